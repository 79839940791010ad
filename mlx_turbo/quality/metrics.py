"""How far a compressed cache moves a model's output (perplexity, the distribution of the KL divergence, agreement of
the most likely token), how many bits per number it takes, and which tokens it keeps exact.

The first three are teacher-forced: the model reads a given text through its cache chunk by chunk, so that it attends to
tokens read back from the cache. Small chunks matter, because the tokens of the current chunk are exact in our caches.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..cache.single import TurboKVCache
from ..integration.prompt_cache import flatten_caches
from .baselines import ExactEndsCache

PROJECTED_TOKENS = 32768
# of the KL divergences of single tokens, interpolated linearly as NumPy does
QUANTILES = {"kld_median": 0.5, "kld_p99": 0.99, "kld_p999": 0.999, "kld_max": 1.0}


# ---- distance between outputs --------------------------------------------------------------------------------
def log_probabilities(logits: mx.array) -> mx.array:
    """log softmax of logits [..., vocabulary], float32."""
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def negative_log_likelihood(log_p: mx.array, targets: mx.array) -> mx.array:
    """-log p(target) in nats, [n], from log_p [n, vocabulary] and the actual tokens, targets [n]."""
    return -mx.take_along_axis(log_p, targets[:, None], axis=-1)[:, 0]


def perplexity(mean_negative_log_likelihood: float) -> float:
    """exp of the mean negative log likelihood per token (nats)."""
    return math.exp(mean_negative_log_likelihood)


def kl_divergence(log_p: mx.array, log_q: mx.array) -> mx.array:
    """KL(p || q) in nats per token, [n], from log_p (uncompressed) and log_q [n, vocabulary]."""
    return (mx.exp(log_p) * (log_p - log_q)).sum(-1)


def same_top1(log_p: mx.array, log_q: mx.array) -> mx.array:
    """Whether both have the same most likely token, bool [n]."""
    return log_p.argmax(-1) == log_q.argmax(-1)


def standard_error(samples: Sequence[float]) -> float | None:
    """Standard error of the mean of independent samples; None for fewer than two."""
    n = len(samples)
    if n < 2:
        return None
    mean = sum(samples) / n
    return math.sqrt(sum((x - mean) ** 2 for x in samples) / (n - 1) / n)


def compare(
    model: Any,
    windows: Sequence[list[int]],
    make_caches: dict[str, Callable[[], list[Any]]],
    chunk: int = 32,
    progress: Callable[[int], Any] | None = None,
) -> dict[str, tuple[dict[str, float | None], list[Any]]]:
    """Read each window through one fresh cache of every kind, side by side.

    windows: lists of token ids, each at least 2 long, read independently. make_caches: name -> function that makes a
    prompt cache; the others are compared with the first. chunk: tokens per step. progress: called with the number of
    tokens done since the last call.

    Returns name -> ({"perplexity", "kld" (mean, nats per token), "kld_se" (standard error of the windows' means, None
    for one window), QUANTILES of the tokens' KL divergences, "top1" (fraction)}, the prompt cache after the last
    window).
    """
    by_token: dict[str, list[np.ndarray]] = {name: [] for name in make_caches}  # per window: [3, n] nll, kld, top1
    for window in windows:
        caches = {name: make() for name, make in make_caches.items()}
        tokens, n = mx.array(window), len(window) - 1
        columns: dict[str, list[mx.array]] = {name: [] for name in caches}
        for start in range(0, n, chunk):
            inputs, targets = tokens[start : min(start + chunk, n)], tokens[start + 1 : start + chunk + 1]
            log_p = None
            for name, cache in caches.items():
                log_q = log_probabilities(model(inputs[None], cache=cache)[0])
                log_p = log_q if log_p is None else log_p
                same = same_top1(log_p, log_q).astype(mx.float32)
                column = mx.stack([negative_log_likelihood(log_q, targets), kl_divergence(log_p, log_q), same])
                mx.eval(column)
                columns[name].append(column)
            if progress:
                progress(len(inputs))
        for name, parts in columns.items():
            by_token[name].append(np.array(mx.concatenate(parts, axis=1), np.float64))
    results = {}
    for name, of_windows in by_token.items():
        nll, kld, top1 = np.concatenate(of_windows, axis=1)
        measured = {
            "perplexity": perplexity(nll.mean()),
            "kld": float(kld.mean()),
            "kld_se": standard_error([window[1].mean() for window in of_windows]),
            **{name: float(np.quantile(kld, share)) for name, share in QUANTILES.items()},
            "top1": float(top1.mean()),
        }
        results[name] = measured, caches[name]
    return results


# ---- exact tokens --------------------------------------------------------------------------------------------
class ExactTokens(NamedTuple):
    """Which tokens of a layer a chunk of the text sees exactly. first: number of leading ones. newest: least and
    greatest number of those just before the chunk. chunk: whether the chunk sees itself exactly."""

    first: int
    newest: tuple[int, int]
    chunk: bool


def exact_tokens(
    make_cache: Callable[[], list[Any]], plain_cache: list[Any], chunk: int, n_tokens: int = 1024
) -> ExactTokens | str | None:
    """What a cache keeps exact, measured: random keys and values pass through that of the first layer with a plain
    KVCache, n_tokens in chunks, and are compared with what `update_and_fetch` returns.

    plain_cache: mlx-lm's, filled by the same model. Returns an `ExactTokens`, "all" if nothing was packed, or None if
    there is no such layer, or its cache returns no arrays [1, n_kv_heads, tokens, head_dim] to look at.
    """
    from mlx_lm.models.cache import KVCache, QuantizedKVCache

    layer = next((i for i, c in enumerate(plain_cache) if type(c) is KVCache and c.offset), None)
    if layer is None:
        return None
    cache = make_cache()[layer]
    if type(cache) is QuantizedKVCache:  # packs every token as it comes
        return ExactTokens(0, (0, 0), False)
    rng, found = mx.random.key(0), []
    shapes = [(1, x.shape[1], n_tokens, x.shape[3]) for x in (plain_cache[layer].keys, plain_cache[layer].values)]
    given = [mx.random.normal(shape, key=k) for shape, k in zip(shapes, mx.random.split(rng))]
    for start in range(0, n_tokens, chunk):
        stop = min(start + chunk, n_tokens)
        seen = cache.update_and_fetch(*(x[:, :, start:stop] for x in given))
        if any(not isinstance(x, mx.array) or x.shape != g[:, :, :stop].shape for x, g in zip(seen, given)):
            return None
        same = np.logical_and(*(np.array((x == g[:, :, :stop]).all((0, 1, 3))) for x, g in zip(seen, given)))
        if not same.all():
            (packed,) = np.nonzero(~same)
            found.append((int(packed[0]), stop - 1 - int(packed[-1]), stop - start))
    if not found:
        return "all"
    newest = [max(n_exact - n_new, 0) for _, n_exact, n_new in found]
    is_exact = all(n_exact >= n_new for _, n_exact, n_new in found)
    return ExactTokens(min(first for first, _, _ in found), (min(newest), max(newest)), is_exact)


# ---- bits per number -----------------------------------------------------------------------------------------
_Side = tuple[list[tuple[Any, int]], int, int]


def _arrays_of(side: Any) -> list[tuple[Any, int]]:
    if side.in_one:
        return [(side.recent, 1)]
    return [(side.codes, 1), (side.scale, 1), (side.means, side.segment)]


def _sides_of(cache: Any) -> list[_Side] | None:
    """Keys and values of one layer's cache as ([(array that grows with the tokens, tokens per row)], head_dim, batch *
    kv heads), or None for a cache that holds no plain keys and values."""
    from mlx_lm.models.cache import KVCache, QuantizedKVCache

    if isinstance(cache, ExactEndsCache):
        cache = cache.packed
    if type(cache) not in (KVCache, QuantizedKVCache, TurboKVCache) or cache.offset == 0:
        return None
    if isinstance(cache, TurboKVCache):
        cache.settle()
        return [
            (
                [(a, n) for a, n in _arrays_of(side) if a is not None],
                side.head_dim,
                side.recent.shape[0] * side.recent.shape[1],
            )
            for side in cache._sides
        ]
    keys_and_values: Any = cache.keys, cache.values
    if isinstance(cache, QuantizedKVCache):
        return [
            ([(a, 1) for a in side], side[0].shape[-1] * 32 // cache.bits, side[0].shape[0] * side[0].shape[1])
            for side in keys_and_values
        ]
    return [([(a, 1)], a.shape[-1], a.shape[0] * a.shape[1]) for a in keys_and_values]


def _bytes_per_token(arrays: list[tuple[Any, int]]) -> float:
    """Bytes per token of buffers [B, H, rows, *] in the cache of a 16-bit model: float32 counts half."""
    return sum(a.nbytes / a.shape[2] / n / (2 if a.dtype == mx.float32 else 1) for a, n in arrays)


def resident_bits(prompt_cache: list[Any]) -> float | None:
    """8 * bytes of all buffers / numbers held, for the layers with plain keys and values; None if there are none."""
    held = values = 0
    for cache in flatten_caches(prompt_cache):
        if sides := _sides_of(cache):
            values += cache.offset * sum(head_dim * heads for _, head_dim, heads in sides)
            counts_itself = isinstance(cache, (TurboKVCache, ExactEndsCache))
            held += cache.nbytes if counts_itself else sum(a.nbytes for arrays, _, _ in sides for a, _ in arrays)
    return 8 * held / values if values else None


def foreign_bits(prompt_cache: list[Any], plain_cache: list[Any]) -> float | None:
    """`resident_bits` of caches that nothing is known about but their nbytes; None if they have none. plain_cache:
    mlx-lm's, with the same tokens, which tells how many numbers they are."""
    layers = [(c, sides) for c, p in zip(prompt_cache, plain_cache) if (sides := _sides_of(p))]
    values = sum(p.offset * dims * heads for p in plain_cache for _, dims, heads in _sides_of(p) or [])
    if not values or not all(hasattr(c, "nbytes") for c, _ in layers):
        return None
    return 8 * sum(c.nbytes for c, _ in layers) / values


