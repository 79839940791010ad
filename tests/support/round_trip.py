"""Quantize and dequantize against the oracle."""

import mlx.core as mx
import numpy as np
from support.arrays import to_numpy

from mlx_turbo.backends import select
from mlx_turbo.backends.self_test import compare_quantized, compare_vectors, factors_of, reference_rows
from mlx_turbo.backends.sides import PackedSide
from mlx_turbo.quant import reference


def vectors(*shape, dtype=mx.float32, seed=0, scale=1.0):
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * scale).astype(dtype)


def check_round_trip(sides, dtype=mx.float32, seed=0, scale="least-squares"):
    """Codes and scales equal the oracle's; what is restored from them equals what the oracle restores."""
    packed = []
    for side, (codes, scales) in zip(sides, select.quantize_sides(sides, seed, scale=scale)):
        want = reference_rows(side, seed, scale)
        assert compare_quantized(np.array(codes), np.array(scales), want) is None
        packed.append(PackedSide(codes, scales, side.bits, side.x.shape[-1], side.mean, side.balance))
    length = sides[0].x.shape[2]
    for side, x in zip(packed, select.dequantize_sides(packed, 0, length, dtype, seed)):
        mean = None if side.mean is None else np.array(side.mean)
        codes, scales = np.array(side.codes), np.array(side.scale)
        q = reference.from_packed(
            codes, scales, side.bits, side.head_dim, rotation=seed, mean=mean, balance=factors_of(side)
        )
        assert x.dtype == dtype and x.shape == (*side.codes.shape[:3], side.head_dim)
        assert compare_vectors(to_numpy(x), reference.dequantize(q), dtype) is None
