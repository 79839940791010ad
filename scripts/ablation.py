#!/usr/bin/env python3
"""What each protection of the cache contributes, alone and together: KL divergence of a model's output.

    python scripts/ablation.py [--tokens 2048] [--windows 2] [--chunk 64] [--json] [--png FILE]
    python scripts/ablation.py --model MODEL --text FILE [--rows ROW ...] [the options above]
    python scripts/ablation.py --of RESULT.json ... [--png FILE]
    python scripts/ablation.py --prefill-cost [--model MODEL] [--tokens 2048]

A row is a configuration. Windows of held-out stories (the embedded model) or of the text are read through its cache and
through an uncompressed one, in chunks, in float32. Bits are resident bits per value, 8 * bytes of the cache /
numbers it stands for: at the end of the window in float32, and projected to 32,768 tokens of a 16-bit model, of which
the exact tokens are a smaller part. Whether keys are centered is decided by the tokens at hand when packing begins, at
least 64: with a smaller --chunk the rows without recent tokens are not. MODEL: a folder, or a Hugging Face id.
--prefill-cost: how much longer the first prompt chunk takes with balanced channels, and with `auto`, than with neither,
in the model's own dtype on a GPU.
--of: shows what --json printed in earlier runs, side by side where these are of several models.
"""

import argparse
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx_lm
from mlx_lm.models.cache import KVCache
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from mlx_turbo import TurboConfig, get_backend  # noqa: E402
from mlx_turbo.backends.device import device_name  # noqa: E402
from mlx_turbo.cli import common
from mlx_turbo.cli.eval import first_windows, read_text
from mlx_turbo.integration import prompt_cache
from mlx_turbo.quality import metrics, plots
from mlx_turbo.quality.cpu_products import use_numpy_products
from mlx_turbo.quality.style import check_plot

LEAST = dict(scale="least-squares", centre=False, balance=False)  # the cache without any of the protections
NOTHING = dict(sink=0, recent=0, block=1, balance=False)  # exact but for the current chunk: as severe as can be
ROWS = {
    "4 bits, the paper's scale, nothing else": TurboConfig("turbo4", scale="norm", centre=False, **NOTHING),
    "+ least-squares scale": TurboConfig("turbo4", **LEAST | NOTHING),
    "+ inner-product scale": TurboConfig("turbo4", centre=False, **NOTHING),
    "+ centring": TurboConfig("turbo4", **NOTHING),
    "+ recent 64": TurboConfig("turbo4", sink=0, balance=False),
    "+ sink 4": TurboConfig("turbo4", balance=False),
    "+ balance = the default": TurboConfig("turbo4"),
    "default without sink": TurboConfig("turbo4", sink=0),
    "default without sink and recent": TurboConfig("turbo4", sink=0, recent=0, block=1),
    "default without centring": TurboConfig("turbo4", centre=False),
    "default with least squares": TurboConfig("turbo4", scale="least-squares"),
    "sink 64": TurboConfig("turbo4", sink=64),
    "recent 128": TurboConfig("turbo4", recent=128),
    "recent 256": TurboConfig("turbo4", recent=256),
    "auto": TurboConfig("auto"),
    "first and last layer's keys at 8 bits": TurboConfig("turbo4", boundary=1),
    "turbo3": TurboConfig("turbo3"),
    "turbo3, least squares, not centered or balanced": TurboConfig("turbo3", **LEAST),
    "turbo2": TurboConfig("turbo2"),
    "turbo2, least squares, not centered or balanced": TurboConfig("turbo2", **LEAST),
    "turbo4v3": TurboConfig("turbo4v3"),
    "turbo3v4": TurboConfig("turbo3v4"),
    "turbo8v2": TurboConfig("turbo8v2"),
    "turbo8v3": TurboConfig("turbo8v3"),
    "turbo8v4": TurboConfig("turbo8v4"),
    "turbo8": TurboConfig("turbo8"),
}


def load(path, text, own_dtype, n_tokens, n_windows):
    """(the model, in float32 unless own_dtype and on a GPU; windows of the file `text`, or of held-out stories)"""
    model, tokenizer = common.load_model(mlx_lm.load, path, "--model")
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    if on_cpu or not own_dtype:
        model.set_dtype(mx.float32)
    if on_cpu:
        model = use_numpy_products(model)
    text, _ = read_text(str(text or common.DEMO_MODEL / "stories.txt"))
    return model, first_windows(tokenizer, text, n_tokens, n_windows)


