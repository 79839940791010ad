"""Where the conversions to mlx-lm's caches are looked up. A cache does not know mlx-lm;
mlx_turbo.integration.conversion registers here what it can make of one."""

from typing import Any, Callable

_converters: dict[str, Callable[..., Any]] = {}


def register_converter(name: str, function: Callable[..., Any]) -> None:
    """Make `function(cache, ...)` what the method `name` of every cache calls."""
    _converters[name] = function


def converter(name: str) -> Callable[..., Any]:
    """The function registered as `name`. Raises RuntimeError if there is none."""
    if name not in _converters:
        raise RuntimeError(f"{name}: no conversion is registered, import mlx_turbo.integration.conversion first")
    return _converters[name]
