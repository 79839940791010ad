"""`mlx-turbo eval`: perplexity, KL divergence, agreement and recall of caches, against the uncompressed one."""

import argparse
import importlib
import json
import logging
import re
import shlex
import subprocess
import time
import warnings
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
from tqdm import tqdm

from ..backends.select import get_backend, use_backend
from ..integration.prompt_cache import describe, make_prompt_cache, reports
from ..quality import metrics, needles, plots
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
from .provenance import machine

DEFAULT_KV = ("mlx8", "mlx4", "turbo8v4", "turbo4", "turbo3", "turbo2")
MLX_GROUP = 64  # numbers that share a scale in mlx-lm's QuantizedKVCache, its default
NEEDLE_CHUNK = 128
HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:/(.+))?")
TEXT_TYPES = (".txt", ".jsonl", ".parquet")
NOTE = f"""\
resident: 8 * bytes of the caches' buffers / numbers held, at the measured length. Exact tokens and the scales of
  mlx8 and mlx4 are in --dtype.
at 32K: the same caches with {metrics.PROJECTED_TOKENS:,} tokens in a 16-bit model: (packed * room for the packed
  tokens + 16 * (sink + recent + block)) / {metrics.PROJECTED_TOKENS:,}.
packed: of one packed number in a 16-bit model, scales included."""


