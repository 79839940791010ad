"""`auto`: how many bits the keys of a layer need, measured on the first prompt chunk with its own queries.

For a sample of queries and keys, the attention weights p with exact keys are compared with the weights p' with packed
keys, centered and scaled as in the cache: error = KL(p || p') in nats, averaged over the sampled queries of a kv head's
query heads; the worst kv head counts. Bits are raised along LADDER until error <= TARGET.

TARGET is calibrated on the embedded model and on copies of it with hostile keys (tests/constructed_models.py): a layer
at 0.02 costs the model's output a KL divergence of 0.003; healthy layers have 0.0001 to 0.008.
"""

from typing import Optional

import mlx.core as mx

from ..backends import select
from ..backends.sides import PackedSide, QuantizeSide
from ..quant.scheme import TurboConfig
from .centering import SEGMENT, plain, should_center, stored, summarize, without_bad

LADDER = (4, 8, 0)  # bits of keys; the last resort is 0 = exact
TARGET = 0.02  # nats
FEWEST = 256  # tokens needed to decide: on fewer, biases that turn with the position hardly show
N_QUERIES, N_SEGMENTS = 16, 4  # sampled query tokens; sampled runs of SEGMENT keys


def sample_queries(n: int) -> list[int]:
    """The at most N_QUERIES of n query tokens that are sampled: evenly spread over the second half."""
    few = min(N_QUERIES, n)
    return [n - 1 - i * max(n // 2, few) // few for i in reversed(range(few))]


def sample_keys(n: int) -> tuple[list[int], int]:
    """First tokens of at most N_SEGMENTS runs, evenly spread over n tokens, and their length."""
    length = min(SEGMENT, n)
    runs = min(N_SEGMENTS, n // length)
    return [i * (n - length) // max(runs - 1, 1) for i in range(runs)], length


def attention_error(
    queries: mx.array,
    positions: list[int],
    keys: mx.array,
    bits: int,
    config: TurboConfig,
    scale: float,
    sinks: Optional[mx.array] = None,
) -> mx.array:
    """The error of the attention weights, in nats, if `keys` were packed at `bits`: a lazy float32 scalar.

    queries: [B, n_heads, n, D], of the tokens at `positions`. keys: [B, n_kv_heads, N, D], exact, of tokens 0 .. N - 1.
    scale: the softmax scale. sinks: [n_heads] sink logits, or None. Keys that cannot be packed count as zeros. Queries
    that are not finite do not count; a kv head that has no others is judged as by `key_error`.
    """
    B, H, N, D = keys.shape
    first, starts, x = _sample(keys, config)
    length = x.shape[2] // len(starts)
    at = list(range(first)) + [first + at + i for at in starts for i in range(length)]
    n_represented = [1.0] * first + [(N - first) / x.shape[2]] * x.shape[2]  # tokens that a sampled one stands for
    weight = mx.log(mx.array(n_represented))
    visible = mx.array(at) <= mx.array(positions)[:, None]
    n_rows = queries.shape[1] // H
    visible = mx.concatenate([visible] * n_rows, axis=0)
    q = queries.astype(mx.float32).reshape(B, H, -1, D) * scale
    good = mx.isfinite(mx.square(q).sum(-1))  # queries are not packed: they may be far larger than keys
    q = mx.where(good[..., None], q, 0)
    exact, _ = without_bad(keys[:, :, :first].astype(mx.float32))
    logits = q @ mx.concatenate([exact, x], axis=2).swapaxes(-1, -2) + weight
    logits = mx.where(visible, logits, -1e30)
    error = _error(x, len(starts), bits, config)
    shift = mx.pad(q @ error.swapaxes(-1, -2), [(0, 0)] * 3 + [(first, 0)])
    if sinks is not None:
        extra = mx.broadcast_to(sinks.astype(mx.float32).reshape(1, H, n_rows, 1), (B, H, n_rows, len(positions)))
        logits = mx.concatenate([logits, extra.reshape(B, H, -1, 1)], axis=-1)
        shift = mx.pad(shift, [(0, 0)] * 3 + [(0, 1)])
    p = mx.softmax(logits, axis=-1)
    kl = mx.logsumexp(logits + shift, axis=-1) - mx.logsumexp(logits, axis=-1) - (p * shift).sum(-1)
    n_good = good.sum(-1)
    return mx.where(n_good > 0, (kl * good).sum(-1) / n_good, _key_error(error)).max()


def key_error(keys: mx.array, bits: int, config: TurboConfig) -> mx.array:
    """A stand-in for `attention_error` without queries: ||error||^2 / (2 D), the KL divergence for queries of norm
    sqrt(D) in a random direction; averaged over tokens, of the worst kv head. keys: [B, n_kv_heads, N, D]."""
    _, starts, x = _sample(keys, config)
    return _key_error(_error(x, len(starts), bits, config)).max()


def _key_error(error):
    return mx.square(error).sum(-1).mean(-1) / (2 * error.shape[-1])


def _sample(keys, config):
    """(first tokens that stay exact, first tokens of the runs of `sample_keys` after these, the keys of all runs
    float32 [B, H, n, D], 0 where they cannot be packed)."""
    first = min(config.sink, keys.shape[2] - 1)
    starts, length = sample_keys(keys.shape[2] - first)
    x = mx.concatenate([keys[:, :, first + at : first + at + length] for at in starts], axis=2)
    return first, starts, without_bad(x.astype(mx.float32))[0]


def _error(x, n_segments, bits, config):
    """Restored minus exact of x [B, H, n_segments * T, D], quantized by segments as if they were heads."""
    B, H, n, D = x.shape
    T, mean = n // n_segments, None
    if config.centre:
        summary = summarize(x, 0, T)
        mean = plain(stored(summary[0], should_center(*summary), config.seed), config.seed).reshape(B, -1, 1, D)
    by_segment = x.reshape(B, H * n_segments, T, D)
    ((codes, gamma),) = select.quantize_sides([QuantizeSide(by_segment, bits, mean)], config.seed, scale=config.scale)
    (restored,) = select.dequantize_sides([PackedSide(codes, gamma, bits, D, mean)], 0, T, mx.float32, config.seed)
    return without_bad(restored.reshape(x.shape) - x)[0]


def choose_key_bits(
    keys: mx.array, config: TurboConfig, observed: Optional[tuple] = None
) -> tuple[int, dict[int, float]]:
    """(bits, {bits tried: error in nats}) for the keys [B, n_kv_heads, N, D] of a layer. Waits for each error, which
    happens once in the life of a cache.

    observed: (queries, positions, scale, sinks) for `attention_error`, or None: then `key_error` decides.
    """
    errors: dict[int, float] = {}
    for bits in LADDER[:-1]:
        if bits < config.scheme.key_bits:
            continue
        if observed is None:
            error = key_error(keys, bits, config)
        else:
            queries, positions, scale, sinks = observed
            error = attention_error(queries, positions, keys, bits, config, scale, sinks)
        errors[bits] = error.item()  # type: ignore[assignment]  # a float32 scalar
        if errors[bits] <= TARGET:
            return bits, errors
    return LADDER[-1], errors


def newest(seen: list[tuple]) -> list[tuple]:
    """[(queries, ..., positions)] without the oldest ones that are not needed for N_QUERIES query tokens."""
    while sum(len(positions) for *_, positions in seen[1:]) >= N_QUERIES:
        seen = seen[1:]
    return seen


def choose_by(keys: mx.array, config: TurboConfig, observed: Optional[tuple]) -> tuple[int, dict[int, float], str]:
    """What `choose_key_bits` returns, and a text that says what the choice is based on. observed: what a cache's
    `observe` has collected, ([(queries, positions)], scale, sinks), or None."""
    if not observed:
        return *choose_key_bits(keys, config), "the keys alone"
    seen, scale, sinks = observed
    positions = [p for _, some in seen for p in some]
    queries = mx.concatenate([q for q, _ in seen], axis=2)
    return *choose_key_bits(keys, config, (queries, positions, scale, sinks)), f"{len(positions)} queries"
