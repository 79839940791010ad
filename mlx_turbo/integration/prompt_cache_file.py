"""Prompt caches in files: mlx-lm's safetensors files with a checksum, so that a damaged file is always an error.

The file is what mlx_lm.models.cache.save_prompt_cache writes: the `state` of every layer, whose header (cache/state.py)
holds the version of that format, the scheme and the head dims. Its metadata has one more entry, `mlx_turbo`: a version
and the CRC-32 of the whole file, computed with eight zeros in place of the checksum. Once mlx_turbo is in use, mlx-lm
reads such a file like any other; without it, mlx-lm does not know the class of the first compressed layer, and the
KeyError that it raises gives the name that stands there, `FOREIGN_NAME`, which says what to do. A file without the
entry is read here without the check. The checksum is not part of `state`, because mlx-lm evaluates that after every
prompt chunk.
"""

import inspect
import json
import os
import re
import uuid
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
from mlx.utils import tree_flatten

from ..cache.single import TurboKVCache
from .prompt_cache import FOREIGN_NAME, flatten_caches, patch_mlx_lm

FILE_VERSION = 1
MARK = "mlx_turbo"  # the entry of the metadata
_ENTRY = re.compile(rb'"[01]\.mlx_turbo":"version=(\d+) crc32=([0-9a-f]{8})"')  # as it stands in the file's header
_SIZES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
    "C64": 8,
}
MOST_HEADER = 100_000_000  # bytes, as in the safetensors library
PIECE = 1 << 24  # bytes read at a time


