"""MLX arrays in NumPy."""

import mlx.core as mx
import numpy as np


def to_numpy(x):
    """An mx.array as float32 NumPy (bfloat16 has no NumPy type)."""
    return np.array(x.astype(mx.float32))


def peak(step):
    """Bytes allocated at most during step(), beyond what was there before."""
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    step()
    mx.synchronize()
    return max(mx.get_peak_memory() - before, 0)  # the peak restarts from 0
