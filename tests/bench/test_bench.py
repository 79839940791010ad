"""`mlx-turbo bench`: what it times is checked, what is wrong is reported and not ranked, and outputs say what ran."""

import json
import math
import resource
import subprocess
import sys
import time
from pathlib import Path

import metalsim
import mlx.core as mx
import numpy as np
import pytest
from support.attend_cases import make_case
from support.no_kernels import NoKernels

from mlx_turbo.backends import select, tuning
from mlx_turbo.backends.attend_launch import AttendTuning
from mlx_turbo.backends.cuda import CudaBackend
from mlx_turbo.backends.kernel_backend import KernelBackend
from mlx_turbo.backends.metal import MetalBackend
from mlx_turbo.backends.mlx_ops import CpuBackend
from mlx_turbo.backends.self_test import compare_quantized
from mlx_turbo.backends.sides import BackendError
from mlx_turbo.backends.sources import metal_source
from mlx_turbo.backends.tiled_attention import tiled_attention
from mlx_turbo.bench import command as bench
from mlx_turbo.bench import common as bench_common
from mlx_turbo.bench import contenders as contending
from mlx_turbo.bench import generate as bench_generate
from mlx_turbo.bench import plots as bench_plots
from mlx_turbo.bench import rows as bench_rows
from mlx_turbo.bench import stages as kernel_stages
from mlx_turbo.bench import tables, timing, tune
from mlx_turbo.cli import common, main
from mlx_turbo.quality import baselines
from mlx_turbo.quant.scheme import Scheme, TurboConfig

ROOT = Path(__file__).parents[2]
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="metalsim runs on Linux")
SMALL = ["--quick", "--tokens", "160", "--head-dim", "64", "--gqa", "2", "--dtype", "float32", "--backend", "cpu"]


@pytest.fixture(autouse=True)
def fast(monkeypatch, tmp_path):
    """Few samples, no warm-up, a small copy, a cache folder of our own."""
    monkeypatch.setattr(timing, "WARM_UP_SECONDS", 0.0)
    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 1e-4)
    monkeypatch.setattr(bench_common, "QUICK", timing.Effort(3, 3, 0.01))
    monkeypatch.setitem(contending.COLD_BYTES, "cpu", 1 << 20)
    monkeypatch.setenv("MLX_TURBO_CACHE_DIR", str(tmp_path / "cache"))
    measure = timing.measure_machine
    monkeypatch.setattr(timing, "measure_machine", lambda gpu, effort, n: measure(gpu, effort, 1 << 20))


@pytest.fixture
def run(capsys):
    """run(*argv, backends=None) -> (exit code, stdout, stderr) of `mlx-turbo bench`."""

    def run(name, *argv, backends=None):
        capsys.readouterr()
        if backends is None:
            return main.main(["bench", name, *map(str, argv)]), *capsys.readouterr()
        return bench.BENCHMARKS[name]([*map(str, argv)], backends), *capsys.readouterr()

    return run


# ---- planted faults --------------------------------------------------------------------------------------------
class WrongRows(CpuBackend):
    """The packed rows of the first of eight kv heads are read two percent too large."""

    name = "wrong rows"

    def read_rows(self, side, first, n):
        rows, scale, bits = super().read_rows(side, first, n)
        return rows * mx.array([1.02] + 7 * [1.0])[:, None, None], scale, bits


class DoesNotBuild(CpuBackend):
    name = "broken"

    def quantize(self, sides, seed=0, scale=None):
        raise BackendError("the Metal kernel does not build or run: quantize.metal\nprogram_source:3: error")


def test_kernels_that_are_wrong_or_fail_are_reported_and_not_ranked(run):
    code, out, err = run("kernels", *SMALL, backends=[NoKernels(), WrongRows(), DoesNotBuild(), CpuBackend()])
    assert code == 1
    lines = out.splitlines()
    ranked = [line for line in lines if line[:3].strip().isdigit()]
    for column, said, times in (
        ("simulated Metal", "WRONG: relative error 1.0e+00", 3),
        ("wrong rows", "WRONG: relative error", 3),
        ("broken", "FAILED: BackendError: the Metal", 1),
    ):
        assert sum(column in line and said in line and line.startswith("  - ") for line in lines) == times
        assert column == "broken" or not any(
            column in line and "turbo4" in line for line in ranked if "mx." not in line and column != "wrong rows"
        )
    assert any("CPU fallback" in line for line in ranked)
    assert (
        err.count("mlx-turbo: WRONG: ") == 7
    )  # zeros: attention, prefill, quantize, dequantize; wrong rows: all but quantize
    assert "mlx-turbo: FAILED: quantize turbo4 by broken (head_dim 64, 160 tokens)" in err


class SeesTheFuture(CpuBackend):
    """Of several query tokens the first ones see the last ones, too."""

    name = "no mask"

    def why_not_fused(self, keys, values, n_query_tokens):
        return None

    def attend(self, queries, keys, values, counts, mask, **options):
        return tiled_attention(queries, keys, values, counts, self.read_rows, mask=None, **options)


def test_several_query_tokens_are_checked_with_their_causal_mask(run, capsys):
    code, out, err = run(
        "kernels", *SMALL, "--gqa", "1", "--query-tokens", "1", "4", "--json", backends=[SeesTheFuture(), CpuBackend()]
    )
    d = json.loads(out)
    attention = {(r["name"], r["column"], r["query_tokens"]): r for r in d["rows"] if r["operation"] == "attention"}
    steps = {r["query_tokens"] for r in d["rows"] if r["operation"] != "prefill"}
    assert len(attention) == 2 * 6 and steps == {1, 4, None}
    assert [key for key, r in attention.items() if r["status"] != "ok"] == [("turbo4", "no mask", 4)]
    assert code == 1 and "WRONG: attention turbo4 by no mask (head_dim 64, GQA 1, 4 query tokens, 160 tokens)" in err
    assert bench_plots.shown_group(d) == (64, 1, 1)
    tables.print_kernels(d)
    out = capsys.readouterr().out
    assert "attention of one decode step, GQA 1: 8" in out and "one decode step, 4 query tokens, GQA 1: 8" in out


