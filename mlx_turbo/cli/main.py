"""The command `mlx-turbo`. Exit codes: 0 done, 1 something is broken (a kernel, a check), 2 wrong input.

`python -X dev -m mlx_turbo ...` shows tracebacks instead of one-line errors.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from ..backends.sides import BackendError
from ..version import __version__
from .common import CliError, Parser, describe_error, print_message

# name -> (module whose main(argv) runs it, imported only then; what it does)
COMMANDS = {
    "generate": (
        "mlx_turbo.cli.generate",
        "generate text with a compressed KV cache (takes every flag of mlx_lm.generate)",
    ),
    "eval": (
        "mlx_turbo.cli.eval",
        "perplexity, KL divergence and recall of compressed caches against the uncompressed one",
    ),
    "plan": (
        "mlx_turbo.cli.plan",
        "how many tokens fit in a given amount of memory with each scheme, from a model's configuration",
    ),
    "chat": ("mlx_turbo.cli.chat", "chat with a model, with a compressed KV cache (takes every flag of mlx_lm.chat)"),
    "serve": (
        "mlx_turbo.cli.serve",
        "a server for OpenAI clients, with compressed KV caches (takes every flag of mlx_lm.server)",
    ),
    "bench": (
        "mlx_turbo.bench.command",
        "speed, memory and errors of the kernels and of generation, next to MLX's own; results to share",
    ),
    "store": ("mlx_turbo.cli.store", "prompts that were stored on disk: list, verify, export, delete"),
    "doctor": ("mlx_turbo.cli.doctor", "build the kernels and check them against the NumPy reference on this machine"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `mlx-turbo` with the arguments argv (default: sys.argv[1:]). Returns the exit code."""
    parser = Parser(
        prog="mlx-turbo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="TurboQuant KV-cache compression for MLX.\n\ncommands:\n"
        + "\n".join(f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items())
        + "\n\n`mlx-turbo COMMAND --help` shows the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"mlx-turbo {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=", ".join(COMMANDS))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="options of the command")
    try:
        if not (sys.argv[1:] if argv is None else argv):
            parser.print_help(sys.stderr)
            return 2
        args = parser.parse_args(argv)
        code = importlib.import_module(COMMANDS[args.command][0]).main(args.arguments)
        sys.stdout.flush()
        return code
    except (BackendError, CliError, ValueError) as e:  # ValueError: mlx-lm and our caches on bad input
        if sys.flags.dev_mode:
            raise
        print_message(f"error: {e}")
        return 1 if isinstance(e, BackendError) else 2
    except OSError as e:  # the disk is full, or the reader of a pipe (`| head`) is gone
        if sys.flags.dev_mode:
            raise
        quiet = isinstance(e, BrokenPipeError)
        if not quiet:
            print_message(f"error: {describe_error(e)}")
        try:
            sys.stdout.flush()
        except OSError:  # Python would flush again at exit, and print a traceback
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141 if quiet else 1  # 141: the exit code of a program ended by SIGPIPE
    except KeyboardInterrupt:
        return 130
