"""The Metal simulator reports pointers that leave their array, which on a GPU wrap around, and no others."""

import sys

import metalsim
import mlx.core as mx
import numpy as np
import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="metalsim runs on Linux")

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
HEADER = """constant float table[4] = {1, 2, 3, 4}, next[4] = {5, 6, 7, 8};
struct P { float a; float b[3]; };
threadgroup float* before(threadgroup float* p, int n) { return p - n; }
const threadgroup float* same(const threadgroup float* p) { return p; }
"""
# In front of every body: i counts the 64 threads; threadgroup arrays s = [0, 1, ..., 63] and t = [1, ..., 1].
BODY = f"""uint i = thread_position_in_grid.x;
threadgroup float s[64], t[8]; s[i] = i; if (i < 8) t[i] = 1; {BARRIER}
"""
LINE = "line 12"  # of the body in the generated text


def run(body, view=lambda x: x):
    """Run `body` over 64 threads with x = view([0, 1, ..., 63]), c = [0, 1, 2]; returns out: [64] float32."""
    kernel = metalsim.metal_kernel("pointers", ["x", "c"], ["out"], BODY + body, HEADER, ensure_row_contiguous=False)
    (out,) = kernel(
        inputs=[view(mx.arange(64, dtype=mx.float32)), mx.arange(3, dtype=mx.float32)],
        output_shapes=[(64,)],
        output_dtypes=[mx.float32],
        grid=(64, 1, 1),
        threadgroup=(64, 1, 1),
    )
    return np.array(out)


# What is only beyond the end is in PAST_END.
BEFORE = {
    "a threadgroup array": (
        "'s': 256 bytes before its beginning",
        "threadgroup float* p = s + i; p -= 64 + i; out[i] = p[64 + i];",
    ),
    "the second threadgroup array": (
        "'t': 4 bytes before its beginning",
        "threadgroup float* p = t; p--; out[i] = p[1];",
    ),
    "a threadgroup array, at the end of a loop": (
        "'s': 4 bytes before its beginning",
        "float sum = 0; for (threadgroup float* p = s + i; p >= s; p--) sum += *p; out[i] = sum;",
    ),
    "a threadgroup array, in a function": (
        "'s': 12 bytes before its beginning",
        "out[i] = before(s + i, 3 + i)[3 + i];",
    ),
    "an array in a threadgroup struct": (
        "'q': 4 bytes before its beginning",
        f"threadgroup P q; if (i == 0) q.b[0] = 7; {BARRIER} threadgroup float* p = q.b; p -= i / 32 * 2; "
        "out[i] = p[i / 32 * 2];",
    ),
    "an input": ("'x': 8 bytes before its beginning", "const device float* p = x + i; p -= i + 2; out[i] = p[i + 2];"),
    "an output": ("'out': 4 bytes before its beginning", "device float* p = out - 1; p[i + 1] = x[i];"),
    "an input, through an unsigned index": (
        "'x': 4 bytes before its beginning",
        "const device float* p = x + (long)(int)(0u - 1u); out[i] = p[i + 1];",
    ),
    "a small input": (
        "'c': 4 bytes before its beginning",
        "constant float* p = c; for (int k = 0; k < 4; k++) { p += k == 2 ? -1 : 0; p -= k == 3; } out[i] = p[2];",
    ),
    "a program-scope constant": (
        "'table': 4 bytes before its beginning",
        "constant float* p = table + i % 4; p -= i % 4 + 1; out[i] = p[1];",
    ),
    "a program-scope constant beyond its end": (
        "'table': 4 bytes beyond its end",
        "constant float* p = table + i % 4; p += 2; out[i] = p[-2];",
    ),
}
WITHIN = {
    "to one past the end and back": (
        "float sum = 0; threadgroup float* p = s + 64; while (p != s) sum += *--p; out[i] = sum;",
        np.full(64, 2016),
    ),
    "to the end of a constant that another one follows, and back, and in it from its beginning": (
        "constant float* p = table + i % 4; p += 4 - i % 4; p -= 2; "
        "constant float* q = next + i % 4; q += 4 - i % 4; q -= 2; "
        "constant float* r = table + i % 4; r -= i % 4; r++; "
        "constant float* u = next + i % 4; u -= i % 4; u++; "
        "out[i] = *p + 10 * *q + 100 * *r + 1000 * *u;",
        np.full(64, 3 + 70 + 200 + 6000),
    ),
    "a negative index into the middle": (
        "threadgroup float* p = s + 32; const device float* q = x + 63; out[i] = p[int(i) - 32] + q[-int(i)];",
        np.full(64, 63),
    ),
    "a comparison after the last step of a loop": (
        "float sum = 0; for (const threadgroup float* p = s + i % 32; p < s + 64; p += 32) sum += *p; "
        "for (const device float* p = x + i % 32; p < x + 64; p += 32) sum += *p; out[i] = sum;",
        4 * (np.arange(64) % 32) + 64,
    ),
    "far beyond the end and back, unused": (
        "threadgroup float* p = s; for (int k = 0; k < 100; k++) p += 64; if (i < 64) p = s + i; out[i] = *p;",
        np.arange(64),
    ),
    "arithmetic of a branch that is not taken": (
        "threadgroup float* p = s; if (x[i] < 0) p -= 1; out[i] = p[i] + (x[i] < 0 ? same(s) - 1 : same(s))[0];",
        np.arange(64),
    ),
    "pointers of every array and constant, added and compared": (
        "out[i] = (same(s) + i < same(s) + 64) + *(x + i) + *(c + 2) + *(table + 3) + (same(t) <= same(t) + 8);",
        np.arange(64) + 8,
    ),
}


