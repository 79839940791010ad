"""A fault in a batch ends one request: the rows beside it answer what they would have without it."""

import functools
import gc
import logging

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import make_prompt_cache
from support.faults import MARKED, SITES, WatchedBatchGenerator, mark, marked_with, once, planted
from support.models import llama
from support.strategies import quick

from mlx_turbo import TurboConfig, disable, enable, use_backend
from mlx_turbo.integration.isolation import GenerationError, IsolatedBatchGenerator

CONFIG = TurboConfig("turbo4", sink=2, recent=4, block=4)
PROMPTS = [np.random.default_rng(n).integers(0, 100, n).tolist() for n in (1, 3, 12, 20, 33, 40)]
pytestmark = pytest.mark.usefixtures("door")


def greedy(logprobs):
    return mx.argmax(logprobs, axis=-1)


@functools.cache
def model(config=CONFIG):
    return enable(llama(), config)


def generator(**options):
    sizes = dict(completion_batch_size=4, prefill_batch_size=2, prefill_step_size=16)
    return IsolatedBatchGenerator(WatchedBatchGenerator, model(), **sizes | options)


def insert(gen, prompt, max_tokens, cache=None, cached=(), sampler=greedy):
    (uid,) = gen.insert_segments(
        [[prompt]], max_tokens=[max_tokens], caches=[cache], all_tokens=[list(cached)], samplers=[sampler]
    )
    return uid


def collect(gen, answers, failed):
    """One step; what it answered is added. Returns the uids of rows that are finished."""
    prompts, tokens = gen.next()
    for r in prompts:
        if isinstance(r.progress, Exception):
            assert r.uid not in failed
            failed[r.uid] = r.progress
        else:
            assert r.uid not in failed and r.progress[0] <= r.progress[1]
    for r in tokens:
        assert r.uid not in failed
        answers.setdefault(r.uid, []).append(r.token)
        if r.finish_reason is not None:  # what its caches hold is what was answered
            assert r.all_tokens[-len(answers[r.uid]) :] == answers[r.uid]
            assert {c.offset for c in r.prompt_cache} == {len(r.all_tokens)}
    return {r.uid for r in tokens if r.finish_reason is not None}


def finish(gen, uids, answers, failed):
    done = set()
    for _ in range(3000):
        if done | set(failed) >= set(uids):
            assert not any(batch.rows for batch in gen._batches) and not gen._waiting  # nothing is left behind
            return
        done |= collect(gen, answers, failed)
    raise AssertionError(f"no end: {answers}, {failed}")


@functools.cache
def alone(i, n, config=CONFIG):
    """What mlx-lm's generator answers to prompt i, with nothing beside it and without a fault."""
    gen = BatchGenerator(model(config), prefill_step_size=16)
    gen.insert([PROMPTS[i]], max_tokens=[n])
    tokens = []
    while responses := gen.next_generated():
        tokens += [r.token for r in responses]
    return tokens


good = st.tuples(st.integers(0, 5), st.integers(1, 14), st.integers(0, 9))
marks = st.just(mark("merging")) | st.builds(
    mark, st.sampled_from([kind for kind in MARKED if kind != "merging"]), st.integers(0, 9)
)
bad = st.tuples(st.integers(0, 5), marks, st.integers(0, 9))


@settings(quick, max_examples=25)
@given(
    rows=st.lists(good | good | bad, min_size=1, max_size=6),
    one=st.none() | st.tuples(st.sampled_from([k for k in SITES if k != "trimming"]), st.integers(1, 30)),
)
def test_every_request_gets_its_own_tokens_or_an_error_of_its_own(rows, one):
    with use_backend("cpu"):
        for i, _, _ in rows:
            alone(i, 14)
        answers, failed, uids, done = {}, {}, {}, set()
        gen = generator()
        with planted(**{"due": once(*one)} if one else {}) as faults:
            for step in range(10):
                for i, n, arrives in rows:
                    if arrives == step:
                        uids[insert(gen, PROMPTS[i], n)] = i, n
                done |= collect(gen, answers, failed)
            finish(gen, set(uids) - done, answers, failed)
        gen.close()
    for uid, (i, n) in uids.items():
        if marked_with(n):
            assert "planted" in str(failed[uid])
            n = len(answers.get(uid, []))
        elif uid in failed:  # it was alone when the one fault came
            assert (one[0], 1) in faults.fired
            n = len(answers.get(uid, []))
        assert answers.get(uid, []) == alone(i, 14)[:n]
    n_unmarked = sum(uid in failed and not marked_with(n) for uid, (_, n) in uids.items())
    assert n_unmarked <= 1


