"""TurboKVCache against a list of tokens in NumPy, against the oracle, and against mlx-lm's contract of a cache."""

import copy
import pickle
import subprocess
import sys
import threading

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test
from mlx_lm.models.cache import KVCache
from support.arrays import peak, to_numpy
from support.caches import (
    DTYPES,
    FAST_BACKENDS,
    WAYS,
    ListModel,
    copied,
    filled,
    header,
    held_nbytes,
    random_tokens,
    restore,
    same,
    snapshot,
    stored,
    vectors,
)
from support.machines import CacheMachine
from support.strategies import CHUNKS, CONFIGS, SHAPES, quick

from mlx_turbo import RotatingTurboKVCache, Scheme, TurboConfig, TurboKVCache
from mlx_turbo.backends import select
from mlx_turbo.backends.mlx_ops import CpuBackend
from mlx_turbo.backends.self_test import compare_quantized, compare_vectors
from mlx_turbo.cache.state import FORMAT_VERSION, HEADER_NAMES
from mlx_turbo.quant.reference import dequantize, quantize
from mlx_turbo.quant.scheme import SCALES

fast = pytest.mark.parametrize("backend", FAST_BACKENDS, indirect=True)


def split(keys, values, sizes):
    start = 0
    for n in sizes:
        yield keys[:, :, start : start + n], values[:, :, start : start + n]
        start += n


# ---- against a list of tokens --------------------------------------------------------------------------------
@fast
@quick
@given(config=CONFIGS, sizes=CHUNKS, shape=SHAPES, seed=st.integers(0, 99))
def test_any_chunks_under_any_configuration_equal_a_list_of_tokens(backend, config, sizes, shape, seed):
    model = ListModel(TurboKVCache(config))
    for keys, values in split(*random_tokens(np.random.default_rng(seed), sum(sizes), **shape), sizes):
        if keys.shape[2] or model.offset:
            model.append(keys, values)


@fast
@quick
@given(config=CONFIGS, sizes=CHUNKS, cuts=st.lists(st.integers(0, 40), min_size=1, max_size=8), seed=st.integers(0, 99))
def test_trim_then_append_equals_a_list_of_tokens(backend, config, sizes, cuts, seed):
    rng, model = np.random.default_rng(seed), ListModel(TurboKVCache(config))
    for n, cut in zip(sizes, cuts):
        model.append(*random_tokens(rng, n + 1))
        model.trim(cut)
    model.append(*random_tokens(rng, 3))


@fast
@pytest.mark.parametrize(
    "cut, parts",
    [
        (2, (2, 24, 4)),
        (6, (2, 24, 0)),
        (13, (2, 17, 0)),
        (30, (2, 0, 0)),
        (31, (1, 0, 0)),
        (32, (0, 0, 0)),
        (33, (0, 0, 0)),
        (10**6, (0, 0, 0)),
        (0, (2, 24, 6)),
        (-3, (2, 24, 6)),
    ],
    ids=[
        "recent",
        "all recent",
        "packed",
        "all packed",
        "sink",
        "all",
        "one too many",
        "far too many",
        "nothing",
        "a negative number",
    ],
)
def test_trim_takes_the_newest_tokens_wherever_they_are(backend, cut, parts):
    cache = TurboKVCache("turbo4", sink=2, recent=4, block=4)
    model, rng = ListModel(cache), np.random.default_rng(0)
    for n in (10, 20, 1, 1):
        model.append(*random_tokens(rng, n))
    assert model.cache.offset == 32
    model.trim(cut)
    assert tuple(header(cache)[n] for n in ("n_sink", "n_packed", "n_recent")) == parts
    for n in (1, 9, 1):
        model.append(*random_tokens(rng, n))


@fast
@quick
@given(sizes=CHUNKS, cuts=st.lists(st.integers(0, 40), min_size=8, max_size=8), config=CONFIGS, shape=SHAPES)
def test_turbo0_equals_kvcache_bit_for_bit(backend, sizes, cuts, config, shape):
    ours = TurboKVCache(TurboConfig("turbo0", config.sink, config.recent, config.block))
    theirs, rng = KVCache(), np.random.default_rng(0)
    for n, cut in zip(sizes, cuts):
        new = random_tokens(rng, n + 1, **shape)
        for a, b in zip(ours.update_and_fetch(*new), theirs.update_and_fetch(*new)):
            assert a.dtype == b.dtype and same(to_numpy(a), to_numpy(b))
        assert ours.trim(cut) == theirs.trim(cut) and ours.offset == theirs.offset


@fast
@quick
@given(config=CONFIGS, shape=SHAPES, sizes=st.tuples(CHUNKS, CHUNKS))
def test_stored_codes_do_not_depend_on_how_the_prompt_was_cut(backend, config, shape, sizes):
    n = max(map(sum, sizes))
    keys, values = random_tokens(np.random.default_rng(1), n, **shape)
    caches = []
    for cut in sizes:
        cache = TurboKVCache(config)
        for k, v in split(keys, values, [*filter(None, cut), n - sum(cut)]):
            cache.update_and_fetch(k, v) if k.shape[2] else None
        caches.append(cache)
    both = min(header(c)["n_packed"] for c in caches)
    for a, b in zip(*map(stored, caches)):
        for name in ("codes", "scale"):
            if both and a[name] is not None:
                np.testing.assert_array_equal(a[name][:, :, :both], b[name][:, :, :both])


