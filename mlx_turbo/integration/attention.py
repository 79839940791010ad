"""Attention straight from a compressed cache, and the door by which mlx-lm's models reach it.

`update_and_fetch` returns `LazyKV` arrays. The replacement for mlx_lm's scaled_dot_product_attention looks at the
arrays it is given, never at `cache`: when keys and values are the LazyKV of one cache as it is now, attention runs on
the packed state; for anything else the original runs. So a model that transforms its keys, passes another layer's, or
calls attention in its own way stays correct: it reads the lazy arrays and is merely slower.
"""

import sys

import mlx.core as mx

from ..backends.attend_launch import MAX_QUERY_TOKENS
from ..backends.select import get_backend
from ..backends.tiled_attention import tiled_attention
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
    """softmax(scale * q k^T + mask) v over all tokens of a `KVView`, from its packed rows: by the fused kernel where
    the backend has one that covers it (decode), else tile by tile (prompt chunks over a packed past).

    queries: [B, n_heads, L, Dk]. mask: None, "causal" (the queries are the last L tokens), boolean or additive,
    broadcast to [B, n_heads, L, N]. sinks: [n_heads], logits without a value (gpt-oss).

    Returns [B, n_heads, L, Dv] in the queries' dtype. Raises ValueError for shapes that do not belong together.
    """
    H, head_dim = view.keys.recent.shape[1], view.keys.head_dim
    if (
        queries.ndim != 4
        or queries.shape[0] != view.keys.recent.shape[0]
        or queries.shape[1] % H
        or queries.shape[3] != head_dim
    ):
        raise ValueError(
            f"queries: got {tuple(queries.shape)}, expected [{view.keys.recent.shape[0]}, a multiple of "
            f"{H} heads, tokens, {head_dim}]"
        )
    if view.cache is not None:
        view.cache.attended_version = view.version
    if view.n_evicted:
        mask = _mask_dead(mask, view, queries.shape[2])
    backend, keys, values = get_backend(backend), view.keys, view.values
    options = dict(scale=scale, mask=mask, sinks=sinks, seed=view.seed)
    if backend.why_not_fused((keys.bits, head_dim), (values.bits, values.head_dim), queries.shape[2]):
        return tiled_attention(
            queries, keys, values, view.counts, backend.read_rows, ahead=backend.tiles_ahead, **options
        )
    return backend.attend(queries, keys, values, view.counts, **options)


def _mask_dead(mask, view, n_queries):
    """`mask` over all tokens of a view's buffers, those that are dead masked."""
    n_sink, n_tokens = view.counts[0], sum(view.counts)
    columns = mx.arange(n_tokens)
    alive = (columns < n_sink) | (columns >= n_sink + view.n_evicted)
    if mask is None:
        return alive
    if isinstance(mask, str):
        return alive & (columns <= mx.arange(n_tokens - n_queries, n_tokens)[:, None])
    mask = mx.broadcast_to(mask, (*mask.shape[:-1], n_tokens - view.n_evicted))
    dead = False if mask.dtype == mx.bool_ else -float("inf")
    dead = mx.full((*mask.shape[:-1], view.n_evicted), dead, mask.dtype)
    return mx.concatenate([mask[..., :n_sink], dead, mask[..., n_sink:]], axis=-1)


def scaled_dot_product_attention(queries, keys, values, cache, scale, mask=None, sinks=None, **options):
    """In the place of mlx_lm.models.base.scaled_dot_product_attention."""
    view = None if options else view_of(keys, values)
    if view is None:
        return _original(queries, keys, values, cache, scale=scale, mask=mask, sinks=sinks, **options)
    if view.cache.undecided or not view.counts[1] and queries.shape[2] > MAX_QUERY_TOKENS:  # nothing is packed
        out = _original(queries, keys, values, cache, scale=scale, mask=mask, sinks=sinks)
        view.cache.observe(queries, scale, sinks)
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
