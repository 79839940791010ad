"""BatchTurboKVCache: every row of a batch is what it would be alone, whatever else is in the batch."""

import concurrent.futures
import copy
import functools
import http.server
import json
import sys
import threading
import urllib.request

import mlx.core as mx
import mlx_lm
import mlx_lm.models.cache as lm_cache
import mlx_lm.server
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from mlx_lm.utils import dequantize_model
from support import families
from support.arrays import to_numpy
from support.caches import FAST_BACKENDS, WAYS, copied, filled, random_tokens, same, same_restored
from support.keys import queries_for, turning
from support.machines import BatchMachine
from support.models import DEMO_MODEL, llama, tokens_of
from support.rows import Rows, check_that_twins_go_their_own_way, state_of
from support.strategies import quick
from support.walk import Walk, check_fused_steps, merged

from mlx_turbo import (
    BatchTurboKVCache,
    RotatingTurboKVCache,
    TurboConfig,
    TurboKVCache,
    describe,
    disable,
    enable,
    make_prompt_cache,
)
from mlx_turbo.cache import auto_bits
from mlx_turbo.integration.prompt_cache import flatten_caches

fast = pytest.mark.parametrize("backend", FAST_BACKENDS, indirect=True)
SMALL = TurboConfig("turbo4", sink=2, recent=4, block=4)


# ---- rows alone ----------------------------------------------------------------------------------------------
@fast
@pytest.mark.parametrize("scheme", ["turbo4", "turbo8v3", "turbo0v2", "turbo3v0", "turbo0"])
@pytest.mark.parametrize("centre", [True, False], ids=["centred", ""])
def test_rows_of_different_lengths_are_what_they_are_alone(backend, short_segments, scheme, centre):
    rows = Rows(TurboConfig(scheme, 2, 4, 4, centre=centre), 4)
    rows.update([31, 7, 1, 18])
    assert [c.report()["packed"] for c in rows.alone] == [25, 0, 0, 12]
    for _ in range(23):
        rows.update([1] * 4)
    rows.update([9, 20, 3, 0])
    if centre and scheme in ("turbo4", "turbo8v3"):
        assert [c.report()["centred"] for c in rows.alone] == [[], ["keys", "values"], [], []]
        assert rows.batch.report()["centred"] == ["keys", "values"]


@fast
def test_rows_that_pack_together_keep_their_own_factors(backend, short_segments):
    """Chosen together, packed together by some, and after rows have come and gone."""
    rows, others = Rows(SMALL, 4), Rows(SMALL, 2, seed=1)
    rows.update([20, 20, 20, 3])
    rows.update([12, 12, 12, 20])
    factors = to_numpy(rows.batch._sides[0].balance.factors)
    assert all(np.abs(factors[a] - factors[b]).max() > 0.1 for a in range(4) for b in range(a))
    rows.update([12, 12, 12, 2])
    rows.filter([2, 0, 3])
    rows.update([9, 9, 9])
    others.update([15, 15])
    rows.extend(others)
    rows.update([10, 10, 10, 10, 10])


@fast
def test_a_row_that_is_no_longer_centred_has_no_means(backend, short_segments):
    rows = Rows(SMALL, 3, seed=1)
    rows.bias = [20, 20, 0]
    rows.update([30, 60, 20])
    rows.bias = [0, 0, 0]
    rows.trim(28)
    rows.update([30, 1, 5])
    assert [c.report()["centred"] for c in rows.alone] == [[], ["keys", "values"], []]
    for _ in range(9):
        rows.update([1, 1, 1])
    rows.filter([2, 0])
    assert rows.batch.report()["centred"] == []


@fast
def test_a_row_that_begins_anew_without_means_keeps_none_of_those_it_had(backend, short_segments):
    """It holds fewer segments at first, beside a row that has means, and then as many as before."""
    rows = Rows(SMALL, 2)
    rows.bias = [20, 20]
    rows.update([60, 90])
    rows.trim(58)
    rows.bias = [0, 0]
    for n in 24, 9, 30:
        rows.update([n, 1])
    assert [c.report()["centred"] for c in rows.alone] == [[], ["keys", "values"]]


