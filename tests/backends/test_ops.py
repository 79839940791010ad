"""Quantize and dequantize, the same behaviour from every backend."""

import mlx.core as mx
import numpy as np
import pytest
from support.arrays import to_numpy
from support.round_trip import check_round_trip, vectors

from mlx_turbo.backends import select
from mlx_turbo.backends.self_test import compare_quantized, random_balance
from mlx_turbo.backends.sides import PackedSide, QuantizeSide
from mlx_turbo.quant import reference
from mlx_turbo.quant.scheme import PACKED_BITS, words_per_row

HEAD_DIMS = (32, 64, 72, 80, 96, 100, 112, 128, 160, 192, 256, 512, 576)
DTYPES = (mx.float16, mx.bfloat16, mx.float32)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("bits", [(2, 3), (4, 8), (5, 6)], ids=str)
def test_keys_and_values_of_every_head_dim_and_width_agree_with_the_oracle(backend, head_dim, bits):
    x = vectors(1, 2, 5, head_dim, seed=head_dim), vectors(1, 2, 5, head_dim, seed=1)
    check_round_trip([QuantizeSide(x[0], bits[0]), QuantizeSide(x[1], bits[1])])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [72, 80, 128])
def test_every_dtype_agrees_with_the_oracle(backend, dtype, head_dim):
    x = vectors(2, 1, 3, head_dim, dtype=dtype)
    check_round_trip([QuantizeSide(x, 4)], dtype)


@pytest.mark.parametrize("head_dim", [72, 80, 128, 576])
def test_a_mean_is_taken_off_before_and_added_after(backend, head_dim):
    mean = vectors(2, 3, 1, head_dim, seed=5, scale=20)
    x = vectors(2, 3, 4, head_dim) + mean
    check_round_trip([QuantizeSide(x, 4, mean), QuantizeSide(x, 8, mean)])


@pytest.mark.parametrize("head_dim", [72, 80, 128, 576])
def test_channels_are_balanced_after_the_mean_and_turned_back_before_it(backend, head_dim):
    balance = random_balance(np.random.default_rng(head_dim), (2, 2, head_dim))
    mean = vectors(2, 2, 1, head_dim, seed=5, scale=20)
    x = vectors(2, 2, 4, head_dim) + mean
    check_round_trip([QuantizeSide(x, 4, mean, balance), QuantizeSide(x, 8, mean)])
    check_round_trip([QuantizeSide(x, 3, None, balance)])


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("first, n", [(0, 9), (3, 9), (6, 1), (131, 2)])
@pytest.mark.parametrize("head_dim", [72, 128])
def test_each_token_gets_the_mean_of_its_segment(backend, head_dim, first, n, balanced):
    """Segments of 4 tokens beside one of all, and what each piece of the tokens gets alone."""
    rng, segments = np.random.default_rng(first), (first % 4 + n + 3) // 4
    balance = random_balance(rng, (2, 3, head_dim)) if balanced else None
    means = vectors(2, 3, segments, head_dim, seed=5, scale=20)
    of_token = mx.array((first % 4 + np.arange(n)) // 4)
    x = vectors(2, 3, n, head_dim) + means[:, :, of_token]
    sides = [QuantizeSide(x, 4, means, balance, first, 4), QuantizeSide(x, 3, means[:, :, :1])]
    (codes, scale), _ = select.quantize_sides(sides)
    for at in range(n):
        side = QuantizeSide(x[:, :, at : at + 1], 4, means[:, :, of_token[at : at + 1]], balance)
        ((want, want_scale),) = select.quantize_sides([side])
        assert mx.array_equal(codes[:, :, at : at + 1], want) and mx.allclose(scale[:, :, at : at + 1], want_scale)


@pytest.mark.parametrize("scale", reference.SCALES)
@pytest.mark.parametrize("bits", [(2, 5), (3, 6), (5, 4), (6, 8)], ids=str)
@pytest.mark.parametrize("head_dim", [72, 80, 128, 576])
def test_every_scale_rule_agrees_with_the_oracle(backend, scale, bits, head_dim):
    mean = vectors(1, 2, 1, head_dim, seed=5)
    x = vectors(1, 2, 5, head_dim, seed=head_dim)
    large_and_zero = x * mx.array([1e-3, 1, 0, 30, 5])[:, None]
    check_round_trip([QuantizeSide(large_and_zero, bits[0]), QuantizeSide(x + mean, bits[1], mean)], scale=scale)


@pytest.mark.parametrize("scale", reference.SCALES)
def test_scale_rules_do_what_their_names_say(backend, scale):
    x = vectors(1, 2, 40, 128)
    codes, scales = select.quantize(x, 2, scale=scale)
    x, back = to_numpy(x), to_numpy(select.dequantize(codes, scales, 2, head_dim=128))
    norm, overlap = ((a * b).sum(-1) / (x * x).sum(-1) for a, b in ((back, back), (x, back)))
    if scale == "matched-norm":
        assert np.abs(norm - 1).max() < 2e-3
    elif scale == "inner-product":
        assert np.abs(overlap - 1).max() < 2e-3 and norm.min() > 1.05
    elif scale == "least-squares":  # what is lost is orthogonal to what is kept
        assert np.abs(overlap - norm).max() < 2e-3 and norm.max() < 0.95
    else:
        assert np.allclose(to_numpy(scales)[..., 0], np.sqrt(np.square(x).mean(-1)), rtol=1e-3)


@pytest.mark.parametrize("scale", reference.SCALES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30, 8e5])
def test_a_vector_that_is_not_finite_has_a_scale_of_nan_and_quantize_refuses_it(backend, scale, bits, bad):
    """Not infinity: times a level of the wrong sign, that would make a key weigh nothing."""
    x = np.ones((1, 1, 3, 64), np.float32)
    x[0, 0, 1, 5] = bad
    ((_, scales),) = select.quantize_sides([QuantizeSide(mx.array(x), bits)], scale=scale)
    assert np.isnan(to_numpy(scales)[0, 0, :, 0]).tolist() == [False, True, False]
    with pytest.raises(ValueError, match="^x: has NaN, infinity"):
        select.quantize(mx.array(x), bits, scale=scale)


