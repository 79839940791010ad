"""`mlx-turbo eval`: perplexity, KL divergence, agreement and recall of caches, against the uncompressed one."""

import argparse
import functools
import importlib
import json
import logging
import re
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from tqdm import tqdm

from ..backends.select import get_backend, use_backend
from ..integration.prompt_cache import describe, make_prompt_cache, reports
from ..quality import metrics, needles, plots
from ..quality.baselines import MLX_LM_BITS, make_plain_cache, make_quantized_cache, why_not_quantized
from ..quality.style import PlotError, check_plot
from ..quant.scheme import TurboConfig
from .common import (
    DEMO_MODEL,
    CliError,
    Parser,
    add_cache_arguments,
    describe_error,
    kv_config,
    load_model,
    print_message,
    warn_beyond_context,
)
from .provenance import provenance

DEFAULT_KV = ("mlx8", "mlx4", "turbo8v4", "turbo4", "turbo3", "turbo2")
NEEDLE_CHUNK = 128
HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:/(.+))?")
TEXT_TYPES = (".txt", ".jsonl", ".parquet")
NOTE = f"""\
resident: 8 * bytes of the cache's buffers / numbers held, at the measured length. Exact tokens and the scales of
  mlx8 and mlx4 are stored in --dtype.
at 32K: the same cache with {metrics.PROJECTED_TOKENS:,} tokens of a 16-bit model: (packed * capacity for packed tokens
  + 16 * (sink + recent + block)) / {metrics.PROJECTED_TOKENS:,}.
packed: for one packed number of a 16-bit model, scales included."""


def build_parser() -> Parser:
    """The parser of `mlx-turbo eval`."""
    parser = Parser(
        prog="mlx-turbo eval",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Perplexity of a text, and how far the model's output moves from that with an uncompressed cache:\n"
        "KL divergence (nats per token) and how often the most likely token is the same. The text passes\n"
        "through the cache in chunks, so that all but the newest tokens are read back from it.",
        epilog="Bits per number (bits/value) in the table:\n" + NOTE,
    )
    add = parser.add_argument
    add("--model", help="a local folder or a Hugging Face id (default: the embedded demo model)")
    add(
        "--text",
        help="a file (.txt, .jsonl, .parquet) or a dataset on the Hugging Face Hub, owner/name or "
        "owner/name/file (default: held-out stories of the demo model)",
    )
    add("--tokens", type=int, default=2048, metavar="N", help="maximum number of tokens per window (default: 2048)")
    add(
        "--windows",
        type=int,
        default=1,
        metavar="N",
        help="number of windows of the text, each read with fresh caches; with two or more, the KL divergence gets a "
        "standard error (default: 1)",
    )
    add("--chunk", type=int, default=32, metavar="N", help="tokens per step (default: 32)")
    add(
        "--dtype",
        choices=["float32", "bfloat16", "float16", "model"],
        default="float32",
        help="dtype of the model's parameters; 'model' leaves them as they are (default: float32; the rounding of "
        "bfloat16 alone is a KL divergence of about 0.003)",
    )
    add(
        "--needles",
        action="store_true",
        help="hide facts in the text and ask for them: how many are recalled, by length and depth",
    )
    add(
        "--needle-lengths",
        type=int,
        nargs="+",
        default=[512, 1024, 2048],
        metavar="N",
        help="document lengths in tokens (default: 512 1024 2048)",
    )
    add(
        "--needle-documents",
        type=int,
        default=10,
        metavar="N",
        help="documents per length (default: 10; with 10 facts each, a fact is one percent)",
    )
    add("--needle-facts", type=int, default=10, metavar="N", help="facts per document (default: 10)")
    add("--json", action="store_true", help="print JSON instead of a table")
    add("--png", metavar="FILE", help="also write a plot of KL divergence against bits per number")
    add("--quiet", action="store_true", help="no progress bar (there is none either if stderr is not a terminal)")
    group = add_cache_arguments(parser)
    group.add_argument(
        "--kv-block",
        type=int,
        metavar="N",
        help="number of exact tokens beyond --kv-recent that are packed together (default: 64)",
    )
    group.add_argument(
        "--kv",
        nargs="+",
        action="extend",
        metavar="SCHEME",
        help="caches to compare with the uncompressed one: turbo4, turbo8v4, ..., and mlx8 and mlx4, "
        f"mlx-lm's own QuantizedKVCache (default: {' '.join(DEFAULT_KV)})",
    )
    return parser


