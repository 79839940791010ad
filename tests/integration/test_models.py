"""The door into mlx-lm: the embedded model and small random ones, run by mlx-lm's own functions."""

import copy
import functools
import math
import warnings
from pathlib import Path

import mlx.core as mx
import mlx_lm
import mlx_lm.models.cache as lm_cache
import numpy as np
import pytest
from mlx_lm.generate import generate_step, maybe_quantize_kv_cache, speculative_generate_step
from support.arrays import to_numpy
from support.caches import FAST_BACKENDS, RotatingThatSeesKept, same
from support.models import DEMO_MODEL, family, gemma3, llama, tokens_of

import mlx_turbo
from mlx_turbo import (
    RotatingTurboKVCache,
    Scheme,
    TurboConfig,
    TurboKVCache,
    load_prompt_cache,
    save_prompt_cache,
)
from mlx_turbo.integration import attention
from mlx_turbo.integration.prompt_cache import describe, disable, enable, make_prompt_cache, reports

STORIES = (DEMO_MODEL / "stories.txt").read_text()
PROMPT = "Once upon a time, a little girl named Lily found a shiny stone in the garden. She"
SMALL = TurboConfig("turbo4", sink=4, recent=8, block=8)  # packs early, so that short texts are packed
pytestmark = pytest.mark.parametrize("backend", FAST_BACKENDS, indirect=True)


@pytest.fixture
def model(demo):
    """The embedded model; whatever a test enables is undone."""
    yield demo[0]
    disable(demo[0])
    assert not hasattr(demo[0], "make_cache")


@pytest.fixture
def tokenizer(demo):
    return demo[1]


def lfm2():
    return family(
        "lfm2",
        vocab_size=100,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        norm_eps=1e-5,
        conv_bias=False,
        conv_L_cache=3,
        block_dim=64,
        block_ff_dim=96,
        block_multiple_of=32,
        block_ffn_dim_multiplier=1.0,
        block_auto_adjust_ff_dim=False,
        full_attn_idxs=[1],
    )


def afm7():
    return family(
        "afm7", vocab_size=100, hidden_dim=128, num_layers=4, num_kv_reuse_layers=2, num_heads=2, num_kv_heads=1
    )


def logits_in_chunks(model, tokens, cache, chunk=7):
    """Logits [L, vocabulary] of tokens [1, L], each chunk attending to the cache of those before it."""
    out = [model(tokens[:, i : i + chunk], cache=cache) for i in range(0, tokens.shape[1], chunk)]
    return to_numpy(mx.concatenate(out, axis=1)[0])


def greedy(model, tokenizer, prompt=PROMPT, n=60, **kwargs):
    """Tokens of mlx_lm.stream_generate, the most likely one each time."""
    return [r.token for r in mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=n, **kwargs)]


# ---- make_prompt_cache ---------------------------------------------------------------------------------------
def test_every_plain_layer_gets_a_compressed_cache(backend, model):
    cache = make_prompt_cache(model, "turbo8v4")
    assert [type(c) for c in cache] == [TurboKVCache] * 4 and len({id(c) for c in cache}) == 4
    assert all(c.config == TurboConfig("turbo8v4") for c in cache)
    cache = make_prompt_cache(model, TurboConfig("turbo4", boundary=1))
    assert [c.config.scheme.key_bits for c in cache] == [8] + [4] * (len(cache) - 2) + [8]
    assert describe(cache) == (
        "4 of 4 layers compressed; keys: 4 bits in layers 1, 2, 8 bits in layers 0, 3; "
        "values: 4 bits in layers 0, 1, 2, 3"
    )
    assert make_prompt_cache(model)[0].config.scheme == Scheme(4, 4)
    assert make_prompt_cache(model, SMALL)[3].config == SMALL


@pytest.mark.parametrize("make", [make_prompt_cache, enable])
def test_an_unknown_scheme_is_refused_and_the_model_left_alone(backend, model, make):
    with pytest.raises(ValueError, match="scheme: got 'turbo7'"):
        make(model, "turbo7")
    assert not hasattr(model, "make_cache")


@pytest.mark.parametrize("head_dim", [64, 80, 30])
def test_turbo0_gives_mlx_lm_s_logits_bit_for_bit(backend, head_dim):
    model, tokens = llama(head_dim), tokens_of(60)
    want = logits_in_chunks(model, tokens, lm_cache.make_prompt_cache(model))
    got = logits_in_chunks(model, tokens, make_prompt_cache(model, TurboConfig("turbo0", 4, 8, 8)))
    assert same(got, want)


