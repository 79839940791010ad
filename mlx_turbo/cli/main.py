"""The command `mlx-turbo`. Exit codes: 0 done, 1 something is broken (a kernel, a check), 2 wrong input.

`python -X dev -m mlx_turbo ...` shows tracebacks instead of one-line errors.
"""

import argparse
import os
import sys

from .. import __version__
from ..backends.sides import BackendError
from .common import CliError, Parser, _of, describe_error, print_message
from .generate import generate

COMMANDS = {
    "generate": (generate, "write text with a compressed KV cache (every flag of mlx_lm.generate)"),
    "eval": (_of("eval"), "perplexity, KL divergence and recall of compressed caches against the uncompressed one"),
    "plan": (_of("plan"), "how many tokens fit into a memory size with each scheme, from a model's configuration"),
    "chat": (_of("chat"), "talk to a model, with a compressed KV cache (every flag of mlx_lm.chat)"),
    "serve": (_of("serve"), "a server for OpenAI clients, with compressed KV caches (every flag of mlx_lm.server)"),
    "bench": (
        _of("..bench.command"),
        "speed, memory and errors of kernels and of generation, beside MLX's own; what to send us",
    ),
    "doctor": (_of("doctor"), "build every kernel and check it against the oracle on this machine"),
}


def main(argv=None):
    """Run `mlx-turbo` with the arguments argv (default: sys.argv[1:]). Returns the exit code."""
    parser = Parser(
        prog="mlx-turbo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="TurboQuant KV-cache compression for MLX.\n\ncommands:\n"
        + "\n".join(f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items())
        + "\n\n`mlx-turbo COMMAND --help` shows the options of one.",
    )
    parser.add_argument("--version", action="version", version=f"mlx-turbo {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=", ".join(COMMANDS))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="the command's options")
    try:
        if not (sys.argv[1:] if argv is None else argv):
            parser.print_help(sys.stderr)
            return 2
        args = parser.parse_args(argv)
        code = COMMANDS[args.command][0](args.arguments)
        sys.stdout.flush()
        return code
    except (BackendError, CliError, ValueError) as e:  # ValueError: mlx-lm and our caches on bad input
        if sys.flags.dev_mode:
            raise
        print_message(f"error: {e}")
        return 1 if isinstance(e, BackendError) else 2
    except OSError as e:  # a disk that is full, or `| head`, which has read enough
        if sys.flags.dev_mode:
            raise
        quiet = isinstance(e, BrokenPipeError)
        if not quiet:
            print_message(f"error: {describe_error(e)}")
        try:
            sys.stdout.flush()
        except OSError:  # Python would try again at its end, and complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141 if quiet else 1  # 141: as of a program that SIGPIPE ends
    except KeyboardInterrupt:
        return 130
