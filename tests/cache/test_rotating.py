"""Windows: RotatingTurboKVCache against mlx-lm's RotatingKVCache and against a list of tokens."""

import copy

import mlx.core as mx
import mlx_lm.models.cache as lm_cache
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from support import families
from support.arrays import to_numpy
from support.backends import BACKENDS
from support.caches import (
    FAST_BACKENDS,
    RotatingThatSeesKept,
    held_nbytes,
    random_tokens,
    same,
    snapshot,
    stored,
    vectors,
)
from support.machines import WindowMachine

from mlx_turbo import RotatingTurboKVCache, TurboConfig, TurboKVCache, make_prompt_cache
from mlx_turbo.cache import centering
from mlx_turbo.integration import attention
from mlx_turbo.integration.conversion import compress_window

SMALL = dict(recent=4, block=4)
# a chunk, single tokens, chunks longer than the windows below, and decode far past them
LENGTHS = [5, 1, 1, 30, 1, 1, 7, 3, *[1] * 45, 100, *[1] * 20, 90, 2, 60, *[1] * 60]
FAST = pytest.mark.parametrize("backend", FAST_BACKENDS, indirect=True)
KERNELS = pytest.mark.parametrize("backend", [n for n in BACKENDS if n != "oracle"], indirect=True)


@pytest.fixture(autouse=True)
def centering_is_decided_early(monkeypatch):
    """Short prompts with a bias are to have means."""
    monkeypatch.setattr(centering, "FEWEST", 4)


pytestmark = pytest.mark.usefixtures("door")


def attend(cache, tokens, queries, **mask):
    """Attention of a cache's model layer to its tokens and these new ones, as mlx-lm's models do it."""
    mask = cache.make_mask(queries.shape[2], **mask)
    fetched = cache.update_and_fetch(*tokens)
    return fetched, attention.scaled_dot_product_attention(queries, *fetched, cache=cache, scale=0.2, mask=mask)


def steps(lengths, seed=0, bias=0, heads=4, **shape):
    """(keys and values, queries) of each update; bias: a constant vector in all keys, of so many times their size."""
    rng = np.random.default_rng(seed)
    constant = vectors(rng, 1, 2, 1, 32) * bias
    for n in lengths:
        keys, values = random_tokens(rng, n, **shape)
        yield (keys + constant, values), mx.array(rng.standard_normal((1, heads, n, 32)).astype(np.float32) * 0.3)


def error(got, want):
    return np.linalg.norm(to_numpy(got) - to_numpy(want)) / np.linalg.norm(to_numpy(want))


# ---- what attention sees ---------------------------------------------------------------------------------------
@FAST
@pytest.mark.parametrize("scheme, close", [("turbo0", 1e-5), ("turbo8", 0.02), ("turbo4", 0.3), ("auto", 0.3)])
@pytest.mark.parametrize(
    "max_size, keep, config",
    [(16, 0, SMALL), (20, 3, SMALL), (64, 4, SMALL), (40, 2, dict(recent=0, block=1)), (150, 0, {}), (12, 0, {})],
)
def test_attention_is_that_of_mlx_lm_s_rotating_cache(backend, max_size, keep, config, scheme, close):
    cache, theirs = RotatingTurboKVCache(max_size, keep, scheme, **config), RotatingThatSeesKept(max_size, keep)
    errors = []
    for tokens, queries in steps(LENGTHS):
        masks = cache.make_mask(queries.shape[2]), theirs.make_mask(queries.shape[2])
        assert type(masks[0]) is type(masks[1])
        (keys, values), got = attend(cache, tokens, queries)
        (k, v), want = attend(theirs, tokens, queries)
        assert keys.shape == k.shape and values.shape == v.shape
        assert (cache.offset, cache.size()) == (theirs.offset, theirs.size())
        assert cache.is_trimmable() == theirs.is_trimmable()
        assert [x.shape for x in cache.keys_and_values()] == [k.shape, v.shape]
        errors.append(error(got, want))
    assert np.median(errors) < close and max(errors) < 3 * close, (np.median(errors), max(errors))
    assert (max(errors) < 1e-5) == (cache.window <= cache.config.recent or scheme == "turbo0")


