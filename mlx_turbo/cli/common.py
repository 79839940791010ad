"""What the commands share: options, loading models, mlx-lm's programs with our caches, and what a cache holds."""

import argparse
import contextlib
import functools
import importlib
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

from ..backends.select import BACKENDS, GPUS, get_backend
from ..backends.sides import BackendError
from ..cache.repacking import floor_for, reachable_pairs
from ..cache.rotating import RotatingTurboKVCache
from ..cache.single import TurboKVCache
from ..integration.bit_budget import Prices, calibration_tokens, spend, without_budget
from ..integration.memory import put_under_budget
from ..integration.prompt_cache import (
    compress,
    configs_of,
    describe,
    flatten_caches,
    is_window,
    make_prompt_cache,
    memory_budget_of,
    patch_mlx_lm,
    reports,
)
from ..integration.prompt_cache_file import load_with
from ..integration.warming import warm
from ..quant.scheme import FLOOR, MEMORY, Scheme, TurboConfig
from ..quant.sizes import size_name
from .kept_prices import KeptPrices, PriceFile, may_keep, prices_folder

DEMO_MODEL = Path(__file__).resolve().parents[1] / "demo_model"
DEMO_PROMPT = "Once upon a time"
DEMO_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"  # the model continues what was said
DEFAULT_SCHEME = "auto"
# field of TurboConfig -> flag
FLAGS = {
    "scheme": "--kv",
    "name": "--kv",
    "memory": "--kv",
    "floor": "--kv-floor",
    "sink": "--kv-sink",
    "recent": "--kv-recent",
}


class CliError(Exception):
    """Wrong input: shown as one line, exit code 2."""


