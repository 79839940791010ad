"""What the commands share: options, loading models, errors in one line, and what a cache held."""

import argparse
import contextlib
import functools
import importlib
import sys
import time
import warnings
from pathlib import Path

from ..backends.select import get_backend
from ..backends.sides import BackendError
from ..cache.rotating import RotatingTurboKVCache
from ..cache.single import TurboKVCache
from ..integration.prompt_cache import compress, describe, flatten_caches, make_prompt_cache, patch_mlx_lm, reports
from ..integration.prompt_cache_file import load_with
from ..integration.warming import warm
from ..quant.scheme import TurboConfig

DEMO_MODEL = Path(__file__).resolve().parents[1] / "demo_model"
DEMO_PROMPT = "Once upon a time"
DEMO_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"  # it goes on with what was said
DEFAULT_SCHEME = "auto"
FLAGS = {"scheme": "--kv", "name": "--kv", "sink": "--kv-sink", "recent": "--kv-recent"}  # of TurboConfig's fields


class CliError(Exception):
    """Wrong input: shown as one line, exit code 2."""


def print_message(message):
    print(f"mlx-turbo: {message}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def warnings_as_messages():
    """Shows warnings as lines of ours."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        print_message(f"warning: {warning.message}")


def _raise_cli_error(message):
    raise CliError(message)


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, not in thirty lines of usage."""

    def error(self, message):
        raise CliError(f"{message} (see {self.prog} --help)")


# ---- options shared by the commands that run a model -------------------------------------------------------
def add_cache_arguments(parser):
    """Add --kv-sink, --kv-recent and --backend: of every command that makes caches, beside its --kv."""
    default = TurboConfig()
    group = parser.add_argument_group("mlx-turbo")
    group.add_argument(
        "--kv-sink", type=int, metavar="N", help=f"so many first tokens stay exact (default: {default.sink})"
    )
    group.add_argument(
        "--kv-recent",
        type=int,
        metavar="N",
        help=f"at least so many of the newest tokens stay exact (default: {default.recent})",
    )
    group.add_argument(
        "--backend",
        choices=["metal", "cpu"],
        help="Metal kernels, or the same in MLX operations (default: metal where it is)",
    )
    return group


def kv_config(scheme, args):
    """The TurboConfig of a scheme's name with --kv-sink and --kv-recent; None for "none"."""
    options = {"sink": args.kv_sink, "recent": args.kv_recent}
    try:
        config = TurboConfig.of(
            DEFAULT_SCHEME if scheme == "none" else scheme, **{k: v for k, v in options.items() if v is not None}
        )
    except ValueError as e:
        name, _, rest = str(e).partition(":")
        none = "; or 'none': mlx-lm's own cache" if name == "scheme" else ""
        raise CliError(f"{FLAGS[name]}:{rest}{none}") from e
    return None if scheme == "none" else config


# ---- mlx-lm's programs with our caches ---------------------------------------------------------------------
def load_model(load, path, flag, *args, **kwargs):
    """`load` (mlx_lm.load) of a model that the user named with `flag`; raises CliError where that fails.

    The embedded model is dequantized where MLX computes on the CPU, whose bfloat16 product with 8-bit weights
    is slow (measured on 2 cores: 35 tokens/s, and 210 dequantized).
    """
    import mlx.core as mx

    adapter = kwargs.get("adapter_path")
    if adapter is not None and not Path(adapter).exists():
        raise CliError(f"--adapter-path: there is no folder {str(adapter)!r}")
    try:
        model, *rest = load(str(path), *args, **kwargs)
    except (OSError, ValueError, KeyError, RuntimeError) as e:
        raise CliError(f"{flag}: {explain_load_error(path, e)}") from e
    if Path(path).resolve() == DEMO_MODEL and mx.default_device().type == mx.DeviceType.cpu:
        model = importlib.import_module("mlx_lm.utils").dequantize_model(model)
        mx.eval(model.parameters())  # a server may generate in another thread, which cannot evaluate them
    return model, *rest


def explain_load_error(path, error):
    from huggingface_hub import errors

    if Path(path).exists():
        return f"cannot load {str(path)!r}: {describe_error(error)}"
    if isinstance(error, errors.HFValidationError):
        return f"there is no folder {str(path)!r}, and it is not a Hugging Face id (owner/name)"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{path!r} is neither a folder here nor on the Hugging Face Hub (or it is private or gated)"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return (
            f"{path!r} is neither a folder here nor in the Hugging Face cache, and the Hub cannot be "
            "reached; without --model the embedded demo model is used, which needs no network"
        )
    return f"cannot get {path!r}: {describe_error(error)}"