def save_prompt_cache(file_name: str | Path, cache: list[Any], metadata: dict[str, str] | None = None) -> None:
    """Write a prompt cache as mlx_lm.models.cache.save_prompt_cache does, with a checksum. mlx-lm's own caches may be
    among its layers.

    file_name: ".safetensors" is appended if missing. metadata: {str: str}. The file is written under a temporary name
    next to its place and then renamed, so it appears whole or not at all; of several threads or processes that write
    one file, the last one to finish wins.

    Raises ValueError for an entry "mlx_turbo" in the metadata, and OSError or RuntimeError if it cannot be written.
    """
    module = patch_mlx_lm()
    if MARK in (metadata or {}):
        raise ValueError(f"metadata: {MARK!r} is reserved for the checksum; use another name")
    path = Path(file_name)
    path = path if path.suffix == ".safetensors" else path.with_name(path.name + ".safetensors")
    temporary = path.with_name(f".mlx_turbo-{uuid.uuid4().hex}.safetensors")
    try:
        entry = {MARK: f"version={FILE_VERSION} crc32={0:08x}"}
        module.save_prompt_cache(str(temporary), _named_for_others(cache), {**(metadata or {}), **entry})
        with open(temporary, "r+b") as file:
            found = _ENTRY.search(_read_header(file))
            assert found is not None  # written just above
            at = 8 + found.start(2)
            checksum = _checksum(file, at)
            file.seek(at)
            file.write(f"{checksum:08x}".encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _named_for_others(prompt_cache: list[Any]) -> list[Any]:
    """The same caches, the first one of ours under the name that tells a program without mlx_turbo what to do."""
    for i, cache in enumerate(prompt_cache):
        if any(isinstance(c, TurboKVCache) for c in flatten_caches([cache])):
            own = {"__getattr__": lambda _, name: getattr(cache, name)}
            return [*prompt_cache[:i], type(FOREIGN_NAME + type(cache).__name__, (), own)(), *prompt_cache[i + 1 :]]
    return prompt_cache


def load_prompt_cache(file_name: str | Path, return_metadata: bool = False) -> Any:
    """A prompt cache from a file written by `save_prompt_cache`, or by mlx-lm's function of that name (no checksum).

    Returns the list of caches, evaluated; with return_metadata, (caches, metadata). Raises OSError if the file cannot
    be read, and ValueError, naming the file, if it is damaged, not a prompt cache, or of a newer version.
    """
    return load_with(patch_mlx_lm().load_prompt_cache, file_name, return_metadata)


def load_with(load: Callable[..., Any], file_name: str | Path, return_metadata: bool = False) -> Any:
    """`load_prompt_cache` through `load`, which is mlx_lm.models.cache.load_prompt_cache."""
    module = patch_mlx_lm()
    try:
        with open(file_name, "rb") as file:
            _check(file, module)
        cache, metadata = load(str(file_name), return_metadata=True)
        mx.eval([a for c in cache for a in dict(tree_flatten(c.state)).values() if isinstance(a, mx.array)])
    except OSError:
        raise
    except Exception as e:  # whatever a file without a checksum makes mlx-lm raise
        raise ValueError(f"{str(file_name)!r}: {e if isinstance(e, ValueError) else f'{type(e).__name__}: {e}'}") from e
    metadata.pop(MARK, None)
    return (cache, metadata) if return_metadata else cache


def _read_header(file: BinaryIO) -> bytes:
    """The JSON text of a safetensors file. Raises ValueError if there is none."""
    n_file = file.seek(0, os.SEEK_END)
    file.seek(0)
    n_header = int.from_bytes(file.read(8), "little")
    if n_file < 8 or not 2 <= n_header <= min(n_file - 8, MOST_HEADER):
        raise ValueError(f"not a safetensors file, or truncated ({n_file} bytes)")
    return file.read(n_header)


def _checksum(file: BinaryIO, at: int) -> int:
    """CRC-32 of a file with zeros in place of the eight digits at byte `at`."""
    file.seek(0)
    crc = zlib.crc32(b"0" * 8, zlib.crc32(file.read(at)))
    file.seek(at + 8)
    while piece := file.read(PIECE):
        crc = zlib.crc32(piece, crc)
    return crc


def _check(file: BinaryIO, module: Any) -> None:
    """Raise ValueError unless an open file is a complete prompt cache that this version reads."""
    text = _read_header(file)
    found = _ENTRY.search(text)
    if found:
        version, want = int(found[1]), int(found[2], 16)
        if version != FILE_VERSION:
            raise ValueError(
                f"written in version {version} of the file format, but this mlx_turbo reads version {FILE_VERSION}"
            )
        got = _checksum(file, 8 + found.start(2))
        if got != want:
            raise ValueError(f"damaged: its CRC-32 is {got:08x}, expected {want:08x}")
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", {})
        tensors = {name: (t["dtype"], t["shape"], t["data_offsets"]) for name, t in header.items()}
        _check_tensors(tensors, file.seek(0, os.SEEK_END) - 8 - len(text))
    except (AttributeError, KeyError, TypeError, UnicodeDecodeError, RecursionError, json.JSONDecodeError) as e:
        raise ValueError(f"its safetensors header is invalid ({type(e).__name__}: {e})") from e
    if found is None and any(f"{i}.{MARK}" in metadata for i in (0, 1)):
        raise ValueError(f"damaged: its entry {MARK!r} cannot be read")
    _check_classes(metadata, tensors, module)


def _check_tensors(tensors: dict[str, Any], n_data: int) -> None:
    """The arrays must fill the file: MLX reads them lazily, and a read past the end would kill the process."""
    end = 0
    for name, (dtype, shape, (first, last)) in sorted(tensors.items(), key=lambda item: item[1][2]):
        size = _SIZES[dtype]
        for n in shape:
            size *= n
        if not all(isinstance(n, int) and n >= 0 for n in shape) or first != end or last - first != size:
            raise ValueError(
                f"damaged: array {name!r} has {last - first} bytes at offset {first}, expected {size} at offset {end}"
            )
        end = last
    if end != n_data:
        raise ValueError(f"truncated or damaged: its arrays take {end} bytes, but the file has {n_data}")


def _check_classes(metadata: dict[str, str], tensors: dict[str, Any], module: Any) -> None:
    """Each layer's class must be one that mlx-lm or we can restore, with a matching state."""
    part, own_part = "1" if metadata.get("2.0") == "" else "2", "1"  # which holds the class names; mlx-lm 0.31: 2
    if "meta_state" in inspect.signature(module.KVCache.from_state).parameters:
        own_part = "2"
    classes = {key[2:]: name for key, name in metadata.items() if re.fullmatch(rf"{part}\.\d+", key)}
    if not classes:
        raise ValueError("not a prompt cache: its metadata names no cache classes")
    for layer, name in classes.items():
        found = getattr(module, name, None)
        if (
            not isinstance(found, type)
            or not hasattr(found, "from_state")
            or not (found.__module__ == module.__name__ or found.__module__.startswith("mlx_turbo."))
        ):
            raise ValueError(f"holds a cache of class {name!r}, which the installed mlx-lm does not have")
        name = found.__name__
        dtype, shape, _ = tensors.get(f"{layer}.0", (None, [], None))
        if issubclass(found, TurboKVCache) != (dtype == "I32" and len(shape) == 1):
            raise ValueError(f"damaged: layer {layer} is not the state of a {name}")
    if part != own_part:
        writer = "0.31" if part == "2" else "0.32 or newer"
        raise ValueError(f"written by mlx-lm {writer}, whose files the installed mlx-lm does not read")