@fast
def test_any_history_of_operations_equals_a_list_of_tokens(backend, door):
    run_state_machine_as_test(CacheMachine, settings=settings(quick, max_examples=40, stateful_step_count=25))


def test_every_backend_stores_and_restores_what_the_oracle_does(backend):
    model, rng = ListModel(TurboKVCache("turbo8v3", sink=2, recent=3, block=2)), np.random.default_rng(5)
    for n in (11, 1, 1, 4):
        model.append(*random_tokens(rng, n, key_dim=64, value_dim=64))
    model.trim(6)
    model.append(*random_tokens(rng, 2, key_dim=64, value_dim=64))


def test_keys_and_values_may_differ_in_dtype_and_head_dim(backend):
    model, rng = ListModel(TurboKVCache("turbo4", sink=1, recent=2, block=2)), np.random.default_rng(6)
    for n in (7, 1, 3):
        model.append(vectors(rng, 1, 2, n, 64, dtype=mx.bfloat16), vectors(rng, 1, 2, n, 32, dtype=mx.float32))


@fast
def test_restored_tokens_are_the_oracle_s_quantized_and_back(backend):
    keys, values = random_tokens(np.random.default_rng(2), 30, key_dim=64, value_dim=64)
    cache = TurboKVCache("turbo4v2", sink=2, recent=4, block=4)
    fetched = [cache.update_and_fetch(keys, values), cache.keys_and_values()]
    assert all(same(to_numpy(a), to_numpy(b)) for a, b in zip(fetched[0], (keys, values)))
    for x, got, bits in zip((keys, values), fetched[1], (4, 2)):
        assert (
            compare_vectors(to_numpy(got)[:, :, 2:26], dequantize(quantize(to_numpy(x)[:, :, 2:26], bits)), mx.float32)
            is None
        )


# ---- mlx-lm's contract ---------------------------------------------------------------------------------------
def test_a_new_cache_is_true_and_without_length_or_what_mlx_lm_takes_for_a_quantized_one():
    cache = TurboKVCache()
    assert cache and not hasattr(cache, "__len__")
    assert not hasattr(cache, "bits") and not isinstance(cache, KVCache)
    assert cache.empty() and cache.size() == cache.offset == cache.nbytes == 0 and cache.is_trimmable()
    assert type(cache.offset) is int and cache.keys is None and cache.values is None
    assert cache.config == TurboConfig("turbo4", sink=4, recent=64, block=64)


def test_options_replace_what_the_configuration_says():
    cache = TurboKVCache(TurboConfig("turbo8v4", sink=7, recent=9), recent=3)
    assert cache.config == TurboConfig(Scheme(8, 4), sink=7, recent=3)


@fast
@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("offset", [0, 40])
def test_masks_are_those_of_kvcache(backend, n, offset):
    ours, theirs = TurboKVCache("turbo4", sink=2, recent=4, block=4), KVCache()
    if offset:
        new = random_tokens(np.random.default_rng(0), offset)
        ours.update_and_fetch(*new), theirs.update_and_fetch(*new)
    for kwargs in (
        dict(return_array=False, window_size=None),
        dict(return_array=True, window_size=None),
        dict(return_array=False, window_size=7),
        dict(return_array=True, window_size=7),
    ):
        got, want = ours.make_mask(n, **kwargs), theirs.make_mask(n, **kwargs)
        if isinstance(want, mx.array):
            assert got.dtype == want.dtype and got.tolist() == want.tolist()
        else:
            assert type(got) is type(want) and got == want


@fast
def test_a_deepcopy_goes_its_own_way(backend):
    cache = filled(40)
    twin, before = copy.deepcopy(cache), snapshot(cache)
    twin.trim(20)
    twin.update_and_fetch(*random_tokens(np.random.default_rng(9), 15))
    assert same(snapshot(cache), before)
    before = snapshot(twin)
    cache.trim(40)
    cache.update_and_fetch(*random_tokens(np.random.default_rng(8), 15))
    assert same(snapshot(twin), before)


@fast
def test_a_cache_made_from_a_state_goes_its_own_way(backend):
    # 258 = 2 sink tokens and packed buffers that are full to the last row
    cache = filled(258, recent=0, block=1)
    state = cache.state
    twins, before = [TurboKVCache.from_state(state), TurboKVCache.from_state(state)], snapshot(cache)
    want = [np.array(a) for a in state]
    for other in (cache, twins[0]):
        other.trim(100)
        other.update_and_fetch(*random_tokens(np.random.default_rng(9), 20))
    assert same(snapshot(twins[1]), before) and same([np.array(a) for a in state], want)


@fast
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("scheme", ["turbo0", "turbo3", "turbo0v4", "turbo8v0"])
@pytest.mark.parametrize("n", [0, 1, 2, 5, 40])
def test_a_cache_made_from_a_state_is_the_same_cache(backend, scheme, n, dtype):
    cache = filled(n, scheme, key_dim=64, value_dim=32, dtype=dtype) if n else TurboKVCache(scheme, seed=3)
    twin = TurboKVCache.from_state(cache.state, "")
    assert twin.config == cache.config and twin.meta_state == cache.meta_state == ""
    assert same(snapshot(twin)[2:], snapshot(cache)[2:])
    new = random_tokens(np.random.default_rng(1), 9, key_dim=64, value_dim=32, dtype=dtype)
    for a, b in zip(cache.update_and_fetch(*new), twin.update_and_fetch(*new)):
        assert a.dtype == b.dtype and same(to_numpy(a), to_numpy(b))


