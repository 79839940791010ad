"""Causal masks, as mlx-lm's caches make them (models/base.py and models/cache.py there)."""

from typing import Optional, Union

import mlx.core as mx


def causal_mask(N: int, offset: int = 0, window_size: Optional[int] = None) -> mx.array:
    """Bool [N, offset + N], True where one of N queries, after `offset` tokens, sees a token: itself and those before
    it, window_size in all if that is given."""
    keys = mx.arange(offset + N)[None]
    queries = mx.arange(offset, offset + N)[:, None]
    mask = queries >= keys
    return mask if window_size is None else mask & (queries < keys + window_size)


def windows_mask(N: int, offset: int, keep: int, window: int, window_size: Optional[int] = None) -> mx.array:
    """Bool [N, offset + N], True where one of N queries, after `offset` tokens, sees a token: the first `keep` ones and
    the newest `window` up to itself; window_size: of all these, only so many of the newest."""
    mask = causal_mask(N, offset, window)
    if keep:
        mask = mask | (causal_mask(N, offset) & (mx.arange(offset + N) < keep))
    return mask if window_size is None else mask & causal_mask(N, offset, window_size)


def attention_mask(
    N: int, offset: int, return_array: bool = False, window_size: Optional[int] = None
) -> Union[mx.array, str, None]:
    """What a model passes to attention for N queries after `offset` tokens: None for a single query, "causal", or, with
    return_array or a window, the `causal_mask`."""
    if window_size is not None or (return_array and N > 1):
        return causal_mask(N, offset, window_size)
    return None if N == 1 else "causal"
