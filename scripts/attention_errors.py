#!/usr/bin/env python3
"""Where a packed cache goes wrong in a real model: the errors of its attention, by layer and kv head, keys and values
apart, for three ways of preparing the keys.

    python scripts/attention_errors.py capture MODEL FILE.npz [--text FILE] [--tokens 1024]
    python scripts/attention_errors.py show FILE.npz [--bits 4] [--sink 4] [--recent 128] [--queries 64] [--heads]

`capture` runs the model once, in float32, and writes queries, keys and values of every layer. MODEL: a folder, or a
Hugging Face id. `show` packs them with mlx_turbo.quant.reference (NumPy, float64) and prints, for the newest queries:

    keys    KL(p || p') in nats of the attention weights p with exact keys from p' with packed ones: the mean over the
            queries of a kv head. A layer has that of its worst head, as `auto` does.
    output  |out' - out|^2 / |out|^2 of the attention's output, summed over the heads: with packed keys, with packed
            values, and with both. This one compares keys with values.

Ways: keys as they are ("plain"); without their mean per 128 tokens ("centred"); and multiplied by s^e per channel
before the rotation, the queries divided by it ("balanced", e = 1; "centred, s^e"), with

    s = sqrt(rms of the queries / rms of the keys, centred where the way is)

of the first 256 tokens, per kv head and channel. The rotation spreads the error evenly over the channels, so that of
a logit is in proportion to (sum q_i^2 / s_i^2) (sum k_i^2 s_i^2), which is least at this s (Cauchy-Schwarz). Some
models have channels whose queries or keys are all 0: an rms counts as at least FLOOR of its head's. "best": the best
of the centred ways, chosen head by head with the queries that measure it. Values are centred by their mean where it
carries half of their energy.
"""

import argparse
import contextlib
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from mlx_turbo.quant import reference  # noqa: E402

SEGMENT, FIRST = 128, 256  # tokens that share a mean; tokens that s is measured on
FLOOR = 1e-3
WAYS = {  # whether the keys are centred, exponent of s
    "plain": (False, 0),
    "centred": (True, 0),
    "balanced": (False, 1),
    "centred, s^1/2": (True, 0.5),
    "centred, s^3/4": (True, 0.75),
    "centred, s^1": (True, 1),
}


# ---- capture -------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def recorded_attention(layers):
    """Inside this context every call of mlx-lm's attention appends {"q", "k", "v", "scale", "visible"} to `layers`."""
    import mlx.core as mx
    import mlx_lm.models.base as base

    original = base.scaled_dot_product_attention

    def recording(queries, keys, values, cache, scale, mask=None, sinks=None, **options):
        n = queries.shape[2]
        seen = mx.tri(n, dtype=mx.bool_) if isinstance(mask, str) else mask
        if sinks is not None or options or seen is None or seen.dtype != mx.bool_ or seen.shape != (n, n):
            raise NotImplementedError("attention with sink logits, options, or a mask that is not boolean [n, n]")
        tensors = {"q": queries, "k": keys, "v": values, "visible": seen}
        layers.append(
            {name: np.array(x if x.dtype == mx.bool_ else x.astype(mx.float32)) for name, x in tensors.items()}
        )
        layers[-1]["scale"] = np.float64(scale)
        return original(queries, keys, values, cache, scale=scale, mask=mask)

    users = [
        m
        for name, m in list(sys.modules.items())
        if name.startswith("mlx_lm.models.") and getattr(m, "scaled_dot_product_attention", None) is original
    ]
    try:
        for module in users:
            module.scaled_dot_product_attention = recording
        yield
    finally:
        for module in users:
            module.scaled_dot_product_attention = original


def capture(args):
    import mlx.core as mx
    import mlx_lm

    from mlx_turbo.cli import common
    from mlx_turbo.quality.cpu_products import use_numpy_products

    model, tokenizer = common.load_model(mlx_lm.load, args.model, "--model")[:2]
    model.set_dtype(mx.float32)
    if mx.default_device().type == mx.DeviceType.cpu:
        model = use_numpy_products(model)
    tokens = tokenizer.encode(Path(args.text).read_text(encoding="utf-8")[: 20 * args.tokens])[: args.tokens]
    if len(tokens) < args.tokens:
        raise SystemExit(f"--text: {args.text} has {len(tokens)} tokens, {args.tokens} are needed")
    layers = []
    with recorded_attention(layers):
        mx.eval(model(mx.array(tokens)[None]))
    np.savez(args.file, **{f"{i} {name}": x for i, layer in enumerate(layers) for name, x in layer.items()})
    print(f"{args.file}: {len(layers)} layers, {len(tokens)} tokens")


def captured(file):
    """The layers of a file: [{"q": [n_heads, N, D], "k": [n_kv_heads, N, D], "v", "scale", "visible": bool [N, N]}]."""
    with np.load(file) as arrays:
        for i in range(1 + max(int(name.split()[0]) for name in arrays.files)):
            layer = {name: arrays[f"{i} {name}"] for name in ("q", "k", "v", "scale", "visible")}
            yield {name: x[0].astype(np.float64) if name in "qkv" else x for name, x in layer.items()}


# ---- the errors ----------------------------------------------------------------------------------------------
def segment_means(x):
    """The mean of each SEGMENT tokens of x [H, N, D], for every token."""
    means = [x[:, i : i + SEGMENT].mean(1, keepdims=True) for i in range(0, x.shape[1], SEGMENT)]
    return np.repeat(np.concatenate(means, 1), SEGMENT, 1)[:, : x.shape[1]]


