"""Budgets of memory of whole models: made with a prompt cache, shared by what an enabled model makes, priced."""

import gc
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map
from mlx_lm.generate import BatchGenerator, generate_step, speculative_generate_step
from mlx_lm.models import cache as lm_cache
from support.caches import FAST_BACKENDS
from support.models import gemma3, llama, tokens_of

import mlx_turbo
from mlx_turbo import Scheme, TurboConfig, TurboKVCache, choose_bits, describe, disable, enable, make_prompt_cache
from mlx_turbo.cache.batch import BatchTurboKVCache
from mlx_turbo.cache.memory_budget import MemoryBudgetError
from mlx_turbo.integration import memory
from mlx_turbo.integration.bit_budget import FEWEST
from mlx_turbo.integration.prompt_cache import flatten_caches, memory_budget_of

fast = pytest.mark.parametrize("backend", FAST_BACKENDS, indirect=True)
TOKENS = tokens_of(FEWEST)[0]
SMALL = dict(sink=2, recent=8, block=8)


def read(model, cache, n, chunk=64):
    for start in range(0, n, chunk):
        model(mx.full((1, min(chunk, n - start)), 3), cache=cache)
        mx.eval([c.state for c in cache])


@fast
def test_a_prompt_cache_under_a_budget_is_exact_and_then_packed(backend):
    model = llama()
    budget = memory_budget_of(make_prompt_cache(model, TurboConfig(memory="1GB", **SMALL)))
    whole = budget.nbytes_after(
        caches := make_prompt_cache(model, TurboConfig(memory="1GB", **SMALL), budget=budget), 700
    )
    assert [c.share.budget for c in caches] == [budget] * len(caches)
    cache = make_prompt_cache(model, TurboConfig(memory=whole // 2, floor="turbo2", **SMALL))
    logits, plain = (
        [],
        model.make_cache() if hasattr(model, "make_cache") else [lm_cache.KVCache() for _ in model.layers],
    )
    for each in cache, plain:
        out = model(TOKENS[None, :100], cache=each)
        logits.append(out)
    assert mx.array_equal(*logits) and "exact in layers" in describe(cache)  # to the bit
    budget = memory_budget_of(cache)
    read(model, cache, 600)
    assert all(c.config.scheme != Scheme(0, 0) for c in cache) and budget.nbytes <= whole // 2
    text = describe(cache)
    assert f"{budget.nbytes:,} bytes used, floor turbo2, every number priced alike: turbo" in text and "next: " in text
    with pytest.raises(MemoryBudgetError, match="of them fit"):
        read(model, cache, 10**6, chunk=10**6)


@fast
def test_all_caches_of_an_enabled_model_share_one_budget(backend):
    model = llama()
    enable(model, TurboConfig(memory="1GB", **SMALL))
    try:
        one, other = lm_cache.make_prompt_cache(model), lm_cache.make_prompt_cache(model)
        budget = memory_budget_of(one)
        assert memory_budget_of(other) is budget
        read(model, one, 300)
        read(model, other, 300)
        assert budget.nbytes == sum(c.nbytes for c in (*one, *other))
        del other
        gc.collect()
        assert budget.nbytes == sum(c.nbytes for c in one)
    finally:
        disable(model)
    assert memory_budget_of(make_prompt_cache(model, "memory:1GB")) is not budget


@fast
def test_windows_and_exact_layers_beside_a_budget(backend):
    """Short windows stay mlx-lm's, and do not count; the shapes of all others are known before the first token."""
    model = gemma3()
    cache = make_prompt_cache(model, TurboConfig(memory="1GB", **SMALL))
    budget, ours = memory_budget_of(cache), [c for c in flatten_caches(cache) if isinstance(c, TurboKVCache)]
    assert ours and all(c.share.shape is not None and c.share.shape.n_heads > 0 for c in ours)
    assert 1000 < budget.tokens_that_fit(ours) < 10**9
    read(model, cache, 200)
    assert budget.nbytes == sum(c.nbytes for c in ours)


@fast
def test_prices_come_from_the_model_and_the_dearest_part_is_packed_last(backend):
    model = llama(num_hidden_layers=3)
    for i, layer in enumerate(model.layers):
        layer.self_attn.o_proj.weight *= 8.0 if i == 1 else 1 / 8
    mx.eval(model.parameters())
    asked = TurboConfig(memory="1GB", **SMALL)
    config = choose_bits(model, TOKENS, asked)
    assert config.memory == 10**9 and len(config.prices) == 3
    nats = [dict(side)[3] for layer in config.prices for side in layer]
    assert min(nats[2:4]) > max(nats[:2] + nats[4:])
    whole = memory_budget_of(make_prompt_cache(model, config)).nbytes_after(make_prompt_cache(model, config), 600)
    whole = memory_budget_of(cache := make_prompt_cache(model, config)).nbytes_after(cache, 600)
    cache = make_prompt_cache(
        model, TurboConfig(memory=int(whole / 2.5), prices=config.prices, floor="turbo2", **SMALL)
    )
    read(model, cache, 590)
    bits = [sum(b or 16 for b in (c.config.scheme.key_bits, c.config.scheme.value_bits)) for c in cache]
    assert bits[1] > max(bits[0], bits[2]) and "priced by KL divergence" in describe(cache)


def test_auto_is_what_the_machine_has_beside_the_model(monkeypatch):
    model = llama()
    weights = sum(p.nbytes for _, p in mlx_turbo.integration.memory.tree_flatten(model.parameters()))
    for what, share in (("the working set that Metal recommends on this Mac", 0.9), ("all of it, no GPU", 0.45)):
        monkeypatch.setattr(memory, "machine_memory", lambda what=what: (10**9, what))
        assert abs(memory.budget_of(model, TurboConfig("memory:auto")).limit - (share * 10**9 - weights)) <= 2
    monkeypatch.setattr(memory, "machine_memory", lambda: (weights, "all memory of this test"))
    with pytest.raises(ValueError, match="memory: got 'auto', but of .* the model takes"):
        make_prompt_cache(model, "memory:auto")


def test_a_budget_of_memory_is_a_configuration_of_a_model():
    config = TurboConfig("memory:6GB", sink=2)
    assert (config.name, config.memory, config.floor, config.of_all_layers) == (
        "memory:6GB",
        6 * 10**9,
        Scheme(3, 3),
        True,
    )
    assert TurboConfig(memory="6 GB", sink=2) == config == TurboConfig(memory=6 * 10**9, sink=2)
    assert config.for_layer(1, 2) == TurboConfig("turbo0", sink=2)
    assert TurboConfig(memory="512MiB").name == "memory:536870912B"
    priced = TurboConfig(memory=1, prices=[[{3: 0.5, 4: 1}, {}]])
    assert priced.prices == ((((3, 0.5), (4, 1.0)), ()),) and hash(priced) == hash(
        TurboConfig(memory=1, prices=priced.prices)
    )
    for options, message in (
        (dict(scheme="memory:x"), "scheme: got 'memory:x', allowed are memory:SIZE with a size such as 6GB"),
        (dict(memory=0), "memory: got 0, allowed are bytes or a size such as 6GB"),
        (dict(memory=True), "memory: got True"),
        (dict(memory=1, scheme="turbo3"), "memory: says how many bits every layer gets"),
        (dict(memory=1, budget=4), "memory: .* leave budget out"),
        (dict(floor="turbo4"), "floor: goes with memory"),
        (dict(memory=1, floor="turbo7"), "floor: got 'turbo7', allowed are turboN and turboKvV"),
        (dict(memory=1, prices=[[{7: 1}, {}]]), "prices: expected of each layer"),
        (dict(memory=1, prices=[[{4: 1}]]), "prices: expected of each layer"),
    ):
        with pytest.raises(ValueError, match=message):
            TurboConfig(**options)
    with pytest.raises(ValueError, match="whole model"):
        TurboKVCache("memory:6GB")


@fast
def test_requests_that_leave_a_batch_take_nothing_beside_it(backend, monkeypatch, door):
    """With mlx-lm's own generator, which takes the caches of finished requests out before it drops them, and divides a
    batch by a copy. most: what the caches take at the ends of its steps, and when a batch is made of others."""
    model, rng = llama(), np.random.default_rng(0)
    prompts, leaving = [rng.integers(0, 100, n).tolist() for n in (150, 300, 90, 280)], []

    def watch(name, found):
        original = getattr(BatchTurboKVCache, name)

        def watched(self, *args):
            result = original(self, *args)
            found.append(budget.nbytes)
            return result

        monkeypatch.setattr(BatchTurboKVCache, name, watched)

    def answer(limit):
        nonlocal budget
        enable(model, TurboConfig(memory=limit, **SMALL))
        budget, most = memory_budget_of(lm_cache.make_prompt_cache(model)), []
        gen = BatchGenerator(model, prefill_batch_size=3, prefill_step_size=64)
        uids, tokens, kept = gen.insert(prompts, max_tokens=[5, 3, 9, 9]), {}, []
        with monkeypatch.context():
            watch("extend", most)
            for name in ("extract", "filter", "__deepcopy__"):
                watch(name, leaving)
            while found := gen.next_generated():
                for r in found:
                    tokens.setdefault(r.uid, []).append(r.token)
                    kept += [r.prompt_cache] if r.finish_reason else []
                del found, r
                most.append(budget.nbytes)
        disable(model)
        return [tokens[uid] for uid in uids], kept, max(most)

    budget = None
    wanted, kept, most = answer(10**12)
    del kept
    gc.collect()
    leaving.clear()
    got, kept, _ = answer(limit := int(1.05 * most))
    assert got == wanted and max(leaving) <= limit
    assert all(c.config.scheme == Scheme(0, 0) for row in kept for c in row)
    assert sorted(row[0].offset for row in kept) == sorted(len(p) + len(a) for p, a in zip(prompts, got))


# ---- a draft model ---------------------------------------------------------------------------------------------------
DRAFT = dict(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)


def with_draft(model, draft, config, draft_config=None):
    cache = make_prompt_cache(model, config)
    return cache + make_prompt_cache(draft, draft_config or config, budget=cache)


@pytest.fixture(scope="module")
def drafted():
    """(model, draft models): one of another size, and the model with noise, of which many tokens are accepted."""
    model, noisy = llama(), llama()
    noise = lambda x: x + 0.01 * mx.random.normal(x.shape) if x.ndim > 1 else x  # noqa: E731
    noisy.update(tree_map(noise, noisy.parameters()))
    mx.eval(noisy.parameters())
    return model, {"other": llama(**DRAFT), "noisy": noisy}


def speculate(model, draft, prompt, cache, n=60, n_draft=3):
    """(tokens, how many the draft model gave) by mlx-lm's own function; at every token the bytes of `cache` are
    within its budget, if it has one."""
    tokens, accepted, budget = [], 0, memory_budget_of(cache)
    steps = speculative_generate_step(
        prompt, model, draft, num_draft_tokens=n_draft, max_tokens=n, prompt_cache=cache, prefill_step_size=64
    )
    for token, _, from_draft in steps:
        tokens.append(int(token))
        accepted += from_draft
        assert budget is None or budget.nbytes == sum(c.nbytes for c in cache) <= budget.limit
    return tokens, accepted


@fast
@pytest.mark.parametrize("name", ["other", "noisy"])
def test_speculative_decoding_under_a_budget(backend, drafted, name):
    """As long as all is exact, the tokens of mlx-lm's own caches; then no more bytes than the limit, and the tokens
    that the model gives alone with the same widths, which it has packed by the time the answer begins."""
    (model, drafts), prompt = drafted, TOKENS[:200]
    draft, config = drafts[name], TurboConfig(memory="1GB", **SMALL)
    wanted = speculate(model, draft, prompt, [lm_cache.KVCache() for m in (model, draft) for _ in m.layers])
    cache = with_draft(model, draft, config)
    assert speculate(model, draft, prompt, cache) == wanted
    assert all(c.config.scheme == Scheme(0, 0) for c in cache) and wanted[1] > 20 * (name == "noisy")
    budget = memory_budget_of(cache)
    fresh = with_draft(model, draft, config)
    need = memory_budget_of(fresh).nbytes_after(fresh, 260)
    small = with_draft(model, draft, replace(config, memory=int(0.3 * need), floor="turbo4"))
    got, _ = speculate(model, draft, prompt, small)
    schemes = [c.config.scheme for c in small]
    assert set(schemes) == {Scheme(8, 8)}
    report = memory_budget_of(small).report()
    assert set(report["layers"]) == set(range(len(model.layers)))
    assert set(report["draft_layers"]) == set(range(len(draft.layers)))
    assert "of the draft model turbo" in describe(small)
    assert budget.report()["draft_layers"] == {i: ["turbo0"] for i in range(len(draft.layers))}
    alone = make_prompt_cache(model, TurboConfig("turbo8", **SMALL))
    assert got == [int(t) for t, _ in generate_step(prompt, model, max_tokens=60, prompt_cache=alone)]


@fast
def test_a_prompt_is_refused_by_what_both_models_need(backend, drafted):
    model, draft = drafted[0], drafted[1]["other"]
    config = TurboConfig(memory="200KB", floor="turbo4", **SMALL)
    alone, both = make_prompt_cache(model, config), with_draft(model, draft, config)
    budget = memory_budget_of(both)
    fit = budget.tokens_that_fit(both)
    assert 0 < fit < memory_budget_of(alone).tokens_that_fit(alone)
    speculate(model, draft, TOKENS[:100], both, n=fit - 100)  # to the last token
    with pytest.raises(MemoryBudgetError):
        speculate(model, draft, TOKENS[:100], both, n=300)


def test_the_prices_of_a_draft_model_are_its_own_and_auto_leaves_room_for_its_weights(drafted, monkeypatch):
    model, draft = drafted[0], drafted[1]["other"]
    cheap, dear = [[{4: 1e-6}, {4: 1e-6}]], [[{4: 1e-2}, {4: 1e-2}]]
    for of_model, of_draft, first in (cheap * 2, dear, False), (dear * 2, cheap, True):
        config = TurboConfig(memory="1GB", **SMALL)
        cache = with_draft(model, draft, replace(config, prices=of_model), replace(config, prices=of_draft))
        for m, layers in (model, cache[:2]), (draft, cache[2:]):
            read(m, layers, 300)
        assert memory_budget_of(cache).report()["next"]["is_draft"] == first
        assert "of the draft model from exact to" in describe(cache) or not first
    with pytest.raises(ValueError, match="budget: it is over the caches of a model and its draft model already"):
        make_prompt_cache(drafted[1]["noisy"], config, budget=cache)
    monkeypatch.setattr(memory, "machine_memory", lambda: (10**9, "the working set that Metal recommends on this Mac"))
    cache = make_prompt_cache(model, "memory:auto")
    before = memory_budget_of(cache).limit
    make_prompt_cache(draft, "memory:auto", budget=cache)
    weights = sum(p.nbytes for _, p in memory.tree_flatten(draft.parameters()))
    assert memory_budget_of(cache).limit == before - weights


@fast
def test_enabled_models_share_a_budget_if_they_are_told_to(backend, drafted):
    model, draft = drafted[0], drafted[1]["other"]
    config = TurboConfig(memory="1GB", **SMALL)
    try:
        enable(model, config)
        enable(draft, config, budget=lm_cache.make_prompt_cache(model))
        caches = [lm_cache.make_prompt_cache(m) for m in (model, draft, model)]
        assert len({id(memory_budget_of(cache)) for cache in caches}) == 1
    finally:
        disable(model), disable(draft)