def test_a_mean_makes_biased_vectors_as_exact_as_unbiased_ones(backend):
    mean = vectors(1, 1, 1, 128, seed=5, scale=50)
    noise = vectors(1, 1, 64, 128)
    errors = []
    for x, m in ((noise, None), (noise + mean, mean), (noise + mean, None)):
        codes, scale = select.quantize(x, 4, mean=m)
        back = select.dequantize(codes, scale, 4, head_dim=128, mean=m)
        errors.append(float(np.square(to_numpy(back - x)).mean()))
    assert errors[1] < 1.02 * errors[0] and errors[2] > 100 * errors[0]


@pytest.mark.parametrize("dims", [(512, 64), (64, 256), (128, 80), (72, 576)])
def test_keys_and_values_may_have_different_head_dims(backend, dims):
    x = [vectors(1, 2, 7, d, seed=d, dtype=mx.bfloat16) for d in dims]
    check_round_trip([QuantizeSide(x[0], 4), QuantizeSide(x[1], 4)], mx.bfloat16)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 1, 2), (1, 3, 1), (2, 1, 3), (1, 2, 17), (3, 5, 7), (1, 1, 129)], ids=str
)
@pytest.mark.parametrize("head_dim", [32, 128])
def test_any_number_of_vectors_agrees_with_the_oracle(backend, shape, head_dim):
    x = vectors(*shape, head_dim, seed=sum(shape))
    check_round_trip([QuantizeSide(x, 3), QuantizeSide(x, 3)])


def test_another_seed_is_another_rotation_with_the_same_error(backend):
    x = vectors(1, 2, 32, 64)
    (a, sa), (b, sb) = select.quantize(x, 4, seed=0), select.quantize(x, 4, seed=7)
    assert not np.array_equal(np.array(a), np.array(b))
    errors = [
        np.square(to_numpy(select.dequantize(c, s, 4, head_dim=64, seed=i) - x)).mean()
        for c, s, i in ((a, sa, 0), (b, sb, 7))
    ]
    assert abs(errors[0] / errors[1] - 1) < 0.15 and max(errors) < 0.012


def test_a_transposed_or_sliced_input_gives_the_codes_of_its_copy(backend):
    x = vectors(2, 6, 3, 192)
    for view in (
        x.transpose(0, 2, 1, 3)[..., 64:],
        x[:, 1:5, :, 32:160],
        x[:, ::2, ::2, :128],
        mx.broadcast_to(x[:1, :1, :, :128], (2, 3, 3, 128)),
    ):
        whole = mx.array(to_numpy(view))
        for got, want in zip(select.quantize(view, 4), select.quantize(whole, 4)):
            assert np.array_equal(np.array(got), np.array(want))


