"""PromptStore: what is fetched is what was put, bit for bit, or what `trim` makes of it; blocks are shared."""

import copy
import os
import stat

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.caches import FAST_BACKENDS
from support.stored import DIM, KINDS, N_HEADS, WHOLE, bits, feed, made, tiny_model, tokens_of, trimmed
from support.strategies import quick

import mlx_turbo
from mlx_turbo import PromptStore, TurboConfig
from mlx_turbo.cache.memory_budget import MemoryBudget, Shape
from mlx_turbo.integration.memory import put_under_budget, take_under_budget
from mlx_turbo.integration.prompt_cache import flatten_caches
from mlx_turbo.quant.scheme import BITS, Scheme
from mlx_turbo.store import cut, files
from mlx_turbo.store.files import SUFFIX
from mlx_turbo.store.raw import unwritten

pytestmark = [pytest.mark.parametrize("backend", FAST_BACKENDS, indirect=True), pytest.mark.usefixtures("door")]

BLOCK = cut.BLOCK
CONFIGS = st.one_of(
    st.just(TurboConfig("auto")),
    st.builds(
        TurboConfig,
        st.builds(Scheme, st.sampled_from(BITS), st.sampled_from(BITS)),
        sink=st.sampled_from([0, 1, 4, 150]),
        recent=st.sampled_from([0, 3, 64]),
        block=st.sampled_from([1, 32, 64]),
        centre=st.booleans(),
    ),
)
LAYERS = st.lists(st.sampled_from(list(KINDS)), min_size=1, max_size=3)
CHUNKS = st.lists(st.one_of(st.integers(1, 3), st.integers(100, 300)), max_size=4)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def model():
    return tiny_model()


@quick
@given(
    config=CONFIGS,
    kinds=LAYERS,
    turns=st.lists(CHUNKS, min_size=1, max_size=2),
    dtype=st.sampled_from([mx.float16, mx.bfloat16, mx.float32]),
    bias=st.sampled_from([0.0, 4.0]),
    memory=st.sampled_from([0, 10_000_000]),
    cut_at=st.floats(0, 1),
)
def test_what_is_fetched_is_what_was_put_or_what_trim_makes_of_it(
    backend, tmp_path_factory, config, kinds, turns, dtype, bias, memory, cut_at
):
    model, folder, cache, n, whole = tiny_model(), tmp_path_factory.mktemp("s") / "s", made(kinds, config), 0, []
    with PromptStore(folder, max_memory_bytes=memory) as store:
        for turn in turns:
            new = 40 + sum(turn)
            tokens = tokens_of(n + new)
            feed(cache, tokens[n:], turn, dtype, bias)
            n += new
            put = store.put(model, tokens, cache)
            assert put.n_tokens == n and put.whole == {}
            whole.append((n, bits(cache)))
            store.flush()
            for n_put, want in whole:
                got, n_got = store.fetch(model, tokens[:n_put] + [63])
                assert n_got == n_put and bits(got) == want
            assert store.report()["damaged"] == store.report()["errors"] == []
    with PromptStore(folder, max_memory_bytes=memory) as store:
        later = tokens_of(300, 7)
        going_on = feed(store.fetch(model, [*tokens, 63])[0], later, turns[0], dtype, bias)
        assert bits(going_on) == bits(feed(copy.deepcopy(cache), later, turns[0], dtype, bias))
        until = int(cut_at * (n - 1)) + 1
        got, n_got = store.fetch(model, [*tokens[:until], 64])
        ends = dict(whole)
        first = max(c.config.sink if hasattr(c, "config") else 0 for c in flatten_caches(cache))
        blocks = [first + BLOCK * (k + 1) for k in range(put.n_blocks)]
        assert n_got == max([n for n in [*ends, *blocks] if n <= until], default=0)
        if n_got:
            assert bits(got) == (ends[n_got] if n_got in ends else bits(trimmed(cache, n_got)))


