"""What a cache returns to a model: lazy arrays that know which cache they come from, and when."""

import threading
from typing import Any, NamedTuple, Optional

import mlx.core as mx

from ..backends import select
from ..backends.sides import CachedSide
from . import centering
from .packing import first_tokens


class KVView(NamedTuple):
    """All tokens of a cache at one moment: whole buffers, and how many tokens of each count.

    counts: (n_sink, n_packed, n_recent), in the order of the tokens. cache, version: tell whether the view is current.
    n_evicted: number of leading packed tokens that are still in the buffers but evicted: they are not among the tokens
    (rotating.py).
    """

    keys: CachedSide
    values: CachedSide
    counts: tuple[int, int, int]
    seed: int
    cache: Any
    version: int
    n_evicted: int = 0

    def is_current(self) -> bool:
        return self.cache.version == self.version

    def restore_packed(self) -> dict[int, mx.array]:
        """The packed tokens, {side: [B, n_kv_heads, n_packed, D]} in the model's dtype, lazily; one launch for both."""
        n_packed = self.counts[1]
        sides: Any = (self.keys, self.values)  # which of their arrays there are follows from the counts
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

    def restore(self, packed: Optional[dict[int, mx.array]] = None) -> list[mx.array]:
        """Keys and values as arrays [B, n_kv_heads, N, D] of the model's dtype, lazily. packed: the result of
        `restore_packed`, if it is at hand."""
        n_sink, n_packed, n_recent = self.counts
        sides: Any = (self.keys, self.values)
        middle = self.restore_packed() if n_packed and packed is None else packed or {}
        out = []
        for i, side in enumerate(sides):
            parts = [first_tokens(side.sink, n_sink)] if n_sink else []
            parts += [middle[i][:, :, self.n_evicted :] if self.n_evicted else middle[i]] if n_packed else []
            parts += [first_tokens(side.recent, n_recent)] if n_recent else []
            out.append(mx.concatenate(parts, axis=2) if len(parts) > 1 else parts[0][:])  # never what we write into
        return out


class LazyKV(mx.array):
    """Keys (side 0) or values (side 1) that a cache returned: an ordinary lazy array that also knows its `KVView`.

    Whatever a model makes of it (a slice, a cast) is a plain array: only what the cache returned is marked."""

    def __init__(self, array: mx.array, view: KVView, side: int) -> None:
        super().__init__(array)
        self.view: KVView = view  # type: ignore[assignment]  # hides mx.array.view, of plain arrays
        self.side = side


class Unread:
    """The lazy restored tokens that the last update returned, if nobody can have read them: building that graph is a
    third of a decode step's Python, and it can be returned again as long as the packed tokens stay the same.

    Only what went to attention.attend counts as unread, so that no restored copy of the cache is kept alive. It is
    returned only in the thread that made it, because MLX evaluates a lazy array in no other. A copy of the cache starts
    without it.
    """

    __slots__ = ("packed", "n_packed", "thread", "version")
    packed: dict[int, mx.array]
    n_packed: int
    thread: Optional[int]
    version: Optional[int]

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Called before codes are written: a graph that reads them would turn the write into a copy."""
        self.packed, self.n_packed, self.thread, self.version = {}, 0, None, None

    def __deepcopy__(self, memo):
        return Unread()

    def get(self, view: KVView) -> dict[int, mx.array]:
        """The restored packed tokens of a view, as `KVView.restore_packed`."""
        n, me = view.counts[1], threading.get_ident()
        if me != self.thread or n > self.n_packed or view.cache.attended_version != self.version:
            self.packed, self.n_packed, self.thread = view.restore_packed(), n, me
        self.version = view.version
        if n == self.n_packed:
            return self.packed
        return {i: x[:, :, self.n_packed - n :] for i, x in self.packed.items()}  # a window evicted its first ones
