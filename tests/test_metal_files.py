"""The text of metal/*.metal: self-contained, documented, and tied to the Python that shares its constants."""
import re

import numpy as np
import pytest

from mlx_turbo import codebook, kernels
from mlx_turbo.scheme import bit_fields

FILES = sorted(kernels.metal_folder().glob("*.metal"))
TEXTS = {path.stem: path.read_text() for path in FILES}


@pytest.mark.parametrize("name", TEXTS)
def test_a_file_includes_nothing_and_states_its_layout_and_launch(name):
    text = TEXTS[name]
    assert not re.search(r"^\s*#\s*(include|import)", text, re.M)
    header = text[:text.index("\n\n")]
    assert all(line.startswith("//") for line in header.splitlines() if line)
    for word in ("INPUTS", "OUTPUTS", "TEMPLATE", "LAUNCH", "MAPPING"):
        assert word in text[:text.index("#define")], word
    assert text.count(kernels.BODY_MARKER) == 1
    assert max(map(len, text.splitlines())) <= 120


def test_the_shared_section_is_the_same_in_every_file_that_has_one():
    sections = {m for text in TEXTS.values() for m in re.findall(r"// ---- shared.*?// ---- end of shared ----", text, re.S)}
    assert len(sections) == 1


def test_both_attention_kernels_finish_a_row_with_the_same_text():
    sections = [re.findall(r"// ---- finish.*?// ---- end of finish ----", TEXTS[name], re.S) for name in ("attend", "merge")]
    assert sections[0] == sections[1] and len(sections[0]) == 1


def test_the_packed_row_is_described_in_the_same_words_everywhere():
    """scheme.py and every kernel that reads or writes rows."""
    rows = {m.strip() for text in TEXTS.values() for m in re.findall(r"(//   4 bits  word w.*?)//   Words are 0", text, re.S)}
    scheme = (kernels.metal_folder().parent / "mlx_turbo" / "scheme.py")
    source = (scheme if scheme.exists() else kernels.Path(kernels.__file__).with_name("scheme.py")).read_text()
    python = re.search(r"(#   4 bits  word w.*?)# Words are 0", source, re.S)[1].strip()
    assert {row.replace("//", "#") for row in rows} == {python}


def constants(pattern):
    found = {m for text in TEXTS.values() for m in re.findall(pattern, text)}
    assert found, pattern
    return found


def test_the_constants_of_the_levels_are_those_of_the_codebook():
    units = constants(r"struct Levels<(\d)> \{\n\s+static constant constexpr const float UNIT = ([^;]+);")
    want = {bits: scale for bits, (_, _, scale) in codebook.PRODUCT.items()} | {8: codebook.UNIFORM_STEP}
    assert {int(b): np.float32(eval(u.replace("f", ""))) for b, u in units} == {b: np.float32(s) for b, s in want.items()}


def test_the_thresholds_of_the_kernel_are_the_midpoints_of_the_levels():
    for bits in (2, 3, 4):
        text, = constants(rf"TQ_T{bits}\[\d+\] = \{{([^}}]+)\}}")
        got = np.array([np.float32(t.strip().rstrip("f")) for t in text.split(",")])
        want = codebook.thresholds(codebook.product(bits))[2 ** (bits - 1):].astype(np.float32)
        assert np.array_equal(got, want)


def test_every_bit_of_a_code_has_one_place_and_no_two_share_one():
    for bits in (2, 3, 4, 8):
        for head_dim in (32, 72, 100, 128, 576):
            fields = bit_fields(bits, head_dim)
            places = [(w, s + k) for _, w, s, _, width in fields for k in range(width)]
            codes = [(d, c + k) for d, _, _, c, width in fields for k in range(width)]
            assert len(set(places)) == len(places) == len(set(codes)) == head_dim * bits