def prefill_cost(model, tokens, repeats=6):
    """Milliseconds of the first prompt chunk without balance, with it, and with auto: medians, interleaved."""
    configs = {"turbo4, no balance": TurboConfig("turbo4", balance=False), "turbo4": "turbo4", "auto": "auto"}
    times = {name: [] for name in configs}
    for _ in range(repeats + 1):
        for name, config in configs.items():
            cache = prompt_cache.make_prompt_cache(model, config)
            start = time.perf_counter()
            mx.eval(model(tokens[None], cache=cache), [c.state for c in prompt_cache.flatten_caches(cache)])
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(of[1:]) for name, of in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--rows", nargs="+", choices=ROWS, metavar="ROW", default=list(ROWS))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--png")
    parser.add_argument("--prefill-cost", action="store_true")
    parser.add_argument("--model", default=common.DEMO_MODEL)
    parser.add_argument("--text", metavar="FILE")
    parser.add_argument("--of", nargs="+", metavar="RESULT", type=Path)
    args = parser.parse_args()
    if args.png:
        check_plot(args.png)
    if args.of:
        results = [json.loads(file.read_text()) for file in args.of]
        if len({tuple(row["configuration"] for row in result["rows"]) for result in results}) > 1:
            parser.error("--of: the results have different rows")
        show(results)
        if args.png:
            draw(results, args.png)
        return
    own_dtype = args.prefill_cost and args.model != common.DEMO_MODEL
    model, windows = load(args.model, args.text, own_dtype, args.tokens, args.windows)
    if len(windows) < args.windows or len(windows[0]) < args.tokens:
        parser.error(f"--tokens and --windows: the text has fewer than {args.windows} x {args.tokens} tokens")
    where = f"{device_name()}, mlx {mx.__version__}, {get_backend().describe()}"
    if args.prefill_cost:
        cost = prefill_cost(model, mx.array(windows[0]))
        if args.json:
            print(json.dumps({"ms": cost, "tokens": args.tokens, "where": where}))
            return
        print(f"The first prompt chunk, {args.tokens:,} tokens:")
        for name, ms in cost.items():
            print(f"{name:<20}{ms:>10,.1f} ms{ms / cost['turbo4, no balance'] - 1:>+8.1%}")
        print(where)
        return
    make = {"uncompressed": lambda: [KVCache() for _ in model.layers]}
    make |= {
        name: partial(prompt_cache.make_prompt_cache, model, config)
        for name, config in ROWS.items()
        if name in args.rows
    }
    with tqdm(total=sum(len(w) - 1 for w in windows), disable=not sys.stderr.isatty()) as bar:
        results = metrics.compare(model, windows, make, args.chunk, bar.update)
    rows = [
        {
            "configuration": name,
            "kld": measured["kld"],
            "kld_se": measured["kld_se"],
            "kld_p999": measured["kld_p999"],
            "bits_here": metrics.resident_bits(cache),
            "bits_32k": metrics.projected_bits(cache),
        }
        for name, (measured, cache) in results.items()
    ][1:]
    result = {
        "model": "embedded model" if args.model == common.DEMO_MODEL else Path(args.model).name,
        "text": Path(args.text).name if args.text else "held-out stories",
        "windows": args.windows,
        "tokens": args.tokens,
        "chunk": args.chunk,
        "where": where,
        "rows": rows,
    }
    if args.png:
        draw([result], args.png)
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        show([result])


def what(result):
    return (
        f"{result['model']}: {result['windows']} x {result['tokens']:,} tokens of {result['text']} in chunks of "
        f"{result['chunk']}, float32"
    )


def draw(results, file):
    """The picture: a panel for each result."""
    panels = [
        (
            what(result),
            [
                (
                    row["configuration"],
                    row["kld"],
                    row["kld_se"],
                    "" if row["bits_32k"] is None else f"{row['bits_32k']:.2f} bits",
                )
                for row in result["rows"]
            ],
        )
        for result in results
    ]
    where = "; ".join(dict.fromkeys(result["where"] for result in results))
    footer = f"scripts/ablation.py, {where}. Bits: per number, in a cache of 32,768 tokens."
    plots.bar_plot(file, panels, "What each protection of the cache contributes", footer)


def show(results):
    """The table: the results side by side, of which all have the same rows."""
    columns = "".join(f" {r['model']}: KLD (nats) | p99.9 | bits at 32K |" for r in results)
    print(f"| Configuration |{columns}\n|{'---|' * (1 + 3 * len(results))}")
    for rows in zip(*(result["rows"] for result in results)):
        cells = ""
        for row in rows:
            error = "" if row["kld_se"] is None else f" ± {row['kld_se']:.2g}"
            bits = "none packed" if row["bits_32k"] is None else f"{row['bits_32k']:.2f}"
            cells += f" {row['kld']:.2g}{error} | {row['kld_p999']:.2g} | {bits} |"
        print(f"| {rows[0]['configuration']} |{cells}")
    for result in results:
        print(f"\n{what(result)}; {result['where']}")


if __name__ == "__main__":
    main()
