"""What a cache hands to a model: lazy arrays that know the cache they come from."""

import threading
from typing import NamedTuple

import mlx.core as mx

from ..backends import select
from ..backends.sides import CachedSide
from . import centering
from .packing import _first


class KVView(NamedTuple):
    """All tokens of a cache as it held them at one moment: whole buffers, and how many tokens of each count.

    counts: (n_sink, n_packed, n_recent), the order of the tokens. cache, version: to tell whether it still holds.
    dead: so many of the first packed tokens are in the buffers, but belong to the tokens no more (rotating.py).
    """

    keys: CachedSide
    values: CachedSide
    counts: tuple
    seed: int
    cache: object
    version: int
    dead: int = 0

    def is_current(self):
        return self.cache.version == self.version

    def restore_packed(self):
        """Its packed tokens, {side: [B, n_kv_heads, n_packed, D]} of the model's dtype, lazily; one launch for both."""
        sides, n_packed = (self.keys, self.values), self.counts[1]
        quantized = [i for i in (0, 1) if sides[i].bits]
        packed = {i: sides[i].codes[:, :, :n_packed] for i in (0, 1) if not sides[i].bits}
        dtypes = {i: sides[i].recent.dtype if sides[i].means is None else mx.float32 for i in quantized}
        for dtype in set(dtypes.values()):
            same = [i for i in quantized if dtypes[i] == dtype]
            restored = select.dequantize_sides([sides[i].packed() for i in same], 0, n_packed, dtype, self.seed)
            packed.update(zip(same, restored))
        for i in quantized:
            if sides[i].means is not None:
                means = centering.plain(sides[i].means, self.seed)
                packed[i] = packed[i] + centering.per_token(means, 0, n_packed, sides[i].segment)
                packed[i] = packed[i].astype(sides[i].recent.dtype)
        return packed

    def restore(self, packed=None):
        """Keys and values as arrays [B, n_kv_heads, N, D] of the model's dtype, lazily. packed: restore_packed()."""
        n_sink, n_packed, n_recent = self.counts
        sides, out = (self.keys, self.values), []
        middle = self.restore_packed() if n_packed and packed is None else packed
        for i, side in enumerate(sides):
            parts = [_first(side.sink, n_sink)] if n_sink else []
            parts += [middle[i][:, :, self.dead :] if self.dead else middle[i]] if n_packed else []
            parts += [_first(side.recent, n_recent)] if n_recent else []
            out.append(mx.concatenate(parts, axis=2) if len(parts) > 1 else parts[0][:])  # never what we write into
        return out


class LazyKV(mx.array):
    """Keys (side 0) or values (side 1) that a cache returned: an ordinary lazy array that also knows its `KVView`.

    What a model makes of it (a slice, a cast) is a plain array: the mark is on exactly what the cache returned."""

    def __init__(self, array, view, side):
        super().__init__(array)
        self.view, self.side = view, side


class _Unread:
    """The lazy restored tokens that the last update returned, if nobody can have read them: building that graph is a
    third of a decode step's Python, and while packed tokens stay the same it can be returned again.

    Only what went to attention.attend counts as unread, so that no restored copy of the cache is kept alive; only in
    the thread that made it, because MLX evaluates a lazy array in no other. Not part of a copy of the cache.
    """

    __slots__ = ("packed", "n_packed", "thread", "version")

    def __init__(self):
        self.forget()

    def forget(self):
        """Before codes are written: what reads them would turn the write into a copy."""
        self.packed = self.n_packed = self.thread = self.version = None

    def __deepcopy__(self, memo):
        return _Unread()

    def get(self, view):
        n, me = view.counts[1], threading.get_ident()
        if me != self.thread or n > self.n_packed or view.cache.attended_version != self.version:
            self.packed, self.n_packed, self.thread = view.restore_packed(), n, me
        self.version = view.version
        if n == self.n_packed:
            return self.packed
        return {i: x[:, :, self.n_packed - n :] for i, x in self.packed.items()}  # a window lost its first ones
