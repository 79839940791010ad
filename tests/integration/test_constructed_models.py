"""The constructed models do what they claim: the same function (or the stated other one), another cache content."""

import dataclasses
from pathlib import Path

import mlx.core as mx
import mlx_lm.models.base as base
import numpy as np
import pytest
from mlx_lm import load
from mlx_lm.models.cache import KVCache
from mlx_lm.utils import dequantize_model
from support import constructed_models as made

from mlx_turbo import TurboConfig, make_prompt_cache
from mlx_turbo.integration import attention
from mlx_turbo.quality.metrics import kl_divergence, log_probabilities

DEMO_MODEL = Path(__file__).resolve().parents[2] / "mlx_turbo" / "demo_model"
N_TOKENS, CHUNK = 128, 32
EXACT = TurboConfig("turbo0", sink=4, recent=16, block=16)
SAME_FUNCTION = {  # name -> (construction, mean KLD in nats that float32's rounding of large keys may cause)
    "constant bias": (lambda m: made.key_bias(m, where="constant"), 1e-6),
    "low bias": (lambda m: made.key_bias(m, where="low"), 0),
    "middle bias": (lambda m: made.key_bias(m, [1, 2], 900, "middle"), 0),
    "bad ends": (made.bad_ends, 0),
    "outlier channel": (made.outlier_channel, 1e-7),
    "near-zero keys": (made.near_zero_keys, 0),
    "unequal channels": (made.unequal_channels, 1e-6),
    "value bias": (made.value_bias, 1e-6),
    "outlier, near-zero and bias": (lambda m: made.key_bias(made.near_zero_keys(made.outlier_channel(m))), 1e-7),
}


@pytest.fixture(scope="module")
def demo():
    """(model in float32, tokens [1, N_TOKENS] of held-out stories)"""
    model, tokenizer = load(str(DEMO_MODEL))
    model = dequantize_model(model)
    model.set_dtype(mx.float32)
    return model, mx.array(tokenizer.encode((DEMO_MODEL / "stories.txt").read_text()[:2000])[:N_TOKENS])[None]


@pytest.fixture(scope="module")
def plain(demo):
    return read(*demo)


@pytest.fixture(scope="module")
def plain_keys(demo):
    return cached(*demo)


def read(model, tokens, cache=None):
    """Log probabilities [N_TOKENS, vocabulary] of tokens read in chunks through the cache (None: mlx-lm's own)."""
    cache = [KVCache() for _ in model.layers] if cache is None else cache
    logits = [model(tokens[:, i : i + CHUNK], cache=cache) for i in range(0, tokens.shape[1], CHUNK)]
    return log_probabilities(mx.concatenate(logits, axis=1)[0])


def kld(log_p, log_q):
    return kl_divergence(log_p, log_q).mean().item()


def cached(model, tokens, side=0):
    """Keys (side 0) or values (1) [n_kv_heads, N_TOKENS, D] of each layer, as the cache gets them."""
    cache = [KVCache() for _ in model.layers]
    mx.eval(model(tokens, cache=cache))
    return [np.array(c.state[side][0, :, : c.offset]) for c in cache]


def norms(keys):
    return np.linalg.norm(keys, axis=-1)


@pytest.mark.parametrize("name", SAME_FUNCTION)
def test_the_function_is_the_plain_model_s(demo, plain, name):
    model, tokens = demo
    construct, most = SAME_FUNCTION[name]
    assert abs(kld(plain, read(construct(model), tokens))) <= most


def test_the_given_model_is_left_alone(demo, plain):
    model, tokens = demo
    made.key_bias(made.attention_sinks(model), where="all")
    assert not any(isinstance(layer.self_attn, made.ConstructedAttention) for layer in model.layers)
    assert mx.array_equal(read(model, tokens), plain).item()


@pytest.mark.parametrize("where", ["constant", "low", "all"])
def test_keys_carry_a_bias_of_the_norm_in_the_chosen_layers_only(demo, plain_keys, where):
    model, tokens = demo
    plain, biased = plain_keys, cached(made.key_bias(model, [0, 2], 600, where), tokens)
    for i in (0, 2):
        np.testing.assert_allclose(norms(biased[i]), 600, rtol=0.05)
    for i in (1, 3):
        np.testing.assert_allclose(biased[i], plain[i], atol=1e-4)


@pytest.mark.parametrize(
    "where,first,last",
    [("constant", 0.99, 1), ("low", 0.99, 1), ("middle", 0.5, 0.98), ("high", 0, 0.1), ("all", 0.5, 0.9)],
)
def test_a_bias_turns_as_fast_as_its_frequencies(demo, where, first, last):
    """||mean||^2 / mean ||k||^2 over the tokens: what a mean can take away."""
    model, tokens = demo
    keys = cached(made.key_bias(model, [0], 600, where), tokens)[0]
    share = norms(keys.mean(1)) ** 2 / (norms(keys) ** 2).mean(1)
    assert (first <= share).all() and (share <= last).all()


