"""A budget of memory over the caches of a model, and of its draft model: exact while there is room, packed as far as
memory asks.

All caches that a budget is over share one `MemoryBudget`. Before an update in which buffers grow, it computes from
counts and shapes, without waiting for anything, what all of them will hold afterwards. If that is too much it takes
steps: the keys or the values of one layer, or both, to fewer bits, always the step that costs least per byte saved, and
never below the floor. If the floor does not hold the tokens either, the update is refused before anything is changed.

Keys and values of a layer are never more than a rung of the ladder apart (`reachable_pairs`), so that the kernels for
all pairs of bits can be built before the first token. A cache that comes from elsewhere may have another pair; its
first step leads to one of these.

What a step costs is the KL divergence that integration/bit_budget.py measured for each part of the model, or, if
nothing was measured, in proportion to the numbers and to the mean squared error of rounding them.

The buffers never take more than `limit`. Beside them there is, while a part is repacked or grows, its other copy: one
part at a time, of which a model of 32 layers has 64. So that a decode step repacks one part at most, the steps that the
next growth of the buffers (by 256 tokens) needs are taken one per token before it, as late as possible. A prompt chunk
takes all it needs at once, one part after the other.

A row that leaves a batch, the batch without it, and the copies by which mlx-lm divides a batch, are made of the same
buffers. None of them is computed until one is used, so that they take what the batch took (`Source`). Then all of them
get buffers of their own, one part after the other, and each part of the old ones goes before the next. By then the
batch has dropped the row, in most cases. If it has not, or a row is kept too, that is a copy, for which room is made.

Not counted is, as in mlx-lm, what an update computes with: restored tokens, and the working memory of a prompt chunk.
"""

import gc
import heapq
import itertools
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Optional

import mlx.core as mx

from ..backends import select
from ..backends.sides import are_latents
from ..quant.budget import LEAST_SHARE, WIDTHS, expected_errors
from ..quant.rotation import can_rotate
from ..quant.scheme import FLOOR, Prices, Scheme, words_per_row
from ..quant.sizes import size_name
from .attention_error import N_QUERIES
from .balancing import MOST_BITS
from .repacking import LADDER, Pair, floor_for, no_more, path_between, reachable_pairs, rungs

CHUNK = 2048  # tokens of a prompt that mlx-lm reads at a time, at most
PARTS_PER_TOKEN = 1  # repacked in a decode step, at most
BALANCED = 5  # arrays of as many numbers as a balance has that are made of it, at most, itself included
SIDES = "keys", "values"


class MemoryBudgetError(ValueError):
    """Tokens that do not fit in a memory budget, even with every part packed to the floor. n_fit: how many of them
    would."""

    def __init__(self, message: str, n_fit: int = 0) -> None:
        super().__init__(message)
        self.n_fit = n_fit


class Room(NamedTuple):
    """Tokens that the buffers of a cache have room for after an update: of sink and recent tokens, and n_packed packed
    ones, and whether all rows have packed. kept: packed tokens that the buffers have room for once they are replaced;
    None: they are not."""

    sink: int
    recent: int
    n_packed: int
    kept: Optional[int] = None
    all_packed: bool = True


class Shape(NamedTuple):
    """Of the tokens of a cache: rows, kv heads, head dims of keys and values, bytes of a number, whether they are of a
    kind that can be packed; n_heads: query heads whose queries are kept until the keys are packed, to balance them."""

    rows: int
    heads: int
    dims: tuple[int, int]
    itemsize: int
    can_pack: bool
    n_heads: int = 0

    @classmethod
    def of(cls, keys: mx.array, values: mx.array, n_heads: int = 0) -> "Shape":
        """Of keys and values [rows, heads, *, dim]."""
        (rows, heads), dims = keys.shape[:2], (keys.shape[3], values.shape[3])
        return cls(rows, heads, dims, keys.dtype.size, keys.dtype in select.DTYPES, n_heads)

    @property
    def queries_nbytes(self) -> int:
        """Bytes of the queries that are kept of each row, at most."""
        return self.n_heads * N_QUERIES * self.dims[0] * self.itemsize


class Group:
    """The caches of one prompt cache, which take each step together. pending: [(cache, its bits then)], the repacking
    that the next growth of their buffers needs, left: tokens until then."""

    def __init__(self) -> None:
        self.caches: list[weakref.ref[Any]] = []
        self.leader: Optional[weakref.ref[Any]] = None  # the cache whose update planned last
        self.planned: Any = None  # for which step
        self.seen: set[int] = set()  # layers that have taken it
        self.pending: list[tuple[weakref.ref[Any], Pair]] = []
        self.left = 0

    def alive(self) -> list[Any]:
        return [c for c in (r() for r in self.caches) if c is not None and c.share is not None]


