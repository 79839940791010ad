"""The tokens of a cache as ordinary arrays: exact ones as they are, packed ones restored."""

import mlx.core as mx

from .rotate import unrotate
from .sides import first_tokens

SLICE_VALUES = 1 << 18  # numbers restored at a time where MLX operations do it


def restore(keys, values, counts, backend, seed=0, first=0, packed=None, wait=False, apart=False):
    """Keys and values of a cache, lazily: [B, n_kv_heads, N, D] each, in the dtype of their exact tokens.

    keys, values: `CachedSide`. counts: (n_sink, n_packed, n_recent), the order of the tokens; the first `first` packed
    ones are left out, so N = sum(counts) - first. One launch where the backend has a kernel for both sides. packed:
    the packed tokens, the result for counts (0, n_packed, 0), if they are at hand: then nothing is launched, and
    backend may be None. wait: whether MLX operations restore one slice after the other, each waited for: not lazily,
    and in half the memory. apart: whether reading one side must not compute the other too, as one launch does.
    """
    if packed is None:
        together = None if apart else backend.restore(keys, values, counts, seed, first)
        if together is not None:
            return together
        middle = [_restore_packed(side, first, counts[1], backend, seed, wait) for side in (keys, values)]
    else:
        middle = [[x[:, :, first:] if first else x] for x in packed]
    return [_join(side, parts, counts) for side, parts in zip((keys, values), middle)]


def _join(side, packed, counts):
    n_sink, _, n_recent = counts
    sink = [first_tokens(side.sink, n_sink)] if n_sink else []
    parts = sink + packed + ([first_tokens(side.recent, n_recent)] if n_recent else [])
    return mx.concatenate(parts, axis=2) if len(parts) > 1 else parts[0][:]  # never what the cache writes into


def _restore_packed(side, first, n_packed, backend, seed, wait):
    """Its packed tokens from number `first` on, in parts that follow each other."""
    if n_packed <= first or not side.bits:
        return [side.codes[:, :, first:n_packed]] if n_packed > first else []
    step = n_packed - first
    if wait and not backend.tiles_ahead:
        batch, n_kv_heads = side.codes.shape[:2]
        step = max(SLICE_VALUES // (batch * n_kv_heads * side.head_dim), 64)
    parts = []
    for at in range(first, n_packed, step):
        parts.append(_restore_slice(side, at, min(step, n_packed - at), backend, seed))
        if step < n_packed - first:
            mx.eval(parts[-1])
    return parts


def _restore_slice(side, first, n, backend, seed):
    dtype = side.exact_dtype(mx.float32)
    if side.means is None:
        return backend.dequantize([side.packed()], first, n, dtype, seed)[0]
    (x,) = backend.dequantize([side.packed()], first, n, mx.float32, seed)
    segments, means = mx.arange(first, first + n) // side.segment, unrotate(side.means, seed)
    means = means if side.balance is None else means / side.balance.factors
    return (x + means[:, :, segments]).astype(dtype)