@fast
def test_a_long_row_without_means_beside_a_short_one_with_them(backend, short_segments):
    rows = Rows(SMALL, 2)
    rows.update([700, 30])
    assert [c.report()["centred"] for c in rows.alone] == [[], ["keys", "values"]]
    rows.filter([1, 0])


@fast
def test_left_padding_is_neither_packed_nor_seen(backend):
    rows = Rows(SMALL, 3)
    rows.update([20, 3, 11], left=[0, 17, 9])
    for _ in range(9):
        rows.update([1, 1, 1])
    with pytest.raises(ValueError, match="left_padding"):
        rows.batch.prepare(left_padding=[1, 0, 0])


@fast
def test_padding_may_span_chunks(backend):
    """Left padding longer than the first chunk, right padding longer than the last one."""
    keys, values = random_tokens(np.random.default_rng(0), 30, batch=2)
    batch, alone = BatchTurboKVCache(SMALL, left_padding=[0, 14]), [TurboKVCache(SMALL) for _ in range(2)]
    batch.prepare(lengths=[12, 30], right_padding=[18, 0])
    for at in range(0, 30, 10):
        batch.update_and_fetch(keys[:, :, at : at + 10], values[:, :, at : at + 10])
        assert batch.offset.tolist() == [min(at + 10, 12), at + 10 - 14]
    batch.finalize()
    for b, chunks in enumerate([[(0, 10), (10, 12)], [(14, 20), (20, 30)]]):
        for first, last in chunks:
            alone[b].update_and_fetch(*(x[b : b + 1, :, first:last] for x in (keys, values)))
        assert same(state_of(batch.extract(b)), state_of(alone[b]))


@fast
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [TurboKVCache, functools.partial(RotatingTurboKVCache, 12, 2)], ids=["", "window"])
def test_a_copy_in_the_middle_of_a_padded_prompt_drops_the_rest_of_the_padding(backend, door, way, make):
    batch, (keys, values) = (
        make(config=SMALL).merge([make(config=SMALL) for _ in range(2)]),
        random_tokens(np.random.default_rng(0), 30, batch=2),
    )
    batch.prepare(lengths=[13, 30], right_padding=[17, 0])
    batch.update_and_fetch(keys[:, :, :10], values[:, :, :10])
    caches = batch, copied(batch, way)
    for cache in caches:
        cache.update_and_fetch(keys[:, :, 10:], values[:, :, 10:])
        cache.finalize()
        assert cache.offset.tolist() == [13, 30]
    assert same(*map(state_of, caches))


@fast
def test_padding_is_dropped_though_the_first_chunk_of_the_prompt_has_none_and_packs_nothing(backend):
    batch = BatchTurboKVCache("turbo4", [0, 0])
    for lengths, chunks in ([20, 20], [20]), ([40, 33], [30, 10]):
        batch.prepare(lengths=lengths, right_padding=[max(lengths) - n for n in lengths])
        for n in chunks:
            batch.update_and_fetch(*random_tokens(np.random.default_rng(0), n, batch=2))
        batch.finalize()
    assert batch.offset.tolist() == [60, 53]


@fast
def test_a_window_is_counted_in_tokens_of_the_row(backend):
    rows = Rows(SMALL, 2)
    rows.update([30, 5])
    rows.update([1, 1])
    for n, window in ((1, 7), (3, 4), (3, 50)):
        mask, plain = (np.array(rows.batch.make_mask(n, window_size=w))[:, 0] for w in (window, None))
        for b, offset in enumerate((31, 6)):
            for i in range(n):
                assert same(np.flatnonzero(mask[b, i]), np.flatnonzero(plain[b, i])[-window:])
                assert plain[b, i].sum() == offset + i + 1


@fast
def test_an_extracted_row_goes_on_alone(backend):
    rows = Rows(SMALL, 3)
    rows.update([25, 4, 12])
    caches, rng = [rows.batch.extract(b) for b in range(3)], np.random.default_rng(1)
    for n in (1, 1, 14, 1):
        for cache, alone in zip(caches, rows.alone):
            new = random_tokens(rng, n)
            cache.update_and_fetch(*new)
            alone.update_and_fetch(*new)
            assert same(state_of(cache), state_of(alone))
    assert rows.batch.offset.tolist() == [25, 4, 12]


