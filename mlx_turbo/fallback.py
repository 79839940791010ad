"""The same operations as kernels.py in MLX operations, on any device. float32 inside."""
import functools

import mlx.core as mx
import numpy as np

from . import codebook, rotation
from .kernels import device_name, diagonals


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
def _quantize(x, bits, mean, seed):
    y = rotate(x if mean is None else x.astype(mx.float32) - mean, seed)
    sigma = mx.sqrt(mx.square(y).mean(-1, keepdims=True))
    if bits == 8:
        inverse = mx.where(sigma > 0, 1 / (sigma * codebook.UNIFORM_STEP), 0)
        codes = (mx.clip(mx.round(y * inverse), -128, 127) + 128).astype(mx.uint32)
    else:
        half, magnitude = 2 ** (bits - 1), mx.abs(y)
        midpoints = codebook.thresholds(codebook.product(bits))[half:]
        m = sum((magnitude >= sigma * float(t)).astype(mx.uint8) for t in midpoints)
        codes = (m ^ mx.where(y < 0, half - 1, half).astype(mx.uint8)).astype(mx.uint32)
    c = _constant(_levels, bits)[codes]
    energy = mx.square(c).sum(-1, keepdims=True)
    # 8-bit codes of zeros have no energy
    scale = (y * c).sum(-1, keepdims=True) / mx.where(energy > 0, energy, 1)
    return pack(codes, bits), scale.astype(mx.float16)


SLICE_VALUES = 1 << 18  # quantized at a time: a prompt chunk's float32 intermediates would be 18 times the chunk


