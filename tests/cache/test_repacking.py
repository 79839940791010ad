"""Fewer bits for what a cache holds: of exact tokens what one chunk would have made, of packed ones a little less."""

import copy
import functools

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.models import cache as lm_cache
from support.arrays import peak, to_numpy
from support.caches import FAST_BACKENDS, WAYS, copied, queries_of, random_tokens, same, snapshot, stored
from support.rows import state_of
from support.strategies import quick

from mlx_turbo import BatchTurboKVCache, RotatingTurboKVCache, Scheme, TurboConfig, TurboKVCache, make_prompt_cache
from mlx_turbo.backends import mlx_ops, statistics
from mlx_turbo.cache import centering, repacking, single
from mlx_turbo.cache.attention_error import sample_queries
from mlx_turbo.integration import attention
from mlx_turbo.quant import reference
from mlx_turbo.quant.scheme import PACKED_BITS

fast = pytest.mark.parametrize("backend", FAST_BACKENDS, indirect=True)


def fed(cache, n, chunk=None, seed=0, **shape):
    """The cache with n random tokens, whose queries it was shown."""
    tokens = random_tokens(np.random.default_rng(seed), n, **shape)
    for at in range(0, n, chunk or n):
        keys, values = (x[:, :, at : at + (chunk or n)] for x in tokens)
        fetched = cache.update_and_fetch(keys, values)
        cache.observe(queries_of(keys), 0.1)
        del fetched
    return cache


def exact(n, chunk=None, repackable=True, config="turbo0", shape=(), **options):
    cache = TurboKVCache(config, **options)
    cache.repackable = repackable
    return fed(cache, n, chunk, **dict(shape))


