#!/usr/bin/env python3
"""What a decode step's attention kernels do, counted in the simulator (tests/metalsim), beside MLX's own fp16 kernels.

    python scripts/kernel_cost.py                                    the table of all configurations, a minute
    python scripts/kernel_cost.py --scheme turbo4 --head-dim 128     some of it
    python scripts/kernel_cost.py --json > cost.json                 a list of rows, nothing else on stdout
    python scripts/kernel_cost.py --latents                          latent attention, for 16 and 128 heads

One query token attends to --tokens packed tokens of one kv head; every feature (masks, attention sinks, left
padding) is compiled in and none is used. Counts are per (key, value) element pair, that is divided by tokens *
head_dim, and sum all launches of the step: attend and merge here, sdpa_vector_2pass_1 and 2pass_2 of MLX, whose text
comes from the installed wheel. A simdgroup of ours gets --tokens-per-block tokens, 512 as in a cache of 64K tokens
with 8 kv heads; shorter caches have shorter blocks, from 128 on, which keep more of a chip busy.
tests/metalsim/README.md says what is counted and what is not.

The simulator is no GPU: nothing here is a measurement of time. The last table is a prediction from these counts.

Runs on Linux; needs `pip install ziglang==0.17.1` (or METALSIM_CLANG).
"""

import argparse
import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import metalsim  # noqa: E402

from mlx_turbo.backends.attend_launch import AttendTuning  # noqa: E402
from mlx_turbo.backends.metal import MetalBackend  # noqa: E402
from mlx_turbo.backends.self_test import (  # noqa: E402
    random_array,
    random_cached_side,
    relative_error,
    restored_tokens,
    rope_logits,
    to_float64,
)
from mlx_turbo.backends.sides import RopePart  # noqa: E402
from mlx_turbo.quant import reference  # noqa: E402
from mlx_turbo.quant.scheme import TurboConfig  # noqa: E402

HEAD_DIMS, GROUPS, SCHEMES = (64, 128, 256), (1, 4, 8), ("turbo4", "turbo3", "turbo2", "turbo5", "turbo6", "turbo8v4")
PARTS = "sink", "codes", "scale", "recent"
CLASSES = ("fma", "fp", "int", "bit", "cvt", "cmp", "branch", "math", "idiv", "fdiv")
MLX_BLOCKS = 64  # of 2pass_1: what MLX takes for a few thousand tokens; their number hardly changes the counts
# Query heads per thread of the 2pass_1_gqa kernels that MLX 0.32 instantiates, by (head_dim, GQA factor).
MLX_GQA = {(64, 8): 8, (128, 8): 4}

# The prediction: (GPU cores, GHz, GB/s) of each chip, 128 lanes per core, of which so many per cycle are kept busy.
CHIPS = {"M1": (8, 1.28, 68), "M2 Pro": (19, 1.4, 200), "M4 Max": (40, 1.58, 546), "M5 class": (10, 1.6, 153)}
LANES_PER_CORE, ISSUE_RATE = 128, 0.5


class CountingBackend(MetalBackend):
    """The Metal backend in the simulator; `stats` has each launch since it was last emptied."""

    def __init__(self, tokens_per_block):
        super().__init__(self._counted)
        self.stats, self.tuning = {}, AttendTuning(tokens_per_block=tokens_per_block)

    def _counted(self, name, *args, **options):
        kernel = metalsim.metal_kernel(name, *args, **options)

        def launch(**arguments):
            outs = kernel(**arguments)
            self.stats[name.removeprefix("turbo_")] = metalsim.last()
            return outs

        return launch


