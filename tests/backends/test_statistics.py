"""Sums and energy of segments: the same behaviour from every backend, and what the kernel reads."""

import metalsim
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.arrays import to_numpy
from support.ceilings import STATISTICS_CEILING
from support.strategies import quick

from mlx_turbo.backends import select, statistics
from mlx_turbo.backends.self_test import compare_statistics
from mlx_turbo.backends.sides import ONE_SEGMENT
from mlx_turbo.quant import reference
from mlx_turbo.quant.scheme import LARGEST

DTYPES = mx.float16, mx.bfloat16, mx.float32
BAD = {mx.float16: [np.nan, np.inf, -np.inf], mx.bfloat16: [np.nan, 1e30], mx.float32: [np.nan, -np.inf, 1e30, 6e5]}


def drawn(rng, shape, dtype, bad=0.0, layout="a copy"):
    """Vectors with a mean, a share `bad` of them with a number that cannot be packed; as a model or a cache hands them
    over."""
    B, H, L, D = shape
    x = rng.standard_normal(shape).astype(np.float32) + rng.standard_normal((B, H, 1, D))
    for at in np.argwhere(rng.random((B, H, L)) < bad):
        x[(*at, rng.integers(D))] = rng.choice(BAD[dtype])
    x = mx.array(x.astype(np.float32)).astype(dtype)
    if layout == "transposed":  # from a projection
        return mx.contiguous(x.swapaxes(1, 2)).swapaxes(1, 2)
    if layout == "part of a buffer":
        room = mx.full((B, H, 3, D), mx.nan, dtype)
        return mx.contiguous(mx.concatenate([room, x, room], axis=2))[:, :, 3 : 3 + L]
    if layout == "every other dim":
        return mx.contiguous(mx.repeat(x, 2, axis=3))[..., ::2]
    return x


LAYOUTS = "a copy", "transposed", "part of a buffer", "every other dim"


@quick
@given(
    seed=st.integers(0, 1000),
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    n_tokens=st.one_of(st.integers(1, 9), st.integers(100, 300)),
    head_dim=st.sampled_from([32, 36, 64, 72, 80, 96, 128, 192, 256, 512, 576]),
    first=st.integers(0, 300),
    segment=st.one_of(st.integers(1, 128), st.just(128), st.just(ONE_SEGMENT)),
    dtype=st.sampled_from(DTYPES),
    bad=st.sampled_from([0, 0.1, 1]),
    layout=st.sampled_from(LAYOUTS),
)
def test_sums_and_energy_are_those_of_the_oracle(
    backend, seed, batch, heads, n_tokens, head_dim, first, segment, dtype, bad, layout
):
    x = drawn(np.random.default_rng(seed), (batch, heads, n_tokens, head_dim), dtype, bad, layout)
    sums, energy = select.statistics(x, first, segment)
    assert sums.dtype == energy.dtype == mx.float32
    problem, _ = compare_statistics(to_numpy(sums), to_numpy(energy), to_numpy(x), first, segment)
    assert problem is None


@quick
@given(
    seed=st.integers(0, 1000),
    n_tokens=st.integers(1, 300),
    head_dim=st.sampled_from([32, 80, 128]),
    first=st.integers(0, 200),
    segment=st.sampled_from([8, 128, ONE_SEGMENT]),
    layout=st.sampled_from(LAYOUTS),
)
def test_a_row_alone_and_in_a_batch_has_the_same_to_the_bit(backend, seed, n_tokens, head_dim, first, segment, layout):
    x = drawn(np.random.default_rng(seed), (3, 2, n_tokens, head_dim), mx.float16, 0.02, layout)
    together = select.statistics(x, first, segment)
    for b in range(3):
        for all_rows, alone in zip(together, select.statistics(x[b : b + 1], first, segment)):
            np.testing.assert_array_equal(to_numpy(all_rows)[b], to_numpy(alone)[0])


def test_long_chunks_are_summed_exactly_enough(backend):
    rng = np.random.default_rng(0)
    x = drawn(rng, (1, 1, 5000, 64), mx.float16, layout="transposed")
    for segment in (128, ONE_SEGMENT):
        sums, energy = select.statistics(x, 0, segment)
        assert compare_statistics(to_numpy(sums), to_numpy(energy), to_numpy(x), 0, segment)[0] is None


@pytest.mark.parametrize("factor, counts", [(0.9999, True), (1.0001, False)])
def test_vectors_count_up_to_the_largest_root_mean_square(backend, factor, counts):
    size = factor * LARGEST
    spread, one = np.full(128, size), np.zeros(128)
    one[77] = size * np.sqrt(128)
    for vector in (spread, one):
        x = mx.array(np.stack([vector, np.ones(128)]), mx.float32)[None, None]
        sums, energy = select.statistics(x, 0, 128)
        np.testing.assert_allclose(to_numpy(sums)[0, 0, 0], vector * counts + 1, rtol=1e-6)
        np.testing.assert_allclose(energy.item(), 128 * size**2 * counts + 128, rtol=1e-6)


def test_the_limit_is_where_a_vector_can_no_longer_be_packed(backend):
    """The scale rule "norm" has the root mean square as its scale."""
    for factor, packs in ((0.9999, True), (1.001, False)):
        x = mx.full((1, 1, 1, 64), factor * LARGEST)
        ((_, scale),) = select.quantize_sides([select.QuantizeSide(x, 4)], scale="norm")
        assert mx.isfinite(scale).item() == packs
        assert bool(select.statistics(x, 0, 128)[1].item()) == packs


