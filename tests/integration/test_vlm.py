"""mlx-vlm's models, small and random, with our caches and with its own: sequences, images, batches, switching."""

import importlib
import random
import re
import sys
import types
import warnings
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.utils import dequantize_model
from support import pages
from support import vlm as models
from support.arrays import to_numpy
from support.caches import FAST_BACKENDS
from support.strategies import quick

import mlx_turbo
from mlx_turbo import BatchRotatingTurboKVCache, BatchTurboKVCache, RotatingTurboKVCache, TurboConfig, TurboKVCache
from mlx_turbo.cli.common import DEMO_MODEL
from mlx_turbo.integration import attention
from mlx_turbo.integration.prompt_cache import flatten_caches
from mlx_turbo.integration.vlm_caches import VlmBatchTurboKVCache, VlmTurboKVCache

TOKENS = mx.array(np.random.default_rng(0).integers(0, 80, (1, 60)))
FIRST = 24  # tokens of the first chunk, which see each other exactly
WITH_ENCODER = [name for name, (_, _, vision) in models.FAMILIES.items() if vision]
READS_STATE = ["gemma3n"]
pytestmark = pytest.mark.usefixtures("vlm")


@pytest.fixture(autouse=True)
def closed():
    yield
    attention.uninstall()


def exact_for_few(scheme):
    """Packs from the seventh token on."""
    return TurboConfig(scheme, sink=2, recent=4, block=4)


def make_prompt_cache(model):
    """mlx-vlm's."""
    return importlib.import_module("mlx_vlm.models.cache").make_prompt_cache(getattr(model, "language_model", model))


def walk(model, cache):
    """Logits [L, vocabulary]: of two chunks of a prompt, of single tokens, and of three at once."""
    part, logits, at = getattr(model, "language_model", model), [], 0
    for n in (FIRST, 11, *[1] * 6, 3, 1):
        logits.append(part(TOKENS[:, at : at + n], inputs_embeds=None, cache=cache).logits[0])
        at += n
    return to_numpy(mx.concatenate(logits))


@pytest.mark.parametrize("backend", FAST_BACKENDS, indirect=True)
@pytest.mark.parametrize("name", [name for name in models.FAMILIES if name not in READS_STATE])
def test_a_model_gives_the_logits_of_its_own_caches_as_closely_as_the_bits_allow(backend, name):
    model, errors = models.build(name), {}
    want = walk(model, make_prompt_cache(model))
    for scheme in ("turbo0", "turbo8", "turbo4"):
        cache = mlx_turbo.make_prompt_cache(model, exact_for_few(scheme))
        got = walk(model, cache)
        # the median over the tokens that see packed ones: of random weights, one token may differ by chance
        errors[scheme] = np.median((np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1))[FIRST:])
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4) if scheme == "turbo0" else None
        ours = [c.report() for c in cache if isinstance(c, TurboKVCache)]
        assert len(ours) >= 2 and all(report["packed"] >= 8 for report in ours)
    assert {report["attention"].split(":")[0] for report in ours} <= {"fused", "tiles"}, ours
    assert errors["turbo8"] < 0.1 and errors["turbo8"] < errors["turbo4"] / 4, errors


def test_decode_reaches_the_kernel(kernels):
    model = models.build("qwen3_vl")
    cache = mlx_turbo.make_prompt_cache(model, exact_for_few("turbo4"))
    for x in (TOKENS[:, :20], TOKENS[:, 20:21]):
        mx.eval(model.language_model(x, cache=cache).logits)
    assert [c.report()["attention"] for c in cache] == ["fused"] * 4


# ---- mlx-vlm's generation --------------------------------------------------------------------------------------------
def tokens_of(model, prompt, n=8, pixels=None, **options):
    """The n tokens that mlx-vlm generates greedily after a prompt."""
    step = importlib.import_module("mlx_vlm.generate").generate_step
    ids = mx.array([prompt])
    return [int(token) for token, _ in step(ids, model, pixels, mx.ones_like(ids), max_tokens=n, **options)]


