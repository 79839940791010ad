"""mlx-lm and mlx-vlm, the libraries whose models mlx_turbo serves: what a model or a cache is of."""

import importlib
import re
from typing import Any

OLDEST = {"mlx_lm": (0, 31, 2), "mlx_vlm": (0, 7, 10)}


def library_of(model: Any) -> str:
    """ "mlx_vlm" for a model of mlx-vlm, or of a class derived from one; "mlx_lm" for all others."""
    packages = [kind.__module__.partition(".")[0] for kind in type(model).__mro__]
    return "mlx_vlm" if "mlx_vlm" in packages else "mlx_lm"


def language_model(model: Any) -> Any:
    """The part of a model that its library makes a prompt cache for: of mlx-vlm's models, what follows the encoders."""
    return getattr(model, "language_model", model) if library_of(model) == "mlx_vlm" else model


def is_cache(cache: Any, name: str) -> bool:
    """Whether a cache is of the class of that name in mlx-lm or mlx-vlm, not of one derived from it."""
    return type(cache).__name__ == name and type(cache).__module__ in [f"{library}.models.cache" for library in OLDEST]


def cache_module(library: str) -> Any:
    """mlx_lm.models.cache or mlx_vlm.models.cache. Raises ImportError if the library is too old."""
    installed, oldest = importlib.import_module(library).__version__, OLDEST[library]
    if tuple(int(part) for part in re.findall(r"\d+", installed)[:3]) < oldest:
        name = library.replace("_", "-")
        raise ImportError(
            f"mlx_turbo needs {name} {'.'.join(map(str, oldest))} or newer, but {installed} is installed: "
            f"pip install -U {name}"
        )
    return importlib.import_module(f"{library}.models.cache")
