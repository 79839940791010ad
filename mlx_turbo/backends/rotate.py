"""The rotation of quant/rotation.py in MLX operations, and constants on the device."""

import functools
from typing import Any, Callable

import mlx.core as mx
import numpy as np

from ..quant import rotation


@functools.lru_cache(maxsize=None)
def diagonals(head_dim: int, seed: int) -> mx.array:
    """The rotation's diagonals as an evaluated float32 array [rounds, head_dim]."""
    array = mx.array(rotation.diagonals(head_dim, seed).astype(np.float32))
    mx.eval(array)  # a constant that is lazy cannot be used from another thread
    return array


@functools.lru_cache(maxsize=None)
def diagonal(head_dim: int, seed: int, i: int, sign: float = 1) -> mx.array:
    """sign times one of `diagonals` as an evaluated float32 array [head_dim]: taking it from there is a kernel."""
    array = mx.array((sign * rotation.diagonals(head_dim, seed)[i]).astype(np.float32))
    mx.eval(array)
    return array


@functools.lru_cache(maxsize=None)
def constant(make: Callable[..., np.ndarray], *args: Any) -> mx.array:
    """make(*args) as an evaluated array, made once."""
    array = mx.array(make(*args))
    mx.eval(array)
    return array


# ---- rotation ------------------------------------------------------------------------------------------------
def _transform_window(x: mx.array, start: int, size: int) -> mx.array:
    # mx.hadamard_transform is right for powers of two only, and on the CPU fast in float32 only
    y = mx.hadamard_transform(x[..., start : start + size], scale=1.0)
    if size == x.shape[-1]:
        return y
    return mx.concatenate([x[..., :start], y, x[..., start + size :]], axis=-1)


def rotate(x: mx.array, seed: int = 0) -> mx.array:
    """rotation.rotate of x [..., head_dim], float32."""
    x = x.astype(mx.float32)
    for i, window in enumerate(rotation.windows(x.shape[-1])):
        x = _transform_window(x * diagonal(x.shape[-1], seed, i), *window)
    return x


def unrotate(y: mx.array, seed: int = 0) -> mx.array:
    """rotation.unrotate of y [..., head_dim], float32."""
    y = y.astype(mx.float32)
    for i, window in reversed(list(enumerate(rotation.windows(y.shape[-1])))):
        y = _transform_window(y, *window) * diagonal(y.shape[-1], seed, i)
    return y
