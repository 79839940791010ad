"""Centring: it is exact, it engages only where a mean carries energy, and it takes a large bias out of 4-bit keys."""

import copy

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.models.cache import KVCache
from support.arrays import to_numpy
from support.caches import FAST_BACKENDS, ListModel, header, held_nbytes, random_tokens, same, stored
from support.keys import biased_keys
from support.looks import FIRST_LOOKS_AT_ONE, FIRST_LOOKS_AT_TWO
from support.rows import state_of
from support.strategies import CHUNKS, CONFIGS, SHAPES, quick

from mlx_turbo import BatchTurboKVCache, TurboConfig, TurboKVCache, make_prompt_cache
from mlx_turbo.cache import centering
from mlx_turbo.cli import common
from mlx_turbo.integration import attention
from mlx_turbo.quality import metrics
from mlx_turbo.quant import reference, rotation

fast = pytest.mark.parametrize("backend", FAST_BACKENDS, indirect=True)


def centred(cache):
    return cache.report()["centred"]


def attention_kl(queries, keys, restored, scale):
    """KL of attention weights, nats: mean over queries."""

    def weights(k):
        logits = scale * queries @ k.swapaxes(-1, -2)
        p = np.exp(logits - logits.max(-1, keepdims=True))
        return p / p.sum(-1, keepdims=True)

    p, q = weights(keys), np.maximum(weights(restored), 1e-300)
    return (p * (np.log(np.maximum(p, 1e-300)) - np.log(q))).sum(-1).mean()


# ---- against a list of tokens: means by segment, whatever the chunks, cuts and copies ------------------------------
@fast
@quick
@given(
    config=CONFIGS,
    sizes=CHUNKS,
    cuts=st.lists(st.integers(0, 20), min_size=8, max_size=8),
    shape=SHAPES,
    bias=st.sampled_from([0, 3, 50]),
)
def test_biased_tokens_in_any_chunks_equal_a_list_of_tokens(backend, short_segments, config, sizes, cuts, shape, bias):
    rng, model = np.random.default_rng(0), ListModel(TurboKVCache(config))
    for n, cut in zip(sizes, cuts):
        model.append(*random_tokens(rng, n + 1, **shape, bias=bias))
        model.trim(cut)
        model.cache = copy.deepcopy(model.cache) if cut % 2 else TurboKVCache.from_state(model.cache.state)
        model.check()


@fast
def test_every_segment_has_the_mean_of_its_own_tokens(backend, short_segments):
    cache = TurboKVCache("turbo4", sink=2, recent=4, block=4)
    keys, values = random_tokens(np.random.default_rng(0), 62, bias=20)
    cache.update_and_fetch(keys[:, :, :50], values[:, :, :50])  # 44 packed: 5 segments and a half
    for i in range(50, 62):
        cache.update_and_fetch(keys[:, :, i : i + 1], values[:, :, i : i + 1])
    n_packed = header(cache)["n_packed"]
    means = to_numpy(centering.plain(mx.array(stored(cache)[0]["means"]), 0))
    tokens = to_numpy(keys)[0, 1, 2:]
    assert n_packed == 52 and means.shape[2] == 7
    for s in range(5):
        np.testing.assert_allclose(means[0, 1, s], tokens[8 * s : 8 * s + 8].mean(0), rtol=2e-3)
    np.testing.assert_allclose(means[0, 1, 5], tokens[40:48].mean(0), rtol=2e-3)  # 4 recent tokens were at hand
    np.testing.assert_allclose(means[0, 1, 6], tokens[48:56].mean(0), rtol=2e-3)
    assert not means[0, 0].any()  # the head without a bias
    value_mean = stored(cache)[1]["means"]
    assert value_mean.shape[2] == 1
    want = to_numpy(values)[0, 1, 2:50].mean(0)
    np.testing.assert_allclose(to_numpy(centering.plain(mx.array(value_mean), 0))[0, 1, 0], want, rtol=2e-3)


