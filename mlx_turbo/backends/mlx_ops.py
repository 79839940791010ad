"""What the kernels in metal/ do, in MLX operations: for any device. float32 inside."""

from typing import Callable, Optional, Sequence, Union

import mlx.core as mx
import numpy as np

from ..quant import codebook
from ..quant.scheme import PLANE_DIMS, SCALES, bit_fields, plane_b
from . import statistics
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


def _plane(bits: int, plane: int) -> np.ndarray:
    """Per dim of the first word of plane A (0) or B (1): first bit of the code, mask, shift. uint32 [3, dims]."""
    dims = PLANE_DIMS[bits][plane]
    first_word, out = plane * plane_b(bits, 32), np.zeros((3, dims), np.uint32)
    for dim, word, shift, code_shift, width in bit_fields(bits, 32):
        if word == first_word:
            out[:, dim] = code_shift, 2**width - 1, shift
    return out


def _pad_last(x: mx.array, size: int) -> mx.array:
    missing = -x.shape[-1] % size
    return mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x


def pack(codes: mx.array, bits: int) -> mx.array:
    """codes uint32 [..., D] -> words uint32 [..., words_per_row]. Fields do not overlap, so a sum joins them."""
    if bits not in PLANE_DIMS:
        per_word = 32 // bits
        fields = mx.unflatten(_pad_last(codes, per_word), -1, (-1, per_word))
        return (fields << constant(_word_shifts, bits)).sum(-1)
    words, units = [], _pad_last(codes, 16)
    for plane, dims in enumerate(PLANE_DIMS[bits]):
        first, mask, shift = constant(_plane, bits, plane)
        fields = mx.unflatten(_pad_last(units, dims), -1, (-1, dims))
        words.append((((fields >> first) & mask) << shift).sum(-1))
    return mx.concatenate(words, axis=-1)