def test_a_turning_bias_does_not_depend_on_how_the_text_is_cut(demo):
    model, tokens = demo
    model = made.key_bias(model, where="all")
    cache = [KVCache() for _ in model.layers]
    for i in range(0, N_TOKENS, CHUNK):
        model(tokens[:, i : i + CHUNK], cache=cache)
    for c, whole in zip(cache, cached(model, tokens)):
        np.testing.assert_allclose(np.array(c.state[0][0, :, : c.offset]), whole, atol=1e-3)


def test_a_turning_bias_in_the_model_s_own_dims_changes_the_function(demo, plain):
    model, tokens = demo
    assert kld(plain, read(made.key_bias(model, where="all", own_dims=True), tokens)) > 1


def test_bad_ends_are_the_first_and_the_last_layer(demo):
    model, tokens = demo
    sizes = [norms(k).mean() for k in cached(made.bad_ends(model), tokens)]
    assert sizes[0] == pytest.approx(605, rel=0.01) and sizes[3] == pytest.approx(921, rel=0.01)
    assert max(sizes[1:3]) < made.MEDIAN_BIAS


def test_an_outlier_channel_is_a_rope_pair(demo, plain_keys):
    model, tokens = demo
    for plain, outlier in zip(plain_keys, cached(made.outlier_channel(model, factor=50, pair=40), tokens)):
        ratio = np.abs(outlier).mean((0, 1)) / np.abs(plain).mean((0, 1))
        np.testing.assert_allclose(ratio[[40, 104]], 50, rtol=0.05)
        assert np.median(ratio) == pytest.approx(1, rel=0.05)


def test_one_head_s_keys_are_near_zero(demo):
    model, tokens = demo
    for keys in cached(made.near_zero_keys(model, head=1), tokens):
        assert 0 < norms(keys[1]).max() < 2e-6 and norms(keys[0]).min() > 1


def test_values_carry_a_bias(demo):
    model, tokens = demo
    sizes = [norms(v).mean() for v in cached(made.value_bias(model, [1], norm=500), tokens, side=1)]
    assert sizes[1] == pytest.approx(500, rel=0.05) and sizes[0] < 50


def test_attention_sinks_are_another_function_and_take_weight(demo, plain):
    model, tokens = demo
    assert kld(plain, read(made.attention_sinks(model), tokens)) > 0.01
    assert kld(plain, read(made.attention_sinks(model, logit=-1e4), tokens)) < 1e-7


@pytest.mark.parametrize("construct", [made.key_bias, made.near_zero_keys, made.value_bias, made.attention_sinks])
def test_a_cache_that_leaves_everything_exact_gives_the_same(demo, construct):
    model, tokens = demo
    model = construct(model)
    assert abs(kld(read(model, tokens), read(model, tokens, make_prompt_cache(model, EXACT)))) < 1e-6


def test_our_attention_sees_every_call(demo, monkeypatch):
    model, tokens = demo
    model, seen = made.attention_sinks(made.key_bias(model)), []
    cache = make_prompt_cache(model, TurboConfig("turbo4", sink=4, recent=16, block=16))
    ours = attention.scaled_dot_product_attention

    def remember(queries, keys, values, **options):
        seen.append(attention.view_of(keys, values) is not None)
        return ours(queries, keys, values, **options)

    monkeypatch.setattr(base, "scaled_dot_product_attention", remember)
    read(model, tokens, cache)
    assert len(seen) == len(model.layers) * N_TOKENS // CHUNK and all(seen)


def test_a_bias_that_no_mean_takes_away_is_a_catastrophe_at_4_bits(demo):
    """The reason for all this: should another cache format make it false, the models no longer try it. Balanced
    channels do make it false: they are left out here."""
    model, tokens = demo
    model, config = made.key_bias(model, where="high"), TurboConfig("turbo4", sink=4, recent=16, block=16)
    want, errors = read(model, tokens), {}
    for balance in (False, True):
        cache = make_prompt_cache(model, dataclasses.replace(config, balance=balance))
        errors[balance] = kld(want, read(model, tokens, cache))
    assert errors[False] > 0.3 > 0.003 > errors[True]


@pytest.mark.parametrize("scheme", ["turbo4", "turbo3"])
def test_channels_that_queries_hardly_look_at_cost_no_more_than_others(demo, plain, scheme):
    model, tokens = demo
    config, errors = TurboConfig(scheme, sink=4, recent=16, block=16), {}
    for name, changed, balance in (
        ("equal", model, True),
        ("unequal", made.unequal_channels(model), True),
        ("not balanced", made.unequal_channels(model), False),
    ):
        cache = make_prompt_cache(changed, dataclasses.replace(config, balance=balance))
        errors[name] = kld(plain, read(changed, tokens, cache))
    assert errors["unequal"] < 2 * errors["equal"] and errors["not balanced"] > 10 * errors["unequal"]
