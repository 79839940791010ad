"""The command `mlx-turbo`. Exit codes: 0 done, 1 something is broken (a kernel, a check), 2 wrong input.

`python -X dev -m mlx_turbo ...` shows tracebacks instead of one-line errors.
"""
import argparse
import contextlib
import functools
import importlib
import json
import logging
import sys
import warnings
from pathlib import Path

from . import BackendError, TurboConfig, TurboKVCache, __version__, models
from . import describe, get_backend, make_prompt_cache, use_backend

DEMO_MODEL = Path(__file__).resolve().with_name("demo_model")
DEMO_PROMPT = "Once upon a time"
DEFAULT_SCHEME = "auto"
FLAGS = {"scheme": "--kv", "name": "--kv", "sink": "--kv-sink", "recent": "--kv-recent"}  # of TurboConfig's fields


class CliError(Exception):
    """Wrong input: shown as one line, exit code 2."""


def _complain(message):
    print(f"mlx-turbo: {message}", file=sys.stderr, flush=True)


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
    group.add_argument("--kv-sink", type=int, metavar="N",
                       help=f"so many first tokens stay exact (default: {default.sink})")
    group.add_argument("--kv-recent", type=int, metavar="N",
                       help=f"at least so many of the newest tokens stay exact (default: {default.recent})")
    group.add_argument("--backend", choices=["metal", "cpu"],
                       help="Metal kernels, or the same in MLX operations (default: metal where it is)")
    return group


def kv_config(scheme, args):
    """The TurboConfig of a scheme's name with --kv-sink and --kv-recent; None for "none"."""
    options = {"sink": args.kv_sink, "recent": args.kv_recent}
    try:
        config = TurboConfig.of(DEFAULT_SCHEME if scheme == "none" else scheme,
                                **{k: v for k, v in options.items() if v is not None})
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

    try:
        model, *rest = load(str(path), *args, **kwargs)
    except (OSError, ValueError, KeyError, RuntimeError) as e:
        raise CliError(f"{flag}: {_why_not_loaded(path, e)}") from e
    if Path(path).resolve() == DEMO_MODEL and mx.default_device().type == mx.DeviceType.cpu:
        model = importlib.import_module("mlx_lm.utils").dequantize_model(model)
    return model, *rest


def _why_not_loaded(path, error):
    from huggingface_hub import errors

    if Path(path).exists():
        return f"cannot load {str(path)!r}: {_one_line(error)}"
    if isinstance(error, errors.HFValidationError):
        return f"there is no folder {str(path)!r}, and it is not a Hugging Face id (owner/name)"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{path!r} is neither a folder here nor on the Hugging Face Hub (or it is private or gated)"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return (f"{path!r} is neither a folder here nor in the Hugging Face cache, and the Hub cannot be "
                "reached; without --model the embedded demo model is used, which needs no network")
    return f"cannot get {path!r}: {_one_line(error)}"


def _one_line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


@contextlib.contextmanager
def _replaced(module, **attributes):
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
        self.config = kv_config(self.scheme, args)
        self._n_loaded = 0

    @contextlib.contextmanager
    def installed(self):
        """Inside this context the `load`, `make_prompt_cache` and `load_prompt_cache` the module uses are ours:
        under its own names, and in mlx_lm.models.cache, where mlx-lm 0.31 looks them up."""
        cache_module = models.register()  # so that load_prompt_cache knows our class
        with contextlib.ExitStack() as stack:
            for module in (self.module, cache_module):
                names = [n for n in ("load", "make_prompt_cache", "load_prompt_cache") if hasattr(module, n)]
                ours = {n: functools.partial(getattr(self, f"_{n}"), getattr(module, n)) for n in names}
                stack.enter_context(_replaced(module, **ours))
            yield self
        if not self.caches:
            raise BackendError(f"{self.module.__name__} made no KV cache through mlx_turbo: this version of mlx-lm "
                               "does it in a way that is not known here, and nothing was compressed")

    def _load(self, original, path, *args, **kwargs):
        flag = "--draft-model" if self._n_loaded else "--model"
        self._n_loaded += 1
        return load_model(original, path, flag, *args, **kwargs)

    def _make_prompt_cache(self, original, model, max_kv_size=None):
        if self.config is None:
            cache = original(model, max_kv_size)
        else:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                cache = make_prompt_cache(model, self.config, max_kv_size)
            for warning in caught:
                _complain(f"warning: {warning.message}")
        self.caches.append(cache)
        return cache

    def _load_prompt_cache(self, original, file, *args, **kwargs):
        try:
            result = original(file, *args, **kwargs)
        except (OSError, ValueError, KeyError, RuntimeError) as e:
            raise CliError(f"--prompt-cache-file: cannot read {file!r}: {_one_line(e)}") from e
        cache, *rest = result if isinstance(result, tuple) else (result,)
        for held in (c.config for c in cache if isinstance(c, TurboKVCache)):
            for name, given in (("name", self.args.kv), ("sink", self.args.kv_sink), ("recent", self.args.kv_recent)):
                made_with = getattr(held, name)
                if given is not None and (self.config is None or getattr(self.config, name) != made_with):
                    raise CliError(f"{FLAGS[name]}: got {given}, but {file!r} was made with {made_with}; "
                                   f"leave {FLAGS[name]} out")
        if self.config is not None:
            cache = compress_prompt_cache(cache, self.config)
        self.caches.append(cache)
        return (cache, *rest) if rest else cache


