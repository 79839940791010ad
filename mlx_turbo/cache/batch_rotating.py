"""BatchRotatingTurboKVCache: a batch of sliding windows.

Every row stays what it would be in a RotatingTurboKVCache of its own: it packs and evicts the same tokens at the same
moment. Until then, tokens that have left its window are masked. When rows evict, the packed buffers of all rows are
copied: a token is copied about four times as often as there are rows that evict one after the other.
"""

from typing import Any, Optional, Sequence, Union

import mlx.core as mx

from ..quant.scheme import Scheme, TurboConfig
from .attention_error import without_first
from .batch import BatchTurboKVCache
from .packing import n_segments, take_ending_at, write
from .rotating import NO_KEPT_TOKENS, RotatingTurboKVCache, Window
from .state import BATCH_WINDOW_MAGIC


class BatchRotatingTurboKVCache(Window, BatchTurboKVCache):
    """A KV cache of one layer for several sequences, in place of mlx_lm.models.cache.BatchRotatingKVCache, which cannot
    keep the first tokens of its rows; this one can.

    max_size, keep: as of RotatingTurboKVCache, the same for all rows. left_padding: as of BatchTurboKVCache.

    Raises ValueError unless 0 <= keep < max_size, and as BatchTurboKVCache does.
    """

    magic = BATCH_WINDOW_MAGIC
    row_names = (*BatchTurboKVCache.row_names, "n_forgotten")  # n_evicted
    row_class = RotatingTurboKVCache

    def __init__(
        self,
        max_size: int,
        keep: int = 0,
        config: Union[str, Scheme, TurboConfig] = "turbo4",
        left_padding: Sequence[int] = (0,),
        **options: Any,
    ) -> None:
        BatchTurboKVCache.__init__(self, self._set_window(max_size, keep, config, options), left_padding)

    @classmethod
    def _empty(cls, like, left_padding=(0,)):
        return cls(like.max_size, like.keep, like.config, left_padding)

    def _empty_row(self):
        return self.row_class(self.max_size, self.keep, self.config)

    # ---- update ----------------------------------------------------------------------------------------------
    def _n_to_evict(self, b):
        n_packed = self._n_packed[b]
        return self._n_evictable(n_packed, self.n_tokens(b) - self.keep - n_packed) if n_packed else 0

    def _free(self):
        held = [sum(counts[1:]) for counts in self._counts() if counts[1] > self._evict_from]
        return min([super()._free(), *(self.room - n for n in held)])

    def _evict_rows(self, n_oldest):
        """Copy the packed buffers without the n_oldest[b] oldest tokens of row b."""
        self._unread.clear()
        self._n_packed = [n - gone for n, gone in zip(self._n_packed, n_oldest)]
        self._n_evicted = [n + gone for n, gone in zip(self._n_evicted, n_oldest)]
        self._observed = [
            without_first(seen, gone, self.keep) if gone else seen for seen, gone in zip(self._observed, n_oldest)
        ]
        n, room = max(self._n_packed), max(self.room, *self._n_packed)
        for side in self._sides:
            for name, per_row in ("codes", 1), ("scale", 1), ("means", side.segment):
                buffer, n_left = getattr(side, name), n_segments(n, per_row)
                if buffer is not None:
                    kept = take_ending_at(buffer, [gone // per_row + n_left for gone in n_oldest], n_left)
                    setattr(side, name, write(None, 0, kept, n_segments(room, per_row)))
        self._evaluate()

    def make_mask(self, N: int, return_array: bool = False, window_size: Optional[int] = None) -> mx.array:
        """As BatchTurboKVCache.make_mask, for what each row would see in a RotatingTurboKVCache of its own."""
        return self.array_mask(N, window_size)

    def array_mask(self, N: int, window_size: Optional[int] = None) -> mx.array:
        """The same."""
        mask, held, index, query = self._tokens_in_columns(N)
        offset = self._offsets[:, None, None, None]
        before = mx.minimum(offset, self.max_size - 1)  # tokens that the row alone would return, besides the new ones
        outside = held - before
        mask = mask & ((index < self.keep) | (index >= self.keep + outside))
        index = mx.where(index < self.keep, index, index - outside)
        window = self.window if self.keep or window_size is None else window_size  # the model's may be wider in a chunk
        mask = mask & ((index < self.keep) | (before + query < index + window))
        return mask if window_size is None else mask & (before + query < index + window_size)

    # ---- what mlx-lm's batches of windows call it -------------------------------------------------------------
    rotated = False  # `keys` and `values` are in the order of the tokens

    @property
    def left_padding(self) -> mx.array:
        """As BatchTurboKVCache.left_padding. Raises ValueError if first tokens are kept: mlx-lm's batches of windows,
        which ask for it, would evict them."""
        if self.keep:
            raise ValueError(NO_KEPT_TOKENS.format(self.keep))
        return super().left_padding

    @property
    def _offset(self) -> int:
        return self._idx

    def _temporal_order(self) -> None:
        """Nothing to do."""

    # ---- the rest of mlx-lm's contract -----------------------------------------------------------------------
    @classmethod
    def _join(cls, parts):
        sizes = sorted({part.max_size for part in parts})
        if len(sizes) > 1:
            raise ValueError(f"caches: got windows of {' and '.join(map(str, sizes))} tokens, allowed is one max_size")
        return super()._join(parts)

    @classmethod
    def _of_row(cls, cache):
        batch = super()._of_row(cache)
        batch._n_evicted = [cache.n_evicted]
        return batch

    def extract(self, idx: int) -> RotatingTurboKVCache:
        """Row idx as a cache of its own."""
        cache = super().extract(idx)
        assert isinstance(cache, RotatingTurboKVCache)
        cache.n_evicted = self._n_evicted[idx]
        return cache

    def is_trimmable(self) -> bool:
        return self._longest() < self.max_size

    def _longest(self):
        """Tokens of the longest row so far, evicted ones included."""
        return max(self.n_tokens(b) + n for b, n in enumerate(self._n_evicted))

    def size(self) -> int:
        return min(self._longest(), self.max_size)

    # ---- state -----------------------------------------------------------------------------------------------
    def _row_counts(self):
        return *super()._row_counts(), self._n_evicted


RotatingTurboKVCache.batch_class = BatchRotatingTurboKVCache
