"""llama.cpp's TurboQuant blocks: byte layout against hand-made and C-made bytes, rules against their definitions."""

import llama_blocks as lb
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

EVERY_FORMAT = pytest.mark.parametrize("block_format", lb.FORMATS, ids=lambda f: f.name)
MATRIX_TOLERANCE = {
    "wht": 1e-12,  # float64
    "dense": 1e-4,  # float32 Gram-Schmidt: measured 6e-6 at 128
}
FLOAT16_RELATIVE = 2.0**-11  # rounding of a normal float16


@pytest.fixture(scope="module")
def wht():
    return lb.wht_rotation()


@pytest.fixture(scope="module")
def dense():
    return lb.init_rotation()


@pytest.fixture
def gaussian_rows():
    return np.random.default_rng(7).standard_normal((4000, 128))


def reconstruct(x, block_format, rotation, **options):
    blocks = lb.quantize(x, block_format, rotation=rotation, **options)
    return lb.dequantize(blocks, block_format, inverse_rotation=rotation.T, levels=options.get("levels"))


@pytest.mark.parametrize(
    "block_format, struct_bytes, bits_per_value",
    [  # sizeof as printed by gcc for the forks' own headers
        (lb.TURBO2_0, 34, 2.125),
        (lb.TURBO3_0, 50, 3.125),
        (lb.TURBO4_0, 66, 4.125),
        (lb.TURBO2_0_BLOCK32, 10, 2.5),
        (lb.TURBO3_0_BLOCK32, 14, 3.5),
        (lb.TURBO4_0_RNORM, 68, 4.25),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_block_is_as_long_as_the_c_struct(block_format, struct_bytes, bits_per_value):
    assert block_format.bytes_per_block == struct_bytes
    assert block_format.bits_per_value == bits_per_value
    assert lb.pack(np.zeros(block_format.values_per_block, int), 0.0, block_format).shape == (struct_bytes,)


@pytest.mark.parametrize(
    "block_format, codes, norm, expected",
    [
        # 3 | 0 << 2 | 1 << 4 | 2 << 6 = 0x93; float16 1.0 = 0x3c00
        (lb.TURBO2_0, [3, 0, 1, 2] * 32, 1.0, "003c" + "93" * 32),
        (lb.TURBO2_0_BLOCK32, [3, 0, 1, 2] * 8, 1.0, "003c" + "93" * 8),
        # low two bits 0 1 2 3 0 1 2 3 -> e4 e4, top bits 0 0 0 0 1 1 1 1 -> f0; float16 2.5 = 0x4100
        (lb.TURBO3_0, list(range(8)) * 16, 2.5, "0041" + "e4" * 32 + "f0" * 16),
        (lb.TURBO3_0_BLOCK32, list(range(8)) * 4, 2.5, "0041" + "e4" * 8 + "f0" * 4),
        # only position 9 is 6 = 0b110: byte 2 of qs, bits 2-3; byte 1 of signs, bit 1
        (lb.TURBO3_0_BLOCK32, [0] * 9 + [6] + [0] * 22, 0.0, "0000" + "0000080000000000" + "00020000"),
        (lb.TURBO4_0, list(range(16)) * 8, -2.0, "00c0" + "1032547698badcfe" * 8),
        (lb.TURBO4_0_RNORM, list(range(16)) * 8, -2.0, "00c0" + "0000" + "1032547698badcfe" * 8),
    ],
)
def test_packed_bytes_are_those_computed_by_hand(block_format, codes, norm, expected):
    blocks = lb.pack(codes, norm, block_format)
    assert blocks.tobytes().hex() == expected
    indices, norms = lb.unpack(blocks, block_format)
    assert indices.tolist() == codes and float(norms) == norm


@EVERY_FORMAT
@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_unpack_inverts_pack(block_format, data):
    lead = data.draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3))
    codes = st.integers(0, 2**block_format.bits - 1)
    indices = data.draw(hnp.arrays(np.int64, (*lead, block_format.values_per_block), elements=codes))
    norms = data.draw(hnp.arrays(np.float16, lead, elements=st.floats(width=16, allow_nan=False, allow_infinity=False)))
    unpacked_indices, unpacked_norms = lb.unpack(lb.pack(indices, norms, block_format), block_format)
    np.testing.assert_array_equal(unpacked_indices, indices)
    np.testing.assert_array_equal(unpacked_norms.view(np.uint16), norms.view(np.uint16))