# ---- exact -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("scheme", ["turbo4", "turbo8v4", "turbo0v3", "turbo3v0"])
def test_attention_over_a_centred_cache_is_that_over_its_restored_tokens(backend, scheme, sinks):
    rng = np.random.default_rng(0)
    cache = TurboKVCache(scheme, recent=8, block=8)
    cache.update_and_fetch(*random_tokens(rng, 200, batch=2, key_dim=64, value_dim=64, bias=9))
    keys, values = cache.update_and_fetch(*random_tokens(rng, 1, batch=2, key_dim=64, value_dim=64, bias=9))
    assert centred(cache) == [
        name
        for name, bits in zip(("keys", "values"), (cache.config.scheme.key_bits, cache.config.scheme.value_bits))
        if bits
    ]
    queries = mx.array(rng.standard_normal((2, 4, 1, 64)), mx.float32)
    sinks = mx.array([0.5, -3, 2, 0], mx.float32) if sinks else None
    got = attention.attend(queries, attention.view_of(keys, values), scale=0.05, sinks=sinks)
    want = reference.attention(
        to_numpy(queries),
        to_numpy(keys),
        to_numpy(values),
        scale=0.05,
        sinks=None if sinks is None else to_numpy(sinks),
    )
    assert np.abs(to_numpy(got) - want).max() < 1e-4 * np.abs(want).max()


# ---- only where the mean carries energy -------------------------------------------------------------------------
@fast
@quick
@given(sizes=CHUNKS, shape=SHAPES, seed=st.integers(0, 99))
def test_tokens_without_a_mean_are_stored_as_without_centering(backend, sizes, shape, seed):
    states = []
    for centre in (True, False):
        rng, cache = np.random.default_rng(seed), TurboKVCache("turbo4", recent=4, block=4, sink=2, centre=centre)
        for n in sizes:
            cache.update_and_fetch(*random_tokens(rng, n + 1, **shape))
        assert centred(cache) == []
        states.append((stored(cache), cache.nbytes))
    assert same(*states)


@pytest.mark.parametrize("share, engages", [(0.2, False), (0.3, True)])
@fast
def test_the_mean_must_carry_a_quarter_of_the_energy(backend, share, engages):
    rng, D = np.random.default_rng(0), 64
    mean = rng.standard_normal(D)
    mean *= np.sqrt(share * D) / np.linalg.norm(mean)
    x = mx.array(rng.standard_normal((1, 2, 600, D)) * np.sqrt(1 - share) + mean, mx.float32)
    cache = TurboKVCache("turbo4")
    cache.update_and_fetch(x, x)
    assert centred(cache) == (["keys", "values"] if engages else [])


@fast
def test_a_row_s_codes_do_not_depend_on_the_rest_of_the_batch(backend):
    rng = np.random.default_rng(0)
    rows = [random_tokens(rng, 300, bias=b) for b in (0, 30)]
    alone = []
    for keys, values in rows:
        cache = TurboKVCache("turbo4")
        cache.update_and_fetch(keys, values)
        alone.append(stored(cache))
    both = TurboKVCache("turbo4")
    both.update_and_fetch(*(mx.concatenate(x) for x in zip(*rows)))
    for i, side in enumerate(stored(both)):
        for row in (0, 1):
            for name in ("codes", "scale"):
                np.testing.assert_array_equal(side[name][row], alone[row][i][name][0])
            if alone[row][i]["means"] is None:
                assert not side["means"][row].any()
            else:
                np.testing.assert_array_equal(side["means"][row], alone[row][i]["means"][0])


# ---- nobody waits to know it -----------------------------------------------------------------------------------------
def batch_of_two(config):
    return BatchTurboKVCache(config, [0, 0])


LOOKS = [(TurboKVCache, name, look) for name, look in FIRST_LOOKS_AT_ONE.items()]
LOOKS += [(batch_of_two, name, look) for name, look in FIRST_LOOKS_AT_TWO.items()]