def test_a_wrong_row_has_no_time_in_the_json_and_red_words_in_the_plot(run, tmp_path):
    pytest.importorskip("matplotlib")
    code, out, _ = run(
        "kernels", *SMALL, "--json", "--html", tmp_path / "page.html", backends=[NoKernels(), CpuBackend()]
    )
    document = json.loads(out)
    wrong = [r for r in document["rows"] if r["status"] == "wrong"]
    assert code == 1 and {r["column"] for r in wrong} == {"simulated Metal"} and len(wrong) == 4
    assert all("median_seconds" not in r and "times_uncompressed" not in r and r["problem"] for r in wrong)
    assert bench_plots.problems(document)[0] == (
        "WRONG, not ranked: attention turbo4 by simulated Metal (head_dim 64, GQA 2, 160 tokens)"
    )
    assert "<tr class=wrong>" in (tmp_path / "page.html").read_text()
    for row in wrong:  # nor would its time be praised if it were right
        row |= {"status": "ok", "median_seconds": 1e-9}
    lines = bench_plots.headlines(document)
    assert len(lines) == 2 and "turbo4 (CPU fallback)" in lines[0] and "turbo" not in lines[1]
    for row in document["rows"]:
        row.pop("median_seconds", None)
    bench_plots.write(document, "png", tmp_path / "x.png")  # nothing left to plot, and no crash


def test_nothing_without_a_gpu_is_called_by_its_name(run, monkeypatch):
    for name in select.GPUS:
        monkeypatch.setattr(getattr(mx, name), "is_available", lambda: False)  # on a machine with one
    assert contending.column_of(MetalBackend()) == "simulated Metal"  # it would not run
    assert contending.column_of(MetalBackend(metalsim.metal_kernel)) == "simulated Metal"
    assert contending.column_of(CudaBackend()) == "simulated CUDA"
    for argv, said in (
        (["--backend", "metal"], "'metal' was asked for, but this build of MLX has no Metal"),
        (["--backend", "cuda"], "'cuda' was asked for, but this build of MLX has no CUDA"),
        (["--ablate"], "--ablate: is about the kernels on a GPU, but this build of MLX has no Metal and no CUDA"),
        (["--tune", "--backend", "cpu"], "--tune: is about the kernels on a GPU, but only the CPU fallback was asked"),
    ):
        code, out, err = run("kernels", "--quick", *argv)
        assert code == 1 and said in err and not out


# ---- what the output says --------------------------------------------------------------------------------------
def test_quick_kernels_say_what_ran_and_check_every_row(run):
    code, out, err = run("kernels", *SMALL, "--kv", "turbo4", "turbo3", "--json")
    assert code == 0, err
    d = json.loads(out)
    assert d["command"].startswith("mlx-turbo bench kernels --quick") and d["format"] == 1
    assert "cpu fallback" in d["backend"] and d["machine"]["mlx"] == mx.__version__
    assert d["method"]["order"] == "interleaved, rotating" and "commit" in d and "power" in d
    assert 0 < d["measured"]["floor_seconds"] < d["measured"]["evaluation_seconds"] * 10
    assert d["measured"]["copy_gb_per_s"] > 0.1
    rows = {(r["operation"], r["scheme"], r["name"], r["column"]): r for r in d["rows"]}
    assert len(rows) == len(d["rows"]) == 3 + 2 * 2 + 2 * 2 * 3 + 3
    for (operation, scheme, name, column), r in rows.items():
        assert r["status"] == "ok" and r["error"] <= r["allowed"]
        assert 0 < r["low_seconds"] <= r["median_seconds"] <= r["high_seconds"] and r["n"] >= 3
        assert math.isclose(r["gb_per_s"], r["bytes"] / r["median_seconds"] / 1e9)
        assert math.isclose(r["bandwidth_share"], r["gb_per_s"] / d["measured"]["copy_gb_per_s"])
        assert column == "NumPy reference" or r["error"] > 0 or operation != "attention"
    turbo, plain = (
        rows["attention", None, name, column]
        for name, column in (("turbo4", "CPU fallback"), ("uncompressed", "MLX float32"))
    )
    assert turbo["bytes"] == 2 * 8 * (100 * 64 * 4 + 60 * (32 + 2)) and plain["bytes"] == 2 * 8 * 160 * 64 * 4
    assert turbo["times_uncompressed"] == pytest.approx(turbo["median_seconds"] / plain["median_seconds"])


CHUNK = ["--past", "300", "--chunk", "40"]