@fast
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [mx.int8, mx.int32, mx.uint8, mx.uint64], ids=str)
def test_turbo0_stores_whole_numbers_as_kvcache_does(backend, door, dtype, way):
    ours, theirs = TurboKVCache("turbo0", sink=2, recent=4, block=4), KVCache()
    rng, low, high = np.random.default_rng(0), mx.iinfo(dtype).min, mx.iinfo(dtype).max
    for n in (20, 1, 1, 7):
        new = [mx.array(rng.integers(low, high, (1, 2, n, 1), str(dtype).split(".")[-1])) for _ in range(2)]
        for a, b in zip(ours.update_and_fetch(*new), theirs.update_and_fetch(*new)):
            assert a.dtype == b.dtype == dtype and same(np.array(a), np.array(b))
        ours = copied(ours, way)
    assert ours.report()["packed"] > 10


@fast
@pytest.mark.parametrize("scheme", ["turbo8", "turbo0v4", "turbo4v0", "auto"])
def test_where_a_side_is_rounded_whole_numbers_are_refused(backend, scheme):
    cache = TurboKVCache(scheme)
    with pytest.raises(ValueError, match="keys: got mlx.core.int32, allowed are .*float32$"):
        cache.update_and_fetch(*[mx.zeros((1, 1, 5, 32), mx.int32)] * 2)
    assert cache.empty() and cache.keys is None
    state = filled(9, scheme).state  # nor are they in a state
    state[0] = state[0] + mx.array([4 * (n == "key_dtype") for n in HEADER_NAMES], mx.int32)
    with pytest.raises(ValueError, match="dtype number 6, there are 3 for "):
        TurboKVCache.from_state(state)


@fast
def test_state_is_arrays_only(backend):
    cache = filled(12)
    assert isinstance(cache.state, list) and all(isinstance(a, mx.array) for a in cache.state)
    assert cache.state[0].dtype == mx.int32


@fast
def test_keys_can_be_tied_to_another_computation(backend):
    model, rng = ListModel(TurboKVCache("turbo4", sink=2, recent=4, block=4)), np.random.default_rng(0)
    in_a_model = {"__name__": "mlx_lm.models.llama", "mx": mx}
    exec("def tie(cache, x):\n cache.keys = mx.depends(cache.keys, x)\n return cache.keys", in_a_model)
    for n in (1, 20, 1, 7, 1):
        model.append(*random_tokens(rng, n))
        tied = in_a_model["tie"](model.cache, mx.array(3.0) + 1)  # mlx-lm's pipeline models: a send or receive
        assert tied.shape[2] <= 8 and model.cache._sides[0].recent is tied  # nothing is restored for it
        model.check()


def held_after(make):
    """(bytes that are held more than before, what `make` returns)."""
    mx.synchronize()
    before = mx.get_active_memory()
    made = make()
    mx.synchronize()
    return mx.get_active_memory() - before, made


@fast
@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy])
def test_a_copy_costs_nothing_until_one_of_the_two_goes_on(backend, way):
    cache, rng = filled(3000, key_dim=64, value_dim=64), np.random.default_rng(1)
    mx.eval(cache.state)
    used, twin = held_after(lambda: way(cache))
    assert used < cache.nbytes / 20 and same(snapshot(twin), before := snapshot(cache))
    twin.keys = mx.zeros_like(twin.keys)  # new arrays in the copy
    twin.update_and_fetch(*random_tokens(rng, 30, key_dim=64, value_dim=64))
    assert same(snapshot(cache), before) and not to_numpy(twin.keys)[:, :, :3000].any()
    keys = to_numpy(twin.keys)
    cache.update_and_fetch(*random_tokens(rng, 1, key_dim=64, value_dim=64))
    assert np.array_equal(to_numpy(twin.keys), keys)


@fast
def test_a_pickle_is_as_large_as_the_state_and_comes_back_in_another_process(backend, tmp_path):
    rng = np.random.default_rng(2)
    cache = filled(2000, key_dim=64, value_dim=64)
    fetched = cache.update_and_fetch(*random_tokens(rng, 1, key_dim=64, value_dim=64))
    mx.eval(fetched)
    (tmp_path / "cache").write_bytes(
        pickle.dumps([cache, TurboKVCache.merge([cache, filled(5, key_dim=64, value_dim=64)])])
    )
    assert (tmp_path / "cache").stat().st_size < 3.1 * sum(a.nbytes for a in cache.state)
    assert len(pickle.dumps(fetched[0])) < fetched[0].nbytes + 1000
    assert type(pickle.loads(pickle.dumps(fetched[0]))) is mx.array
    there = f"""
import pickle, numpy as np, mlx_turbo
with mlx_turbo.use_backend("cpu"), open({str(tmp_path / "cache")!r}, "rb") as file:
    cache, batch = pickle.load(file)
    np.savez({str(tmp_path / "tokens.npz")!r}, keys=cache.keys, values=cache.values, row=batch.extract(0).keys)
"""
    subprocess.run([sys.executable, "-c", there], check=True)
    got = np.load(tmp_path / "tokens.npz")
    for name, want in (("keys", cache.keys), ("values", cache.values), ("row", cache.keys)):
        np.testing.assert_allclose(got[name], to_numpy(want), rtol=1e-5, atol=1e-5)


