"""`mlx-turbo eval`: its figures against figures computed another way, its texts, its picture, and what it refuses."""

import contextlib
import inspect
import io
import json
import math
import re
import runpy
import sys
import types
from pathlib import Path

import huggingface_hub
import mlx.core as mx
import numpy as np
import pytest
from huggingface_hub import errors
from mlx_lm.models.cache import KVCache, QuantizedKVCache, RotatingKVCache
from mlx_lm.models.cache import make_prompt_cache as make_plain_cache
from mlx_lm.utils import load

from mlx_turbo import TurboConfig, TurboKVCache, make_prompt_cache
from mlx_turbo.cli import common, main
from mlx_turbo.cli import eval as evaluate
from mlx_turbo.cli.common import DEMO_MODEL, CliError
from mlx_turbo.integration import bit_budget
from mlx_turbo.quality import baselines, metrics, needles, plots, style

ROOT = Path(__file__).resolve().parents[2]
STORIES = (DEMO_MODEL / "stories.txt").read_text()
SCHEMES = ["mlx4", "turbo8v4", "turbo4", "turbo3", "turbo0"]


@pytest.fixture(scope="module")
def demo():
    """(model, tokenizer) of the embedded model in float32."""
    model, tokenizer = common.load_model(load, DEMO_MODEL, "--model")
    model.set_dtype(mx.float32)
    return model, tokenizer


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(JSON, stderr, PNG) of one run over two windows of 144 tokens."""
    png = tmp_path_factory.mktemp("eval") / "quality.png"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main.main(
            [
                "eval",
                "--tokens",
                "144",
                "--windows",
                "2",
                "--chunk",
                "48",
                "--kv-recent",
                "16",
                "--kv-block",
                "16",
                "--kv",
                *SCHEMES,
                "--json",
                "--png",
                str(png),
            ]
        )
    assert code == 0, err.getvalue()
    return json.loads(out.getvalue()), err.getvalue(), png


@pytest.fixture
def loads_nothing(monkeypatch):
    """Loading a model fails the test: the error must come before."""
    monkeypatch.setattr(evaluate, "load_model", lambda *a: pytest.fail("the model was loaded first"))


def rows_of(report):
    return {row["kv"]: row for row in report["results"]}


# ---- figures -------------------------------------------------------------------------------------------------
def test_perplexity_kl_divergence_and_top1_agree_with_numpy():
    rng = np.random.default_rng(0)
    logits, other = rng.standard_normal((2, 9, 50)) * 3
    targets = rng.integers(0, 50, 9)
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (logits, other))
    log_p, log_q = (metrics.log_probabilities(mx.array(x.astype(np.float32))) for x in (logits, other))
    nll = metrics.negative_log_likelihood(log_p, mx.array(targets))
    np.testing.assert_allclose(np.array(nll), -np.log(p[np.arange(9), targets]), rtol=1e-5, atol=1e-5)
    kld = metrics.kl_divergence(log_p, log_q)
    np.testing.assert_allclose(np.array(kld), (p * np.log(p / q)).sum(-1), rtol=1e-5)
    assert metrics.same_top1(log_p, log_q).tolist() == (p.argmax(-1) == q.argmax(-1)).tolist()
    assert metrics.perplexity(math.log(7)) == pytest.approx(7)


def test_the_standard_error_is_numpy_s():
    assert metrics.standard_error([0.5]) is None
    samples = [0.1, 0.4, 0.25, 0.9]
    assert metrics.standard_error(samples) == pytest.approx(np.std(samples, ddof=1) / 2)


def test_the_uncompressed_cache_is_first_and_no_distance_from_itself(measured):
    report, _, _ = measured
    assert [row["kv"] for row in report["results"]] == ["none", *SCHEMES]
    none = report["results"][0]
    assert (none["kld"], none["kld_se"], none["top1"], none["perplexity_change"]) == (0, 0, 1, 0)
    assert 5 < none["perplexity"] < 14  # measured: 8.6 over 2048 tokens


def test_packing_without_loss_changes_nothing_and_fewer_bits_change_more(measured):
    rows = rows_of(measured[0])
    assert (rows["turbo0"]["kld"], rows["turbo0"]["top1"]) == (0, 1)
    assert 0 < rows["turbo8v4"]["kld"] < rows["turbo4"]["kld"] < rows["turbo3"]["kld"] < rows["mlx4"]["kld"]
    assert rows["turbo3"]["kld"] < 0.05 and abs(rows["turbo4"]["perplexity_change"]) < 0.02
    assert all(row["kld_se"] > 0 for name, row in rows.items() if name not in ("none", "turbo0"))


def test_mlx4_is_what_mlx_lm_s_quantized_cache_gives(demo):
    model, tokenizer = demo
    tokens, chunk = tokenizer.encode(STORIES)[:97], 16
    log_p = {}
    for name, caches in (("none", make_plain_cache(model)), ("mlx4", [QuantizedKVCache(64, 4) for _ in model.layers])):
        logits = [model(mx.array(tokens[i : i + chunk])[None], cache=caches)[0] for i in range(0, 96, chunk)]
        x = np.array(mx.concatenate(logits), np.float64)
        log_p[name] = x - np.log(np.exp(x).sum(-1, keepdims=True))
    p, q = log_p["none"], log_p["mlx4"]
    args = evaluate.build_parser().parse_args(["--kv", "mlx4"])
    result, cache = metrics.compare(model, [tokens], evaluate.make_caches(model, tokenizer, args), chunk)["mlx4"]
    assert [type(c) for c in cache] == [QuantizedKVCache] * 4 and cache[0].offset == 96
    by_token = (np.exp(p) * (p - q)).sum(-1)
    assert result["kld"] == pytest.approx(by_token.mean(), rel=1e-3)
    for name, share in (("kld_median", 0.5), ("kld_p99", 0.99), ("kld_p999", 0.999), ("kld_max", 1)):
        assert result[name] == pytest.approx(np.quantile(by_token, share), rel=1e-2)
    assert result["top1"] == (p.argmax(-1) == q.argmax(-1)).mean()
    assert result["perplexity"] == pytest.approx(np.exp(-q[np.arange(96), tokens[1:]].mean()), rel=1e-5)


def test_windows_are_read_independently(demo):
    model, tokenizer = demo
    tokens = tokenizer.encode(STORIES)
    windows = evaluate.first_windows(tokenizer, STORIES, 40, 2)
    assert windows == [tokens[:40], tokens[40:80]]
    make = {
        "none": lambda: make_plain_cache(model),
        "turbo2": lambda: make_prompt_cache(model, TurboConfig("turbo2", recent=0, block=1)),
    }
    both = metrics.compare(model, windows, make, 8)["turbo2"][0]
    first, second = (metrics.compare(model, [w], make, 8)["turbo2"][0] for w in windows)
    assert both["kld"] == pytest.approx((first["kld"] + second["kld"]) / 2)
    assert both["kld_se"] == pytest.approx(abs(first["kld"] - second["kld"]) / 2) and first["kld_se"] is None


def test_a_short_text_is_one_short_window_and_a_long_one_is_not_encoded_whole(demo):
    _, tokenizer = demo
    seen = []
    spy = types.SimpleNamespace(encode=lambda text: seen.append(len(text)) or tokenizer.encode(text))
    assert evaluate.first_windows(tokenizer, STORIES[:100], 2048, 3) == [tokenizer.encode(STORIES[:100])]
    assert evaluate.first_windows(spy, STORIES, 50, 2) == [tokenizer.encode(STORIES)[i : i + 50] for i in (0, 50)]
    assert max(seen) < len(STORIES) / 2


def test_every_window_begins_as_the_tokenizer_begins_a_text():
    tokenizer = types.SimpleNamespace(bos_token_id=2, encode=lambda text: [2, *map(ord, text)])
    assert evaluate.first_windows(tokenizer, "abcdefgh", 4, 2) == [[2, 97, 98, 99], [2, 100, 101, 102]]
    without = types.SimpleNamespace(bos_token_id=2, encode=lambda text: list(map(ord, text)))
    assert evaluate.first_windows(without, "abcdefgh", 4, 2) == [[97, 98, 99, 100], [101, 102, 103, 104]]


# ---- bits ----------------------------------------------------------------------------------------------------
def filled(make, n_tokens, dtype, head_dim=64, chunk=None):
    rng = mx.random.key(0)
    cache = make()
    x = mx.random.normal((1, 1, n_tokens, head_dim), key=rng).astype(dtype)
    for start in range(0, n_tokens, chunk or n_tokens):
        part = x[:, :, start : start + (chunk or n_tokens)]
        cache.update_and_fetch(part, part)
    return cache


@pytest.mark.parametrize(
    "make",
    [
        KVCache,
        lambda: QuantizedKVCache(64, 4),
        lambda: QuantizedKVCache(64, 8),
        lambda: TurboKVCache("turbo4"),
        lambda: TurboKVCache("turbo3", sink=0, recent=0, block=1),
        lambda: TurboKVCache("turbo0v4", sink=128),
    ],
    ids=["none", "mlx4", "mlx8", "turbo4", "no exact tokens", "exact keys"],
)
def test_bits_projected_from_a_short_float32_run_are_those_of_a_16_bit_cache_with_32k_tokens(make):
    short, full = filled(make, 600, mx.float32, chunk=50), filled(make, 32768, mx.bfloat16)
    assert metrics.projected_bits([short]) == metrics.resident_bits([full])
    assert metrics.resident_bits([full]) == 8 * full.nbytes / (2 * 64 * 32768)
    assert metrics.packed_bits([short]) == metrics.packed_bits([full])


def test_bits_count_what_the_caches_hold(measured):
    rows = rows_of(measured[0])
    # 144 - 1 tokens in buffers for 256, float32
    assert rows["none"]["resident_bits_per_value"] == pytest.approx(32 * 256 / 143)
    for kv, bits in zip(SCHEMES, [4.5, 6.125, 4.125, 3.125, 16]):  # means of keys add up to 16 / 128 on one side
        assert (
            bits
            <= rows[kv]["packed_bits_per_value"]
            <= bits + (16 / 128 / 2 if kv in ("turbo8v4", "turbo4", "turbo3") else 0)
        )
    for kv in SCHEMES[1:]:
        assert rows[kv]["resident_bits_per_value"] == pytest.approx(8 * rows[kv]["nbytes"] / (4 * 2 * 2 * 128 * 143))
    assert 4.125 < rows["turbo4"]["resident_bits_per_value_32k"] < 4.26 < rows["mlx4"]["resident_bits_per_value_32k"]


def test_layers_without_plain_keys_and_values_are_not_counted():
    ours = filled(lambda: TurboKVCache("turbo4"), 300, mx.float32)
    other = filled(lambda: RotatingKVCache(16), 8, mx.float32)
    for bits in (metrics.resident_bits, metrics.packed_bits, metrics.projected_bits):
        assert bits([ours, other]) == bits([ours]) and bits([other]) is None
    assert metrics.projected_bits([filled(lambda: TurboKVCache("turbo4"), 9, mx.float32)]) is None


# ---- needles -------------------------------------------------------------------------------------------------
def test_documents_hide_every_fact_at_its_depth_and_ask_for_it(demo):
    _, tokenizer = demo
    documents = needles.needle_documents(STORIES, tokenizer, 512, n_documents=4, n_facts=5)
    assert documents == needles.needle_documents(STORIES, tokenizer, 512, n_documents=4, n_facts=5)
    assert len({tuple(d.tokens) for d in documents}) == 4
    depths = sorted(q.depth for d in documents for q in d.questions)
    assert depths == pytest.approx([(i + 0.5) / 20 for i in range(20)])
    for document in documents:
        text = tokenizer.decode(document.tokens)
        assert 500 <= len(document.tokens) + max(len(q.tokens) for q in document.questions) == 512
        for question in document.questions:
            spaced = " ".join(question.number)
            assert text.count(f" is {spaced}.") == 1
            assert text.index(spaced) / len(text) == pytest.approx(question.depth, abs=0.12)
            asked = tokenizer.decode(question.tokens)
            what, name = re.match(r"\n\nQuestion: What is (?:the )?(.*?)(?:'s| of) (.*)\? Answer:$", asked).groups()
            fact = re.search(rf"[^.!?]*\bis {spaced}\.", text)[0]
            assert what in fact and name in fact and spaced not in asked


def test_documents_are_in_the_words_the_embedded_model_was_trained_on():
    script = runpy.run_path(str(ROOT / "scripts" / "train_demo_model.py"))
    assert needles.NAMES == script["NAMES"] and list(needles.WHAT) == script["DIGIT_ATTRS"]
    assert {
        f.strip().format(what="{attr}", name="{name}", digits="0").replace(" 0", "{val}") for f in needles.FACTS
    } == set(script["FACTS"])
    assert {q.strip().format(what="{attr}", name="{name}") + "{val}." for q in needles.QUESTIONS} == set(script["ASKS"])


def test_a_text_without_sentences_serves_and_one_without_room_is_refused(demo):
    _, tokenizer = demo
    (document,) = needles.needle_documents("word " * 400, tokenizer, 300, 1, 3)
    assert all(" ".join(q.number) in tokenizer.decode(document.tokens) for q in document.questions)
    with pytest.raises(ValueError, match="length: got 60, too short for 5 facts"):
        needles.needle_documents(STORIES, tokenizer, 60, 1, 5)
    with pytest.raises(ValueError, match="text: it is empty"):
        needles.needle_documents(" \n", tokenizer, 300, 1)


class Forgetful(KVCache):
    """Remembers nothing before the tokens it is given."""

    def update_and_fetch(self, keys, values):
        every = super().update_and_fetch(keys, values)
        new = keys.shape[2]
        return tuple(mx.concatenate([0 * x[:, :, :-new], x[:, :, -new:]], 2) for x in every)


def test_the_embedded_model_recalls_through_a_packed_cache_and_not_without_one(demo):
    model, tokenizer = demo
    (document,) = needles.needle_documents(STORIES, tokenizer, 320, 1, 6)
    caches, done = [], []

    def make():
        caches.append(make_prompt_cache(model, "turbo4"))
        return caches[-1]

    right = needles.recalls(model, tokenizer, document, make, chunk=64, progress=done.append)
    assert sum(right) >= 5 and sum(done) == len(document.tokens)
    assert len(caches) == 1 and caches[0][0].n_packed > 128  # read once, packed, and not touched by the questions
    assert caches[0][0].offset == len(document.tokens)
    assert sum(needles.recalls(model, tokenizer, document, lambda: [Forgetful() for _ in model.layers], 64)) <= 1


def test_needles_by_length_and_depth_stand_in_json_and_table(run, capsys):
    code, out, _ = run(
        "eval",
        "--tokens",
        20,
        "--needles",
        "--needle-documents",
        1,
        "--needle-lengths",
        256,
        "--needle-facts",
        5,
        "--kv",
        "turbo4",
        "--json",
    )
    assert code == 0
    report = json.loads(out)
    none, turbo4 = report["needles"]
    assert (none["kv"], turbo4["kv"], none["length"], none["questions"]) == ("none", "turbo4", 256, 5)
    for row in (none, turbo4):
        assert row["recalled"] == sum(row["by_depth"]) == 5 * row["accuracy"] and len(row["by_depth"]) == 5
        assert row["recalled"] >= 4
    evaluate.print_tables(report)
    assert re.search(r"^turbo4 +256 +\d+\.\d( +\d+){5}$", capsys.readouterr().out, re.MULTILINE)


# ---- what is printed -----------------------------------------------------------------------------------------
def test_json_says_on_what_it_was_measured(measured):
    report, err, _ = measured
    assert err == ""  # no terminal, no progress bar
    assert (report["model"], report["text"], report["dtype"]) == ("embedded demo model", "stories.txt", "float32")
    assert (report["tokens"], report["windows"], report["chunk"]) == (144, 2, 48)
    about = report["provenance"]
    assert report["backend"] and report["device"] and about["machine"]["mlx"] and about["machine"]["chip"]
    assert about["command"].startswith("mlx-turbo eval --tokens 144 --windows 2")
    if (ROOT / ".git").exists():
        assert re.fullmatch(r"[0-9a-f]{12,}(-dirty)?", about["commit"])


def test_the_table_has_a_row_per_cache_and_says_where_it_comes_from(run, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(STORIES[:1000])
    code, out, err = run("eval", "--text", file, "--tokens", 240, "--chunk", 60, "--kv", "turbo4", "--kv", "none")
    assert (code, err) == (0, "")
    for part in (
        "1 x 240 tokens of text.txt in chunks of 60, dtype float32",
        "4 of 4 layers compressed",
        "Backend: ",
        "mlx-lm ",
        f"Command: mlx-turbo eval --text {file}",
        "resident: ",
        "at 32K: ",
        "packed: ",
    ):
        assert part in out
    number = r" +-?[\d.]+%?"
    assert re.search(rf"^none{number * 3} +-{number * 5}$", out, re.MULTILINE)
    assert re.search(rf"^turbo4{number * 3} +-{number * 5}$", out, re.MULTILINE)
    assert re.search(rf"^none +all{number * 2} +-$", out, re.MULTILINE)
    assert re.search(rf"^turbo4 +4 \+ 64, chunk{number * 2} +4\.1\d+$", out, re.MULTILINE)


def test_a_cache_that_packed_nothing_is_pointed_out(run):
    code, out, err = run("eval", "--tokens", 40, "--kv", "turbo4")
    assert code == 0 and "warning: turbo4 packed nothing in 40 tokens" in err
    assert re.search(r"^turbo4.* 0\.000000 .* 0\.00%$", out, re.MULTILINE)
    assert re.search(r"^turbo4 +all .* - +-$", out, re.MULTILINE)


def test_progress_is_for_terminals_that_want_it(run, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for flags, shown in (([], True), (["--quiet"], False)):
        monkeypatch.setattr(sys, "stderr", Terminal())
        assert main.main(["eval", "--tokens", "20", "--kv", "turbo0", *flags]) == 0
        assert ("19/19" in sys.stderr.getvalue()) == shown


def test_default_caches_that_a_model_does_not_allow_are_left_out_with_a_warning(run, monkeypatch):
    monkeypatch.setattr(evaluate, "why_not_quantized", lambda model, with_exact: "of its head_dim")
    monkeypatch.setattr(evaluate, "DEFAULT_KV", ("mlx4", "turbo0"))
    code, out, err = run("eval", "--tokens", 20, "--json")
    assert code == 0 and [row["kv"] for row in json.loads(out)["results"]] == ["none", "turbo0"]
    assert "warning: skipping mlx4: of its head_dim" in err
    code, out, err = run("eval", "--tokens", 20, "--kv", "mlx4")
    assert (code, out) == (2, "") and "--kv: mlx4: of its head_dim" in err


class TinyModel:
    """Puts keys and values of head_dim into caches of one kind."""

    def __init__(self, make_cache, head_dim):
        self.make_cache, self.head_dim, self.layers = lambda: [make_cache()], head_dim, [None]

    def __call__(self, tokens, cache):
        x = mx.zeros((1, 1, tokens.shape[1], self.head_dim))
        cache[0].update_and_fetch(x, x)
        return x


def test_mlx_lm_quantizes_plain_caches_with_whole_groups_only():
    assert baselines.why_not_quantized(TinyModel(KVCache, 128)) is None
    assert "head_dim 80 is not a multiple" in baselines.why_not_quantized(TinyModel(KVCache, 80))
    assert "this one has RotatingKVCache" in baselines.why_not_quantized(TinyModel(lambda: RotatingKVCache(8), 128))


def test_a_device_without_the_products_of_a_quantized_cache_is_named(demo, monkeypatch):
    """As CUDA is. Inside a cache with exact ends it needs none."""
    assert baselines.why_not_quantized(demo[0]) is None
    monkeypatch.setattr(baselines, "on_cuda", lambda: True)
    assert "does not run on CUDA" in baselines.why_not_quantized(demo[0])
    assert baselines.why_not_quantized(demo[0], with_exact=True) is None


# ---- bad input -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "argv, words",
    [
        (["--kv", "turbo7"], ["--kv: got 'turbo7'", "turbo8v4"]),
        (["--kv", "mlx5"], ["--kv: got 'mlx5'", "mlx8 or mlx4"]),
        (["--kv", "mlx5+exact"], ["--kv: got 'mlx5+exact'", "mlx8 or mlx4"]),
        (["--kv", "turbo4+exact"], ["--kv: got 'turbo4+exact'", "ours keep exact tokens"]),
        (["--kv", "no_such_module:make"], ["--kv: cannot import 'no_such_module'"]),
        (["--tool-documents", "0"], ["--tool-documents: got 0"]),
        (["--kv-block", "0"], ["--kv-block: got 0"]),
        (["--kv-recent", "-1"], ["--kv-recent: got -1"]),
        (["--tokens", "1"], ["--tokens: got 1", "at least 2"]),
        (["--windows", "0"], ["--windows: got 0"]),
        (["--chunk", "0"], ["--chunk: got 0"]),
        (["--needle-facts", "0"], ["--needle-facts: got 0"]),
        (["--needle-documents", "0"], ["--needle-documents: got 0"]),
        (["--dtype", "int8"], ["--dtype", "float32"]),
        (["--text", "/no/such"], ["--text", "/no/such"]),
        (["--text", "stories/none.txt"], ["--text", "stories/none.txt"]),
        (["--png", "picture.pdf"], ["--png: 'picture.pdf' does not end in .png"]),
        (["--png", "/no/such/a.png"], ["--png: cannot write '/no/such/a.png'", "No such file"]),
    ],
)
def test_bad_input_gets_one_line_before_the_model_is_loaded(run, loads_nothing, argv, words):
    code, out, err = run("eval", *argv)
    assert (code, out, err.count("\n")) == (2, "", 1)
    for word in words:
        assert word in err


def test_bad_input_that_the_model_shows(run, tmp_path):
    (tmp_path / "a.txt").write_text("a")
    for argv, words in (
        (["--model", "/no/such"], "is neither an existing folder"),
        (["--text", tmp_path / "a.txt"], "at least 2 are needed"),
        (["--needles", "--needle-lengths", 512, 90], "--needle-lengths: got 90, too short for 10"),
        (["--needles", "--needle-facts", 201], "--needle-facts: got 201, at most 200"),
    ):
        code, out, err = run("eval", *argv)
        assert (code, out, err.count("\n")) == (2, "", 1) and words in err


# ---- the picture ---------------------------------------------------------------------------------------------
def test_the_picture_is_a_png_with_something_on_it(measured):
    from matplotlib.image import imread

    pixels = imread(measured[2])
    assert pixels.shape[0] > 700 and pixels.shape[1] > 1000
    assert 15_000 < measured[2].stat().st_size < 400_000
    assert 0.02 < (pixels[..., :3].min(-1) < 0.7).mean() < 0.3  # drawn on, and not filled


def test_budgets_are_measured_once_and_compared(run, monkeypatch):
    """On the model itself, with the fewest tokens."""
    made, real = [], bit_budget.Prices

    def prices(*args):
        made.append(args)
        return real(*args)

    monkeypatch.setattr(common, "Prices", prices)
    monkeypatch.setattr(bit_budget, "MOST", bit_budget.FEWEST)
    argv = ["--tokens", 200, "--chunk", 64, "--kv", "auto:3.125", "turbo3", "auto:6.125"]
    code, out, err = run("eval", "--quiet", "--json", *argv)
    assert code == 0, err
    rows = rows_of(json.loads(out))
    assert list(rows) == ["none", "auto:3.125", "turbo3", "auto:6.125"] and len(made) == 1
    bits = [rows[name]["resident_bits_per_value_32k"] for name in ("auto:3.125", "turbo3", "auto:6.125")]
    assert bits[0] == pytest.approx(bits[1]) and bits[2] == pytest.approx(bits[0] + 3)
    assert rows["auto:6.125"]["kld"] < rows["auto:3.125"]["kld"] < rows["turbo3"]["kld"] * 1.1
    assert "on average 3.125 bits per number" in rows["auto:3.125"]["layers"]


def test_the_picture_has_a_marker_for_every_group_of_caches():
    names = ("mlx4", "mlx8", "mlx4+exact", "a.b:c", "d:e", "d:e+exact", "turbo4", "auto", "auto:4.5")
    groups = {evaluate._group(name) for name in names}
    assert len(groups) == 4 == len(plots.MARKERS) and len(plots.GROUP_COLORS) == 3


def test_a_picture_without_matplotlib_is_refused_with_the_command_that_installs_it(
    run, loads_nothing, monkeypatch, tmp_path
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run("eval", "--png", tmp_path / "a.png")
    assert code == 2 and 'pip install "mlx-turbo[plot]"' in err and not list(tmp_path.iterdir())


def test_checking_the_place_of_a_picture_leaves_it_as_it_was(tmp_path):
    there, new = tmp_path / "there.png", tmp_path / "new.png"
    there.write_bytes(b"mine")
    style.check_plot(there)
    style.check_plot(new)
    assert there.read_bytes() == b"mine" and not new.exists()
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(style.PlotError, match="folder.png"):
        style.check_plot(tmp_path / "folder.png")


def test_a_picture_of_nothing_is_a_warning_and_the_figures_are_printed(run, tmp_path):
    code, out, err = run("eval", "--tokens", 20, "--kv", "turbo0", "--png", tmp_path / "a.png", "--json")
    assert code == 0 and json.loads(out)["results"] and "nothing to show" in err and not (tmp_path / "a.png").exists()


# ---- texts ---------------------------------------------------------------------------------------------------
@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub of datasets, {repo: {file: text}}; there is no network in a test."""
    repos, real = {}, inspect.signature(huggingface_hub.hf_hub_download)

    def http_error(kind, message):
        error = kind.__new__(kind, message)
        Exception.__init__(error, message)
        return error

    def list_repo_files(self, repo, repo_type):
        assert repo_type == "dataset"
        if repo not in repos:
            raise http_error(errors.RepositoryNotFoundError, "404")
        return list(repos[repo])

    def hf_hub_download(repo, file, repo_type):
        assert real.bind(repo, file, repo_type=repo_type)
        if file not in list_repo_files(None, repo, repo_type):
            raise http_error(errors.EntryNotFoundError, "404")
        path = tmp_path / repo / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(repos[repo][file])
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", list_repo_files)
    return repos


