"""Centring: a mean that is subtracted from keys or values before they are rotated and quantized, and put back exactly.

A scale per vector is proportional to the vector's norm, so a constant part of every key (Qwen2's biases have 30 times
the norm of the rest) drowns the signal. q.k = q.(k - mean) + q.mean holds for every mean, also with attention sinks; so
the choice of means costs no correctness, and the nearer they are to the tokens, the less error remains.

Keys turn with their position (RoPE), a constant part turns with them, so they get a mean per segment of SEGMENT packed
tokens; values do not turn and get one. Means are kept in float16 and rotated space, as attention needs them, and the
rounded means are what is subtracted.
"""

import itertools

import mlx.core as mx

from ..backends.rotate import rotate, unrotate
from ..backends.sides import ONE_SEGMENT

SEGMENT = 128  # packed tokens that share a mean of keys: 16 / SEGMENT = 0.125 bits per number where it is used
SLICE = 1024  # tokens that are summed at a time
LARGEST = 65504  # root mean square of a vector that can be packed: float16, as the scales
SHARE = 0.5  # of the energy of a head's tokens that their means must carry; below, what is gained is within the noise
FEWEST = 64  # tokens at hand from which it is told: the mean of a few neighbours is large in any head


def segment_of(side):
    """Packed tokens that share a mean: of keys (side 0), of values (side 1)."""
    return ONE_SEGMENT if side else SEGMENT


def spans(first, n, segment):
    """The packed tokens first .. first + n - 1 by segment: (tokens of a segment begun before, whole segments, tokens of
    a segment that they begin)."""
    begun = min(-first % segment, n)
    whole = (n - begun) // segment
    return begun, whole, n - begun - whole * segment


def without_bad(x):
    """x float32 [..., D] and its squared norms [..., 1], both 0 for a vector that is not finite or too large: it must
    not reach others through a mean or a decision."""
    energy = mx.square(x).sum(-1, keepdims=True)
    good = energy <= x.shape[-1] * float(LARGEST) ** 2  # not so for NaN
    return mx.where(good, x, 0), mx.where(good, energy, 0)


def summarize(x, first, segment):
    """Of x [B, H, T, D], to be packed as tokens first ...: (means by segment float32 [B, H, S, D], tokens of each
    float32 [S, 1], energy of all [B, H, 1, 1]). What cannot be packed counts as zeros. More than a slice of SLICE tokens
    is computed slice by slice, so that no float32 copy of a prompt chunk is made: started here, not waited for."""
    unit = min(segment, SLICE)
    begun, whole, rest = spans(first % unit if segment > unit else first, x.shape[2], unit)
    group = SLICE // unit
    pieces = [(begun, 1)] + [(min(group, whole - i) * unit, min(group, whole - i)) for i in range(0, whole, group)]
    pieces, at, sums, energy, n_tokens = [p for p in [*pieces, (rest, 1)] if p[0]], 0, [], 0, []
    for n, n_segments in pieces:
        piece, squares = without_bad(mx.unflatten(x[:, :, at : at + n].astype(mx.float32), 2, (n_segments, -1)))
        sums.append(piece.sum(3))
        energy = energy + squares.sum((2, 3, 4), keepdims=True)[..., 0]
        n_tokens += [n // n_segments] * n_segments
        at += n
        if x.shape[2] > SLICE:
            mx.async_eval(sums[-1], energy)
    sums, n_tokens = mx.concatenate(sums, axis=2), mx.array(n_tokens, mx.float32)[:, None]
    if segment > unit:
        sums, n_tokens = sums.sum(2, keepdims=True), n_tokens.sum(0, keepdims=True)
    return sums / n_tokens, n_tokens, energy


def worth_it(means, n_tokens, energy):
    """From `summarize`: for each batch row and head, whether the means carry more than SHARE of the energy, apart from
    the share that means of so few tokens have by chance: bool [B, H, 1, 1]. Decided per row and head, so that what else
    is in the batch does not matter."""
    by_chance = (n_tokens.shape[0] / n_tokens.sum()).astype(mx.float32)
    carried = (n_tokens * mx.square(means)).sum((2, 3), keepdims=True)
    return (carried - by_chance * energy > SHARE * (1 - by_chance) * energy) & (n_tokens.sum() >= FEWEST)


def rows_worth_it(uses):
    """Of several `worth_it`, whether any head of a batch row is to be centred: for each a list of bool by row. Waits, once,
    for all that these depend on."""
    flags = mx.concatenate([use.any((1, 2, 3)) for use in uses]).tolist() if uses else []
    edges = list(itertools.accumulate([use.shape[0] for use in uses], initial=0))
    return [flags[a:b] for a, b in zip(edges, edges[1:])]


def stored(means, use, seed):
    """Means [B, H, S, D] as they are kept: rotated, float16, 0 where `use` [B, H, 1, 1] is false or they do not fit."""
    means = rotate(means, seed).astype(mx.float16)
    return mx.where(use & mx.isfinite(means).all(-1, keepdims=True), means, mx.zeros_like(means))


def plain(means, seed):
    """Kept means [B, H, S, D] as vectors to subtract or add, float32."""
    return unrotate(means, seed)


def per_token(means, first, n, segment):
    """The rows of means [B, H, S, D] that belong to packed tokens first .. first + n - 1, [B, H, n or 1, D]."""
    if segment >= first + n:
        return means[:, :, :1]
    last = (first + n - 1) // segment
    rows = mx.repeat(means[:, :, first // segment : last + 1], segment, axis=2)
    return rows[:, :, first % segment : first % segment + n]