@fast
def test_merged_caches_stay_as_they_are(backend):
    caches = [*(filled(n, seed=n) for n in (40, 3, 17)), TurboKVCache(SMALL)]
    before = [state_of(c) for c in caches]
    batch = TurboKVCache.merge(caches)
    for n in (1, 1, 9):
        batch.update_and_fetch(*random_tokens(np.random.default_rng(0), n, batch=4))
    assert all(same(state_of(c), want) for c, want in zip(caches, before))


@fast
def test_a_copy_and_a_state_go_their_own_way(backend, short_segments):
    rows = Rows(SMALL, 3)
    rows.update([30, 2, 11])
    check_that_twins_go_their_own_way(rows, [copy.deepcopy(rows.batch), BatchTurboKVCache.from_state(rows.batch.state)])


@fast
def test_what_does_not_belong_together_is_refused(backend):
    with pytest.raises(ValueError, match="one configuration"):
        TurboKVCache.merge([TurboKVCache("turbo4"), TurboKVCache("turbo3")])
    with pytest.raises(ValueError, match="head_dim and dtype"):
        TurboKVCache.merge([filled(9), filled(9, key_dim=64)])
    with pytest.raises(ValueError, match="caches of one row"):
        TurboKVCache.merge([filled(9, batch=2)])
    with pytest.raises(ValueError, match="got a KVCache"):
        TurboKVCache.merge([filled(9), lm_cache.KVCache()])
    batch = TurboKVCache.merge([filled(9), filled(30)])
    with pytest.raises(ValueError, match="batch size 3"):
        batch.update_and_fetch(*random_tokens(np.random.default_rng(0), 1, batch=3))
    with pytest.raises(ValueError, match="batch size 3"):
        BatchTurboKVCache("turbo4", [0, 0]).update_and_fetch(*random_tokens(np.random.default_rng(0), 1, batch=3))
    with pytest.raises(ValueError, match="lengths"):
        batch.prepare(right_padding=[0, 3])
    before = state_of(batch)
    for rows, error in ([], ValueError), ([0, 2], IndexError):
        with pytest.raises(error, match="batch_indices: got none|out of range"):
            batch.filter(rows)
        assert same(state_of(batch), before)
    one_row_is_padded = mx.array([[0, 0, 0, 3, 0, 0, 0], [0] * 7], mx.int32)
    for spoil in (
        lambda s: s[:1],
        lambda s: [s[0], s[1][:1], *s[2:]],
        lambda s: [s[0], s[1] + 9, *s[2:]],
        lambda s: [s[0], s[1] + one_row_is_padded, *s[2:]],
        lambda s: s[:-1],
        lambda s: [*s, s[-1]],
        lambda s: [mx.array([1, 2], mx.int32), *s[1:]],
    ):
        with pytest.raises(ValueError, match="state: "):
            BatchTurboKVCache.from_state(spoil(batch.state))
    with pytest.raises(ValueError, match="not the state of a TurboKVCache"):
        TurboKVCache.from_state(batch.state)


@fast
@pytest.mark.parametrize("dtype", [mx.float32, mx.int32], ids=str)
@pytest.mark.parametrize("n", [1, 7])
def test_rows_of_one_length_give_batchkvcache_s_arrays_to_the_bit(backend, n, dtype):
    """turbo0 packs nothing away, and without empty columns the tokens are the same."""
    ours, theirs, rng = (
        BatchTurboKVCache("turbo0", [0, 0, 0], sink=2, recent=4, block=4),
        lm_cache.BatchKVCache([0, 0, 0]),
        np.random.default_rng(0),
    )
    for _ in range(12):
        new = random_tokens(rng, n, batch=3, dtype=dtype)
        masks = ours.make_mask(n), theirs.make_mask(n)
        for a, b in zip(ours.update_and_fetch(*new), theirs.update_and_fetch(*new)):
            assert a.dtype == b.dtype and same(to_numpy(a), to_numpy(b))
        assert same(*(np.broadcast_to(np.array(m), (3, 1, n, a.shape[2])) for m in masks))
        assert ours.offset.tolist() == theirs.offset.tolist() and ours.size() == theirs.size()


