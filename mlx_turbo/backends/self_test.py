"""Is a backend right? Random sides, what they restore to, and comparison with the NumPy reference.

One kit for a kernel's first use, `mlx-turbo doctor`, `mlx-turbo bench` and the tests.
"""

from typing import Callable, NamedTuple, Optional, Sequence, Union

import mlx.core as mx
import numpy as np

from ..quant import codebook, reference, rotation
from ..quant.reference import Quantized
from ..quant.scheme import SCALES
from .attend_launch import MAX_QUERY_TOKENS, SEGMENT_STEP, AttendShape, AttendTuning, plan_launches
from .device import float32_is_tf32
from .sides import ONE_SEGMENT, Balance, CachedSide, PackedSide, QuantizeSide, RopePart

# ---- the table of tolerances -----------------------------------------------------------------------------------
# Rounding to the output's dtype: half a unit in the last place. float32 is left to the other tables.
ROUNDING = {mx.float32: 0, mx.float16: 2**-11, mx.bfloat16: 2**-8}
# Largest error of a restored vector, relative to its largest number: rounding of the output's dtype, and of about ten
# float32 operations.
TOLERANCE = {mx.float32: 5e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}
# Largest error of attention, relative to the largest output: float32 sums of up to D products.
ATTEND_TOLERANCE = 4e-6
# A code may be off by one where the reference is this close to the midpoint of two levels, relative to it: float32
# sums of the transform and of the norm.
TIE = 2e-5
# Attention by MLX's own kernel over restored tokens: keys and values are rounded to the type before they are summed.
RESTORED = {mx.float32: 5e-5, mx.float16: 4e-3, mx.bfloat16: 3e-2}


def attend_tolerance(dtype: mx.Dtype, n_queries: int = 1, fused: bool = True) -> float:
    """Largest error of attention allowed, relative to the largest output. n_queries: more than a kernel does at once
    are attended over restored tokens (attend.py). fused: whether a kernel does fewer, or MLX operations. Where these
    round float32 to TF32, which has as many bits as float16, float16's error is allowed."""
    by_operations = n_queries > MAX_QUERY_TOKENS or not fused
    if by_operations and dtype == mx.float32 and float32_is_tf32():
        return RESTORED[mx.float16]
    if n_queries > MAX_QUERY_TOKENS:
        return RESTORED[dtype]
    return ATTEND_TOLERANCE + (TOLERANCE[dtype] if dtype != mx.float32 else 0)


def to_float64(x: mx.array) -> np.ndarray:
    """An array of any float dtype (NumPy has no bfloat16) as float64."""
    return np.array(x.astype(mx.float32)).astype(np.float64)


def random_array(rng: "np.random.Generator", shape: Sequence[int], dtype: mx.Dtype = mx.float32) -> mx.array:
    """Numbers from N(0, 1), rounded to `dtype`."""
    return mx.array(rng.standard_normal(tuple(shape)).astype(np.float32)).astype(dtype)


