"""Attention over a packed cache by MLX operations, tile by tile: memory is bounded by the tile."""

import functools
import itertools

import mlx.core as mx
import numpy as np

from ..quant import rotation
from .mlx_ops import slot_dims, without_nan

# ---- attention -----------------------------------------------------------------------------------------------
DEAD = -1e30  # a masked logit: finite, so that a tile in which everything is masked gives no NaN
LOGIT_BYTES = 64 << 20  # float32 logits of a tile, at most (but those of 64 tokens); up to five copies live at a time
MAX_TILE = 4096  # tokens


@functools.lru_cache(maxsize=64)  # the layers of a step have the same
def _tiles(counts, n_rows, max_tile, logit_bytes):
    """The tokens in tiles: (spans, where to split the columns of a tile into those of its spans), a span being (buffer,
    first, n, column of the mask). Few exact tokens join a tile of packed ones, so that a short cache is one tile."""
    n_sink, n_packed, n_recent = counts
    most = int(min(max_tile, max(64, logit_bytes // (4 * n_rows) // 64 * 64)))
    tiles, room = [[]], most
    for part, n_tokens, column in (
        ("codes", n_packed, n_sink),
        ("sink", n_sink, 0),
        ("recent", n_recent, n_sink + n_packed),
    ):
        for first in range(0, n_tokens, most):
            n = min(most, n_tokens - first)
            if n > room:
                tiles.append([])
                room = most
            if not tiles[-1]:
                room += most // 16
            tiles[-1].append((part, first, n, column + first))
            room -= n
    return [(spans, list(itertools.accumulate(n for _, _, n, _ in spans))[:-1]) for spans in tiles]


def tiled_attention(
    queries, keys, values, counts, read_rows, *, scale, mask=None, sinks=None, seed=0, ahead=0, rope=None
):
    """Attention over a cache, tile by tile, float32 inside: as MetalBackend.attend, for any L.

    `read_rows(side, first, n)` gives the packed rows of tokens first .. first + n - 1 in rotated space: (rows float32
    [B, H, n, S], scale [B, H, n, 1] or None, the bits of `slot_dims` if the S numbers are in that order or None if they
    are the dims). Rows are never un-rotated, and only a tile of them is restored at a time, merged by log-sum-exp
    with what came before: no more memory is taken than 5 * LOGIT_BYTES and 6 times a float32 tile of both sides. That
    is with ahead = 0, which waits for each tile; with ahead = 1 a tile is computed while the next is prepared, so that
    a GPU never runs dry, in twice the memory.

    Raises ValueError for values with more than one mean: that would need the weight of every segment.
    """
    n_packed, n_tokens = counts[1], sum(counts)
    if values.means is not None and n_packed > values.segment:
        raise ValueError(f"values: got segments of {values.segment} tokens, allowed is one mean for all {n_packed}")
    B, n_heads, L, _ = queries.shape
    H = keys.recent.shape[1]
    rows = B, H, n_heads // H * L
    logits_of = _Logits((queries.astype(mx.float32) * scale).reshape(*rows, -1), keys, read_rows, seed)
    rope_of = None
    if rope is not None:
        rope_of = _Logits(rope.queries.astype(mx.float32).reshape(*rows, -1), rope.keys, read_rows, seed)
    sums_of = _ValueSums(values, read_rows)
    n_seen = 0  # by every query, of the first tokens
    if isinstance(mask, str):
        n_seen = n_tokens - L + 1
        mask = None if L == 1 else mx.arange(n_tokens) <= mx.arange(n_tokens - L, n_tokens)[:, None]
    if mask is not None:
        mask = mx.broadcast_to(mask, (B, n_heads, L, n_tokens)).reshape(*rows, n_tokens)
    if sinks is not None:
        sinks = mx.broadcast_to(sinks.astype(mx.float32).reshape(1, H, -1, 1), (B, H, n_heads // H, L))
        sinks = sinks.reshape(*rows, 1)
    tiles = _tiles(counts, B * n_heads * L, MAX_TILE, LOGIT_BYTES)
    one_softmax = len(tiles) == 1 and mask is None and sinks is None
    top, sums, started = sinks, None, []
    for spans, splits in tiles:
        before, logits = top, logits_of(spans)
        if rope_of is not None:
            logits = logits + rope_of(spans)
        if one_softmax:
            weights, total = mx.softmax(logits, axis=-1), 1
        else:
            weights, top = _weights(logits, None if mask is None else _columns(mask, spans), top)
            total = weights.sum(-1, keepdims=True)
        new = sums_of(spans, mx.split(weights, splits, axis=-1) if splits else [weights], total, mask, n_seen)
        if sums is not None:
            fade = mx.exp(before - top)
            new = [a * fade + b for a, b in zip(sums, new)]
        sums = new
        if len(tiles) > 1:  # or MLX would work on many tiles at a time
            started.append([top, *(a for a in sums if isinstance(a, mx.array))])
            mx.async_eval(started[-1])
            if len(started) > ahead:
                mx.eval(started.pop(0))
    total, packed_weight, out, rotated = sums
    if values.bits and n_packed:
        out = _plus(out, rotated @ _rotation(values.head_dim, seed, sums_of.order)[1])
        if values.means is not None:
            out = out + packed_weight * (_exact(values, "means", 0, 1) @ _rotation(values.head_dim, seed, None)[1])
    if not one_softmax:
        if sinks is not None:
            total = total + mx.exp(sinks - top)
        if mask is not None:
            total = mx.where(total == 0, 1, total)  # a row that attends to nothing gives 0
        out = out / total
    return out.reshape(B, n_heads, L, -1).astype(queries.dtype)


class _Logits:
    """Logits of the queries q [B, H, G * L, D] with the keys of a tile; the rotated queries are made when they are
    needed first."""

    def __init__(self, q, keys, read_rows, seed):
        self.q, self.keys, self.read_rows, self.seed = q, keys, read_rows, seed
        self.q_packed = self.q_rotated = None

    def __call__(self, spans):
        return _join([self._of_span(part, first, n) for part, first, n, _ in spans])

    def _of_span(self, part, first, n):
        keys = self.keys
        if part != "codes" or not keys.bits:
            return self.q @ _exact(keys, part, first, n).swapaxes(-1, -2)
        k, gamma, order = self.read_rows(keys, first, n)
        if self.q_packed is None:
            q = self.q if keys.balance is None else self.q / keys.balance.factors
            self.q_packed = q @ _rotation(keys.head_dim, self.seed, order)[0]
            self.q_rotated = None if keys.means is None else q @ _rotation(keys.head_dim, self.seed, None)[0]
        x = self.q_packed @ k.swapaxes(-1, -2)
        x = x if gamma is None else x * gamma.swapaxes(-1, -2)
        return x if keys.means is None else x + _mean_logits(self.q_rotated, keys, first, n)


def _weights(logits, mask, top):
    """exp(logits - maximum) of a tile, masked, and the maximum with that of the tiles before (`top`)."""
    if mask is not None:
        logits = mx.where(mask, logits, DEAD) if mask.dtype == mx.bool_ else mx.where(mask > DEAD, logits + mask, DEAD)
    highest = logits.max(-1, keepdims=True)
    if mask is not None:
        highest = mx.maximum(highest, DEAD / 2)  # the weight of a masked token is 0 also in a row of such
    top = highest if top is None else mx.maximum(top, highest)
    return mx.exp(logits - top), top


class _ValueSums:
    """Sums over the values of a tile. order: that of the rotated sum, as `read_rows` names it, once there is one."""

    def __init__(self, values, read_rows):
        self.values, self.read_rows, self.order = values, read_rows, None

    def __call__(self, spans, weights, total, mask, n_seen):
        """Sums of weights (`total`, spoiled by values that are not finite), of packed weights, of weights * values, and
        of weights * rotated values. weights: [.., n] of each span."""
        values, packed_weight, out, rotated = self.values, 0, 0, 0
        for (part, first, n, column), w in zip(spans, weights):
            packed = part == "codes" and values.bits
            if packed:
                v, gamma, self.order = self.read_rows(values, first, n)
            else:
                v, gamma = _exact(values, part, first, n), None
            if mask is not None and column + n > n_seen:
                v, gamma, spoiled = without_nan(v, gamma, w)
                total = total + spoiled
            if not packed:
                out = _plus(out, w @ v)
                continue
            rotated = _plus(rotated, (w if gamma is None else w * gamma.swapaxes(-1, -2)) @ v)
            if values.means is not None:
                packed_weight = _plus(packed_weight, w.sum(-1, keepdims=True))
        return [total, packed_weight, out, rotated]


def _columns(mask, spans):
    return _join([mask[..., column : column + n] for _, _, n, column in spans])


def _join(arrays):
    return arrays[0] if len(arrays) == 1 else mx.concatenate(arrays, axis=-1)


def _plus(a, b):
    return b if isinstance(a, int) else a + b


def _mean_logits(q, side, first, n):
    """What the means add to the logits of n packed tokens from `first` on, [..., n], or [..., 1] if it is one mean."""
    start, end = first // side.segment, -(-(first + n) // side.segment)
    x, step = q @ _exact(side, "means", start, end - start).swapaxes(-1, -2), side.segment
    if end - start == 1:
        return x
    if first % step:  # a tile that starts within a segment: both start at multiples of 64
        x, step = mx.take(x, mx.arange(first, first + n, 64) // step - start, axis=-1), 64
    return mx.repeat(x, step, axis=-1)[..., :n]


def _exact(side, part, first, n):
    """Rows first .. first + n - 1 of a buffer, float32; one that is full is not sliced, which takes a microsecond."""
    buffer = getattr(side, part)
    if n < buffer.shape[2]:
        buffer = buffer[:, :, first : first + n]
    return buffer.astype(mx.float32)


@functools.lru_cache(maxsize=64)
def _rotation(head_dim, seed, bits):
    """M float32 [head_dim, S] and its transpose: x @ M is x rotated, in the order of the slots of `bits` (0 in a slot
    without a dim) or, with None, of the dims. One operation where the transform and a permutation are six."""
    matrix = np.pad(rotation.matrix(head_dim, seed).T, [(0, 0), (0, 1)])
    matrix = matrix[:, np.arange(head_dim) if bits is None else slot_dims(bits, head_dim)].astype(np.float32)
    arrays = mx.array(matrix), mx.array(np.ascontiguousarray(matrix.T))
    mx.eval(*arrays)
    return arrays
