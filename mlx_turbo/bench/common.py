"""What the benchmarks share: options, where results go, and which backends run."""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import mlx.core as mx

from ..backends import select
from ..backends.select import get_backend
from ..cli.common import CliError, Parser
from ..quality.style import PlotError, check_plot
from ..quant.scheme import Scheme, TurboConfig
from . import contenders, plots, timing
from .rows import Row, describe_row, describe_tuning, is_fault

LEAST_TOKENS = contenders.N_SINK + contenders.N_RECENT + 28  # 128: exact ones and a few packed ones
SCHEMES = ("turbo4", "turbo3", "turbo2", "turbo8v4")
QUICK = timing.Effort(least=5, most=8, seconds=0.3)


def make_parser(name: str, description: str) -> Parser:
    """The parser of `mlx-turbo bench NAME` with the options that all have."""
    parser = Parser(prog=f"mlx-turbo bench {name}", description=description)
    if name != "compare":
        parser.add_argument("--quick", action="store_true", help="finish within a minute: small sizes, few repetitions")
        parser.add_argument("--html", metavar="FILE", help="write the plots and the table as one page")
        parser.add_argument("--png", metavar="FILE", help="write the plots")
    parser.add_argument("--json", action="store_true", help="write JSON, and nothing else, to standard output")
    return parser


def add_numbers(parser: argparse.ArgumentParser, flag: str, default: str, what: str) -> None:
    """Add an option that takes several whole numbers."""
    parser.add_argument(flag, type=int, nargs="+", metavar="N", help=f"{what} (default: {default})")


def check_output(args: argparse.Namespace) -> None:
    """Raise CliError, before anything is measured, if the plots cannot be written."""
    for flag in ("html", "png"):
        if file := getattr(args, flag):
            try:
                check_plot(file, f".{flag}")
            except PlotError as e:
                raise CliError(f"--{flag}: {e}") from e


def chosen_sizes(
    args: argparse.Namespace,
    name: str,
    default: Sequence[int],
    quick: Sequence[int],
    least: int,
    most: int | None = None,
) -> tuple[int, ...]:
    """The numbers of an option, each once; the default, or with --quick the smaller one, where none are given. Raises
    CliError for one below `least` or above `most`."""
    values: Sequence[int] = getattr(args, name) or (quick if args.quick else default)
    for value in values:
        if value < least or most and value > most:
            raise CliError(
                f"--{name.replace('_', '-')}: got {value}, allowed are whole numbers from {least} "
                + (f"to {most}" if most else "on")
            )
    return tuple(dict.fromkeys(values))


def progress_bar(total: int, unit: str) -> Any:
    """A bar on standard error, if that is a terminal."""
    from tqdm import tqdm

    return tqdm(total=total, unit=unit, file=sys.stderr, disable=None, leave=False)


def finish(document: Row, args: argparse.Namespace, print_tables: Callable[[Row], None]) -> int:
    """Write what was asked for; returns the exit code."""
    bad = [r for r in document["rows"] if is_fault(r)]
    document["power_after"] = timing.power()
    if args.json:
        print(json.dumps(document, indent=1, allow_nan=False))
    else:
        print_tables(document)
        for name, said in document["power"].items():
            print(f"{name}: {said}")
        print(
            f"Reproduce: {document['command']} (commit {document['commit'] or 'unknown, an installed package'})\n"
            "The same with --json > bench.json gives the file to attach to an issue (template: benchmark)."
        )
    # launch parameters may be too much for a chip: that they fail is no fault, but to compute something wrong is one
    bad_tunings = [
        row
        for row in document.get("tuning", ())
        if "values" not in row or "wrong" in [left_out["status"] for left_out in row["left_out"]]
    ]
    bad_stages = [row for row in document.get("ablation", ()) if "problem" in row]
    complain(
        [f"{row['status'].upper()}: {describe_row(row)}: {row['problem']}" for row in bad]
        + [
            f"{left_out['status'].upper()}: {describe_tuning(row, left_out)}: {left_out['problem']}"
            for row in document.get("tuning", ())
            for left_out in row["left_out"]
        ]
        + [f"FAILED: stages of {row['scheme']}: {row['problem']}" for row in bad_stages]
    )
    for flag in ("html", "png"):  # last: on a disk that is full nothing else is lost
        if file := getattr(args, flag):
            try:
                plots.write(document, flag, file)
            except OSError as e:
                raise CliError(f"--{flag}: cannot write {file!r}: {e.strerror}") from e
    return 1 if bad or bad_tunings or bad_stages else 0


def complain(lines: Iterable[str]) -> None:
    """Say on standard error what failed or is wrong."""
    for line in lines:
        print(f"mlx-turbo: {line}", file=sys.stderr)


def chosen_backends(choice: str | None) -> list[Any]:
    """The backend of that name; without one, all that run here."""
    if choice:
        return [get_backend(choice)]
    return [get_backend(name) for name in select.BACKENDS if not select.unavailable(name)]


def describe_backend(backend: Any, on_cpu: bool = True) -> str:
    """What a backend says of itself. on_cpu: the fallback runs on the CPU, even if MLX's default device is the GPU."""
    with mx.stream(mx.cpu) if on_cpu and backend.name == "cpu" else contextlib.nullcontext():
        described = backend.describe()
    return f"simulated {described}" if contenders.column_of(backend).startswith("simulated") else described


def chosen_schemes(names: Iterable[str]) -> tuple[Scheme, ...]:
    """The schemes of these names, each once. Raises CliError for one that does not pack both sides."""
    out = []
    for name in dict.fromkeys(names):
        try:
            scheme = TurboConfig.of(name).scheme
        except ValueError:
            scheme = None
        if scheme is None or not scheme.key_bits or not scheme.value_bits or name.startswith("auto"):
            raise CliError(
                f"--kv: got {name!r}, allowed are schemes that pack keys and values: turboN and turboKvV "
                "with N, K, V in (2, 3, 4, 5, 6, 8), for example turbo4, turbo8v4"
            )
        out.append(scheme)
    return tuple(out)
