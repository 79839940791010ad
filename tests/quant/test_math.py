"""Codebooks, rotations, schemes and the NumPy oracle: the paper's numbers, and properties that hold for any input."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mlx_turbo.quant import codebook, reference, rotation
from mlx_turbo.quant.scheme import PACKED_BITS, Scheme, TurboConfig, bits_per_value, words_per_row

HEAD_DIMS = (32, 64, 72, 80, 96, 100, 112, 128, 160, 192, 256, 512, 576)
head_dims = st.integers(8, 144).map(lambda n: 4 * n)
rng = np.random.default_rng(0)


# ---- codebook ------------------------------------------------------------------------------------------------
# Positive halves and mean squared errors of the Lloyd-Max quantizer of N(0, 1), as tabulated by Max (1960).
TABLES = {
    1: ([0.797885], 0.363380),
    2: ([0.452780, 1.510418], 0.117482),
    3: ([0.245094, 0.756005, 1.343909, 2.151946], 0.034548),
    4: ([0.128395, 0.388048, 0.656759, 0.942340, 1.256231, 1.618046, 2.069017, 2.732590], 0.009501),
}


@pytest.mark.parametrize("bits", TABLES)
def test_computed_lloyd_max_levels_are_the_published_ones(bits):
    levels, error = TABLES[bits]
    got = codebook.lloyd_max(bits)
    assert np.allclose(got[2 ** (bits - 1) :], levels, atol=1e-6) and np.allclose(got, -got[::-1])
    assert abs(codebook.gaussian_mse(got) - error) < 1e-6


@pytest.mark.parametrize("bits", range(1, 9))
def test_no_small_change_of_a_lloyd_max_level_lowers_the_error(bits):
    levels = codebook.lloyd_max(bits)
    best = codebook.gaussian_mse(levels)
    for i in range(0, len(levels), max(1, len(levels) // 16)):
        for step in (-1e-3, 1e-3):
            changed = levels.copy()
            changed[i] += step
            assert codebook.gaussian_mse(changed) > best


def test_the_closed_form_error_is_what_sampling_gives():
    x = rng.standard_normal(400_000)
    for levels in (codebook.lloyd_max(3), codebook.product(4)):
        sampled = np.square(x - levels[np.searchsorted(codebook.thresholds(levels), x)]).mean()
        assert abs(sampled / codebook.gaussian_mse(levels) - 1) < 0.02


@pytest.mark.parametrize("bits, excess", [(2, 0.0001), (3, 0.0026), (4, 0.0253), (5, 0.0154), (6, 0.0095)])
def test_product_levels_cost_little_over_lloyd_max_and_have_the_best_scale(bits, excess):
    levels, best = codebook.product(bits), codebook.gaussian_mse(codebook.lloyd_max(bits))
    assert np.array_equal(levels, -levels[::-1])
    assert 1 < codebook.gaussian_mse(levels) / best < 1 + excess
    assert all(codebook.gaussian_mse(levels * s) > codebook.gaussian_mse(levels) for s in (0.999, 1.001))


@pytest.mark.parametrize("bits, least", [(5, 1.09), (6, 1.19)])
def test_neither_uniform_levels_nor_a_difference_of_two_halves_would_do_at_5_and_6_bits(bits, least):
    """Why these have a polynomial. Of the difference only where the octaves begin matters, and how many there are."""
    n, best = 2**bits, codebook.gaussian_mse(codebook.lloyd_max(bits))
    shapes = [np.arange(n) - (n - 1) / 2]
    for shift in range(4, 9):
        for base in range(0x2000 - (n << shift) // 2, 0x2400 - (n << shift) // 2, 0x20):
            f = (base + (np.arange(n) << shift)).astype(np.uint16).view(np.float16).astype(np.float64)
            shapes.append(f - f[::-1])
    for levels in shapes:
        if (np.diff(levels) > 0).all():
            assert all(codebook.gaussian_mse(levels / levels[-1] * s) > least * best for s in np.arange(2.2, 4.4, 0.1))


@pytest.mark.parametrize("bits", [5, 6])
def test_no_other_constants_of_a_curve_nearby_are_better(bits, monkeypatch):
    power, k = codebook.CURVE[bits]
    base, shift, scale = codebook.PRODUCT[bits]
    best = codebook.gaussian_mse(codebook.product(bits))
    for kinks, more in ((1, 0), (-1, 0), (0, 0.25), (0, -0.25)):
        monkeypatch.setitem(codebook.PRODUCT, bits, (base + (kinks << shift), shift, scale))
        monkeypatch.setitem(codebook.CURVE, bits, (power, k + more))
        levels = codebook.product.__wrapped__(bits)
        assert all(codebook.gaussian_mse(levels / levels[-1] * s) > best for s in np.arange(2.5, 4.5, 0.02))


def test_the_levels_at_8_bits_divide_the_cells_of_those_at_6():
    """What is nearest to a level at 6 bits is so by way of 8 bits too, but for a few rare numbers far out."""
    eight, six = codebook.product(8), codebook.product(6)
    assert np.array_equal(eight, -eight[::-1]) and (np.diff(eight) > 0).all()
    in_fours = np.searchsorted(codebook.thresholds(six), eight[20:-20])
    assert np.array_equal(in_fours, np.arange(20, 236) // 4)
    assert codebook.gaussian_mse(eight) < 1.07 * codebook.gaussian_mse(codebook.lloyd_max(8))
    x = np.random.default_rng(0).standard_normal(400_000)
    by_way_of_8 = eight[np.searchsorted(codebook.thresholds(eight), x)]
    codes = [np.searchsorted(codebook.thresholds(six), y) for y in (x, by_way_of_8)]
    once, twice = (np.square(six[c] - x).mean() for c in codes)
    assert twice < 1.012 * once and (codes[0] != codes[1]).mean() < 0.01


@pytest.mark.parametrize("kink", [0x4714 - 6, 0x4714 + 6])
def test_no_other_place_of_the_octave_is_better_at_8_bits(kink, monkeypatch):
    best = codebook.gaussian_mse(codebook.product(8))
    monkeypatch.setitem(codebook.PRODUCT, 8, (kink, *codebook.PRODUCT[8][1:]))
    assert codebook.gaussian_mse(codebook.product.__wrapped__(8)) > best


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: codebook.lloyd_max(9), "bits: got 9, allowed are 1 to 8"),
        (lambda: codebook.product(7), "bits: got 7, product levels exist for (2, 3, 4, 5, 6, 8)"),
        (lambda: codebook.levels("cubic", 4), "levels: got 'cubic', allowed are"),
        (lambda: codebook.levels([0, 1, 2], 2), "levels: got an array of shape (3,), expected 4 ascending levels"),
        (lambda: codebook.levels([0, 2, 1, 3], 2), "levels: got an array of shape (4,), expected 4 ascending levels"),
    ],
)
def test_wrong_levels_get_an_error_that_names_them(call, message):
    with pytest.raises(ValueError) as e:
        call()
    assert str(e.value).startswith(message)


# ---- rotation ------------------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(head_dims, st.integers(0, 1000), st.integers(0, 2**32 - 1))
def test_a_rotation_keeps_norms_and_dot_products_and_can_be_undone(head_dim, seed, data_seed):
    x = np.random.default_rng(data_seed).standard_normal((3, head_dim))
    y = rotation.rotate(x, seed)
    assert np.allclose(y @ y.T, x @ x.T) and np.allclose(rotation.unrotate(y, seed), x)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_matrix_is_orthogonal_and_is_what_rotate_does(head_dim):
    matrix = rotation.matrix(head_dim, 3)
    assert np.allclose(matrix @ matrix.T, np.eye(head_dim))
    x = rng.standard_normal((2, head_dim))
    assert np.allclose(rotation.rotate(x, 3), x @ matrix.T)


def test_the_signs_never_change():
    """Saved caches depend on them."""
    assert "".join("-+"[int(s > 0)] for s in rotation.signs(32, 0)) == SIGNS_OF_STREAM_0
    assert abs(rotation.signs(100_000, 7).mean()) < 0.02


SIGNS_OF_STREAM_0 = "-++-+++-+-+-----+-+----+--++---+"


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("outliers", [[0], [-1], [3, -5]], ids=str)
def test_vectors_with_outlier_channels_quantize_about_as_well_as_with_a_dense_rotation(head_dim, outliers):
    x = np.random.default_rng(1).standard_normal((400, head_dim))
    x[:, outliers] *= 50
    dense = rotation.dense(head_dim, 1)
    errors = [np.square(reference.dequantize(reference.quantize(x, 4, rotation=r)) - x).sum() for r in (0, dense)]
    assert errors[0] < 1.25 * errors[1]


def test_the_dense_rotation_is_written_into_the_array_it_is_given():
    out = np.empty((64, 64))
    assert rotation.dense(64, 5, out=out) is out
    assert np.allclose(out @ out.T, np.eye(64)) and np.array_equal(out, rotation.dense(64, 5))
    with pytest.raises(ValueError, match="^out: got float32"):
        rotation.dense(64, out=np.empty((64, 64), np.float32))


def test_the_dense_rotation_is_spread_evenly_over_the_orthogonal_group():
    """Without the signs of R's diagonal the mean of the diagonal would be far from 0."""
    diagonal = np.array([np.diag(rotation.dense(16, seed)) for seed in range(400)])
    assert np.abs(diagonal.mean(0)).max() < 5 * diagonal.std() / 20


