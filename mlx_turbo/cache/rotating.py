"""RotatingTurboKVCache: a window of the newest tokens, packed; for sliding-window layers and --max-kv-size.

    [ kept: exact ] [ packed: out of the window | seen ] [ recent: exact ]

Tokens stay in the order they came. One that has left the window, which no query sees any more, is left out of what
`update_and_fetch` returns. Once a quarter of a window of packed tokens has left it, they are evicted: the packed
buffers are copied without them. So a layer holds at most 1.25 windows of packed tokens (with `centre`, the quarter is
rounded up to whole segments of 128), and what the newest prompt chunk has beyond that; a token is copied
about four times.
"""

from dataclasses import replace
from typing import Any, Optional, Union

import mlx.core as mx

from ..quant.scheme import Scheme, TurboConfig
from .attention_error import without_first
from .history import set_offset
from .masks import windows_mask
from .packing import n_segments, write
from .single import TurboKVCache
from .state import WINDOW_MAGIC

NO_KEPT_TOKENS = (
    "mlx-lm's batch of windows keeps no first tokens, this window keeps {}: merge it with others of its kind"
)


class Window(TurboKVCache):
    """What the sliding windows of one sequence (below) and of a batch (batch_rotating.py) share.

    Which tokens are evicted, and when, follows from their number and the configuration alone: all layers of a model
    do it at the same update, so that one mask is right for all.
    """

    never_quantized = "window"
    one_buffer = False  # a token that is evicted leaves room between the kept ones and the others
    header_names = (*TurboKVCache.header_names, "max_size")
    max_size: int

    def _set_window(self, max_size, keep, config, options):
        """Sets max_size and returns the configuration. Raises ValueError unless 0 <= keep < max_size."""
        for name, value, allowed in (("max_size", max_size, range(1, 2**31)), ("keep", keep, range(max_size))):
            if value not in allowed:
                raise ValueError(f"{name}: got {value!r}, allowed are whole numbers from {allowed[0]} to {allowed[-1]}")
        self.max_size, self.step = max_size, _step_of(max_size - keep)
        return replace(TurboConfig.of(config, **options), sink=keep)

    @property
    def keep(self) -> int:
        """Number of leading tokens that are always seen."""
        return self.config.sink

    @property
    def window(self) -> int:
        """Number of newest tokens that are seen, besides the first `keep`."""
        return self.max_size - self.keep

    @property
    def _eviction_unit(self):
        """Packed tokens are evicted in multiples of this: whole segments where keys can have means (centering.py), also
        exact ones, which `repack` may pack."""
        return self._sides[0].segment if self.config.centre else 1

    @property
    def _evict_from(self):
        """Number of packed tokens out of the window at which they are evicted."""
        return n_segments(max(self.window // 4, 1), self._eviction_unit) * self._eviction_unit

    @property
    def room(self) -> int:
        """Packed tokens for which the buffers have room after an eviction."""
        return self.window + self._evict_from

    def held_of(self, n: int, chunk: int) -> int:
        """As TurboKVCache.held_of: what has left the window is evicted before the next chunk."""
        return min(n, self.room + self.config.sink + self._capacity() + chunk)

    def _n_evictable(self, n_packed, n_recent):
        """How many of its oldest packed tokens a row with these counts evicts when the next one comes. One remains, so
        that a row that has packed has packed tokens."""
        outside = min(n_packed + n_recent - self.window, n_packed - 1)
        return outside - outside % self._eviction_unit if outside >= self._evict_from else 0

    def _seen_counts(self):
        return [
            (n_sink, max(n_packed - max(n_packed + n_recent - self.window, 0), 0), min(n_recent, self.window))
            for n_sink, n_packed, n_recent in self._counts()
        ]

    def trim(self, n: int) -> int:
        """As without a window as long as all tokens are held; later 0, as nothing can be trimmed."""
        return super().trim(n) if self.is_trimmable() else 0

    def report(self) -> dict[str, Any]:
        """As TurboKVCache.report, of the tokens that the newest query saw; window: max_size."""
        return super().report() | {"window": self.max_size}

    def _uncompressed_capacity(self, n_tokens):
        return min(super()._uncompressed_capacity(n_tokens), self.max_size)

    def _header(self, counts):
        return [*super()._header(counts), self.max_size]

    def own_state(self, header: dict[str, int], config: TurboConfig) -> dict[str, Any]:
        """max_size, and the step that follows from it."""
        max_size = header["max_size"]
        if max_size <= config.sink:
            raise ValueError(f"state: the header names a window of {max_size} tokens, with {config}")
        return {"max_size": max_size, "step": _step_of(max_size - config.sink)}


class RotatingTurboKVCache(Window):
    """A KV cache of one layer, in place of mlx_lm.models.cache.RotatingKVCache: attention sees the first `keep` tokens
    and the newest ones, `max_size` in all; in a prompt chunk each token sees as many.

    config, options: as of TurboKVCache; its sink is `keep`. With recent >= max_size - keep no packed token is ever
    seen.

    Raises ValueError unless 0 <= keep < max_size, and as TurboKVCache does.
    """

    magic = WINDOW_MAGIC
    header_names = (*Window.header_names, "n_forgotten")  # n_evicted
    batch_class: Any = None  # batch_rotating.py sets it

    def __init__(
        self, max_size: int, keep: int = 0, config: Union[str, Scheme, TurboConfig] = "turbo4", **options: Any
    ) -> None:
        super().__init__(self._set_window(max_size, keep, config, options))

    def _clear_counts(self):
        super()._clear_counts()
        self.n_evicted = 0  # tokens that are not in the buffers any more
        self._limit = self.window  # tokens besides the kept ones that the newest update returned, at most

    @property
    def offset(self) -> int:
        """Number of tokens so far, evicted ones included: the position for RoPE. Set as TurboKVCache.offset, until the
        window is full."""
        return super().offset + self.n_evicted

    @offset.setter
    def offset(self, n: int) -> None:
        set_offset(self, n)

    def _temporal_order(self, tokens: mx.array) -> mx.array:
        """`keys` or `values` in their order, which they are in: mlx-lm's windows merge others by this method."""
        if self.keep:
            raise ValueError(NO_KEPT_TOKENS.format(self.keep))
        return tokens

    # ---- update ----------------------------------------------------------------------------------------------
    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """As TurboKVCache.update_and_fetch; returns the tokens that mlx-lm's RotatingKVCache does, in their order: for
        one token [B, n_kv_heads, min(offset, max_size), D], for n min(offset before, max_size - 1) + n."""
        self._check(keys, values)
        self.settle()
        self._evict()
        before, n_new = self._limit, keys.shape[2]
        if n_new:
            self._limit = self.window - 1 + n_new
        try:
            return super().update_and_fetch(keys, values)
        except Exception:
            self._limit = before
            raise

    def _evict(self):
        """Copy the packed buffers without the tokens that have left the window, once these are many."""
        n = self._n_evictable(self.n_packed, self.n_recent)
        if not n:
            return
        self._unread.clear()
        n_left = self.n_packed - n
        room = max(self.room, n_left)
        for side in self._sides:
            for name, per_row in ("codes", 1), ("scale", 1), ("means", side.segment):
                buffer = getattr(side, name)
                if buffer is not None:
                    kept = buffer[:, :, n // per_row : n_segments(self.n_packed, per_row)]
                    setattr(side, name, write(None, 0, kept, n_segments(room, per_row)))
        self.n_packed, self.n_evicted = n_left, self.n_evicted + n
        if self._observed:
            seen, *of_all = self._observed
            self._observed = (without_first(seen, n, self.n_sink), *of_all)
        self._evaluate()

    def _view(self, counts, tails=None):
        """Without the tokens out of the window, except those of a segment that also has seen ones: they are the view's
        `n_evicted`."""
        view, (n_sink, n_packed, n_recent) = super()._view(counts, tails), counts
        excess = n_packed + n_recent - self._limit
        if excess <= 0:
            return view
        from_packed, from_recent = min(excess, n_packed), max(excess - n_packed, 0)
        in_segment = from_packed % view.keys.segment if view.keys.has_means and from_packed < n_packed else 0
        cut = from_packed - in_segment
        cut_of_buffers = cut if cut < n_packed else 0  # never all: an array without elements has no buffer on the GPU
        keys, values = (_without(side, cut_of_buffers, from_recent) for side in (view.keys, view.values))
        counts = n_sink, n_packed - cut, n_recent - from_recent
        return view._replace(keys=keys, values=values, counts=counts, n_evicted=in_segment)

    @classmethod
    def from_newest(
        cls,
        max_size: int,
        keep: int,
        config: Union[str, Scheme, TurboConfig],
        keys: mx.array,
        values: mx.array,
        offset: int,
    ) -> "RotatingTurboKVCache":
        """A window that holds the first `keep` and the newest tokens [B, n_kv_heads, n, D], in their order, of `offset`
        tokens so far."""
        cache = cls(max_size, keep, config)
        cache.update_and_fetch(keys, values)
        cache.n_evicted = offset - keys.shape[2]
        return cache

    # ---- memory budget ---------------------------------------------------------------------------------------
    def _left_packed(self) -> tuple[int, Optional[int]]:
        left = self.n_packed - self._n_evictable(self.n_packed, self.n_recent)
        return left, None if left == self.n_packed else max(self.room, left)

    def next_growth(self, n_new: int) -> Optional[tuple[int, int]]:
        """As TurboKVCache.next_growth; a full window does not grow."""
        found = super().next_growth(n_new)
        return None if found is None or found[1] > self.room + self.step else found

    # ---- the rest of mlx-lm's contract -----------------------------------------------------------------------
    def make_mask(
        self, N: int, window_size: Optional[int] = None, return_array: bool = False
    ) -> Union[mx.array, str, None]:
        """The mask for the next N tokens, over what `update_and_fetch` will return, in the order of the tokens: each
        sees the first `keep` tokens and the newest `window` up to itself. (mlx-lm's RotatingKVCache masks the first
        ones for tokens late in a chunk.) window_size: of the model's layer, if it sees less than this cache holds;
        without kept tokens it may be more: inside a chunk a token sees as many, as far as they are still held."""
        offset = min(self.max_size - 1, self.offset)
        narrow = window_size is not None and offset + N > window_size
        if N == 1:
            return mx.arange(offset + 1) > offset - (window_size or 0) if narrow else None
        if not (narrow or return_array or offset + N > self.max_size):
            return "causal"
        window = self.window if self.keep or window_size is None else window_size
        return windows_mask(N, offset, self.keep, window, window_size)

    def is_trimmable(self) -> bool:
        return self.offset < self.max_size

    def size(self) -> int:
        return min(self.offset, self.max_size)

    # ---- state -----------------------------------------------------------------------------------------------
    def _header(self, counts):
        return [*super()._header(counts), self.n_evicted]

    def own_state(self, header: dict[str, int], config: TurboConfig) -> dict[str, Any]:
        """max_size, its step, and n_evicted."""
        own, n_evicted = super().own_state(header, config), header["n_forgotten"]
        max_size, held = own["max_size"], header["n_packed"] + header["n_recent"]
        if n_evicted < 0 or n_evicted and (held < max_size - config.sink - 1 or header["n_sink"] < config.sink):
            raise ValueError(
                f"state: the header names a window of {max_size} tokens, {n_evicted} forgotten, with "
                f"{held} after the sink and {config}"
            )
        return own | {"n_evicted": n_evicted, "_limit": max_size - config.sink}


def _step_of(window):
    """Tokens by which the packed buffers of a window grow."""
    return min(TurboKVCache.step, max(window // 4, 1))


def _without(side, n_packed, n_recent):
    """A `CachedSide` without its first n_packed packed and n_recent recent tokens."""
    if n_packed:
        cut = {"codes": n_packed, "scale": n_packed, "means": n_packed // side.segment}
        arrays = {name: getattr(side, name) for name in cut}
        side = side._replace(**{name: a if a is None else a[:, :, cut[name] :] for name, a in arrays.items()})
    return side._replace(recent=side.recent[:, :, n_recent:]) if n_recent else side
