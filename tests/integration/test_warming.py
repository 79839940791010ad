"""After warm-up a conversation builds no kernel: what would be handed to Metal's compiler is written down."""

import argparse
import copy
import importlib
import io
import types

import metalsim
import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_map
from mlx_lm.models import deepseek_v3, gemma3_text, gpt_oss, llama, qwen2
from support import families
from support import vlm as models_of_vlm
from support.no_kernels import DoesNotBuild

import mlx_turbo
from mlx_turbo.backends import kernel_backend, select
from mlx_turbo.backends.attend_launch import AttendTuning
from mlx_turbo.backends.metal import MetalBackend
from mlx_turbo.backends.mlx_ops import CpuBackend
from mlx_turbo.backends.sides import BackendError
from mlx_turbo.backends.tiled_attention import tiled_attention
from mlx_turbo.cache import auto_bits
from mlx_turbo.cache.memory_budget import MemoryBudgetError
from mlx_turbo.cache.repacking import reachable_pairs
from mlx_turbo.cli import common, serve
from mlx_turbo.cli.common import DEMO_MODEL
from mlx_turbo.integration import prompt_cache, warming
from mlx_turbo.integration.prompt_cache import flatten_caches

CPU = CpuBackend()
# Tokens from which on attention takes two launches here, more than warm-up needs: decoding 1,024 takes long.
MANY, MANY_OF_AUTO = 150, 400


class Recorder(MetalBackend):
    """The Metal path: the texts of its kernels are written down, the results are the CPU fallback's."""

    def __init__(self):
        super().__init__(self._record)
        self.texts, self.tuning = set(), AttendTuning(one_launch_tokens=MANY_OF_AUTO)
        self._text_of = {}  # what the text depends on -> itself

    def _record(self, name, input_names, output_names, source, header="", ensure_row_contiguous=True):
        def call(*, inputs, output_shapes, output_dtypes, template, **launch):
            key = name, *template, *((a.dtype, a.ndim == 0, a.size < 8) for a in inputs), *output_dtypes
            if key not in self._text_of:
                self._text_of[key] = metalsim.generate(
                    name, input_names, output_names, source, header, False, inputs, output_dtypes, template
                )[0]
                self.texts.add(self._text_of[key])
            return [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes)]

        return call

    def run_check(self, what, check):
        check()  # its launches count, its verdict on zeros does not

    def quantize(self, *args, **options):
        super().quantize(*args, **options)
        return CPU.quantize(*args, **options)

    def requantize(self, *args, **options):
        super().requantize(*args, **options)
        return CPU.requantize(*args, **options)

    def statistics(self, *args):
        super().statistics(*args)
        return CPU.statistics(*args)

    def dequantize(self, *args, **options):
        super().dequantize(*args, **options)
        return CPU.dequantize(*args, **options)

    def read_rows(self, *args):
        super().read_rows(*args)
        return CPU.read_rows(*args)

    def attend(self, *args, **options):
        super().attend(*args, **options)
        return tiled_attention(*args, CPU.read_rows, **options)

    def kinds(self):
        """How many texts of each file."""
        return {
            name: sum(f"custom_kernel_turbo_{name}_" in text for text in self.texts)
            for name in ("statistics", "quantize", "requantize", "dequantize", "attend", "merge")
        }


@pytest.fixture
def recorder(door):
    with select.use_backend(Recorder()) as backend:
        yield backend


@pytest.fixture(scope="module")
def tokenizer():
    return mlx_lm.load(str(DEMO_MODEL))[1]


def build(module, dtype=mx.bfloat16, key_bias=0, **options):
    """A random model of two layers that speaks the embedded one's tokens."""
    args = dict(
        model_type=module.__name__.split(".")[-1],
        hidden_size=64,
        num_hidden_layers=2,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=64,
        rms_norm_eps=1e-5,
        vocab_size=2048,
        rope_theta=1e6,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
    )
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict(args | options))
    model.update(tree_map(lambda a: mx.random.normal(a.shape) * 0.2 if a.ndim > 1 else a, model.parameters()))
    if key_bias:
        for layer in model.layers:
            layer.self_attn.k_proj.bias = layer.self_attn.k_proj.bias + key_bias
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    return model


MODELS = {
    "llama": lambda: build(llama),
    "float16": lambda: build(llama, mx.float16, num_key_value_heads=2),
    "biased keys": lambda: build(qwen2, key_bias=30, hidden_size=128, num_attention_heads=2),
    "sliding windows": lambda: build(
        gemma3_text, sliding_window=280, sliding_window_pattern=2, query_pre_attn_scalar=64
    ),
    "attention sinks": lambda: build(
        gpt_oss,
        mx.float32,
        num_attention_heads=8,
        num_key_value_heads=2,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
        num_local_experts=2,
        num_experts_per_tok=1,
    ),
    "latents": lambda: build(
        deepseek_v3,
        mx.float32,
        **families.SMALL | dict(vocab_size=2048, num_hidden_layers=2, max_position_embeddings=4096),
    ),
}


