"""Attention straight from a compressed cache, and the door by which mlx-lm's models reach it.

`update_and_fetch` returns `LazyKV` arrays. The replacement for mlx_lm's scaled_dot_product_attention looks at the
arrays it is given, never at `cache`: when keys and values are the LazyKV of one cache as it is now, attention runs on
the packed state; for anything else the original runs. So a model that transforms its keys, passes another layer's, or
calls attention in its own way stays correct: it reads the lazy arrays and is merely slower.
"""

import sys

from ..backends.attend_launch import MAX_QUERY_TOKENS
from ..backends.select import get_backend
from ..cache.last_step import BY_THE_MODEL, ELSEWHERE, NOT_SEEN, NOT_YET, NOTHING_PACKED, register_attention
from ..cache.single import TurboKVCache
from ..cache.view import LazyKV

_original = None  # mlx_lm's function, while ours is installed


def view_of(keys, values):
    """The `KVView` whose keys and values these two arrays are, or None."""
    if type(keys) is not LazyKV or type(values) is not LazyKV:
        return None
    view = keys.view
    if view is not values.view or (keys.side, values.side) != (0, 1) or not view.is_current():
        return None
    return view


def attend(queries, view, *, scale, mask=None, sinks=None, backend=None):
    """softmax(scale * q k^T + mask) v over all tokens of a `KVView`, by `attend_sides` of backends/attend.py.

    queries: [B, n_heads, L, Dk]. mask: None, "causal" (the queries are the last L tokens), boolean or additive,
    broadcast to [B, n_heads, L, N]. sinks: [n_heads], logits without a value (gpt-oss).

    Returns [B, n_heads, L, Dv] in the queries' dtype. Raises ValueError for shapes that do not belong together.
    """
    from ..backends.attend import attend_sides, way_of  # with the operations of the CPU fallback: when they are needed

    backend = get_backend(backend)
    way = way_of(view.keys, view.values, view.counts, queries.shape[2], backend)
    if view.cache is not None:
        view.cache.attended_version, view.cache.last_attention = view.version, way
    options = dict(
        scale=scale, mask=mask, sinks=sinks, seed=view.seed, n_evicted=view.n_evicted, backend=backend, way=way
    )
    return attend_sides(queries, view.keys, view.values, view.counts, **options)


def scaled_dot_product_attention(queries, keys, values, cache, scale, mask=None, sinks=None, **options):
    """In the place of mlx_lm.models.base.scaled_dot_product_attention."""
    view = None if options else view_of(keys, values)
    if view is None:
        if isinstance(cache, TurboKVCache):
            note = {NOT_SEEN: BY_THE_MODEL, ELSEWHERE: BY_THE_MODEL, NOT_YET: NOTHING_PACKED}
            cache.last_attention = note.get(cache.last_attention, cache.last_attention)
        return _original(queries, keys, values, cache, scale=scale, mask=mask, sinks=sinks, **options)
    if view.cache.undecided or not view.counts[1] and queries.shape[2] > MAX_QUERY_TOKENS:  # nothing is packed
        out = _original(queries, keys, values, cache, scale=scale, mask=mask, sinks=sinks)
        view.cache.observe(queries, scale, sinks)
        view.cache.last_attention = NOTHING_PACKED
        return out
    return attend(queries, view, scale=scale, mask=mask, sinks=sinks)


def install():
    """Put our scaled_dot_product_attention into mlx_lm.models.base and every loaded model module that has the
    original. Does nothing where it is already there; `uninstall` undoes it. Models loaded later import ours."""
    global _original
    import mlx_lm.models.base as base

    if base.scaled_dot_product_attention is not scaled_dot_product_attention:
        _original = base.scaled_dot_product_attention
    _replace(_original, scaled_dot_product_attention)


def uninstall():
    """Put mlx_lm's own function back everywhere."""
    if _original is not None:
        _replace(scaled_dot_product_attention, _original)


def _replace(old, new):
    for name, module in list(sys.modules.items()):
        if name.startswith("mlx_lm.models.") and getattr(module, "scaled_dot_product_attention", None) is old:
            module.scaled_dot_product_attention = new


def is_installed():
    """Whether our attention is in mlx-lm's place; also if mlx-lm is not loaded."""
    base = sys.modules.get("mlx_lm.models.base")
    return base is None or base.scaled_dot_product_attention is scaled_dot_product_attention


register_attention(is_installed)
