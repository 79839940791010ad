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
from ..backends.sides import Balance, PackedSide, QuantizeSide
from ..backends.statistics import without_bad
from ..quant.scheme import TurboConfig
from .centering import SEGMENT, plain, should_center, stored, summarize
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
    """Keys of a layer. first: number of first tokens, which stay exact. starts: first tokens of the runs of
    `sample_keys` after these. keys: those of all runs, float32 [B, H, n, D], 0 where they cannot be packed. centers:
    the means of the runs, float32 [B, H, runs, D], and of which heads they are subtracted, bool [B, H, 1, 1]; None if
    of none by the configuration."""

    first: int
    starts: list[int]
    keys: mx.array
    centers: Optional[tuple[mx.array, mx.array]]

    def means(self, seed: int, balance: Optional[Balance] = None) -> Optional[mx.array]:
        """The means as a cache would store them, float32 [B, H, runs, D]; [ways * B, H, runs, D] of factors that are so
        many ways to balance each row."""
        if self.centers is None:
            return None
        means, heads = self.centers
        if balance is not None and balance.factors.shape[0] > means.shape[0]:
            ways = balance.factors.shape[0] // means.shape[0]
            means, heads = (mx.concatenate([x] * ways) for x in (means, heads))
        return plain(stored(means, heads, seed, balance), seed, balance)


