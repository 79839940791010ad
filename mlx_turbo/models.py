"""The door into mlx-lm: compressed caches for its models. The only module that needs mlx_lm, and it imports it late."""
import logging
import re
import warnings

from . import attention
from .batch import BatchTurboKVCache
from .batch_rotating import BatchRotatingTurboKVCache
from .cache import TurboKVCache
from .rotating import RotatingTurboKVCache, Window
from .scheme import Scheme, TurboConfig

logger = logging.getLogger("mlx_turbo")
OLDEST_MLX_LM = (0, 31, 2)


def register():
    """Open the door: our classes where mlx_lm.load_prompt_cache looks classes up by name, and our attention where its
    models look theirs up. Returns mlx_lm.models.cache.

    Raises ImportError for an mlx-lm that is too old.
    """
    import mlx_lm
    import mlx_lm.models.cache as module

    version = tuple(int(part) for part in re.findall(r"\d+", mlx_lm.__version__)[:3])
    if version < OLDEST_MLX_LM:
        raise ImportError(f"mlx_turbo needs mlx-lm {'.'.join(map(str, OLDEST_MLX_LM))} or newer, "
                          f"this is {mlx_lm.__version__}: pip install -U mlx-lm")
    for cache in (TurboKVCache, RotatingTurboKVCache, BatchTurboKVCache, BatchRotatingTurboKVCache):
        setattr(module, cache.__name__, cache)
    attention.install()
    return module


def is_long_window(cache, config):
    """Whether a cache is a RotatingKVCache of at least twice the tokens that stay exact: else there is little to save."""
    from mlx_lm.models.cache import RotatingKVCache

    return type(cache) is RotatingKVCache and cache.max_size - cache.keep >= 2 * (config.recent + config.block)


def _compress(cache, config, kv_cache):
    """Replace the plain KV caches and the long windows of a prompt cache in a new list."""
    out = []
    for i, c in enumerate(cache):
        own = config.for_layer(i, len(cache))
        if type(c) is kv_cache:
            c = TurboKVCache(own)
        elif is_long_window(c, own):
            c = RotatingTurboKVCache(c.max_size, c.keep, own)
        out.append(c)
    return out


def _reads_state(model, kv_cache):
    """Whether layers of the model unpack `cache.state` of another layer, which only a KVCache can serve: these two
    families did before mlx-lm's caches had `keys_and_values`."""
    return not hasattr(kv_cache, "keys_and_values") and getattr(model, "model_type", None) in ("afm7", "gemma3n")


def make_prompt_cache(model, config="turbo4", max_kv_size=None):
    """A prompt cache for `model` with TurboKVCache where mlx_lm.models.cache.make_prompt_cache has a KVCache, and
    RotatingTurboKVCache where it has a RotatingKVCache (sliding windows).

    config: a scheme's name, a Scheme or a TurboConfig. max_kv_size: as in mlx-lm, a window for models that do not make
    caches of their own; their first 4 tokens stay. Windows of less than 2 * (recent + block) tokens and layers that
    hold something else (state-space, ...) keep the cache mlx-lm gives them; `describe` says which, a warning is given
    if that leaves nothing to compress.

    Raises ValueError for an unknown scheme.
    """
    config, module = TurboConfig.of(config), register()
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
    cache = _compress(plain, config, module.KVCache)
    kept = sorted({type(c).__name__ for c in cache if not isinstance(c, TurboKVCache)})
    if len(kept) and not any(isinstance(c, TurboKVCache) for c in cache):
        warnings.warn(f"nothing is compressed: every layer's cache is a {' or '.join(kept)}, neither a plain KVCache "
                      "nor a long window", stacklevel=2)
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
    register()
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


def reports(prompt_cache):
    """(layer, cache, report or None) of each layer; None where the layer is not compressed."""
    return [(i, c, c.report() if isinstance(c, TurboKVCache) else None) for i, c in enumerate(prompt_cache)]


def describe(prompt_cache):
    """One line on a prompt cache: how many layers are compressed, and what the others keep and why."""
    kept, chosen, by, undecided = {}, {}, set(), 0
    for i, cache, report in reports(prompt_cache):
        if report is None:
            kept[type(cache).__name__] = kept.get(type(cache).__name__, 0) + 1
        elif report["auto"] and report["auto"]["undecided"]:
            undecided += 1
        elif report["auto"]:
            chosen.setdefault(Scheme.parse(report["scheme"]).key_bits, []).append(i)
            by.add(report["auto"]["by"])
    n = len(prompt_cache)
    text = f"{n - sum(kept.values())} of {n} layers compressed"
    if windows := [c.max_size for c in prompt_cache if isinstance(c, Window)]:
        text += f" ({len(windows)} of them windows of {' and '.join(f'{w:,}' for w in sorted(set(windows)))} tokens)"
    if set(kept) == {"KVCache"}:
        text += ": this is mlx-lm's own cache"
    elif kept:
        text += "; neither a plain KV cache nor a long window and left as it is: "
        text += ", ".join(f"{k} ({v})" for k, v in kept.items())
    if undecided:
        text += f"; auto: not yet decided in {undecided} layers, nothing of them is packed"
    if chosen:
        raised = sorted(chosen, key=lambda bits: bits or 16)
        texts = [f"{f'at {bits} bits' if bits else 'exact'} in {len(chosen[bits])}" for bits in raised]
        texts[0] += " layers"
        texts[1:] = [f"{t} ({', '.join(map(str, chosen[bits]))})" for t, bits in zip(texts[1:], raised[1:])]
        text += f"; auto: keys {', '.join(texts)}, chosen by {' and '.join(sorted(filter(None, by))) or 'another process'}"
    return text
