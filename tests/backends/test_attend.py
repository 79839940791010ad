"""The attention kernels against the float64 oracle: results, what they touch, and what they cost. They run in the
simulator or, where there is CUDA, on the GPU, which says nothing of the last two."""

import itertools
import re

import metalsim
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from support.arrays import to_numpy
from support.attend_cases import check_spoiled, expected, make_case, make_latents
from support.backends import BACKENDS, new_kernels

from mlx_turbo.backends import attend_launch, kernel_backend, sources, tuning
from mlx_turbo.backends.attend_launch import AttendTuning, attend_shape, attend_unsupported
from mlx_turbo.backends.metal import MetalBackend
from mlx_turbo.backends.self_test import ATTEND_TOLERANCE, ROUNDING
from mlx_turbo.backends.sides import BackendError
from mlx_turbo.quant.scheme import BITS, PACKED_BITS

pytestmark = pytest.mark.usefixtures("kernels")

ONE, TWO = new_kernels(), new_kernels()
TWO.tuning = AttendTuning(one_launch_tokens=0, tokens_per_block=64)  # two launches, several blocks even of few tokens
ONE.run_check = TWO.run_check = lambda what, check: None  # the self-test has tests of its own; it doubles the time
LAUNCHES = {"one launch": ONE, "two launches": TWO}
ORDERS = ("natural", "reversed", "random")


def check(case, backends=LAUNCHES.values(), tolerance=1.0, mask=None, sinks=None):
    want = expected(case, mask, sinks)
    allowed = tolerance * ATTEND_TOLERANCE + ROUNDING[case.queries.dtype]
    for backend in backends:
        out = backend.attend(
            case.queries, case.keys, case.values, case.counts, scale=case.scale, mask=mask, sinks=sinks, rope=case.rope
        )
        assert out.dtype == case.queries.dtype and tuple(out.shape) == want.shape
        got = to_numpy(out)
        largest = np.abs(want).max() or 1.0
        assert np.abs(got - want).max() <= allowed * largest, np.abs(got - want).max() / largest
    return want


# Together: every bits on either side, windows and words that do not divide evenly, all the group sizes, both dtypes.
COMBINATIONS = [
    dict(bits=(4, 4), dims=(128, 128), G=4, Hkv=2),
    dict(bits=(3, 3), dims=(64, 64), G=5),
    dict(bits=(2, 2), dims=(80, 80), G=1, B=2),
    dict(bits=(8, 8), dims=(96, 96), G=2, L=3),
    dict(bits=(8, 4), dims=(112, 112), G=7),
    dict(bits=(0, 4), dims=(192, 128), G=1, L=2, dtype=mx.float16),
    dict(bits=(4, 0), dims=(64, 256), G=3),
    dict(bits=(3, 2), dims=(256, 64), G=12, dtype=mx.bfloat16),
    dict(bits=(0, 0), dims=(32, 160), G=16),
    dict(bits=(2, 3), dims=(160, 112), G=2),
    dict(bits=(4, 8), dims=(576, 512), G=2),
    dict(bits=(4, 4), dims=(64, 64), G=1, L=16, counts=(3, 70, 40)),
    dict(bits=(8, 4), dims=(256, 256), G=4, L=4, Hkv=2, counts=(3, 90, 40)),  # shared tiles in two chunks
    dict(bits=(8, 4), dims=(192, 128), G=3, L=5, counts=(3, 70, 40)),
    dict(bits=(3, 2), dims=(576, 80), G=16, L=2, B=2, counts=(3, 70, 40)),  # queries that lie in the results' place
    # of values at 5 and 6 bits a lane has 8 dims, 24, 16
    dict(bits=(6, 5), dims=(128, 128), G=8),
    dict(bits=(5, 6), dims=(80, 576), G=2, counts=(3, 70, 40)),
    dict(bits=(6, 5), dims=(64, 576), G=2, counts=(3, 70, 40)),
    dict(bits=(5, 6), dims=(112, 80), G=3, L=5, counts=(3, 70, 40)),  # shared tiles
    dict(bits=(0, 5), dims=(64, 64), G=1),
]
# All pairs, but 5 and 6 bits each beside itself, the other and some.
PAIRS = [
    *itertools.product((0, 2, 3, 4, 8), repeat=2),
    *((5, 5), (6, 6), (6, 5), (5, 6), (8, 6), (8, 5), (6, 4), (5, 3), (4, 5), (0, 6), (5, 0)),
]


@pytest.mark.parametrize("options", COMBINATIONS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()))
def test_every_scheme_head_dim_and_group_agrees_with_the_oracle(options):
    i = COMBINATIONS.index(options)  # one launch or two, in turn; the slow tests do both
    case = make_case(**{"rng_seed": i, **options})
    with metalsim.configured(order=ORDERS[i % 3], seed=i):
        check(case, [(TWO, ONE)[i % 2]], mask="causal")


@pytest.mark.parametrize(
    "counts",
    [
        (0, 40, 0),
        (0, 0, 5),
        (1, 0, 0),
        (3, 0, 2),
        (3, 70, 0),
        (0, 70, 7),
        (0, 1, 0),
        (4, 300, 64),
        (0, 64, 128),
        (40, 31, 33),
    ],
    ids=str,
)
def test_any_part_may_be_empty(counts):
    check(make_case(dims=(64, 64), G=2, counts=counts))


