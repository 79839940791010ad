"""The three ways to attend: which one serves a call, that all agree with the oracle, and what they hold in memory."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.arrays import to_numpy
from support.attend_cases import expected, make_case
from support.backends import BACKENDS
from support.tolerances import TOLERANCE

from mlx_turbo.backends import attend, select
from mlx_turbo.backends.attend import attend_sides
from mlx_turbo.backends.restore import restore
from mlx_turbo.backends.self_test import RESTORED

BITS = [(4, 4), (3, 2), (8, 0), (0, 4)]


@pytest.fixture(params=[name for name in BACKENDS if name != "oracle"])
def backend(request):
    with select.use_backend(BACKENDS[request.param]) as chosen:
        yield chosen


def attended(case, mask=None, sinks=None, **options):
    out = attend_sides(
        case.queries, case.keys, case.values, case.counts, scale=case.scale, mask=mask, sinks=sinks, **options
    )
    assert out.dtype == case.queries.dtype
    return to_numpy(out)


@pytest.mark.parametrize("chosen", BACKENDS.values(), ids=list(BACKENDS))
def test_restored_tokens_are_those_of_the_oracle(chosen):
    """Also latents, a head_dim that the kernel does not rotate, exact sides, keys and values of two dtypes, evicted
    tokens, and packed ones that are at hand."""

    @settings(max_examples=30, deadline=None, derandomize=True, database=None)
    @given(st.data())
    def check(data):
        pick = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
        dtypes = pick((mx.float32, mx.float32), (mx.float16, mx.float16), (mx.float16, mx.float32))
        bits, dims = pick(*BITS), pick((64, 96), (512, 64), (72, 64))
        counts = pick((4, 150, 33), (0, 257, 0), (3, 140, 5), (2, 0, 7))
        first = pick(0, 9) if counts[1] else 0
        options = dict(means=pick(False, True), balanced=pick(False, True), B=pick(1, 2))
        cases = [make_case(bits, dims, counts, G=1, Hkv=2, dtype=dtype, **options) for dtype in set(dtypes)]
        of = {case.queries.dtype: case for case in cases}
        sides = [of[dtypes[0]].keys, of[dtypes[1]].values]
        wanted = [of[dtypes[0]].restored[0], of[dtypes[1]].restored[1]]
        packed, wait = None, pick(False, True)
        if counts[1] and pick(False, True):
            packed = restore(*sides, (0, counts[1], 0), chosen)
        restored = restore(*sides, counts, chosen, first=first, packed=packed, wait=wait)
        for side, got, want in zip(sides, restored, wanted):
            dtype = side.exact_dtype(mx.float32)
            want = np.delete(want, np.s_[counts[0] : counts[0] + first], axis=2)
            assert got.dtype == dtype and got.shape == want.shape
            if not side.bits or not counts[1]:
                assert np.array_equal(to_numpy(got), want)
            assert np.abs(to_numpy(got) - want).max() <= TOLERANCE[dtype] * np.abs(want).max()

    check()


@pytest.mark.parametrize("means", [False, True])
@pytest.mark.parametrize("L", [1, 17])
def test_queries_are_divided_by_the_factors_of_their_own_row_and_head(L, means):
    case = make_case((4, 4), (64, 64), G=2, Hkv=2, B=2, L=L, balanced=True, means=means)
    want = expected(case, "causal")
    for most in (1 << 30, 0):  # restored, in tiles
        with pytest.MonkeyPatch.context() as patch, select.use_backend("cpu"):
            patch.setattr(attend, "MAX_RESTORED_BYTES", most)
            assert np.abs(attended(case, "causal", None) - want).max() <= RESTORED[mx.float32] * np.abs(want).max()


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_a_prompt_chunk_agrees_with_the_oracle_restored_and_in_tiles(data):
    pick = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    dtype, L = pick(*RESTORED), pick(17, 40)
    counts = pick(0, 4), pick(60, 150, 300), pick(40, 64)
    case = make_case(
        pick(*BITS),
        pick((64, 64), (96, 64)),
        counts,
        G=pick(1, 3),
        Hkv=2,
        B=pick(1, 2),
        L=L,
        dtype=dtype,
        means=pick(True, False),
        balanced=pick(True, False),
    )
    B, heads, n = case.queries.shape[0], case.queries.shape[1], sum(counts)
    rng = np.random.default_rng(0)
    some = rng.random((B, 1, L, n)) < 0.7
    some[..., 0] = True
    added = mx.array(rng.standard_normal((1, heads, L, n)).astype(np.float32)).astype(dtype)
    mask = {"none": None, "causal": "causal", "boolean": mx.array(some), "additive": added}[
        pick("none", "causal", "boolean", "additive")
    ]
    sinks = mx.array(rng.standard_normal(heads).astype(np.float32)) if pick(True, False) else None
    want = expected(case, mask, sinks)
    for most in (1 << 30, 0):
        with pytest.MonkeyPatch.context() as patch, select.use_backend("cpu"):
            patch.setattr(attend, "MAX_RESTORED_BYTES", most)
            assert np.abs(attended(case, mask, sinks) - want).max() <= RESTORED[dtype] * np.abs(want).max()


def test_evicted_tokens_are_left_out_and_the_mask_knows_nothing_of_them(backend):
    case = make_case((4, 4), (64, 64), (4, 150, 40), G=2, L=30)
    keep = np.r_[:4, 13:194]
    mask = np.random.default_rng(0).random((1, 1, 30, 185)) < 0.8
    for given_mask in (None, "causal", mx.array(mask)):
        shorter = case._replace(counts=(4, 141, 40), restored=tuple(x[:, :, keep] for x in case.restored))
        want = expected(shorter, given_mask)
        assert np.abs(attended(case, given_mask, n_evicted=9) - want).max() <= 2e-5 * np.abs(want).max()


def test_a_past_beyond_the_limit_goes_tile_by_tile(backend, monkeypatch):
    case = make_case((4, 4), (64, 64), (4, 150, 40), G=2, L=30)  # 194 tokens * 2 sides * 64 dims * 4 bytes = 99,328
    called = []
    monkeypatch.setattr(attend, "tiled_attention", lambda *args, **options: called.append(1) or case.queries)
    for most, tiles in ((99_328, 0), (99_327, 1)):
        monkeypatch.setenv("MLX_TURBO_MAX_RESTORED_BYTES", str(most))
        attended(case)
        assert len(called) == tiles
    monkeypatch.setenv("MLX_TURBO_MAX_RESTORED_BYTES", "1GB")
    with pytest.raises(ValueError, match="MLX_TURBO_MAX_RESTORED_BYTES: got '1GB', expected a number of bytes"):
        attended(case)


def test_few_query_tokens_are_fused_where_there_is_a_kernel(simulated, monkeypatch):
    monkeypatch.setattr(attend, "restore", None)
    monkeypatch.setattr(attend, "tiled_attention", None)
    for L in (1, 16):
        attended(make_case((4, 4), (64, 64), (4, 70, 40), G=2, L=L))
    with pytest.raises(TypeError):
        attended(make_case((4, 4), (64, 64), (4, 70, 40), G=2, L=17))


def test_a_layers_past_is_restored_when_its_own_queries_are_there(monkeypatch):
    """Several layers in one evaluation: what six hold is what two hold, one being restored while the other is read."""
    with select.use_backend("cpu"):
        cases = [make_case((4, 4), (64, 64), (4, 4096, 40), G=1, L=32, rng_seed=i) for i in range(6)]
        mx.eval([a for c in cases for side in (c.keys, c.values) for a in side if isinstance(a, mx.array)])

        def peak(n_layers):
            mx.synchronize()
            held = mx.get_active_memory()
            mx.reset_peak_memory()
            x = cases[0].queries
            for case in cases[:n_layers]:
                x = attend_sides(x + 0 * case.queries, case.keys, case.values, case.counts, scale=case.scale)
            mx.eval(x)
            return mx.get_peak_memory() - held

        past = 2 * 4140 * 64 * 4
        assert peak(6) <= peak(2) + past / 2
        monkeypatch.setattr(attend, "_behind", lambda queries, side: side)
        assert peak(6) > peak(2) + past / 2


def test_a_long_past_waits_for_the_layer_before_the_last_one(backend, monkeypatch):
    """A failed layer of another call is not this call's error, and a function that is transformed waits for nothing."""
    case, begun, waited = make_case((4, 4), (64, 64), (4, 150, 40), G=2, L=20), attend._layers.begun, []
    short = attended(case)
    assert not begun
    monkeypatch.setattr(attend, "LONG_PAST_BYTES", 0)
    evaluate = mx.eval

    def fails(*arrays):
        waited.append(len(begun))
        evaluate(*arrays)
        raise RuntimeError("of another request")

    for n in (1, 2, 2, 2):
        with monkeypatch.context() as patched:
            patched.setattr(mx, "eval", fails)
            out = attend_sides(case.queries, case.keys, case.values, case.counts, scale=case.scale)
        assert len(begun) == n == attend.LAYERS_AT_ONCE - (n == 1) and np.array_equal(to_numpy(out), short)
    assert waited == [1, 1]
    evaluate(mx.compile(lambda x: attend._begin(x) or 2 * x)(case.queries))
    assert len(begun) == 2
    begun.clear()
