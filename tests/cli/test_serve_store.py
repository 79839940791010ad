"""mlx-turbo serve goes on from prompts on disk: after a restart, a kill, an eviction, a client that hung up."""

import re
import signal
import socket
import time
from argparse import Namespace

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache
from support.servers import STORIES, Reference, Server, cached, save_model, save_state_model, save_window_model

from mlx_turbo.cli.common import DEMO_TEMPLATE
from mlx_turbo.cli.main import main
from mlx_turbo.cli.serve_store import ServedPrompts
from mlx_turbo.store.files import SUFFIX
from mlx_turbo.store.prompt_store import default_folder

SHORT_WINDOW = ["--kv-sink", "2", "--kv-recent", "8"]
PROMPT = " ".join(STORIES[100:118])  # some 300 tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "float32"
    save_model(folder)
    return folder


@pytest.fixture(scope="module")
def reference(model):
    return Reference(model)


@pytest.fixture
def start(tmp_path, model):
    """start(*argv) -> a Server whose prompts lie in tmp_path / "prompts"; all are stopped after the test."""
    servers = []

    def start(*argv, of=model):
        store = [] if "--no-store" in argv else ["--store", tmp_path / "prompts"]
        servers.append(Server(tmp_path, "--model", of, "--chat-template", DEMO_TEMPLATE, *store, *argv))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def complete(server, prompt, n=8, **options):
    status, answer = server.post(
        "/v1/completions", {"prompt": prompt, "max_tokens": n, "logprobs": True, "stop": ["\0"], **options}
    )
    assert status == 200, answer
    return answer


def ids(answer):
    return [token["id"] for token in answer["choices"][0]["logprobs"]["content"]]


def stored(server):
    return server.get("/kv-cache")[1]["store"]


def until(condition, seconds=60):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline
        time.sleep(0.02)


class Talk:
    """A text that goes on: a sentence of ours, an answer."""

    def __init__(self, text=PROMPT):
        self.text, self.turn = text, 0

    def say(self, server, n=8, **options):
        answer = complete(server, self.text, n, **options)
        self.text += f"{answer['choices'][0]['text']} {STORIES[30 + self.turn]}"
        self.turn += 1
        return answer