# ---- counting --------------------------------------------------------------------------------------------------
def count_ours(backend, scheme, head_dim, gqa, counts):
    """{launch: Stats} of one step, and the bytes of the cache's tokens. Raises if the result is wrong."""
    rng = np.random.default_rng(0)
    keys, values = (
        random_cached_side(rng, (1, 1, head_dim), counts, bits, mx.float16)
        for bits in (scheme.key_bits, scheme.value_bits)
    )
    k, v = (mx.array(restored_tokens(side, counts).astype(np.float32)) for side in (keys, values))
    queries = mx.array(rng.standard_normal((1, gqa, 1, head_dim)).astype(np.float16))
    scale = head_dim**-0.5
    backend.attend(queries, keys, values, counts, scale=scale)  # the first call also tests the kernels
    backend.stats.clear()
    out = backend.attend(queries, keys, values, counts, scale=scale).astype(mx.float32)
    want = mx.fast.scaled_dot_product_attention(queries.astype(mx.float32), k, v, scale=scale)
    error = (mx.abs(out - want).max() / mx.abs(want).max()).item()
    if not error < 2e-3:  # float16 output
        raise SystemExit(f"attend is wrong at {scheme}, head_dim {head_dim}, {gqa} query heads: error {error:.1e}")
    n_sink, n_packed, n_recent = counts
    exact = 2 * 2 * (n_sink + n_recent) * head_dim
    return dict(backend.stats), exact + sum(a.nbytes for side in (keys, values) for a in (side.codes, side.scale))


def requested(stats, sides="kv"):
    """Bytes that one launch of ours requests of the cache's buffers."""
    return sum(stats.read_bytes[f"{side}_{part}"] for side in sides for part in PARTS)


def mlx_library():
    """MLX's sdpa_vector.h from the installed wheel, no mask, no sinks."""
    path = Path(mx.__file__).parent / "include/mlx/backend/metal/kernels/sdpa_vector.h"
    text = "\n".join(line for line in path.read_text().splitlines() if not line.startswith('#include "mlx/'))
    constants = {i: False for i in range(20, 26)} | {26: MLX_BLOCKS}
    return metalsim.Library(text, constants), "sdpa_vector_2pass_1_gqa" in text


def count_mlx(library, head_dim, gqa, n_tokens, heads_per_thread=None):
    """[Stats of 2pass_1 (or its gqa variant), Stats of 2pass_2] over a float16 cache."""
    rng, half, D = np.random.default_rng(0), np.float16, head_dim
    q, k, v = (rng.standard_normal(shape).astype(half) for shape in ((gqa, 1, D), (1, n_tokens, D), (1, n_tokens, D)))
    head, row = np.uint64(n_tokens * D), np.uint64(D)
    arguments = dict(
        queries=q,
        keys=k,
        values=v,
        N=np.int32(n_tokens),
        scale=np.float32(D**-0.5),
        k_head_stride=head,
        k_seq_stride=row,
        v_head_stride=head,
        v_seq_stride=row,
    )
    outputs = {
        "out": ((gqa, 1, MLX_BLOCKS, D), half),
        "sums": ((gqa, MLX_BLOCKS), np.float32),
        "maxs": ((gqa, MLX_BLOCKS), np.float32),
    }
    kernel = f"sdpa_vector_2pass_1<float16_t, {D}>"
    if heads_per_thread:
        kernel = f"sdpa_vector_2pass_1_gqa<float16_t, {D}, {D}, {gqa}, {heads_per_thread}>"
    partials = library(kernel, arguments, outputs, (32, gqa, MLX_BLOCKS), (32, gqa, 1))
    stats = [metalsim.last()]
    out = library(
        f"sdpa_vector_2pass_2<float16_t, {D}>",
        dict(partials=partials["out"], sums=partials["sums"], maxs=partials["maxs"], blocks=np.int32(MLX_BLOCKS)),
        {"out": ((gqa, 1, D), half)},
        (gqa * 1024, 1, 1),
        (1024, 1, 1),
    )["out"]
    logits = (q[:, 0].astype(np.float64) @ k[0].T.astype(np.float64)) * D**-0.5
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    want = weights @ v[0] / weights.sum(-1, keepdims=True)
    assert np.abs(out[:, 0] - want).max() < 5e-3 * np.abs(want).max(), f"{kernel} computes something wrong"
    return stats + [metalsim.last()]


def total_ops(stats):
    return sum(stats.ops.values())


