"""The Metal kernels in the simulator: what they touch, how often, in which order, and what it costs."""

import metalsim
import mlx.core as mx
import numpy as np
import pytest
from support.ceilings import DEQUANTIZE_CEILING, QUANTIZE_CEILING, REQUANTIZE_CEILING
from support.round_trip import check_round_trip, vectors

from mlx_turbo.backends import attend_launch, select
from mlx_turbo.backends.self_test import compare_quantized, packed_side
from mlx_turbo.backends.sides import PackedSide, QuantizeSide
from mlx_turbo.quant import reference, rotation

# (head_dim, vectors): one lane group, several, partly filled simdgroups; whole, cut and idle lanes; both roundings
SHAPES = [(32, 33), (72, 5), (80, 9), (100, 3), (128, 1), (128, 13), (512, 3), (576, 2)]


def quantized(head_dim, n, bits=4, **options):
    x = vectors(1, 1, n, head_dim, dtype=mx.float16)
    ((codes, scale),) = select.quantize_sides([QuantizeSide(x, bits)], **options)
    return PackedSide(codes, scale, bits, head_dim)


@pytest.mark.parametrize("order", ["reversed", "random"])
@pytest.mark.parametrize("head_dim, n", SHAPES)
def test_the_order_of_threads_does_not_matter(simulated, order, head_dim, n):
    x = vectors(1, 1, n, head_dim)
    with metalsim.configured(order=order, seed=n):
        check_round_trip([QuantizeSide(x, 3), QuantizeSide(x, 4)])


@pytest.mark.parametrize(
    "bits, head_dim, n",
    [(b, *s) for b in (2, 3, 4, 8) for s in SHAPES] + [(b, *s) for b in (5, 6) for s in ((72, 5), (80, 9), (576, 2))],
)
def test_every_byte_is_written_once_and_every_byte_read_once(simulated, head_dim, n, bits):
    side = quantized(head_dim, n, bits)
    stats = metalsim.last()
    in_kernel = attend_launch.rotates_in_kernel(head_dim)
    assert set(stats.writes["codes0"]) == {1} and set(stats.writes["scale0"]) == {1}
    assert set(stats.reads["x0"]) == {1}
    assert stats.threadgroup_size == 0 and stats.barriers == 0
    assert all(not stats.reads.get(name, np.zeros(1)).any() for name in ("x1", "shift0", "codes0", "scale0"))
    select.dequantize_sides([side], 0, n, mx.bfloat16 if in_kernel else mx.float32)
    stats = metalsim.last()
    assert set(stats.writes["x0"]) == {1} and set(stats.reads["codes0"]) == {1}
    lanes = 32 // attend_launch.vectors_per_simdgroup(head_dim)
    assert set(stats.reads["scale0"]) == {lanes}  # each lane of a vector reads its scale


