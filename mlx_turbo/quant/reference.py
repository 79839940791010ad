"""NumPy oracle: quantize, dequantize and attention over a packed cache, in float64. Imports no MLX.

Formulas: arXiv 2504.19874 (TurboQuant), with a scale per vector that keeps inner products.
Every backend is tested against this file.
"""

from dataclasses import dataclass, replace
from typing import Any, Optional, Union

import numpy as np

from . import codebook
from . import rotation as rotations
from .scheme import LARGEST, SCALES, bit_fields, words_per_row

Rotation = Union[int, np.ndarray, None]  # a seed of rotation.py, an orthogonal matrix, or none
Levels = Union[str, np.ndarray, None]


@dataclass(frozen=True)
class Quantized:
    """Codes and scales of vectors x [..., head_dim], and what is needed to turn them back.

    codes: uint8 [..., head_dim], index into the levels.
    scale: float64 [...], float16-representable unless quantize was told otherwise.
    normalized: float64 [..., head_dim], the centered and rotated vectors scaled to norm sqrt(head_dim): what the
        codes were chosen for (to tell a wrong code from a tie). None if only packed rows are known.
    rotation, levels, mean, balance: as given to `quantize`.
    """

    codes: np.ndarray
    scale: np.ndarray
    normalized: Optional[np.ndarray]
    bits: int
    rotation: Rotation
    levels: Levels
    mean: Optional[np.ndarray]
    balance: Optional[np.ndarray] = None

    def packed(self) -> np.ndarray:
        """The codes as words, uint32 [..., words_per_row]: the layout of the cache (scheme.py)."""
        return pack(self.codes, self.bits)


def _rotate(x: np.ndarray, rotation: Rotation, inverse: bool = False) -> np.ndarray:
    if rotation is None:
        return x
    if isinstance(rotation, (int, np.integer)):
        return (rotations.unrotate if inverse else rotations.rotate)(x, int(rotation))
    matrix = np.asarray(rotation, np.float64)
    if matrix.shape != (x.shape[-1],) * 2:
        raise ValueError(f"rotation: got shape {matrix.shape}, expected {(x.shape[-1],) * 2}, a seed or None")
    return x @ (matrix if inverse else matrix.T)


def _check_vectors(x: Any) -> np.ndarray:
    x = np.asarray(x, np.float64)
    if x.ndim < 1 or x.shape[-1] < 1:
        raise ValueError(f"x: got shape {x.shape}, expected [..., head_dim]")
    if not np.isfinite(x).all():
        raise ValueError("x: has NaN or infinity, allowed are finite numbers")
    return x


def _levels_of(levels: Levels, bits: int) -> np.ndarray:
    if levels is None:
        levels = "product" if bits in codebook.PRODUCT_BITS else "lloyd-max"
    return codebook.levels(levels, bits)


def quantize(
    x: np.ndarray,
    bits: int = 4,
    *,
    rotation: Rotation = 0,
    levels: Levels = None,
    mean: Optional[np.ndarray] = None,
    balance: Optional[np.ndarray] = None,
    scale: str = SCALES[0],
    scale_dtype: Any = np.float16,
) -> Quantized:
    """Quantize vectors x [..., head_dim] to `bits` per number: center, balance, rotate, nearest level, scale.

    bits: 1 to 8.
    rotation: seed of the product's rotation (rotation.py), an orthogonal matrix R [head_dim, head_dim] used as
        y = R x, or None.
    levels: "product" (the kernels' levels; default at 2, 3, 4, 5, 6 and 8 bits), "lloyd-max", or an array [2**bits].
    mean: subtracted before rotation, broadcast against x; None = 0.
    balance: positive factors of the channels, multiplied after that, broadcast against x; None = 1.
    scale: "inner-product" <y, y> / <y, c> keeps the vector's inner product with itself, so that a large logit is not
        systematically too small; "least-squares" <y, c> / <c, c> minimizes the error; "norm" ||y|| / sqrt(head_dim) is
        the paper's; "matched-norm" ||y|| / ||c|| keeps the norm of the vector.
    scale_dtype: the scale is rounded to it; np.float64 to keep it.

    Returns a `Quantized`. Raises ValueError, naming the argument, for non-finite x, bad bits, levels, rotation or
    scale rule, and for vectors whose scale overflows scale_dtype.
    """
    x = _check_vectors(x)
    if isinstance(bits, bool) or bits not in range(1, 9):
        raise ValueError(f"bits: got {bits!r}, allowed are 1 to 8")
    if scale not in SCALES:
        raise ValueError(f"scale: got {scale!r}, allowed are {SCALES}")
    table = _levels_of(levels, bits)
    x = x if mean is None else x - np.asarray(mean, np.float64)
    y = _rotate(x if balance is None else x * np.asarray(balance, np.float64), rotation)
    codes, gamma, u = _encode(y, table, scale)
    with np.errstate(over="ignore"):
        gamma = gamma.astype(scale_dtype).astype(np.float64)
    if not np.isfinite(gamma).all():
        raise ValueError(f"x: a vector's scale is beyond {np.dtype(scale_dtype).name}")
    return Quantized(codes, gamma, u, bits, rotation, table, mean, balance)


