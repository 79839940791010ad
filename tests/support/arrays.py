"""MLX arrays in NumPy."""

import mlx.core as mx
import numpy as np


def to_numpy(x):
    """An mx.array as float32 NumPy (bfloat16 has no NumPy type)."""
    return np.array(x.astype(mx.float32))
