"""The prompts of `mlx-turbo serve` on disk (docs/store.md).

mlx-lm's server keeps the caches of the last prompts in memory. Where those hold less of a prompt than the store does,
the request goes on from the store. What a request has computed is put when it is answered, or when its client is gone,
and while a long prompt is computed.

Nothing that goes wrong with the store fails a request: the log says it, and `/kv-cache`.
"""

import argparse
import logging
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from ..integration.isolation import GenerationError, IsolatedBatchGenerator
from ..integration.memory import take_under_budget
from ..integration.prompt_cache import memory_budget_of
from ..store.cut import BLOCK
from ..store.prompt_store import CHECKPOINT, PromptStore, default_folder
from .common import CliError, describe_error, print_message, trim_to_common


def add_store_arguments(group: Any, size: Callable[[str], int]) -> None:
    """The options of `ServedPrompts`. size: parses a number of bytes."""
    add = group.add_argument
    add("--store", metavar="DIR", help=f"store prompts in this folder (default: {default_folder()}, if possible)")
    add("--no-store", action="store_true", help="store no prompts, and go on from none")
    add("--store-bytes", type=size, default=50 * 10**9, metavar="SIZE", help="most bytes of its files (default: 50GB)")
    add(
        "--store-memory-bytes",
        type=size,
        default=0,
        metavar="SIZE",
        help="most bytes of stored prompts that are also held in memory, besides mlx-lm's prompt caches (default: 0)",
    )
    add(
        "--store-checkpoint",
        type=int,
        default=CHECKPOINT,
        metavar="N",
        help="store a long prompt while it is computed, after every N blocks of 128 tokens (default: "
        f"{CHECKPOINT}; 0: when it is answered)",
    )


def check_store_arguments(args: argparse.Namespace) -> None:
    """Raise CliError for values that do not work."""
    if args.store is not None and args.no_store:
        raise CliError("--store: goes without --no-store")
    for name in ("store_bytes", "store_memory_bytes", "store_checkpoint"):
        if (value := getattr(args, name)) < 0:
            raise CliError(f"--{name.replace('_', '-')}: got {value}, expected a whole number of at least 0")


def new_cache(model: Any) -> list[Any]:
    """A prompt cache as the next request gets it, to look at."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said when the model was loaded
        return make_prompt_cache(model)


class PromptClock:
    """How fast prompts are computed, by the clock: what else the server does meanwhile counts too. tokens, seconds: of
    all prompts so far."""

    def __init__(self) -> None:
        self.tokens, self.seconds = 0, 0.0

    def start(self) -> Callable[[int], None]:
        """A function that takes how many tokens of one prompt are computed so far, as they are."""
        at, before = time.perf_counter(), 0

        def note(done: int) -> None:
            nonlocal at, before
            now = time.perf_counter()
            if done > before:
                self.tokens, self.seconds = self.tokens + done - before, self.seconds + now - at
            at, before = now, done

        return note


class ServedPrompts:
    """The stored prompts of a server. All but `report` is called in the thread that computes.

    store: None as long as it is not open, or if there is none; `off` says why. provider: what has the model.
    """

    def __init__(self) -> None:
        self.store: PromptStore | None = None
        self.off, self.every = "it is not open", CHECKPOINT
        self.provider: Any = None
        self.clock = PromptClock()
        self.evict: Callable[[], bool] = lambda: False  # drops one of mlx-lm's prompt caches
        self.asked: list[int] | None = None  # tokens of the prompt that a cache was looked up for last
        self.hits, self.errors, self.fetch_seconds = 0, 0, 0.0
        self.counts = dict.fromkeys(("tokens_sent", "tokens_from_memory", "tokens_from_store"), 0)

    def open(self, args: argparse.Namespace) -> None:
        """Open the folder, and say in a line which, or why there is none. Raises CliError if one that was named cannot
        be used."""
        self.every, self.off = args.store_checkpoint, ""
        if args.no_store:
            self.off = "--no-store"
        elif args.draft_model is not None:
            self.off = "the caches of a draft model depend on more than the tokens"
        elif args.kv_bits is not None:
            self.off = "the caches that --kv-bits quantizes are not"
        elif mx.distributed.init().size() > 1:
            self.off = "several machines would have to find the same"
        else:
            try:
                self.store = PromptStore(args.store, args.store_bytes, args.store_memory_bytes)
            except (OSError, ValueError) as e:
                if args.store is not None:
                    raise CliError(f"--store: {describe_error(e)}") from e
                self.off = describe_error(e)
        if self.store is None:
            print_message(f"prompts are not stored: {self.off}")
        else:
            report = self.store.report()
            print_message(
                f"prompts are stored in {report['folder']}: {report['nbytes'] / 1e6:,.1f} MB of at most "
                f"{self.store.max_bytes / 1e6:,.0f} MB"
            )

    @property
    def memory_nbytes(self) -> int:
        """Bytes of memory that stored prompts may take, besides what waits to be written."""
        return 0 if self.store is None else self.store.max_memory_bytes

    def close(self) -> None:
        """Write what waits."""
        if self.store is not None:
            self.store.close()
            self.store, self.off = None, "it is closed"

    # ---- requests ------------------------------------------------------------------------------------------------
    def fetch(self, tokens: list[int], cache: Any, rest: list[int]) -> tuple[Any, list[int]]:
        """(caches, the tokens after them) of a prompt: those given, or of the store if it has more."""
        self.asked = list(tokens) if self._can_store(tokens) else None
        if self.asked is None or self.store is None or self.provider is None:
            return cache, rest
        n_memory, start = len(tokens) - len(rest), time.perf_counter()
        self.counts["tokens_sent"] += len(tokens)
        self.counts["tokens_from_memory"] += n_memory
        try:
            model = self.provider.model
            like = new_cache(model)
            found, n = self.store.fetch(model, tokens, like=like, more_than=n_memory)
            budget = memory_budget_of(like)
            if found is not None and budget is not None and not take_under_budget(found, budget):
                found = None
        except Exception:
            self._failed("a stored prompt cannot be used: it is computed")
            return cache, rest
        if found is None:
            return cache, rest
        self.hits += 1
        self.counts["tokens_from_store"] += n - n_memory
        self.fetch_seconds += time.perf_counter() - start
        return found, tokens[n:]

    def put(self, tokens: Sequence[int], cache: Sequence[Any]) -> None:
        """Store the caches of a sequence."""
        if self.store is None or self.provider is None or not self._can_store(tokens):
            return
        try:
            self.store.put(self.provider.model, tokens, cache)
        except Exception:
            self._failed("a prompt is not stored")

    def _can_store(self, tokens: Sequence[int]) -> bool:
        """Whether the tokens say all that the caches depend on: mlx-lm gives those of pictures negative numbers."""
        return bool(tokens) and min(tokens) >= 0

    def _failed(self, what: str) -> None:
        self.errors += 1
        logging.exception(what)

    def stream_generate(self, original: Callable[..., Iterator[Any]], **options: Any) -> Iterator[Any]:
        """mlx-lm's function, by which a request is answered that is not in a batch, with checkpoints in its prompt."""
        tokens, store, theirs = self.asked, self.store, options["prompt_progress_callback"]
        if store is None or tokens is None or not self.every:
            return original(**options)
        n = len(tokens) - len(options["prompt"])
        ours = store.checkpoints(options["model"], tokens, options["prompt_cache"], n, self.every)

        def progress(done: int, total: int) -> None:
            theirs(done, total)
            try:
                ours(done, total)
            except Exception:
                self._failed("a prompt is not stored")

        return original(**options | {"prompt_progress_callback": progress})

    # ---- looking at it -------------------------------------------------------------------------------------------
    def report(self) -> dict[str, Any]:
        """What GET /kv-cache says of it."""
        store = self.store
        if store is None:
            return {"off": self.off}
        seconds = self.clock.seconds / self.clock.tokens if self.clock.tokens else None
        try:
            said = store.report()
        except ValueError:  # closed meanwhile
            return {"off": "it is closed"}
        return {
            "folder": said["folder"],
            "hits": self.hits,
            **self.counts,
            "prompt_tokens_per_second": seconds and 1 / seconds,
            "saved_seconds": seconds and self.counts["tokens_from_store"] * seconds - self.fetch_seconds,
            "nbytes": said["nbytes"],
            "max_bytes": store.max_bytes,
            "memory_nbytes": said["memory_nbytes"] + said["queued_nbytes"],
            "max_memory_bytes": store.max_memory_bytes,
            "not_written": said["not_written"],
            "damaged": len(said["damaged"]),
            "errors": len(said["errors"]) + self.errors,
            "newest_problem": [*said["damaged"], *said["errors"]][-1:],
        }