@EVERY_FORMAT
@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_pack_inverts_unpack_for_any_bytes_with_a_finite_norm(block_format, data):
    blocks = np.frombuffer(
        data.draw(st.binary(min_size=block_format.bytes_per_block, max_size=block_format.bytes_per_block)), np.uint8
    ).copy()
    blocks[1] &= 0xBF  # no exponent of all ones: neither infinite nor NaN
    blocks[2 : 2 + block_format.reserved_bytes] = 0
    np.testing.assert_array_equal(lb.pack(*lb.unpack(blocks, block_format), block_format), blocks)


def test_reserved_bytes_are_ignored_when_reading():
    blocks = lb.pack([5] * 128, 1.5, lb.TURBO4_0_RNORM)
    blocks[2:4] = 0xFF
    indices, norms = lb.unpack(blocks, lb.TURBO4_0_RNORM)
    assert set(indices) == {5} and norms == 1.5


# x as below through quantize_row_turbo{2,3,4}_0_ref of the forks (revisions in the module's docstring), compiled with
# gcc -O2 -ffp-contract=off. No rotated coordinate is closer than 1.5e-4 to a boundary, so rounding decides nothing.
BYTES_FROM_C = [
    (lb.TURBO2_0, "wht", "014fb685a6466e73a164b05a795ce6d54e6a46cb29b6ab0d5566726a11048e5255aa"),
    (
        lb.TURBO3_0,
        "wht",
        "684e2d1a188dd8a746dd66b1a3edcdff88909997076c528bffcca48177684cb0fe558d1d574c3c268d73b1d62f5075001bf0",
    ),
    (
        lb.TURBO4_0_RNORM,
        "wht",
        "844e00006c8f4491498c7c30ea7c1f3d14c9717c12beab35a54df1546cf856f5e930"
        "aa2c2b21bfe1d7087abfaebce62057666868183e9b4907172022f8b009466467cdcd",
    ),
    (
        lb.TURBO2_0_BLOCK32,
        "wht",
        "014fb685a6466e73a164014fb05a795ce6d54e6a014f46cb29b6ab0d5566014f726a11048e5255aa",
    ),
    (
        lb.TURBO3_0_BLOCK32,
        "wht",
        "684e2d1a188dd8a746dd8d1d574c684e66b1a3edcdff88903c268d73"
        "684e9997076c528bffccb1d62f50684ea48177684cb0fe5575001bf0",
    ),
    (
        lb.TURBO4_0,
        "dense",
        "6a4e62998d9269d3727cb0ac87b239aa8a854ceb549d64b3baf7446a866a75aa33b9"
        "2345c853ab6d32d6d5889682678ea22776974967522a3986afa95a36d9798579",
    ),
]


@pytest.mark.parametrize("block_format, rotation, expected", BYTES_FROM_C, ids=[case[0].name for case in BYTES_FROM_C])
def test_quantize_writes_the_bytes_of_the_c_code(block_format, rotation, expected, request):
    i = np.arange(128)
    x = ((32 * i**3 + 29 * i) % 251 - 125) / 32
    blocks = lb.quantize(x, block_format, rotation=request.getfixturevalue(rotation))
    assert blocks.tobytes().hex() == expected


def test_quantize_gives_a_block_computed_by_hand():
    # Norm 5; 0.6 and 0.8 lie beyond the last boundary (code 7), the zeros on the middle one (code 4). Matched norm:
    # 5 / sqrt(2 * 0.190685^2 + 126 * 0.021460^2) = 13.8277, in float16 0x4aea.
    x = np.array([3.0, 4.0] + [0.0] * 126)
    assert lb.quantize(x, lb.TURBO3_0).tobytes().hex() == "ea4a" + "0f" + "00" * 31 + "ff" * 16