def summary(launches, cache_read, fp16_bytes, n_pairs):
    """What is reported of a step with these launches (a list of Stats)."""
    return {
        "ops_per_pair": sum(map(total_ops, launches)) / n_pairs,
        "ops_by_class": {c: sum(s.ops.get(c, 0) for s in launches) / n_pairs for c in CLASSES},
        "cache_reads_vs_fp16": cache_read / fp16_bytes,
        "simd_ops_per_pair": sum(s.simd_ops for s in launches) / n_pairs,
        "threadgroup_bytes": max(s.threadgroup_size for s in launches),
    }


def measure_mlx(library, has_gqa, head_dim, gqa, n_tokens):
    """{kernel: summary} of MLX's fp16 kernels for this shape."""
    kernels = {"2pass_1": None}
    if has_gqa and (head_dim, gqa) in MLX_GQA:
        kernels["2pass_1_gqa"] = MLX_GQA[head_dim, gqa]
    out, n_pairs = {}, n_tokens * head_dim
    for name, heads_per_thread in kernels.items():
        first, second = count_mlx(library, head_dim, gqa, n_tokens, heads_per_thread)
        read = first.read_bytes["keys"] + first.read_bytes["values"]
        out[name] = summary([first, second], read, 4 * n_pairs, n_pairs)
        out[name]["first_pass_ops_per_pair"] = total_ops(first) / n_pairs
    return out


def measure(backend, scheme, head_dim, gqa, counts, fp16):
    """One row. fp16: what `measure_mlx` gave for this shape."""
    launches, held = count_ours(backend, scheme, head_dim, gqa, counts)
    n_pairs = sum(counts) * head_dim
    read = requested(launches["attend"])
    row = summary(list(launches.values()), read, 4 * n_pairs, n_pairs)
    best = min(fp16, key=lambda name: fp16[name]["ops_per_pair"])
    row |= {
        "attend_ops_per_pair": total_ops(launches["attend"]) / n_pairs,
        "merge_ops_per_pair": total_ops(launches["merge"]) / n_pairs if "merge" in launches else 0.0,
        "launches": len(launches),
        "bytes_read_over_packed": read / held,
        "bytes_vs_fp16": row.pop("cache_reads_vs_fp16"),
        "mlx_fp16_kernel": best,
        "mlx_fp16_ops_per_pair": fp16[best]["ops_per_pair"],
        "mlx_fp16": fp16,
    }
    row["predicted_fp16_over_ours"] = {
        chip: predicted_ns(chip, head_dim, row["mlx_fp16_ops_per_pair"], 1.0)
        / predicted_ns(chip, head_dim, row["ops_per_pair"], row["bytes_vs_fp16"])
        for chip in CHIPS
    }
    return {
        "head_dim": head_dim,
        "gqa": gqa,
        "scheme": scheme.name,
        "tokens": counts[1],
        "exact_tokens": counts[0] + counts[2],
        "tokens_per_block": backend.tuning.tokens_per_block,
    } | row


def predicted_ns(chip, head_dim, ops_per_pair, bytes_vs_fp16):
    """Nanoseconds per token and kv head if the chip is bound by operations or by bytes, whichever takes longer."""
    cores, ghz, gigabytes = CHIPS[chip]
    compute = head_dim * ops_per_pair / (cores * LANES_PER_CORE * ghz * ISSUE_RATE)
    return max(compute, 4 * head_dim * bytes_vs_fp16 / gigabytes)


# ---- latent attention ------------------------------------------------------------------------------------------
LATENT_DIM, ROPE_DIM, LATENT_HEADS = 512, 64, (16, 128)