@pytest.mark.parametrize("kind", [k for k in SITES if k != "trimming"])
def test_a_fault_that_does_not_come_back_costs_no_request_beside_others(kind):
    with use_backend("cpu"):
        want = {i: alone(i, 14) for i in (2, 3, 5)}
        gen, answers, failed = generator(), {}, {}
        with planted(due=once(kind, 3)) as faults:
            uids = {insert(gen, PROMPTS[i], 14 - (i == 3)): i for i in want}
            finish(gen, uids, answers, failed)
        assert [k for k, _ in faults.fired] == [kind] and not failed
        assert all(answers[uid] == want[i][: 14 - (i == 3)] for uid, i in uids.items())
        new = insert(gen, PROMPTS[4], 5)
        finish(gen, {new}, answers, failed)
        assert answers[new] == alone(4, 14)[:5]


def test_a_request_that_fails_alone_gets_the_cause_in_one_line_and_the_log_the_traceback(caplog):
    gen, answers, failed = generator(), {}, {}
    with use_backend("cpu"), planted(), caplog.at_level(logging.INFO, "mlx_turbo"):
        uid = insert(gen, PROMPTS[3], mark("attention", 2))
        finish(gen, {uid}, answers, failed)
    assert type(failed[uid]) is GenerationError and str(failed[uid]) == "PlantedFault: planted in attention"
    assert failed[uid].__traceback__ is None and failed[uid].__cause__ is None  # they hold arrays
    assert len(answers[uid]) == 2 and "raise PlantedFault" in caplog.text


def test_a_cache_that_cannot_be_gone_on_from_costs_its_request_nothing():
    """What was kept of an earlier request may be what fails: then the whole prompt is computed."""
    with use_backend("cpu"):
        kept = make_prompt_cache(model())
        for c in kept:
            c.config = TurboConfig("turbo3")  # of another kind than what it holds
        model()(mx.array([PROMPTS[5][:30]]), cache=kept)
        for c in kept:
            c.update_and_fetch = None
            c.__class__ = type("Broken", (type(c),), {"merge": classmethod(lambda cls, caches: 1 / 0)})
        gen, answers, failed = generator(), {}, {}
        uids = {insert(gen, PROMPTS[5][30:], 9, kept, PROMPTS[5][:30]): 5, insert(gen, PROMPTS[2], 9): 2}
        finish(gen, uids, answers, failed)
        assert not failed and all(answers[uid] == alone(i, 14)[:9] for uid, i in uids.items())


def test_a_row_that_goes_away_while_others_are_computed_anew_is_gone():
    with use_backend("cpu"):
        gen, answers, failed = generator(), {}, {}
        with planted(due=once("attention", 5)) as faults:
            uids = [insert(gen, PROMPTS[i], 14) for i in (3, 4, 5)]
            while not faults.fired:
                collect(gen, answers, failed)
            n = len(answers.get(uids[1], []))
            gen.remove([uids[1], 99])
            finish(gen, {uids[0], uids[2]}, answers, failed)
        assert len(answers.get(uids[1], [])) == n and not failed
        assert (answers[uids[0]], answers[uids[2]]) == (alone(3, 14), alone(5, 14))


@pytest.mark.parametrize("kind", ["filtering", "extracting"])
def test_a_fault_while_rows_are_dropped_or_copied_costs_the_others_nothing(kind):
    with use_backend("cpu"):
        want = {i: alone(i, 14) for i in (3, 4)}
        gen, answers, failed = generator(), {}, {}
        uids = [insert(gen, PROMPTS[i], 14) for i in (3, 5, 4)]
        while not all(uid in answers for uid in uids):
            collect(gen, answers, failed)
        with planted(due=once(kind, 1)) as faults:
            (gen.remove if kind == "filtering" else gen.extract_cache)(uids[1:2])
        gen.remove(uids[1:2])
        finish(gen, {uids[0], uids[2]}, answers, failed)
        assert faults.fired and not failed and [answers[uids[0]], answers[uids[2]]] == [*want.values()]