# ---- the text ------------------------------------------------------------------------------------------------
def read_text(source: str) -> tuple[str, str]:
    """(text, its name) of a file, or of a dataset on the Hugging Face Hub. Raises CliError."""
    path = Path(source)
    hub = HUB_ID.fullmatch(source) if not path.exists() else None
    if hub and (hub[2] or path.suffix not in TEXT_TYPES):
        path, name = _from_hub(hub[1], hub[2])
    else:
        name = path.name
    try:
        if path.suffix == ".parquet":
            texts = _parquet_texts(path)
        elif path.suffix == ".jsonl":
            texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        else:
            texts = [path.read_text(encoding="utf-8")]
        return "\n\n".join(texts), name
    except (KeyError, TypeError) as e:
        raise CliError(f"--text: {name!r} has no field 'text', or one that does not hold text") from e
    except (OSError, ValueError) as e:
        raise CliError(f"--text: cannot read {str(path)!r}: {describe_error(e)}") from e


def _parquet_texts(path: Path) -> list[str]:
    try:
        from pyarrow import parquet
    except ImportError as e:
        raise CliError(f"--text: {path.name!r} needs pyarrow, which is not installed: pip install pyarrow") from e
    if "text" not in parquet.read_schema(path).names:
        raise KeyError("text")
    return parquet.read_table(path, columns=["text"])["text"].to_pylist()


def _from_hub(repo: str, file: str | None) -> tuple[Path, str]:
    """A file of a dataset as (local path, name): the one named, else its test or validation split."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        if file is None:
            available = sorted(huggingface_hub.HfApi().list_repo_files(repo, repo_type="dataset"))
            texts = [f for f in available if f.endswith(TEXT_TYPES)]
            splits = [f for split in ("test", "valid") for f in texts if split in f.rsplit("/", 2)[-1]]
            if not splits:
                raise CliError(
                    f"--text: {repo!r} has no test or validation split in {', '.join(TEXT_TYPES)}; name "
                    f"a file, {repo}/FILE; it has {', '.join(texts or available) or 'none'}"
                )
            file = splits[0]
        return Path(huggingface_hub.hf_hub_download(repo, file, repo_type="dataset")), f"{repo}/{file}"
    except errors.LocalEntryNotFoundError as e:
        raise CliError(f"--text: {repo!r} is not in the Hugging Face cache, and the Hub cannot be reached") from e
    except errors.EntryNotFoundError as e:
        raise CliError(
            f"--text: there is no local file '{repo}/{file}', and the dataset {repo!r} on the Hugging Face "
            f"Hub has no {file!r}"
        ) from e
    except errors.RepositoryNotFoundError as e:
        raise CliError(
            f"--text: {repo!r} is neither a local file nor a dataset on the Hugging Face Hub "
            "(or it is private or gated)"
        ) from e
    except (OSError, ValueError, RuntimeError) as e:  # RuntimeError: httpx and requests, raised through huggingface_hub
        raise CliError(f"--text: cannot get {repo!r} from the Hugging Face Hub: {describe_error(e)}") from e


def first_windows(tokenizer: Any, text: str, n_tokens: int, n_windows: int) -> list[list[int]]:
    """The first n_windows windows of a text, n_tokens tokens each; a single shorter one if the text is shorter."""
    wanted, n_chars = n_tokens * n_windows, 8 * n_tokens * n_windows
    tokens = tokenizer.encode(text[:n_chars])
    while len(tokens) <= wanted and n_chars < len(text):  # encode no more of a large file than necessary
        n_chars *= 4
        tokens = tokenizer.encode(text[:n_chars])
    full = [tokens[i * n_tokens : (i + 1) * n_tokens] for i in range(min(n_windows, len(tokens) // n_tokens))]
    return full or [tokens]


# ---- the caches ----------------------------------------------------------------------------------------------
MakeCache = Callable[[], list[Any]]


def make_caches(model: Any, args: argparse.Namespace) -> dict[str, MakeCache]:
    """name -> function that makes a prompt cache: "none" first, then those of --kv. Raises CliError."""
    made: dict[str, MakeCache] = {"none": lambda: make_plain_cache(model)}
    why_not = None
    for name, config in _configs(args).items():
        if config is not None:
            made[name] = functools.partial(make_prompt_cache, model, config)
            continue
        why_not = why_not or why_not_quantized(model)
        if why_not and args.kv:
            raise CliError(f"--kv: {name}: {why_not}")
        if why_not:
            print_message(f"warning: skipping {name}: {why_not}")
        else:
            made[name] = functools.partial(make_quantized_cache, model, name)
    return made


def _configs(args: argparse.Namespace) -> dict[str, TurboConfig | None]:
    """--kv as name -> TurboConfig, None for mlx-lm's quantized cache. Raises CliError."""
    configs: dict[str, TurboConfig | None] = {}
    for name in args.kv or DEFAULT_KV:
        if name.startswith("mlx") and name not in MLX_LM_BITS:
            raise CliError(f"--kv: got {name!r}; mlx-lm's own quantized cache is {' or '.join(MLX_LM_BITS)}")
        config = None if name in MLX_LM_BITS else kv_config(name, args)
        if config is not None and args.kv_block is not None:
            try:
                config = replace(config, block=args.kv_block)
            except ValueError as e:
                raise CliError(f"--kv-{e}") from e
        if name != "none":  # the others are compared with it anyway
            configs[name] = config
    return configs