def measure_latents(backend, scheme, heads, n_tokens):
    """{how: (operations per (key, value) pair, {what: bytes requested per token})} of attend.metal: latents as keys and
    as values of their own with the RoPE part as a mask, as keys and values in one, and that with packed RoPE keys."""
    rng, counts = np.random.default_rng(0), (0, n_tokens, 0)
    latents, keys = (
        random_cached_side(rng, (1, 1, d), counts, bits, mx.float16)
        for d, bits in ((LATENT_DIM, scheme.key_bits), (ROPE_DIM, scheme.value_bits))
    )
    rope = RopePart(random_array(rng, (1, heads, 1, ROPE_DIM), mx.float16), keys)
    queries = random_array(rng, (1, heads, 1, LATENT_DIM), mx.float16)
    restored, added, scale = restored_tokens(latents, counts), rope_logits(rope, counts), LATENT_DIM**-0.5
    want = reference.attention(to_float64(queries), restored, restored, scale=scale, mask=added)
    mask, out = mx.array(added.astype(np.float32)).astype(mx.float16), {}
    for how, values, options in (
        ("keys and values, a mask", latents._replace(), dict(mask=mask)),
        ("one, a mask", latents, dict(mask=mask)),
        ("one, and RoPE keys", latents, dict(rope=rope)),
    ):
        backend.run_check = lambda what, check: None
        got = to_float64(backend.attend(queries, latents, values, counts, scale=scale, **options))
        if not relative_error(got, want) < 2e-2:  # a float16 mask of logits up to 30
            raise SystemExit(f"attend is wrong for {heads} heads, {how}: error {relative_error(got, want):.1e}")
        stats = backend.stats["attend"]
        read = {
            "latents": requested(stats, "k") + requested(stats, "v") * ("rope" not in options),
            "RoPE keys": requested(stats, "v") * ("rope" in options),
            "mask": stats.read_bytes["mask"],
        }
        out[how] = total_ops(stats) / (n_tokens * LATENT_DIM), {k: n / n_tokens for k, n in read.items()}
    held = [sum(a.nbytes for a in (side.codes, side.scale)) / n_tokens for side in (latents, keys)]
    return out, held


def print_latents(backend, schemes, n_tokens):
    print(
        f"Latents of {LATENT_DIM} dims and RoPE keys of {ROPE_DIM}: {n_tokens} packed tokens, one query token.\n"
        "Operations of attend.metal per (key, value) pair, RoPE part included where it reads the RoPE keys;\n"
        "bytes per token that all threadgroups request (held: packed).\n"
    )
    for scheme in schemes:
        for heads in LATENT_HEADS:
            rows, held = measure_latents(backend, scheme, heads, n_tokens)
            print(f"{scheme}, {heads} heads; held: latents {held[0]:.0f}, RoPE keys {held[1]:.0f}")
            for how, (ops, read) in rows.items():
                print(f"  {how:24}{ops:8.1f}   " + ", ".join(f"{k} {n:.0f}" for k, n in read.items()))


# ---- tables ----------------------------------------------------------------------------------------------------
def print_tables(rows):
    first = rows[0]
    print(
        f"Counted in the simulator, MLX {mx.__version__}: one query token, one kv head, {first['tokens']} packed"
        f" and {first['exact_tokens']} exact tokens, {first['tokens_per_block']} a block.\n"
        "Operations per (key, value) element pair, all launches of a step. x fp16: over the cheaper of MLX's kernels."
        "\n"
    )
    print(
        f"{'D':>3} {'G':>2} {'':12}{'ops':>7}{'x fp16':>7}{'attend':>8}{'merge':>7}{'bytes/held':>11}{'x fp16':>7}"
        f"{'simd/token':>11}{'tg bytes':>9}   " + "".join(f"{c:>7}" for c in CLASSES)
    )
    shown = set()
    for row in rows:
        where = row["head_dim"], row["gqa"]
        if where not in shown:
            for name, m in row["mlx_fp16"].items():
                print_row(
                    where,
                    "fp16 gqa" if "gqa" in name else f"fp16 {name}",
                    m,
                    m["first_pass_ops_per_pair"],
                    m["cache_reads_vs_fp16"],
                    1.0,
                    row["mlx_fp16_ops_per_pair"],
                )
            shown.add(where)
        print_row(
            where,
            row["scheme"],
            row,
            row["attend_ops_per_pair"],
            row["bytes_read_over_packed"],
            row["bytes_vs_fp16"],
            row["mlx_fp16_ops_per_pair"],
        )
    print(
        "\nops: of all launches. attend: of the first (for fp16: 2pass_1), merge: of the second. bytes/held:"
        " requested by threads over held by the cache\n"
        "(fp16: a cache line serves several heads). x fp16: bytes of the cache."
        " simd: simdgroup functions per simdgroup. tg: threadgroup memory.\n"
    )
    print(
        "PREDICTION, not a measurement: time of MLX's fp16 kernels over ours (above 1: ours is faster).\n"
        f"Assumed: the longer of operations / (cores * {LANES_PER_CORE} lanes * GHz * {ISSUE_RATE} issue rate)"
        " and bytes / bandwidth; each byte comes from DRAM once;\n"
        "no latency, no spills, loads cost nothing: optimistic. "
        + "; ".join(f"{chip}: {c} cores, {ghz} GHz, {bw} GB/s" for chip, (c, ghz, bw) in CHIPS.items())
        + ".\n"
    )
    print(f"{'D':>3} {'G':>2} {'':12}" + "".join(f"{chip:>10}" for chip in CHIPS))
    for row in rows:
        print(
            f"{row['head_dim']:3} {row['gqa']:2} {row['scheme']:12}"
            + "".join(f"{x:10.2f}" for x in row["predicted_fp16_over_ours"].values())
        )


