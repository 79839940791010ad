"""BatchTurboKVCache: the rows of a batch, of different lengths, in the buffers of one cache.

Every row stays what it would be in a TurboKVCache of its own: it packs the same tokens at the same moment, so its codes
are the same to the bit. (What a GPU restores from them may differ in the last bit of float32: where another row has
means, another variant of the kernel runs.) The tokens of all rows come back as common columns

    [ sink ] [ packed: n of the longest row ] [ recent, the newest last ]

in which a row with fewer tokens has empty ones: after its packed tokens and before its recent ones. `make_mask` masks
them, and padding on either side, which is dropped once the chunk it came with has been attended to.

A row has sink tokens and packed tokens, or neither: until it packs for the first time, all its tokens are recent ones.
Where nothing is packed (single.py), all columns lie in one buffer: tokens move there only where rows differ in length.
"""

import copy
from typing import Any, Iterable, Optional, Sequence, Union

import mlx.core as mx
import numpy as np

from ..backends.sides import Balance, first_tokens
from ..quant.scheme import Scheme, TurboConfig
from . import auto_bits, balancing
from .attention_error import join, newest, sample_queries, still_held
from .batch_plan import Plan
from .history import NAMES
from .joined import Joined
from .memory_budget import Room, Shape
from .packing import (
    Begun,
    PackJob,
    begin,
    grow,
    may_choose_bits,
    n_segments,
    pack,
    quantize_tokens,
    take_ending_at,
    take_rows,
    write,
    write_rows,
)
from .repacking import ExactRows, pack_exact
from .single import TurboKVCache
from .state import BATCH_MAGIC, ROW_NAMES, read_state


def _precision(bits):
    return bits or 16


