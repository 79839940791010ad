"""BatchRotatingTurboKVCache: every row of a batch of windows is what it would be alone, and what mlx-lm's would be."""

import copy
import functools

import mlx.core as mx
import mlx_lm
import mlx_lm.models.cache as lm_cache
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from support import families
from support.arrays import to_numpy
from support.caches import FAST_BACKENDS, random_tokens, same
from support.keys import queries_for, turning
from support.machines import WindowsMachine
from support.models import gemma3, tokens_of
from support.rows import Rows, check_that_twins_go_their_own_way, state_of
from support.strategies import quick
from support.walk import check_fused_steps

from mlx_turbo import (
    BatchRotatingTurboKVCache,
    BatchTurboKVCache,
    RotatingTurboKVCache,
    TurboConfig,
    TurboKVCache,
    describe,
    disable,
    enable,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
)
from mlx_turbo.integration import attention

fast = pytest.mark.parametrize("backend", FAST_BACKENDS, indirect=True)
SMALL = TurboConfig("turbo4", 0, 4, 4)


def rows_of(n_rows, max_size=24, keep=2, config=SMALL, **options):
    return Rows(functools.partial(RotatingTurboKVCache, max_size, keep, config), n_rows, **options)


def settled(cache):
    """A window that returns no more than a single token's query sees."""
    return RotatingTurboKVCache.from_state(cache.state)


# ---- rows alone ----------------------------------------------------------------------------------------------
@fast
@pytest.mark.parametrize("scheme", ["turbo4", "turbo8v3", "turbo0v2", "turbo3v0", "turbo0"])
@pytest.mark.parametrize("centre", [True, False], ids=["centred", ""])
@pytest.mark.parametrize("max_size, keep", [(24, 2), (40, 0), (5, 2)])
def test_windows_of_different_lengths_are_what_they_are_alone(backend, short_segments, scheme, centre, max_size, keep):
    """Shorter and longer than the window, far past it, chunks longer than it, and a window that sees nothing packed."""
    rows = rows_of(4, max_size, keep, TurboConfig(scheme, 0, 4, 4, centre=centre))
    rows.update([31, 7, 1, 18])
    for _ in range(25):
        rows.update([1] * 4)
    rows.update([9, 70, 3, 0])
    for _ in range(25):
        rows.update([1] * 4)
    rows.update([3] * 4)
    batch = rows.batch
    assert max(batch._n_evicted) > 0 and batch.offset.tolist() == [93, 130, 57, 71]
    assert not batch.is_trimmable() and batch.trim(3) == 0 and batch.offset.tolist() == [93, 130, 57, 71]
    if centre and scheme in ("turbo4", "turbo8v3"):
        assert [c.report()["centred"] for c in rows.alone] == [[], ["keys", "values"], [], []]
    report = batch.report()
    assert report["window"] == max_size and report["nbytes"] == batch.nbytes
    assert report["tokens"] == 4 * max_size == report["sink"] + report["packed"] + report["recent"]


@fast
def test_left_padding_and_padding_over_chunks_evict_nothing(backend):
    rows = rows_of(3)
    rows.update([60, 3, 11], left=[0, 57, 49])
    for _ in range(9):
        rows.update([1, 1, 1])
    keys, values = random_tokens(np.random.default_rng(0), 60, batch=2)
    batch = BatchRotatingTurboKVCache(24, 2, SMALL, left_padding=[0, 14])
    alone = [RotatingTurboKVCache(24, 2, SMALL) for _ in range(2)]
    batch.prepare(lengths=[12, 60], right_padding=[48, 0])
    for at in range(0, 60, 10):
        batch.update_and_fetch(keys[:, :, at : at + 10], values[:, :, at : at + 10])
        assert batch.offset.tolist() == [min(at + 10, 12), at + 10 - 14]
    batch.finalize()
    for b, chunks in enumerate([[(0, 10), (10, 12)], [(14, 20), *((at, at + 10) for at in range(20, 60, 10))]]):
        for first, last in chunks:
            alone[b].update_and_fetch(*(x[b : b + 1, :, first:last] for x in (keys, values)))
    assert all(same(state_of(batch.extract(b)), state_of(alone[b])) for b in range(2))