@fast
def test_what_cannot_be_set_is_an_error_and_changes_nothing(backend):
    cache, full = filled(20), RotatingTurboKVCache(8, 0, "turbo4", recent=2, block=2)
    full.update_and_fetch(*random_tokens(np.random.default_rng(0), 20))
    batch, empty = TurboKVCache.merge([filled(20), filled(3)]), TurboKVCache("turbo4")
    twice, before = mx.concatenate([cache.keys] * 2, axis=2), [snapshot(c) for c in (cache, full)]
    for thing, name, wrong, error, message in (
        (cache, "keys", twice, ValueError, r"keys: got mlx.core.float32 \(1, 2, 40, 32\), expected .* or fewer tokens"),
        (cache, "values", cache.values.astype(mx.float16), ValueError, "values: got mlx.core.float16"),
        (cache, "values", cache.values[:, :1], ValueError, "values: got"),
        (cache, "keys", cache.keys[0], ValueError, "keys: got"),
        (cache, "keys", [1], TypeError, "keys: got list, expected an mx.array or None"),
        (cache, "offset", 21, ValueError, "offset: got 21, allowed is 0 to 20; update_and_fetch"),
        (cache, "offset", -1, ValueError, "offset: got -1"),
        (cache, "offset", 3.0, ValueError, "offset: got 3.0"),
        (empty, "keys", twice, ValueError, "keys: the cache is empty; update_and_fetch"),
        (full, "keys", full.keys[:, :, 1:], ValueError, "keys: cannot be set in a full window"),
        (full, "offset", 19, ValueError, "offset: got 19, allowed is 20, as a full window cannot go back"),
        (batch, "offset", batch.offset - 1, ValueError, "offset: of a batch it cannot be set; trim"),
        (batch, "keys", batch.keys, ValueError, "keys: of a batch they cannot be set; extract"),
    ):
        with pytest.raises(error, match=message):
            setattr(thing, name, wrong)
    old = cache.keys
    cache.offset = np.int64(20)
    for tokens, message in (
        (batch.keys, "keys: of a batch they cannot be set"),
        (full.values, "values: cannot be set in a full window"),
        (old, "keys: the cache has changed since this array was read from it; read keys again"),
    ):
        with pytest.raises(ValueError, match=message):
            tokens[:, :, 3] = 0
    assert same([snapshot(c) for c in (cache, full)], before)
    cache.keys = None
    assert cache.empty() and cache.keys is None


@fast
def test_an_empty_update_changes_nothing(backend):
    new, none = random_tokens(np.random.default_rng(0), 20), random_tokens(np.random.default_rng(0), 0, value_dim=64)
    cache = TurboKVCache("turbo4", sink=2, recent=4, block=4)
    assert [tuple(x.shape) for x in cache.update_and_fetch(*none)] == [(1, 2, 0, 32), (1, 2, 0, 64)]
    assert cache.empty() and cache.nbytes == 0
    cache.update_and_fetch(*new)
    before = snapshot(cache)
    fetched = cache.update_and_fetch(*(x[:, :, :0] for x in new))
    assert same([to_numpy(x) for x in fetched], [to_numpy(x) for x in cache.keys_and_values()])
    assert same(snapshot(cache), before)


@fast
def test_keys_and_values_of_an_empty_cache_are_an_error(backend):
    with pytest.raises(ValueError, match="cache is empty"):
        TurboKVCache().keys_and_values()


@fast
@pytest.mark.parametrize("recent", [0, 4, 64])
@pytest.mark.parametrize("sizes", [(1,), (3,), (100,), (3, 100), (100, 10)], ids=str)
@pytest.mark.parametrize("evaluated", ["what was returned", "the state"])
@pytest.mark.parametrize(
    "make",
    [lambda c: c, copy.deepcopy, lambda c: TurboKVCache.from_state(c.state)],
    ids=["itself", "deepcopy", "from_state"],
)
def test_a_cache_can_go_on_in_another_thread(backend, recent, sizes, evaluated, make):
    rng, outcome = np.random.default_rng(0), []
    before, after = ([random_tokens(rng, n) for n in ns] for ns in (sizes, (1, 80, 1)))
    mx.eval(before, after)
    cache = TurboKVCache("turbo4", sink=2, recent=recent, block=4)
    for new in before:
        fetched = cache.update_and_fetch(*new)
        mx.eval(fetched if evaluated == "what was returned" else cache.state)
    cache = make(cache)
    del fetched

    def go_on():
        try:
            for new in after:
                mx.eval(cache.update_and_fetch(*new))
            mx.eval(cache.state)
        except Exception as e:
            outcome.append(e)

    thread = threading.Thread(target=go_on)
    thread.start()
    thread.join()
    assert outcome == [] and cache.offset == sum(sizes) + 82


