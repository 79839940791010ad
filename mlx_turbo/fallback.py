"""The same operations as kernels.py in MLX operations, on any device. float32 inside."""
import functools

import mlx.core as mx
import numpy as np

from . import codebook, rotation
from .kernels import device_name, diagonals


@functools.lru_cache(maxsize=None)
def _constant(make, *args):
    array = mx.array(make(*args))
    mx.eval(array)
    return array


def _levels(bits):
    return codebook.product(bits).astype(np.float32)


# ---- rotation ------------------------------------------------------------------------------------------------
def _transform_window(x, start, size):
    # mx.hadamard_transform is right for powers of two only, and on the CPU fast in float32 only
    y = mx.hadamard_transform(x[..., start:start + size], scale=1.0)
    if size == x.shape[-1]:
        return y
    return mx.concatenate([x[..., :start], y, x[..., start + size:]], axis=-1)


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


# ---- the packed row (scheme.py) ------------------------------------------------------------------------------
def _word_shifts(bits):
    """Shift of each dim of a word, for 2, 4 and 8 bits."""
    r = np.arange(32 // bits)
    return (16 * (r % 2) + bits * (r // 2)).astype(np.uint32)


def _planes(bits=3):
    """For each of the two 3-bit planes, per dim of a unit: first bit of the code, mask, shift. uint32 [2, 3, 16]."""
    j, s = np.divmod(np.arange(16), 2)
    a = np.where(j < 5, 16 * s + 3 * j, 16 * s + 15), np.select([j < 5, j == 7], [7, 1], 0)
    b = np.where(j < 7, 16 * s + 3 * (j - 5), 16 * s + 6), np.select([j < 5, j < 7], [0, 7], 3)
    first = np.where(j == 7, 2, 0), np.zeros_like(j)
    return np.array([(first[p], (a, b)[p][1], np.maximum((a, b)[p][0], 0)) for p in (0, 1)], np.uint32)


def _pad_last(x, size):
    missing = -x.shape[-1] % size
    return mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x


def pack(codes, bits):
    """codes uint32 [..., D] -> words uint32 [..., words_per_row]. Fields do not overlap, so a sum joins them."""
    if bits != 3:
        per_word = 32 // bits
        fields = mx.unflatten(_pad_last(codes, per_word), -1, (-1, per_word))
        return (fields << _constant(_word_shifts, bits)).sum(-1)
    unit = mx.unflatten(_pad_last(codes, 16), -1, (-1, 16))
    planes = _constant(_planes)
    a, b = ((((unit >> planes[p, 0]) & planes[p, 1]) << planes[p, 2]).sum(-1) for p in (0, 1))
    b = mx.unflatten(_pad_last(b, 2), -1, (-1, 2))
    return mx.concatenate([a, b[..., 0] | (b[..., 1] << 8)], axis=-1)


def unpack(words, bits, head_dim):
    """words uint32 [..., words_per_row] -> codes uint32 [..., head_dim]."""
    if bits != 3:
        codes = (words[..., None] >> _constant(_word_shifts, bits)) & (2**bits - 1)
        return codes.flatten(-2)[..., :head_dim]
    units = -(-head_dim // 16)
    a, b = words[..., :units], words[..., units:]
    b = mx.stack([b, b >> 8], axis=-1).flatten(-2)[..., :units]
    planes = _constant(_planes)
    a, b = ((plane[..., None] >> planes[p, 2] & planes[p, 1]) << planes[p, 0] for p, plane in ((0, a), (1, b)))
    return (a | b).flatten(-2)[..., :head_dim]


# ---- the backend ---------------------------------------------------------------------------------------------
def _quantize(x, bits, mean, seed):
    y = rotate(x if mean is None else x.astype(mx.float32) - mean, seed)
    sigma = mx.sqrt(mx.square(y).mean(-1, keepdims=True))
    if bits == 8:
        inverse = mx.where(sigma > 0, 1 / (sigma * codebook.UNIFORM_STEP), 0)
        codes = (mx.clip(mx.round(y * inverse), -128, 127) + 128).astype(mx.uint32)
    else:
        half, magnitude = 2 ** (bits - 1), mx.abs(y)
        midpoints = codebook.thresholds(codebook.product(bits))[half:]
        m = sum((magnitude >= sigma * float(t)).astype(mx.uint8) for t in midpoints)
        codes = (m ^ mx.where(y < 0, half - 1, half).astype(mx.uint8)).astype(mx.uint32)
    c = _constant(_levels, bits)[codes]
    energy = mx.square(c).sum(-1, keepdims=True)
    # 8-bit codes of zeros have no energy
    scale = (y * c).sum(-1, keepdims=True) / mx.where(energy > 0, energy, 1)
    return pack(codes, bits), scale.astype(mx.float16)


SLICE_VALUES = 1 << 18  # quantized at a time: a prompt chunk's float32 intermediates would be 18 times the chunk


def _quantize_in_slices(side, seed):
    x, n = side.x, side.x.shape[2]
    step = max(1, SLICE_VALUES // (x.size // n))
    if step >= n:
        return _quantize(x, side.bits, side.mean, seed)
    slices = []
    for at in range(0, n, step):
        slices.append(_quantize(x[:, :, at:at + step], side.bits, side.mean, seed))
        mx.eval(slices[-1])
    return tuple(mx.concatenate(parts, axis=2) for parts in zip(*slices))


class CpuBackend:
    """MLX operations instead of kernels: for machines without Metal, and for those who ask for it."""

    name = "cpu"

    def describe(self):
        """What runs, for people: the backend, the device MLX uses, and the chip."""
        return f"cpu fallback (MLX operations on the {mx.default_device().type.name}, {device_name()})"

    def quantize(self, sides, seed=0):
        """As MetalBackend.quantize."""
        return [_quantize_in_slices(side, seed) for side in sides]

    def dequantize(self, sides, first, length, dtype, seed=0):
        """As MetalBackend.dequantize."""
        outs = []
        for side in sides:
            codes, scale = (a[:, :, first:first + length] for a in (side.codes, side.scale))
            y = _constant(_levels, side.bits)[unpack(codes, side.bits, side.head_dim)] * scale.astype(mx.float32)
            x = unrotate(y, seed)
            outs.append((x if side.mean is None else x + side.mean).astype(dtype))
        return outs
