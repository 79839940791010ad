"""mlx-turbo serve: its answers to a client that speaks OpenAI's protocol, with and without hits in its prompt cache."""

import argparse
import copy
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.models.cache import CacheList, make_prompt_cache
from support import pages
from support.faults import MARKED, mark
from support.no_kernels import DoesNotBuild
from support.servers import (
    STORIES,
    Conversation,
    Past,
    Reference,
    Server,
    cached,
    free_port,
    save_model,
    save_state_model,
    save_window_model,
    text_of,
)

import mlx_turbo
from mlx_turbo.cli import serve
from mlx_turbo.cli.common import DEMO_MODEL, DEMO_TEMPLATE
from mlx_turbo.cli.main import main
from mlx_turbo.cli.serve_store import ServedPrompts
from mlx_turbo.integration.prompt_cache import TurboKVCache

SHORT_WINDOW = ["--kv-sink", "2", "--kv-recent", "8"]  # so that a short text has packed tokens
STORY = [{"role": "user", "content": "Once upon a time"}]
# How far a packed token may be behind the likeliest one, in nats. Measured over 512 tokens: turbo4 with the short
# window 0.14 in the worst case and 3 tokens that are not the likeliest, turbo8v4 0.07 and 1. A cache with the tokens
# of another text: more than 5.
PACKED_BEHIND = 1.0


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A folder with the embedded model in float32."""
    folder = tmp_path_factory.mktemp("model") / "float32"
    save_model(folder)
    return folder


@pytest.fixture(scope="session")
def draft_model(tmp_path_factory):
    """The same with noise: a draft model that is often wrong."""
    folder = tmp_path_factory.mktemp("draft") / "noisy"
    save_model(folder, seed=1)
    return folder


@pytest.fixture(scope="session")
def reference(model):
    return Reference(model)


@pytest.fixture
def start(tmp_path, model):
    """start(*argv) -> a Server with the float32 model; all are stopped after the test."""
    servers = []

    def start(*argv):
        servers.append(Server(tmp_path, "--model", model, "--chat-template", DEMO_TEMPLATE, *argv))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="module")
def exact(tmp_path_factory, model):
    """A server whose packed tokens are exact, so that every answer is the greedy one."""
    with Server(
        tmp_path_factory.mktemp("exact"),
        "--model",
        model,
        "--chat-template",
        DEMO_TEMPLATE,
        "--kv",
        "turbo0",
        *SHORT_WINDOW,
        "--max-context",
        600,
        "--prompt-cache-bytes",
        "10MB",
    ) as server:
        yield server
        assert "Traceback" not in server.log


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A server that was given nothing."""
    with Server(tmp_path_factory.mktemp("demo")) as server:
        yield server
        assert "Traceback" not in server.log


