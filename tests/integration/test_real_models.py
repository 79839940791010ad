"""Trained models, where a folder of them is named: `MLX_TURBO_REAL_MODELS=FOLDER bash scripts/test.sh -m slow`.

FOLDER holds folders as mlx-lm loads them, of models of up to about a billion parameters; nothing is downloaded. The
bounds are about 3 times what the worst of SmolLM2-135M-Instruct, Qwen2.5-Coder-0.5B-Instruct and Gemma 3 270M had: of
so few tokens, a few decide.
"""

import json
import os
from pathlib import Path

import pytest

from mlx_turbo.cli.common import DEMO_MODEL

VARIABLE = "MLX_TURBO_REAL_MODELS"
FOLDER = os.environ.get(VARIABLE)
MODELS = sorted(path.parent for path in Path(FOLDER).glob("*/config.json")) if FOLDER else []
BOUNDS = {  # mean KL divergence and its p99.9, nats
    "turbo4": (0.006, 0.09),
    "turbo6": (0.00035, 0.006),
    "auto": (0.0045, 0.09),
}


@pytest.mark.slow
@pytest.mark.skipif(not FOLDER, reason=f"{VARIABLE} names no folder of trained models")
@pytest.mark.parametrize("model", MODELS or [None], ids=lambda path: path and path.name)
def test_what_compression_costs_a_trained_model(run, model):
    assert model, f"{VARIABLE}: {FOLDER} holds no model: no folder with a config.json"
    code, out, err = run(
        *("eval", "--model", model, "--text", DEMO_MODEL / "stories.txt", "--tokens", 384, "--chunk", 64),
        *("--windows", 1, "--kv", *BOUNDS, "--json"),
    )
    assert code == 0, err
    rows = {row["kv"]: row for row in json.loads(out)["results"]}
    for kv, (mean, p999) in BOUNDS.items():
        assert 0 < rows[kv]["kld"] <= mean and rows[kv]["kld_p999"] <= p999, (kv, rows[kv])
    assert rows["turbo6"]["kld"] < rows["turbo4"]["kld"] / 4
