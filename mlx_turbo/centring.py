"""Centring: a mean that is subtracted from keys or values before they are rotated and quantized, and put back exactly.

A scale per vector is proportional to the vector's norm, so a constant part of every key (Qwen2's biases have 30 times
the norm of the rest) drowns the signal. q.k = q.(k - mean) + q.mean holds for every mean, also with attention sinks; so
the choice of means costs no correctness, and the nearer they are to the tokens, the less error remains.

Keys turn with their position (RoPE), a constant part turns with them, so they get a mean per segment of SEGMENT packed
tokens; values do not turn and get one. Means are kept in float16 and rotated space, as attention needs them, and the
rounded means are what is subtracted.
"""
import mlx.core as mx

from .fallback import rotate, unrotate
from .kernels import ONE_SEGMENT

SEGMENT = 128  # packed tokens that share a mean of keys: 16 / SEGMENT = 0.125 bits per number where it is used
SHARE = 0.5  # of the energy of a head's tokens that their means must carry: below, centring gains less than 3 dB


def segment_of(side):
    """Packed tokens that share a mean: of keys (side 0), of values (side 1)."""
    return ONE_SEGMENT if side else SEGMENT


def spans(first, n, segment):
    """The packed tokens first .. first + n - 1 by segment: (tokens of a segment begun before, whole segments, tokens of
    a segment that they begin)."""
    begun = min(-first % segment, n)
    whole = (n - begun) // segment
    return begun, whole, n - begun - whole * segment


def segment_means(x, first, segment):
    """Means of x [B, H, T, D], to be packed as tokens first ..., by segment: float32 [B, H, S, D]."""
    begun, whole, rest = spans(first, x.shape[2], segment)
    x = x.astype(mx.float32)
    parts = [x[:, :, :begun].mean(2, keepdims=True)] if begun else []
    if whole:
        parts.append(mx.unflatten(x[:, :, begun:begun + whole * segment], 2, (whole, segment)).mean(3))
    if rest:
        parts.append(x[:, :, x.shape[2] - rest:].mean(2, keepdims=True))
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)


def worth_it(x, segment):
    """For each batch row and head, whether the means of x [B, H, T, D] carry more than SHARE of its energy: bool
    [B, H, 1, 1]. Decided per row and head, so that what else is in the batch does not matter."""
    _, whole, rest = spans(0, x.shape[2], segment)
    tokens = mx.array([segment] * whole + [rest] * (rest > 0), mx.float32)[:, None]
    means = segment_means(x, 0, segment)
    energy = mx.square(x.astype(mx.float32)).sum((2, 3), keepdims=True)
    return (tokens * mx.square(means)).sum((2, 3), keepdims=True) > SHARE * energy


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
    rows = mx.repeat(means[:, :, first // segment:last + 1], segment, axis=2)
    return rows[:, :, first % segment:first % segment + n]