@pytest.fixture
def run(capsys, monkeypatch):
    """run(*argv) -> (exit code, stdout, stderr) of a server that cannot start, in this process."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def run(*argv):
        capsys.readouterr()
        return main(["serve", *map(str, argv)]), *capsys.readouterr()

    return run


def settled(server):
    """What GET /kv-cache says once the server rests."""
    before = None
    while (now := server.get("/kv-cache")[1]) != before:
        before = now
        time.sleep(0.2)
    return now


# ---- what it says ------------------------------------------------------------------------------------------
def test_without_arguments_it_serves_the_embedded_model_compressed_and_says_so(demo):
    log = demo.log
    assert "no --model given: using the embedded demo model" in log and "4096 tokens" in log
    assert f"Backend: {mlx_turbo.get_backend().describe()}" in log
    assert "KV cache auto, 4 of 4 layers compressed" in log
    batched = hasattr(TurboKVCache, "merge")
    assert ("answered in batches" in log, "answered one at a time" in log) == (batched, not batched)


def test_the_models_of_a_machine_without_a_hugging_face_cache_are_the_one_it_serves(demo):
    status, models = demo.get("/v1/models")
    assert status == 200 and [m["id"] for m in models["data"]] == [str(DEMO_MODEL)]
    demo.chat(STORY, model=str(DEMO_MODEL))
    assert demo.log.count("layers compressed") == 1  # by that name it is not loaded again


def test_clients_are_told_the_context_what_is_kept_and_how_much_still_fits(exact, demo, model):
    for server, name, length in (demo, DEMO_MODEL, 4096), (exact, model, 600):
        answer = server.chat(STORY)
        said = settled(server)
        (listed,) = server.get("/v1/models")[1]["data"]
        assert listed == listed | {name: said[name] for name in said if name.startswith(("context", "tokens"))}
        assert listed["id"] == str(name) and listed["context_length"] == length
        assert answer["usage"]["total_tokens"] - 1 <= listed["tokens_in_memory"] < 20_000
        assert listed["tokens_that_fit"] == length  # of a small model on this machine


def test_it_ends_with_what_its_prompt_caches_hold(tmp_path):
    for end in ("SIGINT", "SIGTERM"):
        with Server(tmp_path, "--kv", "turbo4") as server:
            server.chat(STORY)
            held = settled(server)
            server.process.send_signal(getattr(signal, end))
            assert server.process.wait(60) == 0
            assert held["sequences"] == 1 and held["nbytes"] > 0
            assert f"prompt caches held: 1 sequences, {held['nbytes'] / 1e6:.3f} MB" in server.log


# ---- answers -----------------------------------------------------------------------------------------------
def test_an_answer_is_greedy_and_the_same_when_streamed(exact, reference):
    answer = exact.chat(STORY, 24)
    assert answer["object"] == "chat.completion" and answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == 24 + answer["usage"]["prompt_tokens"]
    assert not reference.behind(STORY, answer).any()
    chunks = exact.stream(STORY, 24, stream_options={"include_usage": True})
    deltas = [c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"]]
    assert "".join(deltas) == text_of(answer) and len(deltas) > 10
    assert chunks[-2]["choices"][0]["finish_reason"] == "length" and chunks[-1]["usage"]["completion_tokens"] == 24


def test_a_long_prompt_packed_at_once_is_answered_greedily(exact, reference):
    messages = [{"role": "user", "content": " ".join(STORIES[200:225])}]
    answer = exact.chat(messages, 12)
    assert answer["usage"]["prompt_tokens"] > 300 and not reference.behind(messages, answer).any()


def test_conversations_that_hit_the_prompt_cache_get_the_tokens_of_fresh_runs(exact, reference):
    talks, hits = [Conversation(exact, i) for i in range(3)], []
    for turn in range(4):
        for talk in talks:
            sent, answer = talk.say()
            assert not reference.behind(sent, answer).any(), (talk.number, turn)
            hits.append(cached(answer) / answer["usage"]["prompt_tokens"])
    assert min(hits[3:]) > 0.3 and max(hits[:3]) < 0.3


def test_a_prompt_that_is_all_in_the_cache_is_answered_as_a_fresh_one(exact, reference):
    """mlx-lm's own server has nothing to go on from there, and fails."""
    prompt = STORIES[30]
    for _ in range(3):
        status, answer = exact.post("/v1/completions", {"prompt": prompt, "max_tokens": 9, "logprobs": True})
        assert status == 200
        tokens = reference.tokenizer.encode(prompt)
        assert not reference.behind(tokens, answer).any()
        prompt += answer["choices"][0]["text"]
    again = exact.post("/v1/completions", {"prompt": prompt, "max_tokens": 9, "logprobs": True})[1]
    assert cached(again) == again["usage"]["prompt_tokens"] - 1
    assert not reference.behind(reference.tokenizer.encode(prompt), again).any()


def test_an_answer_asked_for_again_is_the_same(exact):
    messages = [{"role": "user", "content": " ".join(STORIES[40:44])}]
    first, *others = [exact.chat(messages, 30) for _ in range(3)]
    assert cached(first) < 10 and {text_of(a) for a in others} == {text_of(first)}
    assert all(cached(a) == a["usage"]["prompt_tokens"] - 1 for a in others)


def test_conversations_at_the_same_time_do_not_mix(exact, reference):
    def talk(number):
        conversation = Conversation(exact, number)
        return [conversation.say() for _ in range(3)]

    with ThreadPoolExecutor(4) as pool:
        for turns in list(pool.map(talk, range(4, 8))):
            for sent, answer in turns:
                assert not reference.behind(sent, answer).any()


@pytest.mark.parametrize("argv", [["--kv", "turbo4", *SHORT_WINDOW], ["--kv", "turbo8v4", *SHORT_WINDOW]])
def test_packed_caches_stay_close_to_greedy_after_hits(start, reference, argv):
    server = start(*argv)
    talks, behind = {Conversation(server, i): Past(reference.model) for i in range(2)}, []
    for _ in range(5):
        for talk, past in talks.items():
            behind += list(reference.behind(*talk.say(12), past))
    assert len(behind) == 120 and max(behind) < PACKED_BEHIND and np.count_nonzero(behind) <= 6


def test_speculative_decoding_gives_the_tokens_of_the_model_alone_after_hits_too(start, model, draft_model, reference):
    server = start("--kv", "turbo0", *SHORT_WINDOW, "--draft-model", draft_model)
    assert server.log.count("4 of 4 layers compressed") == 2  # both models' caches
    talks = [Conversation(server, i) for i in range(2)]
    for turn in range(3):
        for talk in talks:
            sent, answer = talk.say(10 + turn)  # ends at every place of a draft
            assert not reference.behind(sent, answer).any()
        assert turn == 0 or cached(answer) > 0
    prompt = STORIES[30]
    for n in (5, 6, 7, 8):
        answer = server.post("/v1/completions", {"prompt": prompt, "max_tokens": n, "logprobs": True})[1]
        assert not reference.behind(reference.tokenizer.encode(prompt), answer).any()
        prompt += answer["choices"][0]["text"]


