"""Tokens that are not finite, or too large for their scale: what mlx-lm's own cache makes of them. Queries that see one
get nothing finite; other rows, other heads and later requests do not notice; `report` tells of it."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from support.arrays import to_numpy
from support.attend_cases import check_spoiled, make_case
from support.backends import BACKENDS
from support.caches import FAST_BACKENDS, WAYS, copied, random_tokens, same
from support.keys import queries_for, turning
from support.no_kernels import DoesNotBuild
from support.servers import STORIES, Reference, Server, save_model
from transformers import AutoTokenizer

from mlx_turbo import (
    BackendError,
    BatchTurboKVCache,
    RotatingTurboKVCache,
    TurboConfig,
    TurboKVCache,
    describe,
)
from mlx_turbo.backends import select, tiled_attention
from mlx_turbo.cli.common import DEMO_MODEL, DEMO_TEMPLATE
from mlx_turbo.integration import attention

HEADS, GQA, DIM, WINDOW, KEEP = 2, 2, 32, 24, 2
NEVER, NO_ROW = float("inf"), -1  # in the place of a fault's token and row, once that is gone
fast = pytest.mark.parametrize("backend", FAST_BACKENDS, indirect=True)
pytestmark = pytest.mark.usefixtures("door")


@pytest.fixture(autouse=True)
def tile_by_tile(monkeypatch):
    """Prompt chunks too: over restored tokens MLX's own attention lets a masked value that is not finite reach the
    queries of its row, as with mlx-lm's cache."""
    monkeypatch.setenv("MLX_TURBO_MAX_RESTORED_BYTES", "0")


class Twins:
    """Two caches that get the same tokens, but for one of the second's: (row, head, token of the row, side, value)."""

    def __init__(self, make, n_rows, fault, bias=0):
        self.caches = [make() for _ in "ab"]
        self.fault, self.bias, self.rng = fault, bias, np.random.default_rng(0)
        self.held, self.window = [0] * n_rows, getattr(self.caches[0], "max_size", 10**9)

    def step(self, lengths):
        """Feed row b lengths[b] tokens, padded at the right, and compare what attention gives."""
        width, B = max(lengths), len(lengths)
        tokens = random_tokens(self.rng, width, batch=B, heads=HEADS, key_dim=DIM, value_dim=DIM, bias=self.bias)
        queries = mx.array(self.rng.standard_normal((B, HEADS * GQA, width, DIM)).astype(np.float32))
        spoiled, (row, head, token, side, value) = list(map(mx.array, tokens)), self.fault
        if self.held[row] <= token < self.held[row] + lengths[row]:
            spoiled[side][row, head, token - self.held[row], 3] = value
        first, was_packed = self.caches[0].empty(), self.n_packed_bad
        outs = [self.attend(cache, queries, given, lengths) for cache, given in zip(self.caches, (tokens, spoiled))]
        for b in range(B):
            mine = [out[b, :, : lengths[b]] for out in outs]
            for h in range(HEADS):
                sound, got = (x[h * GQA : (h + 1) * GQA] for x in mine)
                if (b, h) != (row, head):
                    assert same(got, sound), (b, h)
                elif not first and (was_packed or not abs(value) < np.inf):
                    # the first tokens go through mlx-lm's own attention; as long as it is exact, 1e30 is a number
                    self.check_queries(sound, got, self.sees(self.held[b], np.arange(lengths[b])))
        self.held = [n + new for n, new in zip(self.held, lengths)]
        self.check_report()

    @staticmethod
    def attend(cache, queries, tokens, lengths):
        width = queries.shape[2]
        if len(set(lengths)) > 1:
            cache.prepare(lengths=lengths, right_padding=[width - n for n in lengths])
        mask = cache.make_mask(width, return_array=False, window_size=None)
        keys, values = cache.update_and_fetch(*tokens)
        out = attention.scaled_dot_product_attention(queries, keys, values, cache, DIM**-0.5, mask)
        if len(set(lengths)) > 1:
            cache.finalize()
        return to_numpy(out)

    def sees(self, offset, query):
        """Whether queries that come after `offset` tokens see the bad one: as mlx-lm's RotatingKVCache."""
        token, before = self.fault[2], min(offset, self.window - 1)
        gone = offset - before
        index = token if token < KEEP else token - gone
        return (offset + query >= token) & (before + query < index + self.window) & (index >= min(token, KEEP))

    def check_queries(self, sound, got, sees):
        assert not np.isfinite(got[:, sees]).all(-1).any() and np.isfinite(got[:, ~sees]).all()
        if not self.caches[1].report()["centred"]:
            assert same(got[:, ~sees], sound[:, ~sees])

    @property
    def n_packed_bad(self):
        row, _, _, side, _ = self.fault
        return self.caches[1].report()["not_finite"][("keys", "values")[side]][row]

    def check_report(self):
        row, _, token, side, value = self.fault
        clean, bad = (cache.report()["not_finite"] for cache in self.caches)
        newest = self.held[row] - 1
        want = token <= newest and (newest - token < self.window - KEEP or token < KEEP)
        for i, name in enumerate(("keys", "values")):
            assert clean[name] == [0] * len(self.held)
            expected = [int(want and i == side and b == row) for b in range(len(self.held))]
            assert bad[name] == expected or abs(value) < np.inf and bad[name] == [0] * len(self.held)

    def trim(self, n):
        for cache in self.caches:
            cache.trim(n)
        self.held = [max(held - n, 0) for held in self.held]

    def filter(self, rows):
        for cache in self.caches:
            cache.filter(rows)
        self.held = [self.held[b] for b in rows]


