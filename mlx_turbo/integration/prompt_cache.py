"""Compressed prompt caches for models of mlx-lm and mlx-vlm: which layers get one, and what a prompt cache holds."""

import logging
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

from ..cache.batch import BatchTurboKVCache
from ..cache.batch_rotating import BatchRotatingTurboKVCache
from ..cache.last_step import NOT_YET, NOTHING_PACKED
from ..cache.memory_budget import MemoryBudget
from ..cache.rotating import RotatingTurboKVCache, Window
from ..cache.single import TurboKVCache
from ..quant.scheme import Scheme, TurboConfig, bits_per_value
from . import attention
from .conversion import compress_window
from .kv_size import KEEP, limit_kv_size, pass_on_max_kv_size
from .libraries import cache_module, is_cache, language_model, library_of
from .memory import budget_of, flatten_caches, number_in, put_under_budget, shapes_of
from .mixed_batch import let_batches_mix
from .vlm_caches import VlmRotatingTurboKVCache, VlmTurboKVCache

logger = logging.getLogger("mlx_turbo")
# before the class's name in a file: what mlx-lm shows where mlx_turbo is not in use (prompt_cache_file.py)
FOREIGN_NAME = (
    "written by mlx_turbo. Run `mlx-turbo generate` in place of `mlx_lm.generate`, or load the file with "
    "mlx_turbo.load_prompt_cache. Its class is "
)


def patch_mlx_lm() -> Any:
    """Put our classes where mlx_lm's load_prompt_cache looks classes up by name, and our attention where its models
    look theirs up. Returns the module mlx_lm.models.cache.

    Raises ImportError if mlx-lm is too old.
    """
    module = cache_module("mlx_lm")
    from .sparse_indexer import BatchIndexerKVCache, IndexedCacheList

    of_batches = BatchTurboKVCache, BatchRotatingTurboKVCache, BatchIndexerKVCache
    for cache in (TurboKVCache, RotatingTurboKVCache, IndexedCacheList, *of_batches):
        setattr(module, cache.__name__, cache)
        setattr(module, FOREIGN_NAME + cache.__name__, cache)
    setattr(module, FOREIGN_NAME + "CacheList", module.CacheList)
    _patch(module)
    return module


def _patch(module: Any) -> None:
    attention.install()
    pass_on_max_kv_size(module, _EnabledMakeCache)
    let_batches_mix()


def patch_library_of(model: Any) -> Any:
    """As patch_mlx_lm, for the library that a model is of. mlx-vlm saves no caches, so their names are not needed
    there."""
    if library_of(model) == "mlx_lm":
        return patch_mlx_lm()
    module = cache_module("mlx_vlm")
    _patch(module)
    return module


def is_long_window(cache: Any, config: TurboConfig) -> bool:
    """Whether a cache is a RotatingKVCache at least twice as long as what stays exact; a shorter one saves little."""
    return is_cache(cache, "RotatingKVCache") and cache.max_size - cache.keep >= 2 * (config.recent + config.block)


def is_window(cache: Any) -> bool:
    """Whether a cache, mlx-lm's or ours, is of a layer whose attention is a sliding window: not one that a user's
    max_kv_size made, which keeps first tokens."""
    return (isinstance(cache, Window) or is_cache(cache, "RotatingKVCache")) and not cache.keep


def configs_of(prompt_cache: list[Any], config: TurboConfig) -> Callable[[int, Any], TurboConfig]:
    """The configuration of a cache of layer i, as a function of i and the cache, in a prompt cache of whichever
    classes."""
    has_windows = any(map(is_window, flatten_caches(prompt_cache)))

    def of(i: int, cache: Any) -> TurboConfig:
        own = config.for_layer(i, len(prompt_cache))
        return own.of_window() if is_window(cache) else own.beside_windows() if has_windows else own

    return of


