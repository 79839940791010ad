"""Building kernels beforehand, so that no answer waits for the compiler halfway.

A short conversation is held with the model itself and thrown away: it needs what a real one needs, whatever the model
does with its masks, sinks and dtypes. What depends on the text (auto's bits, whether keys are centered) may turn out
differently in a real conversation, so each kind of layer is then also tried with random keys of both sorts.

All this happens before the first token, in the thread that generates and not in a second one: MLX holds its locks of
libraries and pipelines while it compiles, so the first thread would stop at its next launch anyway.
"""

import contextlib
import itertools
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import mlx.core as mx

from ..backends import select
from ..backends.attend_launch import MAX_QUERY_TOKENS
from ..backends.select import GPUS, get_backend
from ..backends.sides import PackedSide
from ..cache import attention_error, auto_bits, centering
from ..cache.repacking import reachable_pairs, rungs
from ..cache.rotating import Window
from ..cache.single import TurboKVCache
from ..quant.rotation import can_rotate
from ..quant.scheme import Scheme, TurboConfig, words_per_row
from . import attention
from .bit_budget import without_budget
from .libraries import language_model
from .prompt_cache import flatten_caches, make_prompt_cache

FEW_SINKS = 4
CHUNK = MAX_QUERY_TOKENS + 1  # tokens of a prompt chunk, which attends to packed ones tile by tile
MARGIN = 2  # auto's error on another text is taken to be within this factor of that on this one, up or down
BIASED = 3  # standard deviations; a mean this large carries 0.9 of the energy
TEXT = """Tom had a small red boat. Every morning he took it down to the river, where the water was slow and
clear, and let it sail between the stones. One day the wind was strong, and the boat went faster than he could
run. "Stop!" he cried, but a boat does not listen. It passed the bridge, the mill with its 12 white ducks, and
the big oak tree. At last it got caught in the grass, far from home. Tom sat down, out of breath, and laughed:
"Next time I will hold the string."
"""


def warm(
    model: Any,
    tokenizer: Any,
    config: str | Scheme | TurboConfig = "turbo4",
    *,
    n_draft_tokens: int = 0,
    max_kv_size: int | None = None,
) -> int:
    """Build the GPU kernels that conversations with `model` will need, and check them against the reference: packing,
    restoring, and attention of a decode step and of up to n_draft_tokens + 1 tokens, over few tokens and over many.

    tokenizer: of a model of mlx-vlm, its processor too. config, max_kv_size: as for `make_prompt_cache`. Costs a prompt
    of about 70 tokens (with auto, 330) and the compiler's time; with a budget of memory once for each number of bits,
    and for all pairs that it may lead to. Does nothing on a backend without kernels. Call it in the thread that will
    generate.

    Returns the number of kernels built. Raises BackendError if a kernel does not build or computes something wrong, and
    ValueError for an unknown scheme.
    """
    backend, turbo = get_backend(), TurboConfig.of(config)
    if backend.name not in GPUS:
        return 0
    before, steps = backend.n_tested, range(1, min(n_draft_tokens + 1, MAX_QUERY_TOKENS) + 1)
    widths = [turbo] if turbo.memory is None else _equal_widths(turbo)
    for own in widths:
        layers = _talk(model, tokenizer, own, max_kv_size, steps)
    if turbo.memory is not None and widths:
        for layer in layers:
            _try_pairs(layer, turbo, steps)
    return backend.n_tested - before


