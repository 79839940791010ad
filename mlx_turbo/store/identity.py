"""What a stored block belongs to: which model computed it, and which tokens stand before it.

The model: the values of its `args`, and of each parameter (adapters' too) the name, shape, dtype and up to SAMPLE
numbers, evenly spread. Models that differ in an adapter, in quantization or by training differ in nearly all of their
numbers. What is not seen: a change of a few numbers in a large array, and code.

The tokens: keyed hashes, each over the one before it, with a secret that lies in the store's folder. Neither a text nor
its length can be guessed from a hash without it.
"""

import hashlib
import json
import weakref
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ..integration.libraries import library_of
from .raw import to_raw

SAMPLE = 1024  # numbers of a parameter

_known: dict[int, tuple[Any, list[Any], str]] = {}  # id of a model: (it, its arrays, all weak; its identity)


def identity_of(model: Any) -> str:
    """The identity of a loaded model, 32 hex digits. Taken anew when an array of the model is replaced."""
    arrays = _arrays_of(model)
    seen = _known.get(id(model))
    if seen and seen[0]() is model and len(seen[1]) == len(arrays):
        if all(ref() is array for ref, array in zip(seen[1], arrays.values())):
            return seen[2]
    samples = {name: _sample(array) for name, array in arrays.items()}
    mx.eval(list(samples.values()))
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([library_of(model), _plain(getattr(model, "args", None))], sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {tuple(array.shape)} {array.dtype}\n".encode())
        digest.update(to_raw(samples[name]).tobytes())
    dead = [key for key, (ref, _, _) in _known.items() if ref() is None]
    for key in dead:
        del _known[key]
    _known[id(model)] = weakref.ref(model), [weakref.ref(array) for array in arrays.values()], digest.hexdigest()
    return digest.hexdigest()


def label_of(model: Any) -> str:
    """A model in words, for lists: its type and number of parameters."""
    n = sum(array.size for array in _arrays_of(model).values())
    kind = getattr(model, "model_type", None) or getattr(getattr(model, "args", None), "model_type", None)
    return f"{kind or type(model).__name__}, {n / 1e6:,.1f}M numbers"


def _arrays_of(model: Any) -> dict[str, mx.array]:
    flat: Any = tree_flatten(model.parameters())
    return dict(flat)


def _sample(array: mx.array) -> mx.array:
    flat = array.reshape(-1)
    return flat[:: max(-(-flat.size // SAMPLE), 1)]


def _plain(value: Any) -> Any:
    """A model's arguments as JSON has them; what else there is by its type."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return {type(value).__name__: _plain(vars(value)) if hasattr(value, "__dict__") else None}


# ---- tokens ----------------------------------------------------------------------------------------------------------
def keyed(key: bytes, *parts: Any) -> str:
    """32 hex digits that nobody can compute without the key; each part by its length, so that none runs into the
    next."""
    digest = hashlib.blake2b(key=key, digest_size=16)
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def first_hash(key: bytes, model: str, first: int) -> str:
    """What every sequence of a model whose blocks begin after `first` tokens starts from."""
    return keyed(key, "first", model, first)


def next_hash(key: bytes, before: str, tokens: np.ndarray) -> str:
    """The hash of a block: of its tokens, int64, and of all before them."""
    return keyed(key, "block", before, tokens.tobytes())


def end_hash(key: bytes, before: str, tokens: np.ndarray) -> str:
    """The hash of a cut: of the tokens after the last block, int64, and of all before them."""
    return keyed(key, "end", before, tokens.tobytes())


def as_tokens(tokens: Sequence[int]) -> np.ndarray:
    """Tokens as int64 [n]. Raises ValueError unless they are whole numbers in one row."""
    array = np.array(tokens)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(
            f"tokens: got {array.dtype} of shape {array.shape}, expected whole numbers in one row, [n_tokens]"
        )
    return np.ascontiguousarray(array, dtype=np.int64)