@pytest.mark.parametrize("kind", WHOLE)
def test_what_cannot_be_cut_is_stored_whole_and_found_for_its_tokens_only(backend, folder, model, kind):
    cache, tokens = feed(made(["turbo", kind], "turbo4"), tokens_of(500), [200]), tokens_of(500)
    if kind == "states":
        assert cache[1].state[0][0] is not None
    with PromptStore(folder) as store:
        put = store.put(model, tokens, cache)
        assert list(put.whole) == [1] and put.n_blocks == 3
    with PromptStore(folder) as store:
        for asked in tokens[:499], tokens, [*tokens[:400], 64, *tokens[401:]]:
            assert store.fetch(model, asked) == (None, 0)
        got, n = store.fetch(model, [*tokens, 1])
        assert n == 500 and bits(got) == bits(cache)
        feed(got, tokens_of(40, 1), []), feed(cache, tokens_of(40, 1), [])
        assert bits(got) == bits(cache)  # it goes on as if nothing had been


def test_a_cache_of_no_more_tokens_than_the_caller_has_is_not_read(backend, folder, model):
    cache, tokens = feed(made(["turbo", "plain"], "turbo4"), tokens_of(300), []), tokens_of(301)
    with PromptStore(folder, max_memory_bytes=0) as store:
        store.put(model, tokens[:300], cache)
        store.flush()
        assert store.fetch(model, tokens, more_than=299)[1] == 300
        for path in folder.glob("*" + SUFFIX):
            path.unlink()
        assert store.fetch(model, tokens, more_than=300) == (None, 0) and not store.report()["damaged"]
        assert store.fetch(model, tokens, more_than=299) == (None, 0) and store.report()["damaged"]
        assert (store.report()["hits"], store.report()["tokens_found"]) == (1, 300)


def test_what_another_store_removes_while_it_is_fetched_is_not_found_and_not_damaged(
    backend, folder, model, monkeypatch
):
    """With the only exception that a file is gone of which the index still has records."""
    cache, tokens = feed(made(["turbo", "plain"], "turbo4"), tokens_of(300), []), tokens_of(301)
    opened, removals = files.opened, []

    def removed_first(path):
        if removals:
            removals.pop()()
        return opened(path)

    monkeypatch.setattr(files, "opened", removed_first)
    with PromptStore(folder, max_memory_bytes=0) as store, PromptStore(folder) as other:
        for removals_of, damaged in (other.delete, False), (lambda: [p.unlink() for p in paths], True):
            store.put(model, tokens[:300], cache)
            store.flush()
            (entry,) = store.entries()
            paths = list(folder.glob("*" + SUFFIX))
            removals.append(removals_of)
            assert store.fetch(model, tokens) == (None, 0) and not removals
            assert bool(store.report()["damaged"]) == damaged
            removals.clear()
            with pytest.raises(KeyError):
                store.load_entry(entry["id"])


@settings(quick, max_examples=15)
@given(kinds=LAYERS, dtype=st.sampled_from([mx.float16, mx.bfloat16]), n=st.integers(150, 700), data=st.data())
def test_a_cache_is_made_of_its_own_pieces_in_any_order_and_of_no_others(backend, kinds, dtype, n, data):
    """Of others: nothing that was in memory before is ever taken for rows."""
    cache = feed(made(kinds, TurboConfig("turbo4", recent=8, block=8)), tokens_of(n), [], dtype)
    contents = cut.read(cache, n)
    n_blocks, root, end = cut.n_blocks(contents), cut.root_payload(contents), cut.end_payload(contents)
    blocks = cut.block_payloads(contents, range(n_blocks))
    root, end, *blocks = (np.frombuffer(piece, np.uint8) for piece in (root, end, *blocks))
    order = data.draw(st.permutations(range(n_blocks)))
    assembly = cut.Assembly(root, n_blocks, end)
    for k in order[:-1]:
        assembly.put(k, blocks[k])
    with pytest.raises(ValueError, match=rf"blocks \[{order[-1]}\] are missing"):
        assembly.caches()
    for wrong in blocks[order[-1]][:-1], np.append(blocks[order[-1]], np.uint8(0)):
        with pytest.raises(ValueError, match="a piece of"):
            assembly.put(order[-1], wrong)
    with pytest.raises(ValueError, match="are missing"):
        assembly.caches()
    assembly.put(order[-1], blocks[order[-1]])
    assert bits(assembly.caches()) == bits(cache)
    for others in n_blocks - 1, n_blocks + 1:
        with pytest.raises(ValueError):
            cut.Assembly(root, others, end)
    fewer = [max(n_packed - BLOCK, 0) for n_packed in contents.n_packed]
    if fewer != contents.n_packed:
        end = np.frombuffer(cut.end_payload(contents._replace(n_packed=fewer)), np.uint8)
        with pytest.raises(ValueError, match="rows from .* on follow"):
            cut.Assembly(root, n_blocks, end)