def converse(model, tokenizer, config, n_prompt, n_answer, **options):
    """mlx-lm's own generation, of two turns; the second prompt is a chunk over packed tokens."""
    prompt = [int(i) for i in np.random.default_rng(1).integers(3, 2000, n_prompt)]
    cache = prompt_cache.make_prompt_cache(model, config)
    if draft := options.get("draft_model"):
        cache += prompt_cache.make_prompt_cache(draft, config)
    for n in (n_answer, 4):
        options |= dict(max_tokens=n, prompt_cache=cache)
        for _ in mlx_lm.stream_generate(model, tokenizer, prompt, **options):
            pass
        prompt = prompt[:30]
    return cache


@pytest.fixture(autouse=True)
def no_end(monkeypatch, tokenizer):
    """A random model does not end its answer early."""
    monkeypatch.setattr(tokenizer, "_eos_token_ids", set())


@pytest.mark.parametrize(
    "name, scheme",
    [
        ("llama", "auto"),
        ("float16", "turbo8v4"),
        ("biased keys", "auto"),
        ("biased keys", "turbo4"),
        ("sliding windows", "auto"),
        ("attention sinks", "turbo0v4"),
        ("latents", "turbo8v4"),
        ("latents", "auto"),
    ],
)
def test_a_conversation_builds_no_kernel_after_warm_up(recorder, tokenizer, name, scheme):
    model, many = MODELS[name](), MANY_OF_AUTO if scheme == "auto" else MANY
    recorder.tuning = AttendTuning(one_launch_tokens=many)
    n = mlx_turbo.warm(model, tokenizer, scheme)
    built, kinds = set(recorder.texts), recorder.kinds()
    needed = set(kinds) - {"requantize"} - ({"statistics"} if name == "latents" else set())  # latents are not centered
    assert n > 0 and all(kinds[kind] for kind in needed)
    cache = converse(model, tokenizer, scheme, 20, many)  # decides, packs, goes beyond one launch
    assert any(c.report()["packed"] for c in cache if isinstance(c, mlx_turbo.TurboKVCache))
    assert recorder.texts == built
    converse(model, tokenizer, scheme, 600, 4)
    assert recorder.texts == built


def test_a_model_of_mlx_vlm_is_warmed_with_its_processor(recorder, vlm):
    """llava's: called as a whole it wants an image. Its vocabulary is so small that any text has tokens of it."""
    model, tokenizer = (
        models_of_vlm.build("llava"),
        types.SimpleNamespace(encode=lambda text: [ord(c) % 80 for c in text]),
    )
    assert mlx_turbo.warm(model, types.SimpleNamespace(tokenizer=tokenizer), "turbo4") > 0
    built, cache = set(recorder.texts), mlx_turbo.make_prompt_cache(model, "turbo4")
    for n in (150, 200, *[1] * 40):
        mx.eval(model.language_model(mx.random.randint(0, 80, (1, n)), cache=cache).logits)
    assert all(c.report()["packed"] for c in cache) and recorder.texts == built


def test_without_warm_up_they_are_built_in_the_middle(recorder, tokenizer):
    """What the test above would see."""
    model, seen = MODELS["llama"](), []
    cache = prompt_cache.make_prompt_cache(model, "auto")
    options = dict(max_tokens=MANY_OF_AUTO + 20, prompt_cache=cache)
    for _ in mlx_lm.stream_generate(model, tokenizer, [5, 6, 7], **options):
        seen.append(len(recorder.texts))
    assert seen[1] < seen[280] < seen[-1]  # packing, then two launches


def test_so_does_one_with_a_text_for_which_auto_chooses_other_bits(recorder, tokenizer, monkeypatch):
    model = MODELS["llama"]()  # auto errs by 0.024 to 0.033 with 4 bits
    monkeypatch.setattr(auto_bits, "TARGET", 0.04)
    mlx_turbo.warm(model, tokenizer, "auto")
    built = set(recorder.texts)
    monkeypatch.setattr(auto_bits, "TARGET", 0.02)  # half of it
    cache = converse(model, tokenizer, "auto", 20, MANY_OF_AUTO)
    assert {c.report()["scheme"] for c in cache} == {"turbo5v4"} and recorder.texts == built


def test_drafts_are_verified_by_kernels_that_are_there(recorder, tokenizer):
    model, draft = MODELS["llama"](), MODELS["llama"]()
    recorder.tuning = AttendTuning(one_launch_tokens=MANY)
    mlx_turbo.warm(model, tokenizer, "turbo4", n_draft_tokens=3)
    mlx_turbo.warm(draft, tokenizer, "turbo4", n_draft_tokens=1)
    built = set(recorder.texts)
    converse(model, tokenizer, "turbo4", 20, MANY, draft_model=draft, num_draft_tokens=3)
    assert recorder.texts == built


