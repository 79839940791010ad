"""A backend of GPU kernels: builds and checks each one once, plans its launches, and launches it.

metal.py says how Metal's are reached; another kind of GPU is another callable (`KernelBackend`). Each combination of
template values is a library of its own. Before one is used for real it is built and compared with the NumPy reference
on a few vectors, once per process; a kernel that does not build or disagrees raises `BackendError`. Nothing here ever
falls back to another backend.
"""

import contextlib
import functools
import math
import threading
from typing import Any, Callable, Hashable, Iterator, Mapping, NamedTuple, Optional, Sequence, Union

import mlx.core as mx
import numpy as np

from ..quant import rotation
from ..quant.scheme import LARGEST, SCALES, words_per_row
from . import self_test
from .attend_launch import (
    SEGMENT_STEP,
    AttendPlan,
    AttendTuning,
    attend_unsupported,
    most_merge_simdgroups,
    plan_attend,
    rotates_in_kernel,
    vectors_per_simdgroup,
)
from .device import device_name
from .rotate import diagonal, diagonals, rotate, unrotate
from .self_test import AttendKernel, AttendSide, RequantizeKernel, StatisticsKernel, VectorsKernel
from .sides import BackendError, Balance, CachedSide, PackedSide, QuantizeSide, RopePart, WrongResultError
from .sources import metal_source
from .statistics import UNIT

Counts = tuple[int, int, int]  # sink, packed and recent tokens
Mask = Union[None, str, mx.array]
Template = list[tuple[str, Any]]

LOG2_E = float(np.log2(np.e))
SIMDGROUPS_PER_THREADGROUP = 8  # of all kernels but those of attention
QUANTIZE_ARGUMENTS = (
    ["x0", "x1", "shift0", "shift1", "diag0", "diag1", "numbers"],
    ["codes0", "codes1", "scale0", "scale1"],
)
DEQUANTIZE_ARGUMENTS = (
    [f"{name}{i}" for name in ("codes", "scale", "mean", "sink", "recent", "diag") for i in (0, 1)] + ["span"],
    ["x0", "x1"],
)
STATISTICS_ARGUMENTS = ["x", "numbers"], ["sums", "energy"]
REQUANTIZE_ARGUMENTS = ["codes", "scale"], ["new_codes", "new_scale"]
OF_SEGMENTS = 2  # MEAN of dequantize.metal: rotated means, one for each segment
WITH_EXACT = "between exact tokens"
ATTEND_ARGUMENTS = (
    ["queries"]
    + [f"{side}_{part}" for side in "kv" for part in ("sink", "codes", "scale", "recent")]
    + ["k_means", "v_means", "mask", "sinks", "diagonals"],
    ["acc"],
)
MERGE_ARGUMENTS = ["acc", "means", "sinks", "diagonals"], ["out"]