# ---- scheme --------------------------------------------------------------------------------------------------
def test_names_and_schemes_are_the_same_thing():
    for name, bits in {
        "turbo4": (4, 4),
        "turbo8v4": (8, 4),
        "turbo0v4": (0, 4),
        "turbo3": (3, 3),
        "turbo0": (0, 0),
        "turbo6v5": (6, 5),
        "turbo5": (5, 5),
    }.items():
        scheme = Scheme.parse(name)
        assert (scheme.key_bits, scheme.value_bits) == bits and scheme.name == name and Scheme.parse(scheme) is scheme
    assert Scheme.parse("turbo4v4").name == "turbo4"


@pytest.mark.parametrize(
    "name",
    [
        "turbo7",
        "turbo1v4",
        "turbo4v9",
        "turbo",
        "Turbo4",
        "turbo4v",
        "q4_0",
        "",
        "turbo4v4v4",
        "turbo44",
        "turbo04",
        None,
        4,
    ],
)
def test_an_unknown_scheme_gets_an_error_with_the_allowed_names(name):
    with pytest.raises(ValueError) as e:
        Scheme.parse(name)
    assert str(e.value).startswith(f"scheme: got {name!r}, allowed are turboN") and "'turbo8v4'" in str(e.value)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(sink=-1), "sink: got -1, allowed are whole numbers from 0"),
        (dict(recent=1.5), "recent: got 1.5"),
        (dict(block=0), "block: got 0, allowed are whole numbers from 1"),
        (dict(sink=True), "sink: got True"),
        (dict(window=3), "window: unknown option, allowed are"),
    ],
)
def test_a_wrong_option_gets_an_error_that_names_it(options, message):
    with pytest.raises(ValueError) as e:
        TurboConfig.of("turbo4", **options)
    assert str(e.value).startswith(message)


