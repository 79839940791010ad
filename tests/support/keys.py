"""Keys with a bias as models have them, and queries for them."""

import mlx.core as mx
import numpy as np

ROPE_BASE = 1e6


def rope(x, base=ROPE_BASE):
    """x [..., n, D] turned by its position, halves paired as in mlx-lm's models."""
    n, D = x.shape[-2:]
    angle = np.arange(n)[:, None] * base ** (-np.arange(D // 2) / (D // 2))
    a, b = x[..., : D // 2], x[..., D // 2 :]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)], -1)


def biased_keys(rng, n, D, norm, pairs, heads=1):
    """Keys of norm about 22 as in Qwen2.5 that carry, before RoPE, a bias of `norm` in the given RoPE pairs."""
    signal, bias = rng.standard_normal((1, heads, n, D)) * 22 / np.sqrt(D), np.zeros(D)
    bias[[*pairs, *(p + D // 2 for p in pairs)]] = rng.standard_normal(2 * len(pairs))
    return rope(signal + norm * bias / np.linalg.norm(bias))


def turning(n, norm=600, seed=0, D=64):
    """Keys and values [1, 1, n, D] whose keys have a bias of half that norm, which no mean takes away."""
    rng = np.random.default_rng(seed)
    return tuple(
        mx.array(x, mx.float32)
        for x in (biased_keys(rng, n, D, norm, range(D // 2)) / 2, rng.standard_normal((1, 1, n, D)))
    )


def queries_for(keys, seed=5):
    shape = (1, 2, *keys.shape[2:])
    return mx.array(np.random.default_rng(seed).standard_normal(shape), mx.float32)