class KernelBackend:
    """Quantize, restore and attend by the kernels in metal/.

    metal_kernel: builds a kernel, with the arguments of mx.fast.metal_kernel; what it returns launches it.
    name: of the backend, as in `use_backend(name)`. title: the same for people, in messages: "Metal".
    is_real: whether the kernels run on a GPU, not in a simulator.
    tuned: {(key bits, value bits, key dim, value dim): AttendTuning} instead of `tuning`, as tuning.load returns it.
    """

    tiles_ahead = 1  # of tiled_attention

    def __init__(
        self,
        metal_kernel: Callable[..., Callable[..., list[mx.array]]],
        name: str,
        title: str,
        *,
        is_real: bool = True,
        tuned: Optional[Mapping[tuple[int, int, int, int], AttendTuning]] = None,
    ):
        self.metal_kernel, self.name, self.title, self.is_real = metal_kernel, name, title, is_real
        self.tuning = AttendTuning()
        self.tuned = dict(tuned or {})
        self._kernels: dict[str, Callable[..., list[mx.array]]] = {}
        self._tested: set[Hashable] = set()
        self.always_two_launches = False

    def describe(self) -> str:
        """What runs, for people: the backend and the chip."""
        return f"{self.name} ({device_name()})"

    def tuning_of(self, keys: CachedSide, values: CachedSide) -> AttendTuning:
        """The tuning for two sides: what `bench kernels --tune` found for this chip, else the default."""
        if not self.tuned:
            return self.tuning
        return self.tuned.get((keys.bits, values.bits, keys.head_dim, values.head_dim), self.tuning)

    # ---- what a backend does -----------------------------------------------------------------------------------
    def quantize(
        self, sides: Sequence[QuantizeSide], seed: int = 0, scale: str = SCALES[0]
    ) -> list[tuple[mx.array, mx.array]]:
        """Quantize one or two `QuantizeSide` of equal [B, H, L] in one launch. scale: its rule, as reference.quantize.

        Returns per side (codes uint32 [B, H, L, words], scale float16 [B, H, L, 1]).
        """
        prepared = []
        for side in sides:
            in_kernel = rotates_in_kernel(side.x.shape[-1])
            if not in_kernel:
                side = QuantizeSide(rotate(side.centered(), seed), side.bits)
            prepared.append((side, in_kernel))
        if len({side.x.dtype for side, _ in prepared}) > 1:  # one input rotated beforehand, the other not
            prepared = [(side._replace(x=side.x.astype(mx.float32)), r) for side, r in prepared]
        kernels = tuple(VectorsKernel(s.x.shape[-1], s.bits, r, s.mean is not None) for s, r in prepared)
        self._test_vectors("quantize", kernels, prepared[0][0].x.dtype, scale)
        return self.launch_quantize(prepared, seed, scale)

    def statistics(self, x: mx.array, first: int, segment: int) -> tuple[mx.array, mx.array]:
        """Sums float32 [B, H, S, D] by segment and energy float32 [B, H, 1, 1] of x [B, H, L, D], any strides, as
        select.statistics: x is read once, where it lies. segment: at most UNIT, or more than first % segment + L."""
        kernel = StatisticsKernel(x.shape[3], x.dtype)
        if kernel not in self._tested:
            self.run_check(
                f"statistics.metal with {kernel}", lambda: self_test.check_statistics(self.launch_statistics, kernel)
            )
            self._tested.add(kernel)
        return self.launch_statistics(x, first, segment)

    def requantize(self, side: PackedSide, bits: int, scale: str = SCALES[0]) -> tuple[mx.array, mx.array]:
        """Rows with fewer `bits` from packed ones, as they lie: means and balance of the side are not looked at. scale:
        the scale's rule, as reference.requantize.

        Returns (codes uint32 [B, H, capacity, words], scale float16 [B, H, capacity, 1]).
        """
        kernel = RequantizeKernel(side.head_dim, side.bits, bits, scale)
        if kernel not in self._tested:
            what = f"requantize.metal with {kernel}"
            self.run_check(what, lambda: self_test.check_requantize(self.launch_requantize, kernel))
            self._tested.add(kernel)
        return self.launch_requantize(side, bits, scale)

    def dequantize(
        self, sides: Sequence[PackedSide], first: int, length: int, dtype: mx.Dtype, seed: int = 0
    ) -> list[mx.array]:
        """Restore tokens first .. first + length - 1 of one or two `PackedSide` in one launch.

        Returns per side x [B, H, length, head_dim] of `dtype`.
        """
        in_kernel = [rotates_in_kernel(side.head_dim) for side in sides]
        out_dtype = dtype if all(in_kernel) else mx.float32
        prepared = [(s if r else s._replace(mean=None, balance=None), r) for s, r in zip(sides, in_kernel)]
        kernels = tuple(VectorsKernel(s.head_dim, s.bits, r, s.mean is not None) for s, r in prepared)
        self._test_vectors("dequantize", kernels, out_dtype)
        outs = self.launch_dequantize(prepared, first, length, out_dtype, seed)
        for i, side in enumerate(sides):
            if not in_kernel[i]:
                outs[i] = side.turned_back(unrotate(outs[i], seed))
        return [x.astype(dtype) for x in outs]

    def restore(
        self, keys: CachedSide, values: CachedSide, counts: Counts, seed: int = 0, first: int = 0
    ) -> Optional[list[mx.array]]:
        """All tokens of two sides in one launch, [B, Hkv, N, D] each in the dtype of the exact ones: sinks, packed
        tokens from number `first` on, recent ones.

        None where one launch cannot: a side that is not packed, exact tokens of two dtypes, or a head_dim whose
        rotation the kernel does not do.
        """
        sides = keys, values
        dtypes = {a.dtype for side in sides for a in (side.sink, side.recent) if a is not None}
        packed = [side for side in sides if side.bits and side.codes is not None and rotates_in_kernel(side.head_dim)]
        if len(packed) < 2 or len(dtypes) != 1 or counts[1] <= first:
            return None
        (dtype,) = dtypes
        kernels = tuple(VectorsKernel(s.head_dim, s.bits, True, OF_SEGMENTS * s.has_means) for s in sides)
        self._test_vectors("dequantize", kernels, dtype, WITH_EXACT)
        prepared = [(side.packed(), True) for side in sides]
        return self.launch_dequantize(prepared, first, counts[1] - first, dtype, seed, sides, counts)

    def read_rows(self, side: CachedSide, first: int, n: int) -> tuple[mx.array, None, None]:
        """For `tiled_attention`: n packed rows of a side from token `first` on, scaled but still rotated, float32
        [B, H, n, head_dim]; no scale and no other order of the dims."""
        kernels = (VectorsKernel(side.head_dim, side.bits, False, False),)
        self._test_vectors("dequantize", kernels, mx.float32)
        packed = side.packed()._replace(balance=None)
        return self.launch_dequantize([(packed, False)], first, n, mx.float32, 0)[0], None, None

    def why_not_fused(self, keys: tuple[int, int], values: tuple[int, int], n_query_tokens: int) -> Optional[str]:
        """Why `attend` does not cover this, or None if it does. keys, values: (bits, head_dim)."""
        return attend_unsupported(keys[0], values[0], keys[1], values[1], n_query_tokens)

    def attend(
        self,
        queries: mx.array,
        keys: CachedSide,
        values: CachedSide,
        counts: Counts,
        *,
        scale: float,
        mask: Mask = None,
        sinks: Optional[mx.array] = None,
        seed: int = 0,
        rope: Optional[RopePart] = None,
    ) -> mx.array:
        """softmax(scale * q k^T + mask) v over a cache's exact and packed tokens, in at most two launches.

        queries: [B, Hq, L, key_dim], any strides, L <= 16, of the last L tokens.
        counts: (n_sink, n_packed, n_recent), which is also the order of the tokens.
        mask: None, "causal", or boolean (True = attend) or additive [.., L, n_tokens], broadcast.
        sinks: [Hq], a logit per head that takes weight and gives no value.
        values: where they are the same object as keys (latents), a row is read once for both.
        rope: whose products are added to the logits; only if the values are the keys, and those are not balanced.

        Returns [B, Hq, L, value_dim] in the dtype of the queries. A row that attends to nothing gives 0. Raises
        ValueError for what `why_not_fused` names and for a segment of the keys that is no multiple of 128.
        """
        if keys.has_means and (keys.segment < 1 or keys.segment % SEGMENT_STEP):
            raise ValueError(f"keys.segment: got {keys.segment}, expected a multiple of {SEGMENT_STEP}")
        if values is keys and (keys.balance is not None or keys.has_means):
            raise ValueError("values: got keys that are balanced or have means, allowed are others")
        if rope is not None and (values is not keys or rope.keys.has_means or rope.keys.balance is not None):
            raise ValueError("rope: got balanced keys, keys with means, or values of their own, allowed are latents")
        launches = self._attend_launches(queries, keys, values, counts, rope)
        if launches.kernel not in self._tested:
            kernel, tuning = launches.kernel, self.tuning_of(keys, values)
            self.run_check(
                f"attend.metal with {kernel}", lambda: self_test.check_attend(self._launch_planned, kernel, tuning)
            )
            self._tested.add(kernel)
        return self.launch_attend(launches, queries, keys, values, counts, scale, mask, sinks, seed, rope)

    def plan(
        self,
        queries: mx.array,
        keys: CachedSide,
        values: CachedSide,
        counts: Counts,
        rope: Optional[RopePart] = None,
    ) -> AttendPlan:
        """How `attend` would launch. Raises ValueError for what `why_not_fused` names."""
        return self._attend_launches(queries, keys, values, counts, rope).plan

    def _attend_launches(
        self, queries: mx.array, keys: CachedSide, values: CachedSide, counts: Counts, rope: Optional[RopePart]
    ) -> "AttendLaunches":
        dtype, same_sides = queries.dtype, values is keys
        return _attend_launches(
            self.tuning_of(keys, values),
            AttendSide(keys.bits, keys.head_dim, keys.has_means, keys.exact_dtype(dtype)),
            AttendSide(values.bits, values.head_dim, values.has_means, values.exact_dtype(dtype)),
            queries.shape,
            keys.n_kv_heads,
            dtype,
            counts,
            self.always_two_launches,
            same_sides,
            None
            if rope is None
            else AttendSide(rope.keys.bits, rope.keys.head_dim, False, rope.keys.exact_dtype(dtype)),
        )

    # ---- launches ----------------------------------------------------------------------------------------------
    def kernel(self, name: str, inputs: list[str], outputs: list[str]) -> Callable[..., list[mx.array]]:
        """The kernel of metal/<name>.metal, to be called with what it is launched for."""
        if name not in self._kernels:
            header, body = metal_source(name)
            self._kernels[name] = self.metal_kernel(
                f"turbo_{name}", inputs, outputs, body, header=header, ensure_row_contiguous=False
            )
        return self._kernels[name]

    def launch_quantize(
        self, prepared: Sequence[tuple[QuantizeSide, bool]], seed: int, scale: str
    ) -> list[tuple[mx.array, mx.array]]:
        """`quantize` untested. prepared: sides of one dtype, and whether the kernel rotates them."""
        n = len(prepared)
        xs, shifts, diags, code_shapes, scale_shapes = [], [], [], [], []
        numbers: list[int] = []
        template: Template = [("RULE", SCALES.index(scale))]
        for i in (0, 1):
            (x, bits, mean, balance, first, segment), rotates = prepared[min(i, n - 1)]
            *batch, head_dim = x.shape
            diag = diagonals(head_dim, seed)
            xs.append(x)
            diags.append(diag[None] if balance is None else balance.made(_diagonals_of_heads, seed, False))
            if mean is not None:
                mean = mx.contiguous(
                    diagonal(head_dim, seed, 0, -1) * (mean if balance is None else mean * balance.factors)
                )
            shifts.append(diag[None, None] if mean is None else mean)
            numbers += (0, batch[2]) if mean is None or mean.shape[2] == 1 else (first % segment, segment)
            template += _vectors_template(i, VectorsKernel(head_dim, bits, rotates, mean is not None))
            code_shapes.append((*batch, words_per_row(bits, head_dim)) if i < n else (1,))
            scale_shapes.append((*batch, 1) if i < n else (1,))
        outs = self.kernel("quantize", *QUANTIZE_ARGUMENTS)(
            inputs=[*xs, *shifts, *diags, _cached_in_this_thread(_as_strides)(*numbers)],
            template=template,
            output_shapes=code_shapes + scale_shapes,
            output_dtypes=[mx.uint32] * 2 + [mx.float16] * 2,
            **_vectors_grid(math.prod(xs[0].shape[:3]), [x.shape[-1] for x in xs[:n]]),
        )
        return [(outs[i], outs[2 + i]) for i in range(n)]

    def launch_statistics(self, x: mx.array, first: int, segment: int) -> tuple[mx.array, mx.array]:
        """`statistics` untested."""
        B, H, L, D = x.shape
        unit = min(segment, UNIT)
        n_units = -(-(first % unit + L) // unit)
        sums, energy = self.kernel("statistics", *STATISTICS_ARGUMENTS)(
            inputs=[x, _cached_in_this_thread(_as_strides)(first % unit, unit)],
            template=[("D", D), ("LARGEST", LARGEST), ("SIMDGROUPS", SIMDGROUPS_PER_THREADGROUP)],
            output_shapes=[(B, H, n_units, D), (B, H, n_units, 1)],
            output_dtypes=[mx.float32] * 2,
            grid=(32, SIMDGROUPS_PER_THREADGROUP * B * H * n_units, 1),
            threadgroup=(32, SIMDGROUPS_PER_THREADGROUP, 1),
        )
        if segment > unit:
            sums = sums.sum(2, keepdims=True)
        return sums, energy.sum(2, keepdims=True)

    def launch_requantize(self, side: PackedSide, bits: int, scale: str) -> tuple[mx.array, mx.array]:
        """`requantize` untested."""
        *batch, _ = side.codes.shape
        codes, scales = self.kernel("requantize", *REQUANTIZE_ARGUMENTS)(
            inputs=[side.codes, side.scale],
            template=[("FROM", side.bits), ("TO", bits), ("D", side.head_dim), ("RULE", SCALES.index(scale))],
            output_shapes=[(*batch, words_per_row(bits, side.head_dim)), (*batch, 1)],
            output_dtypes=[mx.uint32, mx.float16],
            **_vectors_grid(math.prod(batch), [side.head_dim]),
        )
        return codes, scales

    def launch_dequantize(
        self,
        prepared: Sequence[tuple[PackedSide, bool]],
        first: int,
        length: int,
        dtype: mx.Dtype,
        seed: int,
        cached: Sequence[CachedSide] = (),
        counts: Counts = (0, 0, 0),
    ) -> list[mx.array]:
        """`dequantize` untested. prepared: sides, and whether the kernel turns them back. cached: the sides they belong
        to, of which the exact tokens (counts) and the means of segments come too."""
        n, template = len(prepared), [("T", dtype), ("EXACT", bool(cached))]
        codes, scales, means, diags, shapes, exact, segments, shared = [], [], [], [], [], [], [], []
        for i in (0, 1):
            side, rotates = prepared[min(i, n - 1)]
            diag = diagonals(side.head_dim, seed)
            codes.append(side.codes)
            scales.append(side.scale)
            diags.append(diag[None] if side.balance is None else side.balance.made(_diagonals_of_heads, seed, True))
            shared.append(math.prod(side.codes.shape[:2]) // diags[-1].shape[0])
            mean, has_mean, segment = side.mean, int(side.mean is not None), 0
            if cached and cached[i].has_means:
                mean, has_mean, segment = cached[i].means, OF_SEGMENTS, cached[i].segment
            means.append(diag[None, None] if mean is None else mean)
            segments.append(segment)
            here = [a for a in (cached[i].sink, cached[i].recent) if a is not None] if cached else []
            exact.append((here[0], here[-1]) if here else (_nothing(dtype), _nothing(dtype)))
            template += _vectors_template(i, VectorsKernel(side.head_dim, side.bits, rotates, has_mean))
            n_tokens = counts[0] + length + counts[2]
            shapes.append((*side.codes.shape[:2], n_tokens, side.head_dim) if i < n else (1,))
        sinks, recents = zip(*exact)
        span = _span(first, length, counts[0], counts[2], *segments, *shared)
        outs = self.kernel("dequantize", *DEQUANTIZE_ARGUMENTS)(
            inputs=[*codes, *scales, *means, *sinks, *recents, *diags, span],
            template=template,
            output_shapes=shapes,
            output_dtypes=[dtype] * 2,
            **_vectors_grid(math.prod(shapes[0][:3]), [side.head_dim for side, _ in prepared]),
        )
        return list(outs[:n])

    def launch_attend(
        self,
        launches: "AttendLaunches",
        queries: mx.array,
        keys: CachedSide,
        values: CachedSide,
        counts: Counts,
        scale: float,
        mask: Mask = None,
        sinks: Optional[mx.array] = None,
        seed: int = 0,
        rope: Optional[RopePart] = None,
    ) -> mx.array:
        """`attend` untested, as planned."""
        plan, kernel, (batch, n_heads, n_query_tokens), attend, merge = launches
        flags, mask = _flags_and_mask(mask, sinks, (batch, n_heads, n_query_tokens, sum(counts)))
        diagonals = _diagonals_with_numbers(
            (keys.head_dim, values.head_dim, *([] if rope is None else [rope.keys.head_dim]), seed),
            keys.balance if keys.bits else None,
            (*counts, plan.exact_blocks, plan.blocks, plan.row_groups),
            (flags, n_query_tokens, n_heads, keys.n_kv_heads),
            scale,
            (keys.segment, plan.partial_rows, batch, plan.merge_simdgroups),
        )
        key_means = keys.means if keys.has_means else _nothing(mx.float16)
        value_means = values.means if values.has_means else _nothing(mx.float16)
        sinks_or_any = queries if sinks is None else sinks
        both = queries if rope is None else mx.concatenate([queries, rope.queries.astype(queries.dtype)], axis=-1)
        (acc,) = self.kernel("attend", *ATTEND_ARGUMENTS)(
            inputs=[
                both,
                *_side_inputs(keys, queries),
                *_side_inputs(values if rope is None else rope.keys, queries),
                key_means,
                value_means,
                _nothing(mx.bool_) if mask is None else mask,
                sinks_or_any,
                diagonals,
            ],
            **attend,
        )
        if merge is None:
            return acc
        inputs = [acc, value_means, sinks_or_any, diagonals]
        return self.kernel("merge", *MERGE_ARGUMENTS)(inputs=inputs, **merge)[0]

    def _launch_planned(self, plan: AttendPlan, kernel: AttendKernel, queries: mx.array, *arguments: Any) -> mx.array:
        batch, n_heads, n_query_tokens, _ = queries.shape
        launches = launches_of(plan, kernel, (batch, n_heads, n_query_tokens))
        return self.launch_attend(launches, queries, *arguments)

    # ---- first use ---------------------------------------------------------------------------------------------
    def _test_vectors(
        self,
        name: str,
        kernels: tuple[VectorsKernel, ...],
        dtype: mx.Dtype,
        *rule: str,
    ) -> None:
        """Build and check a specialization of quantize.metal or dequantize.metal once."""
        key = name, kernels, dtype, *rule
        if key not in self._tested:
            what = f"{name}.metal with {' and '.join(map(str, kernels))}" + "".join(f", {x}" for x in (dtype, *rule))
            check, launch = getattr(self_test, f"check_{name}"), getattr(self, f"launch_{name}")
            self.run_check(what, lambda: check(launch, kernels, dtype, *rule))
            self._tested.add(key)

    def run_check(self, what: str, check: Callable[[], Optional[str]]) -> None:
        """Run the check of `what`. Raises BackendError where it raises, WrongResultError where it finds something."""
        try:
            problem = check()
        except Exception as e:
            raise BackendError(f"the {self.title} kernel does not build or run: {what} on {device_name()}\n{e}") from e
        if problem:
            raise WrongResultError(
                f"the {self.title} kernel disagrees with the NumPy reference: {what} on {device_name()}: {problem}. "
                "Nothing was computed on another backend; MLX_TURBO_BACKEND=cpu does that. Please report this."
            )

    # ---- building beforehand -----------------------------------------------------------------------------------
    @contextlib.contextmanager
    def two_launches(self) -> Iterator[None]:
        """Inside this context attention takes two launches for any number of tokens, so that few tokens build
        what many tokens need (warming.py)."""
        self.always_two_launches = True
        try:
            yield
        finally:
            self.always_two_launches = False

    @property
    def n_tested(self) -> int:
        """How many specializations have been built and checked so far."""
        return len(self._tested)


# ---- what a launch is given ------------------------------------------------------------------------------------
@functools.lru_cache(maxsize=64)  # the layers of a step have the same
def _span(first: int, length: int, n_sink: int, n_recent: int, *of_sides: int) -> mx.array:
    """dequantize.metal's `span`."""
    return mx.array([first, length, n_sink, n_recent, *of_sides], mx.int32)


def _as_strides(*numbers: int) -> mx.array:
    """What kernels read by `tq_number`: an even number of them, two in each stride but the first, as those of
    attend.metal."""
    pairs = np.array(numbers, np.int32).view(np.int64).tolist()
    return mx.as_strided(_nothing(mx.uint32), [1] * (1 + len(pairs)), [1, *pairs])


def _vectors_template(i: int, kernel: VectorsKernel) -> Template:
    """Template values of side i of quantize.metal and dequantize.metal."""
    return [
        (f"B{i}", kernel.bits),
        (f"D{i}", kernel.head_dim),
        (f"ROTATE{i}", kernel.rotates),
        (f"MEAN{i}", kernel.has_mean),
    ]


def _vectors_grid(n_vectors: int, head_dims: Sequence[int]) -> dict[str, tuple[int, int, int]]:
    """Threads for n_vectors of each side."""
    simdgroups = sum(-(-n_vectors // vectors_per_simdgroup(d)) for d in head_dims)
    return dict(grid=(32, simdgroups, 1), threadgroup=(32, min(simdgroups, SIMDGROUPS_PER_THREADGROUP), 1))


class AttendLaunches(NamedTuple):
    """What the layers of a step have in common: the launches of one call of `attend`.

    shape: batch rows, query heads, query tokens. attend, merge: arguments of their launches; merge is None if there is
    one launch."""

    plan: AttendPlan
    kernel: AttendKernel
    shape: tuple[int, int, int]
    attend: dict[str, Any]
    merge: Optional[dict[str, Any]]


@functools.lru_cache(maxsize=64)
def _attend_launches(
    tuning: AttendTuning,
    keys: AttendSide,
    values: AttendSide,
    query_shape: tuple[int, int, int, int],
    n_kv_heads: int,
    dtype: mx.Dtype,
    counts: Counts,
    always_two_launches: bool,
    same_sides: bool,
    rope: Optional[AttendSide],
) -> AttendLaunches:
    batch, n_heads, n_query_tokens, _ = query_shape
    sides = (keys.bits, keys.head_dim), (values.bits, values.head_dim)
    options = always_two_launches, (0, 0) if rope is None else (rope.bits, rope.head_dim)
    plan = plan_attend(tuning, *sides, batch, n_heads, n_kv_heads, n_query_tokens, counts, *options)
    kernel = AttendKernel(keys, values, plan.shape, plan.single_launch, dtype, same_sides, rope)
    return launches_of(plan, kernel, (batch, n_heads, n_query_tokens))


def launches_of(plan: AttendPlan, kernel: AttendKernel, shape: tuple[int, int, int]) -> AttendLaunches:
    """The launches of a plan. shape: batch rows, query heads, query tokens."""
    out_shape = (*shape, kernel.values.head_dim)
    attend = dict(
        template=_attend_template(kernel),
        grid=plan.grid,
        threadgroup=plan.threadgroup,
        output_shapes=[out_shape if plan.single_launch else (plan.n_partials,)],
        output_dtypes=[kernel.dtype if plan.single_launch else mx.float32],
    )
    merge = dict(
        template=_merge_template(kernel, plan.partial_dim),
        grid=(32, plan.merge_simdgroups, math.prod(shape)),
        threadgroup=(32, plan.merge_simdgroups, 1),
        output_shapes=[out_shape],
        output_dtypes=[kernel.dtype],
    )
    return AttendLaunches(plan, kernel, shape, attend, None if plan.single_launch else merge)


@functools.lru_cache(maxsize=None)
def _attend_template(kernel: AttendKernel) -> Template:
    keys, values, shape, single_launch, dtype, same_sides, rope = kernel
    return [
        ("T", dtype if single_launch else mx.float32),
        ("EXACT_KEY", keys.exact_dtype),
        ("EXACT_VALUE", (rope or values).exact_dtype),
        ("KEY_BITS", keys.bits),
        ("VALUE_BITS", values.bits),
        ("KEY_DIM", keys.head_dim),
        ("VALUE_DIM", values.head_dim),
        ("KEY_MEANS", keys.has_means),
        ("VALUE_MEANS", values.has_means),
        *shape._asdict().items(),
        ("SINGLE_LAUNCH", single_launch),
        ("SAME_SIDES", same_sides),
        ("ROPE_DIM", rope.head_dim if rope else 0),
        ("ROPE_BITS", rope.bits if rope else 0),
    ]


@functools.lru_cache(maxsize=None)
def _merge_template(kernel: AttendKernel, partial_dim: int) -> Template:
    keys, values, dtype = kernel.keys, kernel.values, kernel.dtype
    return [
        ("T", dtype),
        ("D", values.head_dim),
        ("BITS", values.bits),
        ("MEAN", values.has_means),
        ("OFFSET", len(rotation.windows(keys.head_dim)) * keys.head_dim),
        ("ACC_ROW", partial_dim),
        ("MOST_SIMDGROUPS", most_merge_simdgroups(values.head_dim)),
    ]


def _flags_and_mask(
    mask: Mask, sinks: Optional[mx.array], shape: tuple[int, int, int, int]
) -> tuple[int, Optional[mx.array]]:
    """attend.metal's flags (1 causal, 2 a mask, 8 attention sinks), and the mask broadcast to its shape."""
    flags = 8 * (sinks is not None)
    if mask is None:
        return flags, None
    if isinstance(mask, str):
        return flags + (shape[2] > 1), None  # one query token sees all
    if mask.dtype not in (mx.bool_, mx.float16, mx.bfloat16, mx.float32):
        mask = mask.astype(mx.bool_)
    return flags + 2, mx.broadcast_to(mask, shape)


def _side_inputs(side: CachedSide, queries: mx.array) -> tuple[mx.array, ...]:
    """sink, codes, scale and recent of a side, with something in the place of what is not there."""
    sink, codes, scale, recent = side[:4]
    exact = sink if recent is None else recent
    if exact is None:
        exact = queries
    if codes is None:
        codes = _nothing(mx.uint32) if side.bits else exact
    return (
        exact if sink is None else sink,
        _eight(codes),
        _nothing(mx.float16) if scale is None else scale,
        exact if recent is None else recent,
    )


def _diagonals_with_numbers(rotations: tuple[int, ...], balance: Optional[Balance], *numbers: Any) -> mx.array:
    """attend.metal's `diagonals`: those of both rotations, and numbers as the strides of further dims of size 1. MLX
    hands strides to a kernel with the launch; a buffer that the CPU writes at each step costs a GPU with its own memory
    more than attention. The same array for all layers of a step, except those with balanced keys."""
    if balance is not None:
        _, value_dim, seed = rotations
        array = balance.made(_diagonals_and_balanced, value_dim, seed)
        return _with_numbers(array, _both_diagonals(*rotations).size, *numbers)
    return _cached_in_this_thread(_diagonals_as_they_are)(rotations, *numbers)


_of_this_thread = threading.local()


def _cached_in_this_thread(make: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """`make` with a cache of its own in each thread: MLX evaluates a lazy array in no other one. The layers of a step
    ask for the same."""
    name = make.__name__
    if not hasattr(_of_this_thread, name):
        setattr(_of_this_thread, name, functools.lru_cache(maxsize=64)(make))
    cached: Callable[..., mx.array] = getattr(_of_this_thread, name)
    return cached


def _diagonals_as_they_are(rotations: tuple[int, ...], *numbers: Any) -> mx.array:
    return _with_numbers(_both_diagonals(*rotations), 0, *numbers)


def _with_numbers(diagonals: mx.array, balanced: int, *numbers: Any) -> mx.array:
    return mx.as_strided(diagonals, [diagonals.size] + [1] * N_PAIRS, [1, *_pairs(balanced, *numbers)])


N_PAIRS = 8  # of the numbers


@functools.lru_cache(maxsize=64)  # the layers of a step have the same
def _pairs(
    balanced: int, partition: tuple[int, ...], call: tuple[int, ...], scale: float, sizes: tuple[int, ...]
) -> list[int]:
    numbers = [*partition, *call, int(np.float32(scale * LOG2_E).view(np.int32)), *sizes, balanced]
    return np.array(numbers, np.int32).view(np.int64).tolist()  # little-endian: the first one in the low half


@functools.lru_cache(maxsize=None)
def _both_diagonals(*dims_and_seed: int) -> mx.array:
    *dims, seed = dims_and_seed
    both = mx.array(np.concatenate([rotation.diagonals(d, seed).ravel() for d in dims]), mx.float32)
    mx.eval(both)
    return both


def _diagonals_of_heads(factors: mx.array, seed: int, inverse: bool) -> mx.array:
    """The diagonals of the rotation, float32 [B * H, rounds, D], which balance the channels too, or un-balance them.
    factors: of a `Balance`."""
    D = factors.shape[-1]
    first, *others = (diagonal(D, seed, i) for i in range(len(rotation.windows(D))))
    of_heads = mx.flatten(first / factors if inverse else first * factors, 0, 1)
    return mx.concatenate([of_heads, *(mx.broadcast_to(d, of_heads.shape) for d in others)], axis=1)


def _diagonals_and_balanced(factors: mx.array, value_dim: int, seed: int) -> mx.array:
    """`_both_diagonals`, and behind them those of each kv head of the keys, by which queries are rotated."""
    of_heads = _diagonals_of_heads(factors, seed, True)
    return mx.concatenate([_both_diagonals(factors.shape[-1], value_dim, seed), of_heads.reshape(-1)])


@functools.lru_cache(maxsize=None)
def _nothing(dtype: mx.Dtype) -> mx.array:
    """Stands for an array that is not there: never read."""
    array = mx.zeros((1, 1, 8, 8), dtype)
    mx.eval(array)
    return array


def _eight(array: mx.array) -> mx.array:
    """MLX binds arrays of less than 8 elements in another address space; these are small enough to copy."""
    return array if array.size >= 8 else mx.pad(array, [(0, 0), (0, 0), (0, 8), (0, 0)])
