"""A model's large products on a CPU, by NumPy's BLAS.

MLX's wheels for Linux carry the reference BLAS, which is not optimized: a float32 product of 32 tokens with weights
[4864, 896] runs at 2.5 GFLOP/s (2 cores, AVX-512), NumPy's OpenBLAS at 50. Float16 products are slower still. Reading a
text through several caches is nothing but such products; attention stays MLX's, for it is what is measured.
"""

import importlib
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np


def _product(x: mx.array, weight: np.ndarray) -> mx.array:
    """x [..., D] times weight [n, D] transposed, in float32; the result in x's dtype."""
    rows = np.array(x.astype(mx.float32), copy=False)
    return mx.array(rows.reshape(-1, rows.shape[-1]) @ weight.T).reshape(*x.shape[:-1], -1).astype(x.dtype)


class _Linear(nn.Linear):
    def __call__(self, x: mx.array) -> mx.array:
        y = _product(x, self.weight_float32)
        return y + self["bias"] if "bias" in self else y


class _Embedding(nn.Embedding):
    def as_linear(self, x: mx.array) -> mx.array:
        return _product(x, self.weight_float32)


def use_numpy_products(model: Any) -> Any:
    """Let NumPy compute the products of a model's linear layers (nn.Linear, nn.Embedding.as_linear), in float32
    whatever the dtype of its parameters. Quantized layers are dequantized. Changes the model and returns it.

    The parameters must not change afterwards: weights in another dtype than float32 are copied.
    """
    model = importlib.import_module("mlx_lm.utils").dequantize_model(model)
    mx.eval(model.parameters())
    for module in model.modules():
        if type(module) in (nn.Linear, nn.Embedding):
            module.weight_float32 = np.array(module.weight.astype(mx.float32), copy=False)
            module.__class__ = _Linear if type(module) is nn.Linear else _Embedding
    return model