# Latents and RoPE keys: every way simdgroups share the work, every bits, remainders of dims and words, exact sides.
LATENTS = [
    dict(dims=(512, 64), G=16, dtype=mx.float16),  # two lanes to a key
    dict(dims=(512, 64), G=16, rope=False, counts=(3, 70, 40)),
    dict(dims=(64, 32), G=4),  # each simdgroup for itself
    dict(dims=(64, 48), G=16, bits=(8, 8)),  # one lane to a key
    dict(dims=(192, 80), G=12, L=2, B=2, bits=(3, 5)),
    dict(dims=(128, 64), G=9, bits=(4, 0), dtype=mx.bfloat16),
    dict(dims=(64, 32), G=3, bits=(0, 4)),
    dict(dims=(96, 32), G=2, bits=(2, 8), Hkv=2),
    dict(dims=(256, 64), G=8, L=3, bits=(6, 6)),
    dict(dims=(64, 32), G=6, bits=(0, 0)),
]


@pytest.mark.parametrize("options", LATENTS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()))
def test_latents_are_keys_and_values(options):
    i = LATENTS.index(options)
    case = make_latents(**{"rng_seed": i, **options})
    with metalsim.configured(order=ORDERS[i % 3], seed=i):
        for launch in LAUNCHES.values() if options.get("G") < 4 else (TWO,):
            check(case, [launch], mask=(None, "causal")[i % 2])
        some = mx.array(np.random.default_rng(i).random((1, 1, case.queries.shape[2], sum(case.counts))) < 0.7)
        check(case, [TWO], mask=some)


@st.composite
def latents(draw):
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    L = pick(1, 1, 1, 3)
    return dict(
        bits=(pick(*BITS), pick(*BITS)),
        dims=(pick(64, 96, 128, 256, 512), pick(32, 48, 64)),
        counts=(pick(0, 4, 33), draw(st.integers(0, 300)), draw(st.integers(L, 70))),
        G=pick(1, 4, 7, 16, 40),
        B=pick(1, 2),
        L=L,
        dtype=pick(mx.float32, mx.float16, mx.bfloat16),
        rope=pick(True, True, False),
        rng_seed=draw(st.integers(0, 99)),
    ), pick(None, "boolean", "additive")


@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
@given(latents())
def test_any_latents_are_keys_and_values(drawn):
    options, mask = drawn
    case, rng = make_latents(**options), np.random.default_rng(options["rng_seed"])
    shape = options["B"], options["G"], options["L"], sum(options["counts"])
    if mask == "boolean":
        mask = mx.array(rng.random(shape) < 0.7)
    elif mask == "additive":
        mask = mx.array(rng.standard_normal(shape).astype(np.float32)).astype(options["dtype"])
    check(case, mask=mask)


@pytest.mark.parametrize("order", ORDERS)
def test_the_order_of_threads_does_not_matter(order):
    with metalsim.configured(order=order, seed=5):
        check(make_case(dims=(64, 64), G=2, Hkv=2, counts=(4, 150, 33)))
        check(make_case(dims=(128, 128), bits=(8, 4), G=8, counts=(4, 150, 33)))


def masks(B, heads, L, n, rng):
    allowed = rng.random((B, heads, L, n)) < 0.6
    added = rng.standard_normal((B, heads, L, n)).astype(np.float32)
    yield "boolean", mx.array(allowed)
    yield "boolean, a column each", mx.array(allowed[:, :1])
    yield "boolean [L, n]", mx.array(allowed[0, 0])
    yield "additive", mx.array(added).astype(mx.float16)
    yield "additive with infinities", mx.array(np.where(allowed[:, :1], added[:, :1], -np.inf))
    yield (
        "additive with the least float16",
        mx.where(mx.array(allowed[0, 0]), 0, mx.finfo(mx.float16).min).astype(mx.float16),
    )
    yield "a bias per head, whatever the token", mx.array(added[:1, :, :1, :1])


@pytest.mark.parametrize("launch", LAUNCHES)
def test_masks_of_every_form(launch):
    case = make_case(dims=(64, 64), G=2, Hkv=2, B=2, L=3, counts=(4, 90, 33), dtype=mx.float16)
    for name, mask in masks(2, 4, 3, 127, np.random.default_rng(3)):
        check(case, [LAUNCHES[launch]], mask=mask)
    check(case, [LAUNCHES[launch]], mask="causal")
    check(case, [LAUNCHES[launch]])


def test_a_row_that_may_see_nothing_gives_zero():
    case = make_case(dims=(64, 64), G=2, L=3, counts=(4, 90, 33))
    mask = np.ones((1, 2, 3, 127), bool)
    mask[0, 0, 1] = mask[0, 1, 2] = False
    want = check(case, mask=mx.array(mask))
    assert not want[0, 0, 1].any() and want[0, 1, 1].any()
    check(case, mask=mx.zeros((1, 1), mx.bool_))


