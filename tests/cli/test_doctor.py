"""The doctor: it passes a right backend, and fails and names each planted fault."""

import io
import json

import mlx.core as mx
import pytest
from support import pages

from mlx_turbo import BackendError, use_backend
from mlx_turbo.backends import attend_launch, device, metal
from mlx_turbo.backends.mlx_ops import CpuBackend
from mlx_turbo.cli import doctor, main, provenance
from mlx_turbo.quant.scheme import PACKED_BITS


class FlippedCodes(CpuBackend):
    """One bit of one 3-bit code is wrong."""

    def quantize(self, sides, seed=0):
        out = super().quantize(sides, seed)
        return [
            (c ^ (mx.arange(c.shape[-1]) == 0).astype(mx.uint32) if s.bits == 3 else c, scale)
            for s, (c, scale) in zip(sides, out)
        ]


class WrongScale(CpuBackend):
    """Scales a half percent too large, of float16 vectors only."""

    def quantize(self, sides, seed=0):
        out = super().quantize(sides, seed)
        return [(c, scale * 1.005 if s.x.dtype == mx.float16 else scale) for s, (c, scale) in zip(sides, out)]


class ForgetsTheMean(CpuBackend):
    def dequantize(self, sides, first, length, dtype, seed=0):
        return super().dequantize([s._replace(mean=None) for s in sides], first, length, dtype, seed)


class ReadsFromTheStart(CpuBackend):
    def dequantize(self, sides, first, length, dtype, seed=0):
        return super().dequantize(sides, 0, length, dtype, seed)


class GivesNaN(CpuBackend):
    def dequantize(self, sides, first, length, dtype, seed=0):
        return [x * float("nan") for x in super().dequantize(sides, first, length, dtype, seed)]


class KeepsTheScale(CpuBackend):
    """Of rows that get 3 bits."""

    def requantize(self, side, bits):
        codes, scale = super().requantize(side, bits)
        return codes, side.scale if bits == 3 else scale


class ForgetsASide(CpuBackend):
    def quantize(self, sides, seed=0):
        return super().quantize(sides, seed)[:1]


class ForgetsWhereASegmentBegan(CpuBackend):
    def statistics(self, x, first, segment):
        return super().statistics(x, 0, segment)


class DoesNotBuildAt512(CpuBackend):
    """As a failing Metal compile: raised for one specialization, with the compiler's message."""

    def quantize(self, sides, seed=0):
        if sides[0].x.shape[-1] == 512:
            raise BackendError(
                "the Metal kernel does not build or run: quantize.metal with head_dim 512\n"
                "program_source:12:5: error: too many registers"
            )
        return super().quantize(sides, seed)


class ReadsRowsTooLarge(CpuBackend):
    def read_rows(self, side, first, n):
        rows, scale, slots = super().read_rows(side, first, n)
        return rows * 1.5, scale, slots