def compress_prompt_cache(prompt_cache, config):
    """A prompt cache with the tokens of another, its plain KV caches compressed."""
    from mlx_lm.models.cache import KVCache

    out = []
    for i, cache in enumerate(prompt_cache):
        if type(cache) is KVCache and not cache.empty():
            keys, values = (a[:, :, :cache.offset] for a in (cache.keys, cache.values))
            cache = TurboKVCache(config.for_layer(i, len(prompt_cache)))
            cache.update_and_fetch(keys, values)
        out.append(cache)
    return out


# ---- what the caches hold ----------------------------------------------------------------------------------
def summarize(prompt_cache):
    """What the layers of a prompt cache hold together, as a dict of plain values.

    nbytes: bytes of all buffers. uncompressed_nbytes: the same tokens in the model's dtype (layers left as
    they are count as they are). tokens, sink, packed, recent: of the first compressed layer.
    packed_bits_per_value: mean over compressed layers. layers: models.describe.
    """
    layers = models.reports(prompt_cache)
    ours = [report for _, _, report in layers if report]
    held = sum(_nbytes(cache) for _, cache, _ in layers)
    kept = held - sum(report["nbytes"] for report in ours)
    summary = {"nbytes": held, "uncompressed_nbytes": kept + sum(r["uncompressed_nbytes"] for r in ours),
               "n_compressed": len(ours), "layers": describe(prompt_cache)}
    if ours:
        summary |= {name: ours[0][name] for name in ("tokens", "sink", "packed", "recent", "attention")}
        summary["scheme"] = next(c.config.name for c in prompt_cache if isinstance(c, TurboKVCache))
        packed = [r["packed_bits_per_value"] for r in ours if r["packed"]]
        summary["packed_bits_per_value"] = sum(packed) / len(packed) if packed else None
    return summary


def _nbytes(cache):
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
        starts = next(c.packs_beyond for c in prompt_cache if isinstance(c, TurboKVCache))
        size += f" (packing starts beyond {starts} tokens)"
    return [f"KV cache: {s['scheme']}, {s['tokens']} tokens ({s['sink']} sink exact, {packed}, "
            f"{s['recent']} recent exact); {s['layers']}; attention of a decode step: {s['attention']}", size]


# ---- generate ----------------------------------------------------------------------------------------------
def _generate_parser(module):
    parser = module.setup_arg_parser()
    parser.prog = "mlx-turbo generate"
    parser.description = "mlx_lm.generate with a TurboQuant KV cache: all its flags, and those of mlx-turbo."
    parser.error = lambda message: _raise_cli_error(f"{message} (see {parser.prog} --help)")
    parser.set_defaults(prompt=None)
    for action in parser._actions:
        if action.dest == "model":
            action.help = "A local folder or a Hugging Face id; without it the embedded demo model is used."
    group = add_cache_arguments(parser)
    group.add_argument("--kv", metavar="SCHEME",
                       help="bits per number of the KV cache: turbo4, turbo3, turbo2, turbo8v4 (keys 8, "
                            "values 4), ...; auto: turbo4, with more bits for the keys of layers that turn out to "
                            f"need them; or none: mlx-lm's own cache (default: {DEFAULT_SCHEME}). A draft "
                            "model's cache is compressed too. Rotating caches (--max-kv-size) are not.")
    return parser


