"""Layers with an indexer: its cache stays exact, and in a batch follows the columns of the compressed one beside it."""

import copy
import importlib

import mlx.core as mx
import mlx_lm.models.cache as lm_cache
import numpy as np
import pytest
from support import families
from support.arrays import to_numpy
from support.caches import FAST_BACKENDS, random_tokens, same
from support.families import WRITES_EMPTY_ARRAYS
from support.walk import Walk, merged

from mlx_turbo import (
    TurboConfig,
    TurboKVCache,
    describe,
    enable,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
)
from mlx_turbo.cli.common import summarize
from mlx_turbo.integration import prompt_cache
from mlx_turbo.integration.sparse_indexer import IndexedCacheList, indexers_of_model, indexers_of_tokens
from mlx_turbo.quality import metrics

pytestmark = pytest.mark.parametrize("backend", FAST_BACKENDS, indirect=True)
NAMES = ["deepseek_v32", pytest.param("glm_moe_dsa", marks=pytest.mark.slow)]  # the second is the first's code
OTHERS = [n for n in ("minimax_m3_vl", "longcat_flash", "falcon_h1") if n in families.all_names()]


@pytest.fixture(autouse=True)
def door():
    prompt_cache.patch_mlx_lm()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("config", [TurboConfig("turbo4", 4, 8, 8), TurboConfig("auto", 4, 8, 8)], ids=str)
def test_logits_of_a_batch_are_those_of_its_rows_alone(backend, tmp_path, name, config):
    """Right-padded prompts in chunks, decode, a row that joins, one that leaves, copies, files, a trim."""
    model = families.build(name)
    made = [make_prompt_cache(model, config) for _ in range(3)]
    walk = Walk(model, [make_prompt_cache(model, config) for _ in made])
    batch = walk.joined(made)
    walk.step(batch, [0, 1, 2], [1, 1, 1])
    batch = copy.deepcopy(batch)
    walk.step(batch, [0, 1, 2], [2, 5, 1])
    if WRITES_EMPTY_ARRAYS:  # else not of mlx-lm's own caches either
        save_prompt_cache(tmp_path / "a", batch)
        batch = load_prompt_cache(tmp_path / "a.safetensors")
    assert {type(c) for c in batch} == {IndexedCacheList}
    walk.step(batch, [0, 1, 2], [1, 1, 1])
    gone = [c.extract(1) for c in batch]
    for c in batch:
        c.filter([2, 0])
    for _ in range(10):
        walk.step(batch, [2, 0], [1, 1])
    for c in [*batch, *walk.alone[0], *walk.alone[2]]:
        c.trim(3)
    for b in 0, 2:
        walk.at[b] -= 3
    walk.step(batch, [2, 0], [4, 1])
    walk.step(gone, [1], [9])
    again = merged([gone, made[0]])
    assert {type(c) for c in [*gone, *again]} == {IndexedCacheList}
    assert walk.worst < 1e-4


@pytest.mark.parametrize("first", [0, 1])
def test_both_caches_give_a_row_s_tokens_in_the_same_columns(backend, first):
    """Whichever of them gets the tokens first; after rows have joined and left, and tokens were taken back."""
    rng = np.random.default_rng(first)

    def merge(n):
        rows = [
            IndexedCacheList(TurboKVCache("turbo0", sink=2, recent=4, block=4), lm_cache.KVCache()) for _ in range(n)
        ]
        return rows[0].merge(rows)

    def step(batch, lengths):
        width = max(lengths)
        if len(set(lengths)) > 1:
            batch.prepare(lengths=lengths, right_padding=[width - n for n in lengths])
        mask, new = np.array(batch[0].make_mask(width)), random_tokens(rng, width, batch=len(lengths), heads=1)
        fetched = {i: [to_numpy(x) for x in batch[i].update_and_fetch(*new)] for i in (first, 1 - first)}
        batch.finalize()
        for ours, indexer in zip(fetched[0], fetched[1], strict=True):
            assert ours.shape == indexer.shape
            for b, n in enumerate(lengths):
                seen = mask[b, 0, n - 1]
                assert same(ours[b][:, seen], indexer[b][:, seen])

    batch, other = merge(3), merge(2)
    step(other, [7, 15])
    for lengths in [9, 3, 6], [1, 1, 1], [20, 2, 11], *[[1, 1, 1]] * 7, [3, 2, 3]:
        step(batch, lengths)
    batch.extend(other)
    step(batch, [1] * 5)
    batch = copy.deepcopy(batch)
    batch.trim(2)
    step(batch, [5, 1, 2, 9, 1])
    batch.filter([4, 1, 2])
    for lengths in [1, 1, 1], [2, 6, 1], *[[1, 1, 1]] * 9:
        step(batch, lengths)
    n = min(batch[0].offset.tolist()) + 3
    batch.trim(n)
    assert min(batch[0].offset.tolist()) == 0 and batch[0].offset.tolist() == batch[1].offset.tolist()
    for lengths in [2, 3, 2], [1, 1, 1]:
        step(batch, lengths)


