"""Run MLX custom Metal kernels (MSL) on a CPU, checked and counted. The manual is the README next to this.

kernel = metalsim.metal_kernel(name, input_names, output_names, source)    # as mx.fast.metal_kernel
(out,) = kernel(inputs=[x], grid=(n, 1, 1), threadgroup=(32, 1, 1), output_shapes=[(n,)],
                output_dtypes=[mx.float32])
metalsim.last()                                                            # Stats of that dispatch
"""

from . import launch
from .launch import Config, Library, Stats, code_size, config, configured, metal_kernel
from .signature import generate
from .translate import MSLError

__all__ = [
    "Config",
    "Library",
    "MSLError",
    "Stats",
    "code_size",
    "config",
    "configured",
    "generate",
    "last",
    "metal_kernel",
]


def last():
    """Stats of the last dispatch, also of one that raised while running; None before the first."""
    return launch.last_stats