@fast
@pytest.mark.parametrize("bias", [0, 30])
@pytest.mark.parametrize("chunk", [75, 1])
@pytest.mark.parametrize("make, look", [(a, c) for a, _, c in LOOKS], ids=[f"{a.__name__} {b}" for a, b, _ in LOOKS])
def test_whoever_looks_first_finds_what_was_decided(backend, make, look, chunk, bias):
    """Tokens are packed, and means stored, before anybody knows whether there are means. Nobody sees that."""
    config, n_rows = TurboConfig("turbo4", sink=2, recent=8, block=64), 1 + (make is batch_of_two)
    tokens = random_tokens(np.random.default_rng(0), 170, batch=n_rows, bias=bias)
    caches = make(config), make(config)
    for at in range(0, 75, chunk):
        for cache in caches:
            mx.eval(cache.update_and_fetch(*(x[:, :, at : at + chunk] for x in tokens)))
    assert all(cache._to_pack or side.stored_means is not None for cache in caches for side in cache._sides)
    caches[0].report()
    twin, cache = caches[0], look(caches[1])
    for at in 75, 76, 77:
        for c in twin, cache:
            c.update_and_fetch(*(x[:, :, at : at + 1] for x in tokens))
    for c in twin, cache:
        c.update_and_fetch(*(x[:, :, 78:] for x in tokens))
    assert centred(cache) == (["keys", "values"] if bias else [])
    assert same(state_of(cache), state_of(twin)) and cache.nbytes == held_nbytes([cache._sides, cache._observed])


# ---- when the mean is chosen --------------------------------------------------------------------------------------
@fast
def test_a_prompt_of_one_token_is_centred_when_the_first_tokens_are_packed(backend):
    rng, cache = np.random.default_rng(0), TurboKVCache("turbo4", sink=1, recent=32, block=32)
    for i in range(66):
        cache.update_and_fetch(*random_tokens(rng, 1, bias=30))
        assert centred(cache) == (["keys", "values"] if i == 65 else [])
    assert cache.n_packed == 32


@fast
def test_a_later_chunk_that_differs_gets_means_of_its_own_for_keys_and_keeps_the_first_for_values(backend):
    rng, cache = np.random.default_rng(0), TurboKVCache("turbo4", sink=0, recent=0)
    cache.update_and_fetch(*random_tokens(rng, 256, bias=30))
    first = stored(cache)
    cache.update_and_fetch(*random_tokens(rng, 256, bias=-50))
    keys, values = stored(cache)
    np.testing.assert_array_equal(keys["means"][:, :, :2], first[0]["means"])
    means = to_numpy(centering.plain(mx.array(keys["means"]), 0))[0, 1].mean(-1)
    np.testing.assert_allclose(means, [30, 30, -50, -50], atol=0.5)
    np.testing.assert_array_equal(values["means"], first[1]["means"])


@fast
def test_a_bias_that_only_comes_later_is_not_centred(backend):
    """Whether a head is centred is decided once; `auto` is there for what this leaves."""
    rng, cache = np.random.default_rng(0), TurboKVCache("turbo4", sink=0, recent=0)
    cache.update_and_fetch(*random_tokens(rng, 256))
    cache.update_and_fetch(*random_tokens(rng, 256, bias=50))
    assert centred(cache) == []


@fast
def test_trimming_all_packed_tokens_lets_the_next_ones_choose_anew(backend):
    rng, cache = np.random.default_rng(0), TurboKVCache("turbo4", sink=2, recent=4, block=4)
    cache.update_and_fetch(*random_tokens(rng, 100, bias=30))
    cache.trim(98)
    cache.update_and_fetch(*random_tokens(rng, 100))
    assert centred(cache) == []
    cache.trim(10**6)
    cache.update_and_fetch(*random_tokens(rng, 100, bias=30))
    assert centred(cache) == ["keys", "values"]


@fast
def test_a_mean_beyond_float16_in_rotated_space_is_left_out(backend):
    one = np.zeros(64)
    one[5] = 1.6e5
    x = mx.array(np.broadcast_to(rotation.unrotate(one), (1, 1, 300, 64)), mx.float32)  # numbers of 2e4
    cache = TurboKVCache("turbo4")
    cache.update_and_fetch(x, x)
    assert not stored(cache)[0]["means"].any()
    assert np.isfinite(to_numpy(cache.keys_and_values()[0])).all()


