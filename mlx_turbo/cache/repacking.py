"""Re-packing: what a side holds, with fewer bits, as functions on plain data.

Packed tokens get fewer bits in rotated space, from their codes alone (`requantize` of a backend): neither their means
nor the balance change. Exact ones (a side of 0 bits) are packed as the first chunk of a prompt is. The old and the new
buffers of a side exist at the same time, and nothing else of their size: all is done in slices.
"""

import itertools
from typing import NamedTuple, Optional, Sequence

import mlx.core as mx

from ..backends import select
from ..backends.sides import Balance, PackedSide
from ..quant.scheme import BITS, Scheme, TurboConfig, words_per_row
from .joined import Joined
from .packing import Begun, PackJob, Side, SideToPack, decide_means, quantize_tokens, write_rows

SLICE = 1024  # exact tokens that are packed at a time
# The bits to go through, of which any may be skipped, and {bits: how much larger the mean squared error of random
# vectors may be than if they had been packed once}. Fewer bits from levels that are nearly as dense cost most: 6 > 5
# adds 24 %, 6 > 5 > 4 19 %, and 8 > 6 > 4 3.7 %. From 8 to 6 bits it is 0.8 %, as the levels of one divide the cells of
# the other (quant/codebook.py).
LADDER = (0, 8, 6, 4, 3, 2)
Pair = tuple[int, int]  # bits of keys and of values
MORE_ERROR = {6: 0.02, 4: 0.06, 3: 0.08, 2: 0.09}


def rungs(lowest: int) -> tuple[int, ...]:
    """The bits that a side goes through down to its floor, exact first; of one that is never packed (0) only these."""
    return (0, *(bits for bits in LADDER if bits > lowest), lowest) if lowest else (0,)


def reachable_pairs(floor: Scheme) -> list[Pair]:
    """(bits of keys, of values) that a layer under a budget of memory may have, most bits first: one rung apart at
    most, unless the side with more bits is at its floor. There are kernels for each pair, so few of them can all be
    built beforehand. The fewest bits of two pairs, side by side, are one of the pairs again."""
    sides = rungs(floor.key_bits), rungs(floor.value_bits)
    numbers = itertools.product(*map(range, map(len, sides)))
    found = [
        (i, j)
        for i, j in numbers
        if abs(i - j) <= 1 or (i < j and i == len(sides[0]) - 1) or (j < i and j == len(sides[1]) - 1)
    ]
    return [(sides[0][i], sides[1][j]) for i, j in sorted(found, key=lambda pair: (sum(pair), pair[1]))]


def no_more(pair: Sequence[int], other: Sequence[int]) -> bool:
    """Whether neither side has more bits than in the other pair (0: exact, is the most)."""
    return all((a or 16) <= (b or 16) for a, b in zip(pair, other))


def path_between(now: Pair, then: Pair, pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs that a layer has on the way from `now` to `then`, of `pairs`, one side repacked at a time. (Both at
    once for one that comes from elsewhere, if nothing lies between.)"""
    path = []
    while now != then:
        between = [p for p in pairs if p != now and no_more(then, p) and no_more(p, now)]
        moves = [p for p in between if p[0] == now[0] or p[1] == now[1]]
        # rather a side to its end, else as far as it may go
        now = min(moves, key=lambda p: (p[0] != then[0] and p[1] != then[1], sum(b or 16 for b in p)), default=then)
        path.append(now)
    return path


def floor_for(floor: Scheme, now: Scheme) -> Scheme:
    """The floor of a layer that has these bits, from wherever: where they are fewer than the floor's, they stay."""
    sides = (floor.key_bits, now.key_bits), (floor.value_bits, now.value_bits)
    return Scheme(*(min(filter(None, bits), default=0) for bits in sides))


def fewer_bits(now: Scheme, key_bits: Optional[int], value_bits: Optional[int]) -> Scheme:
    """The scheme with these bits of keys and values, where they are given. Raises ValueError unless each is one of BITS
    and no more than now (0: exact, is the most)."""
    bits = []
    for name, got, had in ("key_bits", key_bits, now.key_bits), ("value_bits", value_bits, now.value_bits):
        allowed = [b for b in BITS if not had or 0 < b <= had]
        if got is not None and (isinstance(got, bool) or got not in allowed):
            of = f"of a cache whose {name[:-5]}s are exact" if not had else f"of a cache that has {had}"
            raise ValueError(f"{name}: got {got!r}, allowed are {allowed}, {of}")
        bits.append(had if got is None else got)
    return Scheme(*bits)


def requantize(side: Side, bits: int, config: TurboConfig) -> None:
    """Give the packed tokens of a side fewer bits."""
    rows = PackedSide(side.codes, side.scale, side.bits, side.head_dim)
    codes, scale = select.requantize_side(rows, bits, scale=config.scale)
    mx.eval(codes, scale)
    side.codes, side.scale, side.bits = codes, scale, bits


class ExactRows(NamedTuple):
    """Rows of a side whose packed tokens are exact. tail: their tokens after the sink, [len(rows), H, n, D], of which
    the first n_packed are the packed ones. balance: of the rows' channels."""

    rows: list[int]
    tail: Joined
    n_packed: int
    balance: Optional[Balance] = None


def pack_exact(
    side: Side, bits: int, groups: Sequence[ExactRows], config: TurboConfig, step: int, capacity: int
) -> list[tuple[Optional[mx.array], Optional[Begun]]]:
    """Pack the exact tokens of a side, into buffers with room for `capacity` tokens. Returns for each group the means,
    and what was decided of its rows (`Begun`, or None)."""
    jobs = [
        PackJob([SideToPack(bits, side.segment, None, group.balance)], [group.tail], 0, group.n_packed)
        for group in groups
    ]
    decided = decide_means(jobs, config, step)
    n_rows, heads, _, head_dim = side.recent.shape
    codes = mx.zeros((n_rows, heads, capacity, words_per_row(bits, head_dim)), mx.uint32)
    scale = mx.zeros((n_rows, heads, capacity, 1), mx.float16)
    for group, job, (means, _) in zip(groups, jobs, decided):
        for at in range(0, group.n_packed, SLICE):
            tokens = group.tail[:, :, at : min(at + SLICE, group.n_packed)]
            ((new_codes, new_scale),) = quantize_tokens([tokens], job.sides, means, at, config)
            codes = write_rows(codes, n_rows, group.rows, at, new_codes, step)
            assert new_scale is not None
            scale = write_rows(scale, n_rows, group.rows, at, new_scale, step)
            mx.eval(codes, scale)
    side.codes, side.scale, side.bits = codes, scale, bits
    return [(means[0], begun.get(0)) for means, begun in decided]
