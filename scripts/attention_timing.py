#!/usr/bin/env python3
"""What attention over a compressed cache costs on this machine, beside mlx-lm's own caches: three tables.

    python scripts/attention_timing.py              a minute
    python scripts/attention_timing.py --quick      short contexts, few repeats: to see that it runs
    python scripts/attention_timing.py --json       the same numbers, nothing else on stdout

1. Attention of one decode step at 4,096 and 16,384 tokens, cache update not included: 32 query heads, 8 kv heads,
   head_dim 128. Rows of `mlx-turbo bench kernels`, which has more of them.
2. Multi-head latent attention of one decode step, of 16 and of 128 heads over the same numbers of tokens, as mlx-lm's
   models write it: products with the RoPE keys (64 dims), and attention over latents (512) with these as a mask.
3. Python overhead per layer and token: update_and_fetch and the model's call of scaled_dot_product_attention with our
   door installed, one new token, layer after layer as a model does it, nothing evaluated inside the timed part. Steps
   in which our cache packs a block (one in 64) or mlx-lm's grows (one in 256) are among them; the median hides them.

Float16 where MLX computes on Metal, float32 on the CPU. On the CPU there is no kernel of ours: the fallback in MLX
operations is timed, and, for the overhead, also the Python side of the Metal path with kernels that do nothing (what
mx.fast.metal_kernel itself costs per call is then missing).
"""

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import mlx.core as mx  # noqa: E402
import mlx_lm.models.base as base  # noqa: E402
import numpy as np  # noqa: E402
from mlx_lm.models.cache import KVCache, QuantizedKVCache  # noqa: E402
from support.no_kernels import NoKernels

from mlx_turbo.backends import select
from mlx_turbo.backends.device import device_name  # noqa: E402
from mlx_turbo.bench import (
    common,
    timing,  # noqa: E402
)
from mlx_turbo.bench import contenders as contending
from mlx_turbo.bench.rows import describe_row, is_fault  # noqa: E402
from mlx_turbo.cache.single import TurboKVCache  # noqa: E402
from mlx_turbo.integration import attention
from mlx_turbo.quant.scheme import TurboConfig  # noqa: E402

N_HEADS, N_KV_HEADS, HEAD_DIM = 32, contending.N_KV_HEADS, 128
N_LAYERS = 8  # whose Python runs at a stretch; the first after an evaluation finds the processor's caches cold


