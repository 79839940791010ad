"""The name of the chip."""

import platform

import mlx.core as mx


def device_name() -> str:
    """The chip's name where Metal knows it, else the machine's."""
    info = mx.device_info() if mx.metal.is_available() else {}
    return str(info.get("device_name") or f"{platform.system()} {platform.machine()}")