def test_causal_query_tokens_see_their_own_part_only():
    for counts, L in (((4, 70, 40), 8), ((4, 70, 9), 9), ((6, 0, 0), 5), ((4, 0, 3), 6), ((2, 1, 2), 4)):
        check(make_case(dims=(64, 64), G=2, L=L, counts=counts), mask="causal")


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_attention_sinks_take_weight_and_give_no_value(dtype):
    sinks = mx.array([0.5, -300, 30, 3, 1, 2, 0, -1, 4]).astype(dtype)  # 30: beyond every logit, -300: weighs nothing
    check(make_case(dims=(64, 64), G=3, Hkv=3, L=2), mask="causal", sinks=sinks)
    check(make_case(dims=(64, 64), G=2, means=True), sinks=sinks[:2])  # fewer than 8: in constant memory


def check_spoiled_launches(options, most):
    """Launches as in the test against the oracle, which has compiled them."""
    i = COMBINATIONS.index(options)
    backend = (TWO, ONE)[i % 2]
    check_spoiled(
        make_case(**{"rng_seed": i, **options}),
        lambda case, mask: backend.attend(
            case.queries, case.keys, case.values, case.counts, scale=case.scale, mask=mask
        ),
        most,
    )


def with_ids(combinations):
    return pytest.mark.parametrize("options", combinations, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()))


@with_ids([COMBINATIONS[i] for i in (3, 5, 11, 12)])
def test_a_token_that_is_not_finite_spoils_the_queries_that_see_it_and_no_others(options):
    check_spoiled_launches(options, 3)


@pytest.mark.slow
@with_ids(COMBINATIONS)
def test_whatever_token_is_not_finite_spoils_the_queries_that_see_it_and_no_others(options):
    check_spoiled_launches(options, 12)


@pytest.mark.parametrize("bits", [(4, 4), (3, 8), (0, 2), (8, 0)], ids=str)
def test_packed_tokens_may_be_relative_to_means(bits):
    check_means(bits, dims=(64, 96), G=2)


def check_means(bits, launches=LAUNCHES.values(), **options):
    """Several segments, and a last one of one token."""
    options = dict(bits=bits, Hkv=2, B=2, means=True) | options
    check(make_case(**options, counts=(4, 300, 33)), launches)
    check(make_case(**options, counts=(0, 257, 0)), launches)  # the last segment is one token


def test_many_rows_that_share_a_tile_have_their_own_means():
    check_means((4, 8), dims=(64, 96), G=6, L=2)


@pytest.mark.parametrize("bits", [(4, 4), (3, 8), (0, 2), (8, 0)], ids=str)
def test_the_channels_of_each_kv_head_may_be_balanced(bits):
    """Also where the rotation has two rounds, keys have means too, and queries wait in the results' place."""
    check(make_case(bits, (64, 96), Hkv=2, B=2, G=3, balanced=True), tolerance=2)
    check(make_case(bits, (96, 64), Hkv=3, G=6, L=2, balanced=True, means=True), tolerance=2)
    check(make_case(bits, (576, 80), Hkv=2, G=16, L=2, counts=(3, 70, 40), balanced=True), [TWO], tolerance=2)


def test_segments_may_be_long_and_means_zero():
    case = make_case(dims=(64, 96), G=2, Hkv=2, B=2, means=True, segment=256, counts=(4, 520, 33))
    check(case)
    without = case._replace(keys=case.keys._replace(means=None), values=case.values._replace(means=None))
    zero = case._replace(
        keys=case.keys._replace(means=mx.zeros_like(case.keys.means)),
        values=case.values._replace(means=mx.zeros_like(case.values.means)),
    )
    for backend in LAUNCHES.values():
        got = [to_numpy(backend.attend(*a[:4], scale=a.scale)) for a in (zero, without, case)]
        assert np.abs(got[0] - got[1]).max() < 1e-6 < np.abs(got[2] - got[1]).max()


def test_a_segment_that_is_shorter_than_a_tile_is_refused():
    case = make_case(dims=(64, 96), G=2, means=True)
    with pytest.raises(ValueError, match="keys.segment: got 64, expected a multiple of 128"):
        TWO.attend(case.queries, case.keys._replace(segment=64), case.values, case.counts, scale=1.0)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_the_output_has_the_dtype_of_the_queries(dtype):
    check(make_case(dims=(64, 64), dtype=dtype, G=3))


def test_large_logits_do_not_overflow_and_rescaling_works():
    """Logits that grow along the sequence up to 300 times their usual size: float32 dot products lose so much."""
    for bits in ((4, 4), (0, 4)):
        check(make_case(bits=bits, dims=(64, 64), G=2, gain=300, counts=(4, 280, 33)), tolerance=1.5e3)


def test_a_long_cache():
    check(make_case(dims=(64, 64), G=1, counts=(4, 4096, 64)))


@pytest.mark.parametrize(
    "tuning",
    [
        dict(tokens_per_lane=1),
        dict(tokens_per_lane=4, simdgroups=2),
        dict(accumulators=16),
        dict(tokens_per_block=1000, simdgroups=4),
        dict(rows_per_decode=8),
        dict(rows_per_decode=16),
    ],
    ids=str,
)
def test_the_tuning_does_not_change_the_result(tuning):
    backend = new_kernels()
    case = make_case(dims=(64, 64), G=4, L=5 if "rows_per_decode" in tuning else 1)
    for one in (0, 1024):
        backend.tuning = AttendTuning(one_launch_tokens=one, **tuning)
        check(case, [backend])


HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 256, 512)


