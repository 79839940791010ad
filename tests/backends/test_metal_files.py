"""The text of metal/*.metal: self-contained, documented, and tied to the Python that shares its constants."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from mlx_turbo.backends import sources
from mlx_turbo.quant import codebook, scheme
from mlx_turbo.quant.scheme import PACKED_BITS, bit_fields

FILES = sorted(sources.metal_folder().glob("*.metal"))
TEXTS = {path.stem: path.read_text() for path in FILES}


@pytest.mark.parametrize("name", TEXTS)
def test_a_file_includes_nothing_and_states_its_layout_and_launch(name):
    text = TEXTS[name]
    assert not re.search(r"^\s*#\s*(include|import)", text, re.M)
    assert max(map(len, text.splitlines())) <= 120
    header = text[: text.index("\n\n")]
    assert all(line.startswith("//") for line in header.splitlines() if line)
    if name != "shared":
        assert all(word in header for word in ("INPUTS", "OUTPUT", "TEMPLATE", "LAUNCH", "MAPPING"))
        assert text.count(sources.BODY_MARKER) == 1


def test_no_definition_stands_in_two_files():
    per_file = {
        name: set(re.findall(r"(?:METAL_FUNC|constexpr) [\w<>, *]+?\b(tq_\w+)\(", text)) for name, text in TEXTS.items()
    }
    for a, b in itertools.combinations(per_file, 2):
        assert not per_file[a] & per_file[b]


def test_the_packed_row_is_described_in_the_same_words_everywhere():
    """scheme.py and shared.metal."""
    (rows,) = re.findall(r"(//   4 bits  word w.*?)//   Words are 0", TEXTS["shared"], re.S)
    source = Path(scheme.__file__).read_text()
    python = re.search(r"(#   4 bits  word w.*?)# Words are 0", source, re.S)[1].strip()
    assert rows.strip().replace("//", "#") == python


def constants(pattern):
    found = {m for text in TEXTS.values() for m in re.findall(pattern, text, re.S)}
    assert found, pattern
    return found


def test_the_constants_of_the_levels_are_those_of_the_codebook():
    units = constants(r"struct Levels<(\d)> \{\n\s+static constant constexpr const float UNIT = ([^;]+);")
    want = {bits: scale for bits, (_, _, scale) in codebook.PRODUCT.items()}
    assert {int(b): np.float32(eval(u.replace("f", ""))) for b, u in units} == {
        b: np.float32(s) for b, s in want.items()
    }


def test_the_curves_of_the_levels_are_those_of_the_codebook():
    for bits, (power, k) in codebook.CURVE.items():
        (body,) = constants(rf"struct Levels<{bits}> \{{(.*?)\n  //")
        assert [float(x) for x in re.findall(r"half2\(([-\d.]+)h\)", body)] == [k]
        assert body.count("t * t") == (power == 4) and body.count("fma(t, t") == (power == 2)
        base, shift, _ = codebook.PRODUCT[bits]
        kink = int(re.search(rf"tq_one_kink<{bits}, (\d+), P>", body)[1])
        assert (base + (kink << shift)) & 0x3FF == 0  # where an octave begins


def test_the_thresholds_of_the_kernel_are_the_midpoints_of_the_levels():
    for bits in PACKED_BITS:
        (text,) = constants(rf"TQ_T{bits}\[\d+\] = \{{([^}}]+)\}}")
        got = np.array([np.float32(t.strip().rstrip("f")) for t in text.split(",")])
        want = codebook.thresholds(codebook.product(bits))[2 ** (bits - 1) :].astype(np.float32)
        assert np.array_equal(got, want)


def test_every_bit_of_a_code_has_one_place_and_no_two_share_one():
    for bits in PACKED_BITS:
        for head_dim in (32, 72, 100, 128, 576):
            fields = bit_fields(bits, head_dim)
            places = [(w, s + k) for _, w, s, _, width in fields for k in range(width)]
            codes = [(d, c + k) for d, _, _, c, width in fields for k in range(width)]
            assert len(set(places)) == len(places) == len(set(codes)) == head_dim * bits