def config_of(scheme, centre):
    return TurboConfig(scheme, sink=KEEP, recent=4, block=4, centre=centre)


MAKE = {
    "cache": lambda config, _: TurboKVCache(config),
    "window": lambda config, _: RotatingTurboKVCache(WINDOW, KEEP, config),
    "batch": lambda config, n: BatchTurboKVCache(config, [0] * n),
    "batch of windows": lambda config, n: RotatingTurboKVCache.merge(
        [RotatingTurboKVCache(WINDOW, KEEP, config) for _ in range(n)]
    ),
}


@st.composite
def faults(draw, schemes):
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    kind = pick(*MAKE)
    n_rows = 3 if "batch" in kind else 1
    steps = [[draw(st.integers(1, 40)) for _ in range(n_rows)]]
    for _ in range(draw(st.integers(1, 3))):
        steps += [[pick(1, 1, 3, 20)] * n_rows, *[[1] * n_rows] * draw(st.integers(1, 12))]
    row = draw(st.integers(0, n_rows - 1))
    total = sum(lengths[row] for lengths in steps)
    fault = (
        row,
        draw(st.integers(0, HEADS - 1)),
        draw(st.integers(0, total - 1)),
        pick(0, 1),
        pick(np.nan, np.nan, np.inf, 1e30),
    )
    if fault[3] == 0 and fault[4] == np.inf:  # an exact key's infinite logit may be -infinity: it weighs nothing
        fault = *fault[:4], np.nan
    return kind, pick(*schemes), draw(st.booleans()), pick(0, 20), steps, fault


def check_fault(kind, scheme, centre, bias, steps, fault):
    n_rows, (row, _, token, _, _) = len(steps[0]), fault
    twins = Twins(lambda: MAKE[kind](config_of(scheme, centre), n_rows), n_rows, fault, bias)
    for lengths in steps:
        twins.step(lengths)
    cache = twins.caches[1]
    for way in WAYS:
        assert copied(cache, way).report()["not_finite"] == cache.report()["not_finite"]
    if "window" not in kind and twins.held[row] - token < min(twins.held):  # the bad token goes, and all is well
        after = Twins.__new__(Twins)
        vars(after).update(vars(twins), caches=copy.deepcopy(twins.caches))
        after.trim(twins.held[row] - token)
        after.fault = (row, fault[1], NEVER, fault[3], np.nan)
        for n in (1, 3, 1, 20, 1):
            after.step([n] * n_rows)
    if n_rows > 1:  # the row goes
        others = [b for b in (2, 0, 1) if b != row]
        alone = cache.extract(row).report()["not_finite"]
        assert [alone[name][0] for name in alone] == [by_row[row] for by_row in cache.report()["not_finite"].values()]
        twins.filter(others)
        twins.fault = (NO_ROW, 0, NEVER, 0, np.nan)
        for n in (1, 3, 1):
            twins.step([n] * 2)