@st.composite
def combinations(draw):
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    L = pick(1, 1, 2, 3, 5)
    counts = (pick(0, 1, 4, 33), draw(st.integers(0, 300)), draw(st.integers(L, 70)))
    options = dict(
        bits=(pick(*BITS), pick(*BITS)),
        dims=(pick(*HEAD_DIMS), pick(*HEAD_DIMS)),
        counts=counts,
        G=pick(1, 2, 3, 4, 5, 6, 7, 8, 12, 16),
        Hkv=pick(1, 2),
        B=pick(1, 2),
        L=L,
        dtype=pick(mx.float32, mx.float16, mx.bfloat16),
        means=draw(st.booleans()),
        segment=pick(128, 256),
        rng_seed=draw(st.integers(0, 99)),
    )
    return options, pick(None, "causal", "boolean", "additive"), draw(st.booleans()), pick(*ORDERS)


def check_combination(options, mask, sinks, order):
    case = make_case(**options)
    rng = np.random.default_rng(options["rng_seed"])
    B, heads, L, _ = case.queries.shape
    n = sum(case.counts)
    if mask == "boolean":
        mask = mx.array(rng.random((B, 1, L, n)) < 0.7)
    elif mask == "additive":
        mask = mx.array(rng.standard_normal((1, heads, L, n)).astype(np.float32)).astype(options["dtype"])
    sinks = mx.array(rng.standard_normal(heads).astype(np.float32)) if sinks else None
    with metalsim.configured(order=order, seed=options["rng_seed"]):
        check(case, mask=mask, sinks=sinks)


@settings(max_examples=4, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
@given(combinations())
def test_chosen_combinations_agree_with_the_oracle(combination):
    check_combination(*combination)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
@given(combinations())
def test_many_combinations_agree_with_the_oracle(combination):
    check_combination(*combination)


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("key_bits, value_bits", PAIRS)
def test_every_scheme_pair_agrees_with_the_oracle(key_bits, value_bits, order):
    with metalsim.configured(order=order, seed=1):
        check(make_case(bits=(key_bits, value_bits), dims=(128, 128), G=4, L=2), mask="causal")


@pytest.mark.slow
@pytest.mark.parametrize("key_bits, value_bits", PAIRS)
def test_every_scheme_pair_with_means_agrees_with_the_oracle(key_bits, value_bits):
    for G, L, launch in ((1, 1, ONE), (4, 2, TWO), (6, 2, TWO)):  # tiles of 128, of 64, shared ones of 32
        check_means((key_bits, value_bits), [launch], dims=(128, 128), G=G, L=L)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [(4, 4), (3, 3), (2, 2), (8, 4), (0, 4)], ids=str)
@pytest.mark.parametrize("head_dim", [*HEAD_DIMS, 576])
def test_every_head_dim_agrees_with_the_oracle(head_dim, bits):
    for G in (1, 5, 8):
        check(make_case(bits=bits, dims=(head_dim, head_dim), G=G))


@pytest.mark.slow
@pytest.mark.parametrize("G", [1, 2, 3, 4, 5, 6, 7, 8, 12, 16])
@pytest.mark.parametrize("L", [1, 2, 5, 16])
def test_every_group_and_number_of_query_tokens_agrees_with_the_oracle(G, L):
    check(make_case(dims=(128, 128), G=G, L=L, Hkv=2), mask="causal")


# ---- what is touched, and how often ----------------------------------------------------------------------------
class Recorder(MetalBackend):
    """Remembers the simulator's counts of each launch; `edit` may change the text of a kernel."""

    def __init__(self, edit=None, **tuning):
        if "simulated" not in BACKENDS:
            pytest.skip("the simulator counts and watches; here the kernels run on the GPU")
        super().__init__(self._recorded)
        self.stats, self._edit, self.tuning = {}, edit, AttendTuning(**tuning)

    def _recorded(self, name, inputs, outputs, body, header="", **options):
        if self._edit:
            header, body = self._edit(name, header, body)
        kernel = metalsim.metal_kernel(name, inputs, outputs, body, header=header, **options)

        def launch(**arguments):
            outs = kernel(**arguments)
            self.stats[name.removeprefix("turbo_")] = metalsim.last()
            return outs

        return launch

    def run(self, case, mask=None):
        """The counts of each launch for `case`, and of no self-test."""
        run_check, self.run_check = self.run_check, lambda what, check: None
        self.attend(case.queries, case.keys, case.values, case.counts, scale=case.scale, mask=mask, rope=case.rope)
        self.run_check = run_check
        return self.stats


