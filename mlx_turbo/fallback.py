"""The same operations as kernels.py in MLX operations, on any device. float32 inside."""
import functools
import itertools

import mlx.core as mx
import numpy as np

from . import codebook, rotation
from .kernels import device_name, diagonals
from .scheme import SCALES


@functools.lru_cache(maxsize=None)
def _constant(make, *args):
    array = mx.array(make(*args))
    mx.eval(array)
    return array


def _levels(bits):
    return codebook.product(bits).astype(np.float32)


# ---- rotation ------------------------------------------------------------------------------------------------
def _transform_window(x, start, size):
    # mx.hadamard_transform is right for powers of two only, and on the CPU fast in float32 only
    y = mx.hadamard_transform(x[..., start:start + size], scale=1.0)
    if size == x.shape[-1]:
        return y
    return mx.concatenate([x[..., :start], y, x[..., start + size:]], axis=-1)


def rotate(x, seed=0):
    """rotation.rotate of x [..., head_dim], float32."""
    x = x.astype(mx.float32)
    for i, window in enumerate(rotation.windows(x.shape[-1])):
        x = _transform_window(x * diagonals(x.shape[-1], seed)[i], *window)
    return x


def unrotate(y, seed=0):
    """rotation.unrotate of y [..., head_dim], float32."""
    y = y.astype(mx.float32)
    for i, window in reversed(list(enumerate(rotation.windows(y.shape[-1])))):
        y = _transform_window(y, *window) * diagonals(y.shape[-1], seed)[i]
    return y