@fast
@pytest.mark.parametrize("keep", [0, 2])
def test_a_mask_for_less_than_the_window_counts_the_tokens_of_the_row(backend, keep):
    rows = rows_of(3, 24, keep)
    rows.update([90, 5, 20])
    rows.update([1, 1, 1])
    for n, window in (1, 7), (3, 4), (3, 50), (30, 12):
        mask = np.array(rows.batch.make_mask(n, window_size=window))[:, 0]
        for b, cache in enumerate(rows.alone):
            alone = cache.make_mask(n, window_size=window, return_array=True)
            want = cache.size() + 1 if alone is None else np.array(alone).reshape(n, -1).sum(-1)
            assert same(mask[b].sum(-1), np.broadcast_to(want, n))


@fast
def test_an_extracted_window_goes_on_alone_and_merged_ones_stay_as_they_are(backend):
    rows = rows_of(3)
    rows.update([70, 4, 12])
    caches, rng = [rows.batch.extract(b) for b in range(3)], np.random.default_rng(1)
    before, batch = [state_of(c) for c in caches], caches[0].merge(caches)
    assert type(batch) is BatchRotatingTurboKVCache
    for n in (1, 30, 1):
        batch.update_and_fetch(*random_tokens(rng, n, batch=3))
    assert all(same(state_of(c), want) for c, want in zip(caches, before))
    for n in (1, 1, 14, 1):
        for cache, alone in zip(caches, rows.alone):
            new = random_tokens(rng, n)
            for got, want in zip(cache.update_and_fetch(*new), alone.update_and_fetch(*new)):
                assert same(to_numpy(got), to_numpy(want))
    assert rows.batch.offset.tolist() == [70, 4, 12] and caches[0].offset == 87


@fast
def test_a_copy_and_a_state_of_a_batch_of_windows_go_their_own_way(backend, short_segments):
    rows = rows_of(3)
    rows.update([70, 2, 11])
    for _ in range(12):
        rows.update([1] * 3)
    twins = [copy.deepcopy(rows.batch), BatchRotatingTurboKVCache.from_state(rows.batch.state)]
    assert all((twin.max_size, twin.keep, twin.size()) == (24, 2, 24) for twin in twins)
    check_that_twins_go_their_own_way(rows, twins)


@fast
def test_windows_that_do_not_belong_together_are_refused(backend):
    def one(max_size=24, keep=2, n=50):
        cache = RotatingTurboKVCache(max_size, keep, SMALL, centre=False)
        cache.update_and_fetch(*random_tokens(np.random.default_rng(0), n))
        cache.update_and_fetch(*random_tokens(np.random.default_rng(1), 1))
        return cache

    with pytest.raises(ValueError, match="windows of 24 and 30 tokens, allowed is one max_size"):
        RotatingTurboKVCache.merge([one(), one(30)])
    with pytest.raises(ValueError, match="one configuration"):
        RotatingTurboKVCache.merge([one(), one(keep=3)])
    with pytest.raises(ValueError, match="got a TurboKVCache, allowed are RotatingTurboKVCaches"):
        RotatingTurboKVCache.merge([one(), TurboKVCache(SMALL)])
    with pytest.raises(ValueError, match="got a RotatingTurboKVCache, allowed are TurboKVCaches"):
        TurboKVCache.merge([TurboKVCache(SMALL), one()])
    with pytest.raises(ValueError, match="keep: got 24, allowed are whole numbers from 0 to 23"):
        BatchRotatingTurboKVCache(24, 24, SMALL)
    batch = RotatingTurboKVCache.merge([one(), one(n=9)])
    assert batch._n_evicted[0] > 0
    with pytest.raises(ValueError, match="batch size 3"):
        batch.update_and_fetch(*random_tokens(np.random.default_rng(0), 1, batch=3))
    header, counts = batch.state[0].tolist(), batch.state[1]
    forgotten = mx.array([0, 0, 0, 0, 0, 0, 0, 1], mx.int32)
    for spoil in (
        lambda s: s[:1],
        lambda s: [s[0], s[1][:, :7], *s[2:]],
        lambda s: s[:-1],
        lambda s: [*s, s[-1]],
        lambda s: [s[0], counts + forgotten, *s[2:]],  # of the short row, which has forgotten nothing
        lambda s: [s[0], counts - 9 * forgotten, *s[2:]],
        lambda s: [mx.array([*header[:-1], 200], mx.int32), *s[1:]],
        lambda s: [mx.array([*header[:-1], 2], mx.int32), *s[1:]],
    ):
        with pytest.raises(ValueError, match="state: "):
            BatchRotatingTurboKVCache.from_state(spoil(batch.state))
    with pytest.raises(ValueError, match="not the state of a BatchTurboKVCache"):
        BatchTurboKVCache.from_state(batch.state)