def test_stored_bits_per_value_at_head_dim_128():
    assert [bits_per_value(b, 128) for b in (4, 3, 2, 8, 5, 6)] == [4.125, 3.125, 2.125, 8.125, 5.125, 6.125]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(PACKED_BITS), head_dims, st.integers(0, 2**32 - 1))
def test_packing_is_undone_by_unpacking_and_wastes_less_than_a_word_per_plane(bits, head_dim, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (3, head_dim)).astype(np.uint8)
    words = reference.pack(codes, bits)
    assert np.array_equal(reference.unpack(words, bits, head_dim), codes)
    assert words.shape[-1] == words_per_row(bits, head_dim)
    assert 0 <= 32 * words.shape[-1] - bits * head_dim < {3: 96, 5: 80, 6: 80}.get(bits, 32)


def test_a_packed_row_looks_like_this():
    """By hand from the description in scheme.py; kernels and saved caches depend on it."""

    def row(bits, **codes):
        x = np.zeros(32, np.uint8)
        for dim, code in codes.items():
            x[int(dim[1:])] = code
        return [hex(w) for w in reference.pack(x, bits)]

    assert row(4, d0=1, d1=2, d2=3, d9=0xF) == ["0x20031", "0xf0000", "0x0", "0x0"]
    assert row(2, d0=1, d1=2, d3=3, d16=2) == ["0xe0001", "0x2"]
    assert row(8, d0=0xAB, d1=0xCD, d6=0x12)[:2] == ["0xcd00ab", "0x1200"]
    assert row(3, d0=5, d3=6, d10=7, d14=0b110, d29=5) == ["0x308005", "0x0", "0x28000087"]
    assert row(3, d15=0b101) == ["0x80000000", "0x0", "0x400000"]
    assert row(5, d0=1, d1=2, d2=3, d4=0x1F) == ["0x27c61", "0x0", "0x0", "0x0", "0x0"]
    assert row(5, d6=0b11010, d15=0b10110, d31=0b101) == ["0x8000", "0x80000000", "0x0", "0x0", "0x5060000a"]
    assert row(6, d0=1, d1=2, d2=3, d11=0x3F) == ["0x20c01", "0xfc000000", "0x0", "0x0", "0x0", "0x0"]
    assert row(6, d4=0b101110, d7=0x3F, d13=0b110111, d22=1)[:5:2] == ["0x2c0", "0x0", "0x3fc0002"]