class Source:
    """The buffers of a batch, of which caches are still to be computed. They count until that is done, and these do
    not. nbytes: of keys, with the queries that are kept to balance them, and of values."""

    def __init__(self, batch: Any) -> None:
        values = batch._sides[1].nbytes
        self.nbytes = batch.nbytes - values, values


class Layer(NamedTuple):
    """A layer of one of the models whose caches a budget is over. model: 0, or of a draft model 1."""

    model: int
    number: int

    def __str__(self) -> str:
        return f"layer {self.number}{' of the draft model' * (self.model > 0)}"


class Share:
    """A cache's share in a memory budget: which one, its layer, and the caches that take each step with it. shape: of
    one row's tokens, if it is known before they come. source: what the cache is still to be computed of. A copy of the
    cache has a share of its own; the caches that are copied together take their steps together."""

    def __init__(self, budget: "MemoryBudget", layer: Layer, group: Group, shape: Optional[Shape] = None) -> None:
        self.budget, self.layer, self.group, self.shape = budget, layer, group, shape
        self.source: Optional[Source] = None

    def __deepcopy__(self, memo: dict[Any, Any]) -> "Share":
        group = memo.setdefault((Group, id(self.group)), Group())
        twin = Share(self.budget, self.layer, group, self.shape)
        twin.source = self.source
        return twin

    def join(self, cache: Any) -> None:
        """Count `cache`, whose share this is, as long as it lives."""
        for caches in self.group.caches, self.budget.caches:
            if not any(ref() is cache for ref in caches):
                caches.append(weakref.ref(cache))

    def pass_on(self, cache: Any, *rows: Any) -> None:
        """Put `cache` under the same budget: it is made of rows whose groups are given, as the caches of the other
        layers will be."""
        group = self.budget.group_of(self.layer, rows or (self.group,))
        cache.share = Share(self.budget, self.layer, group, self.shape)
        cache.share.join(cache)

    def lend(self, cache: Any, to: Optional["Share"] = None) -> None:
        """The buffers of `cache`, whose share this is, become the source of itself, and of another cache with the share
        `to`: what is done to either is not computed before `MemoryBudget.separate`."""
        if self.source is None:
            self.source = Source(cache)
            self.budget.has_sources = True
        if to is not None:
            to.source = self.source

    def before_update(self, cache: Any, keys: mx.array, values: mx.array) -> None:
        """Make room for an update of `cache`. Raises MemoryBudgetError, with nothing changed, if there is none."""
        group, n_new = self.group, keys.shape[2]
        if cache.will_grow(n_new):
            n_heads = 0 if self.shape is None else self.shape.n_heads
            self.budget.plan(cache, n_new, Shape.of(keys, values, n_heads))
        elif group.pending and group.leader is not None and group.leader() is cache:
            group.left -= n_new
            if group.left <= len(group.pending):
                self.budget.take_pending(group, PARTS_PER_TOKEN * n_new)

    def after_trim(self, cache: Any, n: int) -> None:
        """Tokens of `cache` went, as after a rejected draft: the next growth is later."""
        if self.group.pending and self.group.leader is not None and self.group.leader() is cache:
            self.group.left += n