# ---- memory ------------------------------------------------------------------------------------------------------
@fast
@pytest.mark.parametrize("bias", [0, 20])
def test_buffers_stay_at_a_quarter_more_than_the_window_and_copies_are_rare(backend, bias):
    """Rows out of step, one with means: each evicts every 128 tokens."""
    rng, copies, largest = np.random.default_rng(0), 0, 0
    caches = [RotatingTurboKVCache(512, 0, "turbo4") for _ in range(3)]
    for b, (cache, n) in enumerate(zip(caches, (1000, 300, 640))):
        cache.update_and_fetch(*random_tokens(rng, n, bias=bias * (b == 0)))
    batch = RotatingTurboKVCache.merge(caches)
    for step in range(900):
        before = batch._n_evicted
        batch.make_mask(1)
        fetched = batch.update_and_fetch(*random_tokens(rng, 1, batch=3))
        mx.eval(batch.state)
        copies += batch._n_evicted != before
        if copies:
            largest = max(largest, batch._sides[0].codes.shape[2])
            assert fetched[0].shape[2] <= 640 + 2
    assert batch.report()["centred"] == (["keys", "values"] if bias else [])
    assert largest == 640 and copies < 3 * (900 / 128 + 2)
    report = batch.report()
    assert report["tokens"] == 3 * 512 and report["nbytes"] < 0.6 * report["uncompressed_nbytes"]


# ---- any history ---------------------------------------------------------------------------------------------


@fast
def test_any_history_leaves_each_window_as_it_is_alone(backend, door, short_segments):
    run_state_machine_as_test(WindowsMachine, settings=settings(quick, max_examples=20, stateful_step_count=12))


# ---- mlx-lm's batch of windows -----------------------------------------------------------------------------------
def attend(cache, tokens, queries):
    """Attention of a layer to the cache's tokens and these new ones, as mlx-lm's models do it."""
    mask = cache.make_mask(queries.shape[2])
    fetched = cache.update_and_fetch(*tokens)
    return to_numpy(attention.scaled_dot_product_attention(queries, *fetched, cache=cache, scale=0.2, mask=mask))