def _warn_beyond_context(model, n_tokens, max_tokens):
    limit = getattr(getattr(model, "args", None), "max_position_embeddings", None)
    total = n_tokens + max(max_tokens, 0)
    if limit and total > limit:
        _complain(f"warning: prompt and answer may reach {total} tokens, the model was made for {limit}: "
                  "expect nonsense beyond")


def generate(argv):
    """`mlx-turbo generate`: mlx_lm.generate's own main() with our caches, then what they hold."""
    module = importlib.import_module("mlx_lm.generate")  # a plain import gives the function
    parser = _generate_parser(module)
    args = parser.parse_args(argv)
    program = TurboProgram(module, args)
    if args.kv_bits is not None and program.config is not None:
        raise CliError(f"--kv-bits: mlx-lm's own cache quantization does not go with --kv {program.scheme}; "
                       "leave --kv-bits out, or say --kv none")
    if args.max_tokens == 0:
        raise CliError("--max-tokens: got 0, allowed are positive numbers, and -1 for no limit")
    if demo := args.model is None and args.prompt_cache_file is None:
        _complain("no --model given: using the embedded demo model (short stories, 4096 tokens of context)")
        args.model = str(DEMO_MODEL)
    if args.prompt is None:
        args.prompt = DEMO_PROMPT if demo else module.DEFAULT_PROMPT
    original = module.generate

    def checked_generate(model, tokenizer, prompt, **kwargs):
        if len(prompt) == 0:
            raise CliError("--prompt: is empty")
        before = max((c.offset for c in kwargs.get("prompt_cache") or [] if hasattr(c, "offset")), default=0)
        _warn_beyond_context(model, before + len(prompt), kwargs["max_tokens"])
        return original(model, tokenizer, prompt, **kwargs)

    parser.parse_args = lambda: args
    # its warning about a long prompt speaks of "indexing errors", which MLX does not have; ours is below
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
    with use_backend(args.backend) as backend, program.installed(), \
            _replaced(module, setup_arg_parser=lambda: parser, generate=checked_generate):
        module.main()
        out = sys.stdout if args.verbose else sys.stderr
        for i, cache in enumerate(program.caches):
            for line in report_lines(cache, program.scheme):
                print(f"Draft model's {line}" if i else line, file=out)
        if program.config is not None:
            print(f"Backend: {backend.describe()}", file=out)
    return 0


