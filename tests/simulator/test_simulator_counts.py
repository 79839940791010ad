"""The Metal simulator counts what a kernel does: checked on kernels whose cost is known by hand."""

import re
import sys

import metalsim
import mlx.core as mx
import numpy as np
import pytest
from metalsim.instrument import accesses, instrument, operation, parse_type

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="metalsim runs on Linux")

N = 256


def run(source, inputs, n_threads=N, n_out=N, dtype=mx.float32, header="", group=64):
    """Run `source` with inputs a, b, ...; returns (out, Stats)."""
    names = "abcd"[: len(inputs)]
    kernel = metalsim.metal_kernel(
        "counted", list(names), ["out"], "uint i = thread_position_in_grid.x;\n" + source, header
    )
    (out,) = kernel(
        inputs=inputs,
        output_shapes=[(n_out,)],
        output_dtypes=[dtype],
        grid=(n_threads, 1, 1),
        threadgroup=(group, 1, 1),
    )
    return np.array(out), metalsim.last()


def per_thread(stats):
    return {name: n / stats.threads for name, n in stats.ops.items()}


def test_a_nibble_dot_product_costs_what_it_says():
    words = mx.arange(N, dtype=mx.uint32)
    out, stats = run(
        """
        uint word = a[i];
        float sum = 0;
        for (int j = 0; j < 8; j++) sum += float((word >> (4 * j)) & 15) * b[j];
        out[i] = sum;""",
        [words, mx.ones((8,))],
    )
    # 7 shifts and 7 masks: the first nibble needs no shift and the last no mask
    assert per_thread(stats) == {"bit": 14, "cvt": 8, "fma": 8}
    assert stats.threads == N
    assert set(stats.reads["a"]) == {1} and set(stats.writes["out"]) == {1}
    assert stats.read_bytes == {"a": 4 * N, "b": 32 * N, "out": 0}
    assert stats.written_bytes["out"] == 4 * N
    assert stats.loads["a"] == N
    np.testing.assert_array_equal(out, (np.arange(N) & 15) + (np.arange(N) >> 4))


def test_an_element_mentioned_twice_is_read_once_and_simd_functions_are_counted_per_simdgroup():
    _, stats = run("out[i] = a[i] + a[i ^ 1] + simd_sum(a[i]);", [mx.ones((N,))])
    assert set(stats.reads["a"]) == {2}  # once as a[i], once as the neighbour's a[i ^ 1]
    assert per_thread(stats) == {"bit": 1, "fp": 2}
    assert stats.simd_ops == N // 32


def test_what_stands_in_for_a_simd_function_is_not_counted_nor_what_it_calls():
    _, stats = run("out[i] = simd_max(a[i]) + simd_min(a[i]);", [mx.ones((N,))])
    assert per_thread(stats) == {"fp": 1}
    assert stats.simd_ops == 2 * N // 32


def test_a_divergent_branch_is_counted_by_the_threads_that_take_it():
    _, stats = run("float v = 0; if (i % 4 == 0) { v = exp(a[i]) / b[i]; } out[i] = v;", [mx.ones((N,))] * 2)
    assert stats.ops["math"] == stats.ops["fdiv"] == N // 4
    assert stats.loads["a"] == N // 4
    assert stats.reads["a"].reshape(N, 4).sum(1).tolist() == [4 if i % 4 == 0 else 0 for i in range(N)]


def test_a_loop_is_counted_by_its_iterations():
    _, stats = run("float v = a[i]; for (int k = 0; k < int(i); k++) v = v * v + 1; out[i] = v;", [mx.zeros((N,))])
    assert stats.ops["fma"] == sum(range(N))


