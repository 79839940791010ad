"""What single caches and batches share, as functions on plain data: the buffers of a side, writing into them, and
packing tokens, which is deciding where to center, computing the means, and quantizing."""

import copy
from typing import Any, NamedTuple, Optional, Sequence

import mlx.core as mx
import numpy as np

from ..backends import select
from ..backends.select import QuantizeSide
from ..backends.sides import ONE_SEGMENT, Balance, are_latents
from ..quant.rotation import can_rotate
from ..quant.scheme import Scheme, TurboConfig
from . import centering
from .joined import Tokens

Buffer = Any  # an mx.array, or None: which it is follows from the token counts


class Side:
    """The keys or the values of a cache: buffers, each with room for more tokens than it holds.

    sink, recent: model dtype [B, H, capacity, D]. codes: uint32 [B, H, capacity, words], or with 0 bits the exact
    vectors [B, H, capacity, D]. scale: float16 [B, H, capacity, 1], or None with 0 bits. stored_means: float16 [B, H,
    segments, D], rotated (centering.py), or None; 0 for heads that are not centered. balance: of the channels
    (balancing.py), or None.

    in_one: all tokens are exact and lie in `recent`, in their columns, as in mlx-lm's cache; sink and codes are None.
    ends: tokens of its capacity that are for sink and recent ones then.

    Which rows are centered is computed when their first tokens are packed, and read later (`settle`): so that the GPU
    is not waited for in between, their means, which may be 0, are stored until then.
    """

    def __init__(self, bits: int, segment: int) -> None:
        self.bits, self.segment = bits, segment
        self.sink: Buffer = None
        self.codes: Buffer = None
        self.scale: Buffer = None
        self.recent: Buffer = None
        self.stored_means: Buffer = None
        self.balance: Optional[Balance] = None
        self.in_one, self.ends = False, 0
        self._centered: list[bool] = []
        self._unread: list[tuple[list[int], list[mx.array]]] = []  # rows, and `Begun.rows` of them

    # ---- means ---------------------------------------------------------------------------------------------------
    def settle(self) -> None:
        """Read which rows are centered, where that was not done yet; without any, there are no means. Waits for it to
        be computed."""
        if not self._unread:
            return
        for rows, centered in self._unread:
            for b, yes in zip(rows, flags_of(centered)):
                self._centered[b] = yes
        self._unread = []
        if not any(self._centered):
            self.stored_means = None

    @property
    def means(self) -> Buffer:
        """`stored_means` once it is known who needs them: None if no row is centered."""
        self.settle()
        return self.stored_means

    @means.setter
    def means(self, means: Buffer) -> None:
        self.stored_means, self._unread = means, []

    @property
    def known_means(self) -> Buffer:
        """`stored_means` if a row is known to be centered: what attention needs in the update in which rows pack their
        first tokens, which it still finds exact."""
        return self.stored_means if not self._unread or any(self._centered) else None

    @property
    def centered(self) -> list[bool]:
        """For each row of a batch, whether any of its heads is centered."""
        self.settle()
        return self._centered

    @centered.setter
    def centered(self, rows: list[bool]) -> None:
        self._centered, self._unread = rows, []

    def may_have_means(self, b: int) -> bool:
        """Whether row b is centered, or nobody has looked yet."""
        return self._centered[b] or any(b in rows for rows, _ in self._unread)

    def begin(self, rows: list[int], begun: "Optional[Begun]") -> None:
        """`rows` have packed their first tokens, which decided this: None, that they are not centered."""
        for b in rows:
            self._centered[b] = False
        if begun is not None:
            self._unread.append((rows, begun.rows))

    def set_means(self, means: Buffer, begun: "Optional[Begun]") -> None:
        """The means of all rows, and what their first tokens decided, if it is these that were packed."""
        self.means = means
        if begun is not None:
            self._centered = [False] * means.shape[0]
            self.begin(list(range(means.shape[0])), begun)

    # ---- all buffers ---------------------------------------------------------------------------------------------
    def started(self) -> list[mx.array]:
        """Everything that was begun, to be computed: the buffers, and which rows are centered."""
        return [*self._buffers(self.stored_means), *(part for _, centered in self._unread for part in centered)]

    @property
    def head_dim(self) -> int:
        return self.recent.shape[-1]

    def buffers(self) -> list[mx.array]:
        """All that is held."""
        return self._buffers(self.means)

    def _buffers(self, means):
        balance = [] if self.balance is None else self.balance.arrays()
        buffers = self.sink, self.codes, self.scale, self.recent, means, *balance
        return [a for a in buffers if a is not None]

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.buffers())

    @property
    def codes_capacity(self) -> int:
        """Number of packed tokens, or what would be packed, that there is room for."""
        if self.in_one:
            return 0 if self.recent is None else self.recent.shape[2] - self.ends
        return 0 if self.codes is None else self.codes.shape[2]

    def write_in_one(self, at: int, new: mx.array, ends: int, n_packed: int, step: int) -> None:
        """Write tokens into the one buffer, from column `at` on. It has room for as many as the buffers of sink, packed
        and recent ones would have: `ends` and a multiple of step."""
        held = self.codes_capacity if self.ends == ends else 0
        capacity = ends + max(held, -(-n_packed // step) * step)
        buffer = self.recent
        if buffer is not None and buffer.shape[2] != capacity:
            buffer = buffer[:, :, :at]
        self.recent, self.ends = write(buffer, at, new, capacity), ends

    def apart(self, n_sink: int, n_packed: int, n_recent: int) -> "Side":
        """This side, or of one whose tokens lie in one buffer another with slices of it, for these counts."""
        if not self.in_one or self.recent is None:
            return self
        side, (front, end) = copy.copy(self), (n_sink + n_packed, n_sink + n_packed + n_recent)
        side.in_one = False
        side.sink = self.recent[:, :, :n_sink] if n_sink else None
        side.codes = self.recent[:, :, n_sink:front] if n_packed else None
        side.recent = self.recent[:, :, front:end]
        return side

    def to_pack(self, means: Optional[mx.array]) -> "SideToPack":
        """How rows with these means are packed."""
        return SideToPack(self.bits, self.segment, means, self.balance)


def make_sides(config: TurboConfig, key_bits: Optional[int] = None) -> list[Side]:
    """Empty keys and values. key_bits: what auto chose, if it has. Raises ValueError for a configuration of a whole
    model."""
    if config.of_all_layers:
        config.check_chosen()
        raise ValueError(
            "schemes: these are of a whole model, for make_prompt_cache; a cache gets config.for_layer(i, n)"
        )
    bits = config.scheme.key_bits if key_bits is None else key_bits, config.scheme.value_bits
    return [Side(b, centering.segment_of(i)) for i, b in enumerate(bits)]


def bits_at(bits: int, head_dim: int) -> int:
    """The bits of a side whose configuration says `bits`: 0, that is exact, at a head_dim that cannot be packed."""
    return bits if can_rotate(head_dim) else 0


def may_choose_bits(config: TurboConfig) -> bool:
    """Whether auto chooses the bits of the keys."""
    return config.auto and config.scheme.key_bits > 0


def allowed_dtypes(config: TurboConfig) -> Sequence[mx.Dtype]:
    """What can be stored: integers too where nothing is ever rounded, as in mlx-lm's KVCache."""
    return select.EXACT_DTYPES if config.scheme == Scheme(0, 0) else select.DTYPES


def n_segments(n_tokens: int, segment: int) -> int:
    """How many segments n_tokens packed tokens lie in; the last one may be incomplete."""
    return -(-n_tokens // segment)


# ---- buffers ---------------------------------------------------------------------------------------------------------
def write(buffer: Buffer, at: int, new: mx.array, step: int) -> mx.array:
    """`buffer` [B, H, capacity, *] with `new` [B, H, n, *] written from token `at` on: in place if it fits, else in
    a copy with room for a multiple of `step` tokens. The tokens of a head are contiguous, as the kernels read them."""
    end = at + new.shape[2]
    fits = buffer is not None and end <= buffer.shape[2]
    capacity = buffer.shape[2] if fits else max(-(-end // step), 1) * step
    if at == 0 and end == capacity:
        return mx.contiguous(new)  # written whole, a buffer would take over the strides of `new`
    if not fits:
        room = mx.zeros((*new.shape[:2], capacity - at, new.shape[3]), new.dtype)
        buffer = room if at == 0 else mx.concatenate([buffer[:, :, :at], room], axis=2)
    if new.shape[2]:
        buffer[:, :, at:end] = new
    return buffer


def write_rows(buffer: Buffer, n_rows: int, rows: list[int], at: int, new: mx.array, step: int) -> mx.array:
    """`buffer` [n_rows, H, capacity, *] with new [len(rows), H, n, *] written to `rows` from token `at` on; it grows as
    in `write`."""
    if rows == list(range(n_rows)):
        return write(buffer, at, new, step)
    end = at + new.shape[2]
    if buffer is None or end > buffer.shape[2]:
        buffer = grow(buffer, (n_rows, new.shape[1], -(-end // step) * step, new.shape[3]), new.dtype)
    for i, b in enumerate(rows):
        buffer[b : b + 1, :, at:end] = new[i : i + 1]
    return buffer


def grow(buffer: Buffer, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """`buffer`, or nothing, padded with zero tokens to `shape`."""
    if buffer is None:
        return mx.zeros(shape, dtype)
    return mx.pad(buffer, [(0, 0), (0, 0), (0, shape[2] - buffer.shape[2]), (0, 0)])


def take_rows(array: mx.array, rows: list[int]) -> mx.array:
    """The given rows of an array; not a copy if they are one row or all rows."""
    if len(rows) == 1:
        return array[rows[0] : rows[0] + 1]
    return array if rows == list(range(array.shape[0])) else array[mx.array(rows)]


def take_ending_at(array: mx.array, ends: list[int], n: int) -> mx.array:
    """The n tokens of array [B, H, N, D] before token ends[b] of row b; whatever would lie outside of the array has no
    meaning."""
    if n == 0 or len(set(ends)) == 1 and n <= ends[0] <= array.shape[2]:
        return array[:, :, ends[0] - n : ends[0]]
    index = mx.clip(mx.array(ends)[:, None] + mx.arange(-n, 0), 0, array.shape[2] - 1)
    return mx.take_along_axis(array, index[:, None, :, None], axis=2)


# ---- packing ---------------------------------------------------------------------------------------------------------
class SideToPack(NamedTuple):
    """How keys or values are packed. means: float16 [B, H, segments, D], rotated, of the tokens that are packed
    already; None if nothing is packed yet or no head is centered. balance: of the rows' channels."""

    bits: int
    segment: int
    means: Optional[mx.array]
    balance: Optional[Balance] = None


def flags_of(parts: Sequence[mx.array]) -> list[bool]:
    """The elements of arrays of bool, one array behind the other. Waits for them."""
    return [yes for flags in map(np.array, parts) for yes in flags.tolist()]


class Begun(NamedTuple):
    """What the first tokens that rows pack decide of one side, lazily. means: float32 [B, H, segments, D]. heads: which
    are centered, bool [B, H, 1, 1]. rows: whether any head of a row is, bool [B], in one array or several."""

    means: mx.array
    heads: mx.array
    rows: list[mx.array]

    def centers(self) -> bool:
        """Whether any row is centered. Waits for that."""
        return any(flags_of(self.rows))

    @classmethod
    def of_rows(cls, rows: "Sequence[Begun]") -> "Begun":
        """Of several rows, each decided alone. What was computed of `rows` is not computed again."""
        means, heads = [of_row.means for of_row in rows], [of_row.heads for of_row in rows]
        return cls(mx.concatenate(means), mx.concatenate(heads), [part for of_row in rows for part in of_row.rows])


class PackJob(NamedTuple):
    """Tokens of rows that pack as many at the same moment.

    tails: keys and values [B, H, n, D], exact, that follow the packed ones; the first n_pack become packed tokens
    n_packed, n_packed + 1, ... begun: what `begin` decided of the first of these tokens, if that was asked before.
    """

    sides: list[SideToPack]
    tails: Sequence[Tokens]
    n_packed: int
    n_pack: int
    begun: Optional[dict[int, Begun]] = None


class PackedTokens(NamedTuple):
    """What one side of a `PackJob` becomes. codes: uint32 [B, H, n_pack, words] and scale: float16 [B, H, n_pack, 1],
    or the exact vectors and None with 0 bits. means: of all packed tokens, with room for more. begun: None where this
    job does not decide it."""

    codes: mx.array
    scale: Optional[mx.array]
    means: Optional[mx.array]
    begun: Optional[Begun]


def pack(jobs: Sequence[PackJob], config: TurboConfig, step: int) -> list[list[PackedTokens]]:
    """Quantizes the tokens of each job: for each, keys and values. step: packed tokens by which buffers grow. Waits for
    nothing."""
    done = []
    for job, (means, begun) in zip(jobs, decide_means(jobs, config, step)):
        quantized = quantize_tokens([x[:, :, : job.n_pack] for x in job.tails], job.sides, means, job.n_packed, config)
        done.append([PackedTokens(*q, mean, begun.get(i)) for i, (q, mean) in enumerate(zip(quantized, means))])
    return done


def decide_means(
    jobs: Sequence[PackJob], config: TurboConfig, step: int
) -> list[tuple[list[Optional[mx.array]], dict[int, Begun]]]:
    """For each job the means of each side with those of the segments that it begins, and {side: what it decided},
    lazily. step: as of `pack`."""
    done = []
    for job in jobs:
        new = begin(job, config) if job.begun is None else job.begun
        new = {i: decided for i, decided in new.items() if job.sides[i].bits}
        done.append((_extend_means(job, new, config, step), {} if job.n_packed else new))
    return done


def begin(job: PackJob, config: TurboConfig) -> dict[int, Begun]:
    """{side: `Begun` of the segments that a job begins}, lazily; of a side without means, nothing.

    Whether a row and head is centered is decided when its first tokens are packed, from all that are at hand; a
    segment's mean when its first token is packed. Latents never are: they serve as keys and values, and do not turn.
    """
    new: dict[int, Begun] = {}
    if (
        not job.n_packed
        and len(job.tails) == 2
        and are_latents(job.tails[0].shape[1], *(tail.shape[3] for tail in job.tails))
    ):
        return new
    for i, (side, tail) in enumerate(zip(job.sides, job.tails)):
        n_before, n = (n_segments(tokens, side.segment) for tokens in (job.n_packed, job.n_packed + job.n_pack))
        if not config.centre or not side.bits or n == n_before:
            continue
        if side.means is None if job.n_packed else tail.shape[2] < centering.FEWEST:
            continue
        summary = centering.summarize(tail, job.n_packed, side.segment)
        in_begun_segment = 1 if job.n_packed % side.segment else 0
        if side.means is not None:
            heads = (side.means[:, :, :1] != 0).any(-1, keepdims=True)
        else:
            heads = centering.should_center(*summary)
        new[i] = Begun(summary[0][:, :, in_begun_segment:][:, :, : n - n_before], heads, [heads.any((1, 2, 3))])
    return new


def _extend_means(job, new, config, step):
    """The means of each side (None: not centered) with those of the segments that a job begins."""
    means = [side.means for side in job.sides]
    for i, (segments, heads, _) in new.items():
        segment = job.sides[i].segment
        rotated = centering.stored(segments, heads, config.seed, job.sides[i].balance)
        means[i] = write(means[i], n_segments(job.n_packed, segment), rotated, max(step // segment, 1))
    return means


def quantize_tokens(
    tails: Sequence[mx.array],
    sides: Sequence[SideToPack],
    means: Sequence[Optional[mx.array]],
    first: int,
    config: TurboConfig,
) -> list[tuple[mx.array, Optional[mx.array]]]:
    """Codes and scale of each side's tokens [B, H, n, D], which become packed tokens first, first + 1, ...; the exact
    vectors and None with 0 bits. One launch for both sides, but for keys with means one of their own: of every pair of
    widths there would be a kernel more. means: float16, rotated, of all segments; those of `sides` are not read."""
    out: list[tuple[mx.array, Optional[mx.array]]] = [(tail, None) for tail in tails]
    launches: dict[bool, dict[int, QuantizeSide]] = {}
    for i, (tail, side, mean) in enumerate(zip(tails, sides, means)):
        if side.bits:
            if mean is not None:
                since, n = first // side.segment, n_segments(first + tail.shape[2], side.segment)
                mean = centering.plain(mean[:, :, since:n], config.seed, side.balance)
            launch = launches.setdefault(mean is not None and side.segment != ONE_SEGMENT, {})
            launch[i] = QuantizeSide(tail, side.bits, mean, side.balance, first, side.segment)
    for launch in launches.values():
        for i, result in zip(launch, select.quantize_sides([*launch.values()], config.seed, scale=config.scale)):
            out[i] = result
    return out
