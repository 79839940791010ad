"""A Metal backend whose kernels do nothing, at once: what is left is its Python, and what a kernel looks like that
fails silently. And one whose kernels do not build."""

import mlx.core as mx

from mlx_turbo.backends import statistics
from mlx_turbo.backends.metal import MetalBackend
from mlx_turbo.backends.mlx_ops import CpuBackend
from mlx_turbo.backends.sides import BackendError


class NoKernels(MetalBackend):
    """Kernels return zeros, and are not tested before their first use. Only sums are right: keys are centered or not by
    them."""

    def __init__(self):
        super().__init__(lambda *names, **options: self._zeros)

    @staticmethod
    def _zeros(*, output_shapes, output_dtypes, **arguments):
        return [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes)]

    def run_check(self, what, check):
        pass

    def launch_statistics(self, x, first, segment):
        super().launch_statistics(x, first, segment)
        return statistics.in_operations(x, first, segment)

    def describe(self):
        return "metal path with kernels that do nothing"


class Unevaluated(NoKernels):
    """Of a kernel there is nothing but the graph: its outputs depend on its inputs."""

    @staticmethod
    def _zeros(*, inputs, **arguments):
        return mx.depends(NoKernels._zeros(**arguments), [a for a in inputs if isinstance(a, mx.array)])

    def launch_statistics(self, x, first, segment):
        return MetalBackend.launch_statistics(self, x, first, segment)


class DoesNotBuild(CpuBackend):
    name, n_tested = "metal", 0

    def quantize(self, sides, seed=0, scale="least-squares"):
        raise BackendError("the kernel does not build\nprogram_source:7:3: error: expected ';'")