@fast
def test_report_says_what_the_cache_holds(backend):
    cache = filled(40, "turbo8v4", dtype=mx.float16)
    report = cache.report()
    assert {k: report[k] for k in ("scheme", "tokens", "sink", "packed", "recent")} == dict(
        scheme="turbo8v4", tokens=40, sink=2, packed=34, recent=4
    )
    assert report["nbytes"] == cache.nbytes and report["uncompressed_nbytes"] == 2 * 256 * 2 * 32 * 2
    assert report["packed_bits_per_value"] == 6 + 16 / 32 and report["backend"] == backend.describe()
    assert TurboKVCache().report()["packed_bits_per_value"] == 0


# ---- memory --------------------------------------------------------------------------------------------------
@fast
@pytest.mark.parametrize("scheme, want", [("turbo4", 4.125), ("turbo3", 3.125), ("turbo2", 2.125), ("turbo6v5", 5.625)])
def test_bits_per_value_of_32k_tokens(backend, scheme, want):
    n, chunk, cache = 32768, 4096, TurboKVCache(scheme)
    x = vectors(np.random.default_rng(0), 1, 1, chunk, 128, dtype=mx.float16)
    for _ in range(n // chunk):
        cache.update_and_fetch(x, x)
    head = header(cache)
    assert (head["n_sink"], head["n_packed"], head["n_recent"]) == (4, n - 68, 64)
    arrays = [a for side in cache._sides for a in (side.codes, side.scale)]
    exact = [a for side in cache._sides for a in (side.sink, side.recent)]
    per_row = [a.nbytes / a.shape[2] for a in arrays]
    assert sum(per_row) * 8 / (2 * 128) == want == cache.report()["packed_bits_per_value"]
    packed = sum(a.nbytes for a in arrays)
    assert 1 <= packed * 8 / (2 * 128 * head["n_packed"]) / want < 1.01  # room for tokens to come
    assert sum(a.nbytes for a in exact) == 2 * (4 + 128) * 128 * 2  # sink, and recent with a block's room
    assert held_nbytes(cache) == packed + sum(a.nbytes for a in exact) == cache.nbytes


@fast
def test_decoding_writes_in_place(backend):
    n = 4 + 64 + 150 * 256 + 10  # of the packed buffers' last 256 rows, 10 are taken
    cache = filled(n, heads=1, key_dim=128, value_dim=128, dtype=mx.float16, sink=4, recent=64, block=64, chunk=5000)
    mx.eval(cache.state)
    packed, new = (
        cache._sides[0].codes.nbytes,
        random_tokens(np.random.default_rng(1), 1, heads=1, key_dim=128, value_dim=128, dtype=mx.float16),
    )
    mx.eval(new)
    shapes = [a.shape for side in cache._sides for a in side.buffers()]

    def decode(n):
        for _ in range(n):
            cache.update_and_fetch(*new)
            mx.eval(cache.state)

    n_packed = cache.n_packed
    used = peak(lambda: decode(140))  # two blocks are packed
    assert cache.n_packed == n_packed + 128
    assert [a.shape for side in cache._sides for a in side.buffers()] == shapes
    assert used < packed / 2, (
        used
    )  # measured on the cpu: 0.69 MB, all of it for packing 64 tokens; the codes are 2.5 MB
    # measured: 10 kB; on CUDA 131 kB, which is how MLX allocates there
    assert peak(lambda: decode(40)) < packed / (15 if backend.name == "cuda" else 100)


@fast
@pytest.mark.parametrize("repackable", [False, True])
@pytest.mark.parametrize("lengths", [[3000], [3000, 3000], [3000, 2300, 700]], ids=["one", "in step", "rows"])
def test_exact_tokens_are_returned_without_a_copy(backend, lengths, repackable):
    """As by mlx-lm's cache, whether rows are in step or not, also while `repack` is to come and queries are held."""
    shape = dict(heads=2, key_dim=64, value_dim=64)
    rows = [TurboKVCache("turbo0") for _ in lengths]
    for row, n in zip(rows, lengths):
        row.repackable = repackable
        row.update_and_fetch(*random_tokens(np.random.default_rng(n), n, **shape))
    cache = rows[0] if len(rows) == 1 else TurboKVCache.merge(rows)
    del rows, row
    new = random_tokens(np.random.default_rng(0), 1, batch=len(lengths), **shape)
    mx.eval(new, cache.state)
    held, n_packed = cache.nbytes, cache.packed_columns

    def decode(n):
        for _ in range(n):
            fetched = cache.update_and_fetch(*new)
            mx.eval(fetched)
            mx.eval(cache.state[0])
            del fetched

    used = peak(lambda: decode(130))
    assert cache.nbytes == held and cache.packed_columns == n_packed + 128
    assert used < held / 20, used  # measured: 2 to 140 kB of 1.7 to 5 MB, the most where rows are not in step


@fast
@pytest.mark.parametrize("n", [1, 40, 133, 400])
def test_exact_tokens_take_no_more_room_than_in_buffers_of_their_own(backend, n):
    exact, ends = TurboKVCache("turbo0"), 4 + 64 + 64
    exact.update_and_fetch(*random_tokens(np.random.default_rng(0), n))
    n_packed = max(n - 68, 0) if n > ends else 0
    assert exact.nbytes == 2 * 2 * 32 * 4 * (ends + -(-n_packed // 256) * 256)


@fast
def test_packed_buffers_grow_by_steps_only(backend):
    cache, capacities = filled(60, recent=4, block=4), []
    new = random_tokens(np.random.default_rng(0), 1)
    for _ in range(500):
        cache.update_and_fetch(*new)
        capacities.append(cache._sides[0].codes.shape[2])
    assert sorted(set(capacities)) == [256, 512, 768] and capacities == sorted(capacities)
    assert cache.n_packed <= capacities[-1]


@fast
@pytest.mark.parametrize("scheme", ["turbo4", "turbo3", "turbo2", "turbo8"])  # measured on the cpu: 2.8, 3.0, 2.6, 2.2
def test_quantizing_a_prompt_chunk_needs_a_small_multiple_of_the_chunk(backend, scheme):
    tokens = random_tokens(np.random.default_rng(0), 4096, heads=2, key_dim=128, value_dim=128, dtype=mx.float16)
    mx.eval(tokens)
    cache, before = TurboKVCache(scheme), mx.get_active_memory()

    def prefill():
        cache.update_and_fetch(*tokens)
        mx.eval(cache.state)

    used, chunk = peak(prefill), sum(x.nbytes for x in tokens)
    # On CUDA, MLX frees what a kernel read when it learns that the kernel is done: measured 3.8 to 6.1 there.
    assert used < {"cpu": 4, "cuda": 8}.get(backend.name, 2) * chunk, used / chunk
    # afterwards nothing but the cache is there (and constants, if this was their first use): no float copy, which
    # would be 2 MB at least, hides behind a lazy array
    assert mx.get_active_memory() - before < cache.nbytes + 100_000


@fast
def test_nothing_is_dequantized_unless_it_is_read(backend):
    n, dim = 16384, 128
    cache = filled(n, heads=1, key_dim=dim, value_dim=dim, dtype=mx.float16, recent=64, block=64, chunk=4096)
    mx.eval(cache.state)
    new = random_tokens(np.random.default_rng(1), 1, heads=1, key_dim=dim, value_dim=dim, dtype=mx.float16)
    mx.eval(new)
    fetched = []

    def append():
        fetched.append(cache.update_and_fetch(*new))
        fetched.append(cache.keys_and_values())
        mx.eval(cache.state)

    one_side = n * dim * 2
    assert peak(append) < one_side / 8
    assert peak(lambda: mx.eval(fetched)) > 2 * one_side  # it is what is read that costs


# ---- bad input -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scheme", ["turbo7", "turbo", "q4", "turbo4v7", "TURBO4", "", None, 4, "turbo4v"])
def test_an_unknown_scheme_is_refused_with_the_known_ones(scheme):
    with pytest.raises(ValueError, match=r"scheme: got .*allowed are .*'turbo4'"):
        TurboKVCache(scheme)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            dict(window=3),
            r"window: unknown option, allowed are \['scheme', 'sink', 'recent', 'block', 'seed', 'scale', ",
        ),
        (dict(sink=-1), "sink: got -1, allowed are whole numbers from 0"),
        (dict(recent=2.5), "recent: got 2.5, allowed are whole numbers from 0"),
        (dict(block=0), "block: got 0, allowed are whole numbers from 1"),
        (dict(seed=True), "seed: got True"),
        (dict(scale="l2"), r"scale: got 'l2', allowed are \('inner-product', "),
        (dict(centre=None), r"centre: got None, allowed are \(False, True\)"),
        (dict(auto=2), "auto: got 2, allowed are"),
        (dict(boundary=-1), "boundary: got -1, allowed are whole numbers from 0"),
    ],
)
def test_a_bad_option_is_refused_by_its_name(options, message):
    with pytest.raises(ValueError, match=message):
        TurboKVCache("turbo4", **options)