@pytest.mark.parametrize("name", BEFORE)
def test_a_pointer_before_its_array_is_reported_with_line_and_name(name):
    expected, body = BEFORE[name]
    with pytest.raises(metalsim.MSLError) as error:
        run(body)
    line = "line 3" if "function" in name else LINE
    assert f"{line}: pointer arithmetic leaves {expected}" in str(error.value)


@pytest.mark.parametrize("name", WITHIN)
def test_a_pointer_that_stays_in_its_array_or_goes_beyond_its_end_is_not_reported(name):
    body, expected = WITHIN[name]
    np.testing.assert_array_equal(run(body), np.asarray(expected, np.float32))
    assert metalsim.last().reports == []


def test_a_view_that_is_read_backwards_may_be_walked_backwards():
    body = "const device float* p = x; for (uint k = 0; k < i; k++) p += x_strides[0]; out[i] = *p;"
    np.testing.assert_array_equal(run(body, view=lambda x: x[::-1]), 63 - np.arange(64))


PAST_END = {
    "a threadgroup array": ("'s': 8 bytes beyond its end", "threadgroup float* p = s + 60; p += 6; out[i] = p[-6];"),
    "an input": ("'x': 4 bytes beyond its end", "const device float* p = x + i + 2; out[i] = p[-2];"),
    "a small input": ("'c': 4 bytes beyond its end", "constant float* p = c + 3; p++; out[i] = p[-2];"),
}


@pytest.mark.parametrize("name", PAST_END)
def test_a_pointer_beyond_the_end_is_reported_if_asked_for(name):
    expected, body = PAST_END[name]
    run(body)
    with metalsim.configured(past_end=True), pytest.raises(metalsim.MSLError, match="leaves") as error:
        run(body)
    assert f"{LINE}: pointer arithmetic leaves {expected}" in str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in WITHIN
        if name not in ("a comparison after the last step of a loop", "far beyond the end and back, unused")
    ],
)
def test_one_past_the_end_is_not_beyond_it(name):
    body, _ = WITHIN[name]
    with metalsim.configured(past_end=True):
        run(body)


def test_a_comparison_of_pointers_into_different_arrays_is_reported():
    for comparison in ("same(s) < same(t)", "same(t) >= same(s)"):
        expected = f"{LINE}: comparison of a pointer to '[st]' with one to '[st]'"
        with pytest.raises(metalsim.MSLError, match=expected):
            run(f"out[i] = {comparison};")
    with pytest.raises(metalsim.MSLError, match=LINE + ": comparison of a pointer to 'x' with one to 'out'"):
        run("out[i] = x + i < (const device float*)out;")


# ---- the fault that was found in metal/attend.metal ------------------------------------------------

# Sums weight * value over n tokens, four of a lane at a time while there are so many, then one at a time. The
# weights lie at the beginning of threadgroup memory.
SUM = """
typedef const threadgroup float *Weights;
template <int U> METAL_FUNC float sum_values(thread const device float *&v, thread Weights &w, Weights stop) {
  float sum = 0;
  HEAD {
    for (int k = 0; k < U; k++) sum += w[8 * k] * v[8 * k];
  }
  return sum;
}
"""
OLD_HEAD = "stop -= (U - 1) * 8;\n  for (; w < stop; w += U * 8, v += U * 8)"
NEW_HEAD = "for (; stop - w > (U - 1) * 8; w += U * 8, v += U * 8)"


def weighted_sum(head, n):
    """sum of k * x[k] over k < n, computed by 8 lanes."""
    body = """
threadgroup float weights[64];
int lane = thread_position_in_grid.x, n = n_tokens;
for (int k = lane; k < 64; k += 8) weights[k] = k;
threadgroup_barrier(mem_flags::mem_threadgroup);
const device float *v = x + lane;
Weights w = weights + lane, stop = weights + n;
float sum = sum_values<4>(v, w, stop);
out[lane] = sum + sum_values<1>(v, w, stop);
"""
    kernel = metalsim.metal_kernel("weighted", ["x", "n_tokens"], ["out"], body, SUM.replace("HEAD", head))
    (out,) = kernel(
        inputs=[mx.arange(64, dtype=mx.float32), n],
        output_shapes=[(8,)],
        output_dtypes=[mx.float32],
        grid=(8, 1, 1),
        threadgroup=(8, 1, 1),
    )
    return out.sum().item()


@pytest.mark.parametrize("n", [1, 2, 8, 23])
def test_a_bound_that_falls_below_address_0_is_reported(n):
    with pytest.raises(metalsim.MSLError) as error:
        weighted_sum(OLD_HEAD, n)
    text = f"line 5: pointer arithmetic leaves 'weights': {4 * (24 - n)} bytes before its beginning"
    assert text in str(error.value)


@pytest.mark.parametrize("n", [1, 23])
def test_where_such_a_bound_is_not_reported_the_loop_runs_away_as_on_a_gpu(n):
    expected = "line 7: out-of-bounds threadgroup read of 4 bytes at byte 256 of 'weights'"
    with metalsim.configured(ignore=("before its beginning",)), pytest.raises(metalsim.MSLError, match=expected):
        weighted_sum(OLD_HEAD, n)


@pytest.mark.parametrize(
    "head, n", [(OLD_HEAD, n) for n in (24, 40, 64)] + [(NEW_HEAD, n) for n in (1, 2, 8, 23, 24, 40, 64)]
)
def test_a_bound_that_stays_in_its_array_is_not_reported(head, n):
    assert weighted_sum(head, n) == sum(k * k for k in range(n))