def test_a_prompt_chunk_is_measured_with_its_memory(run, capsys):
    code, out, err = run("kernels", *SMALL, *CHUNK, "--json")
    d = json.loads(out)
    plain, turbo = (r for r in d["rows"] if r["operation"] == "prefill")
    assert code == 0 and (plain["name"], turbo["name"]) == ("uncompressed", "turbo4")
    for r in plain, turbo:
        assert (r["status"], r["tokens"], r["query_tokens"], r["gqa"]) == ("ok", 300, 40, 2) and 0 < r["error"]
    assert plain["bytes"] == 2 * 8 * 340 * 64 * 4 and turbo["bytes"] == 2 * 8 * (100 * 64 * 4 + 240 * (32 + 2))
    restored = plain["bytes"]  # ours holds the past as uncompressed holds it, for a while
    assert turbo["peak_bytes"] >= restored and turbo["peak_bytes"] >= plain["peak_bytes"] > 0
    assert bench_rows.describe_row(turbo) == (
        "prefill turbo4 by CPU fallback (head_dim 64, GQA 2, 40 query tokens, 300 tokens)"
    )
    tables.print_kernels(d)
    table = capsys.readouterr().out.partition("attention of a prompt chunk of 40 tokens, GQA 2: 8 kv heads of 64, 300")[
        2
    ]
    lines = table.splitlines()[:4]
    assert lines[0] == " tokens before the chunk, float32" and lines[1].endswith("peak MB")
    assert any(line.endswith(f"{turbo['peak_bytes'] / 1e6:9.1f}") and "turbo4" in line for line in lines)


@pytest.mark.parametrize("fault", ["sees the future", "forgets the newest"])
def test_a_prompt_chunk_that_is_wrong_is_not_ranked(run, monkeypatch, fault):
    attend = contending.attention.attend

    def planted(queries, view, mask, **options):
        if mask == "causal" and fault == "sees the future":
            mask = None
        elif mask == "causal":
            view = view._replace(counts=(*view.counts[:2], view.counts[2] - 1))
        return attend(queries, view, mask=mask, **options)

    monkeypatch.setattr(contending.attention, "attend", planted)
    code, out, err = run("kernels", *SMALL, *CHUNK, "--json")
    assert code == 1
    assert [(r["operation"], r["name"]) for r in json.loads(out)["rows"] if r["status"] != "ok"] == [
        ("prefill", "turbo4")
    ]
    assert "WRONG: prefill turbo4 by CPU fallback (head_dim 64, GQA 2, 40 query tokens, 300 tokens)" in err


@pytest.mark.parametrize("name", ["kernels", "generate"])
def test_what_mlx_cannot_do_on_a_device_is_named_and_is_no_fault(run, monkeypatch, tmp_path, name):
    """As on CUDA, where mlx-lm's quantized cache lacks products. It is not even tried: some end the process."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(baselines, "on_cuda", lambda: True)
    monkeypatch.setattr(mx, "quantized_matmul", lambda *args, **options: pytest.fail("tried"))
    argv = SMALL if name == "kernels" else [*GENERATE, "--kv", "mlx4", "turbo4"]
    code, out, err = run(name, *argv, "--json", "--html", tmp_path / "page.html")
    d = json.loads(out)
    left_out = {r["name"]: r for r in d["rows"] if r["status"] != "ok"}
    assert code == 0 and "quantized_matmul" not in err
    assert set(left_out) == ({"mlx-lm 8 bit", "mlx-lm 4 bit"} if name == "kernels" else {"mlx4"})
    for row in left_out.values():
        assert row["status"] == "not run" and "does not run on CUDA" in row["problem"]
    code, out, err = run(name, *argv)
    assert code == 0 and out.count("NOT RUN: mlx-lm's QuantizedKVCache does not run on CUDA") == len(left_out)


def test_a_prompt_chunks_time_is_all_of_it(monkeypatch):
    """Ours starts tiles while it builds the graph, so the graph's evaluation alone is next to nothing."""
    backend = CpuBackend()
    monkeypatch.setattr(backend, "is_real", True, raising=False)
    grid = contending.Grid((256,), (64,), (2,), (Scheme(4, 4),), mx.float32, (1,), (300,), 40)
    ((_, group),) = contending.prefill_contenders(grid, [backend], 300, 64, "cpu").items()
    for contender in group:
        found = timing.interleave({0: contending.timed(contender)}, timing.Effort(3, 3, 1), warm_up=0)[0]
        assert found.python == 0 and found.median > 0


def test_mlx_own_attention_is_allowed_what_tf32_costs(monkeypatch):
    exact = contending._mlx_tolerance(mx.float32)
    monkeypatch.setattr(contending, "float32_is_tf32", lambda: True)
    assert contending._mlx_tolerance(mx.float32) == contending.MLX_TOLERANCE[mx.float16] > 10 * exact
    assert contending._mlx_tolerance(mx.bfloat16) == contending.MLX_TOLERANCE[mx.bfloat16]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_mlx_own_and_the_fallback_are_right_in_16_bits(run, dtype):
    code, _, err = run("kernels", *SMALL, "--dtype", dtype, "--kv", "turbo8v4", "--json")
    assert code == 0, err