@pytest.mark.parametrize("name", models.IMAGE_TOKENS)
def test_an_image_in_the_prompt_is_packed_like_text(name):
    """Its embeddings come from the encoder, Qwen's positions have three axes, gemma3's mask lets its tokens see each
    other; the prompt is cut through the image."""
    model, (n_tokens, pixels, options) = models.build(name), models.image(name)
    prompt = [*TOKENS[0, :13].tolist(), *[models.IMAGE_TOKEN] * n_tokens, *TOKENS[0, 13:40].tolist()]
    options["prefill_step_size"] = 15
    want = tokens_of(model, prompt, pixels=pixels, **options)
    mlx_turbo.enable(model, exact_for_few("turbo0"))
    cache, other = make_prompt_cache(model), make_prompt_cache(model)
    assert tokens_of(model, prompt, pixels=pixels, prompt_cache=cache, **options) == want
    assert {c.report()["tokens"] for c in cache if type(c) is VlmTurboKVCache} == {len(prompt) + 8}
    tokens_of(model, prompt, pixels=models.image(name, seed=1)[1], prompt_cache=other, **options)
    ours = next(i for i, c in enumerate(cache) if type(c) is VlmTurboKVCache)
    assert not mx.allclose(*(mx.array(c[ours].keys_and_values()[0][:, :, 13:17]) for c in (cache, other)))


def test_enable_serves_generate_stream_generate_and_batch_generate(vlm):
    """The embedded model, as mlx-vlm loads it."""
    model, processor = vlm.load(str(DEMO_MODEL))
    dequantize_model(model).set_dtype(mx.float32)  # what MLX's CPU is fastest in
    text = "Once upon a time, there was"
    want = vlm.generate(model, processor, text, max_tokens=40).text
    assert mlx_turbo.enable(model, "turbo8") is model
    assert vlm.generate(model, processor, text, max_tokens=40).text == want
    cache = make_prompt_cache(model)
    for _ in vlm.stream_generate(model, processor, text * 60, max_tokens=5, prompt_cache=cache):
        pass
    assert mlx_turbo.describe(cache).startswith("4 of 4 layers compressed; attention of the last step: ")
    assert all(c.report()["packed"] > 150 for c in cache)
    assert len(vlm.batch_generate(model, processor, prompts=[text, f"{text} a dog"], max_tokens=5).texts) == 2
    mlx_turbo.disable(model)
    assert not any(isinstance(c, TurboKVCache) for c in make_prompt_cache(model))


def test_max_kv_size_makes_windows(vlm):
    cache_module = importlib.import_module("mlx_vlm.models.cache")
    model = models.build("qwen3_5")
    mlx_turbo.enable(model, exact_for_few("turbo4"))
    cache = cache_module.make_prompt_cache(model.language_model, max_kv_size=20)
    windows = [c for c in cache if isinstance(c, RotatingTurboKVCache)]
    assert [(c.max_size, c.keep) for c in windows] == [(20, 4)] * 2
    walk(model, cache)
    short = cache_module.make_prompt_cache(model.language_model, max_kv_size=10)
    assert {type(c) for c in short} == {cache_module.ArraysCache, cache_module.RotatingKVCache}


def test_the_server_s_program_compresses_what_the_server_loads(vlm, monkeypatch):
    """The program of docs/vision.md, with the two names that it takes from mlx-vlm's server. The server itself needs
    packages that the tests do not have."""
    folder = Path(vlm.__file__).parent / "server"
    text = (folder / "generation.py").read_text()
    assert re.search(r"^from \.\.utils import .*\bload\b", text, re.MULTILINE) and "model, processor = load(" in text
    assert "from . import main" in (folder / "__main__.py").read_text()
    server, generation = types.ModuleType("mlx_vlm.server"), types.ModuleType("mlx_vlm.server.generation")
    generation.load = lambda path, adapter, *, trust: (models.build(path), adapter, trust)[:2]
    served = []
    server.main = lambda: served.extend(generation.load("llava", "processor", trust=True))
    server.generation = generation
    for module in (server, generation):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    ((_, program),) = pages.blocks("docs/vision.md", "py")
    exec(compile(program, "docs/vision.md", "exec"), {})
    model, processor = served
    assert processor == "processor" and all(isinstance(c, TurboKVCache) for c in make_prompt_cache(model))


