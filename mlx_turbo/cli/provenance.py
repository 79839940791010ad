"""What ran, and where: the line that every report begins with."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import mlx.core as mx
import numpy as np

from .. import __version__
from ..backends import tuning


# ---- the machine -------------------------------------------------------------------------------------------
def _version(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def machine():
    """Versions, device and memory, as a dict of name -> text."""
    facts = {
        "mlx_turbo": __version__,
        "mlx": _version("mlx"),
        "mlx-lm": _version("mlx-lm"),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "default device": mx.default_device().type.name,
        "metal": "yes" if mx.metal.is_available() else "no",
        "attention tuning": tuning.describe(),
    }
    gib = "{:.1f} GiB".format
    if mx.metal.is_available():
        info = mx.device_info()
        facts |= {"chip": f"{info.get('device_name')} ({info.get('architecture')})"}
        for name, key in (
            ("memory", "memory_size"),
            ("wired limit (recommended working set)", "max_recommended_working_set_size"),
            ("largest buffer", "max_buffer_length"),
        ):
            if key in info:
                facts[name] = gib(info[key] / 2**30)
    else:
        facts |= {
            "chip": mx.device_info().get("device_name") or platform.processor() or platform.machine(),
            "memory": gib(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        }
    return facts