@pytest.mark.parametrize(
    "head_dim, scheme, close",
    [(64, "turbo8", 0.012), (80, "turbo8", 0.012), (64, "turbo4", 0.15), (80, "turbo4", 0.15)],
)
def test_logits_of_small_models_stay_close(backend, head_dim, scheme, close):
    model, tokens = llama(head_dim), tokens_of(120)
    want = logits_in_chunks(model, tokens, lm_cache.make_prompt_cache(model))
    cache = make_prompt_cache(model, TurboConfig(scheme, 4, 8, 8))
    got = logits_in_chunks(model, tokens, cache)
    assert cache[1].report()["packed"] >= 100
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert 0 < error < close, error


@pytest.mark.parametrize("head_dim", [8, 16, 30])
@pytest.mark.parametrize("scheme", ["turbo4", "auto"])
def test_layers_of_a_head_dim_that_cannot_be_packed_stay_exact_and_are_named(backend, door, head_dim, scheme, tmp_path):
    model, tokens = llama(head_dim), tokens_of(120)
    want = logits_in_chunks(model, tokens, lm_cache.make_prompt_cache(model))
    cache = make_prompt_cache(model, TurboConfig.of(scheme, sink=4, recent=8, block=8))
    got = logits_in_chunks(model, tokens, cache)
    assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)
    why = f"head_dim {head_dim}, packed are multiples of 4 from 32 to 576"
    assert describe(cache) == "0 of 2 layers compressed" + "".join(
        f"; {side} of layers 0, 1 stay exact: {why}" for side in ("keys", "values")
    )
    assert cache[0].report()["exact"] == {"keys": why, "values": why} and cache[0].report()["scheme"] == "turbo0"
    save_prompt_cache(tmp_path / "exact", cache)
    batch = [c.merge([c, type(c)(c.config), c]) for c in cache]
    for other in load_prompt_cache(tmp_path / "exact.safetensors"), [c.extract(2) for c in batch]:
        assert describe(other) == describe(cache)
        for a, b in zip(cache, other):
            assert mx.array_equal(a.keys, b.keys)
    for row in batch[0].extract(1), batch[0].extract(0):  # an empty one packs what can be packed
        row.trim(200)
        for n in 300, 1:
            row.update_and_fetch(*(mx.zeros((1, 2, n, 32)) for _ in range(2)))
        assert row.report()["exact"] == {} and row.report()["packed"] > 0


@pytest.mark.parametrize(
    "scheme, windows, others", [("auto", "turbo8", "turbo4v5"), ("turbo3v4", "turbo3v4", "turbo3v4")]
)
def test_auto_gives_more_bits_to_windows_and_to_values_beside_them(backend, door, tmp_path, scheme, windows, others):
    model = gemma3(sliding_window=64)
    options = dict(sink=4, recent=8, block=8)
    cache = make_prompt_cache(model, TurboConfig.of(scheme, **options))
    model(tokens_of(300), cache=cache)
    model(tokens_of(300)[:, :100], cache=cache)
    for layer in cache:
        is_window = isinstance(layer, RotatingTurboKVCache)
        assert layer.config.scheme.name == (windows if is_window else others)
        assert (layer.report()["auto"] is None) == (is_window or scheme != "auto")
        if is_window:
            assert layer.report()["scheme"] == windows
    assert f"windows of 64 tokens{' at turbo8' * (windows == 'turbo8')})" in describe(cache)
    save_prompt_cache(tmp_path / "file", cache)
    loaded = load_prompt_cache(tmp_path / "file.safetensors")
    assert [c.config for c in loaded] == [c.config for c in cache] and describe(loaded)[:45] == describe(cache)[:45]
    limited = make_prompt_cache(llama(64), TurboConfig.of(scheme, **options), max_kv_size=128)
    assert {c.config for c in limited} == {TurboConfig.of(scheme, **options)}  # a user's limit is no sliding window


