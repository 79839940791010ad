"""mlx-turbo chat: mlx_lm.chat, compressed, and a report at its end."""

import importlib
import io
import re

import pytest

from mlx_turbo.cli import common
from mlx_turbo.cli.common import DEMO_MODEL
from mlx_turbo.cli.main import main

SHORT_WINDOW = ["--kv-sink", "2", "--kv-recent", "8"]
TURNS = ["Once upon a time, there was a little girl named Lily.", " The next day, she went to the park.", " Then"]


@pytest.fixture
def run(capsys, monkeypatch):
    """run(lines, *argv) -> (exit code, stdout, stderr) of a chat in which these lines are typed."""

    def run(lines, *argv):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        capsys.readouterr()
        try:
            code = main(["chat", *map(str, argv)])
        except SystemExit as e:  # --help
            code = e.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def answers(monkeypatch):
    """The text of each token of all chats of the test."""
    module, tokens = importlib.import_module("mlx_lm.chat"), []
    original = module.stream_generate

    def remember(*args, **kwargs):
        for response in original(*args, **kwargs):
            tokens.append(response.token)
            yield response

    monkeypatch.setattr(module, "stream_generate", remember)
    return tokens


def test_chat_keeps_every_flag_of_mlx_lm(run):
    theirs = importlib.import_module("mlx_lm.chat").setup_arg_parser()
    code, out, _ = run([], "--help")
    assert code == 0
    for flag in {f for action in theirs._actions for f in action.option_strings} | {"--kv", "--kv-sink", "--backend"}:
        assert re.search(rf"(^|[ ,\[]){flag}\b", out), flag


def test_a_chat_ends_with_what_its_cache_holds_and_the_backend(run):
    code, out, err = run([*TURNS, "q"], "-m", 20, "--kv", "turbo4", "--backend", "cpu", *SHORT_WINDOW)
    assert code == 0 and "embedded demo model" in err
    tokens, packed = map(int, re.search(r"KV cache: turbo4, (\d+) tokens \(2 sink exact, (\d+) packed", out).groups())
    assert tokens > 60 and packed > 0  # all three turns
    assert re.search(r"KV cache bytes: [\d.]+ MB held, [\d.]+ MB uncompressed", out)
    assert "Backend: cpu fallback" in out


def test_with_exact_packing_it_says_what_mlx_lm_s_own_cache_would(run, answers):
    said = {}
    for kv in ("turbo0", "none"):
        assert run([*TURNS, "q"], "-m", 20, "--kv", kv, *SHORT_WINDOW)[0] == 0
        said[kv] = answers[:]
        answers.clear()
    assert said["turbo0"] == said["none"] and len(said["none"]) == 60


def test_a_reset_starts_over_and_the_report_is_of_the_new_cache(run, answers):
    _, out, _ = run([*TURNS, "r", TURNS[0], "q"], "-m", 8)
    assert answers[-8:] == answers[:8]
    assert int(re.search(r"KV cache: auto, (\d+) tokens", out)[1]) < 30


def test_the_end_of_the_input_is_an_end_too(run):
    code, out, _ = run(TURNS[:1], "-m", 4)
    assert code == 0 and "KV cache: auto" in out


def test_rotating_caches_are_said_to_be_left_as_they_are(run):
    _, out, err = run([TURNS[0], "q"], "-m", 4, "--max-kv-size", 64)
    assert ("0 of 4 layers compressed" in out) == ("warning: nothing is compressed" in err)


def test_beyond_the_context_it_warns(run, monkeypatch):
    _, _, err = run([TURNS[0], "q"], "-m", 4)
    assert "the model was made for" not in err
    original = common.load_model

    def load_model(*args, **kwargs):
        model, *rest = original(*args, **kwargs)
        model.args.max_position_embeddings = 16
        return model, *rest

    monkeypatch.setattr(common, "load_model", load_model)
    assert "the model was made for 16" in run([TURNS[0], "q"], "-m", 4)[2]


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--kv", "turbo9"], "--kv: got 'turbo9'"),
        (["--kv-recent", "-1"], "--kv-recent: got -1"),
        (["--model", "/no/such"], "is neither an existing folder"),
        (["--nothing"], "mlx-turbo chat --help"),
    ],
)
def test_wrong_arguments_get_one_line_and_exit_code_2(run, argv, words):
    code, out, err = run(["q"], "--model", DEMO_MODEL, *argv)
    assert (code, out, err.count("\n")) == (2, "", 1) and words in err