def test_part_of_a_capacity_buffer_is_restored_without_touching_the_rest(backend):
    x = vectors(2, 2, 12, 64)
    codes, scale = select.quantize(x, 4)
    want = to_numpy(select.dequantize(codes, scale, 4, head_dim=64))[:, :, 3:8]
    poison = mx.full((2, 2, 20, 1), float("nan"), mx.float16)
    buffers = [mx.concatenate([a, mx.zeros((2, 2, 8, a.shape[-1]), a.dtype)], axis=2) for a in (codes, scale)]
    buffers[1] = mx.where(mx.arange(20)[:, None] < 12, buffers[1], poison)
    (got,) = select.dequantize_sides([PackedSide(*buffers, 4, 64)], 3, 5, mx.float32)
    assert np.array_equal(to_numpy(got), want)


FEWER = [(a, b) for a in PACKED_BITS for b in PACKED_BITS if a > b]


def packed_rows(bits, *shape, seed=0, dead=None):
    """Random rows as the oracle packs them. dead: a vector [b, h, token] whose scale is NaN."""
    rows = reference.quantize(np.random.default_rng(seed).standard_normal(shape), bits)
    if dead is not None:
        rows.scale[dead] = np.nan
    scale = mx.array(rows.scale[..., None].astype(np.float16))
    return rows, PackedSide(mx.array(rows.packed()), scale, bits, shape[-1])


@pytest.mark.parametrize("bits, fewer", FEWER, ids=str)
@pytest.mark.parametrize("head_dim", [32, 72, 80, 128, 576])
def test_rows_get_fewer_bits_as_the_oracle_says(backend, head_dim, bits, fewer):
    rows, side = packed_rows(bits, 2, 1, 5, head_dim, seed=bits)
    codes, scale = select.requantize_side(side, fewer)
    assert codes.dtype == mx.uint32 and scale.dtype == mx.float16 and scale.shape == (2, 1, 5, 1)
    assert compare_quantized(np.array(codes), np.array(scale), reference.requantize(rows, fewer)) is None


@pytest.mark.parametrize("rule", reference.SCALES)
@pytest.mark.parametrize("bits, fewer", [(8, 3), (6, 5), (4, 2)], ids=str)
def test_rows_get_fewer_bits_by_every_scale_rule(backend, rule, bits, fewer):
    rows, side = packed_rows(bits, 1, 2, 5, 128)
    codes, scale = select.requantize_side(side, fewer, scale=rule)
    assert compare_quantized(np.array(codes), np.array(scale), reference.requantize(rows, fewer, scale=rule)) is None


@pytest.mark.parametrize("rule", reference.SCALES)
@pytest.mark.parametrize("bits, fewer", [(8, 4), (5, 2)], ids=str)
def test_fewer_bits_keep_a_scale_that_is_not_finite_and_zeros(backend, rule, bits, fewer):
    rows, side = packed_rows(bits, 1, 1, 4, 64, dead=(0, 0, 1))
    zeros = mx.array([0, 1, 0, 1])[:, None] == 0
    zero_codes, zero_scale = select.quantize_sides([QuantizeSide(mx.zeros((1, 1, 4, 64)), bits)])[0]
    side = side._replace(codes=mx.where(zeros, zero_codes, side.codes), scale=mx.where(zeros, zero_scale, side.scale))
    _, scale = select.requantize_side(side, fewer, scale=rule)
    scale = to_numpy(scale)[0, 0, :, 0]
    assert np.isnan(scale).tolist() == [False, True, False, False] and scale[0] == scale[2] == 0 < scale[3]


def test_a_scale_that_grows_beyond_float16_is_nan(backend):
    """As if the vector had been packed at the fewer bits at once."""
    _, side = packed_rows(8, 1, 1, 3, 64)
    side = side._replace(scale=mx.full((1, 1, 3, 1), 65504.0, mx.float16))
    _, scale = select.requantize_side(side, 2)
    assert np.isnan(to_numpy(scale)).all()
    _, scale = select.requantize_side(side._replace(scale=side.scale / 2), 2)
    assert np.isfinite(to_numpy(scale)).all()


def test_a_part_of_a_larger_buffer_gets_fewer_bits_like_a_copy_of_it(backend):
    _, side = packed_rows(5, 3, 4, 9, 96)
    views = [slice(None), slice(1, 3), slice(2, 7)], [slice(0, 1), slice(None, None, 2), slice(None)]
    for view in views:
        part = side._replace(codes=side.codes[tuple(view)], scale=side.scale[tuple(view)])
        copied = part._replace(codes=mx.array(np.array(part.codes)), scale=mx.array(np.array(part.scale)))
        for got, want in zip(select.requantize_side(part, 3), select.requantize_side(copied, 3)):
            assert np.array_equal(np.array(got), np.array(want))