def test_a_side_that_can_be_packed_is_packed_beside_one_that_cannot(backend, door):
    rng = np.random.default_rng(0)
    for dims, exact in (((64, 16), "values"), ((16, 64), "keys")):
        cache = TurboKVCache("turbo8", sink=2, recent=4, block=4)
        tokens = [mx.array(rng.standard_normal((1, 2, 60, d)), mx.float32) for d in dims]
        fetched = cache.update_and_fetch(*tokens)
        fetched = cache.update_and_fetch(*(x[:, :, :1] for x in tokens))
        queries = mx.array(rng.standard_normal((1, 4, 1, dims[0])), mx.float32)
        got = attention.scaled_dot_product_attention(queries, *fetched, cache, 0.2)
        tokens = [mx.concatenate([x, x[:, :, :1]], axis=2) for x in tokens]
        want = mx.fast.scaled_dot_product_attention(queries, *tokens, scale=0.2)
        assert np.abs(to_numpy(got - want)).max() < 0.05 and list(cache.report()["exact"]) == [exact]


# ---- what is compressed, and what not ------------------------------------------------------------------------
@pytest.mark.parametrize("config", [TurboConfig("turbo0", 4, 8, 8), TurboConfig("turbo0", 4, 4, 4)])
def test_sliding_window_layers_are_windows_or_stay_and_are_reported(backend, config):
    model, tokens, windows = gemma3(), tokens_of(60), config.recent == 4  # of 16 tokens: 2 * (4 + 4)
    cache = make_prompt_cache(model, config)
    kind = "RotatingTurboKVCache" if windows else "RotatingKVCache"
    assert kinds(cache) == 2 * (2 * [kind] + ["TurboKVCache"])
    assert describe(cache) == (
        "6 of 6 layers compressed (4 of them windows of 16 tokens)"
        if windows
        else "2 of 6 layers compressed; RotatingKVCache (4) stays uncompressed: its window is so short that most of it "
        "would stay exact"
    )
    batch = [c.merge([c, c]) for c in make_prompt_cache(model, config)]
    assert describe(batch) == describe(cache).replace("RotatingKVCache", "BatchRotatingKVCache")
    assert [r is None for _, _, r, _ in reports(cache)] == 2 * [not windows, not windows, False]
    want = logits_in_chunks(model, tokens, model.make_cache())
    np.testing.assert_allclose(logits_in_chunks(model, tokens, cache), want, rtol=0, atol=1e-4 * windows)
    assert reports(cache)[2][2]["packed"] > 40
    got = logits_in_chunks(model, tokens, make_prompt_cache(model, SMALL))
    assert 0 < np.linalg.norm(got - want) / np.linalg.norm(want) < 0.2


def test_state_space_layers_stay_and_are_reported(backend):
    model, tokens = lfm2(), tokens_of(60)
    cache = make_prompt_cache(model, TurboConfig("turbo0", 4, 8, 8))
    assert [type(c).__name__ for c in cache] == ["ArraysCache", "TurboKVCache", "ArraysCache"]
    assert describe(cache) == (
        "1 of 3 layers compressed; ArraysCache (2) stays uncompressed: states, which do not grow with the text"
    )
    assert same(logits_in_chunks(model, tokens, cache), logits_in_chunks(model, tokens, model.make_cache()))


def test_layers_that_share_another_layer_s_keys_and_values_get_them(backend):
    model, tokens = afm7(), tokens_of(60)
    want = logits_in_chunks(model, tokens, model.make_cache())
    if not hasattr(lm_cache.KVCache, "keys_and_values"):  # mlx-lm 0.31: the layers want a KVCache's state
        with pytest.warns(UserWarning, match="nothing is compressed: afm7 needs a newer mlx-lm") as caught:
            cache = make_prompt_cache(model)
        assert caught[0].filename == __file__
        assert kinds(cache) == ["KVCache"] * 2 and same(logits_in_chunks(model, tokens, cache), want)
        return
    cache = make_prompt_cache(model, TurboConfig("turbo0", 4, 8, 8))
    assert kinds(cache) == ["TurboKVCache"] * 2
    assert same(logits_in_chunks(model, tokens, cache), want)
    got = logits_in_chunks(model, tokens, make_prompt_cache(model, SMALL))
    assert 0 < np.linalg.norm(got - want) / np.linalg.norm(want) < 0.2


def test_kept_layers_are_logged(backend, caplog):
    with caplog.at_level("INFO", "mlx_turbo"), warnings.catch_warnings():
        warnings.simplefilter("error")
        make_prompt_cache(gemma3())
    assert "2 of 6 layers compressed" in caplog.text and "RotatingKVCache (4)" in caplog.text


