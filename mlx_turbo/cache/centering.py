"""Centering: a mean that is subtracted from keys or values before they are rotated and quantized, and put back exactly.

A scale per vector is proportional to the vector's norm, so a constant part of every key (Qwen2's biases have 30 times
the norm of the rest) drowns the signal. q.k = q.(k - mean) + q.mean holds for every mean, also with attention sinks; so
the choice of means never costs correctness; the nearer they are to the tokens, the smaller the remaining error.

RoPE turns keys with their position, and a constant part with them, so keys get a mean per segment of SEGMENT packed
tokens; values do not turn and get a single mean. Means are stored in float16 and rotated space, as attention needs
them, and the rounded means are what is subtracted.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, Optional

import mlx.core as mx

from ..backends.rotate import rotate, unrotate
from ..backends.sides import ONE_SEGMENT, Balance
from .joined import Tokens

SEGMENT = 128  # packed tokens that share a mean of keys: 16 / SEGMENT = 0.125 bits per number where it is used
SLICE = 1024  # tokens that are summed at a time
LARGEST = 65504  # largest root mean square of a vector that can be packed: scales are float16
SHARE = 0.25  # of the energy of a head's tokens that their means must carry; as many bits more in the codes buy 0.16
FEWEST = 64  # tokens needed to decide: the mean of a few neighbors is large in any head


def segment_of(side: int) -> int:
    """Number of packed tokens that share a mean, of keys (side 0) or values (side 1)."""
    return ONE_SEGMENT if side else SEGMENT


def spans(first: int, n: int, segment: int) -> tuple[int, int, int]:
    """How packed tokens first .. first + n - 1 lie in segments: (tokens of a segment begun earlier, whole segments,
    tokens of a last, incomplete segment)."""
    begun = min(-first % segment, n)
    whole = (n - begun) // segment
    return begun, whole, n - begun - whole * segment


def without_bad(x: mx.array) -> tuple[mx.array, mx.array]:
    """x float32 [..., D] and its squared norms [..., 1], both 0 for a vector that is not finite or too large: it must
    not affect others through a mean or a decision."""
    energy = mx.square(x).sum(-1, keepdims=True)
    good = energy <= x.shape[-1] * float(LARGEST) ** 2  # not so for NaN
    return mx.where(good, x, 0), mx.where(good, energy, 0)


def summarize(x: Tokens, first: int, segment: int, wait: bool = False) -> tuple[mx.array, mx.array, mx.array]:
    """Of x [B, H, T, D], to become packed tokens first, first + 1, ...: (means by segment float32 [B, H, S, D],
    tokens of each float32 [S, 1], energy of all [B, H, 1, 1]). Vectors that cannot be packed count as zeros. More
    than SLICE tokens are summed slice by slice, started here and only with `wait` waited for, so that no float32 copy
    of a prompt chunk is made."""
    unit = min(segment, SLICE)
    begun, whole, rest = spans(first % unit if segment > unit else first, x.shape[2], unit)
    group = SLICE // unit
    pieces = [(begun, 1)] + [(min(group, whole - i) * unit, min(group, whole - i)) for i in range(0, whole, group)]
    at, sums, lengths = 0, [], []
    energy: Any = 0
    for n, n_segments in [p for p in [*pieces, (rest, 1)] if p[0]]:
        piece, squares = without_bad(mx.unflatten(x[:, :, at : at + n].astype(mx.float32), 2, (n_segments, -1)))
        sums.append(piece.sum(3))
        energy = energy + squares.sum((2, 3, 4), keepdims=True)[..., 0]
        lengths += [n // n_segments] * n_segments
        at += n
        if x.shape[2] > SLICE:
            (mx.eval if wait else mx.async_eval)(sums[-1], energy)
    total, n_tokens = mx.concatenate(sums, axis=2), mx.array(lengths, mx.float32)[:, None]
    if segment > unit:
        total, n_tokens = total.sum(2, keepdims=True), n_tokens.sum(0, keepdims=True)
    return total / n_tokens, n_tokens, energy


def should_center(means: mx.array, n_tokens: mx.array, energy: mx.array) -> mx.array:
    """From `summarize`: for each batch row and head, whether the means carry more than SHARE of the energy, apart from
    the share that means of so few tokens have by chance: bool [B, H, 1, 1]. Decided per row and head, so that the other
    rows of a batch do not matter."""
    by_chance = (n_tokens.shape[0] / n_tokens.sum()).astype(mx.float32)
    carried = (n_tokens * mx.square(means)).sum((2, 3), keepdims=True)
    return (carried - by_chance * energy > SHARE * (1 - by_chance) * energy) & (n_tokens.sum() >= FEWEST)


def rows_to_center(decisions: Sequence[mx.array]) -> list[list[bool]]:
    """For each result of `should_center`, whether any head of a batch row is to be centered, by row. Waits, once, for
    everything that these depend on."""
    flags: Any = mx.concatenate([heads.any((1, 2, 3)) for heads in decisions]).tolist() if decisions else []
    edges = list(itertools.accumulate([heads.shape[0] for heads in decisions], initial=0))
    return [flags[a:b] for a, b in zip(edges, edges[1:])]


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
