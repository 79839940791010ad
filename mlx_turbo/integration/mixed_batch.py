"""Batches whose rows have caches of several kinds, because `enable` or `disable` was called while requests ran.

mlx-lm's batches take one kind of cache per layer. Here each kind keeps a batch of its own, so that a running answer
goes on with the scheme it began with; attention sees the tokens of all of them as ordinary arrays until one kind is
left.
"""

import functools
import importlib
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx

from ..cache.single import TurboKVCache
from ..quant.scheme import Scheme


def kind_of(cache: Any) -> tuple[Any, ...]:
    """What the caches of two rows, or two batches, must have in common to be one batch. Under one budget of memory,
    rows of any widths are: they are brought to the same ones."""
    return type(cache), config_of(cache), getattr(cache, "max_size", None)


def config_of(cache: Any) -> Any:
    """The configuration of a cache of ours; with its budget of memory, if it is under one, in place of a scheme."""
    config: Any = getattr(cache, "config", None)
    share = getattr(cache, "share", None)
    return config if share is None else (share.budget, replace(config, scheme=Scheme(0, 0)))


class MixedBatchCache:
    """One layer's cache for the rows of several batch caches.

    parts: the batch caches. rows: for each of them, which rows of this batch its own rows are.
    """

    def __init__(self, parts: Sequence[Any], rows: Sequence[Sequence[int]]) -> None:
        self.parts, self.rows = list(parts), [list(r) for r in rows]

    @property
    def n_rows(self) -> int:
        return sum(map(len, self.rows))

    # ---- tokens ------------------------------------------------------------------------------------------------
    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys [B, n_kv_heads, L, Dk] and values [B, n_kv_heads, L, Dv], padding included, and return the tokens
        of all rows in the columns that `make_mask(L)` is for."""
        if len(self.parts) == 1:
            return self.parts[0].update_and_fetch(keys, values)
        indices = [mx.array(rows) for rows in self.rows]
        return self._fetched([p.update_and_fetch(keys[i], values[i]) for p, i in zip(self.parts, indices)])

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """The tokens of all rows, as the last `update_and_fetch` returned them."""
        return self._fetched([part.keys_and_values() for part in self.parts])

    def _fetched(self, of_parts: list[tuple[mx.array, mx.array]]) -> tuple[mx.array, mx.array]:
        if len(of_parts) == 1:
            return of_parts[0]
        keys, values = (self._right_aligned(list(side), axis=2) for side in zip(*of_parts))
        return keys, values

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """The mask for the next N tokens: bool [B, 1, N, columns]."""
        if len(self.parts) == 1:
            return self.parts[0].make_mask(N, return_array=True, window_size=window_size)
        masks = [getattr(part, "array_mask", part.make_mask)(N, window_size=window_size) for part in self.parts]
        full = [mx.broadcast_to(m, (len(rows), 1, *m.shape[-2:])) for m, rows in zip(masks, self.rows)]
        return self._right_aligned(full, axis=3)

    def _right_aligned(self, arrays: list[mx.array], axis: int) -> mx.array:
        """Arrays of the parts' rows as one of all rows, in their order, with zeros before those of fewer columns."""
        n = max(a.shape[axis] for a in arrays)
        pads = [[(n - a.shape[axis], 0) if i == axis else (0, 0) for i in range(a.ndim)] for a in arrays]
        return self._in_order([mx.pad(mx.array(a), pad) for a, pad in zip(arrays, pads)])

    def _in_order(self, arrays: list[mx.array]) -> mx.array:
        order = [row for rows in self.rows for row in rows]
        joined = mx.concatenate(arrays)
        if order == sorted(order):
            return joined
        return joined[mx.array(sorted(range(len(order)), key=order.__getitem__))]

    @property
    def offset(self) -> mx.array:
        """Tokens of each row so far, [B]."""
        return self._in_order([part.offset for part in self.parts])

    # ---- rows --------------------------------------------------------------------------------------------------
    def prepare(self, **of_rows: Sequence[int] | None) -> None:
        """Announce padding of the tokens to come, per row: left_padding, lengths, right_padding."""
        for part, rows in zip(self.parts, self.rows):
            part.prepare(**{name: [n[row] for row in rows] for name, n in of_rows.items() if n is not None})

    def finalize(self) -> None:
        """Say that the padded prompt is complete."""
        for part in self.parts:
            part.finalize()

    def filter(self, batch_indices: Iterable[int] | mx.array) -> None:
        """Keep the rows batch_indices, in that order."""
        kept: Any = batch_indices.tolist() if isinstance(batch_indices, mx.array) else batch_indices
        place = {old: new for new, old in enumerate(kept)}
        parts, places = [], []
        for part, rows in zip(self.parts, self.rows):
            left = sorted((place[row], i) for i, row in enumerate(rows) if row in place)
            if left:
                if [i for _, i in left] != list(range(len(rows))):
                    part.filter([i for _, i in left])
                parts.append(part)
                places.append([new for new, _ in left])
        self.parts, self.rows = parts, places

    def extract(self, idx: int) -> Any:
        """Row idx as a cache of its own."""
        part, i = next((p, rows.index(idx)) for p, rows in zip(self.parts, self.rows) if idx in rows)
        return part.extract(i)

    def extend(self, other: Any) -> None:
        """Append the rows of another batch cache of any kind, which stays as it is."""
        other = other if isinstance(other, MixedBatchCache) else MixedBatchCache([other], [range(_n_rows(other))])
        n = self.n_rows
        for part, rows in zip(other.parts, other.rows):
            new = [n + row for row in rows]
            at = next((i for i, mine in enumerate(self.parts) if kind_of(mine) == kind_of(part)), None)
            if at is None:
                self.parts.append(part)
                self.rows.append(new)
            else:
                self.parts[at].extend(part)
                self.rows[at] += new

    def is_trimmable(self) -> bool:
        return all(part.is_trimmable() for part in self.parts)

    def trim(self, n: int) -> int:
        """Remove the newest n tokens of each row. Returns how many the longest one lost."""
        return max(part.trim(n) for part in self.parts)

    # ---- what it holds -----------------------------------------------------------------------------------------
    def size(self) -> int:
        return max(part.size() for part in self.parts)

    def empty(self) -> bool:
        return all(part.empty() for part in self.parts)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def state(self) -> list[Any]:
        """The state of each part, to be evaluated; it cannot be set."""
        return [part.state for part in self.parts]