# ---- after a restart ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "kv, options",
    [
        ("turbo4", {}),
        ("none", {"seed": 1}),
        pytest.param("memory:5MB", {}, marks=pytest.mark.slow),
        pytest.param("turbo0", {}, marks=pytest.mark.slow),
        pytest.param("turbo4", {"seed": 1}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_restarted_server_goes_on_from_disk_with_the_tokens_of_one_that_was_not(start, kv, options):
    argv = ["--kv", kv, *(SHORT_WINDOW if kv != "none" else [])]
    one, other = Talk(), Talk()
    kept = start(*argv, "--no-store")
    assert [list(stored(kept)), kept.log.count("prompts are not stored: --no-store")] == [["off"], 1]
    want = [one.say(kept, **options) for _ in range(3)]
    first = start(*argv)
    got = [other.say(first, **options) for _ in range(2)]
    report = stored(first)
    assert report["hits"] == 0 and report["tokens_from_memory"] == cached(got[1]) > 250
    assert first.stop() == 0
    again = start(*argv)
    got.append(other.say(again, **options))
    assert list(map(ids, got)) == list(map(ids, want)) and list(map(cached, got)) == list(map(cached, want))
    report = stored(again)
    assert report["hits"] == 1 and report["tokens_from_store"] == cached(got[2]) > 370
    assert report["tokens_sent"] == got[2]["usage"]["prompt_tokens"] and report["tokens_from_memory"] == 0
    assert report["damaged"] == report["errors"] == 0 and 0 < report["nbytes"] <= report["max_bytes"]


# ---- checkpoints -------------------------------------------------------------------------------------------
CHECKPOINTS = ["--kv", "turbo0", *SHORT_WINDOW, "--prefill-step-size", "128", "--store-checkpoint", "1"]
LONG = " ".join(STORIES[100:150])  # some 900 tokens: seconds


def begin(server, **options):
    """Send LONG as a stream; returns the response once checkpoints are on disk and the prompt is not done."""
    response = server.connect("/v1/completions", {"prompt": LONG, "max_tokens": 4, "stream": True, **options})
    until(lambda: len(list((server.log_file.parent / "prompts").glob("*" + SUFFIX))) >= 4)
    return response


def progress(server):
    """(tokens of the newest prompt that were computed, of how many) as the log says it."""
    return tuple(map(int, re.findall(r"Prompt processing progress: (\d+)/(\d+)", server.log)[-1]))


@pytest.mark.parametrize("options", [{}, {"seed": 1}], ids=["in batches", "one at a time"])
def test_a_server_killed_in_a_long_prompt_goes_on_from_the_newest_checkpoint(start, reference, options):
    first = start(*CHECKPOINTS)
    response = begin(first, **options)
    first.process.send_signal(signal.SIGKILL)
    first.process.wait()
    done, total = progress(first)
    assert 0 < done < total
    response.close()
    again = start(*CHECKPOINTS)
    answer = complete(again, LONG, 4, **options)
    assert 128 < cached(answer) <= done + 128
    assert cached(answer) % 128 in (0, 2)  # a cut, or the edge of a block of one whose end was not written yet
    assert progress(again)[1] == total - cached(answer)  # fewer tokens are computed
    assert not reference.behind(reference.tokenizer.encode(LONG), answer).any()


def test_a_prompt_whose_client_hangs_up_is_gone_on_from(start):
    """mlx-lm keeps nothing of it."""
    server = start(*CHECKPOINTS, "--prompt-cache-size", 1)
    response = begin(server)
    response.fp.raw._sock.shutdown(socket.SHUT_RDWR)
    response.close()
    until(lambda: "closed the connection" in server.log)
    answer = complete(server, LONG, 4)
    done = cached(answer)
    assert 128 < done < answer["usage"]["prompt_tokens"] - 1 and done % 128 in (0, 2)
    assert stored(server)["tokens_from_store"] == done and "Traceback" not in server.log


# ---- what it says, and what is not stored ------------------------------------------------------------------
@pytest.mark.parametrize("save", [save_window_model, save_state_model], ids=["windows", "states"])
def test_caches_that_cannot_be_cut_are_gone_on_from_where_they_were_put(start, tmp_path, save):
    of, argv = tmp_path / "other", ["--kv", "turbo0", "--kv-sink", "2", "--kv-recent", "4"]
    save(of, *([60] if save is save_window_model else []))
    talk, first = Talk(), start(*argv, of=of)
    answers = [talk.say(first) for _ in range(2)]
    text = talk.text
    first.stop()
    again = start(*argv, of=of)
    got = talk.say(again)
    assert cached(got) >= answers[1]["usage"]["prompt_tokens"] - 1  # a random model's text is not its tokens
    assert stored(again)["hits"] == 1 and stored(again)["errors"] == 0, again.log
    again.stop()
    assert ids(complete(start(*argv, "--no-store", of=of), text)) == ids(got)


def test_a_store_that_fails_fails_no_request(start, tmp_path):
    server = start("--kv", "turbo4", *SHORT_WINDOW, "--store-bytes", "1000", "--prompt-cache-size", "1")
    talk, other = Talk(), Talk(" ".join(STORIES[:12]))
    want = ids(talk.say(server))
    complete(server, other.text)  # the first is not in memory any more
    until(lambda: stored(server)["not_written"] > 0)
    report = stored(server)
    assert report["nbytes"] == 0 and report["errors"] > 0 and "more than max_bytes" in report["newest_problem"][0]
    assert ids(complete(server, PROMPT)) == want
    assert server.stop() == 0


def test_damaged_pieces_are_computed_anew_and_reported(start, tmp_path):
    argv = ["--kv", "turbo4", *SHORT_WINDOW]
    first = start(*argv)
    talk = Talk()
    want = talk.say(first)
    first.stop()
    for path in (tmp_path / "prompts").glob("*" + SUFFIX):
        path.write_bytes(path.read_bytes()[:-200] + bytes(200))
    again = start(*argv)
    assert ids(complete(again, PROMPT)) == ids(want)
    assert stored(again)["damaged"] > 0 and "damaged" in stored(again)["newest_problem"][0]


def options(**given):
    """Arguments of the program as far as the store looks at them."""
    defaults = dict(store=None, no_store=False, store_bytes=10**9, store_memory_bytes=0, store_checkpoint=1)
    return Namespace(**defaults | dict(draft_model=None, kv_bits=None) | given)


@pytest.fixture
def at_home(tmp_path, monkeypatch):
    for name in "HOME", "XDG_CACHE_HOME":
        monkeypatch.setenv(name, str(tmp_path))
    return default_folder()


def test_the_default_folder_is_used_if_it_can_be_and_a_line_says_so(at_home, capsys):
    prompts = ServedPrompts()
    prompts.open(options())
    assert (
        prompts.report()["folder"] == str(at_home) and f"prompts are stored in {at_home}: " in capsys.readouterr().err
    )
    prompts.close()
    at_home.joinpath("store.json").write_text("{}")
    prompts.open(options())
    assert list(prompts.report()) == ["off"] and "damaged" in prompts.report()["off"]
    assert "prompts are not stored: ValueError: folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given, word", [({"no_store": True}, "--no-store"), ({"draft_model": "x"}, "draft"), ({"kv_bits": 8}, "--kv-bits")]
)
def test_where_nothing_is_stored_it_says_why(at_home, capsys, given, word):
    prompts = ServedPrompts()
    prompts.open(options(**given))
    assert word in prompts.report()["off"] and "prompts are not stored" in capsys.readouterr().err
    assert not at_home.exists()


def test_what_mlx_lm_calls_the_tokens_of_pictures_is_neither_stored_nor_looked_up(at_home, reference):
    prompts, tokens = ServedPrompts(), [1, 2, 3] * 100
    prompts.open(options())
    prompts.provider = Namespace(model=reference.model)
    cache = [KVCache() for _ in reference.model.layers]
    reference.model(mx.array([tokens]), cache=cache)
    prompts.put([*tokens[:-1], -7], cache)
    assert prompts.store.report()["puts"] == 0
    prompts.put(tokens, cache)
    assert prompts.store.report()["puts"] == 1
    prompts.store.flush()
    assert prompts.fetch([*tokens, 4], None, [*tokens, 4])[1] == [4]
    assert prompts.fetch([*tokens, -7], None, [*tokens, -7]) == (None, [*tokens, -7])
    assert prompts.report()["tokens_sent"] == 301  # of the other it was not asked
    prompts.close()


def test_a_folder_that_cannot_be_used_ends_it_if_it_was_named(tmp_path, model):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(AssertionError, match="--store: .*neither empty nor a prompt store"):
        Server(tmp_path, "--model", model, "--store", tmp_path)


@pytest.mark.parametrize(
    "argv, word",
    [
        (["--store", "x", "--no-store"], "--store: goes without --no-store"),
        (["--store-checkpoint", "-1"], "--store-checkpoint: got -1"),
        (["--store-bytes", "much"], "--store-bytes: got 'much'"),
    ],
)
def test_wrong_options_get_one_line_and_exit_code_2(capsys, argv, word):
    assert main(["serve", *argv]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and word in err