def print_row(where, name, m, first_launch, reads, bytes_vs_fp16, fp16_ops):
    print(
        f"{where[0]:3} {where[1]:2} {name:12}{m['ops_per_pair']:7.2f}{m['ops_per_pair'] / fp16_ops:7.2f}"
        f"{first_launch:8.2f}{m['ops_per_pair'] - first_launch:7.2f}{reads:11.3f}{bytes_vs_fp16:7.3f}"
        f"{m['simd_ops_per_pair'] * where[0]:11.3f}{m['threadgroup_bytes']:9}   "
        + "".join(f"{m['ops_by_class'][c]:7.2f}" for c in CLASSES)
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gqa", type=int, nargs="+", default=GROUPS, help="query heads per kv head")
    parser.add_argument("--head-dim", type=int, nargs="+", default=HEAD_DIMS)
    parser.add_argument("--scheme", nargs="+", default=SCHEMES, help="such as turbo4 or turbo8v4")
    parser.add_argument("--tokens", type=int, default=2048, help="packed tokens")
    parser.add_argument("--tokens-per-block", type=int, default=512, help="of a simdgroup")
    parser.add_argument(
        "--exact",
        action="store_true",
        help="beside the packed tokens, as many exact ones (sink and recent) as a cache has by default",
    )
    parser.add_argument("--latents", action="store_true", help="latent attention instead, of one token")
    parser.add_argument("--json", action="store_true", help="a list of rows on stdout, and nothing else there")
    args = parser.parse_args()
    try:
        metalsim.compile.runtime()
        schemes = [TurboConfig(scheme=s).scheme for s in args.scheme]
    except (RuntimeError, ValueError) as e:
        raise SystemExit(f"kernel_cost: {e}") from None
    if not all(s.key_bits and s.value_bits for s in schemes) or min(args.tokens, args.tokens_per_block, *args.gqa) < 1:
        raise SystemExit(
            "kernel_cost: needs schemes that pack keys and values, and at least one token, token per block"
            " and query head"
        )
    config = TurboConfig()
    counts = (config.sink, args.tokens, config.recent) if args.exact else (0, args.tokens, 0)

    backend, (library, has_gqa) = CountingBackend(args.tokens_per_block), mlx_library()
    if args.latents:
        return print_latents(backend, schemes, args.tokens)
    n_rows, rows = len(args.head_dim) * len(args.gqa) * len(schemes), []
    for head_dim in args.head_dim:
        for gqa in args.gqa:
            fp16 = measure_mlx(library, has_gqa, head_dim, gqa, sum(counts))
            for scheme in schemes:
                print(
                    f"\r{len(rows) + 1} of {n_rows}: {scheme}, head_dim {head_dim}, G = {gqa}    ",
                    end="",
                    file=sys.stderr,
                    flush=True,
                )
                rows.append(measure(backend, scheme, head_dim, gqa, counts, fp16))
    print(file=sys.stderr)
    if args.json:
        json.dump(rows, sys.stdout, indent=1)
        print()
    else:
        print_tables(rows)


if __name__ == "__main__":
    main()
