"""How `bench` measures, and on what: interleaved rounds after a warm-up, and the facts that belong beside every figure.

A sample is the time of several calls. Where a call only builds a graph, its evaluation is timed and Python is told
apart: in a model the GPU works while Python builds the next layer. The contenders of a group take turns, in an order
that rotates, so that a machine that gets slower slows all of them. Rounds go on until the medians are known to
`UNCERTAINTY`, or time is up.
"""

import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional, TypeVar

import mlx.core as mx
import numpy as np

from ..backends.kernel_backend import KernelBackend
from ..cli.provenance import provenance

WARM_UP_SECONDS = 1.0  # GPU clocks ramp up within it
SAMPLE_SECONDS = 0.01  # at least, by more calls: the floor of one evaluation is then a small part
MAX_CALLS = 256
UNCERTAINTY = 0.02
COPY_BYTES = 256 << 20  # beyond every chip's caches


Name = TypeVar("Name")
Run = Callable[[int], Any]  # run(calls): makes the calls; returns None, or lazy arrays


class Effort(NamedTuple):
    """How long to measure. least, most: rounds. seconds: of a contender's samples, once it has `least`; one that takes
    twice as long is sampled three times."""

    least: int = 10
    most: int = 50
    seconds: float = 2.0


class Timing(NamedTuple):
    """Seconds of one call. low, high: quartiles of the samples. uncertainty: half the 95 % interval of the median,
    relative to it (McGill, Tukey & Larsen 1978: 1.57 * interquartile range / sqrt n). python: median seconds of
    building a call's graph, not among the others; 0 where that cannot be told apart."""

    median: float
    low: float
    high: float
    n: int
    calls: int
    uncertainty: float
    python: float = 0.0

    @classmethod
    def of(cls, seconds: Sequence[float], calls: int, python: Sequence[float] = (0.0,)) -> "Timing":
        """Of samples of so many calls each, seconds per call."""
        low, median, high = (float(x) for x in np.percentile(seconds, (25, 50, 75)))
        return cls(
            median,
            low,
            high,
            len(seconds),
            calls,
            1.57 * (high - low) / len(seconds) ** 0.5 / median,
            float(np.median(python)),
        )


def sample(run: Run, calls: int) -> tuple[float, float]:
    """(seconds, seconds of Python before) per call of `run(calls)`, which makes the calls and returns None, or returns
    lazy arrays, whose evaluation is then what is timed."""
    start = time.perf_counter()
    out = run(calls)
    built = time.perf_counter()
    if out is None:
        return (built - start) / calls, 0.0
    mx.eval(out)
    return (time.perf_counter() - built) / calls, (built - start) / calls


def interleave(contenders: Mapping[Name, Run], effort: Effort, warm_up: Optional[float] = None) -> dict[Name, Timing]:
    """{name: `Timing`} of {name: run}, a run being what `sample` takes. warm_up: seconds, WARM_UP_SECONDS if None; in
    it the calls of a sample are chosen. Raises what the runs raise."""
    warm_up = WARM_UP_SECONDS if warm_up is None else warm_up
    for run in contenders.values():
        sample(run, 1)  # builds what must be built
    calls: dict[Name, int] = dict.fromkeys(contenders, 1)
    start, growing = time.perf_counter(), True
    while growing or time.perf_counter() - start < warm_up:
        growing = False
        for name, run in contenders.items():
            short = sample(run, calls[name])[0] * calls[name] < SAMPLE_SECONDS
            if short and calls[name] < MAX_CALLS:
                calls[name], growing = 2 * calls[name], True
    names = list(contenders)
    seconds: dict[Name, list[float]] = {name: [] for name in contenders}
    python: dict[Name, list[float]] = {name: [] for name in contenders}
    for i in range(effort.most):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            taken = seconds[name]
            spent = sum(taken) * calls[name]
            if (
                len(taken) < 3
                or len(taken) < effort.least
                and spent < 2 * effort.seconds
                or (spent < effort.seconds and Timing.of(taken, calls[name]).uncertainty > UNCERTAINTY)
            ):
                took, built = sample(contenders[name], calls[name])
                taken.append(took)
                python[name].append(built)
    return {name: Timing.of(taken, calls[name], python[name]) for name, taken in seconds.items()}


