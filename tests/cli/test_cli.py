"""The command line: what `mlx-turbo` prints, keeps of mlx-lm, and refuses."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from support.no_kernels import DoesNotBuild
from support.servers import save_state_model, save_window_model

import mlx_turbo
from mlx_turbo.cli import common, main
from mlx_turbo.cli.common import DEMO_MODEL, CliError

# long enough that decoding reads packed tokens, short enough for a slow machine
STORY = (DEMO_MODEL / "stories.txt").read_text()[:330]
LONG_STORY = (DEMO_MODEL / "stories.txt").read_text()[:700]  # beyond the default window
SHORT_WINDOW = ["--kv-sink", "2", "--kv-recent", "8"]


def streamed_text(stdout):
    """What mlx-lm prints between its two lines of "=" when verbose."""
    return re.fullmatch(r"={10}\n(.*)\n={10}\n.*", stdout, re.DOTALL)[1]


@pytest.fixture
def prompt_cache_file(tmp_path):
    """make(scheme or None) -> a file as mlx_lm.cache_prompt writes it: LONG_STORY in the embedded model."""
    from mlx_lm import load
    from mlx_lm.models.cache import make_prompt_cache, save_prompt_cache

    def make(scheme):
        model, tokenizer = common.load_model(load, DEMO_MODEL, "--model")
        cache = make_prompt_cache(model) if scheme is None else mlx_turbo.make_prompt_cache(model, scheme)
        model(mx.array(tokenizer.encode(LONG_STORY))[None], cache=cache)
        file = tmp_path / "prompt.safetensors"
        save_prompt_cache(str(file), cache, {"model": str(DEMO_MODEL), "tokenizer_config": "{}"})
        return file

    return make


@pytest.fixture
def adapter(tmp_path):
    """A folder with a random adapter of the embedded model, as mlx_lm.lora writes it."""
    from mlx.utils import tree_flatten
    from mlx_lm import load
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model, _ = load(str(DEMO_MODEL))
    model.freeze()
    config = {"rank": 4, "scale": 20.0, "dropout": 0.0}
    linear_to_lora_layers(model, 4, config)
    mx.random.seed(0)
    mx.save_safetensors(
        str(tmp_path / "adapters.safetensors"),
        {name: 0.05 * mx.random.normal(x.shape) for name, x in tree_flatten(model.trainable_parameters())},
    )
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"fine_tune_type": "lora", "num_layers": 4, "lora_parameters": config})
    )
    return tmp_path


# ---- the command itself ------------------------------------------------------------------------------------
def test_help_and_version_are_answered_without_importing_mlx_lm():
    code = (
        "import sys; from mlx_turbo.cli.main import main\n"
        "for flag in '--help', '--version':\n"
        "    try: main([flag])\n"
        "    except SystemExit as e: assert e.code == 0\n"
        "assert not {'mlx_lm', 'transformers'} & set(sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    for word in (*main.COMMANDS, f"mlx-turbo {mlx_turbo.__version__}"):
        assert word in out.stdout


def test_it_runs_as_a_module_and_reads_the_prompt_from_stdin(tmp_path):
    package = str(Path(mlx_turbo.__file__).parents[1])
    command = f"import sys, runpy; sys.path.insert(0, {package!r}); runpy.run_module('mlx_turbo', run_name='__main__')"
    out = subprocess.run(
        [sys.executable, "-c", command, "generate", "--prompt", "-", "-m", "8"],
        input="Tom had a red ball.",
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert out.returncode == 0, out.stderr
    assert "Generation: 8 tokens" in out.stdout and "KV cache: auto" in out.stdout
    assert "embedded demo model" in out.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a full disk is made of /dev/full")
def test_a_full_disk_is_one_line_and_a_reader_that_left_none():
    command = [sys.executable, "-m", "mlx_turbo", "plan", "--json"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "mlx-turbo: error: OSError: [Errno 28] No space left on device\n")
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_no_command_shows_the_help_and_fails(run):
    code, out, err = run()
    assert (code, out) == (2, "") and "doctor" in err


def test_generate_keeps_every_flag_of_mlx_lm(run):
    module = importlib.import_module("mlx_lm.generate")
    theirs = {flag for action in module.setup_arg_parser()._actions for flag in action.option_strings}
    code, out, _ = run("generate", "--help")
    assert code == 0
    for flag in theirs | {"--kv", "--kv-sink", "--kv-recent", "--backend"}:
        assert re.search(rf"(^|[ ,\[]){flag}\b", out), flag


# ---- generate ----------------------------------------------------------------------------------------------
def test_text_with_exact_packing_equals_text_of_mlx_lm_s_own_cache(run):
    texts = {}
    for kv in ("turbo0", "none"):
        code, out, _ = run("generate", "-p", STORY, "-m", 60, "--kv", kv, *SHORT_WINDOW)
        assert code == 0
        texts[kv] = streamed_text(out)
    assert texts["turbo0"] == texts["none"] and len(texts["none"]) > 100


def test_an_adapter_is_used_with_our_caches_as_with_mlx_lm_s_own(run, adapter):
    argv = ["--prompt", STORY, "-m", "24", *SHORT_WINDOW]
    code, plain, _ = run("generate", *argv, "--kv", "turbo0")
    texts = []
    for kv in ("turbo0", "none"):
        code, out, err = run("generate", *argv, "--kv", kv, "--adapter-path", adapter)
        assert code == 0, err
        texts.append(streamed_text(out))
    assert texts[0] == texts[1] != streamed_text(plain)


def test_generate_ends_with_speed_and_what_the_cache_really_holds(run):
    code, out, _ = run("generate", "-p", STORY, "-m", 30, "--kv", "turbo4", "--backend", "cpu", *SHORT_WINDOW)
    assert code == 0
    for line in (
        r"^Prompt: \d+ tokens, [\d.]+ tokens-per-sec",
        r"^Generation: 30 tokens",
        r"^Peak memory: [\d.]+ GB",
        r"^Backend: cpu fallback",
    ):
        assert re.search(line, out, re.MULTILINE), line
    tokens, sink, packed, recent = map(
        int,
        re.search(
            r"KV cache: turbo4, (\d+) tokens \((\d+) sink exact, (\d+) packed at 4\.[12]\d+ bits per value, (\d+) "
            r"recent exact\); 4 of 4 layers compressed",
            out,
        ).groups(),
    )
    held, uncompressed, ratio = map(
        float, re.search(r"KV cache bytes: ([\d.]+) MB held, ([\d.]+) MB uncompressed, ratio ([\d.]+)", out).groups()
    )
    prompt = int(re.search(r"Prompt: (\d+)", out)[1])
    assert sink == 2 and recent >= 8 and sink + packed + recent == tokens
    assert prompt + 29 <= tokens <= prompt + 30  # mlx-lm has already read the last token, or has not
    # 4 layers, keys and values, 2 heads of 128 bfloat16; mlx-lm's cache grows by 256 tokens
    assert tokens < 256 and uncompressed == pytest.approx(256 * 4 * 2 * 2 * 128 * 2 / 1e6, abs=1e-3)
    assert ratio == pytest.approx(uncompressed / held, abs=0.01)


def test_a_report_before_anything_is_packed_says_when_packing_starts(run):
    _, out, _ = run("generate", "-m", 5)
    assert "0 packed," in out and "packing starts beyond 260 tokens" in out
    assert "packing starts beyond 132 tokens" in run("generate", "-m", 5, "--kv", "turbo4")[1]


def test_not_verbose_prints_the_response_and_nothing_else_on_stdout(run):
    code, out, err = run("generate", "-m", 12, "--verbose", "False")
    assert code == 0
    assert out == streamed_text(run("generate", "-m", 12)[1]) + "\n"
    assert "KV cache: auto" in err


def test_a_draft_model_s_cache_is_compressed_and_reported_too(run):
    story = ["generate", "-p", STORY, "-m", 30, "--draft-model", DEMO_MODEL]
    code, out, _ = run(*story, "--kv", "turbo0", *SHORT_WINDOW)
    assert code == 0
    assert re.search(r"^KV cache: turbo0.*4 of 4 layers", out, re.MULTILINE)
    assert re.search(r"^Draft model's KV cache: turbo0.*4 of 4 layers", out, re.MULTILINE)
    assert streamed_text(out) == streamed_text(run(*story, "--kv", "none")[1])


def test_a_short_max_kv_size_leaves_rotating_caches_and_the_report_says_they_are_not_compressed(run):
    code, out, err = run("generate", "-m", 5, "--max-kv-size", 64)
    assert code == 0
    assert "auto requested, but 0 of 4 layers compressed" in out and "RotatingKVCache (4)" in out
    assert "warning: nothing is compressed" in err


def test_max_kv_size_makes_windows_that_are_compressed(run):
    code, out, err = run("generate", "-m", 200, "--max-kv-size", 150, "--kv", "turbo4", *SHORT_WINDOW)
    assert code == 0 and "warning" not in err
    assert re.search(
        r"^KV cache: turbo4, 150 tokens \(4 sink exact, \d+ packed at .*4 of 4 layers compressed "
        r"\(4 of them windows of 150 tokens\)",
        out,
        re.MULTILINE,
    )


def test_mlx_lm_s_own_quantized_cache_still_works_with_kv_none(run):
    code, out, _ = run("generate", "-m", 5, "--kv", "none", "--kv-bits", 8, "--quantized-kv-start", 0)
    assert code == 0
    assert "KV cache: mlx-lm's own" in out and "Backend" not in out


@pytest.mark.parametrize("scheme", [None, "turbo3"])
def test_a_prompt_cache_file_is_used_and_a_plain_one_compressed(run, prompt_cache_file, scheme):
    given = [] if scheme else ["--kv", "turbo4"]
    code, out, err = run("generate", "-p", " Then", "-m", 5, "--prompt-cache-file", prompt_cache_file(scheme), *given)
    assert code == 0, err
    assert int(re.search(r"Prompt: (\d+)", out)[1]) < 5  # the story itself comes from the file
    packed = int(re.search(rf"KV cache: {scheme or 'turbo4'}, .* (\d+) packed", out)[1])
    assert packed > 50


def test_a_file_that_names_no_model_is_used_with_the_given_one(run, prompt_cache_file, tmp_path):
    """As mlx_turbo.save_prompt_cache writes it: with the metadata that it is given."""
    caches, file = mlx_turbo.load_prompt_cache(prompt_cache_file("turbo4")), tmp_path / "own.safetensors"
    mlx_turbo.save_prompt_cache(file, caches)
    code, _, err = run("generate", "-p", " Then", "-m", 5, "--prompt-cache-file", file)
    assert code == 2 and "does not say which model it is of; pass --model" in err
    code, out, err = run("generate", "-p", " Then", "-m", 5, "--prompt-cache-file", file, "--model", DEMO_MODEL)
    assert code == 0 and int(re.search(r"Prompt: (\d+)", out)[1]) < 5, err


@pytest.mark.parametrize("flag", ["--prompt-cache-file", "--max-kv-size"])
def test_what_does_not_go_with_a_draft_model_is_refused_before_anything_is_loaded(run, flag):
    code, out, err = run("generate", "-m", 5, "--draft-model", "/no/such", flag, 64)
    assert code == 2 and out == "" and f"error: {flag}: " in err and "--draft-model" in err


@pytest.mark.parametrize("kv", ["turbo4", "none"])
def test_a_draft_model_is_refused_where_caches_cannot_go_back(run, tmp_path, kv):
    save_state_model(tmp_path / "states")
    save_window_model(tmp_path / "windows", 150)
    for name, n, word in (
        ("states", 5, "ArraysCache"),
        ("windows", 150, "window of 150"),
        ("windows", -1, "any number"),
    ):
        models = ["--model", DEMO_MODEL, "--draft-model", tmp_path / name]
        for argv in (models, [models[0], models[3], models[2], models[1]]):
            code, _, err = run("generate", "-m", n, "--kv", kv, *argv)
            assert code == 2 and "error: --draft-model: the " in err and word in err
    code, _, err = run("generate", "-m", 50, "--kv", kv, *models)
    assert code == 0, err


def test_a_prompt_cache_file_of_another_scheme_is_refused(run, prompt_cache_file):
    file = prompt_cache_file("turbo3")
    for given in (["--kv", "turbo4"], ["--kv", "none"], ["--kv-sink", "7"]):
        code, _, err = run("generate", "-m", 5, "--prompt-cache-file", file, *given)
        assert code == 2 and given[0] in err and "was made with" in err
    assert run("generate", "-m", 5, "--prompt-cache-file", file, "--kv", "turbo3v3", "--kv-sink", 4)[0] == 0


def test_a_text_beyond_the_model_s_context_works_with_a_warning(run, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(DEMO_MODEL, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16}))
    code, out, err = run("generate", "--model", model, "-p", STORY[:80], "-m", 5)
    assert code == 0
    assert "KV cache: auto" in out and "the model was made for 16" in err
    assert "embedded" not in err


# ---- bad input ---------------------------------------------------------------------------------------------
BAD = {
    "unknown scheme": (["--kv", "turbo9"], ["--kv: got 'turbo9'", "turbo8v4", "'none'"]),
    "negative sink": (["--kv-sink", "-1"], ["--kv-sink: got -1", "from 0"]),
    "negative recent, kv none": (["--kv-recent", "-1", "--kv", "none"], ["--kv-recent: got -1"]),
    "sink that is no number": (["--kv-sink", "some"], ["--kv-sink", "some"]),
    "unknown backend": (["--backend", "gpu"], ["--backend", "'metal', 'cuda', 'cpu'"]),
    "mlx-lm's bits beside ours": (["--kv-bits", "4"], ["--kv-bits", "--kv none"]),
    "no tokens": (["--max-tokens", "0"], ["--max-tokens: got 0"]),
    "less than no tokens": (["--max-tokens", "-5"], ["--max-tokens: got -5", "-1 for no limit"]),
    "unknown flag": (["--kv-sinks", "4"], ["--kv-sinks", "--help"]),
    "path that does not exist": (["--model", "/no/such"], ["--model: '/no/such' is neither an existing folder"]),
    "prompt cache file that does not exist": (["--prompt-cache-file", "/no/such"], ["--prompt-cache-file"]),
}


@pytest.mark.parametrize("argv, words", BAD.values(), ids=BAD)
def test_bad_input_gets_one_line_and_exit_code_2(run, argv, words):
    code, out, err = run("generate", "--prompt", "hi", "--model", DEMO_MODEL, *argv)
    assert code == 2 and out == ""
    assert err.startswith("mlx-turbo: error: ") and err.count("\n") == 1
    for word in words:
        assert word in err


def test_an_empty_prompt_and_a_missing_draft_model_are_named(run, tmp_path):
    code, _, err = run("generate", "--prompt", "")
    assert code == 2 and err.endswith("error: --prompt: the prompt is empty\n")
    code, _, err = run("generate", "--draft-model", tmp_path / "none")
    assert code == 2 and "--draft-model: " in err and "neither an existing folder" in err


def test_a_folder_without_a_model_is_named(run, tmp_path):
    code, _, err = run("generate", "--model", tmp_path)
    assert code == 2 and f"cannot load '{tmp_path}'" in err and "config.json" in err


def test_a_hub_id_without_network_gets_one_line(run, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for command in ("generate", "eval"):
        code, out, err = run(command, "--model", "nobody/no-such-model-7b")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "'nobody/no-such-model-7b'" in err and "Hub cannot be reached" in err


def test_a_hub_id_that_does_not_exist_gets_one_line():
    from huggingface_hub.errors import RepositoryNotFoundError

    def load(path):
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError, "404 Client Error\n(Request ID: 1)")

    with pytest.raises(CliError, match="'nobody/nothing' is neither a local folder nor a model on the Hugging Face"):
        common.load_model(load, "nobody/nothing", "--model")


def test_a_kernel_that_does_not_build_ends_the_program_with_the_compiler_s_message(run):
    with mlx_turbo.use_backend(DoesNotBuild()):
        code, out, err = run("generate", "-p", LONG_STORY, "-m", 5, "--kv", "turbo4")
    assert code == 1
    assert "program_source:7:3: error: expected ';'" in err and "Traceback" not in err
    assert "Generation" not in out


def test_metal_where_there_is_none_is_an_error(run, monkeypatch):
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    code, _, err = run("generate", "-m", 5, "--backend", "metal")
    assert code == 1 and "'metal' was asked for" in err


def test_mlx_lm_is_left_as_it_was_even_after_an_error(run):
    module = importlib.import_module("mlx_lm.generate")
    before = dict(vars(module))
    run("generate", "--model", "/no/such/model")
    assert vars(module) == before


def test_a_program_that_makes_its_caches_past_us_is_an_error_and_not_an_uncompressed_run(run, monkeypatch):
    """As on mlx-lm 0.31, which looks make_prompt_cache up in another module than 0.32."""
    module = importlib.import_module("mlx_lm.generate")
    from mlx_lm.models.cache import KVCache

    original = module.generate
    monkeypatch.setattr(
        module,
        "generate",
        lambda model, *a, **k: original(model, *a, **k | {"prompt_cache": [KVCache() for _ in model.layers]}),
    )
    code, out, err = run("generate", "-p", "Once", "-m", 3)
    assert code == 1 and "made no KV cache through mlx_turbo" in err


# ---- auto:BITS -----------------------------------------------------------------------------------------------
@pytest.fixture
def priced(monkeypatch):
    """The keys of layer 2 of the embedded model cost most, by a measurement that takes no time. Returns the
    configurations that were measured for."""
    measured_for = []

    class Prices:
        n_layers, heads = 4, {(layer, side): [(2, 128)] for layer in range(4) for side in (0, 1)}

        def __init__(self, model, tokens, config):
            assert len(tokens) > 320 and len(model.layers) == 4
            measured_for.append(config)

        def errors(self, progress):
            return {part: {3: 0.1 if part == (2, 0) else 0.001} for part in self.heads}

    monkeypatch.setattr(common, "Prices", Prices)
    return measured_for


def test_a_budget_is_spent_on_the_model_before_its_first_cache(run, priced):
    code, out, err = run("generate", "-p", STORY, "-m", 4, "--kv", "auto:4.25", *SHORT_WINDOW)
    assert code == 0, err
    assert "auto:4.25: choosing the bits of each layer's keys and values" in err and len(priced) == 1
    assert priced[0].sink == 2 and priced[0].recent == 8
    average = float(re.search(r"on average ([\d.]+) bits per number", out)[1])
    assert 4.125 < average <= 4.25 and "keys: " in out and re.search(r"8 bits in layer 2", out)


def test_a_budget_that_makes_no_sense_is_refused_with_the_range(run):
    for command in ("generate", "chat", "serve", "eval", "plan"):
        for kv in ("auto:1", "auto:abc", "auto:20"):
            code, out, err = run(command, "--kv", kv)
            assert code == 2 and out == "" and f"error: --kv: got '{kv}', allowed are auto:BITS with BITS from 2" in err


def test_a_budget_that_the_model_cannot_keep_is_refused(run, priced):
    code, _, err = run("generate", "-p", "Once", "-m", 2, "--kv", "auto:2.1")
    assert code == 2 and "error: --kv: got 'auto:2.1', and this model's keys and values take 2.125 bits" in err


@pytest.mark.parametrize("made_with, code", [("auto:4.25", 0), (None, 0), ("turbo4", 2), ("auto:3.5", 2)])
def test_a_prompt_cache_file_beside_a_budget(run, priced, prompt_cache_file, made_with, code):
    """The file is read before the model: it is checked, or compressed, once the budget is spent."""
    scheme = made_with
    if made_with and made_with.startswith("auto:"):
        from mlx_turbo.integration.bit_budget import spend

        scheme = spend(mlx_turbo.TurboConfig(made_with), common.Prices(_Layers, [0] * 321, None))
    file = prompt_cache_file(scheme)
    got, out, err = run("generate", "-p", " Then", "-m", 5, "--prompt-cache-file", file, "--kv", "auto:4.25")
    assert got == code, err
    if code:
        assert "error: --kv: got auto:4.25 (turbo" in err and "was made with turbo" in err
    else:
        assert re.search(r"KV cache: a scheme for each layer, .* (\d+) packed", out) and "8 bits in layer 2" in out


class _Layers:
    layers = range(4)


# ---- memory:SIZE ---------------------------------------------------------------------------------------------
NOT_MEASURED = "Prices: not measured, as prompt and answer fit in the budget without packing anything further"


def test_nothing_is_measured_where_prompt_and_answer_fit_exactly(run, priced):
    argv = ("generate", "-p", STORY, "-m", 3, *SHORT_WINDOW, "--kv-memory")
    code, out, err = run(*argv, "9MB")
    assert code == 0 and not priced and NOT_MEASURED in out and "measur" not in err and "exact in layers 0-3" in out
    code, out, err = run(*argv, "900KB")
    assert code == 0 and len(priced) == 1 and NOT_MEASURED not in out and "priced by KL divergence" in out
    code, out, err = run(*argv, "9MB")  # known by now, at no cost
    assert code == 0 and len(priced) == 1 and NOT_MEASURED not in out and "priced by KL divergence" in out


@pytest.mark.parametrize("scheme, memory, measured", [("turbo4", "9MB", 0), ("turbo4", "900KB", 0), (None, "900KB", 1)])
def test_a_prompt_cache_file_that_needs_no_step_is_not_measured_for(
    run, priced, prompt_cache_file, scheme, memory, measured
):
    file = prompt_cache_file(scheme)
    code, out, err = run("generate", "-p", " Then", "-m", 5, "--prompt-cache-file", file, "--kv-memory", memory)
    assert code == 0 and len(priced) == measured and (NOT_MEASURED in out) == (not measured), err
    assert f"budget of {memory}" in out and ("priced by KL divergence" in out) == bool(measured)


def test_a_budget_of_memory_is_kept_and_reported(run, priced):
    code, out, err = run("generate", "-p", LONG_STORY, "-m", 300, "--kv-memory", "1600KB", *SHORT_WINDOW)
    assert code == 0, err
    assert "memory:1600KB: measuring the price of each layer's keys and values" in err and len(priced) == 1
    assert "KV cache: memory:1600KB, " in out and "priced by KL divergence: " in out and "; next: " in out
    held = int(re.search(r"budget of 1600KB, ([\d,]+) bytes used, floor turbo3", out)[1].replace(",", ""))
    assert 1_000_000 < held <= 1_600_000 and "the answer ends" not in err


def test_an_answer_ends_where_its_budget_does(run, priced):
    code, out, err = run("generate", "-p", STORY, "-m", 3000, "--kv", "memory:900KB", "--kv-floor", "turbo6")
    assert code == 0, err
    n, n_prompt = (int(re.search(rf"{what}: (\d+) tokens", out)[1]) for what in ("Generation", "Prompt"))
    assert f"the answer ends after {n} tokens: a cache of 900KB holds no more at turbo6, the floor" in err
    assert n + n_prompt == 4 + 64 + 64  # the buffers of packed tokens do not fit


def test_a_prompt_that_its_budget_cannot_hold_is_refused_before_it_is_read(run, priced):
    code, out, err = run("generate", "-p", LONG_STORY * 8, "-m", 10, "--kv-memory", "700KB", *SHORT_WINDOW)
    assert code == 2 and "==" not in out
    assert re.search(
        r"error: --kv: the prompt has [\d,]+ tokens, but a cache of 700KB holds [\d,]+ more at turbo3", err
    )


@pytest.mark.parametrize("chunk, code", [(2048, 2), (128, 0)])
def test_a_long_prompt_of_windows_is_counted_by_the_chunks_in_which_it_is_read(run, priced, chunk, code):
    window = ["--max-kv-size", 256, "--prefill-step-size", chunk, *SHORT_WINDOW]
    got, out, err = run("generate", "-p", LONG_STORY * 8, "-m", 4, "--kv-memory", "1MB", *window)
    assert got == code, err
    assert bool(re.search(r"but a cache of 1MB holds [\d,]+ more at turbo3, the floor", err)) == (code == 2)
    assert ("budget of 1MB" in out) == (code == 0)


@pytest.mark.parametrize("scheme", [None, "turbo4"])
def test_a_prompt_cache_file_goes_on_under_a_budget(run, priced, prompt_cache_file, scheme):
    """Exact, or from the bits that it was packed to."""
    file = prompt_cache_file(scheme)
    code, out, err = run("generate", "-p", " Then", "-m", 5, "--prompt-cache-file", file, "--kv-memory", "900KB")
    assert code == 0, err
    assert "budget of 900KB" in out and ("turbo4 in layers 0-3" if scheme else "priced by KL divergence") in out


def test_generate_keeps_a_budget_of_memory_with_a_draft_model(run, priced):
    story = ["generate", "-p", STORY, "-m", 30, "--draft-model", DEMO_MODEL]
    code, out, err = run(*story, "--kv-memory", "1GB")
    assert code == 0, err
    assert err.count("measuring the price") == 1  # the draft model is the same, and so are its prices
    assert streamed_text(out) == streamed_text(run(*story, "--kv", "none")[1])
    assert "exact in layers 0-3, of the draft model exact in layers 0-3" in out
    code, out, err = run(*story, "--kv-memory", "1200KB", "-m", 500, *SHORT_WINDOW)
    assert code == 0, err
    assert "the answer ends after 166 tokens: a cache of 1200KB holds no more at turbo3" in err
    code, _, err = run(*story, "--kv-memory", "60KB")
    assert code == 2 and "--kv: the prompt has " in err and "but a cache of 60KB holds " in err


@pytest.mark.parametrize(
    "argv, message",
    [
        (("--kv", "turbo4", "--kv-memory", "1GB"), "--kv-memory: the same as --kv memory:SIZE"),
        (("--kv-memory", "many"), "--kv-memory: got 'memory:many', allowed are memory:SIZE with a size such as 6GB"),
        (("--kv-floor", "turbo4"), "--kv-floor: goes with memory"),
        (("--kv-memory", "1GB", "--kv-floor", "turbo9"), "--kv-floor: got 'turbo9', allowed are turboN and turboKvV"),
    ],
)
def test_what_does_not_go_with_a_budget_of_memory_is_refused(run, argv, message):
    code, out, err = run("generate", *argv)
    assert code == 2 and out == "" and f"error: {message}" in err


def test_eval_has_a_row_for_a_budget_of_memory(run, priced):
    code, out, err = run("eval", "--kv", "memory:2MB", "turbo4", "--kv-floor", "turbo4", "--tokens", "300", "--json")
    assert code == 0, err
    none, budget, turbo4 = json.loads(out)["results"]
    assert (
        budget["kv"] == "memory:2MB" and budget["nbytes"] <= 2_000_000 and budget["resident_bits_per_value_32k"] is None
    )
    assert -1e-6 < budget["kld"] <= turbo4["kld"] and "budget of 2MB" in budget["layers"] and turbo4["kv"] == "turbo4"
