"""Backends that build nothing and run nothing: they collect the kernels that steps of a model would ask for."""

import itertools
from typing import NamedTuple

import metalsim
import mlx.core as mx
from support import nvrtc

from mlx_turbo.backends.attend_launch import QUERY_TOKENS
from mlx_turbo.backends.cuda import CudaBackend
from mlx_turbo.backends.metal import MetalBackend
from mlx_turbo.backends.sides import CachedSide, PackedSide, QuantizeSide, RopePart
from mlx_turbo.quant.scheme import PACKED_BITS, words_per_row

# (head_dim of keys, of values, query heads per kv head) of mlx-lm's models, dense ones and those with latent attention
SHAPES = [
    (64, 64, 1),
    (64, 64, 8),
    (80, 80, 1),
    (80, 80, 4),
    (96, 96, 3),
    (96, 96, 8),
    (112, 112, 7),
    (128, 128, 1),
    (128, 128, 2),
    (128, 128, 4),
    (128, 128, 5),
    (128, 128, 8),
    (128, 128, 16),
    (192, 128, 1),
    (256, 256, 2),
    (256, 256, 4),
    (256, 256, 8),
    (256, 256, 16),
    (512, 512, 8),
    (576, 512, 16),
]
LATENTS = [(512, 64, 16), (512, 64, 128)]  # (dims of latents, of RoPE keys, heads)
BITS = [(4, 4), (3, 3), (2, 2), (8, 4), (0, 4), (8, 8), (6, 5)]
PACKED_DIMS = (32, 64, 80, 96, 112, 128, 256, 512, 576)
COUNTS = {"short": (4, 600, 100), "long": (4, 60_000, 100)}  # one launch of attention, and two


class Kernel(NamedTuple):
    """name: of metal/, without its ending. template: its values, {name: value}."""

    name: str
    template: dict

    @property
    def variant(self):
        """The name, and of attention how simdgroups work together."""
        how = [
            text
            for flag, text in (("SINGLE_LAUNCH", "one launch"), ("SHARED_TILES", "tiles"))
            if self.template.get(flag)
        ]
        return ", ".join([self.name, *how])


class _Collector:
    """generated: {what tells a kernel from others: (`Kernel`, what `generate` gave)}."""

    def __init__(self, **tuning):
        super().__init__(self._collect)
        self.tuning, self.generated = self.tuning._replace(**tuning), {}

    def _collect(self, name, input_names, output_names, source, header="", ensure_row_contiguous=True):
        def launch(*, inputs, output_shapes, output_dtypes, template=(), **launch):
            key, out = self.generate(name, input_names, output_names, source, header, inputs, output_dtypes, template)
            self.generated.setdefault(key, (Kernel(name.removeprefix("turbo_").split("_")[0], dict(template)), out))
            return [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes)]

        return launch

    def run_check(self, what, check):
        pass

    def of(self, kernel):
        return [out for k, out in self.generated.values() if k.name == kernel]

    @staticmethod
    def inputs(shape, n_query_tokens, bits=(4, 4), means=True, dtype=mx.float16):
        """(queries, (keys, values)) of one kv head."""
        key_dim, value_dim, gqa = shape
        sides = tuple(_side(b, d, means, dtype) for b, d in zip(bits, (key_dim, value_dim)))
        return mx.zeros((1, gqa, n_query_tokens, key_dim), dtype), sides

    def step(self, shape, n_query_tokens, counts, bits=(4, 4), **options):
        """What one decode step or one verified draft asks for. shape: as in SHAPES."""
        queries, sides = self.inputs(shape, n_query_tokens, bits, **options)
        self.attend(queries, *sides, counts, scale=1.0, mask="causal")

    def latent_step(self, shape, n_query_tokens, counts, bits=(4, 4), dtype=mx.float16):
        """The same of latent attention. shape: as in LATENTS; bits: of latents, of RoPE keys."""
        dim, rope_dim, heads = shape
        queries, (keys, _) = self.inputs((dim, dim, heads), n_query_tokens, bits, False, dtype)
        _, (rope_keys, _) = self.inputs((rope_dim, rope_dim, heads), n_query_tokens, bits[::-1], False, dtype)
        rope = RopePart(mx.zeros((1, heads, n_query_tokens, rope_dim), dtype), rope_keys)
        for part in rope, None:
            self.attend(queries, keys, keys, counts, scale=1.0, rope=part)

    def packing(self, head_dim, bits, dtype=mx.float16):
        """What packing and restoring the tokens of a layer ask for, and their means."""
        x = mx.zeros((1, 1, 8, head_dim), dtype)
        codes, mean = mx.zeros((1, 1, 8, words_per_row(bits, head_dim)), mx.uint32), mx.zeros((1, 1, 1, head_dim))
        self.statistics(x, 0, 128)
        self.quantize([QuantizeSide(x, bits, mean)] * 2)
        packed = PackedSide(codes, mx.zeros((1, 1, 8, 1), mx.float16), bits, head_dim, mean)
        self.dequantize([packed] * 2, 0, 8, dtype)
        for fewer in (b for b in PACKED_BITS if b < bits):
            self.requantize(packed, fewer)


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


def steps(shapes, bits, query_tokens, **options):
    """A CudaCollector that was asked for the steps of all combinations, short and long."""
    collector = CudaCollector()
    for shape, b, n, counts in itertools.product(shapes, bits, query_tokens, COUNTS.values()):
        collector.step(shape, n, counts, b, **options)
    return collector


def latent_steps(shapes, bits):
    """A CudaCollector that was asked for decode steps of latent attention, short and long."""
    collector = CudaCollector()
    for shape, b, counts in itertools.product(shapes, bits, COUNTS.values()):
        collector.latent_step(shape, 1, counts, b)
    return collector


def packing(head_dim, bits=PACKED_BITS):
    """A CudaCollector that was asked to pack and restore vectors."""
    collector = CudaCollector()
    for b in bits:
        collector.packing(head_dim, b)
    return collector


def every_variant():
    """[(architecture, CudaCollector)] of what the slow tests compile: on the older GPU the first bits only."""
    older, newer = nvrtc.ARCHITECTURES
    return [
        *((newer, packing(head_dim)) for head_dim in PACKED_DIMS),
        (newer, steps(SHAPES, BITS, QUERY_TOKENS)),
        (newer, latent_steps(LATENTS, BITS)),
        *((older, packing(head_dim)) for head_dim in PACKED_DIMS),
        (older, steps(SHAPES, BITS[:1], QUERY_TOKENS)),
    ]


def _side(bits, head_dim, means, dtype):
    exact = mx.zeros((1, 1, 8, head_dim), dtype)
    codes = mx.zeros((1, 1, 8, words_per_row(bits, head_dim)), mx.uint32) if bits else exact
    scale = mx.zeros((1, 1, 8, 1), mx.float16) if bits else None
    return CachedSide(
        exact, codes, scale, exact, bits, head_dim, mx.zeros((1, 1, 8, head_dim), mx.float16) if means else None, 128
    )