def test_sampled_tokens_are_repeated_not_sampled_again():
    """A row that is computed anew must not change what a client has already read."""
    rng = np.random.default_rng(0)
    with use_backend("cpu"):
        gen, answers, failed, drawn = generator(), {}, {}, {}

        def sampler(name):
            def sample(logprobs):
                token = int(rng.integers(100))
                drawn.setdefault(name, []).append(token)
                return mx.array([token], mx.uint32)

            return sample

        with planted(due=once("attention", 12)) as faults:
            uids = [insert(gen, PROMPTS[i], 12, sampler=sampler(i)) for i in (3, 4)]
            while not faults.fired:
                collect(gen, answers, failed)
            before = {uid: list(tokens) for uid, tokens in answers.items()}
            finish(gen, uids, answers, failed)
        for uid, name in zip(uids, (3, 4)):
            assert (
                len(before[uid]) > 1
                and answers[uid][: len(before[uid])] == before[uid] == drawn[name][: len(before[uid])]
            )
            assert len(answers[uid]) == 12


def test_a_sampler_that_fails_ends_its_own_request():
    with use_backend("cpu"):
        gen, answers, failed = generator(), {}, {}

        def sampler(logprobs):
            raise ValueError("top_k: too large")

        uids = [insert(gen, PROMPTS[2], 6), insert(gen, PROMPTS[3], 6, sampler=sampler)]
        finish(gen, uids, answers, failed)
        assert answers == {uids[0]: alone(2, 14)[:6]} and str(failed[uids[1]]) == "ValueError: top_k: too large"


def test_faults_leave_nothing_in_memory(monkeypatch):
    monkeypatch.setattr("mlx_turbo.integration.isolation.logger.disabled", True)  # pytest keeps what is logged
    with use_backend("cpu"), planted():
        gen, used = generator(), []
        for i in range(6):
            answers, failed = {}, {}
            uids = [
                insert(gen, PROMPTS[5], mark("attention", 3)),
                insert(gen, PROMPTS[4], 8),
                insert(gen, PROMPTS[3], 8),
            ]
            finish(gen, uids, answers, failed)
            assert list(failed) == uids[:1]
            gc.collect()
            used.append(mx.get_active_memory())
        assert used[-1] < used[1] + 1e6  # what one fault leaves, if it does, is 0.6 MB


# ---- another scheme while requests run ---------------------------------------------------------------------------
TURBO2, TURBO8 = (TurboConfig(scheme, sink=2, recent=4, block=4) for scheme in ("turbo2", "turbo8"))


@pytest.mark.parametrize("first, then", [(TURBO2, TURBO8), (TURBO2, None), (None, TURBO2), (TURBO8, TURBO2)])
@pytest.mark.parametrize("fault", [0, 1, 2])  # the model's so-many-th call: of the running answers, of the new ones
def test_running_answers_keep_their_scheme_and_new_ones_get_the_new_one(first, then, fault, caplog):
    with use_backend("cpu"):
        own = llama()
        switch = lambda config: enable(own, config) if config else disable(own)  # noqa: E731

        def tokens(config, i, n):
            switch(config)
            gen = BatchGenerator(own, prefill_step_size=16)
            gen.insert([PROMPTS[i]], max_tokens=[n])
            out = []
            while responses := gen.next_generated():
                out += [r.token for r in responses]
            return out

        want = [tokens(first, 3, 14), tokens(first, 5, 14), tokens(then, 3, 9), tokens(then, 4, 9)]
        assert want[:2] != [tokens(then, 3, 14), tokens(then, 5, 14)]  # else the test below could not tell
        switch(first)
        gen, answers, failed = IsolatedBatchGenerator(WatchedBatchGenerator, own, prefill_step_size=16), {}, {}
        uids = [insert(gen, PROMPTS[i], 14) for i in (3, 5)]
        while not all(uid in answers for uid in uids):
            collect(gen, answers, failed)
        switch(then)
        uids += [insert(gen, PROMPTS[i], 9) for i in (3, 4)]
        with planted(due=once("model", fault)) as faults:
            finish(gen, uids, answers, failed)
        assert not failed and [answers[uid] for uid in uids] == want
        assert len(faults.fired) == bool(fault) == len(caplog.records)  # different schemes are no fault