def read(model, cache, n):
    mx.eval(model(mx.random.randint(3, 2000, (1, n)), cache=cache))


@pytest.mark.parametrize(
    "name, floor",
    [
        ("llama", "turbo6v4"),
        ("biased keys", "turbo0v4"),
        ("sliding windows", "turbo6"),
        ("attention sinks", "turbo5v8"),
    ],
)
def test_under_a_budget_of_memory_no_pair_of_widths_and_no_step_to_one_needs_a_kernel(recorder, tokenizer, name, floor):
    """Each pair that may be reached, from each that may come before it."""
    config = mlx_turbo.TurboConfig(memory="1GB", floor=floor, sink=2, recent=8, block=8)
    model, pairs = MODELS[name](), reachable_pairs(config.floor)
    assert mlx_turbo.warm(model, tokenizer, config) > 0
    built = set(recorder.texts)
    began = {(0, 0): mlx_turbo.make_prompt_cache(model, config)}
    read(model, began[0, 0], 100)
    for pair in pairs:
        for before in (p for p in pairs if p != pair and all(not a or 0 < b <= a for a, b in zip(p, pair))):
            cache = copy.deepcopy(began[before])
            for layer in flatten_caches(cache):
                if isinstance(layer, mlx_turbo.TurboKVCache):
                    layer.repack(*pair)
            began[pair] = cache
            if before == (0, 0) or before[0] == pair[0] or before[1] == pair[1]:
                read(model, cache, 20)
                read(model, cache, 1)
    assert set(began) == set(pairs) and recorder.texts == built


def test_a_conversation_that_grows_to_the_floor_of_its_budget_builds_no_kernel(recorder, tokenizer):
    """Keys are cheap in the first layer, values in the other."""
    prices = [[{4: 1e-6}, {4: 1e-1}], [{4: 1e-1}, {4: 1e-6}]]
    config = mlx_turbo.TurboConfig(memory=60_000, floor="turbo3", prices=prices, sink=2, recent=8, block=8)
    model, seen = build(llama), set()
    assert mlx_turbo.warm(model, tokenizer, config) == 97  # as docs/memory.md says
    cache, built = mlx_turbo.make_prompt_cache(model, config), set(recorder.texts)
    read(model, cache, 240)
    with pytest.raises(MemoryBudgetError):
        while True:
            read(model, cache, 1)
            seen |= {c.config.scheme.name for c in cache}
    assert recorder.texts == built
    assert len(seen) >= 4 and [c.config.scheme.name for c in cache] == ["turbo3"] * 2


def test_a_batch_needs_the_same_kernels(recorder, tokenizer):
    model = MODELS["llama"]()
    mlx_turbo.warm(model, tokenizer, "turbo4")
    built = set(recorder.texts)
    prompt_cache.enable(model, "turbo4")
    prompts = [[int(i) for i in np.random.default_rng(n).integers(3, 2000, n)] for n in (100, 130, 290)]
    mlx_lm.batch_generate(model, tokenizer, prompts, max_tokens=60)
    assert recorder.texts == built


def test_warming_leaves_model_and_backend_as_they_were(recorder, tokenizer):
    model = prompt_cache.enable(MODELS["llama"](), "turbo8v4")
    before = model.make_cache, recorder.always_two_launches
    mlx_turbo.warm(model, tokenizer, "auto")
    assert (model.make_cache, recorder.always_two_launches) == before
    assert mlx_turbo.warm(model, tokenizer, "auto") == 0  # all is there


def test_where_nothing_is_to_be_built_nothing_runs(recorder, tokenizer):
    class Untouched:
        layers = [None] * 2

    assert mlx_turbo.warm(Untouched(), tokenizer, "turbo0") == 0
    with select.use_backend("cpu"):
        assert mlx_turbo.warm(None, None, "auto") == 0
    with pytest.raises(ValueError, match="scheme"):
        mlx_turbo.warm(Untouched(), tokenizer, "turbo9")


def test_a_wrong_kernel_is_named_before_anything_is_said(simulated, door, tokenizer, monkeypatch):
    """Real kernels, in the simulator, one of which is for many tokens only."""
    backend = MetalBackend(simulated.metal_kernel)
    model = build(llama, num_hidden_layers=1)
    with select.use_backend(backend):
        assert mlx_turbo.warm(model, tokenizer, "turbo4") == backend.n_tested > 3
    source = kernel_backend.metal_source
    monkeypatch.setattr(
        kernel_backend,
        "metal_source",
        lambda name: (source(name)[0], "return;\n" * (name == "merge") + source(name)[1]),
    )
    with select.use_backend(MetalBackend(simulated.metal_kernel)):
        with pytest.raises(BackendError, match="attend.metal"):
            mlx_turbo.warm(model, tokenizer, "turbo4")


