"""Quantize and dequantize: checks the arguments and picks the backend. The only place that chooses one.

Backends: "metal" (kernels.py) and "cpu" (fallback.py). Metal is used where there is Metal and MLX's default device
is the GPU; the CPU fallback where there is none, or where the user says so: `MLX_TURBO_BACKEND=cpu`,
`backend="cpu"`, or `mx.set_default_device(mx.cpu)`. A Metal kernel that does not build or computes something wrong
is an error, never a reason to use the other backend.
"""

import contextlib
import os

import mlx.core as mx

from ..quant.rotation import check_head_dim
from ..quant.scheme import SCALES, words_per_row
from .metal import MetalBackend
from .mlx_ops import CpuBackend
from .sides import BackendError, PackedSide, QuantizeSide

DTYPES = (mx.float16, mx.bfloat16, mx.float32)
EXACT_DTYPES = (*DTYPES, mx.int8, mx.int16, mx.int32, mx.int64, mx.uint8, mx.uint16, mx.uint32, mx.uint64)  # unpacked
_backends = {}
_override = None


def metal_unavailable():
    """Why Metal kernels cannot run here, or None if they can."""
    if not mx.metal.is_available():
        return "this build of MLX has no Metal, or the machine has no Metal GPU"
    if mx.default_device().type != mx.DeviceType.gpu:
        return "MLX's default device is the CPU"
    return None


def get_backend(choice=None):
    """The backend to use: an object with `name`, `describe()`, `quantize` and `dequantize`.

    choice: "metal", "cpu", a backend object, or None for the environment variable MLX_TURBO_BACKEND, and if that is
    not set, Metal where there is Metal.

    Raises BackendError for "metal" where there is none, ValueError for another name.
    """
    source = "backend"
    if choice is None and _override is not None:
        return _override
    if choice is None:
        source, choice = "MLX_TURBO_BACKEND", os.environ.get("MLX_TURBO_BACKEND") or None
    if choice is None:
        choice = "cpu" if metal_unavailable() else "metal"
    if not isinstance(choice, str):
        return choice
    if choice not in ("metal", "cpu"):
        raise ValueError(f"{source}: got {choice!r}, allowed are 'metal' and 'cpu'")
    if choice == "metal" and metal_unavailable():
        raise BackendError(f"{source}: 'metal' was asked for, but {metal_unavailable()}")
    if choice not in _backends:
        _backends[choice] = MetalBackend() if choice == "metal" else CpuBackend()
    return _backends[choice]


@contextlib.contextmanager
def use_backend(choice):
    """`with use_backend("cpu"):` - the backend of everything in the block, whatever the environment says."""
    global _override
    before, _override = _override, get_backend(choice)
    try:
        yield _override
    finally:
        _override = before


def check_vectors(x, name, any_head_dim=False, dtypes=DTYPES):
    """Raise TypeError or ValueError unless x is an array [B, H, L, head_dim] of these dtypes and a head_dim we have."""
    if not isinstance(x, mx.array):
        raise TypeError(f"{name}: got {type(x).__name__}, expected an mx.array")
    if x.ndim != 4:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected [batch, n_kv_heads, tokens, head_dim]")
    if x.dtype not in dtypes:
        raise ValueError(f"{name}: got {x.dtype}, allowed are {', '.join(str(d) for d in dtypes)}")
    if not any_head_dim:
        check_head_dim(x.shape[-1], f"head_dim of {name}")


def _check_bits(bits, name="bits"):
    if isinstance(bits, bool) or bits not in (2, 3, 4, 8):
        raise ValueError(f"{name}: got {bits!r}, allowed are 2, 3, 4 and 8")


def _check_mean(mean, batch, head_dim):
    want, name = (*batch, 1, head_dim), "mean"
    if mean is not None and (not isinstance(mean, mx.array) or tuple(mean.shape) != want or mean.dtype != mx.float32):
        got = f"{mean.dtype} {tuple(mean.shape)}" if isinstance(mean, mx.array) else type(mean).__name__
        raise ValueError(f"{name}: got {got}, expected float32 {want}")


