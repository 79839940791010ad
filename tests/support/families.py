"""A tiny random model of every mlx-lm family that can be built small: `build(name)`.

SMALL gives the sizes that configurations of many families share, by their field names; a model takes those its
ModelArgs has. FAMILIES says what else a family needs. The sizes are ours: head dims that a TurboKVCache packs, windows
shorter than the tests' texts, and each kind of layer a family has at least once.
"""

import importlib
import pkgutil
import warnings

import mlx.core as mx
import mlx_lm.models
from mlx.utils import tree_map_with_path

from mlx_turbo import TurboConfig, TurboKVCache, make_prompt_cache
from mlx_turbo.integration.prompt_cache import flatten_caches

VOCABULARY = 96
YARN = dict(
    type="yarn",
    rope_type="yarn",
    factor=2.0,
    original_max_position_embeddings=256,
    beta_fast=32,
    beta_slow=1,
    mscale=1.0,
    mscale_all_dim=1.0,
)
PATTERN = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
LINEAR = ["linear_attention", "full_attention", "linear_attention", "full_attention"]

SMALL = dict(
    vocab_size=VOCABULARY,
    num_vocab=VOCABULARY,
    hidden_size=128,
    model_dim=128,
    d_model=128,
    n_embd=128,
    hidden_dim=128,
    num_hidden_layers=4,
    num_layers=4,
    n_layer=4,
    n_layers=4,
    num_transformer_layers=4,
    num_attention_heads=4,
    num_heads=4,
    n_head=4,
    n_heads=4,
    num_key_value_heads=2,
    num_kv_heads=2,
    n_kv_heads=2,
    head_dim=32,
    hidden_size_per_head=32,
    kv_channels=32,
    intermediate_size=96,
    ffn_hidden_size=96,
    n_inner=96,
    block_ff_dim=96,
    dense_intermediate_size=96,
    intermediate_size_mlp=96,
    ff_intermediate_size=96,
    shared_intermediate_size=96,
    # mixtures of experts
    num_experts=4,
    num_local_experts=4,
    n_routed_experts=4,
    moe_num_experts=4,
    num_experts_per_tok=2,
    num_experts_per_token=2,
    moe_topk=2,
    moe_top_k=2,
    moe_k=2,
    moe_intermediate_size=64,
    expert_ffn_hidden_size=64,
    n_shared_experts=1,
    num_shared_experts=1,
    num_shared_expert=[1] * 4,
    shared_expert_intermediate_size=64,
    share_expert_dim=64,
    moe_shared_expert_intermediate_size=64,
    first_k_dense_replace=1,
    num_dense_layers=1,
    moe_layer_freq=1,
    decoder_sparse_step=1,
    mlp_only_layers=[],
    n_group=1,
    topk_group=1,
    norm_topk_prob=True,
    routed_scaling_factor=1.0,
    scoring_func="sigmoid",
    topk_method="noaux_tc",
    # multi-head latent attention: a latent of 64 and 32 numbers of position
    kv_lora_rank=64,
    q_lora_rank=48,
    qk_nope_head_dim=32,
    qk_rope_head_dim=32,
    v_head_dim=32,
    # windows, linear and state-space layers
    sliding_window=16,
    sliding_window_size=16,
    window_size=16,
    attention_window_size=16,
    sliding_window_pattern=4,
    linear_num_key_heads=2,
    linear_num_value_heads=2,
    linear_key_head_dim=32,
    linear_value_head_dim=32,
    linear_conv_kernel_dim=4,
    conv_kernel=4,
    conv_L_cache=3,
    conv_bias=False,
    use_conv_bias=True,
    mamba_num_heads=4,
    mamba_head_dim=32,
    n_groups=1,
    ssm_state_size=16,
    state_size=16,
    time_step_rank=8,
    mamba_d_conv=4,
    mamba_d_state=16,
    mamba_expand=2,
    mamba_d_head=32,
    mamba_n_heads=8,
    mamba_d_ssm=256,
    mamba_proj_bias=False,
    mamba_n_groups=1,
    mamba_conv_bias=True,
    time_step_limit=(0.001, 100.0),
    conv1d_width=4,
    group_norm_size=2,
    layer_group_size=2,
    # the rest
    rms_norm_eps=1e-5,
    layer_norm_eps=1e-5,
    norm_eps=1e-5,
    layer_norm_epsilon=1e-5,
    layernorm_epsilon=1e-5,
    norm_epsilon=1e-5,
    rope_theta=10000.0,
    rotary_dim=16,
    rotary_pct=0.5,
    rotary_emb_base=10000,
    partial_rotary_factor=0.5,
    max_position_embeddings=512,
    n_positions=512,
    n_ctx=512,
    model_max_length=512,
    original_max_position_embeddings=512,
    tie_word_embeddings=True,
    attention_bias=False,
    mlp_bias=False,
    use_bias=False,
    use_qkv_bias=False,
    hidden_act="silu",
    use_qk_norm=True,
    embedding_multiplier=1.0,
    logits_scaling=1.0,
    attention_multiplier=0.2,
    residual_multiplier=1.0,
    dim_model_base=64,
    scale_depth=1.0,
    scale_emb=1.0,
    logits_soft_cap=30.0,
)

