"""The embedded model: it loads, it reads, and its training script matches it."""

import json
import math
import runpy
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm import load
from mlx_lm.utils import dequantize_model

ROOT = Path(__file__).resolve().parents[2]
DEMO_MODEL = ROOT / "mlx_turbo" / "demo_model"
TRAIN_SCRIPT = ROOT / "scripts" / "train_demo_model.py"
EOT = "<|endoftext|>"


@pytest.fixture(scope="module")
def demo():
    """(model, tokenizer), dequantized to float32: MLX's CPU is ten times slower on 8 bits in bfloat16."""
    model, tokenizer = load(str(DEMO_MODEL))
    model = dequantize_model(model)
    model.set_dtype(mx.float32)
    return model, tokenizer


def stories():
    return [s.strip() for s in (DEMO_MODEL / "stories.txt").read_text().split(EOT)]


def test_its_files_stay_below_six_megabytes():
    assert sum(f.stat().st_size for f in DEMO_MODEL.iterdir()) < 6e6


def test_config_is_the_training_script_s_plus_8_bit_groups_of_64():
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    eight_bit = {"group_size": 64, "bits": 8, "mode": "affine"}
    assert config.pop("quantization") == config.pop("quantization_config") == eight_bit
    assert config == runpy.run_path(str(TRAIN_SCRIPT))["CONFIG"]


def test_held_out_stories_read_well(demo):
    model, tokenizer = demo
    tokens = tokenizer.encode(EOT.join(stories()[:6]))[:1025]
    x = mx.array(tokens)[None]
    logits = model(x[:, :-1])
    log_p = mx.take_along_axis(logits, x[:, 1:, None], -1)[..., 0] - mx.logsumexp(logits, -1)
    assert math.exp(-log_p.mean().item()) < 8.0  # measured: 7.56


def test_excerpts_are_complete_stories():
    assert len(stories()) == 36
    for story in stories():
        assert story[0].isupper() or story[0] == '"'
        assert story.endswith((".", "!", "?", '"'))


@pytest.mark.parametrize("stage", [[], ["prepare"], ["tokenizer"], ["train"], ["export"], ["quantize"]])
def test_training_script_explains_itself_without_torch(stage):
    code = (
        "import runpy, sys; sys.modules['torch'] = sys.modules['tokenizers'] = None; "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(TRAIN_SCRIPT), *stage, "--help"], capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr
    assert out.stdout.startswith("usage: train_demo_model.py")