@quick
@given(st.lists(st.integers(1, 100_000), min_size=1, max_size=5))
def test_what_is_written_into_the_memory_of_an_array_is_what_the_array_says(backend, sizes):
    arrays = [unwritten(n) for n in sizes]
    for i, (_, memory) in enumerate(arrays):
        memory[:] = np.arange(len(memory)) % 251 + i
    for i, (array, memory) in enumerate(arrays):
        assert array.dtype == mx.uint8 and array.shape == memory.shape == (sizes[i],)
        assert np.array_equal(np.array(array), (np.arange(sizes[i]) % 251 + i).astype(np.uint8))


@settings(quick, max_examples=10)
@given(share=st.floats(0, 1), n=st.integers(1000, 50_000))
def test_what_a_fetch_leaves_in_memory_is_what_it_read(backend, tmp_path_factory, share, n):
    """As many pieces as there is room for, the first ones; however few bytes the system gives at a time."""
    folder, cache, tokens = tmp_path_factory.mktemp("s") / "s", made(["turbo", "plain"], "turbo4"), tokens_of(600)
    feed(cache, tokens, [])
    with PromptStore(folder) as store:
        store.put(tiny_model(), tokens, cache)
    records = [record for path in folder.glob("*" + SUFFIX) for record in files.read_records(path)]
    lengths = [r.length for r in sorted(records, key=lambda r: (r.kind != "root", r.n))]
    most = int(share * sum(lengths))
    held = max(sum(lengths[:k]) for k in range(len(lengths) + 1) if sum(lengths[:k]) <= most)
    preadv, n_open = os.preadv, len(os.listdir("/dev/fd"))
    with PromptStore(folder, max_memory_bytes=most) as store, pytest.MonkeyPatch.context() as patch:
        n_own = len(os.listdir("/dev/fd"))
        patch.setattr(os, "preadv", lambda fd, rooms, at: preadv(fd, [rooms[0][:n]], at))
        for _ in range(2):
            got, n_got = store.fetch(tiny_model(), [*tokens, 1])
            assert n_got == 600 and bits(got) == bits(cache)
            assert store.report()["memory_nbytes"] == held and store.report()["damaged"] == []
        assert len(os.listdir("/dev/fd")) == n_own > n_open


