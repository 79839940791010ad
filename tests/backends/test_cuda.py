"""The Metal text in CUDA: what each rule of the translation does, what it refuses, how a launch lies on the grid."""

import re

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_turbo.backends import cuda, sources
from mlx_turbo.backends.sides import BackendError, QuantizeSide

PRELUDE, POSITIONS = sources.cuda_prelude()
KERNELS = "attend", "merge", "quantize", "dequantize", "statistics"


def translated(header="", body=""):
    """Both as CUDA, without the prelude's part."""
    before, after = cuda.translate(header, body)
    assert before.startswith(PRELUDE) and before.endswith("}  // namespace turbo\n") and after.startswith(POSITIONS)
    return before.removeprefix(PRELUDE).removesuffix("}  // namespace turbo\n"), after.removeprefix(POSITIONS)


# ---- the rules -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "metal, becomes",
    [
        ("threadgroup float a[4], b[N];", "__shared__ float a[4], b[N];"),
        ("  threadgroup float4 memory4[MEMORY / 4];", "  __shared__ float4 memory4[MEMORY / 4];"),
        ("threadgroup float *p = (threadgroup float *)a;", "float *p = (float *)a;"),
        ("const device half *p = k + 1;", "const half *p = k + 1;"),
        ("float f = g((const device float4 *)p, (thread uint *)w);", "float f = g((const float4 *)p, (uint *)w);"),
        ('_Pragma("clang loop unroll(full)") for (;;) {}', '_Pragma("unroll") for (;;) {}'),
        ('_Pragma("clang loop unroll(disable)") for (;;) {}', '_Pragma("unroll 1") for (;;) {}'),
        ("half2 x = half2(1.65625h);", "half2 x = half2(half(1.65625f));"),
        ("half x = 2h + .5h;", "half x = half(2.0f) + half(.5f);"),
        ("int width = device_width + threads;", "int width = device_width + threads;"),
        ("uint x = 0x64006400u; float y = 1e3f;", "uint x = 0x64006400u; float y = 1e3f;"),
    ],
)
def test_a_rule_changes_what_it_names_and_nothing_else(metal, becomes):
    assert translated(body=metal) == ("", becomes)


def test_constants_and_functions_lose_their_address_spaces():
    header = "constant constexpr const float X = 1.0f;\nMETAL_FUNC int f(thread float &x, device void *p) {\n}\n"
    assert translated(header)[0] == "constexpr const float X = 1.0f;\nMETAL_FUNC int f(float &x, void *p) {\n}\n"


def test_of_overloads_for_two_address_spaces_one_stays_and_others_are_kept():
    one = "METAL_FUNC int f({space} float *p) {{\nif (p) {{\nreturn 1;\n}}\nreturn 0;\n}}\n"
    other = "METAL_FUNC int f(float p) {\nreturn 0;\n}\n"
    near, far = (one.format(space=space) for space in ("threadgroup", "device"))
    header = "struct A {\nint x;\n};\n" + near + other + far + "constexpr int N = 1;\n"
    assert translated(header)[0] == header.replace("threadgroup ", "").replace(far, "")


@pytest.mark.parametrize("kernel", KERNELS)
def test_only_the_rules_change_the_text_of_a_kernel(kernel):
    """Word by word: what is gone are address spaces, and one overload; what has come is what the rules name."""
    metal, found = "".join(sources.metal_source(kernel)), "".join(translated(*sources.metal_source(kernel)))
    spaces = r"\b(device|constant|thread|threadgroup)\b"
    assert not re.findall(rf"{spaces} |clang|\d\.\d+h\b", found)
    metal = re.sub(r"METAL_FUNC const device float4 \*tq_fours.*?\}", "", metal, flags=re.S)
    for old, new in (('"clang loop unroll(full)"', '"unroll"'), ('"clang loop unroll(disable)"', '"unroll 1"')):
        metal = metal.replace(old, new)
    metal = re.sub(r"\b(\d+\.\d+)h\b", r"half(\1f)", metal)
    metal, found = re.sub(spaces, "", metal), found.replace("__shared__", "")
    assert re.findall(r"\w+|[^\w\s]", metal) == re.findall(r"\w+|[^\w\s]", found)


