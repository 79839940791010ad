"""What the benchmarks share: options, where results go, and which backends run."""

import contextlib
import json
import sys

import mlx.core as mx

from ..backends import select
from ..backends.select import get_backend
from ..cli.common import CliError, Parser
from ..quality.style import PlotError, check_plot
from ..quant.scheme import TurboConfig
from . import contenders as contending
from . import plots as bench_plots
from . import timing
from .rows import describe_row
from .tables import describe_tuning

LEAST_TOKENS = contending.N_SINK + contending.N_RECENT + 28  # 128: exact ones and a few packed ones
SCHEMES = ("turbo4", "turbo3", "turbo2", "turbo8v4")
QUICK = timing.Effort(least=5, most=8, seconds=0.3)


# ---- the command -----------------------------------------------------------------------------------------------
def _parser(name, description):
    parser = Parser(prog=f"mlx-turbo bench {name}", description=description)
    if name != "compare":
        parser.add_argument("--quick", action="store_true", help="within a minute: small sizes, few repeats")
        parser.add_argument("--html", metavar="FILE", help="write the plots and the table as one page")
        parser.add_argument("--png", metavar="FILE", help="write the plots")
    parser.add_argument("--json", action="store_true", help="JSON on standard output, and nothing else there")
    return parser


def _numbers(parser, flag, default, what):
    parser.add_argument(flag, type=int, nargs="+", metavar="N", help=f"{what} (default: {default})")


def _check_output(args):
    """Before anything is measured: whether the plots can be written."""
    for flag in ("html", "png"):
        if file := getattr(args, flag):
            try:
                check_plot(file, f".{flag}")
            except PlotError as e:
                raise CliError(f"--{flag}: {e}") from e


def _chosen(args, name, default, quick, least, most=None):
    values = getattr(args, name) or (quick if args.quick else default)
    for value in values:
        if value < least or most and value > most:
            raise CliError(
                f"--{name.replace('_', '-')}: got {value}, allowed are whole numbers from {least} "
                + (f"to {most}" if most else "on")
            )
    return tuple(dict.fromkeys(values))


def _progress(total, unit):
    from tqdm import tqdm

    return tqdm(total=total, unit=unit, file=sys.stderr, disable=None, leave=False)


def finish(document, args, print_tables):
    """Write what was asked for; returns the exit code."""
    bad = [r for r in document["rows"] if r["status"] != "ok"]
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
                bench_plots.write(document, flag, file)
            except OSError as e:
                raise CliError(f"--{flag}: cannot write {file!r}: {e.strerror}") from e
    return 1 if bad or bad_tunings or bad_stages else 0


def complain(lines):
    for line in lines:
        print(f"mlx-turbo: {line}", file=sys.stderr)


def _backends(choice):
    if choice:
        return [get_backend(choice)]
    return [get_backend(name) for name in ("metal", "cpu") if name == "cpu" or not select.metal_unavailable()]


def _describe(backend, on_cpu=True):
    """on_cpu: the CPU fallback runs on the CPU, also where MLX's default device is the GPU."""
    with mx.stream(mx.cpu) if on_cpu and backend.name == "cpu" else contextlib.nullcontext():
        described = backend.describe()
    return f"simulated {described}" if contending.column_of(backend).startswith("simulated") else described


def _schemes(names):
    out = []
    for name in dict.fromkeys(names):
        try:
            scheme = TurboConfig.of(name).scheme
        except ValueError:
            scheme = None
        if scheme is None or not scheme.key_bits or not scheme.value_bits or name == "auto":
            raise CliError(
                f"--kv: got {name!r}, allowed are schemes that pack keys and values: turboN and turboKvV "
                "with N, K, V in (2, 3, 4, 8), for example turbo4, turbo8v4"
            )
        out.append(scheme)
    return tuple(out)