def compress(prompt_cache: list[Any], config: TurboConfig, indexers: set[tuple[int, int]] | None = None) -> list[Any]:
    """A prompt cache with the tokens of another, whose plain KV caches and long windows are compressed, also inside a
    CacheList of mlx-lm.

    indexers: {(layer, member)} of the KVCaches in a CacheList that stay exact; found by their tokens if not given.
    """
    from .sparse_indexer import IndexedCacheList, indexers_of_tokens

    indexers = indexers_of_tokens(prompt_cache) if indexers is None else indexers

    config_of = configs_of(prompt_cache, config)

    def compressed(i: int, cache: Any) -> Any:
        own = config_of(i, cache)
        of_mlx_vlm = type(cache).__module__ == "mlx_vlm.models.cache"
        if is_cache(cache, "KVCache"):
            held = None if cache.empty() else [x[:, :, : cache.offset] for x in (cache.keys, cache.values)]
            cache = (VlmTurboKVCache if of_mlx_vlm else TurboKVCache)(own)
            if held:
                cache.update_and_fetch(*held)
        elif is_long_window(cache, own):
            cache = compress_window(cache, own, VlmRotatingTurboKVCache if of_mlx_vlm else RotatingTurboKVCache)
        return cache

    out = []
    for i, c in enumerate(prompt_cache):
        if is_vlm_list(c):
            out.append(c)
            continue
        if not hasattr(c, "caches"):
            out.append(compressed(i, c))
            continue
        kept = [(i, j) in indexers for j in range(len(c.caches))]
        inside = [m if keep else compressed(i, m) for m, keep in zip(c.caches, kept)]
        out.append((IndexedCacheList if any(kept) else type(c))(*inside))
    return out


def is_vlm_list(cache: Any) -> bool:
    """Whether a cache is mlx-vlm's CacheList. Its models use it for what stays exact in mlx-lm's too (indexers, pools)
    and for caches of their own: nothing in it is compressed."""
    return is_cache(cache, "CacheList") and type(cache).__module__ == "mlx_vlm.models.cache"


def _reads_state(model: Any, kv_cache: Any) -> bool:
    """Whether layers of the model unpack `cache.state` of another layer, which only a KVCache supports: two families
    did so before mlx-lm's caches had `keys_and_values`, and mlx-vlm's do."""
    reads = ("afm7", "gemma3n", "gemma3n_text", "diffusion_gemma")
    return not hasattr(kv_cache, "keys_and_values") and getattr(model, "model_type", None) in reads