def packed_codes(cache, n):
    """What it stores of the first n packed tokens."""
    counts = dict(sink=n, codes=n, scale=n, means=-(-n // centering.SEGMENT), balance=1)
    return [
        {name: a if a is None else a[:, :, : counts[name]] for name, a in side.items() if name != "recent"}
        for side in stored(cache)
    ]


# ---- exact tokens ------------------------------------------------------------------------------------------------
@fast
@pytest.mark.parametrize("bias", [0, 20])
@pytest.mark.parametrize("scheme", ["turbo8", "turbo4v3", "turbo5v2", "turbo0v4"])
@pytest.mark.parametrize("n", [200, 2300])
def test_an_exact_cache_becomes_what_one_chunk_would_have_made(backend, scheme, bias, n):
    """To the bit: centering, means, balance, codes and scales."""
    repacked, once = exact(n, shape={"bias": bias}), fed(TurboKVCache(scheme), n, bias=bias)
    bits = Scheme.parse(scheme)
    repacked.repack(bits.key_bits, bits.value_bits)
    assert same(state_of(repacked), state_of(once)) and repacked.config == once.config
    for name in "scheme", "balance", "centred", "packed_bits_per_value", "not_finite":
        assert repacked.report()[name] == once.report()[name]
    assert (once.report()["centred"] == ["keys", "values"]) == (bias > 0 and scheme != "turbo0v4")


@fast
@pytest.mark.parametrize("n", [300, 331])
def test_tokens_that_came_one_by_one_are_packed_as_if_they_had_come_at_once(backend, monkeypatch, n):
    """If the same queries are known. What decoding packs at a time is not what a chunk leaves recent."""
    monkeypatch.setattr(single, "KEPT_EVERY", 1)
    repacked, once = exact(n, 1, shape={"bias": 20}), TurboKVCache("turbo4")
    tokens = random_tokens(np.random.default_rng(0), n, bias=20)
    fetched = once.update_and_fetch(*tokens)
    once.observe(queries_of(tokens[0])[:, :, -32:], 0.1)
    repacked.repack(4, 4)
    n = min(repacked.n_packed, once.n_packed)
    assert n > 100 and same(packed_codes(repacked, n), packed_codes(once, n)) and fetched
    assert repacked.report()["balance"] != "no queries were seen before keys were packed"


@fast
def test_keys_are_balanced_only_if_the_cache_was_told_to_hold_queries(backend):
    told, untold = exact(400), exact(400, repackable=False)
    assert told.wants_queries and not untold.wants_queries and told.nbytes > untold.nbytes
    for cache in told, untold:
        cache.repack(4)
    assert told.report()["balance"].endswith(" of 2 kv heads") and not told.wants_queries
    assert untold.report()["balance"] == "no queries were seen before keys were packed"


@fast
def test_the_newest_queries_are_held_and_no_more(backend):
    """Of decode steps every eighth."""
    cache = exact(600, 200)
    for i in range(300):
        fed(cache, 1, seed=i)
    (seen, scale, sinks), n = cache.observed, cache.offset
    assert [p for _, positions in seen for p in positions] == list(range(n - 4 - 31 * 8, n, 8)) and n == 900
    assert (scale, sinks) == (0.1, None)
    cache.trim(10)
    assert max(p for _, positions in cache.observed[0] for p in positions) == 888


@fast
@pytest.mark.parametrize("make", [TurboKVCache, BatchTurboKVCache])
def test_attention_shows_a_repackable_exact_cache_its_queries_and_computes_what_it_did(backend, door, make):
    """Of caches that are not, it knows nothing: they return plain arrays."""
    rng, outs = np.random.default_rng(0), []
    queries = mx.array(rng.standard_normal((1, 4, 300, 32)), mx.float32)
    tokens = random_tokens(rng, 300)
    told, untold = make("turbo0"), make("turbo0")
    told.repackable = True
    for at, n, newest in ((0, 200, 199), (200, 96, 295), (296, 1, 296), (297, 1, 296), (298, 1, 296)):
        q, k, v = (x[:, :, at : at + n] for x in (queries, *tokens))
        mask = "causal" if n > 1 else None
        outs = [
            attention.scaled_dot_product_attention(q, *cache.update_and_fetch(k, v), cache, 0.1, mask=mask)
            for cache in (told, untold)
        ]
        assert mx.array_equal(*outs)
        of_row = [cache.extract(0) if make is BatchTurboKVCache else cache for cache in (told, untold)]
        assert of_row[0].observed[0][-1][1][-1] == newest and of_row[1].observed is None


@fast
def test_a_window_forgets_queries_of_tokens_that_it_evicts(backend):
    window = RotatingTurboKVCache(256, 4, "turbo0")
    window.repackable = True
    fed(window, 900)
    for i in range(20):
        fed(window, 1, seed=i)
    shown = [*sample_queries(900), 904, 912]
    positions = [p for _, some in window.observed[0] for p in some]
    assert window.n_evicted and len(positions) > 5 and min(positions) >= 4
    assert [p + window.n_evicted for p in positions] == shown[-len(positions) :]
    assert all(queries.shape[2] == len(some) for queries, some in window.observed[0])
    window.repack(4, 4)
    assert window.report()["balance"].endswith("of 2 kv heads")


@fast
@pytest.mark.parametrize("head_dims", [(512, 64), (16, 64)], ids=["latents", "keys that cannot be packed"])
def test_what_is_never_balanced_is_not_on_the_way_either(backend, head_dims):
    shape = dict(heads=1, key_dim=head_dims[0], value_dim=head_dims[1], bias=20)
    repacked, once = exact(300, shape=shape), TurboKVCache("turbo4")
    once.update_and_fetch(*random_tokens(np.random.default_rng(0), 300, **shape))
    assert not repacked.wants_queries or head_dims[0] == 512
    repacked._observed = None  # attention shows none of latents
    repacked.repack(4, 4)
    assert same(state_of(repacked), state_of(once))
    assert repacked.report()["exact"].keys() == ({"keys"} if head_dims[0] == 16 else set())


# ---- packed tokens -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["cache", "window", "batch", "batch of windows"])
def test_packed_tokens_get_what_the_oracle_says_and_new_ones_the_same_bits(backend, kind):
    config = TurboConfig("turbo8v6", recent=8, block=8)
    window = kind.endswith("windows") or kind == "window"
    make = (lambda: RotatingTurboKVCache(200, 4, config)) if window else lambda: TurboKVCache(config)
    cache = fed(make(), 150, bias=20)
    cache = cache.merge([cache, fed(make(), 190, seed=1)]) if kind.startswith("batch") else cache
    rows = [cache.extract(b) for b in (0, 1)] if kind.startswith("batch") else [cache]
    before = [stored(row) for row in rows]
    cache.repack(5, 3)
    rows = [cache.extract(b) for b in (0, 1)] if kind.startswith("batch") else [cache]
    for old, row in zip(before, rows):
        assert row.config.scheme == Scheme(5, 3) and row.report()["scheme"] == "turbo5v3"
        for was, now, a, b in zip(old, stored(row), (8, 6), (5, 3)):
            want = reference.requantize(reference.from_packed(was["codes"], was["scale"], a, 32), b)
            assert np.array_equal(now["codes"], want.packed()) and same(
                [was[name] for name in ("sink", "recent", "means")], [now[name] for name in ("sink", "recent", "means")]
            )
    n_packed = sum(row.n_packed + getattr(row, "n_evicted", 0) for row in rows)
    fed(cache, 20, batch=len(rows))
    rows = [cache.extract(b) for b in (0, 1)] if kind.startswith("batch") else [cache]
    assert all(row.report()["scheme"] == "turbo5v3" for row in rows)
    assert sum(row.n_packed + getattr(row, "n_evicted", 0) for row in rows) > n_packed


@fast
def test_packed_keys_that_wait_for_their_queries_are_balanced_at_the_new_bits(backend):
    """Between an update and its attention."""
    keys, values = random_tokens(np.random.default_rng(0), 400)
    cache, once = TurboKVCache("turbo8"), fed(TurboKVCache("turbo4"), 400)
    fetched = cache.update_and_fetch(keys, values)
    cache.repack(4, 4)
    cache.observe(queries_of(keys), 0.1)
    assert fetched and same(stored(cache)[0], stored(once)[0]) and stored(cache)[0]["balance"] is not None


@fast
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_tokens_that_are_not_finite_stay_so(backend, bad):
    keys, values = random_tokens(np.random.default_rng(0), 300)
    keys[:, 0, 20], values[:, 1, 30] = bad, bad
    for config, *ladder in ("turbo0", (8, 8), (3, 2)), ("turbo6", (4, 3)):
        cache = TurboKVCache(config)
        cache.update_and_fetch(keys, values)
        want = cache.not_finite() if bad != 1e30 or config != "turbo0" else {"keys": [1], "values": [1]}
        for bits in ladder:
            cache.repack(*bits)
            assert cache.not_finite() == want == {"keys": [1], "values": [1]}
        restored = to_numpy(cache.keys_and_values()[0])
        assert not np.isfinite(restored[0, 0, 20]).any() and np.isfinite(np.delete(restored[0, 0], 20, axis=0)).all()


@fast
def test_a_view_of_before_is_still_what_it_was(backend):
    cache = fed(TurboKVCache("turbo8"), 300)
    fetched = cache.keys_and_values()
    want = [to_numpy(x) for x in fetched]
    again = cache.keys_and_values()
    cache.repack(3, 2)
    assert not again[0].view.is_current() and all(map(same, want, map(to_numpy, again)))
    assert not same(want[0], to_numpy(cache.keys_and_values()[0]))


@fast
@pytest.mark.parametrize("way", WAYS)
def test_copies_and_states_go_on_from_fewer_bits(backend, way):
    cache = fed(TurboKVCache("turbo8", recent=4, block=4), 100)
    twin = copy.copy(cache)
    before = snapshot(twin)
    cache.repack(4, 3)
    assert same(snapshot(twin), before)
    again = copied(cache, way)
    assert again.config == cache.config
    for c in cache, again:
        fed(c, 30, 1, seed=3)
    assert same(state_of(again), state_of(cache))


@fast
def test_an_empty_cache_and_one_that_was_trimmed_take_the_new_bits_from_their_next_tokens(backend):
    for n in 0, 1, 2:
        cache, want = fed(TurboKVCache("turbo8", sink=2), 300), fed(TurboKVCache("turbo3v2", sink=2), 300)
        for c in cache, want:
            c.trim(300 - n)
        cache.repack(3, 2)
        assert same(state_of(fed(cache, 200, seed=1)), state_of(fed(want, 200, seed=1)))


@fast
def test_batches_and_their_rows_become_the_same(backend):
    """Of rows that have packed as many tokens, other numbers, or none; with and without means and balance."""
    for lengths in (300, 300), (300, 150, 20, 200), (40, 30), (400,):
        rows = []
        for i, n in enumerate(lengths):
            rows.append(exact(n, shape={"bias": 20 * (i % 2), "seed": i}))
        batch = TurboKVCache.merge(rows)
        for bits in (8, 6), (4, 6), (4, 3):
            batch.repack(*bits)
            for row in rows:
                row.repack(*bits)
            assert all(same(state_of(batch.extract(b)), state_of(row)) for b, row in enumerate(rows)), (lengths, bits)


@fast
@pytest.mark.parametrize("chunks", [(300,), (100, 1, 1), (20, *[1] * 80)])
@pytest.mark.parametrize("make", [TurboKVCache, functools.partial(RotatingTurboKVCache, 256, 4)])
def test_batches_of_exact_rows_hold_the_queries_of_each(backend, make, chunks):
    """Also as windows pack them, which is to move exact tokens to other buffers."""
    *alone, other = (make("turbo0", recent=16, block=16) for _ in range(3))
    for cache in alone:
        cache.repackable = True
    batch, rng = alone[0].merge(alone), np.random.default_rng(0)
    assert batch.extract(1).repackable and other.merge([batch.extract(0), other]).repackable
    for n in chunks:
        keys, values = random_tokens(rng, n, batch=2)
        batch.update_and_fetch(keys, values)
        batch.observe(queries_of(keys), 0.1)
        for b, cache in enumerate(alone):
            cache.update_and_fetch(keys[b : b + 1], values[b : b + 1])
            cache.observe(queries_of(keys)[b : b + 1], 0.1)
    for cache in alone:
        cache.repack(4, 4)
    batch.repack(4, 4)
    assert all(same(state_of(batch.extract(b)), state_of(cache)) for b, cache in enumerate(alone))
    assert batch.report()["balance"].endswith("of 4 kv heads")


@fast
def test_layers_of_any_bits_evict_at_the_same_update_whenever_they_get_them(backend):
    """One mask serves all layers of a batch of windows."""
    layers = []
    for scheme in "turbo0", "turbo0v4", "turbo4", "turbo0":
        config = TurboConfig(scheme, sink=2, recent=8, block=8)
        rows = [RotatingTurboKVCache(100, 2, config) for _ in range(2)]
        for row, n in zip(rows, (90, 150)):
            fed(row, n)
        layers.append(rows[0].merge(rows))
    n_evicted = 0
    for step in range(160):
        assert len({np.array(layer.array_mask(1)).tobytes() for layer in layers}) == 1, step
        for layer in layers:
            fed(layer, 1, seed=step, batch=2)
        if step == 30:
            layers[-1].repack(4, 3)
        assert len({str([layer._n_packed, layer._n_recent, layer._n_evicted]) for layer in layers}) == 1, step
        n_evicted = max(layers[0]._n_evicted)
    assert n_evicted > 100


@fast
def test_a_model_with_exact_caches_that_are_packed_answers_as_if_they_had_been_from_the_start(backend, demo, door):
    """And until then as with mlx-lm's caches. To the bit."""
    model, tokenizer = demo
    prompt = mx.array(tokenizer.encode("The keeper of the lighthouse wrote down what he saw. " * 12))[None]
    prompt, *rest = prompt[:, :-4], prompt[:, -4:-2], prompt[:, -2:-1], prompt[:, -1:]
    exact_ones, uncompressed = make_prompt_cache(model, "turbo0"), lm_cache.make_prompt_cache(model)
    for layer in exact_ones:
        layer.repackable = True
    for x in prompt, rest[0]:
        assert mx.array_equal(*(model(x, cache=c) for c in (exact_ones, uncompressed)))
    once, packed = make_prompt_cache(model, "turbo6v3"), make_prompt_cache(model, "turbo0")
    for layer in packed:
        layer.repackable = True
    for c in once, packed:
        mx.eval(model(prompt, cache=c))
    for layer in packed:
        layer.repack(6, 3)
    for x in rest:
        assert mx.array_equal(*(model(x, cache=c) for c in (once, packed)))
    assert all(same(state_of(a), state_of(b)) for a, b in zip(once, packed))
    assert all(layer.n_packed for layer in packed)


# ---- what is refused ---------------------------------------------------------------------------------------------
INTEGERS = mx.ones((1, 2, 100, 32), mx.int32)


@fast
@pytest.mark.parametrize(
    "config, bits, message",
    [
        ("turbo4", (5, 3), "key_bits: got 5, allowed are [2, 3, 4], of a cache that has 4"),
        ("turbo4", (0, 3), "key_bits: got 0, allowed are [2, 3, 4], of a cache that has 4"),
        ("turbo4v3", (2, 4), "value_bits: got 4, allowed are [2, 3], of a cache that has 3"),
        ("turbo8", (7, None), "key_bits: got 7, allowed are [2, 3, 4, 5, 6, 8], of a cache that has 8"),
        (
            "turbo0",
            (True, None),
            "key_bits: got True, allowed are [0, 2, 3, 4, 5, 6, 8], of a cache whose keys",
        ),
        ("turbo0v4", (4, "3"), "value_bits: got '3', allowed are [2, 3, 4], of a cache that has 4"),
        ("auto", (3, 3), "key_bits: auto has not chosen those of this cache yet, which it does before it packs"),
        ("auto", (None, 3), "key_bits: auto has not chosen"),
    ],
)
def test_what_cannot_be_is_an_error_that_changes_nothing(backend, config, bits, message):
    cache = fed(TurboKVCache(config, recent=4, block=4), 100)
    before, version = snapshot(cache), cache.version
    with pytest.raises(ValueError) as e:
        cache.repack(*bits)
    assert str(e.value).startswith(message)
    assert same(snapshot(cache), before) and cache.version == version


@fast
def test_integers_cannot_be_packed(backend):
    cache = TurboKVCache("turbo0", recent=4, block=4)
    cache.update_and_fetch(INTEGERS, INTEGERS)
    before = snapshot(cache)
    with pytest.raises(ValueError, match="^keys: got mlx.core.int32, which only a cache of turbo0 holds"):
        cache.repack(value_bits=4)
    assert same(snapshot(cache), before)


@fast
def test_as_many_bits_as_there_are_change_nothing(backend):
    for config in "turbo0", "turbo6v3":
        cache = fed(TurboKVCache(config), 300)
        before, version = snapshot(cache), cache.version
        cache.repack()
        cache.repack(cache.config.scheme.key_bits, cache.config.scheme.value_bits)
        assert same(snapshot(cache), before) and cache.version == version


@fast
def test_what_auto_has_chosen_is_the_most_and_then_it_chooses_no_more(backend):
    cache = fed(TurboKVCache("auto"), 400)
    chosen = cache.report()["scheme"]
    assert not cache.undecided
    keys = Scheme.parse(chosen).key_bits
    cache.repack(value_bits=3)
    assert cache.config.scheme == Scheme(keys, 3) and not cache.config.auto and cache.report()["auto"] is None
    assert same(state_of(TurboKVCache.from_state(cache.state)), state_of(cache))
    cache.trim(cache.offset)
    assert not fed(cache, 100).undecided and cache.report()["scheme"] == cache.config.scheme.name


@fast
def test_a_fault_in_the_middle_leaves_a_cache_that_is_what_it_says(backend, monkeypatch):
    """Keys are done and values are not: config.scheme says so."""
    cache, want = exact(300), exact(300)
    want.repack(4)
    pack = repacking.quantize_tokens

    def fails(tails, sides, *rest):
        if sides[0].bits == 3:
            raise MemoryError
        return pack(tails, sides, *rest)

    monkeypatch.setattr(repacking, "quantize_tokens", fails)
    with pytest.raises(MemoryError):
        cache.repack(4, 3)
    assert cache.config.scheme == Scheme(4, 0) and same(state_of(cache), state_of(want))


# ---- memory ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("kind", ["cache", "batch", "rows of other lengths"])
def test_only_the_old_and_the_new_tokens_of_one_side_are_held_at_a_time(backend, kind, monkeypatch):
    """And slices. A copy of the exact tokens in float32 would be 17 MB. (Choosing the balance takes as much for any
    number of tokens.)"""
    monkeypatch.setattr(mlx_ops, "SLICE_VALUES", 1 << 14)
    monkeypatch.setattr(repacking, "SLICE", 256)
    monkeypatch.setattr(statistics, "SLICE", 256)
    n, per_token = 8196, 2 * 4 * 64
    lengths = {"cache": [2 * n], "batch": [n, n], "rows of other lengths": [n, n - 300]}[kind]
    shape = dict(heads=4, key_dim=64, value_dim=64, bias=9, dtype=mx.float16)
    caches = [exact(n, 2048, repackable=False, shape=shape) for n in lengths]
    cache = caches[0] if kind == "cache" else TurboKVCache.merge(caches)
    del caches
    mx.eval(cache.state)
    slack = 2.4e6  # measured: up to 1.7 MB, slices of 2^14 numbers in float32
    for had, now in (0, 8), (8, 6), (6, 4), (4, 2):
        for name in "key_bits", "value_bits":
            used = peak(functools.partial(cache.repack, **{name: now}))
            new = sum(lengths) * per_token // 2 * (now / 8 + 2 / 64) * 1.04  # room to grow by steps
            assert used < new + slack, (kind, had, now, used, new)


# ---- what it costs -----------------------------------------------------------------------------------------------
@quick
@given(
    seed=st.integers(0, 2**32 - 1),
    head_dim=st.sampled_from([64, 128, 256]),
    rungs=st.sets(st.sampled_from(repacking.LADDER[1:]), min_size=2),
    rule=st.sampled_from(["inner-product", "least-squares"]),
)
def test_the_ladder_costs_little_more_than_packing_once(seed, head_dim, rungs, rule):
    """Rungs may be skipped. The bound is of the mean squared error at the last one."""
    x = np.random.default_rng(seed).standard_normal((600, head_dim))
    first, *rest = sorted(rungs, reverse=True)
    rows = reference.quantize(x, first, scale=rule)
    for bits in rest:
        rows = reference.requantize(rows, bits, scale=rule)
        once = reference.dequantize(reference.quantize(x, bits, scale=rule))
        more = np.square(reference.dequantize(rows) - x).mean() / np.square(once - x).mean() - 1
        assert -0.01 < more <= repacking.MORE_ERROR[bits], (bits, more)


def test_the_ladder_leaves_out_the_rung_that_costs():
    """5 bits between 6 and 4."""
    x, errors = np.random.default_rng(0).standard_normal((600, 128)), {}
    for rungs in (6, 4), (6, 5, 4), (6, 5):
        rows = reference.quantize(x, rungs[0])
        for bits in rungs[1:]:
            rows = reference.requantize(rows, bits)
        once = reference.dequantize(reference.quantize(x, rungs[-1]))
        errors[rungs] = np.square(reference.dequantize(rows) - x).mean() / np.square(once - x).mean() - 1
    assert errors[6, 4] < 0.05 and errors[6, 5, 4] > 0.15 and errors[6, 5] > 0.2
    assert set(repacking.LADDER) == {0, *PACKED_BITS} - {5} and list(repacking.MORE_ERROR) == list(repacking.LADDER[2:])


@fast
def test_attention_over_a_cache_that_went_down_the_ladder_errs_little_more(backend):
    rng = np.random.default_rng(0)
    tokens = random_tokens(rng, 700, heads=2, key_dim=64, value_dim=64)
    queries, errors = to_numpy(queries_of(tokens[0]))[:, :, -64:], {}
    want = reference.attention(queries, *map(to_numpy, tokens), scale=0.125, mask="causal")
    for bits in repacking.LADDER[1:]:
        once, cache = TurboKVCache(Scheme(bits, bits)), TurboKVCache("turbo0")
        cache.repackable = True
        for c in once, cache:
            fetched = c.update_and_fetch(*tokens)
            c.observe(queries_of(tokens[0]), 0.125)
            del fetched
        for rung in repacking.LADDER[1 : repacking.LADDER.index(bits) + 1]:
            cache.repack(rung, rung)
        errors[bits] = []
        for c in once, cache:
            got = reference.attention(queries, *map(to_numpy, c.keys_and_values()), scale=0.125, mask="causal")
            errors[bits].append(np.square(got - want).mean())
    assert errors[8][0] == errors[8][1]
    for bits, (once, laddered) in errors.items():
        assert laddered < 1.25 * once, (bits, errors[bits])
