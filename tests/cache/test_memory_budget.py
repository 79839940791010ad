"""A budget of memory: never more than it, exact while it fits, the same each time, refused before anything changes."""

import contextlib
import copy
import gc

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, run_state_machine_as_test
from support.arrays import to_numpy
from support.caches import FAST_BACKENDS, WAYS, copied, queries_of, random_tokens, rule, same
from support.rows import LARGEST_ERROR, state_of
from support.strategies import CHUNKS, quick

from mlx_turbo import RotatingTurboKVCache, Scheme, TurboConfig, TurboKVCache
from mlx_turbo.backends import mlx_ops
from mlx_turbo.cache import memory_budget
from mlx_turbo.cache.memory_budget import MemoryBudget, MemoryBudgetError, Shape, _Held
from mlx_turbo.cache.repacking import LADDER, SLICE, path_between, reachable_pairs, rungs
from mlx_turbo.quant.scheme import PACKED_BITS

fast = pytest.mark.parametrize("backend", FAST_BACKENDS, indirect=True)
SHAPE = dict(heads=2, key_dim=32, value_dim=64)
SMALL = dict(sink=2, recent=4, block=4)
BESIDE = 16_384  # bytes that MLX keeps of a larger buffer behind a slice of it, at most; more than a mask takes
FLOORS = st.builds(Scheme, st.sampled_from([0, *PACKED_BITS]), st.sampled_from(PACKED_BITS))
MAKERS = st.builds(
    lambda window, keep, **config: (window and window + keep, TurboConfig("turbo0", sink=keep, **config)),
    st.sampled_from([0, 0, 20, 300]),
    st.integers(0, 3),
    recent=st.integers(0, 6),
    block=st.integers(1, 6),
    centre=st.booleans(),
    balance=st.booleans(),
)


def make(window, config):
    return RotatingTurboKVCache(window, config.sink, config) if window else TurboKVCache(config)


def layers(limit, n=3, config=None, floor="turbo2", prices=None, shape=SHAPE, n_heads=4):
    """(budget, caches) of a model of n layers with turbo0 and SMALL exact ends."""
    budget = MemoryBudget(limit, Scheme.parse(floor), prices)
    caches = [TurboKVCache(config or TurboConfig("turbo0", **SMALL)) for _ in range(n)]
    dims = shape["key_dim"], shape["value_dim"]
    known = Shape(1, shape["heads"], dims, 4, True, n_heads)
    budget.add(enumerate(caches), dict.fromkeys(range(n), known))
    return budget, caches


def step(caches, tokens, observe=True):
    for cache, (keys, values) in zip(caches, tokens):
        cache.update_and_fetch(keys, values)
        if observe:
            cache.observe(queries_of(keys), 0.1)


def drawn(rng, n_layers, n, **options):
    return [random_tokens(rng, n, **SHAPE | options) for _ in range(n_layers)]


def errors_allowed(cache, held):
    """Whether what a cache restores is as near to the tokens given to it as what it was packed at can be: twice the
    largest error of packing once, as it may have been packed several times."""
    for got, want, side in zip(cache.keys_and_values(), held, cache._sides):
        got = to_numpy(got)
        want = want if got.shape[2] == want.shape[2] else want[:, :, want.shape[2] - got.shape[2] :]
        if not side.bits:
            np.testing.assert_array_equal(got, want)
        factors = 1 if side.balance is None else to_numpy(side.balance.factors)
        error = np.linalg.norm((got - want) * factors, axis=-1)
        norms = np.linalg.norm(want * factors, axis=-1)
        spread = 2 * norms.max() if side.means is not None else norms
        assert (error <= 2 * LARGEST_ERROR[side.bits] * spread + 1e-6 * norms.max()).all()


# ---- arithmetic ------------------------------------------------------------------------------------------------------
@quick
@given(made=MAKERS, chunks=CHUNKS, data=st.data(), batch=st.integers(1, 2))
def test_what_is_computed_beforehand_is_what_the_buffers_take(made, chunks, data, batch):
    """Exactly, but for means, balance and queries as long as nobody knows whether there will be any."""
    cache, rng = make(*made), np.random.default_rng(0)
    budget = MemoryBudget(2**60, Scheme(2, 2))
    known = Shape(batch, SHAPE["heads"], (SHAPE["key_dim"], SHAPE["value_dim"]), 4, True, 2 * SHAPE["heads"])
    budget.add([(0, cache)], {0: known})
    certain = not (made[1].centre or made[1].balance)
    for n in chunks:
        if data.draw(st.booleans()):
            bits = [
                data.draw(st.sampled_from([b for b in LADDER if not s.bits or 0 < b <= s.bits])) for s in cache._sides
            ]
            cache.repack(*bits)
        keys, values = random_tokens(rng, n, **SHAPE | dict(batch=batch))
        held = (
            _Held(cache, cache.room_after(n), Shape.of(keys, values, known.n_heads)) if n else _Held(cache, None, None)
        )
        grows = n and cache.will_grow(n)
        before = sum(side.nbytes for side in cache._sides)
        cache.update_and_fetch(keys, values)
        if n:
            cache.observe(queries_of(keys), 0.1)  # until then the first tokens are exact, as the model has them
        buffers = sum(side.nbytes for side in cache._sides)
        if n:
            assert buffers <= held.nbytes
            if certain and not made[0]:
                assert buffers == held.nbytes - held.kept_queries()
            assert grows or buffers <= before
            assert cache.nbytes <= held.nbytes