def _parser():
    parser = Parser(
        prog="mlx-turbo eval",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Perplexity of a text, and how far the model's output moves from the uncompressed cache's: KL\n"
        "divergence (nats per token) and how often the likeliest token is the same. The text passes\n"
        "through the cache in chunks, so all but the newest tokens come from it.",
        epilog="Bits per number (bits/value) in the table:\n" + NOTE,
    )
    add = parser.add_argument
    add("--model", help="a local folder or a Hugging Face id (default: the embedded demo model)")
    add(
        "--text",
        help="a file (.txt, .jsonl, .parquet) or a dataset on the Hugging Face Hub, owner/name or "
        "owner/name/file (default: held-out stories of the demo model)",
    )
    add("--tokens", type=int, default=2048, metavar="N", help="per window, at most so many (default: 2048)")
    add(
        "--windows",
        type=int,
        default=1,
        metavar="N",
        help="so many windows of the text, each read with fresh caches; two or more give the KL divergence a "
        "standard error (default: 1)",
    )
    add("--chunk", type=int, default=32, metavar="N", help="tokens per step (default: 32)")
    add(
        "--dtype",
        choices=["float32", "bfloat16", "float16", "model"],
        default="float32",
        help="of the model's parameters, 'model': as they are (default: float32; bfloat16 noise alone is a KL "
        "divergence of about 0.003)",
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
        help="tokens of a document (default: 512 1024 2048)",
    )
    add(
        "--needle-documents",
        type=int,
        default=10,
        metavar="N",
        help="per length (default: 10, so that a fact is a point)",
    )
    add("--needle-facts", type=int, default=10, metavar="N", help="in each document (default: 10)")
    add("--json", action="store_true", help="JSON instead of a table")
    add("--png", metavar="FILE", help="also a picture: KL divergence against bits per number")
    add("--quiet", action="store_true", help="no progress bar (there is none either where stderr is no terminal)")
    group = add_cache_arguments(parser)
    group.add_argument(
        "--kv-block",
        type=int,
        metavar="N",
        help="exact tokens beyond --kv-recent are packed when so many have gathered (default: 64)",
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
def read_text(source):
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
        raise CliError(f"--text: {name!r} has no field 'text', or one that is no text") from e
    except (OSError, ValueError) as e:
        raise CliError(f"--text: cannot read {str(path)!r}: {describe_error(e)}") from e


def _parquet_texts(path):
    try:
        from pyarrow import parquet
    except ImportError as e:
        raise CliError(f"--text: {path.name!r} needs pyarrow, which is not installed: pip install pyarrow") from e
    if "text" not in parquet.read_schema(path).names:
        raise KeyError("text")
    return parquet.read_table(path, columns=["text"])["text"].to_pylist()


def _from_hub(repo, file):
    """A dataset's file as (local path, name): the named one, else its test or validation split."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        if file is None:
            there = sorted(huggingface_hub.HfApi().list_repo_files(repo, repo_type="dataset"))
            texts = [f for f in there if f.endswith(TEXT_TYPES)]
            splits = [f for split in ("test", "valid") for f in texts if split in f.rsplit("/", 2)[-1]]
            if not splits:
                raise CliError(
                    f"--text: {repo!r} has no test or validation split as {', '.join(TEXT_TYPES)}; name "
                    f"a file, {repo}/FILE: it has {', '.join(texts or there) or 'none'}"
                )
            file = splits[0]
        return Path(huggingface_hub.hf_hub_download(repo, file, repo_type="dataset")), f"{repo}/{file}"
    except errors.LocalEntryNotFoundError as e:
        raise CliError(f"--text: {repo!r} is not in the Hugging Face cache, and the Hub cannot be reached") from e
    except errors.EntryNotFoundError as e:
        raise CliError(
            f"--text: no file here is called '{repo}/{file}', and the dataset {repo!r} on the Hugging Face "
            f"Hub has no {file!r}"
        ) from e
    except errors.RepositoryNotFoundError as e:
        raise CliError(
            f"--text: {repo!r} is neither a file here nor a dataset on the Hugging Face Hub (or it is private or gated)"
        ) from e
    except (OSError, ValueError, RuntimeError) as e:  # RuntimeError: httpx and requests, by way of huggingface_hub
        raise CliError(f"--text: cannot get {repo!r} from the Hugging Face Hub: {describe_error(e)}") from e


def _windows(tokenizer, text, n_tokens, n_windows):
    """The first windows of a text, lists of n_tokens tokens; one shorter window if the text is shorter than that."""
    wanted, n_chars = n_tokens * n_windows, 8 * n_tokens * n_windows
    tokens = tokenizer.encode(text[:n_chars])
    while len(tokens) <= wanted and n_chars < len(text):  # encode no more of a large file than it takes
        n_chars *= 4
        tokens = tokenizer.encode(text[:n_chars])
    full = [tokens[i * n_tokens : (i + 1) * n_tokens] for i in range(min(n_windows, len(tokens) // n_tokens))]
    return full or [tokens]


# ---- the caches ----------------------------------------------------------------------------------------------
def _mlx_bits(name):
    if not name.startswith("mlx"):
        return None
    if name not in ("mlx8", "mlx4"):
        raise CliError(f"--kv: got {name!r}, mlx-lm's own quantized cache is mlx8 or mlx4")
    return int(name[3:])


def _why_not_quantized(model):
    """Why mlx-lm's QuantizedKVCache cannot serve this model, or None. Reads one token."""
    from mlx_lm.models.cache import KVCache
    from mlx_lm.models.cache import make_prompt_cache as make_plain_cache

    caches = make_plain_cache(model)
    if others := sorted({type(c).__name__ for c in caches} - {KVCache.__name__}):
        return f"mlx-lm quantizes only models whose caches are all a plain KVCache, this one has {', '.join(others)}"
    mx.eval(model(mx.array([[0]]), cache=caches))
    dims = sorted({a.shape[-1] for c in caches for a in (c.keys, c.values)})
    if wrong := [d for d in dims if d % MLX_GROUP]:
        return f"mlx-lm quantizes groups of {MLX_GROUP}, and head_dim {wrong[0]} is not a multiple of that"
    return None


def _make_caches(model, args):
    """name -> function that makes a prompt cache: "none" first, then those of --kv. Raises CliError."""
    from mlx_lm.models.cache import QuantizedKVCache
    from mlx_lm.models.cache import make_prompt_cache as make_plain_cache

    made, why_not = {"none": lambda: make_plain_cache(model)}, None
    for name, config in _configs(args).items():
        if config is not None:
            made[name] = lambda config=config: make_prompt_cache(model, config)
            continue
        why_not = why_not or _why_not_quantized(model)
        if why_not and args.kv:
            raise CliError(f"--kv: {name}: {why_not}")
        if why_not:
            print_message(f"warning: left out {name}: {why_not}")
        else:
            made[name] = lambda bits=_mlx_bits(name): [QuantizedKVCache(MLX_GROUP, bits) for _ in model.layers]
    return made


def _configs(args):
    """--kv as name -> TurboConfig, None for mlx-lm's quantized cache. Raises CliError."""
    configs = {}
    for name in args.kv or DEFAULT_KV:
        config = None if _mlx_bits(name) else kv_config(name, args)
        if config is not None and args.kv_block is not None:
            try:
                config = replace(config, block=args.kv_block)
            except ValueError as e:
                raise CliError(f"--kv-{e}") from e
        if name != "none":  # it is what the others are compared with
            configs[name] = config
    return configs


# ---- what was measured ---------------------------------------------------------------------------------------
def provenance(argv):
    """What a figure must be read with: versions, machine, command line, and the commit in a checkout (else None)."""
    root, commit = Path(__file__).resolve().parents[2], None
    if (root / ".git").exists():
        try:
            commit = subprocess.run(
                ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude", "*", "--abbrev=12"],
                capture_output=True,
                text=True,
                check=True,
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            pass
    return {"command": shlex.join(["mlx-turbo", *argv]), "commit": commit, "machine": machine()}


def _row(name, measured, cache, baseline):
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


def _recall_rows(model, tokenizer, text, make_caches, args, progress):
    """Needles: a row per cache and length."""
    rows = []
    for length in args.needle_lengths:
        documents = needles.needle_documents(text, tokenizer, length, args.needle_documents, args.needle_facts)
        for name, make in make_caches.items():
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


def _bits(value):
    return "-" if value is None else f"{value:.3f}"


def _print_tables(report):
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
    if needles := report.get("needles"):
        n = needles[0]["questions"]
        print(f"\nRecalled of {n} numbers hidden in each length of text, in % (depth 0: its start)\n")
        depths = len(needles[0]["by_depth"])
        print(
            f"{'kv':<10}{'length':>7}{'all':>7}   depth" + "".join(f"{(i + 0.5) / depths:>6.2f}" for i in range(depths))
        )
        for row in needles:
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


def _plot(report, file):
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
        f"{facts['mlx-lm']}. Bits: exact tokens counted at 16 bits. Bars: standard error over windows. "
        f"Command: {about['command']}",
    )


# ---- the command ---------------------------------------------------------------------------------------------
def _check(args):
    for name, least in (("tokens", 2), ("windows", 1), ("chunk", 1), ("needle_documents", 1), ("needle_facts", 1)):
        if getattr(args, name) < least:
            raise CliError(
                f"--{name.replace('_', '-')}: got {getattr(args, name)}, allowed are whole numbers from {least} on"
            )
    if args.png:
        try:
            plots.check_plot(args.png)
        except plots.PlotError as e:
            raise CliError(f"--png: {e}") from e
    _configs(args)


def main(argv):
    """Run the command; returns its exit code."""
    args, tic = _parser().parse_args(argv), time.perf_counter()
    _check(args)
    text, text_name = read_text(args.text or str(DEMO_MODEL / "stories.txt"))
    load = importlib.import_module("mlx_lm.utils").load
    model, tokenizer = load_model(load, args.model or DEMO_MODEL, "--model")
    if args.dtype != "model":
        model.set_dtype(getattr(mx, args.dtype))
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
    windows = _windows(tokenizer, text, args.tokens, args.windows)
    if len(windows[0]) < 2:
        raise CliError(f"--text: {text_name!r} has {len(windows[0])} tokens, at least 2 are needed")
    if len(windows) < args.windows:
        print_message(f"warning: the text has only {len(windows)} of {args.windows} windows of {args.tokens} tokens")
    warn_beyond_context(model, max([len(windows[0])] + args.needle_lengths * args.needles), 0)
    filler = text.replace(tokenizer.eos_token or "\0", "\n")
    if args.needles:
        _check_needles(filler, tokenizer, args)
    with use_backend(args.backend), warnings.catch_warnings(record=True) as caught:
        make_caches = _make_caches(model, args)
        n_steps = sum(len(w) - 1 for w in windows)
        with tqdm(total=n_steps, desc="text", unit=" tokens", disable=args.quiet or None) as bar:
            results = metrics.compare(model, windows, make_caches, args.chunk, bar.update)
        needles = None
        if args.needles:
            total = sum(args.needle_lengths) * args.needle_documents * len(make_caches)
            with tqdm(total=total, desc="needles", unit=" tokens", disable=args.quiet or None) as bar:
                needles = _recall_rows(model, tokenizer, filler, make_caches, args, bar.update)
        backend = get_backend().describe()
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        print_message(f"warning: {message}")
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
                f"warning: {row['kv']} packed nothing in {report['tokens']} tokens: what was measured is exact"
            )
    if needles:
        report["needles"] = needles
    report["seconds"] = round(time.perf_counter() - tic, 1)
    if args.png:
        try:
            _plot(report, args.png)
        except plots.PlotError as e:
            print_message(f"warning: --png: {e}")
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        _print_tables(report)
    return 0


def _check_needles(text, tokenizer, args):
    for length in args.needle_lengths:
        try:
            needles.needle_documents(text, tokenizer, length, 1, args.needle_facts)
        except ValueError as e:
            name, _, rest = str(e).partition(":")
            flag = {"length": "needle-lengths", "n_facts": "needle-facts"}.get(name, name)
            raise CliError(f"--{flag}:{rest}") from e
