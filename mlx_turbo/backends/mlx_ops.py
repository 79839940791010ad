"""What the kernels in metal/ do, in MLX operations: for any device. float32 inside."""

from typing import Optional, Sequence, Union

import mlx.core as mx
import numpy as np

from ..quant import codebook
from ..quant.scheme import SCALES
from .device import device_name
from .rotate import constant, rotate, unrotate
from .sides import CachedSide, PackedSide, QuantizeSide


def _levels(bits: int) -> np.ndarray:
    return codebook.product(bits).astype(np.float32)


# ---- the packed row (scheme.py) ------------------------------------------------------------------------------
def _word_shifts(bits: int) -> np.ndarray:
    """Shift of each dim of a word, for 2, 4 and 8 bits."""
    r = np.arange(32 // bits)
    return (16 * (r % 2) + bits * (r // 2)).astype(np.uint32)


def _planes() -> np.ndarray:
    """For each of the two 3-bit planes, per dim of a unit: first bit of the code, mask, shift. uint32 [2, 3, 16]."""
    j, s = np.divmod(np.arange(16), 2)
    a = np.where(j < 5, 16 * s + 3 * j, 16 * s + 15), np.select([j < 5, j == 7], [7, 1], 0)
    b = np.where(j < 7, 16 * s + 3 * (j - 5), 16 * s + 6), np.select([j < 5, j < 7], [0, 7], 3)
    first = np.where(j == 7, 2, 0), np.zeros_like(j)
    return np.array([(first[p], (a, b)[p][1], np.maximum((a, b)[p][0], 0)) for p in (0, 1)], np.uint32)


def _pad_last(x: mx.array, size: int) -> mx.array:
    missing = -x.shape[-1] % size
    return mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x


def pack(codes: mx.array, bits: int) -> mx.array:
    """codes uint32 [..., D] -> words uint32 [..., words_per_row]. Fields do not overlap, so a sum joins them."""
    if bits != 3:
        per_word = 32 // bits
        fields = mx.unflatten(_pad_last(codes, per_word), -1, (-1, per_word))
        return (fields << constant(_word_shifts, bits)).sum(-1)
    unit = mx.unflatten(_pad_last(codes, 16), -1, (-1, 16))
    planes = constant(_planes)
    a, b = ((((unit >> planes[p, 0]) & planes[p, 1]) << planes[p, 2]).sum(-1) for p in (0, 1))
    b = mx.unflatten(_pad_last(b, 2), -1, (-1, 2))
    return mx.concatenate([a, b[..., 0] | (b[..., 1] << 8)], axis=-1)


# Reading goes through tables over 16 bits, that is over several codes at once: one gather gives up to 8 levels. Its
# results are in the order of memory, not of dims; attention permutes the query instead of the cache.
def _codes_of_halves(bits: int) -> np.ndarray:
    """Codes in each possible half of a word, dims 2j + s for j = 0, 1, ...: uint32 [65536, 16 / bits]."""
    return (np.arange(1 << 16)[:, None] >> (bits * np.arange(16 // bits))) & (2**bits - 1)


def _table(bits: int) -> np.ndarray:
    return _levels(bits)[_codes_of_halves(bits)]


def _table_plane_a() -> np.ndarray:
    return _levels(3)[(np.arange(1 << 15)[:, None] >> (3 * np.arange(5))) & 7]


def _table_plane_b() -> np.ndarray:
    """Index: the byte of plane B, and the top bit of the last code (from plane A) in bit 8."""
    i = np.arange(1 << 9)[:, None]
    return _levels(3)[np.concatenate([i & 7, (i >> 3) & 7, ((i >> 6) & 3) | ((i >> 8) << 2)], axis=1)]


def slot_dims(bits: int, head_dim: int) -> np.ndarray:
    """The dim of each number of `_read_slots`, int [n_slots]; head_dim where a slot belongs to no dim."""
    per_word = 16 if bits == 3 else 32 // bits
    words = -(-head_dim // per_word)
    w, s, j = np.meshgrid(np.arange(words), np.arange(2), np.arange(per_word // 2), indexing="ij")
    return np.minimum((per_word * w + 2 * j + s).ravel(), head_dim)


def _dim_slots(bits: int, head_dim: int) -> np.ndarray:
    """The slot of each dim, int32 [head_dim]: the inverse of `slot_dims`."""
    return np.argsort(slot_dims(bits, head_dim), kind="stable")[:head_dim].astype(np.int32)


def _read_slots(words: mx.array, bits: int, head_dim: int) -> mx.array:
    """Levels of packed rows, float32 [..., n_slots], in the order of `slot_dims`, not yet scaled."""
    if bits != 3:
        return constant(_table, bits)[words.view(mx.uint16)].flatten(-2)
    units = -(-head_dim // 16)
    a = words[..., :units].view(mx.uint16)  # [..., 2 units], halves s = 0, 1
    b = mx.contiguous(words[..., units:]).view(mx.uint8)  # byte i + 2s of word t / 2, i = t % 2
    b = mx.unflatten(b, -1, (-1, 2, 2)).swapaxes(-1, -2).flatten(-3)[..., : 2 * units].astype(mx.uint16)
    levels = [constant(_table_plane_a)[a & 0x7FFF], constant(_table_plane_b)[b | ((a >> 15) << 8)]]
    return mx.concatenate(levels, axis=-1).flatten(-2)


# ---- the backend ---------------------------------------------------------------------------------------------
def _quantize(side: QuantizeSide, seed: int, rule: str) -> tuple[mx.array, mx.array]:
    y, bits = rotate(side.centered(), seed), side.bits
    sigma = mx.sqrt(mx.square(y).mean(-1, keepdims=True))
    if bits == 8:
        inverse = mx.where(sigma > 0, 1 / (sigma * codebook.UNIFORM_STEP), 0)
        c = mx.round(y * inverse)
        c = mx.where(c >= -128, mx.minimum(c, 127), -128)  # also for NaN, which as an index could be anything
        codes = (c + 128).astype(mx.uint32)
    else:
        half, magnitude = 2 ** (bits - 1), mx.abs(y)
        midpoints = codebook.thresholds(codebook.product(bits))[half:]
        above = [(magnitude >= sigma * float(t)).astype(mx.uint8) for t in midpoints]
        m = sum(above[1:], start=above[0])
        codes = (m ^ mx.where(y < 0, half - 1, half).astype(mx.uint8)).astype(mx.uint32)
    c = constant(_levels, bits)[codes]
    dot, energy = (y * c).sum(-1, keepdims=True), mx.square(c).sum(-1, keepdims=True)
    if rule == "inner-product":
        scale = mx.square(y).sum(-1, keepdims=True) / dot
    elif rule == "least-squares":
        scale = dot / energy
    else:
        scale = sigma if rule == "norm" else sigma * mx.sqrt(y.shape[-1] / energy)
    # a vector of zeros has no dot product; 8-bit codes are all 0 if sigma is 0 or infinite
    scale = mx.where(dot > 0 if rule == "inner-product" else energy > 0, scale, sigma).astype(mx.float16)
    return pack(codes, bits), scale + (scale - scale)  # infinity: NaN


SLICE_VALUES = 1 << 18  # quantized at a time: a prompt chunk's float32 intermediates would be 18 times the chunk


def _quantize_in_slices(side: QuantizeSide, seed: int, rule: str) -> tuple[mx.array, mx.array]:
    x, n = side.x, side.x.shape[2]
    step = max(1, SLICE_VALUES // (x.size // n))
    if step >= n:
        return _quantize(side, seed, rule)
    slices = []
    for at in range(0, n, step):
        slices.append(_quantize(side._replace(x=x[:, :, at : at + step]), seed, rule))
        mx.eval(slices[-1])
    codes, scales = (mx.concatenate(list(parts), axis=2) for parts in zip(*slices))
    return codes, scales


def without_nan(
    v: mx.array, gamma: Optional[mx.array], weights: mx.array
) -> tuple[mx.array, Optional[mx.array], mx.array]:
    """(values, scales, spoiled): values [..., n, S], or their scales gamma [..., n, 1] if there are any, with 0 where
    they are not finite, as 0 * NaN is NaN. spoiled: NaN for each row of weights [..., n] in which such a token has
    weight, else 0."""
    finite = mx.isfinite(v).all(-1, keepdims=True) if gamma is None else mx.isfinite(gamma)
    spoiled = mx.where(weights @ (~finite).astype(mx.float32) > 0, mx.nan, 0)
    return (mx.where(finite, v, 0), None, spoiled) if gamma is None else (v, mx.where(finite, gamma, 0), spoiled)


class CpuBackend:
    """MLX operations instead of kernels: for machines without Metal, and for those who ask for it.

    It has the methods of `KernelBackend` except `attend`: attention runs tile by tile, on what `read_rows` gives.
    """

    name, tiles_ahead = "cpu", 0

    def describe(self) -> str:
        """What runs, for people: the backend, the device MLX uses, and the chip."""
        return f"cpu fallback (MLX operations on the {mx.default_device().type.name}, {device_name()})"

    def quantize(
        self, sides: Sequence[QuantizeSide], seed: int = 0, scale: str = SCALES[0]
    ) -> list[tuple[mx.array, mx.array]]:
        """As KernelBackend.quantize."""
        return [_quantize_in_slices(side, seed, scale) for side in sides]

    def dequantize(
        self, sides: Sequence[PackedSide], first: int, length: int, dtype: mx.Dtype, seed: int = 0
    ) -> list[mx.array]:
        """As KernelBackend.dequantize."""
        outs = []
        for side in sides:
            rows, scale, _ = self.read_rows(side, first, length)
            rows = mx.take(rows, constant(_dim_slots, side.bits, side.head_dim), axis=-1)
            outs.append(side.turned_back(unrotate(rows * scale.astype(mx.float32), seed)).astype(dtype))
        return outs

    def restore(
        self, keys: CachedSide, values: CachedSide, counts: tuple[int, int, int], seed: int = 0, first: int = 0
    ) -> None:
        """No launch does both sides at once: restore.py restores them one by one."""

    def read_rows(self, side: Union[PackedSide, CachedSide], first: int, n: int) -> tuple[mx.array, mx.array, int]:
        """For `tiled_attention`: levels as they lie in memory, and the scales, which go to logits and weights."""
        assert side.codes is not None and side.scale is not None
        codes, scale = mx.contiguous(side.codes[:, :, first : first + n]), side.scale[:, :, first : first + n]
        return _read_slots(codes, side.bits, side.head_dim), scale, side.bits

    def why_not_fused(self, keys: tuple[int, int], values: tuple[int, int], n_query_tokens: int) -> str:
        """Never None: there is no kernel here."""
        return "the CPU fallback reads packed rows tile by tile"