# ---- memory ------------------------------------------------------------------------------------------------
def test_thirty_more_requests_take_no_more_memory_than_the_prompt_cache_may(exact):
    def request(i):
        exact.chat([{"role": "user", "content": " ".join(STORIES[60 + 6 * i : 66 + 6 * i])}], 4)

    for i in range(8):
        request(i)
    before, rss = settled(exact), exact.rss
    for i in range(8, 38):
        request(i)
    after = settled(exact)
    # a sequence takes 0.6 or 1.9 MB, so 30 that are kept would take 18 MB and more
    assert 7e6 < after["nbytes"] <= 10e6 and after["sequences"] < 10
    assert after["active_memory"] - after["nbytes"] < before["active_memory"] - before["nbytes"] + 1e6
    assert exact.rss < rss + 15e6


def test_a_client_that_goes_away_in_the_middle_of_a_stream_stops_its_answer(exact, reference):
    long = {"messages": STORY, "max_tokens": 500, "stream": True}
    response = exact.connect("/v1/chat/completions", long)
    assert response.readline().startswith((b"data:", b":"))
    response.fp.raw._sock.shutdown(socket.SHUT_RDWR)
    response.close()
    started = time.time()
    answer = exact.chat([{"role": "user", "content": STORIES[50]}], 4)
    assert not reference.behind([{"role": "user", "content": STORIES[50]}], answer).any()
    deadline = started + 20
    while "closed the connection" not in exact.log:
        assert time.time() < deadline, exact.log
        time.sleep(0.1)
    # what it had so far is in the prompt cache, and correct
    answer = exact.chat(STORY, 12)
    assert cached(answer) > 0 and not reference.behind(STORY, answer).any()


# ---- wrong requests ----------------------------------------------------------------------------------------
def test_a_prompt_beyond_the_model_s_context_is_refused(demo):
    for options in ({}, {"stream": True}):
        status, answer = demo.post(
            "/v1/chat/completions", {"messages": [{"role": "user", "content": "red ball " * 2100}], **options}
        )
        assert status == 400
        assert "tokens, but must have fewer than 4096, the context of the model" in answer["error"]
    assert demo.chat(STORY)["usage"]["completion_tokens"] == 8


def test_an_answer_ends_at_max_context(exact):
    messages = [{"role": "user", "content": "red ball " * 290}]
    answer = exact.chat(messages, 500)
    n = answer["usage"]["prompt_tokens"]
    assert 500 < n < 600 and answer["usage"]["total_tokens"] <= 600
    if answer["usage"]["total_tokens"] == 600:
        assert answer["choices"][0]["finish_reason"] == "length"
    status, answer = exact.post("/v1/completions", {"prompt": "red ball " * 310})
    assert status == 400 and "fewer than 600, the value of --max-context" in answer["error"]


def test_an_unknown_model_gets_404_and_the_next_request_an_answer(demo):
    status, answer = demo.post("/v1/chat/completions", {"messages": STORY, "model": "nobody/nothing"})
    assert status == 404 and "'nobody/nothing'" in answer["error"] and "--model:" not in answer["error"]
    assert text_of(demo.chat(STORY, 12)) == ", there was a little girl named Lily. She loved to"


def test_a_model_named_in_a_request_is_compressed_too(demo, model):
    demo.chat(STORY, model=str(model))
    assert f"{model}: KV cache auto, 4 of 4 layers compressed" in demo.log


@pytest.mark.parametrize(
    "path, body, status, word",
    [
        ("/v1/chat/completions", '{"messages": [', 400, "Invalid JSON"),
        ("/v1/chat/completions", "[1]", 400, "JSON dictionary"),
        ("/v1/completions", {"prompt": ""}, 400, "the prompt is empty"),
    ],
)
def test_a_malformed_request_gets_400_and_says_why(demo, path, body, status, word):
    got, answer = demo.post(path, body)
    assert got == status and word in answer["error"]
    assert demo.get("/health") == (200, {"status": "ok"})


def test_an_unknown_path_gets_404(demo):
    assert demo.connect("/v1/nothing", {}).status == 404


# ---- faults ------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def faulty(tmp_path_factory, model):
    """A server with faults planted: in marked requests (support/faults.py), in every third trim of a kept cache, and,
    for a request that asks for 7 top_logprobs, in mlx-lm's loop itself."""
    prelude = """
import mlx_lm.server as server, support.faults
support.faults.plant_in_server(every=3)
original = server._format_top_logprobs
server._format_top_logprobs = lambda *args: 1 / 0 if args[1] == 7 else original(*args)
"""
    options = ["--model", model, "--chat-template", DEMO_TEMPLATE, "--kv", "turbo8", *SHORT_WINDOW]
    with Server(tmp_path_factory.mktemp("faulty"), *options, prelude=prelude) as server:
        yield server
        assert server.get("/health") == (200, {"status": "ok"})


