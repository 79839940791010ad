#!/usr/bin/env python3
"""Operations and bytes per value of quantize.metal, dequantize.metal and requantize.metal, counted in the simulator
(Linux).

    python scripts/packing_cost.py [--json]

Needs the extra `test`. 64 vectors of float16; operations of all classes; bytes of the vectors, codes and scales.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

CASES = ((64, 4), (80, 4), (96, 4), (128, 4), (256, 4), (576, 4), (128, 3), (128, 2), (128, 5), (128, 6), (128, 8))
FEWER = ((64, 6, 4), (80, 6, 4), (128, 8, 6), (128, 6, 4), (128, 4, 3), (128, 3, 2), (256, 6, 4), (576, 6, 4))
N_VECTORS = 64


def measure(head_dim, bits, fewer=None):
    """One row: operations and bytes per value of quantize and dequantize, or of requantize to fewer bits."""
    import metalsim
    import mlx.core as mx
    import numpy as np

    from mlx_turbo.backends.metal import MetalBackend
    from mlx_turbo.backends.sides import PackedSide, QuantizeSide

    backend, n = MetalBackend(metalsim.metal_kernel), N_VECTORS * head_dim
    x = np.random.default_rng(0).standard_normal((1, 1, N_VECTORS, head_dim)).astype(np.float16)
    row = {"head_dim": head_dim, "bits": bits}

    def count(name, arrays=("x0", "codes0", "scale0")):
        stats = metalsim.last()  # of the real launch: the self-test on first use came before it
        moved = {k: stats.read_bytes[k] + stats.written_bytes[k] for k in stats.read_bytes}
        row[f"{name}_ops"] = round(sum(stats.ops.values()) / n, 1)
        row[f"{name}_bytes"] = round(sum(moved[k] for k in arrays) / n, 3)

    ((codes, scale),) = backend.quantize([QuantizeSide(mx.array(x), bits)])
    packed = PackedSide(codes, scale, bits, head_dim)
    if fewer:
        row["fewer"] = fewer
        backend.requantize(packed, fewer)
        count("requantize", ("codes", "scale", "new_codes", "new_scale"))
        return row
    count("quantize")
    backend.dequantize([packed], 0, N_VECTORS, mx.float16)
    count("dequantize")
    return row


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    args = parser.parse_args(argv)
    rows, again = ([measure(*case) for case in cases] for cases in (CASES, FEWER))
    if args.json:
        print(json.dumps(rows + again, indent=2))
        return
    print(f"Per value, counted in the simulator on {N_VECTORS} vectors of float16\n")
    print("head_dim  bits  quantize ops  bytes  dequantize ops  bytes")
    for r in rows:
        print(
            f"{r['head_dim']:>8}{r['bits']:>6}{r['quantize_ops']:>14}{r['quantize_bytes']:>7.3f}"
            f"{r['dequantize_ops']:>16}{r['dequantize_bytes']:>7.3f}"
        )
    print("\nhead_dim  bits  fewer  requantize ops  bytes")
    for r in again:
        print(f"{r['head_dim']:>8}{r['bits']:>6}{r['fewer']:>7}{r['requantize_ops']:>16}{r['requantize_bytes']:>7.3f}")


if __name__ == "__main__":
    main()
