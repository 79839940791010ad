"""A conversation of `mlx-turbo chat` that outlives its process.

Its messages and tokens lie in a file of their own, its cache in the prompt store. Where the store has lost the cache
or a part of it, the tokens are computed again.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mlx_lm.models.cache import can_trim_prompt_cache

from ..integration.memory import take_under_budget
from ..integration.prompt_cache import memory_budget_of
from ..store import files
from ..store.identity import identity_of, label_of
from ..store.prompt_store import PromptStore
from .common import CliError, describe_error, print_message, trim_to_common

VERSION = 1
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"


def default_chats() -> Path:
    """Where conversations lie: below the user's folder for data, which the system does not empty."""
    if sys.platform == "darwin":
        return Path.home() / "Library/Application Support/mlx-turbo/chats"
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share") / "mlx-turbo/chats"


class Conversation:
    """name: of the conversation; a new one if there is none of this name. store: has its caches.

    Raises CliError for a name that is none, and for a file that cannot be read.
    """

    def __init__(self, name: str, store: PromptStore) -> None:
        if not re.fullmatch(NAME, name):
            raise CliError(f"--resume: got {name!r}, expected a name of letters, digits, '.', '_' and '-'")
        self.name, self.store, self.path = name, store, default_chats() / f"{name}.json"
        self.tokens: list[int] = []
        self.messages: list[dict[str, str]] = []
        self.model = ""
        self._pending: list[int] = []  # the last of `tokens`, which are not in the cache yet
        self._turn: tuple[Any, Any, list[int], list[int], list[str]] | None = None  # model, cache, prompt, tokens, text
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        try:
            said = json.loads(self.path.read_text(encoding="utf-8"))
            if said["version"] != VERSION:
                raise ValueError(f"version {said['version']}, this mlx_turbo reads {VERSION}")
            self.model, self.label = said["model"], said["label"]
            self.messages, self.tokens = said["messages"], [int(t) for t in said["tokens"]]
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise CliError(f"--resume: cannot read {str(self.path)!r}: {describe_error(e)}") from e

    def begin(self, model: Any, cache: list[Any]) -> list[Any]:
        """The cache that the conversation goes on with: an empty one that is given, or what is stored.

        Raises CliError if it was held with another model.
        """
        if not self.tokens:
            print_message(f"{self.name}: a new conversation, kept in {self.path}")
            return cache
        if identity_of(model) != self.model:
            raise CliError(f"--resume: {self.name!r} was held with another model ({self.label}); give that as --model")
        found, n = self.store.fetch(model, [*self.tokens, 0], like=cache)  # 0: the token that it would go on with
        budget = memory_budget_of(cache)
        if found is not None and budget is not None and not take_under_budget(found, budget):
            found, n = None, 0
        self._pending = self.tokens[n:]
        again = f", {len(self._pending)} of which are computed again" if self._pending else ""
        print_message(f"{self.name}: {len(self.messages)} messages, {len(self.tokens)} tokens{again}")
        for message in self.messages[-2:]:
            print(f"{message['role']}: {message['content']}")
        return cache if found is None else found

    def clear(self) -> None:
        """Begin anew; the next answer replaces what is kept."""
        self.tokens, self.messages, self._pending, self._turn = [], [], [], None

    def answer(
        self,
        stream_generate: Callable[..., Iterator[Any]],
        model: Any,
        tokenizer: Any,
        prompt: Sequence[int],
        messages: list[dict[str, str]],
        **options: Any,
    ) -> Iterator[Any]:
        """mlx-lm's stream_generate, for a conversation that is kept once its answer is complete. prompt: tokens of the
        new messages."""
        new = [*self._pending, *prompt]
        self.tokens, self._pending = self.tokens[: len(self.tokens) - len(self._pending)], []
        self.messages += messages
        said, text = list[int](), list[str]()
        self._turn = model, options["prompt_cache"], new, said, text
        for response in stream_generate(model, tokenizer, new, **options):
            said.append(response.token)
            text.append(response.text)
            yield response
        self._finish(complete=True)

    def close(self) -> None:
        """Keep what there is of an answer that was interrupted, and write everything."""
        self._finish(complete=False)
        self.store.close()

    def _finish(self, complete: bool) -> None:
        if self._turn is None:
            return
        (model, cache, new, said, text), self._turn = self._turn, None
        tokens = [*self.tokens, *new, *said]
        self.messages.append({"role": "assistant", "content": "".join(text)})
        n = None
        if complete or can_trim_prompt_cache(cache):  # a state may be a token ahead of what was interrupted
            n = trim_to_common(cache, len(tokens))
        # the next turn goes on from what the cache holds; an interrupted one is computed to its end first
        self.tokens = tokens[:n] if complete else tokens
        self._write(model)
        if n:
            try:
                self.store.put(model, tokens[:n], cache)
            except Exception as e:
                print_message(f"the cache is not stored, and will be computed again: {describe_error(e)}")

    def _write(self, model: Any) -> None:
        """Replace the file, whole or not at all."""
        what = {"version": VERSION, "model": identity_of(model), "label": label_of(model)}
        text = json.dumps(what | {"messages": self.messages, "tokens": self.tokens}, ensure_ascii=False, indent=1)
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            files.replace_private(self.path, text)
        except OSError as e:
            print_message(f"the conversation is not kept: {describe_error(e)}")
