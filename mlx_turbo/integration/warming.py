"""Building kernels beforehand, so that no answer waits for a compiler in its middle.

A short conversation is held with the model itself and thrown away: it needs what a real one needs, whatever
the model does with its masks, sinks and dtypes. What depends on the text (auto's bits, whether keys are
centred) may turn out otherwise in a real one, so each kind of layer is then tried with random keys of either
sort.

All this happens before the first token, in the thread that generates, not beside it: MLX holds its locks of
libraries and pipelines while it compiles, so a second thread would stop the first one at its next launch.
"""

import contextlib
import warnings
from dataclasses import replace
from typing import NamedTuple, Optional

import mlx.core as mx

from ..backends.attend_launch import MAX_QUERY_TOKENS
from ..backends.select import get_backend
from ..cache import auto_bits, centering
from ..cache.rotating import Window
from ..cache.single import TurboKVCache
from ..quant.scheme import Scheme, TurboConfig
from . import attention
from .prompt_cache import flatten_caches, make_prompt_cache

FEW_SINKS = 4
CHUNK = MAX_QUERY_TOKENS + 1  # tokens of a prompt chunk, which attends to packed ones tile by tile
MARGIN = 2  # auto's error on another text is at most so many times that on this one, or as much less
BIASED = 3  # standard deviations: a mean that carries 0.9 of the energy
TEXT = """Tom had a small red boat. Every morning he took it down to the river, where the water was slow and
clear, and let it sail between the stones. One day the wind was strong, and the boat went faster than he could
run. "Stop!" he cried, but a boat does not listen. It passed the bridge, the mill with its 12 white ducks, and
the big oak tree. At last it got caught in the grass, far from home. Tom sat down, out of breath, and laughed:
"Next time I will hold the string."
"""


def warm(model, tokenizer, config="turbo4", *, n_draft_tokens=0, max_kv_size=None):
    """Build, and check against the reference, the Metal kernels that conversations with `model` will need:
    packing, restoring, attention of a decode step and of up to n_draft_tokens + 1 tokens, over few tokens and
    over many.

    config, max_kv_size: as of `make_prompt_cache`. Costs a prompt of about 70 tokens, with auto of 330, and
    the compiler's time; nothing on a backend without kernels. Call it in the thread that will generate.

    Returns the number of kernels built. Raises BackendError for one that does not build or computes something
    wrong, and ValueError for an unknown scheme.
    """
    backend, config = get_backend(), TurboConfig.of(config)
    if backend.name != "metal":
        return 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whoever makes the cache that is used hears them
        cache = make_prompt_cache(model, config, max_kv_size)
    ours = [c for c in flatten_caches(cache) if isinstance(c, TurboKVCache) and c.config.scheme != Scheme(0, 0)]
    if not ours:
        return 0
    before, seen = backend.n_tested, {}
    for c in ours:
        sink = c.config.sink if isinstance(c, Window) else min(c.config.sink, FEW_SINKS)
        c.config = _packs_at_once(c.config, sink)
        c.observe = _remember(c, seen)
    n_prompt = max(c.packs_beyond for c in ours) + centering.FEWEST
    ids = list(tokenizer.encode(TEXT))
    ids *= -(-n_prompt // len(ids))
    steps = range(1, min(n_draft_tokens + 1, MAX_QUERY_TOKENS) + 1)

    def say(n):
        return model(mx.array([ids[:n]]), cache=cache)

    say(1)  # to an empty cache, which observes nothing
    say(n_prompt)
    mx.eval([c.state for c in cache])
    mx.eval(say(CHUNK))
    for launches in contextlib.nullcontext, backend.two_launches:
        with launches():
            for n in steps:
                mx.eval(say(n))
    for layer in _kinds(ours, seen).values():
        for centred in (False, True) if layer.config.centre else (False,):
            _try_layer(layer, centred, steps)
    return backend.n_tested - before


def _packs_at_once(config, sink):
    return replace(config, sink=sink, recent=0, block=1)


def _remember(cache, seen):
    """In the place of cache.observe: fills `seen` with {id of the cache: (queries, scale, sinks)}."""

    def observe(queries, scale, sinks=None):
        seen[id(cache)] = queries[:, :, :1], scale, sinks
        type(cache).observe(cache, queries, scale, sinks)

    return observe


class _Layer(NamedTuple):
    """A kind of layer. config: with the bits of its keys, which auto chose. queries: [1, n_heads, 1, D], or
    None for a model that does not come to our attention."""

    config: TurboConfig
    auto: bool
    n_kv_heads: int
    key_dim: int
    value_dim: int
    dtype: mx.Dtype
    queries: Optional[mx.array]
    scale: float
    sinks: Optional[mx.array]


def _kinds(caches, seen):
    """One `_Layer` of each kind; with auto also for the bits that another text may come to."""
    kinds = {}
    for c in caches:
        queries, *options = seen.get(id(c), (None, 1.0, None))
        targets = [auto_bits.TARGET / MARGIN, auto_bits.TARGET * MARGIN] if c._errors else []
        bits = {c._sides[0].bits} | {_bits_at(target, c._errors) for target in targets}
        for b in bits:
            config = replace(c.config, scheme=Scheme(b, c.config.scheme.value_bits), sink=0, auto=False)
            layer = _Layer(
                config,
                bool(c._errors),
                c.keys.shape[1],
                c.keys.shape[3],
                c.values.shape[3],
                c.keys.dtype,
                queries,
                *options,
            )
            kinds.setdefault((*layer[:6], None if queries is None else queries.shape[1]), layer)
    return kinds


def _bits_at(target, errors):
    """The key bits that auto would choose with this target; those it has not tried are taken to be enough."""
    return next((b for b in auto_bits.LADDER if b >= min(errors) and errors.get(b, 0) <= target), 0)


def _try_layer(layer, centred, steps):
    """The layer's part of a conversation, with random keys and values."""
    cache, backend, shift = TurboKVCache(layer.config), get_backend(), BIASED if centred else 0

    def say(n):
        keys, values = (
            mx.random.normal((1, layer.n_kv_heads, n, d), key=mx.random.key(n))
            for d in (layer.key_dim, layer.value_dim)
        )
        fetched = cache.update_and_fetch((keys + shift).astype(layer.dtype), values.astype(layer.dtype))
        view = attention.view_of(*fetched)
        if view is not None and layer.queries is not None:
            queries = mx.repeat(layer.queries, n, axis=2)
            mx.eval(attention.attend(queries, view, scale=layer.scale, mask="causal", sinks=layer.sinks))

    say(centering.FEWEST)
    say(CHUNK)
    for launches in contextlib.nullcontext, backend.two_launches:
        with launches():
            for n in steps:
                say(n)
    for bits in [b for b in auto_bits.LADDER if b and layer.auto]:  # auto measures before it chooses
        mx.eval(
            auto_bits.key_error(
                keys=mx.zeros((1, layer.n_kv_heads, 2, layer.key_dim), layer.dtype), bits=bits, config=layer.config
            )
        )
