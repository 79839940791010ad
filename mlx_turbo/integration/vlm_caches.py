"""Our caches as mlx-vlm wants them. Its models and its batches ask for a few names beyond mlx-lm's; the caches are the
same otherwise."""

from typing import Any, Sequence

import mlx.core as mx
import numpy as np

from ..cache.batch import BatchTurboKVCache
from ..cache.batch_rotating import BatchRotatingTurboKVCache
from ..cache.rotating import RotatingTurboKVCache
from ..cache.single import TurboKVCache


def _numbers(of_rows: mx.array) -> list[int]:
    return [int(n) for n in np.array(of_rows)]


class _Sequence(TurboKVCache):
    def to_batch(self, left_padding: Sequence[int]) -> Any:
        """An empty batch cache like this empty one. left_padding: for each row, how many of its next tokens are
        padding."""
        return self.batch_class._empty(self, left_padding)


class _Batch(BatchTurboKVCache):
    """mlx-vlm's qwen3_5 computes masks of its own from the `left_padding` of mlx-vlm's batches, and moves rows in and
    out of a batch while padding is to come."""

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """As BatchTurboKVCache.make_mask, always an array: mlx-vlm cuts it."""
        return self.array_mask(N, window_size)

    @property
    def left_padding(self) -> Any:
        """None: the columns of a row are not all at the right, and only `make_mask` knows them. What mlx-vlm sets here
        follows from what it sets as `offset`, and is ignored."""
        return None

    @left_padding.setter
    def left_padding(self, columns: Any) -> None:
        pass

    @property
    def _idx(self) -> int:
        """No mask for the next token has more columns than this, and one for it: mlx-vlm cuts masks here."""
        return self.config.sink + max(map(self.n_tokens, range(self.n_rows))) + self._n_columns

    @property
    def _offset(self) -> int:
        """Tokens of the prompt so far, padding included."""
        return max(_numbers(self.offset))

    @property  # type: ignore[override]
    def offset(self) -> mx.array:
        """Tokens of each row so far, int32 [B]: negative as long as left padding is to come. Setting it announces such
        padding for rows without tokens; raises ValueError for another number of tokens than a row has."""
        return super().offset

    @offset.setter
    def offset(self, n: mx.array) -> None:
        wanted, had = _numbers(n), _numbers(super().offset)
        if any(max(w, 0) != max(h, 0) for w, h in zip(wanted, had)) or len(wanted) != len(had):
            raise ValueError(f"offset: got {wanted}, but the rows hold {had} tokens; negative is padding to come")
        self._pad = [max(-w, 0) for w in wanted]
        self._set_offset()

    def empty(self) -> bool:
        return super().empty() and not any(self._pad)


class VlmTurboKVCache(_Sequence):
    """TurboKVCache for a model of mlx-vlm."""


class VlmRotatingTurboKVCache(_Sequence, RotatingTurboKVCache):
    """RotatingTurboKVCache for a model of mlx-vlm."""


class VlmBatchTurboKVCache(_Batch):
    """BatchTurboKVCache for a model of mlx-vlm."""

    row_class = VlmTurboKVCache


class VlmBatchRotatingTurboKVCache(_Batch, BatchRotatingTurboKVCache):
    """BatchRotatingTurboKVCache for a model of mlx-vlm."""

    row_class = VlmRotatingTurboKVCache


VlmTurboKVCache.batch_class = VlmBatchTurboKVCache
VlmRotatingTurboKVCache.batch_class = VlmBatchRotatingTurboKVCache
