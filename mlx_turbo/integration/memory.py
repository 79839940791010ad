"""Budgets of memory for a model's caches: how much this machine has for them, and which caches come under one."""

import copy
import os
import weakref
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..cache.memory_budget import MemoryBudget, OfModel, Shape
from ..cache.single import TurboKVCache
from ..quant.scheme import TurboConfig
from .libraries import language_model

RESERVE = 0.1  # of what a model may use: for what a step computes with
WITHOUT_GPU = 0.5  # of a machine's memory that "auto" counts as a model's; the rest is the system's


def flatten_caches(prompt_cache: Any) -> list[Any]:
    """All caches of a prompt cache, in order; those inside a CacheList one by one."""
    return [m for c in prompt_cache for m in (flatten_caches(c.caches) if hasattr(c, "caches") else [c])]


def machine_memory() -> tuple[int, str]:
    """(bytes that a model may use on this machine, what they are)."""
    info = mx.device_info() if hasattr(mx, "device_info") else {}
    if limit := info.get("max_recommended_working_set_size"):
        return int(limit), "the working set that Metal recommends on this Mac"
    if limit := info.get("total_memory"):
        return int(limit), f"all memory of the {info.get('device_name')}"
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "all memory of this machine, which has no GPU"


def memory_beside(weights: int) -> int:
    """Bytes that this machine has for the caches of a model with `weights` bytes: what a model may use (without a GPU:
    half of all memory), without a tenth of it for what a step computes with, and without the weights. Raises ValueError
    if nothing is left."""
    memory, what = machine_memory()
    if "no GPU" in what:
        memory, what = int(WITHOUT_GPU * memory), f"half of {what}"
    left = memory - int(RESERVE * memory) - weights
    if left <= 0:
        raise ValueError(
            f"memory: got 'auto', but of {memory:,} bytes ({what}) the model takes {weights:,}, and a tenth is kept "
            "for what it computes with; name a size, such as 'memory:2GB'"
        )
    return left


def budget_of(model: Any, config: TurboConfig) -> MemoryBudget:
    """A budget for the caches of `model`, by a configuration with `memory`. Raises ValueError as `memory_beside`."""
    limit, part = config.memory, language_model(model)
    if limit is None:
        raise ValueError(f"config: got {config.name!r}, expected one with memory, for example 'memory:6GB'")
    budget = MemoryBudget(_limit(limit, part), config.floor, config.prices)
    budget.models[0].model = weakref.ref(part)
    return budget


def _limit(memory, *models):
    if not isinstance(memory, str):
        return memory
    return memory_beside(sum(a.nbytes for m in models for a in dict(tree_flatten(m.parameters())).values()))


def number_in(budget: MemoryBudget, model: Any, config: TurboConfig) -> int:
    """Which of the models of a budget this is. Another model than it was made for comes under it as the draft model,
    with the prices of `config`; if its memory is "auto", the limit leaves room for the weights of both. Raises
    ValueError if nothing is left, and for a third model."""
    part = language_model(model)
    known = [of.model() for of in budget.models]
    for number, one in enumerate(known):
        if one is part:
            return number
    if known == [None]:  # made without a model
        budget.models[0].model = weakref.ref(part)
        return 0
    if len(known) > 1:
        raise ValueError("budget: it is over the caches of a model and its draft model already; allowed is one of each")
    if isinstance(config.memory, str):
        budget.limit = min(budget.limit, _limit(config.memory, *filter(lambda m: m is not None, known), part))
    budget.add_model(OfModel(config.prices, weakref.ref(part)))
    return 1


def _ours(prompt_cache):
    """(layer, cache) of the compressed caches."""
    return [
        (i, cache)
        for i, layer in enumerate(prompt_cache)
        for cache in flatten_caches([layer])
        if isinstance(cache, TurboKVCache)
    ]


def put_under_budget(
    prompt_cache: list[Any], budget: MemoryBudget, shapes: dict[int, Shape] | None = None, number: int = 0
) -> None:
    """Put the compressed caches of a prompt cache under a budget. What is not compressed does not count. shapes: as
    `shapes_of`. number: as `number_in`."""
    budget.add(_ours(prompt_cache), shapes or {}, number)


def take_under_budget(prompt_cache: list[Any], budget: MemoryBudget) -> bool:
    """Put a prompt cache with tokens, which comes from a file or a store, under a budget: caches are packed until all
    fit. False, with no cache changed and this one under no budget, if the floor does not hold them."""
    put_under_budget(prompt_cache, budget, budget.models[0].shapes)
    if budget.make_fit():
        return True
    for _, cache in _ours(prompt_cache):
        cache.share = None
    return False


def shapes_of(model: Any, prompt_cache: list[Any], budget: MemoryBudget, number: int = 0) -> dict[int, Shape]:
    """By their number among the compressed ones, the shapes that the tokens of a new prompt cache will have. The model
    reads one token, once per budget. number: as `number_in`."""
    of = budget.models[number]
    if of.shapes is None:
        called = copy.deepcopy(prompt_cache)
        caches = [cache for _, cache in _ours(called)]
        for cache in caches:
            cache.repackable = True
        model(mx.zeros((1, 1), mx.int32), cache=called)
        of.shapes = {}
        for i, cache in enumerate(caches):
            keys, values = (side.recent for side in cache._sides)
            seen = cache.observed
            if keys is not None:
                of.shapes[i] = Shape.of(keys, values, seen[0][0][0].shape[1] if seen else 0)
    return of.shapes
