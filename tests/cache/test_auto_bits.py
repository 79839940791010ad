"""auto: the layers that need it, and no others, get more bits for their keys; measured, deterministic, visible."""

import copy
import functools

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache
from support import constructed_models as construct
from support.arrays import to_numpy
from support.caches import FAST_BACKENDS, ListModel, held_nbytes, random_tokens, same, snapshot
from support.keys import queries_for, turning
from support.looks import FIRST_LOOKS_AT_ONE
from support.rows import state_of

from mlx_turbo import RotatingTurboKVCache, TurboConfig, TurboKVCache
from mlx_turbo.backends import select
from mlx_turbo.backends.mlx_ops import CpuBackend
from mlx_turbo.cache import attention_error, auto_bits
from mlx_turbo.cli import common
from mlx_turbo.integration import attention, prompt_cache
from mlx_turbo.quality import metrics
from mlx_turbo.quant import reference
from mlx_turbo.quant.scheme import Scheme

fast = pytest.mark.parametrize("backend", FAST_BACKENDS, indirect=True)


def prompt(cache, keys, values, chunk, queries=None, scale=0.125):
    """Feed a prompt as a model does; queries as attention.py would show them, or None."""
    for at in range(0, keys.shape[2], chunk):
        fetched = cache.update_and_fetch(keys[:, :, at : at + chunk], values[:, :, at : at + chunk])
        if queries is not None and fetched:
            cache.observe(queries[:, :, at : at + chunk], scale)


@pytest.fixture(scope="module")
def demo():
    """(the embedded model in float32, 768 tokens of held-out stories)"""
    model, tokenizer = common.load_model(mlx_lm.load, common.DEMO_MODEL, "--model")
    model.set_dtype(mx.float32)
    return model, mx.array(tokenizer.encode((common.DEMO_MODEL / "stories.txt").read_text()[:4000])[:768])


# ---- the measurement ---------------------------------------------------------------------------------------------
@fast
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_the_error_is_the_divergence_of_the_attention_weights(backend, bits, sinks):
    """516 tokens are all sampled: 4 sinks and 4 runs of 128."""
    rng, n, D = np.random.default_rng(0), 516, 64
    keys = rng.standard_normal((2, 2, n, D)) + 2 * rng.standard_normal((2, 2, 1, D))
    queries, positions = rng.standard_normal((2, 4, 3, D)), [300, 400, 515]
    sinks = rng.standard_normal(4) if sinks else None
    restored = keys.copy()
    for s in range(4):
        part = keys[:, :, 4 + 128 * s : 132 + 128 * s]
        restored[:, :, 4 + 128 * s : 132 + 128 * s] = reference.dequantize(
            reference.quantize(part, bits, mean=part.mean(2, keepdims=True))
        )
    weights = []
    for k in (keys, restored):
        logits = 0.3 * queries @ np.repeat(k, 2, 1).swapaxes(-1, -2)
        logits = np.where(np.arange(n) <= np.array(positions)[:, None], logits, -np.inf)
        if sinks is not None:
            logits = np.concatenate([logits, np.broadcast_to(sinks[:, None, None], (2, 4, 3, 1))], -1)
        p = np.exp(logits - logits.max(-1, keepdims=True))
        weights.append(p / p.sum(-1, keepdims=True))
    p, q = weights
    kl = np.where(p > 0, p * np.log(np.maximum(p, 1e-300) / np.maximum(q, 1e-300)), 0).sum(-1)
    want = kl.reshape(2, 2, 6).mean(-1).max()
    sinks = None if sinks is None else mx.array(sinks, mx.float32)
    observed = attention_error.Observed(mx.array(queries, mx.float32), positions, 0.3, sinks)
    got = attention_error.Attention(observed, mx.array(keys, mx.float32), TurboConfig("auto")).errors([bits])[0]
    assert got.shape == (2, 2) and got.max().item() == pytest.approx(want, rel=0.03)