def test_a_dataset_s_test_split_is_taken_or_the_file_that_is_named(hub):
    hub["owner/name"] = {
        "README.md": "",
        "data/train.jsonl": '{"text": "seen"}\n',
        "data/validation.txt": "valid",
        "data/test-00000.jsonl": '{"text": "one"}\n\n{"text": "two"}\n',
    }
    assert evaluate.read_text("owner/name") == ("one\n\ntwo", "owner/name/data/test-00000.jsonl")
    assert evaluate.read_text("owner/name/data/validation.txt") == ("valid", "owner/name/data/validation.txt")
    hub["owner/name"].pop("data/test-00000.jsonl")
    assert evaluate.read_text("owner/name")[0] == "valid"


@pytest.mark.parametrize(
    "source, message",
    [
        ("no/body", "'no/body' is neither a local file nor a dataset on the Hugging Face Hub"),
        ("owner/name/b.txt", "the dataset 'owner/name' on the Hugging Face Hub has no 'b.txt'"),
        ("owner/name", r"no test or validation split .* owner/name/FILE; it has train.txt"),
        ("owner/odd/test.jsonl", "'owner/odd/test.jsonl' has no field 'text'"),
        ("owner/odd/bad-test.jsonl", "cannot read"),
        ("/no/such/file", "cannot read '/no/such/file'"),
    ],
)
def test_texts_that_are_not_there_are_named(hub, source, message):
    hub["owner/name"] = {"train.txt": "seen"}
    hub["owner/odd"] = {"test.jsonl": '{"content": "a"}\n', "bad-test.jsonl": "{"}
    with pytest.raises(CliError, match=message):
        evaluate.read_text(source)


