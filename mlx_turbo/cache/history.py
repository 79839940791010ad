"""`keys`, `values` and `offset` under mlx-lm's names, for programs that know a cache by these: all tokens, restored,
and what setting them means. What is set either has the effect that it has on mlx-lm's KVCache, or is an error.
"""

import sys
from typing import Any, Optional

import mlx.core as mx
import numpy as np

from .packing import quantize_tokens, write
from .view import plain

NAMES = "keys", "values"


class History(mx.array):
    """What `cache.keys` (side 0) or `cache.values` (1) gave: an ordinary array, but what is written into it is set in
    the cache too, as in mlx-lm's, whose array is the cache's own. Raises ValueError where it cannot be set, or once the
    cache has changed."""

    def __init__(self, array: mx.array, cache: Any, side: int) -> None:
        super().__init__(array)
        self.cache, self.side, self.version = cache, side, cache.version

    def __setitem__(self, where: Any, value: Any) -> None:
        name = NAMES[self.side]
        if self.cache.version != self.version:
            raise ValueError(f"{name}: the cache has changed since this array was read from it; read {name} again")
        new = self[:]
        new[where] = value
        setattr(self.cache, name, new)
        super().__setitem__(where, value)
        self.version = self.cache.version

    def __reduce_ex__(self, protocol: Any) -> Any:
        return plain, (self[:],)  # pickled, it is a plain array


def ties(depth: int = 2) -> bool:
    """Whether the code that reads or sets `keys` is a model file of mlx-lm. These only tie a cache's update to another
    computation, `cache.keys = mx.depends(cache.keys, x)`, some of them in every layer and step: that is done on the
    buffer of recent tokens and restores nothing."""
    name = sys._getframe(depth).f_globals.get("__name__", "")
    return name.startswith("mlx_lm.models.") and name != "mlx_lm.models.cache"


def assign(cache: Any, i: int, tokens: Optional[mx.array]) -> None:
    """Set keys (i = 0) or values (1) of a TurboKVCache to tokens [B, n_kv_heads, n, D], n <= offset: the cache is
    trimmed to n tokens, and those that differ from what it holds take their place. None empties it.

    Packed tokens that stay the same keep their bits; others are quantized. Raises TypeError or ValueError, with the
    cache unchanged, for anything else than such an array.
    """
    if tokens is None:
        set_offset(cache, 0)
        return
    name, held = NAMES[i], cache.offset
    if not cache.is_trimmable():
        raise ValueError(f"{name}: cannot be set in a full window, of which only the newest tokens are held")
    if not isinstance(tokens, mx.array):
        raise TypeError(f"{name}: got {type(tokens).__name__}, expected an mx.array or None")
    if not held:
        raise ValueError(f"{name}: the cache is empty; update_and_fetch(keys, values) gives it tokens")
    like, n = cache._sides[i].recent, tokens.shape[2] if tokens.ndim == 4 else -1
    if tokens.dtype != like.dtype or not 0 <= n <= held or tokens.shape != (*like.shape[:2], n, like.shape[3]):
        raise ValueError(
            f"{name}: got {tokens.dtype} {tuple(tokens.shape)}, expected {like.dtype} "
            f"{(*like.shape[:2], held, like.shape[3])} or fewer tokens; update_and_fetch(keys, values) appends"
        )
    set_offset(cache, n)
    if n and cache._sides[i].in_one:
        cache._sides[i].recent = None
        cache.write_in_one(cache._sides[i], 0, tokens)
        cache.version += 1
    elif n:
        _replace(cache, i, tokens)


def _replace(cache, i, tokens):
    """As many tokens as the cache holds, in the place of its own."""
    config, side, counts = cache.config, cache._sides[i], (cache.n_sink, cache.n_packed, cache.n_recent)
    n_sink, n_packed, _ = counts
    sink, packed, recent = mx.split(tokens, [n_sink, n_sink + n_packed], axis=2)
    if n_packed and side.bits:
        held = cache._view((0, n_packed, 0)).restore()[i]
        same = (packed == held).all(-1, keepdims=True)
        ((codes, scale),) = quantize_tokens([packed], [side.to_pack(side.means)], [side.means], 0, config)
        codes, scale = (mx.where(same, a[:, :, :n_packed], b) for a, b in ((side.codes, codes), (side.scale, scale)))
        side.codes, side.scale = (write(None, 0, a, cache.step) for a in (codes, scale))
    elif n_packed:
        side.codes = write(None, 0, packed, cache.step)
    if n_sink:
        side.sink = write(None, 0, sink, config.sink)
    side.recent = write(None, 0, recent, config.recent + config.block)
    cache._unread.clear()
    cache.version += 1


def set_offset(cache: Any, n: int) -> None:
    """Trim a cache to its first n tokens. Raises ValueError, with the cache unchanged, if it has fewer, or is a window
    that has evicted some."""
    held, lowest = cache.offset, 0 if cache.is_trimmable() else cache.offset
    if not isinstance(n, (int, np.integer)) or not lowest <= n <= held:
        allowed = f"0 to {held}" if not lowest else f"{held}, as a full window cannot go back"
        raise ValueError(f"offset: got {n!r}, allowed is {allowed}; update_and_fetch(keys, values) appends")
    cache.trim(held - n)
