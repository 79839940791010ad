"""Turbo caches from mlx-lm's caches, and mlx-lm's caches from ours. What a cache's own methods `to_kv_cache` and
`to_quantized` return is made here: the caches themselves do not know mlx-lm."""

import warnings
from typing import Any, Union

import mlx.core as mx

from ..cache.batch import BatchTurboKVCache
from ..cache.batch_rotating import BatchRotatingTurboKVCache
from ..cache.conversion import register_converter
from ..cache.rotating import RotatingTurboKVCache
from ..cache.single import TurboKVCache
from ..quant.scheme import Scheme, TurboConfig


def compress_window(
    cache: Any,
    config: Union[str, Scheme, TurboConfig],
    kind: type[RotatingTurboKVCache] = RotatingTurboKVCache,
) -> RotatingTurboKVCache:
    """A RotatingTurboKVCache, of a class `kind`, with the tokens of a RotatingKVCache of mlx-lm or mlx-vlm."""
    if cache.empty():
        return kind(cache.max_size, cache.keep, config)
    keys, values = (cache._temporal_order(x) for x in (cache.keys, cache.values))
    return kind.from_newest(cache.max_size, cache.keep, config, keys, values, cache.offset)


def to_kv_cache(cache: TurboKVCache) -> Any:
    """As the method TurboKVCache.to_kv_cache."""
    from mlx_lm.models import cache as lm_cache

    if isinstance(cache, BatchRotatingTurboKVCache):
        if cache.keep:
            raise ValueError(f"to_kv_cache: mlx-lm's batch of windows keeps no first tokens, this keeps {cache.keep}")
        return _batch_to_kv_cache(cache, lm_cache.BatchRotatingKVCache, cache.max_size)
    if isinstance(cache, BatchTurboKVCache):
        return _batch_to_kv_cache(cache, lm_cache.BatchKVCache)
    plain: Any
    if isinstance(cache, RotatingTurboKVCache):
        plain = lm_cache.RotatingKVCache(cache.max_size, cache.keep)
    else:
        plain = lm_cache.KVCache()
    if cache.offset:
        plain.keys, plain.values = (mx.array(x) for x in cache.keys_and_values())
        plain.offset = cache.offset
        if isinstance(cache, RotatingTurboKVCache):
            plain._idx = plain.keys.shape[2]
    return plain


def _batch_to_kv_cache(cache, kind, *options):
    """mlx-lm's batch cache of a kind, which is made with `options` and the padding of its rows."""
    if cache.empty():
        return kind(*options, cache.padding_to_come)
    if cache.is_mid_prompt:
        raise ValueError("to_kv_cache: padding of the prompt is still to come")
    return kind.merge([cache.extract(b).to_kv_cache() for b in range(cache.n_rows)])


def to_quantized(cache: TurboKVCache, group_size: int = 64, bits: int = 4) -> Any:
    """As the method TurboKVCache.to_quantized."""
    if cache.never_quantized:
        raise NotImplementedError(
            f"to_quantized: mlx-lm has no quantized cache of a {cache.never_quantized}, which "
            f"kv_bits asks for; without kv_bits this one stays {cache.config.name}"
        )
    from mlx_lm.models.cache import QuantizedKVCache

    quantized: Any = QuantizedKVCache(group_size, bits)
    if cache.offset:
        quantized.keys, quantized.values = (mx.quantize(x, group_size, bits) for x in cache.keys_and_values())
        quantized.offset = cache.offset
    warnings.warn(
        f"a TurboKVCache ({cache.config.name}) becomes mlx-lm's QuantizedKVCache ({bits} bits, groups of "
        f"{group_size}), made of its restored tokens: without kv_bits it stays {cache.config.name}",
        stacklevel=3,  # whoever called the cache's method
    )
    return quantized


register_converter("to_kv_cache", to_kv_cache)
register_converter("to_quantized", to_quantized)