GEMMA4 = dict(
    num_hidden_layers=6,
    global_head_dim=64,
    vocab_size_per_layer_input=VOCABULARY,
    num_kv_shared_layers=2,
    hidden_size_per_layer_input=16,
    sliding_window_pattern=2,
)
KIMI = dict(
    linear_attn_config=dict(
        kda_layers=[1, 3], full_attn_layers=[2, 4], num_heads=2, head_dim=32, short_conv_kernel_size=4
    )
)
LFM2 = dict(
    block_dim=128,
    block_multiple_of=32,
    block_ffn_dim_multiplier=1.0,
    block_auto_adjust_ff_dim=False,
    full_attn_idxs=[1, 3],
)
LONGCAT = dict(
    attention_method="MLA",
    zero_expert_type="identity",
    zero_expert_num=2,
    mla_scale_q_lora=True,
    mla_scale_kv_lora=True,
)

FAMILIES = dict(
    afm7=dict(num_kv_reuse_layers=2),
    afmoe=dict(layer_types=PATTERN),
    apertus=dict(post_norm=False, qk_norm=True),
    baichuan_m1=dict(
        sliding_window_layers=[0, 2],
        conv_window=2,
        num_swa_attention_heads=4,
        num_swa_key_value_heads=2,
        tie_word_embeddings=False,
    ),
    bailing_moe=dict(norm_softmax=False, norm_head=False),
    cohere2=dict(sliding_window_pattern=4),
    dbrx=dict(
        ffn_config=dict(ffn_hidden_size=64, moe_num_experts=4, moe_top_k=2),
        attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=10000.0),
    ),
    deepseek_v2=dict(rope_scaling=YARN, topk_method="group_limited_greedy"),
    deepseek_v32=dict(index_head_dim=32, index_n_heads=2, index_topk=24),
    deepseek_v41=dict(
        head_dim=64,
        index_head_dim=32,
        index_n_heads=2,
        index_topk=24,
        o_groups=2,
        o_lora_rank=32,
        compress_ratios=(1, 4, 1, 4),
        kv_source_layer_ids=(0, 1, 2, 3),
        index_source_layer_ids=(0, 1, 2, 3),
    ),
    exaone4=dict(sliding_window_pattern="LLLG", rope_scaling=None),
    exaone_moe=dict(layer_types=PATTERN, is_moe_layer=[False, True, True, True]),
    falcon_h1={},
    gear=dict(layer_types=["conv_mixer", "sliding_attention", "conv_mixer", "full_attention"]),
    gemma3_text=dict(query_pre_attn_scalar=32, sliding_window_pattern=4),
    gemma4=dict(text_config=GEMMA4),
    gemma3n=dict(
        text_config=dict(
            vocab_size_per_layer_input=VOCABULARY,
            num_hidden_layers=6,
            num_kv_shared_layers=2,
            rope_local_base_freq=1e4,
            final_logit_softcapping=30.0,
            layer_types=["sliding_attention", "full_attention"] * 3,
            activation_sparsity_pattern=[0.5, 0, 0, 0, 0, 0],
            hidden_size_per_layer_input=16,
            altup_num_inputs=2,
            altup_coef_clip=10.0,
            altup_correct_scale=True,
            altup_active_idx=0,
            laurel_rank=8,
        )
    ),
    gemma4_text=GEMMA4,
    glm4_moe=dict(rope_scaling=None),
    glm_moe_dsa=dict(
        index_head_dim=32, index_n_heads=2, index_topk=24, rope_parameters=dict(rope_theta=10000.0, rope_type="default")
    ),
    gpt_oss=dict(layer_types=["sliding_attention", "full_attention"] * 2),
    granitemoehybrid=dict(layer_types=["mamba", "attention"] * 2, position_embedding_type="rope"),
    hunyuan=dict(
        use_mixed_mlp_moe=True,
        use_cla=True,
        cla_share_factor=2,
        moe_topk=[2] * 4,
        moe_intermediate_size=[64] * 4,
        rope_scaling=dict(alpha=10.0, factor=1.0, type="dynamic"),
    ),
    internlm2=dict(bias=False),
    iquestloopcoder=dict(loop_window_size=16),
    jamba=dict(attn_layer_offset=1, attn_layer_period=2, expert_layer_offset=1, expert_layer_period=2),
    kimi_linear=dict(KIMI, kv_lora_rank=512, qk_rope_head_dim=64),
    kimi_k3=dict(text_config=dict(KIMI, hidden_act="situ")),
    laguna=dict(layer_types=PATTERN),
    lfm2=LFM2,
    **{"lfm2-vl": dict(text_config=LFM2)},
    **{"lille-130m": dict(block_size=512)},
    llama4=dict(
        text_config=dict(num_experts_per_tok=1, attention_chunk_size=16, interleave_moe_layer_step=2, rope_scaling=None)
    ),
    llama4_text=dict(no_rope_layers=[1, 1, 1, 0]),
    lfm2_moe=dict(full_attn_idxs=[1, 3], use_expert_bias=True),
    longcat_flash=LONGCAT,
    longcat_flash_ngram=LONGCAT,
    mellum=dict(layer_types=PATTERN, rope_parameters={t: dict(rope_theta=10000.0) for t in PATTERN}),
    mimo_v2_flash=dict(
        hybrid_layer_pattern=[1, 1, 1, 0],
        add_swa_attention_sink_bias=True,
        add_full_attention_sink_bias=True,
        swa_rope_theta=10000.0,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=2,
        swa_head_dim=32,
        swa_v_head_dim=32,
        moe_layer_freq=[0, 1, 1, 1],
    ),
    minimax_m3_vl=dict(
        text_config=dict(
            index_n_heads=2,
            index_head_dim=32,
            index_block_size=4,
            index_topk_blocks=4,
            sparse_attention_freq=[0, 1] * 2,
            moe_layer_freq=[0, 1, 1, 1],
        )
    ),
    minicpm3=dict(
        rope_scaling=dict(original_max_position_embeddings=512, short_factor=[1.0] * 16, long_factor=[1.0] * 16)
    ),
    ministral3=dict(layer_types=PATTERN, rope_parameters=dict(YARN, rope_theta=10000.0, llama_4_scaling_beta=0.1)),
    mistral4=dict(rope_parameters=dict(YARN, rope_theta=10000.0, llama_4_scaling_beta=0.1)),
    muse_spark=dict(
        text_config=dict(
            post_norm_eps=1e-6,
            rope_parameters=dict(rope_theta=10000.0),
            layer_rope_theta=[10000.0] * 3 + [0],
            layer_types=PATTERN,
            final_logit_softcapping=20.0,
            output_multiplier=1.0,
            moe_hidden_size=64,
            num_shared_experts=0,
        )
    ),
    **{
        "nemotron-nas": dict(
            block_configs=[
                dict(attention=dict(n_heads_in_group=2), ffn=dict(ffn_mult=1.0)),
                dict(attention=dict(no_op=True), ffn=dict(ffn_mult=1.0)),
            ]
            * 2
        )
    },
    nemotron_h=dict(hybrid_override_pattern=["M", "*", "-", "*"]),
    olmo3=dict(layer_types=PATTERN),
    olmo_hybrid=dict(layer_types=LINEAR, linear_allow_neg_eigval=True),
    openelm=dict(num_query_heads=[4] * 4, num_kv_heads=[2] * 4, ffn_multipliers=[1.0] * 4, ffn_dim_divisor=8),
    # it writes to the logits of special tokens by their numbers, so its vocabulary has to be whole
    phi3small=dict(vocab_size=100352, dense_attention_every_n_layers=1, gegelu_limit=20.0),
    plamo=dict(n_shared_head=2),
    plamo2=dict(hidden_size_per_head=32),
    qwen3_next=dict(full_attention_interval=2),
    qwen3_5=dict(text_config=dict(full_attention_interval=2)),
    qwen3_5_moe=dict(text_config=dict(full_attention_interval=2)),
    recurrent_gemma=dict(block_types=["recurrent", "attention"]),
    rwkv7=dict(a_low_rank_dim=8, v_low_rank_dim=8, gate_low_rank_dim=8, decay_low_rank_dim=8),
    smollm3=dict(no_rope_layer_interval=4),
    spark2_5=dict(hidden_act="gelu", rope_parameters={t: dict(rope_theta=10000.0) for t in PATTERN}),
    step3p5=dict(num_attention_groups=2, layer_types=PATTERN),
)