def make_prompt_cache(
    model: Any,
    config: str | Scheme | TurboConfig = "turbo4",
    max_kv_size: int | None = None,
    budget: MemoryBudget | list[Any] | None = None,
) -> list[Any]:
    """A prompt cache for `model` with TurboKVCache where its library's make_prompt_cache has a KVCache, and
    RotatingTurboKVCache where it has a RotatingKVCache (sliding windows).

    model: of mlx-lm or mlx-vlm. config: a scheme's name, a Scheme or a TurboConfig; for "auto:4.5", what `choose_bits`
    returns. max_kv_size: the most tokens that a
    layer sees, the first 4 of them kept; also for models that make their own caches, for which the library ignores it.
    A warning names the layers that it does not limit, and why. Caches inside a CacheList of mlx-lm are treated one by
    one, except those of an indexer (sparse_indexer.py). Windows of fewer than 2 * (recent + block) tokens, caches that
    hold something else (states, ...) and those inside a CacheList of mlx-vlm stay as the library makes them. `describe`
    says which and why; there is a warning if nothing is left to compress.

    With "memory:6GB" the compressed caches share a budget of memory; prompt caches that are to share one are made by a
    model with that `enable`d, or with `budget`: a prompt cache that is under one, or the MemoryBudget itself. Its limit
    and floor are those of the budget then. So are the caches of a draft model, with the prices of their own `config`:
    `cache += make_prompt_cache(draft_model, draft_config, budget=cache)` is what mlx-lm's speculative decoding takes.

    Raises ValueError for an unknown scheme, a budget that `choose_bits` has not spent yet, schemes for another number
    of layers, a memory of "auto" on a machine that the model fills, and a budget that is over two other models.
    """
    budget = memory_budget_of(budget) if isinstance(budget, list) else budget
    turbo, module, model = TurboConfig.of(config), patch_library_of(model), language_model(model)
    turbo.check_chosen()
    if turbo.memory is not None and budget is None:
        budget = budget_of(model, turbo)
    original = getattr(model, "make_cache", None)
    if isinstance(original, _EnabledMakeCache):
        original = original.original
    from .sparse_indexer import indexers_of_model

    indexers: set[tuple[int, int]] = set()
    if original is not None:
        plain = original()
        indexers = indexers_of_model(model, plain)
        if max_kv_size is not None:
            plain, grow = limit_kv_size(model, plain, max_kv_size, indexers)
            for why, layers in grow.items():
                warnings.warn(
                    f"max_kv_size={max_kv_size} does not limit layers {', '.join(map(str, layers))}: {why}",
                    stacklevel=2,
                )
    elif max_kv_size is not None:
        plain = [module.RotatingKVCache(max_size=max_kv_size, keep=KEEP) for _ in model.layers]
    else:
        plain = [module.KVCache() for _ in model.layers]
    if _reads_state(model, module.KVCache):
        why = "needs a newer mlx-lm" if library_of(model) == "mlx_lm" else "reads the state of other layers' caches"
        warnings.warn(f"nothing is compressed: {model.model_type} {why}", stacklevel=2)
        return plain
    cache = compress(plain, turbo, indexers)
    if budget is not None:
        number = number_in(budget, model, turbo)
        put_under_budget(cache, budget, shapes_of(model, cache, budget, number), number)
    kept = sorted({type(c).__name__ for c in flatten_caches(cache) if not isinstance(c, TurboKVCache)})
    if kept and not any(isinstance(c, TurboKVCache) for c in flatten_caches(cache)):
        warnings.warn(
            f"nothing is compressed: every layer's cache is a {' or '.join(kept)}, neither a plain KVCache "
            "nor a long window",
            stacklevel=2,
        )
    elif kept:
        logger.info(describe(cache))
    return cache


def memory_budget_of(prompt_cache: Any) -> MemoryBudget | None:
    """The budget that caches are under."""
    shares = [c.share for c in flatten_caches(prompt_cache) if isinstance(c, TurboKVCache)]
    return next((share.budget for share in shares if share is not None), None)


class _EnabledMakeCache:
    """The `make_cache` that `enable` sets on a model. original: the one it replaces (None: mlx-lm's default)."""

    def __init__(self, model: Any, config: TurboConfig, original: Any, budget: MemoryBudget | None) -> None:
        self.model, self.config, self.original = model, config, original
        if budget is None and config.memory is not None:
            budget = budget_of(model, config)
        self.budget = budget  # of all caches it makes

    def __call__(self, max_kv_size: int | None = None) -> list[Any]:
        return make_prompt_cache(self.model, self.config, max_kv_size, self.budget)


def enable(
    model: Any, config: str | Scheme | TurboConfig = "turbo4", budget: MemoryBudget | list[Any] | None = None
) -> Any:
    """Make every prompt cache that mlx-lm or mlx-vlm builds for `model` a compressed one, for applications that make
    their own.

    Sets `make_cache` on this model object only (of mlx-vlm's models, on its language_model), and the library's
    make_prompt_cache passes max_kv_size on to it. Calling it again changes the configuration; `disable` undoes it.
    budget: as of make_prompt_cache, for a draft model. Returns the model.

    Raises ValueError for an unknown scheme, and a budget that `choose_bits` has not spent yet.
    """
    turbo = TurboConfig.of(config)
    turbo.check_chosen()
    disable(model)
    patch_library_of(model)
    part = language_model(model)
    budget = memory_budget_of(budget) if isinstance(budget, list) else budget
    part.make_cache = _EnabledMakeCache(part, turbo, getattr(part, "make_cache", None), budget)
    return model


