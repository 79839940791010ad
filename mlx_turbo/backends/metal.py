"""How the kernels in metal/ are reached on an Apple GPU: mx.fast.metal_kernel."""

from typing import Any, Callable, Mapping, Optional

import mlx.core as mx

from .attend_launch import AttendTuning
from .kernel_backend import KernelBackend
from .kernel_names import kernel_maker

NAMES_TYPES = 0, 32, 0  # MLX that tells kernels apart by the types of their inputs


class MetalBackend(KernelBackend):
    """The kernels in metal/ on this machine's GPU, or with `metal_kernel` in a simulator of one."""

    def __init__(
        self,
        metal_kernel: Optional[Callable[..., Any]] = None,
        tuned: Optional[Mapping[tuple[int, int, int, int], AttendTuning]] = None,
    ):
        is_real = metal_kernel is None and mx.metal.is_available()
        metal_kernel = metal_kernel or kernel_maker(mx, "metal_kernel", NAMES_TYPES)
        super().__init__(metal_kernel, "metal", "Metal", is_real=is_real, tuned=tuned)
