"""MLX's own Metal kernels, unmodified from the installed wheel, compute in the simulator what NumPy computes.

They are foreign Metal: written by others, for Apple's compiler, and run on every Mac that runs MLX. Each of
them is also run with one barrier deleted, which must be noticed.
"""

import re
import sys
from pathlib import Path

import metalsim
import mlx.core as mx
import numpy as np
import pytest
from metalsim.translate import Source
from support.tolerances import MLX_KERNELS

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="metalsim runs on Linux")

KERNELS = Path(mx.__file__).parent / "include/mlx/backend/metal/kernels"
# MLX pastes its own headers in front when it compiles these at run time; msl.h stands in for them.
PREAMBLE = '#define STEEL_PRAGMA_UNROLL _Pragma("clang loop unroll(full)")\n#define SOFTMAX_N_READS 4\n'


def kernel_text(name):
    return PREAMBLE + re.sub(r'#include "mlx/.*"', "", (KERNELS / name).read_text())


# bfloat16 travels as its bits
NUMPY_TYPE = {"float": np.float32, "float16_t": np.float16, "bfloat16_t": np.uint16}
# largest absolute error against float64 on values of order 1: one rounding of the output, and of p in 16 bits


def rounded(values, kind):
    """(values as the kernel's bits, the same as float64)."""
    if kind != "bfloat16_t":
        stored = values.astype(NUMPY_TYPE[kind])
        return stored, stored.astype(np.float64)
    stored = mx.array(values.astype(np.float32)).astype(mx.bfloat16)
    return np.array(stored.view(mx.uint16)), np.array(stored.astype(mx.float32)).astype(np.float64)


def as_float(raw, kind):
    if kind == "bfloat16_t":
        raw = (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float64)


# ---- attention -----------------------------------------------------------------------------------

NO_OPTION = {20: False, 21: False, 22: False, 23: False, 24: False, 25: False, 26: 0}
HAS_MASK, QUERY_TRANSPOSED, CAUSAL, BOOL_MASK, FLOAT_MASK, SINKS, BLOCKS = range(20, 27)


def attention(q, k, v, mask=None, sinks=None):
    """q: [n_heads, L, D]; k, v: [n_kv_heads, N, D]; mask: bool or additive, broadcast to [n_heads, L, N]."""
    group = q.shape[0] // k.shape[0]
    k, v = np.repeat(k, group, 0), np.repeat(v, group, 0)
    scores = q @ k.swapaxes(1, 2) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + mask
    top = scores.max(-1, keepdims=True)
    if sinks is not None:
        top = np.maximum(top, sinks[:, None, None])
    p = np.exp(scores - top)
    total = p.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks[:, None, None] - top)
    return p @ v / total