def test_a_short_rotating_cache_of_max_kv_size_stays_and_a_warning_says_so(backend, model):
    with pytest.warns(UserWarning, match="nothing is compressed: .*RotatingKVCache, neither a .*long window") as caught:
        cache = make_prompt_cache(model, "turbo4", max_kv_size=32)
    assert [(type(c), c.max_size, c.keep) for c in cache] == 4 * [(lm_cache.RotatingKVCache, 32, 4)]
    assert caught[0].filename == __file__
    assert describe(cache) == (
        "0 of 4 layers compressed; RotatingKVCache (4) stays uncompressed: its window is so short that most of it "
        "would stay exact"
    )


def test_max_kv_size_gives_windows_that_keep_the_first_tokens(backend, model, tokenizer):
    tokens = mx.array(tokenizer.encode(STORIES)[:160])[None]
    want = logits_in_chunks(model, tokens, [RotatingThatSeesKept(36, 4) for _ in model.layers])
    for config, close in (TurboConfig("turbo0", 2, 8, 8), 1e-5), (TurboConfig("turbo8", 2, 8, 8), 0.03):
        cache = make_prompt_cache(model, config, max_kv_size=36)
        assert [(type(c), c.max_size, c.keep) for c in cache] == 4 * [(RotatingTurboKVCache, 36, 4)]
        got = logits_in_chunks(model, tokens, cache)
        assert np.linalg.norm(got - want) / np.linalg.norm(want) < close
        assert cache[0].offset == 160 and cache[0].report()["tokens"] == 36


