"""Centering: a mean that is subtracted from keys or values before they are rotated and quantized, and put back exactly.

A scale per vector is proportional to the vector's norm, so a constant part of every key (Qwen2's biases have 30 times
the norm of the rest) drowns the signal. q.k = q.(k - mean) + q.mean holds for every mean, also with attention sinks; so
the choice of means never costs correctness; the nearer they are to the tokens, the smaller the remaining error.

RoPE turns keys with their position, and a constant part with them, so keys get a mean per segment of SEGMENT packed
tokens; values do not turn and get a single mean. Means are stored in float16 and rotated space, as attention needs
them, and the rounded means are what is subtracted.
"""

import functools
import math
from typing import Optional

import mlx.core as mx

from ..backends import select
from ..backends.rotate import rotate, unrotate
from ..backends.sides import ONE_SEGMENT, Balance
from ..backends.statistics import UNIT, lengths
from .joined import Joined, Tokens

SEGMENT = 128  # packed tokens that share a mean of keys: 16 / SEGMENT = 0.125 bits per number where it is used
SHARE = 0.25  # of the energy of a head's tokens that their means must carry; as many bits more in the codes buy 0.16
FEWEST = 64  # tokens needed to decide: the mean of a few neighbors is large in any head


def segment_of(side: int) -> int:
    """Number of packed tokens that share a mean, of keys (side 0) or values (side 1)."""
    return ONE_SEGMENT if side else SEGMENT


def summarize(x: Tokens, first: int, segment: int) -> tuple[mx.array, tuple[int, ...], mx.array]:
    """Of x [B, H, T, D], to become packed tokens first, first + 1, ...: (means by segment float32 [B, H, S, D],
    tokens of each, energy of all [B, H, 1, 1]). Vectors that cannot be packed count as zeros."""
    unit, n_tokens = min(segment, UNIT), lengths(first, x.shape[2], segment)
    whole = x.parts[0].shape[2] // unit * unit if isinstance(x, Joined) and not first else 0
    pieces = [x[:, :, :whole], x[:, :, whole:]] if whole and whole < x.shape[2] else [x[:, :, :]]
    sums, energy = map(list, zip(*(select.statistics(piece, first % unit, unit) for piece in pieces)))
    total = mx.concatenate(sums, axis=2) if len(sums) > 1 else sums[0]
    if segment > unit:  # in the same order, wherever the tokens lie
        total = total.sum(2, keepdims=True)
    return total / _column(n_tokens), n_tokens, sum(energy[1:], energy[0])


@functools.lru_cache(maxsize=64)  # the layers of a model have the same
def _column(numbers: tuple[int, ...]) -> mx.array:
    return mx.array([[n] for n in numbers], mx.float32)


def should_center(means: mx.array, n_tokens: tuple[int, ...], energy: mx.array) -> mx.array:
    """From `summarize`: for each batch row and head, whether the means carry more than SHARE of the energy, apart from
    the share that means of so few tokens have by chance: bool [B, H, 1, 1]. Decided per row and head, so that the other
    rows of a batch do not matter."""
    if sum(n_tokens) < FEWEST:
        return mx.zeros(energy.shape, mx.bool_)
    by_chance = len(n_tokens) / sum(n_tokens)
    carried = (mx.square(means) * _column(n_tokens)).sum((2, 3), keepdims=True)
    return carried > (by_chance + SHARE * (1 - by_chance)) * energy


def stored(means: mx.array, centered: mx.array, seed: int, balance: Optional[Balance] = None) -> mx.array:
    """Means [B, H, S, D] as they are stored: balanced as the tokens are, rotated, float16, 0 where `centered`
    [B, H, 1, 1] is false or they do not fit."""
    means = rotate(means if balance is None else means * balance.factors, seed).astype(mx.float16)
    finite = (mx.abs(means) < math.inf).all(-1, keepdims=True)
    return mx.where(centered & finite, means, mx.zeros_like(means))


def plain(means: mx.array, seed: int, balance: Optional[Balance] = None) -> mx.array:
    """Stored means [B, H, S, D] as vectors to subtract or add, float32."""
    means = unrotate(means, seed)
    return means if balance is None else means / balance.factors