def _encode(y: np.ndarray, table: np.ndarray, scale: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(codes, scales by the rule, y at norm sqrt(head_dim)) of rotated vectors y [..., head_dim]."""
    head_dim, norm = y.shape[-1], np.linalg.norm(y, axis=-1, keepdims=True)
    u = np.divide(y * np.sqrt(head_dim), norm, out=np.zeros_like(y), where=norm > 0)
    codes = np.searchsorted(codebook.thresholds(table), u, side="right").astype(np.uint8)
    c = table[codes]
    energy, norm = (c * c).sum(-1), norm[..., 0]
    if scale == "inner-product":
        dot = (y * c).sum(-1)
        gamma = np.divide(norm * norm, dot, out=np.zeros_like(norm), where=dot > 0)
    elif scale == "least-squares":
        gamma = np.divide((y * c).sum(-1), energy, out=np.zeros_like(norm), where=(energy > 0) & (norm > 0))
    elif scale == "norm":
        gamma = norm / np.sqrt(head_dim)
    else:
        gamma = np.divide(norm, np.sqrt(energy), out=np.zeros_like(norm), where=energy > 0)
    return codes, gamma, u


def requantize(
    quantized: Quantized, bits: int, *, levels: Levels = None, scale: str = SCALES[0], scale_dtype: Any = np.float16
) -> Quantized:
    """A `Quantized` with fewer bits, from what it holds: its rotated vectors y = scale * levels of the codes are
    quantized as `quantize` would, about the same mean and with the same balance, which are not looked at.

    The codes follow from the old codes alone, and the new scale is the old one times a factor that does; so a scale
    that is not finite, or becomes so, is NaN. levels, scale, scale_dtype: as of `quantize`.

    Raises ValueError, naming the argument, for bits that are not fewer, bad levels and an unknown scale rule.
    """
    q = quantized
    if isinstance(bits, bool) or bits not in range(1, q.bits):
        raise ValueError(f"bits: got {bits!r}, allowed are 1 to {q.bits - 1}, fewer than the rows have")
    if scale not in SCALES:
        raise ValueError(f"scale: got {scale!r}, allowed are {SCALES}")
    table = _levels_of(levels, bits)
    codes, factor, u = _encode(_levels_of(q.levels, q.bits)[q.codes], table, scale)
    with np.errstate(over="ignore", invalid="ignore"):
        gamma = (q.scale * factor).astype(scale_dtype).astype(np.float64)
    gamma = np.where(np.isfinite(gamma), gamma, np.nan)
    return Quantized(codes, gamma, u, bits, q.rotation, table, q.mean, q.balance)


_SAME: Any = object()


def dequantize(
    quantized: Quantized, *, rotation: Rotation = _SAME, levels: Levels = _SAME, mean: Optional[np.ndarray] = _SAME
) -> np.ndarray:
    """Vectors float64 [..., head_dim] from a `Quantized`. The options replace what it was quantized with;
    rotation=None gives them still rotated, mean=None still centered."""
    given: dict[str, Any] = {"rotation": rotation, "levels": levels, "mean": mean}
    q = replace(quantized, **{k: v for k, v in given.items() if v is not _SAME})
    table = _levels_of(q.levels, q.bits)
    x = _rotate(table[q.codes] * q.scale[..., None], q.rotation, inverse=True)
    x = x if q.balance is None else x / np.asarray(q.balance, np.float64)
    return x if q.mean is None else x + np.asarray(q.mean, np.float64)


# ---- the packed row (scheme.py) ------------------------------------------------------------------------------
def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """codes [..., head_dim] -> words uint32 [..., words_per_row(bits, head_dim)]."""
    codes = np.asarray(codes).astype(np.uint32)
    words = np.zeros((*codes.shape[:-1], words_per_row(bits, codes.shape[-1])), np.uint32)
    for dim, word, shift, code_shift, width in bit_fields(bits, codes.shape[-1]):
        words[..., word] |= (codes[..., dim] >> np.uint32(code_shift) & np.uint32(2**width - 1)) << np.uint32(shift)
    return words


def from_packed(
    words: np.ndarray,
    scale: np.ndarray,
    bits: int,
    head_dim: int,
    *,
    rotation: Rotation = 0,
    mean: Optional[np.ndarray] = None,
    balance: Optional[np.ndarray] = None,
) -> Quantized:
    """The `Quantized` (without `normalized`) of packed rows as a cache holds them.

    words: uint32 [..., words_per_row]. scale: [..., 1]. rotation, mean, balance: as `quantize` was given
    them.
    """
    scale = np.asarray(scale)[..., 0].astype(np.float64)
    return Quantized(unpack(words, bits, head_dim), scale, None, bits, rotation, None, mean, balance)


def unpack(words: np.ndarray, bits: int, head_dim: int) -> np.ndarray:
    """words uint32 [..., words_per_row] -> codes uint8 [..., head_dim]."""
    words = np.asarray(words, np.uint32)
    codes = np.zeros((*words.shape[:-1], head_dim), np.uint8)
    for dim, word, shift, code_shift, width in bit_fields(bits, head_dim):
        codes[..., dim] |= (
            (words[..., word] >> np.uint32(shift) & np.uint32(2**width - 1)) << np.uint32(code_shift)
        ).astype(np.uint8)
    return codes


# ---- means ---------------------------------------------------------------------------------------------------
def statistics(x: np.ndarray, first: int, segment: int) -> tuple[np.ndarray, np.ndarray]:
    """Of vectors x [..., L, D], packed tokens first, first + 1, ..., in segments of `segment` tokens: (sums float64
    [..., S, D] of those of each segment, energy float64 [..., 1, 1], the sum of the squares of all).

    A vector that is not finite, or whose root mean square is beyond LARGEST, cannot be packed and counts as zeros."""
    x = np.asarray(x, np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        x = np.where(np.square(x).mean(-1, keepdims=True) <= float(LARGEST) ** 2, x, 0)
    segments = (first + np.arange(x.shape[-2])) // segment - first // segment
    sums = np.stack([x[..., segments == s, :].sum(-2) for s in range(segments[-1] + 1)], axis=-2)
    return sums, np.square(x).sum((-2, -1), keepdims=True)


# ---- attention -----------------------------------------------------------------------------------------------
def attention(
    queries: np.ndarray,
    keys: Union[np.ndarray, Quantized],
    values: Union[np.ndarray, Quantized],
    *,
    scale: float,
    mask: Union[np.ndarray, str, None] = None,
    sinks: Optional[np.ndarray] = None,
) -> np.ndarray:
    """softmax(scale * q k^T + mask) v in float64.

    queries: [B, n_heads, L, D]. keys, values: [B, n_kv_heads, N, D] arrays or `Quantized`; n_heads is a multiple
    of n_kv_heads, consecutive query heads share a kv head. mask: None, "causal" (the L queries are the last of
    the N tokens), boolean (True = attend) or additive, broadcast to [B, n_heads, L, N]. sinks: [n_heads], a
    logit per head that takes weight and gives no value (gpt-oss).

    Returns [B, n_heads, L, D of values]. A row that attends to nothing gives 0, one that attends to a token that is not
    finite gives NaN; a token that a row does not see does not matter to it, finite or not. Raises ValueError for a
    number of heads that is no multiple of n_kv_heads and for an unknown mask.
    """
    keys, values = (dequantize(a) if isinstance(a, Quantized) else np.asarray(a, np.float64) for a in (keys, values))
    queries = np.asarray(queries, np.float64)
    group = queries.shape[1] // keys.shape[1]
    if group * keys.shape[1] != queries.shape[1]:
        raise ValueError(f"queries: {queries.shape[1]} heads, expected a multiple of {keys.shape[1]} kv heads")
    keys, values = np.repeat(keys, group, 1), np.repeat(values, group, 1)
    logits = scale * queries @ keys.swapaxes(-1, -2)
    n_queries, n_keys = logits.shape[-2:]
    if isinstance(mask, str):
        if mask != "causal":
            raise ValueError(f"mask: got {mask!r}, allowed are None, 'causal' or an array")
        mask = np.arange(n_keys) <= np.arange(n_keys - n_queries, n_keys)[:, None]
    if mask is not None:
        mask = np.asarray(mask)
        seen = mask if mask.dtype == bool else mask > -np.inf
        logits = np.where(seen, logits if mask.dtype == bool else logits + mask, -np.inf)
    top = logits.max(-1, keepdims=True)
    if sinks is not None:
        sinks = np.asarray(sinks, np.float64).reshape(-1, 1, 1)
        top = np.maximum(top, sinks)
    weights = np.exp(logits - np.where(np.isfinite(top), top, 0.0))
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks - top)
    finite = np.isfinite(values).all(-1, keepdims=True)  # 0 * NaN is NaN: of a token that a row does not see too
    spoiled = weights @ ~finite > 0
    out = np.where(spoiled, np.nan, weights @ np.where(finite, values, 0))
    return np.divide(out, total, out=np.zeros_like(out), where=total != 0)


# ---- the paper's inner-product variant -----------------------------------------------------------------------
@dataclass(frozen=True)
class QuantizedProduct:
    """The paper's Q_prod: bits - 1 bits of Lloyd-Max codes plus one sign bit of a projection of the residual.

    base: `Quantized` at bits - 1, or None for bits = 1. signs: int8 [..., D]. residual_norm: float64 [...].
    projection: Gaussian S [D, D].
    """

    base: Optional[Quantized]
    signs: np.ndarray
    residual_norm: np.ndarray
    projection: np.ndarray


def quantize_product(x: np.ndarray, bits: int, *, rotation: Rotation = 0, projection: np.ndarray) -> QuantizedProduct:
    """The paper's unbiased inner-product quantizer (arXiv 2504.19874, algorithm 2) of x [..., D].

    QJL of the residual r = x - base: signs of S r with a Gaussian S [D, D], and ||r||. Only here, to reproduce
    the paper: its variance hurts attention, so no kernel and no cache offers it.
    """
    x = _check_vectors(x)
    base, residual = None, x
    if bits > 1:
        base = quantize(x, bits - 1, rotation=rotation, levels="lloyd-max", scale="norm", scale_dtype=np.float64)
        residual = x - dequantize(base)
    signs = np.where(residual @ projection.T < 0, -1, 1).astype(np.int8)
    return QuantizedProduct(base, signs, np.linalg.norm(residual, axis=-1), projection)


def dequantize_product(quantized: QuantizedProduct) -> np.ndarray:
    """Vectors [..., D] whose dot product with any y is an unbiased estimate of <x, y>."""
    q = quantized
    head_dim = q.signs.shape[-1]
    correction = np.sqrt(np.pi / 2) / head_dim * q.residual_norm[..., None] * (q.signs @ q.projection)
    return correction if q.base is None else dequantize(q.base) + correction