# ---- 1: attention ----------------------------------------------------------------------------------------------
def time_attention(n_tokens, effort, dtype):
    """Rows of `bench kernels`: attention of one query token over n_tokens of each kind of cache."""
    backend, device = select.get_backend(), mx.default_device().type.name
    scheme = TurboConfig("turbo4").scheme
    grid = contending.Grid((n_tokens,), (HEAD_DIM,), (N_HEADS // N_KV_HEADS,), (scheme,), dtype)
    (contenders,) = contending.attention_contenders(grid, [backend], n_tokens, HEAD_DIM, device).values()
    contenders = [c for c in contenders if c.column != "NumPy reference"]
    rows = contending.measure(
        contenders,
        effort,
        {
            "what": "attention",
            "operation": "attention",
            "tokens": n_tokens,
            "head_dim": HEAD_DIM,
            "gqa": grid.gqa[0],
            "query_tokens": 1,
        },
    )
    for row in rows:
        if is_fault(row):
            raise SystemExit(f"attention_timing: {row['status']}: {describe_row(row)}: {row['problem']}")
        if row["status"] != "ok":
            print(f"{row['status']}: {describe_row(row)}: {row['problem']}", file=sys.stderr)
    return [row for row in rows if row["status"] == "ok"]


# ---- 2: latent attention ---------------------------------------------------------------------------------------
LATENT_DIMS, LATENT_HEADS = (512, 64), (16, 128)


def time_latents(n_tokens, effort, dtype):
    """Rows: seconds of attention of one query token over n_tokens latents."""
    rng = np.random.default_rng(0)

    def random(n_heads, n, dim):
        return mx.array(rng.standard_normal((1, n_heads, n, dim)).astype(np.float32)).astype(dtype)

    columns = {
        "uncompressed": f"MLX on the {mx.default_device().type.name.upper()}",
        "turbo4": select.get_backend().describe(),
    }
    runs = {}
    attention.install()
    try:
        for name, cache in ("uncompressed", KVCache()), ("turbo4", TurboKVCache("turbo4")):
            cache.update_and_fetch(*(random(1, n_tokens - 1, dim) for dim in LATENT_DIMS))
            mx.eval(cache.state)
            fetched = cache.update_and_fetch(*(random(1, 1, dim) for dim in LATENT_DIMS))
            for heads in LATENT_HEADS:
                queries = [random(heads, 1, dim) for dim in LATENT_DIMS]
                mx.eval(queries)
                runs[name, heads] = latent_run(cache, fetched, *queries)
        found = timing.interleave(runs, effort)
    finally:
        attention.uninstall()
    return [
        {
            "what": "latents",
            "name": name,
            "column": columns[name],
            "heads": heads,
            "tokens": n_tokens,
            **seconds_of(t),
            "times_uncompressed": t.median / found["uncompressed", heads].median,
        }
        for (name, heads), t in found.items()
    ]


def latent_run(cache, fetched, nope, rope):
    """What timing.interleave calls."""
    (latents, keys), scale = fetched, (LATENT_DIMS[0] // 4 + LATENT_DIMS[1]) ** -0.5

    def step():
        mask = (rope * scale) @ keys.swapaxes(-1, -2)
        return base.scaled_dot_product_attention(nope, latents, latents, cache=cache, scale=scale, mask=mask)

    return lambda calls: [step() for _ in range(calls)]


def seconds_of(t):
    """What a row says of a timing.Timing."""
    return {
        "n": t.n,
        "median_seconds": t.median,
        "low_seconds": t.low,
        "high_seconds": t.high,
        "uncertainty": t.uncertainty,
    }


# ---- 3: Python overhead ----------------------------------------------------------------------------------------
def filled(cache, n_tokens, rng, dtype):
    """The cache with n_tokens random tokens, evaluated."""
    cache.update_and_fetch(*(random_tokens(rng, N_KV_HEADS, n_tokens, dtype) for _ in "kv"))
    mx.eval(cache.state)
    return cache


def random_tokens(rng, n_heads, n, dtype):
    """From NumPy: after mx.random, MLX's thread is still busy while the next step is timed (5 us a layer)."""
    return mx.array(rng.standard_normal((1, n_heads, n, HEAD_DIM)).astype(np.float32)).astype(dtype)


def time_overhead(n_tokens, steps, dtype):
    """Rows: seconds of Python per layer and token, nothing evaluated inside."""
    mlx = f"MLX on the {mx.default_device().type.name.upper()}"
    kinds = {
        ("uncompressed", mlx): (KVCache, None),
        ("mlx-lm 4 bit", mlx): (lambda: QuantizedKVCache(bits=4), None),
        ("turbo4", select.get_backend().describe()): (TurboKVCache, None),
    }
    if select.default_name() == "cpu":
        stub = NoKernels()
        kinds["turbo4", stub.describe()] = TurboKVCache, stub
    rng = np.random.default_rng(0)
    layers = {
        kind: [filled(make(), n_tokens, rng, dtype) for _ in range(N_LAYERS)] for kind, (make, _) in kinds.items()
    }
    seconds = {kind: [] for kind in kinds}
    attention.install()
    try:
        for i in range(steps + 2):
            for kind, (_, stub) in kinds.items():
                with select.use_backend(stub) if stub else contextlib.nullcontext():
                    took = one_step(layers[kind], rng, dtype)
                if i >= 2:
                    seconds[kind].append(took)
    finally:
        attention.uninstall()
    found = {kind: timing.Timing.of(taken, 1) for kind, taken in seconds.items()}
    return [
        {
            "what": "python overhead",
            "name": name,
            "column": column,
            "tokens": n_tokens,
            **seconds_of(t),
            "times_mlx_lm_4_bit": t.median / found["mlx-lm 4 bit", mlx].median,
        }
        for (name, column), t in found.items()
    ]


def one_step(caches, rng, dtype):
    """Seconds of Python per layer; then the caches are evaluated, so that graphs do not grow."""
    new = [[random_tokens(rng, heads, 1, dtype) for heads in (N_HEADS, N_KV_HEADS, N_KV_HEADS)] for _ in caches]
    mx.eval(new)
    outs = []
    start = time.perf_counter()
    for cache, (queries, keys, values) in zip(caches, new):
        keys, values = cache.update_and_fetch(keys, values)
        outs.append(
            base.scaled_dot_product_attention(queries, keys, values, cache=cache, scale=HEAD_DIM**-0.5, mask=None)
        )
    took = time.perf_counter() - start
    del outs, keys, values
    mx.eval([cache.state for cache in caches])
    return took / len(caches)


# ---- tables ----------------------------------------------------------------------------------------------------
def print_tables(rows, dtype):
    print(
        f"{device_name()}, MLX {mx.__version__}, {contending.dtype_name(dtype)}: {N_HEADS} query heads, "
        f"{N_KV_HEADS} kv heads, head_dim {HEAD_DIM}. +-: half the 95 % interval of the median"
    )
    for what, title, unit, times, over in (
        ("attention", "Attention of one decode step, milliseconds", 1e-3, "times_uncompressed", "uncompressed"),
        (
            "latents",
            "Latent attention of one decode step, 512 + 64 dims, milliseconds",
            1e-3,
            "times_uncompressed",
            "uncompressed",
        ),
        (
            "python overhead",
            "Python per layer and token, microseconds, nothing evaluated",
            1e-6,
            "times_mlx_lm_4_bit",
            "mlx-lm 4 bit",
        ),
    ):
        print(f"\n{title}\n{'cache':<24}{'tokens':>8}{'median':>9}{'+-':>6}{'over ' + over:>18}   computed by")
        for row in rows:
            if row["what"] == what:
                name = row["name"] + (f", {row['heads']} heads" if "heads" in row else "")
                print(
                    f"{name:<24}{row['tokens']:>8}{row['median_seconds'] / unit:>9.2f}"
                    f"{row['uncertainty']:>6.0%}{row[times]:>17.2f}x   {row['column']}"
                )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short contexts, few repeats")
    parser.add_argument("--json", action="store_true", help="a list of rows on stdout, and nothing else there")
    args = parser.parse_args()
    dtype = mx.float32 if select.default_name() == "cpu" else mx.float16
    rows = []
    for n_tokens in (512,) if args.quick else (4096, 16384):
        print(f"attention over {n_tokens} tokens", file=sys.stderr, flush=True)
        effort = common.QUICK if args.quick else timing.Effort()
        rows += time_attention(n_tokens, effort, dtype) + time_latents(n_tokens, effort, dtype)
    print("python overhead", file=sys.stderr, flush=True)
    rows += time_overhead(256 if args.quick else 1024, 20 if args.quick else 300, dtype)
    if args.json:
        print(json.dumps([{**row, "dtype": contending.dtype_name(dtype)} for row in rows], indent=1))
    else:
        print_tables(rows, dtype)


if __name__ == "__main__":
    main()
