"""Caches of several kinds in one batch, from either side: the batch holds the tokens of each row, or it is an error."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import BatchKVCache, BatchRotatingKVCache, KVCache, RotatingKVCache
from support.arrays import to_numpy
from support.caches import random_tokens, snapshot

from mlx_turbo import RotatingTurboKVCache, TurboConfig, TurboKVCache
from mlx_turbo.backends import select

CONFIG = TurboConfig("turbo8", sink=2, recent=4, block=4)
WINDOW = dict(sink=0, recent=4, block=4)
KINDS = {
    "plain": KVCache,
    "turbo8": lambda: TurboKVCache(CONFIG),
    "turbo4": lambda: TurboKVCache(CONFIG, scheme="turbo4"),
    "another seed": lambda: TurboKVCache(CONFIG, seed=7),
    "another layer's": lambda: TurboKVCache(CONFIG),  # with another head_dim
    "exact": lambda: TurboKVCache(CONFIG, scheme="turbo0"),
}
WINDOWS = {
    "plain": lambda: RotatingKVCache(16),
    "turbo8": lambda: RotatingTurboKVCache(16, 0, "turbo8", **WINDOW),
    "turbo4": lambda: RotatingTurboKVCache(16, 0, "turbo4", **WINDOW),
    "it keeps tokens": lambda: RotatingTurboKVCache(16, 2, "turbo8", **WINDOW),
    "a longer one": lambda: RotatingTurboKVCache(20, 0, "turbo8", **WINDOW),
}


@pytest.fixture(autouse=True)
def on_the_cpu(door):
    with select.use_backend("cpu"):
        yield


def made(kinds, kind, n, rng):
    """(a cache of a kind with n tokens, those of them that the next query sees)"""
    cache, tokens = kinds[kind](), random_tokens(rng, n, key_dim=64 if kind == "another layer's" else 32)
    if n:
        cache.update_and_fetch(*tokens)
    kept = min(getattr(cache, "keep", 0), n)
    seen = np.r_[:kept, n - cache.size() + kept : n]
    return cache, [to_numpy(x)[0][:, seen] for x in tokens]


def rows_of(batch):
    """Keys and values [H, n, D] of each row of a batch of any kind."""
    n_rows = batch.offset.shape[0]
    if batch.empty():
        return [None] * n_rows
    if isinstance(batch, (BatchKVCache, BatchRotatingKVCache)):
        pads = np.maximum(np.array(batch.left_padding), 0)
        keys, values = (to_numpy(x)[:, :, : batch._idx] for x in (batch.keys, batch.values))
        return [[x[b, :, pads[b] :] for x in (keys, values)] for b in range(n_rows)]
    alone = [batch.extract(b) for b in range(n_rows)]
    return [None if c.empty() else [to_numpy(x)[0] for x in (c.keys, c.values)] for c in alone]


def check(batch, given):
    for got, want in zip(rows_of(batch), given, strict=True):
        for x, y in zip(got or [], want) if want[0].size else []:
            assert x.shape == y.shape and np.linalg.norm(x - y) <= 0.2 * np.linalg.norm(y)
        assert got or not want[0].shape[1]


def mixed(kinds):
    """Merged at once, and as two batches of which one is extended by the other."""
    rows = st.lists(
        st.tuples(st.sampled_from(list(kinds)), st.one_of(st.just(0), st.integers(1, 60))), min_size=2, max_size=3
    )

    @settings(max_examples=120, deadline=None, derandomize=True, database=None)
    @given(rows, st.booleans())
    def run(rows, extended):
        rng = np.random.default_rng(0)
        caches, wanted = zip(*(made(kinds, kind, n, rng) for kind, n in rows))
        ours = [c for c in caches if isinstance(c, TurboKVCache)]
        before = [snapshot(c) for c in ours if type(c) is TurboKVCache]
        uniform = len({kind for kind, _ in rows}) == 1
        try:
            if extended:
                batch, other = type(caches[0]).merge(caches[:1]), type(caches[1]).merge(caches[1:])
                batch.extend(other)
            else:
                batch = type(caches[0]).merge(caches)
        except ValueError as e:
            assert not uniform
            assert "plain" in dict(rows) or str(e).startswith(("caches: ", "other: ")), e
            outcomes.add((rows[0][0], "refused"))
        else:
            check(batch, wanted)
            outcomes.add((rows[0][0], "works" if not uniform else "uniform"))
            new = random_tokens(rng, 1, batch=len(rows), key_dim=batch.keys.shape[3] if not batch.empty() else 32)
            batch.make_mask(1)
            assert batch.update_and_fetch(*new)[0].shape[0] == len(rows)
        for cache, was in zip([c for c in ours if type(c) is TurboKVCache], before):
            assert str(snapshot(cache)) == str(was)

    outcomes = set()
    run()
    return outcomes


def test_a_mix_of_caches_works_or_is_refused():
    outcomes = mixed(KINDS)
    assert {("plain", "works"), ("turbo8", "refused"), ("turbo8", "uniform"), ("turbo4", "refused")} <= outcomes


def test_a_mix_of_windows_works_or_is_refused():
    outcomes = mixed(WINDOWS)
    assert {
        ("plain", "works"),
        ("turbo8", "refused"),
        ("turbo8", "uniform"),
        ("it keeps tokens", "refused"),
    } <= outcomes


@pytest.mark.parametrize("n", [30, 200])
def test_a_plain_row_first_gets_the_tokens_of_a_compressed_one(n):
    """Issue 20: up to 128 tokens its keys were others, without an error."""
    rng = np.random.default_rng(1)
    plain, packed = KVCache(), TurboKVCache("turbo8")
    tokens = [random_tokens(rng, 20), random_tokens(rng, n)]
    plain.update_and_fetch(*tokens[0])
    packed.update_and_fetch(*tokens[1])
    check(plain.merge([plain, packed]), [[to_numpy(x)[0] for x in pair] for pair in tokens])
    with pytest.raises(ValueError, match="caches: got a KVCache, allowed are TurboKVCaches"):
        packed.merge([packed, plain])


def test_a_window_that_keeps_tokens_is_no_row_of_a_batch_that_keeps_none():
    rng = np.random.default_rng(1)
    plain, keeps = RotatingKVCache(16), RotatingTurboKVCache(16, 4, "turbo8", recent=4, block=4)
    for cache in plain, keeps:
        cache.update_and_fetch(*random_tokens(rng, 30))
    with pytest.raises(ValueError, match="mlx-lm's batch of windows keeps no first tokens, this window keeps 4"):
        plain.merge([plain, keeps])
    with pytest.raises(ValueError, match="keeps no first tokens"):
        plain.merge([plain]).extend(keeps.merge([keeps]))
    with pytest.raises(ValueError, match="other: got a BatchTurboKVCache, allowed is a BatchRotatingTurboKVCache"):
        keeps.merge([keeps]).extend(TurboKVCache.merge([TurboKVCache()]))
    mx.eval(keeps.keys)
