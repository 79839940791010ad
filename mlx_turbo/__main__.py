"""python -m mlx_turbo: the command `mlx-turbo`."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