def long_prompt(i):
    """Long enough that packing begins with it."""
    return [{"role": "user", "content": " ".join(STORIES[3 * i : 3 * i + 7])}]


class Checked:
    """Whether answers to `long_prompt(i)` are greedy but for the rounding of turbo8; each is looked at once."""

    MOST_BEHIND = 0.1  # nats; measured: 0.02. Another prompt's answer: more than 2

    def __init__(self, reference):
        self.reference, self.known, self.lock = reference, {}, threading.Lock()

    def __call__(self, i, answer):
        ids = tuple(token["id"] for token in answer["choices"][0]["logprobs"]["content"])
        with self.lock:  # the model is not for several threads
            if (i, ids) not in self.known:
                self.known[i, ids] = self.reference.behind(long_prompt(i), answer).max()
        return self.known[i, ids] < self.MOST_BEHIND


@pytest.fixture(scope="module")
def right(reference):
    return Checked(reference)


def ask(server, i, n, **options):
    """(status, answer) of a request that asks for n tokens; n may be a mark."""
    body = {"messages": long_prompt(i), "max_tokens": n, "logprobs": True, **options}
    return server.post("/v1/chat/completions", body)


def first_fault(kind):
    """How many tokens a request of `faulty` answers before it fails; it merges and packs its prompt only."""
    return 0 if kind in ("merging", "packing") else 4


def storm(server, right, n_requests, n_prompts, faults, at_once):
    """n_requests requests, at_once at a time; `faults`: one in so many is marked. Checks every answer, and returns
    how many failed."""
    rng = np.random.default_rng(0)

    def one(_):
        i, n, marked = int(rng.integers(n_prompts)), int(rng.integers(2, 9)), rng.random() < 1 / faults
        kind = MARKED[rng.integers(len(MARKED))]
        status, answer = ask(server, i, mark(kind, first_fault(kind)) if marked else n)
        if marked:
            assert status == 500 and answer == {"error": f"PlantedFault: planted in {kind}"}
        else:
            assert status == 200 and right(i, answer), (i, n, answer)
            assert answer["usage"]["completion_tokens"] == n or answer["choices"][0]["finish_reason"] == "stop"
        return marked

    with ThreadPoolExecutor(at_once) as pool:
        return sum(pool.map(one, range(n_requests)))


def test_a_request_that_fails_gets_500_and_why_and_the_others_their_answers(faulty, right):
    assert 2 < storm(faulty, right, 20, n_prompts=4, faults=4, at_once=3) < 10
    assert "a kept cache cannot be used" in faulty.log and "raise PlantedFault" in faulty.log


@pytest.mark.parametrize("kind", MARKED)
def test_a_stream_that_fails_ends_with_an_event_that_says_why(faulty, right, kind):
    body = {"messages": long_prompt(9), "max_tokens": mark(kind, first_fault(kind)), "stream": True}
    response = faulty.connect("/v1/chat/completions", body)
    events = [e for e in response.read().decode().split("\n\n") if not e.startswith(":")]
    assert response.status == 200 and events.pop() == "" and "data: [DONE]" not in events
    *deltas, error = [json.loads(e.removeprefix("data: ")) for e in events]
    assert error == {"error": {"message": f"PlantedFault: planted in {kind}", "type": "server_error"}}
    text = "".join(d["choices"][0]["delta"].get("content", "") for d in deltas)
    whole = ask(faulty, 9, 12)[1]
    assert right(9, whole) and bool(text) == (first_fault(kind) > 0) and text_of(whole).startswith(text)


def test_a_fault_in_mlx_lm_s_loop_itself_ends_what_it_was_at_and_no_more(faulty, right):
    for _ in range(2):
        status, answer = ask(faulty, 1, 5, top_logprobs=7)
        assert status == 500 and "ZeroDivisionError" in answer["error"]
        status, answer = ask(faulty, 1, 5)
        assert status == 200 and right(1, answer)


@pytest.mark.parametrize("options", [{}, {"seed": 1}], ids=["batch", "alone"])
def test_a_sampler_that_fails_ends_its_own_request(faulty, right, options):
    wrong = {"top_k": 10**6, "temperature": 1.0, **options}
    status, answer = ask(faulty, 2, 5, **wrong)
    assert status == 500 and "top_k" in answer["error"]
    response = faulty.connect("/v1/chat/completions", {"messages": STORY, "stream": True, **wrong})
    assert b'"message": "ValueError: `top_k`' in response.read()
    status, answer = ask(faulty, 2, 5, **options)
    assert status == 200 and right(2, answer)


@pytest.mark.parametrize("stop", [[5], 5, [""], {"a": 1}, [None]])
@pytest.mark.parametrize("options", [{}, {"seed": 1}], ids=["batch", "alone"])
def test_stop_words_that_are_none_are_refused(faulty, stop, options):
    status, answer = ask(faulty, 2, 5, stop=stop, **options)
    assert status == 400 and answer["error"].startswith("stop: got ")


