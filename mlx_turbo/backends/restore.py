"""The tokens of a cache as ordinary arrays: exact ones as they are, packed ones restored."""

import mlx.core as mx

from .rotate import unrotate


def restore(keys, values, counts, backend, seed=0, first=0):
    """Keys and values of a cache, lazily: [B, n_kv_heads, N, D] each, in the dtype of their exact tokens.

    keys, values: `CachedSide`. counts: (n_sink, n_packed, n_recent), the order of the tokens; the first `first` packed
    ones are left out, so N = sum(counts) - first. One launch where the backend has a kernel for both sides.
    """
    together = backend.restore(keys, values, counts, seed, first)
    if together is not None:
        return together
    return [_restore_side(side, counts, backend, seed, first) for side in (keys, values)]


def _restore_side(side, counts, backend, seed, first):
    n_sink, n_packed, n_recent = counts
    parts = [side.sink[:, :, :n_sink]] if n_sink else []
    if n_packed > first and not side.bits:
        parts.append(side.codes[:, :, first:n_packed])
    elif n_packed > first:
        parts.append(_restore_packed(side, first, n_packed - first, backend, seed))
    parts += [side.recent[:, :, :n_recent]] if n_recent else []
    return mx.concatenate(parts, axis=2)


def _restore_packed(side, first, n, backend, seed):
    dtype = side.recent.dtype
    if side.means is None:
        return backend.dequantize([side.packed()], first, n, dtype, seed)[0]
    (x,) = backend.dequantize([side.packed()], first, n, mx.float32, seed)
    segments = mx.arange(first, first + n) // side.segment
    return (x + unrotate(side.means, seed)[:, :, segments]).astype(dtype)
