"""A document read through a cache, and questions about it answered with copies of that cache."""

import copy
from collections.abc import Callable
from typing import Any

import mlx.core as mx


def read(
    model: Any, tokens: list[int], cache: list[Any], chunk: int, progress: Callable[[int], Any] | None = None
) -> None:
    """Let tokens pass through a prompt cache in chunks, so that they are packed as in real use. progress: called with
    the number of tokens done since the last call."""
    for start in range(0, len(tokens), chunk):
        piece = mx.array(tokens[start : start + chunk])
        mx.eval(model(piece[None], cache=cache))
        if progress:
            progress(piece.size)


def answer(
    model: Any,
    tokenizer: Any,
    cache: list[Any],
    question: list[int],
    max_tokens: int,
    is_complete: Callable[[str], bool],
) -> str:
    """The greedy answer to a question about what a prompt cache holds; the cache stays as it is.

    question: tokens that follow those in the cache. is_complete: whether no more of an answer is needed; given its
    text so far.
    """
    used = copy.deepcopy(cache)
    tokens: list[int] = []
    text = ""
    logits = model(mx.array(question)[None], cache=used)
    while len(tokens) < max_tokens:
        token: Any = logits[0, -1].argmax().item()
        if token in tokenizer.eos_token_ids:
            break
        tokens.append(token)
        text = tokenizer.decode(tokens)
        if is_complete(text):
            break
        logits = model(mx.array([[token]]), cache=used)
    return text
