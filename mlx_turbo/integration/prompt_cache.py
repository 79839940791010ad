"""The door into mlx-lm: compressed caches for its models. The only module that needs mlx_lm, and it imports it late."""

import logging
import re
import warnings

from ..cache.batch import BatchTurboKVCache
from ..cache.batch_rotating import BatchRotatingTurboKVCache
from ..cache.rotating import RotatingTurboKVCache, Window
from ..cache.single import TurboKVCache
from ..quant.scheme import Scheme, TurboConfig
from . import attention

logger = logging.getLogger("mlx_turbo")
OLDEST_MLX_LM = (0, 31, 2)


def patch_mlx_lm():
    """Open the door: our classes where mlx_lm.load_prompt_cache looks classes up by name, and our attention where its
    models look theirs up. Returns mlx_lm.models.cache.

    Raises ImportError for an mlx-lm that is too old.
    """
    import mlx_lm
    import mlx_lm.models.cache as module

    version = tuple(int(part) for part in re.findall(r"\d+", mlx_lm.__version__)[:3])
    if version < OLDEST_MLX_LM:
        raise ImportError(
            f"mlx_turbo needs mlx-lm {'.'.join(map(str, OLDEST_MLX_LM))} or newer, "
            f"this is {mlx_lm.__version__}: pip install -U mlx-lm"
        )
    from .sparse_indexer import BatchIndexerKVCache, IndexedCacheList

    of_batches = BatchTurboKVCache, BatchRotatingTurboKVCache, BatchIndexerKVCache
    for cache in (TurboKVCache, RotatingTurboKVCache, IndexedCacheList, *of_batches):
        setattr(module, cache.__name__, cache)
    attention.install()
    return module


def is_long_window(cache, config):
    """Whether a cache is a RotatingKVCache of at least twice the tokens that stay exact: else there is little to save."""
    from mlx_lm.models.cache import RotatingKVCache

    return type(cache) is RotatingKVCache and cache.max_size - cache.keep >= 2 * (config.recent + config.block)


def flatten_caches(prompt_cache):
    """The caches of a prompt cache, those inside a CacheList one by one."""
    return [m for c in prompt_cache for m in (flatten_caches(c.caches) if hasattr(c, "caches") else [c])]


def compress(prompt_cache, config, indexers=None):
    """A prompt cache with the tokens of another: its plain KV caches and long windows compressed, also those inside a
    CacheList. indexers: {(layer, member)} of the KVCaches in a CacheList that stay; found by their tokens if not given.
    """
    from mlx_lm.models.cache import KVCache

    from .sparse_indexer import IndexedCacheList, indexers_of_tokens

    indexers = indexers_of_tokens(prompt_cache) if indexers is None else indexers

    def compressed(cache, own):
        if type(cache) is KVCache:
            held = None if cache.empty() else [x[:, :, : cache.offset] for x in (cache.keys, cache.values)]
            cache = TurboKVCache(own)
            if held:
                cache.update_and_fetch(*held)
        elif is_long_window(cache, own):
            cache = RotatingTurboKVCache.of(cache, own)
        return cache

    out = []
    for i, c in enumerate(prompt_cache):
        own = config.for_layer(i, len(prompt_cache))
        if not hasattr(c, "caches"):
            out.append(compressed(c, own))
            continue
        kept = [(i, j) in indexers for j in range(len(c.caches))]
        inside = [m if keep else compressed(m, own) for m, keep in zip(c.caches, kept)]
        out.append((IndexedCacheList if any(kept) else type(c))(*inside))
    return out


def _reads_state(model, kv_cache):
    """Whether layers of the model unpack `cache.state` of another layer, which only a KVCache can serve: these two
    families did before mlx-lm's caches had `keys_and_values`."""
    return not hasattr(kv_cache, "keys_and_values") and getattr(model, "model_type", None) in ("afm7", "gemma3n")


def make_prompt_cache(model, config="turbo4", max_kv_size=None):
    """A prompt cache for `model` with TurboKVCache where mlx_lm.models.cache.make_prompt_cache has a KVCache, and
    RotatingTurboKVCache where it has a RotatingKVCache (sliding windows).

    config: a scheme's name, a Scheme or a TurboConfig. max_kv_size: as in mlx-lm, a window for models that do not make
    caches of their own; their first 4 tokens stay. Inside a CacheList the same is done cache by cache, but for an
    indexer's (indexer.py). Windows of less than 2 * (recent + block) tokens and what holds something else (states, ...)
    stay as mlx-lm makes them; `describe` says which and why, a warning is given if that leaves nothing to compress.

    Raises ValueError for an unknown scheme.
    """
    config, module = TurboConfig.of(config), patch_mlx_lm()
    original = getattr(model, "make_cache", None)
    if isinstance(original, _EnabledMakeCache):
        original = original.original
    if original is not None:
        plain = original()
    elif max_kv_size is not None:
        plain = [module.RotatingKVCache(max_size=max_kv_size, keep=4) for _ in model.layers]
    else:
        plain = [module.KVCache() for _ in model.layers]
    if _reads_state(model, module.KVCache):
        warnings.warn(f"nothing is compressed: {model.model_type} needs a newer mlx-lm for that", stacklevel=2)
        return plain
    from .sparse_indexer import indexers_of_model

    cache = compress(plain, config, indexers_of_model(model, plain))
    kept = sorted({type(c).__name__ for c in flatten_caches(cache) if not isinstance(c, TurboKVCache)})
    if len(kept) and not any(isinstance(c, TurboKVCache) for c in flatten_caches(cache)):
        warnings.warn(
            f"nothing is compressed: every layer's cache is a {' or '.join(kept)}, neither a plain KVCache "
            "nor a long window",
            stacklevel=2,
        )
    elif kept:
        logger.info(describe(cache))
    return cache