def describe_error(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


@contextlib.contextmanager
def patched_attributes(module, **attributes):
    before = {name: getattr(module, name) for name in attributes}
    try:
        for name, value in attributes.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


class TurboProgram:
    """One of mlx-lm's programs (the module mlx_lm.generate, ...) with our caches in the place of its own.

    args: what was parsed, with kv, kv_sink and kv_recent.
    caches: every prompt cache made or loaded so far, in order: the model's, then a draft model's.
    """

    def __init__(self, module, args):
        self.module, self.args, self.caches = module, args, []
        self.scheme = args.kv or DEFAULT_SCHEME
        self.config, self._file_config = kv_config(self.scheme, args), None
        self._n_loaded = 0

    @contextlib.contextmanager
    def installed(self):
        """Inside this context the `load`, `make_prompt_cache` and `load_prompt_cache` the module uses are ours:
        under its own names, and in mlx_lm.models.cache, where mlx-lm 0.31 looks them up."""
        cache_module = patch_mlx_lm()  # so that load_prompt_cache knows our class
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
                "does it in a way that is not known here, and nothing was compressed"
            )

    def _load(self, original, path, *args, **kwargs):
        is_draft, self._n_loaded = self._n_loaded > 0, self._n_loaded + 1
        model, *rest = load_model(original, path, "--draft-model" if is_draft else "--model", *args, **kwargs)
        self.warm(model, rest[0], is_draft)
        return model, *rest

    _sharded_load = _load

    def warm(self, model, tokenizer, is_draft):
        """Build the kernels before the first token (warming.py), and say so: a new Mac may need a while."""
        config = self._file_config or self.config
        if config is None or get_backend().name != "metal":
            return
        n_draft_tokens = 0
        if is_draft or getattr(self.args, "draft_model", None):  # a draft model rereads its last token
            n_draft_tokens = 1 if is_draft else self.args.num_draft_tokens
        print_message(f"building and checking the kernels for the {'draft ' if is_draft else ''}model ...")
        start = time.perf_counter()
        n = warm(
            model, tokenizer, config, n_draft_tokens=n_draft_tokens, max_kv_size=getattr(self.args, "max_kv_size", None)
        )
        print_message(f"{n} kernels in {time.perf_counter() - start:.1f} s")

    def _make_prompt_cache(self, original, model, max_kv_size=None):
        if self.config is None:
            cache = original(model, max_kv_size)
        else:
            with warnings_as_messages():
                cache = make_prompt_cache(model, self.config, max_kv_size)
        self.caches.append(cache)
        return cache

    def _load_prompt_cache(self, original, file, *args, **kwargs):
        try:
            result = load_with(original, file, *args, **kwargs)
        except (OSError, ValueError) as e:
            raise CliError(f"--prompt-cache-file: cannot read {file!r}: {describe_error(e)}") from e
        cache, *rest = result if isinstance(result, tuple) else (result,)
        for held in (c for c in flatten_caches(cache) if isinstance(c, TurboKVCache)):
            self._file_config = held.config  # it was made with a scheme of its own
            for name, given in (("name", self.args.kv), ("sink", self.args.kv_sink), ("recent", self.args.kv_recent)):
                if name == "sink" and isinstance(held, RotatingTurboKVCache):
                    continue  # a window keeps what it was made to keep
                made_with = getattr(held.config, name)
                if given is not None and (self.config is None or getattr(self.config, name) != made_with):
                    raise CliError(
                        f"{FLAGS[name]}: got {given}, but {file!r} was made with {made_with}; leave {FLAGS[name]} out"
                    )
        if self.config is not None:
            cache = compress(cache, self.config)
        self.caches.append(cache)
        return (cache, *rest) if rest else cache