# ---- eval --------------------------------------------------------------------------------------------------
def _progress(done, total):
    if sys.stderr.isatty():
        bar, end = "#" * (40 * done // total), "\n" if done == total else ""
        print(f"\r[{bar:.<40}] {done}/{total} tokens", end=end, file=sys.stderr, flush=True)


def _eval_parser():
    parser = Parser(
        prog="mlx-turbo eval",
        description="Perplexity of a text, and how far the model's output moves from the uncompressed "
                    "cache's: KL divergence (nats per token) and how often the likeliest token is the same. "
                    "The text passes through the cache in chunks, so all but the newest tokens come from it.")
    add = parser.add_argument
    add("--model", help="a local folder or a Hugging Face id (default: the embedded demo model)")
    add("--text", metavar="FILE", help="text to read (default: held-out stories of the demo model)")
    add("--tokens", type=int, default=2048, metavar="N", help="at most so many (default: 2048)")
    add("--chunk", type=int, default=32, metavar="N", help="tokens per step (default: 32)")
    add("--dtype", choices=["float32", "bfloat16", "float16", "model"],
        help="of the model's parameters (default: float32 on the CPU, else the model's own; bfloat16 noise "
             "alone is a KL divergence of about 0.003)")
    add("--json", action="store_true", help="JSON instead of a table")
    add_cache_arguments(parser).add_argument(
        "--kv", nargs="+", action="extend", metavar="SCHEME",
        help=f"schemes to compare with the uncompressed cache (default: {DEFAULT_SCHEME})")
    return parser


def evaluate(argv):
    """`mlx-turbo eval`: fidelity.compare as a table or as JSON."""
    args = _eval_parser().parse_args(argv)
    for name, least in (("tokens", 2), ("chunk", 1)):
        if getattr(args, name) < least:
            raise CliError(f"--{name}: got {getattr(args, name)}, allowed are whole numbers from {least} on")
    configs = {scheme: kv_config(scheme, args) for scheme in args.kv or [DEFAULT_SCHEME]}
    configs.pop("none", None)  # it is what the others are compared with
    path = Path(args.text or DEMO_MODEL / "stories.txt")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise CliError(f"--text: cannot read {str(path)!r}: {_one_line(e)}") from e

    import mlx.core as mx

    from . import fidelity
    load = importlib.import_module("mlx_lm.utils").load
    model, tokenizer = load_model(load, args.model or DEMO_MODEL, "--model")
    model_name = args.model or "embedded demo model"
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    dtype = args.dtype or ("float32" if on_cpu else "model")
    if dtype != "model":
        model.set_dtype(getattr(mx, dtype))
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
    tokens = tokenizer.encode(text)[:args.tokens]
    if len(tokens) < 2:
        raise CliError(f"--text: {str(path)!r} has {len(tokens)} tokens, at least 2 are needed")
    _warn_beyond_context(model, len(tokens), 0)
    with use_backend(args.backend):
        results = fidelity.compare(model, tokens, configs, args.chunk, _progress)
        backend = get_backend().describe()
    rows = []
    for name, (measured, cache) in results.items():
        rows.append({"kv": name, **measured, **summarize(cache)})
        if name == "none":
            del rows[0]["layers"]
        rows[-1]["perplexity_change"] = measured["perplexity"] / rows[0]["perplexity"] - 1
    if args.json:
        print(json.dumps({"model": model_name, "text": str(path), "tokens": len(tokens), "chunk": args.chunk,
                          "dtype": dtype, "backend": backend, "results": rows}, indent=2))
        return 0
    print(f"{model_name}, {len(tokens)} tokens of {path.name} in chunks of {args.chunk}, dtype {dtype}\n")
    print(f"{'kv':<10}{'perplexity':>11}{'change':>9}{'KLD nats':>11}{'same top-1':>12}{'cache MB':>10}"
          f"{'bits/value':>12}")
    for row in rows:
        bits = row.get("packed_bits_per_value")
        print(f"{row['kv']:<10}{row['perplexity']:>11.4f}{row['perplexity_change']:>9.2%}{row['kld']:>11.6f}"
              f"{row['top1']:>12.2%}{row['nbytes'] / 1e6:>10.3f}{f'{bits:.3f}' if bits else '-':>12}")
    print(f"\nbits/value: of packed tokens, scale included. Backend: {backend}")
    for layers in dict.fromkeys(row["layers"] for row in rows[1:]):
        print(layers)
    return 0


# ---- the command -------------------------------------------------------------------------------------------
def doctor(argv):
    """`mlx-turbo doctor`."""
    from .doctor import main as doctor_main

    return doctor_main(argv)


def plan(argv):
    """`mlx-turbo plan`."""
    from .plan import main as plan_main

    return plan_main(argv)


def bench(argv):
    """`mlx-turbo bench`."""
    from .bench import main as bench_main

    return bench_main(argv)


COMMANDS = {
    "generate": (generate, "write text with a compressed KV cache (every flag of mlx_lm.generate)"),
    "eval": (evaluate, "perplexity and KL divergence of a compressed cache against an uncompressed one"),
    "plan": (plan, "how many tokens fit into a memory size with each scheme, from a model's configuration"),
    "bench": (bench, "speed, memory and errors of kernels and of generation, beside MLX's own; what to send us"),
    "doctor": (doctor, "build every kernel and check it against the oracle on this machine"),
}


def main(argv=None):
    """Run `mlx-turbo` with the arguments argv (default: sys.argv[1:]). Returns the exit code."""
    parser = Parser(
        prog="mlx-turbo", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="TurboQuant KV-cache compression for MLX.\n\ncommands:\n" + "\n".join(
            f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items())
        + "\n\n`mlx-turbo COMMAND --help` shows the options of one.")
    parser.add_argument("--version", action="version", version=f"mlx-turbo {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=", ".join(COMMANDS))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="the command's options")
    try:
        if not (sys.argv[1:] if argv is None else argv):
            parser.print_help(sys.stderr)
            return 2
        args = parser.parse_args(argv)
        return COMMANDS[args.command][0](args.arguments)
    except (BackendError, CliError, ValueError) as e:  # ValueError: mlx-lm and our caches on bad input
        if sys.flags.dev_mode:
            raise
        _complain(f"error: {e}")
        return 1 if isinstance(e, BackendError) else 2
    except KeyboardInterrupt:
        return 130