class _EnabledMakeCache:
    """The `make_cache` that `enable` puts on a model; remembers the one it replaces (None: mlx-lm's default)."""

    def __init__(self, model, config, original):
        self.model, self.config, self.original = model, config, original

    def __call__(self):
        return make_prompt_cache(self.model, self.config)


def enable(model, config="turbo4"):
    """Make every prompt cache that mlx-lm builds for `model` a compressed one: for applications that make their own.

    Sets `make_cache` on this model object only. Calling it again changes the configuration; `disable` undoes it.
    Returns the model. Raises ValueError for an unknown scheme.
    """
    config = TurboConfig.of(config)
    disable(model)
    patch_mlx_lm()
    model.make_cache = _EnabledMakeCache(model, config, getattr(model, "make_cache", None))
    return model


def disable(model):
    """Undo `enable`; does nothing if the model is not enabled. Returns the model."""
    enabled = getattr(model, "make_cache", None)
    if isinstance(enabled, _EnabledMakeCache):
        del model.make_cache
        if enabled.original is not None and getattr(model, "make_cache", None) != enabled.original:
            model.make_cache = enabled.original
    return model


_KEPT = {
    "ArraysCache": "states, which do not grow with the text",
    "ChunkedKVCache": "it holds the newest chunk only",
    "RotatingKVCache": "of so short a window most would stay exact",
    "KVCache": "it was made without mlx_turbo",
    "QuantizedKVCache": "kv_bits asked mlx-lm for it",
    "LayerCache": "the model's own, of a window and of tokens that it merges itself",
}


def _why_kept(cache, layer):
    from .sparse_indexer import IndexedCacheList

    if isinstance(layer, IndexedCacheList):
        return "an indexer reads every key of it at each step, and it has no values"
    return _KEPT.get(type(cache).__name__.removeprefix("Batch"), "a kind that is not known here")


def reports(prompt_cache):
    """(layer, cache, report, why) of each cache, those inside a CacheList one by one: its report, or None and why it is
    not compressed."""
    found = [(i, layer, cache) for i, layer in enumerate(prompt_cache) for cache in flatten_caches([layer])]
    return [
        (i, cache, cache.report(), None)
        if isinstance(cache, TurboKVCache)
        else (i, cache, None, _why_kept(cache, layer))
        for i, layer, cache in found
    ]


def describe(prompt_cache):
    """One line on a prompt cache: how many layers are compressed, what else they hold and why, and which hold tokens
    that are not finite. Waits for the tokens to be computed."""
    kept, compressed, chosen, by, undecided, not_finite = {}, set(), {}, set(), set(), {}
    for i, cache, report, why in reports(prompt_cache):
        if report is None:
            kept[type(cache).__name__, why] = kept.get((type(cache).__name__, why), 0) + 1
            continue
        compressed.add(i)
        if any(bad := [sum(by_row) for by_row in report["not_finite"].values()]):
            not_finite[i] = bad
        if report["auto"] and report["auto"]["undecided"]:
            undecided.add(i)
        elif report["auto"]:
            chosen.setdefault(Scheme.parse(report["scheme"]).key_bits, set()).add(i)
            by.add(report["auto"]["by"])
    n = len(prompt_cache)
    text = f"{len(compressed)} of {n} layers compressed"
    if windows := [c.max_size for c in flatten_caches(prompt_cache) if isinstance(c, Window)]:
        text += f" ({len(windows)} of them windows of {' and '.join(f'{w:,}' for w in sorted(set(windows)))} tokens)"
    if {kind for kind, _ in kept} == {"KVCache"} and not compressed:
        text += ": this is mlx-lm's own cache"
    else:
        text += "".join(f"; {kind} ({count}) stays: {why}" for (kind, why), count in kept.items())
    if undecided:
        text += f"; auto: not yet decided in {len(undecided)} layers, nothing of them is packed"
    if chosen:
        raised = sorted(chosen, key=lambda bits: bits or 16)
        texts = [f"{f'at {bits} bits' if bits else 'exact'} in {len(chosen[bits])}" for bits in raised]
        texts[0] += " layers"
        texts[1:] = [f"{t} ({', '.join(map(str, sorted(chosen[bits])))})" for t, bits in zip(texts[1:], raised[1:])]
        text += (
            f"; auto: keys {', '.join(texts)}, chosen by {' and '.join(sorted(filter(None, by))) or 'another process'}"
        )
    if not_finite:
        keys, values = map(max, zip(*not_finite.values()))
        layers = ", ".join(map(str, not_finite))
        text += (
            f"; NOT FINITE in {len(not_finite)} layers ({layers}): keys of {keys} tokens at most, values of {values}"
        )
    return text