class Unfinished(list[Any]):
    """The caches of a prompt that is not answered yet."""


class StoringBatchGenerator(IsolatedBatchGenerator):
    """Puts the caches of long prompts while they are computed, and those of requests whose clients are gone."""

    def __init__(self, prompts: ServedPrompts, generator: Callable[..., Any], model: Any, **options: Any) -> None:
        super().__init__(generator, model, **options)
        self._prompts = prompts
        self._put_at: dict[int, int] = {}  # by uid, tokens of its prompt

    def next(self) -> tuple[list[Any], list[Any]]:
        """As IsolatedBatchGenerator's."""
        prompts, answers = super().next()
        due = [r.uid for r in prompts if self._is_due(r) and self._has_room()]
        for cache, tokens in super().extract_cache(due).values():
            self._prompts.put(tokens, cache)
        return prompts, answers

    def _is_due(self, response: Any) -> bool:
        if isinstance(response.progress, GenerationError) or response.end_of_prompt:
            self._put_at.pop(response.uid, None)
            return False
        done, every = response.progress[0], self._prompts.every * BLOCK
        if not every or self._prompts.store is None or done - self._put_at.setdefault(response.uid, 0) < every:
            return False
        self._put_at[response.uid] = done
        return True

    def _has_room(self) -> bool:
        """Whether a row can be copied, to be stored, within a budget of memory."""
        budget = memory_budget_of(new_cache(self._prompts.provider.model)) if self._prompts.provider else None
        return budget is None or 2 * budget.nbytes <= budget.limit

    def extract_cache(self, uids: Iterable[int]) -> dict[int, Any]:
        """As IsolatedBatchGenerator's."""
        return {uid: (Unfinished(cache), tokens) for uid, (cache, tokens) in super().extract_cache(uids).items()}

    def remove(self, uids: Iterable[int]) -> None:
        """As IsolatedBatchGenerator's."""
        uids = set(uids)
        if self._prompts.store is not None and self._has_room():
            for cache, tokens in super().extract_cache(uids).values():
                if tokens and (n := trim_to_common(cache, len(tokens))):
                    self._prompts.put(tokens[:n], cache)
        for uid in uids:
            self._put_at.pop(uid, None)
        super().remove(uids)