# ---- any history ---------------------------------------------------------------------------------------------


@fast
def test_any_history_leaves_each_row_as_it_is_alone(backend, door, short_segments):
    run_state_machine_as_test(BatchMachine, settings=settings(quick, max_examples=20, stateful_step_count=12))


# ---- auto: rows may want different bits ------------------------------------------------------------------------
AUTO = TurboConfig("auto", sink=4, recent=16, block=16)


def fed(batch, new, queries):
    """Update and let it see the queries, as attention.py does."""
    batch.update_and_fetch(*new)
    batch.observe(queries, 0.125)


@fast
def test_auto_chooses_for_the_most_demanding_row(backend):
    """Two prompts of one batch, one with keys that 4 bits do not hold, then the same alone."""
    rows = [turning(300, norm=0), turning(300, seed=1)]
    queries = [queries_for(keys, seed=b) for b, (keys, _) in enumerate(rows)]
    alone = [TurboKVCache(AUTO) for _ in rows]
    batch = TurboKVCache.merge(alone)
    for first, last in ((0, 290), (290, 291), (291, 300)):
        new = [mx.concatenate([r[side][:, :, first:last] for r in rows]) for side in (0, 1)]
        fed(batch, new, mx.concatenate([q[:, :, first:last] for q in queries]))
        for b, cache in enumerate(alone):
            fed(cache, [x[:, :, first:last] for x in rows[b]], queries[b][:, :, first:last])
    easy, hard = (c._sides[0].bits for c in alone)
    assert (easy, hard) == (4, batch._sides[0].bits) and hard != 4
    assert same(state_of(batch.extract(1)), state_of(alone[1]))
    assert batch.report()["auto"] == alone[1].report()["auto"]
    assert batch.report()["scheme"] == alone[1].report()["scheme"]


@fast
@pytest.mark.parametrize("what", ["filter", "trim", "extend", "copy"])
def test_what_was_measured_for_rows_that_are_gone_does_not_choose(backend, what):
    """The errors are computed before the update that chooses by them."""
    rows = [turning(300, norm=0), turning(300, seed=1)]
    queries = [queries_for(keys, seed=b) for b, (keys, _) in enumerate(rows)]
    alone, batch = TurboKVCache(AUTO), BatchTurboKVCache(AUTO, [0, 0])
    fed(batch, [mx.concatenate(pair)[:, :, :290] for pair in zip(*rows)], mx.concatenate(queries)[:, :, :290])
    fed(alone, [x[:, :, :290] for x in rows[0]], queries[0][:, :, :290])
    if what == "copy":
        batch = copy.deepcopy(batch)
    if what == "trim":
        batch.trim(1)
        alone = batch.extract(0)
    batch.filter([0])
    if what == "extend":
        batch.extend(BatchTurboKVCache(AUTO, [0]))
        batch.filter([0])
    for cache in alone, batch:
        fed(cache, [x[:, :, 290:291] for x in rows[0]], queries[0][:, :, 290:291])
    assert batch._sides[0].bits == 4 and same(state_of(batch.extract(0)), state_of(alone))


@fast
def test_undecided_rows_stay_undecided_and_decide_as_alone(backend):
    """Short prompts: what was observed before merging, filtering and extracting counts."""
    keys, values = turning(320)
    queries = queries_for(keys)
    alone = TurboKVCache(AUTO)
    fed(alone, (keys[:, :, :200], values[:, :, :200]), queries[:, :, :200])
    short = TurboKVCache(AUTO)
    fed(short, turning(30, norm=0), queries[:, :, :30])
    batch = TurboKVCache.merge([short, alone])
    batch.filter([1])
    assert batch.undecided and batch.extract(0).undecided
    caches = [alone, batch, batch.extract(0)]
    for at in range(200, 320):
        for cache in caches:
            fed(cache, (keys[:, :, at : at + 1], values[:, :, at : at + 1]), queries[:, :, at : at + 1])
    want = state_of(alone)
    assert not alone.undecided and same(state_of(caches[2]), want) and same(state_of(batch.extract(0)), want)


