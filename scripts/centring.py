#!/usr/bin/env python3
"""Which mean should be taken off keys with a large bias? Attention KL divergence of synthetic keys at 4 bits, as a
multiple of the same keys without bias, for no mean, one mean of the first tokens, and a mean per segment of tokens.

    python scripts/centring.py [--tokens 8192 32768] [--bits 4] [--json]

Keys: head_dim 128, a Gaussian signal of norm 22 (about the median of the biases of the keys of Qwen2.5-7B) plus a bias
of norm 600 that RoPE turns with the position, in some of its frequencies. Queries: 32 Gaussian ones, scaled so that
logits have a standard deviation of 4. NumPy, with mlx_turbo.quant.reference.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from mlx_turbo.quant import reference  # noqa: E402

D, SIGNAL, NORM, LOGITS, FIXED = 128, 22, 600, 4, 2048
SEGMENTS = (64, 128, 256, 1024)
BIASES = {  # RoPE pairs that carry it, base
    "none": ([], 1e6),
    "constant after RoPE": (None, 1e6),
    "low frequencies": (range(48, 64), 1e6),
    "low frequencies, base 1e4": (range(48, 64), 1e4),
    "middle frequencies": (range(16, 48), 1e6),
    "all frequencies": (range(64), 1e6),
}


def bias(rng, n, pairs, base):
    """[n, D], of norm NORM at every position."""
    b = rng.standard_normal(D)
    if pairs is not None:
        b *= np.isin(np.arange(D) % (D // 2), list(pairs))
    b *= NORM / max(np.linalg.norm(b), 1e-9)
    if pairs is None:
        return np.tile(b, (n, 1))
    angle = np.arange(n)[:, None] * base ** (-np.arange(D // 2) / (D // 2))
    x, y = b[: D // 2], b[D // 2 :]
    return np.concatenate([x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)], -1)


def means(keys, how):
    """What is subtracted from each key: None, ("fixed", n) or ("segment", n)."""
    if how is None:
        return None
    kind, n = how
    if kind == "fixed":
        return keys[:n].mean(0)
    return np.repeat([keys[i : i + n].mean(0) for i in range(0, len(keys), n)], n, axis=0)[: len(keys)]


def attention_kl(signal, error, queries):
    """KL of the attention weights: the bias adds the same to every logit, so the signal is the truth."""

    def log_weights(keys):
        logits = queries @ keys.T * (LOGITS / SIGNAL)
        logits -= logits.max(-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    p, q = log_weights(signal), log_weights(signal + error)
    return (np.exp(p) * (p - q)).sum(-1).mean()


def measure(n, bits):
    """Rows {"bias", "tokens", how: KL}, first without bias."""
    rng = np.random.default_rng(0)
    signal, queries = rng.standard_normal((n, D)) * SIGNAL / np.sqrt(D), rng.standard_normal((32, D))
    ways = {
        "not centred": None,
        f"first {FIXED:,}": ("fixed", FIXED),
        **{f"per {s:,}": ("segment", s) for s in SEGMENTS},
    }
    rows = []
    for name, (pairs, base) in BIASES.items():
        keys = signal + (0 if name == "none" else bias(rng, n, pairs, base))
        row = {"bias": name, "tokens": n}
        for way, how in ways.items():
            restored = reference.dequantize(reference.quantize(keys, bits, mean=means(keys, how)))
            row[way] = attention_kl(signal, restored - keys, queries)
        rows.append(row)
    return rows, list(ways)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    measured = [measure(n, args.bits) for n in args.tokens]
    if args.json:
        print(json.dumps([row for rows, _ in measured for row in rows], indent=1))
        return
    ways = measured[0][1]
    print(f"| Bias in | {' | '.join(ways)} |\n|{'---|' * (len(ways) + 1)}")
    for i, name in enumerate(BIASES):
        cells = [" / ".join(f"{rows[i][way] / rows[0]['not centred']:.3g}" for rows, _ in measured) for way in ways]
        print(f"| {name} | {' | '.join(cells)} |")
    unbiased = " / ".join(f"{rows[0]['not centred']:.4f}" for rows, _ in measured)
    print(f"\nMultiples of the KL divergence without bias and mean, {unbiased} nats with {args.tokens} tokens")


if __name__ == "__main__":
    main()