def test_names_and_layers_of_a_configuration():
    assert [TurboConfig(s).name for s in ("auto", "turbo4", "turbo8v4")] == ["auto", "turbo4", "turbo8v4"]
    assert TurboConfig("turbo3", auto=True).name == "auto from turbo3"
    assert TurboConfig.of("auto", sink=9) == TurboConfig("turbo4", sink=9, auto=True)
    config = TurboConfig("turbo4v3", boundary=2)
    assert [config.for_layer(i, 6).scheme.name for i in range(6)] == ["turbo8v3"] * 2 + ["turbo4v3"] * 2 + [
        "turbo8v3"
    ] * 2
    exact = TurboConfig("turbo0v4", boundary=1)
    assert exact.for_layer(0, 6) == exact


@fast
@pytest.mark.parametrize("scale", SCALES)
def test_the_scale_rule_is_the_configuration_s(backend, scale):
    keys, values = random_tokens(np.random.default_rng(0), 90)
    cache = TurboKVCache("turbo2", sink=0, recent=0, scale=scale)
    cache.update_and_fetch(keys, values)
    for side, x in zip(stored(cache), (keys, values)):
        want = quantize(to_numpy(x), 2, scale=scale)
        assert compare_quantized(side["codes"], side["scale"], want) is None
    assert TurboKVCache.from_state(cache.state).config == cache.config


def changed(tokens, name, change):
    pair = dict(zip(("keys", "values"), tokens))
    pair[name] = change(pair[name])
    return pair["keys"], pair["values"]


