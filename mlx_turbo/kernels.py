"""The Metal backend: loads metal/*.metal, registers them with mx.fast.metal_kernel, tests and launches them.

Each combination of template values is a Metal library of its own. Before one is used for real it is built and
compared with the NumPy reference on a few vectors, once per process; a kernel that does not build or disagrees
raises `BackendError`. Nothing here ever falls back to another backend.
"""
import functools
from pathlib import Path
from typing import NamedTuple, Optional

import mlx.core as mx
import numpy as np

from . import codebook, reference, rotation
from .scheme import words_per_row

SIMDGROUPS_PER_THREADGROUP = 8
BODY_MARKER = "// ==== body\n"


class BackendError(RuntimeError):
    """A backend was asked for that is not there, does not build, or computes something wrong."""


class QuantizeSide(NamedTuple):
    """Vectors to quantize. x: [B, H, L, D]. mean: float32 [B, H, 1, D] or None."""
    x: mx.array
    bits: int
    mean: Optional[mx.array] = None


class PackedSide(NamedTuple):
    """Packed rows. codes: uint32 [B, H, capacity, words]. scale: float16 [B, H, capacity, 1].
    mean: float32 [B, H, 1, head_dim] or None."""
    codes: mx.array
    scale: mx.array
    bits: int
    head_dim: int
    mean: Optional[mx.array] = None


class CachedSide(NamedTuple):
    """The keys or the values of a cache: whole capacity buffers, whatever they hold; None for a part never used.

    sink, recent: model dtype [B, H, capacity, D]. codes: uint32 [B, H, capacity, words], with 0 bits the exact
    vectors [B, H, capacity, D] (then scale is None). scale: float16 [B, H, capacity, 1]. mean: float32 [B, H, 1, D].
    """
    sink: Optional[mx.array]
    codes: Optional[mx.array]
    scale: Optional[mx.array]
    recent: mx.array
    bits: int
    head_dim: int
    mean: Optional[mx.array] = None

    def packed(self):
        """Its packed rows, as the dequantize kernel takes them."""
        return PackedSide(self.codes, self.scale, self.bits, self.head_dim, self.mean)


def metal_folder():
    """Where the .metal files are: inside the installed package, or beside it in a checkout."""
    for folder in (Path(__file__).with_name("metal"), Path(__file__).parent.parent / "metal"):
        if (folder / "quantize.metal").is_file():
            return folder
    raise BackendError(f"no metal/quantize.metal in {Path(__file__).parent} or beside it: the installation is incomplete")


@functools.lru_cache(maxsize=None)
def metal_source(name):
    """(header, body) of metal/<name>.metal."""
    header, body = (metal_folder() / f"{name}.metal").read_text().split(BODY_MARKER)
    return header, body


@functools.lru_cache(maxsize=None)
def diagonals(head_dim, seed):
    """The rotation's diagonals as an evaluated float32 array [rounds, head_dim]."""
    array = mx.array(rotation.diagonals(head_dim, seed).astype(np.float32))
    mx.eval(array)  # a constant that is lazy cannot be used from another thread
    return array


def rotates_in_kernel(head_dim):
    """Whether the transform's windows start where a lane's dims start (see tq_hadamard in metal/)."""
    dims_per_lane = 32 if head_dim > 512 else 16
    return all(n % dims_per_lane == 0 for window in rotation.windows(head_dim) for n in (*window, head_dim))