# ---- what it is for -------------------------------------------------------------------------------------------------
@fast
@pytest.mark.parametrize("scheme", ["turbo4", "turbo3"])
@pytest.mark.parametrize("D, pairs", [(128, range(54, 64)), (64, range(27, 32)), (80, range(34, 40))])
def test_a_key_bias_of_norm_600_in_low_frequencies_costs_at_most_half_more(backend, D, pairs, scheme):
    """Attention KL against that of the same keys without bias. Uncentred it is 50 times as much."""
    n, kl = 2048, {}
    for norm in (0, 600):
        for centre in (True, False):
            rng = np.random.default_rng(0)
            keys = biased_keys(rng, n, D, norm, pairs)
            queries = rng.standard_normal((1, 1, 64, D))
            cache = TurboKVCache(scheme, centre=centre)
            cache.update_and_fetch(mx.array(keys, mx.float32), mx.array(keys, mx.float32))
            kl[norm, centre] = attention_kl(queries, keys, to_numpy(cache.keys_and_values()[0]), 8 / np.sqrt(D))
            assert ("keys" in centred(cache)) == (centre and norm > 0)
    assert kl[600, True] < 1.5 * kl[0, True]
    assert kl[600, False] > 20 * kl[0, False]


@fast
def test_one_mean_for_all_keys_fails_where_the_bias_turns(backend, monkeypatch):
    """Why keys have a mean per segment: a bias at 1e-3 radians per token has turned by 8 after 8,192 tokens."""
    rng = np.random.default_rng(0)
    keys = biased_keys(rng, 8192, 64, 600, [16])
    queries, kl = rng.standard_normal((1, 1, 64, 64)), []
    for segment in (centering.SEGMENT, 1 << 20):
        monkeypatch.setattr(centering, "SEGMENT", segment)
        cache = TurboKVCache("turbo4")
        for at in range(0, 8192, 2048):
            cache.update_and_fetch(*2 * [mx.array(keys[:, :, at : at + 2048], mx.float32)])
        kl.append(attention_kl(queries, keys, to_numpy(cache.keys_and_values()[0]), 1.0))
    assert kl[0] < kl[1] / 10


@fast
def test_means_count_in_the_report(backend):
    cache = TurboKVCache("turbo4", sink=0, recent=0)
    cache.update_and_fetch(*random_tokens(np.random.default_rng(0), 1024, key_dim=64, value_dim=64, bias=30))
    keys_and_values = 2 * (64 * 4 + 16) / 128
    assert cache.report()["packed_bits_per_value"] == pytest.approx(keys_and_values + 16 / 128 / 2 + 16 / 1024 / 2)
    config = TurboConfig("turbo4", centre=False)
    assert TurboKVCache(config).config.centre is False


@fast
def test_centering_does_a_healthy_model_no_harm(backend):
    """The embedded model normalizes its keys, and some of its heads carry a third of their energy in their means."""
    model, tokenizer = common.load_model(mlx_lm.load, common.DEMO_MODEL, "--model")
    model.set_dtype(mx.float32)
    tokens = mx.array(tokenizer.encode((common.DEMO_MODEL / "stories.txt").read_text()[:4000])[:512])
    divergence = []
    for centre in (True, False):
        ours = make_prompt_cache(model, TurboConfig("turbo3", sink=0, recent=0, block=16, centre=centre))
        plain, total = [KVCache() for _ in model.layers], 0
        for at in range(0, 512, 64):
            log_p, log_q = (
                metrics.log_probabilities(model(tokens[None, at : at + 64], cache=c)[0]) for c in (plain, ours)
            )
            total += metrics.kl_divergence(log_p, log_q).sum().item()
        divergence.append(total)
        assert any(c.report()["centred"] for c in ours) == centre
    assert divergence[0] < 1.2 * divergence[1]  # measured: 1.09; over 3 x 2,048 tokens with the defaults 0.83