COMMON = dict(deadline=None, derandomize=True, database=None, phases=[Phase.generate])


@pytest.mark.parametrize("name", FAST_BACKENDS + ["oracle"])
def test_a_token_that_is_not_finite_spoils_the_queries_that_see_it_and_nothing_else(name):
    @settings(max_examples=40, **COMMON)
    @given(faults(["turbo4", "turbo8v3", "turbo4v0", "turbo0v2"]))
    def check(fault):
        with select.use_backend(BACKENDS[name]):
            check_fault(*fault)

    check()


@settings(max_examples=3, **COMMON)
@given(faults(["turbo4"]))
def check_simulated(fault):
    check_fault(*fault)


def test_a_token_that_is_not_finite_spoils_what_sees_it_in_the_kernels_too(simulated):
    check_simulated()


@pytest.mark.parametrize("bits", [(4, 4), (0, 8), (3, 0)], ids=str)
@pytest.mark.parametrize("tile", [64, 4096])
@pytest.mark.parametrize("name", ["cpu", "oracle", "simulated"])
def test_attention_without_a_kernel_reads_over_what_a_query_does_not_see(monkeypatch, name, tile, bits):
    """In tiles, of rows that the backend reads; the oracle has no tiles. The kernels: test_attend.py."""
    monkeypatch.setattr(tiled_attention, "MAX_TILE", tile)

    def attend(case, mask):
        arguments = case.queries, case.keys, case.values, case.counts
        if name == "oracle":
            return BACKENDS[name].attend(*arguments, scale=case.scale, mask=mask)
        return tiled_attention.tiled_attention(*arguments, BACKENDS[name].read_rows, scale=case.scale, mask=mask)

    if name in BACKENDS:
        check_spoiled(make_case(bits, (64, 64), (4, 150, 33), G=2, Hkv=2, B=2, L=3), attend, 12)


@fast
@pytest.mark.parametrize("side", [0, 1])
def test_an_evicted_token_that_is_not_finite_is_nothing_to_a_window_with_an_additive_mask(backend, side):
    """Those of a segment that also has live ones are in the buffers, and masked."""
    rng, cache = np.random.default_rng(0), RotatingTurboKVCache(200, 0, "turbo4", recent=16, block=16)
    tokens = random_tokens(rng, 300, bias=30)
    tokens[side][0, :, 110] = float("nan")
    cache.update_and_fetch(*tokens)
    keys, values = cache.update_and_fetch(*random_tokens(rng, 1, bias=30))
    assert keys.view.n_evicted > 0 and sum(cache.report()["not_finite"].values(), []) == [side == 0, side == 1]
    for bad in (True, False):
        mask = mx.zeros((1, keys.shape[2]), mx.float16)
        out = attention.attend(mx.zeros((1, 2, 1, 32)), keys.view, scale=1.0, mask=mask)
        assert mx.isnan(out).all().item() == bad
        for _ in range(20):
            keys, values = cache.update_and_fetch(*random_tokens(rng, 1, bias=30))
    assert keys.view.n_evicted > 0


