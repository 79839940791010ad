#!/usr/bin/env python3
"""A budget of memory on a growing text: bytes and KL divergence by context length, beside fixed schemes at equal bytes.

    python scripts/memory_budget.py [--tokens 2048] [--skip 0] [--chunk 32] [--fractions 2 4 6] [--json] [--png FILE]
    python scripts/memory_budget.py --model MODEL --text FILE --dtype model --fractions 2 4 6 [the options above]

One window of held-out stories (the embedded model) or of the text is read in chunks through each cache and through
mlx-lm's own. A budget of 1/d is that part of the bytes that mlx-lm's caches take at the end of the window.
At equal bytes: the keys and values of each layer at fixed widths that `auto:BITS` chooses by the same prices, with as
many bits as the budget holds at the end; and each turboN. Nothing is exact there but the sink and the newest tokens,
whatever the length. --dtype: of parameters and caches; float32 unless given, of which 1/d is 1/(2 d) of 16 bits. MODEL:
a folder, or a Hugging Face id.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from mlx_turbo import TurboConfig, get_backend, make_prompt_cache  # noqa: E402
from mlx_turbo.backends.device import device_name  # noqa: E402
from mlx_turbo.cache.memory_budget import MemoryBudget, MemoryBudgetError
from mlx_turbo.cache.single import TurboKVCache
from mlx_turbo.cli import common, plan
from mlx_turbo.integration.bit_budget import Prices, calibration_tokens, spend
from mlx_turbo.integration.memory import put_under_budget, shapes_of
from mlx_turbo.integration.prompt_cache import flatten_caches, memory_budget_of
from mlx_turbo.quality import metrics
from mlx_turbo.quality.baselines import make_plain_cache
from mlx_turbo.quality.cpu_products import use_numpy_products
from mlx_turbo.quality.style import (
    BLACK,
    BLUE,
    GRAY,
    LIGHT_GRAY,
    ORANGE,
    PURPLE,
    TEAL,
    add_titles,
    check_plot,
    save_png,
)

FIXED = ("turbo8", "turbo6", "turbo5", "turbo4", "turbo3", "turbo2")
BITS = [b / 16 for b in range(32, 137)]  # of auto:BITS, that are tried
COLORS = (BLUE, TEAL, PURPLE, ORANGE)


def load(args):
    """(model in args.dtype, tokenizer, tokens of the text)"""
    model, tokenizer = common.load_model(mlx_lm.load, args.model, "--model")
    if args.dtype != "model":
        model.set_dtype(getattr(mx, args.dtype))
    if mx.default_device().type == mx.DeviceType.cpu:
        model.set_dtype(mx.float32)
        model = use_numpy_products(model)
    text = Path(args.text or common.DEMO_MODEL / "stories.txt").read_text()
    tokens, end = [], args.skip + args.tokens
    for part in text.split("<|endoftext|>"):
        if len(tokens) >= end:
            break
        tokens += tokenizer.encode(part[: 12 * end])
    return model, tokenizer, tokens[args.skip : end]


def ours(cache):
    return [c for c in flatten_caches(cache) if isinstance(c, TurboKVCache)]


def bytes_at_end(model, config, n, chunk):
    """Bytes of the compressed caches of a configuration with n tokens, means included whether or not there are any; of
    windows with all that they may hold between two evictions."""
    cache, budget = make_prompt_cache(model, config), MemoryBudget(2**62)
    put_under_budget(cache, budget, shapes_of(model, cache, budget))
    return budget.nbytes_after(ours(cache), n, chunk)


def uncompressed_bytes(model, n):
    """Bytes that mlx-lm's own caches take with n tokens."""
    layers = plan.layers_of(model)
    return plan.cache_bytes(layers, [None] * len(layers), n)


def at_equal_bytes(model, prices, limit, n, chunk):
    """The most bits of auto:BITS whose caches take at most `limit` bytes with n tokens: (configuration, bytes), or
    None."""
    for bits in reversed(BITS):
        try:
            config = spend(TurboConfig(budget=bits), prices)
        except ValueError:
            return None
        if (taken := bytes_at_end(model, config, n, chunk)) <= limit:
            return config, taken
    return None


def read(model, tokens, caches, chunk, progress):
    """{name: {"kld": of each token, "nbytes": after each chunk, "ended": tokens, if the budget held no more}}; the
    others are compared with the first."""
    ids = mx.array(tokens)
    found = {name: {"kld": [], "nbytes": [], "ended": None} for name in caches}
    for start in range(0, len(tokens), chunk):
        part, log_p = ids[None, start : start + chunk], None
        for name, cache in caches.items():
            if found[name]["ended"] is not None:
                continue
            try:
                log_q = metrics.log_probabilities(model(part, cache=cache)[0])
            except MemoryBudgetError:
                found[name]["ended"] = start
                continue
            log_p = log_q if log_p is None else log_p
            found[name]["kld"] += metrics.kl_divergence(log_p, log_q).tolist()
            found[name]["nbytes"].append(sum(c.nbytes for c in flatten_caches(cache)))
        progress(part.shape[1])
    return found


def rows_of(found, caches, limits, args):
    """What is printed of each cache."""
    edges = np.linspace(0, args.tokens, args.bins + 1).astype(int)
    rows = []
    for name, of_cache in found.items():
        kld = np.array(of_cache["kld"])
        exact = np.flatnonzero(kld > args.exact)
        budget = memory_budget_of(caches[name])
        rows.append(
            {
                "kv": name,
                "limit": limits.get(name),
                "nbytes": of_cache["nbytes"][-1] if of_cache["nbytes"] else 0,
                "most_nbytes": max(of_cache["nbytes"], default=0),
                "kld": float(kld.mean()),
                "kld_by_length": [float(kld[a:b].mean()) if len(kld) >= b else None for a, b in zip(edges, edges[1:])],
                "exact_up_to": int(exact[0]) if len(exact) else len(kld),
                "ended": of_cache["ended"],
                "did": None if budget is None else budget.describe(),
                "nbytes_by_chunk": of_cache["nbytes"],
            }
        )
    return edges[1:].tolist(), rows