@FAST
@pytest.mark.parametrize("max_size, keep", [(16, 0), (20, 3)])
def test_the_tokens_are_the_kept_and_the_newest_in_order(backend, max_size, keep):
    cache, given = RotatingTurboKVCache(max_size, keep, "turbo0", **SMALL), None
    for tokens, queries in steps(LENGTHS):
        given = tokens if given is None else [mx.concatenate(p, axis=2) for p in zip(given, tokens)]
        n, total = queries.shape[2], given[0].shape[2]
        n_newest = max_size - keep - (n > 1) + (n if n > 1 else 0)
        for got, x in zip(cache.update_and_fetch(*tokens), given):
            if total - keep > n_newest:
                x = mx.concatenate([x[:, :, :keep], x[:, :, total - n_newest :]], axis=2)
            assert mx.array_equal(got, x)


@FAST
def test_any_history_gives_the_newest_tokens_of_a_cache_that_evicts_nothing(backend):
    run_state_machine_as_test(
        WindowMachine, settings=settings(max_examples=30, stateful_step_count=15, deadline=None, derandomize=True)
    )


@FAST
@pytest.mark.parametrize("window", [5, 12])
def test_a_mask_for_less_than_the_window_is_mlx_lm_s_in_the_order_of_the_tokens(backend, window):
    cache, theirs = RotatingTurboKVCache(16, 0, "turbo0", **SMALL), lm_cache.RotatingKVCache(16)
    for tokens, queries in steps([3, *[1] * 40, 7, 30, *[1] * 9]):
        got, want = (attend(c, tokens, queries, window_size=window)[1] for c in (cache, theirs))
        np.testing.assert_allclose(to_numpy(got), to_numpy(want), atol=1e-5)


@KERNELS
@pytest.mark.parametrize(
    "scheme, bias", [("turbo4", 5), ("turbo3", 5), ("turbo8v4", 5), ("turbo4", 0), ("turbo0v3", 0)]
)
def test_evicted_tokens_are_not_seen_whatever_the_mask(backend, scheme, bias):
    """Keys with means are cut by segments of 128, and what is evicted of the first one is masked."""
    cache, n_evicted, worst = RotatingTurboKVCache(40, 2, scheme, **SMALL), set(), 0
    for tokens, queries in steps([60, 1, 1, 9, 3, *[1] * 12, 70, 2], bias=bias):
        n, mask = queries.shape[2], cache.make_mask(queries.shape[2])
        keys, values = cache.update_and_fetch(*tokens)
        if type(keys).__name__ != "LazyKV":
            continue
        n_evicted.add(keys.view.n_evicted)
        n_tokens = keys.shape[2]
        assert keys.view.counts[1] - keys.view.n_evicted + keys.view.counts[0] + keys.view.counts[2] == n_tokens
        exact = mx.array(keys), mx.array(values)
        causal = mx.arange(n_tokens) <= mx.arange(n_tokens - n, n_tokens)[:, None]
        additive = mx.where(causal, mx.random.normal((1, 1, n, n_tokens), key=mx.random.key(1)), -1e9)
        for m in (mask, None, "causal", causal, additive):
            got = attention.attend(queries, keys.view, scale=0.2, mask=m)
            want = mx.fast.scaled_dot_product_attention(queries, *exact, scale=0.2, mask=m)
            worst = max(worst, error(got, want))
    assert (len(n_evicted) > 5 and max(n_evicted) > 20) == bool(cache.report()["centred"]) == bool(bias)
    assert worst < 1e-4


@FAST
@pytest.mark.parametrize("name", ["gemma3_text", "gpt_oss", "cohere2", "ministral3"])
def test_models_decode_far_past_their_windows_as_with_mlx_lm_s_cache(backend, name):
    if name not in families.all_names():
        return  # a newer mlx-lm has it
    model, tokens = families.build(name), mx.array(np.random.default_rng(1).integers(0, 96, (1, 150)))

    def logits(cache):
        out = [model(part, cache=cache) for part in mx.split(tokens, [40, 75, 90, *range(91, 150)], axis=1)]
        return to_numpy(mx.concatenate(out, axis=1)[0])

    want = logits(lm_cache.make_prompt_cache(model))
    for scheme, close in ("turbo0", 1e-5), ("turbo8", 0.1):
        cache = make_prompt_cache(model, TurboConfig(scheme, sink=2, **SMALL))
        assert RotatingTurboKVCache in map(type, cache)
        got = logits(cache)
        distance = np.median(np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1))
        assert distance < close and (distance > 1e-5) == (scheme == "turbo8")


