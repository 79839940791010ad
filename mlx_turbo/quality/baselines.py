"""The caches that ours are compared with: mlx-lm's plain cache, its QuantizedKVCache as mlx8 and mlx4, and any other by
the import path of a factory; each also with the exact tokens that ours keep."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..cache.masks import attention_mask
from ..integration.prompt_cache import flatten_caches

MLX_LM_BITS = {"mlx8": 8, "mlx4": 4}
MLX_LM_GROUP_SIZE = 64  # numbers that share a scale in mlx-lm's QuantizedKVCache, its default
CONTRACT = "factory(model) returns new caches, one per layer, each with update_and_fetch and offset as in mlx-lm"


def make_plain_cache(model: Any) -> list[Any]:
    """mlx-lm's own prompt cache for `model`, uncompressed."""
    from mlx_lm.models.cache import make_prompt_cache

    return make_prompt_cache(model)


def make_quantized_cache(model: Any, name: str) -> list[Any]:
    """A prompt cache of QuantizedKVCache for `model`. name: a key of MLX_LM_BITS."""
    from mlx_lm.models.cache import QuantizedKVCache

    return [QuantizedKVCache(MLX_LM_GROUP_SIZE, MLX_LM_BITS[name]) for _ in model.layers]


class NotOnThisDevice(RuntimeError):
    """What MLX cannot compute on a device. It is tried nowhere: it may end the process."""


def on_cuda() -> bool:
    """Whether MLX computes on an NVIDIA GPU now."""
    return mx.cuda.is_available() and mx.default_device() == mx.gpu


def check_products() -> None:
    """Raise NotOnThisDevice where mlx-lm's QuantizedKVCache cannot be attended to."""
    if on_cuda():
        raise NotOnThisDevice(
            "mlx-lm's QuantizedKVCache does not run on CUDA: there, mx.quantized_matmul lacks some of the shapes, and "
            "reads outside its memory in others (MLX 0.32.4)"
        )


def why_not_quantized(model: Any, with_exact: bool = False) -> str | None:
    """Why mlx-lm's QuantizedKVCache cannot serve this model here, or None. with_exact: inside an `ExactEndsCache`,
    which needs no products with it. Reads a token."""
    from mlx_lm.models.cache import KVCache

    caches = make_plain_cache(model)
    if others := sorted({type(c).__name__ for c in caches} - {KVCache.__name__}):
        return f"mlx-lm quantizes only models whose caches are all plain KVCaches, and this one has {', '.join(others)}"
    mx.eval(model(mx.array([[0]]), cache=caches))
    dims = sorted({a.shape[-1] for c in caches for a in (c.keys, c.values)})
    if wrong := [d for d in dims if d % MLX_LM_GROUP_SIZE]:
        return f"mlx-lm quantizes in groups of {MLX_LM_GROUP_SIZE}, and head_dim {wrong[0]} is not a multiple of that"
    try:
        check_products()
    except NotOnThisDevice as e:
        return None if with_exact else str(e)
    return None


# ---- any other cache -----------------------------------------------------------------------------------------
def import_factory(path: str) -> Callable[[Any], Any]:
    """The function "package.module:name", which makes a prompt cache for a model (CONTRACT). The working directory is
    searched for it too.

    Raises ValueError that says what is missing.
    """
    module_name, _, name = path.partition(":")
    if not module_name or not name.isidentifier():
        raise ValueError(f"got {path!r}, expected package.module:factory; {CONTRACT}")
    here = str(Path.cwd())
    sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except Exception as e:  # whatever a foreign module raises
        raise ValueError(f"cannot import {module_name!r} of {path!r}: {type(e).__name__}: {e}") from e
    finally:
        sys.path.remove(here)
    factory = getattr(module, name, None)
    if not callable(factory):
        state = "is not a function" if hasattr(module, name) else "does not exist"
        raise ValueError(f"{name!r} in {module_name!r} {state}; {CONTRACT}")
    return factory


def make_foreign_cache(model: Any, factory: Callable[[Any], Any], path: str) -> list[Any]:
    """What a factory makes for `model`, checked. Raises ValueError that says which part of CONTRACT it breaks."""
    try:
        caches, n_layers = factory(model), len(make_plain_cache(model))
    except Exception as e:  # whatever foreign code raises
        raise ValueError(f"{path} raised {type(e).__name__}: {e}") from e
    if not isinstance(caches, (list, tuple)) or len(caches) != n_layers:
        got = f"{len(caches)} caches" if isinstance(caches, (list, tuple)) else type(caches).__name__
        raise ValueError(f"{path} returned {got} for a model with {n_layers} layers; {CONTRACT}")
    for i, cache in enumerate(caches):
        for member in flatten_caches([cache]):
            if missing := [name for name in ("update_and_fetch", "offset") if not hasattr(member, name)]:
                what = f"{type(member).__name__} of layer {i} has no {' and no '.join(missing)}"
                raise ValueError(f"{path}: {what}; {CONTRACT}")
            if member.offset != 0:
                raise ValueError(f"{path}: layer {i} already holds {member.offset} tokens; {CONTRACT}")
    return list(caches)