def print_message(message: str) -> None:
    """Print a line on stderr, starting with "mlx-turbo: "."""
    print(f"mlx-turbo: {message}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def warnings_as_messages() -> Iterator[None]:
    """Print warnings with `print_message` once the context ends."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        print_message(f"warning: {warning.message}")


def _raise_cli_error(message: str) -> NoReturn:
    raise CliError(message)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, instead of thirty lines of usage."""

    def error(self, message: str) -> NoReturn:
        raise CliError(f"{message} (see {self.prog} --help)")


# ---- options shared by the commands that run a model -------------------------------------------------------
def add_cache_arguments(parser: argparse.ArgumentParser) -> Any:
    """Add --kv-sink, --kv-recent and --backend, which every command that makes caches has next to its --kv. Returns
    their argument group."""
    default = TurboConfig()
    group = parser.add_argument_group("mlx-turbo")
    group.add_argument(
        "--kv-sink", type=int, metavar="N", help=f"number of leading tokens kept exact (default: {default.sink})"
    )
    group.add_argument(
        "--kv-recent",
        type=int,
        metavar="N",
        help=f"minimum number of newest tokens kept exact (default: {default.recent})",
    )
    group.add_argument(
        "--kv-floor",
        metavar="SCHEME",
        help=f"of a budget of memory: the scheme below which nothing is packed (default: {FLOOR.name})",
    )
    group.add_argument(
        "--kv-measure",
        action="store_true",
        help="of a budget: measure again what packing costs this model, though an earlier command has (in "
        f"{prices_folder()})",
    )
    group.add_argument(
        "--backend",
        choices=BACKENDS,
        help="kernels on the GPU, or the same computation in MLX operations (default: the GPU's if there is one)",
    )
    return group


def kv_config(scheme: str, args: argparse.Namespace) -> TurboConfig | None:
    """The TurboConfig of a scheme's name with --kv-sink and --kv-recent; None for "none". Raises CliError."""
    options = {"sink": args.kv_sink, "recent": args.kv_recent}
    named = [args.kv] if isinstance(args.kv, str) else args.kv or ()
    if scheme.startswith(MEMORY) or not any(name.startswith(MEMORY) for name in named):
        options["floor"] = getattr(args, "kv_floor", None)
    try:
        config = TurboConfig.of(
            DEFAULT_SCHEME if scheme == "none" else scheme, **{k: v for k, v in options.items() if v is not None}
        )
    except ValueError as e:
        name, _, rest = str(e).partition(":")
        if name == "scheme" and getattr(args, "kv_memory", None) and scheme == MEMORY + args.kv_memory:
            raise CliError(f"--kv-memory:{rest}") from e
        none = "; or 'none' for mlx-lm's own cache" if name == "scheme" else ""
        raise CliError(f"{FLAGS[name]}:{rest}{none}") from e
    return None if scheme == "none" else config


AnyPrices = dict[TurboConfig, KeptPrices]  # of one model, by configuration without its budget


def has_budget(config: TurboConfig | None) -> TypeGuard[TurboConfig]:
    """Whether a configuration needs prices: `auto:BITS`, `memory:SIZE`."""
    return config is not None and (config.budget is not None or config.memory is not None)


def kept_prices(config: TurboConfig | None, model: Any, tokenizer: Any) -> AnyPrices:
    """The prices that an earlier command measured for a budget, if there are any. Says so if a file cannot be used."""
    if not has_budget(config) or not may_keep():
        return {}
    file = PriceFile(model, calibration_tokens(tokenizer), without_budget(config))
    try:
        found = file.read()
    except (OSError, ValueError) as e:
        print_message(f"{file.path} cannot be used, and is measured again: {describe_error(e)}")
        return {}
    return {} if found is None else {without_budget(config): found}


def for_model(
    config: TurboConfig | None, model: Any, tokenizer: Any, known: AnyPrices | None = None, measure: bool = False
) -> TurboConfig | None:
    """A configuration for a model: a budget is spent, or one of memory gets its prices, by a text of this package. They
    are measured, which is said and takes a while, unless they are known or kept in a file. Raises CliError for a budget
    that this model cannot keep.

    known: prices of the same model; what is found or measured is added. measure: rather than read a file.
    """
    if not has_budget(config):
        return config
    known, but_for_its_size = {} if known is None else known, without_budget(config)
    if but_for_its_size not in known and not measure:
        known |= kept_prices(config, model, tokenizer)
    doing, done = ("choosing the bits", "chosen") if config.memory is None else ("measuring the price", "measured")
    try:
        prices: Any = known.get(but_for_its_size)
        if prices is not None:
            chosen, by = spend(config, prices), "chosen by prices measured" if config.memory is None else "measured"
            print_message(
                f"{config.name}: {by} by {prices.backend} on {prices.date}, in {prices.seconds:.1f} s (--kv-measure: "
                "measure again)"
            )
            return chosen
        print_message(f"{config.name}: {doing} of each layer's keys and values ...")
        start, tokens = time.perf_counter(), calibration_tokens(tokenizer)
        measured = Prices(model, tokens, config)
        chosen = spend(config, measured)
    except ValueError as e:
        raise CliError(f"--kv: {str(e).removeprefix('config: ')}") from e
    known[but_for_its_size] = prices = KeptPrices.of(measured, time.perf_counter() - start)
    print_message(f"{config.name}: {done} now in {prices.seconds:.1f} s by {prices.backend}")
    if may_keep():
        file = PriceFile(model, tokens, but_for_its_size)
        try:
            file.write(prices)
        except (OSError, ValueError) as e:
            print_message(f"the prices are not kept: {describe_error(e)}")
    return chosen


# ---- mlx-lm's programs with our caches ---------------------------------------------------------------------
def load_model(load: Callable[..., Any], path: str | Path, flag: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """Call `load` (mlx_lm.load) for a model that the user named with `flag`. Raises CliError if that fails.

    The embedded model is dequantized if MLX computes on the CPU, whose bfloat16 product with 8-bit weights is slow
    (measured on 2 cores: 35 tokens/s, and 210 dequantized).
    """
    import mlx.core as mx

    adapter = kwargs.get("adapter_path")
    if adapter is not None and not Path(adapter).exists():
        raise CliError(f"--adapter-path: the folder {str(adapter)!r} does not exist")
    try:
        model, *rest = load(str(path), *args, **kwargs)
    except (OSError, ValueError, KeyError, RuntimeError) as e:
        raise CliError(f"{flag}: {explain_load_error(path, e)}") from e
    if Path(path).resolve() == DEMO_MODEL and mx.default_device().type == mx.DeviceType.cpu:
        model = importlib.import_module("mlx_lm.utils").dequantize_model(model)
        mx.eval(model.parameters())  # here: a server generates in another thread, which cannot evaluate them
    return model, *rest


def explain_load_error(path: str | Path, error: Exception) -> str:
    """Why a model could not be loaded, in words that a user can act on."""
    from huggingface_hub import errors

    if Path(path).exists():
        return f"cannot load {str(path)!r}: {describe_error(error)}"
    if isinstance(error, errors.HFValidationError):
        return f"{str(path)!r} is neither an existing folder nor a Hugging Face id (owner/name)"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{path!r} is neither a local folder nor a model on the Hugging Face Hub (or it is private or gated)"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return (
            f"{path!r} is neither a local folder nor in the Hugging Face cache, and the Hub cannot be "
            "reached; leave --model out to use the embedded demo model, which needs no network"
        )
    return f"cannot download {path!r}: {describe_error(error)}"


def describe_error(error: BaseException) -> str:
    """An exception's type and message in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


@contextlib.contextmanager
def patched_attributes(module: Any, **attributes: Any) -> Iterator[None]:
    """Replace attributes of a module inside this context."""
    before = {name: getattr(module, name) for name in attributes}
    try:
        for name, value in attributes.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


class TurboProgram:
    """One of mlx-lm's programs (the module mlx_lm.generate, ...) with our caches instead of its own.

    args: the parsed arguments, with kv, kv_sink and kv_recent.
    caches: every prompt cache made or loaded so far, in order: the model's, then a draft model's.
    """

    def __init__(self, module: Any, args: argparse.Namespace) -> None:
        self.module, self.args = module, args
        self.caches: list[list[Any]] = []
        if args.kv_memory is not None:
            if args.kv is not None:
                raise CliError("--kv-memory: the same as --kv memory:SIZE; leave one of them out")
            args.kv = MEMORY + args.kv_memory
        self.scheme: str = args.kv or DEFAULT_SCHEME
        self.config = kv_config(self.scheme, args)
        self._file_configs: list[TurboConfig] = []  # with which the caches of a file were made
        self._of_models: dict[int, tuple[Any, TurboConfig | None]] = {}  # by id: a model, and its configuration
        self._not_checked: list[tuple[list[Any], str]] = []  # caches of files that came before their model
        self._n_loaded = 0
        self._draft: Any = None  # a draft model, whose caches are under the budget of the model's

    @contextlib.contextmanager
    def installed(self) -> "Iterator[TurboProgram]":
        """Inside this context the module uses our `load`, `make_prompt_cache` and `load_prompt_cache`: under its own
        names, and in mlx_lm.models.cache, where mlx-lm 0.31 looks them up. Raises BackendError at the end if no cache
        was made through us."""
        cache_module = patch_mlx_lm()  # so that load_prompt_cache knows our classes
        self._make_plain_cache = cache_module.make_prompt_cache
        with contextlib.ExitStack() as stack:
            for module in (self.module, cache_module):
                names = [
                    n for n in ("load", "sharded_load", "make_prompt_cache", "load_prompt_cache") if hasattr(module, n)
                ]
                ours = {n: functools.partial(getattr(self, f"_{n}"), getattr(module, n)) for n in names}
                stack.enter_context(patched_attributes(module, **ours))
            yield self
        if not self.caches:
            raise BackendError(
                f"{self.module.__name__} made no KV cache through mlx_turbo: this version of mlx-lm "
                "makes caches in a way that mlx_turbo does not know, and nothing was compressed"
            )

    def _load(self, original: Callable[..., Any], path: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        is_draft, self._n_loaded = self._n_loaded > 0, self._n_loaded + 1
        model, *rest = load_model(original, path, "--draft-model" if is_draft else "--model", *args, **kwargs)
        config = self.choose(model, rest[0])
        if is_draft:
            self._draft = model
        while self._not_checked and config is not None:
            self._fit(*self._not_checked.pop(), config)
        self.warm(model, rest[0], is_draft)
        return model, *rest

    _sharded_load = _load

    def choose(self, model: Any, tokenizer: Any) -> TurboConfig | None:
        """The configuration of a model that was just loaded. Raises CliError for a budget that it cannot keep."""
        config = for_model(self.config, model, tokenizer, measure=getattr(self.args, "kv_measure", False))
        self._of_models[id(model)] = model, config
        return config

    def config_of(self, model: Any) -> TurboConfig | None:
        """The configuration of a model; None for mlx-lm's own caches."""
        return self._of_models.get(id(model), (model, self.config))[1]

    def warm(self, model: Any, tokenizer: Any, is_draft: bool) -> None:
        """Build the kernels before the first token (warming.py), and say so: on a new Mac it takes a while."""
        config = self.config_of(model)
        configs = [*self._file_configs]
        if config is not None and config.memory is not None:  # under which a file goes on, from what it holds
            floors = {floor_for(config.floor, own.scheme) for own in configs} or {config.floor}
            known = {Scheme(*pair) for floor in floors for pair in reachable_pairs(floor)}
            configs = [own for own in configs if own.auto or own.scheme not in known]
            configs += [replace(config, floor=floor) for floor in floors]
        elif config is not None and not configs:
            configs = [config]
        if not configs or get_backend().name not in GPUS:
            return
        n_draft_tokens = 0
        if is_draft or getattr(self.args, "draft_model", None):  # a draft model rereads its last token
            n_draft_tokens = 1 if is_draft else self.args.num_draft_tokens
        print_message(f"building and checking the kernels for the {'draft ' if is_draft else ''}model ...")
        start = time.perf_counter()
        max_kv_size, n = getattr(self.args, "max_kv_size", None), 0
        for own in configs:
            n += warm(model, tokenizer, own, n_draft_tokens=n_draft_tokens, max_kv_size=max_kv_size)
        print_message(f"{n} kernels in {time.perf_counter() - start:.1f} s")

    def new_cache(self, model: Any) -> list[Any]:
        """A prompt cache as this program makes it, to look at."""
        if (config := self.config_of(model)) is None:
            return self._make_plain_cache(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said where one is made to be used
            return make_prompt_cache(model, config)

    def own_cache(self, model: Any, max_kv_size: int | None = None) -> list[Any]:
        """A prompt cache to be used."""
        return self._make_prompt_cache(self._make_plain_cache, model, max_kv_size)

    def _make_prompt_cache(self, original: Callable[..., Any], model: Any, max_kv_size: int | None = None) -> list[Any]:
        if (config := self.config_of(model)) is None:
            cache = original(model, max_kv_size)
        else:
            with warnings_as_messages():
                budget = memory_budget_of(self.caches[0]) if model is self._draft and self.caches else None
                cache = make_prompt_cache(model, config, max_kv_size, budget)
        self.caches.append(cache)
        return cache

    def _load_prompt_cache(self, original: Callable[..., Any], file: str, *args: Any, **kwargs: Any) -> Any:
        try:
            result = load_with(original, file, *args, **kwargs)
        except (OSError, ValueError) as e:
            raise CliError(f"--prompt-cache-file: cannot read {file!r}: {describe_error(e)}") from e
        cache, *rest = result if isinstance(result, tuple) else (result,)
        for metadata in rest:  # what mlx_lm.generate reads there, and only mlx_lm.cache_prompt and the like write
            metadata.setdefault("tokenizer_config", "{}")
            if metadata.setdefault("model", getattr(self.args, "model", None)) is None:
                raise CliError(f"--prompt-cache-file: {file!r} does not say which model it is of; pass --model")
        for saved in (c for c in flatten_caches(cache) if isinstance(c, TurboKVCache)):
            if saved.config not in self._file_configs:
                self._file_configs.append(saved.config)
        budgets = (None, None) if self.config is None else (self.config.budget, self.config.memory)
        if budgets != (None, None):  # it is spent, or priced, once the model is there
            self._not_checked.append((cache, file))
        else:
            self._fit(cache, file, self.config)
        self.caches.append(cache)
        return (cache, *rest) if rest else cache

    def _fit(self, cache: list[Any], file: str, config: TurboConfig | None) -> None:
        """Compress what a file holds uncompressed. Raises CliError if a flag contradicts what it holds."""
        config_of = None if config is None else configs_of(cache, config)
        for i, layer in enumerate(cache):
            for saved in flatten_caches([layer]):
                if isinstance(saved, TurboKVCache):
                    self._check_flags(saved, file, config_of and config_of(i, saved))
        if config is not None:
            cache[:] = compress(cache, config)
        if config is not None and config.memory is not None:
            new = self.new_cache(next(model for model, own in self._of_models.values() if own == config))
            budget = memory_budget_of(new)
            if budget is not None:
                put_under_budget(cache, budget, budget.models[0].shapes)

    def _check_flags(self, saved: TurboKVCache, file: str, config: TurboConfig | None) -> None:
        """Raise CliError if a flag contradicts what a cache in a file was made with. config: of its layer. A budget of
        memory goes on from any scheme."""
        for name, given in (("name", self.args.kv), ("sink", self.args.kv_sink), ("recent", self.args.kv_recent)):
            if name == "sink" and isinstance(saved, RotatingTurboKVCache):
                continue  # a window keeps the leading tokens that it was made to keep
            if name == "name" and self.scheme.startswith(MEMORY):
                continue
            made_with = getattr(saved.config, name)
            if given is not None and (config is None or getattr(config, name) != made_with):
                wanted = f" ({config.name} in a layer)" if config is not None and config is not self.config else ""
                raise CliError(
                    f"{FLAGS[name]}: got {given}{wanted * (name == 'name')}, but {file!r} was made with {made_with}; "
                    f"leave {FLAGS[name]} out"
                )


# ---- what the caches hold ----------------------------------------------------------------------------------
def summarize(prompt_cache: list[Any]) -> dict[str, Any]:
    """What all layers of a prompt cache hold, as a dict of plain values.

    nbytes: bytes of all buffers. uncompressed_nbytes: bytes of the same tokens in the model's dtype (a layer
    that is not compressed counts as it is). tokens, sink, packed, recent: of the first compressed layer without a
    sliding window. packed_bits_per_value: mean over compressed layers. layers: the text of `describe`.
    """
    layers = reports(prompt_cache)
    ours = [report for _, _, report, _ in layers if report]
    held = sum(cache_nbytes(cache) for _, cache, _, _ in layers)
    kept = held - sum(report["nbytes"] for report in ours)
    summary = {
        "nbytes": held,
        "uncompressed_nbytes": kept + sum(r["uncompressed_nbytes"] for r in ours),
        "n_compressed": len(ours),
        "layers": describe(prompt_cache),
    }
    if ours:
        first = next((report for report in ours if "window" not in report), ours[0])
        summary |= {name: first[name] for name in ("tokens", "sink", "packed", "recent", "attention")}
        of_ours = [c for c in flatten_caches(prompt_cache) if isinstance(c, TurboKVCache)]
        names = {c.config.name for c in [c for c in of_ours if not is_window(c)] or of_ours}
        summary["scheme"] = names.pop() if len(names) == 1 else "a scheme for each layer"
        if (budget := memory_budget_of(prompt_cache)) is not None:
            summary["scheme"], summary["memory"] = MEMORY + size_name(budget.limit), budget.report()
        packed = [r["packed_bits_per_value"] for r in ours if r["packed"]]
        summary["packed_bits_per_value"] = sum(packed) / len(packed) if packed else None
    return summary


def cache_nbytes(cache: Any) -> int:
    """Bytes of a cache's arrays, also for caches of mlx-lm that do not count them."""
    try:
        return cache.nbytes
    except (NameError, NotImplementedError):  # mlx-lm 0.31.2 lacks an import, and not all of its caches have nbytes
        return tree_nbytes(cache.state)


def tree_nbytes(tree: Any) -> int:
    """Bytes of all arrays in a tree of lists, tuples and dicts."""
    from mlx.utils import tree_flatten

    return sum(a.nbytes for a in dict(tree_flatten(tree)).values() if hasattr(a, "nbytes"))


def report_lines(prompt_cache: list[Any], scheme: str) -> list[str]:
    """`summarize` as lines of text, for the end of a program called with --kv `scheme`."""
    s = summarize(prompt_cache)
    held, uncompressed = f"{s['nbytes'] / 1e6:.3f} MB", f"{s['uncompressed_nbytes'] / 1e6:.3f} MB"
    if not s["n_compressed"]:
        what = "mlx-lm's own" if scheme == "none" else f"{scheme} requested, but {s['layers']}"
        return [f"KV cache: {what}", f"KV cache bytes: {held} held"]
    packed = f"{s['packed']} packed"
    if s["packed"]:
        packed += f" at {s['packed_bits_per_value']:.3f} bits per value"
    ratio = s["uncompressed_nbytes"] / s["nbytes"] if s["nbytes"] else 1.0
    size = f"KV cache bytes: {held} held, {uncompressed} uncompressed, ratio {ratio:.2f}"
    if not s["packed"]:
        starts = next(c.packs_beyond for c in flatten_caches(prompt_cache) if isinstance(c, TurboKVCache))
        size += f" (packing starts beyond {starts} tokens)"
    return [
        f"KV cache: {s['scheme']}, {s['tokens']} tokens ({s['sink']} sink exact, {packed}, "
        f"{s['recent']} recent exact); {s['layers']}; attention in a decode step: {s['attention']}",
        size,
    ]


# ---- what mlx-lm's programs take ---------------------------------------------------------------------------
def add_program_arguments(parser: argparse.ArgumentParser, command: str, module: Any) -> Any:
    """Turn the parser of mlx-lm's program `module` into that of `mlx-turbo command`. Returns our argument group."""
    parser.prog = f"mlx-turbo {command}"
    parser.description = (
        f"{module.__name__} with a TurboQuant KV cache: takes all of its flags, plus those of mlx-turbo."
    )
    error = lambda message: _raise_cli_error(f"{message} (see {parser.prog} --help)")  # noqa: E731
    setattr(parser, "error", error)
    group = add_cache_arguments(parser)
    group.add_argument(
        "--kv",
        metavar="SCHEME",
        help="scheme of the KV cache, named after its bits per number: turbo4, turbo3, turbo2, turbo8v4 (8 for keys, "
        "4 for values), ...; auto: turbo4, with more bits for the keys of layers that turn out to need them; "
        "auto:BITS: BITS per number on average, scales included, spent where the model needs them (auto:4.5); "
        "memory:SIZE: exact as long as it fits in SIZE, then packed step by step (memory:6GB, or memory:auto: what "
        f"this machine has beside the model); none: mlx-lm's own cache (default: {DEFAULT_SCHEME}). A draft model's "
        "cache and the window of --max-kv-size are compressed too.",
    )
    group.add_argument("--kv-memory", metavar="SIZE", help="the same as --kv memory:SIZE")
    return group


def describe_model_argument(parser: argparse.ArgumentParser) -> None:
    """Make no --model mean the embedded demo model, and say so in its help."""
    for action in parser._actions:
        if action.dest == "model":
            action.default, action.help = (
                None,
                "a local folder or a Hugging Face id (default: the embedded demo model)",
            )


def use_demo_model(args: argparse.Namespace) -> None:
    """Fill in --model, and say so."""
    print_message("no --model given: using the embedded demo model (short stories, context of 4096 tokens)")
    args.model = str(DEMO_MODEL)


def limit_to_budget(prompt_cache: Any, n_prompt: int, max_tokens: int, chunk: int) -> int:
    """max_tokens, or fewer: as many as a budget of memory holds behind a prompt of n_prompt tokens, which is read in
    chunks of at most `chunk`. prompt_cache: with the caches of a draft model, if there is one. max_tokens: -1 is no
    limit. Raises CliError if it does not hold the prompt."""
    budget = memory_budget_of(prompt_cache)
    if budget is None:
        return max_tokens
    ours = [c for c in flatten_caches(prompt_cache) if isinstance(c, TurboKVCache)]
    fit = budget.tokens_that_fit(ours, chunk=chunk)
    if fit is None:
        return max_tokens
    if fit <= n_prompt:
        raise CliError(
            f"--kv: the prompt has {n_prompt:,} tokens, but a cache of {size_name(budget.limit)} holds {fit:,} more at "
            f"{budget.floor.name}, the floor, and needs one for the answer; allow more memory, or a lower --kv-floor"
        )
    return min(max_tokens, fit - n_prompt) if max_tokens >= 0 else fit - n_prompt


def say_budget_ended(prompt_cache: Any, n_answered: int, asked: int, allowed: int) -> None:
    """Print a message if an answer of n_answered tokens ended where its memory budget did: of `asked` (-1: any number)
    `allowed` fitted."""
    if allowed != asked and n_answered >= allowed and (budget := memory_budget_of(prompt_cache)) is not None:
        print_message(
            f"the answer ends after {n_answered:,} tokens: a cache of {size_name(budget.limit)} holds no more at "
            f"{budget.floor.name}, the floor"
        )


def refuse_kv_bits(program: TurboProgram) -> None:
    """Raise CliError if mlx-lm's --kv-bits was given and our --kv is not none."""
    if getattr(program.args, "kv_bits", None) is not None and program.config is not None:
        raise CliError(
            f"--kv-bits: mlx-lm's own cache quantization cannot be combined with --kv {program.scheme}; "
            "leave --kv-bits out, or pass --kv none"
        )


def refuse_prompt_cache_file(args: argparse.Namespace) -> None:
    """Raise CliError for --prompt-cache-file beside --draft-model."""
    if args.draft_model is not None and args.prompt_cache_file is not None:
        raise CliError(
            "--prompt-cache-file: a file holds the caches of one model, and --draft-model needs its tokens too; "
            "leave one of them out"
        )


def check_going_back(prompt_cache: list[Any], n_most: int | None, what: str) -> None:
    """Raise CliError unless caches, as they were made, can give back the tokens of a rejected draft.

    n_most: the most tokens they may hold; None: no limit. what: the model, in words.
    """
    caches = flatten_caches(prompt_cache)
    kinds = sorted({type(c).__name__ for c in caches if not getattr(c, "is_trimmable", bool)()})
    if kinds:
        raise CliError(
            f"--draft-model: {what} has {' and '.join(kinds)}s, which cannot go back to an earlier token, as they must "
            "after a rejected draft; leave --draft-model out"
        )
    window = min((c.max_size for c in caches if hasattr(c, "max_size")), default=None)
    if window is not None and (n_most is None or n_most >= window):
        most = "any number of tokens" if n_most is None else f"{n_most} tokens"
        raise CliError(
            f"--draft-model: {what} has a window of {window} tokens, which cannot go back once it is full, and may "
            f"hold {most}; leave --draft-model out, or set a lower limit"
        )


def trim_to_common(prompt_cache: Sequence[Any], n_tokens: int) -> int | None:
    """Trim caches to the tokens that all of them hold, at most n_tokens, and return how many; None if one cannot be
    trimmed."""
    caches = flatten_caches(prompt_cache)
    offsets = [getattr(c, "offset", None) or n_tokens for c in caches]  # 0: a layer that is not used
    n = min([n_tokens, *offsets])
    for cache, offset in zip(caches, offsets):
        if offset > n:
            if not cache.is_trimmable():
                return None
            cache.trim(offset - n)
    return n


def cached_tokens(prompt_cache: list[Any]) -> int:
    """The number of tokens that a prompt cache has seen."""
    return max((c.offset for c in flatten_caches(prompt_cache) if hasattr(c, "offset")), default=0)


def warn_beyond_context(model: Any, n_tokens: int, max_tokens: int) -> None:
    """Print a warning if n_tokens of prompt and max_tokens of answer exceed the model's context."""
    limit = getattr(getattr(model, "args", None), "max_position_embeddings", None)
    total = n_tokens + max(max_tokens, 0)
    if limit and total > limit:
        print_message(
            f"warning: prompt and answer may reach {total} tokens, but the model was made for {limit}: "
            "expect nonsense beyond that"
        )