# ---- what the machine can do -----------------------------------------------------------------------------------
EMPTY = "if (thread_position_in_grid.x == 0) y[0] = x[0] + 1.0f;"


def floor_run(metal_kernel: Optional[Callable[..., Any]] = None) -> Run:
    """run(calls) of calls that do nothing, chained: what a call costs at least. metal_kernel: of an empty kernel;
    without it, an MLX operation on 8 numbers."""
    x = mx.zeros((8,))
    mx.eval(x)
    kernel = metal_kernel and metal_kernel("turbo_empty", ["x"], ["y"], EMPTY)

    def run(calls):
        y = x
        for _ in range(calls):
            y = (
                y + 1
                if kernel is None
                else kernel(
                    inputs=[y],
                    grid=(32, 1, 1),
                    threadgroup=(32, 1, 1),
                    output_shapes=[(8,)],
                    output_dtypes=[mx.float32],
                )[0]
            )
        return y

    return run


def copy_run(on_gpu: bool, n_bytes: int = COPY_BYTES) -> tuple[Run, int]:
    """(run, bytes moved by a call): a copy beyond the caches. On the GPU the negation of an array; on the CPU
    numpy.copyto, because MLX would allocate, and fault in, fresh memory each time."""
    if on_gpu:
        x = mx.zeros((n_bytes // 4,))
        mx.eval(x)
        return lambda calls: [-x for _ in range(calls)], 2 * n_bytes
    source, target = np.zeros(n_bytes // 4, np.float32), np.ones(n_bytes // 4, np.float32)
    source += 1  # or its pages would all be the kernel's one page of zeros

    def run(calls):
        for _ in range(calls):
            np.copyto(target, source)

    return run, 2 * n_bytes


def measure_machine(gpu: Optional[KernelBackend], effort: Effort, n_bytes: int = COPY_BYTES) -> dict[str, Any]:
    """{"floor_seconds", "evaluation_seconds", "copy_gb_per_s", ...}: an empty kernel, chained; one evaluated alone; a
    copy. gpu: the backend of the GPU to measure, or None for the CPU."""
    copy, moved = copy_run(gpu is not None, n_bytes)
    floor = floor_run(gpu.metal_kernel if gpu else None)

    def evaluate(calls: int) -> None:
        for _ in range(calls):
            mx.eval(floor(1))

    alone = interleave({"floor": floor, "evaluation": evaluate}, effort)
    copied = interleave({"copy": copy}, effort)["copy"]
    return {
        "floor_seconds": alone["floor"].median,
        "floor": f"empty {gpu.title} kernel" if gpu else "MLX operation on 8 numbers",
        "evaluation_seconds": alone["evaluation"].median,
        "copy_gb_per_s": moved / copied.median / 1e9,
        "copy": "MLX negation on the GPU" if gpu else "numpy.copyto, one thread",
        "copy_bytes": n_bytes,
        "copy_uncertainty": copied.uncertainty,
    }


# ---- facts that stand beside every figure ----------------------------------------------------------------------
def _output(*command: str) -> Optional[str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def power() -> dict[str, str]:
    """What the system says on power mode and thermal state, {} where it says nothing (Linux)."""
    if platform.system() != "Darwin":
        return {}
    notes = {"thermal": _output("pmset", "-g", "therm"), "power": _output("pmset", "-g")}
    notes["source"] = (_output("pmset", "-g", "batt") or "").partition("\n")[0]
    modes = [
        " ".join(line.split())
        for line in (notes.pop("power") or "").splitlines()
        if line.split()[:1] in (["powermode"], ["lowpowermode"], ["highpowermode"])
    ]
    return {name: " ".join(text.split()) for name, text in {**notes, "mode": ", ".join(modes)}.items() if text}


def header(what: str, argv: Sequence[str], backend: str) -> dict[str, Any]:
    """The start of every document: what ran, where, and how it was called."""
    return {
        "benchmark": what,
        "format": 1,
        **provenance(["bench", *argv]),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "backend": backend,
        "power": power(),
        "method": {
            "warm_up_seconds": WARM_UP_SECONDS,
            "sample_seconds": SAMPLE_SECONDS,
            "until_uncertainty": UNCERTAINTY,
            "order": "interleaved, rotating",
        },
        "executable": Path(sys.executable).name,
    }