def chosen(monkeypatch, bits, n=400, seed=0, **shape):
    """A cache of n tokens with key biases, for whose keys auto chose `bits`."""
    cache = TurboKVCache(AUTO)
    monkeypatch.setattr(auto_bits, "choose_key_bits", lambda *_: (bits, {}, "the test"))
    keys, values = random_tokens(np.random.default_rng(seed), n, bias=9, **shape)
    for at in range(0, n, 300):
        cache.update_and_fetch(keys[:, :, at : at + 300], values[:, :, at : at + 300])
    return cache


@fast
@pytest.mark.parametrize("bits", [8, 0])
def test_rows_of_fewer_bits_are_brought_to_more(backend, monkeypatch, bits):
    """Nothing is lost but what quantizing restored keys again costs."""
    easy, hard = chosen(monkeypatch, 4), chosen(monkeypatch, bits, seed=1)
    assert easy.report()["centred"] == ["keys", "values"] and easy.report()["packed"] > 300
    before = state_of(easy), [to_numpy(x) for x in easy.keys_and_values()]
    batch = TurboKVCache.merge([easy, hard])
    assert batch._sides[0].bits == bits and same(state_of(easy), before[0])
    assert same(state_of(batch.extract(1)), state_of(hard))
    keys, values = (to_numpy(x) for x in batch.extract(0).keys_and_values())
    error = np.linalg.norm(keys - before[1][0]) / np.linalg.norm(before[1][0])
    assert error == 0 if bits == 0 else 0 < error < 0.01, error
    assert same_restored(values, before[1][1])
    new = random_tokens(np.random.default_rng(2), 40, batch=2)
    batch.update_and_fetch(*new)
    hard.update_and_fetch(*(x[1:] for x in new))
    assert same(state_of(batch.extract(1)), state_of(hard))


@fast
def test_rows_that_cannot_join_leave_a_batch_of_fewer_bits_as_it_was(backend, monkeypatch):
    batch = TurboKVCache.merge([chosen(monkeypatch, 4)])
    before, other = state_of(batch), TurboKVCache.merge([chosen(monkeypatch, 8, dtype=mx.float16)])
    with pytest.raises(ValueError, match="allowed are equal kv heads, head_dim and dtype"):
        batch.extend(other)
    assert same(state_of(batch), before)


@fast
def test_an_undecided_row_follows_the_others_if_it_is_short_and_decides_if_it_is_not(backend, monkeypatch):
    for n, want in ((9, 8), (256, 0)):
        waiting, decided = TurboKVCache(AUTO), chosen(monkeypatch, 8)
        waiting.update_and_fetch(*random_tokens(np.random.default_rng(0), n))
        monkeypatch.setattr(auto_bits, "choose_key_bits", lambda *_: (0, {}, "the test"))
        batch = TurboKVCache.merge([waiting, decided])
        assert not batch.undecided and batch._sides[0].bits == want and waiting.undecided
        batch.update_and_fetch(*random_tokens(np.random.default_rng(0), 1, batch=2))


@fast
@pytest.mark.parametrize("way", WAYS)
def test_a_row_whose_bits_were_chosen_before_it_has_packed_is_saved(backend, door, monkeypatch, way):
    """It followed another row, and has more exact tokens than fit beside its recent ones."""
    waiting, decided = TurboKVCache(AUTO), chosen(monkeypatch, 8)
    waiting.update_and_fetch(*random_tokens(np.random.default_rng(0), 200))
    row = TurboKVCache.merge([waiting, decided]).extract(0)
    assert not row.undecided and row.report()["recent"] == 196
    again = copied(row, way)
    for cache in row, again:
        cache.update_and_fetch(*random_tokens(np.random.default_rng(1), 1))
    assert again.report()["recent"] < 32 and same(state_of(again), state_of(row))


