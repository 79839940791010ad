"""`max_kv_size` for models that make their own caches: windows where a layer allows it. mlx-lm and mlx-vlm ignore it
for these."""

import sys
from typing import Any

from .libraries import is_cache

KEEP = 4  # first tokens that such a window keeps, as in mlx-lm
POSITIONS_FROM_KEYS = ("afm7",)  # model types whose last layers take a token's position from the number of keys
_BOUNDED = ("ArraysCache", "ChunkedKVCache", "RotatingKVCache")  # mlx-lm's caches that do not grow without end


def limit_kv_size(
    model: Any, prompt_cache: list[Any], max_kv_size: int, indexers: set[tuple[int, int]]
) -> tuple[list[Any], dict[str, list[int]]]:
    """A new prompt cache of a model, with windows of max_kv_size tokens, the first 4 of them kept, where it has a
    KVCache; a longer RotatingKVCache becomes as short. Members of a CacheList are treated one by one.

    indexers: {(layer, member)} as from sparse_indexer.py. Returns the prompt cache and {why: layers} of what still
    grows.
    """
    refused: str | None = None
    if getattr(model, "model_type", None) in POSITIONS_FROM_KEYS:
        refused = "the model takes the positions of tokens from the number of keys"
    elif indexers:
        refused = "an indexer picks from all tokens"
    grow: dict[str, list[int]] = {}

    def limited(layer: int, cache: Any) -> Any:
        window: Any = getattr(sys.modules[type(cache).__module__], "RotatingKVCache", None)
        if is_cache(cache, "RotatingKVCache") and cache.max_size > max_kv_size and not refused:
            return window(max_kv_size, min(cache.keep, max_kv_size - 1))
        if is_cache(cache, "KVCache") and not refused:
            return window(max_kv_size, KEEP)
        if type(cache).__name__ not in _BOUNDED:
            why = (
                refused if is_cache(cache, "KVCache") else f"mlx_turbo does not know the model's {type(cache).__name__}"
            )
            layers = grow.setdefault(str(why), [])
            layers += [layer] * (layer not in layers)
        return cache

    out = []
    for i, cache in enumerate(prompt_cache):
        if hasattr(cache, "caches"):
            out.append(type(cache)(*(limited(i, member) for member in cache.caches)))
        else:
            out.append(limited(i, cache))
    return out, grow


def pass_on_max_kv_size(module: Any, takes_it: Any) -> None:
    """Make a library's make_prompt_cache hand max_kv_size to a model's `make_cache` of the class `takes_it`; it ignores
    it for all others. module: mlx_lm.models.cache or mlx_vlm.models.cache. Does nothing the second time."""
    original = module.make_prompt_cache
    if hasattr(original, "passes_on_max_kv_size"):
        return

    def make_prompt_cache(model: Any, max_kv_size: int | None = None) -> list[Any]:
        own = getattr(model, "make_cache", None)
        return own(max_kv_size) if isinstance(own, takes_it) else original(model, max_kv_size)

    setattr(make_prompt_cache, "passes_on_max_kv_size", True)
    for name, loaded in list(sys.modules.items()):
        if (
            name.startswith(module.__name__.partition(".")[0])
            and getattr(loaded, "make_prompt_cache", None) is original
        ):
            setattr(loaded, "make_prompt_cache", make_prompt_cache)