def _talk(model: Any, tokenizer: Any, config: TurboConfig, max_kv_size: int | None, steps: range) -> list["_Layer"]:
    """A short conversation under a configuration, and all kinds of layers by themselves. Returns these."""
    backend = get_backend()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are given when the real cache is made
        cache = make_prompt_cache(model, config, max_kv_size)
    ours = [c for c in flatten_caches(cache) if isinstance(c, TurboKVCache) and c.config.scheme != Scheme(0, 0)]
    if not ours:
        return []
    seen: dict[int, Any] = {}
    for c in ours:
        sink = c.config.sink if isinstance(c, Window) else min(c.config.sink, FEW_SINKS)
        c.config = _packs_at_once(c.config, sink)
        setattr(c, "observe", _remember(c, seen))
    n_prompt = max(c.packs_beyond for c in ours) + centering.FEWEST
    ids = list(getattr(tokenizer, "tokenizer", tokenizer).encode(TEXT))
    ids *= -(-n_prompt // len(ids))
    part = language_model(model)

    def say(n: int) -> mx.array:
        out = part(mx.array([ids[:n]]), cache=cache)
        return getattr(out, "logits", out)  # mlx-vlm's models return more than the logits

    say(1)  # an empty cache observes nothing
    say(n_prompt)
    mx.eval([c.state for c in cache])
    mx.eval(say(CHUNK))
    for launches in contextlib.nullcontext, backend.two_launches:
        with launches():
            for n in steps:
                mx.eval(say(n))
    layers = list(_kinds(ours, seen).values())
    for layer in layers:
        for centered in (False, True) if layer.config.centre else (False,):
            _try_layer(layer, centered, steps)
    return layers


def _equal_widths(config: TurboConfig) -> list[TurboConfig]:
    """Of the pairs that a budget of memory may lead to, those down the middle: keys and values at the same rung."""
    sides = [rungs(bits) for bits in (config.floor.key_bits, config.floor.value_bits)]
    numbers = range(1, max(map(len, sides)))
    schemes = [Scheme(*(of_side[min(i, len(of_side) - 1)] for of_side in sides)) for i in numbers]
    return [replace(without_budget(config), scheme=scheme) for scheme in schemes]


def _try_pairs(layer: "_Layer", config: TurboConfig, steps: range) -> None:
    """What a layer under a budget of memory needs besides: the other pairs that it may have, and the steps to them."""
    dims = layer.key_dim, layer.value_dim
    floor = Scheme(*(b if can_rotate(d) else 0 for b, d in zip((config.floor.key_bits, config.floor.value_bits), dims)))
    tried = {Scheme(0, 0), *(own.scheme for own in _equal_widths(config))}
    for scheme in (Scheme(*pair) for pair in reachable_pairs(floor)):
        if scheme not in tried:
            own = layer._replace(config=replace(layer.config, scheme=scheme))
            for centered in (False, True) if layer.config.centre and scheme.key_bits else (False,):
                _try_layer(own, centered, steps)
    for lowest, dim in zip((floor.key_bits, floor.value_bits), dims):
        for had, bits in itertools.combinations(rungs(lowest)[1:], 2):
            codes, scale = mx.zeros((1, 1, 16, words_per_row(had, dim)), mx.uint32), mx.zeros((1, 1, 16, 1), mx.float16)
            mx.eval(select.requantize_side(PackedSide(codes, scale, had, dim), bits, scale=layer.config.scale))


def _packs_at_once(config: TurboConfig, sink: int) -> TurboConfig:
    return replace(config, sink=sink, recent=0, block=1)


def _remember(cache: TurboKVCache, seen: dict[int, Any]) -> Callable[..., None]:
    """A replacement for cache.observe that also fills `seen` with {id of the cache: (queries, scale, sinks)}."""

    def observe(queries: mx.array, scale: float, sinks: mx.array | None = None) -> None:
        seen[id(cache)] = queries[:, :, :1], scale, sinks
        type(cache).observe(cache, queries, scale, sinks)

    return observe


class _Layer(NamedTuple):
    """A kind of layer. config: with the key bits that auto chose. queries: [1, n_heads, 1, D], or None for a model that
    does not call our attention."""

    config: TurboConfig
    auto: bool
    n_kv_heads: int
    key_dim: int
    value_dim: int
    dtype: mx.Dtype
    queries: mx.array | None
    scale: float
    sinks: mx.array | None


def _kinds(caches: list[TurboKVCache], seen: dict[int, Any]) -> dict[Any, _Layer]:
    """One `_Layer` of each kind; with auto, also for the bits that another text may lead to."""
    kinds: dict[Any, _Layer] = {}
    for c in caches:
        keys, values = (side.recent for side in c._sides)  # a prompt has gone through
        queries, *options = seen.get(id(c), (None, 1.0, None))
        targets = [auto_bits.TARGET / MARGIN, auto_bits.TARGET * MARGIN] if c._errors else []
        bits = {c._sides[0].bits} | {_bits_at(target, c._errors) for target in targets}
        for b in bits:
            config = replace(c.config, scheme=Scheme(b, c._sides[1].bits), sink=0, auto=False)
            layer = _Layer(
                config,
                bool(c._errors),
                keys.shape[1],
                keys.shape[3],
                values.shape[3],
                keys.dtype,
                queries,
                *options,
            )
            kinds.setdefault((*layer[:6], None if queries is None else queries.shape[1]), layer)
    return kinds


def _bits_at(target: float, errors: dict[int, float]) -> int:
    """The key bits that auto would choose with this target; widths it has not tried are assumed to be enough."""
    return next((b for b in auto_bits.LADDER if b >= min(errors) and errors.get(b, 0) <= target), 0)


def _try_layer(layer: _Layer, centered: bool, steps: range) -> None:
    """The layer's part of a conversation, with random keys and values."""
    cache, backend, shift = TurboKVCache(layer.config), get_backend(), BIASED if centered else 0

    def say(n: int) -> None:
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
    if layer.auto:  # which measures before it chooses
        keys = mx.zeros((1, layer.n_kv_heads, 2, layer.key_dim), layer.dtype)
        mx.eval(attention_error.key_errors(keys, auto_bits.MEASURED, layer.config))