class Beside:
    """mlx-lm's BatchRotatingKVCache and ours, fed with the same; compares what attention gives."""

    def __init__(self, ours, theirs, seed=0):
        self.ours, self.theirs, self.rng = ours, theirs, np.random.default_rng(seed)

    def update(self, lengths, left=False):
        width = max(lengths)
        padding = [width - n for n in lengths]
        tokens = random_tokens(self.rng, width, batch=len(lengths))
        queries = mx.array(self.rng.standard_normal((len(lengths), 4, width, 32)).astype(np.float32))
        outs = []
        for cache in self.ours, self.theirs:
            if any(padding):
                cache.prepare(**dict(left_padding=padding) if left else dict(lengths=lengths, right_padding=padding))
            outs.append(attend(cache, tokens, queries))
            cache.finalize()
        assert self.ours.offset.tolist() == self.theirs.offset.tolist()
        for b, n in enumerate(lengths):
            got, want = (out[b, :, width - n :] if left else out[b, :, :n] for out in outs)
            np.testing.assert_allclose(got, want, atol=2e-5, rtol=1e-4)

    def extend(self, other):
        self.ours.extend(other.ours)
        self.theirs.extend(other.theirs)

    def filter(self, rows):
        self.ours.filter(rows)
        self.theirs.filter(mx.array(rows))


@fast
@pytest.mark.parametrize("max_size", [16, 40, 150])
@pytest.mark.parametrize("left", [False, True])
def test_attention_is_that_of_mlx_lm_s_batch_of_windows(backend, door, max_size, left):
    """In mlx-lm's order, chunks before single tokens: its mask for a chunk is wrong once its buffer has wrapped."""

    def pair(n_rows):
        return Beside(
            BatchRotatingTurboKVCache(max_size, 0, TurboConfig("turbo0", 0, 4, 4), left_padding=[0] * n_rows),
            lm_cache.BatchRotatingKVCache(max_size, [0] * n_rows),
        )

    both, other = pair(3), pair(1)
    both.update([50, 9, 30], left)
    both.update([20, 3, 45])
    for _ in range(30):
        both.update([1, 1, 1])
    other.update([33])
    other.update([1])
    both.extend(other)
    for _ in range(30):
        both.update([1, 1, 1, 1])
    ours, theirs = ([cache.extract(b) for b in range(4)] for cache in (both.ours, both.theirs))
    both = Beside(ours[0].merge(ours), theirs[0].merge(theirs))
    both.update([7, 20, 3, 1])
    for _ in range(20):
        both.update([1, 1, 1, 1])
    alone = [cache.extract(1) for cache in (both.ours, both.theirs)]
    both.filter([3, 0])
    for _ in range(20):
        both.update([1, 1])
    assert type(alone[0]) is RotatingTurboKVCache and type(alone[1]) is lm_cache.RotatingKVCache
    for n in (12, *[1] * 20):
        tokens, queries = random_tokens(both.rng, n), mx.random.normal((1, 4, n, 32))
        np.testing.assert_allclose(*(attend(cache, tokens, queries) for cache in alone), atol=2e-5, rtol=1e-4)


@fast
def test_trim_is_mlx_lm_s(backend, door):
    both = Beside(
        BatchRotatingTurboKVCache(40, 0, TurboConfig("turbo0", 0, 4, 4), left_padding=[0, 0]),
        lm_cache.BatchRotatingKVCache(40, [0, 0]),
    )
    both.update([30, 30])
    assert both.ours.is_trimmable() and both.ours.trim(7) == both.theirs.trim(7) == 7
    both.update([5, 5])
    assert both.ours.size() == both.theirs.size() == 28
    for _ in range(12):
        assert both.ours.is_trimmable() == both.theirs.is_trimmable()
        both.update([1, 1])
    assert not both.ours.is_trimmable()