@pytest.mark.parametrize("every, n_held, wanted", [(1, 0, [200, 400, 600]), (2, 0, [400]), (3, 7, [407]), (9, 0, [])])
def test_checkpoints_are_the_caches_at_the_ends_of_chunks(backend, folder, model, every, n_held, wanted):
    tokens, cache, said = tokens_of(n_held + 601), made(["turbo", "plain"], "turbo4"), []
    with PromptStore(folder) as store:
        if n_held:
            feed(cache, tokens[:n_held], [])
        note = store.checkpoints(model, tokens, cache, n_held, every)
        note(0, 601)
        for done in range(200, 601, 200):
            feed(cache, tokens[n_held + done - 200 : n_held + done], [])
            note(done, 601)
            said.append(bits(cache))
        note(601, 601)  # mlx-lm calls it after the first answer is in the cache
        store.flush()
        assert sorted(e["tokens"] for e in store.entries()) == wanted
    with PromptStore(folder) as store:
        for n in wanted:
            got, found = store.fetch(model, tokens[: n + 1])
            assert found == n and bits(got) == said[(n - n_held) // 200 - 1]


@pytest.mark.parametrize("every", [0, -1, 1.5, True])
def test_checkpoints_after_no_whole_number_of_blocks_are_refused(backend, folder, model, every):
    with PromptStore(folder) as store, pytest.raises(ValueError, match="every: got"):
        store.checkpoints(model, [1], [], every=every)


def test_exactly_the_stored_tokens_give_a_cache_of_one_less(backend, folder, model):
    cache, tokens = feed(made(["turbo", "plain"], "turbo4"), tokens_of(300), []), tokens_of(300)
    with PromptStore(folder) as store:
        store.put(model, tokens, cache)
        got, n = store.fetch(model, tokens)
        assert n == 299 and bits(got) == bits(trimmed(cache, 299))


def test_a_conversation_that_goes_on_adds_its_new_blocks_only(backend, folder, model):
    tokens = tokens_of(2000)
    with PromptStore(folder) as store:
        first = store.put(model, tokens[:1000], feed(made(["turbo"], "turbo4"), tokens[:1000], []))
        assert first.n_blocks == first.n_new == (1000 - 4 - 64) // BLOCK
        for end, seed in (1500, 0), (1500, 1):
            cache, n = store.fetch(model, [*tokens[:1000], *tokens_of(end - 1000, seed)])
            assert n == 1000
            branch = [*tokens[:1000], *tokens_of(end - 1000, seed)]
            put = store.put(model, branch, feed(cache, branch[1000:], []))
            assert put.n_blocks - put.n_new == first.n_blocks and 2 <= put.n_new <= 4
        store.flush()
        report = store.report()
        assert report["blocks"] == first.n_blocks + 2 * put.n_new and report["ends"] == 3
        assert sum(e["nbytes"] for e in store.entries()) > report["nbytes"] > report["memory_nbytes"]
        again = store.put(model, branch, cache)
        assert again.n_new == again.n_bytes == 0
        store.flush()
        assert store.report()["nbytes"] == report["nbytes"]


def test_bits_that_differ_by_chunks_are_both_kept(backend, folder, model):
    """The mean of a segment is that of the tokens packed together when it began: other chunks, other bits."""
    tokens = tokens_of(700)
    one, other = (feed(made(["turbo"], "turbo4"), tokens, chunks, bias=4.0) for chunks in ([300], [300, 70]))
    assert bits(one) != bits(other)
    with PromptStore(folder) as store:
        store.put(model, tokens, one)
        put = store.put(model, tokens, other)
        assert 0 < put.n_new < put.n_blocks
        store.flush()
        got = {bits(store.load_entry(entry["id"])) for entry in store.entries()}
        assert got == {bits(one), bits(other)}
        for until in range(150, 701, 50):
            cache, n = store.fetch(model, [*tokens[:until], 64])
            assert bits(cache) in [bits(trimmed(copy.deepcopy(c), n)) for c in (one, other)]


def test_only_the_model_and_the_configuration_it_was_made_with_find_it(backend, folder, model):
    tokens = tokens_of(400)
    with PromptStore(folder) as store:
        store.put(model, tokens, feed(made(["turbo"], "turbo4"), tokens, []))
        assert store.fetch(tiny_model(1), [*tokens, 1]) == (None, 0)
        assert store.fetch(tiny_model(0), [*tokens, 1])[1] == 400  # loaded again
        for config, n in ("turbo4", 400), ("turbo3", 0), (TurboConfig("turbo4", sink=0), 0), ("auto", 0):
            assert store.fetch(model, [*tokens, 1], like=made(["turbo"], config))[1] == n
        assert store.fetch(model, [*tokens, 1], like=made(["plain"], None))[1] == 0
        model.weight = model.weight + 1  # an adapter, other weights
        assert store.fetch(model, [*tokens, 1]) == (None, 0)


def test_a_row_of_a_batch_is_stored_like_a_cache_of_its_own(backend, folder, model):
    rows = [tokens_of(n, seed) for seed, n in enumerate((600, 450))]
    alone = [feed(made(["turbo"], "turbo4"), tokens, [])[0] for tokens in rows]
    batch = mlx_turbo.TurboKVCache.merge(copy.deepcopy(alone))
    with PromptStore(folder) as store:
        with pytest.raises(ValueError, match="layer 0 is a BatchTurboKVCache, a batch"):
            store.put(model, rows[0], [batch])
        for i, tokens in enumerate(rows):
            assert store.put(model, tokens, [alone[i]]).n_new == (len(tokens) - 68) // BLOCK
            assert store.put(model, tokens, [batch.extract(i)]).n_new == 0


@pytest.mark.parametrize(
    "tokens, cache, said",
    [
        ([1, 2], ["turbo"], r"tokens: got 2, but layer 0 of the cache holds 300"),
        ([], ["turbo"], "tokens: got none"),
        ([[1]], ["turbo"], r"tokens: got int64 of shape \(1, 1\)"),
        ([1.5], ["turbo"], "tokens: got float64"),
        ([1], [], "cache: got no layers"),
    ],
)
def test_wrong_input_is_refused(backend, folder, model, tokens, cache, said):
    with PromptStore(folder) as store, pytest.raises(ValueError, match=said):
        store.put(model, tokens, feed(made(cache, "turbo4"), tokens_of(300), []))


def test_classes_that_cannot_be_found_again_are_refused(backend, folder, model):
    class Own(mlx_turbo.TurboKVCache):
        pass

    with PromptStore(folder) as store, pytest.raises(ValueError, match="Own, which cannot be found again"):
        store.put(model, [1], [Own()])


def test_a_closed_store_says_so(backend, folder, model):
    store = PromptStore(folder)
    store.close()
    store.close()
    for call in store.report, store.entries, lambda: store.fetch(model, [1]):
        with pytest.raises(ValueError, match="the store is closed"):
            call()


def test_nothing_of_the_text_is_readable_and_only_the_owner_reads(backend, folder, model):
    tokens = [60, 61, 62, 63] * 200
    with PromptStore(folder) as store:
        store.put(model, tokens, feed(made(["turbo"], "turbo4"), tokens, []))
        store.flush()
        found = list(folder.iterdir())
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and len(found) >= 5
        for path in found:
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
            for dtype in np.int64, np.int32, np.int16, np.uint8:
                assert np.array(tokens[:16], dtype).tobytes() not in path.read_bytes()
            assert b"60, 61" not in path.read_bytes()
    with PromptStore(folder.with_name("other")) as other:  # another key: the same text has other hashes there
        other.put(model, tokens, feed(made(["turbo"], "turbo4"), tokens, []))
        other.flush()
        ids = [{e["id"] for e in s.entries()} for s in (other, PromptStore(folder))]
        assert not ids[0] & ids[1]


def test_delete_by_model_age_and_id(backend, folder, model):
    tokens, other = tokens_of(1000), tiny_model(1)
    with PromptStore(folder) as store:
        store.put(model, tokens[:600], feed(made(["turbo"], "turbo4"), tokens[:600], []))
        cache, _ = store.fetch(model, [*tokens[:600], 1])
        store.put(model, tokens, feed(cache, tokens[600:], []))
        store.put(other, tokens, cache)
        store.flush()
        entries = {(e["label"], e["model"], e["tokens"]): e["id"] for e in store.entries()}
        assert len(entries) == 3 and store.delete(older_than=3600) == 0
        (long,) = [i for (_, m, n), i in entries.items() if n == 1000 and m == store.entries()[-1]["model"]]
        n_files = store.report()["n_files"]
        assert store.delete(id=long) > 0 and store.report()["n_files"] < n_files
        assert store.fetch(model, [*tokens, 1])[1] == 600
        with pytest.raises(KeyError, match="none of the entries"):
            store.delete(id=long)
        assert store.delete(model=[e["model"] for e in store.entries() if e["tokens"] == 1000][0]) > 0
        assert store.fetch(other, [*tokens, 1]) == (None, 0) and store.fetch(model, [*tokens, 1])[1] == 600
        assert store.delete(older_than=0) > 0 and store.report()["nbytes"] == 0
        assert store.fetch(model, [*tokens, 1]) == (None, 0)


# ---- a budget of memory ------------------------------------------------------------------------------------------
def under(budget, shapes=None):
    """An empty prompt cache of two layers under a budget."""
    caches = made(["turbo", "turbo"], TurboConfig("turbo0", 2, 8, 8))
    known = Shape(1, N_HEADS, (DIM, DIM), 2, True, 2 * N_HEADS)
    budget.models[0].shapes = {0: known, 1: known}
    put_under_budget(caches, budget, budget.models[0].shapes)
    return caches


@pytest.mark.parametrize("share", [2.0, 0.6, 0.3], ids=["exact", "some packed", "all packed"])
def test_a_prompt_of_a_budget_is_found_by_caches_under_the_same_one_and_counts_there(backend, folder, model, share):
    """Whatever was packed when it was stored; not under another limit, nor by caches under none."""
    free = MemoryBudget(2**60)
    whole = free.nbytes_after(under(free), 700)
    tokens, (one, other) = tokens_of(700), [MemoryBudget(int(share * whole), Scheme(2, 2)) for _ in range(2)]
    with PromptStore(folder) as store:
        cache = feed(under(one), tokens, [300])
        assert one.nbytes <= one.limit and store.put(model, tokens, cache).n_blocks == 5
        want, schemes = bits(cache), [c.config.scheme for c in cache]
        assert (set(schemes) == {Scheme(0, 0)}) == (share == 2)
        assert store.fetch(model, [*tokens, 1], like=under(MemoryBudget(one.limit + 1, Scheme(2, 2)))) == (None, 0)
        assert store.fetch(model, [*tokens, 1], like=made(["turbo", "turbo"], cache[0].config)) == (None, 0)
        found, n = store.fetch(model, [*tokens, 1], like=under(other))
        assert n == 700 and bits(found) == want and take_under_budget(found, other)
        assert other.nbytes == sum(c.nbytes for c in found) <= other.limit
        assert [c.config.scheme for c in found] == schemes and all(c.repackable for c in found)
        for budget, going_on in (one, cache), (other, found):
            feed(going_on, tokens_of(60, 1), [])
            assert budget.nbytes <= budget.limit
        assert bits(found) == bits(cache)


def test_a_prompt_that_a_budget_does_not_hold_beside_the_others_packs_them_or_is_not_taken(backend):
    budget = MemoryBudget(2**60, Scheme(4, 4))
    kept = feed(under(budget), tokens_of(700), [])
    for share, fits in (1.2, True), (0.2, False):
        found = feed(made(["turbo", "turbo"], kept[0].config), tokens_of(700, 1), [])
        budget.limit = int(share * sum(c.nbytes for c in [*kept, *found]))
        before = bits(kept)
        assert take_under_budget(found, budget) == fits
        assert [c.share is not None for c in found] == [fits] * 2
        assert budget.nbytes == sum(c.nbytes for c in kept) + fits * sum(c.nbytes for c in found)
        assert budget.nbytes <= budget.limit or bits(kept) == before
        del found
        budget.limit = 2**60
    budget.limit = int(0.8 * sum(c.nbytes for c in kept))
    evicted = [kept]
    del kept
    budget.evict.append(lambda: bool(evicted) and evicted.pop() is not None)
    assert budget.make_fit() and not evicted and budget.nbytes == 0