def test_the_dense_rotation_has_the_bits_of_the_c_code(dense):
    # turbo_init_rotation of the fork, compiled without fused multiply-add; the last column has seen every rounding.
    assert dense.dtype == np.float32 and dense.shape == (128, 128)
    corners = [float(value).hex() for value in (dense[0, 0], dense[0, 127], dense[127, 0], dense[127, 127])]
    assert corners == [
        "0x1.d6d1880000000p-7", "-0x1.4d34160000000p-4", "0x1.35422c0000000p-6", "0x1.54c4600000000p-3",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "rotation, tolerance",
    [
        (lb.wht_rotation(128), MATRIX_TOLERANCE["wht"]),
        (lb.wht_rotation(64), MATRIX_TOLERANCE["wht"]),
        (lb.init_rotation(128), MATRIX_TOLERANCE["dense"]),
        (lb.init_rotation(5, seed=1042), MATRIX_TOLERANCE["dense"]),
        (lb.init_rotation(1, seed=0), MATRIX_TOLERANCE["dense"]),
    ],
    ids=["wht128", "wht64", "dense128", "dense5", "dense1"],
)
def test_rotations_are_orthogonal(rotation, tolerance):
    rotation = rotation.astype(np.float64)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(len(rotation)), atol=tolerance)
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(len(rotation)), atol=tolerance)


def test_the_wht_signs_are_numpys_draws_with_seed_42(wht):
    rng = np.random.default_rng(42)
    signs1, signs2 = rng.choice([-1.0, 1.0], 128), rng.choice([-1.0, 1.0], 128)
    np.testing.assert_array_equal(np.sign(wht[0]), signs1 * signs2[0])  # Hadamard's first row and column are ones
    np.testing.assert_array_equal(np.sign(wht[:, 0]), signs2 * signs1[0])


def test_another_seed_gives_another_rotation():
    assert not np.array_equal(lb.init_rotation(8, seed=42), lb.init_rotation(8, seed=43))


@EVERY_FORMAT
def test_boundaries_are_midpoints_of_symmetric_ascending_levels(block_format):
    levels, boundaries = np.array(block_format.levels), np.array(block_format.boundaries)
    assert len(levels) == 2**block_format.bits and (np.diff(levels) > 0).all()
    np.testing.assert_array_equal(levels, -levels[::-1])
    np.testing.assert_allclose(boundaries, (levels[1:] + levels[:-1]) / 2, atol=5.1e-7)  # six decimals in C


@EVERY_FORMAT
def test_the_matched_norm_restores_the_norm_of_every_group(block_format, wht, gaussian_rows):
    x = gaussian_rows.reshape(-1, 256)
    restored = reconstruct(x, block_format, wht, norm_rule="matched")
    norms, restored_norms = (np.linalg.norm(rows.reshape(-1, 128), axis=-1) for rows in (x, restored))
    np.testing.assert_allclose(restored_norms, norms, rtol=1.01 * FLOAT16_RELATIVE)


@EVERY_FORMAT
def test_no_norm_rule_beats_least_squares_on_any_vector(block_format, wht, gaussian_rows):
    error = {
        rule: ((reconstruct(gaussian_rows, block_format, wht, norm_rule=rule) - gaussian_rows) ** 2).sum(axis=-1)
        for rule in lb.NORM_RULES
    }
    # float16 moves the norm by 2^-11 of itself, so the squared error by up to 2^-22 of the vector's square.
    slack = 2.0**-22 * (gaussian_rows**2).sum(axis=-1)
    for rule in lb.NORM_RULES:
        assert (error["least_squares"] <= error[rule] + slack).all()