@pytest.mark.parametrize("one", [False, True], ids=["two launches", "one launch"])
@pytest.mark.parametrize(
    "options",
    [
        dict(G=4),
        dict(bits=(3, 2), dims=(64, 96)),
        dict(bits=(8, 0), dims=(96, 80), G=3),
        dict(dims=(64, 64), G=2, L=4),
        dict(G=8, bits=(2, 8)),
        dict(bits=(3, 3), dims=(64, 96), G=7),
    ],
    ids=str,
)
def test_packed_bytes_are_read_once_and_outputs_written_once(options, one):
    # whole tiles: in one that is not full, lanes without a token read the last token's key again
    case = make_case(**{"Hkv": 2, "counts": (4, 192, 60), "dtype": mx.float16, **options})
    recorder = Recorder(one_launch_tokens=1024 * one, tokens_per_block=64)
    stats = recorder.run(case, "causal")
    one = one and case.queries.shape[2] == 1  # drafts are verified in two launches
    assert len(stats) == 2 - one
    n = case.counts[1]
    for side, dims_lanes in ((case.keys, "k"), (case.values, "v")):
        reads = stats["attend"].reads[f"{dims_lanes}_codes"].reshape(2, side.codes.shape[2], -1)
        assert (reads[:, :n] == 1).all() and not reads[:, n:].any()
        if side.scale is not None:
            reads = stats["attend"].reads[f"{dims_lanes}_scale"].reshape(2, side.codes.shape[2], -1)
            assert (reads[:, :n] == 1).all() and not reads[:, n:].any()
        for part, count in (("sink", 4), ("recent", 60)):
            reads = stats["attend"].reads[f"{dims_lanes}_{part}"].reshape(2, count + 24, -1)
            assert (reads[:, :count] == 1).all() and not reads[:, count:].any()
    outputs = [("attend", "acc")] if one else [("attend", "acc"), ("merge", "out")]
    for name, output in outputs:
        assert set(stats[name].writes[output]) == {1}, output


def decodes(case, **tuning):
    """How often each packed word and scale is read, of keys and of values."""
    reads = Recorder(**tuning).run(case)["attend"].reads
    n = case.counts[1]
    for name in "k_codes", "v_codes", "k_scale", "v_scale":
        times = reads[name].reshape(*getattr(case, "keys" if name[0] == "k" else "values").codes.shape[:3], -1)[
            :, :, :n
        ]
        yield from np.unique(times)


@pytest.mark.parametrize("G, dims, exact", [(16, (512, 64), 60), (16, (64, 32), 0), (1, (64, 32), 4)], ids=str)
def test_packed_latents_are_read_once_for_keys_and_values(G, dims, exact):
    """And RoPE keys once, where simdgroups share tiles; a simdgroup of its own reads its latents twice."""
    case = make_latents(dims=dims, G=G, counts=(0, 256, exact), dtype=mx.float16)
    stats = Recorder(one_launch_tokens=0, tokens_per_block=64).run(case)["attend"]
    for name, side, times in ("k", case.keys, 1 if G > 1 else 2), ("v", case.rope.keys, 1):
        reads = stats.reads[f"{name}_codes"].reshape(side.codes.shape[2], -1)
        assert (reads[:256] == times).all() and not reads[256:].any()
        assert set(stats.reads[f"{name}_scale"].reshape(side.codes.shape[2], -1)[:256].ravel()) == {1}


SHARING = [(128, 12, 1), (128, 16, 1), (128, 5, 3), (192, 3, 8), (256, 4, 4), (576, 16, 1)]
SHARING_MUCH = [
    (128, 4, 16),
    (128, 7, 16),
    (128, 8, 16),
    (80, 8, 16),
    (256, 4, 16),
    (256, 6, 16),
    (512, 3, 16),
    (576, 48, 1),
]


@pytest.mark.parametrize(
    "head_dim, G, L", [*SHARING, (128, 4, 16), *(pytest.param(*p, marks=pytest.mark.slow) for p in SHARING_MUCH[1:])]
)
def test_many_rows_share_what_is_decoded_once(head_dim, G, L):
    case = make_case(dims=(head_dim, min(head_dim, 512)), bits=(4, 3), G=G, L=L, counts=(0, 96, 32))
    assert set(decodes(case, one_launch_tokens=0)) == {1}


@pytest.mark.parametrize("rows, times", [(8, 4), (16, 2), (32, 1), (256, 1)])
def test_a_tuning_says_for_how_many_rows_packed_words_are_decoded_at_once(rows, times):
    case = make_case(dims=(64, 64), G=8, L=4, counts=(0, 128, 32))
    assert set(decodes(case, one_launch_tokens=0, rows_per_decode=rows)) == {times}
    shape = attend_shape(AttendTuning(rows_per_decode=rows), 4, 4, 64, 64, 8, 4, False)
    assert shape.SHARED_TILES == (rows > 8)  # a simdgroup does 8 alone


@pytest.mark.parametrize("G, L, bits", [(16, 1, 4), (7, 1, 4), (4, 4, 4), (64, 1, 4), (5, 1, 3), (7, 1, 3)])
def test_few_tokens_are_decoded_once_and_at_most_twice_for_many_heads(G, L, bits):
    case = make_case(bits=(bits, bits), dims=(128, 128), G=G, L=L, counts=(0, 192, 32))
    assert set(decodes(case)) == {2 if G == 16 else 1}
    check(case)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 112, 128, 192, 256])
def test_one_launch_does_a_token_of_up_to_16_heads(head_dim, bits):
    for G in range(1, 17):
        case = make_case(bits=(bits, bits), dims=(head_dim, head_dim), G=G, counts=(4, 20, 8))
        assert ONE.plan(case.queries, case.keys, case.values, case.counts).single_launch, G


