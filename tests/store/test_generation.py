"""The embedded model with a PromptStore: the same tokens as without one."""

import json

import pytest
from mlx_lm.models.cache import KVCache
from support.models import DEMO_MODEL
from support.soak import generate, soak

from mlx_turbo import PromptStore, make_prompt_cache

pytestmark = pytest.mark.usefixtures("door")


def text_tokens(tokenizer, n, skip=0):
    return tokenizer.encode((DEMO_MODEL / "stories.txt").read_text())[skip : skip + n]


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


LIMITS = {"turbo0": (12_000_000, 4_000_000), "turbo4": (1_000_000_000, 0)}  # bytes on disk and in memory


@pytest.mark.parametrize("scheme", LIMITS)
@pytest.mark.parametrize(
    "n_requests, n_kills, n_restarts", [(12, 1, 1), pytest.param(500, 8, 8, marks=pytest.mark.slow)]
)
def test_conversations_with_common_prefixes_restarts_and_kills_get_no_wrong_token(
    tmp_path, scheme, n_requests, n_kills, n_restarts
):
    """turbo0 with limits that it reaches, against computing anew; turbo4 against a run without restarts and kills."""
    max_bytes, memory = LIMITS[scheme]
    out = soak(tmp_path, scheme, n_requests, max_bytes, memory, n_kills, n_restarts)
    print(f"{scheme}, {n_requests} requests:", json.dumps(out))
    assert out["wrong"] == 0
    assert out["nbytes"] <= max_bytes and out["memory_nbytes"] <= memory
    assert out["store_found"] > out["mlx_lm_found"] and out["store_found"] > out["sent"] / 4
    if n_requests == 500 and scheme == "turbo0":
        assert out["nbytes"] > 0.8 * max_bytes and out["memory_nbytes"] > 0.8 * memory