# ---- with the same exact tokens as ours ----------------------------------------------------------------------
def keep_exact(model: Any, caches: list[Any], sink: int, recent: int, block: int) -> list[Any]:
    """A prompt cache in which each layer that has a plain KVCache in mlx-lm keeps exact tokens as a TurboKVCache does,
    and packs the others with its cache of `caches`."""
    from mlx_lm.models.cache import KVCache

    plain = make_plain_cache(model)
    return [ExactEndsCache(c, sink, recent, block) if type(p) is KVCache else c for c, p in zip(caches, plain)]


Pair = tuple[mx.array, mx.array]  # keys and values [B, n_kv_heads, tokens, D]


class ExactEndsCache:
    """A cache of one layer that keeps its ends exact and hands all other tokens to another cache.

        [ sink: exact ] [ those in `packed` ] [ recent: exact ]

    packed: any cache whose `update_and_fetch` returns keys and values [B, n_kv_heads, tokens, D] of all its tokens, or
    mlx-lm's QuantizedKVCache. sink, recent, block: as in TurboConfig; the same tokens are exact at every step as in a
    TurboKVCache. For measuring quality: what `packed` returned is kept, and not counted in nbytes.
    """

    def __init__(self, packed: Any, sink: int, recent: int, block: int) -> None:
        self.packed, self.n_sink, self.n_recent, self.block = packed, sink, recent, block
        self._parts: list[Pair | None] = [None, None, None]  # sink, packed, recent

    @property
    def offset(self) -> int:
        """Number of tokens in the cache."""
        return sum(map(_length, self._parts))

    @property
    def nbytes(self) -> int:
        """Bytes of the packed tokens and of buffers for all exact ones."""
        exact = self._parts[2] or self._parts[0]
        per_token = sum(x.nbytes // x.shape[2] for x in exact) if exact else 0
        return self.packed.nbytes + (self.n_sink + self.n_recent + self.block) * per_token

    def make_mask(self, N: int, *, return_array: bool = False, window_size: int | None = None) -> Any:
        """As TurboKVCache.make_mask."""
        return attention_mask(N, self.offset, return_array, window_size)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Pair:
        """Append keys and values [B, n_kv_heads, L, D] and return all tokens, the packed ones restored."""
        new: Pair | None = (keys, values)
        sink, packed, recent = self._parts
        n_to_sink = min(self.n_sink - _length(sink), keys.shape[2])
        if n_to_sink:
            sink, new = _joined(sink, _cut(new, 0, n_to_sink)), _cut(new, n_to_sink, keys.shape[2])
        everything = _joined(recent, new)
        if _length(everything) > self.n_recent + self.block:
            is_chunk = _length(new) > self.block
            is_exact = is_chunk or packed is None  # attended exactly, then packed
            n_pack = _length(everything if is_chunk else recent) - self.n_recent
            recent = _cut(everything, n_pack, _length(everything))
            before, packed = packed, self._pack(packed, _cut(everything, 0, n_pack))
            self._parts = [sink, packed, recent]
            return _all([sink, before, everything] if is_exact else self._parts)
        self._parts = [sink, packed, everything]
        return _all(self._parts)

    def _pack(self, packed: Pair | None, tokens: Pair | None) -> Pair | None:
        if tokens is None:
            return packed
        keys, values = self.packed.update_and_fetch(*tokens)
        return self._restored(keys, tokens[0]), self._restored(values, tokens[1])

    def _restored(self, side: Any, like: mx.array) -> mx.array:
        if isinstance(side, (list, tuple)) and len(side) == 3 and hasattr(self.packed, "group_size"):
            codes, scales, biases = side
            side = mx.dequantize(codes, scales, biases, self.packed.group_size, self.packed.bits)
        if not isinstance(side, mx.array) or side.ndim != 4 or side.shape[2] != self.packed.offset:
            got = getattr(side, "shape", type(side).__name__)
            raise ValueError(
                f"{type(self.packed).__name__}.update_and_fetch returned {got}; to keep tokens exact around it, it "
                f"must return arrays [batch, n_kv_heads, {self.packed.offset}, head_dim] of all its tokens"
            )
        return side.astype(like.dtype)


def _length(part: Pair | None) -> int:
    return part[0].shape[2] if part else 0


def _cut(part: Pair | None, start: int, stop: int) -> Pair | None:
    return (part[0][:, :, start:stop], part[1][:, :, start:stop]) if part and stop > start else None


def _joined(a: Pair | None, b: Pair | None) -> Pair | None:
    if not a or not b:
        return a or b
    return mx.concatenate([a[0], b[0]], axis=2), mx.concatenate([a[1], b[1]], axis=2)


def _all(parts: list[Pair | None]) -> Pair:
    found = [part for part in parts if part]
    return mx.concatenate([k for k, _ in found], axis=2), mx.concatenate([v for _, v in found], axis=2)