@pytest.mark.parametrize(
    "kind, n_bytes",
    [
        ("float", 4),
        ("float2", 8),
        ("float3", 16),
        ("float4", 16),
        ("half", 2),
        ("half2", 4),
        ("half4", 8),
        ("bfloat4", 8),
        ("uchar", 1),
        ("uchar2", 2),
        ("uchar4", 4),
        ("ushort4", 8),
        ("uint2", 8),
        ("uint4", 16),
        ("ulong2", 16),
    ],
)
def test_a_store_and_a_load_of_every_type_have_their_size(kind, n_bytes):
    """Also in threadgroup memory, and no part of what was written counts as uninitialised."""
    out, stats = run(
        f"""
        threadgroup {kind} s[32];
        const device {kind}* from = (const device {kind}*)a;
        s[i] = from[i] + ({kind})(1);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        ((device {kind}*)out)[i] = s[31 - i];""",
        [mx.zeros((16 * 32,), mx.uint8)],
        n_threads=32,
        n_out=16 * 32,
        dtype=mx.uint8,
        group=32,
    )
    assert stats.threadgroup_written == stats.threadgroup_read == 32 * n_bytes
    assert stats.threadgroup_size == 32 * n_bytes
    assert stats.read_bytes["a"] == stats.written_bytes["out"] == 32 * n_bytes
    assert stats.writes["out"].sum() == 32 * n_bytes
    assert stats.loads["a"] == 32


def test_vectors_inside_structs_and_arrays_have_their_size():
    out, stats = run(
        """
        threadgroup Tile s[32];
        s[i].scale = float2(a[i], 1);
        for (int k = 0; k < 3; k++) s[i].codes[k] = half2(a[i], k);
        s[i].tag = 5;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        float2 scale = s[31 - i].scale;
        half2 code = s[31 - i].codes[2];
        out[i] = scale.x + scale.y + code.x + code.y + s[31 - i].tag;""",
        [mx.arange(32, dtype=mx.float32)],
        n_threads=32,
        n_out=32,
        group=32,
        header="struct Tile { float2 scale; half2 codes[3]; uchar tag; };",
    )
    np.testing.assert_array_equal(out, 2 * (31 - np.arange(32)) + 1 + 2 + 5)
    assert stats.threadgroup_size == 32 * 24
    assert stats.threadgroup_written == 32 * (8 + 3 * 4 + 1)
    assert stats.threadgroup_read == 32 * (8 + 4 + 1)


def test_barriers_and_atomics_are_counted():
    source = """
        threadgroup atomic_uint c;
        if (i % 64 == 0) atomic_store_explicit(&c, 0, memory_order_relaxed);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        atomic_fetch_add_explicit(&c, 1, memory_order_relaxed);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        out[i] = atomic_load_explicit(&c, memory_order_relaxed) + a[i];"""
    out, stats = run(source, [mx.zeros((N,))])
    np.testing.assert_array_equal(out, 64)
    n_groups = N // 64
    assert stats.barriers == 2 * n_groups
    assert stats.atomics == n_groups + 2 * N


@pytest.mark.parametrize(
    "text, n_bytes",
    [
        ("i1", 1),
        ("i8", 1),
        ("i32", 4),
        ("half", 2),
        ("ptr addrspace(1)", 8),
        ("ptr addrspace(271)", 4),
        ("<2 x float>", 8),
        ("<2 x half>", 4),
        ("<3 x i32>", 12),
        ("<4 x i1>", 1),
        ("<2 x ptr addrspace(1)>", 16),
        ("[3 x i16]", 6),
        ("[2 x [3 x float]]", 24),
        ("[2 x <3 x float>]", 32),
        ("{ float, i32 }", 8),
        ("{ i8, <2 x float> }", 16),
        ("<{ i8, <2 x float> }>", 9),
        ("[2 x { i8, float, i8 }]", 24),
        ("{ { i64, i8 }, [2 x i8] }", 24),
        ("%struct.P", 12),
        ('%"class.Q<4>"', 24),
    ],
)
def test_the_size_of_an_llvm_type_is_what_an_access_to_it_touches(text, n_bytes):
    named = {"%struct.P": "{ float, i32, i8 }", '%"class.Q<4>"': "{ %struct.P, <2 x float> }"}
    kind, rest = parse_type(text + " %value", named)
    assert (kind.bytes, rest.strip()) == (n_bytes, "%value")


def test_an_llvm_type_of_unknown_size_is_an_error():
    with pytest.raises(metalsim.MSLError, match="does not know the size"):
        parse_type('target("spirv.Image") %x')


