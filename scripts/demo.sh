#!/usr/bin/env bash
# A story from the embedded model, with a compressed cache.  Further arguments go to `mlx-turbo generate`:
#
#   bash scripts/demo.sh --prompt "One day, a cat" --max-tokens 100
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
ensure_venv "."
exec "$venv/bin/mlx-turbo" generate --prompt "Once upon a time" --max-tokens 400 "$@"