# ---- the programs ------------------------------------------------------------------------------------------
@pytest.fixture
def at_first_word(monkeypatch, recorder):
    """The texts that were built when generation began, for each time it did."""
    found = []
    modules = [importlib.import_module(f"mlx_lm.{name}") for name in ("generate", "chat")]  # before either is changed
    for module in modules:
        original = module.stream_generate

        def remember(*args, original=original, **kwargs):
            found.append(set(recorder.texts))
            return original(*args, **kwargs)

        monkeypatch.setattr(module, "stream_generate", remember)
    return found


STORY = " ".join((warming.TEXT * 3).split())[:1250]  # 370 tokens
LONG = ["--kv-recent", "8", "-m", "50"]  # packs, and goes beyond MANY_OF_AUTO in the answer


@pytest.mark.parametrize(
    "more", [["--kv", "auto"], ["--kv", "turbo4", "--draft-model", DEMO_MODEL]], ids=["auto", "draft"]
)
def test_generate_builds_all_before_its_first_token(run, recorder, at_first_word, more):
    code, _, err = run("generate", "--prompt", STORY, *LONG, *more)
    assert code == 0 and "building and checking the kernels for the model ..." in err
    (built,) = at_first_word
    assert built == recorder.texts and len(built) > 4


def test_chat_builds_all_before_its_first_word(run, recorder, at_first_word, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"Once upon a time\n{STORY}\nq\n"))
    assert run("chat", *LONG)[0] == 0
    assert len(at_first_word) == 2 and all(built == recorder.texts for built in at_first_word)


def test_a_prompt_cache_file_is_gone_on_with_its_own_scheme(run, recorder, at_first_word, tmp_path):
    model, tokenizer = common.load_model(mlx_lm.load, DEMO_MODEL, "--model")
    cache = prompt_cache.make_prompt_cache(model, "turbo3")
    mx.eval(model(mx.array([tokenizer.encode(warming.TEXT * 2)]), cache=cache))
    file = str(tmp_path / "a.safetensors")
    mlx_turbo.save_prompt_cache(file, cache, {"model": str(DEMO_MODEL), "tokenizer_config": "{}"})
    recorder.__init__()
    code, _, err = run("generate", "--prompt", "Then", "--prompt-cache-file", file, "-m", "20")
    assert code == 0, err
    assert at_first_word[0] == recorder.texts and recorder.texts


def test_one_under_a_budget_that_could_not_have_led_to_its_scheme_is_warmed_with_what_comes_after(
    run, recorder, tmp_path, monkeypatch
):
    warmed = []
    monkeypatch.setattr(common, "warm", lambda model, tokenizer, config, **options: warmed.append(config) or 0)
    monkeypatch.setattr(common, "for_model", lambda config, *args: config)  # measures no prices
    cache = [mlx_turbo.TurboKVCache("turbo8v2") for _ in range(8)]
    for layer in cache:
        layer.update_and_fetch(*mx.zeros((2, 1, 4, 9, 32)))
    file = str(tmp_path / "a.safetensors")
    mlx_turbo.save_prompt_cache(file, cache, {"model": str(DEMO_MODEL), "tokenizer_config": "{}"})
    run("generate", "--prompt-cache-file", file, "-m", "1", "--kv-memory", "9MB", "--kv-floor", "turbo3")
    assert [(c.name, c.floor.name) for c in warmed] == [("turbo8v2", "turbo3"), ("memory:9MB", "turbo3v2")]


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_kernel_that_does_not_build_ends_it_before_the_first_token(run, command, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\nq\n"))
    with select.use_backend(DoesNotBuild()):
        code, out, err = run(command, "-m", "4")
    assert code == 1 and "error: the kernel does not build\nprogram_source:7:3: error: expected ';'" in err


def test_the_server_builds_what_its_answers_need(recorder, tokenizer, monkeypatch):
    asked = []
    monkeypatch.setattr(common, "warm", lambda *args, **options: asked.append(options["n_draft_tokens"]) or 0)
    for draft in None, str(DEMO_MODEL) + "/.":
        args = argparse.Namespace(
            kv="auto",
            kv_memory=None,
            budgets={},
            loaded=[],
            kv_sink=None,
            kv_recent=None,
            model=str(DEMO_MODEL),
            draft_model=draft,
            num_draft_tokens=5,
            rooms={},
        )
        program = serve.ServerProgram(serve.module, args)
        for path in filter(None, (args.model, draft)):
            program._load(mlx_lm.load, path)
    assert asked == [0, 5, 1]
