"""A server in a process of its own, a client that speaks to it as OpenAI's does, and what a greedy answer must be."""

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

import mlx_turbo
from mlx_turbo.cli.common import DEMO_MODEL, DEMO_TEMPLATE

# of sentences that the embedded model goes on from
STORIES = [s.strip() for s in re.findall(r"[^.!?\n\"]{30,90}[.]", (DEMO_MODEL / "stories.txt").read_text())]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    """`mlx-turbo serve` with some arguments; `with Server(...) as server:` ends it. prelude: Python that its process
    runs first."""

    def __init__(self, folder, *argv, prelude=""):
        self.port, self.log_file = free_port(), Path(folder) / "server.log"
        package = str(Path(mlx_turbo.__file__).parents[1])
        # what a shell starts in the background, and all that this starts, ignores SIGINT
        command = (
            "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
            f"sys.path[:0] = {[package, str(Path(__file__).parents[1])]!r}; {prelude}\n"
            "from mlx_turbo.cli.main import main; sys.exit(main(sys.argv[1:]))"
        )
        env = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(folder),
            "HOME": str(folder),
            "XDG_CACHE_HOME": str(folder),
        }
        with open(self.log_file, "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", command, "serve", "--port", str(self.port), *map(str, argv)],
                stdout=log,
                stderr=log,
                env=env,
                cwd=folder,
            )
        while True:
            assert self.process.poll() is None, self.log
            try:
                assert self.get("/health") == (200, {"status": "ok"})
                return
            except ConnectionRefusedError:
                time.sleep(0.1)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.stop()

    @property
    def log(self):
        return self.log_file.read_text()

    @property
    def rss(self):
        """Bytes of the process that are in memory."""
        return 1024 * int(subprocess.check_output(["ps", "-o", "rss=", "-p", str(self.process.pid)]))

    def stop(self):
        """Interrupts it; returns its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        return self.process.wait(60)

    def connect(self, path, body):
        """The response of a POST, to be read."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.request(
            "POST", path, body if isinstance(body, str) else json.dumps(body), {"Content-Type": "application/json"}
        )
        return connection.getresponse()

    def get(self, path):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, json.loads(response.read())

    def post(self, path, body):
        response = self.connect(path, body)
        return response.status, json.loads(response.read())

    def chat(self, messages, max_tokens=8, **options):
        status, answer = self.post(
            "/v1/chat/completions", {"messages": messages, "max_tokens": max_tokens, "logprobs": True, **options}
        )
        assert status == 200, answer
        return answer

    def stream(self, messages, max_tokens=8, **options):
        """The chunks of a streamed answer; checks the format of server-sent events."""
        response = self.connect(
            "/v1/chat/completions", {"messages": messages, "max_tokens": max_tokens, "stream": True, **options}
        )
        assert response.status == 200 and response.headers["Content-Type"] == "text/event-stream"
        events = response.read().decode().split("\n\n")
        assert events[-1] == "" and events[-2] == "data: [DONE]"
        return [json.loads(e.removeprefix("data: ")) for e in events[:-2] if not e.startswith(":")]  # : keepalive


def save_model(folder, seed=None, infinite=None):
    """The embedded model in float32, where rounding hardly ever decides between tokens. seed: with noise. infinite: a
    token whose embedding is infinite."""
    import mlx_lm.utils

    model, _ = mlx_lm.utils.load(str(DEMO_MODEL))
    model = mlx_lm.utils.dequantize_model(model)
    model.set_dtype(mx.float32)
    if seed is not None:
        mx.random.seed(seed)
        model.update(
            tree_map(lambda a: a * (1 + 0.1 * mx.random.normal(a.shape)) if a.ndim == 2 else a, model.parameters())
        )
    folder.mkdir()
    for file in DEMO_MODEL.glob("tokenizer*.json"):
        shutil.copy(file, folder)
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    config = {k: v for k, v in config.items() if not k.startswith("quantization")}
    if infinite is not None:
        embedding = model.model.embed_tokens.weight
        config["tie_word_embeddings"] = model.args.tie_word_embeddings = False  # what is written stays as it was
        model.lm_head = nn.Linear(embedding.shape[1], embedding.shape[0], bias=False)
        model.lm_head.weight = mx.array(embedding)
        embedding[infinite] = float("inf")
    (folder / "config.json").write_text(json.dumps(config))
    mlx_lm.utils.save_model(folder, model, donate_model=False)


