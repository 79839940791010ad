"""Backends that build nothing and run nothing: they collect the kernels that steps of a model would ask for."""

import metalsim
import mlx.core as mx
from support import nvrtc

from mlx_turbo.backends.attend_launch import AttendTuning
from mlx_turbo.backends.cuda import CudaBackend
from mlx_turbo.backends.metal import MetalBackend
from mlx_turbo.backends.sides import CachedSide, PackedSide, QuantizeSide
from mlx_turbo.quant.scheme import words_per_row

COUNTS = {"short": (4, 600, 100), "long": (4, 60_000, 100)}  # one launch of attention, and two


class _Collector:
    """generated: {what tells a kernel from others: (metal/'s name, what `generate` gave, the launch)}."""

    def __init__(self, **tuning):
        super().__init__(self._collect)
        self.tuning, self.generated = AttendTuning(**tuning), {}

    def _collect(self, name, input_names, output_names, source, header="", ensure_row_contiguous=True):
        def launch(*, inputs, output_shapes, output_dtypes, template=(), **launch):
            key, out = self.generate(name, input_names, output_names, source, header, inputs, output_dtypes, template)
            self.generated.setdefault(key, (name.removeprefix("turbo_").split("_")[0], out, dict(template)))
            return [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes)]

        return launch

    def run_check(self, what, check):
        pass

    def of(self, kernel):
        return [out for name, out, _ in self.generated.values() if name == kernel]

    def step(self, shape, n_query_tokens, counts, bits=(4, 4), means=True, dtype=mx.float16):
        """What one decode step or one verified draft asks for. shape: (head_dim of keys, of values, query heads per kv
        head)."""
        key_dim, value_dim, gqa = shape
        sides = [_side(b, d, means, dtype) for b, d in zip(bits, (key_dim, value_dim))]
        queries = mx.zeros((1, gqa, n_query_tokens, key_dim), dtype)
        self.attend(queries, *sides, counts, scale=1.0, mask="causal")

    def packing(self, head_dim, bits, dtype=mx.float16):
        """What packing and restoring the tokens of a layer ask for."""
        x = mx.zeros((1, 1, 8, head_dim), dtype)
        codes, mean = mx.zeros((1, 1, 8, words_per_row(bits, head_dim)), mx.uint32), mx.zeros((1, 1, 1, head_dim))
        self.quantize([QuantizeSide(x, bits, mean)] * 2)
        self.dequantize([PackedSide(codes, mx.zeros((1, 1, 8, 1), mx.float16), bits, head_dim, mean)] * 2, 0, 8, dtype)


class MetalCollector(_Collector, MetalBackend):
    """Of texts for Metal: each as metalsim.generate gives it."""

    @staticmethod
    def generate(name, input_names, output_names, source, header, *call):
        out = metalsim.generate(name, input_names, output_names, source, header, False, *call)
        return out[1], out


class CudaCollector(_Collector, CudaBackend):
    """Of texts for CUDA: each as nvrtc.kernel_text gives it."""

    @staticmethod
    def generate(*call):
        out = nvrtc.kernel_text(*call)
        return out[1], out


def _side(bits, head_dim, means, dtype):
    exact = mx.zeros((1, 1, 8, head_dim), dtype)
    codes = mx.zeros((1, 1, 8, words_per_row(bits, head_dim)), mx.uint32) if bits else exact
    scale = mx.zeros((1, 1, 8, 1), mx.float16) if bits else None
    return CachedSide(
        exact, codes, scale, exact, bits, head_dim, mx.zeros((1, 1, 8, head_dim), mx.float16) if means else None, 128
    )