@quick
@given(
    chunks=st.lists(st.tuples(st.lists(st.integers(0, 40), min_size=3, max_size=3), st.booleans()), max_size=6),
    bits=st.sampled_from([0, 8, 3]),
    window=st.sampled_from([0, 0, 30]),
)
def test_what_is_computed_beforehand_for_a_batch_is_never_less_than_its_buffers_take(chunks, bits, window):
    budget, rng = MemoryBudget(2**60, Scheme(2, 2)), np.random.default_rng(0)
    row = make(window, TurboConfig("turbo0", **SMALL))
    budget.add([(0, row)], {0: Shape(1, SHAPE["heads"], (SHAPE["key_dim"], SHAPE["value_dim"]), 4, True, 4)})
    batch = row.merge([row] * 3)
    for lengths, decode in [([30, 9, 0], False), *chunks]:
        width = 1 if decode else max(lengths)
        if not width:
            continue
        if not decode:
            batch.prepare(lengths=lengths, right_padding=[width - n for n in lengths])
        keys, values = random_tokens(rng, width, **SHAPE | dict(batch=3))
        if batch.packed_columns and bits and not batch._sides[0].bits:
            batch.repack(bits, bits)
        held, grows = _Held(batch, batch.room_after(width), Shape.of(keys, values, 4)), batch.will_grow(width)
        before = sum(side.nbytes for side in batch._sides)
        batch.update_and_fetch(keys, values)
        batch.observe(queries_of(keys), 0.1)  # until then the first tokens are exact, as the model has them
        after = sum(side.nbytes for side in batch._sides)
        assert after <= held.nbytes and (grows or after <= before)
        assert batch.nbytes <= held.nbytes
        batch.finalize()


@fast
def test_the_next_growth_is_at_the_token_that_was_named(backend):
    _, (cache, *_) = layers(2**60)
    rng = np.random.default_rng(0)
    for n in (7, 30, 200, 1, 290):
        left, n_packed = cache.next_growth(n)
        cache.update_and_fetch(*random_tokens(rng, n, **SHAPE))
        for _ in range(left - 1):
            assert cache._sides[0].codes is None or not cache.will_grow(1)
            cache.update_and_fetch(*random_tokens(rng, 1, **SHAPE))
        held = cache.nbytes
        cache.update_and_fetch(*random_tokens(rng, 1, **SHAPE))
        assert cache.nbytes > held and cache.n_packed == n_packed


# ---- what is promised ------------------------------------------------------------------------------------------------
@quick
@given(
    limit=st.integers(30_000, 900_000),
    chunks=st.lists(st.sampled_from([1, 3, 60, 300]), min_size=1, max_size=12),
    floor=FLOORS,
    seed=st.integers(0, 3),
)
def test_the_same_tokens_and_budget_give_the_same_caches_and_never_more_bytes(limit, chunks, floor, seed):
    states = []
    for _ in range(2):
        budget, caches = layers(limit, floor=floor.name)
        rng, n = np.random.default_rng(seed), 0
        for chunk in chunks:
            tokens = drawn(rng, len(caches), chunk)
            before = [state_of(c) for c in caches]
            try:
                step(caches, tokens)
            except MemoryBudgetError as e:
                assert all(map(same, before, map(state_of, caches)))  # nothing has changed
                assert e.n_fit < chunk
                break
            n += chunk
            assert budget.nbytes == sum(c.nbytes for c in caches) <= limit
        assert [c.offset for c in caches] == [n] * len(caches)
        states.append([state_of(c) for c in caches])
    assert same(*states)


@fast
@pytest.mark.parametrize("chunk", [1, 50])
def test_nothing_is_packed_as_long_as_it_fits(backend, chunk):
    """Limits around what exact caches take at the end: from there on they stay exact, below they do not."""
    budget, caches = layers(2**60, n=1)
    needed = budget.nbytes_after(caches, 300)
    for limit, exact in ((needed, True), (needed - 1, False)):
        budget, caches = layers(limit, n=1)
        rng = np.random.default_rng(0)
        for _ in range(0, 300, chunk):
            step(caches, drawn(rng, 1, chunk))
        assert all(c.config.scheme == Scheme(0, 0) for c in caches) == exact
        assert budget.nbytes <= limit


@quick
@given(
    made=st.lists(MAKERS, min_size=1, max_size=2),
    chunks=st.lists(st.sampled_from([1, 2, 60, 300]), min_size=1, max_size=4),
    single=st.sampled_from([0, 3, 40]),
)
def test_what_needs_no_step_is_never_packed_in_whatever_chunks_it_comes(made, chunks, single):
    """Within the least limit of which it is said."""
    rng, known = np.random.default_rng(0), Shape(1, SHAPE["heads"], (SHAPE["key_dim"], SHAPE["value_dim"]), 4, True, 4)
    chunks = [*chunks, *[1] * single]
    budget, caches = MemoryBudget(2**60, Scheme(2, 2)), [make(*m) for m in made]
    budget.add(enumerate(caches), dict.fromkeys(range(len(caches)), known))
    low, high = 0, 2**24
    while high - low > 1:
        budget.limit = (low + high) // 2
        low, high = (
            (low, budget.limit) if budget.needs_no_step(caches, sum(chunks), max(chunks)) else (budget.limit, high)
        )
    budget.limit = high
    for n in chunks:
        step(caches, drawn(rng, len(caches), n))
    assert all(c.config.scheme == Scheme(0, 0) for c in caches) and budget.nbytes <= budget.limit


@fast
def test_what_costs_least_is_packed_first(backend):
    cheap, dear = {4: 1e-6}, {4: 1e-1}
    for part in (0, 1), (2, 0):
        prices = [[cheap if (i, side) == part else dear for side in (0, 1)] for i in range(3)]
        budget, caches = layers(620_000, prices=prices)
        assert budget.report()["next"] is None  # nothing is there to be packed
        rng = np.random.default_rng(0)
        bits = {(i, side): 0 for i in range(3) for side in (0, 1)}
        while list(bits.values()).count(0) > 2:
            step(caches, drawn(rng, 3, 50))
            bits = {(i, side): c._sides[side].bits for i, c in enumerate(caches) for side in (0, 1)}
        assert 0 < bits[part] <= min(b for other, b in bits.items() if b and other != part)
        assert "priced by KL divergence" in budget.describe()


