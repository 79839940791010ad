"""Which chip this is."""

import mlx.core as mx


def device_name():
    """The chip's name where Metal knows it, else the machine's."""
    import platform

    info = mx.device_info() if mx.metal.is_available() else {}
    return info.get("device_name") or f"{platform.system()} {platform.machine()}"