@pytest.mark.parametrize(
    "block_format, at_unit_variance",
    [  # E (g - level)^2 for g ~ N(0, 1), by quadrature over the tables
        (lb.TURBO2_0, 0.117482),
        (lb.TURBO3_0, 0.034570),
        (lb.TURBO4_0, 0.009501),
        (lb.TURBO2_0_BLOCK32, 0.117482),
        (lb.TURBO3_0_BLOCK32, 0.034570),
        (lb.TURBO4_0_RNORM, 0.020273),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_the_error_on_gaussian_rows_is_the_codebooks(block_format, at_unit_variance, wht, gaussian_rows):
    error = ((reconstruct(gaussian_rows, block_format, wht, norm_rule="norm") - gaussian_rows) ** 2).mean()
    # A coordinate of a unit vector has slightly lighter tails than N(0, 1/128): 1 to 2 %, 4 % with clipped tails.
    assert 0.95 * at_unit_variance < error < at_unit_variance


def test_exact_levels_can_replace_the_forks(wht, gaussian_rows):
    positive = np.array([0.245094, 0.756005, 1.343909, 2.151946])  # Lloyd-Max for N(0, 1)
    levels = np.concatenate([-positive[::-1], positive]) / np.sqrt(128)
    exact = reconstruct(gaussian_rows, lb.TURBO3_0, wht, levels=levels)
    forks = reconstruct(gaussian_rows, lb.TURBO3_0, wht)
    assert 0 < np.abs(exact - forks).max()
    # The tables differ by less than 1 %; so do the errors.
    assert ((exact - gaussian_rows) ** 2).mean() < 1.01 * ((forks - gaussian_rows) ** 2).mean()


def test_blocks_of_32_hold_the_codes_and_norms_of_blocks_of_128(wht, gaussian_rows):
    x = gaussian_rows[:6].reshape(2, 384)
    large = lb.quantize(x, lb.TURBO3_0, rotation=wht)
    small = lb.quantize(x, lb.TURBO3_0_BLOCK32, rotation=wht)
    assert large.shape == (2, 3, 50) and small.shape == (2, 12, 14)
    large_indices, large_norms = lb.unpack(large, lb.TURBO3_0)
    small_indices, small_norms = lb.unpack(small, lb.TURBO3_0_BLOCK32)
    np.testing.assert_array_equal(small_indices.reshape(2, 384), large_indices.reshape(2, 384))
    np.testing.assert_array_equal(small_norms, np.repeat(large_norms, 4, axis=-1))


def test_a_matrix_and_a_callable_rotate_alike(wht, gaussian_rows):
    x = gaussian_rows[:5]
    blocks = lb.quantize(x, lb.TURBO4_0, rotation=wht)
    np.testing.assert_array_equal(lb.quantize(x, lb.TURBO4_0, rotation=lambda groups: groups @ wht.T), blocks)
    np.testing.assert_array_equal(
        lb.dequantize(blocks, lb.TURBO4_0, inverse_rotation=lambda groups: groups @ wht),
        lb.dequantize(blocks, lb.TURBO4_0, inverse_rotation=wht.T),
    )


@EVERY_FORMAT
@pytest.mark.parametrize("norm_rule", lb.NORM_RULES)
def test_a_zero_vector_stays_zero(block_format, norm_rule, wht):
    restored = reconstruct(np.zeros((2, 128)), block_format, wht, norm_rule=norm_rule)
    np.testing.assert_array_equal(restored, np.zeros((2, 128)))


@pytest.mark.parametrize("shape", [(0, 128), (3, 0), (2, 0, 256)])
def test_empty_arrays_keep_their_shape(shape):
    blocks = lb.quantize(np.zeros(shape), lb.TURBO3_0)
    assert blocks.shape == (*shape[:-1], shape[-1] // 128, 50)
    assert lb.dequantize(blocks, lb.TURBO3_0).shape == shape


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: lb.pack([0.0] * 128, 1.0, lb.TURBO3_0), TypeError, "indices: got dtype float64"),
        (lambda: lb.pack([0] * 32, 1.0, lb.TURBO3_0), ValueError, r"indices: got shape \(32,\).*\[..., 128\]"),
        (lambda: lb.pack([8] + [0] * 127, 1.0, lb.TURBO3_0), ValueError, "indices: got values from 0 to 8.*0 to 7"),
        (lambda: lb.pack([-1] + [0] * 127, 1.0, lb.TURBO2_0), ValueError, "indices: got values from -1 to 0.*0 to 3"),
        (lambda: lb.pack([0] * 128, [1.0], lb.TURBO3_0), ValueError, r"norms: got shape \(1,\).*shape \(\)"),
        (lambda: lb.pack([0] * 128, np.nan, lb.TURBO3_0), ValueError, "norms: 1 of 1 values are not finite"),
        (lambda: lb.pack([0] * 128, 1e6, lb.TURBO3_0), ValueError, r"norms: got 1e\+06.*65504"),
        (lambda: lb.pack([0] * 128, "1", lb.TURBO3_0), TypeError, "norms: got dtype"),
        (lambda: lb.unpack(np.zeros(50, np.int8), lb.TURBO3_0), TypeError, "blocks: got dtype int8"),
        (lambda: lb.unpack(np.zeros(52, np.uint8), lb.TURBO3_0), ValueError, r"blocks: got shape \(52,\).*50"),
        (lambda: lb.quantize(np.zeros(100), lb.TURBO3_0), ValueError, r"x: got shape \(100,\).*multiple of 128"),
        (lambda: lb.quantize(1.0, lb.TURBO3_0), ValueError, r"x: got shape \(\)"),
        (lambda: lb.quantize([np.inf] * 128, lb.TURBO3_0), ValueError, "x: 128 of 128 values are not finite"),
        (lambda: lb.quantize([1j] * 128, lb.TURBO3_0), TypeError, "x: got dtype complex128"),
        (lambda: lb.quantize([1e5] * 128, lb.TURBO3_0), ValueError, "norms: got .*65504"),
        (lambda: lb.quantize([1e300] * 128, lb.TURBO3_0), ValueError, "norms: .* not finite"),
        (lambda: lb.quantize([0] * 128, lb.TURBO3_0, norm_rule="l2"), ValueError, "norm_rule: got 'l2'; .*'matched'"),
        (lambda: lb.quantize([0] * 128, lb.TURBO3_0, levels=[1, 2]), ValueError, "levels: got .*8 ascending"),
        (lambda: lb.quantize([0] * 128, lb.TURBO2_0, levels=[0, 1, 1, 2]), ValueError, "levels: got .*4 ascending"),
        (lambda: lb.quantize([0] * 128, lb.TURBO3_0, rotation=np.eye(64)), ValueError, r"rotation: got .*\(64, 64\)"),
        (lambda: lb.quantize([0] * 128, lb.TURBO3_0, rotation=lambda g: g[:, :1]), ValueError, "rotation: it returned"),
        (lambda: lb.dequantize(np.zeros(50, np.uint8), lb.TURBO3_0), ValueError, r"blocks: got shape \(50,\)"),
        (lambda: lb.dequantize(np.full((1, 50), 0xFF, np.uint8), lb.TURBO3_0), ValueError, "blocks: 1 of 1 norms"),
        (
            lambda: lb.dequantize(np.zeros((3, 14), np.uint8), lb.TURBO3_0_BLOCK32, inverse_rotation=np.eye(128)),
            ValueError,
            "blocks: got 3 blocks of 32 values",
        ),
        (lambda: lb.wht_rotation(96), ValueError, "head_dim: got 96"),
        (lambda: lb.init_rotation(0), ValueError, "head_dim: got 0"),
        (lambda: lb.init_rotation(4, seed=-1), ValueError, "seed: got -1"),
    ],
)
def test_an_error_names_the_argument_and_what_is_allowed(call, error, words):
    with pytest.raises(error, match=words):
        call()
