"""The choice of a backend, and the public `quantize` and `dequantize`, which check their arguments.

Backends: "metal" (metal.py), "cuda" (cuda.py) and "cpu" (mlx_ops.py). The kernels are used where MLX has a GPU, of
either kind, and it is MLX's default device; MLX operations where there is none, or where the user says so:
`MLX_TURBO_BACKEND=cpu`, `backend="cpu"`, or `mx.set_default_device(mx.cpu)`. A kernel that does not build or computes
something wrong is an error, never a reason to use another backend.
"""

import contextlib
import os
from importlib import metadata
from typing import Any, Iterator, Optional, Sequence

import mlx.core as mx

from ..quant.rotation import check_head_dim
from ..quant.scheme import PACKED_BITS, SCALES, words_per_row
from .sides import BackendError, PackedSide, QuantizeSide
from .statistics import UNIT, lengths

DTYPES = (mx.float16, mx.bfloat16, mx.float32)
# of tokens that stay exact
EXACT_DTYPES = (*DTYPES, mx.int8, mx.int16, mx.int32, mx.int64, mx.uint8, mx.uint16, mx.uint32, mx.uint64)
GPUS = {"metal": "Metal", "cuda": "CUDA"}  # backends of kernels, and what they are called
BACKENDS = (*GPUS, "cpu")
_ABSENT = {
    "metal": "this build of MLX has no Metal, or the machine has no Metal GPU",
    "cuda": "this build of MLX has no CUDA, or the machine has no NVIDIA GPU; on Linux "
    'pip install "mlx-turbo[cuda13]" (or [cuda12]) brings MLX with CUDA',
}
_backends: dict[str, Any] = {}  # one of each name
_override: Any = None  # the backend of `use_backend`


def unavailable(name: str) -> Optional[str]:
    """Why the backend of that name cannot run here, or None if it can."""
    if name == "cpu":
        return None
    if not getattr(mx, name).is_available():
        return (overwritten() if name == "cuda" else None) or _ABSENT[name]
    if mx.default_device().type != mx.DeviceType.gpu:
        return "MLX's default device is the CPU"
    return None


def default_name() -> str:
    """The backend that is used if nothing is said: a GPU's where there is one, else "cpu"."""
    if mx.default_device().type != mx.DeviceType.gpu:
        return "cpu"
    return next((name for name in GPUS if getattr(mx, name).is_available()), "cpu")


def why_default() -> str:
    """Why `default_name` is what it is, for people."""
    name = default_name()
    if name in GPUS:
        return f"{GPUS[name]} is available"
    if any(getattr(mx, gpu).is_available() for gpu in GPUS):
        return "MLX's default device is the CPU"
    return "this build of MLX has no Metal and no CUDA, or the machine has no GPU"


def overwritten() -> Optional[str]:
    """What is wrong where MLX for CUDA is installed and another build of MLX lies over its library, or None."""
    for package in ("mlx-cuda-13", "mlx-cuda-12"):
        try:
            files = metadata.files(package) or []
        except metadata.PackageNotFoundError:
            continue
        for file in files:
            if file.name == "libmlx.so" and os.stat(str(file.locate())).st_size != file.size:
                return (
                    f"{package} is installed, but another build of MLX was installed over it; pip install "
                    f"--force-reinstall --no-deps {package} puts it back"
                )
    return None


def get_backend(choice: Any = None) -> Any:
    """The backend to use: an object with `name`, `describe()`, `quantize`, `dequantize`, `attend` and more.

    choice: "metal", "cuda", "cpu", a backend object, or None for the environment variable MLX_TURBO_BACKEND, and if
    that is not set, the GPU's where there is one.

    Raises BackendError for a GPU that is not there, ValueError for another name.
    """
    source = "backend"
    if choice is None and _override is not None:
        return _override
    if choice is None:
        source, choice = "MLX_TURBO_BACKEND", os.environ.get("MLX_TURBO_BACKEND") or None
    if choice is None:
        choice = default_name()
    if not isinstance(choice, str):
        return choice
    if choice not in BACKENDS:
        raise ValueError(f"{source}: got {choice!r}, allowed are 'metal', 'cuda' and 'cpu'")
    if why := unavailable(choice):
        raise BackendError(f"{source}: {choice!r} was asked for, but {why}")
    if choice not in _backends:
        _backends[choice] = _load(choice)
    return _backends[choice]


def _load(choice: str) -> Any:
    """The backend of that name. Only what is chosen is imported: the package itself imports a third faster."""
    if choice == "cpu":
        from .mlx_ops import CpuBackend

        return CpuBackend()
    from . import tuning

    if choice == "cuda":
        from .cuda import CudaBackend

        return CudaBackend(tuned=tuning.load())
    from .metal import MetalBackend

    return MetalBackend(tuned=tuning.load())


@contextlib.contextmanager
def use_backend(choice: Any) -> Iterator[Any]:
    """`with use_backend("cpu"):` - the backend of everything in the block, whatever the environment says.

    choice: as `get_backend`, which raises what this raises.
    """
    global _override
    before, _override = _override, get_backend(choice)
    try:
        yield _override
    finally:
        _override = before