def sample_queries(n: int) -> list[int]:
    """The at most N_QUERIES of n query tokens that are sampled: evenly spread over the second half."""
    few = min(N_QUERIES, n)
    return [n - 1 - i * max(n // 2, few) // few for i in reversed(range(few))]


def sample_keys(n: int) -> tuple[list[int], int]:
    """First tokens of at most N_SEGMENTS runs, evenly spread over n tokens, and their length."""
    length = min(SEGMENT, n)
    runs = min(N_SEGMENTS, n // length)
    return [i * (n - length) // max(runs - 1, 1) for i in range(runs)], length


class Attention:
    """The attention of sampled queries over a sample of exact keys, for measuring what packing the keys changes.

    keys: [B, n_kv_heads, N, D], exact, of tokens 0 .. N - 1. Keys that cannot be packed count as zeros. Queries that
    are not finite do not count; a kv head that has no others is judged as by `key_errors`.
    """

    def __init__(self, observed: Observed, keys: Tokens, config: TurboConfig) -> None:
        B, H, N, D = keys.shape
        queries, positions, scale, sinks = observed
        self.config, self.sample = config, sample(keys, config)
        first, starts, x, _ = self.sample
        n_rows = queries.shape[1] // H
        weight = _weight(N, first, tuple(starts), x.shape[2] // len(starts), tuple(positions))
        self.queries, self.good = without_infinite(queries.astype(mx.float32).reshape(B, H, -1, D) * scale)
        exact, _ = without_bad(mx.contiguous(keys[:, :, :first]).astype(mx.float32))
        logits = self.queries @ mx.concatenate([exact, x], axis=2).swapaxes(-1, -2)
        logits = mx.flatten(mx.unflatten(logits, 2, (n_rows, -1)) + weight, 2, 3)
        if sinks is not None:
            extra = mx.broadcast_to(sinks.astype(mx.float32).reshape(1, H, n_rows, 1), (B, H, n_rows, len(positions)))
            logits = mx.concatenate([logits, extra.reshape(B, H, -1, 1)], axis=-1)
        self.has_sinks, self.logits, self.total = sinks is not None, logits, mx.logsumexp(logits, axis=-1)
        self.weights = mx.softmax(logits, axis=-1)

    def error(self, bits: int, balance: Optional[Balance] = None) -> mx.array:
        """The error of the attention weights, in nats, if the keys were packed at `bits`: lazy float32 [B, n_kv_heads].

        balance: of their channels; of n * B rows, n ways to balance them, and the result is [n * B, n_kv_heads].
        """
        return mx.flatten(self._divergence(_errors(self.sample, [bits], self.config, balance)), 0, 1)

    def errors(self, ladder: Sequence[int], balance: Optional[Balance] = None) -> mx.array:
        """`error` at each of several bits, as [len(ladder), B, n_kv_heads]. balance: one."""
        return self._divergence(_errors(self.sample, ladder, self.config, balance))

    def _divergence(self, error):
        """[n, B, H] of errors [n * B, H, *, D] of the sample's keys."""
        error = mx.unflatten(error, 0, (-1, self.sample.keys.shape[0]))
        shift = self.queries @ error.swapaxes(-1, -2)
        shift = mx.pad(shift, [(0, 0)] * 4 + [(self.sample.first, int(self.has_sinks))])
        kl = mx.logsumexp(self.logits + shift, axis=-1) - self.total - (self.weights * shift).sum(-1)
        n_good = self.good.sum(-1)
        kl = (kl * self.good).sum(-1) / n_good
        return mx.where(n_good > 0, kl, _key_error(error))


def without_infinite(queries: mx.array) -> tuple[mx.array, mx.array]:
    """Queries float32 [..., D], 0 where they are not finite, and which are, bool [...]. They are not packed: they may
    be far larger than keys."""
    good = mx.square(queries).sum(-1) < math.inf  # not so for NaN
    return mx.where(good[..., None], queries, 0), good


def key_errors(keys: mx.array, ladder: Sequence[int], config: TurboConfig) -> mx.array:
    """A stand-in for `Attention.errors` without queries, [len(ladder), B, n_kv_heads]: ||error||^2 / (2 D), the KL
    divergence for queries of norm sqrt(D) in a random direction; averaged over tokens. keys: [B, n_kv_heads, N, D]."""
    return _key_error(mx.unflatten(_errors(sample(keys, config), ladder, config, None), 0, (len(ladder), -1)))


def _key_error(error):
    return mx.square(error).sum(-1).mean(-1) / (2 * error.shape[-1])


def sample(keys: Tokens, config: TurboConfig) -> Sample:
    """A sample of keys [B, H, N, D] of tokens 0 .. N - 1."""
    first = min(config.sink, keys.shape[2] - 1)
    starts, length = sample_keys(keys.shape[2] - first)
    # contiguous, so that a row of a batch gets the same to the bit
    x = mx.contiguous(mx.concatenate([keys[:, :, first + at : first + at + length] for at in starts], axis=2))
    summary = summarize(x, 0, length) if config.centre else None  # of the model's dtype, as those of the cache
    x, _ = without_bad(x.astype(mx.float32))
    return Sample(first, starts, x, None if summary is None else (summary[0], should_center(*summary)))


@functools.lru_cache(maxsize=2)  # the layers of a model have the same, or windows others
def _weight(N, first, starts, length, positions):
    """What is added to the logits of queries at `positions`: float32 [queries, tokens]. The logarithm of how many of N
    tokens a sampled one stands for, and -1e30 where it is not visible."""
    at = np.concatenate([np.arange(first), *(np.arange(first + run, first + run + length) for run in starts)])
    n_represented = np.where(np.arange(len(at)) < first, 1, (N - first) / (len(at) - first))
    weight = np.where(at <= np.array(positions)[:, None], np.log(n_represented), -1e30)
    return mx.array(weight.astype(np.float32))  # nothing lazy: threads share it


def _errors(sample, ladder, config, balance):
    """Restored minus exact of a sample's keys, quantized at each of the bits, by runs as if they were heads:
    [len(ladder) * ways * B, H, n, D] of factors that are so many ways to balance each of B rows."""
    x, n_runs, mean = sample.keys, len(sample.starts), sample.means(config.seed, balance)
    if balance is not None:
        x = mx.concatenate([x] * (balance.factors.shape[0] // x.shape[0]))
    B, H, n, D = x.shape
    mean = None if mean is None else mean.reshape(B, -1, 1, D)
    T = n // n_runs
    runs, restored = x.reshape(B, H * n_runs, T, D), []
    for bits in ladder:
        side = QuantizeSide(runs, bits, mean, balance)
        ((codes, gamma),) = select.quantize_sides([side], config.seed, scale=config.scale)
        packed = PackedSide(codes, gamma, bits, D, mean, balance)
        restored += select.dequantize_sides([packed], 0, T, mx.float32, config.seed)
    error = mx.concatenate(restored).reshape(len(ladder), *runs.shape) - runs
    return without_bad(error.reshape(-1, H, n, D))[0]


def newest(seen: list[tuple]) -> list[tuple]:
    """[(queries, ..., positions)] without the oldest ones that are not needed for N_QUERIES query tokens."""
    while sum(len(positions) for *_, positions in seen[1:]) >= N_QUERIES:
        seen = seen[1:]
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
