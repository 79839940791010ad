"""Attention over the sides of a cache: which of three ways serves a call.

fused     up to 16 query tokens (decode, drafts), where the backend has a kernel: it reads the packed rows themselves
restored  more query tokens, a prompt chunk over a packed past: the past is restored once, in the model's dtype, and
          MLX's own attention does the rest, at its speed and with its memory. Restoring waits for the layer's own
          queries, and a long past for the layer before the last one, so that the layers of a step do not all hold
          their past at once
tiles     the rest: no kernel, or a past of more than MAX_RESTORED_BYTES; tile by tile, in bounded memory
"""

import collections
import os
import threading

import mlx.core as mx

from .attend_launch import MAX_QUERY_TOKENS
from .restore import restore
from .select import get_backend
from .tiled_attention import tiled_attention

# Keys and values of one layer, in the model's dtype. A past of 128K tokens takes 512 MB with 8 kv heads of 128 dims.
MAX_RESTORED_BYTES = 1 << 30

# From this size on, restoring a past waits for the layer before the last one: MLX takes memory ahead of the GPU.
LONG_PAST_BYTES = 1 << 26
LAYERS_AT_ONCE = 2


def max_restored_bytes():
    """MAX_RESTORED_BYTES, or what the environment variable MLX_TURBO_MAX_RESTORED_BYTES says instead."""
    given = os.environ.get("MLX_TURBO_MAX_RESTORED_BYTES")
    if given is None:
        return MAX_RESTORED_BYTES
    if not given.isdigit():
        raise ValueError(f"MLX_TURBO_MAX_RESTORED_BYTES: got {given!r}, expected a number of bytes")
    return int(given)


def way_of(keys, values, counts, n_queries, backend=None):
    """How `attend_sides` serves n_queries query tokens: "fused", or "restored" or "tiles" and why."""
    why = get_backend(backend).why_not_fused((keys.bits, keys.head_dim), (values.bits, values.head_dim), n_queries)
    if not why:
        return "fused"
    if n_queries <= MAX_QUERY_TOKENS:
        return f"tiles: {why}"
    n_bytes, most = _restored_bytes(keys, values, counts), max_restored_bytes()
    if n_bytes <= most:
        return f"restored: a chunk of {n_queries} tokens"
    return f"tiles: a past of {n_bytes:,} bytes, at most {most:,} are restored"


def attend_sides(
    queries,
    keys,
    values,
    counts,
    *,
    scale,
    mask=None,
    sinks=None,
    seed=0,
    n_evicted=0,
    backend=None,
    way=None,
    rope=None,
):
    """softmax(scale * q k^T + mask) v over all tokens of a cache.

    queries: [B, n_heads, L, Dk]. keys, values: `CachedSide`. counts: (n_sink, n_packed, n_recent), the order of the
    tokens. mask: None, "causal" (the queries are the last L tokens), boolean or additive, broadcast to
    [B, n_heads, L, N]; it knows nothing of the first n_evicted packed tokens, which no query sees. sinks: [n_heads],
    logits without a value (gpt-oss). way: what `way_of` says, if it is at hand. rope: a `RopePart`, whose products are
    added to the logits; not with a prompt chunk, which is restored.

    Returns [B, n_heads, L, Dv] in the queries' dtype. Raises ValueError for shapes that do not belong together.
    """
    batch, n_kv_heads = keys.recent.shape[:2]
    dims = queries.shape
    if len(dims) != 4 or dims[0] != batch or dims[1] % n_kv_heads or dims[3] != keys.head_dim:
        allowed = f"[{batch}, a multiple of {n_kv_heads} heads, tokens, {keys.head_dim}]"
        raise ValueError(f"queries: got {tuple(dims)}, expected {allowed}")
    backend, n_queries = get_backend(backend), queries.shape[2]
    way = way or way_of(keys, values, counts, n_queries, backend)
    options = dict(scale=scale, mask=mask, sinks=sinks)
    if way == "fused":
        if n_evicted:
            options["mask"] = _mask_evicted(mask, counts, n_evicted, n_queries)
        return backend.attend(queries, keys, values, counts, seed=seed, rope=rope, **options)
    if way.startswith("restored"):
        return _attend_restored(queries, keys, values, counts, backend, seed, n_evicted, **options)
    if n_evicted:
        options["mask"] = _mask_evicted(mask, counts, n_evicted, n_queries)
    return tiled_attention(
        queries, keys, values, counts, backend.read_rows, ahead=backend.tiles_ahead, seed=seed, rope=rope, **options
    )


def _restored_bytes(keys, values, counts):
    batch, n_kv_heads = keys.recent.shape[:2]
    return batch * n_kv_heads * sum(counts) * (keys.head_dim + values.head_dim) * keys.recent.dtype.size


def _attend_restored(queries, keys, values, counts, backend, seed, n_evicted, *, scale, mask, sinks):
    is_long = _restored_bytes(keys, values, counts) >= LONG_PAST_BYTES
    if is_long:
        _wait_for_layers(LAYERS_AT_ONCE - 1)
    keys, values = (_behind(queries, side) for side in (keys, values))
    k, v = restore(keys, values, counts, backend, seed, n_evicted, wait=True)
    dtype = queries.dtype if queries.dtype == k.dtype == v.dtype else mx.float32
    q, k, v = (a.astype(dtype) for a in (queries, k, v))
    if mask is not None and not isinstance(mask, str) and mask.dtype not in (mx.bool_, dtype):
        mask = mask.astype(dtype)
    sinks = None if sinks is None else sinks.astype(dtype)
    out = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask, sinks=sinks)
    if is_long:
        _begin(out)
    return out.astype(queries.dtype)


class _Layers(threading.local):
    """Numbers of the outputs of attention that this thread began to compute, the newest last. A number of its own, so
    that the output is not kept."""

    def __init__(self):
        self.begun = collections.deque()


_layers = _Layers()


def _begin(out):
    of_layer = mx.contiguous(out[:1, :1, :1, :1])
    try:
        mx.async_eval(of_layer)
    except ValueError:  # in a function that is transformed there is nothing to compute yet
        return
    _layers.begun.append(of_layer)


def _wait_for_layers(n):
    """Until no more than n layers are being computed."""
    while len(_layers.begun) > n:
        try:
            mx.eval(_layers.begun.popleft())
        except Exception:  # another call's: whoever reads its output is told
            continue


def _behind(queries, side):
    """The side, not to be read before the queries are there: MLX would restore the past of all layers at once."""
    if not side.bits or side.codes is None:
        return side
    (codes,) = mx.depends([side.codes], [queries])
    return side._replace(codes=codes)


def _mask_evicted(mask, counts, n_evicted, n_queries):
    """`mask` over all tokens of the buffers, the first n_evicted packed ones masked."""
    n_sink, n_tokens = counts[0], sum(counts)
    columns = mx.arange(n_tokens)
    alive = (columns < n_sink) | (columns >= n_sink + n_evicted)
    if mask is None:
        return alive
    if isinstance(mask, str):
        return alive & (columns <= mx.arange(n_tokens - n_queries, n_tokens)[:, None])
    mask = mx.broadcast_to(mask, (*mask.shape[:-1], n_tokens - n_evicted))
    dead = False if mask.dtype == mx.bool_ else -float("inf")
    dead = mx.full((*mask.shape[:-1], n_evicted), dead, mask.dtype)
    return mx.concatenate([mask[..., :n_sink], dead, mask[..., n_sink:]], axis=-1)
