"""BatchRotatingTurboKVCache: a batch of windows.

Every row stays what it would be in a RotatingTurboKVCache of its own: it packs and forgets the same tokens at the same
moment. Until then its dead ones are masked. When rows forget, the packed buffers of all are copied: a token is copied
about four times as often as there are rows that do so one after the other.
"""

import mlx.core as mx

from .batch import BatchTurboKVCache, _ending_at
from .packing import _write
from .rotating import RotatingTurboKVCache, Window


class BatchRotatingTurboKVCache(Window, BatchTurboKVCache):
    """A KV cache of one layer for several sequences, in the place of mlx_lm.models.cache.BatchRotatingKVCache. That
    cannot keep the first tokens of its rows; this can.

    max_size, keep: as of RotatingTurboKVCache, the same for all rows. left_padding: as of BatchTurboKVCache.

    Raises ValueError unless 0 <= keep < max_size, and as BatchTurboKVCache does.
    """

    magic, row_names = 0x54554B52, (*BatchTurboKVCache.row_names, "n_forgotten")  # "TUKR"
    _row_class = RotatingTurboKVCache

    def __init__(self, max_size, keep=0, config="turbo4", left_padding=(0,), **options):
        super().__init__(self._set_window(max_size, keep, config, options), left_padding)

    @classmethod
    def _empty(cls, like, left_padding=(0,)):
        return cls(like.max_size, like.keep, like.config, left_padding)

    def _alone(self):
        return RotatingTurboKVCache(self.max_size, self.keep, self.config)

    # ---- update ----------------------------------------------------------------------------------------------
    def _to_forget(self, b):
        n_packed = self._n_packed[b]
        return self._forgettable(n_packed, self._tokens(b) - self.keep - n_packed) if n_packed else 0

    def _free(self):
        held = [sum(counts[1:]) for counts in self._counts() if counts[1] > self._most_dead]
        return min([super()._free(), *(self.room - n for n in held)])

    def _forget(self, n_oldest):
        """Copy the packed buffers without the n_oldest[b] oldest tokens of row b."""
        self._unread.forget()
        self._n_packed = [n - gone for n, gone in zip(self._n_packed, n_oldest)]
        self._n_forgotten = [n + gone for n, gone in zip(self._n_forgotten, n_oldest)]
        n, room = max(self._n_packed), max(self.room, *self._n_packed)
        for side in self._sides:
            for name, per_row in ("codes", 1), ("scale", 1), ("means", side.segment):
                buffer, n_left = getattr(side, name), -(-n // per_row)
                if buffer is not None:
                    rows = _ending_at(buffer, [gone // per_row + n_left for gone in n_oldest], n_left)
                    setattr(side, name, _write(None, 0, rows, -(-room // per_row)))
        self._evaluate()

    def make_mask(self, N, return_array=False, window_size=None):
        """As BatchTurboKVCache.make_mask, for what each row would see in a RotatingTurboKVCache of its own."""
        plan, mask, held, index, query = self._tokens_in_columns(N)
        offset = self._offset[:, None, None, None]
        before = mx.minimum(offset, self.max_size - 1)  # so many tokens are returned alone, and the new ones
        dead = held - before
        mask = mask & ((index < self.keep) | (index >= self.keep + dead))
        index = mx.where(index < self.keep, index, index - dead)
        return mask & (before + query < index + (window_size or self.max_size))

    # ---- the rest of mlx-lm's contract -----------------------------------------------------------------------
    @classmethod
    def _join(cls, parts):
        sizes = sorted({part.max_size for part in parts})
        if len(sizes) > 1:
            raise ValueError(f"caches: got windows of {' and '.join(map(str, sizes))} tokens, allowed is one max_size")
        return super()._join(parts)

    @classmethod
    def _of(cls, cache):
        batch = super()._of(cache)
        batch._n_forgotten = [cache.n_forgotten]
        return batch

    def extract(self, idx):
        cache = super().extract(idx)
        cache.n_forgotten = self._n_forgotten[idx]
        return cache

    def is_trimmable(self):
        return self._longest() < self.max_size

    def _longest(self):
        """Tokens of the longest row so far."""
        return max(self._tokens(b) + n for b, n in enumerate(self._n_forgotten))

    def size(self):
        return min(self._longest(), self.max_size)

    def to_kv_cache(self):
        """A plain mlx_lm BatchRotatingKVCache with the same tokens, packed ones restored in the model's dtype.

        Raises ValueError in the middle of a padded prompt, and with keep > 0, which that has not.
        """
        from mlx_lm.models.cache import BatchRotatingKVCache

        if self.keep:
            raise ValueError(f"to_kv_cache: mlx-lm's batch of windows keeps no first tokens, this keeps {self.keep}")
        return self._plain(BatchRotatingKVCache, self.max_size, self._pad)

    # ---- state -----------------------------------------------------------------------------------------------
    def _row_counts(self):
        return *super()._row_counts(), self._n_forgotten
