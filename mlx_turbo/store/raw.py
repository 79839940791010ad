"""MLX arrays as bytes and back: NumPy has no bfloat16, so the bits travel as unsigned numbers."""

import functools
import io
import json
import math
from typing import Any

import mlx.core as mx
import numpy as np

_UNSIGNED = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}
_NUMPY = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
DTYPES = {
    name: getattr(mx, name)
    for name in (
        *("bool_", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
        *("float16", "bfloat16", "float32", "complex64"),
    )
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
SLICE = 4096  # rows hashed at a time


def to_raw(array: mx.array) -> np.ndarray:
    """The bits of an array as unsigned numbers, of the same shape; evaluates it. 0-dimensional ones too."""
    if not array.size:
        return np.zeros(array.shape, _NUMPY[array.dtype.size])
    return np.array(mx.contiguous(array).reshape(-1).view(_UNSIGNED[array.dtype.size])).reshape(array.shape)


def from_raw(raw: np.ndarray, dtype: mx.Dtype) -> mx.array:
    """The array of `dtype` whose bits these are. The bytes are copied."""
    if not raw.size:
        return mx.zeros(raw.shape, dtype)
    return mx.array(raw.reshape(-1)).view(dtype).reshape(raw.shape)


def unwritten(nbytes: int) -> tuple[mx.array, np.ndarray]:
    """(an array of uint8 [nbytes], nbytes > 0, that says whatever was in its memory; that memory, to be written into as
    long as nothing else holds the array).

    MLX allocates memory for its arrays itself, and to make one it writes all of it, but for one that it reads from a
    file: this one's file writes nothing.
    """
    array: Any = mx.load(_Untouched(nbytes), format="npy")
    return array, np.frombuffer(array, np.uint8)


class _Untouched(io.BytesIO):
    """A .npy file of which only the header is there."""

    def __init__(self, nbytes: int) -> None:
        super().__init__()
        header = {"descr": "|u1", "fortran_order": False, "shape": (nbytes,)}
        np.lib.format.write_array_header_1_0(self, header)
        self.seek(0)

    def readinto(self, into: Any) -> int:
        super().readinto(into)
        return len(into)


def row_hashes(array: mx.array) -> np.ndarray:
    """Of the bits of array [1, H, n, D], two hashes per token: uint32 [n, 2].

    Sums of the words times odd random numbers, modulo 2^32: computed where the array lies, so that tokens that are
    stored already need not be copied. A change of a single word always shows; others go unseen once in 2^64.
    """
    n = array.shape[2]
    if not array.size:
        return np.zeros((n, 2), np.uint32)
    found = []
    for i in range(0, n, SLICE):
        words = mx.contiguous(array[0, :, i : i + SLICE]).view(_UNSIGNED[min(array.dtype.size, 4)]).astype(mx.uint32)
        weights = _weights(words.shape[0], words.shape[2])
        sums = mx.stack([(words * w).sum((0, 2)) for w in weights], axis=1)
        mx.eval(sums)
        found.append(np.array(sums))
    return np.concatenate(found)


@functools.lru_cache(maxsize=16)
def _weights(n_heads: int, width: int) -> tuple[mx.array, mx.array]:
    drawn = np.random.default_rng(0x6D6C78).integers(0, 2**31, (2, n_heads, 1, width)) * 2 + 1
    first, second = (mx.array(w.astype(np.uint32)) for w in drawn)
    mx.eval(first, second)  # here: another thread cannot evaluate them
    return first, second


# ---- trees -----------------------------------------------------------------------------------------------------------
def join(meta: dict[str, Any], arrays: list[mx.array]) -> bytes:
    """A JSON object and arrays in one piece."""
    described = [[list(a.shape), NAMES[a.dtype]] for a in arrays]
    text = json.dumps({"meta": meta, "arrays": described}).encode()
    return b"".join([len(text).to_bytes(8, "little"), text, *(to_raw(a).tobytes() for a in arrays)])


def split(data: np.ndarray) -> tuple[dict[str, Any], list[mx.array], int]:
    """What `join` put together at the beginning of uint8 data, and how many bytes that takes. Raises ValueError if it
    is not such a piece."""
    try:
        at = 8 + int.from_bytes(data[:8].tobytes(), "little")
        described = json.loads(data[8:at].tobytes())
        arrays = []
        for shape, name in described["arrays"]:
            dtype, n = DTYPES[name], math.prod(shape)
            raw = np.frombuffer(data[at : at + n * dtype.size].tobytes(), _NUMPY[dtype.size], n)
            arrays.append(from_raw(raw.reshape(shape), dtype))
            at += n * dtype.size
        return described["meta"], arrays, at
    except (KeyError, TypeError, UnicodeDecodeError) as e:
        raise ValueError(f"not a piece of a prompt store ({type(e).__name__}: {e})") from e


def to_tree(value: Any, arrays: list[mx.array]) -> Any:
    """A cache's state as JSON has it; its arrays are appended to `arrays`. Raises ValueError for what is neither an
    array, a plain value nor a list of them."""
    if isinstance(value, mx.array):
        arrays.append(value)
        return {"array": len(arrays) - 1}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [to_tree(v, arrays) for v in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise ValueError(f"holds a {type(value).__name__}")


def from_tree(tree: Any, arrays: list[mx.array]) -> Any:
    """What `to_tree` described."""
    ((kind, value),) = tree.items()
    if kind == "array":
        return arrays[value]
    if kind == "value":
        return value
    return {"list": list, "tuple": tuple}[kind](from_tree(v, arrays) for v in value)