# Reading goes through tables over 16 bits, that is over several codes at once: one gather gives up to 8 levels. Its
# results are in the order of memory, not of dims; attention permutes the query instead of the cache.
def _codes_of_halves(bits: int) -> np.ndarray:
    """Codes in each possible half of a word, dims 2j + s for j = 0, 1, ...: uint32 [65536, 16 / bits]."""
    return (np.arange(1 << 16)[:, None] >> (bits * np.arange(16 // bits))) & (2**bits - 1)


FEW = 1 << 12  # numbers that are compared with all midpoints at once: up to 127 bytes for each, but two operations


def _midpoints(bits: int) -> np.ndarray:
    """Between neighboring levels, the positive ones."""
    return codebook.thresholds(codebook.product(bits))[2 ** (bits - 1) :].astype(np.float32)


def _table(bits: int) -> np.ndarray:
    return _levels(bits)[_codes_of_halves(bits)]


# Of a half of a word of plane A: where its whole codes begin; where the top bits of a code in plane B begin, how many.
_WHOLE = {3: (0, 3, 6, 9, 12), 5: (0, 5, 10), 6: (0, 10)}
_TOP = {3: (15, 1), 5: (15, 1), 6: (6, 4)}


def _table_plane_a(bits: int) -> np.ndarray:
    """Index: a half of a word, without bit 15 if that is no part of a whole code."""
    n = 15 if _TOP[bits] == (15, 1) else 16
    return _levels(bits)[(np.arange(1 << n)[:, None] >> np.array(_WHOLE[bits])) & (2**bits - 1)]


def _table_plane_b(bits: int) -> np.ndarray:
    """Index: what plane B has of these dims, and above it the top bits from plane A."""
    if bits == 5:
        return _levels(5)[:, None]
    i = np.arange(1 << (8 + _TOP[bits][1]))[:, None]
    if bits == 3:
        return _levels(3)[np.concatenate([i & 7, (i >> 3) & 7, ((i >> 6) & 3) | ((i >> 8) << 2)], axis=1)]
    return _levels(6)[np.concatenate([(i & 3) | ((i >> 8) << 2), (i >> 2) & 63], axis=1)]


def _multiples(width: int) -> np.ndarray:
    return np.arange(0, 16, width, dtype=np.uint16)


def slot_dims(bits: int, head_dim: int) -> np.ndarray:
    """The dim of each number of `_read_slots`, int [n_slots]; head_dim where a slot belongs to no dim."""
    if bits in PLANE_DIMS:
        per_word, words = PLANE_DIMS[bits][0], plane_b(bits, head_dim)
    else:
        per_word = 32 // bits
        words = -(-head_dim // per_word)
    w, s, j = np.meshgrid(np.arange(words), np.arange(2), np.arange(per_word // 2), indexing="ij")
    return np.minimum((per_word * w + 2 * j + s).ravel(), head_dim)


def _dim_slots(bits: int, head_dim: int) -> np.ndarray:
    """The slot of each dim, int32 [head_dim]: the inverse of `slot_dims`."""
    return np.argsort(slot_dims(bits, head_dim), kind="stable")[:head_dim].astype(np.int32)


def _read_slots(words: mx.array, bits: int, head_dim: int) -> mx.array:
    """Levels of packed rows, float32 [..., n_slots], in the order of `slot_dims`, not yet scaled."""
    if bits not in PLANE_DIMS:
        return constant(_table, bits)[words.view(mx.uint16)].flatten(-2)
    n_a, (dims_a, dims_b), (top, n_top) = plane_b(bits, head_dim), PLANE_DIMS[bits], _TOP[bits]
    a = words[..., :n_a].view(mx.uint16)  # [..., 2 words], halves s = 0, 1
    b = mx.contiguous(words[..., n_a:]).view(mx.uint16)[..., None]
    width = 16 * dims_a // dims_b  # of what a half of plane B has of the dims of a half of plane A
    b = (b >> constant(_multiples, width)) & (2**width - 1)  # [..., 2 words, pieces]
    b = mx.unflatten(b, -2, (-1, 2)).swapaxes(-1, -2).flatten(-3)[..., : 2 * n_a]
    table_a = constant(_table_plane_a, bits)
    whole, rest = table_a[a & (len(table_a) - 1)], ((a >> top) & (2**n_top - 1)) << width
    return mx.concatenate([whole, constant(_table_plane_b, bits)[b | rest]], axis=-1).flatten(-2)


# ---- the backend ---------------------------------------------------------------------------------------------
def _encode(y: mx.array, bits: int, rule: str) -> tuple[mx.array, mx.array]:
    """(words, scales float32 [..., 1] by the rule) of rotated vectors y float32 [..., D]."""
    sigma = mx.sqrt(mx.square(y).mean(-1, keepdims=True))
    half, magnitude = 2 ** (bits - 1), mx.abs(y)
    if y.size <= FEW:
        m = (magnitude[..., None] >= sigma[..., None] * constant(_midpoints, bits)).sum(-1).astype(mx.uint8)
    else:
        above = [(magnitude >= sigma * float(t)).astype(mx.uint8) for t in _midpoints(bits)]
        m = sum(above[1:], start=above[0])
    codes = (m ^ mx.where(y < 0, half - 1, half).astype(mx.uint8)).astype(mx.uint32)
    c = constant(_levels, bits)[codes]
    dot, energy = (y * c).sum(-1, keepdims=True), mx.square(c).sum(-1, keepdims=True)
    if rule == "inner-product":  # a vector of zeros has no dot product
        scale = mx.where(dot > 0, mx.square(y).sum(-1, keepdims=True) / dot, sigma)
    elif rule == "least-squares":
        scale = dot / energy
    else:
        scale = sigma if rule == "norm" else sigma * mx.sqrt(y.shape[-1] / energy)
    return pack(codes, bits), scale


def _stored(scale: mx.array) -> mx.array:
    scale = scale.astype(mx.float16)
    return scale + (scale - scale)  # infinity: NaN


def _quantize(side: QuantizeSide, seed: int, rule: str) -> tuple[mx.array, mx.array]:
    codes, scale = _encode(rotate(side.centered(), seed), side.bits, rule)
    return codes, _stored(scale)


def _requantize(side: PackedSide, bits: int, rule: str) -> tuple[mx.array, mx.array]:
    levels = _read_slots(mx.contiguous(side.codes), side.bits, side.head_dim)
    codes, factor = _encode(mx.take(levels, constant(_dim_slots, side.bits, side.head_dim), axis=-1), bits, rule)
    return codes, _stored(side.scale.astype(mx.float32) * factor)


SLICE_VALUES = 1 << 18  # quantized at a time: a prompt chunk's float32 intermediates would be 18 times the chunk


def _in_slices(n: int, values_per_token: int, of_tokens: Callable[[slice], tuple[mx.array, mx.array]]):
    """of_tokens(slice(0, n)), a slice at a time, each waited for and written to where it belongs."""
    step = max(1, SLICE_VALUES // values_per_token)
    if step >= n:
        return of_tokens(slice(0, n))
    whole: list[mx.array] = []
    for at in range(0, n, step):
        part = of_tokens(slice(at, at + step))
        whole = whole or [mx.zeros((*a.shape[:2], n, a.shape[3]), a.dtype) for a in part]
        for buffer, a in zip(whole, part):
            buffer[:, :, at : at + step] = a
        mx.eval(whole)
    codes, scales = whole
    return codes, scales


def _quantize_in_slices(side: QuantizeSide, seed: int, rule: str) -> tuple[mx.array, mx.array]:
    x, n = side.x, side.x.shape[2]

    def of_tokens(tokens: slice) -> tuple[mx.array, mx.array]:
        first, mean = side.first + tokens.start, side.mean
        if mean is not None and mean.shape[2] > 1:
            mean = mean[:, :, first // side.segment - side.first // side.segment :]
        return _quantize(side._replace(x=x[:, :, tokens], mean=mean, first=first), seed, rule)

    return _in_slices(n, x.size // n, of_tokens)


def _requantize_in_slices(side: PackedSide, bits: int, rule: str) -> tuple[mx.array, mx.array]:
    B, H, n, _ = side.codes.shape

    def of_tokens(tokens: slice) -> tuple[mx.array, mx.array]:
        part = side._replace(codes=side.codes[:, :, tokens], scale=side.scale[:, :, tokens])
        return _requantize(part, bits, rule)

    return _in_slices(n, B * H * side.head_dim, of_tokens)


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

    def statistics(self, x: mx.array, first: int, segment: int) -> tuple[mx.array, mx.array]:
        """As KernelBackend.statistics."""
        return statistics.in_operations(x, first, segment)

    def requantize(self, side: PackedSide, bits: int, scale: str = SCALES[0]) -> tuple[mx.array, mx.array]:
        """As KernelBackend.requantize."""
        return _requantize_in_slices(side, bits, scale)

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
