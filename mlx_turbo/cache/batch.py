"""BatchTurboKVCache: the rows of a batch, of different lengths, in the buffers of one cache.

Every row stays what it would be in a TurboKVCache of its own: it packs the same tokens at the same moment, so its codes
are the same to the bit. The tokens of all rows come back as common columns

    [ sink ] [ packed: n of the longest row ] [ recent, the newest last ]

in which a row with fewer tokens has dead ones: after its packed tokens and before its recent ones. `make_mask` masks
them, and padding on either side, which is dropped once the chunk it came with has been attended to.

A row has sinks and packed tokens, or neither: until it packs for the first time, all its tokens are recent ones.
"""

import mlx.core as mx
import numpy as np

from ..backends.sides import CachedSide
from . import auto_bits
from .batch_plan import _Plan
from .packing import _first, _make_sides, _write
from .single import TurboKVCache, which_are_centred
from .state import _read_config, _read_header, _restore
from .view import KVView, LazyKV, _Unread

BATCH_MAGIC = 0x54554B42  # "TUKB"
_ROW = ("n_packed", "n_recent", "n_pad", "n_until", "key_means", "value_means")  # n_until: -1 without right padding


def _precision(bits):
    return bits or 16


def _write_rows(buffer, batch, rows, at, new, step):
    """`buffer` [batch, H, capacity, *] with new [len(rows), H, n, *] written to `rows` from token `at` on; it grows as
    in _write."""
    if rows == list(range(batch)):
        return _write(buffer, at, new, step)
    end = at + new.shape[2]
    if buffer is None or end > buffer.shape[2]:
        buffer = _grown(buffer, (batch, new.shape[1], -(-end // step) * step, new.shape[3]), new.dtype)
    for i, b in enumerate(rows):
        buffer[b : b + 1, :, at:end] = new[i : i + 1]
    return buffer


def _grown(buffer, shape, dtype):
    """`buffer`, or nothing, with zeros behind its tokens up to `shape`."""
    if buffer is None:
        return mx.zeros(shape, dtype)
    return mx.pad(buffer, [(0, 0), (0, 0), (0, shape[2] - buffer.shape[2]), (0, 0)])


def _rows(array, rows):
    """The given rows of an array; not a copy where they are one or all."""
    if len(rows) == 1:
        return array[rows[0] : rows[0] + 1]
    return array if rows == list(range(array.shape[0])) else array[mx.array(rows)]


def _ending_at(array, ends, n):
    """The n tokens of array [B, H, N, D] before token ends[b] of row b: what is outside of the array is dead."""
    if n == 0 or len(set(ends)) == 1 and n <= ends[0] <= array.shape[2]:
        return array[:, :, ends[0] - n : ends[0]]
    index = mx.clip(mx.array(ends)[:, None] + mx.arange(-n, 0), 0, array.shape[2] - 1)
    return mx.take_along_axis(array, index[:, None, :, None], axis=2)


class BatchTurboKVCache(TurboKVCache):
    """A KV cache of one layer for several sequences, in the place of mlx_lm.models.cache.BatchKVCache.

    config: as for TurboKVCache. left_padding: per row, how many tokens at the left of what comes are padding; its
    length is the batch size. `merge` makes one from the caches of the rows, `extract` takes a row out again.

    Raises ValueError for an unknown scheme or option.
    """

    magic, row_names, _row_class = BATCH_MAGIC, _ROW, TurboKVCache
    never_quantized = "batch"

    def __init__(self, config="turbo4", left_padding=(0,), **options):
        self._pad = [int(n) for n in left_padding]
        super().__init__(config, **options)

    def _clear(self):
        B = len(self._pad)
        super()._clear()
        del self.n_sink, self.n_packed, self.n_recent  # they are per row
        self._n_packed, self._n_recent, self._n_forgotten = [0] * B, [0] * B, [0] * B
        self._centred = [False] * B, [False] * B  # of keys, of values: whether the row has means
        self._until = None  # per row, how many tokens come before right padding
        self._n_columns = 0  # of the recent tokens
        self._shown = None  # the plan of the last update, if that left other columns than it returned
        self._n_free = 0  # so many tokens can be appended to every row and nothing else happens
        self._observed, self._observed_with, self._last = [[] for _ in range(B)], None, []
        self._set_offset()

    @classmethod
    def _empty(cls, like, left_padding=(0,)):
        """A batch without tokens, configured as a cache of this class or of a row."""
        return cls(like.config, left_padding)

    def _alone(self):
        """A cache for a row, without tokens."""
        return TurboKVCache(self.config)

    # ---- rows ------------------------------------------------------------------------------------------------
    def _sinks(self, n_packed):
        return self.config.sink if n_packed else 0

    def _tokens(self, b):
        """Tokens that are held of row b, padding not counted."""
        return self._sinks(self._n_packed[b]) + self._n_packed[b] + self._n_recent[b]

    @property
    def _n_rows(self):
        return len(self._pad)

    @property
    def offset(self):
        """Tokens of each row so far, int32 [B]: negative as long as left padding is to come."""
        return self._offset

    def _set_offset(self):
        sink = self.config.sink
        self._offset = mx.array(
            [
                (sink + n_packed if n_packed else 0) + n_recent + n_forgotten - pad
                for n_packed, n_recent, n_forgotten, pad in zip(
                    self._n_packed, self._n_recent, self._n_forgotten, self._pad
                )
            ],
            mx.int32,
        )

    def _changed(self):
        self.version += 1
        self._n_free, self._shown = 0, None
        self._set_offset()

    def _columns(self, n_packed):
        most = max(n_packed, default=0)
        return self._sinks(most), most

    def _counts(self):
        """(n_sink, n_packed, n_recent) of each row, as TurboKVCache would count them."""
        rows = []
        for n_packed, n_recent in zip(self._n_packed, self._n_recent):
            n_sink = self.config.sink if n_packed else min(self.config.sink, n_recent)
            rows.append((n_sink, n_packed, n_recent if n_packed else n_recent - n_sink))
        return rows

    def _columns_of_rows(self):
        columns = *self._columns(self._n_packed), self._n_columns
        ends = [
            (self._sinks(n_packed) + n_packed, sum(columns) - n_recent)
            for n_packed, n_recent in zip(self._n_packed, self._n_recent)
        ]
        return columns, [np.r_[:front, back : sum(columns)] for front, back in ends]

    # ---- update ----------------------------------------------------------------------------------------------
    def _plan(self, n_new):
        config = self.config
        capacity = config.recent + config.block
        spans, alone = [], []
        for b, (n_sink, _, n_recent) in enumerate(self._counts()):
            first = min(self._pad[b], n_new)
            n = n_new - first if self._until is None else max(min(n_new, self._until[b]) - first, 0)
            spans.append((first, n))
            alone.append((n_recent, max(n - (config.sink - n_sink), 0)))  # recent ones and new ones beside them
        decide = self.undecided and any(
            n > self._capacity() or (n + new > self._capacity() and new <= config.block) for n, new in alone
        )
        forget = [self._to_forget(b) if n else 0 for b, (_, n) in enumerate(spans)]
        before, after = [0] * self._n_rows, [0] * self._n_rows
        for b, (n, new) in enumerate(alone):
            if self.undecided and not decide or not spans[b][1]:
                continue
            if n + new > capacity and (new <= config.block or decide and n > capacity):
                before[b] = n - config.recent
                n = config.recent
            if n + new > capacity:
                after[b] = n + new - config.recent
        n_packed = [n - fewer + more for n, fewer, more in zip(self._n_packed, forget, before)]
        n_recent = [
            recent - more - (config.sink if more and not packed else 0)
            for recent, more, packed in zip(self._n_recent, before, self._n_packed)
        ]
        return _Plan(
            n_new,
            decide,
            spans,
            forget,
            before,
            after,
            n_packed,
            n_recent,
            (*self._columns(n_packed), self._compacted(n_recent)),
        )

    def _to_forget(self, b):
        """How many of its oldest packed tokens row b forgets when the next one comes."""
        return 0

    def _compacted(self, n_recent):
        """Columns of the recent tokens once those that are dead in all rows are cut off, which waits until it is worth
        a copy."""
        most = max(n_recent, default=0)
        return most if 4 * (self._n_columns - most) >= self.config.block else self._n_columns

    def update_and_fetch(self, keys, values):
        """Append keys [B, n_kv_heads, L, Dk] and values [B, n_kv_heads, L, Dv], padding included, and return the tokens
        of all rows in the columns that `make_mask(L)` is for, the new ones exactly as given.

        Raises as TurboKVCache.update_and_fetch, and ValueError for another batch size than this cache has.
        """
        self._check(keys, values)
        if keys.shape[0] != self._n_rows:
            raise ValueError(f"keys: batch size {keys.shape[0]}, but this cache has {self._n_rows} rows")
        new, n_new = (keys, values), keys.shape[2]
        if n_new == 0:
            return self.keys_and_values() if self._n_columns or any(self._n_packed) else new
        if n_new <= self._n_free:
            return self._append(new, n_new)
        plan = self._plan(n_new)
        if plan.decide:
            self._decide()
        if any(plan.forget):
            self._forget(plan.forget)
        self._pack_recent(plan.before)
        self._cut_recent(plan.columns[2])
        R, first = plan.columns[2], not any(plan.columns)
        if not first and self._until is None and not any(plan.after) and all(s == (0, n_new) for s in plan.spans):
            fetched = self._append(new, n_new)
            self._n_free = 0 if self.undecided else self._free()
            return fetched
        tails = [mx.concatenate([_first(side.recent, R), x], axis=2) if R else x for side, x in zip(self._sides, new)]
        self._take_over(tails, plan, R)
        self._pad = [pad - min(pad, n_new) for pad in self._pad]
        if self._until is not None:
            self._until = [max(n - n_new, 0) for n in self._until]
        self._last = plan.spans
        self._changed()
        self._shown = plan
        self._evaluate()
        if first and not self.undecided:
            return new
        return self._fetch((*plan.columns[:2], R + n_new), tails, new if first else None)

    def _free(self):
        return self.config.recent + self.config.block - max(n_recent for *_, n_recent in self._counts())

    def _append(self, new, n_new):
        """The new tokens of all rows are recent ones, without padding."""
        for side, x in zip(self._sides, new):
            side.recent = _write(side.recent, self._n_columns, x, self._room())
        self._n_recent = [n + n_new for n in self._n_recent]
        self._n_columns += n_new
        self._n_free -= n_new
        self._last = [(0, n_new)] * self._n_rows
        self.version += 1
        self._shown = None
        self._set_offset()
        return self._fetch((*self._columns(self._n_packed), self._n_columns))

    def _room(self):
        config = self.config
        return config.sink + config.recent + config.block + -(-config.block // 4)

    def _take_over(self, tails, plan, n_before):
        """Pack what `plan` says of `tails` (recent columns and the new chunk, per side), and keep the rest."""
        ends = [n_before + first + n for first, n in plan.spans]
        n_exact = [had + n for had, (_, n) in zip(self._n_recent, plan.spans)]
        self._pack(plan.after, tails, ends, n_exact)
        self._n_columns = max(self._n_recent)
        for side, tail in zip(self._sides, tails):
            side.recent = _write(None, 0, _ending_at(tail, ends, self._n_columns), self._room())

    def _cut_recent(self, n):
        if n < self._n_columns:
            for side in self._sides:
                side.recent = _write(None, 0, side.recent[:, :, self._n_columns - n : self._n_columns], self._room())
            self._n_columns = n

    def _pack_recent(self, n_pack):
        if any(n_pack):
            tails = [_first(side.recent, self._n_columns) for side in self._sides]
            self._pack(n_pack, tails, [self._n_columns] * self._n_rows, self._n_recent)

    def _pack(self, n_pack, tails, ends, n_exact):
        """Quantize n_pack[b] tokens of each row b, the oldest but sinks of the n_exact[b] that end at token ends[b] of
        `tails`. Rows in the same situation are quantized together. Raises before anything is changed."""
        self._unread.forget()
        groups, begun, done = {}, [], []
        for b, n in enumerate(n_pack):
            if n:
                situation = n, n_exact[b], ends[b], self._n_packed[b], *(c[b] for c in self._centred)
                groups.setdefault(situation, []).append(b)
        for (n, exact, end, n_packed, *centred), rows in groups.items():
            like = TurboKVCache(self.config)  # these rows alone: what is packed does not depend on the others
            like.n_packed, sinks = n_packed, 0 if n_packed else self.config.sink
            for mine, side, yes in zip(like._sides, self._sides, centred):
                mine.bits = side.bits
                mine.means = _rows(side.means, rows) if yes and n_packed else None
            exact = [_rows(tail, rows)[:, :, end - exact : end] for tail in tails]
            begun.append((rows, n, sinks, exact, like, like._new_means([x[:, :, sinks:] for x in exact], n)))
        decided = which_are_centred([group[-2:] for group in begun])
        for (rows, n, sinks, exact, like, new), centred in zip(begun, decided):
            means = like._means(new, centred)
            packed = like._quantize([x[:, :, sinks : sinks + n] for x in exact], means)
            done.append((rows, n, sinks, exact, means, packed, centred))
        self._n_recent = list(n_exact)
        for rows, n, sinks, exact, means, packed, centred in done:
            at = self._n_packed[rows[0]]
            for i, (side, x, mean, (codes, scale)) in enumerate(zip(self._sides, exact, means, packed)):
                if sinks:
                    side.sink = _write_rows(side.sink, self._n_rows, rows, 0, x[:, :, :sinks], sinks)
                side.codes = _write_rows(side.codes, self._n_rows, rows, at, codes, self.step)
                if scale is not None:
                    side.scale = _write_rows(side.scale, self._n_rows, rows, at, scale, self.step)
                yes = [False] * len(rows)
                if mean is not None:
                    mean = mean[:, :, : -(-(at + n) // side.segment)]
                    step = max(self.step // side.segment, 1)
                    side.means = _write_rows(side.means, self._n_rows, rows, 0, mean, step)
                    yes = [self._centred[i][rows[0]]] * len(rows) if at else centred[i]
                for b, has in zip(rows, yes):
                    self._centred[i][b] = has
                    if not at and not has and side.means is not None:
                        side.means[b] = 0  # of what the row held before a trim
            for b in rows:
                self._n_packed[b] += n
                self._n_recent[b] -= n + sinks
        self._cover_means()

    def _cover_means(self):
        """Segments without a mean of their own are read too, in rows that are not centred."""
        for side, centred in zip(self._sides, self._centred):
            n = -(-max(self._n_packed) // side.segment)
            if not any(centred):
                side.means = None
            elif side.means.shape[2] < n:
                side.means = _grown(side.means, (*side.means.shape[:2], n, side.means.shape[3]), side.means.dtype)

    # ---- auto ------------------------------------------------------------------------------------------------
    def observe(self, queries, scale, sinks=None):
        """As TurboKVCache.observe. What it sees is used at the next update, so that all layers pack at once."""
        if not self.undecided:
            return
        self._observed_with = scale, sinks
        for b, (first, n) in enumerate(self._last):
            if not n:
                continue
            sample = auto_bits.sample_queries(n)
            positions = [self._tokens(b) - n + i for i in sample]
            seen = queries, b, positions
            if queries.shape[2] > 1:  # one token's queries are evaluated with the step, and kept as they are
                seen = mx.take(queries[b : b + 1], mx.array([first + i for i in sample]), axis=2), 0, positions
                mx.async_eval(seen[0])
            self._observed[b] = auto_bits.newest([*self._observed[b], seen])

    def _observed_of(self, b):
        """What a TurboKVCache of row b would have observed: ([(queries, positions)], scale, sinks) or None."""
        if not self._observed[b]:
            return None
        seen = [
            (q if q.shape[0] == 1 else mx.contiguous(q[row : row + 1]), positions)  # not a view of all rows' queries
            for q, row, positions in self._observed[b]
        ]
        return seen, *self._observed_with

    def _observed_queries(self):
        return list(
            {id(q): q for seen in self._observed for q, *_ in seen}.values()
        )  # rows share those of a decode step

    def _decide(self):
        """The bits of the keys that the most demanding row needs; rows with too few tokens to tell are not asked."""
        tokens = [self._tokens(b) for b in range(self._n_rows)]
        asked = [b for b, n in enumerate(tokens) if n >= min(auto_bits.FEWEST, max(tokens))]
        choices = []
        for b in asked:
            keys = self._sides[0].recent[b : b + 1, :, self._n_columns - tokens[b] : self._n_columns]
            choices.append(auto_bits.choose_by(keys, self.config, self._observed_of(b)))
        bits, errors, by = max(choices, key=lambda choice: _precision(choice[0]))
        self._decided(bits, errors, by)

    def _decided(self, bits, errors, by):
        self._sides[0].bits, self._errors, self._by = bits, errors, by
        self.undecided, self._observed = False, [[] for _ in range(self._n_rows)]

    def _raise_keys(self, bits):
        """Bring packed keys to more bits, or to exact ones: restored and quantized again about the same means."""
        side = self._sides[0]
        if side.bits == bits:
            return
        n = max(self._n_packed)
        if n:
            keys = self._view((0, n, 0), None).restore_packed()[0]
            means = side.means
            side.bits = bits
            if bits:
                like = TurboKVCache(self.config)
                like._sides[0].bits, like._sides[1].bits = bits, 0
                (codes, scale), _ = like._quantize([keys, keys], [means, None])
                side.scale = _write(None, 0, scale, self.step)
            else:
                codes, side.scale, side.means = keys, None, None
                self._centred = [False] * self._n_rows, self._centred[1]
            side.codes = _write(None, 0, codes, self.step)
        side.bits = bits

    # ---- fetch -----------------------------------------------------------------------------------------------
    def _view(self, columns, tails):
        sides = []
        for i, side in enumerate(self._sides):
            tail = side.recent if tails is None else mx.contiguous(tails[i])
            sides.append(
                CachedSide(side.sink, side.codes, side.scale, tail, side.bits, side.head_dim, side.means, side.segment)
            )
        return KVView(*sides, columns, self.config.seed, self, self.version)

    def _fetch(self, columns, tails=None, new=None):
        view = self._view(columns, tails)
        if not any(side.bits for side in self._sides):
            return tuple(view.restore())
        packed = self._unread.get(view) if columns[1] else None
        return tuple(LazyKV(x, view, i) for i, x in enumerate(new or view.restore(packed)))

    def keys_and_values(self):
        """The tokens of all rows, [B, n_kv_heads, columns, D] of keys and of values, packed ones dequantized lazily.
        After an update in its columns, so that layers without a cache of their own can attend with the same mask."""
        if self._sides[0].recent is None:
            raise ValueError("the cache is empty: it does not know the shape of its keys and values yet")
        fetched = self._fetch((*self._columns(self._n_packed), self._n_columns))
        if self._shown is None:
            return fetched
        now = self._plan(0)
        index = np.zeros((self._n_rows, sum(self._shown.columns) + self._shown.n_new), np.int32)
        for b, row in enumerate(index):
            row[self._shown.live(b)] = now.live(b)
        index = mx.array(index)[:, None, :, None]
        return tuple(mx.take_along_axis(x, index, axis=2) for x in fetched)

    def make_mask(self, N, return_array=False, window_size=None):
        """The mask for the next N tokens: bool [B, 1, N, columns], True where a token is to be attended to.
        return_array is ignored: there may always be dead tokens to mask."""
        _, mask, held, index, query = self._tokens_in_columns(N)
        return mask if window_size is None else mask & (held + query < index + window_size)

    def _tokens_in_columns(self, N):
        """For the next N tokens: their plan; a mask [B, 1, N, columns], where a query's row has a token that is not
        newer; how many tokens the row holds before [B, 1, 1, 1]; which of its tokens is in a column, from 0 on
        [B, 1, 1, columns], where it has one; the number of the query [N, 1]."""
        plan = self._plan(N)
        n_sink, n_packed, _ = plan.columns
        base = sum(plan.columns)  # the column of the first new token
        held = [self._tokens(b) - plan.forget[b] - pad for b, pad in enumerate(self._pad)]
        rows = [(*plan.edges(b), held[b]) for b in range(self._n_rows)]
        front, back, held = (mx.array(numbers, mx.int32)[:, None, None, None] for numbers in zip(*rows))
        column, query = mx.arange(base + N), mx.arange(N)[:, None]
        mask = (column < front) | (column >= back)
        if N > 1:
            mask = mask & (column <= base + query)
        return plan, mask, held, mx.where(column < n_sink + n_packed, column, held + column - base), query

    # ---- batches ---------------------------------------------------------------------------------------------
    def prepare(self, *, left_padding=None, lengths=None, right_padding=None):
        """Announce padding of what comes next. left_padding: per row, more of it, for an empty cache. right_padding and
        lengths: per row, tokens of padding at the end, and tokens before that.

        Raises ValueError for left padding of a cache with tokens, and for right padding without lengths.
        """
        if left_padding is not None:
            if any(self._tokens(b) for b in range(self._n_rows)):
                raise ValueError("left_padding: it can only be added to an empty cache")
            self._pad = [pad + int(n) for pad, n in zip(self._pad, left_padding)]
            self._set_offset()
        if right_padding is not None and max(right_padding) > 0:
            if lengths is None:
                raise ValueError("lengths: right_padding needs them, or the cache cannot tell padding from tokens")
            self._until, self._n_free = [int(n) for n in lengths], 0

    def finalize(self):
        """The padded prompt has come: its padding is already gone."""
        self._until = None

    @classmethod
    def merge(cls, caches):
        """A batch cache whose rows are the given TurboKVCaches, which stay as they are.

        Rows with other bits for their keys (`auto`) are brought to those of the most precise one.

        Raises ValueError for different configurations, shapes or dtypes, and for a cache that holds a batch.
        """
        return cls._join([cls._of(cache) for cache in caches])

    @classmethod
    def _of(cls, cache):
        """The cache of a row as a batch; buffers are shared as long as nothing is appended."""
        if type(cache) is not cls._row_class:
            raise ValueError(f"caches: got a {type(cache).__name__}, allowed are {cls._row_class.__name__}s")
        batch = cls._empty(cache)
        batch.undecided, batch._errors, batch._by = cache.undecided, dict(cache._errors), cache._by
        unpacked = not cache.n_packed
        for i, (mine, side) in enumerate(zip(batch._sides, cache._sides)):
            mine.bits = side.bits
            if not cache.offset:
                continue
            if side.recent.shape[0] != 1:
                raise ValueError(f"caches: got one of batch size {side.recent.shape[0]}, allowed are caches of one row")
            mine.recent = side.recent[:, :, : cache.n_recent]
            if unpacked:
                mine.recent = (
                    mx.concatenate([side.sink[:, :, : cache.n_sink], mine.recent], axis=2)
                    if cache.n_sink
                    else mine.recent
                )
            else:
                mine.sink, mine.codes, mine.scale, mine.means = side.sink, side.codes, side.scale, side.means
                batch._centred[i][0] = side.means is not None
        batch._n_packed, batch._n_recent = [cache.n_packed], [cache.n_recent + (cache.n_sink if unpacked else 0)]
        batch._n_columns = batch._n_recent[0]
        if cache._observed is not None:
            seen, *batch._observed_with = cache._observed
            batch._observed = [[(queries, 0, positions) for queries, positions in seen]]
        batch._set_offset()
        return batch

    @classmethod
    def _join(cls, parts):
        """One cache of the rows of several; these may be changed in what does not show."""
        config = parts[0].config
        for part in parts:
            if part.config != config:
                raise ValueError(f"caches: got {part.config} and {config}, allowed is one configuration")
        decided = [p for p in parts if not p.undecided]
        for part in parts if decided else []:
            if part.undecided and max(map(part._tokens, range(part._n_rows))) >= auto_bits.FEWEST:
                part._decide()
                decided.append(part)
        joined = cls._empty(parts[0], [pad for p in parts for pad in p._pad])
        if decided:
            best = max(decided, key=lambda p: _precision(p._sides[0].bits))
            joined._decided(best._sides[0].bits, dict(best._errors), best._by)
        else:
            joined._observed = [seen for p in parts for seen in p._observed]
            joined._observed_with = next((p._observed_with for p in parts if p._observed_with), None)
        for name in "_n_packed", "_n_recent", "_n_forgotten":
            setattr(joined, name, [n for p in parts for n in getattr(p, name)])
        joined._n_columns = max(joined._n_recent)
        if any(p._until is not None for p in parts):
            raise ValueError("caches: one is in the middle of a right-padded prompt, which must be finalized first")
        filled = [p for p in parts if p._sides[0].recent is not None]
        if filled:
            for part in filled:
                part._raise_keys(joined._sides[0].bits)
            joined._centred = tuple([yes for p in parts for yes in p._centred[i]] for i in (0, 1))
            for i, side in enumerate(joined._sides):
                joined._join_side(side, [p._sides[i] for p in parts], parts)
            joined._cover_means()
            joined._evaluate()
        joined._set_offset()
        return joined

    def _join_side(self, side, sides, parts):
        like = next(s for s in sides if s.recent is not None).recent
        for s in sides:
            if s.recent is not None and (
                s.recent.dtype != like.dtype or s.recent.shape[1] != like.shape[1] or s.recent.shape[3] != like.shape[3]
            ):
                raise ValueError(
                    f"caches: got tokens {s.recent.dtype} {(*like.shape[:1], *s.recent.shape[1:])} and "
                    f"{like.dtype} {tuple(like.shape)}, allowed are equal kv heads, head_dim and dtype"
                )
        n_packed = max(self._n_packed)
        sizes = dict(
            sink=(self._sinks(n_packed), 1),
            codes=(n_packed, self.step),
            scale=(n_packed, self.step),
            means=(-(-n_packed // side.segment), 1),
            recent=(self._n_columns, self._room()),
        )
        for name, (n, step) in sizes.items():
            of_parts = [getattr(s, name) for s in sides]
            some = like if name == "recent" else next((a for a in of_parts if a is not None), None)
            if some is None or not n and name != "recent":
                continue
            pieces = []
            for a, part in zip(of_parts, parts):
                held = part._held(name, side.segment)
                if a is None or not held:
                    pieces.append(mx.zeros((part._n_rows, some.shape[1], n, some.shape[3]), some.dtype))
                    continue
                start = part._n_columns - min(held, n) if name == "recent" else 0
                a = a[:, :, start : start + min(held, n)]
                pad = (n - a.shape[2], 0) if name == "recent" else (0, n - a.shape[2])
                pieces.append(mx.pad(a, [(0, 0), (0, 0), pad, (0, 0)]) if any(pad) else a)
            setattr(side, name, _write(None, 0, mx.concatenate(pieces), step))

    def _held(self, name, segment):
        """Tokens, or means, of the longest row in a buffer."""
        n_packed = max(self._n_packed)
        return {"sink": self._sinks(n_packed), "means": -(-n_packed // segment), "recent": max(self._n_recent)}.get(
            name, n_packed
        )

    def extend(self, other):
        """Append the rows of another batch cache, which stays as it is. Raises as `merge`, with this one unchanged."""
        joined = self._join([self._shallow(), other._shallow()])
        version = self.version + 1
        self.__dict__.update(joined.__dict__)
        self.version = version

    def _shallow(self):
        """A cache of the same arrays that can get other ones without this one noticing."""
        twin = self._empty(self)
        twin.__dict__.update(self.__dict__)
        twin._unread, twin._sides = _Unread(), _make_sides(self.config)
        for mine, side in zip(twin._sides, self._sides):
            mine.__dict__.update(side.__dict__)
        return twin

    def filter(self, batch_indices):
        """Keep the rows batch_indices (a list or array of row numbers), in that order.

        Raises IndexError for a row that is not there, and ValueError for none, with the cache unchanged.
        """
        every = list(range(self._n_rows))
        rows = [every[i] for i in (batch_indices.tolist() if isinstance(batch_indices, mx.array) else batch_indices)]
        if not rows:
            raise ValueError(f"batch_indices: got none, allowed is at least one of the rows 0 to {self._n_rows - 1}")
        self._unread.forget()
        pick = lambda values: [values[b] for b in rows]  # noqa: E731
        for name in "_pad", "_n_packed", "_n_recent", "_n_forgotten":
            setattr(self, name, pick(getattr(self, name)))
        self._until = None if self._until is None else pick(self._until)
        self._observed, self._last = pick(self._observed), pick(self._last) if self._last else []
        self._centred = tuple(map(pick, self._centred))
        start, n_packed = self._n_columns - max(self._n_recent, default=0), max(self._n_packed, default=0)
        index, self._n_columns = mx.array(rows), self._n_columns - start
        for side in self._sides:
            if side.recent is None:
                continue
            side.recent = _write(None, 0, side.recent[:, :, start : start + self._n_columns][index], self._room())
            sizes = dict(sink=self._sinks(n_packed), codes=n_packed, scale=n_packed, means=-(-n_packed // side.segment))
            for name, n in sizes.items():
                a = getattr(side, name)
                if a is not None:
                    n = min(-(-n // self.step) * self.step, a.shape[2]) if name in ("codes", "scale") else n
                    setattr(side, name, mx.contiguous(a[:, :, :n][index]) if n else None)
        self._cover_means()
        self._changed()
        if self._sides[0].recent is not None:
            self._evaluate()

    def extract(self, idx):
        """Row idx as a cache of its own."""
        b = list(range(self._n_rows))[idx]
        cache = self._alone()
        cache.undecided, cache._errors, cache._by = self.undecided, dict(self._errors), self._by
        cache._sides[0].bits = self._sides[0].bits
        if not self._tokens(b):
            return cache
        cache.n_sink, cache.n_packed, cache.n_recent = self._counts()[b]
        cache._observed, end = self._observed_of(b), self._n_columns
        for side, mine, centred in zip(self._sides, cache._sides, self._centred):
            exact = side.recent[b : b + 1, :, end - self._n_recent[b] : end]
            if cache.n_sink:
                sinks = side.sink[b : b + 1] if cache.n_packed else exact[:, :, : cache.n_sink]
                mine.sink = _write(None, 0, sinks, self.config.sink)
            mine.recent = _write(
                None, 0, exact[:, :, self._n_recent[b] - cache.n_recent :], self.config.recent + self.config.block
            )
            if cache.n_packed:
                mine.codes = _write(None, 0, side.codes[b : b + 1, :, : cache.n_packed], self.step)
                if side.scale is not None:
                    mine.scale = _write(None, 0, side.scale[b : b + 1, :, : cache.n_packed], self.step)
                if centred[b]:
                    n = -(-cache.n_packed // side.segment)
                    mine.means = _write(None, 0, side.means[b : b + 1, :, :n], max(self.step // side.segment, 1))
        cache._evaluate()
        return cache

    def trim(self, n):
        """Forget the newest n tokens of each row, or all of a row that has fewer; returns how many the longest row
        forgot."""
        trimmed = n = min(max(int(n), 0), max(map(self._tokens, range(self._n_rows))))
        self._unread.forget()
        left, to_recent = [], {}
        for b in range(self._n_rows):
            keep = max(self._tokens(b) - n, 0)
            sinks = self._sinks(self._n_packed[b])
            if self._n_packed[b] and keep <= sinks:  # only sinks are left: a row that has not packed
                left.append((0, keep))
                to_recent[b] = keep
            else:
                packed = min(self._n_packed[b], keep - sinks) if self._n_packed[b] else 0
                left.append((packed, keep - packed - (sinks if packed else 0)))
        end = max(self._n_columns - n, 0)
        columns = max([end, *to_recent.values()])
        if columns and to_recent:
            for side in self._sides:
                recent = mx.pad(side.recent[:, :, :end], [(0, 0), (0, 0), (columns - end, 0), (0, 0)])
                for b, keep in to_recent.items():
                    if keep:
                        recent[b : b + 1, :, columns - keep :] = side.sink[b : b + 1, :, :keep]
                side.recent = _write(None, 0, recent, self._room())
        self._n_columns = columns
        self._n_packed, self._n_recent = map(list, zip(*left))
        for b, packed in enumerate(self._n_packed):
            for centred in self._centred:
                centred[b] = centred[b] and packed > 0
        if self._sides[0].recent is not None:
            self._cover_means()
        self._last = []
        if self.empty():
            self._clear()
        self._changed()
        return trimmed

    def size(self):
        """Tokens of the longest row."""
        return max(map(self._tokens, range(self._n_rows)))

    def empty(self):
        return self.size() == 0

    def to_kv_cache(self):
        """A plain mlx_lm BatchKVCache with the same tokens, packed ones restored in the model's dtype.

        Raises ValueError in the middle of a padded prompt.
        """
        from mlx_lm.models.cache import BatchKVCache

        return self._plain(BatchKVCache, self._pad)

    def _plain(self, kind, *empty):
        """mlx-lm's batch cache of a kind; empty: what it is made of where no row has tokens."""
        if self.empty():
            return kind(*empty)
        if any(self._pad) or self._until is not None:
            raise ValueError("to_kv_cache: padding of the prompt is still to come")
        return kind.merge([self.extract(b).to_kv_cache() for b in range(self._n_rows)])

    # ---- state -----------------------------------------------------------------------------------------------
    def _row_counts(self):
        """What `row_names` names, each a list of the rows'."""
        return self._n_packed, self._n_recent, self._pad, self._until or [-1] * self._n_rows, *self._centred

    @property
    def state(self):
        """Everything as a list of arrays: an int32 header, int32 [B, names] with what `row_names` names of each row,
        then per side sink, codes, scale, means and recent, cut to the columns they have; parts without columns are left
        out."""
        columns = (*self._columns(self._n_packed), self._n_columns)
        rows = mx.array([*zip(*self._row_counts())], mx.int32)
        return [mx.array(self._header(columns), mx.int32), rows, *self._arrays(columns)]

    @state.setter
    def state(self, arrays):
        header = _read_header(arrays[0] if arrays else None, self)
        config, key_bits = _read_config(header)
        own = self._own_state(header, config)
        rows = arrays[1] if len(arrays) > 1 else None
        names = self.row_names
        if not isinstance(rows, mx.array) or rows.dtype != mx.int32 or rows.ndim != 2 or rows.shape[1] != len(names):
            raise ValueError(f"state: the second array is not int32 [B, {len(names)}], the counts of the rows")
        n_packed, n_recent, pad, until, *centred = map(list, zip(*rows.tolist()))
        n_forgotten = centred.pop() if len(centred) > 2 else [0] * len(pad)
        sides, rest = _make_sides(config, None if key_bits < 0 else key_bits), iter(arrays[2:])
        columns = header["n_sink"], header["n_packed"], header["n_recent"]
        sink = config.sink if max(n_packed) else 0
        if (
            min(n_packed + n_recent + pad + n_forgotten) < 0
            or min(until) < -1
            or -1 in until
            and max(until) >= 0
            or (sink, max(n_packed)) != columns[:2]
            or max(n_recent) > columns[2]
            or (key_bits < 0 and max(n_packed))
            or any(
                gone and (config.sink if packed else 0) + packed + recent < own["max_size"] - 1
                for gone, packed, recent in zip(n_forgotten, n_packed, n_recent)
            )
        ):
            raise ValueError(f"state: the header names {columns} columns, the rows {rows.tolist()}, with {config}")
        try:
            for side, name in zip(sides, ("key", "value")):
                _restore(side, rest, columns, header, name, config)
        except StopIteration:
            raise ValueError("state: arrays are missing") from None
        if next(rest, None) is not None:
            raise ValueError("state: more arrays than the header says")
        if sum(columns) and (
            sides[0].recent.shape[:2] != sides[1].recent.shape[:2] or sides[0].recent.shape[0] != len(pad)
        ):
            raise ValueError("state: keys, values and rows have different batch sizes or numbers of kv heads")
        vars(self).update(own)
        BatchTurboKVCache.__init__(self, config, pad)
        self._sides, self.undecided = sides, key_bits < 0
        self._n_packed, self._n_recent, self._n_forgotten = n_packed, n_recent, n_forgotten
        self._n_columns, self._until = columns[2], None if -1 in until else until
        self._centred = tuple([bool(x) for x in c] for c in centred)
        self._set_offset()
        self._evaluate()