# ---- what stays uncompressed -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", READS_STATE)
def test_a_model_that_reads_the_state_of_other_layers_is_left_alone_and_says_so(name):
    model = models.build(name)
    with pytest.warns(UserWarning, match="nothing is compressed: gemma3n reads the state"):
        cache = mlx_turbo.make_prompt_cache(model, exact_for_few("turbo4"))
    np.testing.assert_array_equal(walk(model, cache), walk(model, make_prompt_cache(model)))


def test_what_stays_uncompressed_is_named():
    cache_module = importlib.import_module("mlx_vlm.models.cache")
    model = models.build("qwen3_5")
    model.language_model.make_cache = lambda: [
        cache_module.ArraysCache(size=2),
        cache_module.KVCache(),
        cache_module.CacheList(cache_module.KVCache(), cache_module.KVCache()),
        cache_module.ChunkedKVCache(16),
        cache_module.RotatingKVCache(max_size=10),
        cache_module.SimpleKVCache(),
    ]
    said = mlx_turbo.describe(mlx_turbo.make_prompt_cache(model, exact_for_few("turbo4")))
    assert said == (
        "1 of 6 layers compressed; ArraysCache (1) stays uncompressed: states, which do not grow with the text; "
        "KVCache (2) stays uncompressed: it is in a CacheList of mlx-vlm; "
        "ChunkedKVCache (1) stays uncompressed: it holds only the newest chunk; "
        "RotatingKVCache (1) stays uncompressed: its window is so short that most of it would stay exact; "
        "SimpleKVCache (1) stays uncompressed: mlx_turbo does not know this kind of cache"
    )


def test_kv_bits_quantizes_a_compressed_cache_and_warns(vlm):
    model = models.build("llava")
    want = tokens_of(model, TOKENS[0].tolist(), kv_bits=8, kv_group_size=32, quantized_kv_start=0)
    mlx_turbo.enable(model, exact_for_few("turbo0"))
    with pytest.warns(UserWarning, match="becomes mlx-lm's QuantizedKVCache"):
        got = tokens_of(model, TOKENS[0].tolist(), kv_bits=8, kv_group_size=32, quantized_kv_start=0)
    assert got == want


def test_an_older_mlx_vlm_is_refused(vlm, monkeypatch):
    model = models.build("llava")
    monkeypatch.setattr(vlm, "__version__", "0.7.9")
    with pytest.raises(ImportError, match="needs mlx-vlm 0.7.10 or newer, but 0.7.9"):
        mlx_turbo.enable(model)
    assert not hasattr(model.language_model, "make_cache")


# ---- mlx-vlm's batches -----------------------------------------------------------------------------------------------
def answers(model, prompts, n_first, step, n=6, meanwhile=lambda: None):
    """The n tokens of each prompt from mlx-vlm's BatchGenerator. The first n_first prompts begin; the others come after
    `meanwhile()`, when some of these have three tokens. And the caches of the last step."""
    generator = importlib.import_module("mlx_vlm.generate").BatchGenerator(
        model.language_model, models.WITHOUT_TOKENIZER, max_tokens=n, prefill_step_size=step, compute_logprobs=False
    )
    tokens, uids, caches = {}, [], []

    def insert(some):
        features = [model.get_input_embeddings(mx.array([prompt]), None).to_dict() for prompt in some]
        options = [{key: value for key, value in f.items() if value is not None} for f in features]
        uids.extend(generator.insert(some, prompt_kwargs=options))

    insert(prompts[:n_first])
    while len(uids) < len(prompts) or any(len(tokens.get(uid, [])) < n for uid in uids):
        for response in generator.next()[1]:
            tokens.setdefault(response.uid, []).append(response.token)
        caches = list(generator._generation_batch.prompt_cache) or caches
        if len(uids) < len(prompts) and any(len(answer) >= 3 for answer in tokens.values()):
            meanwhile()
            insert(prompts[n_first:])
    return [tokens[uid] for uid in uids], caches


def random_prompts(lengths, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(80) for _ in range(n)] for n in lengths]