ONLY_METAL = ("bitnet", "muse_spark")  # their layers have a kernel and no MLX operations
NOT_BUILT = {
    **{name: "runs only on Metal" for name in ONLY_METAL},
    "olmo": "needs the package ai2-olmo",
    "prism_hadamard_qwen35": "its layers come from a pack of 2-bit weights",
}

NAMED = [  # what the fast tests run
    "llama",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_5",
    "gemma3_text",
    "gemma3n",
    "gemma4_text",
    "gpt_oss",
    "mixtral",
    "phi3",
    "cohere2",
    "falcon_h1",
    "deepseek_v3",
    "glm4_moe_lite",
    "mistral4",
    "kimi_linear",
    "longcat_flash",
    "afm7",
    "iquestloopcoder",
    "minimax_m3_vl",
    "deepseek_v32",
]


# ---- what works, of each family: the cells of docs/models.md. test_families.py and test_batch.py hold our caches to a
# "yes", and to every exception that mlx-lm's own caches are one too
PHASES = ("prefill", "decode", "verify", "trim", "batch", "save, load")
UNTIL_FULL = "until a window is full"
CANNOT_TRIM = "no: a state cannot be trimmed"
NO_BATCH = "no: mlx-lm cannot batch such a cache"
ONE_NUMBER = "no: the model takes a single position for all rows"
EQUAL_LENGTHS = "only rows of equal length: mlx-lm's own batch is wrong for others"
NO_NAME = "no: mlx-lm cannot load such a cache"
EXCEPTIONS = {
    "trim": {
        UNTIL_FULL: """
            afmoe cohere2 exaone4 exaone_moe gemma3 gemma3_text gemma3n gemma4 gemma4_text gpt_oss iquestloopcoder
            laguna mellum mimo_v2_flash ministral3 muse_glimmer olmo3 plamo3 spark2_5 step3p5""",
        CANNOT_TRIM: """
            baichuan_m1 bailing_hybrid bailing_moe_linear bailing_moe_v3 deepseek_v41 falcon_h1 gear granitemoehybrid
            jamba kimi_k3 kimi_linear lfm2-vl lfm2 lfm2_moe longcat_flash_ngram mamba mamba2 nemotron_h olmo_hybrid
            plamo2 qwen3_5 qwen3_5_moe qwen3_next recurrent_gemma rwkv7""",
    },
    "batch": {
        EQUAL_LENGTHS: """
            afm7 baichuan_m1 bailing_moe_linear falcon_h1 gemma2 granitemoehybrid jamba longcat_flash_ngram mamba mamba2
            minimax_m3_vl nemotron_h olmo_hybrid phi3small plamo2 recurrent_gemma rwkv7""",
        ONE_NUMBER: "gpt_bigcode",
        NO_BATCH: "deepseek_v41 llama4",
    },
    "save, load": {NO_NAME: "deepseek_v41"},
}