def check_vectors(x: Any, name: str, any_head_dim: bool = False, dtypes: Sequence[mx.Dtype] = DTYPES) -> None:
    """Raise TypeError or ValueError unless x is an array [B, H, L, head_dim] of one of `dtypes` and a supported
    head_dim (any_head_dim: or another one). name: of x in messages."""
    if not isinstance(x, mx.array):
        raise TypeError(f"{name}: got {type(x).__name__}, expected an mx.array")
    if x.ndim != 4:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected [batch, n_kv_heads, tokens, head_dim]")
    if x.dtype not in dtypes:
        raise ValueError(f"{name}: got {x.dtype}, allowed are {', '.join(str(d) for d in dtypes)}")
    if not any_head_dim:
        check_head_dim(x.shape[-1], f"head_dim of {name}")


def _check_bits(bits: Any) -> None:
    if isinstance(bits, bool) or bits not in PACKED_BITS:
        raise ValueError(f"bits: got {bits!r}, allowed are 2, 3, 4, 5, 6 and 8")


def _check_mean(mean: Any, batch: Sequence[int], head_dim: int) -> None:
    want = (*batch, 1, head_dim)
    if mean is not None and (not isinstance(mean, mx.array) or tuple(mean.shape) != want or mean.dtype != mx.float32):
        got = f"{mean.dtype} {tuple(mean.shape)}" if isinstance(mean, mx.array) else type(mean).__name__
        raise ValueError(f"mean: got {got}, expected float32 {want}")


def quantize_sides(
    sides: Sequence[QuantizeSide], seed: int = 0, backend: Any = None, scale: str = SCALES[0]
) -> list[tuple[mx.array, mx.array]]:
    """Quantize one or two `QuantizeSide` of equal [B, H, L] and dtype in one launch, lazily.

    Returns per side (codes uint32 [B, H, L, words], scale float16 [B, H, L, 1]). A vector that is not finite, or too
    large for a float16 scale, gets a scale of NaN. Raises ValueError for an unknown rule of the scale; nothing else is
    checked.
    """
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


def requantize_side(
    side: PackedSide, bits: int, backend: Any = None, scale: str = SCALES[0]
) -> tuple[mx.array, mx.array]:
    """Codes uint32 [B, H, capacity, words] and scale float16 [B, H, capacity, 1] of a side's rows at fewer `bits`, from
    what they hold and unchecked; the same means and balance belong to them. A scale that is not finite stays NaN."""
    return get_backend(backend).requantize(side, bits, scale)


def dequantize_sides(
    sides: Sequence[PackedSide], first: int, length: int, dtype: mx.Dtype, seed: int = 0, backend: Any = None
) -> list[mx.array]:
    """Restore tokens first .. first + length - 1 of one or two `PackedSide` in one launch, lazily and unchecked.

    Returns per side x [B, H, length, head_dim] of `dtype`.
    """
    if length == 0 or 0 in sides[0].codes.shape[:2]:
        return [mx.zeros((*s.codes.shape[:2], length, s.head_dim), dtype) for s in sides]
    return get_backend(backend).dequantize(sides, first, length, dtype, seed)


def statistics(x: mx.array, first: int, segment: int, backend: Any = None) -> tuple[mx.array, mx.array]:
    """Of x [B, H, L, D] (any strides), to become packed tokens first, first + 1, ..., in segments of `segment` tokens:
    (sums float32 [B, H, S, D] of those of each segment, energy float32 [B, H, 1, 1], the sum of the squares of all),
    lazily. A vector that cannot be packed counts as zeros. What a row gets does not depend on the others, to the bit.

    Raises ValueError for a segment of more than 128 tokens that is not the only one.
    """
    if segment > UNIT and first % segment + x.shape[2] > segment:
        raise ValueError(f"segment: got {segment}, allowed are 1 to {UNIT}, or more if they hold all tokens")
    if 0 in x.shape[:3]:
        n_segments = len(lengths(first, x.shape[2], segment))
        return mx.zeros((*x.shape[:2], n_segments, x.shape[3])), mx.zeros((*x.shape[:2], 1, 1))
    return get_backend(backend).statistics(x, first, segment)


def quantize(
    x: mx.array,
    bits: int = 4,
    *,
    mean: Optional[mx.array] = None,
    seed: int = 0,
    backend: Any = None,
    scale: str = SCALES[0],
) -> tuple[mx.array, mx.array]:
    """Quantize vectors x [B, H, L, head_dim] (float16, bfloat16 or float32) to `bits` (2, 3, 4, 5, 6 or 8) per number.

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


def dequantize(
    codes: mx.array,
    scale: mx.array,
    bits: int = 4,
    *,
    head_dim: int,
    mean: Optional[mx.array] = None,
    seed: int = 0,
    dtype: mx.Dtype = mx.float32,
    backend: Any = None,
) -> mx.array:
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
