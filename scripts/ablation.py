#!/usr/bin/env python3
"""What each protection of the cache contributes, alone and together: KL divergence of the embedded model's output.

    python scripts/ablation.py [--tokens 768] [--windows 2] [--chunk 16] [--json] [--png FILE]
    python scripts/ablation.py --auto-cost

A row is a configuration; windows of held-out stories are read through its cache and an uncompressed one, in chunks of
16, in float32. Bits are resident bits per value: 8 * bytes of the cache / numbers it stands for, at the end of the
window, and for 32,768 tokens of a 16-bit model. The windows of exact tokens are large against 768 tokens and small
against 32,768: compare rows of equal bits in the column that is meant. --auto-cost: how much longer the first prompt
chunk takes with `auto` than with turbo4.
"""
import argparse
import json
import statistics
import sys
import time

import mlx.core as mx
import mlx_lm
from mlx_lm.models.cache import KVCache

from mlx_turbo import TurboConfig, TurboKVCache, cli, fidelity, get_backend, models
from mlx_turbo.kernels import device_name

LEAST = dict(scale="least-squares", centre=False)  # the cache without any of the protections
NOTHING = dict(sink=0, recent=0, block=16)
ROWS = {
    "4 bits, the paper's scale, nothing else": TurboConfig("turbo4", scale="norm", centre=False, **NOTHING),
    "+ least-squares scale": TurboConfig("turbo4", **LEAST, **NOTHING),
    "+ inner-product scale": TurboConfig("turbo4", centre=False, **NOTHING),
    "+ centring": TurboConfig("turbo4", **NOTHING),
    "+ sink 4": TurboConfig("turbo4", sink=4, recent=0, block=16),
    "+ recent 64 = the default": TurboConfig("turbo4"),
    "default without sink": TurboConfig("turbo4", sink=0),
    "default without recent": TurboConfig("turbo4", recent=0, block=16),
    "default without centring": TurboConfig("turbo4", centre=False),
    "default with least squares": TurboConfig("turbo4", scale="least-squares"),
    "sink 64": TurboConfig("turbo4", sink=64),
    "recent 32": TurboConfig("turbo4", recent=32),
    "recent 128": TurboConfig("turbo4", recent=128),
    "first and last layer's keys at 8 bits": TurboConfig("turbo4", boundary=1),
    "turbo3": TurboConfig("turbo3"),
    "turbo3, least squares, uncentred": TurboConfig("turbo3", **LEAST),
    "turbo2": TurboConfig("turbo2"),
    "turbo2, least squares, uncentred": TurboConfig("turbo2", **LEAST),
    "turbo4v3": TurboConfig("turbo4v3"),
    "turbo3v4": TurboConfig("turbo3v4"),
    "turbo8v2": TurboConfig("turbo8v2"),
    "turbo8v3": TurboConfig("turbo8v3"),
    "turbo8v4": TurboConfig("turbo8v4"),
    "turbo8": TurboConfig("turbo8"),
}


def load():
    """(the embedded model in float32, its held-out stories as tokens)"""
    model, tokenizer = cli.load_model(mlx_lm.load, cli.DEMO_MODEL, "--model")
    model.set_dtype(mx.float32)
    text = (cli.DEMO_MODEL / "stories.txt").read_text()
    return model, mx.array(sum((tokenizer.encode(t) for t in text.split("<|endoftext|>")), []))


def bits_at(config, n_tokens, n_layers, heads, head_dim):
    """Resident bits per value of an uncentred float16 cache of n_tokens, measured on one."""
    total = values = 0
    for layer in range(n_layers):
        cache = TurboKVCache(config.for_layer(layer, n_layers))
        for at in range(0, n_tokens, 2048):
            cache.update_and_fetch(*2 * [mx.random.normal((1, heads, min(2048, n_tokens - at), head_dim)).astype(mx.float16)])
        total, values = total + 8 * cache.nbytes, values + 2 * heads * n_tokens * head_dim
    return total / values


def measure(model, windows, chunk, progress):
    """KLD per row and window, and resident bits at the end of the last window: {row: ([kld], bits)}."""
    out = {name: ([], None) for name in ROWS}
    for w, window in enumerate(windows):
        plain = [KVCache() for _ in model.layers]
        caches = {name: models.make_prompt_cache(model, config) for name, config in ROWS.items()}
        sums = dict.fromkeys(ROWS, 0.0)
        for at in range(0, len(window) - 1, chunk):
            inputs = window[None, at:min(at + chunk, len(window) - 1)]
            log_p = fidelity.log_probabilities(model(inputs, cache=plain)[0])
            for name, cache in caches.items():
                log_q = fidelity.log_probabilities(model(inputs, cache=cache)[0])
                sums[name] += fidelity.kl_divergence(log_p, log_q).sum().item()
            progress(f"window {w + 1} of {len(windows)}, {at} tokens")
        for name, cache in caches.items():
            values = sum(2 * c._sides[0].recent.shape[1] * c.offset * c._sides[0].head_dim for c in cache)
            out[name] = out[name][0] + [sums[name] / (len(window) - 1)], sum(8 * c.nbytes for c in cache) / values
    return out


def auto_cost(model, tokens, repeats=9):
    """Seconds of the first prompt chunk with turbo4 and with auto: medians, interleaved."""
    seconds = {"turbo4": [], "auto": []}
    for _ in range(repeats + 1):
        for name, times in seconds.items():
            cache = models.make_prompt_cache(model, name)
            start = time.perf_counter()
            mx.eval(model(tokens[None], cache=cache), [c.state for c in cache])
            times.append(time.perf_counter() - start)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=768)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--chunk", type=int, default=16)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--auto-cost", action="store_true")
    args = parser.parse_args()
    model, tokens = load()
    where = f"{device_name()}, mlx {mx.__version__}, {get_backend().describe()}"
    if args.auto_cost:
        cost = auto_cost(model, tokens[:2048])
        print(f"first chunk of 2,048 tokens: turbo4 {cost['turbo4']:.3f} s, auto {cost['auto']:.3f} s, "
              f"{cost['auto'] / cost['turbo4'] - 1:+.1%}\n{where}")
        return
    def progress(text):
        if sys.stderr.isatty():
            print(f"\r{text}   ", end="", file=sys.stderr, flush=True)

    windows = [tokens[i * args.tokens:(i + 1) * args.tokens] for i in range(args.windows)]
    attention = model.layers[0].self_attn
    shape = len(model.layers), attention.n_kv_heads, attention.k_norm.weight.shape[0]
    rows = [{"configuration": name, "kld": statistics.mean(kld), "kld_of_windows": kld, "bits_here": bits,
             "bits_32k": bits_at(ROWS[name], 32768, *shape)}
            for name, (kld, bits) in measure(model, windows, args.chunk, progress).items()]
    if args.json:
        print(json.dumps({"where": where, "tokens": args.tokens, "chunk": args.chunk, "rows": rows}, indent=1))
        return
    print(f"| Configuration | KLD (nats) | bits per value, {args.tokens} tokens of float32 | 32,768 of float16 |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['configuration']} | {row['kld']:.5f} | {row['bits_here']:.2f} | {row['bits_32k']:.3f} |")
    print(f"\n{where}")


if __name__ == "__main__":
    main()