def quantize_sides(sides, seed=0, backend=None, scale=SCALES[0]):
    """Quantize one or two `QuantizeSide` of equal [B, H, L] and dtype in one launch, lazily; only the scale's rule is
    checked. A vector that is not finite, or too large for a float16 scale, gets a scale of NaN."""
    if scale not in SCALES:
        raise ValueError(f"scale: got {scale!r}, allowed are {SCALES}")
    if 0 in sides[0].x.shape[:3]:
        return [
            (
                mx.zeros((*s.x.shape[:3], words_per_row(s.bits, s.x.shape[3])), mx.uint32),
                mx.zeros((*s.x.shape[:3], 1), mx.float16),
            )
            for s in sides
        ]
    return get_backend(backend).quantize(sides, seed, scale)


def dequantize_sides(sides, first, length, dtype, seed=0, backend=None):
    """Restore tokens first .. first + length - 1 of one or two `PackedSide` in one launch, lazily and unchecked."""
    if length == 0 or 0 in sides[0].codes.shape[:2]:
        return [mx.zeros((*s.codes.shape[:2], length, s.head_dim), dtype) for s in sides]
    return get_backend(backend).dequantize(sides, first, length, dtype, seed)


def quantize(x, bits=4, *, mean=None, seed=0, backend=None, scale=SCALES[0]):
    """Quantize vectors x [B, H, L, head_dim] (float16, bfloat16 or float32) to `bits` (2, 3, 4 or 8) per number.

    mean: float32 [B, H, 1, head_dim], subtracted first. seed: of the rotation's signs. backend: see `get_backend`.
    scale: the rule of the scale, one of scheme.SCALES; the formulas are in reference.quantize.

    Returns codes uint32 [B, H, L, words_per_row(bits, head_dim)] (layout: scheme.py) and scale float16 [B, H, L, 1],
    as reference.quantize computes them. Raises ValueError, naming the argument, for a wrong shape, dtype, head_dim,
    bits or scale rule, and for NaN, infinity or numbers too large for a float16 scale in x (this evaluates x).
    """
    check_vectors(x, "x")
    _check_bits(bits)
    _check_mean(mean, x.shape[:2], x.shape[-1])
    ((codes, scales),) = quantize_sides([QuantizeSide(x, bits, mean)], seed, backend, scale)
    if not mx.isfinite(scales).all().item():
        raise ValueError(
            "x: has NaN, infinity or a vector with a root mean square beyond 65504 (float16), allowed are "
            "finite numbers"
        )
    return codes, scales


def dequantize(codes, scale, bits=4, *, head_dim, mean=None, seed=0, dtype=mx.float32, backend=None):
    """Vectors [B, H, L, head_dim] of `dtype` from what `quantize` returned (same bits, mean and seed).

    Raises ValueError, naming the argument, for shapes or dtypes that do not belong together.
    """
    check_head_dim(head_dim)
    _check_bits(bits)
    want = words_per_row(bits, head_dim)
    if codes.ndim != 4 or codes.shape[-1] != want or codes.dtype != mx.uint32:
        raise ValueError(f"codes: got {codes.dtype} {tuple(codes.shape)}, expected uint32 [B, H, L, {want}]")
    if tuple(scale.shape) != (*codes.shape[:3], 1) or scale.dtype != mx.float16:
        raise ValueError(f"scale: got {scale.dtype} {tuple(scale.shape)}, expected float16 {(*codes.shape[:3], 1)}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype}, allowed are {', '.join(str(d) for d in DTYPES)}")
    _check_mean(mean, codes.shape[:2], head_dim)
    side = PackedSide(codes, scale, bits, head_dim, mean)
    return dequantize_sides([side], 0, codes.shape[2], dtype, seed, backend)[0]
