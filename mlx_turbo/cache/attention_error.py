"""How far the attention weights of a layer err if its keys are packed, measured on a sample of its queries and keys.

The attention weights p with exact keys are compared with the weights p' with packed keys, centered and scaled as in the
cache: error = KL(p || p') in nats, averaged over the sampled queries of a kv head's query heads. `auto` chooses bits by
it (auto_bits.py), and every cache the balance of the keys' channels (balancing.py).
"""

from typing import NamedTuple, Optional

import mlx.core as mx

from ..backends import select
from ..backends.sides import Balance, PackedSide, QuantizeSide
from ..quant.scheme import TurboConfig
from .centering import SEGMENT, plain, should_center, stored, summarize, without_bad

N_QUERIES, N_SEGMENTS = 32, 4  # sampled query tokens; sampled runs of SEGMENT keys


class Observed(NamedTuple):
    """Queries that a cache has been shown. queries: [B, n_heads, n, D], of the tokens at `positions`. scale: the
    softmax scale. sinks: [n_heads] sink logits, or None."""

    queries: mx.array
    positions: list[int]
    scale: float
    sinks: Optional[mx.array]


class Sample(NamedTuple):
    """Keys of a layer. first: number of first tokens, which stay exact. starts: first tokens of the runs of
    `sample_keys` after these. keys: those of all runs, float32 [B, H, n, D], 0 where they cannot be packed."""

    first: int
    starts: list[int]
    keys: mx.array


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
    are not finite do not count; a kv head that has no others is judged as by `key_error`.
    """

    def __init__(self, observed: Observed, keys: mx.array, config: TurboConfig) -> None:
        self.config, (B, H, N, D) = config, keys.shape
        queries, positions, scale, sinks = observed
        self.first, self.starts, self.keys = sample(keys, config)
        first, x = self.first, self.keys
        length = x.shape[2] // len(self.starts)
        at = list(range(first)) + [first + at + i for at in self.starts for i in range(length)]
        n_represented = [1.0] * first + [(N - first) / x.shape[2]] * x.shape[2]  # tokens that a sampled one stands for
        weight = mx.log(mx.array(n_represented))
        visible = mx.array(at) <= mx.array(positions)[:, None]
        n_rows = queries.shape[1] // H
        visible = mx.concatenate([visible] * n_rows, axis=0)
        self.queries, self.good = without_infinite(queries.astype(mx.float32).reshape(B, H, -1, D) * scale)
        exact, _ = without_bad(keys[:, :, :first].astype(mx.float32))
        logits = self.queries @ mx.concatenate([exact, x], axis=2).swapaxes(-1, -2) + weight
        logits = mx.where(visible, logits, -1e30)
        if sinks is not None:
            extra = mx.broadcast_to(sinks.astype(mx.float32).reshape(1, H, n_rows, 1), (B, H, n_rows, len(positions)))
            logits = mx.concatenate([logits, extra.reshape(B, H, -1, 1)], axis=-1)
        self.has_sinks, self.logits, self.total = sinks is not None, logits, mx.logsumexp(logits, axis=-1)
        self.weights = mx.softmax(logits, axis=-1)

    def error(self, bits: int, balance: Optional[Balance] = None) -> mx.array:
        """The error of the attention weights, in nats, if the keys were packed at `bits`: lazy float32 [B, n_kv_heads].

        balance: of their channels; of n * B rows, n ways to balance them, and the result is [n * B, n_kv_heads].
        """
        (B, H, n, D), x = self.keys.shape, self.keys
        n_ways = 1 if balance is None else balance.factors.shape[0] // B
        x = mx.concatenate([x] * n_ways) if n_ways > 1 else x
        error = _error(x, len(self.starts), bits, self.config, balance)
        shift = self.queries @ error.reshape(n_ways, B, H, n, D).swapaxes(-1, -2)
        shift = mx.pad(shift, [(0, 0)] * 4 + [(self.first, int(self.has_sinks))])
        kl = mx.logsumexp(self.logits + shift, axis=-1) - self.total - (self.weights * shift).sum(-1)
        n_good = self.good.sum(-1)
        kl = (kl * self.good).sum(-1) / n_good
        return mx.where(n_good > 0, kl, _key_error(error).reshape(kl.shape)).reshape(-1, H)


def without_infinite(queries: mx.array) -> tuple[mx.array, mx.array]:
    """Queries float32 [..., D], 0 where they are not finite, and which are, bool [...]. They are not packed: they may
    be far larger than keys."""
    good = mx.isfinite(mx.square(queries).sum(-1))
    return mx.where(good[..., None], queries, 0), good


def key_error(keys: mx.array, bits: int, config: TurboConfig) -> mx.array:
    """A stand-in for `Attention.error` without queries, [B, n_kv_heads]: ||error||^2 / (2 D), the KL divergence for
    queries of norm sqrt(D) in a random direction; averaged over tokens. keys: [B, n_kv_heads, N, D]."""
    _, starts, x = sample(keys, config)
    return _key_error(_error(x, len(starts), bits, config, None))


def _key_error(error):
    return mx.square(error).sum(-1).mean(-1) / (2 * error.shape[-1])


def sample(keys: mx.array, config: TurboConfig) -> Sample:
    """A sample of keys [B, H, N, D] of tokens 0 .. N - 1."""
    first = min(config.sink, keys.shape[2] - 1)
    starts, length = sample_keys(keys.shape[2] - first)
    x = mx.concatenate([keys[:, :, first + at : first + at + length] for at in starts], axis=2)
    return Sample(first, starts, without_bad(x.astype(mx.float32))[0])


def means_of(x: mx.array, n_segments: int, config: TurboConfig, balance: Optional[Balance]) -> Optional[mx.array]:
    """The means of x [B, H, n_segments * T, D] as a cache would store them, float32 [B, H, n_segments, D]; None if the
    configuration has none."""
    if not config.centre:
        return None
    summary = summarize(x, 0, x.shape[2] // n_segments)
    return plain(stored(summary[0], should_center(*summary), config.seed, balance), config.seed, balance)


def _error(x, n_segments, bits, config, balance):
    """Restored minus exact of x [B, H, n_segments * T, D], quantized by segments as if they were heads."""
    B, H, n, D = x.shape
    T, mean = n // n_segments, means_of(x, n_segments, config, balance)
    mean = None if mean is None else mean.reshape(B, -1, 1, D)
    side = QuantizeSide(x.reshape(B, H * n_segments, T, D), bits, mean, balance)
    ((codes, gamma),) = select.quantize_sides([side], config.seed, scale=config.scale)
    packed = PackedSide(codes, gamma, bits, D, mean, balance)
    (restored,) = select.dequantize_sides([packed], 0, T, mx.float32, config.seed)
    return without_bad(restored.reshape(x.shape) - x)[0]


def newest(seen: list[tuple]) -> list[tuple]:
    """[(queries, ..., positions)] without the oldest ones that are not needed for N_QUERIES query tokens."""
    while sum(len(positions) for *_, positions in seen[1:]) >= N_QUERIES:
        seen = seen[1:]
    return seen


def still_held(seen: list[tuple], n: int) -> list[tuple]:
    """[(queries, ..., positions)] without those of tokens that a trim to n tokens removes."""
    return [some for some in seen if some[-1][-1] < n]


def join(seen: list[tuple], scale: float, sinks: Optional[mx.array]) -> Optional[Observed]:
    """What a cache has collected, [(queries, positions)], as one; None if that is nothing."""
    if not seen:
        return None
    positions = [p for _, some in seen for p in some]
    return Observed(mx.concatenate([q for q, _ in seen], axis=2), positions, scale, sinks)
