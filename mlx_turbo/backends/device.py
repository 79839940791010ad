"""The name of the chip, its size, and how MLX computes on it."""

import ctypes
import functools
import platform
from typing import Optional

import mlx.core as mx
import numpy as np

MULTIPROCESSOR_COUNT = 16  # CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT of cuda.h


def device_name() -> str:
    """The GPU's name where MLX has one, else the machine's."""
    info = mx.device_info() if mx.metal.is_available() or mx.cuda.is_available() else {}
    return str(info.get("device_name") or f"{platform.system()} {platform.machine()}")


def float32_is_tf32() -> bool:
    """Whether MLX's products of float32 matrices keep 10 bits of the mantissa (TF32) on the device in use: measured.
    Newer GPUs do, unless MLX_ENABLE_TF32=0."""
    return _rounds_to_tf32(mx.default_device().type.name)


@functools.lru_cache(maxsize=None)
def _rounds_to_tf32(device: str) -> bool:
    x = np.full((128, 128), 1 + 2**-12, np.float32)
    return bool((np.array(mx.array(x) @ mx.eye(128)) != x).any())


@functools.lru_cache(maxsize=None)
def multiprocessors() -> Optional[int]:
    """Multiprocessors of the first NVIDIA GPU, or None where its driver does not tell."""
    count, device = ctypes.c_int(), ctypes.c_int()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    calls = (
        lambda: driver.cuInit(0),
        lambda: driver.cuDeviceGet(ctypes.byref(device), 0),
        lambda: driver.cuDeviceGetAttribute(ctypes.byref(count), MULTIPROCESSOR_COUNT, device),
    )
    return count.value if all(call() == 0 for call in calls) else None