@fast
@pytest.mark.parametrize("n, limit", [(3, 700_000), (1, 233_000)], ids=["three layers", "one, both sides at a growth"])
def test_a_decode_step_repacks_one_part_at_most_and_leads_to_a_pair_of_widths_that_is_known(
    backend, monkeypatch, n, limit
):
    calls, original = [], TurboKVCache.repack
    monkeypatch.setattr(TurboKVCache, "repack", lambda self, *a, **k: (calls.append(self), original(self, *a, **k))[1])
    prices = [[{4: 1e-6}, {4: 1e-1}]] * n  # keys alone would go to the floor
    budget, caches = layers(limit, n=n, floor="turbo4", prices=prices)
    rng, most, total, pairs = np.random.default_rng(0), 0, 0, {*reachable_pairs(budget.floor)}
    step(caches, drawn(rng, n, 100))
    with pytest.raises(MemoryBudgetError, match="1 more tokens after .* take .* every layer at turbo4"):
        while True:
            calls.clear()
            step(caches, drawn(rng, n, 1), observe=False)
            most, total = max(most, len(calls)), total + len(calls)
            assert budget.nbytes <= budget.limit
            assert {tuple(s.bits for s in c._sides) for c in caches} <= pairs
    assert most == 1 and total > 3 * n
    assert all(c.config.scheme == Scheme(4, 4) for c in caches)


@fast
def test_rejected_drafts_do_not_let_anything_be_packed_earlier(backend):
    """Speculative decoding appends several tokens at a time, and trims most of them."""
    packed_at = []
    for n_draft in (0, 3):
        budget, caches = layers(700_000, n=2)
        rng = np.random.default_rng(0)
        step(caches, drawn(rng, 2, 20))
        while all(c.config.scheme == Scheme(0, 0) for c in caches):
            step(caches, drawn(rng, 2, 1 + n_draft), observe=False)
            for c in caches:
                c.trim(n_draft)
            assert budget.nbytes <= budget.limit
        packed_at.append(caches[0].offset)
    alone, drafted = packed_at
    assert 100 < alone - 4 <= drafted <= alone


@fast
def test_a_prompt_that_cannot_fit_is_refused_and_what_is_said_to_fit_does(backend):
    budget, caches = layers(100_000)
    rng = np.random.default_rng(0)
    with pytest.raises(MemoryBudgetError, match="100,000 .100KB.; .* of them fit") as refused:
        step(caches, drawn(rng, 3, 2000))
    assert all(c.empty() for c in caches) and budget.nbytes == 0
    fit = refused.value.n_fit
    assert 100 < fit < 2000 and budget.tokens_that_fit(caches) == fit
    step(caches, drawn(rng, 3, fit))
    assert budget.nbytes <= budget.limit


