"""The Metal backend: loads metal/*.metal, registers them with mx.fast.metal_kernel, tests and launches them.

Each combination of template values is a Metal library of its own. Before one is used for real it is built and
compared with the NumPy reference on a few vectors, once per process; a kernel that does not build or disagrees
raises `BackendError`. Nothing here ever falls back to another backend.
"""

import contextlib
import functools
import math
import re

import mlx.core as mx
import numpy as np

from ..quant import reference, rotation
from ..quant.scheme import SCALES, words_per_row
from .attend_launch import (
    MERGE_SIMDGROUPS,
    SEGMENT_STEP,
    AttendTuning,
    attend_blocks,
    attend_shape,
    attend_unsupported,
    rotates_in_kernel,
    vectors_per_simdgroup,
)
from .device import device_name
from .rotate import diagonals
from .self_test import ATTEND_TOLERANCE, TOLERANCE, compare_quantized, compare_vectors
from .sides import (
    ONE_SEGMENT,
    BackendError,
    CachedSide,
    PackedSide,
    QuantizeSide,
    WrongResultError,
    _exact_dtype,
    _n_kv_heads,
)
from .sources import metal_source

SIMDGROUPS_PER_THREADGROUP = 8
DIMS = 16  # numbers of `dims` before the diagonals


@functools.lru_cache(maxsize=64)
def _attend_dims(integers, scale, segment, acc_rows, batch, key_dim, value_dim, seed):
    """attend.metal's `dims`, the same array for all layers of a step: numbers, and the diagonals of both rotations."""
    dims = _dims_with_diagonals(key_dim, value_dim, seed).copy()
    dims[: len(integers) + 4] = [*integers, np.float32(scale * LOG2_E).view(np.int32), segment, acc_rows, batch]
    return mx.array(dims)


@functools.lru_cache(maxsize=None)
def _dims_with_diagonals(key_dim, value_dim, seed):
    diagonals = [rotation.diagonals(d, seed).astype(np.float32).ravel().view(np.int32) for d in (key_dim, value_dim)]
    return np.concatenate([np.zeros(DIMS, np.int32), *diagonals])


DEQUANTIZE_INPUTS = [f"{name}{i}" for name in ("codes", "scale", "mean", "sink", "recent", "diag") for i in (0, 1)] + [
    "span"
]


@functools.lru_cache(maxsize=64)
def _span(first, length, n_sink, n_recent, *segments):
    """dequantize.metal's `span`."""
    return mx.array([first, length, n_sink, n_recent, *segments, 0, 0], mx.int32)


@functools.lru_cache(maxsize=None)
def _nothing(dtype):
    """Stands for an array that is not there: never read."""
    array = mx.zeros((1, 1, 8, 8), dtype)
    mx.eval(array)
    return array


def _eight(array):
    """MLX binds arrays of less than 8 elements in another address space; these are small enough to copy."""
    return array if array.size >= 8 else mx.pad(array, [(0, 0), (0, 0), (0, 8), (0, 0)])


def _tuned_values():
    from .tuning import load

    return load()


LOG2_E = float(np.log2(np.e))
ATTEND_INPUTS = [
    "queries",
    "k_sink",
    "k_codes",
    "k_scale",
    "k_recent",
    "v_sink",
    "v_codes",
    "v_scale",
    "v_recent",
    "k_means",
    "v_means",
    "mask",
    "sinks",
    "dims",
]