def cell(name, phase):
    """ "yes", or the exception of a family."""
    return next((why for why, names in EXCEPTIONS.get(phase, {}).items() if name in names.split()), "yes")


def module_of(name):
    return importlib.import_module(f"mlx_lm.models.{name}")


def all_names():
    """Every module of mlx_lm.models that has a model."""
    helpers = {
        "activations",
        "base",
        "bitlinear_layers",
        "cache",
        "gated_delta",
        "mla",
        "pipeline",
        "rope_utils",
        "ssm",
        "switch_layers",
    }
    return [m.name for m in pkgutil.iter_modules(mlx_lm.models.__path__) if m.name not in helpers]


def config(name):
    """The small configuration of a family, as its config.json would have it."""
    extra = dict(FAMILIES.get(name, {}))
    args = {"model_type": name, **SMALL}
    if "text_config" in module_of(name).ModelArgs.__dataclass_fields__:
        args = {
            "model_type": name,
            "vocab_size": VOCABULARY,
            "text_config": {**args, "model_type": f"{name}_text", **extra.pop("text_config", {})},
        }
    return args | extra


def build(name, seed=0):
    """A small model of the family with random weights in float32, evaluated."""
    module = module_of(name)
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(config(name)))
    model.set_dtype(mx.float32)

    def weight(path, x):
        if not mx.issubdtype(x.dtype, mx.floating):
            return x
        if "sink" in path:  # enough to take a good part of the weight
            return x + 3
        # matrices large enough for attention to differ from token to token; norms and biases nearly as made
        return mx.random.normal(x.shape) * 0.1 if x.ndim > 1 else x + mx.random.normal(x.shape) * 0.05

    model.update(tree_map_with_path(weight, model.parameters()))
    model.eval()
    mx.eval(model.parameters())
    return model


WRITES_EMPTY_ARRAYS = tuple(map(int, mx.__version__.split(".")[:2])) > (0, 30)


WINDOW = dict(sink=2, recent=4, block=4)  # so small that each chunk of the prompt is packed, and windows of 16 tokens


def compressed(model, config):
    """Our prompt cache for a model; a warning that nothing is compressed has to be true."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cache = make_prompt_cache(model, TurboConfig.of(config, **WINDOW))
    nothing = not any(isinstance(c, TurboKVCache) for c in flatten_caches(cache))
    assert [str(w.message)[:21] for w in caught] == ["nothing is compressed"] * nothing
    return cache