def plot(file, rows, edges, args, subtitle, footer):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True)
    colors = iter(COLORS)
    at = [min((i + 1) * args.chunk, args.tokens) for i in range(len(rows[0]["nbytes_by_chunk"]))]
    above.plot(at, [n / 1e6 for n in rows[0]["nbytes_by_chunk"]], color=BLACK, label="uncompressed")
    middles = [(a + b) / 2 for a, b in zip([0, *edges], edges)]
    for row in rows:
        if row["limit"] is None or not row["kv"].startswith("memory"):
            continue
        color, part = next(colors), row["kv"].split()[-1]
        held = row["nbytes_by_chunk"]
        above.plot(at[: len(held)], [n / 1e6 for n in held], color=color, label=f"budget of {part}")
        above.axhline(row["limit"] / 1e6, color=color, linestyle=":", linewidth=1)
        below.plot(middles, row["kld_by_length"], color=color, marker="o", label=f"budget of {part}")
        equal = next((r for r in rows if r["kv"].startswith("fixed") and r["kv"].split()[-1] == part), None)
        if equal is not None:
            label = f"fixed widths, the bytes of {part}"
            below.plot(middles, equal["kld_by_length"], color=color, linestyle="--", marker="x", label=label)
    for axes in above, below:
        axes.grid(True, color=LIGHT_GRAY, linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    above.set_ylabel("MB of all caches (dotted: the budget)")
    below.set_yscale("symlog", linthresh=1e-6)
    below.set_ylabel("KL divergence, nats per token")
    below.set_xlabel("tokens in the cache", color=GRAY)
    add_titles(figure, above, "A growing text in a budget of memory", subtitle, footer)
    save_png(figure, file)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--skip", type=int, default=0, help="tokens of the text before the window")
    parser.add_argument("--chunk", type=int, default=32)
    parser.add_argument("--fractions", type=float, nargs="+", default=[2, 4, 6], metavar="D")
    parser.add_argument("--floor", default="turbo2")
    parser.add_argument("--bins", type=int, default=8)
    parser.add_argument("--exact", type=float, default=1e-6, help="nats up to which a token counts as exact")
    parser.add_argument("--no-prices", action="store_true", help="every number counts alike")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16", "model"], default="float32")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--png")
    parser.add_argument("--model", default=common.DEMO_MODEL)
    parser.add_argument("--text", metavar="FILE")
    args = parser.parse_args()
    if args.png:
        check_plot(args.png)
    start = time.perf_counter()
    model, tokenizer, tokens = load(args)
    if len(tokens) < args.tokens:
        parser.error(f"--tokens: {args.tokens}, but the text has only {len(tokens)}")
    prices = Prices(model, calibration_tokens(tokenizer), TurboConfig(budget=4.5))
    whole = uncompressed_bytes(model, args.tokens)
    caches, limits = {"uncompressed": make_plain_cache(model)}, {}
    for d in args.fractions:
        config = TurboConfig(memory=int(whole / d), floor=args.floor)
        config = config if args.no_prices else replace(config, prices=spend(config, prices).prices)
        name = f"memory 1/{d:g}"
        caches[name], limits[name] = make_prompt_cache(model, config), config.memory
        if (equal := at_equal_bytes(model, prices, config.memory, args.tokens, args.chunk)) is not None:
            name = f"fixed 1/{d:g}"
            caches[name], limits[name] = make_prompt_cache(model, equal[0]), config.memory
    caches |= {name: make_prompt_cache(model, name) for name in FIXED}
    mx.reset_peak_memory()
    with tqdm(total=args.tokens, disable=not sys.stderr.isatty()) as bar:
        found = read(model, tokens, caches, args.chunk, bar.update)
    edges, rows = rows_of(found, caches, limits, args)
    where = f"{device_name()}, mlx {mx.__version__}, {get_backend().describe()}"
    dtype = "float32" if mx.default_device().type == mx.DeviceType.cpu else args.dtype
    what = (
        f"{args.tokens:,} tokens of {Path(args.text).name if args.text else 'held-out stories'} in chunks of "
        f"{args.chunk}, "
        f"{'embedded model' if args.model == common.DEMO_MODEL else Path(args.model).name}, {dtype}, floor {args.floor}"
    )
    if args.png:
        plot(args.png, rows, edges, args, what, f"scripts/memory_budget.py, {where}.")
    if args.json:
        seconds = round(time.perf_counter() - start, 1)
        out = {"what": what, "where": where, "lengths": edges, "uncompressed_nbytes": whole, "rows": rows}
        print(json.dumps(out | {"seconds": seconds}, indent=1))
        return
    print("| kv | MB at the end | exact up to | " + " | ".join(f"KLD, {n:,} tokens" for n in edges) + " |")
    print("|---|---|---|" + "---|" * len(edges))
    for row in rows[1:]:
        by_length = " | ".join("refused" if x is None else f"{x:.6f}" for x in row["kld_by_length"])
        print(f"| {row['kv']} | {row['nbytes'] / 1e6:.3f} | {row['exact_up_to']:,} | {by_length} |")
    print(f"\n{what}; {where}")
    for name in caches:
        if name.startswith("fixed"):
            print(name, [c.config.scheme.name for c in ours(caches[name])])
    for row in rows:
        if row["did"]:
            print(f"{row['kv']}: {row['did']}")


if __name__ == "__main__":
    main()