@quick
@given(
    made=st.lists(MAKERS, min_size=1, max_size=2),
    chunks=st.lists(st.sampled_from([1, 2, 20, 60, 300]), min_size=1, max_size=4),
    single=st.sampled_from([0, 3, 40]),
    floor=FLOORS,
    n_heads=st.sampled_from([4, 40]),
)
def test_what_is_said_to_fit_is_never_refused_in_whatever_chunks_it_comes(made, chunks, single, floor, n_heads):
    """Within the least limit of which it is said, which has no room for queries."""
    rng, n = np.random.default_rng(0), sum(chunks) + single
    known = Shape(1, SHAPE["heads"], (SHAPE["key_dim"], SHAPE["value_dim"]), 4, True, n_heads)
    budget, caches = MemoryBudget(2**60, floor), [make(*m) for m in made]
    budget.add(enumerate(caches), dict.fromkeys(range(len(caches)), known))
    low, high = 0, 2**24
    while high - low > 1:
        budget.limit = (low + high) // 2
        fits = budget.tokens_that_fit(caches, n, max(chunks)) is None
        low, high = (low, budget.limit) if fits else (budget.limit, high)
    budget.limit = high
    for chunk in [*chunks, *[1] * single]:
        for cache, (keys, values) in zip(caches, drawn(rng, len(caches), chunk)):
            cache.update_and_fetch(keys, values)
            if cache.wants_queries:
                cache.observe(mx.tile(queries_of(keys), (1, n_heads // 4, 1, 1)), 0.1)
            assert budget.nbytes <= budget.limit
    assert budget.report()["caches"] == len(caches)


@fast
def test_a_budget_that_is_too_short_for_queries_gives_up_those_of_the_cheapest_layers_and_says_so(backend):
    """Keys are packed without balance then, and the other layers keep theirs."""
    prices = [[{4: e}, {4: e}] for e in (1e-2, 1e-5, 1e-3)]
    budget, caches = layers(2**60, prices=prices, n_heads=40)
    rng, few = np.random.default_rng(0), SMALL["sink"] + SMALL["recent"] + SMALL["block"]
    whole, of_layer = budget.nbytes_after(caches, few), 40 * 32 * 32 * 4
    budget.limit = whole - of_layer - of_layer // 2
    assert budget.tokens_that_fit(caches) > few
    step(caches, drawn(rng, 3, 5))
    assert [c.wants_queries for c in caches] == [True, False, False]
    assert budget.describe().endswith("; queries given up in layers 1-2: their keys are packed without balance")
    assert budget.report()["without_queries"] == [1, 2] and budget.nbytes <= budget.limit
    step(caches, drawn(rng, 3, 300))
    said = [c.report()["balance"] for c in caches]
    assert said[0].endswith("of 2 kv heads") and set(said[1:]) == {"the memory budget had no room for queries"}
    twins = [copied(c, way) for c, way in zip(caches, ("copy", "pickle", "file"))]
    assert all(same(state_of(a), state_of(b)) for a, b in zip(caches, twins)) and not twins[1].wants_queries
    for c in caches:
        c.trim(c.offset)
    budget.limit = 2**60
    step(caches, drawn(rng, 3, 300))
    assert all(c.wants_queries for c in caches) and budget.report()["without_queries"] == []


@fast
def test_rows_whose_queries_were_given_up_are_in_a_batch_what_they_were_alone(backend):
    budget, row = layers(2**60, n=1)
    (row,), (other,) = row, copy.deepcopy(row)
    rng = np.random.default_rng(0)
    row.give_up_queries()
    step([row], drawn(rng, 1, 5))
    step([other], drawn(rng, 1, 9))
    batch = row.merge([row, other, row])
    assert budget.report()["without_queries"] == [0]
    alone = [row, other, copy.deepcopy(row)]
    for n in (1, 200, 1):
        (keys, values), *_ = drawn(rng, 1, n, batch=3)
        step([batch], [(keys, values)])
        for b, cache in enumerate(alone):
            step([cache], [(keys[b : b + 1], values[b : b + 1])])
            assert same(state_of(batch.extract(b)), state_of(cache))
            assert batch.extract(b).wants_queries == cache.wants_queries == (b == 1)
    batch.repack(4, 4)
    for cache in alone:
        cache.repack(4, 4)
    assert all(same(state_of(batch.extract(b)), state_of(cache)) for b, cache in enumerate(alone))
    assert [c._sides[0].balance is None for c in alone] == [True, False, True]
    batch.filter([1])
    assert budget.report()["without_queries"] == [0]  # the row that is still held alone
    del alone, row, cache
    gc.collect()
    assert budget.report()["without_queries"] == []


@fast
def test_a_batch_without_queries_waits_for_none_and_a_row_that_is_trimmed_to_nothing_begins_again(backend):
    _, (row,) = layers(2**60, n=1)
    row.give_up_queries()
    rng, rows = np.random.default_rng(0), [row, copy.deepcopy(row)]
    for n, cache in zip((5, 9), rows):
        step([cache], drawn(rng, 1, n), observe=False)
    batch = row.merge(rows)
    for cache in batch, *rows:
        cache.trim(6)
    assert [batch.extract(b).wants_queries for b in (0, 1)] == [cache.wants_queries for cache in rows] == [True, False]
    batch.give_up_queries()
    batch.repack(4, 4)
    ((keys, values),) = drawn(rng, 1, 300, batch=2)
    batch.update_and_fetch(keys, values)
    assert not batch.wants_queries and batch.packed_columns > 200


@fast
def test_a_batch_that_has_no_room_for_queries_gives_them_up_rather_than_being_refused(backend):
    done = set()
    for limit in range(100_000, 3_600_000, 100_000):
        budget, caches = layers(2**60, n=2, n_heads=40, config=TurboConfig("turbo0", 2, 40, 40))
        rows, rng = [caches, copy.deepcopy(caches)], np.random.default_rng(0)
        del caches
        try:
            for row in rows:
                step(row, drawn(rng, 2, 4), observe=False)
            batch, others = ([layer.merge([layer] * n) for layer in row] for n, row in zip((3, 1), rows))
            del rows, row
            budget.limit = limit
            for layer, other in zip(batch, others):
                layer.extend(other)
            for cache, (keys, values) in zip(batch, drawn(rng, 2, 60, batch=4)):  # no buffer grows
                cache.update_and_fetch(keys, values)
                if cache.wants_queries:
                    cache.observe(mx.tile(queries_of(keys), (1, 10, 1, 1)), 0.1)
                assert budget.nbytes <= budget.limit
        except MemoryBudgetError:
            done.add("refused")
        else:
            done.add(len(budget.report()["without_queries"]))
    assert done == {"refused", 0, 1, 2}


@quick
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    chunks=st.lists(st.one_of(st.just(1), st.integers(1, 40)), max_size=20),
    single=st.integers(0, 280),
    window=st.sampled_from([0, 0, 30]),
)
def test_the_queries_that_are_kept_are_never_more_than_is_counted(lengths, chunks, single, window):
    """Of rows of whatever lengths, which keep the queries of other steps."""
    rng, rows = np.random.default_rng(0), [make(window, TurboConfig("turbo0", **SMALL)) for _ in lengths]
    for n, row in zip(lengths, rows):
        row.repackable = True
        step([row], drawn(rng, 1, n))
    batch = rows[0].merge(rows)
    per_row = Shape(1, SHAPE["heads"], (SHAPE["key_dim"], SHAPE["value_dim"]), 4, True, 4).queries_nbytes
    (tokens,) = drawn(rng, 1, 1, batch=len(rows))
    for chunk in [*chunks, *[1] * single]:
        step([batch], [tokens] if chunk == 1 else drawn(rng, 1, chunk, batch=len(rows)))
        assert sum(q.nbytes for q in batch._observed_queries()) <= len(rows) * per_row


@fast
def test_stages_say_at_how_many_tokens_the_bits_change(backend):
    budget, caches = layers(400_000, floor="turbo3")
    found = budget.stages(caches)
    assert [bits for bits, _ in found] == [b for b in LADDER if not b or b >= 3]
    tokens = [n for _, n in found]
    assert tokens == sorted(tokens) and tokens[-1] == budget.tokens_that_fit(caches)
    for bits, n in found:
        budget, caches = layers(400_000, floor="turbo3")
        step(caches, drawn(np.random.default_rng(0), 3, n))
        fewest = min(s.bits or 16 for c in caches for s in c._sides)
        assert fewest >= (bits or 16)


@fast
def test_mlx_itself_holds_no_more_than_the_budget_one_part_twice_and_what_a_slice_is_computed_with(
    backend, monkeypatch
):
    """However many tokens there are: packing goes by slices, with 13 arrays of the size of one in MLX operations
    (measured: 12.3)."""
    monkeypatch.setattr(mlx_ops, "SLICE_VALUES", SLICE * 32)
    shape = dict(heads=1, key_dim=32, value_dim=32)
    budget, caches = layers(4_000_000, n=8, shape=shape, config=TurboConfig("turbo0", 4, 16, 16))
    tokens = drawn(np.random.default_rng(0), 8, 128, **shape)  # the same ones again and again
    mx.eval(tokens)
    gc.collect()
    mx.synchronize()
    base, part = mx.get_active_memory(), 0
    mx.reset_peak_memory()
    while caches[0].offset < 8000:
        step(caches, tokens)
        mx.eval([side.buffers() for c in caches for side in c._sides])
        part = max([part, *(s.codes.nbytes for c in caches for s in c._sides if s.codes is not None)])
    assert min(s.bits for c in caches for s in c._sides) > 0  # all of them have been packed
    one_slice, chunk = SLICE * 32 * 4, 8 * 4 * tokens[0][0].nbytes  # with what it is joined to
    assert mx.get_peak_memory() - base <= budget.limit + 2 * part + 13 * one_slice + chunk < 2.2 * budget.limit


@fast
def test_caches_count_as_long_as_they_live(backend):
    budget, caches = layers(2**60)
    step(caches, drawn(np.random.default_rng(0), 3, 300))
    once = budget.nbytes
    twins = copy.deepcopy(caches)
    assert budget.nbytes == 2 * once and len(budget.alive()) == 6
    step(twins, drawn(np.random.default_rng(1), 3, 300))
    assert [c.offset for c in caches] == [300] * 3 and budget.nbytes == once + sum(c.nbytes for c in twins)
    del twins
    gc.collect()
    assert budget.nbytes == once
    caches[0].trim(300)
    assert caches[0].config.scheme == Scheme(0, 0)


@fast
def test_what_can_be_had_again_goes_before_anything_is_packed(backend):
    budget, caches = layers(1_500_000)
    kept = [copy.deepcopy(caches)]
    step(kept[0], drawn(np.random.default_rng(0), 3, 300))
    budget.evict.append(lambda: bool(kept) and kept.pop() is not None)
    step(caches, drawn(np.random.default_rng(1), 3, 400))
    assert not kept and all(c.config.scheme == Scheme(0, 0) for c in caches)
    budget.others.append(lambda: 900_000)
    step(caches, drawn(np.random.default_rng(1), 3, 300))
    assert all(c.config.scheme != Scheme(0, 0) for c in caches)
    assert budget.nbytes == sum(c.nbytes for c in caches) + 900_000 <= 1_500_000


# ---- pairs of widths -------------------------------------------------------------------------------------------------
ANY_FLOOR = st.builds(Scheme, *[st.sampled_from([0, *PACKED_BITS])] * 2)


def fewest(*pairs):
    return tuple(min(bits, key=lambda b: b or 16) for bits in zip(*pairs))


def lower(pair, than):
    return pair != than and fewest(pair, than) == pair


@quick
@given(floor=ANY_FLOOR)
def test_pairs_are_few_and_none_is_left_by_joining_rows_or_on_the_way_to_another(floor):
    pairs = reachable_pairs(floor)
    lowest = floor.key_bits, floor.value_bits
    assert (pairs[0], pairs[-1]) == ((0, 0), lowest) and len(set(pairs)) == len(pairs) <= 3 * len(LADDER)
    for pair in pairs:
        key, value = (rungs(b).index(bits) for b, bits in zip(lowest, pair))
        assert abs(key - value) <= 1 or pair[value < key] == lowest[value < key]
        assert all(fewest(pair, other) in pairs for other in pairs)
        for then in (p for p in pairs if lower(p, pair)):
            path = path_between(pair, then, pairs)
            assert path[-1] == then and set(path) <= set(pairs)
            for before, after in zip([pair, *path], path):
                assert lower(after, before) and sum(a != b for a, b in zip(before, after)) == 1


@fast
@pytest.mark.parametrize(
    "scheme, floor, then",
    [
        ("turbo8v3", "turbo3", {(4, 3), (3, 3)}),
        ("turbo8v2", "turbo3", {(3, 2)}),  # below the floor: stays
        ("turbo5", "turbo4", {(4, 4)}),
        ("turbo8v4", "turbo0v3", {(8, 3)}),
        ("turbo8v4", "turbo4", {(6, 4), (4, 4)}),
    ],
)
def test_a_cache_with_a_pair_from_elsewhere_goes_on_to_one_that_may_be_reached(backend, scheme, floor, then):
    own = Scheme.parse(scheme)
    budget, seen = MemoryBudget(2**60, Scheme.parse(floor)), set()
    cache = TurboKVCache(TurboConfig(own, **SMALL))
    budget.add([(0, cache)])
    rng = np.random.default_rng(0)
    step([cache], drawn(rng, 1, 300))
    assert cache.config.scheme == own
    for share in (1, 0.9, 0.8, 0.7, 0.6, 0.5):
        budget.limit = int(share * cache.nbytes)
        if budget.make_fit():
            seen.add((cache.config.scheme.key_bits, cache.config.scheme.value_bits))
    assert seen - {(own.key_bits, own.value_bits)} and seen <= then | {(own.key_bits, own.value_bits)}


# ---- batches ---------------------------------------------------------------------------------------------------------
@fast
def test_rows_of_different_widths_are_brought_to_the_fewest_bits(backend):
    budget, caches = layers(2**60, n=1)
    rows = [caches[0], *(copy.copy(caches[0]) for _ in range(2))]
    rng = np.random.default_rng(0)
    for row, n in zip(rows, (40, 90, 3)):
        step([row], drawn(rng, 1, n))
    rows[1].repack(8, 4)
    batch = rows[0].merge(rows)
    assert batch.config.scheme == Scheme(8, 4) and batch.share.budget is budget
    assert rows[0].config.scheme == Scheme(0, 0) == rows[2].config.scheme  # which stay as they are
    assert budget.nbytes == sum(c.nbytes for c in (*rows, batch))
    del rows, row
    caches.clear()
    gc.collect()
    assert budget.nbytes == batch.nbytes
    row = batch.extract(1)
    assert row.share.budget is budget and row.config.scheme == Scheme(8, 4) and row.offset == 90
    with pytest.raises(ValueError, match="different memory budgets"):
        row.merge([row, TurboKVCache(row.config)])


def rows_of(budget, lengths, n_layers=2, seed=0):
    """A prompt cache of some tokens for each row, under one budget."""
    rng, known = (
        np.random.default_rng(seed),
        Shape(1, SHAPE["heads"], (SHAPE["key_dim"], SHAPE["value_dim"]), 4, True, 4),
    )
    rows = []
    for n in lengths:
        rows.append([TurboKVCache(TurboConfig("turbo0", **SMALL)) for _ in range(n_layers)])
        budget.add(enumerate(rows[-1]), dict.fromkeys(range(n_layers), known))
        step(rows[-1], drawn(rng, n_layers, n))
    return rows


@fast
@pytest.mark.parametrize("way", ["merge", "extend"])
def test_a_batch_is_made_within_the_budget_and_packs_first_if_it_must(backend, way):
    lengths = (300, 420)
    need = {}
    for limit in (2**60, None):
        budget = MemoryBudget(limit or int(0.6 * need["bytes"]), Scheme(2, 2))
        rows, most = rows_of(budget, lengths), 0
        if way == "extend":
            rows = [[layer.merge([layer]) for layer in row] for row in rows]
            gc.collect()
        batch = []
        for a, b in zip(*rows):
            batch.append(a.merge([a, b]) if way == "merge" else a)
            if way == "extend":
                a.extend(b)
            most = max(most, budget.nbytes)
        need["bytes"] = most
        assert most == budget.nbytes <= budget.limit
        assert all((c.config.scheme == Scheme(0, 0)) == (limit is not None) for c in batch)
        del rows, a, b
        gc.collect()
        assert budget.nbytes == sum(c.nbytes for c in batch)
        assert len({id(c.share.group) for c in batch}) == 1  # they take their steps together


@fast
def test_a_batch_that_cannot_be_made_within_the_budget_is_refused_before_anything_changes(backend):
    budget = MemoryBudget(2**60, Scheme(8, 8))
    rows = rows_of(budget, (300, 420), 1)
    budget.limit = int(0.5 * budget.nbytes)
    before = [state_of(layer) for row in rows for layer in row]
    with pytest.raises(
        MemoryBudgetError, match="memory: a batch of 2 rows, made of others, takes .* at turbo8, the floor"
    ):
        rows[0][0].merge([row[0] for row in rows])
    assert all(map(same, before, [state_of(layer) for row in rows for layer in row]))
    kept = [copy.deepcopy(rows[0])]
    budget.evict.append(lambda: bool(kept) and kept.pop() is not None)
    budget.limit = int(2.1 * sum(c.nbytes for row in rows for c in row))
    assert rows[0][0].merge([row[0] for row in rows]).n_rows == 2 and not kept


@fast
@pytest.mark.parametrize("scheme", [(0, 0), (4, 3)])
def test_a_batch_that_loses_rows_is_never_held_twice(backend, scheme):
    """Each part is computed by itself, and the old one goes before the next. Exact tokens are gathered, and then put
    where there is room for more."""
    use_every_width()
    gc.collect()
    mx.synchronize()
    before = mx.get_active_memory()
    budget, caches = layers(2**60, n=4)
    step(caches, drawn(np.random.default_rng(0), 4, 1000))
    for cache in caches:
        cache.repack(*scheme)
    batch = [layer.merge([layer] * 4) for layer in caches]
    del caches, cache
    gc.collect()
    mx.eval([side.started() for layer in batch for side in layer._sides])
    budget.limit, part = budget.nbytes, max(side.nbytes for layer in batch for side in layer._sides)
    mx.reset_peak_memory()
    for layer in batch:
        layer.filter([0, 1, 3])
    assert budget.nbytes <= budget.limit
    budget.separate()
    mx.eval([side.started() for layer in batch for side in layer._sides])
    assert mx.get_peak_memory() - before <= budget.limit + 2 * part + BESIDE * 4


# ---- state machines --------------------------------------------------------------------------------------------------
class BudgetMachine(RuleBasedStateMachine):
    """Everything that is done to the caches of a model, in any order, under a budget."""

    @initialize(limit=st.integers(60_000, 700_000), floor=FLOORS, centre=st.booleans(), priced=st.booleans())
    def start(self, limit, floor, centre, priced):
        self.rng = np.random.default_rng(0)
        prices = [[{4: float(e)} for e in self.rng.exponential(size=2)] for _ in range(2)] if priced else None
        self.config = TurboConfig("turbo0", centre=centre, **SMALL)
        self.budget, caches = layers(limit, 2, self.config, floor.name, prices)
        self.sequences = [(caches, None)]

    def tokens(self, batch, n):
        return [random_tokens(self.rng, n, **SHAPE | dict(batch=batch)) for _ in range(2)]

    @rule(n=st.one_of(st.just(1), st.integers(2, 40), st.integers(100, 300)), data=st.data())
    def append(self, n, data):
        at = data.draw(st.integers(0, len(self.sequences) - 1))
        (caches, held), new = self.sequences[at], self.tokens(1, n)
        before = [state_of(c) for c in caches]
        try:
            step(caches, new)
        except MemoryBudgetError:
            assert all(map(same, before, map(state_of, caches)))
            return
        new = [[to_numpy(x) for x in layer] for layer in new]
        if held is not None:
            new = [[np.concatenate(p, axis=2) for p in zip(old, layer)] for old, layer in zip(held, new)]
        self.sequences[at] = caches, new

    @rule(n=st.one_of(st.integers(0, 4), st.integers(0, 300)), data=st.data())
    def trim(self, n, data):
        at = data.draw(st.integers(0, len(self.sequences) - 1))
        caches, held = self.sequences[at]
        for c in caches:
            c.trim(n)
        left = caches[0].offset
        self.sequences[at] = caches, [[x[:, :, :left] for x in layer] for layer in held] if left else None

    @precondition(lambda self: len(self.sequences) < 3)
    @rule(data=st.data())
    def go_on_from_a_copy(self, data):
        caches, held = self.sequences[
            data.draw(st.integers(0, len(self.sequences) - 1))
        ]  # hypothesis keeps what it drew
        if self.budget.nbytes + sum(c.nbytes for c in caches) <= self.budget.limit:  # else the next step makes room
            self.sequences.append((copy.deepcopy(caches), held))

    @precondition(lambda self: len(self.sequences) > 1)
    @rule()
    def drop(self):
        self.sequences.pop(0)
        gc.collect()

    @rule(way=st.sampled_from([w for w in WAYS if "copy" not in w]))
    def save_and_load(self, way):
        """What comes from a file, a pickle or a state comes under the budget again if it is put there."""
        caches, held = self.sequences.pop()
        loaded = [copied(c, way) for c in caches]
        assert all(c.share is None for c in loaded)
        assert [c.config.scheme for c in loaded] == [c.config.scheme for c in caches]
        del caches
        gc.collect()
        self.budget.add(enumerate(loaded))
        self.sequences.append((loaded, held))

    @precondition(lambda self: len(self.sequences) > 1)
    @rule()
    def merge_and_extract(self):
        budget, batches = self.budget, []
        try:
            for layer in zip(*(caches for caches, _ in self.sequences)):
                batches.append(layer[0].merge(layer))
        except MemoryBudgetError:  # rows and batches are held at the same time
            batches.clear()
        del layer
        if not batches:
            gc.collect()
            return
        held = [g for _, g in self.sequences]
        self.sequences = []
        gc.collect()
        assert all(b.share.budget is budget for b in batches)
        self.sequences = [([b.extract(i) for b in batches], g) for i, g in enumerate(held)]
        del batches
        gc.collect()
        self.merged = True

    @invariant()
    def never_more_than_the_budget(self):
        alive = [c for caches, _ in self.sequences for c in caches]
        assert {id(c) for c in self.budget.alive()} == {id(c) for c in alive}
        # rows that left a batch are not computed yet: what there is, is the batch's buffers, with room of their own
        sources = {c.share.source for c in alive} - {None}
        total = sum(c.nbytes for c in alive if c.share.source is None) + sum(sum(s.nbytes) for s in sources)
        assert total == self.budget.nbytes <= self.budget.limit

    @invariant()
    def keys_and_values_have_a_pair_of_widths_that_is_known_beforehand(self):
        """During the steps that are taken one per token, too."""
        pairs = reachable_pairs(self.budget.floor)
        assert all(tuple(s.bits for s in c._sides) in pairs for caches, _ in self.sequences for c in caches)

    @invariant()
    def as_many_tokens_as_came(self):
        for caches, held in self.sequences:
            assert [c.offset for c in caches] == [0 if held is None else held[0][0].shape[2]] * 2

    def teardown(self):
        for caches, held in getattr(self, "sequences", ()):
            for cache, of_layer in zip(caches, held or ()):
                assert cache.config.scheme == Scheme(*(s.bits for s in cache._sides))
                errors_allowed(cache, of_layer)


@fast
def test_anything_may_happen_under_a_budget(backend):
    run_state_machine_as_test(BudgetMachine, settings=settings(quick, max_examples=6, stateful_step_count=12))


def use_every_width():
    """Let the tables be made that rotating and rounding use."""
    for bits in PACKED_BITS:
        cache = TurboKVCache(TurboConfig("turbo0", centre=True, **SMALL))
        step([cache], drawn(np.random.default_rng(0), 1, 300))
        cache.repack(bits, bits)
        mx.eval(cache.keys_and_values())


class BatchBudgetMachine(RuleBasedStateMachine):
    """What a server does to the rows of a model of two layers under a budget: each is read alone, joins the batch,
    answers there and leaves it. held: of each row of the batch, per layer, keys and values as NumPy. kept: (caches,
    held) of rows that left it."""

    @initialize(limit=st.integers(100_000, 1_000_000), floor=FLOORS, centre=st.booleans(), can_evict=st.booleans())
    def start(self, limit, floor, centre, can_evict):
        self.budget, self.rng = MemoryBudget(limit, floor), np.random.default_rng(0)
        self.config = TurboConfig("turbo0", centre=centre, **SMALL)
        self.batch, self.held, self.kept = None, [], []
        if can_evict:
            self.budget.evict.append(lambda: bool(self.kept) and self.kept.pop(0) is not None)
        gc.collect()
        self.before = mx.get_active_memory()

    def tokens(self, n, batch=1):
        return [random_tokens(self.rng, n, **SHAPE | dict(batch=batch)) for _ in range(2)]

    def drop(self):
        self.batch, self.held = None, []
        gc.collect()

    def parts(self):
        return [side for layer in self.batch for side in layer._sides]

    def allowed(self):
        """What MLX may hold."""
        return self.budget.limit + BESIDE * (1 + len(self.budget.alive()))

    def keep_rows(self, rows):
        """filter, of all layers."""
        self.held = [self.held[b] for b in rows]
        if not rows:
            return self.drop()
        for layer in self.batch:
            layer.filter(rows)

    @precondition(lambda self: len(self.held) < 4)
    @rule(n=st.one_of(st.integers(1, 20), st.integers(150, 400)))
    def join(self, n):
        row = [TurboKVCache(self.config) for _ in range(2)]
        known = Shape(1, SHAPE["heads"], (SHAPE["key_dim"], SHAPE["value_dim"]), 4, True, 4)
        self.budget.add(enumerate(row), {0: known, 1: known})
        new = self.tokens(n)
        try:
            step(row, new)
            row = [layer.merge([layer]) for layer in row]
        except MemoryBudgetError:
            return
        gc.collect()
        try:
            if self.batch is None:
                self.batch = row
            for layer, other in zip(self.batch, row) if row is not self.batch else ():
                layer.extend(other)
                assert self.budget.nbytes <= self.budget.limit
        except MemoryBudgetError:
            return self.drop()  # as a generator does, whose layers have different rows now
        self.held.append([[to_numpy(x).copy() for x in layer] for layer in new])  # MLX's buffers go

    @precondition(lambda self: self.held)
    @rule(data=st.data(), n=st.sampled_from([1, 1, 7, 90]))
    def answer(self, data, n):
        lengths = [data.draw(st.integers(0 if n > 1 else 1, n)) for _ in self.held]
        width = max(lengths)
        if not width:
            return
        new = self.tokens(width, len(self.held))
        for layer in self.batch:
            layer.prepare(lengths=lengths, right_padding=[width - n for n in lengths])
        try:
            self.budget.separate()
            before = [state_of(c) for c in self.batch]
            try:
                step(self.batch, new)
            except MemoryBudgetError:
                assert all(map(same, before, map(state_of, self.batch)))
                raise
        except MemoryBudgetError:
            return
        finally:
            for layer in self.batch:
                layer.finalize()
        for b, row in enumerate(self.held):
            for layer, got in zip(row, new):
                layer[:] = [np.concatenate([x, to_numpy(y)[b : b + 1, :, : lengths[b]]], 2) for x, y in zip(layer, got)]

    @precondition(lambda self: self.held)
    @rule(n=st.integers(1, 30))
    def trim(self, n):
        try:
            for layer in self.batch:
                layer.trim(n)
        except MemoryBudgetError:
            return
        for row in self.held:
            row[:] = [[x[:, :, : max(x.shape[2] - n, 0)] for x in layer] for layer in row]
        if all(row[0][0].shape[2] == 0 for row in self.held):
            self.drop()

    @precondition(lambda self: self.held)
    @rule(data=st.data(), is_kept=st.booleans())
    def rows_leave(self, data, is_kept):
        """Some are done, and the others stay: as mlx-lm's generation batch does it, or a cancelled request leaves."""
        gone = data.draw(st.lists(st.integers(0, len(self.held) - 1), unique=True, min_size=1))
        stay, part = [b for b in range(len(self.held)) if b not in gone], max(side.nbytes for side in self.parts())
        mx.eval([side.started() for side in self.parts()])
        mx.reset_peak_memory()
        if is_kept:
            self.kept += [([layer.extract(b) for layer in self.batch], self.held[b]) for b in gone]
        self.keep_rows(stay)
        assert self.budget.nbytes <= self.budget.limit
        try:
            self.budget.separate()
        except MemoryBudgetError:
            return
        mx.eval([side.started() for side in self.parts()] if self.batch else [])
        assert mx.get_peak_memory() - self.before <= self.allowed() + part

    @precondition(lambda self: self.held)
    @rule(data=st.data(), is_read=st.booleans())
    def a_copy_of_a_row_is_kept(self, data, is_read):
        """As mlx-lm's server does at the end of a segment of a prompt; the batch goes on with the row."""
        b = data.draw(st.integers(0, len(self.held) - 1))
        row = [layer.extract(b) for layer in self.batch]
        self.kept.append((row, copy.deepcopy(self.held[b])))
        if is_read and row[0].offset:
            del row
            with contextlib.suppress(MemoryBudgetError):
                self.budget.separate()
        self.read_kept_rows()

    @precondition(lambda self: self.kept)
    @rule()
    def read_kept_rows(self):
        with contextlib.suppress(MemoryBudgetError):
            self.budget.separate()  # which may evict some
            for row, held in self.kept:
                for cache, of_layer in zip(row, held):
                    assert cache.offset == of_layer[0].shape[2]
                    if cache.offset:
                        errors_allowed(cache, of_layer)

    @precondition(lambda self: self.kept)
    @rule()
    def forget_kept_rows(self):
        self.kept.clear()
        gc.collect()

    @precondition(lambda self: len(self.held) > 1)
    @rule(data=st.data())
    def the_batch_is_divided(self, data):
        """By mlx-lm: prompts that are read go to another batch. Here they come back."""
        rows = range(len(self.held))
        split = sorted(data.draw(st.lists(st.sampled_from(rows), unique=True, min_size=1, max_size=len(rows) - 1)))
        part = max(side.nbytes for side in self.parts())
        mx.eval([side.started() for side in self.parts()])
        mx.reset_peak_memory()
        twin, held = copy.deepcopy(self.batch), [self.held[b] for b in split]
        self.keep_rows([b for b in rows if b not in split])
        for layer in twin:
            layer.filter(split)
        assert self.budget.nbytes <= self.budget.limit
        try:
            self.budget.separate()
            assert mx.get_peak_memory() - self.before <= self.allowed() + part
            for layer, other in zip(self.batch, twin):
                layer.extend(other)
                assert self.budget.nbytes <= self.budget.limit
        except MemoryBudgetError:
            return self.drop()
        finally:
            del twin, layer
            gc.collect()
        self.held += held

    @invariant()
    def never_more_than_the_budget(self):
        alive = [*(self.batch or []), *(cache for row, _ in self.kept for cache in row)]
        assert {id(c) for c in self.budget.alive()} == {id(c) for c in alive}
        if not self.budget.has_sources:
            assert sum(c.nbytes for c in alive) == self.budget.nbytes
            mx.eval([side.started() for c in alive for side in c._sides])
        del alive
        mx.synchronize()
        assert self.budget.nbytes <= self.budget.limit
        assert mx.get_active_memory() - self.before <= self.allowed()

    @invariant()
    def keys_and_values_have_a_pair_of_widths_that_is_known_beforehand(self):
        pairs = reachable_pairs(self.budget.floor)
        assert all(tuple(s.bits for s in layer._sides) in pairs for layer in self.batch or ())

    @invariant()
    def one_mask_serves_all_layers(self):
        if self.batch:
            masks = [np.array(layer.array_mask(1)) for layer in self.batch]
            assert np.array_equal(*masks)


@fast
def test_a_batch_may_do_anything_under_a_budget(backend):
    use_every_width()
    run_state_machine_as_test(BatchBudgetMachine, settings=settings(quick, max_examples=8, stateful_step_count=12))


def test_the_ladder_begins_exact_and_only_goes_down():
    assert LADDER[0] == 0 and list(LADDER[1:]) == sorted(set(LADDER[1:]) & set(PACKED_BITS), reverse=True)
    assert memory_budget._ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