@fast
@pytest.mark.parametrize(
    "make, kind",
    [
        (lambda: TurboKVCache("turbo0", sink=2, recent=4, block=4), lm_cache.BatchKVCache),
        (lambda: RotatingTurboKVCache(24, 0, "turbo0", recent=4, block=4), lm_cache.BatchRotatingKVCache),
    ],
)
def test_mlx_lm_s_plain_batch_comes_back(backend, door, make, kind):
    rows = Rows(make, 3)
    rows.batch.prepare(left_padding=[0, 3, 1])
    empty = rows.batch.to_kv_cache()
    assert type(empty) is kind and empty.empty() and empty.offset.tolist() == [0, -3, -1]
    rows = Rows(make, 3)
    rows.update([50, 1, 12])
    for _ in range(8):
        rows.update([1, 1, 1])
    plain = rows.batch.to_kv_cache()
    assert type(plain) is kind and plain.offset.tolist() == [58, 9, 20]
    for n in (7, 1, 1):  # a chunk comes first: mlx-lm's mask for several tokens is wrong once its buffer has wrapped
        tokens, queries = random_tokens(rows.rng, n, batch=3), mx.random.normal((3, 4, n, 32))
        got, want = (attend(cache, tokens, queries) for cache in (rows.batch, plain))
        np.testing.assert_allclose(got, want, atol=2e-5, rtol=1e-4)
    rows.batch.prepare(lengths=[1, 2, 2], right_padding=[1, 0, 0])
    with pytest.raises(ValueError, match="to_kv_cache: padding of the prompt is still to come"):
        rows.batch.to_kv_cache()
    if kind is lm_cache.BatchRotatingKVCache:
        with pytest.raises(ValueError, match="to_kv_cache: mlx-lm's batch .* this keeps 2"):
            rows_of(2).batch.to_kv_cache()


# ---- auto --------------------------------------------------------------------------------------------------------
@fast
@pytest.mark.parametrize("max_size", [100, 300])
def test_undecided_windows_decide_as_alone(backend, max_size):
    """The long row decides, in the middle of decode, and the short one follows."""
    keys, values = turning(360)
    queries = queries_for(keys)
    alone = [RotatingTurboKVCache(max_size, 4, "auto", recent=16, block=16) for _ in range(2)]
    for cache, n in zip(alone, (200, 30)):
        cache.update_and_fetch(keys[:, :, :n], values[:, :, :n])
        cache.observe(queries[:, :, :n], 0.125)
    batch = alone[0].merge(alone)
    for at in range(160):
        row = [200 + at, 30 + at]
        new = [mx.concatenate([x[:, :, i : i + 1] for i in row]) for x in (keys, values)]
        batch.update_and_fetch(*new)
        batch.observe(mx.concatenate([queries[:, :, i : i + 1] for i in row]), 0.125)
        alone[0].update_and_fetch(*(x[:1] for x in new))
        alone[0].observe(queries[:, :, row[0] : row[0] + 1], 0.125)
        assert same(state_of(batch.extract(0)), state_of(alone[0])), at
    assert not batch.undecided and batch.extract(0).n_packed > 0 and batch.extract(1).n_packed > 0
    assert (batch._n_evicted[0] > 0) == (max_size == 100)


# ---- attention -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scheme, keep", [("turbo4", 0), ("turbo8v3", 4)])
def test_a_decode_step_of_a_batch_of_windows_runs_the_fused_kernel(simulated, scheme, keep):
    rng, caches = np.random.default_rng(0), []
    for b, n in enumerate([330, 3, 101]):
        caches.append(RotatingTurboKVCache(60, keep, scheme, recent=16, block=16))
        caches[-1].update_and_fetch(*random_tokens(rng, n, key_dim=64, value_dim=64, bias=20 * (b == 0)))
    batch = RotatingTurboKVCache.merge(caches)
    check_fused_steps(simulated, batch, caches, rng)
    assert batch._n_evicted[0] > 0