# ---- the packed row (scheme.py) ------------------------------------------------------------------------------
def _word_shifts(bits):
    """Shift of each dim of a word, for 2, 4 and 8 bits."""
    r = np.arange(32 // bits)
    return (16 * (r % 2) + bits * (r // 2)).astype(np.uint32)


def _planes(bits=3):
    """For each of the two 3-bit planes, per dim of a unit: first bit of the code, mask, shift. uint32 [2, 3, 16]."""
    j, s = np.divmod(np.arange(16), 2)
    a = np.where(j < 5, 16 * s + 3 * j, 16 * s + 15), np.select([j < 5, j == 7], [7, 1], 0)
    b = np.where(j < 7, 16 * s + 3 * (j - 5), 16 * s + 6), np.select([j < 5, j < 7], [0, 7], 3)
    first = np.where(j == 7, 2, 0), np.zeros_like(j)
    return np.array([(first[p], (a, b)[p][1], np.maximum((a, b)[p][0], 0)) for p in (0, 1)], np.uint32)


def _pad_last(x, size):
    missing = -x.shape[-1] % size
    return mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x


def pack(codes, bits):
    """codes uint32 [..., D] -> words uint32 [..., words_per_row]. Fields do not overlap, so a sum joins them."""
    if bits != 3:
        per_word = 32 // bits
        fields = mx.unflatten(_pad_last(codes, per_word), -1, (-1, per_word))
        return (fields << _constant(_word_shifts, bits)).sum(-1)
    unit = mx.unflatten(_pad_last(codes, 16), -1, (-1, 16))
    planes = _constant(_planes)
    a, b = ((((unit >> planes[p, 0]) & planes[p, 1]) << planes[p, 2]).sum(-1) for p in (0, 1))
    b = mx.unflatten(_pad_last(b, 2), -1, (-1, 2))
    return mx.concatenate([a, b[..., 0] | (b[..., 1] << 8)], axis=-1)


# Reading goes through tables over 16 bits, that is over several codes at once: one gather gives up to 8 levels. Its
# results are in the order of memory, not of dims; attention permutes the query instead of the cache.
def _codes_of_halves(bits):
    """Codes in each possible half of a word, dims 2j + s for j = 0, 1, ...: uint32 [65536, 16 / bits]."""
    return (np.arange(1 << 16)[:, None] >> (bits * np.arange(16 // bits))) & (2**bits - 1)


def _table(bits):
    return _levels(bits)[_codes_of_halves(bits)]


def _table_plane_a():
    return _levels(3)[(np.arange(1 << 15)[:, None] >> (3 * np.arange(5))) & 7]


def _table_plane_b():
    """Index: the byte of plane B, and the top bit of the last code (from plane A) in bit 8."""
    i = np.arange(1 << 9)[:, None]
    return _levels(3)[np.concatenate([i & 7, (i >> 3) & 7, ((i >> 6) & 3) | ((i >> 8) << 2)], axis=1)]


def slot_dims(bits, head_dim):
    """The dim of each number of `read_slots`, int [n_slots]; head_dim where a slot belongs to no dim."""
    per_word = 16 if bits == 3 else 32 // bits
    words = -(-head_dim // per_word)
    w, s, j = np.meshgrid(np.arange(words), np.arange(2), np.arange(per_word // 2), indexing="ij")
    return np.minimum((per_word * w + 2 * j + s).ravel(), head_dim)


def dim_slots(bits, head_dim):
    """The slot of each dim, int32 [head_dim]: the inverse of `slot_dims`."""
    return np.argsort(slot_dims(bits, head_dim), kind="stable")[:head_dim].astype(np.int32)


def read_slots(words, bits, head_dim):
    """Levels of packed rows, float32 [..., n_slots], in the order of `slot_dims`, not yet scaled."""
    if bits != 3:
        return _constant(_table, bits)[words.view(mx.uint16)].flatten(-2)
    units = -(-head_dim // 16)
    a = words[..., :units].view(mx.uint16)                                    # [..., 2 units], halves s = 0, 1
    b = mx.contiguous(words[..., units:]).view(mx.uint8)                      # byte i + 2s of word t / 2, i = t % 2
    b = mx.unflatten(b, -1, (-1, 2, 2)).swapaxes(-1, -2).flatten(-3)[..., :2 * units].astype(mx.uint16)
    levels = [_constant(_table_plane_a)[a & 0x7FFF], _constant(_table_plane_b)[b | ((a >> 15) << 8)]]
    return mx.concatenate(levels, axis=-1).flatten(-2)


# ---- the backend ---------------------------------------------------------------------------------------------
def _quantize(x, bits, mean, seed, rule):
    y = rotate(x if mean is None else x.astype(mx.float32) - mean, seed)
    sigma = mx.sqrt(mx.square(y).mean(-1, keepdims=True))
    if bits == 8:
        inverse = mx.where(sigma > 0, 1 / (sigma * codebook.UNIFORM_STEP), 0)
        c = mx.round(y * inverse)
        c = mx.where(c >= -128, mx.minimum(c, 127), -128)  # also for NaN, which as an index could be anything
        codes = (c + 128).astype(mx.uint32)
    else:
        half, magnitude = 2 ** (bits - 1), mx.abs(y)
        midpoints = codebook.thresholds(codebook.product(bits))[half:]
        m = sum((magnitude >= sigma * float(t)).astype(mx.uint8) for t in midpoints)
        codes = (m ^ mx.where(y < 0, half - 1, half).astype(mx.uint8)).astype(mx.uint32)
    c = _constant(_levels, bits)[codes]
    dot, energy = (y * c).sum(-1, keepdims=True), mx.square(c).sum(-1, keepdims=True)
    if rule == "inner-product":
        scale = mx.square(y).sum(-1, keepdims=True) / dot
    elif rule == "least-squares":
        scale = dot / energy
    else:
        scale = sigma if rule == "norm" else sigma * mx.sqrt(x.shape[-1] / energy)
    # a vector of zeros has no dot product; 8-bit codes are all 0 if sigma is 0 or infinite
    scale = mx.where(dot > 0 if rule == "inner-product" else energy > 0, scale, sigma).astype(mx.float16)
    return pack(codes, bits), scale + (scale - scale)  # infinity: NaN


SLICE_VALUES = 1 << 18  # quantized at a time: a prompt chunk's float32 intermediates would be 18 times the chunk


def _quantize_in_slices(side, seed, rule):
    x, n = side.x, side.x.shape[2]
    step = max(1, SLICE_VALUES // (x.size // n))
    if step >= n:
        return _quantize(x, side.bits, side.mean, seed, rule)
    slices = []
    for at in range(0, n, step):
        slices.append(_quantize(x[:, :, at:at + step], side.bits, side.mean, seed, rule))
        mx.eval(slices[-1])
    return tuple(mx.concatenate(parts, axis=2) for parts in zip(*slices))


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
    for part, n_tokens, column in (("codes", n_packed, n_sink), ("sink", n_sink, 0),
                                   ("recent", n_recent, n_sink + n_packed)):
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


def tiled_attention(queries, keys, values, counts, read_rows, *, scale, mask=None, sinks=None, seed=0, ahead=0):
    """Attention over a cache, tile by tile, float32 inside: as MetalBackend.attend, for any L.

    `read_rows(side, first, n)` gives the packed rows of tokens first .. first + n - 1 in rotated space: (rows float32
    [B, H, n, S], scale [B, H, n, 1] or None, the bits of `slot_dims` if the S numbers are in that order or None if they
    are the dims). Rows are never un-rotated, and only a tile of them is restored at a time, merged by log-sum-exp
    with what came before: no more memory is taken than 5 * LOGIT_BYTES and 6 times a float32 tile of both sides. That
    is with ahead = 0, which waits for each tile; with ahead = 1 a tile is computed while the next is prepared, so that a
    GPU never runs dry, in twice the memory.

    Raises ValueError for values with more than one mean: that would need the weight of every segment.
    """
    n_packed, n_tokens = counts[1], sum(counts)
    if values.means is not None and n_packed > values.segment:
        raise ValueError(f"values: got segments of {values.segment} tokens, allowed is one mean for all {n_packed}")
    B, n_heads, L, _ = queries.shape
    H = keys.recent.shape[1]
    rows = B, H, n_heads // H * L
    q = (queries.astype(mx.float32) * scale).reshape(*rows, -1)
    q_packed = q_rotated = value_order = None
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

    def attend_tile(spans, splits, top):
        """The new maximum of the logits, and sums of weights, of packed weights, of weights * values, and of weights *
        rotated values."""
        nonlocal q_packed, q_rotated, value_order
        logits = []
        for part, first, n, _ in spans:
            if part != "codes" or not keys.bits:
                logits.append(q @ _exact(keys, part, first, n).swapaxes(-1, -2))
                continue
            k, gamma, order = read_rows(keys, first, n)
            if q_packed is None:
                q_packed = q @ _rotation(keys.head_dim, seed, order)[0]
                q_rotated = None if keys.means is None else q @ _rotation(keys.head_dim, seed, None)[0]
            x = q_packed @ k.swapaxes(-1, -2)
            x = x if gamma is None else x * gamma.swapaxes(-1, -2)
            logits.append(x if keys.means is None else x + _mean_logits(q_rotated, keys, first, n))
        logits = _join(logits)
        if one_softmax:
            sums = [1, 0, 0, 0]
            weights = mx.softmax(logits, axis=-1)
        else:
            if mask is not None:
                x = _join([mask[..., column:column + n] for _, _, n, column in spans])
                logits = mx.where(x, logits, DEAD) if mask.dtype == mx.bool_ else mx.where(x > DEAD, logits + x, DEAD)
            highest = logits.max(-1, keepdims=True)
            if mask is not None:
                highest = mx.maximum(highest, DEAD / 2)  # the weight of a masked token is 0 also in a row of such
            top = highest if top is None else mx.maximum(top, highest)
            weights = mx.exp(logits - top)
            sums = [weights.sum(-1, keepdims=True), 0, 0, 0]
        for (part, first, n, column), w in zip(spans, mx.split(weights, splits, axis=-1) if splits else [weights]):
            packed = part == "codes" and values.bits
            if packed:
                v, gamma, value_order = read_rows(values, first, n)
            else:
                v, gamma = _exact(values, part, first, n), None
            if mask is not None and column + n > n_seen:
                v, gamma, spoiled = _without_nan(v, gamma, w)
                sums[0] = sums[0] + spoiled
            if not packed:
                sums[2] = _plus(sums[2], w @ v)
                continue
            sums[3] = _plus(sums[3], (w if gamma is None else w * gamma.swapaxes(-1, -2)) @ v)
            if values.means is not None:
                sums[1] = _plus(sums[1], w.sum(-1, keepdims=True))
        return top, sums

    top, sums, started = sinks, None, []
    for spans, splits in tiles:
        before = top
        top, new = attend_tile(spans, splits, top)
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
        out = _plus(out, rotated @ _rotation(values.head_dim, seed, value_order)[1])
        if values.means is not None:
            out = out + packed_weight * (_exact(values, "means", 0, 1) @ _rotation(values.head_dim, seed, None)[1])
    if not one_softmax:
        if sinks is not None:
            total = total + mx.exp(sinks - top)
        if mask is not None:
            total = mx.where(total == 0, 1, total)  # a row that attends to nothing gives 0
        out = out / total
    return out.reshape(B, n_heads, L, -1).astype(queries.dtype)


def _join(arrays):
    return arrays[0] if len(arrays) == 1 else mx.concatenate(arrays, axis=-1)


def _plus(a, b):
    return b if isinstance(a, int) else a + b


def _without_nan(v, gamma, weights):
    """Values [..., n, S], or else their scales [..., n, 1], with 0 where they are not finite, as 0 * NaN is NaN; and NaN
    for each row of weights [..., n] that such a token has a part in, else 0."""
    finite = mx.isfinite(v).all(-1, keepdims=True) if gamma is None else mx.isfinite(gamma)
    spoiled = mx.where(weights @ (~finite).astype(mx.float32) > 0, mx.nan, 0)
    return (mx.where(finite, v, 0), None, spoiled) if gamma is None else (v, mx.where(finite, gamma, 0), spoiled)


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
        buffer = buffer[:, :, first:first + n]
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


class CpuBackend:
    """MLX operations instead of kernels: for machines without Metal, and for those who ask for it."""

    name, tiles_ahead = "cpu", 0

    def describe(self):
        """What runs, for people: the backend, the device MLX uses, and the chip."""
        return f"cpu fallback (MLX operations on the {mx.default_device().type.name}, {device_name()})"

    def quantize(self, sides, seed=0, scale=SCALES[0]):
        """As MetalBackend.quantize."""
        return [_quantize_in_slices(side, seed, scale) for side in sides]

    def dequantize(self, sides, first, length, dtype, seed=0):
        """As MetalBackend.dequantize."""
        outs = []
        for side in sides:
            rows, scale, _ = self.read_rows(side, first, length)
            rows = mx.take(rows, _constant(dim_slots, side.bits, side.head_dim), axis=-1)
            x = unrotate(rows * scale.astype(mx.float32), seed)
            outs.append((x if side.mean is None else x + side.mean).astype(dtype))
        return outs

    def read_rows(self, side, first, n):
        """For `tiled_attention`: levels as they lie in memory, and the scales, which go to logits and weights."""
        codes, scale = mx.contiguous(side.codes[:, :, first:first + n]), side.scale[:, :, first:first + n]
        return read_slots(codes, side.bits, side.head_dim), scale, side.bits

    def why_not_fused(self, keys, values, n_query_tokens):
        """There is no kernel here: attention.attend reads the packed rows tile by tile."""
        return "the CPU fallback reads packed rows tile by tile"