class Attention:
    """One attention problem: random queries, keys and values, and the arguments all sdpa_vector kernels
    share."""

    def __init__(self, kind, n_heads, n_kv_heads, n_keys, head_dim, n_queries=1, seed=0):
        rng = np.random.default_rng(seed)
        self.kind, self.n_heads, self.n_queries, self.head_dim = kind, n_heads, n_queries, head_dim
        shapes = [(n_heads, n_queries, head_dim)] + 2 * [(n_kv_heads, n_keys, head_dim)]
        tensors = [rounded(rng.standard_normal(shape), kind) for shape in shapes]
        (queries, self.q), (keys, self.k), (values, self.v) = tensors
        head_stride, row_stride = np.uint64(n_keys * head_dim), np.uint64(head_dim)
        self.arguments = {
            "queries": queries,
            "keys": keys,
            "values": values,
            "gqa_factor": np.int32(n_heads // n_kv_heads),
            "N": np.int32(n_keys),
            "scale": np.float32(head_dim**-0.5),
            "k_head_stride": head_stride,
            "k_seq_stride": row_stride,
            "v_head_stride": head_stride,
            "v_seq_stride": row_stride,
        }
        self.rng, self.n_keys = rng, n_keys

    def mask(self, values):
        """The arguments of a mask [n_heads, n_queries, n_keys]."""
        name = "bmask" if values.dtype == bool else "fmask"
        return {
            name: values,
            "mask_kv_seq_stride": np.int32(1),
            "mask_q_seq_stride": np.int32(self.n_keys),
            "mask_head_stride": np.int32(self.n_queries * self.n_keys),
        }

    def sinks(self, values):
        return {"sinks": values, "num_q_heads": np.int32(self.n_heads)}

    def one_pass(self, text, constants=(), **arguments):
        library = metalsim.Library(text, NO_OPTION | dict(constants))
        shape = (self.n_heads, self.n_queries, self.head_dim)
        out = library(
            f"sdpa_vector<{self.kind}, {self.head_dim}>",
            self.arguments | arguments,
            {"out": (shape, NUMPY_TYPE[self.kind])},
            (self.n_heads * 1024, self.n_queries, 1),
            (1024, 1, 1),
        )
        return as_float(out["out"], self.kind)

    def check(self, out, **reference):
        np.testing.assert_allclose(
            out, attention(self.q, self.k, self.v, **reference), rtol=0, atol=MLX_KERNELS[self.kind]
        )


SDPA = kernel_text("sdpa_vector.h")


@pytest.mark.parametrize("order", ["natural", "random"])
@pytest.mark.parametrize(
    "kind, n_heads, n_kv_heads, n_keys, head_dim",
    [
        ("float", 8, 2, 1024, 128),
        ("float16_t", 4, 4, 300, 64),
        ("bfloat16_t", 4, 1, 257, 96),
        ("float16_t", 2, 1, 31, 256),
        ("float", 2, 2, 1, 64),
    ],
)
def test_sdpa_vector_matches_numpy(kind, n_heads, n_kv_heads, n_keys, head_dim, order):
    problem = Attention(kind, n_heads, n_kv_heads, n_keys, head_dim)
    with metalsim.configured(order=order):
        problem.check(problem.one_pass(SDPA))
    assert metalsim.last().reports == []


def test_sdpa_vector_reads_each_key_once_per_query_head():
    problem = Attention("float", n_heads=8, n_kv_heads=2, n_keys=320, head_dim=128)
    problem.one_pass(SDPA)
    stats = metalsim.last()
    assert set(stats.reads["keys"]) == set(stats.reads["values"]) == {4}
    assert set(stats.writes["out"]) == {1}


def test_sdpa_vector_with_a_causal_mask_matches_numpy():
    problem = Attention("float16_t", n_heads=4, n_kv_heads=2, n_keys=300, head_dim=64, n_queries=3)
    causal = np.arange(300) <= 300 - 3 + np.arange(3)[:, None]
    problem.check(problem.one_pass(SDPA, {CAUSAL: True}), mask=causal[None])


@pytest.mark.parametrize("kind", ["float", "float16_t"])
def test_sdpa_vector_with_a_mask_and_sinks_matches_numpy(kind):
    problem = Attention(kind, n_heads=4, n_kv_heads=4, n_keys=200, head_dim=96, n_queries=2)
    keep = problem.rng.random((4, 2, 200)) < 0.7
    stored_sinks, sinks = rounded(problem.rng.standard_normal(4), kind)
    out = problem.one_pass(
        SDPA, {HAS_MASK: True, BOOL_MASK: True, SINKS: True}, **problem.mask(keep), **problem.sinks(stored_sinks)
    )
    problem.check(out, mask=keep, sinks=sinks)


def test_sdpa_vector_with_an_additive_mask_matches_numpy():
    problem = Attention("float16_t", n_heads=2, n_kv_heads=1, n_keys=150, head_dim=64)
    stored, bias = rounded(problem.rng.standard_normal((2, 1, 150)), "float16_t")
    problem.check(problem.one_pass(SDPA, {HAS_MASK: True, FLOAT_MASK: True}, **problem.mask(stored)), mask=bias)


@pytest.mark.parametrize(
    "kind, first_pass, group_y",
    [
        ("float", "sdpa_vector_2pass_1<float, 128>", 4),
        ("float16_t", "sdpa_vector_2pass_1<float16_t, 128>", 4),
        ("bfloat16_t", "sdpa_vector_2pass_1<bfloat16_t, 128>", 4),
        ("float", "sdpa_vector_2pass_1_gqa<float, 128, 128, 4, 2>", 4),
        ("float16_t", "sdpa_vector_2pass_1_gqa<float16_t, 128, 128, 4, 2>", 4),
    ],
)
def test_two_pass_sdpa_vector_matches_numpy(kind, first_pass, group_y):
    n_blocks, n_heads = 32, 8
    problem = Attention(kind, n_heads, n_kv_heads=2, n_keys=1024, head_dim=128)
    library = metalsim.Library(SDPA, NO_OPTION | {BLOCKS: n_blocks})
    outputs = {
        "out": ((n_heads, 1, n_blocks, 128), NUMPY_TYPE[kind]),
        "sums": ((n_heads, n_blocks), np.float32),
        "maxs": ((n_heads, n_blocks), np.float32),
    }
    partial = library(first_pass, problem.arguments, outputs, (32 * 2, group_y, n_blocks), (32, group_y, 1))
    # one read per query head of the group, or per pair of them in the gqa variant
    assert set(metalsim.last().reads["keys"]) == {2 if "gqa" in first_pass else 4}
    arguments = {
        "partials": partial["out"],
        "sums": partial["sums"],
        "maxs": partial["maxs"],
        "blocks": np.int32(n_blocks),
    }
    out = library(
        f"sdpa_vector_2pass_2<{kind}, 128>",
        arguments,
        {"out": ((n_heads, 1, 128), NUMPY_TYPE[kind])},
        (n_heads * 1024, 1, 1),
        (1024, 1, 1),
    )
    problem.check(as_float(out["out"], kind))


# ---- Hadamard transform, softmax, quantization ---------------------------------------------------

HADAMARD = kernel_text("hadamard.h")
SOFTMAX = kernel_text("softmax.h")
# quantized.h also holds matrix products over other headers of MLX: take the helpers at its top, and its last
# kernels
QUANTIZED = kernel_text("quantized.h")
QUANTIZED = (
    QUANTIZED[: QUANTIZED.index("template <typename T, typename U, int values_per_thread, int bits>")]
    + QUANTIZED[QUANTIZED.rindex("template <", 0, QUANTIZED.index("void affine_quantize(")) :]
)


def run_hadamard(text, kind, n, n_rows=3, max_radix=16, read_width=4):
    stored, x = rounded(np.random.default_rng(n).standard_normal((n_rows, n)), kind)
    library = metalsim.Library(text)
    expression = f"hadamard_n<{kind}, {n}, {min(n, max_radix)}, {read_width}>"
    n_threads = n // min(n, max_radix)
    out = library(
        expression,
        {"in": stored, "scale": np.float32(n**-0.5)},
        {"out": (x.shape, NUMPY_TYPE[kind])},
        (n_threads, n_rows, 1),
        (n_threads, 1, 1),
    )
    return as_float(out["out"], kind), x


@pytest.mark.parametrize("kind", ["float", "float16_t"])
@pytest.mark.parametrize("n", [64, 128, 512])
def test_hadamard_matches_numpy(kind, n):
    matrix = np.ones((1, 1))
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    out, x = run_hadamard(HADAMARD, kind, n)
    # float16 is rounded after every radix step
    np.testing.assert_allclose(out, x @ matrix / n**0.5, rtol=0, atol=4 * MLX_KERNELS[kind])


def run_softmax(text, n, n_threads=1024, n_rows=2):
    x = np.random.default_rng(n).standard_normal((n_rows, n)).astype(np.float32)
    out = metalsim.Library(text)(
        "softmax_looped<float, float, 4>",
        {"in": x, "axis_size": np.int32(n)},
        {"out": (x.shape, np.float32)},
        (n_rows * n_threads, 1, 1),
        (n_threads, 1, 1),
    )
    return out["out"], x


@pytest.mark.parametrize("n", [1024, 1030])
def test_softmax_matches_numpy(n):
    out, x = run_softmax(SOFTMAX, n)
    p = np.exp(x - x.max(-1, keepdims=True))
    np.testing.assert_allclose(out, p / p.sum(-1, keepdims=True), rtol=1e-5, atol=1e-9)


def run_affine(kernel, bits, arguments, outputs, n_threads):
    library = metalsim.Library(QUANTIZED, {200: False, 201: False, 202: False})
    return library(f"{kernel}<float, 64, {bits}>", arguments, outputs, (n_threads, 1, 1), (32, 1, 1))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_affine_dequantize_matches_mlx(bits):
    """The words, scales and biases come from mx.quantize, the expected values from mx.dequantize, on the
    CPU."""
    x = mx.random.normal((8, 256), key=mx.random.key(bits))
    words, scales, biases = mx.quantize(x, group_size=64, bits=bits)
    expected = np.array(mx.dequantize(words, scales, biases, group_size=64, bits=bits))
    values_per_thread = 8 if bits in (3, 5) else 4 if bits == 6 else 8 // bits
    arguments = {"w": np.array(words).view(np.uint8), "scales": np.array(scales), "biases": np.array(biases)}
    out = run_affine(
        "affine_dequantize", bits, arguments, {"out": (expected.shape, np.float32)}, expected.size // values_per_thread
    )
    np.testing.assert_allclose(out["out"], expected, rtol=0, atol=1e-6)
    assert set(metalsim.last().writes["out"]) == {1}


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_affine_quantize_matches_mlx(bits):
    x = mx.random.normal((8, 256), key=mx.random.key(bits))
    words, scales, biases = (np.array(a) for a in mx.quantize(x, group_size=64, bits=bits))
    outputs = {
        "out": (words.view(np.uint8).shape, np.uint8),
        "scales": (scales.shape, np.float32),
        "biases": (biases.shape, np.float32),
    }
    out = run_affine("affine_quantize", bits, {"w": np.array(x)}, outputs, x.size // 2)
    np.testing.assert_allclose(out["scales"], scales, rtol=1e-6)
    np.testing.assert_allclose(out["biases"], biases, rtol=1e-6)
    # a value that lies between two codes may round either way: seen once in 2,048 values at 6 bits
    assert np.mean(out["out"] != words.view(np.uint8)) < 0.002


# ---- the rules of MSL -----------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(KERNELS.rglob("*.h")), ids=lambda p: str(p.relative_to(KERNELS)))
def test_texts_that_apple_accepts_break_no_rule(path):
    """Of the simulator's own: nothing is compiled. Texts with `nax` in their name are for Metal 4 only."""
    macro = "#define STEEL_CONST static constant constexpr const\n"
    text = macro + re.sub(r"#\s*include .*", "", path.read_text())
    constants = dict.fromkeys(range(400), 0)
    if "nax" in path.name and re.search(r"\[&[^]]*\] *[({]", text):
        with pytest.raises(metalsim.MSLError) as error:
            Source(text, constants)
        assert all("MSL has no lambda" in line for line in str(error.value).splitlines())
    else:
        Source(text, constants)


# ---- deleted barriers ----------------------------------------------------------------------------


def barriers_of(text, kernel):
    """Positions of the threadgroup_barrier calls in one kernel of the text."""
    start = text.index(f"void {kernel}(")
    end = text.find("[[kernel]]", start)  # -1 after the last kernel
    body = text[:end] if end > 0 else text
    return [m.span() for m in re.compile(r"threadgroup_barrier\(.*?\);").finditer(body, start)]


def without(text, span):
    return text[: span[0]] + text[span[1] :]


@pytest.mark.parametrize("k", range(len(barriers_of(SDPA, "sdpa_vector"))))
def test_a_barrier_deleted_from_sdpa_vector_is_noticed(k):
    text = without(SDPA, barriers_of(SDPA, "sdpa_vector")[k])
    problem = Attention("float", n_heads=1, n_kv_heads=1, n_keys=64, head_dim=128)
    with pytest.raises(metalsim.MSLError, match="data race"):
        problem.one_pass(text)


@pytest.mark.parametrize("k", range(len(barriers_of(HADAMARD, "hadamard_n"))))
def test_a_barrier_deleted_from_hadamard_is_noticed(k):
    with pytest.raises(metalsim.MSLError, match="data race"):
        run_hadamard(without(HADAMARD, barriers_of(HADAMARD, "hadamard_n")[k]), "float", 512, n_rows=1)