@fast
@pytest.mark.parametrize("seed", range(6))
def test_tokens_stay_in_order_while_rows_decide(backend, monkeypatch, seed):
    """Against lists of tokens: auto keeps all exact here, but rows decide, and pack, at any time and in any company."""
    monkeypatch.setattr(auto_bits, "FEWEST", 24)
    monkeypatch.setattr(auto_bits, "choose_key_bits", lambda *_: (0, {}, "the test"))
    rng, config = np.random.default_rng(seed), TurboConfig("turbo4v0", 2, 4, 4, auto=True)
    cache, rows, n_decided = BatchTurboKVCache(config, [0]), [np.zeros((1, 2, 0, 32))], 0
    for step in range(80):
        B, steps = len(rows), ["decode", "prompt", "extend", "filter", "trim", "copy"]
        what = rng.choice(steps, p=[0.4, 0.2, 0.2, 0.1, 0.05, 0.05])
        if what in ("decode", "prompt"):
            width = 1 if what == "decode" else int(rng.integers(1, 40))
            lengths = [width if what == "decode" else int(rng.integers(0, width + 1)) for _ in rows]
            new = random_tokens(rng, width, batch=B)
            cache.prepare(lengths=lengths, right_padding=[width - n for n in lengths])
            mask = np.array(cache.make_mask(width))
            fetched = cache.update_and_fetch(*new)
            cache.observe(mx.zeros((B, 2, width, 32)), 1.0)
            cache.finalize()
            rows = [
                np.concatenate([row, to_numpy(new[0])[b : b + 1, :, :n]], axis=2)
                for b, (row, n) in enumerate(zip(rows, lengths))
            ]
            for b, n in enumerate(lengths):
                if n:
                    assert same(to_numpy(fetched[0])[b : b + 1, :, mask[b, 0, n - 1]], rows[b].astype(np.float32))
        elif what == "extend" and B < 4:
            other = TurboKVCache(config)
            keys, values = random_tokens(rng, int(rng.integers(1, 40)))
            other.update_and_fetch(keys, values)
            cache.extend(TurboKVCache.merge([other]))
            rows.append(to_numpy(keys))
        elif what == "filter":
            keep = rng.permutation(B)[: rng.integers(1, B + 1)].tolist()
            cache.filter(keep)
            rows = [rows[b] for b in keep]
        elif what == "trim":
            n = int(rng.integers(1, 9))
            cache.trim(n)
            rows = [row[:, :, : max(row.shape[2] - n, 0)] for row in rows]
        elif what == "copy":
            cache = copy.deepcopy(cache) if step % 2 else BatchTurboKVCache.from_state(cache.state)
        assert cache.offset.tolist() == [row.shape[2] for row in rows]
        n_decided += not cache.undecided
        for b, row in enumerate(rows):
            if row.shape[2]:
                assert same(to_numpy(cache.extract(b).keys_and_values()[0]), row.astype(np.float32))
    assert 5 < n_decided < 80


# ---- attention -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["turbo4", "turbo8v3"])
def test_a_decode_step_of_a_batch_runs_the_fused_kernel(simulated, short_segments, monkeypatch, scheme):
    monkeypatch.setattr("mlx_turbo.cache.centering.SEGMENT", 128)  # the kernel's
    lengths, rng = [150, 3, 41], np.random.default_rng(0)
    config = TurboConfig(scheme, 4, 16, 16)
    caches = []
    for b, n in enumerate(lengths):
        caches.append(TurboKVCache(config))
        caches[-1].update_and_fetch(*random_tokens(rng, n, key_dim=64, value_dim=64, bias=20 * (b == 0)))
    batch = TurboKVCache.merge(caches)
    check_fused_steps(simulated, batch, caches, rng)


# ---- models ------------------------------------------------------------------------------------------------------


