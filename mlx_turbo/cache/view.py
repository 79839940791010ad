"""What a cache returns to a model: lazy arrays that know which cache they come from, and when."""

import threading
from typing import Any, NamedTuple, Optional

import mlx.core as mx

from ..backends import select
from ..backends.restore import restore
from ..backends.sides import CachedSide, are_latents


class KVView(NamedTuple):
    """All tokens of a cache at one moment: whole buffers, and how many tokens of each count.

    keys, values: the cache's two sides; of multi-head latent attention, both are the latents, and rope is the other.
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
    rope: Optional[CachedSide] = None

    def is_current(self) -> bool:
        return self.cache.version == self.version

    def restore_packed(self) -> list[mx.array]:
        """The packed tokens of keys and values, [B, n_kv_heads, n_packed, D] in the model's dtype, lazily."""
        counts = 0, self.counts[1], 0
        return restore(self.keys, self.values, counts, select.get_backend(), self.seed, apart=self._apart)

    def restore(self, packed: Optional[list[mx.array]] = None) -> list[mx.array]:
        """Keys and values as arrays [B, n_kv_heads, N, D] of the model's dtype, lazily. packed: the result of
        `restore_packed`, if it is at hand."""
        backend = select.get_backend() if packed is None else None  # looking it up takes a microsecond
        return restore(
            self.keys, self.values, self.counts, backend, self.seed, self.n_evicted, packed, apart=self._apart
        )

    @property
    def _apart(self):
        """Whether a model reads one side without the other: the RoPE keys, while attention takes the latents."""
        return are_latents(self.keys.n_kv_heads, self.keys.head_dim, self.values.head_dim)


class MarkedArray(mx.array):
    """An array that knows where it comes from. Pickled, it is a plain one: its cache does not come with it."""

    def __init__(self, array: mx.array) -> None:
        super().__init__(array)  # a copy, if it were read
        self[:] = array  # the array itself

    def __reduce_ex__(self, protocol: Any) -> Any:
        return plain, (self[:],)


class LazyKV(MarkedArray):
    """Keys (side 0) or values (side 1) that a cache returned: an ordinary lazy array that also knows its `KVView`.

    Whatever a model makes of it (a slice, a cast) is a plain array: only what the cache returned is marked."""

    def __init__(self, array: mx.array, view: KVView, side: int) -> None:
        super().__init__(array)
        self.view: KVView = view  # type: ignore[assignment]  # hides mx.array.view, of plain arrays
        self.side = side

    def swapaxes(self, axis1: int, axis2: int, *, stream: Any = None) -> mx.array:
        """As of mx.array. With the last two axes, what knows that a product with it is of queries and keys."""
        swapped = super().swapaxes(axis1, axis2, stream=stream)
        return TransposedKV(swapped, self) if {axis1 % 4, axis2 % 4} == {2, 3} else swapped


class TransposedKV(MarkedArray):
    """A `LazyKV`, [B, n_kv_heads, D, N]."""

    def __init__(self, array: mx.array, of: LazyKV) -> None:
        super().__init__(array)
        self.of = of

    def __rmatmul__(self, queries: Any) -> mx.array:
        product = mx.matmul(queries, self)
        return KeyLogits(product, queries, self.of) if type(queries) is mx.array and queries.ndim == 4 else product


class KeyLogits(MarkedArray):
    """Products [B, n_heads, L, N] of queries with the tokens of a `LazyKV`, of which they are known: an ordinary lazy
    array, computed if it is read. Models with latent attention hand it to attention as what is added to the logits."""

    def __init__(self, array: mx.array, queries: mx.array, of: LazyKV) -> None:
        super().__init__(array)
        self.queries, self.of = queries, of


def plain(array: mx.array) -> mx.array:
    """The array itself: what an array that knows its cache is pickled as."""
    return array


class Unread:
    """The lazy restored tokens that the last update returned, if nobody can have read them: building that graph is a
    third of a decode step's Python, and it can be returned again as long as the packed tokens stay the same.

    Only what went to attention.attend counts as unread, so that no restored copy of the cache is kept alive. It is
    returned only in the thread that made it, because MLX evaluates a lazy array in no other. A copy of the cache starts
    without it.
    """

    __slots__ = ("packed", "n_packed", "thread", "version")
    packed: Optional[list[mx.array]]
    n_packed: int
    thread: Optional[int]
    version: Optional[int]

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Called before codes are written: a graph that reads them would turn the write into a copy."""
        self.packed, self.n_packed, self.thread, self.version = None, 0, None, None

    def __deepcopy__(self, memo):
        return Unread()

    def get(self, view: KVView) -> Optional[list[mx.array]]:
        """The restored packed tokens of a view, as `KVView.restore_packed`; None if what the last update returned may
        have been read: then all tokens are to be restored at once."""
        n, me, last = view.counts[1], threading.get_ident(), self.version
        if last is None or view.cache.attended_version != last:
            self.clear()
        elif self.packed is None or me != self.thread or n > self.n_packed:
            self.packed, self.n_packed, self.thread = view.restore_packed(), n, me
        self.version = view.version
        if self.packed is None or n == self.n_packed:
            return self.packed
        return [x[:, :, self.n_packed - n :] for x in self.packed]  # a window evicted its first ones
