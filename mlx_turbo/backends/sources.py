"""The text of metal/*.metal and of cuda/prelude.cuh, as it is handed to MLX."""

import functools
import re
from pathlib import Path

from .sides import BackendError

BODY_MARKER = "// ==== body\n"


def metal_folder() -> Path:
    """Where the .metal files are. Raises BackendError if they are nowhere."""
    return _folder("metal/quantize.metal")


def _folder(file: str) -> Path:
    """The folder of a file: inside the installed package, or beside it in a checkout."""
    for place in Path(__file__).parents[1:3]:
        if (place / file).is_file():
            return (place / file).parent
    raise BackendError(f"no {file} in {Path(__file__).parents[1]} or beside it: the installation is incomplete")


@functools.lru_cache(maxsize=None)
def metal_source(name: str) -> tuple[str, str]:
    """(header, body) of metal/<name>.metal, with shared.metal in front and without comments and blank lines."""
    header, body = (metal_folder() / f"{name}.metal").read_text().split(BODY_MARKER)
    return _without_comments((metal_folder() / "shared.metal").read_text() + header), _without_comments(body)


@functools.lru_cache(maxsize=None)
def cuda_prelude() -> tuple[str, str]:
    """(what stands in front of a header in CUDA, in front of a body), without comments and blank lines.

    Raises BackendError if the file is nowhere."""
    header, body = (_folder("cuda/prelude.cuh") / "prelude.cuh").read_text().split(BODY_MARKER)
    return _without_comments(header), _without_comments(body)


def _without_comments(text: str) -> str:
    """The text that is compiled: MLX hashes it at every launch, and half of it is comments and spaces."""
    lines = (re.sub(r"\s*//.*", "", line) for line in text.splitlines())
    return "".join(f"{line.strip()}\n" for line in lines if line.strip())
