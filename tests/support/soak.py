"""A soak of the prompt store: requests of conversations with common prefixes, answered by a process that is restarted
and killed in between."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import KVCache, LRUPromptCache
from support.models import llama

from mlx_turbo import PromptStore, make_prompt_cache

N_TALKS, N_SYSTEM, N_ANSWER, MOST, VOCABULARY = 8, 300, 6, 1200, 100
START = """
import sys
sys.path[:0] = {paths!r}
from support.soak import work
work(*{args!r})
"""


def generate(model, tokens, cache, n):
    """The next n tokens, after which the cache holds all of them."""
    steps = generate_step(mx.array(tokens), model, max_tokens=n, prompt_cache=cache, prefill_step_size=512)
    return [int(token) for token, _ in steps]


def sharp_model():
    """A small model whose answers depend on what it attends to: logits are large, so that it looks at few tokens."""
    model = llama()
    for layer in model.layers:
        layer.self_attn.q_proj.weight *= 8
        layer.self_attn.o_proj.weight *= 8
    mx.eval(model.parameters())
    return model


def answer(store, model, tokens, scheme):
    """(how many tokens were stored, the answer, the cache that holds both)"""
    cache, n = store.fetch(model, tokens, like=make_prompt_cache(model, scheme))
    cache = cache or make_prompt_cache(model, scheme)
    return n, generate(model, tokens[n:], cache, N_ANSWER), cache


def work(folder, scheme, max_bytes, memory, flush):
    """What the process does: a line with a prompt, a line with what is said to it; a line that bids it go on, it puts
    the cache, and a line with the store's report. The end of the input closes the store."""
    model, store = sharp_model(), PromptStore(folder, max_bytes=max_bytes, max_memory_bytes=memory)
    print("ready", flush=True)
    while line := sys.stdin.readline():
        tokens = json.loads(line)
        n, said, cache = answer(store, model, tokens, scheme)
        print(json.dumps([n, said]), flush=True)
        if not sys.stdin.readline():
            break
        store.put(model, tokens + said, cache)
        if flush:
            store.flush()
        print(json.dumps(store.report()), flush=True)
    store.close()


class Worker:
    """The process. args: of `work`."""

    def __init__(self, *args):
        tests = Path(__file__).parents[1]
        text = START.format(paths=[str(tests), str(tests.parent)], args=args)
        self.process = subprocess.Popen(
            [sys.executable, "-c", text], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout.readline() == "ready\n"

    def say(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def hear(self):
        return json.loads(self.process.stdout.readline())

    def kill(self):
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.communicate()

    def end(self):
        self.process.stdin.close()
        assert self.process.wait(60) == 0
        self.process.stdout.close()


class Held:
    """Stands for a layer of a cache in mlx-lm's LRUPromptCache, of which only hits are counted."""

    nbytes = 1

    def is_trimmable(self):
        return True

    def trim(self, n):
        return n


class TheirCache:
    """How many tokens mlx-lm's own prompt cache finds, with the size that its server gives it."""

    def __init__(self):
        self.forget()

    def forget(self):
        self.cache = LRUPromptCache(10)

    def find(self, tokens):
        _, rest = self.cache.fetch_nearest_cache("model", tokens)
        return len(tokens) - max(len(rest), 1)  # a whole prompt that is cached: one token is computed all the same


def prompts(n_requests, rng, answers):
    """Of each request the conversation, the prompt and its beginning: a conversation goes on, starts over in another
    place, or asks the same again. answers: gets what is said, by conversation."""
    system = [rng.randrange(VOCABULARY) for _ in range(N_SYSTEM)]
    for _ in range(n_requests):
        i, what = rng.randrange(N_TALKS), rng.random()
        before = answers.setdefault(i, system)
        if what > 0.8:
            before = before[: rng.randrange(200, len(before) + 1)]
        prompt = before + [rng.randrange(VOCABULARY) for _ in range(rng.randrange(20, 150))]
        yield i, (system + prompt[-100:] if len(prompt) > MOST else prompt)


def soak(folder, scheme, n_requests, max_bytes, memory, n_kills, n_restarts):
    """What became of `n_requests` requests, as a dict.

    scheme: with "turbo0" every answer is compared with one that is computed anew, and the process is killed at any
    moment; with others, with an uninterrupted run, and it is killed in an answer, when what it had put is written.
    """
    rng, model, answers, theirs = random.Random(0), sharp_model(), {}, TheirCache()
    exact = scheme == "turbo0"
    args = str(folder / "store"), scheme, max_bytes, memory, not exact
    out = dict.fromkeys(("sent", "store_found", "mlx_lm_found", "wrong", "nbytes", "memory_nbytes"), 0)
    planned = rng.sample(range(1, n_requests), n_kills + n_restarts)
    kills, restarts = planned[:n_kills], planned[n_kills:]
    calm, worker = PromptStore(folder / "calm"), Worker(*args)
    for k, (i, prompt) in enumerate(prompts(n_requests, rng, answers)):
        if k in restarts:
            worker.end()
        if k in kills:
            worker.say(json.dumps(prompt))
            if exact and rng.random() < 0.5:
                worker.hear()
                worker.say("")
            time.sleep(rng.random() * 0.1)
            worker.kill()
        if k in planned:
            theirs.forget()
            worker = Worker(*args)
        worker.say(json.dumps(prompt))
        if exact:
            want = generate(model, prompt, [KVCache() for _ in model.layers], N_ANSWER)
        else:
            n, want, cache = answer(calm, model, prompt, scheme)
            calm.put(model, prompt + want, cache)
        found, said = worker.hear()
        worker.say("")
        out["wrong"] += sum(a != b for a, b in zip(said, want)) + (not exact and n != found)
        report = worker.hear()
        assert report["damaged"] == report["errors"] == [], report
        for name in "nbytes", "memory_nbytes":
            out[name] = max(out[name], report[name])
        out["sent"] += len(prompt)
        out["store_found"] += found
        out["mlx_lm_found"] += theirs.find(prompt)
        answers[i] = prompt + said
        theirs.cache.insert_cache("model", answers[i], [Held()])
    worker.end()
    calm.close()
    return out