def test_a_loop_of_mlx_lm_s_that_is_not_the_known_one_is_an_error_at_the_start(run, monkeypatch):
    def loop(self):
        generator = make_batches()  # noqa: F821
        generator.insert_segments(), generator.next(), generator.remove()

    monkeypatch.setattr("mlx_lm.server.ResponseGenerator._generate", loop)
    code, _, err = run("--port", free_port())
    assert code == 1 and "the loop does not use BatchGenerator" in err and "is installed" not in err
    assert "Starting httpd" not in err


@pytest.mark.slow
def test_a_thousand_requests_of_which_one_in_twenty_fails(faulty, right):
    rest = []
    for _ in range(5):
        failed = storm(faulty, right, 200, n_prompts=12, faults=20, at_once=6)
        held = settled(faulty)
        rest.append((held["active_memory"] - held["nbytes"], faulty.rss))
        assert 0 < failed < 30 and faulty.get("/health") == (200, {"status": "ok"})
    assert rest[-1][0] < rest[0][0] + 2e6 and rest[-1][1] < rest[0][1] + 30e6, rest
    print(json.dumps({"active_memory beside the prompt caches, rss": rest}))


def test_what_was_kept_in_another_scheme_is_not_gone_on_from(tmp_path, model):
    """`enable` is called while the server runs: by a request for 6 top_logprobs."""
    prelude = """
import mlx_lm.server as server, mlx_turbo, mlx_turbo.cli.serve as serve
init, original = serve.ModelProvider.__init__, server._format_top_logprobs
serve.ModelProvider.__init__ = lambda self, *args: (globals().update(provider=self), init(self, *args))[1]
def switch(*args):
    if args[1] == 6:
        mlx_turbo.enable(provider.model, "turbo2")
    return original(*args)
server._format_top_logprobs = switch
"""
    with Server(tmp_path, "--model", model, "--chat-template", DEMO_TEMPLATE, "--kv", "turbo4", prelude=prelude) as s:
        n_cached = [cached(ask(s, 0, 3, **options)[1]) for options in ({}, {"top_logprobs": 6}, {}, {})]
        assert n_cached[0] == n_cached[2] == 0 and min(n_cached[1], n_cached[3]) > 50
        assert "failed" not in s.log


# ---- wrong arguments ---------------------------------------------------------------------------------------
BAD = {
    "unknown scheme": (["--kv", "turbo9"], ["--kv: got 'turbo9'", "'none'"]),
    "negative sink": (["--kv-sink", "-1"], ["--kv-sink: got -1"]),
    "negative context": (["--max-context", "-1"], ["--max-context: got -1"]),
    "negative size": (["--prompt-cache-size", "-3"], ["--prompt-cache-size: got -3"]),
    "no size": (["--prompt-cache-bytes", "much"], ["--prompt-cache-bytes: got 'much', expected a number of bytes"]),
    "size in another unit": (["--prompt-cache-bytes", "3TB"], ["--prompt-cache-bytes: got '3TB'", "M, MB, G or GB"]),
    "host that does not exist": (["--host", "nowhere.invalid"], ["--host: cannot listen on nowhere.invalid"]),
    "mlx-lm's wrong port": (["--port", "some"], ["--port", "some", "mlx-turbo serve --help"]),
    "impossible port": (["--port", "99999"], ["--port: cannot listen on 127.0.0.1:99999"]),
    "unknown flag": (["--kv-sinks", "4"], ["--kv-sinks"]),
    "abbreviated flag": (["--max-con", "4"], ["--max-con"]),
    "path that does not exist": (["--model", "/no/such"], ["--model: '/no/such' is neither an existing folder"]),
    "draft model that does not exist": (
        ["--draft-model", "/no/such"],
        ["--draft-model: '/no/such' is neither an existing folder"],
    ),
    "adapter that does not exist": (
        ["--adapter-path", "/no/such"],
        ["--adapter-path: the folder '/no/such' does not exist"],
    ),
}


@pytest.mark.parametrize("draft", [False, True], ids=["model", "draft model"])
@pytest.mark.parametrize("kv", ["auto", "none"])
def test_a_draft_model_is_refused_where_caches_cannot_go_back(run, tmp_path, draft, kv):
    save_state_model(tmp_path / "states")
    save_window_model(tmp_path / "windows", 150)
    common = "--port", free_port(), "--kv", kv
    for name, words in (("states", ["ArraysCache"]), ("windows", ["window of 150 tokens", "hold 4096 tokens"])):
        models = [DEMO_MODEL, tmp_path / name]
        code, _, err = run(*common, "--model", models[not draft], "--draft-model", models[draft])
        assert code == 2 and "Traceback" not in err
        last = err.splitlines()[-1]
        assert last.startswith(f"mlx-turbo: error: --draft-model: the {'draft ' * draft}model has ")
        assert all(word in last for word in words)


