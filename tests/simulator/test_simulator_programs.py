"""The Metal simulator refuses or reports wrong programs, and accepts right ones in every thread order."""

import sys

import metalsim
import mlx.core as mx
import numpy as np
import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="metalsim runs on Linux")

# Every body begins with these two: i counts threads of the grid, l threads of the threadgroup.
INDICES = "uint i = thread_position_in_grid.x; uint l = thread_position_in_threadgroup.x;\n"
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
ONE_SIMDGROUP = {"n": 32, "group": 32, "n_out": 32}


def run(body, header="", n=64, group=64, n_out=64, inputs=None, template=None, init_value=None, **options):
    """Run `body` over `n` threads with x = [0, 1, ..., 63] float32 and return out: [n_out] float32."""
    x = mx.arange(64, dtype=mx.float32) if inputs is None else inputs
    kernel = metalsim.metal_kernel("program", ["x"], ["out"], INDICES + body, header, **options)
    grid = n if isinstance(n, tuple) else (n, 1, 1)
    threadgroup = group if isinstance(group, tuple) else (group, 1, 1)
    (out,) = kernel(
        inputs=[x],
        output_shapes=[(n_out,)],
        output_dtypes=[mx.float32],
        grid=grid,
        threadgroup=threadgroup,
        template=template,
        init_value=init_value,
    )
    return np.array(out)


