"""MLX keeps a compiled kernel under a name, which before MLX 0.32.0 does not tell its texts apart."""

import contextlib
import re
import types

import metalsim
import mlx.core as mx
import numpy as np
import pytest
from support import nvrtc
from support.attend_cases import make_case
from support.no_kernels import NoKernels

from mlx_turbo.backends import cuda, kernel_names, metal
from mlx_turbo.backends.sides import PackedSide, QuantizeSide


class OldMLX:
    """mx.fast.metal_kernel of MLX 0.30 and 0.31: template values make a name. Its kernels do nothing."""

    def __init__(self):
        self.texts = {}  # name -> texts

    def metal_kernel(self, name, input_names, output_names, source, header="", ensure_row_contiguous=True):
        assert re.fullmatch(r"\w+", name)  # part of a function's name

        def call(*, inputs, output_shapes, output_dtypes, template, **launch):
            values = "_".join(str(value) for _, value in template)
            text, kernel, _ = metalsim.generate(
                name, input_names, output_names, source, header, False, inputs, output_dtypes, template
            )
            self.texts.setdefault(f"{name}_{values}", set()).add(text.replace(kernel, "NAME"))
            return [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes)]

        return call


def launch_in_many_ways(metal_kernel):
    """What one process may ask for: models of several dtypes, masks, sinks, one launch and two."""
    backend = NoKernels()
    backend.metal_kernel = metal_kernel
    for dtype in (mx.float16, mx.bfloat16, mx.float32):
        x = mx.zeros((1, 2, 8, 64), dtype)
        (packed,) = backend.quantize([QuantizeSide(x, 4)])
        backend.dequantize([PackedSide(*packed, 4, 64)], 0, 8, dtype)
        for G in (2, 8):
            case = make_case(dims=(64, 64), G=G, Hkv=2, dtype=dtype)
            masks = None, mx.zeros((187,), mx.bool_), *(mx.zeros((187,), t) for t in (dtype, mx.float32))
            sinks = None, mx.zeros((2 * G,), dtype), mx.zeros((2 * G,), mx.float32)
            for mask, sink in [(mask, None) for mask in masks] + [(None, sink) for sink in sinks]:
                for launches in contextlib.nullcontext, backend.two_launches:
                    with launches():
                        backend.attend(*case[:4], scale=1.0, mask=mask, sinks=sink)


class OldCuda(OldMLX):
    """mx.fast.cuda_kernel of MLX before 0.32.2."""

    def metal_kernel(self, name, input_names, output_names, source, header="", ensure_row_contiguous=True):
        def call(*, inputs, output_shapes, output_dtypes, template, **launch):
            call = name, input_names, output_names, source, header, inputs, output_dtypes, template
            text, kernel = nvrtc.kernel_text(*call)
            self.texts.setdefault(kernel, set()).add(text)
            return [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes)]

        return call

    cuda_kernel = metal_kernel


@pytest.mark.parametrize(
    "kind, backend, version", [(OldMLX, metal.MetalBackend, "0.31.2"), (OldCuda, cuda.CudaBackend, "0.32.1")]
)
def test_a_name_stands_for_one_text_also_where_mlx_leaves_the_types_out(kind, backend, version, monkeypatch):
    old = kind()
    launch_in_many_ways(backend(old.metal_kernel).metal_kernel)
    assert max(map(len, old.texts.values())) > 1  # what it is about
    old = kind()
    monkeypatch.setattr(mx, "__version__", version)
    for name in ("metal_kernel", "cuda_kernel"):
        monkeypatch.setattr(mx.fast, name, old.metal_kernel)
    launch_in_many_ways(backend().metal_kernel)
    assert {len(texts) for texts in old.texts.values()} == {1}


@pytest.mark.parametrize(
    "version, named",
    [
        ("0.30.4", {"metal", "cuda"}),
        ("0.31.2", {"metal", "cuda"}),
        ("0.32.0", {"cuda"}),
        ("0.32.1", {"cuda"}),
        ("0.32.2", set()),
        ("0.32.4.dev1", set()),
        ("1.0.0", set()),
    ],
)
def test_newer_mlx_names_them_itself(version, named):
    mlx = types.SimpleNamespace(__version__=version, fast=OldCuda())
    for gpu in metal, cuda:
        name = gpu.__name__.rpartition(".")[2]
        maker = kernel_names.kernel_maker(mlx, f"{name}_kernel", gpu.NAMES_TYPES)
        assert (maker != getattr(mlx.fast, f"{name}_kernel")) == (name in named)


def test_results_are_the_same_with_names_of_ours(simulated):
    x = mx.array(np.random.default_rng(0).standard_normal((1, 2, 9, 64)).astype(np.float32))
    mlx = types.SimpleNamespace(__version__="0.31.2", fast=metalsim)
    named = metal.MetalBackend(kernel_names.kernel_maker(mlx, "metal_kernel", metal.NAMES_TYPES))
    for dtype in (mx.float16, mx.float32):
        side = QuantizeSide(x.astype(dtype), 4)
        for got, want in zip(*(backend.quantize([side])[0] for backend in (named, simulated))):
            assert mx.array_equal(got, want)


def test_no_mask_a_causal_and_a_boolean_one_need_one_library():
    """A window that fills up goes from none to a boolean one in the middle of an answer."""
    recorded, backend = OldMLX(), NoKernels()
    backend.metal_kernel = recorded.metal_kernel
    case = make_case(dims=(64, 64), G=4, Hkv=2, dtype=mx.bfloat16)
    for mask in (None, "causal", mx.zeros((187,), mx.bool_), mx.zeros((1, 8, 1, 187), mx.bool_)):
        backend.attend(case.queries, case.keys, case.values, case.counts, scale=1.0, mask=mask)
    assert [len(texts) for texts in recorded.texts.values()] == [1]