def test_a_draft_model_and_a_window_longer_than_max_context_go_together(tmp_path, model):
    """A draft is never longer than the answer may be, so the window does not fill up."""
    save_window_model(tmp_path / "windows", 41)
    reference = Reference(tmp_path / "windows")
    argv = "--model", tmp_path / "windows", "--draft-model", model, "--chat-template", DEMO_TEMPLATE
    with Server(tmp_path, *argv, "--max-context", 40) as server:
        for n in 3, 90:
            answer = server.chat(STORY, 200, num_draft_tokens=n)
            assert answer["usage"]["total_tokens"] == 40 and not reference.behind(STORY, answer).any()


@pytest.mark.parametrize("argv, words", BAD.values(), ids=BAD)
def test_wrong_arguments_get_one_line_and_exit_code_2(run, caplog, argv, words):
    port = [] if "--port" in argv else ["--port", free_port()]
    given = [] if "--model" in argv else ["--model", DEMO_MODEL]
    threads = threading.active_count()
    code, out, err = run(*port, *given, *argv)
    lines = [line for line in err.splitlines() if line.startswith("mlx-turbo: error: ")]
    assert (code, out, len(lines)) == (2, "", 1) and "Traceback" not in err.replace(lines[0], "") + caplog.text
    assert all(word in lines[0] for word in words)
    assert threading.active_count() == threads  # the one that generates has ended


def test_a_port_in_use_is_named_before_anything_is_loaded(run):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, _, err = run("--port", port)
    assert code == 2 and err == f"mlx-turbo: error: --port: cannot listen on 127.0.0.1:{port}: Address already in use\n"


def test_mlx_lm_s_bits_beside_ours_are_refused_where_mlx_lm_has_them(run):
    code, _, err = run("--kv-bits", "4", "--port", free_port())
    assert code == 2 and err.count("\n") == 1 and "--kv-bits" in err


def test_a_kernel_that_does_not_build_ends_it_before_it_listens(run):
    with mlx_turbo.use_backend(DoesNotBuild()):
        code, _, err = run("--port", free_port())
    assert code == 1 and "mlx-turbo: error: the kernel does not build\nprogram_source:7:3: error: expected ';'" in err
    assert "Starting httpd" not in err


# ---- the prompt cache itself -------------------------------------------------------------------------------
@pytest.fixture
def lru(reference):
    """(an empty prompt cache of the server, a model, fill(tokens) -> a turbo4 cache with them)"""
    from mlx_turbo.cli.serve import LRUPromptCache

    def fill(tokens):
        cache = mlx_turbo.make_prompt_cache(reference.model, mlx_turbo.TurboConfig("turbo4", sink=2, recent=8, block=8))
        mx.eval(reference.model(mx.array([tokens]), cache=cache))
        return cache

    return LRUPromptCache(10), reference.model, fill


def tokens_of(reference, n):
    return reference.tokenizer.encode(" ".join(STORIES[:60]))[:n]


@pytest.mark.parametrize("common", [100, 97, 70, 3, 1])
def test_a_hit_is_what_trimming_the_cache_itself_gives(lru, reference, common):
    cache, model, fill = lru
    tokens = tokens_of(reference, 110)
    held, other = tokens[:100], tokens[:common] + [7] * 5
    cache.insert_cache("model", held, fill(held))
    expected = fill(held)
    for c in expected:
        c.trim(100 - common)
    for _ in range(2):  # a hit leaves the entry as it was
        hit, rest = cache.fetch_nearest_cache("model", other)
        assert len(other) - len(rest) == common == hit[0].offset
        want = model(mx.array([rest]), cache=copy.deepcopy(expected))
        assert mx.array_equal(model(mx.array([rest]), cache=hit), want)


def test_an_entry_is_filed_under_the_tokens_that_are_in_it(lru, reference):
    cache, _, fill = lru
    tokens = tokens_of(reference, 110)
    ahead, behind = fill(tokens[:103]), fill(tokens[:98])  # as after speculative decoding: two models' caches
    cache.insert_cache("model", tokens[:100], ahead + behind)
    assert cache.nbytes == sum(c.nbytes for c in ahead + behind)
    hit, rest = cache.fetch_nearest_cache("model", tokens)
    assert rest == tokens[98:] and {c.offset for c in hit} == {98}


def test_the_tokens_of_caches_inside_lists_count_too(lru, reference):
    cache, _, fill = lru
    tokens = tokens_of(reference, 60)
    lists = [CacheList(a, b) for a, b in zip(fill(tokens[:53]), fill(tokens[:49]))]
    cache.insert_cache("model", tokens[:50], lists)
    assert cache.nbytes == sum(m.nbytes for c in lists for m in c.caches)
    hit, rest = cache.fetch_nearest_cache("model", tokens)
    assert rest == tokens[49:] and {m.offset for c in hit for m in c.caches} == {49}