def put(value, at, dim=5):
    def change(x):
        x = mx.array(x)
        x[:, -1:, at, dim] = value
        return x

    return change


SPOILED = {
    "rank": (
        lambda x: x[0],
        ValueError,
        r"{name}: got shape \(2, 30, 32\), expected \[batch, n_kv_heads, tokens, head_d",
    ),
    "integers": (lambda x: x.astype(mx.int32), ValueError, "{name}: got mlx.core.int32, allowed are .*float16"),
    "complex": (lambda x: x.astype(mx.complex64), ValueError, "{name}: got mlx.core.complex64, allowed are .*float16"),
    "a NumPy array": (np.array, TypeError, "{name}: got ndarray, expected an mx.array"),
    "None": (lambda x: None, TypeError, "{name}: got NoneType, expected an mx.array"),
    "fewer tokens": (lambda x: x[:, :, 1:], ValueError, "values: got .* expected .*as keys"),
    "another batch size": (
        lambda x: mx.concatenate([x, x]),
        ValueError,
        "(values: got .* expected|{name}: batch size 2)",
    ),
    "another number of heads": (
        lambda x: x[:, :1],
        ValueError,
        "(values: got .* expected|{name}: number of kv heads 1)",
    ),
}


@fast
@pytest.mark.parametrize("name", ["keys", "values"])
@pytest.mark.parametrize("how", SPOILED)
@pytest.mark.parametrize("full", [False, True], ids=["a new cache", "a cache in use"])
def test_bad_tokens_are_refused_by_name_and_the_cache_stays_as_it_was(backend, name, how, full):
    change, error, message = SPOILED[how]
    cache = filled(20) if full else TurboKVCache("turbo4", sink=2, recent=4, block=4)
    before = snapshot(cache)
    tokens = random_tokens(np.random.default_rng(1), 30)
    with pytest.raises(error, match=message.format(name=name)):
        cache.update_and_fetch(*changed(tokens, name, change))
    assert same(snapshot(cache), before)
    assert cache.update_and_fetch(*tokens)[0].shape[2] == (50 if full else 30)  # and it can go on


@fast
@pytest.mark.parametrize(
    "what, spoil",
    [
        ("batch size 2", lambda x: mx.concatenate([x, x])),
        ("number of kv heads 4", lambda x: mx.concatenate([x, x], 1)),
        ("head_dim 64", lambda x: mx.concatenate([x, x], -1)),
        ("dtype mlx.core.float16", lambda x: x.astype(mx.float16)),
    ],
)
def test_tokens_of_another_kind_in_mid_stream_are_refused(backend, what, spoil):
    cache = filled(20)
    before = snapshot(cache)
    with pytest.raises(
        ValueError, match=f"keys: {what}, but this cache holds tokens with .* (1|2|32|mlx.core.float32)"
    ):
        cache.update_and_fetch(*map(spoil, random_tokens(np.random.default_rng(1), 3)))
    assert same(snapshot(cache), before)
    cache.trim(20)  # an empty cache takes anything
    cache.update_and_fetch(*map(spoil, random_tokens(np.random.default_rng(1), 3)))
    assert cache.offset == 3


@fast
def test_nan_in_exact_tokens_is_stored_as_given_until_its_vector_is_packed(backend):
    cache, rng = TurboKVCache("turbo4", sink=2, recent=4, block=4), np.random.default_rng(0)
    keys, values = random_tokens(rng, 8)
    keys, values = put(float("nan"), 0)(keys), put(float("inf"), 5)(values)  # a sink token, a recent one
    for _ in range(2):
        assert same([to_numpy(x) for x in cache.update_and_fetch(keys, values)], [to_numpy(keys), to_numpy(values)])
        assert same([to_numpy(x) for x in cache.keys_and_values()], [to_numpy(keys), to_numpy(values)])
        cache.trim(8)
    cache.update_and_fetch(keys, values)
    cache.update_and_fetch(*random_tokens(rng, 2))
    cache.update_and_fetch(*random_tokens(rng, 1))  # token 5 leaves the window
    finite = [np.isfinite(to_numpy(x)) for x in cache.keys_and_values()]
    assert np.argwhere(~finite[0].all(-1)).tolist() == [[0, 1, 0]]
    assert np.argwhere(~finite[1].any(-1)).tolist() == np.argwhere(~finite[1].all(-1)).tolist() == [[0, 1, 5]]


@fast
@pytest.mark.parametrize("scheme", ["turbo0", "turbo0v4", "turbo4v0"])
def test_an_uncompressed_side_takes_any_number_and_any_head_dim(backend, scheme):
    bits = Scheme.parse(scheme)
    dims = [33 if b == 0 else 32 for b in (bits.key_bits, bits.value_bits)]
    tokens = random_tokens(np.random.default_rng(0), 30, key_dim=dims[0], value_dim=dims[1])
    tokens = [put(float("inf"), 9)(x) if d == 33 else x for x, d in zip(tokens, dims)]
    cache = TurboKVCache(scheme, sink=2, recent=4, block=4)
    cache.update_and_fetch(*tokens)
    for x, got, dim in zip(tokens, cache.keys_and_values(), dims):
        assert dim == 32 or same(to_numpy(got), to_numpy(x))


