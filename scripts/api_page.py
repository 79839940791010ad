#!/usr/bin/env python3
"""The page of the public names, docs/api.md, from signatures and docstrings.

    python scripts/api_page.py [--write]

Prints it; --write: into docs/api.md. tests/project/test_docs.py fails when the page is not what this prints.
"""

import argparse
import ast
import dataclasses
import inspect
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import mlx_turbo

PAGE = ROOT / "docs/api.md"
HEAD = """# API

The public names of `mlx_turbo`, in alphabetical order. What is not on this page may change without notice. Shapes: `B`
rows of a batch, `H` or `n_kv_heads` heads, `L` tokens; words as in [architecture.md](architecture.md#glossary).

This page is written by `python scripts/api_page.py --write` from the docstrings.
"""


def definition(thing: Any) -> ast.FunctionDef | ast.ClassDef:
    """The syntax of a function or class, so that a page does not depend on how a Python prints annotations."""
    node = ast.parse(textwrap.dedent(inspect.getsource(thing))).body[0]
    assert isinstance(node, (ast.FunctionDef, ast.ClassDef))
    return node


def signature(name: str, node: ast.FunctionDef, thing: Any, bound: bool) -> str:
    """`name(arguments) -> result`; defaults that are named constants by their values."""
    arguments = node.args
    values = {n: p.default for n, p in inspect.signature(thing).parameters.items()}
    positional = [*arguments.posonlyargs, *arguments.args]
    with_default = positional[len(positional) - len(arguments.defaults) :]
    for args, defaults in (with_default, arguments.defaults), (arguments.kwonlyargs, arguments.kw_defaults):
        for i, (arg, default) in enumerate(zip(args, defaults)):
            if default is not None and isinstance(values.get(arg.arg), (str, int, float)):
                defaults[i] = ast.Constant(values[arg.arg])
    if bound:
        positional[0].arg = ""
        positional[0].annotation = None
    text = ast.unparse(arguments).removeprefix(", ")
    return f"{name}({text})" + (f" -> {ast.unparse(node.returns)}" if node.returns else "")


def fields(node: ast.ClassDef, thing: type) -> str:
    """The arguments of a dataclass, with the values of its defaults."""
    out = []
    for f, n in zip(dataclasses.fields(thing), (n for n in node.body if isinstance(n, ast.AnnAssign)), strict=True):
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        out.append(
            f"{f.name}: {ast.unparse(n.annotation)}" + ("" if default is dataclasses.MISSING else f" = {default!r}")
        )
    return ", ".join(out)


def doc(node: ast.FunctionDef | ast.ClassDef) -> str:
    """A docstring; a line that begins with the name of an argument begins an item of a list."""
    out: list[str] = []
    for line in (ast.get_docstring(node) or "").splitlines():
        if re.match(r"[a-z_]+(, [a-z_]+)*: ", line):
            if out and out[-1] and not out[-1].startswith(("- ", "  ")):
                out.append("")
            out.append(f"- {line}")
        else:
            out.append(f"  {line.strip()}" if line and out and out[-1].startswith(("- ", "  ")) else line)
    return "\n".join(out)


def function_section(name: str, thing: Any) -> list[str]:
    thing = inspect.unwrap(thing)
    node = definition(thing)
    assert isinstance(node, ast.FunctionDef)
    return [f"    {signature(name, node, thing, bound=False)}", doc(node)]


def class_section(name: str, thing: type) -> list[str]:
    """The class, its constructor if it has one of its own, and its public methods and properties with docstrings."""
    node = definition(thing)
    assert isinstance(node, ast.ClassDef)
    bases = [base.__name__ for base in thing.__bases__ if base.__name__ in mlx_turbo.__all__]
    members = {n.name: n for n in node.body if isinstance(n, ast.FunctionDef)}
    out = []
    if "__init__" in members:
        out.append(f"    {signature(name, members['__init__'], thing.__dict__['__init__'], bound=True)}")
    elif dataclasses.is_dataclass(thing):
        out.append(f"    {name}({fields(node, thing)})")
    if bases:
        out.append(f"A `{'`, `'.join(bases)}`.")
    out.append(doc(node))
    listed = []
    for member, n in members.items():
        if member.startswith("_") or not doc(n):
            continue
        kinds = [ast.unparse(d) for d in n.decorator_list]
        if any(kind.endswith(".setter") for kind in kinds):
            continue
        summary = " ".join(doc(n).split("\n\n")[0].split())
        if "property" in kinds:
            listed.append(f"- `{member}`: {summary}")
        else:
            function = getattr(thing, member)
            function = inspect.unwrap(getattr(function, "__func__", function))
            text = signature(member, n, function, "staticmethod" not in kinds)
            listed.append(f"- `{text}`: {summary}")
    return [*out, "\n".join(listed)] if listed else out


def page() -> str:
    """docs/api.md."""
    parts = [HEAD.rstrip()]
    for name in sorted(mlx_turbo.__all__):
        thing = getattr(mlx_turbo, name)
        parts.append(f"## {name}")
        parts += [p for p in (class_section if isinstance(thing, type) else function_section)(name, thing) if p]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="into docs/api.md")
    if parser.parse_args().write:
        PAGE.write_text(page())
    else:
        print(page(), end="")


if __name__ == "__main__":
    main()
