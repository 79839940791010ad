"""How the kernels in metal/ are reached on an Apple GPU: mx.fast.metal_kernel, and names for what it builds."""

import functools
import re
from types import ModuleType
from typing import Any, Callable, Mapping, Optional

import mlx.core as mx

from .attend_launch import AttendTuning
from .kernel_backend import KernelBackend


class MetalBackend(KernelBackend):
    """The kernels in metal/ on this machine's GPU, or with `metal_kernel` in a simulator of one."""

    def __init__(
        self,
        metal_kernel: Optional[Callable[..., Any]] = None,
        tuned: Optional[Mapping[tuple[int, int, int, int], AttendTuning]] = None,
    ):
        is_real = metal_kernel is None and mx.metal.is_available()
        super().__init__(metal_kernel or metal_kernel_of(mx), "metal", "Metal", is_real=is_real, tuned=tuned)


def metal_kernel_of(mlx: ModuleType) -> Callable[..., Any]:
    """The metal_kernel of the module `mlx`, with names of kernels that stand for one text each.

    MLX before 0.32.0 names a kernel by its template values only, though its text depends on the types of inputs
    and outputs too, and forgets the pipeline of the one text when it meets the other, which commands that wait may
    still use (ml-explore/mlx#3662).
    """
    version = tuple(int(n) for n in re.findall(r"\d+", mlx.__version__)[:3])
    if version >= (0, 32, 0):
        return mlx.fast.metal_kernel
    return functools.partial(_named_by_types, mlx.fast.metal_kernel)


def _named_by_types(metal_kernel: Callable[..., Any], name: str, *texts: Any, **options: Any) -> Callable[..., Any]:
    kernels: dict[Any, Callable[..., Any]] = {}

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
