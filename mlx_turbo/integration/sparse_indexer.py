"""Layers whose attention picks its tokens with an indexer (deepseek_v32, glm_moe_dsa, minimax_m3_vl).

The CacheList of such a layer has a second cache for the indexer's keys. The indexer scores all of them at every step,
outside attention, and has no values. Packing them would cost a restored copy per step and change which tokens are
picked, so that cache stays exact.

Imported late: it needs mlx_lm.
"""

import copy
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import BatchKVCache, CacheList, KVCache


class _Probe(KVCache):
    """Notes whether it is given keys without values."""

    keys_only: bool | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        self.keys_only = values is keys or not values.size  # deepseek_v32's placeholder, minimax_m3_vl's
        return super().update_and_fetch(keys, values)


def _candidates(prompt_cache: list[Any]) -> dict[tuple[int, int], Any]:
    """{(layer, member): cache} of the KVCaches that are not alone in their CacheList; some may be an indexer's."""
    plain = {
        i: [j for j, m in enumerate(getattr(c, "caches", ())) if type(m) is KVCache] for i, c in enumerate(prompt_cache)
    }
    return {(i, j): prompt_cache[i][j] for i, several in plain.items() if len(several) > 1 for j in several}


def indexers_of_model(model: Any, prompt_cache: list[Any]) -> set[tuple[int, int]]:
    """{(layer, member)} of the indexers' caches in a new prompt cache of mlx-lm for `model`: those that get keys
    without values. The model is called once to find out, and nothing of the call is evaluated (61 layers: 35 ms)."""
    probes = {at: _Probe() for at in _candidates(prompt_cache)}
    if not probes:
        return set()
    called = copy.deepcopy(prompt_cache)
    for i in {i for i, _ in probes}:
        called[i].caches = tuple(probes.get((i, j), m) for j, m in enumerate(called[i].caches))
    model(mx.zeros((1, 1), mx.int32), cache=called)
    return {at for at, probe in probes.items() if probe.keys_only is not False}


def indexers_of_tokens(prompt_cache: list[Any]) -> set[tuple[int, int]]:
    """As `indexers_of_model`, for a prompt cache that holds tokens: an indexer's values are zeros or empty."""
    return {at for at, c in _candidates(prompt_cache).items() if c.empty() or not mx.any(c.values).item()}


class IndexedCacheList(CacheList):
    """The caches of a layer with an indexer: a TurboKVCache first, and the indexer's KVCache last. In a batch, the last
    one follows the first."""

    @property
    def caches(self) -> tuple[Any, ...]:
        """The caches, in the model's order."""
        return self._caches

    @caches.setter
    def caches(self, caches: Any) -> None:
        self._caches = tuple(caches)  # empty while they are merged
        if caches and isinstance(caches[-1], BatchKVCache):
            self._caches = *caches[:-1], BatchIndexerKVCache.of(caches[-1], caches[0])

    def extract(self, idx: int) -> "IndexedCacheList":
        """The caches of one row of a batch."""
        return IndexedCacheList(*super().extract(idx).caches)


class BatchIndexerKVCache(BatchKVCache):
    """mlx-lm's BatchKVCache, but its tokens are returned in the columns of a BatchTurboKVCache, the layer's first
    cache: the mask has those columns, and the indexer picks from them."""

    @classmethod
    def of(cls, cache: BatchKVCache, first: Any) -> "BatchIndexerKVCache":
        """A BatchKVCache that follows `first`."""
        own = cls.__new__(cls)
        own.__dict__.update(cache.__dict__)
        own._follow(first)
        return own

    def _follow(self, first: Any) -> None:
        """Both hold the same tokens at this point."""
        self._first, self._seen = first, self._tokens_of(first)

    @staticmethod
    def _tokens_of(first: Any) -> list[int]:
        return [first.n_tokens(b) for b in range(first.n_rows)]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        """As BatchKVCache.update_and_fetch. The first cache may already have these tokens (deepseek_v32), or be about
        to get them (minimax_m3_vl)."""
        first, had = self._first, self._tokens_of(self._first)
        if had == self._seen:
            plan = first.plan(keys.shape[2])
            self._seen = [n + new for n, (_, new) in zip(had, plan.spans)]
        else:
            plan, self._seen = first.shown or first.plan(0), had
        edges = zip(*(plan.edges(b) for b in range(first.n_rows)))
        front, back = (mx.array(columns, mx.int32)[:, None] for columns in edges)
        column = mx.arange(sum(plan.columns) + plan.n_new)
        token = mx.where(column < front, column, column - back + front)  # in an evicted column: any
        fetched = super().update_and_fetch(keys, values)
        index = mx.clip(token + self.left_padding[:, None], 0, self._idx - 1)[:, None, :, None]
        return tuple(mx.take_along_axis(x, index, axis=2) for x in fetched)

    def filter(self, batch_indices: Any) -> None:
        """As BatchKVCache.filter."""
        super().filter(batch_indices)
        self._follow(self._first)

    def extend(self, other: Any) -> None:
        """As BatchKVCache.extend."""
        super().extend(other)
        self._follow(self._first)

    def trim(self, n: int) -> int:
        """As BatchKVCache.trim."""
        n = super().trim(n)
        self.left_padding = mx.minimum(self.left_padding, self._idx)  # a row that had fewer tokens is empty
        self.offset = self._idx - self.left_padding
        self._follow(self._first)
        return n