def test_a_dataset_without_network_is_one_line(run, loads_nothing, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for source in ("nobody/no-such-text", "nobody/no-such-text/test.txt"):
        code, out, err = run("eval", "--text", source)
        assert (code, out, err.count("\n")) == (2, "", 1) and "--text: " in err and "Hugging Face" in err


def test_parquet_is_read_with_pyarrow_and_refused_without(hub, monkeypatch):
    hub["owner/name"] = {"test.parquet": ""}
    table = types.SimpleNamespace(to_pylist=lambda: ["one", "two"])
    fake = types.ModuleType("pyarrow")
    names = ["id", "text"]
    fake.parquet = types.SimpleNamespace(
        read_table=lambda path, columns: {columns[0]: table},
        read_schema=lambda path: types.SimpleNamespace(names=names),
    )
    monkeypatch.setitem(sys.modules, "pyarrow", fake)
    assert evaluate.read_text("owner/name") == ("one\n\ntwo", "owner/name/test.parquet")
    names.remove("text")
    with pytest.raises(CliError, match="'owner/name/test.parquet' has no field 'text'"):
        evaluate.read_text("owner/name")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(CliError, match="'test.parquet' needs pyarrow, which is not installed: pip install pyarrow"):
        evaluate.read_text("owner/name")


# ---- targets -------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_at_the_defaults_our_schemes_beat_mlx_lm_s_4_bits_by_far(run):
    code, out, _ = run("eval", "--kv", "mlx4", "turbo8v4", "turbo4", "turbo3", "--json")
    rows = rows_of(json.loads(out))
    kld = {kv: row["kld"] / rows["mlx4"]["kld"] for kv, row in rows.items()}
    assert kld["turbo8v4"] <= 1 / 50 and kld["turbo4"] <= 1 / 10 and kld["turbo3"] <= 1 / 2