def vectors_per_simdgroup(head_dim):
    """32 / LANES of the kernels."""
    lanes = -(-head_dim // (32 if head_dim > 512 else 16))
    return 32 >> (lanes - 1).bit_length()


def _grid(n_vectors, head_dims):
    simdgroups = sum(-(-n_vectors // vectors_per_simdgroup(d)) for d in head_dims)
    return dict(grid=(32, simdgroups, 1), threadgroup=(32, min(simdgroups, SIMDGROUPS_PER_THREADGROUP), 1))


class MetalBackend:
    """The kernels in metal/, launched through `metal_kernel` (mx.fast.metal_kernel, or a simulator of it)."""

    name = "metal"

    def __init__(self, metal_kernel=None):
        self._metal_kernel = metal_kernel or mx.fast.metal_kernel
        self._kernels = {}
        self._tested = set()

    def describe(self):
        """What runs, for people: the backend and the chip."""
        return f"metal ({device_name()})"

    def quantize(self, sides, seed=0):
        """Quantize one or two `QuantizeSide` of equal [B, H, L] in one launch.

        Returns per side (codes uint32 [B, H, L, words], scale float16 [B, H, L, 1]).
        """
        from .fallback import rotate  # head dims whose transform the kernel does not do

        prepared = []
        for side in sides:
            in_kernel = rotates_in_kernel(side.x.shape[-1])
            x, mean = side.x, side.mean
            if not in_kernel:
                x, mean = rotate(x.astype(mx.float32) if mean is None else x.astype(mx.float32) - mean, seed), None
            prepared.append((QuantizeSide(x, side.bits, mean), in_kernel))
        if len({side.x.dtype for side, _ in prepared}) > 1:  # one input rotated beforehand, the other not
            prepared = [(side._replace(x=side.x.astype(mx.float32)), r) for side, r in prepared]
        self._test("quantize", tuple((s.x.shape[-1], s.bits, r, s.mean is not None) for s, r in prepared),
                   prepared[0][0].x.dtype)
        return self._quantize(prepared, seed)

    def dequantize(self, sides, first, length, dtype, seed=0):
        """Restore tokens first .. first + length - 1 of one or two `PackedSide` in one launch.

        Returns per side x [B, H, length, head_dim] of `dtype`.
        """
        from .fallback import unrotate

        in_kernel = [rotates_in_kernel(side.head_dim) for side in sides]
        out_dtype = dtype if all(in_kernel) else mx.float32
        prepared = [(s if r else s._replace(mean=None), r) for s, r in zip(sides, in_kernel)]
        self._test("dequantize", tuple((s.head_dim, s.bits, r, s.mean is not None) for s, r in prepared), out_dtype)
        outs = self._dequantize(prepared, first, length, out_dtype, seed)
        for i, side in enumerate(sides):
            if not in_kernel[i]:
                outs[i] = unrotate(outs[i], seed) if side.mean is None else unrotate(outs[i], seed) + side.mean
        return [x.astype(dtype) for x in outs]

    # ---- launches --------------------------------------------------------------------------------------------
    def _kernel(self, name, inputs, outputs):
        if name not in self._kernels:
            header, body = metal_source(name)
            self._kernels[name] = self._metal_kernel(
                f"turbo_{name}", inputs, outputs, body, header=header, ensure_row_contiguous=False)
        return self._kernels[name]

    def _quantize(self, prepared, seed):
        kernel = self._kernel("quantize", ["x0", "x1", "shift0", "shift1", "diag0", "diag1"],
                              ["codes0", "codes1", "scale0", "scale1"])
        n = len(prepared)
        xs, shifts, diags, template, code_shapes, scale_shapes = [], [], [], [], [], []
        for i in (0, 1):
            (x, bits, mean), in_kernel = prepared[min(i, n - 1)]
            *batch, head_dim = x.shape
            diag = diagonals(head_dim, seed)
            xs.append(x)
            diags.append(diag)
            shifts.append(diag if mean is None else mx.contiguous(-diag[0] * mean))
            template += [(f"B{i}", bits), (f"D{i}", head_dim), (f"ROTATE{i}", in_kernel), (f"MEAN{i}", mean is not None)]
            code_shapes.append((*batch, words_per_row(bits, head_dim)) if i < n else (1,))
            scale_shapes.append((*batch, 1) if i < n else (1,))
        n_vectors = int(np.prod(xs[0].shape[:3]))
        outs = kernel(
            inputs=xs + shifts + diags, template=template, output_shapes=code_shapes + scale_shapes,
            output_dtypes=[mx.uint32] * 2 + [mx.float16] * 2, **_grid(n_vectors, [x.shape[-1] for x in xs[:n]]))
        return [(outs[i], outs[2 + i]) for i in range(n)]

    def _dequantize(self, prepared, first, length, dtype, seed):
        kernel = self._kernel(
            "dequantize", ["codes0", "codes1", "scale0", "scale1", "mean0", "mean1", "diag0", "diag1", "span"],
            ["x0", "x1"])
        n = len(prepared)
        codes, scales, means, diags, template, shapes = [], [], [], [], [("T", dtype)], []
        for i in (0, 1):
            side, in_kernel = prepared[min(i, n - 1)]
            diag = diagonals(side.head_dim, seed)
            codes.append(side.codes)
            scales.append(side.scale)
            diags.append(diag)
            means.append(diag if side.mean is None else side.mean)
            template += [(f"B{i}", side.bits), (f"D{i}", side.head_dim), (f"ROTATE{i}", in_kernel),
                         (f"MEAN{i}", side.mean is not None)]
            shapes.append((*side.codes.shape[:2], length, side.head_dim) if i < n else (1,))
        n_vectors = int(np.prod(shapes[0][:3]))
        outs = kernel(
            inputs=codes + scales + means + diags + [mx.array([first, length], mx.int32)], template=template,
            output_shapes=shapes, output_dtypes=[dtype] * 2,
            **_grid(n_vectors, [side.head_dim for side, _ in prepared]))
        return list(outs[:n])

    # ---- self-test -------------------------------------------------------------------------------------------
    def _test(self, name, sides, dtype):
        """Build and check a specialization once: `sides` of (head_dim, bits, rotates, has mean)."""
        key = (name, sides, dtype)
        if key in self._tested:
            return
        what = f"{name}.metal with " + " and ".join(
            f"head_dim {d}, {b} bits{', mean' if m else ''}" for d, b, _, m in sides) + f", {dtype}"
        try:
            error = getattr(self, f"_check_{name}")(sides, dtype)
        except Exception as e:
            raise BackendError(f"the Metal kernel does not build or run: {what} on {device_name()}\n{e}") from e
        if error:
            raise BackendError(
                f"the Metal kernel disagrees with the NumPy reference: {what} on {device_name()}: {error}. Nothing "
                "was computed on another backend; MLX_TURBO_BACKEND=cpu does that. Please report this.")
        self._tested.add(key)

    def _check_quantize(self, sides, dtype):
        rng, prepared, wants = np.random.default_rng(0), [], []
        for head_dim, bits, in_kernel, has_mean in sides:
            mean = mx.array(rng.standard_normal((1, 3, 1, head_dim)).astype(np.float32)) if has_mean else None
            x = mx.array(rng.standard_normal((1, 3, 7, head_dim)).astype(np.float32)).astype(dtype)
            prepared.append((QuantizeSide(x, bits, mean), in_kernel))
            wants.append(reference.quantize(np.array(x.astype(mx.float32)), bits, rotation=0 if in_kernel else None,
                                            mean=None if mean is None else np.array(mean)))
        for (codes, scale), want in zip(self._quantize(prepared, seed=0), wants):
            error = compare_quantized(np.array(codes), np.array(scale), want)
            if error:
                return error
        return None

    def _check_dequantize(self, sides, dtype):
        rng, prepared, wants = np.random.default_rng(0), [], []
        for head_dim, bits, in_kernel, has_mean in sides:
            mean = rng.standard_normal((1, 3, 1, head_dim)).astype(np.float32) if has_mean else None
            want = reference.quantize(rng.standard_normal((1, 3, 9, head_dim)), bits,
                                      rotation=0 if in_kernel else None)
            wants.append(reference.dequantize(want, mean=mean)[:, :, 2:])
            prepared.append((PackedSide(mx.array(want.packed()), mx.array(want.scale[..., None].astype(np.float16)),
                                        bits, head_dim, None if mean is None else mx.array(mean)), in_kernel))
        for got, want in zip(self._dequantize(prepared, 2, 7, dtype, seed=0), wants):
            error = compare_vectors(np.array(got.astype(mx.float32)), want, dtype)
            if error:
                return error
        return None


# Largest error of a restored vector, relative to its largest number: rounding of the output type, and of about ten
# float32 operations.
TOLERANCE = {mx.float32: 5e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}


def compare_vectors(got, want, dtype):
    """What is wrong with restored vectors `got` [..., D] against the oracle's, or None."""
    error = np.abs(got - want).max(-1) / np.maximum(np.abs(want).max(-1), 1e-30)
    if not (error <= TOLERANCE[dtype]).all():  # also for NaN
        return f"relative error {error.max():.1e}, allowed is {TOLERANCE[dtype]:.0e}"
    return None


def compare_quantized(words, scale, want, tie=2e-5):
    """What is wrong with packed rows `words` and `scale` [..., 1] against a reference `Quantized`, or None.

    Codes must be equal, except by one where the oracle is within `tie` (relative) of the midpoint of two levels;
    padding bits must be 0. Scales must be within one float16 rounding, and two where codes differ.
    """
    codes = reference.unpack(words, want.bits, want.codes.shape[-1]).astype(int)
    if not np.array_equal(reference.pack(codes, want.bits), words):
        return "bits that belong to no dim are set"
    off = (codes != want.codes) & (want.scale[..., None] != 0)
    if off.any():
        # the vector as the oracle saw it, in units of its levels
        u = want.normalized
        middle = codebook.thresholds(want.levels)[np.minimum(codes, want.codes)[off]]
        wrong = (np.abs(codes - want.codes)[off] > 1) | (np.abs(u[off] - middle) > tie * np.maximum(np.abs(middle), 1))
        if wrong.any():
            return f"{int(wrong.sum())} of {codes.size} codes differ away from ties"
    step = np.spacing(np.maximum(np.abs(want.scale), 6e-5).astype(np.float16)).astype(np.float64)
    error = np.abs(scale[..., 0].astype(np.float64) - want.scale) / step
    if not (error <= 1 + off.any(-1)).all():
        return f"scale off by {error.max():.1f} float16 roundings"
    return None


def device_name():
    """The chip's name where Metal knows it, else the machine's."""
    import platform

    info = mx.device_info() if mx.metal.is_available() else {}
    return info.get("device_name") or f"{platform.system()} {platform.machine()}"