class BatchTurboKVCache(TurboKVCache):
    """A KV cache of one layer for several sequences, in place of mlx_lm.models.cache.BatchKVCache.

    config: as for TurboKVCache. left_padding: number of padding tokens at the left of each row's next tokens; its
    length is the batch size. `merge` makes a batch from the caches of its rows, `extract` takes a row out again.

    Raises ValueError for an unknown scheme or option.
    """

    magic = BATCH_MAGIC
    row_names: tuple[str, ...] = ROW_NAMES
    row_class: type[TurboKVCache] = TurboKVCache
    never_quantized = "batch"

    def __init__(
        self,
        config: Union[str, Scheme, TurboConfig] = "turbo4",
        left_padding: Sequence[int] = (0,),
        **options: Any,
    ) -> None:
        self._pad = [int(n) for n in left_padding]
        super().__init__(config, **options)

    def _clear_counts(self):
        B = len(self._pad)
        self._n_packed, self._n_recent, self._n_evicted = [0] * B, [0] * B, [0] * B
        for side in self._sides:
            side.centered = [False] * B
        # auto chooses at the next update, when the rows pack too, by (version, what was measured then of each row that
        # counts, `Begun` of rows by side)
        self._measured = None
        self._begun = {}  # of rows that pack because auto has chosen: `Begun` by side
        self._balanced = [False] * B  # whether the channels of its keys are
        self._n_before_right_padding = None  # per row, if the prompt is padded on the right
        self._n_columns = 0  # of the recent tokens
        self.shown = None  # the plan of the last update, if that returned other columns than it left
        self._n_free = 0  # number of tokens that every row can take while nothing else happens
        self._observed, self._observed_with, self._last = [[] for _ in range(B)], None, []
        self._no_queries = [False] * B
        self._to_pack = []  # as of TurboKVCache, of each row
        self._set_offset()

    @classmethod
    def _empty(cls, like, left_padding=(0,)):
        """A batch without tokens, configured as a cache of this class or of a row."""
        return cls(like.config, left_padding)

    def _empty_row(self):
        """A cache for a row, without tokens."""
        return self.row_class(self.config)

    @property
    def _has_packed(self):
        return any(self._n_packed)

    # ---- rows ------------------------------------------------------------------------------------------------
    def _sinks(self, n_packed):
        return self.config.sink if n_packed else 0

    def n_tokens(self, b: int) -> int:
        """Number of tokens that are held of row b, padding not counted."""
        return self._sinks(self._n_packed[b]) + self._n_packed[b] + self._n_recent[b]

    @property
    def n_rows(self) -> int:
        return len(self._pad)

    @property
    def padding_to_come(self) -> list[int]:
        """For each row, how many of the next tokens are left padding."""
        return list(self._pad)

    @property
    def is_mid_prompt(self) -> bool:
        """Whether padding of the prompt is still to come."""
        return any(self._pad) or self._n_before_right_padding is not None

    @property  # type: ignore[override]
    def offset(self) -> mx.array:  # mlx-lm's contract: an int of one sequence, an array of a batch
        """Tokens of each row so far, int32 [B]: negative as long as left padding is to come. Setting it raises
        ValueError."""
        return self._offsets

    @offset.setter
    def offset(self, n: Any) -> None:
        raise ValueError("offset: of a batch it cannot be set; trim(n) drops the newest n tokens of each row")

    def _set_offset(self):
        sink = self.config.sink
        self._offsets = mx.array(
            [
                (sink + n_packed if n_packed else 0) + n_recent + n_evicted - pad
                for n_packed, n_recent, n_evicted, pad in zip(
                    self._n_packed, self._n_recent, self._n_evicted, self._pad
                )
            ],
            mx.int32,
        )

    def _changed(self):
        self.version += 1
        self._n_free, self.shown = 0, None
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
        columns = self._buffer_counts()
        ends = [
            (self._sinks(n_packed) + n_packed, sum(columns) - n_recent)
            for n_packed, n_recent in zip(self._n_packed, self._n_recent)
        ]
        return columns, [np.r_[:front, back : sum(columns)] for front, back in ends]

    # ---- update ----------------------------------------------------------------------------------------------
    def plan(self, n_new: int) -> Plan:
        """What an update with n_new tokens, padding included, will do."""
        config = self.config
        capacity = config.recent + config.block
        spans = [self._span(b, n_new) for b in range(self.n_rows)]
        exact = []  # per row: recent tokens, and the new ones that come beside them
        for (n_sink, _, n_recent), (_, n) in zip(self._counts(), spans):
            exact.append((n_recent, max(n - (config.sink - n_sink), 0)))
        decide = self._undecided and any(
            n > self._capacity() or (n + new > self._capacity() and new <= config.block) for n, new in exact
        )
        n_evict = [self._n_to_evict(b) if n else 0 for b, (_, n) in enumerate(spans)]
        before, after = [0] * self.n_rows, [0] * self.n_rows
        for b, (n, new) in enumerate(exact):
            if self._undecided and not decide or not spans[b][1]:
                continue
            waited = decide and n > capacity  # for auto
            if n + new > capacity and new <= config.block and not self._n_packed[b] and not waited:
                after[b] = n - config.recent  # the first ones: attended exactly once more
                continue
            if n + new > capacity and (new <= config.block or waited):
                before[b] = n - config.recent
                n = config.recent
            if n + new > capacity:
                after[b] = n + new - config.recent
        n_packed = [n - fewer + more for n, fewer, more in zip(self._n_packed, n_evict, before)]
        n_recent = [
            recent - more - (config.sink if more and not packed else 0)
            for recent, more, packed in zip(self._n_recent, before, self._n_packed)
        ]
        columns = *self._columns(n_packed), self._compacted(n_recent)
        return Plan(n_new, decide, spans, n_evict, before, after, n_packed, n_recent, columns)

    def _span(self, b, n_new):
        """(first, n): which of n_new tokens of row b are not padding."""
        first = min(self._pad[b], n_new)
        if self._n_before_right_padding is not None:
            return first, max(min(n_new, self._n_before_right_padding[b]) - first, 0)
        return first, n_new - first

    def _n_to_evict(self, b):
        """How many of its oldest packed tokens row b evicts when the next one comes."""
        return 0

    def _evict_rows(self, n_oldest):
        raise NotImplementedError  # only windows evict

    def _compacted(self, n_recent):
        """Columns of the recent tokens once those that are empty in all rows are cut off, which waits until it is worth
        a copy."""
        most = max(n_recent, default=0)
        return most if 4 * (self._n_columns - most) >= self.config.block else self._n_columns

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys [B, n_kv_heads, L, Dk] and values [B, n_kv_heads, L, Dv], padding included, and return the tokens
        of all rows in the columns that `make_mask(L)` is for, the new ones exactly as given.

        Raises as TurboKVCache.update_and_fetch, and ValueError for another batch size than this cache has.
        """
        self._check(keys, values)
        if keys.shape[0] != self.n_rows:
            raise ValueError(f"keys: batch size {keys.shape[0]}, but this cache has {self.n_rows} rows")
        new, n_new = (keys, values), keys.shape[2]
        if n_new == 0:
            return self.keys_and_values() if self._n_columns or any(self._n_packed) else new
        self.settle()
        if self.share is not None:
            self.share.before_update(self, keys, values)
        if n_new <= self._n_free:
            return self._append(new, n_new)
        plan = self.plan(n_new)
        if plan.decide_bits:
            self._decide()
        if any(plan.n_evict):
            self._evict_rows(plan.n_evict)
        self._pack_recent(plan.pack_before, plan.columns[2])
        R, first = plan.columns[2], not any(plan.columns)
        if (
            not first
            and self._n_before_right_padding is None
            and not any(plan.pack_after)
            and all(s == (0, n_new) for s in plan.spans)
        ):
            fetched = self._append(new, n_new)
            self._n_free = 0 if self._undecided else self._free()
            return fetched
        n = sum(plan.columns) if self._sides[0].in_one else R
        if self._sides[0].in_one and self._in_step(plan):
            tails = self._append_columns(new, plan)
        else:
            tails = [
                mx.concatenate([first_tokens(side.recent, n), x], axis=2) if n else x
                for side, x in zip(self._sides, new)
            ]
            self._take_over(tails, plan, R)
        self._pad = [pad - min(pad, n_new) for pad in self._pad]
        if self._n_before_right_padding is not None:
            self._n_before_right_padding = [max(n - n_new, 0) for n in self._n_before_right_padding]
        self._last = plan.spans
        self._updated()
        self._changed()
        self.shown = plan
        self._evaluate()
        if first and not self._may_balance and not self._undecided and not self._keeps_queries:
            return new
        return self._fetch((*plan.columns[:2], R + n_new), tails, new if first else None)

    def _free(self):
        return self.config.recent + self.config.block - max(n_recent for *_, n_recent in self._counts())

    def _append(self, new, n_new):
        """Append new tokens that are recent ones in all rows, without padding."""
        at, end = self._n_columns, sum(self._buffer_counts())
        self._n_recent = [n + n_new for n in self._n_recent]
        self._n_columns += n_new
        for side, x in zip(self._sides, new):
            if side.in_one:
                self.write_in_one(side, end, x)
            else:
                side.recent = write(side.recent, at, x, self._room())
        self._n_free -= n_new
        self._last = [(0, n_new)] * self.n_rows
        self.version += 1
        self._updated()
        self.shown = None
        self._set_offset()
        return self._fetch(self._buffer_counts())

    def _buffer_counts(self):
        return *self._columns(self._n_packed), self._n_columns

    def _ends(self):
        return self._sinks(self.packed_columns) + max(-(-self._n_columns // self._room()), 1) * self._room()

    def _room(self):
        config = self.config
        return config.sink + config.recent + config.block + -(-config.block // 4)

    def _take_over(self, tails, plan, n_before):
        """Pack what `plan` says of `tails` (recent columns and the new chunk, per side), and keep the rest."""
        ends = [n_before + first + n for first, n in plan.spans]
        n_exact = [had + n for had, (_, n) in zip(self._n_recent, plan.spans)]
        if self._sides[0].in_one:
            self._count_packed(plan.pack_after, n_exact)
            self._gather(tails, list(map(plan.token_columns, range(self.n_rows))))
            return
        waits = self._may_balance and not self._are_latents(*tails)
        to_pack = [
            n if waits and not had and not given_up else 0
            for n, had, given_up in zip(plan.pack_after, self._n_packed, self._no_queries)
        ]
        self._to_pack = to_pack if any(to_pack) else []
        self._pack_rows([n - later for n, later in zip(plan.pack_after, to_pack)], tails, ends, n_exact)
        self._n_columns = max(self._n_recent)
        for side, tail in zip(self._sides, tails):
            side.recent = write(None, 0, take_ending_at(tail, ends, self._n_columns), self._room())

    def _cut_recent(self, n):
        if n < self._n_columns:
            for side in self._sides:
                side.recent = write(None, 0, side.recent[:, :, self._n_columns - n : self._n_columns], self._room())
            self._n_columns = n

    # ---- exact tokens in one buffer --------------------------------------------------------------------------
    def _in_step(self, plan):
        """Whether the tokens of the rows lie in the same columns, before an update and after it."""
        rows = zip(plan.n_packed, plan.n_recent, plan.spans, plan.pack_after)
        return len(set(rows)) == 1 and plan.spans[0] == (0, plan.n_new) and plan.n_recent[0] == plan.columns[2]

    def _append_columns(self, new, plan):
        """Append a chunk of rows that are in step. Returns the columns of all tokens."""
        at = sum(plan.columns)
        self._count_packed(plan.pack_after, [n + plan.n_new for n in self._n_recent])
        self._n_columns = self._n_recent[0]
        for side, x in zip(self._sides, new):
            self.write_in_one(side, at, x)
        return [first_tokens(side.recent, at + plan.n_new) for side in self._sides]

    def _count_packed(self, n_pack, n_exact):
        """Say that n_pack[b] tokens of each row b are packed, of the n_exact[b] that are not: the oldest, sink tokens
        apart."""
        sinks = [self._n_new_sinks(had) if n else 0 for n, had in zip(n_pack, self._n_packed)]
        self._n_recent = [n - more - sink for n, more, sink in zip(n_exact, n_pack, sinks)]
        self._n_packed = [had + more for had, more in zip(self._n_packed, n_pack)]

    def _gather(self, tokens, columns):
        """Make the buffers anew of `tokens`, keys and values [B, H, n, D]. columns: of each row, where its tokens lie
        there, in order; the counts say where they belong."""
        self._n_columns = max(self._n_recent)
        front, n = sum(self._columns(self._n_packed)), sum(self._buffer_counts())
        index = np.zeros((self.n_rows, max(n, 1)), np.int32)
        for b, (row, n_recent) in enumerate(zip(columns, self._n_recent)):
            n_before = len(row) - n_recent
            assert n_before <= front
            index[b, :n_before], index[b, n - n_recent : n] = row[:n_before], row[n_before:]
        at = mx.array(index)[:, None, :, None]
        for side, x in zip(self._sides, tokens):
            side.recent = None
            self.write_in_one(side, 0, mx.take_along_axis(x, at, axis=2)[:, :, :n])

    def _move(self, n_pack, n_columns):
        """Let n_pack[b] recent tokens of each row b follow its packed ones, and leave n_columns columns of recent ones:
        the tokens move that do not lie there already."""
        before, end = self._n_packed, sum(self._buffer_counts())
        sources = [end - n for n in self._n_recent]
        self._count_packed(n_pack, self._n_recent)
        self._n_columns = n_columns
        now = sum(self._buffer_counts())
        moves = []  # (row, from, to, number of tokens)
        for b, (n, had, source) in enumerate(zip(n_pack, before, sources)):
            at, n = (self.config.sink + had if had else 0), n and n + self._n_new_sinks(had)
            if n and at != source:
                moves.append((b, source, at, n))
        copies = []
        for side in self._sides:
            pieces = [mx.contiguous(side.recent[b : b + 1, :, at : at + n]) for b, at, _, n in moves]
            stays = now == end and side.ends == self._ends() and side.codes_capacity >= self.packed_columns
            copies.append((pieces, [] if stays else [mx.contiguous(side.recent[:, :, end - n_columns : end])]))
        mx.eval(copies)  # as long as something is still to be read, MLX does not write into the same buffer
        for side, (pieces, recent) in zip(self._sides, copies):
            for (b, _, at, n), piece in zip(moves, pieces):
                side.recent[b : b + 1, :, at : at + n] = piece
            for piece in recent:
                self.write_in_one(side, now - n_columns, piece)

    # ---- packing ---------------------------------------------------------------------------------------------
    def _pack_recent(self, n_pack, n_columns):
        """Pack n_pack[b] recent tokens of each row b, and leave n_columns columns of recent ones."""
        if self._sides[0].in_one:
            if any(n_pack) or n_columns < self._n_columns:
                self._move(n_pack, n_columns)
            return
        if any(n_pack):
            tails = [first_tokens(side.recent, self._n_columns) for side in self._sides]
            self._pack_rows(n_pack, tails, [self._n_columns] * self.n_rows, self._n_recent)
            self.settle()  # rows that waited for auto: attention finds them packed in this update
        self._begun = {}
        self._cut_recent(n_columns)

    def _pack_waiting(self):
        """As of TurboKVCache."""
        if self._to_pack:
            tails = [first_tokens(side.recent, self._n_columns) for side in self._sides]
            self._pack_rows(self._to_pack, tails, [self._n_columns] * self.n_rows, self._n_recent)
            self._to_pack = []
            self._cut_recent(max(self._n_recent))
            self._n_free = 0
            self._evaluate()

    def _pack_rows(self, n_pack, tails, ends, n_exact):
        """Quantize n_pack[b] tokens of each row b: the oldest, sink tokens apart, of the n_exact[b] that end before
        token ends[b] of `tails`. Rows in the same situation are quantized together. Raises before anything is
        changed."""
        self._unread.clear()
        groups = {}
        for b, n in enumerate(n_pack):
            if n:
                situation = n, n_exact[b], ends[b], self._n_packed[b], *(s.may_have_means(b) for s in self._sides)
                groups.setdefault(situation, []).append(b)
        jobs, exact_of, balanced = [], [], {}
        for (n, n_tail, end, n_packed, *centered), rows in groups.items():
            means = [take_rows(s.stored_means, rows) if c and n_packed else None for s, c in zip(self._sides, centered)]
            exact = [take_rows(tail, rows)[:, :, end - n_tail : end] for tail in tails]
            after_sink = [x[:, :, self._n_new_sinks(n_packed) :] for x in exact]
            sides = [side.to_pack(mean) for side, mean in zip(self._sides, means)]
            if n_packed:
                balance = self._balance_of(rows)
            else:
                keys = [exact[0][j : j + 1] for j in range(len(rows))]
                chooses = self._may_balance and not self._are_latents(*tails)
                balance, balanced[rows[0]] = self._choose_balance(rows, keys) if chooses else (None, [])
            sides[0] = sides[0]._replace(balance=balance)
            begun = None if n_packed or any(b not in self._begun for b in rows) else self._begun_of(rows)
            jobs.append(PackJob(sides, after_sink, n_packed, n, begun))
            exact_of.append(exact)
        packed = pack(jobs, self.config, self.step)
        self._n_recent = list(n_exact)
        for rows, job, exact, new in zip(groups.values(), jobs, exact_of, packed):
            sinks = self._n_new_sinks(job.n_packed)
            if not job.n_packed:
                self._set_balance(rows, job.sides[0].balance, balanced[rows[0]])
            for i, side in enumerate(self._sides):
                if sinks:
                    side.sink = write_rows(side.sink, self.n_rows, rows, 0, exact[i][:, :, :sinks], sinks)
                self._write_packed(i, rows, job.n_packed, job.n_pack, new[i])
            for b in rows:
                self._n_packed[b] += job.n_pack
                self._n_recent[b] -= job.n_pack + sinks
        self._cover_means()

    def _begun_of(self, rows):
        """What was decided beforehand of rows that pack together: of each side that has means."""
        of_sides = {i: Begun.of_rows([self._begun[b][i] for b in rows]) for i in self._begun[rows[0]]}
        return {i: begun for i, begun in of_sides.items() if begun.centers()}

    # ---- balance ---------------------------------------------------------------------------------------------
    @property
    def _may_balance(self):
        return self.config.balance and self._sides[0].bits > 0

    @property
    def _balances(self):
        return self.config.balance and not all(self._no_queries)

    @property
    def _begins_to_pack(self):
        to_come = (not n and not given_up for n, given_up in zip(self._n_packed, self._no_queries))
        return self._may_balance and any(to_come)

    def _balance_of(self, rows):
        """The balance of rows, or None if none of them has one."""
        balance = self._sides[0].balance
        if balance is None or rows == list(range(self.n_rows)):
            return balance
        return Balance(take_rows(balance.factors, rows)) if any(self._balanced[b] for b in rows) else None

    def _choose_balance(self, rows, keys, bits=None):
        """The balance of rows whose keys, each [1, H, n, D] from the first token on, are at hand, as far as it can be
        chosen, and those rows that it could be chosen for. bits: as of TurboKVCache._choose_balance."""
        chosen, keys = [], list(keys)
        for b, of_row in zip(rows, keys):
            observed, self._observed[b] = self._observed_of(b), []
            joined = join(*observed) if observed else None
            found = balancing.choose(of_row, self.config, bits or self._sides[0].bits, joined)
            chosen.append(None if found is None else found.factors)
        balanced = [b for b, factors in zip(rows, chosen) if factors is not None]
        if not balanced:
            return None, balanced
        ones = mx.ones((1, keys[0].shape[1], 1, keys[0].shape[3]))
        return Balance(mx.concatenate([ones if factors is None else factors for factors in chosen])), balanced

    def _set_balance(self, rows, balance, balanced=()):
        """The balance of `rows` is this one, chosen for those of `balanced`. None: their channels are as they are."""
        side = self._sides[0]
        for b in rows:
            self._balanced[b] = b in balanced
        if rows == list(range(self.n_rows)) or not any(self._balanced):
            side.balance = balance
        elif balance is not None or side.balance is not None:
            shape = self.n_rows, side.recent.shape[1], 1, side.head_dim
            factors = mx.ones(shape) if side.balance is None else side.balance.factors[:]
            factors[mx.array(rows)] = mx.ones((1,)) if balance is None else balance.factors
            side.balance = Balance(factors)

    def _n_new_sinks(self, n_packed):
        """Tokens that become sink tokens when a row with n_packed packed tokens packs."""
        return 0 if n_packed else self.config.sink

    def _write_packed(self, i, rows, at, n, new):
        """Write the `PackedTokens` of keys (i = 0) or values (1) to `rows`, as packed tokens at .. at + n - 1."""
        side = self._sides[i]
        side.codes = write_rows(side.codes, self.n_rows, rows, at, new.codes, self.step)
        if new.scale is not None:
            side.scale = write_rows(side.scale, self.n_rows, rows, at, new.scale, self.step)
        self._write_means(i, rows, at, n, new.means, new.begun)

    def _write_means(self, i, rows, at, n, means, begun):
        """The same of the means, or None. begun: what was decided of the rows, if they begin to pack."""
        side = self._sides[i]
        if not at:
            side.begin(rows, begun)
            for b in rows if side.stored_means is not None else ():
                side.stored_means[b] = 0  # of what the row held before a trim
        if means is not None:
            means, step = means[:, :, : n_segments(at + n, side.segment)], max(self.step // side.segment, 1)
            side.stored_means = write_rows(side.stored_means, self.n_rows, rows, 0, means, step)

    def _cover_means(self):
        """Make the means cover all segments: those of rows that are not centered are read too."""
        for side in self._sides:
            n, means = n_segments(max(self._n_packed), side.segment), side.stored_means
            if not any(map(side.may_have_means, range(self.n_rows))):
                side.stored_means = None
            elif means.shape[2] < n:
                side.stored_means = grow(means, (*means.shape[:2], n, means.shape[3]), means.dtype)

    # ---- fewer bits ------------------------------------------------------------------------------------------
    def _pack_exact(self, i, bits):
        side, config, packed = self._sides[i], self._config_of_keys(), [b for b, n in enumerate(self._n_packed) if n]
        alike = len(set(zip(self._n_packed, self._n_recent))) == 1
        groups, changes = [], []
        for rows in [packed] if alike else [[b] for b in packed]:  # a row, or all rows, without a copy of their tokens
            tail = self._exact_tail(side, rows)
            balance, balanced = (None, []) if i else self._choose_balance(rows, map(self._exact_row, rows), bits)
            groups.append(ExactRows(rows, tail, self._n_packed[rows[0]], balance))
            changes.append((rows, balance, balanced))
        decided = pack_exact(side, bits, groups, config, self.step, self._codes_capacity(side))
        for (rows, balance, balanced), group, (means, begun) in zip(changes, groups, decided):
            if i == 0:
                self._set_balance(rows, balance, balanced)
            self._write_means(i, rows, 0, group.n_packed, means, begun)
        self._cover_means()
        side.settle()

    def _exact_tail(self, side, rows):
        """The tokens after the sink of rows that hold as many, of a side that is exact."""
        n_packed, n_recent, end = self._n_packed[rows[0]], self._n_recent[rows[0]], self._n_columns
        side = side.apart(*self._buffer_counts())
        packed, recent = (take_rows(a, rows) for a in (side.codes, side.recent))
        return Joined([packed[:, :, :n_packed], recent[:, :, end - n_recent : end]])

    def _exact_row(self, b):
        """The keys of a row from its first token on."""
        side, parts = self._sides[0], self._sides[0].apart(*self._buffer_counts())
        sink = [parts.sink[b : b + 1, :, : self.config.sink]] if self.config.sink else []
        return Joined([*sink, *self._exact_tail(side, [b]).parts])

    # ---- auto ------------------------------------------------------------------------------------------------
    def observe(self, queries: mx.array, scale: float, sinks: Optional[mx.array] = None) -> None:
        """As TurboKVCache.observe. `auto` uses the queries at the next update, so that all layers pack at once."""
        if not self.wants_queries:
            return
        self._observed_with = scale, sinks
        rows = [b for b, (_, n) in enumerate(self._last) if n and self._wants_queries_of(b, n)]
        for b in rows:
            first, n = self._last[b]
            sample = sample_queries(n)
            positions = [self.n_tokens(b) - n + i for i in sample]
            seen = queries, b, positions
            # the queries of one token are evaluated with the step, and kept as they are unless only some rows keep them
            if queries.shape[2] > 1 or self._keeps_queries and len(rows) < self.n_rows:
                of_row = queries[b : b + 1, :, first + sample.start : first + sample.stop : sample.step]
                seen = mx.contiguous(of_row), 0, positions
                mx.async_eval(seen[0])
            self._observed[b] = newest([*self._observed[b], seen])
        if self._to_pack:
            self._pack_waiting()
        elif self._undecided and any(n_recent > self._capacity() for *_, n_recent in self._counts()):
            self._measure()

    def _wants_queries_of(self, b, n):
        """Whether the queries of row b, of its n newest tokens, are to be kept."""
        if self._no_queries[b] or self._n_packed[b] and not self._keeps_queries:
            return False
        position = self.n_tokens(b) + self._n_evicted[b] - 1
        return n > 1 or not self._keeps_queries or self._keeps_query_of(position)

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
        by_id = {id(q): q for seen in self._observed for q, *_ in seen}  # rows share those of a decode step
        return list(by_id.values())

    def _measure(self):
        """Start to compute what the bits of the keys are chosen by at the next update, if the cache is as it is until
        then; rows with too few tokens to tell do not count."""
        tokens = [self.n_tokens(b) for b in range(self.n_rows)]
        asked = [b for b, n in enumerate(tokens) if n >= min(auto_bits.FEWEST, max(tokens))]
        measured, begun = [], {}
        for b in asked:
            keys = self._sides[0].recent[b : b + 1, :, self._n_columns - tokens[b] : self._n_columns]
            observed = self._observed_of(b)
            joined = join(*observed) if observed else None
            found = balancing.choose(keys, self.config, auto_bits.LADDER[0], joined)
            measured.append(auto_bits.measure(keys, self._config_of_keys(), joined, found))
        for b, (n_sink, _, n) in enumerate(self._counts()):
            n_pack = n - self.config.recent
            if n_pack > self.config.block:
                tails = [side.recent[b : b + 1, :, self._n_columns - n : self._n_columns] for side in self._sides]
                sides = [side.to_pack(None) for side in self._sides]
                begun[b] = begin(PackJob(sides, tails, 0, n_pack), self.config)
        mx.async_eval([of_row.errors for of_row in measured], [list(new.values()) for new in begun.values()])
        self._measured = self.version, measured, begun

    def _decide(self):
        """Choose the bits of the keys that the most demanding row needs."""
        if self._measured is None or self._measured[0] != self.version:
            self._measure()
        _, measured, self._begun = self._measured
        choices = [auto_bits.choose_key_bits(of_row) for of_row in measured]
        bits, errors, by = max(choices, key=lambda choice: _precision(choice[0]))
        self._decided(bits, errors, by)

    def _decided(self, bits, errors, by):
        self._sides[0].bits, self._errors, self._by = bits, errors, by
        self._undecided, self._measured = False, None
        self._arrange()
        if not self._may_balance and not self._keeps_queries:
            self._observed = [[] for _ in range(self.n_rows)]

    def _raise_keys(self, bits):
        """Bring packed keys to more bits, or to exact ones: restored and quantized again about the same means."""
        side = self._sides[0]
        if side.bits == bits:
            return
        n = max(self._n_packed)
        if n:
            means, keys = side.means, self._view((0, n, 0)).restore()[0]
            side.bits = bits
            if bits:
                ((codes, scale),) = quantize_tokens([keys], [side.to_pack(means)], [means], 0, self.config)
                side.scale = write(None, 0, scale, self.step)
            else:
                codes, side.scale, side.means, side.balance = keys, None, None, None
                self._balanced = [False] * self.n_rows
                side.centered = [False] * self.n_rows
            side.codes = write(None, 0, codes, self.step)
        side.bits = bits

    # ---- memory budget ---------------------------------------------------------------------------------------
    @property
    def packed_columns(self) -> int:
        """As of TurboKVCache."""
        return max(self._n_packed, default=0)

    @property
    def all_packed(self) -> bool:
        """As of TurboKVCache."""
        return all(self._n_packed)

    def step_key(self) -> Any:
        """As TurboKVCache.step_key."""
        return tuple(map(self.n_tokens, range(self.n_rows))), tuple(self._n_evicted), tuple(self._pad)

    def will_grow(self, n_new: int) -> bool:
        """As TurboKVCache.will_grow."""
        recent = self._sides[0].recent
        if recent is None:
            return True
        if n_new <= self._n_free:
            held = sum(self._buffer_counts()) if self._sides[0].in_one else self._n_columns
            return held + n_new > recent.shape[2]
        room = self.room_after(n_new)
        if self._sides[0].in_one:
            return room.sink + room.recent > self._sides[0].ends or room.n_packed > self._sides[0].codes_capacity
        if room.recent > recent.shape[2] or room.sink and self._sides[0].sink is None and self.config.sink:
            return True
        return any(side.codes is None or room.n_packed > side.codes.shape[2] for side in self._sides if room.n_packed)

    def room_after(self, n_new: int) -> Room:
        """As TurboKVCache.room_after; never less than there will be."""
        plan, step = self.plan(n_new), self._room()
        of_rows = [n + more for n, more in zip(plan.n_packed, plan.pack_after)]
        n_packed = max(of_rows)
        columns = plan.columns[2] + n_new
        if any(plan.pack_after) or any(span != (0, n_new) for span in plan.spans) or not any(plan.columns):
            columns = max(
                recent + n - more - (self.config.sink if more and not packed else 0)
                for recent, (_, n), more, packed in zip(plan.n_recent, plan.spans, plan.pack_after, plan.n_packed)
            )
        return Room(self._sinks(n_packed), max(-(-columns // step), 1) * step, n_packed, None, all(of_rows))

    def give_up_queries(self) -> None:
        """As TurboKVCache.give_up_queries, of all rows that there are now."""
        self._observed = [[] for _ in range(self.n_rows)]
        self._no_queries = [True] * self.n_rows

    def n_rows_with_queries(self, n_rows: int) -> int:
        """As TurboKVCache.n_rows_with_queries."""
        return self._no_queries.count(False)

    def next_growth(self, n_new: int) -> Optional[tuple[int, int]]:
        """None: what a batch needs is not looked for ahead."""
        return None

    # ---- fetch -----------------------------------------------------------------------------------------------
    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """The tokens of all rows, [B, n_kv_heads, columns, D] of keys and of values, packed ones dequantized lazily.
        After an update in its columns, so that layers without a cache of their own can attend with the same mask."""
        self.settle()
        if self._sides[0].recent is None:
            raise ValueError("the cache is empty: it does not know the shape of its keys and values yet")
        fetched = self._fetch(self._buffer_counts())
        if self.shown is None:
            return fetched
        now = self.plan(0)
        columns = np.zeros((self.n_rows, sum(self.shown.columns) + self.shown.n_new), np.int32)
        for b, row in enumerate(columns):
            row[self.shown.token_columns(b)] = now.token_columns(b)
        index = mx.array(columns)[:, None, :, None]
        keys, values = (mx.take_along_axis(x, index, axis=2) for x in fetched)
        return keys, values

    def make_mask(self, N: int, return_array: bool = False, window_size: Optional[int] = None) -> Optional[mx.array]:
        """The mask for the next N tokens: bool [B, 1, N, columns], True where a token is to be attended to.
        return_array is ignored: there may always be empty columns to mask. None only for one token of rows of equal
        length that hold latents: models with these read the RoPE keys to apply a mask."""
        if N == 1 and window_size is None and self.holds_latents:  # which wait for nothing
            plan = self.plan(1)
            if all(front >= back for front, back in map(plan.edges, range(self.n_rows))):
                return None
        return self.array_mask(N, window_size)

    def array_mask(self, N: int, window_size: Optional[int] = None) -> mx.array:
        """The mask for the next N tokens as `make_mask`, always an array."""
        mask, held, index, query = self._tokens_in_columns(N)
        return mask if window_size is None else mask & (held + query < index + window_size)

    def _tokens_in_columns(self, N):
        """For the next N tokens: a mask [B, 1, N, columns], where a query's row has a token that is not newer; how
        many tokens the row holds before [B, 1, 1, 1]; which of its tokens is in a column, from 0 on [B, 1, 1,
        columns], where it has one; the number of the query [N, 1]."""
        self._pack_waiting()
        plan = self.plan(N)
        n_sink, n_packed, _ = plan.columns
        base = sum(plan.columns)  # the column of the first new token
        held = [self.n_tokens(b) - plan.n_evict[b] - pad for b, pad in enumerate(self._pad)]
        rows = [(*plan.edges(b), held[b]) for b in range(self.n_rows)]
        front, back, held = (mx.array(numbers, mx.int32)[:, None, None, None] for numbers in zip(*rows))
        column, query = mx.arange(base + N), mx.arange(N)[:, None]
        mask = (column < front) | (column >= back)
        if N > 1:
            mask = mask & (column <= base + query)
        return mask, held, mx.where(column < n_sink + n_packed, column, held + column - base), query

    # ---- what mlx-lm's batches call it: see history.py --------------------------------------------------------
    def _history(self, i):
        """All tokens of the rows [B, n_kv_heads, tokens of the longest, D], right-aligned, zeros before them."""
        if self.is_mid_prompt:
            raise ValueError(f"{NAMES[i]}: padding of the prompt is still to come")
        if self.empty():
            return None
        self.settle()
        columns, rows = self._seen_columns()
        longest = max(map(len, rows))
        index = mx.array([[0] * (longest - len(row)) + row for row in rows])[:, None, :, None]
        held = mx.array([[False] * (longest - len(row)) + [True] * len(row) for row in rows])[:, None, :, None]
        tokens = mx.take_along_axis(self._view(columns).restore()[i], index, axis=2)
        return mx.where(held, tokens, mx.zeros_like(tokens))

    def _assign(self, i, tokens):
        raise ValueError(f"{NAMES[i]}: of a batch they cannot be set; extract(row) gives a cache whose can")

    def _seen_columns(self):
        """The columns of the buffers, and for each row those of the tokens that a query sees, in their order."""
        columns, rows = self._columns_of_rows()
        seen = [(n_sink, sum(others)) for n_sink, *others in self._seen_counts()]
        return columns, [
            [*row[:n_sink].tolist(), *row[len(row) - n :].tolist()] for row, (n_sink, n) in zip(rows, seen)
        ]

    @property
    def left_padding(self) -> mx.array:
        """Columns before the first token of each row in `keys` and `values`, int32 [B]."""
        n_tokens = [len(row) for row in self._seen_columns()[1]]
        return mx.array([max(n_tokens) - n for n in n_tokens], mx.int32)

    @property
    def _idx(self) -> int:
        """Columns of `keys` and `values`."""
        return max(len(row) for row in self._seen_columns()[1])

    # ---- batches ---------------------------------------------------------------------------------------------
    def prepare(
        self,
        *,
        left_padding: Optional[Sequence[int]] = None,
        lengths: Optional[Sequence[int]] = None,
        right_padding: Optional[Sequence[int]] = None,
    ) -> None:
        """Announce padding of the tokens to come, per row. left_padding: additional padding tokens, for an empty cache.
        right_padding and lengths: number of padding tokens at the end, and of tokens before them.

        Raises ValueError for left padding of a cache with tokens, and for right padding without lengths.
        """
        if left_padding is not None:
            if any(self.n_tokens(b) for b in range(self.n_rows)):
                raise ValueError("left_padding: it can only be added to an empty cache")
            self._pad = [pad + int(n) for pad, n in zip(self._pad, left_padding)]
            self._set_offset()
        if right_padding is not None and max(right_padding) > 0:
            if lengths is None:
                raise ValueError("lengths: right_padding needs them, or the cache cannot tell padding from tokens")
            self._n_before_right_padding, self._n_free = [int(n) for n in lengths], 0

    def finalize(self) -> None:
        """Say that the padded prompt is complete; its padding is already dropped."""
        self._n_before_right_padding = None

    @classmethod
    def merge(cls, caches: Sequence[TurboKVCache]) -> "BatchTurboKVCache":
        """A batch cache whose rows are the given TurboKVCaches, which stay as they are.

        Rows with other bits for their keys (`auto`) are brought to those of the most precise one.

        Raises ValueError for different configurations, shapes or dtypes, and for a cache that holds a batch.
        """
        parts = [cls._of_row(cache) for cache in caches]
        if caches[0].share is not None:
            cls._make_room(parts, caches)
            parts = [cls._of_row(cache) for cache in caches]  # which may have fewer bits now
        return cls._join(parts)

    @classmethod
    def _make_room(cls, parts, caches, leaving=()):
        """Make room in a memory budget for the batch that `_join` will make of parts, which are those of `caches`."""
        budgets = {id(cache.share and cache.share.budget) for cache in caches}
        filled = [part for part in parts if part._sides[0].recent is not None]
        if len(budgets) > 1 or not filled:
            return
        joined = cls._empty(parts[0], [pad for part in parts for pad in part._pad])
        joined.share, joined.repackable = caches[0].share, any(part.repackable for part in parts)
        n_packed = [n for part in parts for n in part._n_packed]
        columns, step = max(n for part in parts for n in part._n_recent), joined._room()
        keys, values = (side.recent for side in filled[0]._sides)
        known = caches[0].share.shape
        shape = Shape.of(keys, values, 0 if known is None else known.n_heads)._replace(rows=len(n_packed))
        n_recent, most = max(-(-columns // step), 1) * step, max(n_packed)
        room = Room(joined._sinks(most), n_recent, most, None, all(n_packed))
        caches[0].share.budget.before_join(joined, room, shape, caches, leaving)

    @classmethod
    def _of_row(cls, cache):
        """The cache of a row as a batch; buffers are shared as long as nothing is appended."""
        if type(cache) is not cls.row_class:
            raise ValueError(f"caches: got a {type(cache).__name__}, allowed are {cls.row_class.__name__}s")
        cache.settle()
        batch = cls._empty(cache)
        batch.share = cache.share  # for `_join`, which puts what it makes under the budget
        batch.repackable = cache.repackable
        batch._undecided, batch._errors, batch._by = cache.undecided, dict(cache._errors), cache._by
        batch._no_queries = [cache._no_queries]
        unpacked = not cache.n_packed
        for i, (mine, side) in enumerate(zip(batch._sides, cache._sides)):
            mine.bits, mine.in_one = side.bits, side.in_one and not cache.offset
            if not cache.offset:
                continue
            side = side.apart(*cache._buffer_counts())
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
                mine.balance = side.balance
                batch._balanced[0] = batch._balanced[0] or side.balance is not None
                mine.centered = [side.means is not None]
        batch._n_packed, batch._n_recent = [cache.n_packed], [cache.n_recent + (cache.n_sink if unpacked else 0)]
        batch._n_columns = batch._n_recent[0]
        if cache._observed is not None:
            seen, *batch._observed_with = cache._observed
            batch._observed = [[(queries, 0, positions) for queries, positions in seen]]
        batch._set_offset()
        return batch

    @classmethod
    def _join(cls, parts):
        """One cache of the rows of several, which may change internally."""
        budgets = {id(part.share.budget) if part.share is not None else None for part in parts}
        if len(budgets) > 1:
            raise ValueError("caches: they are under different memory budgets, or some under none; allowed is one")
        share = parts[0].share
        if share is not None:
            cls._lower_to_fewest(parts)
        config = parts[0].config
        for part in parts:
            part._pack_waiting()
            if part.config != config:
                raise ValueError(f"caches: got {part.config} and {config}, allowed is one configuration")
        decided = [p for p in parts if not p.undecided]
        for part in parts if decided else []:
            if part.undecided and max(map(part.n_tokens, range(part.n_rows))) >= auto_bits.FEWEST:
                part._decide()
                decided.append(part)
        joined = cls._empty(parts[0], [pad for p in parts for pad in p._pad])
        if decided:
            best = max(decided, key=lambda p: _precision(p._sides[0].bits))
            joined._decided(best._sides[0].bits, dict(best._errors), best._by)
        joined.repackable = any(p.repackable for p in parts)
        if joined.undecided or joined._may_balance or joined._keeps_queries:
            joined._observed = [seen for p in parts for seen in p._observed]
            joined._observed_with = next((p._observed_with for p in parts if p._observed_with), None)
        for name in "_n_packed", "_n_recent", "_n_evicted", "_no_queries":
            setattr(joined, name, [n for p in parts for n in getattr(p, name)])
        joined._n_columns = max(joined._n_recent)
        if any(p._n_before_right_padding is not None for p in parts):
            raise ValueError("caches: one is in the middle of a right-padded prompt, which must be finalized first")
        filled = [p for p in parts if p._sides[0].recent is not None]
        if filled:
            for part in filled:
                part._sides = [side.apart(*part._buffer_counts()) for side in part._sides]
                part._raise_keys(joined._sides[0].bits)
            joined._sides[1].bits = filled[0]._sides[1].bits
            for i, side in enumerate(joined._sides):
                side.in_one = False
                side.centered = [yes for p in parts for yes in p._sides[i].centered]
                joined._join_side(side, [p._sides[i] for p in parts], parts)
            joined._join_balance(parts)
            joined._cover_means()
            joined._arrange()
            joined._evaluate()
        joined._set_offset()
        if share is not None:
            share.pass_on(joined, *(part.share.group for part in parts))
        return joined

    @staticmethod
    def _lower_to_fewest(parts):
        """Bring caches under a memory budget to the fewest bits that one of them has."""
        names = "key_bits", "value_bits"
        fewest = {name: min((getattr(part.config.scheme, name) for part in parts), key=_precision) for name in names}
        for part in parts:
            fewer = {name: bits for name, bits in fewest.items() if getattr(part.config.scheme, name) != bits}
            if fewer:
                part.repack(**fewer)

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
            means=(n_segments(n_packed, side.segment), 1),
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
                    pieces.append(mx.zeros((part.n_rows, some.shape[1], n, some.shape[3]), some.dtype))
                    continue
                start = part._n_columns - min(held, n) if name == "recent" else 0
                a = a[:, :, start : start + min(held, n)]
                pad = (n - a.shape[2], 0) if name == "recent" else (0, n - a.shape[2])
                pieces.append(mx.pad(a, [(0, 0), (0, 0), pad, (0, 0)]) if any(pad) else a)
            setattr(side, name, write(None, 0, mx.concatenate(pieces), step))

    def _join_balance(self, parts):
        if not self._may_balance:
            return
        of_parts = [p._sides[0].balance for p in parts]
        self._balanced = [yes for p in parts for yes in p._balanced]
        if any(self._balanced):
            side = self._sides[0]
            ones = [mx.ones((p.n_rows, side.recent.shape[1], 1, side.head_dim)) for p in parts]
            side.balance = Balance(mx.concatenate([o if b is None else b.factors for b, o in zip(of_parts, ones)]))

    def _held(self, name, segment):
        """Tokens, or means, of the longest row in a buffer."""
        n_packed = max(self._n_packed)
        return {
            "sink": self._sinks(n_packed),
            "means": n_segments(n_packed, segment),
            "recent": max(self._n_recent),
        }.get(name, n_packed)

    def extend(self, other: "BatchTurboKVCache") -> None:
        """Append the rows of another batch cache, which stays as it is. Raises as `merge`, with this one unchanged."""
        if type(other) is not type(self):
            raise ValueError(f"other: got a {type(other).__name__}, allowed is a {type(self).__name__}")
        self.settle()
        other.settle()
        if self.share is not None:
            self._make_room([self, other], [self, other], [self])
        joined = self._join([self._uncounted(), other._uncounted()])
        version = self.version + 1
        self.__dict__.update(joined.__dict__)
        self.version = version
        if self.share is not None:
            self.share.join(self)
            joined.share = None

    def _uncounted(self):
        """A copy that a memory budget does not count."""
        share, self.share = self.share, None
        try:
            twin = copy.copy(self)
        finally:
            self.share = share
        twin.share = share
        return twin

    def filter(self, batch_indices: Union[Iterable[int], mx.array]) -> None:
        """Keep the rows batch_indices (a list or array of row numbers), in that order.

        Raises IndexError for a row that does not exist, and ValueError for none, with the cache unchanged.
        """
        every = list(range(self.n_rows))
        indices: Any = batch_indices.tolist() if isinstance(batch_indices, mx.array) else batch_indices
        rows = [every[i] for i in indices]
        if not rows:
            raise ValueError(f"batch_indices: got none, allowed is at least one of the rows 0 to {self.n_rows - 1}")
        self._pack_waiting()
        if self.share is not None:
            self.share.lend(self)
        self._unread.clear()
        front, end = sum(self._columns(self._n_packed)), sum(self._buffer_counts())
        pick = lambda values: [values[b] for b in rows]  # noqa: E731
        for name in "_pad", "_n_packed", "_n_recent", "_n_evicted", "_no_queries":
            setattr(self, name, pick(getattr(self, name)))
        self._n_before_right_padding = (
            None if self._n_before_right_padding is None else pick(self._n_before_right_padding)
        )
        self._observed, self._last = pick(self._observed), pick(self._last) if self._last else []
        for side in self._sides:
            side.centered = pick(side.centered)
        start, n_packed = self._n_columns - max(self._n_recent, default=0), max(self._n_packed, default=0)
        index, self._n_columns = mx.array(rows), self._n_columns - start
        self._balanced = pick(self._balanced)
        if (balance := self._sides[0].balance) is not None:
            self._sides[0].balance = Balance(balance.factors[index]) if any(self._balanced) else None
        for side in self._sides:
            if side.recent is None:
                continue
            if side.in_one:
                kept = sum(self._columns(self._n_packed))
                parts = [side.recent[:, :, :kept], side.recent[:, :, front + start : end]]
                together = [side.recent[:, :, :end]] if kept == front and not start else parts
                side.recent = None
                self.write_in_one(side, 0, mx.concatenate([p[index] for p in together], axis=2))
                continue
            side.recent = write(None, 0, side.recent[:, :, start : start + self._n_columns][index], self._room())
            sizes = dict(
                sink=self._sinks(n_packed), codes=n_packed, scale=n_packed, means=n_segments(n_packed, side.segment)
            )
            for name, n in sizes.items():
                a = getattr(side, name)
                if a is not None:
                    n = min(-(-n // self.step) * self.step, a.shape[2]) if name in ("codes", "scale") else n
                    setattr(side, name, mx.contiguous(a[:, :, :n][index]) if n else None)
        self._cover_means()
        self._changed()
        if self.share is None and self._sides[0].recent is not None:
            self._evaluate()

    def extract(self, idx: int) -> TurboKVCache:
        """Row idx as a cache of its own. Under a memory budget it is computed when this batch, or the row, is used:
        until then it takes nothing."""
        b = list(range(self.n_rows))[idx]
        self._pack_waiting()
        cache = self._empty_row()
        if self.share is not None:
            self.share.pass_on(cache, (self.share.group, b))
            self.share.lend(self, cache.share)
        cache.repackable, cache._no_queries = self.repackable, self._no_queries[b]
        n = self.n_tokens(b)
        if n or may_choose_bits(self.config) and not self._exact_because():
            cache._undecided, cache._errors, cache._by = self._undecided, dict(self._errors), self._by
            for mine, side in zip(cache._sides, self._sides):
                mine.bits = side.bits
        if not n:
            return cache
        cache.n_sink, cache.n_packed, cache.n_recent = self._counts()[b]
        cache._observed, end = self._observed_of(b), self._n_columns
        if self._balanced[b]:
            cache._sides[0].balance = self._balance_of([b])
        for side, mine in zip(self._sides, cache._sides):
            mine.in_one = side.in_one
            if side.in_one:
                front, last = cache.n_sink + cache.n_packed if cache.n_packed else 0, sum(self._buffer_counts())
                edges = (0, front), (last - self._n_recent[b], last)
                row = [side.recent[b : b + 1, :, at:until] for at, until in edges if until > at]
                cache.write_in_one(mine, 0, mx.concatenate(row, axis=2))
                continue
            exact = side.recent[b : b + 1, :, end - self._n_recent[b] : end]
            if cache.n_sink:
                sinks = side.sink[b : b + 1] if cache.n_packed else exact[:, :, : cache.n_sink]
                mine.sink = write(None, 0, sinks, self.config.sink)
            mine.recent = write(
                None, 0, exact[:, :, self._n_recent[b] - cache.n_recent :], self.config.recent + self.config.block
            )
            if cache.n_packed:
                mine.codes = write(None, 0, side.codes[b : b + 1, :, : cache.n_packed], self.step)
                if side.scale is not None:
                    mine.scale = write(None, 0, side.scale[b : b + 1, :, : cache.n_packed], self.step)
                if side.centered[b]:
                    n = n_segments(cache.n_packed, side.segment)
                    mine.means = write(None, 0, side.means[b : b + 1, :, :n], max(self.step // side.segment, 1))
        if cache.share is None:
            cache._evaluate()
        return cache

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self.share is not None:  # mlx-lm divides a batch by filtering it and its copy
            self.share.lend(self)
        return super().__deepcopy__(memo)

    def trim(self, n: int) -> int:
        """Remove the newest n tokens of each row, or all of a row that has fewer. Returns how many the longest row
        lost."""
        self.settle()
        trimmed = n = min(max(int(n), 0), max(map(self.n_tokens, range(self.n_rows))))
        self._unread.clear()
        left, to_recent = [], {}
        for b in range(self.n_rows):
            keep = max(self.n_tokens(b) - n, 0)
            sinks = self._sinks(self._n_packed[b])
            if self._n_packed[b] and keep <= sinks:  # only sinks are left: a row that has not packed
                left.append((0, keep))
                to_recent[b] = keep
            else:
                packed = min(self._n_packed[b], keep - sinks) if self._n_packed[b] else 0
                left.append((packed, keep - packed - (sinks if packed else 0)))
        in_one, rows = self._sides[0].in_one, self._columns_of_rows()[1]
        end = max(self._n_columns - n, 0)
        columns = max([end, *to_recent.values()])
        stay = [packed for packed, _ in left] == self._n_packed
        if columns and to_recent and not in_one:
            for side in self._sides:
                recent = mx.pad(side.recent[:, :, :end], [(0, 0), (0, 0), (columns - end, 0), (0, 0)])
                for b, keep in to_recent.items():
                    if keep:
                        recent[b : b + 1, :, columns - keep :] = side.sink[b : b + 1, :, :keep]
                side.recent = write(None, 0, recent, self._room())
        self._n_columns = columns
        self._n_packed, self._n_recent = map(list, zip(*left))
        if in_one and not stay and not self.empty() and self._sides[0].recent is not None:
            columns = [row[: self.n_tokens(b)] for b, row in enumerate(rows)]
            self._gather([side.recent for side in self._sides], columns)
        for b, packed in enumerate(self._n_packed):
            self._observed[b] = still_held(self._observed[b], self.n_tokens(b))
            self._no_queries[b] = self._no_queries[b] and self.n_tokens(b) > 0
            for side in self._sides:
                side.centered[b] = side.centered[b] and packed > 0
            if not packed:
                self._set_balance([b], None)
        if self._sides[0].recent is not None:
            self._cover_means()
        self._last = []
        if self.empty():
            self._clear()
        self._changed()
        return trimmed

    def size(self) -> int:
        """Number of tokens of the longest row."""
        return max(map(self.n_tokens, range(self.n_rows)))

    def empty(self) -> bool:
        return self.size() == 0

    # ---- state -----------------------------------------------------------------------------------------------
    def _row_counts(self):
        """The counts that `row_names` names, each a list with an entry per row."""
        return (
            self._n_packed,
            self._n_recent,
            self._pad,
            self._n_before_right_padding or [-1] * self.n_rows,
            *(side.centered for side in self._sides),
            self._balanced,
        )

    @property
    def state(self) -> list[mx.array]:
        """Everything as a list of arrays: an int32 header, int32 [B, names] with what `row_names` names of each row,
        then per side sink, codes, scale, means and recent, cut to the columns they have, then the balance of the keys;
        what is not there is left out. Setting it raises ValueError for arrays that are not the state of such a
        cache."""
        self.settle()
        columns = self._buffer_counts()
        rows = mx.array([*zip(*self._row_counts())], mx.int32)
        return [mx.array(self._header(columns), mx.int32), rows, *self._arrays(columns)]

    @state.setter
    def state(self, arrays: list[mx.array]) -> None:
        state = read_state(arrays, self)
        rows = state.rows
        vars(self).update(state.own)
        BatchTurboKVCache.__init__(self, state.config, rows["n_pad"])
        self._sides, self._undecided = state.sides, state.undecided
        self._n_packed, self._n_recent = rows["n_packed"], rows["n_recent"]
        self._n_evicted = rows.get("n_forgotten", [0] * self.n_rows)
        self._n_columns = state.counts[2]
        self._n_before_right_padding = None if -1 in rows["n_until"] else rows["n_until"]
        for side, name in zip(self._sides, ("key_means", "value_means")):
            side.centered = [bool(x) for x in rows[name]]
        self._balanced = [bool(x) for x in rows["balanced"]]
        self._arrange()
        self._set_offset()
        self._evaluate()


TurboKVCache.batch_class = BatchTurboKVCache
