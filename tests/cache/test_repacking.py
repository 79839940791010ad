"""Fewer bits for what a cache holds."""

import numpy as np
import pytest
from support.caches import queries_of, random_tokens, same
from support.rows import state_of

from mlx_turbo import Scheme, TurboKVCache


def fed(cache, n, chunk=None, seed=0, **shape):
    """The cache with n random tokens, whose queries it is shown."""
    keys, values = random_tokens(np.random.default_rng(seed), n, **shape)
    for at in range(0, n, chunk or n):
        k, v = (x[:, :, at : at + (chunk or n)] for x in (keys, values))
        fetched = cache.update_and_fetch(k, v)
        cache.observe(queries_of(k), 0.1)
        del fetched
    return cache


def exact(n, config="turbo0", repackable=True, chunk=None, bias=0, **options):
    cache = TurboKVCache(config, **options)
    cache.repackable = repackable
    return fed(cache, n, chunk, bias=bias)


@pytest.mark.parametrize("bias", [0, 20])
@pytest.mark.parametrize("scheme", ["turbo8", "turbo4v3", "turbo5v2"])
@pytest.mark.parametrize("n", [200, 1300])
def test_an_exact_cache_becomes_what_one_chunk_would_have_made(backend, scheme, bias, n):
    """To the bit: centering, means, balance, codes and scales."""
    repacked, once = exact(n, bias=bias), fed(TurboKVCache(scheme), n, bias=bias)
    bits = Scheme.parse(scheme)
    repacked.repack(bits.key_bits, bits.value_bits)
    assert same(state_of(repacked), state_of(once))
    assert repacked.config == once.config and repacked.report()["balance"] == once.report()["balance"]