def disable(model: Any) -> Any:
    """Undo `enable`; does nothing if the model is not enabled. Returns the model."""
    part = language_model(model)
    enabled = getattr(part, "make_cache", None)
    if isinstance(enabled, _EnabledMakeCache):
        del part.make_cache
        if enabled.original is not None and getattr(part, "make_cache", None) != enabled.original:
            part.make_cache = enabled.original
    return model


_KEPT = {
    "ArraysCache": "states, which do not grow with the text",
    "ChunkedKVCache": "it holds only the newest chunk",
    "RotatingKVCache": "its window is so short that most of it would stay exact",
    "KVCache": "it was made without mlx_turbo",
    "QuantizedKVCache": "kv_bits made mlx-lm quantize it",
    "MixedBatchCache": "its rows began under several schemes, each of which keeps its own",
    "LayerCache": "the model's own class, which holds a window and tokens that it merges itself",
}


def _why_kept(cache: Any, layer: Any) -> str:
    from .sparse_indexer import IndexedCacheList

    if is_vlm_list(layer):
        return "it is in a CacheList of mlx-vlm"
    if isinstance(layer, IndexedCacheList):
        return "an indexer reads all of its keys at every step, and it has no values"
    return _KEPT.get(type(cache).__name__.removeprefix("Batch"), "mlx_turbo does not know this kind of cache")


def reports(prompt_cache: list[Any]) -> list[tuple[int, Any, dict[str, Any] | None, str | None]]:
    """(layer, cache, report, why) of each cache, those inside a CacheList one by one: its report and None, or None and
    why it is not compressed."""
    found = [(i, layer, cache) for i, layer in enumerate(prompt_cache) for cache in flatten_caches([layer])]
    return [
        (i, cache, cache.report(), None)
        if isinstance(cache, TurboKVCache)
        else (i, cache, None, _why_kept(cache, layer))
        for i, layer, cache in found
    ]


def describe(prompt_cache: list[Any]) -> str:
    """A prompt cache in one line: how many layers are compressed, what stays uncompressed and why, what `auto` chose or
    the widths of each layer, and which layers hold tokens that are not finite. Waits for the tokens to be computed."""
    found = reports(prompt_cache)
    compressed = [(layer, cache) for layer, cache, report, _ in found if report and len(report["exact"]) < 2]
    windows, n_compressed = [c for _, c in compressed if isinstance(c, Window)], len({layer for layer, _ in compressed})
    text = f"{n_compressed} of {len(prompt_cache)} layers compressed"
    if windows:
        sizes = " and ".join(f"{size:,}" for size in sorted({c.max_size for c in windows}))
        schemes, others = (
            {c.config.name for _, c in compressed if isinstance(c, Window) == of} for of in (True, False)
        )
        at = f" at {' and '.join(sorted(schemes))}" if others and schemes != others else ""
        text += f" ({len(windows)} of them windows of {sizes} tokens{at})"
    return (
        text
        + _describe_kept(found)
        + _describe_exact(found)
        + _describe_auto(found)
        + (_describe_widths(found) if (budget := memory_budget_of(prompt_cache)) is None else f"; {budget.describe()}")
        + _describe_not_finite(found)
        + _describe_attention(found)
    )


_Reports = list[tuple[int, Any, dict[str, Any] | None, str | None]]


def _describe_kept(found: _Reports) -> str:
    kept = Counter((type(cache).__name__, why) for _, cache, report, why in found if report is None)
    if {kind for kind, _ in kept} == {"KVCache"} and all(report is None for _, _, report, _ in found):
        return ": this is mlx-lm's own cache"
    return "".join(f"; {kind} ({count}) stays uncompressed: {why}" for (kind, why), count in kept.items())


def _describe_exact(found: _Reports) -> str:
    layers: dict[tuple[str, str], dict[int, None]] = {}
    for layer, _, report, _ in found:
        for side, why in report["exact"].items() if report else ():
            layers.setdefault((side, why), {})[layer] = None
    return "".join(
        f"; {side} of layer{'s' * (len(which) > 1)} {', '.join(map(str, which))} stay exact: {why}"
        for (side, why), which in layers.items()
    )


