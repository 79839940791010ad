"""Small random models of mlx-vlm: `build(name)`. An encoder each, and a language model of the sizes of families.py.

They need the fixture `vlm`, which makes mlx_vlm importable."""

import importlib
import types
import zipfile

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map_with_path
from support.downloads import downloaded, filled_once

VERSION = "0.7.10"
VOCABULARY = 96
IMAGE_TOKEN = 90
TEXT = dict(
    vocab_size=VOCABULARY,
    hidden_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    intermediate_size=96,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    max_position_embeddings=2048,
    tie_word_embeddings=False,
)
SECTIONS = dict(type="default", mrope_section=[6, 5, 5])
QWEN_VISION = dict(
    depth=2,
    hidden_size=32,
    out_hidden_size=128,
    intermediate_size=48,
    num_heads=2,
    patch_size=4,
    spatial_patch_size=4,
    num_position_embeddings=64,
    fullatt_block_indexes=[1],
    window_size=16,
)
VISION = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, patch_size=4, image_size=16
)
FAMILIES = {  # a model's own fields, its text_config and its vision_config
    "qwen2_vl": (dict(), dict(rope_scaling=SECTIONS), dict(QWEN_VISION, embed_dim=32, hidden_size=128)),
    "qwen2_5_vl": (dict(), dict(rope_scaling=SECTIONS), QWEN_VISION),
    "qwen3_vl": (dict(), dict(rope_scaling=SECTIONS), dict(QWEN_VISION, deepstack_visual_indexes=[0])),
    "qwen3_5": (
        dict(),
        dict(
            linear_num_value_heads=4,
            linear_num_key_heads=2,
            linear_key_head_dim=32,
            linear_value_head_dim=32,
            linear_conv_kernel_dim=4,
            full_attention_interval=2,
            rope_parameters=dict(SECTIONS, mrope_section=[3, 3, 2], rope_theta=10000.0, partial_rotary_factor=0.5),
        ),
        QWEN_VISION,
    ),
    "gemma3": (
        dict(mm_tokens_per_image=4),
        dict(sliding_window=16, sliding_window_pattern=2, query_pre_attn_scalar=32, mm_tokens_per_image=4),
        dict(VISION, model_type="siglip_vision_model"),
    ),
    "gemma4": (
        dict(),
        dict(
            num_hidden_layers=6,
            global_head_dim=64,
            vocab_size_per_layer_input=VOCABULARY,
            num_kv_shared_layers=2,
            hidden_size_per_layer_input=16,
            sliding_window=16,
            sliding_window_pattern=2,
        ),
        dict(VISION, num_key_value_heads=2, head_dim=16, global_head_dim=16, position_embedding_size=64),
    ),
    "gemma3n": (
        dict(),
        dict(
            vocab_size_per_layer_input=VOCABULARY,
            num_hidden_layers=6,
            num_kv_shared_layers=2,
            intermediate_size=[96] * 6,
            layer_types=["sliding_attention", "full_attention"] * 3,
            activation_sparsity_pattern=[0.5, 0, 0, 0, 0, 0],
            sliding_window=16,
            hidden_size_per_layer_input=16,
            altup_num_inputs=2,
            laurel_rank=8,
            final_logit_softcapping=30.0,
        ),
        None,
    ),
    "mistral3": (
        dict(),
        dict(model_type="mistral", rope_parameters=dict(rope_theta=10000.0)),
        dict(VISION, model_type="pixtral", head_dim=16, rope_theta=100.0, num_channels=3),
    ),
    "llava": (dict(), dict(model_type="llama"), dict(VISION, model_type="clip_vision_model")),
    "idefics3": (dict(), dict(model_type="llama"), dict(VISION, model_type="idefics3")),
    "glm4v": (
        dict(),
        dict(
            attention_bias=True,
            attention_dropout=0.0,
            hidden_act="silu",
            initializer_range=0.02,
            pad_token_id=0,
            eos_token_id=[0],
            partial_rotary_factor=0.5,
            rope_scaling=SECTIONS,
            rope_parameters=dict(SECTIONS, rope_theta=10000.0, partial_rotary_factor=0.5),
        ),
        dict(QWEN_VISION, model_type="glm4v"),
    ),
    "lfm2_vl": (
        dict(),
        dict(
            model_type="lfm2",
            norm_eps=1e-5,
            conv_bias=False,
            conv_L_cache=3,
            block_dim=128,
            block_ff_dim=96,
            block_multiple_of=32,
            block_ffn_dim_multiplier=1.0,
            block_auto_adjust_ff_dim=False,
            layer_types=["conv", "full_attention"] * 2,
            full_attn_idxs=[1, 3],
        ),
        dict(VISION, model_type="lfm2_vl", num_patches=16),
    ),
}


