"""What `mlx-turbo serve` tells clients of a model's context: how long it is, and how many tokens still fit."""

import logging
from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from ..integration.memory import machine_memory
from ..quant.scheme import TurboConfig
from .plan import Layer, cache_bytes, configs_of, layers_of, tokens_that_fit


class Room:
    """What the caches of a model take, by the arithmetic of `mlx-turbo plan`.

    model: a loaded one, not enabled yet. config: of its caches; None: mlx-lm's own. Measures in the thread that
    computes, before the model is used; `layers` and `configs` are plain values.
    """

    def __init__(self, model: Any, config: TurboConfig | None) -> None:
        self.layers: list[Layer] = layers_of(model)
        self.configs: list[TurboConfig | None] = configs_of(model, config)
        cache_bytes(self.layers, self.configs, 1)  # measures, once per shape


def room_of(model: Any, config: TurboConfig | None) -> Room | None:
    """The `Room` of a model; None, and a line in the log, if the model cannot be called as plan calls it."""
    if mx.distributed.init().size() > 1:
        return None
    try:
        return Room(model, config)
    except Exception:
        logging.exception("how many tokens fit is not known for this model")
        return None


def context(provider: Any, prompt_cache: Any, rooms: Mapping[str, Room | None]) -> dict[str, Any]:
    """context_length: the most tokens that prompt and answer may have; None: no limit. tokens_in_memory: of all prompt
    caches that are kept. tokens_that_fit: how many tokens a prompt that goes on from none of them may have, by the
    memory that is left on this machine and the context; None: unknown.

    provider: of the server. prompt_cache: mlx-lm's LRUPromptCache. rooms: by the path of a model.
    """
    limit = provider.limit() if provider.model is not None else None
    kept = [entry for entries in list(prompt_cache._lru._lrus.values()) for entry in list(entries)]
    found = [rooms.get(path) for path in (provider.model_key or ())[::2] if path is not None]
    fit: int | None = None
    if found and all(found):
        layers, configs = ([x for room in found if room for x in getattr(room, name)] for name in ("layers", "configs"))
        left = machine_memory()[0] - mx.get_active_memory()
        fit = tokens_that_fit(layers, configs, max(left, 0))
        if limit is not None:
            fit = limit if fit is None else min(fit, limit)
    return {
        "context_length": limit,
        "tokens_in_memory": sum(len(tokens) for _, tokens in kept),
        "tokens_that_fit": fit,
    }