def _n_rows(batch: Any) -> int:
    return batch.offset.shape[0]


def _is_mix(caches: list[Any]) -> bool:
    """Whether caches of one layer, ours among them, are of several kinds."""
    ours = any(isinstance(c, (TurboKVCache, MixedBatchCache)) for c in caches)
    return ours and (len({kind_of(c) for c in caches}) > 1 or any(isinstance(c, MixedBatchCache) for c in caches))


def _merge(original: Callable[..., list[Any]], caches: list[list[Any]]) -> list[Any]:
    """mlx-lm's _merge_caches: for each layer, the rows' caches as a batch. caches: per row, per layer."""
    layers = [list(layer) for layer in zip(*caches)]
    if not any(map(_is_mix, layers)):
        return original(caches)
    merged = []
    for layer in layers:
        rows: dict[tuple[Any, ...], list[int]] = {}
        for row, cache in enumerate(layer):
            rows.setdefault(kind_of(cache), []).append(row)
        parts = [layer[of_kind[0]].merge([layer[row] for row in of_kind]) for of_kind in rows.values()]
        merged.append(parts[0] if len(parts) == 1 else MixedBatchCache(parts, list(rows.values())))
    return merged


def _extend(original: Callable[..., list[Any]], cache_a: list[Any], cache_b: list[Any]) -> list[Any]:
    """mlx-lm's and mlx-vlm's _extend_cache: the layers of one batch, each with the rows of the other's appended.
    mlx-vlm also gives it a row that is no batch yet."""
    given, cache_b = cache_b, [*map(_as_batch, cache_b)]
    cache_a[:] = map(_as_batch, cache_a)
    for i, (a, b) in enumerate(zip(cache_a, cache_b)):
        if _is_mix([a, b]) and not isinstance(a, MixedBatchCache):
            cache_a[i] = MixedBatchCache([a], [range(_n_rows(a))])
    if not cache_a or not any(getattr(b, "share", None) is not None for b in cache_b):
        return original(cache_a, cache_b)
    given.clear()  # the generators drop it: under a budget each layer goes as soon as it is in the other batch
    cache_b.reverse()
    for i, a in enumerate(cache_a):
        (cache_a[i],) = original([a], [cache_b.pop()])
    return cache_a


def _as_batch(cache: Any) -> Any:
    """A batch of one row for one of our caches of one sequence; any other cache as it is."""
    return type(cache).merge([cache]) if isinstance(cache, TurboKVCache) and not hasattr(cache, "extend") else cache


def let_batches_mix() -> None:
    """Make mlx-lm's batches take caches of several kinds, and those of mlx-vlm if it is loaded. Does nothing the second
    time."""
    module = importlib.import_module("mlx_lm.generate")  # a plain import gives the function
    replaced: list[tuple[Any, str, Callable[..., Any]]] = [
        (module, "_merge_caches", _merge),
        (module, "_extend_cache", _extend),
    ]
    if "mlx_vlm.generate.ar" in sys.modules:
        replaced.append((sys.modules["mlx_vlm.generate.ar"], "_extend_cache", _extend))
    for module, name, ours in replaced:
        original = getattr(module, name)
        if not (isinstance(original, functools.partial) and original.func is ours):
            setattr(module, name, functools.partial(ours, original))