@pytest.mark.parametrize(
    "line, expected",
    [
        ("  store <2 x float> %a, ptr addrspace(271) %p, align 8", [("271", "%p", "i64 8", 8)]),
        (
            "  store <2 x float> <float 1.0, float 2.0>, ptr addrspace(1) %p, align 8, !dbg !3",
            [("1", "%p", "i64 8", 8)],
        ),
        ("  store { <2 x float>, i32 } %a, ptr addrspace(1) %p, align 8", [("1", "%p", "i64 16", 8)]),
        ("  store ptr addrspace(1) %a, ptr addrspace(271) %p, align 8", [("271", "%p", "i64 8", 8)]),
        ("  store ptr addrspace(1) %a, ptr %p, align 8", []),
        (
            "  store volatile i32 0, ptr addrspace(1) getelementptr inbounds (i8, ptr addrspace(1) @x, i64 4), align 4",
            [("1", "getelementptr inbounds (i8, ptr addrspace(1) @x, i64 4)", "i64 4", 4)],
        ),
        ("  %3 = load <4 x half>, ptr addrspace(1) %p, align 2, !tbaa !7", [("1", "%p", "i64 8", 2)]),
        ("  %3 = load atomic i32, ptr addrspace(1) %p monotonic, align 4", [("1", "%p", "i64 4", 4)]),
        ("  %3 = atomicrmw fadd ptr addrspace(271) %p, float %v monotonic, align 4", [("271", "%p", "i64 4", 4)]),
        (
            "  %3 = cmpxchg weak volatile ptr addrspace(1) %p, i32 %a, i32 %b monotonic monotonic, align 4",
            [("1", "%p", "i64 4", 4)],
        ),
        (
            "  tail call void @llvm.memcpy.p271.p1.i64(ptr addrspace(271) noundef align 4 %p, "
            "ptr addrspace(1) align 4 %q, i64 12, i1 false), !dbg !4",
            [("271", "%p", "i64 12", 4), ("1", "%q", "i64 12", 4)],
        ),
        (
            "  call void @llvm.memset.p271.i64(ptr addrspace(271) align 16 %p, i8 0, i64 %n, i1 false)",
            [("271", "%p", "i64 %n", 16)],
        ),
    ],
)
def test_the_accesses_of_an_llvm_instruction_are_recognised(line, expected):
    assert [(str(a.space), a.pointer, a.n_bytes, a.alignment) for a in accesses(line)] == expected


def test_an_access_to_threadgroup_memory_goes_where_that_lies_in_the_host():
    ir, info = instrument("""
%P = type { float, i8 }
@_ZZ4loopE1p_0 = external addrspace(271) global [3 x %P], align 4
@_ZZ1fE4last = external addrspace(271) global i8, align 16
define void @f(ptr addrspace(1) %a, i64 %n) {
  store float 1.0, ptr addrspace(271) getelementptr (i8, ptr addrspace(271) @_ZZ4loopE1p_0, i32 8), align 4
  call void @llvm.memcpy.p271.p271.i64(ptr addrspace(271) @_ZZ1fE4last, ptr addrspace(271) %b, i64 %n, i1 0)
  ret void
}
declare void @llvm.memcpy.p271.p271.i64(ptr addrspace(271), ptr addrspace(271), i64, i1)
""")
    assert info["threadgroup_variables"] == ["p", "last"]
    assert "@msl_threadgroup_variables = global [5 x i64] [i64 0, i64 24, i64 32, i64 1, i64 0]" in ir
    lines = [re.sub(r"(address|host)\d+", r"\1", line.strip()) for line in ir.split("\n")]
    first = lines.index("store float 1.0, ptr %msl.host, align 4")
    assert lines[first - 2] == (
        "%msl.address = ptrtoint ptr addrspace(271) getelementptr (i8, "
        "ptr addrspace(271) inttoptr (i32 0 to ptr addrspace(271)), i32 8) to i32"
    )
    second = "inttoptr (i32 1048576 to ptr addrspace(271))"
    assert f"%msl.address = ptrtoint ptr addrspace(271) {second} to i32" in lines
    assert "call void @llvm.memcpy.p0.p0.i64(ptr %msl.host, ptr %msl.host, i64 %n, i1 0)" in lines
    assert sum("declare void @llvm.memcpy.p0.p0.i64(" in line for line in lines) == 1


