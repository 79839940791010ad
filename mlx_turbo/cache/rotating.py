"""RotatingTurboKVCache: a window of the newest tokens, packed; for sliding-window layers and --max-kv-size.

    [ kept: exact ] [ packed: dead | live ] [ recent: exact ]

Tokens stay in the order they came. One that no query sees any more is dead: it is left out of what `update_and_fetch`
returns, and once a quarter of a window is dead, the packed buffers are copied without it. So a layer holds at most 1.25
windows of packed tokens (where keys may be centred, the quarter is rounded up to whole segments of 128), and what the
newest prompt chunk has beyond that; a token is copied about four times.
"""

from dataclasses import replace

import mlx.core as mx

from ..quant.scheme import TurboConfig
from .packing import _write
from .single import TurboKVCache
from .state import _HEADER


class Window:
    """What a window is, of one sequence (below) and of a batch (batch_rotating.py).

    Which tokens are forgotten, and when, follows from their numbers and the configuration alone: all layers of a model
    do it at once, so that one mask is right for all.
    """

    never_quantized = "window"
    header_names = (*_HEADER, "max_size")

    def _set_window(self, max_size, keep, config, options):
        """Sets max_size and returns the configuration. Raises ValueError unless 0 <= keep < max_size."""
        for name, value, allowed in (("max_size", max_size, range(1, 2**31)), ("keep", keep, range(max_size))):
            if value not in allowed:
                raise ValueError(f"{name}: got {value!r}, allowed are whole numbers from {allowed[0]} to {allowed[-1]}")
        self.max_size = max_size
        return replace(TurboConfig.of(config, **options), sink=keep)

    @property
    def keep(self):
        return self.config.sink

    @property
    def window(self):
        """Tokens that are seen besides the first `keep`."""
        return self.max_size - self.keep

    @property
    def step(self):
        return min(TurboKVCache.step, max(self.window // 4, 1))

    @property
    def _unit(self):
        """Packed tokens are forgotten in multiples of this: whole segments where keys can have means (centring.py)."""
        config = self.config
        return self._sides[0].segment if config.centre and config.scheme.key_bits else 1

    @property
    def _most_dead(self):
        """With so many dead packed tokens it is time to forget them."""
        return -(-max(self.window // 4, 1) // self._unit) * self._unit

    @property
    def room(self):
        """Packed tokens that the buffers have room for once tokens were forgotten."""
        return self.window + self._most_dead

    def _forgettable(self, n_packed, n_recent):
        """How many of its oldest packed tokens a row with these counts forgets when the next one comes. One remains, so
        that a row that has packed has packed tokens."""
        dead = min(n_packed + n_recent - self.window, n_packed - 1)
        return dead - dead % self._unit if dead >= self._most_dead else 0

    def _seen_counts(self):
        return [
            (n_sink, max(n_packed - max(n_packed + n_recent - self.window, 0), 0), min(n_recent, self.window))
            for n_sink, n_packed, n_recent in self._counts()
        ]

    def trim(self, n):
        """As without a window while everything is still held; later 0, as nothing can be trimmed."""
        return super().trim(n) if self.is_trimmable() else 0

    def report(self):
        """As TurboKVCache.report, of the tokens that the newest query saw; window: max_size."""
        return super().report() | {"window": self.max_size}

    def _uncompressed_capacity(self, n_tokens):
        return min(super()._uncompressed_capacity(n_tokens), self.max_size)

    def _header(self, counts):
        return [*super()._header(counts), self.max_size]

    def _own_state(self, header, config):
        if header["max_size"] <= config.sink:
            raise ValueError(f"state: the header names a window of {header['max_size']} tokens, with {config}")
        return {"max_size": header["max_size"]}


class RotatingTurboKVCache(Window, TurboKVCache):
    """A KV cache of one layer, in the place of mlx_lm.models.cache.RotatingKVCache: attention sees the first `keep`
    tokens and the newest ones, `max_size` in all; in a prompt chunk each of its tokens sees so many.

    config, options: as of TurboKVCache; its sink is `keep`. With recent >= max_size - keep no packed token is ever seen.

    Raises ValueError unless 0 <= keep < max_size, and as TurboKVCache does.
    """

    magic, header_names = 0x54554B57, (*Window.header_names, "n_forgotten")

    def __init__(self, max_size, keep=0, config="turbo4", **options):
        super().__init__(self._set_window(max_size, keep, config, options))

    def _clear(self):
        super()._clear()
        self.n_forgotten = 0  # tokens that are not in the buffers any more
        self._limit = self.window  # tokens besides the kept ones that the newest update returned, at most

    @property
    def offset(self):
        """Tokens that came so far: RoPE's position."""
        return super().offset + self.n_forgotten

    # ---- update ----------------------------------------------------------------------------------------------
    def update_and_fetch(self, keys, values):
        """As TurboKVCache.update_and_fetch; returns what mlx-lm's RotatingKVCache does, in the order of the tokens: for
        one token [B, n_kv_heads, min(offset, max_size), D], for n min(offset before, max_size - 1) + n."""
        self._check(keys, values)
        self._forget()
        before, n_new = self._limit, keys.shape[2]
        if n_new:
            self._limit = self.window - 1 + n_new
        try:
            return super().update_and_fetch(keys, values)
        except Exception:
            self._limit = before
            raise

    def _forget(self):
        """Copy the packed buffers without their dead tokens, once there are many."""
        drop = self._forgettable(self.n_packed, self.n_recent)
        if not drop:
            return
        self._unread.forget()
        n_left = self.n_packed - drop
        room = max(self.room, n_left)
        for side in self._sides:
            for name, per_row in ("codes", 1), ("scale", 1), ("means", side.segment):
                buffer = getattr(side, name)
                if buffer is not None:
                    rows = buffer[:, :, drop // per_row : -(-self.n_packed // per_row)]
                    setattr(side, name, _write(None, 0, rows, -(-room // per_row)))
        self.n_packed, self.n_forgotten = n_left, self.n_forgotten + drop
        self._evaluate()

    def _view(self, sides, counts):
        """Without the dead tokens, but for those of a segment that also has live ones: they are the view's `dead`."""
        view, (n_sink, n_packed, n_recent) = super()._view(sides, counts), counts
        excess = n_packed + n_recent - self._limit
        if excess <= 0:
            return view
        dead, dead_recent = min(excess, n_packed), max(excess - n_packed, 0)
        within = dead % view.keys.segment if view.keys.has_means and dead < n_packed else 0
        cut = dead - within
        of_codes = cut if cut < n_packed else 0  # never all: an array without elements has no buffer on the GPU
        keys, values = (_without(side, of_codes, dead_recent) for side in (view.keys, view.values))
        return view._replace(
            keys=keys, values=values, counts=(n_sink, n_packed - cut, n_recent - dead_recent), dead=within
        )

    @classmethod
    def of(cls, cache, config):
        """A window with the tokens of an mlx_lm RotatingKVCache."""
        own = cls(cache.max_size, cache.keep, config)
        if not cache.empty():
            keys, values = (cache._temporal_order(x) for x in (cache.keys, cache.values))
            own.update_and_fetch(keys, values)
            own.n_forgotten = cache.offset - keys.shape[2]
        return own

    # ---- the rest of mlx-lm's contract -----------------------------------------------------------------------
    def make_mask(self, N, window_size=None, return_array=False):
        """The mask for the next N tokens, over what `update_and_fetch` will return; as of mlx-lm's RotatingKVCache, but
        in the order of the tokens."""
        from mlx_lm.models.cache import create_causal_mask

        offset, window_size = min(self.max_size - 1, self.offset), window_size or (self.max_size if N > 1 else None)
        if N > 1:
            if offset + N > window_size or return_array:
                return create_causal_mask(N, offset, window_size=window_size)
            return "causal"
        if window_size is not None and window_size <= offset:
            return mx.arange(offset + 1) > offset - window_size
        return None

    def is_trimmable(self):
        return self.offset < self.max_size

    def size(self):
        return min(self.offset, self.max_size)

    @classmethod
    def merge(cls, caches):
        """A BatchRotatingTurboKVCache whose rows are `caches`."""
        from .batch_rotating import BatchRotatingTurboKVCache

        return BatchRotatingTurboKVCache.merge(caches)

    def to_kv_cache(self):
        """A plain mlx_lm RotatingKVCache with the same tokens, packed ones restored in the model's dtype."""
        from mlx_lm.models.cache import RotatingKVCache

        cache = RotatingKVCache(self.max_size, self.keep)
        if self.offset:
            cache.keys, cache.values = (mx.array(x) for x in self.keys_and_values())
            cache.offset, cache._idx = self.offset, cache.keys.shape[2]
        return cache

    # ---- state -----------------------------------------------------------------------------------------------
    def _header(self, counts):
        return [*super()._header(counts), self.n_forgotten]

    def _own_state(self, header, config):
        own, n_forgotten = super()._own_state(header, config), header["n_forgotten"]
        max_size, held = own["max_size"], header["n_packed"] + header["n_recent"]
        if n_forgotten < 0 or n_forgotten and (held < max_size - config.sink - 1 or header["n_sink"] < config.sink):
            raise ValueError(
                f"state: the header names a window of {max_size} tokens, {n_forgotten} forgotten, with "
                f"{held} after the sink and {config}"
            )
        return own | {"n_forgotten": n_forgotten, "_limit": max_size - config.sink}


def _without(side, n_packed, n_recent):
    """A `CachedSide` without the first n_packed packed and n_recent recent tokens."""
    if n_packed:
        side = side._replace(
            **{
                name: a if a is None else a[:, :, n_packed // per_row :]
                for name, a, per_row in (
                    ("codes", side.codes, 1),
                    ("scale", side.scale, 1),
                    ("means", side.means, side.segment),
                )
            }
        )
    return side._replace(recent=side.recent[:, :, n_recent:]) if n_recent else side
