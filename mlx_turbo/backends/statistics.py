"""What the means of keys and values are made of: how tokens lie in segments, which vectors count, and their sums in MLX
operations: what statistics.metal does, for any device."""

import functools
from typing import Any

import mlx.core as mx

from ..quant.scheme import LARGEST

UNIT = 128  # most tokens that a threadgroup of statistics.metal adds: a longer segment is several of these
SLICE = 1024  # tokens that MLX operations add at a time


def spans(first: int, n: int, segment: int) -> tuple[int, int, int]:
    """How packed tokens first .. first + n - 1 lie in segments: (tokens of a segment begun earlier, whole segments,
    tokens of a last, incomplete segment)."""
    begun = min(-first % segment, n)
    whole = (n - begun) // segment
    return begun, whole, n - begun - whole * segment


@functools.lru_cache(maxsize=64)  # the layers of a model have the same
def lengths(first: int, n: int, segment: int) -> tuple[int, ...]:
    """How many of packed tokens first .. first + n - 1 lie in each segment."""
    begun, whole, rest = spans(first, n, segment)
    return (begun,) * (begun > 0) + (segment,) * whole + (rest,) * (rest > 0)


def without_bad(x: mx.array) -> tuple[mx.array, mx.array]:
    """x float32 [..., D] and its squared norms [..., 1], both 0 for a vector that is not finite or too large: it must
    not affect others through a mean or a decision."""
    energy = mx.square(x).sum(-1, keepdims=True)
    good = energy <= x.shape[-1] * float(LARGEST) ** 2  # not so for NaN
    return mx.where(good, x, 0), mx.where(good, energy, 0)


def in_operations(x: mx.array, first: int, segment: int) -> tuple[mx.array, mx.array]:
    """`select.statistics` in MLX operations. More than SLICE tokens are added slice by slice, and waited for, so
    that no float32 copy of a prompt chunk is made."""
    unit = min(segment, SLICE)
    begun, whole, rest = spans(first if segment == unit else 0, x.shape[2], unit)
    group = SLICE // unit
    pieces = [(begun, 1)] + [(min(group, whole - i) * unit, min(group, whole - i)) for i in range(0, whole, group)]
    at, sums = 0, []
    energy: Any = 0
    for n, n_units in [p for p in [*pieces, (rest, 1)] if p[0]]:
        piece, squares = without_bad(mx.unflatten(x[:, :, at : at + n].astype(mx.float32), 2, (n_units, -1)))
        sums.append(piece.sum(3))
        energy = energy + squares.sum((2, 3, 4), keepdims=True)[..., 0]
        at += n
        if x.shape[2] > SLICE:
            mx.eval(sums[-1], energy)
    total = mx.concatenate(sums, axis=2)
    return total if segment == unit else total.sum(2, keepdims=True), energy