@pytest.mark.parametrize(
    "line, says",
    [
        ("float x [[threadgroup(0)]];", "an attribute"),
        ("#include <metal_stdlib>", "an #include"),
        ("# import <metal_stdlib>", "an #include"),
        ('_Pragma("clang loop vectorize(enable)")', "a pragma of clang"),
        ("using namespace metal;", "Metal's namespace"),
        ("float x = metal::exp(y);", "Metal's namespace"),
        ("kernel void f() {}", "a word of Metal"),
        ("float x = simd_prefix_inclusive_sum(y);", "cuda/prelude.cuh does not define simd_prefix_inclusive_sum"),
        ("float x = quad_sum(y);", "cuda/prelude.cuh does not define quad_sum"),
        ("float x = fast::tanh(y);", "cuda/prelude.cuh does not define fast::tanh"),
        ("simdgroup_float8x8 m;", "cuda/prelude.cuh does not define simdgroup_float8x8"),
        ("uint n = threads_per_grid.x;", "cuda/prelude.cuh does not define threads_per_grid"),
        ("uint n = thread_index_in_threadgroup;", "cuda/prelude.cuh does not define thread_index_in_threadgroup"),
        ("atomic_fetch_add_explicit(p, 1);", "cuda/prelude.cuh does not define atomic_fetch_add_explicit"),
        ("threadgroup_barrier(mem_flags::mem_texture);", "cuda/prelude.cuh does not define mem_texture"),
    ],
)
@pytest.mark.parametrize("where", [0, 1])
def test_what_no_rule_knows_is_an_error_that_names_the_line(line, says, where):
    texts = ["int a = 0;\n", "int b = 1;\n"]
    cuda.translate(*texts)
    texts[where] += line + "\nint c = 2;\n"
    with pytest.raises(BackendError) as e:
        cuda.translate(*texts)
    assert says in str(e.value) and str(e.value).endswith(f": {line}")


def test_a_kernel_that_cannot_be_translated_is_an_error_of_the_backend(monkeypatch):
    header, body = sources.metal_source("quantize")
    monkeypatch.setattr("mlx_turbo.backends.kernel_backend.metal_source", lambda name: (header, body + "quad_sum(1);"))
    with pytest.raises(BackendError, match="the CUDA kernel does not build or run: quantize.metal(.|\n)*quad_sum"):
        cuda.CudaBackend().quantize([QuantizeSide(mx.zeros((1, 1, 8, 64)), 4)])


# ---- the grid --------------------------------------------------------------------------------------------------
SIZES = st.integers(1, 40)


@given(y=SIZES, z=SIZES, high=st.integers(1, 8), deep=st.integers(1, 3))
def test_every_thread_of_metals_grid_is_there_once_and_no_other(y, z, high, deep):
    """As MLX divides a grid into blocks, and as the prelude reads positions."""
    grid, group = (32, y, z), (32, high, deep)
    launch = cuda.launch_arguments("k", grid, group)
    block = [min(t, g) for t, g in zip(launch["threadgroup"], launch["grid"])]
    blocks = [-(-g // t) for t, g in zip(launch["threadgroup"], launch["grid"])]
    assert block[0] == 32 and blocks[1] == 1
    ys = [x * block[1] + t for x in range(blocks[0]) for t in range(block[1])]
    zs = [x * block[2] + t for x in range(blocks[2]) for t in range(block[2])]
    assert ys == list(range(y)) and zs == list(range(z))


def test_as_many_threadgroups_as_a_long_past_needs_fit():
    """128K tokens of 8 kv heads of 128 take 65,536 threadgroups to restore, one more than CUDA allows along y."""
    launch = cuda.launch_arguments("turbo_dequantize", (32, 2 * 8 * 131_072 // 4, 1), (32, 8, 1))
    assert launch["grid"][0] // 32 == 65_536 and launch["grid"][1] == 8
    with pytest.raises(BackendError, match="merge: got 65536 threadgroups along z, CUDA allows 65535"):
        cuda.launch_arguments("merge", (32, 4, 65_536), (32, 4, 1))


@pytest.mark.parametrize("grid, group", [((64, 1, 1), (32, 1, 1)), ((32, 1, 1), (16, 1, 1))])
def test_lanes_are_the_threads_along_x(grid, group):
    with pytest.raises(BackendError, match="expected both 32 wide"):
        cuda.launch_arguments("k", grid, group)
