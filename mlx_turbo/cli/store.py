"""`mlx-turbo store`: what a folder of stored prompts holds; check it, take a cache out of it, delete."""

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..integration.prompt_cache_file import save_prompt_cache
from ..store.prompt_store import MARK, PromptStore, default_folder
from .common import CliError, Parser

UNITS = {"m": 60, "h": 3600, "d": 86400}
DIGITS = 8  # of an id, in lists


def _build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="mlx-turbo store",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Stored prompts (docs/store.md).\n\n"
        "  list                 the caches, the one used last first\n"
        "  verify               read everything, and forget what is damaged; exit code 1 if anything was\n"
        "  export ID FILE       a cache as a file that `mlx-turbo generate --prompt-cache-file` takes\n"
        "  delete ID | --all | --model ID | --older-than TIME",
    )
    parser.add_argument("action", choices=("list", "verify", "export", "delete"))
    parser.add_argument("names", nargs="*", metavar="ID [FILE]", help="a cache, by the first digits of its id")
    parser.add_argument("--store", metavar="DIR", help=f"the folder (default: {default_folder()})")
    parser.add_argument("--json", action="store_true", help="list: as JSON")
    parser.add_argument("--all", action="store_true", help="delete: everything")
    parser.add_argument(
        "--model", metavar="ID", help="delete: what belongs to a model, by its first digits in the list"
    )
    parser.add_argument("--older-than", metavar="TIME", help="delete: what was not used for so long: 30m, 12h, 7d")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    args = _build_parser().parse_args(argv)
    folder = Path(args.store) if args.store else default_folder()
    n_names = {"list": (0,), "verify": (0,), "export": (2,), "delete": (0, 1)}[args.action]
    if len(args.names) not in n_names:
        raise CliError(f"{args.action}: got {len(args.names)} names, expected {' or '.join(map(str, n_names))}")
    chosen = [bool(x) for x in (args.names, args.all, args.model, args.older_than)]
    if args.action == "delete" and (not any(chosen) or args.all and sum(chosen) > 1):
        raise CliError("delete: say what: an id, --model, --older-than, or --all alone")
    if args.action != "delete" and any(chosen[1:]):
        raise CliError(f"{args.action}: --all, --model and --older-than go with delete")
    if not (folder / MARK).exists():
        raise CliError(f"--store: there is no prompt store in {str(folder)!r}")
    with PromptStore(folder, max_memory_bytes=0) as store:
        return globals()[f"_{args.action}"](store, args)


def _find(ids: Sequence[str], digits: str, what: str) -> str:
    found = sorted({i for i in ids if i.startswith(digits)})
    if len(found) != 1:
        raise CliError(
            f"{what}: {len(found)} in this store begin with {digits!r}, expected one; see `mlx-turbo store list`"
        )
    return found[0]


def _list(store: PromptStore, args: argparse.Namespace) -> int:
    entries, report = store.entries(), store.report()
    if args.json:
        json.dump({"folder": report["folder"], "nbytes": report["nbytes"], "entries": entries}, sys.stdout, indent=2)
        print()
        return 0
    print(f"{report['folder']}: {len(entries)} caches, {report['blocks']} blocks, {report['nbytes'] / 1e6:,.1f} MB")
    if entries:
        print(f"\n{'id':<10}{'tokens':>8}{'MB':>10}{'shared':>10}  {'used':<18}model")
    for e in entries:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(e["used"]))
        sizes = f"{e['nbytes'] / 1e6:>10,.1f}{e['shared_nbytes'] / 1e6:>10,.1f}"
        print(f"{e['id'][:DIGITS]:<10}{e['tokens']:>8,}{sizes}  {used:<18}{e['model'][:DIGITS]} ({e['label']})")
    return 0


def _verify(store: PromptStore, args: argparse.Namespace) -> int:
    wrong = store.report()["damaged"] + store.verify()
    for message in wrong:
        print(message)
    report = store.report()
    print(f"{report['blocks']} blocks and {report['ends']} ends are as they were written, {len(wrong)} were damaged")
    return 1 if wrong else 0


def _export(store: PromptStore, args: argparse.Namespace) -> int:
    digits, file = args.names
    id = _find([e["id"] for e in store.entries()], digits, "export")
    cache = store.load_entry(id)
    save_prompt_cache(file, cache)
    print(f"{file}: {len(cache)} layers")
    return 0


def _delete(store: PromptStore, args: argparse.Namespace) -> int:
    entries, what = store.entries(), dict[str, Any]()
    if args.names:
        what["id"] = _find([e["id"] for e in entries], args.names[0], "delete")
    if args.model:
        what["model"] = _find([e["model"] for e in entries], args.model, "--model")
    if args.older_than:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([mhd])", args.older_than)
        if not found:
            raise CliError(f"--older-than: got {args.older_than!r}, expected a number with m, h or d, as in 7d")
        what["older_than"] = float(found[1]) * UNITS[found[2]]
    freed = store.delete(**what)
    print(f"{freed / 1e6:,.1f} MB are free, {store.report()['nbytes'] / 1e6:,.1f} MB are left")
    return 0