def test_zero_vectors_come_back_as_zeros(backend):
    for bits in PACKED_BITS:
        codes, scale = select.quantize(mx.zeros((1, 1, 3, 64)), bits)
        assert not np.array(scale).any()
        assert not to_numpy(select.dequantize(codes, scale, bits, head_dim=64)).any()


@pytest.mark.parametrize("factor", [1e-12, 1e-6, 1e-3, 1e3])
def test_vectors_of_any_size_keep_their_codes(backend, factor):
    x = vectors(1, 1, 4, 64)
    codes, scale = select.quantize(x, 4)
    scaled_codes, scaled = select.quantize(x * factor, 4)
    same = np.array(codes) == np.array(scaled_codes)
    assert same.mean() > 0.98  # rounding of x * factor may move a number across a midpoint
    assert np.allclose(np.array(scaled), np.array(scale).astype(np.float32) * factor, rtol=2e-3, atol=6e-8)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e30])
def test_numbers_that_cannot_be_stored_are_an_error_that_names_the_argument(backend, bad):
    x = np.random.default_rng(0).standard_normal((1, 2, 3, 64)).astype(np.float32)
    x[0, 1, 2, 17] = bad
    with pytest.raises(ValueError, match="^x: has NaN, infinity"):
        select.quantize(mx.array(x), 4)


def test_no_vectors_give_no_codes(backend):
    codes, scale = select.quantize(mx.zeros((1, 2, 0, 128)), 3)
    assert codes.shape == (1, 2, 0, words_per_row(3, 128)) and scale.shape == (1, 2, 0, 1)
    assert select.dequantize(codes, scale, 3, head_dim=128).shape == (1, 2, 0, 128)


X = mx.zeros((1, 1, 2, 64))
C, S = mx.zeros((1, 1, 2, 8), mx.uint32), mx.zeros((1, 1, 2, 1), mx.float16)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: select.quantize(np.zeros((1, 1, 2, 64)), 4), "x: got ndarray, expected an mx.array"),
        (lambda: select.quantize(mx.zeros((2, 64)), 4), "x: got shape (2, 64), expected"),
        (lambda: select.quantize(X.astype(mx.int32), 4), "x: got mlx.core.int32, allowed are"),
        (
            lambda: select.quantize(mx.zeros((1, 1, 2, 30)), 4),
            "head_dim of x: got 30, allowed are multiples of 4 from 32",
        ),
        (lambda: select.quantize(mx.zeros((1, 1, 2, 580)), 4), "head_dim of x: got 580"),
        (lambda: select.quantize(X, 7), "bits: got 7, allowed are 2, 3, 4, 5, 6 and 8"),
        (lambda: select.quantize(X, True), "bits: got True"),
        (
            lambda: select.quantize(X, 4, mean=mx.zeros((64,))),
            "mean: got mlx.core.float32 (64,), expected float32 (1, 1, 1, 64)",
        ),
        (
            lambda: select.quantize(X, 4, scale="l2"),
            "scale: got 'l2', allowed are ('inner-product', 'least-squares', 'norm', 'matched-norm')",
        ),
        (
            lambda: select.quantize_sides([QuantizeSide(X[:, :, :0], 4)], scale=None),
            "scale: got None, allowed are ('inner-",
        ),
        (lambda: select.quantize(X, 4, backend="gpu"), "backend: got 'gpu', allowed are 'metal', 'cuda' and 'cpu'"),
        (
            lambda: select.dequantize(C, S, 3, head_dim=64),
            "codes: got mlx.core.uint32 (1, 1, 2, 8), expected uint32 [B, H, L, 6]",
        ),
        (
            lambda: select.dequantize(C, S[:, :, :1], 4, head_dim=64),
            "scale: got mlx.core.float16 (1, 1, 1, 1), expected",
        ),
        (lambda: select.dequantize(C, S, 4, head_dim=64, dtype=mx.int8), "dtype: got mlx.core.int8, allowed are"),
        (lambda: select.dequantize(C, S, 4, head_dim=64, mean=X), "mean: got mlx.core.float32 (1, 1, 2, 64), expected"),
    ],
)
def test_bad_arguments_get_an_error_that_names_them(call, message):
    with pytest.raises((ValueError, TypeError)) as e:
        call()
    assert str(e.value).startswith(message)