@pytest.mark.parametrize("n, first", [(100, 4), (516, 4), (2048, 0), (2048, 4), (5000, 64)])
def test_a_sampled_key_weighs_as_many_as_it_stands_for(n, first):
    """And is seen by the queries that see it."""
    starts, length = attention_error.sample_keys(n - first)
    weight = to_numpy(attention_error._weight(n, first, tuple(starts), length, (n // 2, n - 1))).astype(np.float64)
    at = [*range(first), *(first + start + i for start in starts for i in range(length))]
    assert weight.shape == (2, len(at))
    counts = np.exp(weight[1])
    assert counts.sum() == pytest.approx(n, rel=1e-5) and np.allclose(counts[:first], 1) and np.ptp(counts[first:]) == 0
    assert [w < -1e29 for w in weight[0]] == [t > n // 2 for t in at]


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 100, 2048])
def test_samples_are_tokens_that_exist_each_once(n):
    queries, (starts, length) = attention_error.sample_queries(n), attention_error.sample_keys(n)
    assert list(queries) == sorted(set(queries)) and 0 <= queries[0] and queries[-1] == n - 1
    assert len(queries) == min(n, attention_error.N_QUERIES) and (
        n < 2 * attention_error.N_QUERIES or queries[0] >= n // 2
    )
    assert all(a + length <= b for a, b in zip(starts, [*starts[1:], n])) and starts[0] == 0
    assert len(starts) * length <= 4 * 128 and (n > 128 or length == n)


# ---- the choice ---------------------------------------------------------------------------------------------------
@fast
@pytest.mark.parametrize("balance", [False, True])
@pytest.mark.parametrize("norm, bits", [(0, 4), (32, 5), (160, 6), (480, 8), (40000, 0)])
def test_keys_get_the_bits_they_need(backend, balance, norm, bits):
    keys, values = turning(512, norm)
    cache = TurboKVCache("auto", balance=balance)
    prompt(cache, keys, values, 512, queries_for(keys))
    report = cache.report()
    assert report["scheme"] == Scheme(bits, 4).name
    assert report["auto"]["by"] == "32 queries" and not report["auto"]["undecided"]
    errors = report["auto"]["error"]
    assert list(errors) == [b for b in (4, 5, 6, 8) if not bits or b <= bits]
    assert [e <= auto_bits.TARGET for e in errors.values()] == [b == bits for b in errors]
    assert cache.nbytes == held_nbytes(cache)


@fast
@pytest.mark.parametrize("norm, bits", [(0, 4), (32, 5), (100, 6), (240, 8), (10000, 0)])
def test_without_queries_the_keys_decide_and_the_report_says_so(backend, norm, bits):
    keys, values = turning(512, norm)
    cache = TurboKVCache("auto")
    prompt(cache, keys, values, 512)
    assert cache.undecided and cache.n_packed == 0
    cache.update_and_fetch(keys[:, :, :1], values[:, :, :1])
    assert cache.report()["scheme"] == Scheme(bits, 4).name
    assert cache.report()["auto"]["by"] == "the keys alone"
    assert cache.n_packed > 0


@fast
def test_observed_queries_are_bytes_of_the_cache_until_it_has_chosen(backend):
    keys, values = turning(300)
    queries = queries_for(keys)
    cache, unseen = TurboKVCache("auto"), TurboKVCache("auto")
    prompt(cache, keys[:, :, :100], values[:, :, :100], 100, queries[:, :, :100])
    prompt(unseen, keys[:, :, :100], values[:, :, :100], 100)
    assert cache.nbytes == held_nbytes(cache) == unseen.nbytes + 32 * 2 * 64 * 4  # 32 query tokens of two heads
    batch = TurboKVCache.merge([cache, unseen])
    assert batch.nbytes == held_nbytes([batch._sides, batch._observed]) > held_nbytes(batch._sides)
    for i in range(100, 110):  # decode steps, whose queries the rows share
        new = [mx.concatenate([x[:, :, i : i + 1]] * 2) for x in (keys, values, queries)]
        batch.update_and_fetch(*new[:2])
        batch.observe(new[2], 0.125)
    assert batch.nbytes == held_nbytes([batch._sides, batch._observed])
    row = batch.extract(1)  # 10 query tokens of its own, and not a view of both rows'
    assert row.nbytes == held_nbytes(row) == sum(side.nbytes for side in row._sides) + 10 * 2 * 64 * 4
    prompt(cache, keys[:, :, 100:], values[:, :, 100:], 200, queries[:, :, 100:])
    assert not cache.undecided and cache.nbytes == sum(side.nbytes for side in cache._sides) == held_nbytes(cache)


@fast
@pytest.mark.parametrize("look", FIRST_LOOKS_AT_ONE.values(), ids=FIRST_LOOKS_AT_ONE)
@pytest.mark.parametrize("make", [TurboKVCache, functools.partial(RotatingTurboKVCache, 164, 4)], ids=["", "window"])
def test_it_chooses_when_somebody_looks_whoever_that_is(backend, make, look):
    """Until then the tokens stay exact, and nobody sees that."""
    keys, values = turning(420, 100)
    caches = [make(config="auto"), make(config="auto")]
    for cache in caches:
        prompt(cache, keys[:, :, :300], values[:, :, :300], 300, queries_for(keys[:, :, :300]))
        assert cache.n_packed == 0 and not cache.wants_queries
    assert caches[0].report()["packed"]
    twin, cache = caches[0], look(caches[1])
    for chunk in (keys[:, :, 300:301], values[:, :, 300:301]), (keys[:, :, 301:], values[:, :, 301:]):
        twin.update_and_fetch(*chunk)
        cache.update_and_fetch(*chunk)
        assert same(state_of(cache), state_of(twin))
    assert cache.report()["scheme"] == "turbo5v4" and cache.nbytes == held_nbytes(cache)


@fast
@pytest.mark.parametrize("rows, n, held", [(1, 300, True), (1, 301, False), (2, 152, True), (2, 153, False)])
def test_many_tokens_are_packed_at_once(backend, monkeypatch, rows, n, held):
    """They would take several times the memory until somebody looks."""
    monkeypatch.setattr(auto_bits, "MOST_HELD", 296)
    monkeypatch.setattr(auto_bits, "FEWEST", 64)
    keys, values = turning(n, 0)
    cache = TurboKVCache("auto", recent=16, block=16)
    prompt(cache, *(mx.concatenate([x] * rows) for x in (keys, values)), n, mx.concatenate([queries_for(keys)] * rows))
    assert (cache.n_packed == 0) == held


@fast
def test_auto_from_another_scheme_never_takes_bits_away(backend):
    keys, values = turning(512, 0)
    for scheme, name in (("turbo3", "turbo4v3"), ("turbo8v2", "turbo8v2"), ("turbo0v4", "turbo0v4")):
        cache = TurboKVCache(scheme, auto=True, balance=False)
        prompt(cache, keys, values, 512, queries_for(keys))
        assert cache.report()["scheme"] == name


@fast
def test_the_choice_is_deterministic_and_packs_what_the_chosen_scheme_packs(backend):
    keys, values = turning(600, 80)
    caches = [TurboKVCache(s) for s in ("auto", "auto", "turbo5v4")]
    for cache in caches:
        prompt(cache, keys, values, 600, queries_for(keys))
    a, b, c = ([to_numpy(x) for x in cache.keys_and_values()] for cache in caches)
    assert same(a, b) and same(a, c)


@fast
def test_a_decode_only_start_decides_by_the_queries_of_the_newest_tokens(backend):
    keys, values = turning(auto_bits.FEWEST + 30, 160)
    cache = TurboKVCache("auto", sink=4)
    prompt(cache, keys, values, 1, queries_for(keys))
    assert cache.report()["auto"]["by"] == "32 queries" and cache.report()["scheme"] == "turbo6v4"
    assert cache.n_packed > 0 and cache.n_recent <= 128


@fast
def test_a_decided_cache_is_a_list_of_tokens_like_any_other(backend):
    cache = TurboKVCache("auto", sink=2, recent=4, block=4)
    model, rng = ListModel(cache), np.random.default_rng(0)
    cache.update_and_fetch(*random_tokens(rng, 300))
    cache.update_and_fetch(*random_tokens(rng, 1))
    cache.trim(10**6)
    assert cache.undecided  # an empty cache starts anew
    keys, values = random_tokens(rng, 300)
    cache.update_and_fetch(keys, values)
    cache.observe(queries_for(keys), 0.01)
    assert cache.report()["scheme"] == "turbo4"
    model.given, model.dtypes = [to_numpy(keys), to_numpy(values)], [mx.float32] * 2
    model.check()
    for n in (1, 1, 1, 1, 1, 9, 40, 1):
        model.append(*random_tokens(rng, n))
        model.trim(2)


@fast
@pytest.mark.parametrize("decided", [False, True])
def test_a_copy_and_a_saved_cache_go_on_as_the_original(backend, decided):
    keys, values = turning(400, 160)
    cache = TurboKVCache("auto")
    prompt(cache, keys[:, :, :300], values[:, :, :300], 300, queries_for(keys[:, :, :300]) if decided else None)
    others = [copy.deepcopy(cache), TurboKVCache.from_state(cache.state)]
    assert [c.undecided for c in (cache, *others)] == [not decided] * 3
    before = snapshot(cache)
    for c in others:
        prompt(c, keys[:, :, 300:], values[:, :, 300:], 1)
    assert same(snapshot(cache), before)
    prompt(cache, keys[:, :, 300:], values[:, :, 300:], 1)
    for c in others:
        assert same([to_numpy(x) for x in c.keys_and_values()], [to_numpy(x) for x in cache.keys_and_values()])
        assert c.report()["scheme"] == cache.report()["scheme"] == ("turbo5v4" if decided else "turbo6v4")


# ---- in a model -----------------------------------------------------------------------------------------------------
@fast
def test_the_first_chunk_is_attended_as_without_a_cache(backend, demo):
    model, tokens = demo
    want = model(tokens[None, :300], cache=[KVCache() for _ in model.layers])
    cache = prompt_cache.make_prompt_cache(model, "auto")
    assert mx.array_equal(model(tokens[None, :300], cache=cache), want)
    assert all(c.report()["auto"]["by"] == "32 queries" and c.n_packed for c in cache)


@fast
def test_without_the_hook_auto_still_decides(backend, demo):
    model, tokens = demo
    cache = prompt_cache.make_prompt_cache(model, "auto")
    attention.uninstall()
    try:
        for at, end in (0, 310), (310, 320):
            model(tokens[None, at:end], cache=cache)
    finally:
        attention.install()
    assert all(c.report()["auto"]["by"] == "the keys alone" and c.report()["scheme"] == "turbo4" for c in cache)
    assert "chosen by the keys alone" in prompt_cache.describe(cache)


@fast
def test_describe_names_the_layers_that_were_raised(backend, demo):
    model, tokens = construct.bad_ends(demo[0], where="middle"), demo[1]
    model = construct.key_bias(model, [3], norm=6000, where="middle")  # more than 8 bits can hold
    cache = prompt_cache.make_prompt_cache(model, TurboConfig("auto", balance=False))
    assert "auto: not yet decided" in prompt_cache.describe(cache)
    model(tokens[None, :300], cache=cache)
    assert "auto: keys at 4 bits in 2 layers, at 8 bits in 1 (0), exact in 1 (3)" in prompt_cache.describe(cache)


HOSTILE = {
    "healthy": lambda m: m,
    "outlier channel": construct.outlier_channel,
    "keys near zero": construct.near_zero_keys,
    "sinks": construct.attention_sinks,
    "value bias": construct.value_bias,
    "bad ends, low": construct.bad_ends,
    "bad ends, middle": lambda m: construct.bad_ends(m, where="middle"),
    "bad ends, all": lambda m: construct.bad_ends(m, where="all"),
    "low": construct.key_bias,
    "middle": lambda m: construct.key_bias(m, where="middle"),
    "all": lambda m: construct.key_bias(m, where="all"),
    "all, norm 100": lambda m: construct.key_bias(m, norm=100, where="all"),
    "middle, one layer": lambda m: construct.key_bias(m, layers=[2], where="middle"),
    "outliers and bias": lambda m: construct.key_bias(construct.outlier_channel(m), where="middle"),
}


@fast
@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_auto_never_costs_more_than_a_hundredth_of_a_nat(backend, demo, name):
    """KLD against the uncompressed cache with nothing exact but the chunk of 16, the hardest case."""
    model, tokens = HOSTILE[name](demo[0]), demo[1]
    ours = prompt_cache.make_prompt_cache(model, TurboConfig("auto", recent=0, block=16))
    plain, total = [KVCache() for _ in model.layers], 0
    for at, end in [(0, 256)] + [(i, i + 16) for i in range(256, 768, 16)]:
        log_p, log_q = (metrics.log_probabilities(model(tokens[None, at:end], cache=c)[0]) for c in (plain, ours))
        total += metrics.kl_divergence(log_p, log_q).sum().item() if at else 0
    assert total / 512 <= 0.01
    if name == "healthy":
        assert {c.report()["scheme"] for c in ours} <= {"turbo4", "turbo5v4"}


@fast
def test_a_healthy_model_keeps_a_third_of_the_bytes_at_32k(backend):
    """The bytes do not depend on the content, beyond the choice, which is that of the embedded model's layers."""
    cache = TurboKVCache("auto")
    keys, values = turning(32768, 0, D=128)
    keys, values = keys.astype(mx.float16), values.astype(mx.float16)
    prompt(cache, keys, values, 2048, queries_for(keys), scale=0.03)
    report = cache.report()
    assert report["scheme"] == "turbo4"
    assert report["uncompressed_nbytes"] >= 3 * report["nbytes"]


def test_ops_is_what_measures(monkeypatch):
    """The measurement runs the backend's own kernels, not a formula: a backend that quantizes badly is found out."""

    class Coarse(CpuBackend):
        def dequantize(self, sides, *args):
            return [mx.round(x) for x in super().dequantize(sides, *args)]

    keys, values = turning(512, 0)
    for backend, bits in ((CpuBackend(), "turbo4"), (Coarse(), "turbo0v4")):
        with select.use_backend(backend):
            cache = TurboKVCache("auto")
            prompt(cache, keys, values, 512, queries_for(keys), scale=3.0 if bits == "turbo0v4" else 0.125)
            assert cache.report()["scheme"] == bits


@fast
@pytest.mark.parametrize("chosen", [0, 8])
def test_keys_that_auto_leaves_exact_beside_exact_values_lie_in_one_buffer_with_all_tokens(
    backend, monkeypatch, chosen
):
    """In a cache, in its copies and states, and in batches with rows that chose otherwise or not yet."""
    monkeypatch.setattr(auto_bits, "choose_key_bits", lambda *a: (chosen, {}, "keys"))
    config, rng = TurboConfig("turbo4v0", auto=True, sink=2, recent=4, block=4), np.random.default_rng(0)
    tokens = random_tokens(rng, 400)
    cache = TurboKVCache(config)
    for at, n in ((0, 300), (300, 1), (301, 99)):
        cache.update_and_fetch(*(x[:, :, at : at + n] for x in tokens))
        assert cache.n_packed + cache.n_recent + cache.n_sink == at + n
    assert not cache.undecided and [side.in_one for side in cache._sides] == [chosen == 0] * 2
    monkeypatch.setattr(auto_bits, "choose_key_bits", lambda *a: (4, {}, "keys"))
    other, young = TurboKVCache(config), TurboKVCache(config)
    for row, n in ((other, 350), (other, 1), (young, 9)):
        row.update_and_fetch(*(x[:, :, :n] for x in tokens))
    batch = cache.merge([cache, other, young])
    assert batch._sides[0].bits == chosen and batch._sides[0].in_one == (chosen == 0)
    for row in cache, TurboKVCache.from_state(cache.state), batch.extract(0):
        for got, want, side in zip(row.keys_and_values(), tokens, row._sides):
            assert side.bits or mx.array_equal(got, want)
    for b, n in ((1, 351), (2, 9)):
        values = batch.extract(b).keys_and_values()[1]
        want = tokens[1][:, :, :9] if b == 2 else mx.concatenate([tokens[1][:, :, :350], tokens[1][:, :, :1]], axis=2)
        assert values.shape[2] == n and mx.array_equal(values, want)
