"""How many kernels a conversation needs, and how much each asks of Metal's compiler and of its tables."""

import itertools
import sys

import metalsim
import pytest
from support.collector import BITS, COUNTS, SHAPES, MetalCollector

from mlx_turbo.backends import attend_launch, sources

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="metalsim runs on Linux")

# LLVM IR instructions after -O2
LIMITS = {  # by the file
    "attend": 12_500,
    "merge": 3_000,
    "quantize": 9_000,
    "dequantize": 5_000,
    "requantize": 9_000,
    "statistics": 2_000,
}
BUFFERS, FREE_BUFFERS = 31, 3  # what Metal has, and what attend leaves


def check_sizes(collector):
    for (name, _), (text, kernel, expression) in collector.generated.values():
        instructions, _ = metalsim.code_size(text, kernel, expression)
        assert instructions <= LIMITS[name], expression
        assert text.count("[[buffer(") <= BUFFERS - FREE_BUFFERS, expression


def collect(shapes, bits, query_tokens=(1, *attend_launch.QUERY_TOKENS)):
    collector = MetalCollector()
    for shape, b, n in itertools.product(shapes, bits, query_tokens):
        for counts in COUNTS.values():
            collector.step(shape, n, counts, b)
    return collector


LARGEST = [(64, 64, 8), (96, 96, 8), (128, 128, 8), (576, 512, 16)]  # of SHAPES


@pytest.mark.parametrize("shape", LARGEST, ids=str)
def test_no_kernel_of_the_largest_shapes_is_long(shape):
    check_sizes(collect([shape], BITS[:1], (1, 16)))


@pytest.mark.slow
@pytest.mark.parametrize("bits", BITS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_kernel_of_any_models_shape_is_long(shape, bits):
    check_sizes(collect([shape], [bits]))


@pytest.mark.parametrize("head_dim", [32, 80, 128, 512, 576])
def test_packing_and_restoring_kernels_are_short(head_dim):
    collector = MetalCollector()
    for bits in (3, 4, 6, 8):
        collector.packing(head_dim, bits)
    check_sizes(collector)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_session_with_drafts_needs_at_most_four_attention_kernels(shape):
    """Short and long caches, and drafts of any length up to 7 tokens; longer ones need one more."""
    for longest, most in ((1, 2), (4, 3), (8, 4), (16, 5)):
        collector = MetalCollector()
        for n, counts in itertools.product(range(1, longest + 1), COUNTS.values()):
            collector.step(shape, n, counts)
        assert len(collector.of("attend")) <= most and len(collector.of("merge")) == 1


def test_the_text_that_metal_gets_has_no_comments_and_says_the_same():
    for name, *behind in (
        ("attend",),
        ("merge",),
        ("quantize",),
        ("dequantize",),
        ("statistics",),
        ("requantize", "dequantize", "quantize"),
    ):
        text = "".join(sources.metal_source(name))
        assert "//" not in text and "\n\n" not in text and "/*" not in text
        files = [(sources.metal_folder() / f"{n}.metal").read_text() for n in ("shared", *behind, name)]
        source = "".join([text.split(sources.BODY_MARKER)[0] for text in files[:-1]] + files[-1:])
        code = "".join(line.split("//")[0] for line in source.splitlines())
        assert "".join(text.split()) == "".join(code.split())