def _describe_attention(found: _Reports) -> str:
    layers: dict[str, set[int]] = {}
    for layer, _, report, _ in found:
        if report and report["attention"] not in (NOT_YET, NOTHING_PACKED):
            layers.setdefault(report["attention"], set()).add(layer)
    ways = [(*way.partition(": "), len(which)) for way, which in layers.items()]
    texts = [f"{way} in {n} layer{'s' * (n > 1)}" + (f" ({why})" if why else "") for way, _, why, n in ways]
    return f"; attention of the last step: {', '.join(texts)}" if texts else ""


def _describe_auto(found: _Reports) -> str:
    undecided: set[int] = set()
    chosen: dict[int, set[int]] = {}  # bits of keys -> layers
    by: set[str | None] = set()
    for layer, _, report, _ in found:
        if report is None or not report["auto"]:
            continue
        if report["auto"]["undecided"]:
            undecided.add(layer)
        else:
            chosen.setdefault(Scheme.parse(report["scheme"]).key_bits, set()).add(layer)
            by.add(report["auto"]["by"])
    text = f"; auto: not yet decided in {len(undecided)} layers, which have packed nothing" if undecided else ""
    if chosen:
        raised = sorted(chosen, key=lambda bits: bits or 16)
        texts = [f"{f'at {bits} bits' if bits else 'exact'} in {len(chosen[bits])}" for bits in raised]
        texts[0] += " layers"
        texts[1:] = [f"{t} ({', '.join(map(str, sorted(chosen[bits])))})" for t, bits in zip(texts[1:], raised[1:])]
        text += (
            f"; auto: keys {', '.join(texts)}, chosen by {' and '.join(sorted(filter(None, by))) or 'another process'}"
        )
    return text


def _describe_widths(found: _Reports) -> str:
    """Which layers have keys and values of which width, and the average, where the configuration gives layers different
    ones."""
    ours = [(layer, cache) for layer, cache, report, _ in found if report and not report["auto"]]
    if len({cache.config.scheme for _, cache in ours}) < 2:
        return ""
    text = ""
    for i, name in enumerate(("keys", "values")):
        layers: dict[int, dict[int, None]] = {}
        for layer, cache in ours:
            scheme = cache.config.scheme
            layers.setdefault((scheme.key_bits, scheme.value_bits)[i], {})[layer] = None
        at = [
            f"{f'{bits} bits' if bits else 'exact'} in layer{'s' * (len(layers[bits]) > 1)} "
            f"{', '.join(map(str, layers[bits]))}"
            for bits in sorted(layers, key=lambda bits: bits or 16)
        ]
        text += f"; {name}: {', '.join(at)}"
    average = scheme_bits([cache for _, cache in ours])
    return text if average is None else f"{text}; on average {average:.3f} bits per number"


def scheme_bits(caches: list[Any]) -> float | None:
    """Stored bits per number of packed keys and values, scales included, of caches of ours; what stays exact does not
    count. None if nothing is to be packed, or the caches are empty."""
    sides = [side for cache in caches for side in cache._sides if side.recent is not None and side.bits]
    numbers = [side.recent.shape[1] * side.head_dim for side in sides]
    if not numbers:
        return None
    return sum(n * bits_per_value(side.bits, side.head_dim) for n, side in zip(numbers, sides)) / sum(numbers)


def _describe_not_finite(found: _Reports) -> str:
    counts = {
        layer: [sum(by_row) for by_row in report["not_finite"].values()] for layer, _, report, _ in found if report
    }
    bad = {layer: sides for layer, sides in counts.items() if any(sides)}
    if not bad:
        return ""
    keys, values = map(max, zip(*bad.values()))
    return (
        f"; NOT FINITE in {len(bad)} layers ({', '.join(map(str, bad))}): keys of up to {keys} tokens, values of up to "
        f"{values}"
    )