# name: (text the error must contain, body, header, options)
BAD_PROGRAMS = {
    # address spaces and other rules of the language
    "missing address space on a parameter": (
        "explicit address space",
        "out[i] = f(&x[i]);",
        "float f(const float* p) { return *p; }",
        {},
    ),
    "missing address space on a local pointer": (
        "explicit address space",
        "float a[2] = {1, 2}; float* p = a; out[i] = p[0];",
        "",
        {},
    ),
    "missing address space, template parameter": (
        "explicit address space",
        "out[i] = f(x);",
        "template <typename T> T f(const T* p) { return *p; }",
        {},
    ),
    "device pointer passed as thread pointer": (
        "no matching function",
        "out[i] = f(&x[i]);",
        "float f(const thread float* p) { return *p; }",
        {},
    ),
    "threadgroup pointer passed as device pointer": (
        "no matching function",
        "threadgroup float s[4]; out[i] = f(s);",
        "float f(const device float* p) { return *p; }",
        {},
    ),
    "write through const device": ("read-only", "x[i] = 1;", "", {}),
    "write to constant": ("const", "c[0] = 1;", "constant float c[2] = {1, 2};", {}),
    "include of a file": ("only <metal_*>", "out[i] = 0;", '#include "utils.h"\n', {}),
    "include of a C++ header": ("only <metal_*>", "out[i] = 0;", "#include <vector>\n", {}),
    "double": ("no double", "double d = x[i]; out[i] = d;", "", {}),
    "std namespace": ("std::", "out[i] = std::max(x[i], 0.0f);", "", {}),
    "recursion": ("recursive", "out[i] = f(3);", "float f(int n) { return n ? f(n - 1) : 1.0f; }", {}),
    "virtual function": ("virtual", "out[i] = 0;", "struct S { virtual void f() {} };", {}),
    "ambiguous max of float and int": ("no matching function", "out[i] = max(x[i], 0);", "", {}),
    "C++20 feature": ("error", "out[i] = 0;", "template <auto N> struct S {};", {}),
    "undeclared identifier": ("undeclared", "out[i] = y;", "", {}),
    "as_type between sizes": ("sizes differ", "out[i] = as_type<half>(x[i]);", "", {}),
    "uninitialised local": ("uninitialized", "float a; out[i] = a;", "", {}),
    # what Apple's front end refuses and a C++ compiler does not
    "static variable in a kernel": ("line 7: 'static'", "static float a[2] = {1, 2}; out[i] = a[l & 1];", "", {}),
    "static constant in a function": (
        "line 1: 'static'",
        "out[i] = f();",
        "float f() { for (;;) { static constexpr float a = 1; return a; } }",
        {},
    ),
    "lambda expression": ("line 7: MSL has no lambda", "auto f = [](float v) { return v; }; out[i] = f(x[i]);", "", {}),
    "lambda expression as an argument": (
        "line 7: MSL has no lambda",
        "out[i] = f([&] { return x[i]; });",
        "template <class F> float f(F g) { return g(); }",
        {},
    ),
    "threadgroup variable in a function that is no kernel": (
        "line 1: only a kernel function has threadgroup variables",
        "out[i] = f(l);",
        "float f(uint l) { threadgroup float s[64]; s[l] = l; return s[l]; }",
        {},
    ),
    "threadgroup variable at program scope": (
        "line 1: only a kernel function has threadgroup variables",
        "s[l] = l; out[i] = s[l];",
        "threadgroup float s[64];",
        {},
    ),
    **{
        f"no constant address space: {declaration}": (
            f"line 2: '{name}', {where}, must be in the constant address space",
            "out[i] = 0;",
            "\n" + declaration,
            {},
        )
        for name, where, declaration in [
            ("N", "at program scope", "constexpr int N = 3;"),
            ("a", "at program scope", "const float a[2] = {1, 2};"),
            ("b", "at program scope", "static const float2 b = float2(1, 2), c = float2(3);"),
            ("v", "at program scope", "template <typename T> constexpr bool v = sizeof(T) == 4;"),
            ("n", "at program scope", "namespace mine { constexpr uint n = 1; }"),
            ("x", "at program scope", "struct P { int k; }; device float *x;"),
            ("K", "a static member", "template <int N> struct S { int k; static constexpr int K = N; };"),
            ("M", "a static member", "struct S { void f() {} static const int M; };"),
        ]
    },
    "simd_sum of ulong": (
        "kernel:7:23: error: static assertion failed due to requirement 'sizeof(unsigned long) < 8': "
        "simdgroup functions take no types of 64 bits",
        "ulong v = l; out[i] = simd_sum(v);",
        "",
        {},
    ),
    **{
        f"{call}: 64 bits": ("simdgroup functions take no types of 64 bits", f"out[i] = {call}.x;", "", {})
        for call in (
            "simd_shuffle(long2(l), 1)",
            "simd_shuffle_xor(long2(l), 1)",
            "quad_max(long2(l))",
            "simd_broadcast_first(ulong3(l))",
            "simd_prefix_inclusive_sum(long4(l))",
        )
    },
    **{
        f"function named like one of the library: {declaration}": (
            f"line 2: '{name}': the Metal standard library has a function of this name",
            "out[i] = 0;",
            f"\n{declaration} {{ return a; }}",
            {},
        )
        for name, declaration in [
            ("min", "float min(float a, float b)"),
            ("clamp", "METAL_FUNC half4 clamp(half4 a, half4 b, half4 c)"),
            ("select", "template <typename T> static T select(T a, T b, bool c)"),
            ("fma", "inline bfloat fma(const bfloat a, bfloat b, bfloat c)"),
            ("dot", "template <typename T, int N> vec<T, N> dot(vec<T, N> a, vec<T, N> b)"),
            ("abs", "constexpr long abs(long a)"),
            ("simd_shuffle_xor", "uint2 simd_shuffle_xor(uint2 a, ushort n)"),
        ]
    },
    **{
        f"{declaration} without an address space": (
            "needs an explicit address space",
            declaration + " out[i] = 0;",
            "",
            {},
        )
        for declaration in (
            "auto *p = out;",
            "auto &p = out[i];",
            "const auto &p = x[i];",
            "auto const *p = x;",
            "auto &&p = out[i];",
            "for (auto *p = x; p != x; p++) {}",
        )
    },
    # limits
    "threadgroup memory over 32 KB": (
        "limit is 32768",
        f"threadgroup float s[8193]; s[l] = 1; {BARRIER} out[i] = s[l];",
        "",
        {},
    ),
    "more than 1024 threads per threadgroup": ("1024", "out[i] = 0;", "", {"n": 2048, "group": 2048, "n_out": 2048}),
    # bounds and alignment
    "write out of bounds": ("out-of-bounds write", "out[i + 1] = 0;", "", {}),
    "read out of bounds": ("out-of-bounds read", "out[i] = x[i + 1];", "", {}),
    "read out of bounds through uint underflow": ("device read", "out[i] = x[i - 1];", "", {}),
    "threadgroup array overrun, static index": (
        "out of bounds",
        "threadgroup float s[64]; s[l + 1] = 1; out[i] = 0;",
        "",
        {},
    ),
    "threadgroup array overrun through a pointer": (
        "out-of-bounds threadgroup write of 4 bytes at byte 256 of 's' (256 bytes)",
        "threadgroup float s[64]; threadgroup float t[64]; threadgroup float* p = s; p[l + 1] = 1; t[l] = 1; "
        f"{BARRIER} out[i] = s[63 - l] + t[63 - l];",
        "",
        {},
    ),
    **{
        f"{name} threadgroup array read before its beginning": (
            f"out-of-bounds threadgroup read of 4 bytes at byte -4 of '{array}' (256 bytes)",
            f"threadgroup float s[64], t[64]; s[l] = t[l] = 1; {BARRIER} threadgroup float* p = {array}; "
            "out[i] = p[(int)l - 1];",
            "",
            {},
        )
        for name, array in (("first", "s"), ("second", "t"))
    },
    "threadgroup array overrun far into the next one": (
        "out-of-bounds threadgroup read of 4 bytes at byte 384 of 's' (256 bytes)",
        "threadgroup float s[64]; threadgroup float t[256]; threadgroup float* p = s; p[l] = 1; "
        f"for (int k = 0; k < 4; k++) t[l * 4 + k] = 1; {BARRIER} out[i] = p[l ? l : 96] + t[l];",
        "",
        {},
    ),
    "thread array overrun through a pointer parameter": (
        "out of bounds",
        "float a[4] = {}; f(a, l / 8); out[i] = a[0];",
        "void f(thread float* p, uint k) { p[k] = 1; }",
        {},
    ),
    "overrun of an array that ends a struct": (
        "out of bounds",
        "S s = {}; for (int k = 0; k <= 4; k++) s.a[k] = x[i]; out[i] = s.a[0];",
        "struct S { float first; float a[4]; };",
        {},
    ),
    "thread array overrun": ("out of bounds", "float a[4] = {}; a[l / 8] = 1; out[i] = a[0];", "", {}),
    "misaligned vector load": ("misaligned", "out[i] = (*(const device float4*)(x + (i & 31) + 1)).x;", "", {}),
    "shift by 32": ("shift by 32", "out[i] = (1u << (l + 1)) >> 1;", "", {"n": 32, "group": 32}),
    # barriers and simdgroup functions
    "barrier inside a divergent if": ("not reached by all", f"if (l < 32) {BARRIER} out[i] = 0;", "", {}),
    "barrier inside an if that splits a simdgroup": ("not reached by all", f"if (l < 7) {BARRIER} out[i] = 0;", "", {}),
    "different barriers on two branches": (
        "divergent",
        f"if (l < 32) {{\n {BARRIER} }} else {{\n {BARRIER} }}\n out[i] = 0;",
        "",
        {},
    ),
    "barrier after an early return": ("not reached by all", f"if (i > 40) return; {BARRIER} out[i] = 0;", "", {}),
    "simd_sum inside a divergent if": (
        "divergent",
        "float v = 0; if (l % 2) v = simd_sum(x[i]);\n v += simd_sum(1.0f); out[i] = v;",
        "",
        {},
    ),
    "shuffle from an inactive lane": (
        "inactive lane",
        "if (l < 16) return; out[i] = simd_shuffle(x[i], 3);",
        "",
        {"n": 32, "group": 32},
    ),
    "shuffle from a lane on the other branch": (
        "inactive lane",
        "float v = 0; if (l & 2) v = simd_shuffle_xor(x[i], 2);\n out[i] = v;",
        "",
        {"n": 32, "group": 32},
    ),
    "shuffle from a lane in another call of the function": (
        "inactive lane",
        "float v = l & 1 ? other<1>(x[i]) : other<2>(x[i]); out[i] = v;",
        "template <int K> METAL_FUNC float other(float v) { return simd_shuffle_xor(v * K, 1); }",
        {"n": 32, "group": 32},
    ),
    # races
    "missing barrier before a read": ("data race", "threadgroup float s[64]; s[l] = x[i]; out[i] = s[63 - l];", "", {}),
    "missing barrier before a write": (
        "data race",
        f"threadgroup float s[64]; s[l] = x[i]; {BARRIER} float v = s[63 - l]; s[l] = v; out[i] = v;",
        "",
        {},
    ),
    "barrier with the wrong flags": (
        "data race",
        "threadgroup float s[64]; s[l] = x[i]; threadgroup_barrier(mem_flags::mem_device); out[i] = s[63 - l];",
        "",
        {},
    ),
    "simdgroup_barrier where a threadgroup one is needed": (
        "data race",
        "threadgroup float s[64]; s[l] = x[i]; simdgroup_barrier(mem_flags::mem_threadgroup); out[i] = s[63 - l];",
        "",
        {},
    ),
    "the last of several readers writes": (
        "write after read",
        f"threadgroup float s[2]; if (l == 0) s[0] = 1; {BARRIER} "
        "if (l == 0 || l == 63) out[i] = s[l >> 6]; if (l == 63) s[0] = 2;",
        "",
        {},
    ),
    "the last of several readers in a simdgroup writes": (
        "write after read",
        f"threadgroup float s[1]; if (l == 0) s[0] = 1; {BARRIER} out[i] = s[0]; if (l == 31) s[0] = 2;",
        "",
        {"n": 32, "group": 32},
    ),
    "two threads write one output": ("write after write", "out[i / 2] = x[i];", "", {}),
    "two threadgroups write one output": ("write after write", "out[l] = x[l];", "", {"n": 128, "group": 64}),
    "accumulation across threadgroups without atomics": (
        "data race",
        "out[0] += x[i];",
        "",
        {"n": 64, "group": 32, "init_value": 0},
    ),
    # initialisation
    "threadgroup memory used before it is written": (
        "uninitialised threadgroup",
        f"threadgroup float s[64]; if (l < 32) s[l] = 1; {BARRIER} out[i] = s[l];",
        "",
        {},
    ),
    "threadgroup flag that is only ever 0 used before it is written": (
        "uninitialised threadgroup",
        "threadgroup int s; if (l == 63) s = 0; out[i] = s;",
        "",
        {},
    ),
    "output read before it is written": ("uninitialised output", "out[i] += x[i];", "", {}),
    "atomics on outputs without init_value": (
        "uninitialised output",
        "atomic_fetch_add_explicit(&out[0], x[i], memory_order_relaxed);",
        "",
        {"atomic_outputs": True},
    ),
    # what would hang or crash the process
    "endless loop without memory accesses": (
        "did not end within 1 seconds",
        "uint k = 0; while (k != 1) k = (k + 2) & ~1u; out[i] = 0;",
        "",
        {},
    ),
    "endless loop over barriers": ("did not end within 1 seconds", f"for (;;) {{ {BARRIER} }}", "", {}),
    "stack overflow": (
        "stack overflow",
        "out[i] = f(x + i, l);",
        "float f(const device float* x, uint k) { volatile float a[200000]; a[k] = x[0]; return a[k]; }",
        {},
    ),
    "crash": ("crashed, after this line, with signal", "out[i] = 0; if (l == 5) __builtin_trap();", "", {}),
    "wild thread pointer": (
        "wild pointer",
        "thread float* p = (thread float*)(size_t)(64 + i * 8); out[i] = *p;",
        "",
        {},
    ),
}