# ---- models ------------------------------------------------------------------------------------------------------
@fast
@pytest.mark.parametrize("name", ["gemma3_text", "gpt_oss", "cohere2"])
@pytest.mark.parametrize("config", [TurboConfig("turbo4", 2, 4, 4), TurboConfig("auto", 2, 4, 4), "turbo0"], ids=str)
def test_batch_generate_far_past_the_windows_writes_what_each_prompt_gets_alone(
    backend,
    demo,  # noqa: F811
    monkeypatch,
    name,
    config,
):
    if getattr(backend, "is_real", False) and name == "gpt_oss":
        pytest.skip(
            "a GPU rounds a batch's products differently, and this random mixture of experts shows it in turbo0"
        )
    config = TurboConfig.of(config, recent=4, block=4)
    model, kinds, update = families.build(name), set(), BatchRotatingTurboKVCache.update_and_fetch
    monkeypatch.setattr(
        BatchRotatingTurboKVCache,
        "update_and_fetch",
        lambda cache, *new: kinds.add(cache.max_size) or update(cache, *new),
    )
    prompts = [np.random.default_rng(n).integers(2, 96, n).tolist() for n in (70, 3, 25)]
    enable(model, config)
    try:
        got = mlx_lm.batch_generate(model, demo[1], prompts, max_tokens=[40, 50, 30], return_prompt_caches=True)
        again = mlx_lm.batch_generate(model, demo[1], [[5], [6, 7], [8] * 20], max_tokens=30, prompt_caches=got.caches)
        for prompt, n, text, more, next_prompt, next_text in zip(
            prompts, [40, 50, 30], got.texts, got.caches, [[5], [6, 7], [8] * 20], again.texts
        ):
            assert mlx_lm.generate(model, demo[1], prompt, max_tokens=n) == text.lstrip()
            assert mlx_lm.generate(model, demo[1], next_prompt, max_tokens=30, prompt_cache=more) == next_text.lstrip()
    finally:
        disable(model)
    assert kinds == {16} and RotatingTurboKVCache in map(type, got.caches[0])


@fast
def test_windows_that_keep_their_first_tokens_are_batched(backend, demo):
    """max_kv_size: mlx-lm's batch would evict the first tokens."""
    model, tokenizer = demo
    texts = [
        "Once upon a time, there was a little girl named Lily. She loved to play in the park.",
        "The dog ran",
        "Tom and Sue had a red ball. They went out to play, but it began to rain. " * 4,
    ]
    prompts = [tokenizer.encode(t) for t in texts]
    config = TurboConfig("turbo4", 2, 8, 8, centre=False)
    made = [[make_prompt_cache(model, config, max_kv_size=40) for _ in prompts] for _ in "12"]
    got = mlx_lm.batch_generate(model, tokenizer, prompts, max_tokens=60, prompt_caches=made[0])
    for prompt, cache, text in zip(prompts, made[1], got.texts):
        assert mlx_lm.generate(model, tokenizer, prompt, max_tokens=60, prompt_cache=cache) == text.lstrip()
        assert cache[0].keep == 4 and cache[0].n_evicted > 0


@fast
def test_a_batch_of_windows_is_saved_loaded_and_described(backend, tmp_path):
    model = gemma3()
    caches = [make_prompt_cache(model, TurboConfig("turbo4", 2, 4, 4, centre=False)) for _ in range(2)]
    for cache, n in zip(caches, (60, 9)):
        model(tokens_of(n), cache=cache)
        model(tokens_of(1), cache=cache)
    batch = [layer[0].merge(list(layer)) for layer in zip(*caches)]
    save_prompt_cache(tmp_path / "ours.safetensors", batch)
    lm_cache.save_prompt_cache(str(tmp_path / "theirs.safetensors"), batch)
    for loaded in (
        load_prompt_cache(tmp_path / "ours.safetensors"),
        lm_cache.load_prompt_cache(str(tmp_path / "theirs.safetensors")),
    ):
        assert all(type(c) is type(b) and same(state_of(c), state_of(b)) for c, b in zip(loaded, batch))
        assert describe(loaded) == "6 of 6 layers compressed (4 of them windows of 16 tokens)"
    report = loaded[0].report()
    assert (report["tokens"], report["packed"], report["recent"]) == (26, 16, 10)
    assert loaded[0]._n_evicted[0] > 0 and report["window"] == 16