def _save(folder, model, args):
    """A new folder with a model and the embedded one's tokens."""
    import mlx_lm.utils

    folder.mkdir()
    for file in DEMO_MODEL.glob("tokenizer*.json"):
        shutil.copy(file, folder)
    (folder / "config.json").write_text(json.dumps(args | {"eos_token_id": 0}))
    mlx_lm.utils.save_model(folder, model, donate_model=False)


def save_window_model(folder, window):
    """A random model that speaks the embedded one's tokens, with layers that see the newest `window` of them only."""
    from mlx_lm.models import llama

    args = dict(
        model_type="llama",
        hidden_size=64,
        num_hidden_layers=4,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        rms_norm_eps=1e-5,
        vocab_size=2048,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        sliding_window=window,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
    )
    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs(**args))
    model.update(tree_map(lambda a: mx.random.normal(a.shape) * 0.1 if a.ndim > 1 else a, model.parameters()))
    _save(folder, model, args)


def save_state_model(folder):
    """A random model that speaks the embedded one's tokens, whose layers hold states (Mamba 2)."""
    from mlx_lm.models import mamba2

    args = dict(
        model_type="mamba2",
        num_heads=4,
        head_dim=32,
        vocab_size=2048,
        hidden_size=64,
        intermediate_size=128,
        state_size=16,
        num_hidden_layers=2,
        layer_norm_epsilon=1e-5,
        conv_kernel=4,
        n_groups=1,
        use_bias=False,
        use_conv_bias=True,
        tie_word_embeddings=True,
        time_step_limit=[0.0, 100.0],
        time_step_rank="auto",
    )
    mx.random.seed(0)
    model = mamba2.Model(mamba2.ModelArgs(**args))
    _save(folder, model, args)


class Reference:
    """What the model itself says, without a server and without compression."""

    def __init__(self, folder):
        import mlx_lm

        self.model, self.tokenizer = mlx_lm.load(str(folder), {"chat_template": DEMO_TEMPLATE})

    def prompt(self, messages):
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)

    def behind(self, prompt, answer, past=None):
        """For every token of an answer: how much less likely it is than the likeliest one, in nats, given the prompt
        (messages or tokens) and the answer so far. All 0 if and only if it is the greedy answer.

        The whole text in one pass; or what is new in it, if `past`, a Past, has the rest: MLX on a CPU takes 3 ms a
        token.
        """
        if isinstance(prompt[0], dict):
            prompt = self.prompt(prompt)
        ids = [token["id"] for token in answer["choices"][0]["logprobs"]["content"]]
        assert answer["usage"]["prompt_tokens"] == len(prompt) and answer["usage"]["completion_tokens"] == len(ids) > 0
        text = prompt + ids[:-1]
        n_past, cache = past.go_back(text, len(prompt) - 1) if past else (0, None)
        logits = np.array(self.model(mx.array([text[n_past:]]), cache=cache))[0, len(prompt) - 1 - n_past :]
        return logits.max(-1) - logits[np.arange(len(ids)), ids]


class Past:
    """A text in mlx-lm's own cache."""

    def __init__(self, model):
        from mlx_lm.models.cache import make_prompt_cache

        self.tokens, self.cache = [], make_prompt_cache(model)

    def go_back(self, text, most):
        """Keep what `text` begins with, at most so many tokens: (how many, the cache); expects the rest next."""
        same = next((i for i, (a, b) in enumerate(zip(self.tokens, text)) if a != b), len(self.tokens))
        n = min(same, most)
        for c in self.cache:
            c.trim(len(self.tokens) - n)
        self.tokens = text
        return n, self.cache


def text_of(answer):
    return answer["choices"][0]["message"]["content"] or ""


def cached(answer):
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


class Conversation:
    """Goes on turn after turn: a sentence of ours (so many at first), an answer."""

    def __init__(self, server, number, n_first=1):
        self.server, self.number, self.n_first, self.messages, self.turn = server, number, n_first, [], 0

    def say(self, max_tokens=8):
        """One turn; returns the messages it sent and the answer."""
        n = 1 if self.messages else self.n_first
        sentence = " ".join(STORIES[(7 * self.number + self.turn + i) % len(STORIES)] for i in range(n))
        sent = [*self.messages, {"role": "user", "content": f". {sentence} " if self.messages else f"{sentence} "}]
        answer = self.server.chat(sent, max_tokens)
        self.messages = [*sent, {"role": "assistant", "content": text_of(answer)}]
        self.turn += 1
        return sent, answer
