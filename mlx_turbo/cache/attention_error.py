"""How far the attention weights of a layer err if its keys are packed, measured on a sample of its queries and keys.

The attention weights p with exact keys are compared with the weights p' with packed keys, centered and scaled as in the
cache: error = KL(p || p') in nats, averaged over the sampled queries of a kv head's query heads. `auto` chooses bits by
it (auto_bits.py), and every cache the balance of the keys' channels (balancing.py).
"""

import functools
import math
from typing import NamedTuple, Optional, Sequence

import mlx.core as mx
import numpy as np

from ..backends import select
from ..backends.sides import PackedSide, QuantizeSide
from ..backends.statistics import without_bad
from ..quant.scheme import TurboConfig
from .centering import SEGMENT, should_center, summarize
from .joined import Tokens

N_QUERIES, N_SEGMENTS = 32, 4  # sampled query tokens; sampled runs of SEGMENT keys
KEPT_EVERY = 8  # decode steps whose query is kept where exact keys may be packed one day: holding each costs time


class Observed(NamedTuple):
    """Queries that a cache has been shown. queries: [B, n_heads, n, D], of the tokens at `positions`. scale: the
    softmax scale. sinks: [n_heads] sink logits, or None."""

    queries: mx.array
    positions: list[int]
    scale: float
    sinks: Optional[mx.array]


class Sample(NamedTuple):
    """Keys of a layer: the `first` ones, which stay exact, and runs of the others from the tokens `starts` after these
    on. keys: all of them, float32 [B, H, first + n, D], 0 where they cannot be packed. centered: [B, H, n, D], those of
    the runs minus their means, in heads that would be centered."""

    first: int
    starts: list[int]
    keys: mx.array
    centered: mx.array