def _quantize_in_slices(side, seed):
    x, n = side.x, side.x.shape[2]
    step = max(1, SLICE_VALUES // (x.size // n))
    if step >= n:
        return _quantize(x, side.bits, side.mean, seed)
    slices = []
    for at in range(0, n, step):
        slices.append(_quantize(x[:, :, at:at + step], side.bits, side.mean, seed))
        mx.eval(slices[-1])
    return tuple(mx.concatenate(parts, axis=2) for parts in zip(*slices))


# ---- attention -----------------------------------------------------------------------------------------------
DEAD = -1e30  # a masked logit: finite, so that a tile in which everything is masked gives no NaN
SCORE_BYTES = 32 << 20  # of the float32 logits of one tile, at most (a tile has at least 64 tokens)
MAX_TILE = 2048  # tokens


def tile_tokens(n_rows):
    """Tokens read at a time for n_rows = B * n_heads * L rows of queries."""
    return int(min(MAX_TILE, max(64, SCORE_BYTES // (4 * n_rows) // 64 * 64)))


def tiled_attention(queries, keys, values, counts, read_rows, *, scale, mask=None, sinks=None, seed=0):
    """Attention over a cache, tile by tile, merged by log-sum-exp; float32 inside.

    As MetalBackend.attend, for any L. `read_rows(side, first, n)` gives the packed rows of tokens first .. first +
    n - 1 in rotated space: (rows float32 [B, H, n, S], scale [B, H, n, 1] or None, the dim of each of the S numbers
    (and the slot of each dim) or None if they are the dims). Never un-rotated, and nothing larger than a tile is restored.
    """
    n_sink, n_packed, n_recent = counts
    n_tokens = sum(counts)
    B, n_heads, L, _ = queries.shape
    H = keys.recent.shape[1]
    G = n_heads // H
    q = queries.astype(mx.float32).reshape(B, H, G * L, -1) * scale
    q_rotated = rotate(q, seed) if keys.bits and n_packed else None
    if isinstance(mask, str):
        mask = mx.arange(n_tokens) <= mx.arange(n_tokens - L, n_tokens)[:, None]
    if mask is not None:
        mask = mx.broadcast_to(mask, (B, n_heads, L, n_tokens))
        mask = mask if mask.dtype == mx.bool_ else mask.astype(mx.float32)
    tile = tile_tokens(B * n_heads * L)
    parts = [("sink", 0, n_sink)] if n_sink else []
    parts += [("packed", at, min(tile, n_packed - at)) for at in range(0, n_packed, tile)]
    parts += [("recent", at, min(tile, n_recent - at)) for at in range(0, n_recent, tile)]

    top = mx.full((B, H, G * L, 1), DEAD, mx.float32)
    if sinks is not None:
        sinks = mx.broadcast_to(sinks.astype(mx.float32).reshape(1, H, G, 1), (B, H, G, L)).reshape(B, H, G * L, 1)
        top = mx.maximum(top, sinks)
    total = mx.zeros_like(top)
    plain = rotated = packed_weight = mx.zeros((1,), mx.float32)  # sums of weight * value: as given, and rotated
    column, value_slots = 0, None
    for part, first, n in parts:
        packed_keys, packed_values = (part == "packed" and bool(side.bits) for side in (keys, values))
        if packed_keys:
            k, gamma, dims = read_rows(keys, first, n)
            if dims is not None:  # a slot without a dim meets a query of 0
                padded = mx.pad(q_rotated, [(0, 0)] * 3 + [(0, 1)]) if k.shape[-1] > keys.head_dim else q_rotated
            logits = (q_rotated if dims is None else mx.take(padded, dims[0], axis=-1)) @ k.swapaxes(-1, -2)
            logits = logits if gamma is None else logits * gamma.astype(mx.float32).swapaxes(-1, -2)
            if keys.mean is not None:
                logits = logits + q @ keys.mean.swapaxes(-1, -2)
        else:
            logits = q @ _exact(keys, part, first, n).swapaxes(-1, -2)
        if mask is not None:
            m = mask[..., column:column + n].reshape(B, H, G * L, n)
            logits = mx.where(m, logits, DEAD) if m.dtype == mx.bool_ else mx.maximum(logits + m, DEAD)
        new_top = mx.maximum(top, logits.max(-1, keepdims=True))
        weights = mx.where(logits > DEAD, mx.exp(logits - new_top), 0)
        fade = mx.exp(top - new_top)
        weight = weights.sum(-1, keepdims=True)
        total, top = total * fade + weight, new_top
        plain, rotated, packed_weight = plain * fade, rotated * fade, packed_weight * fade
        if packed_values:
            v, gamma, value_slots = read_rows(values, first, n)
            weights = weights if gamma is None else weights * gamma.astype(mx.float32).swapaxes(-1, -2)
            rotated, packed_weight = rotated + weights @ v, packed_weight + weight
        else:
            plain = plain + weights @ _exact(values, part, first, n)
        column += n
        if L > 16 and len(parts) > 1:
            mx.eval(total, top, plain, rotated, packed_weight)  # one tile at a time in memory
    if values.bits and n_packed:
        if value_slots is not None:
            rotated = mx.take(rotated, value_slots[1], axis=-1)
        plain = plain + unrotate(rotated, seed)
        if values.mean is not None:
            plain = plain + packed_weight * values.mean
    if sinks is not None:
        total = total + mx.exp(sinks - top)
    out = mx.where(total > 0, plain / mx.where(total > 0, total, 1), 0)
    return out.reshape(B, n_heads, L, -1).astype(queries.dtype)


def _exact(side, part, first, n):
    buffer = {"sink": side.sink, "packed": side.codes, "recent": side.recent}[part]
    return buffer[:, :, first:first + n].astype(mx.float32)


@functools.lru_cache(maxsize=None)
def _slots(bits, head_dim):
    """(dim of each slot, slot of each dim) as evaluated arrays."""
    arrays = mx.array(slot_dims(bits, head_dim).astype(np.int32)), mx.array(dim_slots(bits, head_dim))
    mx.eval(*arrays)
    return arrays


class CpuBackend:
    """MLX operations instead of kernels: for machines without Metal, and for those who ask for it."""

    name = "cpu"

    def describe(self):
        """What runs, for people: the backend, the device MLX uses, and the chip."""
        return f"cpu fallback (MLX operations on the {mx.default_device().type.name}, {device_name()})"

    def quantize(self, sides, seed=0):
        """As MetalBackend.quantize."""
        return [_quantize_in_slices(side, seed) for side in sides]

    def dequantize(self, sides, first, length, dtype, seed=0):
        """As MetalBackend.dequantize."""
        outs = []
        for side in sides:
            rows, scale, (_, slot_of_dim) = self.read_rows(side, first, length)
            x = unrotate(mx.take(rows, slot_of_dim, axis=-1) * scale.astype(mx.float32), seed)
            outs.append((x if side.mean is None else x + side.mean).astype(dtype))
        return outs

    def read_rows(self, side, first, n):
        """For `tiled_attention`: levels as they lie in memory, and the scales, which go to logits and weights."""
        codes, scale = (mx.contiguous(a[:, :, first:first + n]) for a in (side.codes, side.scale))
        return read_slots(codes, side.bits, side.head_dim), scale, _slots(side.bits, side.head_dim)

    def why_not_fused(self, keys, values, n_query_tokens):
        """There is no kernel here: attention.attend reads the packed rows tile by tile."""
        return "the CPU fallback reads packed rows tile by tile"