# ---- memory ------------------------------------------------------------------------------------------------------
@FAST
@pytest.mark.parametrize("scheme, bias, windows", [("turbo4", 0, 1.3), ("turbo4", 5, 1.8), ("turbo0", 0, 1.3)])
def test_memory_is_bounded_and_copies_are_rare(backend, scheme, bias, windows):
    cache, copies, largest = RotatingTurboKVCache(512, 0, scheme), 0, 0
    for tokens, _ in steps([700, *[50] * 10, *[1] * 900], bias=bias):
        before = cache.n_evicted
        cache.update_and_fetch(*tokens)
        copies += cache.n_evicted > before
        if cache.offset > 1200:
            largest = max(largest, cache._sides[0].codes.shape[2])
            assert cache.nbytes == held_nbytes(cache)
    assert bool(cache.report()["centred"]) == bool(bias)
    assert 512 < largest < windows * 512 and 5 < copies < 2100 / 128 + 2
    report = cache.report()
    assert report["window"] == 512 == report["tokens"] == report["packed"] + report["recent"]
    assert report["uncompressed_nbytes"] == lm_nbytes(512) and report["nbytes"] == cache.nbytes
    assert (report["nbytes"] < 0.6 * report["uncompressed_nbytes"]) == (scheme == "turbo4")


def lm_nbytes(max_size):
    cache = lm_cache.RotatingKVCache(max_size)
    for tokens, _ in steps([max_size, 1, 1]):
        cache.update_and_fetch(*tokens)
    return cache.nbytes


# ---- trim, copies, state -----------------------------------------------------------------------------------------
@FAST
def test_trim_works_until_tokens_are_evicted(backend):
    cache, theirs = RotatingTurboKVCache(30, 3, "turbo0", **SMALL), RotatingThatSeesKept(30, 3)
    for i, (tokens, queries) in enumerate(steps([20, 1, 1, 4, 2, 9, *[1] * 20, 12, 1])):
        got, want = (attend(c, tokens, queries)[1] for c in (cache, theirs))
        np.testing.assert_allclose(to_numpy(got), to_numpy(want), atol=1e-5)
        if i in (1, 3):
            assert cache.trim(9) == theirs.trim(9) == 9
    assert not cache.is_trimmable()
    before = snapshot(cache)
    assert cache.trim(2) == 0 and same(snapshot(cache), before)
    short = RotatingTurboKVCache(30, 3, "turbo4", **SMALL)
    short.update_and_fetch(*next(steps([29]))[0])
    assert short.trim(40) == 29 and short.empty() and short.offset == 0


