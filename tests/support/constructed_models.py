"""Models that say the same as a given one and fill its cache with what real models do to caches: key biases thirty
times the signal, outlier channels, keys near zero, bad first and last layers. And attention sinks, which do change
what the model says: there, caches are compared on the same model.

Each function takes an mlx-lm Qwen3 model (the embedded one, in float32: in half precision a bias of 600 rounds the
signal away) and returns a changed copy. They can be applied one after another. The changes are made between RoPE and
the cache, so that they work with any cache, and attention is called as mlx-lm's models call it.
"""

import copy

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models.base as base
import numpy as np

EXTRA_DIMS = 128  # of keys that carry a turning bias: 128 + 128 is a power of two
ROPE_BASE = 1e6  # of the biases; Qwen2.5's
# The norms of Qwen2.5-7B's key biases: first layer, last layer, and the median, which is the signal's scale too
FIRST_LAYER_BIAS, LAST_LAYER_BIAS, MEDIAN_BIAS = 605, 921, 22


class ConstructedAttention(nn.Module):
    """A Qwen3 attention layer that changes what goes through its cache.

    changes: functions (queries [B, n_heads, L, Dk], keys [B, n_kv_heads, L, Dk], offset) -> queries, keys, after RoPE.
    value_bias: [n_kv_heads, D] or None, added to values and taken off the output. sinks: [n_heads] or None.
    """

    def __init__(self, plain):
        super().__init__()
        self.plain = plain
        self.changes, self.value_bias, self.sinks = [], None, None

    def __call__(self, x, mask=None, cache=None):
        plain, (B, L, _) = self.plain, x.shape
        offset = 0 if cache is None else cache.offset
        queries = plain.q_norm(plain.q_proj(x).reshape(B, L, plain.n_heads, -1)).swapaxes(1, 2)
        keys = plain.k_norm(plain.k_proj(x).reshape(B, L, plain.n_kv_heads, -1)).swapaxes(1, 2)
        values = plain.v_proj(x).reshape(B, L, plain.n_kv_heads, -1).swapaxes(1, 2)
        queries, keys = plain.rope(queries, offset=offset), plain.rope(keys, offset=offset)
        for change in self.changes:
            queries, keys = change(queries, keys, offset)
        if self.value_bias is not None:
            values = values + self.value_bias[:, None]
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        out = base.scaled_dot_product_attention(
            queries, keys, values, cache=cache, scale=plain.scale, mask=mask, sinks=self.sinks
        )
        if self.value_bias is not None:  # weights sum to one
            out = out - mx.repeat(self.value_bias, plain.n_heads // plain.n_kv_heads, axis=0)[:, None]
        return plain.o_proj(out.swapaxes(1, 2).reshape(B, L, -1))


def _with_attention(model, layers, change):
    """A copy of `model` after change(attention, layer) for `layers` (None: all)."""
    model = copy.deepcopy(model)
    for i in range(len(model.layers)) if layers is None else layers:
        layer = model.layers[i]
        if not isinstance(layer.self_attn, ConstructedAttention):
            layer.self_attn = ConstructedAttention(layer.self_attn)
        change(layer.self_attn, i)
    return model


def _directions(shape, seed):
    """Random unit vectors [..., D] in float32."""
    x = np.random.default_rng(seed).standard_normal(shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def bias_dims(where, head_dim):
    """The dims of the RoPE frequencies called `where`, bool [head_dim]: "low" the slowest quarter (a bias hardly turns
    within thousands of tokens), "middle" the half between the slowest and the fastest quarter, "high" the fastest
    quarter (turns within tokens: no mean helps), "all". Dims i and i + head_dim / 2 are a pair."""
    n = head_dim // 2
    first, last = {"high": (0, n // 4), "middle": (n // 4, n - n // 4), "low": (n - n // 4, n), "all": (0, n)}[where]
    pair = (np.arange(n) >= first) & (np.arange(n) < last)
    return np.concatenate([pair, pair])


def turning_bias(n_kv_heads, n_tokens, *, norm, where, head_dim, offset=0, rope_base=ROPE_BASE, seed=0):
    """What a bias of k_proj (Qwen2) adds to each key: a fixed vector of `norm` in the frequencies `where`, turned by
    RoPE. float32 [1, n_kv_heads, n_tokens, head_dim]."""
    b = _directions((n_kv_heads, head_dim), seed) * bias_dims(where, head_dim)
    b = mx.array(norm * b / np.linalg.norm(b, axis=-1, keepdims=True))[None, :, None]
    b = mx.contiguous(
        mx.broadcast_to(b, (1, n_kv_heads, n_tokens, head_dim))
    )  # MLX on CUDA turns a broadcast one wrong
    return mx.fast.rope(b, head_dim, traditional=False, base=rope_base, scale=1.0, offset=offset)


def key_bias(model, layers=None, norm=600, where="low", own_dims=False, rope_base=ROPE_BASE, seed=0):
    """A key bias of `norm` in `layers`, in the RoPE frequencies `where` (see `bias_dims`) or "constant": not turning.

    The constant bias lies in the model's own dims: softmax ignores a number added to all logits. A turning one lies in
    EXTRA_DIMS more dims of keys and queries, in which queries are 0, so that the function stays exactly the same. Or,
    with own_dims, in the model's own: then the function changes, as queries see the bias turn.
    """

    def change(attention, i):
        def constant(queries, keys, offset):
            b = norm * _directions((keys.shape[1], keys.shape[3]), (seed, i))
            return queries, keys + mx.array(b)[:, None]

        def turning(queries, keys, offset):
            B, H, L, D = keys.shape
            options = dict(norm=norm, where=where, offset=offset, rope_base=rope_base, seed=(seed, i))
            if own_dims:
                return queries, keys + turning_bias(H, L, head_dim=D, **options)
            b = mx.broadcast_to(turning_bias(H, L, head_dim=EXTRA_DIMS, **options), (B, H, L, EXTRA_DIMS))
            return (
                mx.pad(queries, [(0, 0)] * 3 + [(0, EXTRA_DIMS)]),
                mx.concatenate([keys, b.astype(keys.dtype)], axis=-1),
            )

        attention.changes.append(constant if where == "constant" else turning)

    return _with_attention(model, layers, change)


def bad_ends(model, where="low", seed=0):
    """The first and the last layer carry Qwen2.5-7B's biases, the layers between are healthy."""
    model = key_bias(model, [0], FIRST_LAYER_BIAS, where, seed=seed)
    return key_bias(model, [len(model.layers) - 1], LAST_LAYER_BIAS, where, seed=seed)


def unequal_channels(model, layers=None, spread=1.3, seed=0):
    """Keys are large in some channels, which queries hardly look at: keys are multiplied by exp(spread * normal) per kv
    head and channel, queries divided by it, so that the function stays the same. In the layer of Qwen2.5-Coder-0.5B
    where they differ most, sqrt(rms of queries / rms of centered keys) has such a spread; the median of its layers is
    0.3."""

    def change(attention, i):
        def unequal(queries, keys, offset):
            _, H, _, D = keys.shape
            t = np.exp(spread * np.random.default_rng((seed, i)).standard_normal((H, 1, D))).astype(np.float32)
            return queries / mx.repeat(mx.array(t), queries.shape[1] // H, axis=0), keys * mx.array(t)

        attention.changes.append(unequal)

    return _with_attention(model, layers, change)


def value_bias(model, layers=None, norm=50, seed=0):
    """Every value carries a fixed vector of `norm`, which the layer's output is freed of: weights sum to one, so the
    function stays the same. Not together with `attention_sinks`: there they do not."""

    def change(attention, i):
        b = _directions(
            (attention.plain.n_kv_heads, attention.plain.v_proj.weight.shape[0] // attention.plain.n_kv_heads),
            (seed, i),
        )
        attention.value_bias = mx.array(norm * b)

    return _with_attention(model, layers, change)


def _scaled_dims(model, layers, factors):
    """Keys times `factors` [n_kv_heads or 1, head_dim], queries divided by them. Powers of two change no bit."""

    def change(attention, i):
        def scale(queries, keys, offset):
            f = mx.array(np.broadcast_to(factors, (keys.shape[1], keys.shape[3])).astype(np.float32))
            of_queries = mx.repeat(f, queries.shape[1] // keys.shape[1], axis=0)
            return queries / of_queries[:, None], keys * f[:, None]

        attention.changes.append(scale)

    return _with_attention(model, layers, change)


def outlier_channel(model, layers=None, factor=50, pair=40):
    """Keys `factor` times as large in the two dims of one RoPE pair, queries as much smaller there. Apply before a
    turning `key_bias`, which adds dims."""
    factors = np.ones((1, 128))
    factors[:, [pair, pair + 64]] = factor
    return _scaled_dims(model, layers, factors)


def near_zero_keys(model, layers=None, head=0, factor=2.0**-24):
    """One kv head's keys `factor` times as large (norms of 1e-6), its queries as much larger: to the bit the same
    function. Keys so small with queries as they are would attend uniformly, which is another function, and one that no
    error of a key could change. Apply before a turning `key_bias`."""
    attention = model.layers[0].self_attn
    factors = np.ones((getattr(attention, "plain", attention).n_kv_heads, 128))
    factors[head] = factor
    return _scaled_dims(model, layers, factors)


def attention_sinks(model, layers=None, logit=8.0, seed=0):
    """Every head has a learned-looking extra logit about `logit`, which takes weight from all tokens (gpt-oss). This
    is another function than the plain model's."""

    def change(attention, i):
        rng = np.random.default_rng((seed, i))
        attention.sinks = mx.array((logit + rng.standard_normal(attention.plain.n_heads)).astype(np.float32))

    return _with_attention(model, layers, change)