@pytest.mark.parametrize("name", [*NAMES, *OTHERS, "llama"])
def test_the_caches_of_an_indexer_are_the_same_by_a_call_and_by_what_they_hold(backend, name):
    model = families.build(name)
    plain = lm_cache.make_prompt_cache(model)
    found = indexers_of_model(model, plain)
    assert all(c.empty() for c in plain)  # the call was another cache's
    model(mx.array([[1, 2, 3]]), cache=plain)
    assert found == indexers_of_tokens(plain)
    assert len(found) == {"deepseek_v32": 4, "glm_moe_dsa": 4, "minimax_m3_vl": 2}.get(name, 0)


@pytest.mark.parametrize("name", [*NAMES, *OTHERS])
def test_a_plain_prompt_cache_is_compressed_with_its_tokens(backend, name):
    model, config = families.build(name), TurboConfig("turbo4", 2, 4, 4)
    tokens = mx.array(np.random.default_rng(0).integers(0, 96, (1, 40)))
    plain, ours = lm_cache.make_prompt_cache(model), make_prompt_cache(model, config)
    model(tokens[:, :30], cache=plain)
    got = prompt_cache.compress(plain, config)
    assert describe(got) == describe(ours)
    model(tokens[:, :30], cache=ours)
    want = [to_numpy(model(tokens[:, i : i + 1], cache=ours)) for i in range(30, 40)]
    np.testing.assert_allclose(
        [to_numpy(model(tokens[:, i : i + 1], cache=got)) for i in range(30, 40)], want, atol=0.05
    )


@pytest.mark.parametrize("name", [n for n in ("deepseek_v32", "longcat_flash", "falcon_h1") if n in NAMES + OTHERS])
def test_bytes_and_tokens_inside_lists_are_counted(backend, name):
    model = families.build(name)
    plain, ours = lm_cache.make_prompt_cache(model), make_prompt_cache(model, TurboConfig("turbo4", 2, 4, 4))
    for cache in plain, ours:
        mx.eval(model(mx.array(np.random.default_rng(0).integers(0, 96, (1, 300))), cache=cache))
    summary = summarize(ours)
    assert (
        summary["nbytes"]
        == sum(c.nbytes for c in prompt_cache.flatten_caches(ours))
        < 0.5 * summary["uncompressed_nbytes"]
    )
    assert summary["uncompressed_nbytes"] == sum(c.nbytes for c in prompt_cache.flatten_caches(plain))
    assert summary["tokens"] == 300 and summary["scheme"] == "turbo4" and 4 < summary["packed_bits_per_value"] < 5
    assert metrics.resident_bits(ours) < metrics.resident_bits(plain) == 32 * 512 / 300


@pytest.mark.parametrize("name", NAMES)
def test_mlx_lm_s_batch_generation_writes_what_each_prompt_gets_alone(backend, name):
    generate = importlib.import_module("mlx_lm.generate")  # a plain import gives the function
    model, config, n_tokens = families.build(name), TurboConfig("turbo4", 2, 4, 4), 12
    prompts = [np.random.default_rng(b).integers(0, 96, n).tolist() for b, n in enumerate((70, 9, 33))]
    generator = generate.BatchGenerator(enable(model, config), max_tokens=n_tokens)
    got = {uid: [] for uid in generator.insert(prompts, [n_tokens] * len(prompts))}
    while sum(map(len, got.values())) < n_tokens * len(prompts):
        for answer in generator.next()[1]:
            got[answer.uid].append(answer.token)
    for tokens, prompt in zip(got.values(), prompts):
        cache = make_prompt_cache(model, config)
        assert tokens == [
            int(token)
            for token, _ in generate.generate_step(mx.array(prompt), model, prompt_cache=cache, max_tokens=n_tokens)
        ]
