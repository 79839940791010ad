"""`mlx-turbo bench kernels --tune`: what this chip likes."""

import math

import numpy as np

from ..backends import tuning
from ..backends.metal import MetalBackend
from . import contenders as contending
from . import timing
from .common import _progress


def _attend_contenders(grid, backends, scheme, n_tokens, head_dim, device):
    """[[Contender of each backend] for each GQA factor and number of query tokens of the grid] of one scheme's
    attention."""
    groups = contending.attention_contenders(grid._replace(schemes=(scheme,)), backends, n_tokens, head_dim, device)
    return [
        [c for c in contenders if c.name == scheme.name and c.column != "NumPy reference"]
        for contenders in groups.values()
    ]


def _tune(grid, metal, device, effort):
    """Find, keep and use the best tuning of each scheme and head dim. Returns rows for the document."""
    rows, tuned = [], {}
    grid = grid._replace(tokens=tuple(dict.fromkeys((grid.tokens[0], grid.tokens[len(grid.tokens) // 2]))))
    quick = effort._replace(most=effort.least, seconds=0.2)
    with _progress(len(grid.schemes) * len(grid.head_dims) * len(tuning.CANDIDATES), "parameter") as bar:
        for scheme in grid.schemes:
            for head_dim in grid.head_dims:
                problems = {}

                def time_all(tunings):
                    seconds, found = time_tunings(grid, metal, scheme, head_dim, device, quick, tunings)
                    problems.update(found)
                    return seconds

                row = {"scheme": scheme.name, "head_dim": head_dim}
                rows.append(row)
                try:
                    best, ratio = tuning.search(time_all, progress=lambda name: bar.update())
                except ValueError:
                    if not problems:
                        raise
                    best, ratio = None, None
                row["left_out"] = [{"changes": tuning.changes(values), **bad} for values, bad in problems.items()]
                if best is not None:
                    tuned[scheme.key_bits, scheme.value_bits, head_dim, head_dim] = best
                    row |= {"values": best._asdict(), "changes": tuning.changes(best), "time_over_default": ratio}
    if metal.is_real:
        tuning.save(tuned)
    metal.tuned |= tuned
    return rows


def time_tunings(grid, metal, scheme, head_dim, device, effort, tunings):
    """([geometric mean of the seconds over the grid's contexts, GQA factors and query tokens, or None where a tuning is
    wrong or does not run], {tuning: {"status", "problem"}} of those)."""
    backends, problems = [], {}
    for values in tunings:
        backend = MetalBackend(None if metal.is_real else metal.metal_kernel)
        backend.tuning, backend.tuned = values, {}
        backends.append(backend)
    logs = np.zeros(len(tunings))
    for n_tokens in grid.tokens:
        for contenders in _attend_contenders(grid, backends, scheme, n_tokens, head_dim, device):
            runs = {}
            for i, c in enumerate(contenders):
                try:
                    wrong = c.check()[2]
                    bad = {"status": "wrong", "problem": wrong} if wrong else None
                except Exception as e:  # too many threads for the chip's registers, for example
                    bad = contending.failure(e)
                if bad:
                    logs[i] = math.inf
                    problems.setdefault(tunings[i], bad)
                else:
                    runs[i] = contending.timed(c)
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