@pytest.mark.parametrize("scheme", ["turbo4", "turbo8v2"])
def test_zero_vectors_come_back_as_zeros(backend, scheme):
    zeros = mx.zeros((1, 1, 12, 64))
    cache = TurboKVCache(scheme, sink=0, recent=2, block=2)
    cache.update_and_fetch(zeros, zeros)
    for x in cache.keys_and_values():
        assert same(to_numpy(x), np.zeros((1, 1, 12, 64), np.float32))


@fast
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32], ids=str)
def test_the_largest_and_smallest_numbers_survive(backend, dtype):
    for size in (6e4, 1e-4):
        x = (mx.random.randint(0, 2, (1, 1, 12, 64), key=mx.random.key(0)) * 2 - 1).astype(mx.float32) * size
        x = x.astype(dtype)
        cache = TurboKVCache("turbo8", sink=0, recent=0, block=1)
        cache.update_and_fetch(x, x)
        got, want = to_numpy(cache.keys_and_values()[0]), to_numpy(x)
        assert np.abs(got - want).max() < 0.03 * np.abs(want).max()


def change(name, by):
    """Adds to a number of the header."""
    return lambda s: [s[0] + mx.array([by * (n == name) for n in HEADER_NAMES], mx.int32), *s[1:]]


BAD_STATES = {
    "nothing": (lambda s: [], "header"),
    "another cache's": (lambda s: [mx.zeros((1, 2, 3, 4)), mx.zeros((1, 2, 3, 4))], "header"),
    "no magic": (change("magic", 1), "not the state of a TurboKVCache"),
    "a newer version": (change("version", 1), f"format version {FORMAT_VERSION + 1}.*reads 2, 3, {FORMAT_VERSION}"),
    "8 bits of a version with other levels": (
        lambda s: change("version", 3 - FORMAT_VERSION)(change("value_bits", 4)(s)),
        "format version 3 with 8 bits",
    ),
    "a longer header": (lambda s: [mx.concatenate([s[0], s[0][:1]]), *s[1:]], "format version"),
    "too few arrays": (lambda s: s[:-1], "arrays are missing"),
    "only the header": (lambda s: s[:1], "arrays are missing"),
    "too many arrays": (lambda s: [*s, s[-1]], "more arrays"),
    "a shorter array": (lambda s: [*s[:2], s[2][:, :, :-1], *s[3:]], "state: got .* expected"),
    "another dtype": (lambda s: [*s[:2], s[2].astype(mx.int32), *s[3:]], "state: got .* expected .*uint32"),
    "another order": (lambda s: [s[0], *s[:0:-1]], "state: got .* expected"),
    "bits that are not ours": (change("key_bits", 3), "allowed are"),
    "more sink tokens than the sink has": (change("sink", -1), "state: "),
    "a negative count": (change("n_packed", -40), "state: "),
    "an unknown scale rule": (change("scale", 4), "state: the header names scale rule 4"),
    "bits nobody chose": (change("chosen_key_bits", 4), "state: the header names 8 bits"),
    "means that are not there": (change("key_means", 1), "state: got .* expected .*float16"),
    "too many means": (change("key_means", 2), "state: the header names 2 means of keys"),
    "keys and values of another batch": (lambda s: [*s[:5], *(mx.concatenate([a, a]) for a in s[5:])], "state: "),
    "not arrays": (lambda s: [1, 2, 3], "state: "),
}


@fast
@pytest.mark.parametrize("how", BAD_STATES)
def test_a_state_that_is_not_ours_is_refused(backend, how):
    spoil, message = BAD_STATES[how]
    cache, other = filled(20), filled(30)
    before = snapshot(other)
    with pytest.raises(ValueError, match=message):
        TurboKVCache.from_state(spoil(cache.state))
    with pytest.raises(ValueError, match=message):
        other.state = spoil(cache.state)
    assert same(snapshot(other), before)


def test_a_state_of_kvcache_is_refused():
    theirs = KVCache()
    theirs.update_and_fetch(*random_tokens(np.random.default_rng(0), 5))
    with pytest.raises(ValueError, match="state: the first array is not the header"):
        TurboKVCache.from_state(list(theirs.state))


def test_the_cpu_backend_is_what_a_cache_uses_when_told_to():
    class Counting(CpuBackend):
        calls = 0

        def quantize(self, sides, *options):
            Counting.calls += 1
            assert len(sides) == 2  # keys and values in one launch
            return super().quantize(sides, *options)

    with select.use_backend(Counting()):
        filled(40).settle()
    assert Counting.calls == 1


def test_tools_notice_what_they_are_for():
    """The comparisons these tests stand on: `same`, `held_nbytes`, `restore`."""
    cache = filled(40)
    a = snapshot(cache)
    b = copy.deepcopy(a)
    b[3][1]["recent"][0, 0, 0, 0] += 1e-3
    assert same(a, a) and not same(a, b)
    assert held_nbytes([mx.zeros(3), {"x": mx.zeros(5)}, "no array"]) == 32
    side = stored(cache)[0]
    assert (
        compare_quantized(side["codes"] ^ 1, side["scale"], quantize(restore(side["codes"], side["scale"], 4, 32), 4))
        is not None
    )
