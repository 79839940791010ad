"""Versions of Python, macOS and Linux that we run on: named alike everywhere, and a clear word elsewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.parts import part_of

ROOT = Path(__file__).parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text()
OLDEST, END = (int(n) for n in re.search(r'requires-python = ">=3\.(\d+),<3\.(\d+)"', PYPROJECT).groups())
FIRST, LAST = f"3.{OLDEST}", f"3.{END - 1}"
SHELL = (ROOT / "scripts/venv.sh").read_text()
WORKFLOW = ROOT / ".github/workflows/ci.yml"


def test_every_file_names_the_pythons_of_pyproject():
    versions = [f"3.{n}" for n in range(OLDEST, END)]
    assert re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PYPROJECT) == versions
    assert f"Python {FIRST} to {LAST}" in (ROOT / "README.md").read_text()
    ranges = re.findall(r"3\.\d+ (?:to|\.\.) 3\.\d+", SHELL)
    assert set(ranges) == {f"{FIRST} to {LAST}", f"{FIRST} .. {LAST}"}
    assert f"not (3, {OLDEST}) <= sys.version_info[:2] < (3, {END})" in SHELL
    assert "python3.{" + ",".join(str(n) for n in reversed(range(OLDEST, END))) + "}" in SHELL


@pytest.mark.skipif(not WORKFLOW.exists(), reason="an sdist has no workflow")
def test_the_workflow_runs_every_part_on_every_macos_and_the_oldest_and_newest_python():
    jobs = re.findall(r'- \{os: ([\w-]+), python: "([\d.]+)", tests: (.+)\}', WORKFLOW.read_text())
    assert {python for _, python, tests in jobs if tests == "fast"} >= {FIRST, "3.14", LAST}
    assert {python for _, python, _ in jobs} <= {f"3.{n}" for n in range(OLDEST, END)}
    parts = {"fast", *(f"slow {k}/3" for k in (1, 2, 3))}
    for os_name in "macos-14", "macos-15", "macos-26", "ubuntu-latest":
        assert {tests for name, _, tests in jobs if name == os_name} == parts


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_the_parts_of_a_suite_are_the_suite(n):
    items = list(range(20))
    parts = [part_of(items, f"{k}/{n}") for k in range(1, n + 1)]
    assert sorted(sum(parts, [])) == items and max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("part", ["0/3", "4/3", "1", "1/", "a/b", "-1/3"])
def test_a_part_that_there_is_not_is_refused(part):
    with pytest.raises(pytest.UsageError, match="--part"):
        part_of([], part)


def test_parts_are_taken_of_what_the_markers_leave():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-q",
        "-m",
        "slow",
        "--part",
        "2/2",
        str(ROOT / "tests/backends/test_kernels.py"),
    ]
    out = subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout
    found = re.findall(r"::(test_\w+)\[", out)
    assert set(found) == {"test_every_combination_agrees_with_the_oracle_in_every_order"} and len(found) == 36


# ---- scripts/venv.sh on machines that this one is not ------------------------------------------------------
MAC = {"uname": "case $1 in -s) echo Darwin;; *) echo arm64;; esac", "sysctl": "echo 1", "sw_vers": "echo 15.3.1"}
LINUX = {"uname": "echo Linux", "getconf": "echo glibc 2.36"}
PYTHON = "case $2 in *version_info*) exit 0;; *machine*) echo arm64;; esac"
FINE = {
    "a new Mac": MAC,
    "macOS 26": MAC | {"sw_vers": "echo 26.0"},
    "the oldest macOS": MAC | {"sw_vers": "echo 14.0"},
    "a terminal under Rosetta": MAC | {"uname": "case $1 in -s) echo Darwin;; *) echo x86_64;; esac"},
    "Debian 12": LINUX,
    "Ubuntu 22.04": LINUX | {"getconf": "echo glibc 2.35"},
}
REFUSED = {
    "macOS 13": (MAC | {"sw_vers": "echo 13.7.2"}, "MLX needs macOS 14 or newer; this is macOS 13.7.2"),
    "an Intel Mac": (
        MAC | {"sysctl": "exit 1"},
        "MLX needs a Mac with Apple silicon (M1 or newer); this one has an Intel processor",
    ),
    "Ubuntu 20.04": (LINUX | {"getconf": "echo glibc 2.31"}, "MLX needs glibc 2.35 or newer"),
    "musl": (LINUX | {"getconf": "exit 1"}, "MLX needs macOS, or Linux with glibc 2.35"),
}
PYTHONS = {
    "too old": ({"python3": "exit 1"}, f"no Python {FIRST} to {LAST} found"),
    "for Intel": ({"python3": PYTHON.replace("arm64", "x86_64")}, "python3 is a Python for Intel processors"),
    "without venv": ({"python3": PYTHON + "; exit 1"}, "python3 has no venv module"),
}


@pytest.fixture
def on(tmp_path):
    """on(commands, line) -> (exit code, stdout, stderr) of a line of bash after venv.sh."""

    def on(commands, line):
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        for name, script in commands.items():
            (folder / name).write_text(f"#!/bin/bash\n{script}\n")
            (folder / name).chmod(0o755)
        script = f'set -euo pipefail; source "{ROOT}/scripts/venv.sh"; PATH={folder}; {line}'
        done = subprocess.run(
            ["/bin/bash", "-c", script], capture_output=True, text=True, env={"PATH": os.environ["PATH"]}
        )
        return done.returncode, done.stdout, done.stderr

    return on


@pytest.mark.parametrize("machine", FINE)
def test_where_mlx_has_wheels_the_set_up_begins(on, machine):
    assert on(FINE[machine], "check_machine; echo on") == (0, "on\n", "")


@pytest.mark.parametrize("machine", REFUSED)
def test_elsewhere_one_line_says_why_not(on, machine):
    commands, words = REFUSED[machine]
    code, out, err = on(commands, "check_machine; echo on")
    assert (code, out, err.count("\n")) == (1, "", 1) and err.startswith(f"error: {words}")


@pytest.mark.parametrize("python", PYTHONS)
def test_a_python_that_cannot_have_mlx_is_passed_over_and_named(on, python):
    commands, words = PYTHONS[python]
    code, out, err = on(MAC | commands, "python=$(find_python); echo on")
    assert (code, out, err.count("\n")) == (1, "", 1) and words in err
    newest = f"python{LAST}"
    assert on(MAC | commands | {newest: PYTHON}, "find_python") == (0, f"{newest}\n", "")