# ---- the oracle ----------------------------------------------------------------------------------------------
def unit_vectors(n, head_dim):
    x = rng.standard_normal((n, head_dim))
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


# Table of the paper: mean squared error of unit vectors, and head_dim times the squared error of dot products with
# unit vectors. The paper prints 0.36 0.117 0.03 0.009 and 1.57 0.56 0.18 0.047; these are the unrounded values,
# pi / 2 times the mean squared error at one bit less for the second row (its 0.047 is pi / 2 times the rounded 0.03).
@pytest.mark.parametrize(
    "bits, mse, product", [(1, 0.3634, 1.571), (2, 0.1175, 0.571), (3, 0.03455, 0.1845), (4, 0.0095, 0.0543)]
)
def test_the_papers_two_rows(bits, mse, product):
    head_dim = 256
    x = unit_vectors(1500, head_dim)
    q = reference.quantize(x, bits, levels="lloyd-max", scale="norm", scale_dtype=np.float64)
    assert abs(np.square(reference.dequantize(q) - x).sum(-1).mean() / mse - 1) < 0.03
    errors, y = [], unit_vectors(200, head_dim).T
    for part in np.array_split(x, 15):
        q = reference.quantize_product(part, bits, projection=rng.standard_normal((head_dim, head_dim)))
        errors.append(reference.dequantize_product(q) @ y - part @ y)
    errors = np.concatenate(errors)
    assert abs(head_dim * np.square(errors).mean() / product - 1) < 0.04
    assert abs(errors.mean()) < 4 * errors.std() / np.sqrt(15 * 200)  # unbiased


@pytest.mark.parametrize("bits, mse", [(2, 0.1175), (3, 0.0346), (4, 0.0095), (5, 0.00254), (6, 0.000655), (8, 9e-5)])
def test_the_product_is_no_worse_than_the_papers_quantizer(bits, mse):
    x = unit_vectors(3000, 128)
    assert (
        np.square(reference.dequantize(reference.quantize(x, bits, scale="least-squares")) - x).sum(-1).mean()
        < 1.005 * mse
    )


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(PACKED_BITS), hnp.arrays(np.float64, (2, 64), elements=st.floats(-1e4, 1e4, width=32)))
def test_each_scale_rule_keeps_what_its_name_says(bits, x):
    errors = {}
    for scale in reference.SCALES:
        q = reference.quantize(x, bits, scale=scale, scale_dtype=np.float64)
        back = reference.dequantize(q)
        errors[scale] = np.square(back - x).sum(-1)
        if scale == "matched-norm":
            kept = np.linalg.norm(back, axis=-1)
            norms = np.linalg.norm(x, axis=-1)
            assert np.allclose(kept, norms) or bits == 8  # codes of 8 bits can all be the level 0
        if scale == "inner-product":
            assert np.allclose((back * x).sum(-1), np.square(x).sum(-1)) or bits == 8
    for scale in reference.SCALES:
        assert (errors["least-squares"] <= errors[scale] * (1 + 1e-9) + 1e-24 * np.square(x).sum(-1)).all()


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(PACKED_BITS), st.integers(0, 2**32 - 1), st.integers(-8, 8))
def test_codes_do_not_depend_on_the_size_of_a_vector_and_the_scale_is_proportional(bits, seed, power):
    x = np.random.default_rng(seed).standard_normal((4, 96))
    a, b = (reference.quantize(x * f, bits, scale_dtype=np.float64) for f in (1, 2.0**power))
    assert np.array_equal(a.codes, b.codes) and np.allclose(a.scale * 2.0**power, b.scale)