@pytest.mark.parametrize("order", ["natural", "reversed", "random"])
@pytest.mark.parametrize("bits, fewer", [(8, 6), (8, 2), (6, 4), (5, 3), (4, 3)], ids=str)
@pytest.mark.parametrize("head_dim, n", SHAPES)
def test_fewer_bits_in_any_order_of_threads(simulated, head_dim, n, bits, fewer, order):
    """And every byte is read once, and written once."""
    rows = reference.quantize(np.random.default_rng(n).standard_normal((1, 1, n, head_dim)), bits)
    with metalsim.configured(order=order, seed=n):
        codes, scale = select.requantize_side(packed_side(rows), fewer)
    stats = metalsim.last()
    assert compare_quantized(np.array(codes), np.array(scale), reference.requantize(rows, fewer)) is None
    assert set(stats.writes["new_codes"]) == set(stats.writes["new_scale"]) == set(stats.reads["codes"]) == {1}
    assert set(stats.reads["scale"]) == {32 // attend_launch.vectors_per_simdgroup(head_dim)}
    assert stats.threadgroup_size == 0 and stats.barriers == 0


def test_one_launch_reads_and_writes_both_sides_of_different_head_dims(simulated):
    x = vectors(1, 2, 5, 512, dtype=mx.float16), vectors(1, 2, 5, 64, dtype=mx.float16)
    packed = select.quantize_sides([QuantizeSide(x[0], 8), QuantizeSide(x[1], 4)])
    stats = metalsim.last()
    for name in ("codes0", "codes1", "scale0", "scale1"):
        assert set(stats.writes[name]) == {1}, name
    assert set(stats.reads["x0"]) == set(stats.reads["x1"]) == {1}
    sides = [PackedSide(*packed[0], 8, 512), PackedSide(*packed[1], 4, 64)]
    select.dequantize_sides(sides, 0, 5, mx.float16)
    stats = metalsim.last()
    assert all(set(stats.reads[f"codes{i}"]) == {1} and set(stats.writes[f"x{i}"]) == {1} for i in (0, 1))


def test_only_the_tokens_asked_for_are_read_from_a_capacity_buffer(simulated):
    side = quantized(64, 12)
    select.dequantize_sides([side], 3, 5, mx.float16)
    reads = metalsim.last().reads["codes0"].reshape(12, -1)
    assert (reads[3:8] == 1).all() and not reads[:3].any() and not reads[8:].any()


def test_lengths_are_data_the_text_of_the_kernel_stays_the_same(simulated, generated_texts):
    for n in (8, 9, 40):
        quantized(128, n)
    assert len(generated_texts) == 1
    for first, n in ((0, 8), (3, 17), (1, 39)):
        select.dequantize_sides([quantized(128, 40)], first, n, mx.float16)
    assert len(generated_texts) == 2
    for n in (8, 9, 40):
        select.requantize_side(quantized(128, n), 3)
    assert len(generated_texts) == 3


def counted(run, n_values):
    run()
    stats = metalsim.last()
    return sum(stats.ops.values()) / n_values


@pytest.mark.parametrize("head_dim, bits", list(QUANTIZE_CEILING), ids=str)
def test_operations_per_value_stay_below_their_ceiling(simulated, head_dim, bits):
    n = 64
    assert counted(lambda: quantized(head_dim, n, bits), n * head_dim) <= QUANTIZE_CEILING[head_dim, bits]
    side = quantized(head_dim, n, bits)
    dequantize = counted(lambda: select.dequantize_sides([side], 0, n, mx.float16), n * head_dim)
    assert dequantize <= DEQUANTIZE_CEILING[head_dim, bits]


@pytest.mark.parametrize("head_dim, bits, fewer", list(REQUANTIZE_CEILING), ids=str)
def test_operations_of_fewer_bits_stay_below_their_ceiling(simulated, head_dim, bits, fewer):
    side, n = quantized(head_dim, 64, bits), 64 * head_dim
    assert counted(lambda: select.requantize_side(side, fewer), n) <= REQUANTIZE_CEILING[head_dim, bits, fewer]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_another_scale_rule_costs_no_more_than_least_squares(simulated, bits):
    cost = {scale: counted(lambda: quantized(128, 64, bits, scale=scale), 64 * 128) for scale in reference.SCALES}
    assert cost["norm"] < cost["matched-norm"] < cost["least-squares"]


def test_the_kernel_transforms_every_head_dim_that_is_a_multiple_of_16_up_to_512_and_576():
    inside = [d for d in range(32, 577, 4) if attend_launch.rotates_in_kernel(d)]
    assert inside == [*range(32, 513, 16), 544, 576]
    assert all(sum(size for _, size in rotation.windows(d)) >= d for d in inside)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32], ids=str)
@pytest.mark.parametrize("mean", [False, True], ids=["no mean", "mean"])
@pytest.mark.parametrize("head_dim", [32, 64, 72, 80, 96, 112, 128, 160, 192, 256, 512, 576])
def test_every_combination_agrees_with_the_oracle_in_every_order(simulated, head_dim, mean, dtype):
    for i, bits in enumerate([(2, 2), (3, 3), (4, 4), (8, 8), (5, 6)]):
        x = vectors(2, 2, 3, head_dim, dtype=dtype, seed=i)
        m = vectors(2, 2, 1, head_dim, seed=9) if mean else None
        with metalsim.configured(order=["natural", "reversed", "random"][i % 3], seed=i):
            check_round_trip([QuantizeSide(x, bits[0], m), QuantizeSide(x, bits[1], m)], dtype)