def packed_bits(prompt_cache: list[Any]) -> float | None:
    """Bits per number of packed tokens, scales included, in the cache of a 16-bit model, from the buffers as they are;
    None if there are no such tokens yet."""
    total, values = 0.0, 0
    for sides in filter(None, map(_sides_of, flatten_caches(prompt_cache))):
        if not all(arrays for arrays, _, _ in sides):
            return None
        total += 8 * sum(_bytes_per_token(arrays) for arrays, _, _ in sides)
        values += sum(head_dim * heads for _, head_dim, heads in sides)
    return total / values if values else None


def projected_bits(prompt_cache: list[Any], n_tokens: int = PROJECTED_TOKENS) -> float | None:
    """`resident_bits` of the same caches of a 16-bit model with n_tokens tokens: buffers of exact tokens (sink, recent
    + block) at 16 bits, the rest as packed now, in buffers that grow in steps. None if nothing is packed yet."""
    total, values = 0.0, 0
    for cache in flatten_caches(prompt_cache):
        sides = _sides_of(cache)
        if not sides:
            continue
        if not all(arrays for arrays, _, _ in sides):
            return None
        numbers = sum(head_dim * heads for _, head_dim, heads in sides)
        exact = n_rest = 0
        if isinstance(cache, TurboKVCache):
            n_rest = cache.config.sink + cache.config.recent
            exact = n_rest + cache.config.block
        elif isinstance(cache, ExactEndsCache):
            n_rest = cache.n_sink + cache.n_recent
            exact = n_rest + cache.block
            cache = cache.packed
        capacity = -(-(n_tokens - n_rest) // cache.step) * cache.step
        total += 8 * capacity * sum(_bytes_per_token(arrays) for arrays, _, _ in sides) + 16 * exact * numbers
        values += n_tokens * numbers
    return total / values if values else None