def build(name, seed=0, vocabulary=VOCABULARY, image_token=IMAGE_TOKEN):
    """A small model of mlx-vlm with random weights in float32, evaluated; without a vision_config a language model."""
    own, text, vision = FAMILIES[name]
    module = importlib.import_module(f"mlx_vlm.models.{name}")
    text = module.TextConfig.from_dict({"model_type": name, **TEXT, "vocab_size": vocabulary, **text})
    mx.random.seed(seed)
    if vision is None:
        model = module.LanguageModel(text)
    else:
        own = {"image_token_id": image_token, "image_token_index": image_token, "vocab_size": vocabulary, **own}
        own = {key: value for key, value in own.items() if key in module.ModelConfig.__dataclass_fields__}
        vision = module.VisionConfig.from_dict({"model_type": name, **vision})
        model = module.Model(module.ModelConfig(text_config=text, vision_config=vision, model_type=name, **own))
    model.set_dtype(mx.float32)

    def weight(path, x):
        if not mx.issubdtype(x.dtype, mx.floating):
            return x
        return mx.random.normal(x.shape) * 0.1 if x.ndim > 1 else x + mx.random.normal(x.shape) * 0.05

    model.update(tree_map_with_path(weight, model.parameters()))
    model.eval()
    mx.eval(model.parameters())
    return model


def unpacked(folder):
    """mlx-vlm's wheel in a folder, which is made if it is not there, without what it depends on: 39 MB in place of
    700. Its models, `generate` and its batches need only what mlx-lm needs; its server, audio and video need more."""
    if tuple(map(int, mx.__version__.split(".")[:3])) < (0, 32, 4):
        pytest.skip(f"mlx-vlm {VERSION} needs mlx 0.32.4")
    with filled_once(folder) as new:
        if new:
            with downloaded(f"mlx-vlm=={VERSION}", "--only-binary", "mlx-vlm") as wheel:
                zipfile.ZipFile(wheel).extractall(new)
    return folder


QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")
IMAGE_TOKENS = {**dict.fromkeys(QWEN, 4), "gemma3": 4, "mistral3": 4, "idefics3": 4, "llava": 16}


def image(name, seed=0):
    """A random image of 16 x 16 pixels, as a family's processor makes them: (number of its tokens, pixel_values, what
    else the model gets)."""
    rng, patch = np.random.default_rng(seed), QWEN_VISION["patch_size"]
    if name in QWEN:
        grid = 16 // patch
        pixels, options = rng.normal(size=(grid**2, 3 * 2 * patch**2)), {"image_grid_thw": mx.array([[1, grid, grid]])}
    else:
        pixels = rng.normal(size=(1, 1, 3, 16, 16) if name == "idefics3" else (1, 3, 16, 16))
        options = {"image_sizes": [(16, 16)]} if name == "mistral3" else {}
    return IMAGE_TOKENS[name], mx.array(pixels, mx.float32), options


class Processor:
    """A processor for a random model: the embedded model's tokenizer, and the same image for any."""

    def __init__(self, tokenizer, image_token):
        self.image_token_id = image_token
        self.tokenizer, self.detokenizer = tokenizer, tokenizer.detokenizer
        self.chat_template = None

    def apply_chat_template(self, messages, **_):
        return "".join(
            part.get("text", "") if part["type"] == "text" else "<image>" for m in messages for part in m["content"]
        )

    def __call__(self, text, images, padding, return_tensors, **_):
        texts = [text] if isinstance(text, str) else text
        ids = [i for t in texts for i in self.tokenizer.encode(t.replace("<image>", ""))]
        n_tokens, pixels, options = image("qwen3_vl")
        ids = [*[self.image_token_id] * n_tokens, *ids]
        return {
            "input_ids": mx.array([ids]),
            "attention_mask": mx.ones((1, len(ids)), mx.int32),
            "pixel_values": pixels,
            **options,
        }


class NeverStops:
    def add_eos_token_ids(self, ids):
        pass

    def __call__(self, token):
        return False


WITHOUT_TOKENIZER = types.SimpleNamespace(tokenizer=types.SimpleNamespace(stopping_criteria=NeverStops()))