# ---- what rows share ------------------------------------------------------------------------------------------------
@fast
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("side", [0, 1])
def test_the_neighbours_of_a_bad_token_keep_their_mean(backend, side, value):
    """In its segment, once it is trimmed off, and what comes after; also where it is among the first tokens, from which
    it is told whether to centre."""

    def error(n_first, at):
        rng, cache = np.random.default_rng(0), TurboKVCache("turbo4", sink=2, recent=4, block=4)
        tokens = [to_numpy(x) for x in random_tokens(rng, 700, bias=30)]
        spoiled = [x.copy() for x in tokens]
        if at is not None:
            spoiled[side][0, 1, at, 3] = value
        for a, b in [(0, n_first), *((i, i + 1) for i in range(n_first, 500)), (500, 700)]:
            cache.update_and_fetch(*(mx.array(x[:, :, a:b]) for x in spoiled))
        assert cache.report()["not_finite"][("keys", "values")[side]] == [int(at is not None)]
        cache.trim(700 - (at or 470))
        fetched = to_numpy(cache.keys_and_values()[side])
        return np.linalg.norm(fetched - tokens[side][:, :, : fetched.shape[2]], axis=-1)[:, :, 2:].max()

    assert error(300, 470) < 1.2 * error(300, None) and error(490, 470) < 1.2 * error(490, None)


@fast
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("what", ["keys", "queries", "all keys", "all queries", "all of both"])
def test_auto_chooses_by_the_tokens_that_are_finite(backend, what, value):
    """In a batch the most demanding row counts: that must not be one that is broken."""
    keys, values = turning(400, 0)
    queries, bits = queries_for(keys), []
    spoiled = [mx.array(keys), mx.array(queries)]
    for name, x, at in ("keys", spoiled[0], 350), ("queries", spoiled[1], 390):
        if what in (name, f"all {name}", "all of both"):
            x[:, :, slice(None) if "all" in what else slice(at, at + 2), 3] = value
    caches = []
    for k, q in ((keys, queries), spoiled):
        cache = TurboKVCache("auto")
        cache.update_and_fetch(k, values)
        caches.append(copy.deepcopy(cache))
        cache.observe(q, 0.1)
        bits.append(cache.report()["scheme"])
        assert all(np.isfinite(error) for error in cache.report()["auto"]["error"].values())
        assert cache.report()["packed"]
    assert bits == ["turbo4"] * 2
    batch = TurboKVCache.merge(caches)
    batch._last = [(0, 400)] * 2
    batch.observe(mx.concatenate([queries, spoiled[1]]), 0.1)
    batch.update_and_fetch(*(mx.concatenate([x[:, :, :1]] * 2) for x in (keys, values)))
    assert batch.report()["scheme"] == "turbo4"


@fast
def test_keys_with_a_bad_one_among_them_get_the_bits_that_they_need(backend):
    keys, values = turning(400, 600)
    for k in (keys, mx.array(keys)):
        cache = TurboKVCache("auto")
        cache.update_and_fetch(k, values)
        cache.observe(queries_for(keys), 0.1)
        assert cache.report()["scheme"] == "turbo6v4"
        keys[0, 0, 350, 3] = float("nan")


# ---- what it says ---------------------------------------------------------------------------------------------------
@fast
def test_the_report_tells_which_tokens_of_which_row_are_not_finite(backend):
    tokens = [to_numpy(x) for x in random_tokens(np.random.default_rng(0), 60, batch=3, heads=2)]
    tokens[0][0, 0, [1, 20, 58], 3] = np.nan, np.inf, np.nan  # sink, packed, recent; twice in one token
    tokens[0][0, 1, 20] = np.nan
    tokens[1][2, 1, 7, 3] = 1e30
    cache = TurboKVCache("turbo4", sink=2, recent=4, block=4)
    assert cache.report()["not_finite"] == {"keys": [0], "values": [0]}
    cache.update_and_fetch(*map(mx.array, tokens))
    assert cache.report()["not_finite"] == {"keys": [3, 0, 0], "values": [0, 0, 1]}
    line = describe([cache, TurboKVCache("turbo4")])
    assert line == "2 of 2 layers compressed; NOT FINITE in 1 layers (0): keys of up to 3 tokens, values of up to 1"
    cache.trim(30)
    assert cache.report()["not_finite"] == {"keys": [2, 0, 0], "values": [0, 0, 1]}
    cache.trim(60)
    assert cache.report()["not_finite"] == {"keys": [0], "values": [0]}
    assert describe([cache]) == "1 of 1 layers compressed"


