"""A model whose linear layers NumPy computes is the same model."""

import copy

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from support.models import family, llama
from support.tolerances import TOLERANCE

from mlx_turbo.quality.cpu_products import use_numpy_products

TOKENS = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])


def qwen2():
    return family(
        "qwen2",
        hidden_size=64,
        num_hidden_layers=2,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        vocab_size=100,
        tie_word_embeddings=True,
    )


def assert_near(ours, theirs, dtype):
    ours, theirs = (np.array(x.astype(mx.float32)) for x in (ours, theirs))
    assert np.abs(ours - theirs).max() <= TOLERANCE[dtype] * np.abs(theirs).max()


@pytest.mark.parametrize("make", [llama, qwen2], ids=["llama", "biases and tied embeddings"])
def test_the_logits_are_the_same(make):
    model = make()
    assert_near(use_numpy_products(copy.deepcopy(model))(TOKENS), model(TOKENS), mx.float32)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_products_are_in_float32_whatever_the_dtype(dtype):
    rng = np.random.default_rng(0)
    layer = nn.Linear(512, 64)
    layer.update({"weight": mx.array(rng.standard_normal((64, 512))), "bias": mx.array(rng.standard_normal(64))})
    layer.set_dtype(dtype)
    x = mx.array(rng.standard_normal((2, 5, 512))).astype(dtype)
    exact = np.array(x.astype(mx.float32), np.float64) @ np.array(layer.weight.astype(mx.float32), np.float64).T
    exact += np.array(layer.bias.astype(mx.float32), np.float64)
    y = use_numpy_products(nn.Sequential(layer))(x)
    assert y.dtype == dtype and y.shape == (2, 5, 64)
    error = np.abs(np.array(y.astype(mx.float32), np.float64) - exact)
    assert (error <= 2 * float(mx.finfo(dtype).eps) * np.abs(exact).max()).all()


def test_a_quantized_model_is_computed_with_its_own_weights():
    model = llama()
    nn.quantize(model, 32, 4)
    assert_near(use_numpy_products(copy.deepcopy(model))(TOKENS), model(TOKENS), mx.float32)
    assert not any(isinstance(m, nn.QuantizedLinear) for m in use_numpy_products(model).modules())


def test_linear_layers_ask_numpy(monkeypatch):
    from mlx_turbo.quality import cpu_products

    asked, product = [], cpu_products._product
    monkeypatch.setattr(cpu_products, "_product", lambda x, w: asked.append(w.shape) or product(x, w))
    use_numpy_products(qwen2())(TOKENS)
    assert len(asked) == 2 * 7 + 1 and asked[-1] == (100, 64)  # seven per layer, and the tied embedding
