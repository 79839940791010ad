"""`enable` and `disable` while mlx-lm's own BatchGenerator runs: each request keeps the scheme it began with."""

import functools

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import make_prompt_cache
from support import families
from support.models import gemma3, llama
from support.strategies import quick

from mlx_turbo import TurboConfig, describe, disable, enable, use_backend
from mlx_turbo.integration.mixed_batch import MixedBatchCache
from mlx_turbo.integration.prompt_cache import make_prompt_cache as make_compressed_cache

pytestmark = pytest.mark.usefixtures("door")
SCHEMES = {
    "off": None,
    "turbo2": TurboConfig("turbo2", sink=2, recent=4, block=4),
    "turbo8": TurboConfig("turbo8", sink=2, recent=4, block=4),
    "auto": TurboConfig("auto", sink=2, recent=4, block=4),
    "another size": TurboConfig("turbo2", sink=0, recent=2, block=3),
}
PROMPTS = [np.random.default_rng(n).integers(0, 90, n).tolist() for n in (1, 2, 12, 20, 33, 40)]
MODELS = {
    "llama": llama,
    "windows": functools.partial(gemma3, sliding_window=24),
    "latents": functools.partial(families.build, "deepseek_v3"),
}


@functools.cache
def model(name):
    return MODELS[name]()


def switch(name, scheme):
    config = SCHEMES[scheme]
    return enable(model(name), config) if config else disable(model(name))


def named(config):
    """What tells the schemes apart, also in windows, which keep other leading tokens."""
    return config and (config.name, config.recent, config.block)


@functools.cache
def named_of(name, scheme):
    """The same of the layers of a model under a scheme: `auto` gives windows another than their neighbors."""
    config = SCHEMES[scheme]
    return {named(c.config) for c in make_compressed_cache(model(name), config)} if config else {None}


@functools.cache
def alone(name, scheme, i, n):
    """The answer to a request with nothing beside it."""
    with use_backend("cpu"):
        gen = BatchGenerator(switch(name, scheme), prefill_step_size=16)
        gen.insert([PROMPTS[i]], max_tokens=[n])
        tokens = []
        while responses := gen.next_generated():
            tokens += [r.token for r in responses]
    return tokens


REQUESTS = st.tuples(
    st.sampled_from(sorted(SCHEMES)),
    st.integers(0, len(PROMPTS) - 1),
    st.integers(1, 12),
    st.integers(0, 8),  # the step at which it comes
)


@pytest.mark.parametrize("name", MODELS)
def test_every_request_answers_what_it_would_alone_in_its_scheme(name):
    seen = set()

    @settings(quick, max_examples=15)
    @given(requests=st.lists(REQUESTS, min_size=2, max_size=5), gone=st.none() | st.integers(0, 4))
    def run(requests, gone):
        wanted = [alone(name, scheme, i, n) for scheme, i, n, _ in requests]
        with use_backend("cpu"):
            gen = BatchGenerator(model(name), prefill_step_size=16, prefill_batch_size=2, completion_batch_size=4)
            uids, answers, ended = {}, {}, set()
            for step in range(200):
                for number, (scheme, i, n, arrives) in enumerate(requests):
                    if arrives == step:
                        switch(name, scheme)
                        (uids[number],) = gen.insert([PROMPTS[i]], max_tokens=[n])
                if step == 6 and gone in uids and uids[gone] not in ended:
                    gen.remove([uids[gone]])
                    ended.add(uids[gone])
                _, responses = gen.next()
                for r in responses:
                    answers.setdefault(r.uid, []).append(r.token)
                    if r.finish_reason:
                        ended.add(r.uid)
                        scheme = next(requests[number][0] for number, uid in uids.items() if uid == r.uid)
                        assert named_of(name, scheme) & {named(getattr(c, "config", None)) for c in r.prompt_cache}
                held = gen._generation_batch.prompt_cache
                for c in held:
                    seen.add(len(c.parts) if isinstance(c, MixedBatchCache) else 0)
                if len(uids) == len(requests) and ended >= set(uids.values()):
                    break
            else:
                raise AssertionError("no end")
            for number, uid in uids.items():
                got = answers.get(uid, [])
                assert got == (wanted[number][: len(got)] if number == gone else wanted[number])

    run()
    assert {0, 1, 2, 3} <= seen  # several kinds at once, and one that is left of them


def test_what_a_mixed_batch_holds_is_described():
    with use_backend("cpu"):
        batch = []
        for scheme in "turbo8", "off":
            cache = make_prompt_cache(switch("llama", scheme))
            model("llama")(mx.array([PROMPTS[5]]), cache=cache)
            rows = [c.merge([c]) for c in cache]
            batch = [MixedBatchCache([a, b], [[1], [0]]) for a, b in zip(batch, rows)] if batch else rows
    assert "MixedBatchCache (2) stays uncompressed: its rows began under several schemes" in describe(batch)
    assert batch[0].size() == 40 and batch[0].nbytes == sum(p.nbytes for p in batch[0].parts)
    assert batch[0].trim(3) == 3 and batch[0].offset.tolist() == [37, 37] and not batch[0].empty()
    batch[0].filter([1])
    assert batch[0].n_rows == 1 and type(batch[0].extract(0)).__name__ == "TurboKVCache"