@pytest.mark.parametrize(
    "line, expected",
    [
        ("  %3 = fadd <4 x float> %1, %2", ("fp", 4)),
        ("  %3 = fmul reassoc nnan <2 x half> %1, %2", ("fp", 2)),
        ("  %3 = call float @llvm.fmuladd.f32(float %1, float %2, float %0)", ("fma", 1)),
        ("  %3 = tail call <4 x float> @llvm.fma.v4f32(<4 x float> %1, <4 x float> %2, <4 x float> %0)", ("fma", 4)),
        ("  %3 = tail call float @llvm.exp.f32(float %1)", ("math", 1)),
        ("  br label %7", None),
        ("  br i1 %6, label %7, label %8", ("branch", 1)),
    ],
)
def test_an_llvm_instruction_counts_once_per_element(line, expected):
    assert operation(line) == expected


# ---- code size -----------------------------------------------------------------------------------


def size(body, header=""):
    text = metalsim.generate(
        "sized",
        ["a"],
        ["out"],
        "uint i = thread_position_in_grid.x;\n" + body,
        header,
        False,
        [mx.ones((N,))],
        [mx.float32],
        None,
    )
    return metalsim.code_size(*text).instructions


def test_an_unrolled_loop_is_larger_by_its_body_times_its_trips():
    loop = '_Pragma("clang loop unroll({})") for (int k = 0; k < {}; k++) v = exp(v) * a[k];'
    rolled, *unrolled = (
        size(f"float v = a[i]; {loop.format(*how)} out[i] = v;")
        for how in (("disable", 64), ("full", 32), ("full", 64))
    )
    assert rolled < 32
    # an exponential, a product, a load, and the address of all but a[0]
    assert unrolled[1] - unrolled[0] == 32 * 4 and unrolled[1] > 64 * 4


def test_a_simdgroup_function_is_one_instruction_and_no_check_is_counted():
    assert size("out[i] = simd_sum(simd_max(simd_shuffle_xor(a[i], 1)));") - size("out[i] = a[i];") == 3
    once, twice = (size(f"out[i] = {'a[i] + ' * n}a[i + 1];") for n in (1, 2))
    assert twice - once == 1  # an addition: neither bounds nor counters


@pytest.mark.parametrize(
    "body",
    [
        "out[i] = simd_broadcast_first(a[i]) + simd_prefix_inclusive_sum(a[i]) + quad_sum(a[i]);",
        "out[i] = simd_any(a[i] > 0) + simd_is_first() + quad_shuffle(a[i], 1) + simd_shuffle_up(a[i], 1);",
        "simdgroup_float8x8 x, y(2); simdgroup_load(x, a); simdgroup_multiply(x, x, y); simdgroup_store(x, out);",
    ],
)
def test_code_with_simdgroup_functions_of_every_kind_has_a_size(body):
    assert 10 < size(body) < 100


def test_code_that_is_called_counts_and_a_kernel_that_is_not_asked_for_does_not():
    function = "__attribute__((noinline)) float f(float v) {{ {} return v; }}"
    short, long = (size("out[i] = f(a[i]);", function.format("v = exp(v) * v; " * n)) for n in (2, 12))
    assert long - short == 20
    other = "[[kernel]] void other(device float *p [[buffer(0)]]) { p[0] = exp(p[1]); }\n"
    assert size("out[i] = 0;", other) == size("out[i] = 0;")


def test_a_size_is_kept_and_no_compiler_runs_for_it_again(monkeypatch):
    text = "[[kernel]] void k(device float *p [[buffer(0)]]) { p[0] = 17; }"
    first = metalsim.code_size(text, "k")
    assert first.instructions > 2 and first.seconds > 0
    monkeypatch.setattr(metalsim.compile, "_run", None)
    assert metalsim.code_size(text, "k") == first
    with pytest.raises(TypeError):
        metalsim.code_size(text + " ", "k")


def test_a_program_that_does_not_compile_has_no_size():
    with pytest.raises(metalsim.MSLError, match="undeclared"):
        size("out[i] = y;")