@fast
@pytest.mark.parametrize("scheme", ["turbo4", "turbo8v3", "turbo0"])
def test_logits_of_a_batch_are_those_of_its_rows_alone(backend, scheme):
    """Right-padded prompts in chunks, decode, another row that joins, one that leaves, one that goes on alone."""
    model, config = llama(), TurboConfig(scheme, 4, 8, 8)
    made = [make_prompt_cache(model, config) for _ in range(3)]
    walk = Walk(model, [make_prompt_cache(model, config) for _ in made])
    batch = walk.joined(made)
    for _ in range(10):
        walk.step(batch, [0, 1, 2], [1, 1, 1])
    gone = [c.extract(1) for c in batch]
    for c in batch:
        c.filter([2, 0])
    for _ in range(10):
        walk.step(batch, [2, 0], [1, 1])
    walk.step(gone, [1], [9])
    packed = [[c.report()["packed"] for c in cache] for cache in (batch, walk.alone[0], walk.alone[2])]
    assert packed[0] == [a + b for a, b in zip(*packed[1:])] and packed[0][0] > 90 and walk.worst < 1e-4


QUICK = "gemma3n", "gpt_oss", "deepseek_v3", "deepseek_v32", "longcat_flash", "falcon_h1"


def batch_error(model, make, lengths=(40, 23)):
    """The largest relative distance of a batch's logits from the rows alone; None where it cannot be made."""
    walk, made = Walk(model, [make(), make()]), [make(), make()]
    if not all(hasattr(c, "merge") for c in flatten_caches(made[0])):
        return None
    batch = merged(made)
    for lengths in (lengths, *[[1, 1]] * 12, [3, 1] if lengths[0] > lengths[1] else [3, 3]):
        walk.step(batch, [0, 1], lengths)
    return walk.worst


@fast
@pytest.mark.filterwarnings("ignore:nothing is compressed", "ignore:invalid value")
@pytest.mark.parametrize(
    "name",
    [
        *(n for n in QUICK if n in families.all_names()),
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in families.all_names()
            if n not in (*QUICK, *families.NOT_BUILT)
        ),
    ],
)
def test_every_family_that_mlx_lm_batches_is_batched_with_our_caches(backend, name):
    """Sliding windows, linear layers, latent attention, attention sinks, shared keys and values, indexers. Where
    mlx-lm's own batch is not the rows alone, ours has nothing to equal."""
    model, cell = families.build(name), families.cell(name, "batch")
    theirs = functools.partial(lm_cache.make_prompt_cache, model)
    ours = functools.partial(make_prompt_cache, model, TurboConfig("turbo4", 2, 4, 4))
    if name in ("afm7", "gemma3n") and not hasattr(lm_cache.KVCache, "keys_and_values"):  # before mlx-lm 0.32
        with pytest.raises(ValueError, match="unpack"):  # they read the state of another layer as a KVCache's
            batch_error(model, theirs)
    elif cell == families.NO_BATCH:
        assert batch_error(model, theirs) is None and batch_error(model, ours) is None
    elif cell == families.ONE_NUMBER:
        with pytest.raises(ValueError, match="length-1"):
            batch_error(model, theirs)
    elif cell == families.EQUAL_LENGTHS:
        assert not batch_error(model, theirs) < 1e-4
        assert batch_error(model, theirs, (33, 33)) < 1e-4 and batch_error(model, ours, (33, 33)) < 1e-4
        batch_error(model, ours)  # no exception where mlx-lm has none
    else:
        assert cell == "yes"
        assert batch_error(model, theirs) < 1e-4 and batch_error(model, ours) < 1e-4


PROMPTS = [
    "Once upon a time, a little girl named Lily found a shiny stone in the garden. She",
    "The dog",
    "Tom and his sister Sue went to the park with a red ball. They wanted to play, but it began to rain. " * 12,
]


@fast
@pytest.mark.parametrize("config", ["auto", TurboConfig("turbo4", 4, 16, 16), "turbo0"], ids=str)
def test_batch_generate_writes_what_each_prompt_gets_alone(backend, demo, config):
    model, tokenizer = demo
    enable(model, config)
    try:
        prompts = [tokenizer.encode(p) for p in PROMPTS]
        got = mlx_lm.batch_generate(model, tokenizer, prompts, max_tokens=[24, 12, 30], return_prompt_caches=True)
        want = [mlx_lm.generate(model, tokenizer, p, max_tokens=n) for p, n in zip(prompts, [24, 12, 30])]
    finally:
        disable(model)
    assert [t.lstrip() for t in got.texts] == want  # a streaming detokenizer drops the first space
    assert all(type(c) is TurboKVCache for cache in got.caches for c in cache)
    more = [tokenizer.encode(" Then") for _ in prompts]
    again = mlx_lm.batch_generate(model, tokenizer, more, max_tokens=6, prompt_caches=got.caches)
    for cache, prompt, text in zip(got.caches, more, again.texts):
        alone = mlx_lm.generate(model, tokenizer, prompt, max_tokens=6, prompt_cache=copy.deepcopy(cache))
        assert alone == text.lstrip()


