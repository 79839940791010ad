"""`mlx-turbo generate`: mlx_lm.generate's own main() with compressed caches, then a report of what they hold."""

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence
from typing import Any

from ..backends.select import use_backend
from ..cache.single import TurboKVCache
from ..integration.memory import put_under_budget
from ..integration.prompt_cache import flatten_caches, memory_budget_of
from ..quant.scheme import TurboConfig
from .common import (
    DEMO_PROMPT,
    CliError,
    TurboProgram,
    add_program_arguments,
    cached_tokens,
    check_going_back,
    describe_model_argument,
    for_model,
    kept_prices,
    limit_to_budget,
    patched_attributes,
    refuse_kv_bits,
    refuse_prompt_cache_file,
    report_lines,
    say_budget_ended,
    use_demo_model,
    warn_beyond_context,
)


class GenerateProgram(TurboProgram):
    """Measures the prices of a budget of memory when it is known that something has to be packed."""

    unpriced: tuple[Any, Any] | None = None  # model and tokenizer, if nothing was measured

    def choose(self, model: Any, tokenizer: Any) -> TurboConfig | None:
        """As TurboProgram's; with a budget of memory, for one model, by prices that are kept only."""
        config = self.config
        if config is None or config.memory is None or self.args.draft_model is not None or self.args.kv_measure:
            return super().choose(model, tokenizer)
        if known := kept_prices(config, model, tokenizer):
            config = for_model(config, model, tokenizer, known)
        else:
            self.unpriced = model, tokenizer
        self._of_models[id(model)] = model, config
        return config

    def price(self, cache: list[Any], n_tokens: int) -> None:
        """Measure for a cache that is to take n_tokens more (-1: nobody knows how many), unless all fit as it is."""
        budget = memory_budget_of(cache)
        if self.unpriced is None or budget is None:
            return
        ours = [c for c in flatten_caches(cache) if isinstance(c, TurboKVCache)]
        if n_tokens >= 0 and budget.needs_no_step(ours, n_tokens, self.args.prefill_step_size):
            return
        (model, tokenizer), self.unpriced = self.unpriced, None
        self._of_models[id(model)] = model, for_model(self.config, model, tokenizer, measure=True)
        priced = memory_budget_of(self.new_cache(model))
        if priced is not None:
            put_under_budget(cache, priced, priced.models[0].shapes)


def _build_parser(module: Any) -> argparse.ArgumentParser:
    parser = module.setup_arg_parser()
    parser.set_defaults(prompt=None)
    add_program_arguments(parser, "generate", module)
    describe_model_argument(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    module = importlib.import_module("mlx_lm.generate")  # a plain import gives the function
    parser = _build_parser(module)
    args = parser.parse_args(argv)
    program = GenerateProgram(module, args)
    refuse_kv_bits(program)
    if args.max_tokens < -1 or args.max_tokens == 0:
        raise CliError(f"--max-tokens: got {args.max_tokens}, expected a positive number, or -1 for no limit")
    refuse_prompt_cache_file(args)
    if args.draft_model is not None and args.max_kv_size is not None:
        raise CliError("--max-kv-size: mlx-lm has no window beside --draft-model; leave one of them out")
    if demo := args.model is None and args.prompt_cache_file is None:
        use_demo_model(args)
    if args.prompt is None:
        args.prompt = DEMO_PROMPT if demo else module.DEFAULT_PROMPT
    original = module.generate

    def checked_generate(model, tokenizer, prompt, **kwargs):
        if len(prompt) == 0:
            raise CliError("--prompt: the prompt is empty")
        before = cached_tokens(kwargs.get("prompt_cache") or [])
        warn_beyond_context(model, before + len(prompt), kwargs["max_tokens"])
        draft = kwargs.get("draft_model")
        if draft is not None:
            n_most = len(prompt) + args.max_tokens if args.max_tokens > 0 else None
            for each, what in ((model, "the model"), (draft, "the draft model")):
                check_going_back(program.new_cache(each), n_most, what)
        asked, cache = kwargs["max_tokens"], kwargs.get("prompt_cache")
        if cache is None and program.config is not None and program.config.memory is not None:
            cache = kwargs["prompt_cache"] = program.own_cache(model, kwargs.pop("max_kv_size", None))
            if draft is not None:
                cache += program.own_cache(draft)
        kwargs["max_tokens"] = allowed = limit_to_budget(cache or [], len(prompt), asked, args.prefill_step_size)
        program.price(cache or [], len(prompt) + allowed if allowed >= 0 else -1)
        n_answered, stream = 0, module.stream_generate

        def counted(*args, **options):
            nonlocal n_answered
            for response in stream(*args, **options):
                n_answered = response.generation_tokens
                yield response

        with patched_attributes(module, stream_generate=counted):
            answer = original(model, tokenizer, prompt, **kwargs)
        say_budget_ended(cache or [], n_answered, asked, allowed)
        return answer

    setattr(parser, "parse_args", lambda: args)
    # its warning about a long prompt speaks of "indexing errors", which MLX does not have; ours is above
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
    with (
        use_backend(args.backend) as backend,
        program.installed(),
        patched_attributes(module, setup_arg_parser=lambda: parser, generate=checked_generate),
    ):
        module.main()
        out = sys.stdout if args.verbose else sys.stderr
        for i, cache in enumerate(program.caches):
            for line in report_lines(cache, program.scheme):
                print(f"Draft model's {line}" if i else line, file=out)
        if program.unpriced is not None:
            print(
                "Prices: not measured, as prompt and answer fit in the budget without packing anything further",
                file=out,
            )
        if program.config is not None:
            print(f"Backend: {backend.describe()}", file=out)
    return 0