@pytest.mark.parametrize("rotated_by", [0, 5, None, "dense"])
def test_rotation_levels_and_mean_are_options_of_both_directions(rotated_by):
    x, mean = rng.standard_normal((50, 64)) + 30, np.full(64, 30.0)
    r = rotation.dense(64) if rotated_by == "dense" else rotated_by
    for levels in ("product", "lloyd-max", codebook.lloyd_max(4)):
        q = reference.quantize(x, bits=4, rotation=r, levels=levels, mean=mean)
        back = reference.dequantize(q)
        assert np.square(back - x).mean() < 0.011
        assert np.array_equal(reference.dequantize(q, rotation=r, levels=levels, mean=mean), back)
        assert np.allclose(reference.dequantize(q, mean=None) + mean, back)
        still = reference.dequantize(q, rotation=None, mean=None)
        assert np.allclose(np.linalg.norm(still, axis=-1), np.linalg.norm(back - mean, axis=-1))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: reference.quantize(x * np.nan), "x: has NaN or infinity"),
        (lambda x: reference.quantize(1.0), "x: got shape ()"),
        (lambda x: reference.quantize(x, 9), "bits: got 9, allowed are 1 to 8"),
        (lambda x: reference.quantize(x, scale="max"), "scale: got 'max', allowed are"),
        (
            lambda x: reference.quantize(x, rotation=np.eye(3)),
            "rotation: got shape (3, 3), expected (32, 32), a seed or None",
        ),
        (lambda x: reference.quantize(x * 1e30), "x: a vector's scale is beyond float16"),
        (lambda x: reference.quantize(x[:, :30]), "head_dim: got 30, allowed are multiples of 4 from 32 to 576"),
    ],
)
def test_bad_arguments_of_the_oracle_get_an_error_that_names_them(call, message):
    with pytest.raises(ValueError) as e:
        call(np.ones((2, 32)))
    assert str(e.value).startswith(message)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_attention_over_a_packed_cache_is_attention_over_what_it_restores():
    q = rng.standard_normal((2, 6, 3, 32))
    k, v = rng.standard_normal((2, 2, 11, 32)), rng.standard_normal((2, 2, 11, 64))
    packed = reference.quantize(k, 4), reference.quantize(v, 4)
    got = reference.attention(q, *packed, scale=0.2, mask="causal")
    restored = [np.repeat(reference.dequantize(p), 3, axis=1) for p in packed]
    logits = 0.2 * np.einsum("bhld,bhnd->bhln", q, restored[0])
    logits[..., np.arange(11) > np.arange(8, 11)[:, None]] = -np.inf
    assert np.allclose(got, softmax(logits) @ restored[1])


def test_masks_and_sinks_take_weight_as_defined():
    q, k, v = rng.standard_normal((1, 2, 2, 32)), rng.standard_normal((1, 2, 5, 32)), rng.standard_normal((1, 2, 5, 32))
    keep = rng.random((1, 2, 2, 5)) < 0.6
    keep[..., 0] = True
    boolean = reference.attention(q, k, v, scale=1, mask=keep)
    assert np.allclose(boolean, reference.attention(q, k, v, scale=1, mask=np.where(keep, 0.0, -1e300)))
    sink = np.array([0.3, -2.0])
    with_sink = np.concatenate([k, np.zeros((1, 2, 1, 32))], 2), np.concatenate([v, np.zeros((1, 2, 1, 32))], 2)
    bias = np.concatenate([np.zeros((1, 2, 2, 5)), np.broadcast_to(sink[:, None, None], (1, 2, 2, 1))], -1)
    assert np.allclose(
        reference.attention(q, k, v, scale=1, sinks=sink), reference.attention(q, *with_sink, scale=1, mask=bias)
    )
    assert not reference.attention(q, k, v, scale=1, mask=np.zeros((2, 5), bool)).any()


def test_adding_a_mean_to_all_keys_changes_no_weight_and_one_to_all_values_comes_through():
    q, k, v = (rng.standard_normal((1, 1, 4, 32)) for _ in range(3))
    mean = 10 * rng.standard_normal(32)
    out = reference.attention(q, k, v, scale=1)
    assert np.allclose(reference.attention(q, k + mean, v + mean, scale=1), out + mean)


# ---- imports -------------------------------------------------------------------------------------------------
def test_the_oracle_does_not_load_mlx():
    """Loaded as plain files: the package itself imports MLX."""
    code = (
        "import sys, types; p = types.ModuleType('mlx_turbo'); p.__path__ = [sys.argv[1]]; "
        "sys.modules['mlx_turbo'] = p; import mlx_turbo.quant.reference; "
        "assert not [m for m in sys.modules if m == 'mlx' or m.startswith('mlx.')]"
    )
    subprocess.run([sys.executable, "-c", code, reference.__file__.rsplit("/", 2)[0]], check=True)


def test_importing_the_package_is_fast_and_does_not_load_mlx_lm():
    code = (
        "import time; t = time.process_time(); import mlx_turbo; t = time.process_time() - t; import sys; "
        "assert 'mlx_lm' not in sys.modules and 'transformers' not in sys.modules; print(t)"
    )
    times = [
        float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
        for _ in range(3)
    ]
    assert min(times) < 0.5
