"""What the tests of the prompt store share: prompt caches of made-up models, whose keys and values follow from the
tokens, and their bits."""

import functools
import pickle

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models.cache as lm_cache
import numpy as np
from mlx.utils import tree_flatten
from support.caches import queries_of

from mlx_turbo import RotatingTurboKVCache, TurboKVCache
from mlx_turbo.integration.prompt_cache import flatten_caches
from mlx_turbo.store.raw import to_raw

DIM, N_HEADS = 32, 2
# what a layer may be, by name; `whole`: cannot be cut
KINDS = {
    "turbo": lambda config: TurboKVCache(config),
    "window": lambda config: RotatingTurboKVCache(4000, 0, config),
    "plain": lambda config: lm_cache.KVCache(),
    "list": lambda config: lm_cache.CacheList(TurboKVCache(config), lm_cache.KVCache()),
}
WHOLE = {
    "full window": lambda config: RotatingTurboKVCache(60, 2, config),
    "their window": lambda config: lm_cache.RotatingKVCache(50),
    "states": lambda config: lm_cache.ArraysCache(2),
    "quantized": lambda config: lm_cache.QuantizedKVCache(32, 4),
}


def tiny_model(seed=0):
    """Something with weights: the store asks a model for nothing else."""
    mx.random.seed(seed)
    return nn.Linear(4, 4)


def tokens_of(n, seed=0):
    """n tokens that `feed` knows."""
    return np.random.default_rng(seed).integers(0, 64, n).tolist()


def made(kinds, config):
    """An empty prompt cache with a layer of each kind."""
    return [(KINDS | WHOLE)[kind](config) for kind in kinds]


@functools.lru_cache
def _table():
    return np.random.default_rng(5).standard_normal((64, N_HEADS, DIM)).astype(np.float32)


def feed(prompt_cache, tokens, chunks, dtype=mx.float16, bias=0.0):
    """Append tokens to all layers, in chunks of these sizes and then in one. Keys and values follow from the token, its
    position and the layer."""
    done = 0
    for n in [*chunks, len(tokens)]:
        part = np.array(tokens[done : done + n])
        if not len(part):
            continue
        for i, cache in enumerate(flatten_caches(prompt_cache)):
            if isinstance(cache, lm_cache.ArraysCache):
                cache[0] = mx.array(_table()[part].sum(0, keepdims=True)) + (0 if cache[0] is None else 0.5 * cache[0])
                continue
            at = np.arange(cache.offset, cache.offset + len(part))
            x = _table()[part] * (1 + 0.1 * np.cos(at / (i + 3)))[:, None, None]
            keys = mx.array(x.transpose(1, 0, 2)[None] + np.float32(bias)).astype(dtype)
            returned = cache.update_and_fetch(keys, keys[..., ::-1])
            if isinstance(cache, TurboKVCache):
                cache.observe(queries_of(keys), 0.1)
            del returned
        done += len(part)
    return prompt_cache


def bits(prompt_cache):
    """Everything that a prompt cache holds, as plain values that can be compared."""
    out = []
    for cache in flatten_caches(prompt_cache):
        state = cache.state
        if type(cache) is lm_cache.KVCache and cache.keys is not None:  # without the room for more tokens
            state = cache.keys[:, :, : cache.offset], cache.values[:, :, : cache.offset], cache.offset
        flat = [
            (name, (str(x.dtype), to_raw(x).tolist()) if isinstance(x, mx.array) else x)
            for name, x in tree_flatten([list(state), getattr(cache, "observed", None) or ""])
        ]
        out.append((type(cache).__name__, flat))
    return pickle.dumps([[type(c).__name__ for c in prompt_cache], out])


def trimmed(prompt_cache, n):
    """The same cache, trimmed to n tokens."""
    for cache in prompt_cache:
        for member in flatten_caches([cache]):
            member.trim(member.offset - n)
    return prompt_cache
