"""mlx-turbo chat: mlx_lm.chat, compressed, and a report at its end."""

import importlib
import io
import json
import re
import shutil

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.generate import generate_step

from mlx_turbo.cli import common
from mlx_turbo.cli.common import DEMO_MODEL
from mlx_turbo.cli.conversation import default_chats
from mlx_turbo.cli.main import main
from mlx_turbo.store.prompt_store import default_folder

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


# ---- conversations that go on ------------------------------------------------------------------------------
@pytest.fixture
def at_home(tmp_path, monkeypatch):
    for name, folder in ("HOME", "."), ("XDG_CACHE_HOME", "cache"), ("XDG_DATA_HOME", "data"):
        monkeypatch.setenv(name, str(tmp_path / folder))
    return tmp_path


def kept(name="talk"):
    return json.loads((default_chats() / f"{name}.json").read_text())


def all_at_once(tokens, n):
    """The n tokens that the embedded model goes on with, without a chat."""
    model, _ = common.load_model(mlx_lm.load, DEMO_MODEL, "--model")
    return [int(t) for t, _ in generate_step(mx.array(tokens), model, max_tokens=n)]


LONG_TURN = " ".join(["One day, she saw a big red ball in the park, and she wanted to play with it."] * 8)


@pytest.mark.parametrize(
    "kv",
    ["turbo4", "none", "auto", pytest.param("memory:1400KB", marks=pytest.mark.slow)],  # four times priced
)
def test_a_conversation_goes_on_with_the_tokens_of_one_that_did_not_end(run, answers, at_home, kv):
    turns, argv = [TURNS[0], LONG_TURN, TURNS[2]], ["-m", 12, "--kv", kv, *(SHORT_WINDOW if kv != "none" else [])]
    assert run([*turns, "q"], *argv)[0] == 0
    want = answers[:]
    answers.clear()
    for turn, end in zip(turns, (["q"], ["/exit"], [])):  # at last the end of the input
        code, _, err = run([turn, *end], *argv, "--resume", "talk")
        assert code == 0 and "computed again" not in err, err
        assert ("a new conversation" in err) == (turn == turns[0])
    assert answers == want and len(want) == 36
    said = kept()["messages"]
    assert [m["role"] for m in said] == ["user", "assistant"] * 3 and [m["content"] for m in said[::2]] == turns
    assert "6 messages" in run(["q"], *argv, "--resume", "talk")[2]


def test_what_is_kept_of_a_conversation_only_its_owner_reads(run, at_home):
    assert run([TURNS[0], "q"], "-m", 4, "--resume", "talk", "--system-prompt", "Tell a tale of a fox. ")[0] == 0
    assert [m["role"] for m in kept()["messages"]] == ["system", "user", "assistant"]
    files = [p for p in at_home.rglob("*") if p.is_file() and "mlx-turbo" in str(p)]
    assert {p.name for p in files} >= {"talk.json", "store.json"} and all(p.stat().st_mode & 0o077 == 0 for p in files)
    assert all(p.parent.stat().st_mode & 0o077 == 0 for p in files)
    assert [p.name for p in files if b"Lily" in p.read_bytes()] == ["talk.json"]  # the store has no text in the clear


@pytest.mark.parametrize("at", ["in the answer", "in the prompt"])
def test_ctrl_c_keeps_what_there_is(run, answers, at_home, monkeypatch, at):
    argv = ["-m", 12, "--kv", "turbo0", *SHORT_WINDOW, "--resume", "talk"]
    run([TURNS[0], "q"], *argv)
    module, answered = importlib.import_module("mlx_lm.chat"), len(kept()["tokens"])
    original = module.stream_generate

    def interrupted(*args, **kwargs):
        for n, response in enumerate(original(*args, **kwargs)):
            yield response
            if n == 4:
                raise KeyboardInterrupt

    attention, calls = importlib.import_module("mlx_lm.models.qwen3").Attention, []
    whole = attention.__call__

    def broken(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == 3:  # two layers have the prompt, the others do not
            raise KeyboardInterrupt
        return whole(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        if at == "in the answer":
            patch.setattr(module, "stream_generate", interrupted)
        else:
            patch.setattr(attention, "__call__", broken)
        assert run([LONG_TURN, "q"], *argv)[0] == 0
    said = kept()
    n_said = 5 if at == "in the answer" else 0
    assert [m["role"] for m in said["messages"]] == ["user", "assistant"] * 2
    assert said["messages"][2]["content"] == LONG_TURN and bool(said["messages"][3]["content"]) == (n_said > 0)
    assert len(said["tokens"]) > answered + 100 + n_said
    answers.clear()
    _, _, err = run([TURNS[2], "q"], *argv)
    assert ("computed again" in err) == (at == "in the prompt")
    tokens = kept()["tokens"]
    assert tokens[: len(said["tokens"])] == said["tokens"] and answers == all_at_once(tokens[:-12], 12)


def test_without_its_cache_a_conversation_is_computed_again(run, answers, at_home):
    argv = ["-m", 6, "--kv", "turbo0", *SHORT_WINDOW, "--resume", "talk"]
    run([TURNS[0], "q"], *argv)
    shutil.rmtree(default_folder())
    answers.clear()
    code, _, err = run([TURNS[1], "q"], *argv)
    assert code == 0 and re.search(r"2 messages, (\d+) tokens, \1 of which are computed again", err)
    assert answers == all_at_once(kept()["tokens"][:-6], 6)


def test_a_reset_is_what_is_kept_from_the_next_answer_on(run, at_home):
    argv = ["-m", 6, "--resume", "talk"]
    run([TURNS[0], "q"], *argv)
    before = kept()
    run(["r", "q"], *argv)
    assert kept() == before
    run(["r", TURNS[1], "q"], *argv)
    assert [m["content"] for m in kept()["messages"]][0] == TURNS[1] and len(kept()["messages"]) == 2


def test_another_model_s_conversation_and_a_file_that_is_none_are_refused(run, at_home):
    argv = ["-m", 4, "--resume", "talk"]
    run([TURNS[0], "q"], *argv)
    path = default_chats() / "talk.json"
    path.write_text(json.dumps(kept() | {"model": "0" * 32}))
    code, _, err = run(["q"], *argv)
    assert code == 2 and "'talk' was held with another model (qwen3" in err
    for text in '{"version": 7}', "dear", '{"version": 1}':
        path.write_text(text)
        code, _, err = run(["q"], *argv)
        assert code == 2 and "--resume: cannot read" in err
        assert path.read_text() == text


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--kv", "turbo9"], "--kv: got 'turbo9'"),
        (["--kv-recent", "-1"], "--kv-recent: got -1"),
        (["--model", "/no/such"], "is neither an existing folder"),
        (["--resume", "../secret"], "--resume: got '../secret'"),
        (["--store", "x"], "--store: goes with --resume"),
        (["--resume", "x", "--store", "/dev/null/x"], "--store: NotADirectoryError"),
        (["--nothing"], "mlx-turbo chat --help"),
    ],
)
def test_wrong_arguments_get_one_line_and_exit_code_2(run, at_home, argv, words):
    code, out, err = run(["q"], "--model", DEMO_MODEL, *argv)
    assert (code, out, err.count("\n")) == (2, "", 1) and words in err
