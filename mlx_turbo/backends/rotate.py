"""The Metal backend: loads metal/*.metal, registers them with mx.fast.metal_kernel, tests and launches them.

Each combination of template values is a Metal library of its own. Before one is used for real it is built and
compared with the NumPy reference on a few vectors, once per process; a kernel that does not build or disagrees
raises `BackendError`. Nothing here ever falls back to another backend.
"""

import functools

import mlx.core as mx
import numpy as np

from ..quant import rotation


@functools.lru_cache(maxsize=None)
def diagonals(head_dim, seed):
    """The rotation's diagonals as an evaluated float32 array [rounds, head_dim]."""
    array = mx.array(rotation.diagonals(head_dim, seed).astype(np.float32))
    mx.eval(array)  # a constant that is lazy cannot be used from another thread
    return array


pass


@functools.lru_cache(maxsize=None)
def constant(make, *args):
    array = mx.array(make(*args))
    mx.eval(array)
    return array


# ---- rotation ------------------------------------------------------------------------------------------------
def _transform_window(x, start, size):
    # mx.hadamard_transform is right for powers of two only, and on the CPU fast in float32 only
    y = mx.hadamard_transform(x[..., start : start + size], scale=1.0)
    if size == x.shape[-1]:
        return y
    return mx.concatenate([x[..., :start], y, x[..., start + size :]], axis=-1)


def rotate(x, seed=0):
    """rotation.rotate of x [..., head_dim], float32."""
    x = x.astype(mx.float32)
    for i, window in enumerate(rotation.windows(x.shape[-1])):
        x = _transform_window(x * diagonals(x.shape[-1], seed)[i], *window)
    return x


def unrotate(y, seed=0):
    """rotation.unrotate of y [..., head_dim], float32."""
    y = y.astype(mx.float32)
    for i, window in reversed(list(enumerate(rotation.windows(y.shape[-1])))):
        y = _transform_window(y, *window) * diagonals(y.shape[-1], seed)[i]
    return y