# ---- what was measured ---------------------------------------------------------------------------------------
def _row(name: str, measured: dict[str, Any], cache: list[Any], baseline: dict[str, Any]) -> dict[str, Any]:
    row = {
        "kv": name,
        **measured,
        "perplexity_change": measured["perplexity"] / baseline["perplexity"] - 1,
        "resident_bits_per_value": metrics.resident_bits(cache),
        "resident_bits_per_value_32k": metrics.projected_bits(cache),
        "packed_bits_per_value": metrics.packed_bits(cache) if name != "none" else None,
    }
    if layers := [report for _, _, report, _ in reports(cache) if report]:
        row |= {key: layers[0][key] for key in ("tokens", "sink", "packed", "recent")}
        row |= {key: sum(report[key] for report in layers) for key in ("nbytes", "uncompressed_nbytes")}
        row["layers"] = describe(cache)
    return row


def _recall_rows(
    model: Any,
    tokenizer: Any,
    text: str,
    caches: dict[str, MakeCache],
    args: argparse.Namespace,
    progress: Callable[[int], Any],
) -> list[dict[str, Any]]:
    """Needles: a row per cache and length."""
    rows = []
    for length in args.needle_lengths:
        documents = needles.needle_documents(text, tokenizer, length, args.needle_documents, args.needle_facts)
        for name, make in caches.items():
            right = [
                needles.recalls(model, tokenizer, document, make, NEEDLE_CHUNK, progress=progress)
                for document in documents
            ]
            by_depth = [sum(column) / len(documents) for column in zip(*right)]
            n, recalled = sum(map(len, right)), sum(map(sum, right))
            rows.append(
                {
                    "kv": name,
                    "length": length,
                    "questions": n,
                    "recalled": recalled,
                    "accuracy": recalled / n,
                    "by_depth": by_depth,
                }
            )
    return rows