def balance(q, k, exponent):
    """s^exponent [H, 1, D] by the first tokens of q [n_heads, N, D] and k [n_kv_heads, N, D], centred or not."""

    def rms(x):
        square = (x * x).mean(1, keepdims=True)
        return np.sqrt(np.maximum(square, FLOOR**2 * square.mean(-1, keepdims=True)))

    return (rms(q[:, :FIRST].reshape(len(k), -1, q.shape[-1])) / rms(k[:, :FIRST])) ** (exponent / 2)


def pack(x, bits, mean, exact):
    """x [H, N, D] as a packed cache gives it back, with its exact tokens (bool [N])."""
    packed = reference.dequantize(reference.quantize(x, bits, mean=mean))
    return np.where(exact[:, None], x, packed)


def packed_keys(q, k, bits, way, exact):
    centred, exponent = WAYS[way]
    s = balance(q, k - segment_means(k) if centred else k, exponent)
    return pack(k * s, bits, segment_means(k * s) if centred else None, exact) / s


def packed_values(v, bits, exact):
    mean = v.mean(1, keepdims=True)
    carried = (mean * mean).sum((1, 2), keepdims=True) * v.shape[1] / (v * v).sum((1, 2), keepdims=True)
    return pack(v, bits, np.where(carried > 0.5, mean, 0), exact)


def log_weights(q, k, visible, scale):
    """log softmax of the logits, [n_kv_heads, queries of its group, N]."""
    logits = scale * q @ k.swapaxes(1, 2)
    logits = np.where(np.tile(visible, (q.shape[1] // len(visible), 1)), logits, -1e30)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def errors(layer, bits, n_queries, n_sink, n_recent):
    """{"ways": {way: {"kl": by kv head [H], "keys": share, "both": share}}, "values": share}."""
    q, k, v = (layer[name] for name in "qkv")
    n_kv, n_tokens, D = k.shape
    exact = (np.arange(n_tokens) < n_sink) | (np.arange(n_tokens) >= n_tokens - n_recent)
    asked = q[:, -n_queries:].reshape(n_kv, -1, D)
    visible = layer["visible"][-n_queries:]
    log_p = log_weights(asked, k, visible, layer["scale"])
    p, restored = np.exp(log_p), packed_values(v, bits, exact)
    out = p @ v
    energy, found = (out * out).sum(), {}
    for way in WAYS:
        log_q = log_weights(asked, packed_keys(q, k, bits, way, exact), visible, layer["scale"])
        kl = (p * (log_p - log_q)).sum(-1).mean(-1)
        with_values = {"keys": v, "both": restored}
        found[way] = {"kl": kl.tolist()}
        found[way] |= {name: ((np.exp(log_q) @ x - out) ** 2).sum() / energy for name, x in with_values.items()}
    return {"ways": found, "values": ((p @ restored - out) ** 2).sum() / energy}


# ---- the tables ----------------------------------------------------------------------------------------------
def table(header, rows):
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(x if isinstance(x, str) else f'{x:.4g}' for x in row)} |")


def with_best(values):
    """The values of each way, and the least of the centred ones."""
    return [*values, min(x for x, (centred, _) in zip(values, WAYS.values()) if centred)]


def show(args):
    layers = []
    for layer in captured(args.file):
        layers.append(errors(layer, args.bits, args.queries, args.sink, args.recent))
        n_tokens = layer["k"].shape[1]
    if args.json:
        print(json.dumps({**vars(args), "tokens": n_tokens, "layers": layers}, indent=1, default=float))
        return
    print(
        f"{args.file}: {n_tokens:,} tokens, keys and values at {args.bits} bits, first {args.sink} and newest "
        f"{args.recent} exact, newest {args.queries} queries\n\nKL of the attention weights, nats, worst kv head:\n"
    )
    by_head = [list(map(with_best, zip(*(layer["ways"][way]["kl"] for way in WAYS)))) for layer in layers]
    worst = [list(map(max, zip(*heads))) for heads in by_head]
    table(["layer", *WAYS, "best"], [*([str(i), *row] for i, row in enumerate(worst)), ["**sum**", *np.sum(worst, 0)]])
    if args.heads:
        print("\nThe same by kv head:\n")
        rows = [[f"{i}.{h}", *row] for i, heads in enumerate(by_head) for h, row in enumerate(heads)]
        table(["layer.head", *WAYS, "best"], rows)
    print("\nError of the attention's output as a share of its energy:\n")
    some = [way for way in WAYS if way != "balanced"]
    rows = [[*(layer["ways"][way]["keys"] for way in some), layer["values"]] for layer in layers]
    header = ["layer", *(f"keys, {way}" for way in some), "values"]
    table(header, [*([str(i), *row] for i, row in enumerate(rows)), ["**mean**", *np.mean(rows, 0)]])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    of_capture, of_show = commands.add_parser("capture"), commands.add_parser("show")
    of_capture.add_argument("model")
    stories = Path(__file__).resolve().parent.parent / "mlx_turbo" / "demo_model" / "stories.txt"
    of_capture.add_argument("--text", default=str(stories))
    of_capture.add_argument("--tokens", type=int, default=1024)
    for name, default in (("bits", 4), ("queries", 64), ("sink", 4), ("recent", 128)):
        of_show.add_argument(f"--{name}", type=int, default=default)
    for name in ("heads", "json"):
        of_show.add_argument(f"--{name}", action="store_true")
    for command in (of_capture, of_show):
        command.add_argument("file")
    args = parser.parse_args()
    (capture if args.command == "capture" else show)(args)


if __name__ == "__main__":
    main()
