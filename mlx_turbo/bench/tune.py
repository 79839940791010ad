"""`mlx-turbo bench kernels --tune`: what this chip likes."""

import math
from collections.abc import Sequence
from typing import Any, Optional

import numpy as np

from ..backends import tuning
from ..backends.attend_launch import AttendTuning
from ..backends.kernel_backend import KernelBackend
from ..quant.scheme import Scheme
from . import contenders, timing
from .common import progress_bar
from .rows import Row


def scheme_contenders(
    grid: contenders.Grid, backends: list[Any], scheme: Scheme, n_tokens: int, head_dim: int, device: str
) -> list[list[contenders.Contender]]:
    """[[Contender of each backend] for each GQA factor and number of query tokens of the grid] of one scheme's
    attention."""
    groups = contenders.attention_contenders(grid._replace(schemes=(scheme,)), backends, n_tokens, head_dim, device)
    return [[c for c in group if c.name == scheme.name and c.column != "NumPy reference"] for group in groups.values()]


def tune_kernels(grid: contenders.Grid, gpu: KernelBackend, device: str, effort: timing.Effort) -> list[Row]:
    """Find, keep and use the best tuning of each scheme and head dim. Returns rows for the document."""
    rows: list[Row] = []
    tuned: dict[tuple[int, int, int, int], AttendTuning] = {}
    grid = grid._replace(tokens=tuple(dict.fromkeys((grid.tokens[0], grid.tokens[len(grid.tokens) // 2]))))
    quick = effort._replace(most=effort.least, seconds=0.2)
    with progress_bar(len(grid.schemes) * len(grid.head_dims) * len(tuning.CANDIDATES), "parameter") as bar:
        for scheme in grid.schemes:
            for head_dim in grid.head_dims:
                problems: dict[AttendTuning, Row] = {}

                def time_all(tunings):
                    seconds, found = time_tunings(grid, gpu, scheme, head_dim, device, quick, tunings)
                    problems.update(found)
                    return seconds

                row: Row = {"scheme": scheme.name, "head_dim": head_dim}
                rows.append(row)
                try:
                    best, ratio = tuning.search(time_all, gpu.tuning, progress=lambda name: bar.update())
                except ValueError:
                    if not problems:
                        raise
                    best, ratio = None, None
                row["left_out"] = [
                    {"changes": tuning.changes(values, gpu.tuning), **bad} for values, bad in problems.items()
                ]
                if best is not None:
                    tuned[scheme.key_bits, scheme.value_bits, head_dim, head_dim] = best
                    row |= {
                        "values": best._asdict(),
                        "changes": tuning.changes(best, gpu.tuning),
                        "time_over_default": ratio,
                    }
    if gpu.is_real:
        tuning.save(tuned)
    gpu.tuned |= tuned
    return rows


def time_tunings(
    grid: contenders.Grid,
    gpu: KernelBackend,
    scheme: Scheme,
    head_dim: int,
    device: str,
    effort: timing.Effort,
    tunings: Sequence[AttendTuning],
) -> tuple[list[Optional[float]], dict[AttendTuning, Row]]:
    """([geometric mean of the seconds over the grid's contexts, GQA factors and query tokens, or None where a tuning is
    wrong or does not run], {tuning: {"status", "problem"}} of those)."""
    backends: list[KernelBackend] = []
    problems: dict[AttendTuning, Row] = {}
    for values in tunings:
        backend = KernelBackend(gpu.metal_kernel, gpu.name, gpu.title, is_real=gpu.is_real)
        backend.tuning = values
        backends.append(backend)
    logs = np.zeros(len(tunings))
    for n_tokens in grid.tokens:
        for group in scheme_contenders(grid, backends, scheme, n_tokens, head_dim, device):
            runs: dict[int, timing.Run] = {}
            for i, c in enumerate(group):
                try:
                    wrong = c.check()[2]
                    bad = {"status": "wrong", "problem": wrong} if wrong else None
                except Exception as e:  # too many threads for the chip's registers, for example
                    bad = contenders.failure(e)
                if bad:
                    logs[i] = math.inf
                    problems.setdefault(tunings[i], bad)
                else:
                    runs[i] = contenders.timed(c)
            try:
                timings = timing.interleave(runs, effort, 0.2) if runs else {}
            except RuntimeError as e:  # whose fault it was is not known
                bad = {"status": "failed", "problem": f"while a group was timed: {e}"}
                problems.update({tunings[i]: bad for i in runs})
                logs[list(runs)] = math.inf
                continue
            for i, t in timings.items():
                logs[i] += math.log(t.median)
    n = len(grid.tokens) * len(grid.gqa) * len(grid.query_tokens)
    return [None if math.isinf(x) else math.exp(x / n) for x in logs], problems
