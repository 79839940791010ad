"""TurboKVCache: a key-value cache for mlx-lm models that holds most tokens packed.

    [ sink: exact ] [ packed ] [ recent: exact ]

Where neither keys nor values are packed (turbo0, and under a memory budget until it is short), all tokens lie in one
buffer, as in mlx-lm's KVCache, and an update returns a slice of it; the counts say what would be packed.

The first `sink` tokens and at least the newest `recent` ones stay exact, in the model's dtype. Older ones are quantized
from those exact values, once, so the stored codes do not depend on how the prompt was cut into chunks. Every array is
[B, n_kv_heads, tokens, *]: the bits of a token never leave its row.
"""

import copy
from dataclasses import replace
from typing import Any, Optional, Sequence, Union

import mlx.core as mx
import numpy as np

from ..backends import select
from ..backends.select import check_vectors, get_backend
from ..backends.sides import CachedSide, are_latents
from ..quant.rotation import ALLOWED_HEAD_DIMS
from ..quant.scheme import SCALES, Scheme, TurboConfig
from . import auto_bits, balancing, history
from .attention_error import KEPT_EVERY, join, newest, sample_queries, still_held
from .balancing import balance_of
from .conversion import converter
from .joined import Joined
from .last_step import NOT_YET, after_update
from .masks import attention_mask
from .memory_budget import Room, Share
from .packing import (
    PackJob,
    Side,
    allowed_dtypes,
    begin,
    bits_at,
    make_sides,
    may_choose_bits,
    n_segments,
    pack,
    write,
)
from .repacking import ExactRows, fewer_bits, pack_exact, requantize
from .state import FORMAT_VERSION, HEADER_NAMES, MAGIC, read_state
from .view import KVView, LazyKV, Unread

# what a pickle leaves out: it is in the state, or belongs to this process
_NOT_PICKLED = (
    *("_sides", "_offsets", "_unread", "_to_pack", "_choice", "_measured"),
    *("version", "attended_version", "last_attention", "share"),
)


