"""Small models of mlx-lm's families with random weights."""

import importlib
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

import mlx_turbo

DEMO_MODEL = Path(mlx_turbo.__file__).parent / "demo_model"


def family(name, **args):
    """A small model of an mlx-lm family with random weights."""
    mx.random.seed(0)
    module = importlib.import_module(f"mlx_lm.models.{name}")
    model = module.Model(module.ModelArgs(model_type=name, **args))
    # RMSNorm weights and the like as they are, matrices large enough for attention to differ from token to token
    model.update(tree_map(lambda x: mx.random.normal(x.shape) * 0.1 if x.ndim > 1 else x, model.parameters()))
    mx.eval(model.parameters())
    return model


def llama(head_dim=64, **args):
    return family(
        "llama",
        **{
            **dict(
                hidden_size=64,
                num_hidden_layers=2,
                intermediate_size=96,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=head_dim,
                rms_norm_eps=1e-5,
                vocab_size=100,
            ),
            **args,
        },
    )


def gemma3(**args):
    return family(
        "gemma3_text",
        **{
            **dict(
                hidden_size=64,
                num_hidden_layers=6,
                intermediate_size=96,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=64,
                query_pre_attn_scalar=64,
                vocab_size=100,
                sliding_window=16,
                sliding_window_pattern=3,
            ),
            **args,
        },
    )


def tokens_of(n, vocabulary=100):
    return mx.array(np.random.default_rng(0).integers(0, vocabulary, (1, n)))