LANES = np.arange(32)
THREADS = np.arange(64)
# name: (body, header, options, expected out)
GOOD_PROGRAMS = {
    "exchange through threadgroup memory": (
        f"threadgroup float s[64]; s[l] = x[i]; {BARRIER} out[i] = s[63 - l];",
        "",
        {},
        THREADS[::-1],
    ),
    "exchange inside a simdgroup with simdgroup_barrier": (
        "threadgroup float s[64]; s[l] = x[i]; simdgroup_barrier(mem_flags::mem_threadgroup); out[i] = s[l ^ 1];",
        "",
        {},
        THREADS ^ 1,
    ),
    "threadgroup variables that only ever hold constants": (
        f"threadgroup int s; threadgroup float t[1]; if (l == 0) {{ s = 0; t[0] = 1; }} {BARRIER} "
        f"int before = s; {BARRIER} if (l == 63) s = 2; {BARRIER} out[i] = 10 * before + s + t[0];",
        "",
        {},
        np.full(64, 3),
    ),
    "scalar threadgroup variables of every kind": (
        "threadgroup float a; threadgroup half b; threadgroup bool c; threadgroup ulong d; "
        "threadgroup uchar e; threadgroup float4 f; threadgroup bfloat g; threadgroup int2 h[1]; "
        "if (l == 5) { a = 1; b = 2; c = true; d = 3; e = 4; f = float4(5); g = bfloat(6); h[0] = int2(7); } "
        f"{BARRIER} out[i] = a + float(b) + c + d + e + f.w + float(g) + h[0].y;",
        "",
        {},
        np.full(64, 29),
    ),
    "lanes leave a loop of simd_sum one by one": (
        "float v = 0; for (uint k = 0; k <= l % 4; k++) v += simd_sum(1.0f); out[i] = v;",
        "",
        ONE_SIMDGROUP,
        np.tile([32, 56, 72, 80], 8),
    ),
    "simd_sum in a branch uniform per simdgroup": (
        "float v = 1; if (simdgroup_index_in_threadgroup == 1) v = simd_sum(x[i]); out[i] = v;",
        "",
        {},
        np.r_[np.ones(32), np.full(32, np.arange(32, 64).sum())],
    ),
    "partial simdgroup and partial threadgroup": (
        "out[i] = simd_sum(1.0f) + 100 * threads_per_threadgroup.x;",
        "",
        {"n": 50, "group": 40, "n_out": 50},
        np.r_[np.full(32, 4032), np.full(8, 4008), np.full(10, 1010)],
    ),
    "float literal is single": ("out[i] = 0.1 * x[i] == 0.1f * x[i];", "", {}, np.ones(64)),
    "shuffle xor, down and broadcast": (
        "out[i] = simd_shuffle_xor(x[i], 5) * 1000 + simd_shuffle_down(x[i], 1) + simd_broadcast(x[i], 3) * 0.5f;",
        "",
        ONE_SIMDGROUP,
        (LANES ^ 5) * 1000 + np.minimum(LANES + 1, 31) + 1.5,
    ),
    "shuffle up and prefix sum": (
        "out[i] = simd_shuffle_up(x[i], 2) + 1000 * simd_prefix_exclusive_sum(1.0f);",
        "",
        ONE_SIMDGROUP,
        np.where(LANES < 2, LANES, LANES - 2) + 1000 * LANES,
    ),
    "rotations, quad shuffles and inclusive product": (
        "out[i] = simd_shuffle_rotate_down(x[i], 3) + 100 * simd_shuffle_rotate_up(x[i], 3) "
        "+ 10000 * quad_shuffle_xor(x[i], 2) + simd_prefix_inclusive_product(1.0f);",
        "",
        ONE_SIMDGROUP,
        (LANES + 3) % 32 + 100 * ((LANES - 3) % 32) + 10000 * (LANES ^ 2) + 1,
    ),
    "shuffle of vectors": (
        "float4 v = float4(x[i], 1, 2, 3); half2 h = half2(x[i], 7); "
        "out[i] = simd_shuffle_xor(v, 1).x + simd_shuffle(h, 4).x;",
        "",
        ONE_SIMDGROUP,
        (LANES ^ 1) + 4,
    ),
    "ballot": ("out[i] = (uint64_t)simd_ballot(l % 3 == 0) == 0x49249249;", "", ONE_SIMDGROUP, np.ones(32)),
    "quad_sum": ("out[i] = quad_sum(x[i]);", "", ONE_SIMDGROUP, np.repeat(LANES.reshape(8, 4).sum(1), 4)),
    "vectors, swizzles, constructors and casts": (
        "float4 a = float4(1, float2(2, 3), 4); half4 h = half4(a.wzyx); int4 n = int4(h); "
        "uchar4 c = as_type<uchar4>(0x04030201u); float4 z = (float4)n; z.xy += float2(c.zw); "
        "out[i] = dot(z, float4(1, 10, 100, 1000)) + static_cast<float>(max(a, z.yyyy).x);",
        "",
        {},
        np.full(64, 4 + 3 + 10 * 7 + 200 + 1000 + 7),
    ),
    "vector load and store": (
        "((device float4*)out)[i] = ((const device float4*)x)[i] * 2;",
        "",
        {"n": 16, "group": 16},
        THREADS * 2,
    ),
    "packed codes read as uint4 and taken apart": (
        "uint4 w = ((const device uint4*)x)[i]; uint word = w[1]; uint4 s = uint4(0, 8, 16, 24); "
        "uint4 bytes = (word >> s) & 255; out[i] = bytes.x + bytes.y + bytes.z + bytes.w;",
        "",
        {"inputs": mx.arange(64, dtype=mx.uint32) * 0x01010101, "n": 16, "group": 16, "n_out": 16},
        4 * (4 * np.arange(16) + 1),
    ),
    "vec<T, N> and aliases in templates": (
        "using T4 = vec<T, 4>; T4 v = T4(1, 2, 3, x[i]); out[i] = vec<float, 4>(v).w;",
        "",
        {"template": [("T", mx.float16)]},
        THREADS,
    ),
    "half rounds after every operation": (
        "half a = 2048.0h; half b = 1.0h; out[i] = float(a + b + b);",
        "",
        {},
        np.full(64, 2048),
    ),
    "bfloat arithmetic": (
        "bfloat a = bfloat(x[i]); out[i] = float(a + bfloat(256.0f));",
        "",
        {"n": 4, "group": 4, "n_out": 4},
        np.array([256, 256, 258, 260]),
    ),
    "threadgroup atomics": (
        "threadgroup atomic_uint c[2]; if (l < 2) atomic_store_explicit(&c[l], 0, memory_order_relaxed); "
        f"{BARRIER} atomic_fetch_add_explicit(&c[l & 1], l, memory_order_relaxed); {BARRIER} "
        "out[i] = atomic_load_explicit(&c[l & 1], memory_order_relaxed);",
        "",
        {},
        np.tile([992, 1024], 32),
    ),
    "threadgroup structs, several declarators": (
        "threadgroup P s[64]; threadgroup float a[64], b[2]; s[l].v = x[i]; a[l] = 1; if (l < 2) b[l] = l; "
        f"{BARRIER} out[i] = s[63 - l].v + a[63 - l] + b[l & 1];",
        "struct P { float v; int n; };",
        {},
        64 - THREADS + THREADS % 2,
    ),
    "struct array in device memory, by member": (
        "const device P* p = (const device P*)x; out[i] = p[i].b + p[i].a;",
        "struct P { float a, b; };",
        ONE_SIMDGROUP,
        LANES * 4 + 1,
    ),
    "struct with methods, operator() and static constexpr": (
        "Op<3> op; out[i] = op(x[i]);",
        "template <int K> struct Op { static constexpr constant int k = K; "
        "float operator()(float v) const { return v * k; } };",
        {},
        THREADS * 3,
    ),
    "program-scope constant table and pointers to it": (
        "constant float* p = tab; out[i] = p[l & 3] + tab[0];",
        "constant float tab[4] = {1, 2, 3, 4};",
        {},
        np.tile([2, 3, 4, 5], 16),
    ),
    "threadgroup pointer parameter": (
        f"threadgroup float s[64]; s[l] = x[i]; {BARRIER} out[i] = total(s, 64);",
        "float total(threadgroup const float* p, int n) "
        "{ float t = 0; for (int i = 0; i < n; i++) t += p[i]; return t; }",
        {},
        np.full(64, 2016),
    ),
    "thread pointer and reference parameters": (
        "float a[2] = {x[i], 1}; swap(a, a[1]); out[i] = a[1];",
        "void swap(thread float* p, thread float& r) { float t = p[0]; p[0] = r; r = t; }",
        {},
        THREADS,
    ),
    "simdgroup matrices": (
        "threadgroup float s[64]; simdgroup_float8x8 a, b, c = simdgroup_float8x8(2.0f); "
        "simdgroup_load(a, x, 8); simdgroup_load(b, x, 8, ulong2(0), true); "
        f"simdgroup_multiply_accumulate(c, a, b, c); simdgroup_store(c, s, 8); {BARRIER} "
        "out[l] = s[l]; out[l + 32] = s[l + 32];",
        "",
        {"n": 32, "group": 32},
        (THREADS.reshape(8, 8) @ THREADS.reshape(8, 8).T + 2 * np.eye(8)).ravel(),
    ),
    "three-dimensional grid": (
        "uint3 g = thread_position_in_grid; uint3 n = threads_per_grid; out[(g.z * n.y + g.y) * n.x + g.x] = "
        "thread_index_in_threadgroup + 100 * simdgroup_index_in_threadgroup;",
        "",
        {"n": (4, 4, 4), "group": (4, 4, 4)},
        THREADS + 100 * (THREADS // 32),
    ),
    # what looks like something that is refused
    "constants in the constant address space": (
        "int n[] = {N, M[1], S<4>::K, mine::n, COUNT, TWO, three, v<int>}; out[i] = n[l % 8] + S<1>::f();",
        "constant constexpr const int N = 1; constant int M[2] = {3, 2}, L = 5;\n"
        "#define CONSTANT static constant \\\n  constexpr const\nCONSTANT int COUNT = 5;\n"
        "namespace mine { constant uint n = 4; float f(float a = 0) { return a; } }\n"
        "template <int N> struct S { int k; static constant constexpr const int K = N - 1; "
        "static METAL_FUNC int f() { return 0; } static constexpr int g() { return 1; } };\n"
        "enum { ONE, TWO = 6, }; constexpr int seven() { return 7; } "
        "static constexpr constant int three = seven();\n"
        "template <typename T> constant constexpr int v = sizeof(T) + 4; struct P; typedef int Int;\n"
        "using I = int; static inline float g(float a) { return a; } "
        'static_assert(int{3} == N + 2, ""); float h(float a, float b);',
        {},
        1 + THREADS % 8,
    ),
    "a threadgroup variable in a block of a kernel": (
        f"float v = 0; if (threads_per_grid.x == 64) {{ threadgroup float s[64]; s[l] = x[i]; {BARRIER} "
        "v = s[63 - l]; } out[i] = v;",
        "",
        {},
        THREADS[::-1],
    ),
    "functions named like some of the library that take other types, or elsewhere": (
        "P p = {x[i], 2}; ulong w = (ulong)l << 40; "
        "out[i] = min(p, p).a + mine::clamp(1) + p.max(2) + float(simd_shuffle_xor(w, 1) >> 40) "
        "+ float(simd_shuffle_down((long)l << 40, 1) >> 40);",
        "struct P { float a, b; float max(float c) const { return c; } }; P min(P a, P b) { return a; } "
        "namespace mine { float clamp(float a) { return a; } } ulong simd_shuffle_xor(ulong v, ushort n) "
        "{ return as_type<ulong>(metal::simd_shuffle_xor(as_type<uint2>(v), n)); }",
        ONE_SIMDGROUP,
        LANES + 3 + (LANES ^ 1) + np.minimum(LANES + 1, 31),
    ),
    "auto by value, and pointers and references to it with an address space": (
        "auto v = x[i]; device auto *p = out; thread auto &q = v; const device auto &r = x[i]; q += r; "
        "p[i] = v + (true && v > 0) + (p == out);",
        "",
        {},
        2 * THREADS + (THREADS > 0) + 1,
    ),
    "brackets that begin no lambda expression": (
        "int n[3] = {1, 2, 3}; float2 f[2] = {}; int at[] = {0}; "
        "out[i] = (n)[at[0]] + n[1] + float2(1, 2)[1] + sizeof(int[2]) + f[0][1] + last(n)[n[0]];",
        "thread int *last(thread int *n) { return n + 1; }",
        {},
        np.full(64, 1 + 2 + 2 + 8 + 3),
    ),
    "small inputs are constant": (
        "constant float* p = x; out[i] = p[l];",
        "",
        {"inputs": mx.arange(4, dtype=mx.float32), "n": 4, "group": 4, "n_out": 4},
        np.arange(4),
    ),
    "0-d input": ("out[i] = x + 1;", "", {"inputs": mx.array(2.0), "n": 4, "group": 4, "n_out": 4}, np.full(4, 3)),
}


@pytest.mark.parametrize("name", BAD_PROGRAMS)
def test_a_bad_program_is_refused_or_reported(name):
    expected, body, header, options = BAD_PROGRAMS[name]
    timeout = 1 if "endless" in name else 120
    with metalsim.configured(timeout=timeout), pytest.raises((metalsim.MSLError, ValueError)) as error:
        run(body, header, **options)
    assert expected in str(error.value)


@pytest.mark.parametrize("order", ["natural", "reversed", "random"])
@pytest.mark.parametrize("name", GOOD_PROGRAMS)
def test_a_good_program_is_clean_in_every_thread_order(name, order):
    body, header, options, expected = GOOD_PROGRAMS[name]
    with metalsim.configured(order=order):
        np.testing.assert_array_equal(run(body, header, **options), np.asarray(expected, np.float32))
    assert metalsim.last().reports == []


def test_after_a_refused_program_the_next_one_runs():
    for name in ("write out of bounds", "stack overflow", "endless loop over barriers"):
        _, body, header, options = BAD_PROGRAMS[name]
        with metalsim.configured(timeout=1), pytest.raises(metalsim.MSLError):
            run(body, header, **options)
        np.testing.assert_array_equal(run("out[i] = x[i];"), THREADS)


def test_the_orders_differ_and_a_seed_repeats_its_order():
    def arrivals(**configuration):
        body = (
            "threadgroup atomic_uint c; if (simdgroup_index_in_threadgroup == 0) "
            f"atomic_store_explicit(&c, 0, memory_order_relaxed); {BARRIER} "
            "out[i] = atomic_fetch_add_explicit(&c, 1, memory_order_relaxed);"
        )
        with metalsim.configured(**configuration):
            return run(body).astype(int).tolist()

    assert arrivals(order="natural") == list(range(64))
    assert arrivals(order="reversed") == list(range(63, -1, -1))
    shuffled = arrivals(order="random", seed=1)
    assert sorted(shuffled) == list(range(64)) and shuffled != list(range(64))
    assert arrivals(order="random", seed=1) == shuffled != arrivals(order="random", seed=2)


def test_ignored_divergence_follows_the_active_lanes():
    body = "float v = 0; if (l % 2) {\n v = simd_sum(1.0f); }\n v += simd_sum(x[i]); out[i] = v;"
    with metalsim.configured(order="random", ignore=("divergent",)):
        np.testing.assert_array_equal(run(body, **ONE_SIMDGROUP), 496 + 16 * (LANES % 2))
    assert any("divergent" in report for report in metalsim.last().reports)


def test_lanes_on_the_same_branch_may_shuffle():
    body = "float v = 0; if (l & 2) v = simd_shuffle_xor(x[i], 1);\n v += simd_sum(1.0f); out[i] = v;"
    for order in ("natural", "reversed", "random"):
        with metalsim.configured(order=order):
            np.testing.assert_array_equal(run(body, **ONE_SIMDGROUP), 32 + np.where(LANES & 2, LANES ^ 1, 0))


def test_a_report_names_the_line_the_buffer_and_the_thread():
    with pytest.raises(metalsim.MSLError) as error:
        run("\n\nout[i + 1] = 0;")
    text = str(error.value)
    # the signature takes 5 lines, so the body's first line is the 6th of the text
    assert "line 9: out-of-bounds write of 4 bytes at byte 256 of 'out' (256 bytes)" in text
    assert "[thread 63,0,0 of group 0,0,0]" in text


def add_all(n_inputs):
    """The sum of n_inputs arrays, in a kernel that has two more buffers: a shape and the output."""
    names = [f"x{k}" for k in range(n_inputs)]
    terms = " + ".join(f"{name}[0]" for name in names)
    kernel = metalsim.metal_kernel("buffers", names, ["out"], f"out[0] = x0_shape[0] * ({terms});")
    inputs = [mx.full((8,), float(k)) for k in range(n_inputs)]
    return kernel(
        inputs=inputs, output_shapes=[(1,)], output_dtypes=[mx.float32], grid=(1, 1, 1), threadgroup=(1, 1, 1)
    )[0].item()


def test_a_kernel_has_31_buffers_like_in_metal_and_no_more():
    assert add_all(29) == 8 * sum(range(29))
    with pytest.raises(metalsim.MSLError, match=r"line 33: buffer\(31\): Metal has the buffers 0 to 30"):
        add_all(30)


@pytest.mark.parametrize("n", [31, 32])
def test_buffers_without_an_index_and_of_kernels_that_are_not_run_count_too(n):
    parameters = ", ".join(f"device float *p{k}" for k in range(n))
    header = f"[[kernel]] void other(uint i [[thread_position_in_grid]], {parameters}) {{}}\n"
    if n == 31:
        np.testing.assert_array_equal(run("out[i] = x[i];", header), THREADS)
    else:
        with pytest.raises(metalsim.MSLError, match="line 1: a kernel has at most 31 buffers"):
            run("out[i] = x[i];", header)


def test_configured_restores_what_it_changed_also_after_an_error():
    before = vars(metalsim.config).copy()
    with pytest.raises(ZeroDivisionError), metalsim.configured(order="random", seed=7, races=False):
        assert metalsim.config.order == "random" and metalsim.config.seed == 7
        1 / 0
    assert vars(metalsim.config) == before
    with pytest.raises(TypeError, match="config has no 'oder'"), metalsim.configured(oder="random"):
        pass