def _grid(n_vectors, head_dims):
    simdgroups = sum(-(-n_vectors // vectors_per_simdgroup(d)) for d in head_dims)
    return dict(grid=(32, simdgroups, 1), threadgroup=(32, min(simdgroups, SIMDGROUPS_PER_THREADGROUP), 1))


class MetalBackend:
    """The kernels in metal/, launched through `metal_kernel` (mx.fast.metal_kernel, or a simulator of it)."""

    name, tiles_ahead = "metal", 1  # of tiled_attention

    def __init__(self, metal_kernel=None):
        self._metal_kernel = metal_kernel or metal_kernel_of(mx)
        self.is_real = metal_kernel is None and mx.metal.is_available()
        self._kernels = {}
        self._tested = set()
        self.tuning = AttendTuning()
        self.tuned = _tuned_values() if self.is_real else {}

    def describe(self):
        """What runs, for people: the backend and the chip."""
        return f"metal ({device_name()})"

    def tuning_of(self, keys, values):
        """The `AttendTuning` of two `CachedSide`: what `bench --tune` found for this chip, else the default."""
        if not self.tuned:
            return self.tuning
        return self.tuned.get((keys.bits, values.bits, keys.head_dim, values.head_dim), self.tuning)

    def quantize(self, sides, seed=0, scale=SCALES[0]):
        """Quantize one or two `QuantizeSide` of equal [B, H, L] in one launch. scale: its rule, as reference.quantize.

        Returns per side (codes uint32 [B, H, L, words], scale float16 [B, H, L, 1]).
        """
        from .rotate import rotate  # head dims whose transform the kernel does not do

        prepared = []
        for side in sides:
            in_kernel = rotates_in_kernel(side.x.shape[-1])
            x, mean = side.x, side.mean
            if not in_kernel:
                x, mean = rotate(x.astype(mx.float32) if mean is None else x.astype(mx.float32) - mean, seed), None
            prepared.append((QuantizeSide(x, side.bits, mean), in_kernel))
        if len({side.x.dtype for side, _ in prepared}) > 1:  # one input rotated beforehand, the other not
            prepared = [(side._replace(x=side.x.astype(mx.float32)), r) for side, r in prepared]
        self._test(
            "quantize",
            tuple((s.x.shape[-1], s.bits, r, s.mean is not None) for s, r in prepared),
            prepared[0][0].x.dtype,
            scale,
        )
        return self._quantize(prepared, seed, scale)

    def dequantize(self, sides, first, length, dtype, seed=0):
        """Restore tokens first .. first + length - 1 of one or two `PackedSide` in one launch.

        Returns per side x [B, H, length, head_dim] of `dtype`.
        """
        from .rotate import unrotate

        in_kernel = [rotates_in_kernel(side.head_dim) for side in sides]
        out_dtype = dtype if all(in_kernel) else mx.float32
        prepared = [(s if r else s._replace(mean=None), r) for s, r in zip(sides, in_kernel)]
        self._test("dequantize", tuple((s.head_dim, s.bits, r, s.mean is not None) for s, r in prepared), out_dtype)
        outs = self._dequantize(prepared, first, length, out_dtype, seed)
        for i, side in enumerate(sides):
            if not in_kernel[i]:
                outs[i] = unrotate(outs[i], seed) if side.mean is None else unrotate(outs[i], seed) + side.mean
        return [x.astype(dtype) for x in outs]

    def restore(self, keys, values, counts, seed=0, first=0):
        """All tokens of two `CachedSide`, [B, Hkv, N, D] each in the dtype of the exact ones, in one launch: sinks,
        packed tokens from number `first` on, recent ones. counts: (n_sink, n_packed, n_recent).

        None where one launch cannot: a side that is not packed, or exact tokens of two dtypes, or a head_dim whose
        rotation the kernel does not do.
        """
        sides, dtypes = (keys, values), {_exact_dtype(side, None) for side in (keys, values)}
        packed = [side for side in sides if side.bits and side.codes is not None and rotates_in_kernel(side.head_dim)]
        if len(packed) < 2 or len(dtypes) > 1 or None in dtypes or counts[1] <= first:
            return None
        (dtype,) = dtypes
        kinds = tuple((side.head_dim, side.bits, True, 2 * side.has_means) for side in sides)
        self._test("dequantize", kinds, dtype, True)
        prepared = [(side.packed(), True) for side in sides]
        return self._dequantize(prepared, first, counts[1] - first, dtype, seed, sides, counts)

    def read_rows(self, side, first, n):
        """For fallback.tiled_attention: n packed rows of a `CachedSide` from token `first` on, scaled but still
        rotated, float32 [B, H, n, head_dim]; no scale and no other order of the dims."""
        prepared = [(side.packed(), False)]
        self._test("dequantize", ((side.head_dim, side.bits, False, False),), mx.float32)
        return self._dequantize(prepared, first, n, mx.float32, seed=0)[0], None, None

    def why_not_fused(self, keys, values, n_query_tokens):
        """Why `attend` does not cover this, or None if it does. keys, values: (bits, head_dim)."""
        return attend_unsupported(keys[0], values[0], keys[1], values[1], n_query_tokens)

    def attend(self, queries, keys, values, counts, *, scale, mask=None, sinks=None, seed=0):
        """softmax(scale * q k^T + mask) v over a cache's exact and packed tokens, in at most two launches.

        queries: [B, Hq, L, key_dim], any strides, L <= 16, of the last L tokens.
        keys, values: `CachedSide`. counts: (n_sink, n_packed, n_recent), which is also the order of the tokens.
        mask: None, "causal", or boolean (True = attend) or additive [.., L, n_tokens], broadcast.
        sinks: [Hq], a logit per head that takes weight and gives no value.

        Returns [B, Hq, L, value_dim] in the dtype of the queries. A row that attends to nothing gives 0. Raises
        ValueError for what `attend_unsupported` names and for a segment of the keys that is no multiple of 128.
        """
        n_query_tokens = queries.shape[2]
        reason = attend_unsupported(keys.bits, values.bits, keys.head_dim, values.head_dim, n_query_tokens)
        if reason:
            raise ValueError(reason)
        if keys.has_means and (keys.segment < 1 or keys.segment % SEGMENT_STEP):
            raise ValueError(f"keys.segment: got {keys.segment}, expected a multiple of {SEGMENT_STEP}")
        one = self._one_launch(queries, keys, values, counts)
        self._test_attend(queries, keys, values, one)
        return self._attend(queries, keys, values, counts, scale, mask, sinks, seed, one)

    # ---- launches --------------------------------------------------------------------------------------------
    def _kernel(self, name, inputs, outputs):
        if name not in self._kernels:
            header, body = metal_source(name)
            self._kernels[name] = self._metal_kernel(
                f"turbo_{name}", inputs, outputs, body, header=header, ensure_row_contiguous=False
            )
        return self._kernels[name]

    def _quantize(self, prepared, seed, scale):
        kernel = self._kernel(
            "quantize", ["x0", "x1", "shift0", "shift1", "diag0", "diag1"], ["codes0", "codes1", "scale0", "scale1"]
        )
        n = len(prepared)
        xs, shifts, diags, code_shapes, scale_shapes = [], [], [], [], []
        template = [("RULE", SCALES.index(scale))]
        for i in (0, 1):
            (x, bits, mean), in_kernel = prepared[min(i, n - 1)]
            *batch, head_dim = x.shape
            diag = diagonals(head_dim, seed)
            xs.append(x)
            diags.append(diag)
            shifts.append(diag if mean is None else mx.contiguous(-diag[0] * mean))
            template += [
                (f"B{i}", bits),
                (f"D{i}", head_dim),
                (f"ROTATE{i}", in_kernel),
                (f"MEAN{i}", mean is not None),
            ]
            code_shapes.append((*batch, words_per_row(bits, head_dim)) if i < n else (1,))
            scale_shapes.append((*batch, 1) if i < n else (1,))
        n_vectors = math.prod(xs[0].shape[:3])
        outs = kernel(
            inputs=xs + shifts + diags,
            template=template,
            output_shapes=code_shapes + scale_shapes,
            output_dtypes=[mx.uint32] * 2 + [mx.float16] * 2,
            **_grid(n_vectors, [x.shape[-1] for x in xs[:n]]),
        )
        return [(outs[i], outs[2 + i]) for i in range(n)]

    def _dequantize(self, prepared, first, length, dtype, seed, cached=None, counts=(0, 0, 0)):
        """cached: the two `CachedSide` of which `prepared` has the packed rows, if their exact tokens come too."""
        kernel = self._kernel("dequantize", DEQUANTIZE_INPUTS, ["x0", "x1"])
        n, exact, segments = len(prepared), [], []
        n_sink, _, n_recent = counts
        codes, scales, means, diags, template, shapes = [], [], [], [], [("T", dtype)], []
        for i in (0, 1):
            side, in_kernel = prepared[min(i, n - 1)]
            diag = diagonals(side.head_dim, seed)
            codes.append(side.codes)
            scales.append(side.scale)
            diags.append(diag)
            of_segments = cached is not None and cached[i].has_means
            mean = cached[i].means if of_segments else side.mean
            means.append(diag[None, None] if mean is None else mean)
            segments.append(cached[i].segment if of_segments else 0)
            here = [] if cached is None else [a for a in (cached[i].sink, cached[i].recent) if a is not None]
            exact.append((here[0], here[-1]) if here else (_nothing(dtype), _nothing(dtype)))
            template += [
                (f"B{i}", side.bits),
                (f"D{i}", side.head_dim),
                (f"ROTATE{i}", in_kernel),
                (f"MEAN{i}", 2 if of_segments else int(mean is not None)),
            ]
            shapes.append((*side.codes.shape[:2], n_sink + length + n_recent, side.head_dim) if i < n else (1,))
        n_vectors = math.prod(shapes[0][:3])
        sinks, recents = zip(*exact)
        outs = kernel(
            inputs=[
                *codes,
                *scales,
                *means,
                *sinks,
                *recents,
                *diags,
                _span(first, length, n_sink, n_recent, *segments),
            ],
            template=[*template, ("EXACT", cached is not None)],
            output_shapes=shapes,
            output_dtypes=[dtype] * 2,
            **_grid(n_vectors, [side.head_dim for side, _ in prepared]),
        )
        return list(outs[:n])

    def _one_launch(self, queries, keys, values, counts):
        """Whether one launch does it: for one query token over few tokens, where packed words are decoded once, or
        twice for 8 or more heads."""
        tuning = self.tuning_of(keys, values)
        gqa = queries.shape[1] // _n_kv_heads(keys)
        if queries.shape[2] > 1 or sum(counts) > tuning.one_launch_tokens:
            return False
        shape = attend_shape(tuning, keys.bits, values.bits, keys.head_dim, values.head_dim, gqa, 1, True)
        return -(-gqa // shape.rows) <= 1 + (gqa >= 8)

    def _attend(self, queries, keys, values, counts, scale, mask, sinks, seed, one):
        batch, n_heads, n_query_tokens, key_dim = queries.shape
        n_kv_heads = _n_kv_heads(keys)
        n_sink, n_packed, n_recent = counts
        gqa = n_heads // n_kv_heads
        n_rows = gqa * n_query_tokens
        tuning = self.tuning_of(keys, values)
        shape = attend_shape(tuning, keys.bits, values.bits, key_dim, values.head_dim, gqa, n_query_tokens, one)
        row_groups = -(-n_rows // shape.rows)
        n_groups = batch * n_kv_heads * row_groups
        exact_blocks, blocks = attend_blocks(tuning, shape, n_sink + n_recent, n_packed, n_groups, one)

        flags = 8 * (sinks is not None)
        if isinstance(mask, str):
            flags, mask = flags + (n_query_tokens > 1), None  # one query token sees all
        if mask is not None:
            flags += 2
            if mask.dtype not in (mx.bool_, mx.float16, mx.bfloat16, mx.float32):
                mask = mask.astype(mx.bool_)
            mask = mx.broadcast_to(mask, (batch, n_heads, n_query_tokens, sum(counts)))
        acc_rows, acc_row = n_rows, values.head_dim
        if shape.QUERIES_IN_DEVICE_MEMORY:
            acc_rows, acc_row = row_groups * shape.rows, max(key_dim, values.head_dim)
        dims = _attend_dims(
            (n_sink, n_packed, n_recent, exact_blocks, blocks, row_groups, flags, n_query_tokens, n_heads, n_kv_heads),
            scale,
            keys.segment,
            acc_rows,
            batch,
            key_dim,
            values.head_dim,
            seed,
        )
        sides, exact_types = [], []
        for side in (keys, values):
            exact = [a for a in (side.recent, side.sink) if a is not None]
            exact = exact[0] if exact else queries
            codes = side.codes
            if codes is None:
                codes = _nothing(mx.uint32) if side.bits else exact
            sides += [
                exact if side.sink is None else side.sink,
                _eight(codes),
                _nothing(mx.float16) if side.scale is None else side.scale,
                exact if side.recent is None else side.recent,
            ]
            exact_types.append(exact.dtype)
        means = [side.means if side.has_means else _nothing(mx.float16) for side in (keys, values)]
        template = [
            ("T", queries.dtype if one else mx.float32),
            ("EXACT_KEY", exact_types[0]),
            ("EXACT_VALUE", exact_types[1]),
            ("KEY_BITS", keys.bits),
            ("VALUE_BITS", values.bits),
            ("KEY_DIM", key_dim),
            ("VALUE_DIM", values.head_dim),
            ("KEY_MEANS", keys.has_means),
            ("VALUE_MEANS", values.has_means),
            *shape._asdict().items(),
            ("SINGLE_LAUNCH", one),
        ]
        out_shape = (batch, n_heads, n_query_tokens, values.head_dim)
        n_partials = batch * n_kv_heads * blocks * (acc_rows * acc_row + 2 * n_rows)
        sinks_or_any = queries if sinks is None else sinks
        kernel = self._kernel("attend", ATTEND_INPUTS, ["acc"])
        (acc,) = kernel(
            inputs=[queries, *sides, *means, _nothing(mx.bool_) if mask is None else mask, sinks_or_any, dims],
            template=template,
            grid=(32, blocks * (shape.SIMDGROUPS if shape.SHARED_TILES else 1), n_groups),
            threadgroup=(32, shape.SIMDGROUPS, 1),
            output_shapes=[out_shape if one else (n_partials,)],
            output_dtypes=[queries.dtype if one else mx.float32],
        )
        if one:
            return acc
        rounds = len(rotation.windows(key_dim))
        kernel = self._kernel("merge", ["acc", "means", "sinks", "dims"], ["out"])
        (out,) = kernel(
            inputs=[acc, means[1], sinks_or_any, dims],
            template=[
                ("T", queries.dtype),
                ("D", values.head_dim),
                ("BITS", values.bits),
                ("MEAN", values.has_means),
                ("OFFSET", DIMS + rounds * key_dim),
                ("ACC_ROW", acc_row),
                ("SIMDGROUPS", MERGE_SIMDGROUPS),
            ],
            grid=(32, MERGE_SIMDGROUPS, batch * n_heads * n_query_tokens),
            threadgroup=(32, MERGE_SIMDGROUPS, 1),
            output_shapes=[out_shape],
            output_dtypes=[queries.dtype],
        )
        return out

    # ---- self-test -------------------------------------------------------------------------------------------
    def _test(self, name, sides, dtype, *rule):
        """Build and check a specialization once: `sides` of (head_dim, bits, rotates, has mean); the scale's rule."""
        key = (name, sides, dtype, *rule)
        if key in self._tested:
            return
        what = (
            f"{name}.metal with "
            + " and ".join(f"head_dim {d}, {b} bits{', mean' if m else ''}" for d, b, _, m in sides)
            + "".join(f", {x}" for x in (dtype, *rule))
        )
        self._run_check(what, lambda: getattr(self, f"_check_{name}")(sides, dtype, *rule))
        self._tested.add(key)

    def _run_check(self, what, check):
        try:
            error = check()
        except Exception as e:
            raise BackendError(f"the Metal kernel does not build or run: {what} on {device_name()}\n{e}") from e
        if error:
            raise WrongResultError(
                f"the Metal kernel disagrees with the NumPy reference: {what} on {device_name()}: {error}. Nothing "
                "was computed on another backend; MLX_TURBO_BACKEND=cpu does that. Please report this."
            )

    def _test_attend(self, queries, keys, values, one):
        """Build and check the specialization of these arguments once."""
        n_kv_heads = _n_kv_heads(keys)
        shape = attend_shape(
            self.tuning_of(keys, values),
            keys.bits,
            values.bits,
            keys.head_dim,
            values.head_dim,
            queries.shape[1] // n_kv_heads,
            queries.shape[2],
            one,
        )
        sides = tuple(
            (side.bits, side.head_dim, side.has_means, _exact_dtype(side, queries.dtype)) for side in (keys, values)
        )
        key = ("attend", sides, shape, one, queries.dtype)
        if key in self._tested:
            return
        what = (
            "attend.metal with "
            + " and ".join(
                f"{name} of head_dim {d}, {b} bits{', mean' if m else ''}"
                for name, (b, d, m, _) in zip(("keys", "values"), sides)
            )
            + f", {shape.ROWS} rows, {queries.dtype}"
        )
        self._run_check(what, lambda: self._check_attend(sides, shape, one, queries.dtype))
        self._tested.add(key)

    def _check_attend(self, sides, shape, one, dtype):
        """As many query heads as a simdgroup has rows, a few tokens of each kind, and one left out at either end."""
        rng, counts = np.random.default_rng(0), (3, 150, 20)
        cached, restored = [], []
        for bits, head_dim, has_mean, exact_dtype in sides:
            x = rng.standard_normal((1, 1, sum(counts), head_dim)).astype(np.float32)
            exact = mx.array(x).astype(exact_dtype)
            x = np.array(exact.astype(mx.float32)).astype(np.float64)
            middle = slice(counts[0], counts[0] + counts[1])
            codes, scale, means, segment = exact[:, :, middle], None, None, ONE_SEGMENT if cached else SEGMENT_STEP
            if bits:
                want = reference.quantize(x[:, :, middle], bits)
                x[:, :, middle] = reference.dequantize(want)
                if has_mean:
                    means = rng.standard_normal((1, 1, 2, head_dim)).astype(np.float16)
                    x[:, :, middle] += rotation.unrotate(means[:, :, np.arange(counts[1]) // segment])
                    means = mx.array(means)
                codes, scale = mx.array(want.packed()), mx.array(want.scale[..., None].astype(np.float16))
            restored.append(x)
            cached.append(
                CachedSide(
                    exact[:, :, : counts[0]], codes, scale, exact[:, :, -counts[2] :], bits, head_dim, means, segment
                )
            )
        scale = sides[0][1] ** -0.5
        queries = mx.array(rng.standard_normal((1, shape.rows, 1, sides[0][1])).astype(np.float32)).astype(dtype)
        inner = mx.arange(sum(counts))
        got = self._attend(queries, *cached, counts, scale, (inner > 0) & (inner < sum(counts) - 1), None, 0, one)
        x, y = (a[:, :, 1:-1] for a in restored)
        want = reference.attention(np.array(queries.astype(mx.float32)), x, y, scale=scale)
        error = np.abs(np.array(got.astype(mx.float32)) - want).max() / np.abs(want).max()
        allowed = ATTEND_TOLERANCE[sides[0][0]] + TOLERANCE[dtype] * (dtype != mx.float32)
        return None if error <= allowed else f"relative error {error:.1e}, allowed is {allowed:.0e}"

    def _check_quantize(self, sides, dtype, rule):
        rng, prepared, wants = np.random.default_rng(0), [], []
        for head_dim, bits, in_kernel, has_mean in sides:
            mean = mx.array(rng.standard_normal((1, 3, 1, head_dim)).astype(np.float32)) if has_mean else None
            x = mx.array(rng.standard_normal((1, 3, 7, head_dim)).astype(np.float32)).astype(dtype)
            prepared.append((QuantizeSide(x, bits, mean), in_kernel))
            wants.append(
                reference.quantize(
                    np.array(x.astype(mx.float32)),
                    bits,
                    rotation=0 if in_kernel else None,
                    mean=None if mean is None else np.array(mean),
                    scale=rule,
                )
            )
        for (codes, scale), want in zip(self._quantize(prepared, 0, rule), wants):
            error = compare_quantized(np.array(codes), np.array(scale), want)
            if error:
                return error
        return None

    def _check_restore(self, sides, dtype):
        """Two sinks, packed tokens of two segments but the first ones, five recent ones."""
        rng, counts, first, cached, wants = np.random.default_rng(0), (2, SEGMENT_STEP + 9, 5), 3, [], []
        for i, (head_dim, bits, _, mean_kind) in enumerate(sides):
            x = mx.array(rng.standard_normal((1, 2, sum(counts), head_dim)).astype(np.float32)).astype(dtype)
            want = np.array(x.astype(mx.float32)).astype(np.float64)
            middle, segment, means = slice(counts[0], counts[0] + counts[1]), ONE_SEGMENT if i else SEGMENT_STEP, None
            packed = reference.quantize(want[:, :, middle], bits)
            want[:, :, middle] = reference.dequantize(packed)
            if mean_kind:
                rows = rng.standard_normal((1, 2, 2, head_dim)).astype(np.float16)
                want[:, :, middle] += rotation.unrotate(rows[:, :, np.arange(counts[1]) // segment])
                means = mx.array(rows)
            codes, scale = mx.array(packed.packed()), mx.array(packed.scale[..., None].astype(np.float16))
            wants.append(np.delete(want, np.s_[counts[0] : counts[0] + first], axis=2))
            cached.append(
                CachedSide(
                    x[:, :, :2], codes, scale, x[:, :, -5:], bits, head_dim, means, 0 if means is None else segment
                )
            )
        prepared = [(side.packed(), True) for side in cached]
        for got, want in zip(self._dequantize(prepared, first, counts[1] - first, dtype, 0, cached, counts), wants):
            error = compare_vectors(np.array(got.astype(mx.float32)), want, dtype)
            if error:
                return error
        return None

    def _check_dequantize(self, sides, dtype, exact=False):
        if exact:
            return self._check_restore(sides, dtype)
        rng, prepared, wants = np.random.default_rng(0), [], []
        for head_dim, bits, in_kernel, has_mean in sides:
            mean = rng.standard_normal((1, 3, 1, head_dim)).astype(np.float32) if has_mean else None
            want = reference.quantize(rng.standard_normal((1, 3, 9, head_dim)), bits, rotation=0 if in_kernel else None)
            wants.append(reference.dequantize(want, mean=mean)[:, :, 2:])
            prepared.append(
                (
                    PackedSide(
                        mx.array(want.packed()),
                        mx.array(want.scale[..., None].astype(np.float16)),
                        bits,
                        head_dim,
                        None if mean is None else mx.array(mean),
                    ),
                    in_kernel,
                )
            )
        for got, want in zip(self._dequantize(prepared, 2, 7, dtype, seed=0), wants):
            error = compare_vectors(np.array(got.astype(mx.float32)), want, dtype)
            if error:
                return error
        return None

    # ---- building beforehand ---------------------------------------------------------------------------------
    @contextlib.contextmanager
    def two_launches(self):
        """Inside this context attention takes two launches for any number of tokens, so that few tokens build
        what many tokens need (warming.py)."""
        self._one_launch = lambda *arguments: False
        try:
            yield
        finally:
            del self._one_launch

    @property
    def n_tested(self):
        """How many specializations have been built and checked so far."""
        return len(self._tested)


def metal_kernel_of(mlx):
    """The metal_kernel of the module `mlx`, with names of kernels that stand for one text each.

    MLX before 0.32.0 names a kernel by its template values only, though its text depends on the types of inputs
    and outputs too, and forgets the pipeline of the one text when it meets the other, which commands that wait may
    still use (ml-explore/mlx#3662).
    """
    version = tuple(int(n) for n in re.findall(r"\d+", mlx.__version__)[:3])
    if version >= (0, 32, 0):
        return mlx.fast.metal_kernel
    return functools.partial(_named_by_types, mlx.fast.metal_kernel)


def _named_by_types(metal_kernel, name, *texts, **options):
    kernels = {}

    def call(*, inputs, output_dtypes, **arguments):
        # MLX passes arrays without dims and those of less than 8 elements in other ways
        types = tuple((a.dtype, a.ndim == 0, a.size < 8) for a in inputs), tuple(output_dtypes)
        if types not in kernels:
            kinds = [(dtype, "s" * scalar + "c" * small) for dtype, scalar, small in types[0]]
            suffix = "_".join(
                str(dtype).removeprefix("mlx.core.") + how
                for dtype, how in [*kinds, *((dtype, "") for dtype in types[1])]
            )
            kernels[types] = metal_kernel(f"{name}_{suffix}", *texts, **options)
        return kernels[types](inputs=inputs, output_dtypes=output_dtypes, **arguments)

    return call