def test_no_tokens_have_no_segments_and_no_energy(backend):
    for shape, n_segments in (((2, 3, 0, 64), 0), ((0, 3, 5, 64), 1)):
        sums, energy = select.statistics(mx.zeros(shape), 0, 128)
        assert sums.shape == (*shape[:2], n_segments, 64) and energy.shape == (*shape[:2], 1, 1)
        assert not energy.size or not energy.any()


def test_a_long_segment_that_is_not_the_only_one_is_refused():
    x = mx.zeros((1, 1, 300, 64))
    select.statistics(x, 0, 300)
    with pytest.raises(ValueError, match="segment: got 256, allowed are 1 to 128, or more if they hold all tokens"):
        select.statistics(x, 0, 256)
    with pytest.raises(ValueError, match="segment: got 300"):
        select.statistics(x, 1, 300)


@given(first=st.integers(0, 500), n=st.integers(0, 500), segment=st.one_of(st.integers(1, 130), st.just(ONE_SEGMENT)))
def test_lengths_are_those_of_the_segments(first, n, segment):
    places = (first + np.arange(n)) // segment
    assert list(statistics.lengths(first, n, segment)) == np.unique(places, return_counts=True)[1].tolist()


# ---- the fallback ----------------------------------------------------------------------------------------------
def test_the_fallback_makes_no_float32_copy_of_a_prompt_chunk():
    x = mx.zeros((1, 8, 16384, 128), mx.float16)
    mx.eval(x)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    with select.use_backend("cpu"):
        mx.eval(select.statistics(x, 0, 128), select.statistics(x, 0, ONE_SEGMENT))
    assert mx.get_peak_memory() - before < 0.6 * x.nbytes  # a float32 copy has twice the bytes of x


# ---- the kernel in the simulator -------------------------------------------------------------------------------
@pytest.mark.parametrize("order", ["reversed", "random"])
@pytest.mark.parametrize("head_dim, segment", [(32, 128), (72, 20), (128, 128), (256, ONE_SEGMENT), (576, 128)])
def test_the_order_of_threads_does_not_matter(simulated, order, head_dim, segment):
    x = drawn(np.random.default_rng(0), (1, 2, 150, head_dim), mx.float16, 0.05)
    want = select.statistics(x, 17, segment)
    with metalsim.configured(order=order, seed=head_dim):
        for a, b in zip(want, select.statistics(x, 17, segment)):
            np.testing.assert_array_equal(to_numpy(a), to_numpy(b))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("head_dim", [32, 64, 72, 128, 512, 576])
@pytest.mark.parametrize("first, segment", [(0, 128), (100, 128), (3, 8), (5, ONE_SEGMENT)])
def test_every_number_is_read_once_where_it_lies_and_every_result_written_once(
    simulated, head_dim, first, segment, layout
):
    x = drawn(np.random.default_rng(0), (1, 2, 150, head_dim), mx.float16, layout=layout)
    n_bytes = 2 * x.size
    mx.eval(x)
    select.statistics(x, 0, 128)  # tested at first use
    select.statistics(x, first, segment)
    stats = metalsim.last()
    assert set(stats.writes["sums"]) == set(stats.writes["energy"]) == {1}
    assert set(stats.reads["x"]) <= {0, 1} and stats.reads["x"].sum() == n_bytes
    assert stats.barriers == stats.writes["energy"].size // 4


@pytest.mark.parametrize("head_dim", STATISTICS_CEILING)
def test_operations_per_value_stay_below_their_ceiling(simulated, head_dim):
    x = drawn(np.random.default_rng(0), (1, 1, 512, head_dim), mx.float16, layout="transposed")
    select.statistics(x, 0, 128)
    select.statistics(x, 0, 128)
    assert sum(metalsim.last().ops.values()) / x.size <= STATISTICS_CEILING[head_dim]


def test_another_length_or_segment_is_no_other_kernel(simulated, generated_texts):
    for n, first, segment in ((10, 0, 128), (300, 7, 128), (300, 7, 8), (300, 7, ONE_SEGMENT)):
        select.statistics(mx.ones((1, 2, n, 96), mx.bfloat16), first, segment)
    assert len(generated_texts) == 1


# ---- that the comparison sees what it is for -------------------------------------------------------------------
@pytest.mark.parametrize("fault", ["one token less", "sums of another segment", "a bad vector", "NaN"])
def test_a_fault_is_seen(fault):
    x = np.random.default_rng(0).standard_normal((1, 2, 300, 64))
    sums, energy = reference.statistics(x, 5, 128)
    assert compare_statistics(sums, energy, x, 5, 128)[0] is None
    if fault == "one token less":
        sums, energy = reference.statistics(np.where(np.arange(300)[:, None] == 150, 0, x), 5, 128)
    elif fault == "sums of another segment":
        sums = sums[:, :, ::-1]
    elif fault == "a bad vector":
        x[0, 1, 7, 3] = np.inf
    else:
        sums = sums * np.nan
    assert compare_statistics(sums, energy, x, 5, 128)[0] is not None
