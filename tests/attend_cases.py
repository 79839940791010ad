"""Caches with known contents for the tests of the attention kernels, and what attention over them must give."""
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_turbo import reference, rotation
from mlx_turbo.kernels import ONE_SEGMENT, CachedSide

POISON = 24  # rows of capacity behind the last token, filled with what must never be read


class Case(NamedTuple):
    """What `attend` takes, and keys and values [B, Hkv, n_tokens, D] float64 as the oracle sees them."""
    queries: mx.array
    keys: CachedSide
    values: CachedSide
    counts: tuple
    scale: float
    restored: tuple


def _buffer(x, dtype, poison=np.nan):
    """[B, H, n + POISON, D] of `dtype`: x and then poison."""
    room = np.full((*x.shape[:2], POISON, x.shape[3]), poison, x.dtype)
    return mx.array(np.concatenate([x, room], 2)).astype(dtype)


def _side(rng, shape, counts, bits, dtype, segment, seed, gain=None):
    batch, heads, dim = shape
    n_sink, n_packed, n_recent = counts
    x = rng.standard_normal((batch, heads, sum(counts), dim))
    if gain is not None:
        x *= gain[:, None]
    x = np.array(mx.array(x.astype(np.float32)).astype(dtype).astype(mx.float32))
    restored = x.astype(np.float64)
    middle, codes, scale, means = slice(n_sink, n_sink + n_packed), None, None, None
    if segment:  # of a side without packed rows they must do nothing
        means = rng.standard_normal((batch, heads, -(-max(n_packed, 1) // segment), dim)).astype(np.float16)
    if n_packed and bits:
        mean = 0
        if segment:
            mean = rotation.unrotate(means.astype(np.float64), seed)[:, :, np.arange(n_packed) // segment]
        packed = reference.quantize(restored[:, :, middle] - mean, bits, rotation=seed)
        restored[:, :, middle] = reference.dequantize(packed) + mean
        codes = _buffer(packed.packed(), mx.uint32, 0xFFFFFFFF)
        scale = _buffer(packed.scale[..., None].astype(np.float16), mx.float16)
    elif n_packed:
        codes = _buffer(x[:, :, middle], dtype)
    sink = _buffer(x[:, :, :n_sink], dtype) if n_sink else None
    recent = _buffer(x[:, :, n_sink + n_packed:], dtype) if n_recent else None
    means = _buffer(means, mx.float16) if segment else None
    return CachedSide(sink, codes, scale, recent, bits, dim, means, segment), restored


def make_case(bits=(4, 4), dims=(128, 128), counts=(4, 150, 33), G=4, Hkv=1, B=1, L=1, dtype=mx.float32, means=False,
              seed=0, rng_seed=0, gain=1.0, segment=128):
    """means: packed tokens are relative to one, of the keys to one for each `segment` of them. gain: the logits grow
    along the sequence up to so many times their usual size."""
    rng = np.random.default_rng(rng_seed)
    growth = None if gain == 1 else np.linspace(0.01, 1, sum(counts))
    keys, k = _side(rng, (B, Hkv, dims[0]), counts, bits[0], dtype, means and segment, seed, growth)
    values, v = _side(rng, (B, Hkv, dims[1]), counts, bits[1], dtype, means and ONE_SEGMENT, seed)
    q = rng.standard_normal((B, L, Hkv * G, dims[0])).astype(np.float32) * 2 * gain
    queries = mx.array(q).astype(dtype).transpose(0, 2, 1, 3)  # as models have them: not row-contiguous
    return Case(queries, keys, values, counts, dims[0] ** -0.5, (k, v))


def expected(case, mask=None, sinks=None):
    """float64 [B, Hq, L, Dv]."""
    q = np.array(case.queries.astype(mx.float32)).astype(np.float64)
    sinks = None if sinks is None else np.array(sinks.astype(mx.float32))
    if mask is not None and not isinstance(mask, str):
        mask = np.array(mask if mask.dtype == mx.bool_ else mask.astype(mx.float32))
    return reference.attention(q, *case.restored, scale=case.scale, mask=mask, sinks=sinks)