def test_the_context_is_what_the_configuration_says():
    from types import SimpleNamespace as Args

    from mlx_turbo.cli.serve import context_of

    yarn = {"factor": 4.0, "original_max_position_embeddings": 32768}
    for args, limit in (
        (Args(max_position_embeddings=4096), 4096),
        (Args(), None),
        (None, None),
        (Args(max_position_embeddings=None, text_config={"max_position_embeddings": 64}), 64),
        (Args(max_position_embeddings=32768, rope_scaling=yarn), 131072),
    ):
        assert context_of(Args(args=args)) == limit


def test_a_layer_that_is_not_used_does_not_empty_an_entry(lru, reference):
    cache, _, fill = lru
    tokens = tokens_of(reference, 30)
    cache.insert_cache("model", tokens, [*fill(tokens), TurboKVCache()])
    assert cache.fetch_nearest_cache("model", tokens + [5])[1] == [5]


def test_a_cache_that_cannot_be_trimmed_is_not_filed_under_other_tokens_and_no_exact_hit(lru, reference):
    cache, _, fill = lru
    tokens = tokens_of(reference, 30)

    def untrimmable():
        caches = fill(tokens)
        for c in caches:
            c.is_trimmable = lambda: False
        return caches

    cache.insert_cache("model", tokens[:-1], untrimmable())
    assert len(cache) == 0
    cache.insert_cache("model", tokens, untrimmable())
    assert cache.fetch_nearest_cache("model", tokens) == (None, tokens)
    assert cache.fetch_nearest_cache("model", tokens + [5])[1] == [5]


# ---- sliding windows ---------------------------------------------------------------------------------------
def test_conversations_with_a_model_of_sliding_windows_are_answered_together_and_greedily(tmp_path):
    """Far past the window, four at a time, with hits in the prompt cache."""
    folder = tmp_path / "windows"
    save_window_model(folder, 150)
    reference = Reference(folder)
    with (
        Server(
            tmp_path,
            "--model",
            folder,
            "--chat-template",
            DEMO_TEMPLATE,
            "--kv",
            "turbo0",
            *SHORT_WINDOW,
            "--prompt-cache-size",
            99,
        ) as server,
        ThreadPoolExecutor(4) as pool,
    ):
        assert "4 of 4 layers compressed (3 of them windows of 150 tokens)" in server.log
        assert "answered in batches" in server.log
        talks, hits = [Conversation(server, i) for i in range(4)], []
        for talk in talks:
            talk.messages = [{"role": "user", "content": " ".join(STORIES[5 * talk.number : 5 * talk.number + 14])}]
        for _ in range(4):
            for sent, answer in pool.map(lambda talk: talk.say(12), talks):
                assert reference.behind(sent, answer).max() < 1e-4
                assert answer["usage"]["prompt_tokens"] > 150
                hits.append(cached(answer))
        assert min(hits[4:]) > 150, hits
        assert "Traceback" not in server.log


# ---- docs/server.md ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("language, word", [("bash", "curl"), ("python", "urllib")])
def test_what_the_page_on_the_server_shows_works(demo, language, word):
    blocks = pages.blocks("docs/server.md", language)
    assert blocks
    for _, block in blocks:
        program = block.replace(":8080", f":{demo.port}")
        assert word in program and program != block
        if language == "bash" and not shutil.which("curl"):
            pytest.skip("no curl here")
        command = ["bash", "-c", program] if language == "bash" else [sys.executable, "-c", program]
        out = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert out.returncode == 0, out.stderr
        if "kv-cache" in block:
            example = json.loads(re.search(r"^    (\{.*\})$", pages.text("docs/server.md"), re.MULTILINE)[1])
            assert set(json.loads(out.stdout)) == set(example)
        else:
            assert ", there was a little girl named Lily." in out.stdout


# ---- soak --------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize(
    "argv, n_first, most_behind, most_not_greedy",
    [(["--kv", "turbo0", *SHORT_WINDOW], 1, 0.0, 0), ([], 30, PACKED_BEHIND, 0.02)],
    ids=["exact", "default"],
)
def test_two_hundred_requests_of_eight_conversations(start, reference, argv, n_first, most_behind, most_not_greedy):
    """Two at a time, each starting anew now and then, so that the prompt cache is full. With what rounds nothing no
    token is wrong; the default packs from 256 tokens on, and begins with more."""
    server = start(*argv, "--prompt-cache-size", 9)
    rest = settled(server)["active_memory"]
    talks, behind, hits = {Conversation(server, i, n_first): Past(reference.model) for i in range(8)}, [], 0
    with ThreadPoolExecutor(2) as pool:
        for turn in range(25):
            for talk, (sent, answer) in zip(talks, pool.map(lambda talk: talk.say(4), talks)):
                behind += list(reference.behind(sent, answer, talks[talk]))
                hits += cached(answer) > 50
                if (turn + talk.number) % 16 == 15:
                    behind += list(reference.behind(sent, answer))  # the whole text at once, too
                    talk.messages = []
            held = settled(server)
            assert held["sequences"] <= 9
            # less: a hit and what it came from share buffers until one of them is written into
            # more: a batch, and the last request's cache as it was before its batch, not yet packed, which mlx-lm's
            # server keeps until the next; 200 caches that are kept would be 120 MB
            assert 0.5 * held["nbytes"] < held["active_memory"] - rest < 1.1 * held["nbytes"] + 8e6
    assert len(behind) >= 25 * 8 and hits > 60
    assert max(behind) <= most_behind and np.count_nonzero(behind) <= most_not_greedy * len(behind)
    print(
        json.dumps(
            {
                "tokens": len(behind),
                "hits": hits,
                "not greedy": int(np.count_nonzero(behind)),
                "most behind": float(max(behind)),
                **held,
            }
        )
    )