@pytest.mark.parametrize("head_dim", [64, 80, 96, 112, 128, 192, 256, 512])
def test_packed_words_are_decoded_once_for_all_rows_that_registers_hold(head_dim):
    """To head_dim 128 for 16 tokens of 8 heads, and at most twice for more heads; above, sums are twice and four times
    as large: 256 rows of 256 dims are 256 KB, and a core of an Apple GPU has 208 KB of registers."""
    backend, most = new_kernels(), {64: 128, 192: 96, 256: 96, 512: 48}
    rows_at_once = most.get(head_dim, 128)
    for G, L, bits in itertools.product(range(1, 17), range(1, 17), PACKED_BITS):
        shape = attend_shape(backend.tuning, bits, bits, head_dim, head_dim, G, L, False)
        times = -(-G * L // shape.rows)
        built_for = G * next(n for n in attend_launch.QUERY_TOKENS if n >= L)
        assert times <= -(-built_for // rows_at_once)
        if head_dim <= 128:
            assert times <= (1 if G <= 8 else 2)


DIMS = (32, 80, 256, 512, 576)


@pytest.mark.parametrize("single_launch", [False, True], ids=["two launches", "one launch"])
@pytest.mark.parametrize("bits", BITS)
def test_every_shape_fits_into_threadgroup_memory_and_divides_the_values(single_launch, bits):
    """Also with RoPE keys beside latents."""
    dims = [*((*d, 0) for d in itertools.product(DIMS, DIMS)), *((d, d, r) for d in DIMS for r in (32, 64, 80))]
    for (key_dim, value_dim, rope_dim), n_rows, at_once in itertools.product(
        dims, range(1, 40), tuning.CANDIDATES["rows_per_decode"]
    ):
        query_dim = key_dim + rope_dim
        rows, tokens, dims_per_lane, simdgroups, shared, chunks, in_device_memory = attend_shape(
            AttendTuning(rows_per_decode=at_once), bits, bits, key_dim, value_dim, n_rows, 1, single_launch, query_dim
        )
        padded = rows if rows <= 2 else -(-rows // 4) * 4
        copies = simdgroups if shared else 2 if single_launch and bits else 1
        queries = 0 if in_device_memory else 4 * query_dim * rows * copies
        tile = 64 * tokens * max(key_dim // chunks + 8, (value_dim + 8) // chunks) if shared else 0
        if shared and rope_dim:
            tile += 64 * tokens // chunks * (rope_dim + 8) + 4 * rows * simdgroups
        assert queries + simdgroups * 128 * tokens * padded + tile <= 31 * 1024
        assert not single_launch or simdgroups * 4 * value_dim <= 31 * 1024
        assert value_dim % dims_per_lane == 0 and value_dim // dims_per_lane <= 32
        assert dims_per_lane % (4 if shared else 8) == 0 and rows * dims_per_lane <= max(64, dims_per_lane)
        assert shared or bits != 3 or dims_per_lane == 8 or dims_per_lane % 16 == 0


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    st.tuples(st.integers(0, 40), st.integers(0, 70_000), st.integers(1, 300)),
    st.sampled_from([1, 2, 4, 5, 8, 16]),
    st.sampled_from([1, 2, 8]),
    st.sampled_from([1, 2, 5, 16]),
    st.sampled_from([(4, 64), (8, 128), (0, 256), (3, 576)]),
    st.booleans(),
)
def test_a_plan_has_room_for_every_row_and_blocks_for_every_token(counts, gqa, n_kv_heads, L, side, two_launches):
    batch, n_heads, (bits, head_dim) = 2, gqa * n_kv_heads, side
    value = bits, min(head_dim, 512)
    plan = attend_launch.plan_attend(AttendTuning(), side, value, batch, n_heads, n_kv_heads, L, counts, two_launches)
    assert plan.row_groups * plan.shape.rows >= gqa * L > (plan.row_groups - 1) * plan.shape.rows
    assert plan.n_groups == batch * n_kv_heads * plan.row_groups == plan.grid[2]
    assert (plan.exact_blocks > 0) == (counts[0] + counts[2] > 0) and plan.grid[1] % plan.threadgroup[1] == 0
    n = plan.shape.SIMDGROUPS if plan.single_launch else plan.blocks  # of which exact_blocks have exact tokens
    assert (n > plan.exact_blocks) == (counts[1] > 0) and 4 <= plan.merge_simdgroups <= 16
    assert not (plan.single_launch and two_launches)
    if plan.single_launch:  # one threadgroup does all tokens
        assert L == 1 and plan.grid[1] == plan.threadgroup[1] and -(-gqa // plan.shape.rows) <= 2
    assert plan.partial_rows >= gqa * L and plan.partial_dim >= value[1]
    assert plan.n_partials == batch * n_kv_heads * plan.blocks * (plan.partial_rows * plan.partial_dim + 2 * gqa * L)


def test_a_call_is_planned_once_for_all_layers_of_a_step():
    case = make_case(dims=(64, 64), G=2)
    kernel_backend._attend_launches.cache_clear()
    for _ in range(3):
        TWO.attend(case.queries, case.keys, case.values, case.counts, scale=case.scale)
    assert kernel_backend._attend_launches.cache_info().misses == 1


def test_a_threadgroup_of_16_simdgroups_fits_with_the_last_dims_that_leave_room_for_it():
    backend = new_kernels()
    backend.run_check, backend.tuning = ONE.run_check, AttendTuning(simdgroups_one_launch=16)
    check(make_case(dims=(240, 64), G=8, counts=(2, 60, 10)), [backend])


def test_lengths_are_data_the_text_of_the_kernels_stays_the_same(generated_texts):
    for counts in ((4, 150, 33), (4, 64, 40), (4, 300, 64), (0, 299, 1)):
        Recorder(one_launch_tokens=0).run(make_case(dims=(64, 64), G=2, counts=counts))
    assert len(generated_texts) == 2
    for counts in ((4, 150, 33), (4, 64, 40), (4, 300, 64)):
        Recorder().run(make_case(dims=(64, 64), G=2, counts=counts))
    assert len(generated_texts) == 3


def test_a_broadcast_mask_is_not_materialized():
    case = make_case(dims=(64, 64), G=4, L=2)
    n = sum(case.counts)
    stats = Recorder().run(case, mx.ones((1, 1, 1, n), mx.bool_))
    assert stats["attend"].reads["mask"].size == n


def barriers():
    for name in ("attend", "merge"):
        text = "".join(sources.metal_source(name))
        for i, match in enumerate(re.finditer(r"\w+_barrier\(", text)):
            yield pytest.param(name, i, id=f"{name}-{i}-{match[0][:-9]}")


def run_past_every_barrier(edit=None):
    case = make_case(dims=(32, 512), G=2, counts=(4, 300, 33))  # 512: the rows are merged one by one
    for order in ORDERS[:2]:
        with metalsim.configured(order=order):
            Recorder(edit, one_launch_tokens=0).run(make_case(dims=(32, 32), G=16, counts=(0, 90, 0)))  # shared tiles
            Recorder(edit, one_launch_tokens=0).run(
                make_case(dims=(512, 32), G=16, counts=(0, 40, 0))
            )  # and queries in device memory
            for dims, counts in ((32, 32), (0, 90, 0)), ((512, 32), (0, 40, 0)):  # latents, two lanes to a key at 512
                Recorder(edit, one_launch_tokens=0).run(make_latents(dims=dims, G=16, counts=counts))
            Recorder(edit).run(case)
            Recorder(edit, one_launch_tokens=0, simdgroups=2, tokens_per_block=512).run(case)  # several tiles


@pytest.mark.parametrize("name, i", list(barriers()))
def test_a_barrier_less_is_noticed(name, i):
    def without(kernel, header, body):
        if kernel != f"turbo_{name}":
            return header, body
        text = header + sources.BODY_MARKER + body
        match = list(re.finditer(r"(if \([^()]*\) )?\w+_barrier\([^)]*\);", text))[i]
        return (text[: match.start()] + text[match.end() :]).split(sources.BODY_MARKER)

    with pytest.raises(metalsim.MSLError, match="race|initialis"):
        run_past_every_barrier(without)


def test_with_all_barriers_nothing_is_noticed():
    run_past_every_barrier()


def test_a_kernel_that_computes_something_wrong_is_an_error():
    def wrong(name, header, body):
        return header.replace("0x2e762e76u", "0x2e762e77u"), body

    case = make_case(dims=(64, 64), G=2)
    with pytest.raises(BackendError, match="disagrees.*64, 4 bits"):
        Recorder(wrong).attend(case.queries, case.keys, case.values, case.counts, scale=case.scale)
    with pytest.raises(BackendError, match="does not build"):
        Recorder(lambda name, header, body: (header, body + "}")).attend(
            case.queries, case.keys, case.values, case.counts, scale=case.scale
        )


@pytest.mark.parametrize("options", [dict(G=2), dict(bits=(8, 3), means=True), dict(bits=(0, 2)), dict(G=16)], ids=str)
def test_the_self_test_passes_once_for_each_specialization(options):
    case = make_case(**{"dims": (64, 64), "G": 1, **options})
    for one in (0, 1024):
        recorder, checks = Recorder(one_launch_tokens=one), []
        run_check = recorder.run_check
        recorder.run_check = lambda what, check: checks.append(run_check(what, check))
        for _ in range(2):
            recorder.attend(case.queries, case.keys, case.values, case.counts, scale=case.scale)
        assert len(checks) == 1


@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize("options", [dict(G=2), dict(bits=(8, 3), dims=(64, 32), G=16)], ids=str)
def test_the_self_test_notices_what_only_latents_use(options, rope):
    """Once for each specialization; and with the RoPE part at a wrong scale, or values that are not the keys."""
    case = make_latents(**{"dims": (64, 48), "rope": rope, **options})

    def attend(edit=None):
        recorder, checks = Recorder(edit, one_launch_tokens=0), []
        run_check = recorder.run_check
        recorder.run_check = lambda what, check: checks.append(what) or run_check(what, check)
        for _ in range(2):
            recorder.attend(case.queries, case.keys, case.values, case.counts, scale=case.scale, rope=case.rope)
        assert len(checks) == 1 and "the same values" in checks[0] and ("RoPE keys" in checks[0]) == rope

    attend()
    right, wrong = (r"TQ_LOG2E,(\s+r_diag)", r"1.5f,\1") if rope else (r"(SAME_SIDES\s+\?) key_scale", r"\1 1.01f")

    def edit(name, header, body):
        text, n = re.subn(right, wrong, header + sources.BODY_MARKER + body)
        assert (n > 0) == (name == "turbo_attend")
        return text.split(sources.BODY_MARKER)

    with pytest.raises(BackendError, match="disagrees.*the same values"):
        attend(edit)


def test_what_cannot_serve_as_keys_and_values_is_an_error():
    case, other = make_latents(dims=(64, 32), G=2), make_case(dims=(64, 32), G=2, means=True, balanced=True)

    def attend(keys, values, rope):
        return ONE.attend(case.queries, keys, values, case.counts, scale=1.0, rope=rope)

    for keys in (
        case.keys._replace(balance=other.keys.balance),
        case.keys._replace(means=other.keys.means, segment=other.keys.segment),
    ):
        with pytest.raises(ValueError, match="values: got keys that are balanced or have means"):
            attend(keys, keys, None)
    for arguments in (
        (case.keys, case.keys, case.rope._replace(keys=other.values)),
        (case.keys, case.keys._replace(segment=1), case.rope),
    ):
        with pytest.raises(ValueError, match="rope: got .* allowed are latents"):
            attend(*arguments)


def test_what_the_kernel_does_not_cover_says_why():
    assert attend_unsupported(4, 4, 128, 128, 1) is None
    assert "head_dim 72 of the keys" in attend_unsupported(4, 4, 72, 128, 1)
    assert "head_dim 100 of the values" in attend_unsupported(4, 4, 128, 100, 1)
    assert "17 query tokens" in attend_unsupported(4, 4, 128, 128, 17)
    case = make_case(dims=(64, 64), L=1)
    with pytest.raises(ValueError, match="query tokens"):
        ONE.attend(mx.zeros((1, 4, 17, 64)), case.keys, case.values, case.counts, scale=1.0)


# ---- cost ------------------------------------------------------------------------------------------------------
# Operations per (key, value) pair of attend.metal over 2048 packed tokens in blocks of 512, as in a long cache, all
# classes together, everything compiled in but unused (no mask, no sinks). A change must not break them.
CEILING = {
    ((4, 4), 128): {1: 10.1, 4: 16.5, 8: 24.8},
    ((3, 3), 128): {1: 10.1, 4: 16.5, 8: 25.3},
    ((2, 2), 128): {1: 9.6, 4: 16.0},
    ((5, 5), 128): {1: 14.4},
    ((6, 6), 128): {4: 22.8},
    ((8, 4), 128): {4: 19.4},
    ((4, 4), 64): {4: 16.9},
    ((4, 4), 256): {4: 16.3},
}


def operations(*launches):
    return sum(sum(stats.ops.values()) for stats in launches)


@pytest.mark.parametrize("bits, head_dim, G", [((4, 4), 128, 8), ((8, 4), 128, 4), ((4, 4), 64, 4)], ids=str)
def test_means_of_keys_and_values_cost_less_than_two_percent(bits, head_dim, G):
    case = make_case(bits=bits, dims=(head_dim, head_dim), G=G, counts=(0, 2048, 0), dtype=mx.float16, means=True)
    without = case._replace(keys=case.keys._replace(means=None), values=case.values._replace(means=None))
    assert operations(*Recorder().run(case).values()) <= 1.02 * operations(*Recorder().run(without).values())


# The same for many rows, G = 8 and more query tokens: shared tiles, in two chunks at (256, 16), with queries in
# device memory at 64.
ROWS_CEILING = {(128, 32): 84.3, (256, 16): 44.7, (128, 64): 162.0}


@pytest.mark.parametrize("head_dim, n_rows", ROWS_CEILING, ids=str)
def test_operations_of_many_rows_stay_below_their_ceiling(head_dim, n_rows):
    case = make_case(dims=(head_dim, head_dim), G=8, L=n_rows // 8, counts=(0, 1088, 0), dtype=mx.float16)
    stats = Recorder(tokens_per_block=512).run(case)["attend"]
    assert operations(stats) <= 1088 * head_dim * ROWS_CEILING[head_dim, n_rows]


@pytest.mark.parametrize("G", [1, 4, 8])
def test_the_short_blocks_of_a_short_cache_cost_three_percent_more_operations(G):
    case = make_case(dims=(128, 128), G=G, counts=(0, 2048, 0), dtype=mx.float16)
    short, long = (operations(Recorder(tokens_per_block=n).run(case)["attend"]) for n in (128, 512))
    assert AttendTuning().tokens_per_block == 128 and 1.02 * long < short < 1.035 * long


@pytest.mark.parametrize("bits, head_dim, G", [(b, d, g) for (b, d), row in CEILING.items() for g in row], ids=str)
def test_operations_per_pair_stay_below_their_ceiling(bits, head_dim, G):
    case = make_case(bits=bits, dims=(head_dim, head_dim), G=G, counts=(0, 2048, 0), dtype=mx.float16)
    stats = Recorder(tokens_per_block=512).run(case)["attend"]
    per_pair = operations(stats) / (2048 * head_dim)
    assert per_pair <= CEILING[bits, head_dim][G]
    packed = [a[:, :, :2048] for side in (case.keys, case.values) for a in (side.codes, side.scale)]
    read = sum(stats.read_bytes[f"{side}_{part}"] for side in "kv" for part in ("codes", "scale"))
    assert read == sum(a.nbytes for a in packed)