# fault -> whether it must fail the check of this name
FAULTS = {
    FlippedCodes: lambda name: name.startswith("quantize") and " 3 bits" in name,
    WrongScale: lambda name: name.startswith("quantize") and ", float16" in name,
    ForgetsTheMean: lambda name: name.startswith("dequantize") and "mean" in name,
    ReadsFromTheStart: lambda name: name.startswith("dequantize"),
    # a prompt chunk attends over restored tokens
    GivesNaN: lambda name: name.startswith("dequantize") or "40 query tokens" in name,
    KeepsTheScale: lambda name: name.startswith("requantize") and "to 3 bits" in name,
    ForgetsASide: lambda name: name.startswith("quantize") and " and " in name,
    ReadsRowsTooLarge: lambda name: name.startswith(("attend", "dequantize")),
    ForgetsWhereASegmentBegan: lambda name: name.startswith("statistics") and "segments of 128" in name,
    DoesNotBuildAt512: lambda name: name.startswith("quantize head_dim 512"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_planted_fault_fails_exactly_the_checks_it_touches(capsys, monkeypatch, fault):
    monkeypatch.setattr(doctor, "quick_checks", list)  # the others have every kind of them
    assert doctor.main(["--all", "--json"], backend=fault()) == 1
    report = json.loads(capsys.readouterr().out)
    expected = [str(c) for c in doctor.all_checks() if FAULTS[fault](str(c))]
    failed = [f["check"] for f in report["failures"]]
    assert not report["ok"] and failed == expected and expected
    assert report["checks"] == len(doctor.all_checks())  # it went on after the first failure
    assert sum(g["failed"] for g in report["groups"].values()) == len(failed)


def test_a_failure_is_printed_with_its_name_the_compiler_s_message_and_the_verdict(capsys):
    with use_backend(DoesNotBuildAt512()):
        assert main.main(["doctor", "--all"]) == 1
    out = capsys.readouterr().out
    assert "FAILED  quantize head_dim 512, 4 bits" in out
    assert out.count("program_source:12:5: error: too many registers") == 1
    assert "quantize, bfloat16" in out and "6 FAILED" in out
    assert out.splitlines()[-1].startswith("NOT OK: ")


def test_it_passes_on_this_machine_and_says_what_it_checked(capsys):
    """On a Mac these are the real kernels."""
    assert main.main(["doctor", "--all", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and report["failures"] == [] and report["checks"] == len(doctor.all_checks())
    for name in (
        "mlx_turbo",
        "mlx",
        "mlx-lm",
        "python",
        "numpy",
        "system",
        "chip",
        "memory",
        "default device",
        "float32 products",
    ):
        assert report["machine"][name]
    assert report["backend"]["name"] in ("metal", "cuda", "cpu") and report["backend"]["why"]
    assert report["seconds"] > 0


def test_checks_cover_every_head_dim_bits_dtype_operation_with_and_without_mean():
    checks = doctor.all_checks()
    single = [(c.operation, *c.sides[0], c.dtype) for c in checks if isinstance(c, doctor.Check) and len(c.sides) == 1]
    for op in ("quantize", "dequantize"):
        for bits in PACKED_BITS:
            assert {d for o, d, b, _, _ in single if (o, b) == (op, bits)} == set(doctor.HEAD_DIMS)
            for mean in (False, True):
                dtypes = [dtype for o, _, b, m, dtype in single if (o, b, m) == (op, bits, mean)]
                assert all(dtype in dtypes for dtype in (mx.float16, mx.bfloat16, mx.float32))


def test_checks_cover_every_number_of_bits_that_rows_can_get():
    checks = [c for c in doctor.all_checks() if isinstance(c, doctor.RequantizeCheck)]
    steps = {(a, b) for a in PACKED_BITS for b in PACKED_BITS if a > b}
    assert {(c.bits, c.fewer) for c in checks if c.head_dim == 128} == steps
    assert {c.head_dim for c in checks} == set(doctor.HEAD_DIMS)


def test_text_ends_with_a_verdict_and_verbose_names_every_check(capsys):
    assert main.main(["doctor", "--backend", "cpu", "--verbose"]) == 0
    out = capsys.readouterr().out
    for check in doctor.quick_checks():
        assert str(check) in out
    assert "because: --backend cpu" in out and "worst relative error" in out
    assert any(line.startswith("OK: ") for line in out.splitlines())


@pytest.mark.parametrize("gpu, title", [("metal", "Metal"), ("cuda", "CUDA")])
def test_a_gpu_that_is_not_there_fails(gpu, title, capsys, monkeypatch):
    monkeypatch.setattr(getattr(mx, gpu), "is_available", lambda: False)
    assert main.main(["doctor", "--backend", gpu]) == 1
    out = capsys.readouterr().out
    assert "FAILED  backend: " in out and f"no {title}" in out and "NOT OK" in out


@pytest.mark.parametrize("gpu", ["metal", "cuda"])
def test_a_gpu_that_is_there_but_not_used_is_said_loudly(gpu, capsys, monkeypatch):
    check = doctor.Check("quantize", ((64, 4, False),), mx.float32, 5)
    monkeypatch.setattr(doctor, "quick_checks", lambda: [check])
    monkeypatch.setattr(getattr(mx, gpu), "is_available", lambda: True)
    monkeypatch.setenv("MLX_TURBO_BACKEND", "cpu")
    assert main.main(["doctor"]) == 0
    out, err = capsys.readouterr()
    assert out.count(f"THIS MACHINE HAS {gpu.upper()}, BUT IT IS NOT USED: MLX_TURBO_BACKEND=cpu") == 2
    assert "IT IS NOT USED" in err


def test_a_build_of_mlx_over_the_one_for_cuda_is_warned_of(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "quick_checks", lambda: [doctor.Check("quantize", ((64, 4, False),), mx.float32, 5)])
    monkeypatch.setattr(doctor.select, "overwritten", lambda: "another build of MLX")
    monkeypatch.setattr(mx.cuda, "is_available", lambda: False)
    assert main.main(["doctor"]) == 0
    assert capsys.readouterr().out.count("*** another build of MLX ***") == 2


def rounded_to_tf32(x):
    """float32 numbers with the 10 bits of the mantissa that TF32 keeps."""
    return ((x.view(mx.uint32) + 0x1000) & 0xFFFFE000).view(mx.float32)


@pytest.mark.parametrize("n_queries", [1, 40])
def test_products_in_tf32_are_seen_named_and_allowed_for(n_queries, monkeypatch):
    """MLX's float32 products on newer GPUs: attention by MLX operations is off by more than float32 explains."""
    check = doctor.AttendCheck((4, 64), (4, 64), 4, n_queries, 90, "causal", False, False, mx.float32)
    exact, attend, sdpa = mx.array.__matmul__, doctor.attention.attend, mx.fast.scaled_dot_product_attention
    assert not device.float32_is_tf32() or mx.default_device().type == mx.DeviceType.gpu

    def rounded(queries, view, **options):
        with monkeypatch.context() as m:
            m.setattr(mx.array, "__matmul__", lambda a, b: exact(rounded_to_tf32(a), rounded_to_tf32(b)))
            m.setattr(mx.fast, "scaled_dot_product_attention", lambda *qkv, **o: sdpa(*map(rounded_to_tf32, qkv), **o))
            out = attend(queries, view, **options)
            mx.eval(out)
            return out

    monkeypatch.setattr(doctor.attention, "attend", rounded)
    problem, error = doctor.run_check(check, CpuBackend())
    assert problem and error > 5e-5
    with monkeypatch.context() as m:
        m.setattr(mx.array, "__matmul__", lambda a, b: exact(rounded_to_tf32(a), rounded_to_tf32(b)))
        m.setattr(device, "_rounds_to_tf32", device._rounds_to_tf32.__wrapped__)
        assert device.float32_is_tf32()
        assert "TF32" in provenance.machine()["float32 products"]
        assert doctor.run_check(check, CpuBackend()) == (None, error)


def test_it_checks_what_widely_used_models_need_and_says_that_there_is_more(capsys):
    quick, every = doctor.quick_checks(), doctor.all_checks()
    assert main.main(["doctor", "--backend", "cpu"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"OK: {len(quick)} of {len(every)} checks agree") and "--all also runs the rest" in last
    assert main.main(["doctor", "--backend", "cpu", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["checks"], report["checks_with_all"]) == (len(quick), len(every))
    assert doctor.main([], backend=GivesNaN()) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("NOT OK: ") and f" of {len(quick)} checks ({len(every)} with --all) failed" in last


def test_the_quick_checks_pair_what_models_differ_in():
    quick = doctor.quick_checks()
    assert len(quick) == len(set(quick)) and set(quick) < set(doctor.all_checks())
    attend = [c for c in quick if isinstance(c, doctor.AttendCheck)]
    for head_dim in (64, 128, 256):
        mine = [c for c in attend if c.keys[1] == c.values[1] == head_dim]
        assert {c.keys[0] for c in mine} == {0, 4, 8} and {c.values[0] for c in mine} == {4}
        assert {c.n_tokens > attend_launch.AttendTuning().one_launch_tokens for c in mine} == {False, True}
        assert {c.dtype for c in mine} == {mx.float16, mx.bfloat16}
        assert {4, 8} <= {c.heads_per_kv_head for c in mine}
        for operation in ("quantize", "dequantize"):
            sides = {c.sides for c in quick if isinstance(c, doctor.Check) and c.operation == operation}
            assert {b for s in sides for d, b, _ in s if d == head_dim} == {4, 8}
    for dtype in (mx.float16, mx.bfloat16):
        mine = [c for c in attend if c.dtype == dtype]
        assert {c.keys[0] for c in mine} == {0, 4, 8} and {c.means for c in mine} == {False, True}
    assert {c.n_queries for c in attend} == {1, 4} and {c.sinks for c in attend} == {False, True}


def test_the_page_names_the_models_as_they_are_checked():
    keys = {0: "exact", 4: "4 bits", 8: "8 bits"}
    lines = [line for line in pages.text("docs/compiling.md").splitlines() if line.startswith("| ")]
    assert [line[2:-2].split(" | ") for line in lines[1:]] == [
        [
            m.names,
            str(m.head_dim),
            str(m.heads_per_kv_head),
            keys[m.key_bits] + (", centered" if m.key_bits else ", values centered") * m.means,
            doctor.dtype_name(m.dtype),
            ("one launch" if m.n_tokens == doctor.ONE_LAUNCH else "two launches")
            + f", and {m.n_drafts} drafts verified" * bool(m.n_drafts)
            + ", sinks" * m.sinks,
        ]
        for m in doctor.MODELS
    ]


def test_the_quick_checks_pass_in_the_simulator_and_build_few_libraries(simulated, generated_texts, capsys):
    assert doctor.main([], backend=metal.MetalBackend(simulated.metal_kernel)) == 0
    assert len(generated_texts) <= 42  # two for latents, six for statistics; --all: over 300


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_shows_progress_on_a_terminal_and_nothing_elsewhere(capsys, monkeypatch):
    assert main.main(["doctor", "--backend", "cpu"]) == 0
    assert "building and checking" not in capsys.readouterr().err
    monkeypatch.setattr("sys.stderr", Terminal())
    assert main.main(["doctor", "--backend", "cpu"]) == 0
    assert f"/{len(doctor.quick_checks())}" in main.sys.stderr.getvalue()


def test_unknown_options_are_refused_in_one_line(capsys):
    assert main.main(["doctor", "--backend", "opencl"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_attention_is_checked_with_every_scheme_head_dim_mask_length_and_dtype():
    checks = [c for c in doctor.all_checks() if isinstance(c, doctor.AttendCheck)]
    assert {c.keys[1] for c in checks} >= {64, 80, 96, 112, 128, 192, 256, 512}
    for dim in (64, 128):
        pairs = {(c.keys[0], c.values[0]) for c in checks if (c.keys[1], c.values[1]) == (dim, dim)}
        assert pairs == set(doctor.SCHEMES)
    assert {(k, v) for k in (0, 2, 3, 4, 8) for v in (0, 2, 3, 4, 8)} - {(0, 0)} < set(doctor.SCHEMES)
    for bits in (5, 6):
        for side in (0, 1):
            beside = {pair[1 - side] for pair in doctor.SCHEMES if pair[side] == bits}
            assert beside > {5, 6}
    assert {c.mask for c in checks} == {None, "causal", "boolean", "additive"}
    assert {c.sinks for c in checks} == {False, True} and {c.n_queries for c in checks} >= {1, 3, 40}
    assert {c.heads_per_kv_head for c in checks} >= {1, 4, 5, 8} and len({c.n_tokens for c in checks}) == 2
    for dtype in (mx.float16, mx.bfloat16, mx.float32):
        assert any(c.dtype == dtype for c in checks)


def test_attention_is_checked_with_tiles_of_each_kind():
    """Decoded by each simdgroup for itself, shared by several, and shared by so many rows that queries are in device
    memory."""
    shapes = {
        attend_launch.attend_shape(
            attend_launch.AttendTuning(),
            c.keys[0],
            c.values[0],
            c.keys[1],
            c.values[1],
            c.heads_per_kv_head,
            c.n_queries,
            False,
        )
        for c in doctor.all_checks()
        if isinstance(c, doctor.AttendCheck) and c.n_queries <= 16
    }
    assert {(s.SHARED_TILES, s.QUERIES_IN_DEVICE_MEMORY) for s in shapes} == {
        (False, False),
        (True, False),
        (True, True),
    }
    assert {s.CHUNKS for s in shapes} == {1, 2}


def test_latent_attention_is_checked_with_shared_tiles_and_without_and_first_of_all():
    latents = [c for c in doctor.all_checks() if isinstance(c, doctor.AttendCheck) and c.rope]
    assert {c.keys[0] for c in latents} >= {0, 3, 4, 6, 8} and {c.rope[0] for c in latents} >= {3, 4}
    assert {c.heads_per_kv_head for c in latents} >= {2, 16, 128}
    assert any(c.rope for c in doctor.quick_checks() if isinstance(c, doctor.AttendCheck))