@FAST
@pytest.mark.parametrize("scheme, bias", [("turbo4", 0), ("turbo4", 5), ("turbo0v4", 0), ("auto", 0)])
@pytest.mark.parametrize("length", [0, 3, 14, 90, 300])
def test_a_copy_and_a_restored_state_go_on_as_the_original(backend, scheme, bias, length):
    cache = RotatingTurboKVCache(64, 2, scheme, **SMALL)
    for tokens, _ in steps([length // 2, 1, length - length // 2 - 1] if length > 2 else [], bias=bias):
        cache.update_and_fetch(*tokens)
    others = copy.deepcopy(cache), RotatingTurboKVCache.from_state(cache.state)
    assert others[1].max_size == 64 and others[1].keep == 2 and others[1].config == cache.config
    for tokens, queries in steps([*[1] * 30, 70, 2, *[1] * 30], seed=1, bias=bias):
        want = attend(cache, tokens, queries)[1]
        for other in others:
            assert mx.array_equal(attend(other, tokens, queries)[1], want)
            assert (other.offset, other.size()) == (cache.offset, cache.size())
    assert same(stored(others[0]), stored(cache))


@FAST
def test_the_state_of_another_class_or_of_a_wrong_window_is_refused(backend):
    cache, plain = (
        kind("turbo4", sink=2, centre=False, **SMALL)
        for kind in (lambda config, sink, **options: RotatingTurboKVCache(32, sink, config, **options), TurboKVCache)
    )
    for tokens, _ in steps([50, 1, *[1] * 30]):
        cache.update_and_fetch(*tokens)
        plain.update_and_fetch(*tokens)
    with pytest.raises(ValueError, match="not the state of a RotatingTurboKVCache"):
        RotatingTurboKVCache.from_state(plain.state)
    with pytest.raises(ValueError, match="not the state of a TurboKVCache"):
        TurboKVCache.from_state(cache.state)
    header = cache.state[0].tolist()
    for at, value in (-2, 2), (-2, 0), (-2, 200), (-1, -1):
        wrong = header[:at] + [value] + header[at:][1:]
        with pytest.raises(ValueError, match="names a window"):
            RotatingTurboKVCache.from_state([mx.array(wrong, mx.int32), *cache.state[1:]])


@FAST
@pytest.mark.parametrize("keep", [0, 3])
def test_a_plain_rotating_cache_comes_back(backend, keep):
    for lengths in [], [9], [20, 1, 1], [20, *[1] * 30, 25], [70, *[1] * 30]:
        cache = RotatingTurboKVCache(24, keep, "turbo0", **SMALL)
        theirs = lm_cache.RotatingKVCache(24, keep)
        for tokens, _ in steps(lengths):
            cache.update_and_fetch(*tokens)
            theirs.update_and_fetch(*tokens)
        plain = cache.to_kv_cache()
        assert type(plain) is lm_cache.RotatingKVCache
        assert (plain.offset, plain.keep, plain.max_size, plain.empty()) == (theirs.offset, keep, 24, theirs.empty())
        for tokens, queries in steps([1, 1, 3, *[1] * 30, 40, 1], seed=1):
            got, want = (attend(c, tokens, queries)[1] for c in (plain, theirs))
            np.testing.assert_allclose(to_numpy(got), to_numpy(want), atol=1e-5)


@FAST
@pytest.mark.parametrize("keep", [0, 3])
def test_the_tokens_of_a_plain_rotating_cache_are_taken_over(backend, keep):
    for lengths in [], [9], [20, 1, 1], [20, *[1] * 30, 25], [70, *[1] * 30]:
        theirs = RotatingThatSeesKept(24, keep)
        for tokens, _ in steps(lengths):
            theirs.update_and_fetch(*tokens)
        cache = compress_window(theirs, TurboConfig("turbo0", **SMALL))
        assert (cache.offset, cache.keep, cache.max_size, cache.empty()) == (theirs.offset, keep, 24, theirs.empty())
        for tokens, queries in steps([1, 1, 3, *[1] * 30, 40, 1], seed=1):
            got, want = (attend(c, tokens, queries)[1] for c in (cache, theirs))
            np.testing.assert_allclose(to_numpy(got), to_numpy(want), atol=1e-5)


@FAST
def test_what_auto_observes_of_a_window_taken_over_is_where_its_keys_are(backend):
    theirs = lm_cache.RotatingKVCache(60)
    for tokens, _ in steps([100, 1]):
        theirs.update_and_fetch(*tokens)
    cache = compress_window(theirs, TurboConfig("auto", **SMALL))
    assert cache.undecided and cache.offset == 101
    for n, positions in (1, [60]), (3, [62, 63]):
        ((tokens, queries),) = steps([n])
        cache.update_and_fetch(*tokens)
        cache.observe(queries, 0.2)
        assert cache._observed[0][-1][1][-len(positions) :] == positions


# ---- the rest ----------------------------------------------------------------------------------------------------
@FAST
def test_its_sink_is_what_the_window_keeps(backend):
    cache = RotatingTurboKVCache(512, 3, TurboConfig("auto", sink=7, recent=32))
    assert (cache.keep, cache.config.sink, cache.config.recent, cache.undecided) == (3, 3, 32, True)


@FAST
@pytest.mark.parametrize(
    "max_size, keep, message",
    [(0, 0, "max_size: got 0"), (8, 8, "keep: got 8, allowed are whole numbers from 0 to 7"), (8, -1, "keep: got -1")],
)
def test_a_window_that_cannot_be_is_refused(backend, max_size, keep, message):
    with pytest.raises(ValueError, match=message):
        RotatingTurboKVCache(max_size, keep)
