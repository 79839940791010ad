"""`mlx-turbo chat`: mlx_lm.chat's own main() with compressed caches, in conversations that go on after it ended."""

import argparse
import builtins
import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx_lm.chat as module

from ..backends.select import use_backend
from ..store.prompt_store import PromptStore, default_folder
from .common import (
    DEMO_MODEL,
    DEMO_TEMPLATE,
    CliError,
    TurboProgram,
    add_program_arguments,
    cached_tokens,
    describe_error,
    describe_model_argument,
    limit_to_budget,
    patched_attributes,
    report_lines,
    say_budget_ended,
    use_demo_model,
    warn_beyond_context,
)
from .conversation import Conversation, default_chats


class ChatProgram(TurboProgram):
    """Keeps the newest cache only: "r" starts over, and the old cache's memory must be freed. conversation: that of
    --resume, or None. query: what the user typed last."""

    conversation: Conversation | None = None
    query = ""

    def _load(self, original: Callable[..., Any], path: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        if path == str(DEMO_MODEL):
            kwargs["tokenizer_config"] = {**kwargs.get("tokenizer_config", {}), "chat_template": DEMO_TEMPLATE}
        return super()._load(original, path, *args, **kwargs)

    def _make_prompt_cache(self, original: Callable[..., Any], model: Any, max_kv_size: int | None = None) -> list[Any]:
        is_first = not self.caches
        self.caches.clear()
        cache = super()._make_prompt_cache(original, model, max_kv_size)
        if self.conversation is not None:
            if is_first:
                cache = self.caches[0] = self.conversation.begin(model, cache)
            else:
                self.conversation.clear()
        return cache

    def input(self, original: Callable[..., str], *prompt: Any) -> str:
        """What the user types; /exit is mlx-lm's q."""
        self.query = original(*prompt)
        return "q" if self.query.strip() == "/exit" else self.query

    def stream_generate(
        self, original: Callable[..., Any], model: Any, tokenizer: Any, prompt: Any, **options: Any
    ) -> Any:
        """mlx-lm's function, with a warning beyond the model's context, and with the conversation kept."""
        warn_beyond_context(model, cached_tokens(options["prompt_cache"]) + len(prompt), options["max_tokens"])
        original = functools.partial(_within_budget, original)
        if self.conversation is None:
            return original(model, tokenizer, prompt, **options)
        system = getattr(self.args, "system_prompt", None)
        sent = [{"role": "system", "content": system}] if system is not None else []
        sent.append({"role": "user", "content": self.query})
        return self.conversation.answer(original, model, tokenizer, prompt, sent, **options)


def _within_budget(original: Callable[..., Any], model: Any, tokenizer: Any, prompt: Any, **options: Any) -> Any:
    """mlx-lm's stream_generate, whose answer ends where a memory budget does."""
    cache, asked, n = options["prompt_cache"], options["max_tokens"], 0
    allowed = limit_to_budget(cache, len(prompt), asked, options["prefill_step_size"])
    for response in original(model, tokenizer, prompt, **options | {"max_tokens": allowed}):
        n += 1
        yield response
    say_budget_ended(cache, n, asked, allowed)


def _open_conversation(args: argparse.Namespace) -> Conversation | None:
    """The conversation of --resume. Raises CliError."""
    if args.resume is None:
        if args.store is not None:
            raise CliError("--store: goes with --resume")
        return None
    if mx.distributed.init().size() > 1:
        raise CliError("--resume: goes with one machine only")
    try:
        store = PromptStore(args.store, max_memory_bytes=0)
    except (OSError, ValueError) as e:
        raise CliError(f"--store: {describe_error(e)}") from e
    try:
        return Conversation(args.resume, store)
    except CliError:
        store.close()
        raise


def main(argv: Sequence[str]) -> int:
    """Run the chat, then report what its last cache holds; returns the exit code."""
    parser = module.setup_arg_parser()
    group = add_program_arguments(parser, "chat", module)
    group.add_argument(
        "--resume",
        metavar="NAME",
        help="keep this conversation when the chat ends, and go on with it if there is one of this name: in "
        f"{default_chats()}/NAME.json, readable by you only",
    )
    group.add_argument("--store", metavar="DIR", help=f"where the caches of --resume lie (default: {default_folder()})")
    describe_model_argument(parser)
    args = parser.parse_args(argv)
    program = ChatProgram(module, args)
    if args.model is None:
        use_demo_model(args)
    program.conversation = _open_conversation(args)
    setattr(parser, "parse_args", lambda: args)
    with (
        use_backend(args.backend) as backend,
        program.installed(),
        patched_attributes(
            module,
            setup_arg_parser=lambda: parser,
            stream_generate=functools.partial(program.stream_generate, module.stream_generate),
        ),
        patched_attributes(builtins, input=functools.partial(program.input, input)),
    ):
        try:
            with contextlib.suppress(EOFError, KeyboardInterrupt):  # other ways to leave the chat
                module.main()
        finally:
            if program.conversation is not None:
                program.conversation.close()
        if program.caches:
            print("\n" + "\n".join(report_lines(program.caches[0], program.scheme)))
        if program.config is not None:
            print(f"Backend: {backend.describe()}")
    return 0