@pytest.mark.parametrize("name", ["kernels", "generate"])
def test_quick_is_done_within_a_minute(name):
    """Of the processor's time, because other programs may be running; in a process, so that nothing is made shorter."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "mlx_turbo", "bench", name, "--quick", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert {r["status"] for r in document["rows"]} == {"ok"} and document["method"]["warm_up_seconds"] >= 1
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 60


def test_the_table_ranks_by_time_and_ends_with_the_command(run):
    code, out, _ = run("kernels", *SMALL)
    assert code == 0
    block = out[out.index("attention of one") : out.index("\nquantize,")].splitlines()[2:]
    times = [float(line[38:48]) for line in block if line.strip()]
    assert times == sorted(times) and len(times) == 5
    assert "Reproduce: mlx-turbo bench kernels --quick" in out and "Floor of a call" in out


@pytest.mark.parametrize(
    "argv, said",
    [
        (["kernels", "--tokens", "100"], "--tokens: got 100, allowed are whole numbers from 128 on"),
        (["kernels", "--query-tokens", "0"], "--query-tokens: got 0, allowed are whole numbers from 1 to 16"),
        (["kernels", "--query-tokens", "17"], "--query-tokens: got 17, allowed are whole numbers from 1 to 16"),
        (["kernels", "--head-dim", "72"], "--head-dim: head_dim 72"),
        (["kernels", "--chunk", "16"], "--chunk: got 16, allowed are whole numbers from 17 on"),
        (["kernels", "--past", "100"], "--past: got 100, allowed are whole numbers from 128 on"),
        (["kernels", "--kv", "turbo7"], "--kv: got 'turbo7'"),
        (["kernels", "--kv", "turbo0v4"], "--kv: got 'turbo0v4', allowed are schemes that pack keys and values"),
        (["kernels", "--kv", "auto"], "--kv: got 'auto', allowed are schemes that pack keys and values: turboN"),
        (["kernels", "--png", "no/such/folder/x.png"], "--png: cannot write 'no/such/folder/x.png': No such file"),
        (["generate", "--png", "picture"], "--png: 'picture' does not end in .png"),
        (["generate", "--html", "x.png"], "--html: 'x.png' does not end in .html"),
        (["generate", "--context", "1"], "--context: got 1"),
        (["generate", "--context", "8192"], "the model was made for 4096"),
        (["generate", "--kv", "mlx5"], "; or 'none' for mlx-lm's own cache; or mlx8, mlx4 for its quantized ones"),
        (["compare", "a.json", "b.json"], "A.json: cannot read 'a.json': FileNotFoundError"),
        (["speed"], "invalid choice: 'speed'"),
        ([], "the following arguments are required: BENCHMARK"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(capsys, argv, said):
    assert main.main(["bench", *argv]) == 2
    out, err = capsys.readouterr()
    assert said in err and len([x for x in err.splitlines() if "mlx-turbo" in x]) == 1 and not out


def test_plots_without_matplotlib_are_refused_before_anything_is_measured(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = run("kernels", *SMALL, "--png", "x.png")
    assert code == 2 and "pip install matplotlib" in err and not out


def test_plots_are_written(run, tmp_path):
    pytest.importorskip("matplotlib")
    code, out, _ = run("kernels", *SMALL, "--json", "--png", tmp_path / "x.png")
    assert code == 0 and (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    d = json.loads(out)
    d["ablation"] = [
        {
            "scheme": "turbo4",
            "head_dim": 64,
            "gqa": 2,
            "tokens": 160,
            "column": "simulated Metal",
            "seconds": dict(zip(kernel_stages.STAGES, (6, 5, 4, 3, 2, 1))),
            "verdict": "Bound by something.",
        }
    ]
    bench_plots.write(d, "html", tmp_path / "x.html")
    page = (tmp_path / "x.html").read_text()
    assert page.count("<svg") == 1 and d["command"] in page


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a full disk is made of /dev/full")
def test_a_picture_that_finds_the_disk_full_loses_nothing_else(run, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "x.png").symlink_to("/dev/full")
    code, out, err = run("kernels", *SMALL, "--json", "--png", tmp_path / "x.png")
    assert code == 2 and json.loads(out)["rows"]
    assert err.endswith(f"mlx-turbo: error: --png: cannot write {str(tmp_path / 'x.png')!r}: No space left on device\n")


# ---- method ----------------------------------------------------------------------------------------------------
def test_contenders_take_turns_in_a_rotating_order_after_the_warm_up():
    order = []
    runs = {name: (lambda calls, name=name: order.append(name)) for name in "abc"}
    found = timing.interleave(runs, timing.Effort(4, 4, 1), warm_up=0)
    assert "".join(order[:3]) == "abc" and "".join(order[-12:]) == "abcbcacababc"
    assert all(t.n == 4 for t in found.values())


@LINUX
def test_the_empty_kernel_runs():
    assert timing.floor_run(metalsim.metal_kernel)(3)[0].item() == 3 == timing.floor_run()(3)[0].item()


def test_a_mac_says_its_power_mode_and_thermal_state(monkeypatch):
    said = {
        ("-g", "therm"): "Note: No thermal warning level has been recorded\n",
        ("-g", "batt"): "Now drawing from 'AC Power'\n x",
        ("-g",): "System-wide power settings:\nCurrently in use:\n lowpowermode         1\n sleep 1\n",
    }
    monkeypatch.setattr(timing.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(timing, "_output", lambda *command: said[command[1:]])
    assert timing.power() == {
        "thermal": "Note: No thermal warning level has been recorded",
        "source": "Now drawing from 'AC Power'",
        "mode": "lowpowermode 1",
    }
    monkeypatch.setattr(timing, "_output", lambda *command: None)
    assert timing.power() == {}


def test_python_that_builds_a_graph_is_told_apart_from_its_evaluation():
    x = mx.ones((400, 400))
    mx.eval(x)

    def lazy(calls):
        time.sleep(0.01 * calls)
        return x + 1

    def eager(calls):
        time.sleep(0.01 * calls)

    found = timing.interleave({"lazy": lazy, "eager": eager}, timing.Effort(3, 3, 1), warm_up=0)
    assert found["lazy"].python >= 0.01 and found["eager"].median >= 0.01 and found["eager"].python == 0
    assert found["lazy"].median < found["lazy"].python


def test_rounds_go_on_until_the_median_is_known(monkeypatch):
    clock = iter(float(x) for x in range(10_000))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))  # every sample takes 1 s exactly
    found = timing.interleave({"steady": lambda calls: None}, timing.Effort(5, 50, 1e9), warm_up=0)["steady"]
    assert (found.n, found.uncertainty, found.median) == (5, 0.0, 1.0)
    assert timing.Timing.of([1, 2, 3, 4, 5], 1).uncertainty == pytest.approx(1.57 * 2 / 5**0.5 / 3)


def test_a_tie_moves_the_scale_and_is_no_error():
    """A number midway between two levels: with the other code <y, c> is another, and so is the scale."""
    from mlx_turbo.quant import codebook, reference

    rng = np.random.default_rng(0)
    want = reference.quantize(rng.standard_normal((1, 64)), 4, rotation=None)
    i = int(np.argmax(want.codes[0] < 15))
    other = want.codes.copy()
    other[0, i] += 1
    middle = codebook.thresholds(want.levels)[want.codes[0, i]]
    u = want.normalized.copy()
    u[0, i] = middle
    tie = reference.Quantized(want.codes, want.scale, u, 4, None, want.levels, None)
    moved = want.scale * (u * want.levels[want.codes]).sum() / (u * want.levels[other]).sum()
    words, scale = reference.pack(other, 4), moved[..., None].astype(np.float16)
    assert compare_quantized(words, scale, tie) is None
    assert "scale off" in compare_quantized(words, scale * np.float16(1.02), tie)
    assert "differ away from ties" in compare_quantized(words, scale, want)


# ---- ablation --------------------------------------------------------------------------------------------------
@LINUX
@pytest.mark.parametrize("bits", [(4, 4), (3, 2), (8, 4)])
def test_every_ablation_builds_runs_and_does_less(bits):
    case = make_case(bits=bits, dims=(64, 64), counts=(4, 300, 33), G=2)
    outputs, ops = {}, {}
    for stage in kernel_stages.STAGES:
        backend = kernel_stages.AblatedBackend(stage, MetalBackend(metalsim.metal_kernel))
        backend.tuning = AttendTuning(one_launch_tokens=10**6)  # so that the last dispatch is attend's
        with metalsim.configured(races=False):
            out = backend.attend(case.queries, case.keys, case.values, case.counts, scale=case.scale)
            mx.eval(out)
        outputs[stage], ops[stage] = np.array(out), metalsim.last()
    total = {stage: sum(s.ops.values()) for stage, s in ops.items()}
    for stage in list(kernel_stages.STAGES)[1:]:
        assert not np.array_equal(outputs[stage], outputs["full"], equal_nan=True)
        assert total[stage] < total["full"]
    read = {
        stage: sum(n for name, n in s.read_bytes.items() if name in ("k_codes", "v_codes")) for stage, s in ops.items()
    }
    assert read["no codebook"] == read["no softmax"] == read["full"] > 0
    assert read["bytes only"] >= read["full"] and read["nothing"] == 0 < read["no values"] < read["full"]
    assert total["nothing"] < total["bytes only"] < min(total[s] for s in ("no codebook", "no values", "no softmax"))


def test_an_ablation_of_a_changed_kernel_is_an_error(monkeypatch):
    header, body = metal_source("attend")
    header = header.replace("simd_max(top)", "simd_max( top)")
    monkeypatch.setattr(kernel_stages, "metal_source", lambda name: (header, body))
    with pytest.raises(ValueError, match="attend.metal has 0 times, and an ablation expects once: 'top = simd_max"):
        kernel_stages.variant("no softmax")


@pytest.mark.parametrize(
    "left, said",
    [
        ((10, 9, 9, 9, 9, 6), "Bound by launching: 60%"),
        ((10, 9, 9, 9, 9, 1), "Bound by memory: reading the bytes alone takes 90%"),
        (
            (10, 7, 6, 9, 3, 1),
            "Bound by arithmetic: reading the bytes alone takes 30% of the time; the largest stage is the values",
        ),
    ],
)
def test_the_verdict_names_what_bounds_the_kernel(left, said):
    assert kernel_stages.verdict(dict(zip(kernel_stages.STAGES, left))).startswith(said)


@LINUX
def test_bench_reports_the_stages_of_a_simulated_kernel_as_simulated(run):
    code, out, err = run("kernels", *SMALL, "--ablate", backends=[MetalBackend(metalsim.metal_kernel)])
    assert code == 0, err
    assert "Stages of attention, turbo4 on simulated Metal: head_dim 64, GQA 2, 160 tokens" in out
    assert all(f"\n  {stage} " in out for stage in kernel_stages.STAGES)
    assert "Times of the simulator say nothing about a GPU." in out
    assert "metal" not in out.lower().replace("simulated metal", "")


# ---- tuning ----------------------------------------------------------------------------------------------------
def test_the_search_takes_what_is_faster_and_leaves_what_is_wrong_or_noise():
    def time_all(tunings):
        return [
            None
            if t.simdgroups == 8
            else (0.5 if t.tokens_per_block == 256 else 1) * (0.99 if t.tokens_per_lane == 4 else 1)
            for t in tunings
        ]

    best, ratio = tuning.search(time_all)
    assert best == AttendTuning(tokens_per_block=256) and ratio == 0.5
    with pytest.raises(ValueError, match="does not run"):
        tuning.search(lambda tunings: [None] * len(tunings))


def test_a_tuning_is_kept_for_its_chip_and_its_kernels(monkeypatch):
    key, values = (4, 4, 128, 128), AttendTuning(tokens_per_block=256)
    tuning.save({key: values}, "M9")
    tuning.save({(3, 3, 64, 64): AttendTuning(simdgroups=8)}, "M8")
    assert tuning.load("M9") == {key: values} and tuning.load("M7") == {}
    assert list(tuning.load("M8")) == [(3, 3, 64, 64)]
    backend = MetalBackend(metalsim.metal_kernel)
    assert backend.tuned == {}  # not of a real chip
    backend.tuned = tuning.load("M9")
    sides = [make_case(dims=(d, d)).keys for d in (128, 64)]
    assert backend.tuning_of(sides[0], sides[0]) == values and backend.tuning_of(sides[1], sides[1]) == AttendTuning()
    monkeypatch.setattr(tuning, "device_name", lambda: "M9")
    assert tuning.describe() == "4 and 4 bits, head_dim 128: tokens_per_block 256 (default 128)"
    monkeypatch.setattr(tuning, "metal_source", lambda name: ("another", "text"))
    assert tuning.load("M9") == {} and tuning.describe().startswith("none")
    tuning.save({}, "M9")
    assert len(json.loads(tuning.path().read_text())["entries"]) == 1  # M8's


@pytest.mark.parametrize("gpu", select.GPUS)
def test_a_gpu_uses_what_was_kept_for_its_chip(gpu, monkeypatch):
    tuning.save({(4, 4, 128, 128): AttendTuning(simdgroups=8)}, "M9")
    monkeypatch.setattr(getattr(mx, gpu), "is_available", lambda: True)
    monkeypatch.setattr(tuning, "device_name", lambda: "M9")
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(select, "_backends", {})
    assert select.get_backend(gpu).tuned == {(4, 4, 128, 128): AttendTuning(simdgroups=8)}


@LINUX
def test_tune_reports_what_it_found_and_keeps_nothing_of_a_simulated_chip(run, monkeypatch):
    monkeypatch.setattr(tuning, "CANDIDATES", {"tokens_per_lane_few_rows": (1, 4)})
    monkeypatch.setattr(tune, "time_tunings", lambda *args: ([1.0, 0.5][: len(args[-1])], {}))
    metal = MetalBackend(metalsim.metal_kernel)
    code, out, err = run("kernels", *SMALL, "--tune", backends=[metal])
    assert code == 0, err
    assert "Tuned turbo4, head_dim 64: tokens_per_lane_few_rows 1 (default 4), 0.50 of the default's time" in out
    assert metal.tuned == {(4, 4, 64, 64): AttendTuning(tokens_per_lane_few_rows=1)} and not tuning.path().exists()


@LINUX
def test_tune_starts_from_what_the_backend_has_by_default(run, monkeypatch):
    """CUDA's defaults may be others than Metal's."""
    monkeypatch.setattr(tuning, "CANDIDATES", {"tokens_per_lane_few_rows": (1, 4)})
    asked = []
    monkeypatch.setattr(tune, "time_tunings", lambda *args: (asked.append(args[-1]), ([1.0] * len(args[-1]), {}))[1])
    metal = MetalBackend(metalsim.metal_kernel)
    metal.tuning = AttendTuning(simdgroups_per_launch=2112)
    code, out, err = run("kernels", *SMALL, "--tune", backends=[metal])
    assert code == 0 and {t.simdgroups_per_launch for tried in asked for t in tried} == {2112}
    assert "Tuned turbo4, head_dim 64: the defaults" in out and metal.tuned == {(4, 4, 64, 64): metal.tuning}
    monkeypatch.undo()
    monkeypatch.setenv("MLX_TURBO_CACHE_DIR", str(tuning.path().parent))
    tuning.save(metal.tuned, "M9")
    assert tuning.load("M9") == metal.tuned  # it is no candidate, but a backend's own
    monkeypatch.setattr(tuning, "device_name", lambda: "M9")
    assert tuning.describe(metal.tuning).endswith("head_dim 64: the defaults")


def test_a_cache_folder_that_cannot_be_written_is_said_before_anything_is_tuned(run, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLX_TURBO_CACHE_DIR", str(tmp_path / "file"))
    metal = MetalBackend(metalsim.metal_kernel)
    monkeypatch.setattr(metal, "is_real", True)
    with pytest.raises(common.CliError, match="--tune: cannot keep what it finds in '.*tuning.json': File exists"):
        run("kernels", *SMALL, "--tune", backends=[metal])


@pytest.mark.parametrize("text", ["{", "[]", '{"entries": 3}', '{"entries": [{"chip": "M9"}]}'])
def test_a_damaged_file_is_ignored_and_replaced(text, recwarn):
    tuning.path().parent.mkdir(parents=True)
    tuning.path().write_text(text)
    assert tuning.load("M9") == {}
    assert ("is ignored" in str(recwarn[0].message)) if recwarn else "M9" in text
    tuning.save({(4, 4, 128, 128): AttendTuning()}, "M9")
    assert len(tuning.load("M9")) == 1


def test_an_edited_value_is_not_used():
    tuning.save({(4, 4, 128, 128): AttendTuning(simdgroups=3)}, "M9")
    assert tuning.load("M9") == {}


@LINUX
def test_tunings_are_timed_and_wrong_ones_left_out(monkeypatch):
    grid = contending.Grid((160,), (64,), (2,), (Scheme(4, 4),), mx.float32)
    metal = MetalBackend(metalsim.metal_kernel)
    tunings = [AttendTuning(), AttendTuning(tokens_per_lane_few_rows=1)]
    seconds, problems = tune.time_tunings(grid, metal, Scheme(4, 4), 64, "cpu", timing.Effort(1, 1, 0), tunings)
    assert all(s > 0 for s in seconds) and not problems
    grid = grid._replace(query_tokens=(1, 3))
    seconds, problems = tune.time_tunings(
        grid, metal, Scheme(4, 4), 64, "cpu", timing.Effort(1, 1, 0), [AttendTuning(), AttendTuning(rows_per_decode=8)]
    )
    assert all(s > 0 for s in seconds) and not problems
    seconds, problems = tune.time_tunings(grid, NoKernels(), Scheme(4, 4), 64, "cpu", timing.Effort(1, 1, 0), tunings)
    assert seconds == [None, None] and [problems[t]["status"] for t in tunings] == ["wrong", "wrong"]


@pytest.mark.parametrize(
    "broken, status, exit_code",
    [
        (lambda out: [mx.zeros_like(a) for a in out], "wrong", 1),
        (lambda out: [a * 1.02 for a in out], "wrong", 1),
        (lambda out: 1 / 0, "failed", 0),
    ],
    ids=["silent", "wrong", "does not run"],
)
@LINUX
def test_launch_parameters_that_are_wrong_or_fail_are_reported_and_not_ranked(
    run, monkeypatch, broken, status, exit_code
):
    """The kernel is broken with one of the candidates only, and would be the fastest: it is never run."""
    attend = KernelBackend.attend

    def planted(self, queries, *args, **options):
        if self.tuning.tokens_per_lane_few_rows == 1:
            return broken([mx.ones(queries.shape)])[0]
        return attend(self, queries, *args, **options)

    monkeypatch.setattr(KernelBackend, "attend", planted)
    monkeypatch.setattr(tuning, "CANDIDATES", {"tokens_per_lane_few_rows": (1, 4)})
    metal = MetalBackend(metalsim.metal_kernel)
    argv = [*SMALL, "--tune"]
    code, out, err = run("kernels", *argv, backends=[metal])
    said = "tuning turbo4, head_dim 64, tokens_per_lane_few_rows 1 (default 4)"
    assert code == exit_code and f"  - {said}: {status.upper()}: " in out
    assert f"mlx-turbo: {status.upper()}: {said}: " in err
    assert "Tuned turbo4, head_dim 64: the defaults, 1.00 of the default's time" in out
    assert metal.tuned == {(4, 4, 64, 64): AttendTuning()}


def test_a_kernel_that_is_wrong_with_every_launch_parameter_is_not_tuned(run, monkeypatch):
    monkeypatch.setattr(tuning, "CANDIDATES", {"tokens_per_lane_few_rows": (1, 4)})
    metal = NoKernels()
    code, out, err = run("kernels", *SMALL, "--tune", "--json", backends=[metal])
    (row,) = json.loads(out)["tuning"]
    assert code == 1 and metal.tuned == {} and "values" not in row and len(row["left_out"]) == 2
    assert "mlx-turbo: WRONG: tuning turbo4, head_dim 64, the defaults: WrongResultError: the Metal kernel disag" in err


# ---- generate --------------------------------------------------------------------------------------------------
GENERATE = ["--quick", "--context", "140", "--tokens", "3", "--rounds", "1"]


def test_generate_reports_speed_memory_and_distance_of_each_cache(run, tmp_path):
    code, out, err = run("generate", *GENERATE, "--kv", "mlx4", "turbo2", "--json", "--png", tmp_path / "x.png")
    assert code == 0, err
    d = json.loads(out)
    assert [r["name"] for r in d["rows"]] == ["none", "mlx4", "turbo2"] and d["model"] == "embedded demo model"
    plain, affine, turbo = d["rows"]
    assert plain["kld"] < 1e-6 < turbo["kld"] < 0.5 and affine["kld"] > 1e-6
    assert plain["generation_tps_ratio"] == 1 and turbo["generation_tps_ratio"] > 0
    assert all(r["peak_bytes"] >= r["cache_bytes"] > 0 and r["prompt_tps"] > 0 for r in d["rows"])
    assert affine["cache_bytes"] < plain["cache_bytes"] and turbo["cache_bytes"] < plain["cache_bytes"]
    assert turbo["layers"].startswith("4 of 4 layers compressed; attention of the last step: ")


def test_the_plot_of_generation_names_the_ratio_at_the_longest_context():
    pytest.importorskip("matplotlib")
    speeds = {("none", 100): 10, ("none", 200): 8, ("turbo4", 100): 5, ("turbo4", 200): 12}
    rows = [
        {
            "name": name,
            "context": context,
            "generated": 3,
            "status": "ok",
            "generation_tps": tps,
            "prompt_tps": tps,
            "generation_tps_ratio": tps / speeds["none", context],
            "prompt_tps_ratio": 1.0,
            "cache_bytes": 1000 // tps,
            "generation_tps_quartiles": [tps, tps],
            "prompt_tps_quartiles": [tps, tps],
            "peak_bytes": 9,
        }
        for (name, context), tps in speeds.items()
    ]
    document = {
        **timing.header("generate", [], "somewhere"),
        "rows": rows,
        "model": "m",
        "dtype": "float32",
        "rounds": 2,
        "column": "CPU fallback",
    }
    figure = bench_plots.generate_figure(document)
    texts = [t.get_text() for ax in figure.axes for t in ax.texts]
    assert "turbo4  1.50x" in texts and "uncompressed  1.00x" in texts and "turbo4  0.50x" not in texts
    assert bench_plots.headlines(document)[0] == (
        "At 200 tokens, turbo4 (CPU fallback) is 1.5x faster than the uncompressed cache (float32) and 1.5x smaller."
    )


class Scaled(CpuBackend):
    """Packed tokens are read `factor` times as large as they are: 0 is a kernel that silently does nothing."""

    def __init__(self, factor):
        self.factor = factor

    def read_rows(self, side, first, n):
        rows, scale, bits = super().read_rows(side, first, n)
        return rows * self.factor, scale, bits


@pytest.mark.parametrize(
    "factor, said",
    [
        (math.nan, "the next token's distribution is nan nats"),
        (0.0, "attention over what layer 0 holds disagrees with the oracle"),
        (1.02, "attention over what layer 0 holds disagrees with the oracle"),
    ],
)
def test_generate_with_a_broken_kernel_is_reported_and_has_no_speed(run, factor, said):
    code, out, err = run("generate", *GENERATE, "--kv", "turbo4", backends=[Scaled(factor)])
    assert code == 1 and f"turbo4        WRONG: {said}" in out
    assert "mlx-turbo: WRONG: turbo4 at 140 tokens" in err


class FailsLater(CpuBackend):
    """Runs while it is checked, and never again."""

    def read_rows(self, side, first, n):
        if self.tired:
            raise RuntimeError("out of memory")
        return super().read_rows(side, first, n)


def test_a_cache_that_fails_while_it_is_timed_is_reported_and_the_others_are_kept(run, monkeypatch):
    run_once = bench_generate.run_once
    backend = FailsLater()
    backend.tired = False

    def tired(*args):
        backend.tired = True
        try:
            return run_once(*args)
        finally:
            backend.tired = False

    monkeypatch.setattr(bench_generate, "run_once", tired)
    code, out, err = run("generate", *GENERATE, "--kv", "mlx4", "turbo4", "--json", backends=[backend])
    plain, affine, turbo = json.loads(out)["rows"]
    assert code == 1 and plain["generation_tps"] > 0 and affine["generation_tps_ratio"] > 0
    assert turbo["status"] == "failed" and "generation_tps" not in turbo
    assert "mlx-turbo: FAILED: turbo4 at 140 tokens: while it was timed: RuntimeError: out of memory" in err


def test_without_the_uncompressed_cache_there_is_nothing_to_compare_with(run, monkeypatch):
    steps = bench_generate.decode_steps

    def no_room(model, prompt, forced, kv, config):
        if kv == "none" and prompt.size > 140:
            raise RuntimeError("out of memory")
        return steps(model, prompt, forced, kv, config)

    monkeypatch.setattr(bench_generate, "decode_steps", no_room)
    code, out, err = run("generate", *GENERATE, "--context", "140", "150", "--json")
    rows = json.loads(out)["rows"]
    assert code == 1 and [(r["context"], r["status"]) for r in rows] == 2 * [(140, "ok")] + 2 * [(150, "failed")]
    assert "mlx-turbo: FAILED: none at 150 tokens: there is nothing to compare with" in err


# ---- compare ---------------------------------------------------------------------------------------------------
def test_compare_tells_a_difference_from_noise(run, tmp_path):
    _, out, _ = run("kernels", *SMALL, "--json")
    a = json.loads(out)
    b = json.loads(out)
    rows = [r for r in b["rows"] if r["operation"] == "attention"][:3]
    for name, factor in (("median_seconds", 3), ("low_seconds", 3), ("high_seconds", 3)):
        rows[0][name] = rows[0]["high_seconds"] * factor if name != "high_seconds" else rows[0][name] * 4
    rows[1] |= {"status": "wrong", "problem": "relative error 1.0"}
    for name in ("median_seconds", "low_seconds", "high_seconds"):
        del rows[1][name]
    b["machine"]["chip"] = "another"
    for name, document in (("a", a), ("b", b)):
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    code, out, err = run("compare", tmp_path / "a.json", tmp_path / "b.json", "--json")
    found = json.loads(out)
    verdicts = [r["verdict"] for r in found["rows"][:3]]
    assert code == 1 and verdicts == ["slower", "not compared: B is wrong", "within the spread"]
    assert found["different"].keys() == {"chip"} and found["a"]["command"] == a["command"]
    said = f"B: WRONG: {bench_rows.describe_row(rows[1])}: relative error 1.0"
    assert found["bad"] == [said] and err == f"mlx-turbo: {said}\n"
    code, out, err = run("compare", tmp_path / "a.json", tmp_path / "b.json")
    assert code == 1 and err == f"mlx-turbo: {said}\n" and "slower" in out and "rows in common" in out
    assert "different chip: A " in out and f"A: {a['command']} (commit " in out and out.count("Backends: ") == 2
    code, out, err = run("compare", tmp_path / "a.json", tmp_path / "a.json")
    assert code == 0 and not err and "different" not in out
    for row in a["rows"]:  # a file of before several query tokens were measured
        del row["query_tokens"]
    (tmp_path / "old.json").write_text(json.dumps(a))
    code, out, err = run("compare", tmp_path / "old.json", tmp_path / "b.json", "--json")
    assert [r["verdict"] for r in json.loads(out)["rows"][:3]] == verdicts
    for damaged in (
        {"format": 1, "benchmark": "kernels"},
        a | {"rows": [{"name": "turbo4"}]},
        [],
        a | {"format": 2},
        a | {"rows": 3},
        a | {"rows": [3]},
        a | {"benchmark": []},
    ):
        (tmp_path / "b.json").write_text(json.dumps(damaged))
        code, out, err = run("compare", tmp_path / "a.json", tmp_path / "b.json")
        said = f"B.json: {str(tmp_path / 'b.json')!r} is not what mlx-turbo bench --json writes"
        assert (code, out, err) == (2, "", f"mlx-turbo: error: {said}\n")


def test_scheme_names_of_the_default_are_schemes():
    assert all(TurboConfig.of(name).scheme.name == name for name in bench_common.SCHEMES)
