"""The tokens of a cache as ordinary arrays: exact ones as they are, packed ones restored."""

import mlx.core as mx

from .rotate import unrotate

SLICE_VALUES = 1 << 18  # numbers restored at a time where MLX operations do it


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
    dtype = side.exact_dtype(mx.float32)
    parts = [side.sink[:, :, :n_sink]] if n_sink else []
    if n_packed > first and not side.bits:
        parts.append(side.codes[:, :, first:n_packed])
    elif n_packed > first:
        batch, n_kv_heads = side.codes.shape[:2]
        step = n_packed if backend.tiles_ahead else max(SLICE_VALUES // (batch * n_kv_heads * side.head_dim), 64)
        for at in range(first, n_packed, step):
            parts.append(_restore_packed(side, at, min(step, n_packed - at), backend, seed, dtype))
            if step < n_packed - first:
                mx.eval(parts[-1])  # one after the other: MLX would hold several float32 copies of all at once
    parts += [side.recent[:, :, :n_recent]] if n_recent else []
    return mx.concatenate(parts, axis=2)


def _restore_packed(side, first, n, backend, seed, dtype):
    if side.means is None:
        return backend.dequantize([side.packed()], first, n, dtype, seed)[0]
    (x,) = backend.dequantize([side.packed()], first, n, mx.float32, seed)
    segments = mx.arange(first, first + n) // side.segment
    return (x + unrotate(side.means, seed)[:, :, segments]).astype(dtype)
