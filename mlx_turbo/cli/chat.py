"""`mlx-turbo chat`: mlx_lm.chat's own main() with compressed caches."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import mlx_lm.chat as module

from ..backends.select import use_backend
from .common import (
    DEMO_MODEL,
    DEMO_TEMPLATE,
    TurboProgram,
    add_program_arguments,
    cached_tokens,
    describe_model_argument,
    patched_attributes,
    report_lines,
    use_demo_model,
    warn_beyond_context,
)


class ChatProgram(TurboProgram):
    """Keeps the newest cache only: "r" starts over, and the old cache's memory must be freed."""

    def _load(self, original: Callable[..., Any], path: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        if path == str(DEMO_MODEL):
            kwargs["tokenizer_config"] = {**kwargs.get("tokenizer_config", {}), "chat_template": DEMO_TEMPLATE}
        return super()._load(original, path, *args, **kwargs)

    def _make_prompt_cache(self, original: Callable[..., Any], model: Any, max_kv_size: int | None = None) -> list[Any]:
        self.caches.clear()
        return super()._make_prompt_cache(original, model, max_kv_size)


def main(argv: Sequence[str]) -> int:
    """Run the chat, then report what its last cache holds; returns the exit code."""
    parser = module.setup_arg_parser()
    add_program_arguments(parser, "chat", module)
    describe_model_argument(parser)
    args = parser.parse_args(argv)
    program = ChatProgram(module, args)
    if args.model is None:
        use_demo_model(args)
    original = module.stream_generate

    def checked_stream_generate(model, tokenizer, prompt, **kwargs):
        before = cached_tokens(kwargs["prompt_cache"])
        warn_beyond_context(model, before + len(prompt), kwargs["max_tokens"])
        return original(model, tokenizer, prompt, **kwargs)

    setattr(parser, "parse_args", lambda: args)
    with (
        use_backend(args.backend) as backend,
        program.installed(),
        patched_attributes(module, setup_arg_parser=lambda: parser, stream_generate=checked_stream_generate),
    ):
        with contextlib.suppress(EOFError, KeyboardInterrupt):  # other ways to leave the chat
            module.main()
        if program.caches:
            print("\n" + "\n".join(report_lines(program.caches[0], program.scheme)))
        if program.config is not None:
            print(f"Backend: {backend.describe()}")
    return 0