# ---- what the caches hold ----------------------------------------------------------------------------------
def summarize(prompt_cache):
    """What the layers of a prompt cache hold together, as a dict of plain values.

    nbytes: bytes of all buffers. uncompressed_nbytes: the same tokens in the model's dtype (layers left as
    they are count as they are). tokens, sink, packed, recent: of the first compressed layer that is no window.
    packed_bits_per_value: mean over compressed layers. layers: models.describe.
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
        summary["scheme"] = next(c.config.name for c in flatten_caches(prompt_cache) if isinstance(c, TurboKVCache))
        packed = [r["packed_bits_per_value"] for r in ours if r["packed"]]
        summary["packed_bits_per_value"] = sum(packed) / len(packed) if packed else None
    return summary


def cache_nbytes(cache):
    try:
        return cache.nbytes
    except (NameError, NotImplementedError):  # mlx-lm 0.31.2 forgot an import, and not every cache of its counts
        from mlx.utils import tree_flatten

        return sum(a.nbytes for _, a in tree_flatten(cache.state) if hasattr(a, "nbytes"))


def report_lines(prompt_cache, scheme):
    """`summarize` as lines of text, for the end of a program that was asked for `scheme`."""
    s = summarize(prompt_cache)
    held, uncompressed = (f"{s[name] / 1e6:.3f} MB" for name in ("nbytes", "uncompressed_nbytes"))
    if not s["n_compressed"]:
        what = "mlx-lm's own" if scheme == "none" else f"{scheme} was asked for, but {s['layers']}"
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
        f"{s['recent']} recent exact); {s['layers']}; attention of a decode step: {s['attention']}",
        size,
    ]


# ---- generate ----------------------------------------------------------------------------------------------
def add_program_arguments(parser, command, module):
    """Make the parser of mlx-lm's program `module` that of `mlx-turbo command`; returns the group of our options."""
    parser.prog = f"mlx-turbo {command}"
    parser.description = f"{module.__name__} with a TurboQuant KV cache: all its flags, and those of mlx-turbo."
    parser.error = lambda message: _raise_cli_error(f"{message} (see {parser.prog} --help)")
    group = add_cache_arguments(parser)
    group.add_argument(
        "--kv",
        metavar="SCHEME",
        help="bits per number of the KV cache: turbo4, turbo3, turbo2, turbo8v4 (keys 8, "
        "values 4), ...; auto: turbo4, with more bits for the keys of layers that turn out to "
        f"need them; or none: mlx-lm's own cache (default: {DEFAULT_SCHEME}). A draft "
        "model's cache is compressed too, and so are the windows of --max-kv-size.",
    )
    return group


def describe_model_argument(parser):
    """Say in its help what no --model means here."""
    for action in parser._actions:
        if action.dest == "model":
            action.default, action.help = (
                None,
                ("A local folder or a Hugging Face id; without it the embedded demo model is used."),
            )


def use_demo_model(args):
    """Fill in --model, and say so."""
    print_message("no --model given: using the embedded demo model (short stories, 4096 tokens of context)")
    args.model = str(DEMO_MODEL)


def refuse_kv_bits(program):
    """Raise CliError where mlx-lm's --kv-bits came beside our --kv."""
    if getattr(program.args, "kv_bits", None) is not None and program.config is not None:
        raise CliError(
            f"--kv-bits: mlx-lm's own cache quantization does not go with --kv {program.scheme}; "
            "leave --kv-bits out, or say --kv none"
        )


def cached_tokens(prompt_cache):
    return max((c.offset for c in flatten_caches(prompt_cache) if hasattr(c, "offset")), default=0)


def warn_beyond_context(model, n_tokens, max_tokens):
    limit = getattr(getattr(model, "args", None), "max_position_embeddings", None)
    total = n_tokens + max(max_tokens, 0)
    if limit and total > limit:
        print_message(
            f"warning: prompt and answer may reach {total} tokens, the model was made for {limit}: "
            "expect nonsense beyond"
        )


# ---- the command -------------------------------------------------------------------------------------------


def _of(module):
    """The command whose main(argv) is in a module of its own, imported when it runs."""
    return lambda argv: importlib.import_module(module if module.startswith(".") else f".{module}", __package__).main(
        argv
    )
