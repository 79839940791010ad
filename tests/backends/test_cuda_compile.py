"""The kernels compiled by NVIDIA's compiler, without a GPU: they build, spill nothing, and keep to their registers."""

import sys

import mlx.core as mx
import pytest
from support import nvrtc
from support.ceilings import registers_allowed, spills_allowed
from support.collector import BITS, COUNTS, LATENTS, PACKED_DIMS, SHAPES, CudaCollector, latent_steps, packing, steps

from mlx_turbo.backends import cuda
from mlx_turbo.backends.attend_launch import QUERY_TOKENS, THREADGROUP_BYTES
from mlx_turbo.bench import stages, timing

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="NVRTC comes from PyPI for Linux")

HOPPER = nvrtc.ARCHITECTURES[1]


def compiled(collector, architectures=nvrtc.ARCHITECTURES):
    """[(what a kernel is, `Resources`)] of all kernels that a collector was asked for."""
    return [
        ((kernel, architecture, out[1]), nvrtc.compile_for(architecture, *out))
        for kernel, out in collector.generated.values()
        for architecture in architectures
    ]


def check(collector, architectures=nvrtc.ARCHITECTURES):
    for (kernel, architecture, name), used in compiled(collector, architectures):
        where = f"{kernel} for {architecture}: {name}: {used}"
        assert used.registers <= registers_allowed(kernel), where
        assert used.spills <= spills_allowed(kernel), where
        assert used.shared <= THREADGROUP_BYTES + 1024, where


def test_the_kernels_of_widely_used_models_keep_to_their_registers():
    check(steps([(128, 128, 1), (128, 128, 8), (256, 256, 8)], BITS[:1], [1]), [HOPPER])
    check(steps([(128, 128, 4)], BITS[:1], [1], dtype=mx.bfloat16))


def test_the_kernels_of_latent_attention_keep_to_their_registers():
    check(latent_steps(LATENTS[:1], BITS[:1]), [HOPPER])


@pytest.mark.slow
@pytest.mark.parametrize("bits", BITS, ids=str)
def test_the_kernels_of_latent_attention_of_any_bits_keep_to_their_registers(bits):
    check(latent_steps(LATENTS, [bits]), nvrtc.ARCHITECTURES if bits == BITS[0] else [HOPPER])


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_packing_kernels_keep_to_their_registers(bits):
    check(packing(128, [bits]), [HOPPER])


@pytest.mark.slow
@pytest.mark.parametrize("bits", BITS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernels_of_any_models_shape_keep_to_their_registers(shape, bits):
    """Other bits than the first for one query token and one architecture: a variant takes the compiler a second."""
    if bits == BITS[0]:
        check(steps([shape], [bits], QUERY_TOKENS), nvrtc.ARCHITECTURES)
    else:
        check(steps([shape], [bits], [1]), [HOPPER])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32], ids=str)
def test_the_kernels_of_any_dtype_keep_to_their_registers(dtype):
    check(steps([(128, 128, 4), (64, 64, 8)], BITS[:1], [1, 4], dtype=dtype, means=False), [HOPPER])


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", PACKED_DIMS)
def test_packing_kernels_of_any_head_dim_keep_to_their_registers(head_dim):
    check(packing(head_dim))


@pytest.mark.parametrize(
    "stage", [pytest.param(s, marks=[pytest.mark.slow][: s != "bytes only"]) for s in stages.STAGES]
)
def test_the_kernel_without_a_stage_builds(stage):
    collector = CudaCollector()
    backend = stages.AblatedBackend(stage, collector)
    queries, sides = CudaCollector.inputs((64, 64, 2), 1)
    backend.attend(queries, *sides, COUNTS["short"], scale=1.0)
    assert compiled(collector, [HOPPER])


def test_the_empty_kernel_builds():
    collector = CudaCollector()
    timing.floor_run(collector.metal_kernel)(1)
    (used,) = [used for _, used in compiled(collector)][:1]
    assert used.spills == 0 and used.registers < 32


# ---- that the harness sees what it is for ----------------------------------------------------------------------
def kernel(body, header=""):
    inputs = [mx.zeros((4, 4))]
    header, body = cuda.translate(header, body)
    return nvrtc.kernel_text("probe", ["x"], ["y"], body, header, inputs, [mx.float32], [("N", 200)])


def test_resources_are_those_of_the_kernel():
    small = nvrtc.compile_for(HOPPER, *kernel("y[0] = x[thread_position_in_grid.y];"))
    shared = "threadgroup float t[N];\nint i = thread_index_in_simdgroup;\nt[i] = x[i];\n"
    shared += "threadgroup_barrier(mem_flags::mem_threadgroup);\ny[i] = t[N - 1 - i];"
    assert small.shared == 0 and small.spills == 0 and small.registers < 20
    assert nvrtc.compile_for(HOPPER, *kernel(shared)).shared == 800


def test_registers_and_spills_are_counted():
    unrolled = 'float a[N];\n_Pragma("clang loop unroll(full)") for (int i = 0; i < N; i++)\na[i] = x[i];\n'
    unrolled += "threadgroup_barrier(mem_flags::mem_device);\nfor (int k = 0; k < int(x[0]); k++)\n{"
    unrolled += (
        '_Pragma("clang loop unroll(full)") for (int i = 0; i < N; i++)\na[i] = a[i] * a[(i + 7) % N] + x[k];\n}\n'
    )
    unrolled += 'float s = 0;\n_Pragma("clang loop unroll(full)") for (int i = 0; i < N; i++)\ns += a[i];\ny[0] = s;'
    assert nvrtc.compile_for(HOPPER, *kernel(unrolled)).registers > 200
    text, name = kernel(unrolled)
    assert nvrtc.compile_for(HOPPER, text.replace("int N = 200", "int N = 400"), name).spills > 0


def test_what_does_not_build_is_an_error_with_the_compilers_message():
    with pytest.raises(RuntimeError, match='sm_90a(.|\n)*error: identifier "z" is undefined'):
        nvrtc.compile_for(HOPPER, *kernel("y[0] = z;"))
