"""Imports point one way, and tests share helpers, not each other: read from the text, imports inside functions too."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# A folder (or module beside them) imports from those of a lower rank and from itself; "" is mlx_turbo/__init__.py.
RANKS = {
    "version": 0,
    "quant": 0,
    "backends": 1,
    "cache": 2,
    "integration": 3,
    "quality": 4,
    "store": 4,
    "cli": 5,
    "bench": 5,
    "": 6,
}
FORBIDDEN = {"quant": ("mlx", "mlx_lm", "mlx_vlm"), "backends": ("mlx_lm", "mlx_vlm"), "cache": ("mlx_lm", "mlx_vlm")}


def sources(folder):
    """{dotted name: text} of the modules of a folder of the checkout; a package has the name of its folder."""
    paths = sorted((ROOT / folder).rglob("*.py"))
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p.read_text() for p in paths}


def imported(name, text, modules):
    """Dotted names that a module imports, anywhere in it: a module's own name where there is one of it in `modules`."""
    package = name.split(".") if is_package(name, modules) else name.split(".")[:-1]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules else base
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            yield from (a.value for a in node.args[:1] if isinstance(a, ast.Constant))


def is_package(name, modules):
    return any(other.startswith(f"{name}.") for other in modules) or name.count(".") == 0


def folder_of(name):
    """The folder below mlx_turbo that a module lies in, "" for the package itself."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else ""


def violations(modules):
    """What is wrong with the imports of mlx_turbo's {dotted name: text}."""
    edges = {name: sorted(set(imported(name, text, modules))) for name, text in modules.items()}
    found = []
    for name, targets in edges.items():
        if name == "mlx_turbo.__main__":
            continue
        folder = folder_of(name)
        if folder not in RANKS:
            found.append(f"{name}: the folder {folder!r} has no rank")
            continue
        for target in targets:
            top = target.split(".")[0]
            if top in FORBIDDEN.get(folder, ()):
                found.append(f"{name}: {folder} knows {top}")
            elif top == "mlx_turbo" and RANKS.get(folder_of(target), 0) > RANKS[folder]:
                found.append(f"{name}: upward to {target}")
    return found + [f"circle: {' -> '.join(circle)}" for circle in circles(edges)]


def circles(edges):
    """Circles of a graph {name: names}, at least one where there is any."""
    found, finished = [], set()

    def visit(name, path):
        if name in path:
            found.append([*path[path.index(name) :], name])
        elif name not in finished and name in edges:
            for target in edges[name]:
                if target != name:
                    visit(target, [*path, name])
            finished.add(name)

    for name in edges:
        visit(name, [])
    return found


def test_imports_of_the_package_point_one_way():
    assert violations(sources("mlx_turbo")) == []


PLANTED = {  # module: (import, what is said)
    "upward": (
        "backends.select",
        "from ..cache import view",
        "mlx_turbo.backends.select: upward to mlx_turbo.cache.view",
    ),
    "in a function": (
        "cache.view",
        "def f():\n    from ..integration.attention import attend",
        "mlx_turbo.cache.view: upward to mlx_turbo.integration.attention",
    ),
    "absolute": (
        "quant.codebook",
        "import mlx_turbo.cli.main",
        "mlx_turbo.quant.codebook: upward to mlx_turbo.cli.main",
    ),
    "of the root": ("quality.metrics", "from .. import __version__", "mlx_turbo.quality.metrics: upward to mlx_turbo"),
    "mlx-lm in cache": ("cache.state", "from mlx_lm.models import cache", "mlx_turbo.cache.state: cache knows mlx_lm"),
    "mlx-lm by name": (
        "backends.sides",
        "import importlib\nimportlib.import_module('mlx_lm.utils')",
        "mlx_turbo.backends.sides: backends knows mlx_lm",
    ),
    "MLX in quant": ("quant.scheme", "import mlx.core as mx", "mlx_turbo.quant.scheme: quant knows mlx"),
    "circle": (
        "quant.codebook",
        "from .reference import quantize",
        "circle: mlx_turbo.quant.codebook -> mlx_turbo.quant.reference -> mlx_turbo.quant.codebook",
    ),
    "a folder without a rank": ("server.http", "import json", "mlx_turbo.server.http: the folder 'server' has no rank"),
}


@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_import_is_found(kind):
    module, text, said = PLANTED[kind]
    modules = sources("mlx_turbo")
    before = violations(modules)
    modules[f"mlx_turbo.{module}"] = modules.get(f"mlx_turbo.{module}", "") + f"\n{text}\n"
    new = set(violations(modules)) - set(before)
    assert said in new or said.startswith("circle") and any(circle_of(s) == circle_of(said) for s in new), new


def circle_of(text):
    """The modules of a circle, wherever it begins."""
    return text.startswith("circle: ") and set(text.removeprefix("circle: ").split(" -> "))


# ---- tests --------------------------------------------------------------------------------------------------------
def borrowed(modules):
    """Which modules of the tests import a test module or conftest: helpers belong in tests/support."""
    return [
        f"{name}: {target}"
        for name, text in modules.items()
        for target in imported(name, text, {})
        if target.split(".")[-1].startswith("test_") or target.split(".")[-1] == "conftest"
    ]


def test_no_test_module_imports_from_another_one():
    assert borrowed(sources("tests")) == []


@pytest.mark.parametrize(
    "text", ["from conftest import x", "def f():\n    from test_cache import y", "import test_ops"]
)
def test_a_test_module_that_imports_from_another_one_is_found(text):
    assert len(borrowed({"tests.cache.test_batch": text})) == 1
