"""How far a compressed cache moves a model's output (perplexity, KL divergence, agreement of the most likely token),
and how many bits per number it takes.

The first three are teacher-forced: the model reads a given text through its cache chunk by chunk, so that it attends to
tokens read back from the cache. Small chunks matter, because the tokens of the current chunk are exact in our caches.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from ..cache.single import TurboKVCache
from ..integration.prompt_cache import flatten_caches

PROJECTED_TOKENS = 32768


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
    for one window), "top1" (fraction)}, the prompt cache after the last window).
    """
    sums: dict[str, list[list[float]]] = {name: [] for name in make_caches}  # per window: [nll, kld, top1] per token
    for window in windows:
        caches = {name: make() for name, make in make_caches.items()}
        tokens, n = mx.array(window), len(window) - 1
        totals = {name: mx.zeros(3) for name in caches}
        for start in range(0, n, chunk):
            inputs, targets = tokens[start : min(start + chunk, n)], tokens[start + 1 : start + chunk + 1]
            log_p = None
            for name, cache in caches.items():
                log_q = log_probabilities(model(inputs[None], cache=cache)[0])
                log_p = log_q if log_p is None else log_p
                totals[name] += mx.stack(
                    [
                        negative_log_likelihood(log_q, targets).sum(),
                        kl_divergence(log_p, log_q).sum(),
                        same_top1(log_p, log_q).sum().astype(mx.float32),
                    ]
                )
                mx.eval(totals[name])
            if progress:
                progress(len(inputs))
        for name, total in totals.items():
            values: Any = total.tolist()
            sums[name].append([x / n for x in values])
    n_tokens, results = [len(window) - 1 for window in windows], {}
    for name, rows in sums.items():
        nll, kld, top1 = (sum(n * x for n, x in zip(n_tokens, column)) / sum(n_tokens) for column in zip(*rows))
        results[name] = (
            {"perplexity": perplexity(nll), "kld": kld, "kld_se": standard_error([r[1] for r in rows]), "top1": top1},
            caches[name],
        )
    return results


# ---- bits per number -----------------------------------------------------------------------------------------
_Side = tuple[list[tuple[Any, int]], int, int]


def _sides_of(cache: Any) -> list[_Side] | None:
    """Keys and values of one layer's cache as ([(array that grows with the tokens, tokens per row)], head_dim, batch *
    kv heads), or None for a cache that holds no plain keys and values."""
    from mlx_lm.models.cache import KVCache, QuantizedKVCache

    if type(cache) not in (KVCache, QuantizedKVCache, TurboKVCache) or cache.offset == 0:
        return None
    if isinstance(cache, TurboKVCache):
        return [
            (
                [(a, n) for a, n in ((side.codes, 1), (side.scale, 1), (side.means, side.segment)) if a is not None],
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
            ours = isinstance(cache, TurboKVCache)
            held += cache.nbytes if ours else sum(a.nbytes for arrays, _, _ in sides for a, _ in arrays)
    return 8 * held / values if values else None


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
            exact, n_rest = (
                cache.config.sink + cache.config.recent + cache.config.block,
                cache.config.sink + cache.config.recent,
            )
        capacity = -(-(n_tokens - n_rest) // cache.step) * cache.step
        total += 8 * capacity * sum(_bytes_per_token(arrays) for arrays, _, _ in sides) + 16 * exact * numbers
        values += n_tokens * numbers
    return total / values if values else None
