"""The sides of a cache and how tokens are written into them: what single caches and batches share."""

import mlx.core as mx

from ..backends import select
from ..quant.scheme import Scheme
from . import centering


class _Side:
    """The keys or the values of a cache: three buffers, each with room for more tokens than it holds.

    sink, recent: model dtype [B, H, capacity, D]. codes: uint32 [B, H, capacity, words], or with 0 bits the exact
    vectors [B, H, capacity, D]. scale: float16 [B, H, capacity, 1], or None with 0 bits. means: float16 [B, H, segments,
    D], rotated (centring.py), or None.
    """

    def __init__(self, bits, segment):
        self.bits, self.segment = bits, segment
        self.sink = self.codes = self.scale = self.recent = self.means = None

    @property
    def head_dim(self):
        return self.recent.shape[-1]

    def buffers(self):
        return [a for a in (self.sink, self.codes, self.scale, self.recent, self.means) if a is not None]

    @property
    def nbytes(self):
        return sum(a.nbytes for a in self.buffers())


def _write(buffer, at, new, step):
    """`buffer` [B, H, capacity, *] with `new` [B, H, n, *] written from token `at` on: in place if it fits, else in
    a copy with room for a multiple of `step` tokens. The tokens of a head lie one behind the other, as the kernels
    read them."""
    end = at + new.shape[2]
    fits = buffer is not None and end <= buffer.shape[2]
    capacity = buffer.shape[2] if fits else max(-(-end // step), 1) * step
    if at == 0 and end == capacity:
        return mx.contiguous(new)  # written whole, a buffer would take over the strides of `new`
    if not fits:
        room = mx.zeros((*new.shape[:2], capacity - at, new.shape[3]), new.dtype)
        buffer = room if at == 0 else mx.concatenate([buffer[:, :, :at], room], axis=2)
    if new.shape[2]:
        buffer[:, :, at:end] = new
    return buffer


def _make_sides(config, key_bits=None):
    bits = config.scheme.key_bits if key_bits is None else key_bits, config.scheme.value_bits
    return [_Side(b, centering.segment_of(i)) for i, b in enumerate(bits)]


def _may_choose(config):
    return config.auto and config.scheme.key_bits > 0


def _dtypes(config):
    """What can be stored: whole numbers too where nothing is ever rounded, as mlx-lm's KVCache stores them."""
    return select.EXACT_DTYPES if config.scheme == Scheme(0, 0) else select.DTYPES


def _first(buffer, n):
    """The first n tokens of a buffer; one that is full is not sliced, which takes a microsecond."""
    return buffer if n == buffer.shape[2] else buffer[:, :, :n]