@pytest.mark.parametrize("name", WITH_ENCODER)
def test_rows_of_a_batch_get_the_tokens_of_mlx_vlm_s_caches(name):
    """Padding that spans chunks, and rows that join a batch: with turbo0 the same tokens, packed ones are attended."""
    model, prompts = models.build(name), random_prompts((30, 52, 7, 41))
    want, _ = answers(model, prompts, 2, 16)
    for scheme in ("turbo0", "turbo4"):
        mlx_turbo.enable(model, exact_for_few(scheme))
        got, cache = answers(model, prompts, 2, 16)
        ours = [c for c in flatten_caches(cache) if isinstance(c, TurboKVCache)]
        assert ours and all(isinstance(c, (BatchTurboKVCache, BatchRotatingTurboKVCache)) for c in ours)
        if scheme == "turbo0":
            assert got == want
        else:
            assert {c.report()["attention"].split(":")[0] for c in ours} <= {"fused", "tiles"}


PROMPTS = st.lists(st.integers(1, 45), min_size=2, max_size=4)


@pytest.mark.parametrize("name", ["qwen3_5", "gemma3"])
@settings(quick, max_examples=8)
@given(lengths=PROMPTS, n_first=st.integers(1, 4), step=st.sampled_from([5, 16]), seed=st.integers(0, 99))
def test_a_row_of_any_batch_gets_the_tokens_that_it_gets_alone(name, lengths, n_first, step, seed):
    model, prompts = built(name), random_prompts(lengths, seed)
    want = [tokens_of(model, prompt, 6) for prompt in prompts]
    mlx_turbo.enable(model, exact_for_few("turbo0"))
    try:
        assert answers(model, prompts, min(n_first, len(prompts)), step)[0] == want
    finally:
        mlx_turbo.disable(model)


BUILT = {}


def built(name):
    return BUILT.setdefault(name, models.build(name))


@pytest.mark.parametrize("schemes", [("turbo4", "turbo0"), ("turbo4", None), (None, "turbo0")])
def test_running_answers_go_on_with_the_scheme_they_began_with(schemes):
    model, prompts = models.build("qwen3_vl"), random_prompts((30, 41, 25))

    def switch(scheme):
        mlx_turbo.enable(model, exact_for_few(scheme)) if scheme else mlx_turbo.disable(model)

    want = []
    for scheme, some in zip(schemes, (prompts[:2], prompts[2:])):
        switch(scheme)
        want += answers(model, some, len(some), 64)[0]
    switch(schemes[0])
    assert answers(model, prompts, 2, 64, meanwhile=lambda: switch(schemes[1]))[0] == want


@pytest.mark.parametrize("name", ["plain first", "ours first"])
def test_a_batch_of_mlx_vlm_s_class_and_one_of_ours_do_not_mix_in_silence(name):
    """Outside of mlx-vlm's generator, which keeps them apart."""
    module = importlib.import_module("mlx_vlm.models.cache")
    plain, ours = module.BatchKVCache([0]), VlmBatchTurboKVCache(exact_for_few("turbo4"), [0])
    for cache in (plain, ours):
        cache.update_and_fetch(*[mx.random.normal((1, 2, 30, 32))] * 2)
    with pytest.raises((ValueError, TypeError)):
        plain.extend(ours) if name == "plain first" else ours.extend(plain)


def test_padding_that_mlx_vlm_sets_is_checked():
    batch = VlmTurboKVCache("turbo4").to_batch([0, 3])
    assert batch.offset.tolist() == [0, -3] and not batch.empty() and batch.left_padding is None
    batch.offset = mx.array([0, -5])
    assert batch.padding_to_come == [0, 5]
    with pytest.raises(ValueError, match=r"offset: got \[2, -5\], but the rows hold \[0, -5\] tokens"):
        batch.offset = mx.array([2, -5])
    mlx_lm_s = mlx_lm.models.cache.KVCache()
    with pytest.raises(ValueError, match="got a KVCache"):
        VlmTurboKVCache.merge([mlx_lm_s])


def test_nothing_warns_while_an_enabled_model_generates():
    model = models.build("mistral3")
    mlx_turbo.enable(model, exact_for_few("turbo4"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokens_of(model, TOKENS[0].tolist())
