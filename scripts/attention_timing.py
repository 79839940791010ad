#!/usr/bin/env python3
"""What attention over a compressed cache costs on this machine, beside mlx-lm's own caches.

    python scripts/attention_timing.py              two tables; a minute
    python scripts/attention_timing.py --quick      short contexts, few repeats: to see that it runs
    python scripts/attention_timing.py --json       the same numbers, nothing else on stdout

1. Attention of one decode step, cache update not included: 32 query heads, 8 kv heads, head_dim 128. Medians and
   quartiles of interleaved repeats, each contender once per round, so that a busy machine slows all of them.
2. Python overhead per layer and token: update_and_fetch and the model's call of scaled_dot_product_attention with our
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

import mlx.core as mx
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import mlx_lm.models.base as base  # noqa: E402
from mlx_lm.models.cache import KVCache, QuantizedKVCache  # noqa: E402

from mlx_turbo import attention, ops  # noqa: E402
from mlx_turbo.cache import TurboKVCache  # noqa: E402
from mlx_turbo.kernels import MetalBackend, device_name  # noqa: E402

N_HEADS, N_KV_HEADS, HEAD_DIM = 32, 8, 128
SCALE = HEAD_DIM ** -0.5
N_LAYERS = 8  # whose Python runs at a stretch; the first after an evaluation finds the processor's caches cold


class NoKernels(MetalBackend):
    """The Python side of the Metal path: kernels return zeros at once, and are not tested."""

    def __init__(self):
        super().__init__(lambda *names, **options: self._zeros)

    @staticmethod
    def _zeros(*, output_shapes, output_dtypes, **arguments):
        return [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes)]

    def _run_check(self, what, check):
        pass

    def describe(self):
        return "metal path with kernels that do nothing"


def random_tokens(rng, n_heads, n, dtype):
    return mx.array(rng.standard_normal((1, n_heads, n, HEAD_DIM)).astype(np.float32)).astype(dtype)


def filled(cache, n_tokens, dtype):
    """The cache with n_tokens random tokens, evaluated."""
    rng = np.random.default_rng(0)
    for at in range(0, n_tokens, 2048):
        n = min(2048, n_tokens - at)
        cache.update_and_fetch(*(random_tokens(rng, N_KV_HEADS, n, dtype) for _ in "kv"))
        mx.eval(cache.state)
    return cache


def quartiles(seconds, unit):
    low, middle, high = np.percentile(seconds, (25, 50, 75)) / unit
    return {"median": float(middle), "quartiles": [float(low), float(high)]}


# ---- 1: attention ----------------------------------------------------------------------------------------------
def time_attention(n_tokens, repeats, dtype, names):
    """Rows: attention of one query token over n_tokens of each kind of cache, in milliseconds."""
    queries = random_tokens(np.random.default_rng(1), N_HEADS, 1, dtype)
    plain, affine, turbo = (filled(cache, n_tokens, dtype)
                            for cache in (KVCache(), QuantizedKVCache(bits=4), TurboKVCache("turbo4")))
    keys, values = plain.keys[:, :, :n_tokens], plain.values[:, :, :n_tokens]
    quantized, view = affine.keys_and_values(), turbo.keys_and_values()[0].view
    mx.eval(queries, keys, values, quantized)
    contenders = {
        "uncompressed": (names["mlx"], lambda: mx.fast.scaled_dot_product_attention(
            queries, keys, values, scale=SCALE)),
        "mlx-lm 4 bit": (names["mlx"], lambda: base.quantized_scaled_dot_product_attention(
            mx.array(queries), *quantized, scale=SCALE, mask=None, group_size=64, bits=4)),  # it scales in place
        "turbo4": (names["ours"], lambda: attention.attend(queries, view, scale=SCALE)),
    }
    seconds = {name: [] for name in contenders}
    for i in range(repeats + 2):
        for name, (_, attend) in contenders.items():
            start = time.perf_counter()
            mx.eval(attend())
            if i >= 2:  # warm
                seconds[name].append(time.perf_counter() - start)
    return [{"what": "attention", "cache": name, "backend": backend, "tokens": n_tokens, "dtype": str(dtype),
             "unit": "ms", "repeats": repeats, **quartiles(seconds[name], 1e-3),
             "over_uncompressed": float(np.median(seconds[name]) / np.median(seconds["uncompressed"]))}
            for name, (backend, _) in contenders.items()]


# ---- 2: Python overhead ----------------------------------------------------------------------------------------
def time_overhead(n_tokens, steps, dtype, names):
    """Rows: microseconds of Python per layer and token, nothing evaluated inside."""
    rng = np.random.default_rng(2)
    kinds = {
        ("uncompressed", names["mlx"]): (KVCache, None),
        ("mlx-lm 4 bit", names["mlx"]): (lambda: QuantizedKVCache(bits=4), None),
        ("turbo4", names["ours"]): (TurboKVCache, None),
    }
    if ops.metal_unavailable():
        stub = NoKernels()
        kinds["turbo4", stub.describe()] = TurboKVCache, stub
    layers = {kind: [filled(make(), n_tokens, dtype) for _ in range(N_LAYERS)] for kind, (make, _) in kinds.items()}
    seconds = {kind: [] for kind in kinds}
    attention.install()
    try:
        for i in range(steps + 2):
            for kind, (_, stub) in kinds.items():
                with ops.use_backend(stub) if stub else contextlib.nullcontext():
                    took = one_step(layers[kind], rng, dtype)
                if i >= 2:
                    seconds[kind].append(took)
    finally:
        attention.uninstall()
    affine = np.median(seconds["mlx-lm 4 bit", names["mlx"]])
    return [{"what": "python overhead", "cache": cache, "backend": backend, "tokens": n_tokens, "dtype": str(dtype),
             "unit": "us", "repeats": steps, **quartiles(took, 1e-6),
             "over_mlx_lm_4_bit": float(np.median(took) / affine)}
            for (cache, backend), took in seconds.items()]


def one_step(caches, rng, dtype):
    """Seconds of Python per layer; then the caches are evaluated, so that graphs do not grow."""
    new = [[random_tokens(rng, heads, 1, dtype) for heads in (N_HEADS, N_KV_HEADS, N_KV_HEADS)] for _ in caches]
    mx.eval(new)
    outs = []
    start = time.perf_counter()
    for cache, (queries, keys, values) in zip(caches, new):
        keys, values = cache.update_and_fetch(keys, values)
        outs.append(base.scaled_dot_product_attention(queries, keys, values, cache=cache, scale=SCALE, mask=None))
    took = time.perf_counter() - start
    del outs, keys, values
    mx.eval([cache.state for cache in caches])
    return took / len(caches)


# ---- tables ----------------------------------------------------------------------------------------------------
def print_tables(rows):
    print(f"{device_name()}, MLX {mx.__version__}, {rows[0]['dtype'].removeprefix('mlx.core.')}: "
          f"{N_HEADS} query heads, {N_KV_HEADS} kv heads, head_dim {HEAD_DIM}")
    for what, title, relative in (
            ("attention", "Attention of one decode step, milliseconds", "over_uncompressed"),
            ("python overhead", "Python per layer and token, microseconds, nothing evaluated", "over_mlx_lm_4_bit")):
        print(f"\n{title}\n{'cache':14}{'tokens':>8}{'median':>9}   {'quartiles':18}{relative.replace('_', ' '):>18}"
              "   backend")
        for row in rows:
            if row["what"] == what:
                low, high = row["quartiles"]
                spread = f"{low:.2f} .. {high:.2f}"
                print(f"{row['cache']:14}{row['tokens']:8}{row['median']:9.2f}   {spread:18}{row[relative]:17.2f}x"
                      f"   {row['backend']}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", help="context lengths of the first table (4096 16384)")
    parser.add_argument("--repeats", type=int, help="of each contender (30)")
    parser.add_argument("--quick", action="store_true", help="short contexts, few repeats")
    parser.add_argument("--json", action="store_true", help="a list of rows on stdout, and nothing else there")
    args = parser.parse_args()
    lengths = args.tokens or ((512,) if args.quick else (4096, 16384))
    repeats = args.repeats or (3 if args.quick else 30)
    on_metal = mx.metal.is_available() and mx.default_device().type == mx.DeviceType.gpu
    dtype = mx.float16 if on_metal else mx.float32
    names = {"mlx": "mlx on the " + ("GPU" if on_metal else "CPU"), "ours": ops.get_backend().describe()}

    rows = []
    for n_tokens in lengths:
        print(f"attention over {n_tokens} tokens", file=sys.stderr, flush=True)
        rows += time_attention(n_tokens, repeats, dtype, names)
    print("python overhead", file=sys.stderr, flush=True)
    rows += time_overhead(256 if args.quick else 1024, 20 if args.quick else 300, dtype, names)
    if args.json:
        json.dump(rows, sys.stdout, indent=1)
        print()
    else:
        print_tables(rows)


if __name__ == "__main__":
    main()
