"""The text of metal/*.metal and of cuda/prelude.cuh, as it is handed to MLX."""

import functools
import re
from pathlib import Path

from .sides import BackendError

BODY_MARKER = "// ==== body\n"
BEHIND = {"requantize": ("dequantize", "quantize")}  # files whose headers a kernel uses, besides shared.metal


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
    """(header, body) of metal/<name>.metal, with shared.metal and the headers that it uses (BEHIND) in front, without
    comments and blank lines."""
    files = {file: (metal_folder() / f"{file}.metal").read_text() for file in ("shared", *BEHIND.get(name, ()), name)}
    headers = [text.split(BODY_MARKER)[0] for text in files.values()]
    return _without_comments("".join(headers)), _without_comments(files[name].split(BODY_MARKER)[1])


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
