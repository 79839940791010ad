"""What a figure must be read with: the command, the commit, the versions and the machine."""

import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..backends import select, tuning
from ..backends.device import float32_is_tf32
from ..version import __version__


def provenance(argv: Sequence[str]) -> dict[str, Any]:
    """{"command", "commit", "machine"} of `mlx-turbo` called with argv, as plain values."""
    return {"command": command_line(argv), "commit": commit(), "machine": machine()}


def command_line(argv: Sequence[str]) -> str:
    """`mlx-turbo` with argv, without the user's name: results are sent to us."""
    return shlex.join(["mlx-turbo", *argv]).replace(str(Path.home()), "~")


def commit() -> str | None:
    """The commit of the running checkout, with "-dirty" if tracked files differ; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude", "*", "--abbrev=12"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def machine() -> dict[str, str]:
    """Versions, device and memory, as name -> text."""
    facts = {
        "mlx_turbo": __version__,
        "mlx": _version("mlx"),
        "mlx-lm": _version("mlx-lm"),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "default device": mx.default_device().type.name,
        "metal": "yes" if mx.metal.is_available() else "no",
        "cuda": "yes" if mx.cuda.is_available() else "no",
        "float32 products": "TF32 (MLX_ENABLE_TF32=0 makes them exact)" if float32_is_tf32() else "exact",
        "attention tuning": _attention_tuning(),
    }
    if not (mx.metal.is_available() or mx.cuda.is_available()):
        return facts | {
            "chip": str(mx.device_info().get("device_name") or platform.processor() or platform.machine()),
            "memory": _gib(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        }
    info = mx.device_info()
    facts["chip"] = f"{info.get('device_name')} ({info.get('architecture')})"
    for name, key in (
        ("memory", "memory_size"),
        ("memory of the GPU", "total_memory"),
        ("wired limit (recommended working set)", "max_recommended_working_set_size"),
        ("largest buffer", "max_buffer_length"),
    ):
        if key in info:
            facts[name] = _gib(int(info[key]))
    return facts


def _attention_tuning() -> str:
    name = select.default_name()
    return tuning.describe(select.get_backend(name).tuning) if name in select.GPUS else tuning.describe()


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB"
