#!/usr/bin/env python3
"""Registers, spills and shared memory of the kernels on NVIDIA GPUs, as NVIDIA's compiler says. Needs no GPU.

One line per kernel that a step asks for: attention in one launch (a short cache) and in two (a long one), merging,
packing and restoring; and those that give packed rows fewer bits. warps: how many fit on a multiprocessor by registers
and shared memory, of 64.

With --ceilings instead: the most that any kernel of the slow tests takes, for the table in tests/support/ceilings.py (a
quarter of an hour on 2 cores).

Needs `pip install -e ".[cuda-test]"`.
"""

import argparse
import itertools
import sys
from multiprocessing.pool import ThreadPool
from pathlib import Path

import mlx.core as mx

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from support import nvrtc  # noqa: E402
from support.collector import COUNTS, CudaCollector, every_variant  # noqa: E402

from mlx_turbo.backends.kernel_backend import SIMDGROUPS_PER_THREADGROUP  # noqa: E402
from mlx_turbo.quant.scheme import TurboConfig  # noqa: E402

REGISTERS, WARP, GRAIN, MOST_WARPS, SHARED = 65536, 32, 256, 64, 227 * 1024  # of a multiprocessor, compute 9.0


def warps(used, threads):
    """Warps per multiprocessor."""
    per_block = threads // WARP
    by_registers = REGISTERS // (-(-used.registers * WARP // GRAIN) * GRAIN) // per_block
    by_shared = SHARED // (used.shared + 1024)
    return per_block * min(by_registers, by_shared, MOST_WARPS // per_block)


def compiled(jobs, n_at_once):
    """`Resources` of [(architecture, text, name)], in order, as they are found."""
    with ThreadPool(n_at_once) as pool:
        yield from pool.imap(lambda job: nvrtc.compile_for(*job), jobs)


def print_ceilings(n_at_once):
    jobs = [
        (architecture, kernel, out)
        for architecture, collector in every_variant()
        for kernel, out in collector.generated.values()
    ]
    most = {}  # {variant: {rows: (registers, spills)}}
    for i, (job, used) in enumerate(
        zip(jobs, compiled([(architecture, *out) for architecture, _, out in jobs], n_at_once)), 1
    ):
        print(f"\r{i} of {len(jobs)}", end="", file=sys.stderr, flush=True)
        rows = most.setdefault(job[1].variant, {})
        at = job[1].template.get("ROWS", 0)
        rows[at] = tuple(map(max, rows.get(at, (0, 0)), (used.registers, used.spills)))
    print(file=sys.stderr)
    for variant, rows in most.items():
        registers = {n: min(-(-r // 8) * 8, 255) for n, (r, _) in sorted(rows.items())}  # they are allotted in eights
        spills = {n: s for n, (_, s) in rows.items() if s}
        print(f"{variant!r}: {registers.get(0, registers)}," + (f"  # spilled bytes: {spills}" if spills else ""))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gqa", type=int, nargs="+", default=(1, 4, 8), help="query heads per kv head")
    parser.add_argument("--head-dim", type=int, nargs="+", default=(128, 256))
    parser.add_argument("--scheme", nargs="+", default=("turbo4",), help="such as turbo4 or turbo8v4")
    parser.add_argument("--query-tokens", type=int, nargs="+", default=(1,))
    parser.add_argument("--no-means", action="store_true", help="keys and values without means")
    parser.add_argument("--architecture", default="sm_90a", help="sm_80, sm_90a, ...")
    parser.add_argument("--ceilings", action="store_true", help="print the table of ceilings")
    parser.add_argument("--jobs", type=int, default=2, help="kernels at a time")
    args = parser.parse_args()
    if args.ceilings:
        print_ceilings(args.jobs)
        return
    rows, seen, means = [], set(), not args.no_means
    for scheme, head_dim, gqa, n in itertools.product(args.scheme, args.head_dim, args.gqa, args.query_tokens):
        bits = TurboConfig(scheme=scheme).scheme
        collector = CudaCollector()
        for counts in COUNTS.values():
            collector.step((head_dim, head_dim, gqa), n, counts, (bits.key_bits, bits.value_bits), means=means)
        for b in {bits.key_bits, bits.value_bits} - {0}:
            collector.packing(head_dim, b)
        for key, (kernel, out) in collector.generated.items():
            if key not in seen:
                seen.add(key)
                rows.append(((scheme, head_dim, gqa, n), kernel, out))
    found = compiled([(args.architecture, *out) for _, _, out in rows], args.jobs)
    print(f"{args.architecture}, NVRTC {nvrtc.version()}, MLX {mx.__version__}")
    print(
        f"{'scheme':8} {'D':>3} {'G':>3} {'L':>2} {'kernel':18}{'ROWS':>5}{'TPL':>4}{'DPL':>4}{'SIMD':>5}"
        f"{'shared':>8}{'regs':>6}{'spill':>6}{'stack':>6}{'warps':>6}"
    )
    for (where, kernel, _), used in zip(rows, found):
        t = kernel.template
        shape = "".join(f"{t.get(k, ''):>{w}}" for k, w in (("ROWS", 5), ("TOKENS_PER_LANE", 4), ("DIMS_PER_LANE", 4)))
        n = t.get("SIMDGROUPS", SIMDGROUPS_PER_THREADGROUP)
        print(
            "{:8} {:3} {:3} {:2}".format(*where) + f" {kernel.variant:18}{shape}{n:5}{used.shared:8}{used.registers:6}"
            f"{used.spills:6}{used.stack:6}{warps(used, WARP * n):6}",
            flush=True,
        )


if __name__ == "__main__":
    main()