def sample_queries(n: int) -> range:
    """The at most N_QUERIES of n query tokens that are sampled: evenly spread over the second half."""
    few = min(N_QUERIES, n)
    step = max(n // 2 // few, 1)
    return range(n - 1 - (few - 1) * step, n, step)


def sample_keys(n: int) -> tuple[list[int], int]:
    """First tokens of at most N_SEGMENTS runs, evenly spread over n tokens, and their length."""
    length = min(SEGMENT, n)
    runs = min(N_SEGMENTS, n // length)
    return [i * ((n - length) // max(runs - 1, 1)) for i in range(runs)], length


class Attention:
    """The attention of sampled queries over a sample of exact keys, for measuring what packing the keys changes.

    keys: [B, n_kv_heads, N, D], exact, of tokens 0 .. N - 1. Keys that cannot be packed count as zeros. Queries that
    are not finite do not count; a kv head that has no others is judged as by `key_errors`.
    """

    def __init__(self, observed: Observed, keys: Tokens, config: TurboConfig) -> None:
        B, H, N, D = keys.shape
        queries, positions, scale, sinks = observed
        self.config, self.sample = config, sample(keys, config)
        first, starts, every, x = self.sample
        n_rows, length = queries.shape[1] // H, x.shape[2] // len(starts)
        self.queries, self.good = without_infinite(queries.astype(mx.float32).reshape(B, H, -1, D) * scale)
        logits = mx.unflatten(self.queries @ every.swapaxes(-1, -2), 2, (n_rows, -1))
        logits = mx.flatten(logits + _weight(N, first, tuple(starts), length, tuple(positions)), 2, 3)
        if sinks is not None:
            extra = mx.broadcast_to(sinks.astype(mx.float32).reshape(1, H, n_rows, 1), (B, H, n_rows, len(positions)))
            logits = mx.concatenate([extra.reshape(B, H, -1, 1), logits], axis=-1)
        n_exact = logits.shape[-1] - x.shape[2]
        self.weights = mx.softmax(logits, axis=-1)[..., n_exact:]
        self.exact = mx.logsumexp(logits[..., :n_exact], axis=-1) if n_exact else None
        self.logits, self.total = logits[..., n_exact:], mx.logsumexp(logits, axis=-1)

    def errors(self, ladder: Sequence[int], factors: Optional[mx.array] = None) -> mx.array:
        """The error of the attention weights, in nats, if the keys were packed at each of several bits: lazy float32
        [len(ladder) * ways, B, n_kv_heads].

        factors: of their channels, [ways, B, n_kv_heads, 1, D]; without, one way.
        """
        x, q = self.sample.centered[None], self.queries[None]
        x, q = (x, q) if factors is None else (x * factors, q / factors)
        error = _errors(mx.flatten(x, 0, 1), ladder, self.config)
        error = mx.unflatten(error, 0, (len(ladder), *x.shape[:2]))
        shift = mx.flatten(q @ error.swapaxes(-1, -2), 0, 1)
        moved = mx.logsumexp(self.logits + shift, axis=-1)
        moved = moved if self.exact is None else mx.logaddexp(moved, self.exact)
        kl = moved - self.total - (self.weights * shift).sum(-1)
        n_good = self.good.sum(-1)
        kl = mx.where(self.good, kl, 0).sum(-1) / n_good
        return mx.where(n_good > 0, kl, _key_error(mx.flatten(error, 0, 1), factors))


def without_infinite(queries: mx.array) -> tuple[mx.array, mx.array]:
    """Queries float32 [..., D], 0 where they are not finite, and which are, bool [...]. They are not packed: they may
    be far larger than keys."""
    good = mx.square(queries).sum(-1) < math.inf  # not so for NaN
    return mx.where(good[..., None], queries, 0), good


def key_errors(keys: mx.array, ladder: Sequence[int], config: TurboConfig) -> mx.array:
    """A stand-in for `Attention.errors` without queries, [len(ladder), B, n_kv_heads]: ||error||^2 / (2 D), the KL
    divergence for queries of norm sqrt(D) in a random direction; averaged over tokens. keys: [B, n_kv_heads, N, D]."""
    x = sample(keys, config).centered
    return _key_error(mx.unflatten(_errors(x, ladder, config), 0, (len(ladder), -1)), None)


def _key_error(error, factors):
    error = error if factors is None else error / factors
    return mx.square(error).sum((-2, -1)) / (2 * error.shape[-1] * error.shape[-2])


def sample(keys: Tokens, config: TurboConfig) -> Sample:
    """A sample of keys [B, H, N, D] of tokens 0 .. N - 1."""
    first = min(config.sink, keys.shape[2] - 1)
    starts, length = sample_keys(keys.shape[2] - first)
    pieces = [keys[:, :, first + at : first + at + length] for at in starts]
    # contiguous, so that a row of a batch gets the same to the bit
    every = mx.contiguous(mx.concatenate([keys[:, :, :first], *pieces] if first else pieces, axis=2))
    summary = summarize(every[:, :, first:], 0, length) if config.centre else None  # in the dtype of the cache
    every, _ = without_bad(every.astype(mx.float32))
    x = every[:, :, first:]
    if summary is not None:  # what float16 makes of the means is in the packed keys and in the exact ones
        means = mx.where(should_center(*summary), summary[0], 0)[..., None, :]
        x = mx.flatten(mx.unflatten(x, 2, (len(starts), length)) - means, 2, 3)
    return Sample(first, starts, every, x)


@functools.lru_cache(maxsize=2)  # the layers of a model have the same, or windows others
def _weight(N, first, starts, length, positions):
    """What is added to the logits of queries at `positions`: float32 [queries, tokens]. The logarithm of how many of N
    tokens a sampled one stands for, and -1e30 where it is not visible."""
    at = np.concatenate([np.arange(first), *(np.arange(first + run, first + run + length) for run in starts)])
    n_represented = np.where(np.arange(len(at)) < first, 1, (N - first) / (len(at) - first))
    weight = np.where(at <= np.array(positions)[:, None], np.log(n_represented), -1e30)
    return mx.array(weight.astype(np.float32))  # nothing lazy: threads share it


def _errors(x, ladder, config):
    """Restored minus exact of x [B, H, n, D], quantized at each of the bits: [len(ladder) * B, H, n, D], 0 where that
    cannot be packed."""
    restored = []
    for bits in ladder:
        ((codes, gamma),) = select.quantize_sides([QuantizeSide(x, bits)], config.seed, scale=config.scale)
        packed = PackedSide(codes, gamma, bits, x.shape[3])
        restored += select.dequantize_sides([packed], 0, x.shape[2], mx.float32, config.seed)
    error = mx.unflatten(mx.concatenate(restored), 0, (len(ladder), -1)) - x
    return mx.flatten(mx.where(mx.abs(error) < math.inf, error, 0), 0, 1)


def newest(seen: list[tuple]) -> list[tuple]:
    """[(queries, ..., positions)] of the newest N_QUERIES query tokens. What is left of an array that also has older
    ones is a copy, which is begun."""
    more = sum(len(positions) for *_, positions in seen) - N_QUERIES
    while more >= len(seen[0][-1]):
        more -= len(seen[0][-1])
        seen = seen[1:]
    if more > 0:
        (queries, *others, positions), *seen = seen
        mx.async_eval(left := mx.contiguous(queries[:, :, more:]))
        seen = [(left, *others, positions[more:]), *seen]
    return seen


def still_held(seen: list[tuple], n: int) -> list[tuple]:
    """[(queries, ..., positions)] without those of tokens that a trim to n tokens removes."""
    return [some for some in seen if some[-1][-1] < n]


def without_first(seen: list[tuple], n: int, n_kept: int) -> list[tuple]:
    """[(queries, ..., positions)] once the n tokens after the first n_kept are not held any more: without the queries
    of these tokens."""
    left = []
    for queries, *others, positions in seen:
        gone = sum(p < n_kept + n for p in positions)
        if gone < len(positions):
            left.append((queries[:, :, gone:], *others, [p - n for p in positions[gone:]]))
    return left


def join(seen: list[tuple], scale: float, sinks: Optional[mx.array]) -> Optional[Observed]:
    """What a cache has collected, [(queries, positions)], as one; None if that is nothing."""
    if not seen:
        return None
    positions = [p for _, some in seen for p in some]
    return Observed(mx.concatenate([q for q, _ in seen], axis=2), positions, scale, sinks)