@fast
def test_a_batch_cache_is_saved_loaded_and_described(backend, tmp_path):
    model = llama()
    caches = [make_prompt_cache(model, SMALL) for _ in range(2)]
    for cache, n in zip(caches, (40, 9)):
        model(tokens_of(n), cache=cache)
    batch = [layer[0].merge(list(layer)) for layer in zip(*caches)]
    lm_cache.save_prompt_cache(str(tmp_path / "batch.safetensors"), batch)
    loaded = lm_cache.load_prompt_cache(str(tmp_path / "batch.safetensors"))
    assert all(type(c) is BatchTurboKVCache and same(state_of(c), state_of(b)) for c, b in zip(loaded, batch))
    assert describe(loaded) == "2 of 2 layers compressed"
    report = loaded[0].report()
    assert (report["tokens"], report["sink"], report["packed"], report["recent"]) == (49, 4, 34, 11)
    assert report["nbytes"] == loaded[0].nbytes


@pytest.fixture
def server(monkeypatch):
    """The address of mlx-lm's own server with the embedded model, in float32 and enabled as the server loads it."""
    provider, load = [], mlx_lm.server.load

    def load_enabled(*args, **options):
        model, *rest = load(*args, **options)
        model = dequantize_model(model)
        model.set_dtype(mx.float32)
        return enable(model, SMALL), *rest

    monkeypatch.setattr(mlx_lm.server, "load", load_enabled)
    monkeypatch.setattr(mlx_lm.server, "run", lambda host, port, made: provider.append(made))
    monkeypatch.setattr(sys, "argv", ["mlx_lm.server", "--model", str(DEMO_MODEL)])
    mlx_lm.server.main()
    generator = mlx_lm.server.ResponseGenerator(provider[0], lm_cache.LRUPromptCache(10))
    httpd = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *args, **options: mlx_lm.server.APIHandler(generator, *args, **options)
    )
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}/v1/completions"
    httpd.shutdown()
    httpd.server_close()
    generator.stop_and_join()


def complete(address, prompt, n):
    """(text, prompt tokens that were in the server's prompt cache) of a completion of n tokens."""
    body = json.dumps(dict(model="default_model", prompt=prompt, max_tokens=n, temperature=0)).encode()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        answer = json.load(response)
    return answer["choices"][0]["text"], answer["usage"].get("prompt_tokens_details", {}).get("cached_tokens", 0)


@fast
def test_mlx_lm_s_server_batches_our_caches(backend, server, demo, monkeypatch):
    """Three requests at once, then each again with more text, from the server's prompt cache."""
    n_rows, update = [], BatchTurboKVCache.update_and_fetch

    def counted(cache, keys, values):
        n_rows.append(keys.shape[0])
        return update(cache, keys, values)

    monkeypatch.setattr(BatchTurboKVCache, "update_and_fetch", counted)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        first = list(pool.map(lambda prompt: complete(server, prompt, 30), PROMPTS))
        more = [f"{prompt} {text} They all" for prompt, (text, _) in zip(PROMPTS, first)]
        again = list(pool.map(lambda prompt: complete(server, prompt, 8), more))
    assert max(n_rows) == 3
    assert all(text and n_cached > 25 for text, n_cached in again)
    for prompt, (text, _) in zip(PROMPTS, first):
        cache = make_prompt_cache(demo[0], SMALL)
        assert text.lstrip() == mlx_lm.generate(*demo, prompt, max_tokens=30, prompt_cache=cache)