@fast
def test_another_thread_may_look_at_the_report_between_steps(backend):
    rng, found = np.random.default_rng(0), []
    cache = TurboKVCache("turbo4", sink=2, recent=4, block=4)
    for n in (30, 1, 1, 1, 1, 1):
        keys, values = cache.update_and_fetch(*random_tokens(rng, n))
        mx.eval(attention.attend(mx.zeros((1, 2, 1, 32)), keys.view, scale=1.0) if n == 1 else keys)
        thread = threading.Thread(target=lambda: found.append(cache.report()["not_finite"]))
        thread.start()
        thread.join()
    assert found == [{"keys": [0], "values": [0]}] * 6


@fast
def test_a_kernel_that_fails_leaves_the_cache_as_it_was(backend):
    def held(cache):
        rows = [cache.extract(b) for b in range(2)] if hasattr(cache, "extract") else [cache]
        return cache.size(), [[to_numpy(x) for x in row.keys_and_values()] for row in rows]

    rng = np.random.default_rng(0)
    for kind, make in MAKE.items():
        n_rows = 2 if "batch" in kind else 1
        cache = make(TurboConfig("turbo4", sink=KEEP, recent=4, block=4, centre=False), n_rows)
        for n in (20, 1, 1, 1):
            cache.update_and_fetch(*random_tokens(rng, n, batch=n_rows))
        before, new = held(cache), random_tokens(rng, 20, batch=n_rows)
        with select.use_backend(DoesNotBuild()), pytest.raises(BackendError):
            cache.update_and_fetch(*new)
        assert same(held(cache), before), kind
        cache.update_and_fetch(*new)


# ---- in mlx-lm's programs -------------------------------------------------------------------------------------------
SHORT_WINDOW = ["--kv-sink", "2", "--kv-recent", "8"]


@pytest.fixture(scope="module")
def broken_model(tmp_path_factory):
    """A folder with the embedded model, in which the embedding of one token is infinite."""
    folder = tmp_path_factory.mktemp("broken") / "model"
    (bad,) = AutoTokenizer.from_pretrained(DEMO_MODEL).encode("@")
    save_model(folder, infinite=bad)
    return folder


def test_generate_says_at_its_end_that_the_cache_is_not_finite(run, broken_model):
    for prompt, said in ("Once upon a time there was a dog. " * 4, False), ("Once upon @ a time. " * 4, True):
        code, out, _ = run(
            "generate", "--model", broken_model, "--prompt", prompt, "--max-tokens", 12, "--kv", "turbo4", *SHORT_WINDOW
        )
        assert code == 0 and ("; NOT FINITE in 4 layers (0, 1, 2, 3): keys of" in out) == said


def test_a_request_that_is_not_finite_neither_ends_a_server_nor_reaches_another(broken_model, tmp_path):
    save_model(tmp_path / "sound")
    reference, story = Reference(tmp_path / "sound"), ". ".join(STORIES[:3])

    def ask(text):
        messages = [{"role": "user", "content": text}]
        return messages, server.chat(messages, 12)

    with (
        Server(
            tmp_path, "--model", broken_model, "--chat-template", DEMO_TEMPLATE, "--kv", "turbo8v4", *SHORT_WINDOW
        ) as server,
        ThreadPoolExecutor(4) as pool,
    ):
        answers = list(pool.map(ask, [story, f"{story} @", f"{STORIES[3]} {story}", "@"]))
        answers += [ask(f"{story} {STORIES[4]}"), ask(STORIES[5])]  # the first goes on from the story
        behind = [reference.behind(*answers[i]).max() for i in (0, 2, 4, 5)]
        assert max(behind) < 1.0 and "Traceback" not in server.log, server.log