def random_cached_side(
    rng: "np.random.Generator",
    shape: tuple[int, int, int],
    counts: tuple[int, int, int],
    bits: int,
    dtype: mx.Dtype,
    segment: int = 0,
    *,
    seed: int = 0,
    room: int = 0,
    growth: Optional[np.ndarray] = None,
    balanced: bool = False,
) -> CachedSide:
    """A `CachedSide` of random tokens; `restored_tokens` says what it stands for.

    shape: (batch, n_kv_heads, head_dim). counts: sink, packed and recent tokens; a part without tokens is None.
    segment: packed tokens are relative to means, one for this many of them; 0 for no means. They are there with 0 bits
    too, where they must do nothing. seed: of the rotation. growth: [tokens], each token is multiplied by its number.
    balanced: whether the channels have factors, between 1/2 and 2.
    room: rows of capacity behind the last token of each part, filled with what must never be read: NaN, all bits set.
    """
    batch, n_kv_heads, head_dim = shape
    n_sink, n_packed, _ = counts
    x = rng.standard_normal((batch, n_kv_heads, sum(counts), head_dim))
    if growth is not None:
        x *= growth[:, None]
    exact = np.array(mx.array(x.astype(np.float32)).astype(dtype).astype(mx.float32))
    means = None
    if segment:
        means = rng.standard_normal((batch, n_kv_heads, -(-max(n_packed, 1) // segment), head_dim)).astype(np.float16)

    def buffer(rows: Optional[np.ndarray], dtype: mx.Dtype, unread: float = np.nan) -> Optional[mx.array]:
        if rows is None or not rows.shape[2]:
            return None
        spare = np.full((*rows.shape[:2], room, rows.shape[3]), unread, rows.dtype)
        return mx.array(np.concatenate([rows, spare], axis=2)).astype(dtype)

    sink, middle, recent = np.split(exact, [n_sink, n_sink + n_packed], axis=2)
    codes, scale = buffer(middle, dtype), None
    if n_packed and bits:
        packed = reference.quantize(middle, bits, rotation=seed)
        codes = buffer(packed.packed(), mx.uint32, 0xFFFFFFFF)
        scale = buffer(packed.scale[..., None].astype(np.float16), mx.float16)
    parts = buffer(sink, dtype), codes, scale, buffer(recent, dtype)
    balance = random_balance(rng, (batch, n_kv_heads, head_dim)) if balanced else None
    return CachedSide(*parts, bits, head_dim, buffer(means, mx.float16), segment, balance)


def random_balance(rng: "np.random.Generator", shape: tuple[int, int, int]) -> Balance:
    """Factors between 1/2 and 2 for the channels of (batch, n_kv_heads, head_dim)."""
    factors = 2.0 ** rng.uniform(-1, 1, (*shape[:2], 1, shape[2]))
    return Balance(mx.array(factors.astype(np.float32)))


def factors_of(side: Union[QuantizeSide, PackedSide, CachedSide]) -> Optional[np.ndarray]:
    """The factors of a side's channels, float64 [B, H, 1, D], or None."""
    return None if side.balance is None else to_float64(side.balance.factors)


def means_of(side: QuantizeSide) -> Optional[np.ndarray]:
    """The mean that is subtracted from each vector of a side, float64 [B, H, L, D], or None."""
    if side.mean is None:
        return None
    segments = (side.first % side.segment + np.arange(side.x.shape[2])) // side.segment
    return to_float64(side.mean)[:, :, segments]


def restored_tokens(side: CachedSide, counts: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """The tokens of a `CachedSide` as the reference restores them, float64 [B, H, sum(counts), head_dim].

    counts: sink, packed and recent tokens. seed: of the rotation.
    """
    n_sink, n_packed, n_recent = counts
    parts = []
    if n_sink and side.sink is not None:
        parts.append(to_float64(side.sink[:, :, :n_sink]))
    if n_packed and side.bits:
        codes, scale = (np.array(a[:, :, :n_packed]) for a in side.packed()[:2])
        rows = reference.from_packed(codes, scale, side.bits, side.head_dim, rotation=seed)
        packed = reference.dequantize(rows)
        if side.means is not None:
            means = to_float64(side.means[:, :, : -(-n_packed // side.segment)])
            packed += rotation.unrotate(means, seed)[:, :, np.arange(n_packed) // side.segment]
        factors = factors_of(side)
        parts.append(packed if factors is None else packed / factors)
    elif n_packed and side.codes is not None:
        parts.append(to_float64(side.codes[:, :, :n_packed]))
    if n_recent and side.recent is not None:
        parts.append(to_float64(side.recent[:, :, :n_recent]))
    return np.concatenate(parts, axis=2)


def rope_logits(rope: RopePart, counts: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """What a `RopePart` adds to the logits, float64 [B, n_heads, L, sum(counts)]. seed: of the rotation."""
    keys = restored_tokens(rope.keys, counts, seed)
    return to_float64(rope.queries) @ np.repeat(keys, rope.queries.shape[1] // keys.shape[1], 1).swapaxes(-1, -2)


def reference_rows(side: QuantizeSide, seed: Optional[int] = 0, scale: str = SCALES[0]) -> Quantized:
    """What the reference makes of a `QuantizeSide`. seed: of the rotation, None for none. scale: the scale's rule."""
    mean, balance = means_of(side), factors_of(side)
    return reference.quantize(to_float64(side.x), side.bits, rotation=seed, mean=mean, balance=balance, scale=scale)


def packed_side(rows: Quantized) -> PackedSide:
    """Rows that the reference has quantized, [B, H, L, head_dim], as a backend restores them."""
    scale = mx.array(rows.scale[..., None].astype(np.float16))
    mean = None if rows.mean is None else mx.array(np.asarray(rows.mean, np.float32))
    balance = None if rows.balance is None else Balance(mx.array(np.asarray(rows.balance, np.float32)))
    return PackedSide(mx.array(rows.packed()), scale, rows.bits, rows.codes.shape[-1], mean, balance)


# ---- comparison ------------------------------------------------------------------------------------------------
def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """The largest error relative to the largest number."""
    return float(np.abs(got - want).max() / np.abs(want).max())


def too_large(error: float, allowed: float) -> Optional[str]:
    """What is wrong with a relative error, or None. NaN is wrong."""
    return None if error <= allowed else f"relative error {error:.1e}, allowed is {allowed:.0e}"


def compare_vectors(got: np.ndarray, want: np.ndarray, dtype: mx.Dtype) -> Optional[str]:
    """What is wrong with restored vectors `got` [..., D] of `dtype` against the reference's, or None."""
    error = np.abs(got - want).max(-1) / np.maximum(np.abs(want).max(-1), 1e-30)
    return too_large(float(error.max(initial=0)), TOLERANCE[dtype])  # the maximum is NaN if one is


def compare_quantized(words: np.ndarray, scale: np.ndarray, want: Quantized, tie: float = TIE) -> Optional[str]:
    """What is wrong with packed rows `words` and `scale` [..., 1] against a reference `Quantized`, or None.

    Codes must be equal, except by one where the reference is within `tie` (relative) of the midpoint of two levels;
    padding bits must be 0. Scales must be within one float16 rounding; two where codes differ, and what the other
    codes move <y, c> by, which the scale may be divided by.
    """
    codes = reference.unpack(words, want.bits, want.codes.shape[-1]).astype(int)
    if not np.array_equal(reference.pack(codes, want.bits), words):
        return "bits that belong to no dim are set"
    off = (codes != want.codes) & (want.scale[..., None] != 0)
    moved = 0.0
    if off.any():
        # the vector as the reference saw it, in units of its levels
        u, levels = want.normalized, np.asarray(want.levels)
        assert u is not None, "rows of `quantize`, not of `from_packed`"
        middle = codebook.thresholds(levels)[np.minimum(codes, want.codes)[off]]
        wrong = (np.abs(codes - want.codes)[off] > 1) | (np.abs(u[off] - middle) > tie * np.maximum(np.abs(middle), 1))
        if wrong.any():
            return f"{int(wrong.sum())} of {codes.size} codes differ away from ties"
        had, has = ((u * levels[c]).sum(-1) for c in (want.codes, codes))
        moved = np.abs(np.divide(had, has, out=np.ones_like(has), where=has > 0) - 1) * want.scale
    step = np.spacing(np.maximum(np.abs(want.scale), 6e-5).astype(np.float16)).astype(np.float64)
    error = (np.abs(scale[..., 0].astype(np.float64) - want.scale) - moved) / step
    if not (error <= 1 + off.any(-1)).all():
        return f"scale off by {error.max():.1f} float16 roundings"
    return None


def compare_statistics(
    sums: np.ndarray, energy: np.ndarray, x: np.ndarray, first: int, segment: int
) -> tuple[Optional[str], float]:
    """What is wrong with sums [B, H, S, D] and energy [B, H, 1, 1] of x [B, H, L, D] (`select.statistics`) against the
    reference, or None, and the largest error relative to the largest number of a head."""
    worst = 0.0
    for got, want in zip((sums, energy), reference.statistics(x, first, segment)):
        if got.shape != want.shape:
            return f"got shape {got.shape}, expected {want.shape}", np.inf
        error = np.abs(got - want).max((2, 3)) / np.maximum(np.abs(want).max((2, 3)), 1e-30)
        worst = max(worst, float(np.where(np.isnan(error), np.inf, error).max()))
    return too_large(worst, TOLERANCE[mx.float32]), worst


# ---- first use of a kernel -------------------------------------------------------------------------------------
# Each function builds one specialization by launching it for a few vectors, and says what is wrong or None. launch: the
# method of KernelBackend.
class VectorsKernel(NamedTuple):
    """One side of a specialization of quantize.metal or dequantize.metal."""

    head_dim: int
    bits: int
    rotates: bool
    has_mean: int  # False or True; of dequantize.metal also 2: means of segments

    def __str__(self) -> str:
        return f"head_dim {self.head_dim}, {self.bits} bits{', mean' if self.has_mean else ''}"


class StatisticsKernel(NamedTuple):
    """A specialization of statistics.metal. dtype: of the vectors."""

    head_dim: int
    dtype: mx.Dtype

    def __str__(self) -> str:
        return f"head_dim {self.head_dim}, {self.dtype}"


class RequantizeKernel(NamedTuple):
    """A specialization of requantize.metal. rule: of the scale."""

    head_dim: int
    bits: int
    to_bits: int
    rule: str

    def __str__(self) -> str:
        return f"head_dim {self.head_dim}, {self.bits} to {self.to_bits} bits, {self.rule}"


class AttendSide(NamedTuple):
    """One side of a specialization of attend.metal. exact_dtype: of sink and recent tokens."""

    bits: int
    head_dim: int
    has_means: bool
    exact_dtype: mx.Dtype

    def __str__(self) -> str:
        return f"head_dim {self.head_dim}, {self.bits} bits{', mean' if self.has_means else ''}"


class AttendKernel(NamedTuple):
    """A specialization of attend.metal. dtype: of the queries. same_sides: the values are the keys. rope: RoPE keys
    beside them."""

    keys: AttendSide
    values: AttendSide
    shape: AttendShape
    single_launch: bool
    dtype: mx.Dtype
    same_sides: bool = False
    rope: Optional[AttendSide] = None

    def __str__(self) -> str:
        values = "the same values" if self.same_sides else f"values of {self.values}"
        rope = "" if self.rope is None else f", RoPE keys of {self.rope}"
        return f"keys of {self.keys} and {values}{rope}, {self.shape.ROWS} rows, {self.dtype}"


def check_quantize(
    launch: Callable[..., list[tuple[mx.array, mx.array]]], sides: Sequence[VectorsKernel], dtype: mx.Dtype, rule: str
) -> Optional[str]:
    """quantize.metal for 21 random vectors of `dtype`, of three segments. rule: of the scale."""
    rng, prepared, wants = np.random.default_rng(0), [], []
    for kernel in sides:
        mean = random_array(rng, (1, 3, 3, kernel.head_dim)) if kernel.has_mean else None
        balance = random_balance(rng, (1, 3, kernel.head_dim)) if kernel.rotates else None
        side = QuantizeSide(random_array(rng, (1, 3, 7, kernel.head_dim), dtype), kernel.bits, mean, balance, 6, 4)
        prepared.append((side, kernel.rotates))
        wants.append(reference_rows(side, 0 if kernel.rotates else None, rule))
    for (codes, scale), want in zip(launch(prepared, 0, rule), wants):
        if problem := compare_quantized(np.array(codes), np.array(scale), want):
            return problem
    return None


def check_statistics(launch: Callable[..., tuple[mx.array, mx.array]], kernel: StatisticsKernel) -> Optional[str]:
    """statistics.metal for the tokens of three segments, as a model's projection leaves them; one is not finite."""
    rng, first, n_tokens = np.random.default_rng(0), 5, 2 * SEGMENT_STEP
    x = random_array(rng, (1, n_tokens, 2, kernel.head_dim), kernel.dtype) + 0.5
    x = mx.where(mx.arange(n_tokens)[:, None, None] == 9, mx.nan, x).astype(kernel.dtype).swapaxes(1, 2)
    for segment in (SEGMENT_STEP, ONE_SEGMENT):
        sums, energy = launch(x, first, segment)
        problem, _ = compare_statistics(to_float64(sums), to_float64(energy), to_float64(x), first, segment)
        if problem:
            return problem
    return None


def check_requantize(
    launch: Callable[[PackedSide, int, str], tuple[mx.array, mx.array]], kernel: RequantizeKernel
) -> Optional[str]:
    """requantize.metal for 21 random rows."""
    x = np.random.default_rng(0).standard_normal((1, 3, 7, kernel.head_dim))
    rows = reference.quantize(x, kernel.bits, rotation=None)
    codes, scale = launch(packed_side(rows), kernel.to_bits, kernel.rule)
    want = reference.requantize(rows, kernel.to_bits, scale=kernel.rule)
    return compare_quantized(np.array(codes), np.array(scale), want)


def check_dequantize(
    launch: Callable[..., list[mx.array]], sides: Sequence[VectorsKernel], dtype: mx.Dtype, exact: str = ""
) -> Optional[str]:
    """dequantize.metal for 21 random rows that are not the first of their buffer, restored to `dtype`; with `exact`,
    between exact tokens and relative to the means of two segments."""
    if exact:
        return _check_restore(launch, sides, dtype)
    rng, prepared, wants = np.random.default_rng(0), [], []
    for kernel in sides:
        mean = rng.standard_normal((1, 3, 1, kernel.head_dim)).astype(np.float32) if kernel.has_mean else None
        x = rng.standard_normal((1, 3, 9, kernel.head_dim))
        factors = np.array(random_balance(rng, (1, 3, kernel.head_dim)).factors) if kernel.rotates else None
        rows = reference.quantize(x, kernel.bits, rotation=0 if kernel.rotates else None, balance=factors)
        wants.append(reference.dequantize(rows, mean=mean)[:, :, 2:])
        side = packed_side(rows)._replace(mean=None if mean is None else mx.array(mean))
        prepared.append((side, kernel.rotates))
    for got, want in zip(launch(prepared, 2, 7, dtype, 0), wants):
        if problem := compare_vectors(to_float64(got), want, dtype):
            return problem
    return None


def _check_restore(
    launch: Callable[..., list[mx.array]], sides: Sequence[VectorsKernel], dtype: mx.Dtype
) -> Optional[str]:
    rng, counts, first = np.random.default_rng(0), (2, SEGMENT_STEP + 9, 5), 3
    cached: list[CachedSide] = []
    wants = []
    for kernel, segment in zip(sides, (SEGMENT_STEP, ONE_SEGMENT)):
        segment = segment if kernel.has_mean else 0
        shape = 1, 2, kernel.head_dim
        cached.append(random_cached_side(rng, shape, counts, kernel.bits, dtype, segment, balanced=not cached))
        wants.append(np.delete(restored_tokens(cached[-1], counts), np.s_[counts[0] : counts[0] + first], axis=2))
    prepared = [(side.packed(), True) for side in cached]
    for got, want in zip(launch(prepared, first, counts[1] - first, dtype, 0, cached, counts), wants):
        if problem := compare_vectors(to_float64(got), want, dtype):
            return problem
    return None


def check_attend(launch: Callable[..., mx.array], kernel: AttendKernel, tuning: AttendTuning) -> Optional[str]:
    """attend.metal, and merge.metal where there are two launches, with as many query heads as a threadgroup has rows.
    There are a few tokens of each kind, and one is masked at either end."""
    rng, counts = np.random.default_rng(0), (3, 150, 20)

    def side(s: AttendSide, segment: int, balanced: bool = False) -> CachedSide:
        shape = 1, 1, s.head_dim
        return random_cached_side(rng, shape, counts, s.bits, s.exact_dtype, s.has_means * segment, balanced=balanced)

    keys = side(kernel.keys, SEGMENT_STEP, not kernel.same_sides)
    values = keys if kernel.same_sides else side(kernel.values, ONE_SEGMENT)
    key_dim, rope, rope_dim = kernel.keys.head_dim, None, 0
    queries = random_array(rng, (1, kernel.shape.rows, 1, key_dim), kernel.dtype)
    if kernel.rope is not None:
        rope_dim = kernel.rope.head_dim
        rope = RopePart(random_array(rng, (1, kernel.shape.rows, 1, rope_dim), kernel.dtype), side(kernel.rope, 0))
    token = mx.arange(sum(counts))
    mask = (token > 0) & (token < sum(counts) - 1)
    value_dim, n_heads = kernel.values.head_dim, kernel.shape.rows
    query_dim = key_dim + rope_dim
    plan = plan_launches(tuning, kernel.shape, kernel.single_launch, query_dim, value_dim, 1, n_heads, 1, 1, counts)
    got = launch(plan, kernel, queries, keys, values, counts, key_dim**-0.5, mask, None, 0, rope)
    added = None if rope is None else rope_logits(rope, counts)[..., 1:-1]
    seen = (restored_tokens(side, counts)[:, :, 1:-1] for side in (keys, values))
    want = reference.attention(to_float64(queries), *seen, scale=key_dim**-0.5, mask=added)
    return too_large(relative_error(to_float64(got), want), attend_tolerance(kernel.dtype))
