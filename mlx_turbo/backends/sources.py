"""The text of metal/*.metal, as it is handed to MLX."""

import functools
import re
from pathlib import Path

from .sides import BackendError

BODY_MARKER = "// ==== body\n"


def metal_folder() -> Path:
    """Where the .metal files are: inside the installed package, or beside it in a checkout.

    Raises BackendError if they are in neither place.
    """
    for folder in (Path(__file__).parents[1] / "metal", Path(__file__).parents[2] / "metal"):
        if (folder / "quantize.metal").is_file():
            return folder
    raise BackendError(
        f"no metal/quantize.metal in {Path(__file__).parents[1]} or beside it: the installation is incomplete"
    )


@functools.lru_cache(maxsize=None)
def metal_source(name: str) -> tuple[str, str]:
    """(header, body) of metal/<name>.metal, with shared.metal in front and without comments and blank lines."""
    header, body = (metal_folder() / f"{name}.metal").read_text().split(BODY_MARKER)
    return _without_comments((metal_folder() / "shared.metal").read_text() + header), _without_comments(body)


def _without_comments(text: str) -> str:
    """The text that is compiled: MLX hashes it at every launch, and half of it is comments and spaces."""
    lines = (re.sub(r"\s*//.*", "", line) for line in text.splitlines())
    return "".join(f"{line.strip()}\n" for line in lines if line.strip())