# ---- a budget of memory ------------------------------------------------------------------------------------------
def test_a_draft_model_comes_under_the_budget_of_the_model_that_is_loaded_with_it(monkeypatch):
    args = argparse.Namespace(
        **dict(
            kv=None, kv_memory="3MB", kv_floor=None, kv_sink=2, kv_recent=8, num_draft_tokens=3, prefill_step_size=2048
        ),
        **dict(model=str(DEMO_MODEL), draft_model=f"{DEMO_MODEL}/.", prompts=ServedPrompts()),
        **dict(rooms={}, budgets={}, loaded=[]),
    )
    program = serve.ServerProgram(serve.module, args)
    monkeypatch.setattr(program, "choose", lambda model, tokenizer: program.config)  # without prices
    model, draft = (program._load(mlx_lm.load, path)[0] for path in (args.model, args.draft_model))
    budget, fit = args.budgets[args.model]
    caches = [cache for m in (model, draft) for cache in make_prompt_cache(m)]
    assert {id(c.share.budget) for c in caches} == {id(budget)} and len(budget.models) == len(budget.evict) + 1 == 2
    assert budget.tokens_that_fit(caches) == fit > 300
    args.loaded.clear()
    program._load(mlx_lm.load, args.model)
    assert args.budgets[args.model][1] > 1.5 * fit


@pytest.mark.slow
def test_a_budget_of_memory_is_over_the_caches_of_a_draft_model_too(start, draft_model, reference):
    server = start("--kv-memory", "9MB", *SHORT_WINDOW, "--draft-model", draft_model)
    sent, answer = Conversation(server, 0).say(12)
    assert not reference.behind(sent, answer).any()
    held = server.get("/kv-cache")[1]["memory"]
    assert set(held["layers"]) == set(held["draft_layers"]) == set("0123")
    assert "exact in layers 0-3, of the draft model exact in layers 0-3" in held["text"]
    said = [{"role": "user", "content": " ".join(STORIES[:40])}]
    answer = server.post("/v1/chat/completions", {"messages": said, "max_tokens": 20})[1]
    assert answer["usage"]["completion_tokens"] == 20 or answer["choices"][0]["finish_reason"] == "stop"
    held = server.get("/kv-cache")[1]["memory"]
    assert 0 < held["nbytes"] <= held["limit"] == 9_000_000 and "of the draft model turbo" in held["text"]


def test_all_requests_share_a_budget_of_memory_and_one_that_does_not_fit_fails_alone(start):
    server = start("--kv-memory", "3MB", *SHORT_WINDOW)

    def ask(n):
        said = [{"role": "user", "content": " ".join(STORIES[:n])}]
        return server.post("/v1/chat/completions", {"messages": said, "max_tokens": 6})

    limit = server.get("/kv-cache")[1]["context_length"]
    assert 500 < limit < 4096
    status, refused = ask(2 * limit // 15)
    assert status == 400 and f"must have fewer than {limit}, what the memory budget holds" in refused["error"]
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(ask, [3, 30, 40]))
    statuses = [status for status, _ in answers]
    assert set(statuses) <= {200, 500} and statuses.count(200) >= 1
    for status, answer in answers:
        if status == 200:
            assert answer["usage"]["completion_tokens"] == 6 or answer["choices"][0]["finish_reason"] == "stop"
        else:
            assert "MemoryBudgetError: memory: " in answer["error"] and "budget is 3,000,000 (3MB)" in answer["error"]
    held = server.get("/kv-cache")[1]["memory"]
    assert 0 < held["nbytes"] <= held["limit"] == 3_000_000, (held, statuses)
    assert held["priced_by"] == "KL divergence"
    assert set(held["layers"]) == set("0123") and "budget of 3MB" in held["text"]
    assert ask(20)[0] == 200  # what earlier requests left is dropped for it
    assert server.stop() == 0 and "prompt caches: budget of 3MB" in server.log
