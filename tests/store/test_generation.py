"""The embedded model with a PromptStore: the same tokens as without one."""

import random

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import KVCache
from support.models import DEMO_MODEL

from mlx_turbo import PromptStore, make_prompt_cache

pytestmark = pytest.mark.usefixtures("door")


def text_tokens(tokenizer, n, skip=0):
    return tokenizer.encode((DEMO_MODEL / "stories.txt").read_text())[skip : skip + n]


def generate(model, tokens, cache, n):
    """The next n tokens, after which the cache holds all of them."""
    steps = generate_step(mx.array(tokens), model, max_tokens=n, prompt_cache=cache, prefill_step_size=512)
    return [int(token) for token, _ in steps]


def new_cache(model, scheme):
    return [KVCache() for _ in model.layers] if scheme == "none" else make_prompt_cache(model, scheme)


@pytest.mark.parametrize("scheme, n_prompt", [("turbo4", 400), ("auto", 60), ("none", 150)])  # 60: nothing is packed
def test_a_conversation_that_is_stored_after_each_turn_gets_the_tokens_of_one_that_is_not(
    demo, tmp_path, scheme, n_prompt
):
    model, tokenizer = demo
    turns = text_tokens(tokenizer, n_prompt), text_tokens(tokenizer, 90, 2000), text_tokens(tokenizer, 130, 3000)
    kept = new_cache(model, scheme)
    conversation = []
    for turn in turns:
        want = generate(model, turn, kept, 8)
        with PromptStore(tmp_path / "store") as store:  # a new process, as far as the store knows
            cache, n = store.fetch(model, conversation + turn, like=new_cache(model, scheme))
            assert n == len(conversation)
            conversation += turn
            cache = cache or new_cache(model, scheme)
            got = generate(model, conversation[n:], cache, 8)
            assert got == want
            conversation += got
            store.put(model, conversation, cache)


def soak(model, tokenizer, folder, n_requests, rng):
    """(tokens that differ from computing anew, tokens sent, tokens that were found) of requests in 8 conversations with
    common prefixes: each goes on, starts over in another place, or asks the same again; the store is opened anew now
    and then."""
    system, wrong, sent, found = text_tokens(tokenizer, 300), 0, 0, 0
    conversations = [system for _ in range(8)]
    store = PromptStore(folder, max_bytes=60_000_000, max_memory_bytes=20_000_000)
    for _ in range(n_requests):
        if rng.random() < 0.2:
            store.close()
            store = PromptStore(folder, max_bytes=60_000_000, max_memory_bytes=rng.choice([0, 20_000_000]))
        i, what = rng.randrange(8), rng.random()
        before = conversations[i] if what < 0.8 else conversations[i][: rng.randrange(200, len(conversations[i]) + 1)]
        prompt = before + text_tokens(tokenizer, rng.randrange(20, 150), rng.randrange(5000))
        if len(prompt) > 1500:
            prompt = system + prompt[-100:]
        cache, n = store.fetch(model, prompt)
        cache = cache or make_prompt_cache(model, "turbo0")
        got = generate(model, prompt[n:], cache, 6)
        want = generate(model, prompt, new_cache(model, "none"), 6)
        wrong += sum(a != b for a, b in zip(got, want))
        conversations[i] = prompt + got
        store.put(model, conversations[i], cache)
        sent, found = sent + len(prompt), found + n
        report = store.report()
        assert report["nbytes"] <= 60_000_000 and report["memory_nbytes"] <= 20_000_000
        assert report["damaged"] == report["errors"] == []
    store.close()
    return wrong, sent, found


@pytest.mark.parametrize("n_requests", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_conversations_with_common_prefixes_and_restarts_get_no_wrong_token(demo, tmp_path, n_requests):
    wrong, sent, found = soak(*demo, tmp_path / "store", n_requests, random.Random(0))
    print(f"{n_requests} requests: {wrong} wrong tokens, {sent} tokens sent, {found} of them stored")
    assert wrong == 0 and found > sent / 4