def test_a_compressed_model_gives_no_warning(backend, model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_prompt_cache(model)


# ---- enable and disable --------------------------------------------------------------------------------------
def kinds(cache):
    return [type(c).__name__ for c in cache]


def test_enable_reaches_mlx_lm_s_own_prompt_cache_and_disable_undoes_it(backend, model):
    assert enable(model, "turbo8v4") is model
    cache = lm_cache.make_prompt_cache(model)
    assert kinds(cache) == ["TurboKVCache"] * 4 and cache[0].config.scheme == Scheme(8, 4)
    assert kinds(make_prompt_cache(model, "turbo2")) == ["TurboKVCache"] * 4
    assert make_prompt_cache(model, "turbo2")[0].config.scheme == Scheme(2, 2)
    assert disable(model) is model and not hasattr(model, "make_cache")
    assert kinds(lm_cache.make_prompt_cache(model)) == ["KVCache"] * 4
    assert disable(model) is model  # twice does no harm


def test_enable_twice_changes_the_configuration_and_one_disable_is_enough(backend, model):
    enable(model, "turbo8")
    enable(model, SMALL)
    assert {c.config for c in lm_cache.make_prompt_cache(model)} == {SMALL}
    disable(model)
    assert kinds(lm_cache.make_prompt_cache(model)) == ["KVCache"] * 4


def test_enable_reaches_this_model_object_only(backend):
    one, other = gemma3(), gemma3()
    enable(one)
    assert "TurboKVCache" in kinds(lm_cache.make_prompt_cache(one))
    assert "TurboKVCache" not in kinds(lm_cache.make_prompt_cache(other))


@pytest.mark.parametrize("make", [gemma3, lfm2])
def test_enable_keeps_what_a_family_s_make_cache_chooses(backend, make):
    model = make()
    before = kinds(lm_cache.make_prompt_cache(model))
    for config in ("turbo4", "turbo8"):
        enable(model, config)
        want = ["TurboKVCache" if k == "KVCache" else k for k in before]
        assert kinds(lm_cache.make_prompt_cache(model)) == kinds(model.make_cache()) == want != before
    disable(model)
    assert kinds(lm_cache.make_prompt_cache(model)) == before
    assert "make_cache" not in vars(model)


def test_a_make_cache_set_on_the_instance_is_used_and_comes_back(backend, model):
    def own():
        return [lm_cache.KVCache(), lm_cache.RotatingKVCache(8), lm_cache.KVCache(), lm_cache.KVCache()]

    model.make_cache = own
    want = ["TurboKVCache", "RotatingKVCache", "TurboKVCache", "TurboKVCache"]
    assert kinds(make_prompt_cache(model)) == want and model.make_cache is own
    for _ in range(2):
        enable(model)
        assert kinds(lm_cache.make_prompt_cache(model)) == want
    disable(model)
    assert model.make_cache is own
    disable(model)
    assert model.make_cache is own
    del model.make_cache


def test_a_copy_of_an_enabled_model_is_enabled_too(backend):
    model = enable(llama(), SMALL)
    twin = copy.deepcopy(model)
    disable(model)
    assert kinds(lm_cache.make_prompt_cache(twin)) == ["TurboKVCache"] * 2
    assert kinds(lm_cache.make_prompt_cache(model)) == ["KVCache"] * 2


# ---- text ----------------------------------------------------------------------------------------------------
def perplexity(model, tokens, cache, chunk=32):
    log_p = []
    for i in range(0, tokens.shape[1] - 1, chunk):
        x, y = tokens[:, i : i + chunk], tokens[:, i + 1 : i + chunk + 1]
        logits = model(x, cache=cache)[:, : y.shape[1]]
        log_p.append(mx.take_along_axis(logits, y[..., None], -1)[..., 0] - mx.logsumexp(logits, -1))
    return math.exp(-mx.concatenate(log_p, axis=1).mean().item())


@pytest.fixture(scope="module")
def held_out(demo):
    """545 tokens of stories, and the embedded model's perplexity on them with mlx-lm's cache."""
    model, tokenizer = demo
    tokens = mx.array(tokenizer.encode(STORIES)[:545])[None]
    return tokens, perplexity(model, tokens, lm_cache.make_prompt_cache(model))


@pytest.mark.parametrize("scheme, within", [("turbo0", 0), ("turbo8", 0.001), ("turbo8v4", 0.01), ("turbo4", 0.01)])
def test_perplexity_on_stories_stays(backend, model, held_out, scheme, within):
    tokens, want = held_out
    cache = make_prompt_cache(model, TurboConfig(scheme, sink=4, recent=32, block=32))
    got = perplexity(model, tokens, cache)
    assert cache[0].report()["packed"] > 470
    print(f"{scheme}: {got / want - 1:+.5f}")
    assert 3 < want < 15 and abs(got / want - 1) <= within, (got, want)


def test_damage_shows_in_the_perplexity(backend, model, held_out):
    """Else the test above would not notice a cache that never packs, or a model that does not look at it."""
    tokens, want = held_out
    got = perplexity(model, tokens, make_prompt_cache(model, TurboConfig("turbo2", 0, 0, 1, scale="norm")))
    assert 1.01 < got / want < 1.5, got / want


def test_greedy_text_with_turbo0_is_mlx_lm_s(backend, model, tokenizer):
    want = greedy(model, tokenizer)
    assert len(want) == 60
    assert greedy(model, tokenizer, prompt_cache=make_prompt_cache(model, TurboConfig("turbo0", 4, 8, 8))) == want


def test_greedy_text_with_turbo8_starts_as_mlx_lm_s(backend, model, tokenizer):
    want, cache = greedy(model, tokenizer), make_prompt_cache(model, TurboConfig("turbo8", 4, 8, 8))
    got = greedy(model, tokenizer, prompt_cache=cache)
    assert got[:30] == want[:30] and cache[0].report()["packed"] > 50


def test_an_enabled_model_generates_with_the_compressed_cache(backend, model, tokenizer):
    want = greedy(model, tokenizer, prompt_cache=make_prompt_cache(model, SMALL))
    enable(model, SMALL)
    assert greedy(model, tokenizer) == want
    assert mlx_lm.generate(model, tokenizer, PROMPT, max_tokens=60) == tokenizer.decode(want).lstrip()
    tokens = mx.array(tokenizer.encode(PROMPT))
    assert [t for t, _ in generate_step(tokens, model, max_tokens=60)] == want


@pytest.mark.parametrize("config", [TurboConfig("turbo0", 4, 8, 8), TurboConfig("turbo8", 4, 8, 8)], ids=str)
def test_kv_bits_is_honoured_beside_ours_and_one_warning_names_both(backend, model, tokenizer, config):
    options = dict(kv_bits=8, kv_group_size=32, quantized_kv_start=30)
    want, cache = greedy(model, tokenizer, **options), make_prompt_cache(model, config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        got = greedy(model, tokenizer, prompt_cache=cache, **options)
    assert got[:30] == want[:30] and (config.name != "turbo0" or got == want)
    assert {type(c) for c in cache} == {lm_cache.QuantizedKVCache} and {c.bits for c in cache} == {8}
    (message,) = [str(w.message) for w in caught]
    assert config.name in message and "QuantizedKVCache (8 bits" in message
    assert (
        describe(cache)
        == "0 of 4 layers compressed; QuantizedKVCache (4) stays uncompressed: kv_bits made mlx-lm quantize it"
    )


def test_kv_bits_is_refused_for_windows_as_mlx_lm_refuses_it(backend):
    model = gemma3(sliding_window=256)
    prompt, options = mx.arange(20), dict(kv_bits=8, kv_group_size=32, quantized_kv_start=0)
    for cache in model.make_cache(), make_prompt_cache(model, SMALL):
        with pytest.raises(NotImplementedError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            next(generate_step(prompt, model, prompt_cache=cache, **options))


def test_kv_bits_reaches_no_cache_in_a_cache_list_mlx_lm_s_or_ours(backend):
    for kind in lm_cache.KVCache, TurboKVCache:
        caches = [lm_cache.CacheList(kind(), kind())]
        maybe_quantize_kv_cache(caches, 0, 64, 8)
        assert [type(c) for c in caches[0].caches] == [kind, kind]


def test_the_prompt_s_step_size_changes_little(backend, model, tokenizer):
    """A chunk sees itself exactly, so logits depend on the step size within what packing costs."""
    tokens = mx.array(tokenizer.encode(STORIES)[:150])
    logits = [
        next(generate_step(tokens, model, prompt_cache=make_prompt_cache(model, SMALL), prefill_step_size=step))[1]
        for step in (16, 2048)
    ]
    assert mx.abs(mx.exp(logits[0]) - mx.exp(logits[1])).max().item() < 0.1


@functools.lru_cache(None)
def peak_of_a_prompt(scheme):
    """(peak bytes of 3,072 tokens in chunks of 512 beyond the model, bytes of a layer's keys and values): four layers
    of 2 heads of 64, with mlx-lm's own caches if scheme is None."""
    n, model = 3072, llama(num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2)
    cache = make_prompt_cache(model, scheme) if scheme else lm_cache.make_prompt_cache(model)
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for _ in generate_step(tokens_of(n)[0], model, max_tokens=2, prompt_cache=cache, prefill_step_size=512):
        pass
    return mx.get_peak_memory() - before, 2 * n * 2 * 64 * 4


@pytest.mark.parametrize("scheme", ["turbo8", "turbo4"])
def test_a_long_prompt_takes_no_more_memory_than_an_uncompressed_one_and_a_layer(backend, scheme):
    (ours, layer), (plain, _) = peak_of_a_prompt(scheme), peak_of_a_prompt(None)
    assert ours <= plain + layer


def test_speculative_generation_equals_plain_generation(backend, model, tokenizer):
    """The draft is the same model: nearly all of its tokens are accepted, rejected ones are trimmed away."""
    prompt, n = mx.array(tokenizer.encode(PROMPT)), 40
    # recent > num_draft_tokens: what is trimmed has not been packed yet
    config = TurboConfig("turbo8", 4, 8, 8)
    want = greedy(model, tokenizer, n=n, prompt_cache=make_prompt_cache(model, config))
    enable(model, config)
    got = list(speculative_generate_step(prompt, model, model, num_draft_tokens=3, max_tokens=n))
    assert [int(t) for t, _, _ in got] == want
    assert sum(from_draft for _, _, from_draft in got) > n // 2


@pytest.mark.parametrize("scheme", ["turbo0", "turbo4"])
def test_speculative_generation_with_a_bad_draft_trims_and_goes_on(backend, model, tokenizer, scheme):
    draft = family(
        "llama",
        hidden_size=32,
        num_hidden_layers=1,
        intermediate_size=32,
        num_attention_heads=1,
        rms_norm_eps=1e-5,
        vocab_size=2048,
    )
    prompt, config = mx.array(tokenizer.encode(PROMPT)), TurboConfig(scheme, 4, 8, 8)
    caches = [make_prompt_cache(m, config) for m in (model, draft)]
    got = list(
        speculative_generate_step(
            prompt, model, draft, num_draft_tokens=4, max_tokens=30, prompt_cache=caches[0] + caches[1]
        )
    )
    assert not any(from_draft for _, _, from_draft in got[:5])
    want = greedy(model, tokenizer, n=30)
    assert [int(t) for t, _, _ in got][: 30 if scheme == "turbo0" else 10] == want[: 30 if scheme == "turbo0" else 10]
    assert {c.offset for c in caches[0]} == {prompt.size + 29}


# ---- caches that are kept ------------------------------------------------------------------------------------
def prefilled(model, tokens, config=SMALL):
    cache = make_prompt_cache(model, config)
    model(mx.array(tokens)[None], cache=cache)
    mx.eval([c.state for c in cache])
    return cache


@pytest.mark.parametrize("n", [3, 40])
def test_a_saved_prompt_cache_goes_on_as_the_original(backend, model, tokenizer, tmp_path, n):
    tokens = tokenizer.encode(PROMPT * 3)
    cache = prefilled(model, tokens[:n])
    file = str(tmp_path / "cache.safetensors")
    lm_cache.save_prompt_cache(file, cache, {"model": "demo"})
    loaded, metadata = lm_cache.load_prompt_cache(file, return_metadata=True)
    assert metadata == {"model": "demo"} and kinds(loaded) == kinds(cache)
    assert [c.config for c in loaded] == [SMALL] * 4 and [c.offset for c in loaded] == [n] * 4
    want = greedy(model, tokenizer, tokens[n : n + 9], prompt_cache=cache)
    assert greedy(model, tokenizer, tokens[n : n + 9], prompt_cache=loaded) == want


def test_caches_of_all_kinds_are_saved_and_loaded(backend, tmp_path):
    model, tokens, file = gemma3(), tokens_of(40), str(tmp_path / "cache.safetensors")
    cache = make_prompt_cache(model, SMALL)
    model(tokens, cache=cache)
    lm_cache.save_prompt_cache(file, cache)
    loaded = lm_cache.load_prompt_cache(file)
    assert kinds(loaded) == kinds(cache)
    assert same(to_numpy(model(tokens[:, :5], cache=loaded)), to_numpy(model(tokens[:, :5], cache=cache)))


def test_a_saved_empty_cache_is_loaded_as_one(backend, model, tmp_path):
    file = str(tmp_path / "cache.safetensors")
    lm_cache.save_prompt_cache(file, make_prompt_cache(model, SMALL))
    loaded = lm_cache.load_prompt_cache(file)
    assert all(c.empty() and c.config == SMALL for c in loaded) and len(loaded) == 4


@pytest.mark.parametrize("config, exact", [(TurboConfig("turbo0", 4, 8, 8), True), (SMALL, False)])
def test_a_server_copies_a_cache_trims_it_to_the_common_prefix_and_goes_on(backend, model, tokenizer, config, exact):
    tokens = tokenizer.encode(STORIES)
    prefix, first, second = tokens[:60], tokens[60:75], tokens[200:215]
    kept = prefilled(model, prefix + first, config)
    want = greedy(model, tokenizer, prefix + second, n=20)
    for _ in range(2):  # the kept cache serves again and again
        cache = copy.deepcopy(kept)
        assert lm_cache.can_trim_prompt_cache(cache) and lm_cache.trim_prompt_cache(cache, len(first)) == len(first)
        got = greedy(model, tokenizer, second, n=20, prompt_cache=cache)
        assert got == want or not exact and got[:3] == want[:3]
        assert cache[0].offset >= len(prefix + second) + 19  # generate looks one token ahead
    assert {c.offset for c in kept} == {75}


def test_mlx_lm_s_prompt_store_keeps_and_finds_compressed_caches(backend, model, tokenizer):
    tokens = tokenizer.encode(STORIES)[:70]
    store = lm_cache.LRUPromptCache()
    store.insert_cache("demo", tokens, prefilled(model, tokens))
    assert store.nbytes == sum(c.nbytes for c in prefilled(model, tokens))
    cache, rest = store.fetch_nearest_cache("demo", tokens[:50] + [1, 2, 3])
    assert rest == [1, 2, 3] and [c.offset for c in cache] == [50] * 4
    greedy(model, tokenizer, rest, n=5, prompt_cache=cache)
    cache, rest = store.fetch_nearest_cache("demo", tokens + [5])
    assert rest == [5] and [c.offset for c in cache] == [70] * 4


def test_importing_mlx_turbo_does_not_import_mlx_lm(backend):
    import subprocess
    import sys

    code = "import sys, mlx_turbo; sys.exit('mlx_lm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(mlx_turbo.__file__).parents[1]).returncode == 0
