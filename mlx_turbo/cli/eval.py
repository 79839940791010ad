"""`mlx-turbo eval`: perplexity, KL divergence with its tail, recall and function calls of caches, against the
uncompressed one."""

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
from ..integration.prompt_cache import describe, make_prompt_cache, memory_budget_of, reports
from ..quality import metrics, needles, plots, tool_calls
from ..quality.baselines import (
    MLX_LM_BITS,
    import_factory,
    keep_exact,
    make_foreign_cache,
    make_plain_cache,
    make_quantized_cache,
    why_not_quantized,
)
from ..quality.cpu_products import use_numpy_products
from ..quality.style import PlotError, check_plot
from ..quant.scheme import MEMORY, TurboConfig
from .common import (
    DEFAULT_SCHEME,
    DEMO_MODEL,
    AnyPrices,
    CliError,
    Parser,
    add_cache_arguments,
    describe_error,
    for_model,
    kv_config,
    load_model,
    print_message,
    warn_beyond_context,
)
from .provenance import provenance

DEFAULT_KV = ("mlx8", "mlx4", "mlx4+exact", "turbo8v4", "turbo4", "turbo3", "turbo2")
WITH_EXACT = "+exact"  # at the end of a name: with the exact tokens of our caches
DOCUMENT_CHUNK = 128  # tokens per step of documents with needles or schemas
HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:/(.+))?")
TEXT_TYPES = (".txt", ".jsonl", ".parquet")
NOTE = f"""\
KL div.: KL divergence from the uncompressed cache, nats per token; +-: standard error of the mean over the windows.
flips: how often the most likely token is another one.
exact: first + newest tokens that a chunk sees exactly before itself, measured on one layer; "chunk": itself too.
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
        "KL divergence (nats per token), its tail, and how often the most likely token is another one. The\n"
        "text passes through the cache in chunks, so that all but the newest tokens are read back from it.",
        epilog="In the tables:\n" + NOTE,
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
    add(
        "--tools",
        action="store_true",
        help="give the model schemas of functions and ask for calls: how many are valid JSON, of the right function, "
        "with the right arguments (for models with a chat template)",
    )
    add(
        "--tool-tokens",
        type=int,
        default=1536,
        metavar="N",
        help="length of the context with the schemas and a part of the text, in tokens (default: 1536)",
    )
    add(
        "--tool-documents",
        type=int,
        default=3,
        metavar="N",
        help=f"contexts, with {len(tool_calls.FUNCTIONS)} requests each (default: 3)",
    )
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
        metavar="CACHE",
        help="caches to compare with the uncompressed one: turbo4, auto, auto:4.5, memory:6GB; mlx8 and mlx4, "
        "mlx-lm's own QuantizedKVCache; and any other as package.module:factory, where factory(model) returns new "
        f"caches, one per layer. mlx4{WITH_EXACT} and package.module:factory{WITH_EXACT} keep the same tokens exact as "
        f"ours (default: {' '.join(DEFAULT_KV)})",
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
    """The first n_windows windows of a text, n_tokens tokens each; a single shorter one if the text is shorter. Where
    the tokenizer begins a text with a token of its own, so does every window: some models (Gemma) are lost without."""
    wanted, n_chars = n_tokens * n_windows, 8 * n_tokens * n_windows
    tokens = tokenizer.encode(text[:n_chars])
    while len(tokens) <= wanted and n_chars < len(text):  # encode no more of a large file than necessary
        n_chars *= 4
        tokens = tokenizer.encode(text[:n_chars])
    begin = tokens[:1] if tokens[:1] == [getattr(tokenizer, "bos_token_id", None)] else []
    rest, n = tokens[len(begin) :], n_tokens - len(begin)
    full = [begin + rest[i * n : (i + 1) * n] for i in range(min(n_windows, len(rest) // n if n else 0))]
    return full or [tokens]


# ---- the caches ----------------------------------------------------------------------------------------------
MakeCache = Callable[[], list[Any]]


def make_caches(model: Any, tokenizer: Any, args: argparse.Namespace) -> dict[str, MakeCache]:
    """name -> function that makes a prompt cache: "none" first, then those of --kv, whose budgets are spent now. Raises
    CliError."""
    prices: AnyPrices = {}
    made: dict[str, MakeCache] = {"none": lambda: make_plain_cache(model)}
    for name, config in _configs(args).items():
        base = name.removesuffix(WITH_EXACT)
        ours = for_model(config, model, tokenizer, prices, args.kv_measure) if base == name else None
        if ours is not None:
            made[name] = functools.partial(make_prompt_cache, model, ours)
            continue
        if base in MLX_LM_BITS:
            why_not = why_not_quantized(model, with_exact=base != name)
            if why_not and args.kv:
                raise CliError(f"--kv: {name}: {why_not}")
            if why_not:
                print_message(f"warning: skipping {name}: {why_not}")
                continue
            make = functools.partial(make_quantized_cache, model, base)
        else:
            make = functools.partial(make_foreign_cache, model, import_factory(base), base)
            try:
                make()
            except ValueError as e:
                raise CliError(f"--kv: {e}") from e
        made[name] = make if config is None else functools.partial(_with_exact, model, make, config)
    return made


def _is_foreign(name: str) -> bool:
    """Whether a name of --kv is package.module:factory."""
    return ":" in name and not name.startswith(("auto:", MEMORY))


def _with_exact(model: Any, make: MakeCache, config: TurboConfig) -> list[Any]:
    return keep_exact(model, make(), config.sink, config.recent, config.block)


def _configs(args: argparse.Namespace) -> dict[str, TurboConfig | None]:
    """--kv as name -> TurboConfig; for mlx-lm's and foreign caches that of the exact tokens they get, or None. Raises
    CliError."""
    configs: dict[str, TurboConfig | None] = {}
    for name in args.kv or DEFAULT_KV:
        base = name.removesuffix(WITH_EXACT)
        if _is_foreign(base):
            try:
                import_factory(base)
            except ValueError as e:
                raise CliError(f"--kv: {e}") from e
        elif name.startswith("mlx") and base not in MLX_LM_BITS:
            raise CliError(f"--kv: got {name!r}; mlx-lm's own quantized cache is {' or '.join(MLX_LM_BITS)}")
        elif base != name and base not in MLX_LM_BITS:
            raise CliError(f"--kv: got {name!r}; {WITH_EXACT} is for mlx-lm's and other caches: ours keep exact tokens")
        config = None
        if base != name or base not in MLX_LM_BITS and not _is_foreign(base):
            config = _with_block(kv_config(DEFAULT_SCHEME if base != name else name, args), args)
        if name != "none":  # the others are compared with it anyway
            configs[name] = config
    return configs


def _with_block(config: TurboConfig | None, args: argparse.Namespace) -> TurboConfig | None:
    if config is None or args.kv_block is None:
        return config
    try:
        return replace(config, block=args.kv_block)
    except ValueError as e:
        raise CliError(f"--kv-{e}") from e


# ---- what was measured ---------------------------------------------------------------------------------------
def _row(
    name: str, measured: dict[str, Any], cache: list[Any], baseline: dict[str, Any], plain: list[Any]
) -> dict[str, Any]:
    """A cache's row. baseline, plain: what was measured with mlx-lm's own cache, and that cache."""
    row = {
        "kv": name,
        **measured,
        "perplexity_change": measured["perplexity"] / baseline["perplexity"] - 1,
        "resident_bits_per_value": metrics.resident_bits(cache) or metrics.foreign_bits(cache, plain),
        # what a budget of memory packs by then is not what it packs now
        "resident_bits_per_value_32k": metrics.projected_bits(cache) if memory_budget_of(cache) is None else None,
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
                needles.recalls(model, tokenizer, document, make, DOCUMENT_CHUNK, progress=progress)
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


def _tool_rows(
    model: Any,
    documents: list[tool_calls.ToolDocument],
    tokenizer: Any,
    caches: dict[str, MakeCache],
    progress: Callable[[int], Any],
) -> list[dict[str, Any]]:
    """Function calls: a row per cache, with what was right, and how many answers are those of the first cache."""
    rows, first = [], None
    for name, make in caches.items():
        grades = [
            grade
            for document in documents
            for grade in tool_calls.tool_calls(model, tokenizer, document, make, DOCUMENT_CHUNK, progress)
        ]
        first = first or grades
        right = {field: sum(getattr(grade, field) for grade in grades) for field in ("valid", "function", "arguments")}
        same = sum(grade.text == reference.text for grade, reference in zip(grades, first))
        rows.append({"kv": name, "requests": len(grades), **right, "same_answer": same})
    return rows


def _bits(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _exact_text(exact: dict[str, Any] | str | None) -> str:
    """The exact tokens of a row in a few words: "4 + 64 to 96, chunk"."""
    if not isinstance(exact, dict):
        return exact or "-"
    first, (low, high), chunk = exact["first"], exact["newest"], exact["chunk"]
    if not first and not high and not chunk:
        return "none"
    return f"{first} + {low}" + (f" to {high}" if high > low else "") + (", chunk" if chunk else "")


def print_tables(report: dict[str, Any]) -> None:
    """Print a report as tables."""
    about = report["provenance"]
    print(
        f"{report['model']}, {report['windows']} x {report['tokens']} tokens of {report['text']} in chunks of "
        f"{report['chunk']}, dtype {report['dtype']}\n"
    )
    width = 2 + max(len(row["kv"]) for row in report["results"])
    print(f"{'':<{width}}{'':>11}{'':>9}{'KL div.:':>10}")
    print(
        f"{'kv':<{width}}{'perplexity':>11}{'change':>9}{'mean':>10}{'+-':>10}{'median':>10}{'p99':>10}{'p99.9':>10}"
        f"{'max':>10}{'flips':>9}"
    )
    for row in report["results"]:
        error = "-" if row["kld_se"] is None else f"{row['kld_se']:.6f}"
        print(
            f"{row['kv']:<{width}}{row['perplexity']:>11.4f}{row['perplexity_change']:>9.2%}{row['kld']:>10.6f}"
            f"{error:>10}{row['kld_median']:>10.6f}{row['kld_p99']:>10.5f}{row['kld_p999']:>10.5f}"
            f"{row['kld_max']:>10.5f}{1 - row['top1']:>9.2%}"
        )
    print(f"\n{'':<{width}}{'':<24}{'bits/value:':>13}")
    print(f"{'kv':<{width}}{'exact':<24}{'resident':>10}{'at 32K':>9}{'packed':>9}")
    for row in report["results"]:
        print(
            f"{row['kv']:<{width}}{_exact_text(row['exact']):<24}{_bits(row['resident_bits_per_value']):>10}"
            f"{_bits(row['resident_bits_per_value_32k']):>9}{_bits(row['packed_bits_per_value']):>9}"
        )
    print(f"\n{NOTE}")
    if recalled := report.get("needles"):
        n = recalled[0]["questions"]
        print(f"\nRecalled of {n} numbers hidden in texts of each length, in % (depth 0: start of the text)\n")
        depths = len(recalled[0]["by_depth"])
        print(
            f"{'kv':<{width}}{'length':>7}{'all':>7}   depth"
            + "".join(f"{(i + 0.5) / depths:>6.2f}" for i in range(depths))
        )
        for row in recalled:
            print(
                f"{row['kv']:<{width}}{row['length']:>7}{100 * row['accuracy']:>7.1f}{'':>8}"
                + "".join(f"{100 * share:>6.0f}" for share in row["by_depth"])
            )
    if calls := report.get("tools"):
        print(
            f"\nOf {calls[0]['requests']} calls of functions whose schemas stand in the context "
            f"({report['tool_tokens']:,} tokens)\n"
        )
        print(f"{'kv':<{width}}{'valid JSON':>11}{'+ function':>12}{'+ arguments':>13}{'answer as none':>16}")
        for row in calls:
            print(
                f"{row['kv']:<{width}}{row['valid']:>11}{row['function']:>12}{row['arguments']:>13}"
                f"{row['same_answer']:>16}"
            )
    print()
    for layers in dict.fromkeys(row["layers"] for row in report["results"] if "layers" in row):
        print(layers)
    facts = about["machine"]
    print(f"Backend: {report['backend']}; linear layers: {report['linear_layers']}; {facts['chip']}, {facts['system']}")
    print(
        f"mlx_turbo {facts['mlx_turbo']}"
        + (f" ({about['commit']})" if about["commit"] else "")
        + f", mlx {facts['mlx']}, mlx-lm {facts['mlx-lm']}, python {facts['python']}; {report['seconds']:.0f} s"
    )
    print(f"Command: {about['command']}")


def _group(name: str) -> str:
    """Whose cache a row is, for the legend."""
    if _is_foreign(name):
        return "other caches"
    if not name.startswith("mlx"):
        return "mlx_turbo"
    return "mlx-lm's QuantizedKVCache" + (", ends exact" if name.endswith(WITH_EXACT) else "")


def _plot(report: dict[str, Any], file: str) -> None:
    points = [
        (
            row["kv"],
            _group(row["kv"]),
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
    for name, least in (
        ("tokens", 2),
        ("windows", 1),
        ("chunk", 1),
        ("needle_documents", 1),
        ("needle_facts", 1),
        ("tool_documents", 1),
    ):
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


def _tool_documents(text: str, tokenizer: Any, args: argparse.Namespace) -> list[tool_calls.ToolDocument]:
    try:
        return tool_calls.tool_documents(text, tokenizer, args.tool_tokens, args.tool_documents)
    except ValueError as e:
        name, _, rest = str(e).partition(":")
        raise CliError(f"--{ {'length': 'tool-tokens', 'tokenizer': 'tools'}.get(name, name) }:{rest}") from e


def _on_cpu() -> bool:
    return mx.default_device().type == mx.DeviceType.cpu


def _load_model(args: argparse.Namespace) -> tuple[Any, Any]:
    load = importlib.import_module("mlx_lm.utils").load
    model, tokenizer, *_ = load_model(load, args.model or DEMO_MODEL, "--model")
    if args.dtype != "model":
        model.set_dtype(getattr(mx, args.dtype))
    if _on_cpu():
        model = use_numpy_products(model)
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
    model: Any,
    tokenizer: Any,
    windows: list[list[int]],
    filler: str,
    documents: list[tool_calls.ToolDocument],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """What a report has of the caches: {"results"}, and {"needles"} and {"tools"} if they were asked for. documents: of
    --tools. Prints each warning once."""
    with warnings.catch_warnings(record=True) as caught:
        caches = make_caches(model, tokenizer, args)
        n_steps = sum(len(w) - 1 for w in windows)
        with tqdm(total=n_steps, desc="text", unit=" tokens", disable=args.quiet or None) as bar:
            results = metrics.compare(model, windows, caches, args.chunk, bar.update)
        baseline, plain = results["none"]
        measured: dict[str, Any] = {
            "results": [_row(name, *found, baseline, plain) for name, found in results.items()],
        }
        for row in measured["results"]:
            exact = metrics.exact_tokens(caches[row["kv"]], plain, args.chunk, min(len(windows[0]), 1024))
            row["exact"] = exact._asdict() if isinstance(exact, metrics.ExactTokens) else exact
        if args.needles:
            total = sum(args.needle_lengths) * args.needle_documents * len(caches)
            with tqdm(total=total, desc="needles", unit=" tokens", disable=args.quiet or None) as bar:
                measured["needles"] = _recall_rows(model, tokenizer, filler, caches, args, bar.update)
        if args.tools:
            total = sum(len(document.tokens) for document in documents) * len(caches)
            with tqdm(total=total, desc="tools", unit=" tokens", disable=args.quiet or None) as bar:
                measured["tools"] = _tool_rows(model, documents, tokenizer, caches, bar.update)
                measured["tool_tokens"] = args.tool_tokens
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        print_message(f"warning: {message}")
    return measured


def main(argv: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    args, tic = build_parser().parse_args(argv), time.perf_counter()
    _check(args)
    text, text_name = read_text(args.text or str(DEMO_MODEL / "stories.txt"))
    model, tokenizer = _load_model(args)
    windows = _read_windows(tokenizer, text, text_name, args)
    lengths = [len(windows[0]), *args.needle_lengths * args.needles, *[args.tool_tokens] * args.tools]
    warn_beyond_context(model, max(lengths), 0)
    filler = text.replace(tokenizer.eos_token or "\0", "\n")
    if args.needles:
        _check_needles(filler, tokenizer, args)
    documents = _tool_documents(filler, tokenizer, args) if args.tools else []
    with use_backend(args.backend):
        measured = _measure(model, tokenizer, windows, filler, documents, args)
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
        "linear_layers": "NumPy, float32" if _on_cpu() else "MLX",
        "provenance": provenance(["eval", *argv]),
        **measured,
    }
    for row in report["results"][1:]:
        if row.get("packed") == 0:
            print_message(
                f"warning: {row['kv']} packed nothing in {report['tokens']} tokens, so what was measured is exact"
            )
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