class TurboKVCache:
    """A KV cache of one layer, in place of mlx_lm.models.cache.KVCache.

    config: a scheme's name ("turbo4", "turbo8v4", ...), a Scheme or a TurboConfig. Options (sink, recent, block,
    seed, ...) replace what the configuration says.

    Raises ValueError for an unknown scheme or option.
    """

    step: int = 256  # tokens by which the packed buffers grow
    magic = MAGIC  # of its state
    header_names: tuple[str, ...] = HEADER_NAMES
    row_names: tuple[str, ...] = ()  # of the counts of rows in the state
    never_quantized: Optional[str] = None  # what this is, if mlx-lm has no quantized cache of that kind
    batch_class: Any = None  # what `merge` makes; batch.py sets it
    share: Optional[Share] = None  # in a memory budget
    one_buffer: bool = True  # whether exact tokens lie in one
    _choice: Any = None  # what auto will choose by, which is computed meanwhile
    _no_queries: Any = False  # whether a memory budget has no room for them; of a batch, of each row
    repackable: bool = False
    """Whether the newest queries are held as long as keys are exact (0 bits), so that `repack` can balance them: set
    by whoever will call it, before the first token. A state does not hold it."""

    def __init__(self, config: Union[str, Scheme, TurboConfig] = "turbo4", **options: Any) -> None:
        self.config = TurboConfig.of(config, **options)
        self.version = 0  # changes with every update: a view of an older version must not be read
        self.attended_version: Optional[int] = None  # set by attention.attend
        self.last_attention: Optional[str] = NOT_YET
        self._unread = Unread()
        self._clear()

    def _clear(self):
        if self.share is not None:  # there is room again
            self.config = replace(self.config, scheme=Scheme(0, 0))
        self._sides = make_sides(self.config)
        self._arrange()
        self._undecided = may_choose_bits(self.config)  # auto has not chosen the bits of the keys; nothing is packed
        self._errors, self._by = {}, None  # of auto's choice: error by bits, what it was based on
        self._choice = None
        self._clear_counts()

    def _clear_counts(self):
        self.n_sink = self.n_packed = self.n_recent = 0
        self._observed, self._no_queries = None, False
        self._to_pack = []  # how many tokens will be packed first, once their queries have come

    @property
    def offset(self) -> int:
        """Number of tokens in the cache. Setting it to fewer trims it; raises ValueError for more."""
        return self.n_sink + self.n_packed + self.n_recent

    @offset.setter
    def offset(self, n: int) -> None:
        history.set_offset(self, n)

    # ---- update ----------------------------------------------------------------------------------------------
    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys [B, n_kv_heads, L, Dk] and values [B, n_kv_heads, L, Dv] (post-RoPE; float16, bfloat16 or
        float32, with turbo0 integers too) and return all tokens, the new ones exactly as given.

        The older tokens come as lazy arrays: dequantizing costs nothing unless they are read.

        A token that is not finite, or too large for a float16 scale once it is packed, has the same effect as in
        mlx-lm's cache: queries that see it get nothing finite, other rows and heads are unaffected. `report` counts
        such tokens; updates do not wait to find them.

        Raises TypeError or ValueError, with the cache unchanged, for wrong shapes, dtypes or head dims, for a batch,
        number of heads, head_dim or dtype other than before, and for tokens that its memory budget cannot hold. Keys or
        values of a head_dim that cannot be packed stay exact; `report` says so.
        """
        self._check(keys, values)
        new, n_new = (keys, values), keys.shape[2]
        if n_new == 0:
            return self.keys_and_values() if self.offset else new
        self.settle()
        if self.share is not None:
            self.share.before_update(self, keys, values)
        first, begins = self.offset == 0, self._begins_to_pack
        n_to_sink = min(self.config.sink - self.n_sink, n_new)
        n_to_recent = n_new - n_to_sink
        if self._undecided and (
            self.n_recent > self._capacity()
            or (self.n_recent + n_to_recent > self._capacity() and n_to_recent <= self.config.block)
        ):
            self._decide()  # nothing showed us the queries of the chunk, or a decode step has to pack
            self.settle()
        if self._sides[0].in_one:
            return self._append_exact(new)
        capacity, n, view = self._room(), self.n_recent + n_to_recent, None
        if n <= capacity or self._undecided:
            pass
        elif self._begins_to_pack and not self._are_latents(keys, values):  # attended exactly once more
            self._to_pack = [n - self.config.recent - (n_to_recent if n_to_recent <= self.config.block else 0)]
        elif n_to_recent <= self.config.block and self.n_packed:  # make room: what is appended stays exact until later
            self._pack(self._recent_tokens(), self.n_recent - self.config.recent)
        else:  # a prompt chunk, or the first tokens to be packed: attended exactly now, packed at once
            tails = [x[:, :, n_to_sink:] for x in new]
            if self.n_recent:
                tails = [mx.concatenate([held, x], axis=2) for held, x in zip(self._recent_tokens(), tails)]
            view = self.n_packed, tails
            n_beside = n_to_recent if n_to_recent <= self.config.block else 0
            self._pack(tails, n - self.config.recent - n_beside)
        waits = n > self._capacity() and view is None and not self.n_packed
        for side, x in zip(self._sides, new):
            if n_to_sink:
                side.sink = write(side.sink, self.n_sink, x[:, :, :n_to_sink], self.config.sink)
                x = x[:, :, n_to_sink:]
            if waits:  # nothing is appended before they are packed: no room for more, no copy of a chunk
                side.recent = mx.concatenate([side.recent[:, :, : self.n_recent], x], axis=2) if self.n_recent else x
            elif view is None:
                side.recent = write(side.recent, self.n_recent, x, capacity)
        self.n_sink += n_to_sink
        if view is None:
            self.n_recent += n_to_recent
        self.version += 1
        self._updated()
        if first or view or waits:
            self._evaluate()
        if first and not begins and not self._undecided and not self._keeps_queries:
            return new
        if view is None:
            return self._fetch((self.n_sink, self.n_packed, self.n_recent), new=new if first else None)
        n_packed, tails = view
        return self._fetch((self.n_sink, n_packed, tails[0].shape[2]), tails, new if first else None)

    def _append_exact(self, new):
        """What update_and_fetch does where all tokens lie in one buffer."""
        held, counts = self.offset, self._counts_after(new[0].shape[2])
        self.n_sink, self.n_packed, self.n_recent = counts
        for side, x in zip(self._sides, new):
            self.write_in_one(side, held, x)
        self.version += 1
        self._updated()
        if held:
            is_shown = new[0].shape[2] > 1 or self._keeps_query_of(held)
            return self._fetch(counts) if is_shown else self._exact_tokens(held + 1)
        self._evaluate()
        return self._fetch(counts, new=new) if self._keeps_queries else new

    def _counts_after(self, n_new):
        """(n_sink, n_packed, n_recent) after n_new more tokens."""
        config = self.config
        n_sink = min(config.sink, self.n_sink + n_new)
        n_to_recent, n_pack = n_new - (n_sink - self.n_sink), 0
        n = self.n_recent + n_to_recent
        if n > config.recent + config.block:
            n_pack = (self.n_recent if n_to_recent <= config.block else n) - config.recent
        return n_sink, self.n_packed + n_pack, n - n_pack

    def _room(self):
        """Number of tokens that the buffers of recent ones have room for."""
        return self.config.recent + self.config.block

    def _buffer_counts(self):
        """The sink, packed and recent tokens that the buffers hold."""
        return self.n_sink, self.n_packed, self.n_recent

    def _ends(self):
        """Number of sink and recent tokens that there is room for."""
        return self.config.sink + self._room()

    def write_in_one(self, side: Side, at: int, new: mx.array) -> None:
        """Write tokens [B, H, n, D] into the one buffer of a side, from column `at` on, with the counts as they are
        then."""
        side.write_in_one(at, new, self._ends(), self.packed_columns, self.step)

    def _arrange(self):
        """Put exact tokens into one buffer, or what lies in one apart, as the bits of both sides ask."""
        in_one = self.one_buffer and not any(side.bits for side in self._sides)
        for side in self._sides:
            if side.recent is None:
                side.in_one = in_one
            elif in_one and not side.in_one:
                self._put_in_one(side)
            elif side.in_one and not in_one:
                self._put_apart(side)

    def _put_in_one(self, side):
        names = "sink", "codes", "recent"
        held = [(getattr(side, name), n) for name, n in zip(names, self._buffer_counts())]
        parts = [a[:, :, :n] for a, n in held if n]
        tokens = mx.concatenate(parts, axis=2) if parts else side.recent[:, :, :0]
        side.sink, side.codes, side.recent, side.in_one = None, None, None, True
        self.write_in_one(side, 0, tokens)

    def _put_apart(self, side):
        """Its packed tokens are elsewhere already if it has bits."""
        n_sink, n_packed, n_recent = self._buffer_counts()
        apart = side.apart(n_sink, n_packed, n_recent)
        if n_sink:
            side.sink = write(None, 0, apart.sink, self.config.sink)
        if n_packed and not side.bits:
            side.codes = write(None, 0, apart.codes, self.step)
        side.recent, side.in_one = write(None, 0, apart.recent, self._room()), False
        mx.eval(side.buffers())

    def _pack(self, tails, n_pack, begun=None):
        """Quantize the first n_pack tokens of `tails` (exact tokens after the packed ones, per side); the others go to
        new recent buffers. begun: as of PackJob. Raises before anything is changed."""
        self._unread.clear()
        sides = [side.to_pack(side.means if self.n_packed else None) for side in self._sides]
        (packed,) = pack([PackJob(sides, tails, self.n_packed, n_pack, begun)], self.config, self.step)
        for side, tail, new in zip(self._sides, tails, packed):
            side.set_means(new.means, new.begun)
            side.codes = write(side.codes, self.n_packed, new.codes, self.step)
            if new.scale is not None:
                side.scale = write(side.scale, self.n_packed, new.scale, self.step)
            side.recent = write(None, 0, tail[:, :, n_pack:], self.config.recent + self.config.block)
        self.n_packed += n_pack
        self.n_recent = tails[0].shape[2] - n_pack

    def settle(self) -> None:
        """Do what was put off: pack the first tokens, whose queries did not come; with `auto`, choose and pack; and
        read which rows are centered. The next update does it, and so does whatever looks at the buffers before. Raises
        MemoryBudgetError if a row was taken out of a batch that goes on with it, and its memory budget does not hold
        both."""
        if self.share is not None:
            self.share.budget.separate()
        self._settle()

    def _settle(self):
        if self._choice is not None:
            self._decide()
        self._pack_waiting()
        for side in self._sides:
            side.settle()

    def _updated(self):
        keys, values = self._sides
        is_packed = keys.codes is not None and (keys.bits or values.bits) > 0
        self.last_attention = after_update(self.last_attention, is_packed)

    def _evaluate(self):
        """Start computing new buffers that the returned arrays do not read: another thread cannot evaluate them, and
        until they are evaluated they keep their inputs alive."""
        mx.async_eval(*map(self.side_started, (0, 1)))

    def side_started(self, i: int) -> list[mx.array]:
        """All that was begun of keys (i = 0), with the queries that are kept to balance them, or of values (1)."""
        return [*self._sides[i].started(), *(() if i else self._observed_queries())]

    def _check(self, keys, values):
        for x, name, side in ((keys, "keys", self._sides[0]), (values, "values", self._sides[1])):
            had = side.recent
            if (
                had is not None
                and isinstance(x, mx.array)
                and x.dtype == had.dtype
                and x.ndim == 4
                and x.shape[:2] == had.shape[:2]
                and x.shape[3] == had.shape[3]
            ):
                continue  # a decode step
            check_vectors(x, name, any_head_dim=True, dtypes=allowed_dtypes(self.config))
            if had is not None:
                for what, was, now in (
                    ("batch size", had.shape[0], x.shape[0]),
                    ("number of kv heads", had.shape[1], x.shape[1]),
                    ("head_dim", had.shape[3], x.shape[3]),
                    ("dtype", had.dtype, x.dtype),
                ):
                    if was != now:
                        raise ValueError(f"{name}: {what} {now}, but this cache holds tokens with {what} {was}")
        if keys.shape[:3] != values.shape[:3]:
            raise ValueError(
                f"values: got {tuple(values.shape)}, expected [batch, n_kv_heads, tokens] as keys {tuple(keys.shape)}"
            )
        if self._sides[0].recent is None:
            for side, x in zip(self._sides, (keys, values)):
                side.bits = bits_at(side.bits, x.shape[3])
            self._undecided = self._undecided and self._sides[0].bits > 0
            self._arrange()

    # ---- auto ------------------------------------------------------------------------------------------------
    @property
    def undecided(self) -> bool:
        """Whether auto has still to choose the bits of the keys; nothing is packed before."""
        if self._choice is not None:
            self._decide()
        return self._undecided

    def observe(self, queries: mx.array, scale: float, sinks: Optional[mx.array] = None) -> None:
        """Take note of the queries [B, n_heads, L, Dk] of the newest L tokens, by which keys are balanced and `auto`
        chooses bits. Attention calls it. scale: the softmax scale. sinks: [n_heads] sink logits."""
        if not self.wants_queries:
            return
        n, (counts,) = queries.shape[2], self._counts()
        held = sum(counts)
        if n == 1 and self._keeps_queries and not self._keeps_query_of(self.offset - 1):
            return
        if n > 1:  # one token's queries are evaluated with the step, and kept as they are
            sample = sample_queries(n)
            queries = mx.contiguous(queries[:, :, sample.start :: sample.step])
            positions = [held - n + i for i in sample]
            if not self._to_pack:
                mx.async_eval(queries)
        else:
            positions = [held - 1]
        seen = self._observed[0] if self._observed else []
        self._observed = newest([*seen, (queries, positions)]), scale, sinks
        if self._to_pack:
            self._pack_waiting()
        elif self._undecided and self.n_recent > self._capacity():
            self._measure()
            if self._sides[0].recent.shape[0] * self.n_recent > auto_bits.MOST_HELD:
                self._decide()

    @property
    def observed(self) -> Optional[tuple[Any, float, Optional[mx.array]]]:
        """What `observe` was shown and is still to be used, which `state` leaves out: ([(queries [B, n_heads, n, Dk],
        positions), ...], softmax scale, sink logits); or None. Set it on a cache made from a state, and that decides as
        the one it was taken from would."""
        return self._observed

    @observed.setter
    def observed(self, observed: Optional[tuple[Any, float, Optional[mx.array]]]) -> None:
        self._observed = observed

    @property
    def wants_queries(self) -> bool:
        """Whether `observe` has use for queries: until the first keys are packed."""
        if self._choice is not None:
            return False
        return self._undecided or self._begins_to_pack or self._keeps_queries

    @property
    def _keeps_queries(self):
        """Whether exact keys may be packed later, and balanced then."""
        keys = self._sides[0]
        can_pack = keys.recent is None or bits_at(8, keys.head_dim) > 0
        return self.repackable and self._balances and not keys.bits and can_pack and not self.holds_latents

    @property
    def _balances(self):
        """Whether the keys that are packed first will be balanced, if their queries are shown."""
        return self.config.balance and not self._no_queries

    def _keeps_query_of(self, position):
        """Whether the query of a decode step is kept as long as keys are exact: those of the newest tokens would tell
        no more than some of many."""
        return self._keeps_queries and position % KEPT_EVERY == 0

    @property
    def holds_latents(self) -> bool:
        """Whether its keys are the latents of multi-head latent attention, and its values the RoPE keys. They are never
        centered, nor balanced: attention shows no queries of latents, as they are values too."""
        keys, values = (side.recent for side in self._sides)
        return keys is not None and self._are_latents(keys, values)

    @staticmethod
    def _are_latents(keys, values):
        return are_latents(keys.shape[1], keys.shape[3], values.shape[3])

    def _config_of_keys(self):
        """How keys are packed, as auto measures it."""
        return replace(self.config, centre=False) if self.holds_latents else self.config

    @property
    def _begins_to_pack(self):
        """Whether the next keys to be packed are the first, and may be balanced."""
        return not self.n_packed and self._balances and self._sides[0].bits > 0

    def _choose_balance(self, tail, bits=None):
        """How keys are balanced of which `tail`, one array or several, comes after the sink, if it can be chosen.
        bits: at which they will be packed, if that is not what they have."""
        if not self._observed:
            return None
        sink = [self._sides[0].apart(*self._buffer_counts()).sink[:, :, : self.n_sink]] if self.n_sink else []
        keys = Joined([*sink, *(tail if isinstance(tail, list) else [tail])])
        return balancing.choose(keys, self.config, bits or self._sides[0].bits, join(*self._observed))

    def _pack_waiting(self):
        """Pack the first tokens, if they wait for it, balanced by the queries that were seen."""
        if self._to_pack:
            tails = self._recent_tokens()
            self._sides[0].balance = balance_of(self._choose_balance(tails[0]))
            self._pack(tails, *self._to_pack)
            self._to_pack, self._observed = [], None
            self._evaluate()

    def _observed_queries(self):
        """The arrays that `observe` holds on to; none once they have been used. (The sink logits are the model's.)"""
        return [queries for queries, _ in self._observed[0]] if self._observed else []

    def _capacity(self):
        """Number of tokens after the sink that can all be exact; one more, and the oldest are packed."""
        capacity = self.config.recent + self.config.block
        return max(capacity, auto_bits.FEWEST) if self._undecided else capacity

    @property
    def packs_beyond(self) -> int:
        """As long as the cache holds no more tokens than this, all of them are exact."""
        return self.config.sink + self._capacity()

    def _measure(self):
        """Start to compute what the bits of the keys are chosen by, and how they are packed then. Without queries
        (nothing called `observe`) the keys alone decide."""
        tails, keys = self._recent_tokens(), self._sides[0]
        every = mx.concatenate([keys.sink[:, :, : self.n_sink], tails[0]], axis=2) if self.n_sink else tails[0]
        chosen = self._choose_balance(tails[0], auto_bits.LADDER[0])
        observed = join(*self._observed) if self._observed else None
        measured = auto_bits.measure(every, self._config_of_keys(), observed, chosen)
        balance = balance_of(chosen)
        sides, n_pack = [side.to_pack(None) for side in self._sides], self.n_recent - self.config.recent
        begun = begin(PackJob(sides, tails, 0, n_pack), self.config) if n_pack > self.config.block else {}
        self._choice, self._observed = (measured, balance, begun), None
        factors = [] if balance is None else [balance.factors]
        mx.async_eval(measured.errors, factors, list(begun.values()))

    def _recent_tokens(self):
        return [side.recent[:, :, : self.n_recent] for side in self._sides]

    def _decide(self):
        """Choose the bits of the keys, and pack the tokens that waited for it."""
        if self._choice is None:
            self._measure()
        (measured, balance, begun), self._choice = self._choice, None
        bits, self._errors, self._by = auto_bits.choose_key_bits(measured)
        self._sides[0].bits, self._undecided = bits, False
        self._sides[0].balance = balance if bits else None
        if self.n_recent > self._capacity():
            begun = {i: new for i, new in begun.items() if new.centers()}
            self._pack(self._recent_tokens(), self.n_recent - self.config.recent, begun)
            self._evaluate()
        self._arrange()

    # ---- memory budget ---------------------------------------------------------------------------------------
    @property
    def packed_columns(self) -> int:
        """Number of packed tokens, of the row that has most."""
        return self.n_packed

    @property
    def all_packed(self) -> bool:
        """Whether each row has packed tokens."""
        return self.n_packed > 0

    def step_key(self) -> Any:
        """What the caches of a prompt cache have in common before a step, and not after it."""
        return self.offset

    def will_grow(self, n_new: int) -> bool:
        """Whether buffers may grow in an update with n_new tokens."""
        if self.n_sink < self.config.sink or self._sides[0].recent is None:
            return True
        if self.n_recent + n_new <= self._room():
            return False
        n_packed = self.room_after(n_new).n_packed
        return any(n_packed > side.codes_capacity for side in self._sides)

    def held_of(self, n: int, chunk: int) -> int:
        """Of n more tokens, which come in chunks of at most so many: how many may be held at a time, one after the
        other."""
        return n

    def room_after(self, n_new: int) -> Room:
        """The `Room` after an update with n_new tokens."""
        (n_sink, n_packed, _), (left, kept) = self._counts_after(n_new), self._left_packed()
        return Room(self.config.sink if n_sink else 0, self._room(), n_packed - (self.n_packed - left), kept)

    def next_growth(self, n_new: int) -> Optional[tuple[int, int]]:
        """(tokens, n_packed): after an update with n_new tokens, the number of single tokens with which the packed
        buffers grow next, and how many they hold then. None: they do not grow."""
        config, room = self.config, self.room_after(n_new)
        n_recent = self.offset + n_new - room.n_packed - min(config.sink, self.n_sink + n_new)
        capacity = -(-room.n_packed // self.step) * self.step
        n_times = (capacity - room.n_packed) // config.block + 1
        first = self._room() - n_recent + 1
        return first + (n_times - 1) * config.block, room.n_packed + n_times * config.block

    def give_up_queries(self) -> None:
        """Hold no queries, now or later: keys that are not packed yet will not be balanced."""
        self._observed, self._no_queries = None, True

    def n_rows_with_queries(self, n_rows: int) -> int:
        """Of so many rows, for how many queries may be held."""
        return 0 if self._no_queries else n_rows

    def _left_packed(self) -> tuple[int, Optional[int]]:
        """(packed tokens before an update packs others, tokens that their buffers have room for if they are new)"""
        return self.n_packed, None

    # ---- fewer bits ------------------------------------------------------------------------------------------
    def repack(self, key_bits: Optional[int] = None, value_bits: Optional[int] = None) -> None:
        """Give keys and values fewer bits per number (None: as many as they have), the tokens that are packed already
        too, from what the cache holds; config.scheme is the new scheme.

        Packed tokens get them from their codes, with the means and the balance that they have. Exact ones (0 bits) are
        packed as if all tokens had come in one chunk, if `repackable` was set before they came: then keys are balanced
        by the newest queries. Waits for the result: keys first, then values; of each, the old and the new tokens are
        held at the same time. With `auto`, the bits are then as they are: it chooses no others.

        Raises ValueError, with the cache unchanged, for more bits than there are or other ones than 0, 2, 3, 4, 5, 6
        and 8, for integers, and as long as `auto` has not chosen.
        """
        if not self._to_pack:  # else they are packed at the new bits, once their queries have come
            self.settle()
        now = self._asked_bits()
        if self._undecided:
            raise ValueError("key_bits: auto has not chosen those of this cache yet, which it does before it packs")
        scheme = fewer_bits(now, key_bits, value_bits)
        if scheme == now:
            return
        for x, name in zip((side.recent for side in self._sides), history.NAMES):
            if x is not None and x.dtype not in select.DTYPES:
                raise ValueError(f"{name}: got {x.dtype}, which only a cache of turbo0 holds; it cannot be packed")
        self._unread.clear()
        self.version += 1
        self._errors, self._by = {}, None
        done = now
        try:
            for i, bits in enumerate((scheme.key_bits, scheme.value_bits)):
                side = self._sides[i]
                packed_at = bits if side.recent is None else bits_at(bits, side.head_dim)
                if packed_at != side.bits:
                    self._repack_side(i, packed_at)
                done = Scheme(scheme.key_bits, scheme.value_bits if i else done.value_bits)
                self.config = replace(self.config, scheme=done, auto=False)
        finally:
            self._arrange()  # the other side may be exact still

    def _asked_bits(self):
        """The scheme as it is: config.scheme, and of keys what auto chose."""
        scheme, chosen = self.config.scheme, self._sides[0].bits
        if may_choose_bits(self.config) and "keys" not in self._exact_because():
            return Scheme(chosen, scheme.value_bits)
        return scheme

    def _repack_side(self, i, bits):
        """Bring the packed tokens of keys (i = 0) or values (1) to fewer bits, and those to come."""
        side = self._sides[i]
        if not self._has_packed:
            side.codes = side.scale = side.means = None  # room of another width, of tokens that were trimmed
            side.bits = bits
        elif side.bits:
            requantize(side, bits, self.config)
        else:
            self._pack_exact(i, bits)
            if side.in_one:
                self._put_apart(side)

    @property
    def _has_packed(self):
        return self.n_packed > 0

    def _pack_exact(self, i, bits):
        """Pack the tokens of keys (i = 0) or values (1) that are exact at 0 bits."""
        side, config, apart = self._sides[i], self._config_of_keys(), self._sides[i].apart(*self._buffer_counts())
        tail = [apart.codes[:, :, : self.n_packed], apart.recent[:, :, : self.n_recent]]
        balance = None if i else balance_of(self._choose_balance(tail, bits))
        rows = ExactRows(list(range(side.recent.shape[0])), Joined(tail), self.n_packed, balance)
        ((means, begun),) = pack_exact(side, bits, [rows], config, self.step, self._codes_capacity(side))
        side.set_means(means, begun)
        side.settle()
        if i == 0:
            side.balance, self._observed = balance, None

    def _codes_capacity(self, side):
        """Number of tokens that its packed buffers have room for, or will once its tokens are not in one."""
        n = -(-self.packed_columns // self.step) * self.step
        return n if side.codes is None else side.codes.shape[2]

    # ---- fetch -----------------------------------------------------------------------------------------------
    def _fetch(self, counts, tails=None, new=None):
        """All tokens of both sides as `LazyKV`: (n_sink, n_packed, n_recent) of sink, packed and exact `tails` (the
        recent tokens, if not given). new: the same tokens as arrays, if they are at hand."""
        if self._sides[0].in_one:
            return self._fetch_exact(counts, new or tails)
        view = self._view(counts, tails)
        if not any(side.bits for side in self._sides) and not self._keeps_queries:
            return tuple(view.restore())  # nothing is packed: exactly what mlx-lm's own attention gets
        packed = self._unread.get(view) if view.counts[1] else None
        return tuple(LazyKV(x, view, i) for i, x in enumerate(new or view.restore(packed)))

    def _exact_tokens(self, n):
        """The first n tokens, which lie in one buffer: exactly what mlx-lm's own attention gets."""
        return tuple(side.recent[:, :, :n] for side in self._sides)

    def _fetch_exact(self, counts, arrays):
        arrays = arrays or self._exact_tokens(sum(counts))
        if not self._keeps_queries:
            return tuple(arrays)
        view = self._view(counts)
        return tuple(LazyKV(x, view, i) for i, x in enumerate(arrays))

    def _view(self, counts, tails=None):
        if self._sides[0].in_one:
            counts = 0, 0, sum(counts)
        sides = []
        for i, side in enumerate(self._sides):
            tail = side.recent if tails is None else tails[i]
            if tails is not None or self._to_pack:
                tail = mx.contiguous(tail)
            sides.append(
                CachedSide(
                    side.sink,
                    side.codes,
                    side.scale,
                    tail,
                    side.bits,
                    side.head_dim,
                    side.known_means,
                    side.segment,
                    side.balance,
                )
            )
        return KVView(*sides, counts, self.config.seed, self, self.version)

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """All tokens, [B, n_kv_heads, offset, D] of keys and of values, packed ones dequantized lazily.

        Raises ValueError while the cache is empty.
        """
        self.settle()
        if self._sides[0].recent is None:
            raise ValueError("the cache is empty: it does not know the shape of its keys and values yet")
        return self._fetch((self.n_sink, self.n_packed, self.n_recent))

    # ---- the rest of mlx-lm's contract -----------------------------------------------------------------------
    @property
    def keys(self) -> Optional[mx.array]:
        """All keys, [B, n_kv_heads, offset, Dk], packed ones restored lazily; None while empty. In what they take
        uncompressed: the cache's own bytes are `nbytes`.

        Setting it trims the cache to as many tokens and replaces those that differ. Raises TypeError or ValueError for
        more tokens, another shape or dtype, and a full window. (mlx-lm's own model files tie the cache's update to
        another computation in this way: they get and set the buffer of recent keys.)
        """
        return self._sides[0].recent if history.ties() else self._read(0)

    @keys.setter
    def keys(self, keys: Optional[mx.array]) -> None:
        if history.ties():
            self._sides[0].recent = keys
        else:
            self._assign(0, keys)

    @property
    def values(self) -> Optional[mx.array]:
        """All values, as `keys`."""
        return self._sides[1].recent if history.ties() else self._read(1)

    @values.setter
    def values(self, values: Optional[mx.array]) -> None:
        if history.ties():
            self._sides[1].recent = values
        else:
            self._assign(1, values)

    def _read(self, i):
        tokens = self._history(i)
        return None if tokens is None else history.History(tokens, self, i)

    def _assign(self, i, tokens):
        self.settle()
        history.assign(self, i, tokens)

    def _history(self, i):
        self.settle()
        return None if self.empty() else self._view((self.n_sink, self.n_packed, self.n_recent)).restore()[i]

    def is_trimmable(self) -> bool:
        return True

    def trim(self, n: int) -> int:
        """Remove the newest n tokens, or all if there are fewer. Returns how many were removed."""
        self.settle()
        trimmed = n = min(max(int(n), 0), self.offset)
        self.version += 1
        self._unread.clear()
        if n == self.offset:
            self._clear()
            return trimmed
        for name in ("n_recent", "n_packed", "n_sink"):
            take = min(n, getattr(self, name))
            setattr(self, name, getattr(self, name) - take)
            n -= take
        if trimmed and self.share is not None:
            self.share.after_trim(self, trimmed)
        if trimmed and self._observed:
            seen, *of_all = self._observed
            self._observed = (still_held(seen, self.offset), *of_all)
        if not self.n_packed:
            self._sides[0].balance = None
        return trimmed

    def make_mask(
        self, N: int, *, return_array: bool = False, window_size: Optional[int] = None
    ) -> Union[mx.array, str, None]:
        """The mask for the next N tokens, as of mlx_lm.models.cache.KVCache: None for a single token, "causal", or,
        with return_array or window_size, bool [N, offset + N]."""
        return attention_mask(N, self.offset, return_array, window_size)

    @classmethod
    def merge(cls, caches: Sequence[Any]) -> Any:
        """A batch cache whose rows are `caches` (BatchTurboKVCache; BatchRotatingTurboKVCache for windows): mlx-lm
        batches caches that have this method. Raises ValueError as BatchTurboKVCache.merge."""
        return cls.batch_class.merge(caches)

    def size(self) -> int:
        return self.offset

    def empty(self) -> bool:
        return self.offset == 0

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, unused room included, and of the queries that are held until the keys are balanced and
        auto has chosen."""
        self._settle()
        return sum(side.nbytes for side in self._sides) + sum(queries.nbytes for queries in self._observed_queries())

    def _counts(self):
        """(n_sink, n_packed, n_recent) of each sequence."""
        return [(self.n_sink, self.n_packed, self.n_recent)]

    def _seen_counts(self):
        """The same, of the tokens that a query sees."""
        return self._counts()

    def _columns_of_rows(self):
        """(n_sink, n_packed, n_recent) columns of the buffers, and for each row the columns of its tokens, in order."""
        counts = self.n_sink, self.n_packed, self.n_recent
        n_rows = 1 if self.empty() else self._sides[0].recent.shape[0]
        return counts, [np.arange(sum(counts))] * n_rows

    def not_finite(self) -> dict[str, list[int]]:
        """{"keys": [tokens of row 0, ...], "values": [...]}: how many tokens that a query sees are not finite in some
        head, or were too large for a float16 scale when they were packed. Found in the stored arrays: it costs nothing
        until it is called, and then waits for the tokens to be computed."""
        self.settle()
        columns, rows = self._columns_of_rows()
        seen = self._seen_counts()
        found: dict[str, list[int]] = {}
        for name, side in zip(("keys", "values"), self._sides):
            side = side.apart(*columns)
            buffers = side.sink, side.codes if side.scale is None else side.scale, side.recent
            parts = [(~mx.isfinite(a[:, :, :n])).any((1, 3)) for a, n in zip(buffers, columns) if n]
            bad = np.array(mx.concatenate(parts, axis=1)) if parts else np.zeros((len(rows), 0), bool)
            found[name] = []
            for b, row in enumerate(rows):
                n_sink, *others = seen[b % len(seen)]
                found[name].append(int(bad[b, row[:n_sink]].sum() + bad[b, row[len(row) - sum(others) :]].sum()))
        return found

    def report(self) -> dict[str, Any]:
        """What the cache holds, as a dict of plain values: scheme (auto's choice included); tokens, of which sink,
        packed and recent; nbytes; uncompressed_nbytes (what mlx-lm's KVCache, which grows by 256 tokens, would hold);
        packed_bits_per_value (of keys and values, from the arrays themselves); centred (sides with means); balance
        (of how many kv heads the channels of the keys are balanced, or why none); not_finite
        (see that method: this waits for the tokens to be computed); exact ({"keys": why, "values": why}, of sides that
        the scheme packs and that stay exact); auto (None, or how the bits were chosen); backend; attention (what
        it did with the tokens of the last update: "fused"; "tiles", "restored" or "exact" and why; "nothing yet")."""
        self.settle()
        values = packed_bits = uncompressed = 0
        n_tokens = [sum(counts) for counts in self._seen_counts()]
        n_sink, n_packed, n_recent = map(sum, zip(*self._seen_counts()))
        for side in self._sides:
            if side.recent is None:
                continue
            per_token = side.recent.shape[0] * side.recent.shape[1] * side.head_dim
            values += per_token
            uncompressed += self._uncompressed_capacity(max(n_tokens)) * per_token * side.recent.dtype.size
            side = side.apart(*self._buffer_counts())
            if side.codes is not None:
                arrays = [a for a in (side.codes, side.scale, side.means) if a is not None]
                packed_bits += 8 * sum(a.nbytes for a in arrays) / side.codes.shape[2]
        return {
            "scheme": Scheme(*(side.bits for side in self._sides)).name,
            "tokens": sum(n_tokens),
            "sink": n_sink,
            "packed": n_packed,
            "recent": n_recent,
            "nbytes": self.nbytes,
            "uncompressed_nbytes": uncompressed,
            "packed_bits_per_value": packed_bits / values if values else 0.0,
            "centred": [name for name, side in zip(("keys", "values"), self._sides) if side.means is not None],
            "balance": self._balance_report(),
            "not_finite": self.not_finite(),
            "exact": self._exact_because(),
            "auto": self._auto_report(),
            "backend": get_backend().describe(),
            "attention": self.last_attention or NOT_YET,
        }

    def _uncompressed_capacity(self, n_tokens):
        """Tokens for which mlx-lm's cache of this kind has room, once it holds n_tokens."""
        return -(-n_tokens // 256) * 256

    def _balance_report(self):
        keys = self._sides[0]
        if not self.config.balance or not keys.bits:
            return "off" if keys.bits else "keys are exact"
        if keys.balance is None and self.holds_latents:
            return "off: latents serve as keys and values"
        if keys.balance is None and np.any(self._no_queries):
            return "the memory budget had no room for queries"
        if keys.balance is None:
            return "no queries were seen before keys were packed" if any(c[1] for c in self._counts()) else NOT_YET
        changed = (keys.balance.factors != 1).any((2, 3))
        return f"{changed.sum().item()} of {changed.size} kv heads"

    def _auto_report(self):
        if not may_choose_bits(self.config) or "keys" in self._exact_because():
            return None
        return {"undecided": self._undecided, "target": auto_bits.TARGET, "error": dict(self._errors), "by": self._by}

    def _exact_because(self):
        asked = self.config.scheme.key_bits, self.config.scheme.value_bits
        return {
            name: f"head_dim {side.head_dim}, packed are {ALLOWED_HEAD_DIMS}"
            for name, side, bits in zip(history.NAMES, self._sides, asked)
            if side.recent is not None and bits_at(bits, side.head_dim) != bits
        }

    def to_kv_cache(self) -> Any:
        """The mlx-lm cache that this one takes the place of (KVCache, RotatingKVCache, BatchKVCache,
        BatchRotatingKVCache) with the same tokens, packed ones restored in the model's dtype.

        Raises ValueError in the middle of a padded prompt, and for a batch of windows with keep > 0, which mlx-lm
        does not support.
        """
        return converter("to_kv_cache")(self)

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> Any:
        """An mlx_lm QuantizedKVCache made of the restored tokens, as KVCache.to_quantized: mlx-lm's `kv_bits` calls it,
        and asking for both gives a warning. This cache stays as it is.

        Raises ValueError for bit widths MLX does not support and a head_dim that is no multiple of group_size, and
        NotImplementedError for windows and batches, which mlx-lm cannot quantize.
        """
        return converter("to_quantized")(self, group_size, bits)

    # ---- copies ----------------------------------------------------------------------------------------------
    def __copy__(self) -> Any:
        """A cache that goes its own way. It costs nothing: a buffer is copied when one of the two writes into it."""
        return copy.deepcopy(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = memo[id(self)] = type(self).__new__(type(self))
        vars(twin).update((name, copy.deepcopy(value, memo)) for name, value in vars(self).items())
        if twin.share is not None:
            twin.share.join(twin)
        return twin

    def __reduce__(self) -> Any:
        """For pickle: the `state`, and what that leaves out; packed tokens stay packed."""
        self.settle()
        own = {name: value for name, value in vars(self).items() if name not in _NOT_PICKLED}
        return _unpickled, (type(self), self.state, own)

    # ---- state -----------------------------------------------------------------------------------------------
    def _header(self, counts):
        scheme, config = self.config.scheme, self.config
        filled = sum(counts) > 0
        dims = [side.head_dim if filled else 0 for side in self._sides]
        dtypes = [select.EXACT_DTYPES.index(side.recent.dtype) if filled else 0 for side in self._sides]
        n_means = [0 if side.means is None else n_segments(counts[1], side.segment) for side in self._sides]
        return [
            self.magic,
            FORMAT_VERSION,
            scheme.key_bits,
            scheme.value_bits,
            config.sink,
            config.recent,
            config.block,
            config.seed,
            SCALES.index(config.scale),
            config.centre,
            config.auto,
            -1 if self._undecided else self._sides[0].bits if may_choose_bits(config) else scheme.key_bits,
            *counts,
            *dims,
            *dtypes,
            *n_means,
            config.balance,
            self._sides[0].balance is not None,
        ]

    def _arrays(self, counts):
        arrays, (n_sink, n_packed, n_recent) = [], counts
        for side in self._sides:
            side = side.apart(*counts)
            parts = (
                (side.sink, n_sink),
                (side.codes, n_packed),
                (side.scale, n_packed),
                (side.means, n_segments(n_packed, side.segment)),
                (side.recent, n_recent),
            )
            arrays += [a[:, :, :n] for a, n in parts if a is not None and n]  # never the object we write into
        balance = self._sides[0].balance
        return arrays if balance is None else [*arrays, balance.factors]

    @property
    def state(self) -> list[mx.array]:
        """Everything as a list of arrays: an int32 header, then per side sink, codes, scale, means and recent, cut to
        the tokens they hold, then the balance of the keys; what is not there is left out. Setting it raises ValueError
        for arrays that are not the state of such a cache."""
        self.settle()
        counts = self.n_sink, self.n_packed, self.n_recent
        return [mx.array(self._header(counts), mx.int32), *self._arrays(counts)]

    @state.setter
    def state(self, arrays: list[mx.array]) -> None:
        state = read_state(arrays, self)
        self.config, self._sides, self._undecided = state.config, state.sides, state.undecided
        self.n_sink, self.n_packed, self.n_recent = state.counts
        self.version, self.attended_version, self._unread = 0, None, Unread()
        self.last_attention = NOT_YET
        self._observed, self._errors, self._by, self._to_pack, self._choice = None, {}, None, [], None
        self._no_queries = False
        vars(self).update(state.own)
        self._arrange()
        self._evaluate()

    def own_state(self, header: dict[str, int], config: TurboConfig) -> dict[str, Any]:
        """The attributes that a subclass keeps in the header, for `read_state`. Raises ValueError for values that do
        not fit."""
        return {}

    @property
    def meta_state(self) -> str:  # mlx-lm 0.31 saves it; the header is in `state`
        return ""

    @meta_state.setter
    def meta_state(self, value: str) -> None:
        pass

    @classmethod
    def from_state(cls, state: list[mx.array], meta_state: Optional[str] = None) -> "TurboKVCache":
        """A cache from the `state` of another. Raises ValueError for arrays that are not one."""
        cache = cls.__new__(cls)
        cache.state = state
        return cache


def _unpickled(cls, state, own):
    cache = cls.from_state(state)
    vars(cache).update(own)
    return cache