class _Held:
    """What a cache holds once an update is done, by the `bits` of its keys and values. now: those that they have.
    gives_up_queries: it holds none then. Arithmetic only."""

    def __init__(self, cache: Any, room: Optional[Room], shape: Optional[Shape]) -> None:
        self.cache, self.share = cache, cache.share
        self.bits: Sequence[int] = tuple(side.bits for side in cache._sides)
        self.room = room  # None: it stays as it is
        self.n_packed = cache.packed_columns if room is None else room.n_packed
        self.shape = shape or self._own_shape()
        self.gives_up_queries = False
        self.queries = self.most_queries(self.shape)
        self.fixed = 0
        if self.shape is not None:
            self.fixed = sum(map(self.exact, (0, 1)))
            self.bits = tuple(b if can_rotate(d) else 0 for b, d in zip(self.bits, self.shape.dims))
        self.now = self.bits
        self._packed: Any = {}

    def most_queries(self, shape: Optional[Shape]) -> int:
        """Bytes of the queries that it holds, or may hold of tokens with this shape before anything is computed
        again."""
        now = sum(q.nbytes for q in self.cache._observed_queries())
        if shape is None or not self.cache.repackable:
            return now
        return max(now, self.cache.n_rows_with_queries(shape.rows) * shape.queries_nbytes)

    def _own_shape(self):
        keys, values = (side.recent for side in self.cache._sides)
        known = self.share.shape
        return None if keys is None else Shape.of(keys, values, 0 if known is None else known.n_heads)

    def exact(self, i: int) -> int:
        """Bytes of the sink and recent tokens of keys (i = 0) or values (1)."""
        if self.shape is None:
            return 0
        side, room = self.cache._sides[i], self.room
        if side.in_one:
            n = side.recent.shape[2] - side.codes_capacity if room is None else room.sink + room.recent
            return self._vectors(i, n) * self.shape.itemsize
        if room is None:
            return sum(a.nbytes for a in (side.sink, side.recent) if a is not None)
        return self._vectors(i, room.sink + room.recent) * self.shape.itemsize

    def _vectors(self, i, n):
        return self.shape.rows * self.shape.heads * n * self.shape.dims[i]

    def packed(self, i: int, bits: int) -> int:
        """Bytes of the packed tokens of keys (i = 0) or values (1) at `bits`: codes, scales, means, balance, and of the
        queries that are kept."""
        key = i, bits
        if key not in self._packed:
            self._packed[key] = self._compute_packed(i, bits)
        return self._packed[key] + (0 if i else self.kept_queries(bits))

    def _compute_packed(self, i, bits):
        cache, shape = self.cache, self.shape
        side = cache._sides[i]
        same = bits == side.bits
        if self.room is None and same and not side.in_one:
            packed = (a for a in (side.codes, side.scale, side.means) if a is not None)
            return sum(a.nbytes for a in packed) + self._balance(i, bits)
        if shape is None or not self.n_packed and not side.codes_capacity:
            return 0
        now = cache.packed_columns
        held = self.room.kept if self.room is not None else None
        if held is None:
            held = side.codes_capacity
        if not same and not now:
            held = 0  # what has room for other tokens is given up
        capacity = held if self.n_packed <= held else -(-self.n_packed // cache.step) * cache.step
        lines = shape.rows * shape.heads * capacity
        if not bits:
            return lines * shape.dims[i] * shape.itemsize
        n = lines * (4 * words_per_row(bits, shape.dims[i]) + 2)
        return n + self._means(i, same and now > 0) + self._balance(i, bits)

    def kept_queries(self, bits: Optional[int] = None) -> int:
        """Bytes of the queries that are kept until keys are packed; these are at `bits`, if given."""
        all_packed = self.cache.all_packed if self.room is None else self.room.all_packed
        is_used = (self.bits[0] if bits is None else bits) and self.n_packed and all_packed
        return 0 if is_used or self.gives_up_queries else self.queries

    def _means(self, i, known):
        """Bytes of the means; as long as nobody knows whether there are any, of those that there may be."""
        side, cache = self.cache._sides[i], self.cache
        may = cache.config.centre and not are_latents(self.shape.heads, *self.shape.dims)
        if side.means is None if known or (side.bits and cache.packed_columns) else not may:
            return 0
        step = max(cache.step // side.segment, 1)
        needed = -(-(-(-self.n_packed // side.segment)) // step) * step
        held = 0 if side.means is None else side.means.shape[2]
        return 2 * self._vectors(i, max(needed, held))

    def _balance(self, i, bits):
        balance = self.cache._sides[i].balance
        if balance is not None:
            return sum(a.nbytes for a in balance.arrays())
        if i or not bits or not self.cache.config.balance or self.cache._sides[i].bits and self.cache.packed_columns:
            return 0
        return 0 if self.shape is None else 4 * BALANCED * self._vectors(0, 1)

    @property
    def nbytes(self) -> int:
        return self.fixed + sum(self.packed(i, bits) for i, bits in enumerate(self.bits))

    def saved(self, pair: Pair) -> int:
        """Bytes that it would hold less at other bits."""
        (keys, values), (had_keys, had_values) = pair, self.bits
        return self.packed(0, had_keys) - self.packed(0, keys) + self.packed(1, had_values) - self.packed(1, values)

    def can_step(self, i: int) -> bool:
        """Whether keys or values have packed tokens that may take fewer bits."""
        shape = self.shape
        return shape is not None and shape.can_pack and self.n_packed > 0 and can_rotate(shape.dims[i])


class OfModel:
    """What a budget knows of a model whose caches it is over. prices: as of TurboConfig. model: gives it, or None when
    it is gone. shapes: of its caches, by their number among the compressed ones, if they are known."""

    def __init__(self, prices: Optional[Prices], model: Callable[[], Any] = lambda: None) -> None:
        self.prices, self.model = prices, model
        self.shapes: Optional[dict[int, Shape]] = None


class MemoryBudget:
    """A budget over all caches that share it. limit: bytes. floor: the fewest bits of keys and values. prices: as of
    TurboConfig. models: whose caches they are, a draft model last."""

    def __init__(self, limit: int, floor: Scheme = FLOOR, prices: Optional[Prices] = None) -> None:
        self.limit, self.floor = limit, floor
        self.caches: list[weakref.ref[Any]] = []  # in the order in which they came: what is done depends on it
        self.others: list[Callable[[], int]] = []  # bytes that are held elsewhere, and count
        self.evict: list[Callable[[], bool]] = []  # each frees something that can be had again, or returns False
        self.has_sources = False  # whether there are caches that are still to be computed
        self.n_plans = 0
        self._groups: weakref.WeakValueDictionary[Any, Group] = weakref.WeakValueDictionary()
        self._errors: dict[tuple[Layer, int, int], list[float]] = {}
        self._reachable: dict[Any, tuple[list[Pair], list[Pair]]] = {}
        self.models: list[OfModel] = []
        self.add_model(OfModel(prices))

    def __deepcopy__(self, memo: Any) -> "MemoryBudget":
        return self

    def add_model(self, model: OfModel) -> None:
        """Let this budget be over the caches of another model too."""
        self.models.append(model)
        self._errors.clear()
        measured = [expected_errors(side)[WIDTHS.index(4)] for side in self._every_price()]
        self._least = LEAST_SHARE * sum(measured) / len(measured) if measured else 0.0

    def _every_price(self):
        """{width: nats} of each part that was measured."""
        return [dict(side) for of in self.models for of_layer in of.prices or () for side in of_layer if side]

    def add(
        self, caches: Iterable[tuple[int, Any]], shapes: Mapping[int, Shape] = MappingProxyType({}), model: int = 0
    ) -> None:
        """Put caches that take each step together under this budget: (layer, cache) of each. shapes: by the number of a
        cache among these, the `Shape` that its tokens will have, as far as it is known. model: which of `models`."""
        group = Group()
        for number, (layer, cache) in enumerate(caches):
            cache.share = Share(self, Layer(model, layer), group, shapes.get(number))
            cache.repackable = number in shapes  # what it keeps to balance keys by is in the arithmetic then
            cache.share.join(cache)

    def group_of(self, layer: Layer, rows: Sequence[Any]) -> Group:
        """The group of caches that are made of the same rows, layer by layer."""
        key = tuple((id(row[0]), *row[1:]) if isinstance(row, tuple) else id(row) for row in rows)
        group = self._groups.get(key)
        if group is None or any(cache.share.layer == layer for cache in group.alive()):
            group = self._groups[key] = Group()
        return group

    # ---- arithmetic ----------------------------------------------------------------------------------------------
    def alive(self) -> list[Any]:
        """The caches that there are."""
        found = [(r, c) for r, c in ((r, r()) for r in self.caches) if c is not None and c.share is not None]
        self.caches = [r for r, _ in found]
        return [c for _, c in found]

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers under the budget."""
        caches = self.alive()
        own = sum(c.nbytes for c in caches if c.share.source is None)
        of_sources = sum(
            sum(source.nbytes) for source in {c.share.source for c in caches if c.share.source is not None}
        )
        return own + of_sources + sum(other() for other in self.others)

    def _lowest(self, i):
        return (self.floor.key_bits, self.floor.value_bits)[i]

    def _pairs(self, held):
        """The bits that the keys and values of a cache may have, most bits first."""
        return self._allowed(held)[0]

    def _steps(self, held):
        """The bits that a cache may take next."""
        return self._allowed(held)[1]

    def _allowed(self, held):
        lowest = tuple(self._lowest(i) if held.can_step(i) else 0 for i in (0, 1))
        key = lowest, held.bits
        if key not in self._reachable:
            pairs = reachable_pairs(floor_for(Scheme(*lowest), Scheme(*held.bits)))
            self._reachable[key] = pairs, [p for p in pairs if p != held.bits and no_more(p, held.bits)]
        return self._reachable[key]

    def _error(self, held, i, bits):
        """What keys or values of a cache cost at `bits`: nats, or numbers if nothing was measured."""
        if not bits:
            return 0.0
        layer, numbers = held.share.layer, held.shape.heads * held.shape.dims[i]
        key = layer, i, numbers
        if key not in self._errors:
            self._errors[key] = expected_errors(self._measured(layer, i) or {4: float(numbers)}, self._least)
        return self._errors[key][WIDTHS.index(bits)]

    def _errors_of(self, held, pair):
        return sum(self._error(held, i, bits) for i, bits in enumerate(pair))

    def _measured(self, layer, i):
        """{width: nats} of a part; of one that was not measured, as of the dearest."""
        prices = self.models[layer.model].prices or ()
        own = dict(prices[layer.number][i]) if layer.number < len(prices) else {}
        return own or max(self._every_price(), key=lambda side: expected_errors(side)[WIDTHS.index(4)], default=None)

    def _total(self, table):
        return sum(held.nbytes for held in table) + sum(other() for other in self.others)

    def _fits(self, table):
        return self._total(table) <= self.limit

    def _next_steps(self, table):
        """A heap of each cache's best step: (price per byte saved, number of the cache, bits)."""
        heap: list[tuple[float, int, Pair]] = []
        for number, held in enumerate(table):
            self._push(heap, number, held)
        return heap

    def _push(self, heap, number, held):
        best = None
        for pair in self._steps(held):
            saved = held.saved(pair)
            if saved > 0:
                price = (self._errors_of(held, pair) - self._errors_of(held, held.bits)) / saved
                best = (price, number, pair) if best is None or price < best[0] else best
        if best is not None:
            heapq.heappush(heap, best)

    def _take_steps(self, table, fits=None):
        """Lower the bits in `table` until it fits, or nothing is left; then give up the queries that are kept, and take
        back what the last, large steps made unnecessary. Returns the parts that changed, in the order of their caches'
        first steps."""
        heap, taken, fits = self._next_steps(table), [], fits or (lambda: self._fits(table))
        while heap and not fits():
            _, number, pair = heapq.heappop(heap)
            held = table[number]
            taken.append((held, held.bits, pair))
            held.bits = pair
            self._push(heap, number, held)
        for held in sorted(filter(_Held.kept_queries, table), key=self._price_of_balance):
            if fits():
                break
            held.gives_up_queries = True
        if fits():
            for held, before, after in reversed(taken):
                if held.bits == after:
                    between = [p for p in self._pairs(held) if no_more(after, p) and no_more(p, before)]
                    for held.bits in sorted({before, *between}, key=lambda pair: self._errors_of(held, pair)):
                        if held.bits == after or fits():
                            break
        changed = {id(held): held for held, _, _ in taken}
        return [(held, i) for held in changed.values() for i in (0, 1) if held.bits[i] != held.now[i]]

    def _price_of_balance(self, held):
        """What it costs to pack the keys of a cache without balance, per byte of its queries, as far as that is known:
        those that cost more to pack lose more."""
        return self._error(held, 0, MOST_BITS) / held.kept_queries()

    # ---- steps ---------------------------------------------------------------------------------------------------
    def plan(self, cache: Any, n_new: int, shape: Shape) -> None:
        """Make room for n_new tokens in `cache` and in those that take the step with it. Raises MemoryBudgetError, with
        nothing changed, if there is none."""
        group, layer = cache.share.group, cache.share.layer
        step = cache.step_key(), n_new, self.n_plans
        if group.planned == step and layer not in group.seen:  # the first one of the step planned for all
            group.seen.add(layer)
            return
        growing = self._growing(cache, shape)
        table = self._table(growing, n_new)
        while not self._fits(table) and any(evict() for evict in self.evict):
            del table  # it holds the caches
            gc.collect()
            table = self._table(growing, n_new)
        changed = self._take_steps(table)
        if self._total(table) > self.limit:
            self._refuse(growing, n_new)
        self.n_plans += 1
        group.planned, group.seen = (*step[:2], self.n_plans), {layer}
        group.leader, group.pending = weakref.ref(cache), []
        self._give_up_queries(table)
        for held, i in changed:
            self._repack(held.cache, i, held.bits[i])
        self._look_ahead(group, growing, n_new)

    def make_fit(self) -> bool:
        """Evict and pack as far as what there is asks, and compute what is still to be computed. False, with nothing
        packed, if the floor does not hold it."""
        table = [_Held(cache, None, None) for cache in self.alive()]
        while not self._fits(table) and any(evict() for evict in self.evict):
            del table
            gc.collect()
            table = [_Held(cache, None, None) for cache in self.alive()]
        changed = self._take_steps(table)
        if not self._fits(table):
            return False
        self._compute(table, changed)
        return True

    def separate(self) -> None:
        """Give caches that are still to be computed buffers of their own. Raises MemoryBudgetError, with nothing
        changed, if the floor does not hold all of them."""
        if self.has_sources and not self.make_fit():
            raise MemoryBudgetError(
                f"memory: rows that were taken out of a batch are still in it too, and with every layer at "
                f"{self.floor.name}, the floor, the budget of {self.limit:,} bytes ({size_name(self.limit)}) does not "
                "hold both. Drop some, or allow more memory or a lower floor"
            )

    def _compute(self, table, changed):
        """Repack what changed, and compute what is still to be computed: one part after the other of the caches that
        have a source in common, those that free most first. Each part of a source goes before the next."""
        steps = {(id(held), i) for held, i in changed}
        self._give_up_queries(table)

        def repack(held: _Held, i: int) -> None:
            if (id(held), i) in steps:
                self._repack(held.cache, i, held.bits[i])

        of_sources: dict[Source, list[_Held]] = {}
        for held in table:
            if held.share.source is not None:
                of_sources.setdefault(held.share.source, []).append(held)
        parts = []
        for number, (source, made) in enumerate(of_sources.items()):
            for i in (0, 1):
                more = sum(held.exact(i) + held.packed(i, held.bits[i]) for held in made) - source.nbytes[i]
                parts.append((more, number, i, made))
        alone = [(held, i) for held, i in changed if held.share.source is None]
        self.has_sources = False
        for held in itertools.chain(*of_sources.values()):
            held.share.source = None
        for held, i in alone:
            repack(held, i)
        for _, _, i, made in sorted(parts, key=lambda part: part[:3]):
            mx.eval([held.cache.side_started(i) for held in made])
            for held in made:
                repack(held, i)

    def before_join(
        self, joined: Any, room: Room, shape: Shape, parts: Sequence[Any], leaving: Sequence[Any] = ()
    ) -> None:
        """Make room for a batch that is to be made of `parts`, caches under this budget, beside everything there is.
        joined: such a batch without tokens. room, shape: of its buffers. leaving: the parts that it takes the place of.
        Raises MemoryBudgetError, with no cache changed, if there is none."""
        new = _Held(joined, room, shape)
        while True:
            table = [_Held(cache, None, None) for cache in self.alive()]
            of_parts = [held for held in table if any(held.cache is part for part in parts)]
            gone = [held for held in of_parts if any(held.cache is part for part in leaving)]
            queries = [held.most_queries(shape._replace(rows=1)) for held in of_parts]

            def taken(table=table, of_parts=of_parts, gone=gone, queries=queries) -> int:
                new.bits = [min((held.bits[i] for held in of_parts), key=lambda bits: bits or 16) for i in (0, 1)]
                new.queries = sum(n for held, n in zip(of_parts, queries) if not held.gives_up_queries)
                return self._total(table) - sum(held.nbytes for held in gone) + new.nbytes

            if taken() <= self.limit or not any(evict() for evict in self.evict):
                break
            del table, of_parts, gone, taken
            gc.collect()
        changed = self._take_steps(table, lambda: taken() <= self.limit)
        if taken() > self.limit:
            raise MemoryBudgetError(
                f"memory: a batch of {shape.rows} rows, made of others, takes {taken():,} bytes with what there is "
                f"beside it and every layer at {self.floor.name}, the floor, and the budget is {self.limit:,} "
                f"({size_name(self.limit)}). Allow more memory, a lower floor or fewer requests at a time"
            )
        self._give_up_queries(table)
        for held, i in changed:
            self._repack(held.cache, i, held.bits[i])

    def _growing(self, cache, shape):
        """{id: (cache, shape)} of a cache that is to be updated, and of those that will be with it. The shape of one
        without tokens is taken to be that of a cache of its kind, if it is not known."""
        found = {id(cache): (cache, shape)}
        kind = type(cache), getattr(cache, "max_size", None)
        for peer in cache.share.group.alive():
            if peer is cache or peer.step_key() != cache.step_key():
                continue
            if peer._sides[0].recent is not None:
                found[id(peer)] = peer, None
            elif peer.share.shape is not None:
                found[id(peer)] = peer, peer.share.shape._replace(rows=shape.rows)
            elif (type(peer), getattr(peer, "max_size", None)) == kind:
                found[id(peer)] = peer, shape
        return found

    def _table(self, growing, n_new, chunk=None):
        """After n_new more tokens, which come at once, or in chunks of at most so many."""
        table = []
        for cache in self.alive():
            _, shape = growing.get(id(cache), (None, None))
            n = n_new if chunk is None else cache.held_of(n_new, chunk)
            table.append(_Held(cache, cache.room_after(n) if id(cache) in growing else None, shape))
        return table

    def _lowered(self, growing, n_new, chunk=None):
        """Bytes of everything with every part at the floor and no queries kept, after n_new more tokens."""
        table = self._table(growing, n_new, chunk)
        for held in table:
            held.bits = max([held.bits, *self._steps(held)], key=held.saved)
            held.gives_up_queries = True
        return self._total(table)

    def _refuse(self, growing, n_new):
        needed, low = self._lowered(growing, n_new), self._most(growing, n_new)
        (cache, _), *_ = growing.values()
        raise MemoryBudgetError(
            f"memory: {n_new} more tokens after {cache.size()} take {needed:,} bytes with every layer at "
            f"{self.floor.name}, the floor, and the budget is {self.limit:,} ({size_name(self.limit)}); "
            f"{low} of them fit. Allow more memory, a lower floor or fewer tokens",
            low,
        )

    def _most(self, growing, high, chunk=None):
        """The most tokens, fewer than `high`, that fit at the floor."""
        return _largest(lambda n: self._lowered(growing, n, chunk) <= self.limit, high)

    def tokens_that_fit(self, caches: Sequence[Any], most: int = 2**40, chunk: int = CHUNK) -> Optional[int]:
        """How many more tokens the caches of one prompt cache can take, in chunks of at most `chunk`, with everything
        else as it is, before the floor holds no more; None: `most`, or as many as one likes. Caches whose shapes are
        not known yet count nothing."""
        fits = self._most(self._known(caches), most + 1, chunk)
        return None if fits == most else fits

    def _known(self, caches):
        """As `_growing`, of the caches whose shapes are known."""
        growing = {}
        for cache in caches:
            if cache._sides[0].recent is not None or cache.share.shape is not None:
                growing[id(cache)] = cache, None if cache._sides[0].recent is not None else cache.share.shape
        return growing

    def nbytes_after(self, caches: Sequence[Any], n: int, chunk: int = CHUNK) -> int:
        """Bytes of everything after n more tokens in the caches of one prompt cache, in chunks of at most `chunk`, if
        nothing is packed further."""
        return self._total(self._table(self._known(caches), n, chunk))

    def needs_no_step(self, caches: Sequence[Any], n: int, chunk: int = CHUNK) -> bool:
        """Whether the caches of one prompt cache can take n more tokens, in chunks of at most `chunk`, with nothing
        packed further, neither for these nor ahead of the next growth of the buffers."""
        ahead = 2 * len(LADDER) * len(caches)  # tokens before a growth in which parts are packed for it, at most
        return self.nbytes_after(caches, n + ahead, chunk) <= self.limit

    def stages(self, caches: Sequence[Any]) -> list[tuple[int, Optional[int]]]:
        """(bits, tokens) of each rung of the ladder, most bits first: how many tokens the caches of one prompt cache
        can take, in chunks of at most CHUNK, with no part at fewer bits; None: as many as one likes. What counts is as
        for `tokens_that_fit`."""
        lowest = min(self._lowest(0), self._lowest(1)) or max(self._lowest(0), self._lowest(1))
        found = []
        for bits in [b for b in LADDER if not b or b > lowest] + [lowest] * (lowest > 0):

            def fits(n: int, bits: int = bits) -> bool:
                table = self._table(self._known(caches), n, CHUNK)
                for held in table:
                    allowed = [[b for b in rungs(self._lowest(i)) if b >= bits > 0] for i in (0, 1)]
                    held.bits = tuple(
                        of_side[-1] if of_side and held.can_step(i) else held.bits[i]
                        for i, of_side in enumerate(allowed)
                    )
                if not self._fits(table) and not self._next_steps(table):  # the queries go last
                    for held in table:
                        held.gives_up_queries = True
                return self._fits(table)

            most = _largest(fits, 2**40)
            found.append((bits, None if most == 2**40 - 1 else most))
        return found

    def _look_ahead(self, group, growing, n_new):
        """Note which steps the next growth of the buffers by single tokens will need."""
        ahead = {key: (c, c.next_growth(n_new)) for key, (c, _) in growing.items()}
        left = min((found[0] for _, found in ahead.values() if found is not None), default=None)
        if left is None:
            return
        table = []
        for cache in self.alive():
            room, shape = None, None
            if id(cache) in growing:
                _, found = ahead[id(cache)]
                room, shape = cache.room_after(n_new), growing[id(cache)][1]
                if found is not None and found[0] == left:
                    room = room._replace(n_packed=found[1])
            table.append(_Held(cache, room, shape))
        changed = {id(held): held for held, _ in self._take_steps(table)}
        group.left = left
        paths = [(weakref.ref(held.cache), self._path(held, held.bits)) for held in changed.values()]
        group.pending = [(ref, pair) for ref, path in paths for pair in path]

    def _path(self, held, pair):
        return path_between(held.now, pair, self._pairs(held))

    def take_pending(self, group: Group, n: int) -> None:
        """Take the next n of the steps that were noted."""
        for _ in range(min(n, len(group.pending))):
            ref, pair = group.pending.pop(0)
            cache = ref()
            if cache is None or cache.share is None:
                continue
            for i, (side, bits) in enumerate(zip(cache._sides, pair)):
                if bits != side.bits and no_more([bits], [side.bits]):
                    self._repack(cache, i, bits)

    @staticmethod
    def _give_up_queries(table):
        for held in table:
            if held.gives_up_queries:
                held.cache.give_up_queries()

    def _repack(self, cache, i, bits):
        """Waits for the result, so that no more than one part exists twice."""
        cache.repack(**{("key_bits", "value_bits")[i]: bits})

    # ---- looking at it -------------------------------------------------------------------------------------------
    def report(self) -> dict[str, Any]:
        """What it holds and what was done, as a dict of plain values: limit and nbytes; caches: how many are counted;
        floor; priced_by; layers: {layer: [schemes that its caches have]}, and draft_layers: those of a draft model;
        without_queries, and draft_without_queries: layers of which a cache holds no queries, as there was no room: keys
        that were not packed by then are not balanced; next: the step that comes next, with layer, is_draft, side, bits
        before and after, bytes that it saves now; None if none is left."""
        table = [_Held(cache, None, None) for cache in self.alive() if not cache.empty()]
        layers: list[dict[int, list[str]]] = [{}, {}]
        for held in table:
            name, layer = Scheme(*held.bits).name, held.share.layer
            if name not in layers[layer.model].setdefault(layer.number, []):
                layers[layer.model][layer.number].append(name)
        heap = self._next_steps(table)

        def given_up(model: int) -> list[int]:
            rows = ((held, held.shape.rows) for held in table if held.share.layer.model == model)
            return sorted({held.share.layer.number for held, n in rows if held.cache.n_rows_with_queries(n) < n})

        return {
            "limit": self.limit,
            "nbytes": self.nbytes,
            "caches": len(table),
            "floor": self.floor.name,
            "priced_by": "KL divergence" if self._every_price() else "numbers",
            "layers": dict(sorted(layers[0].items())),
            "draft_layers": dict(sorted(layers[1].items())),
            "without_queries": given_up(0),
            "draft_without_queries": given_up(1),
            "next": self._describe_step(table, heap[0]) if heap else None,
        }

    def _describe_step(self, table, step):
        _, number, pair = step
        held = table[number]
        first, (model, layer) = self._path(held, pair)[0], held.share.layer
        i = 0 if first[0] != held.now[0] else 1
        return {
            "layer": layer,
            "is_draft": model > 0,
            "side": SIDES[i],
            "from": held.now[i],
            "to": first[i],
            "saves": held.packed(i, held.now[i]) - held.packed(i, first[i]),
        }

    def describe(self) -> str:
        """`report` in one line."""
        r = self.report()
        text = f"budget of {size_name(r['limit'])}, {r['nbytes']:,} bytes used, floor {r['floor']}"
        text += ", priced by KL divergence" if r["priced_by"] != "numbers" else ", every number priced alike"
        named = _by_schemes(r["layers"])
        if of_draft := _by_schemes(r["draft_layers"]):
            named += [f"of the draft model {of_draft[0]}", *of_draft[1:]]
        text += f": {', '.join(named)}" * bool(named)
        if (step := r["next"]) is not None:
            before = f"{step['from']} bits" if step["from"] else "exact"
            text += f"; next: {step['side']} of {Layer(int(step['is_draft']), step['layer'])} from {before} to "
            text += f"{step['to']} bits"
        elif named:
            text += "; no step would save anything now"
        for name, of in ("without_queries", ""), ("draft_without_queries", " of the draft model"):
            if r[name]:
                text += f"; queries given up in layers {_ranges(r[name])}{of}: their keys are packed without balance"
        return text


def _largest(fits, high):
    """The largest number below `high` that fits; 0 if none does."""
    low = 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _by_schemes(layers):
    """Which layers have which schemes, in words."""
    found: dict[str, list[int]] = {}
    for layer, schemes in layers.items():
        found.setdefault(" and ".join(schemes), []).append(layer)
    return [f"{_scheme_text(s)} in layers {_ranges(which)}" for s, which in found.items()]


def _scheme_text(schemes):
    return " and ".join("exact" if s == "turbo0" else s for s in schemes.split(" and "))


def _ranges(numbers):
    """[0, 1, 2, 5] as "0-2, 5"."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
