"""The measuring scripts in scripts/ run and print well-formed JSON with plausible numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="metalsim runs on Linux")


def run(script, *arguments):
    done = subprocess.run([sys.executable, str(SCRIPTS / script), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


@LINUX
def test_kernel_cost_counts_fewer_operations_and_bytes_than_fp16():
    done = run("kernel_cost.py", "--gqa", "4", "--head-dim", "128", "--scheme", "turbo4", "--json")
    (row,) = json.loads(done.stdout)
    assert (row["head_dim"], row["gqa"], row["scheme"], row["tokens"]) == (128, 4, "turbo4", 2048)
    assert 8 < row["ops_per_pair"] < 0.6 * row["mlx_fp16_ops_per_pair"]  # 8: a multiply-add per head and side
    assert row["ops_per_pair"] == pytest.approx(row["attend_ops_per_pair"] + row["merge_ops_per_pair"])
    assert row["ops_per_pair"] == pytest.approx(sum(row["ops_by_class"].values()))
    assert row["launches"] == 2 and row["bytes_read_over_packed"] == 1
    assert 0.25 < row["bytes_vs_fp16"] < 0.27
    assert row["threadgroup_bytes"] <= 32768 and row["simd_ops_per_pair"] > 0
    assert all(0.5 < ratio < 10 for ratio in row["predicted_fp16_over_ours"].values())
    assert "1 of 1" in done.stderr


@LINUX
def test_kernel_cost_prints_a_table_that_calls_its_prediction_one():
    out = run(
        "kernel_cost.py", "--gqa", "1", "--head-dim", "64", "--scheme", "turbo2", "--tokens", "320", "--exact"
    ).stdout
    assert "320 packed and 68 exact tokens" in out and "PREDICTION, not a measurement" in out
    assert "fp16 2pass_1" in out and "M4 Max" in out


@LINUX
def test_kernel_cost_says_what_is_missing_or_wrong(tmp_path, monkeypatch):
    command = [sys.executable, str(SCRIPTS / "kernel_cost.py")]
    done = subprocess.run([*command, "--scheme", "turbo7"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("kernel_cost: scheme: got 'turbo7'")
    (tmp_path / "ziglang.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("METALSIM_CLANG", raising=False)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "pip install ziglang" in done.stderr and "Traceback" not in done.stderr


@LINUX
def test_cuda_registers_prints_what_each_kernel_of_a_step_asks_for():
    out = run("cuda_registers.py", "--head-dim", "64", "--gqa", "2", "--scheme", "turbo3").stdout
    title, names, *lines = out.splitlines()
    assert title.startswith("sm_90a, NVRTC 13.0") and names.split()[-5:] == [
        "shared",
        "regs",
        "spill",
        "stack",
        "warps",
    ]
    kernels = {line[20:38].strip(): line.split()[-5:] for line in lines}
    in_registers = {"quantize", "dequantize", "requantize"}
    assert set(kernels) == {"attend, one launch", "attend", "merge", "statistics", *in_registers}
    for name, numbers in kernels.items():
        shared, registers, spills, stack, warps = map(int, numbers)
        assert (shared > 0) == (name not in in_registers) and 20 < registers < 256
        assert spills <= 200 and stack <= 64 and 8 <= warps <= min(64, 65536 // 32 // registers)


def test_attention_timing_names_the_backend_of_each_figure():
    rows = json.loads(run("attention_timing.py", "--quick", "--json").stdout)
    assert all(0 < r["low_seconds"] <= r["median_seconds"] <= r["high_seconds"] and r["dtype"] for r in rows)
    by = {
        what: {r["name"]: r for r in rows if r["what"] == what} for what in ("attention", "latents", "python overhead")
    }
    assert list(by["attention"]) == ["uncompressed", "mlx-lm 8 bit", "mlx-lm 4 bit", "turbo4"]
    assert list(by["python overhead"]) == ["uncompressed", "mlx-lm 4 bit", "turbo4"]
    assert list(by["latents"]) == ["uncompressed", "turbo4"]
    assert [r["heads"] for r in rows if r["what"] == "latents"] == [16, 128, 16, 128]
    ours = [r for r in rows if r["name"] == "turbo4"]
    assert ours[0]["status"] == "ok" and ours[0]["column"] in ("CPU fallback", "Metal", "CUDA")
    assert all(r["column"].startswith(("cpu fallback", "metal", "cuda")) for r in ours[1:])


@LINUX
def test_packing_cost_counts_what_the_ceilings_of_the_kernel_tests_allow():
    from support.ceilings import DEQUANTIZE_CEILING, QUANTIZE_CEILING, REQUANTIZE_CEILING

    from mlx_turbo.backends.attend_launch import vectors_per_simdgroup

    rows = json.loads(run("packing_cost.py", "--json").stdout)
    rows, again = ([r for r in rows if ("fewer" in r) == fewer] for fewer in (False, True))
    assert {b for r in again for b in (r["bits"], r["fewer"])} == {8, 6, 4, 3, 2}
    for r in again:
        assert 10 < r["requantize_ops"] <= REQUANTIZE_CEILING[r["head_dim"], r["bits"], r["fewer"]] + 0.1
        lanes = 32 // vectors_per_simdgroup(r["head_dim"])  # each of which reads the scale
        codes = (r["bits"] + r["fewer"]) / 8
        assert r["requantize_bytes"] == pytest.approx(codes + 2 * (lanes + 1) / r["head_dim"], abs=0.03)
    assert {(r["head_dim"], r["bits"]) for r in rows} == set(QUANTIZE_CEILING)
    for r in rows:
        case = r["head_dim"], r["bits"]
        assert 10 < r["quantize_ops"] <= QUANTIZE_CEILING[case] + 0.1
        assert 10 < r["dequantize_ops"] <= DEQUANTIZE_CEILING[case] + 0.1
        assert r["quantize_bytes"] == pytest.approx(2 + r["bits"] / 8 + 2 / r["head_dim"], abs=0.002)


def test_ablation_measures_what_each_protection_contributes(tmp_path):
    rows = ["4 bits, the paper's scale, nothing else", "+ inner-product scale", "+ balance = the default"]
    picture = tmp_path / "ablation.png"
    out = json.loads(
        run("ablation.py", "--tokens", "400", "--windows", "1", "--json", "--png", str(picture), "--rows", *rows).stdout
    )
    assert [r["configuration"] for r in out["rows"]] == rows and "cpu fallback" in out["where"]
    paper, scale, default = (r["kld"] for r in out["rows"])
    assert 0 < default < scale / 2 < paper / 3  # measured on 2,048 tokens: docs/quality.md
    assert all(4.1 < r["bits_32k"] < 4.4 < r["bits_here"] for r in out["rows"][2:])
    assert picture.stat().st_size > 10_000
    file, both = tmp_path / "one.json", tmp_path / "both.png"
    file.write_text(json.dumps(out))
    shown = run("ablation.py", "--of", str(file), str(file), "--png", str(both)).stdout.splitlines()
    assert shown[0].count("embedded model: KLD") == 2 and shown[3].startswith(f"| {rows[1]} | {scale:.2g} |")
    assert both.stat().st_size > 10_000


def test_prefill_cost_times_the_first_chunk_with_and_without_what_is_chosen_there():
    out = json.loads(run("ablation.py", "--prefill-cost", "--tokens", "300", "--json").stdout)
    assert list(out["ms"]) == ["turbo4, no balance", "turbo4", "auto"] and out["tokens"] == 300
    assert min(out["ms"].values()) > 0


def test_centring_measures_that_a_bias_that_turns_needs_means_by_segment():
    rows = {r["bias"]: r for r in json.loads(run("centring.py", "--tokens", "4096", "--json").stdout)}
    unbiased, low = rows["none"]["not centred"], rows["low frequencies, base 1e4"]
    assert low["per 128"] < 2 * unbiased < 50 * unbiased < min(low["not centred"], low["first 2,048"])
    assert rows["constant after RoPE"]["first 2,048"] < 1.5 * unbiased


def test_attention_errors_of_a_model_are_captured_and_shown(tmp_path):
    file = str(tmp_path / "captured.npz")
    demo_model = SCRIPTS.parent / "mlx_turbo" / "demo_model"
    assert (
        "4 layers, 300 tokens" in run("attention_errors.py", "capture", str(demo_model), file, "--tokens", "300").stdout
    )
    out = json.loads(run("attention_errors.py", "show", file, "--json", "--recent", "64").stdout)
    eight = json.loads(run("attention_errors.py", "show", file, "--json", "--recent", "64", "--bits", "8").stdout)
    assert out["tokens"] == 300 and len(out["layers"]) == 4
    for layer, better in zip(out["layers"], eight["layers"]):
        for way, found in layer["ways"].items():
            assert len(found["kl"]) == 2 and 1e-5 < max(found["kl"]) < 0.1
            assert max(better["ways"][way]["kl"]) < max(found["kl"]) / 50 and found["keys"] < found["both"] < 0.1
        assert better["values"] < layer["values"] / 50


def test_attention_errors_find_what_centering_and_balance_are_for(tmp_path):
    rng, n, dims = np.random.default_rng(0), 512, 64
    queries, keys, values = (rng.standard_normal((1, heads, n, dims)) for heads in (4, 2, 2))
    loud = np.where(np.arange(dims) < 4, 30, 1)  # channels with large keys that the queries hardly look at
    arrays = {}
    balanced = queries / loud, keys * loud
    for i, (q, k) in enumerate(((queries, keys), (queries, keys + 40), balanced, (balanced[0], balanced[1] + 40))):
        layer = {"q": q, "k": k, "v": values, "scale": np.float64(0.125), "visible": np.tri(n, dtype=bool)}
        arrays |= {f"{i} {name}": x for name, x in layer.items()}
    np.savez(tmp_path / "captured.npz", **arrays)
    command = "attention_errors.py", "show", str(tmp_path / "captured.npz"), "--json"
    by_layer = [
        {way: max(x["kl"]) for way, x in layer["ways"].items()} for layer in json.loads(run(*command).stdout)["layers"]
    ]
    plain, biased, loud, both = by_layer
    assert biased["plain"] > 20 * plain["plain"] and biased["centred"] < 1.5 * plain["centred"]
    assert loud["centred"] > 10 * plain["plain"] and loud["centred, s^1"] < 1.5 * plain["plain"]
    assert loud["centred, s^1"] < loud["centred, s^3/4"] < loud["centred, s^1/2"] < loud["centred"]
    assert both["centred, s^1"] < 1.5 * plain["plain"] < both["centred"] / 5  # s is that of the centred keys
    exact = json.loads(run(*command, "--recent", str(n - 4)).stdout)["layers"]
    assert all(max(*x["kl"], x["both"]) < 1e-12 for layer in exact for x in layer["ways"].values())


def test_store_cost_measures_bytes_and_speed():
    found = json.loads(run("store_cost.py", "--prompt", "0", "--tokens", "2500", "--layers", "1").stdout)
    bare = found["bare"]
    assert 0.25 < bare["ratio"] < 0.32 and bare["bytes_per_token_and_layer"] > 1024 + 32
    when = ["cold", "warm"] if hasattr(os, "posix_fadvise") else ["warm"]
    measured = {f"{way}_{w}" for way in ("read", "fetch", "fetch_and_keep", "mlx_lm") for w in when}
    assert set(bare["GB_per_s"]) == set(bare["seconds"]) == measured
    assert min(bare["GB_per_s"].values()) > 0
    assert found["first_token"] is None
    large = found["arithmetic_8b"]
    assert 1 < large["bytes"] / (2500 * 36 * 2 * 8 * (64 + 2)) < 1.3  # packed rows; besides: exact tokens, room to grow
    assert large["weights_of_layers"] == 36 * (4096 * 128 * (2 * 32 + 2 * 8) + 3 * 4096 * 12288 + 2 * 4096 + 2 * 128)
    assert large["operations"] == 5000 * large["weights_of_layers"] + 4 * 36 * 32 * 128 * 2500 * 2501 / 2
    assert large["fetch_s"] == large["bytes"] / 1e9 / bare["GB_per_s"][f"fetch_{when[0]}"]


def test_a_budget_of_memory_is_measured_beside_fixed_schemes_at_equal_bytes(tmp_path):
    picture = tmp_path / "budget.png"
    out = json.loads(
        run("memory_budget.py", "--tokens", "500", "--chunk", "100", "--fractions", "2", "--bins", "2", "--json",
            "--png", str(picture)).stdout
    )  # fmt: skip
    rows = {row["kv"]: row for row in out["rows"]}
    budget, fixed = rows["memory 1/2"], rows["fixed 1/2"]
    assert (
        budget["most_nbytes"] <= budget["limit"] == out["uncompressed_nbytes"] // 2
        and fixed["nbytes"] <= fixed["limit"]
    )
    assert budget["kld_by_length"][0] <= fixed["kld_by_length"][0] + 1e-6 < rows["turbo2"]["kld_by_length"][0]
    assert len(budget["nbytes_by_chunk"]) == 5 and picture.stat().st_size > 10_000