def _bits(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def print_tables(report: dict[str, Any]) -> None:
    """Print a report as tables."""
    about = report["provenance"]
    print(
        f"{report['model']}, {report['windows']} x {report['tokens']} tokens of {report['text']} in chunks of "
        f"{report['chunk']}, dtype {report['dtype']}\n"
    )
    print(f"{'':<10}{'':>11}{'':>9}{'KL div.':>10}{'':>10}{'same':>9}{'bits/value:':>13}")
    print(
        f"{'kv':<10}{'perplexity':>11}{'change':>9}{'nats':>10}{'+-':>10}{'top-1':>9}{'resident':>10}{'at 32K':>9}"
        f"{'packed':>9}"
    )
    for row in report["results"]:
        error = "-" if row["kld_se"] is None else f"{row['kld_se']:.6f}"
        print(
            f"{row['kv']:<10}{row['perplexity']:>11.4f}{row['perplexity_change']:>9.2%}{row['kld']:>10.6f}{error:>10}"
            f"{row['top1']:>9.2%}{_bits(row['resident_bits_per_value']):>10}"
            f"{_bits(row['resident_bits_per_value_32k']):>9}{_bits(row['packed_bits_per_value']):>9}"
        )
    print(f"\n{NOTE}")
    if recalled := report.get("needles"):
        n = recalled[0]["questions"]
        print(f"\nRecalled of {n} numbers hidden in texts of each length, in % (depth 0: start of the text)\n")
        depths = len(recalled[0]["by_depth"])
        print(
            f"{'kv':<10}{'length':>7}{'all':>7}   depth" + "".join(f"{(i + 0.5) / depths:>6.2f}" for i in range(depths))
        )
        for row in recalled:
            print(
                f"{row['kv']:<10}{row['length']:>7}{100 * row['accuracy']:>7.1f}{'':>8}"
                + "".join(f"{100 * share:>6.0f}" for share in row["by_depth"])
            )
    print()
    for layers in dict.fromkeys(row["layers"] for row in report["results"] if "layers" in row):
        print(layers)
    facts = about["machine"]
    print(f"Backend: {report['backend']}; {facts['chip']}, {facts['system']}")
    print(
        f"mlx_turbo {facts['mlx_turbo']}"
        + (f" ({about['commit']})" if about["commit"] else "")
        + f", mlx {facts['mlx']}, mlx-lm {facts['mlx-lm']}, python {facts['python']}; {report['seconds']:.0f} s"
    )
    print(f"Command: {about['command']}")


def _plot(report: dict[str, Any], file: str) -> None:
    points = [
        (
            row["kv"],
            "mlx-lm's QuantizedKVCache" if row["kv"].startswith("mlx") else "mlx_turbo",
            row["resident_bits_per_value_32k"],
            row["kld"],
            row["kld_se"],
        )
        for row in report["results"][1:]
        if row["resident_bits_per_value_32k"] is not None
    ]
    about, facts = report["provenance"], report["provenance"]["machine"]
    version = facts["mlx_turbo"] + (f" ({about['commit']})" if about["commit"] else "")
    plots.quality_plot(
        file,
        points,
        f"KV cache quality against size: {report['model']}",
        f"{report['windows']} x {report['tokens']:,} tokens of {report['text']}, read in chunks of {report['chunk']}, "
        f"{report['dtype']}",
        f"Made by mlx-turbo eval {version} on {report['backend']}, {facts['chip']}; mlx {facts['mlx']}, mlx-lm "
        f"{facts['mlx-lm']}. Bits: exact tokens counted at 16 bits. Bars: standard error over the windows. "
        f"Command: {about['command']}",
    )


# ---- the command ---------------------------------------------------------------------------------------------
def _check(args: argparse.Namespace) -> None:
    """Raise CliError for what is wrong with the arguments, before anything is loaded."""
    for name, least in (("tokens", 2), ("windows", 1), ("chunk", 1), ("needle_documents", 1), ("needle_facts", 1)):
        if getattr(args, name) < least:
            raise CliError(
                f"--{name.replace('_', '-')}: got {getattr(args, name)}, expected a whole number of at least {least}"
            )
    if args.png:
        try:
            check_plot(args.png)
        except PlotError as e:
            raise CliError(f"--png: {e}") from e
    _configs(args)


def _check_needles(text: str, tokenizer: Any, args: argparse.Namespace) -> None:
    for length in args.needle_lengths:
        try:
            needles.needle_documents(text, tokenizer, length, 1, args.needle_facts)
        except ValueError as e:
            name, _, rest = str(e).partition(":")
            flag = {"length": "needle-lengths", "n_facts": "needle-facts"}.get(name, name)
            raise CliError(f"--{flag}:{rest}") from e


def _load_model(args: argparse.Namespace) -> tuple[Any, Any]:
    load = importlib.import_module("mlx_lm.utils").load
    model, tokenizer, *_ = load_model(load, args.model or DEMO_MODEL, "--model")
    if args.dtype != "model":
        model.set_dtype(getattr(mx, args.dtype))
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
    return model, tokenizer


def _read_windows(tokenizer: Any, text: str, text_name: str, args: argparse.Namespace) -> list[list[int]]:
    """`first_windows`, checked. Raises CliError for a text that is too short to measure."""
    windows = first_windows(tokenizer, text, args.tokens, args.windows)
    if len(windows[0]) < 2:
        raise CliError(f"--text: {text_name!r} has {len(windows[0])} tokens, at least 2 are needed")
    if len(windows) < args.windows:
        print_message(f"warning: the text has only {len(windows)} of {args.windows} windows of {args.tokens} tokens")
    return windows


def _measure(
    model: Any, tokenizer: Any, windows: list[list[int]], filler: str, args: argparse.Namespace
) -> tuple[dict[str, Any], list[dict[str, Any]] | None]:
    """`metrics.compare` of all caches, and the rows of needles or None. Prints each warning once."""
    with warnings.catch_warnings(record=True) as caught:
        caches = make_caches(model, args)
        n_steps = sum(len(w) - 1 for w in windows)
        with tqdm(total=n_steps, desc="text", unit=" tokens", disable=args.quiet or None) as bar:
            results = metrics.compare(model, windows, caches, args.chunk, bar.update)
        recalled = None
        if args.needles:
            total = sum(args.needle_lengths) * args.needle_documents * len(caches)
            with tqdm(total=total, desc="needles", unit=" tokens", disable=args.quiet or None) as bar:
                recalled = _recall_rows(model, tokenizer, filler, caches, args, bar.update)
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        print_message(f"warning: {message}")
    return results, recalled


def main(argv: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    args, tic = build_parser().parse_args(argv), time.perf_counter()
    _check(args)
    text, text_name = read_text(args.text or str(DEMO_MODEL / "stories.txt"))
    model, tokenizer = _load_model(args)
    windows = _read_windows(tokenizer, text, text_name, args)
    warn_beyond_context(model, max([len(windows[0])] + args.needle_lengths * args.needles), 0)
    filler = text.replace(tokenizer.eos_token or "\0", "\n")
    if args.needles:
        _check_needles(filler, tokenizer, args)
    with use_backend(args.backend):
        results, recalled = _measure(model, tokenizer, windows, filler, args)
        backend = get_backend().describe()
    report = {
        "model": args.model or "embedded demo model",
        "text": text_name,
        "tokens": len(windows[0]),
        "windows": len(windows),
        "chunk": args.chunk,
        "dtype": args.dtype,
        "backend": backend,
        "device": str(mx.default_device()),
        "provenance": provenance(["eval", *argv]),
        "results": [_row(name, measured, cache, results["none"][0]) for name, (measured, cache) in results.items()],
    }
    for row in report["results"][1:]:
        if row.get("packed") == 0:
            print_message(
                f"warning: {row['kv']} packed nothing in {report['tokens']} tokens, so what was measured is exact"
            )
    if recalled:
        report["needles"] = recalled
    report["seconds"] = round(time.perf_counter() - tic, 1)
    if args.png:
        try:
            _plot(report, args.png)
        except PlotError as e:
            print_message(f"warning: --png: {e}")
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        print_tables(report)
    return 0
