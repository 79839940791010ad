"""A budget of bits over the keys and values of a model's layers: the widths that cost least.

What a width costs is measured at some widths (integration/bit_budget.py). At the others the error of a part is taken
to be in proportion to the mean squared error of rounding, and the errors of parts to add up: the KL divergence of a
model's output is quadratic in small errors, and the errors of different parts are independent.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from .codebook import gaussian_mse, product
from .scheme import PACKED_BITS, bits_per_value

WIDTHS = PACKED_BITS  # 2, 3, 4, 5, 6 and 8 bits
ALWAYS_LESS = 1 - 1e-6  # times the error of the width below, where more was measured
LEAST_SHARE = 1e-3  # of the mean error of all parts: what is measured below that is rounding


class Part(NamedTuple):
    """The packed keys, or values, of one layer. heads: (n_kv_heads, head_dim) of its cache, or of each if there are
    several. errors: {width: what packing it costs}, at one width or more."""

    heads: Sequence[tuple[int, int]]
    errors: Mapping[int, float]

    @property
    def numbers(self) -> int:
        """Per token."""
        return sum(n * head_dim for n, head_dim in self.heads)

    def bits(self, width: int) -> int:
        """Stored bits per token, scales included."""
        return round(sum(n * head_dim * bits_per_value(width, head_dim) for n, head_dim in self.heads))


def average_bits(parts: Sequence[Part], widths: Sequence[int]) -> float:
    """Stored bits per number of packed tokens, scales included."""
    return sum(part.bits(width) for part, width in zip(parts, widths)) / sum(part.numbers for part in parts)


def expected_errors(errors: Mapping[int, float], least: float = 0.0) -> list[float]:
    """The errors at all WIDTHS of a part with errors measured at some: at a width between or beyond those, that at the
    nearest measured width above (the last one: below), in proportion to the mean squared error. Always less with more
    bits, and nowhere less than that of a part with the error `least` at 4 bits."""
    squares = {width: gaussian_mse(product(width)) for width in WIDTHS}
    expected: list[float] = []
    for width in WIDTHS:
        at = min((w for w in errors if w >= width), default=max(errors))
        error = max(errors[at] * squares[width] / squares[at], least * squares[width] / squares[4])
        expected.append(min([error, *(ALWAYS_LESS * last for last in expected[-1:])]))
    return expected


def cheapest_widths(parts: Sequence[Part], bits: float) -> list[int]:
    """The width of each part, of those that take at most `bits` per number on average the ones with the least sum of
    errors. No part could take the next width and stay within `bits`, as more bits always cost less.

    Raises ValueError if 2 bits for all are more than that.
    """
    if not parts:
        return []
    lowest, numbers = average_bits(parts, [WIDTHS[0]] * len(parts)), sum(part.numbers for part in parts)
    if lowest > bits + 1e-9:
        raise ValueError(
            f"bits: got {bits:g}, and {WIDTHS[0]} bits for all keys and values take {lowest:g} with scales"
        )
    more = np.array([[part.bits(width) - part.bits(WIDTHS[0]) for width in WIDTHS] for part in parts])
    unit = math.gcd(*more.ravel().tolist())
    more, room = more // unit, int((bits - lowest + 1e-9) * numbers / unit)
    room = min(room, int(more[:, -1].sum()))
    mean = float(np.mean([expected_errors(part.errors)[WIDTHS.index(4)] for part in parts]))
    least = max(LEAST_SHARE * mean, np.finfo(float).tiny * 2.0**52)
    errors = [expected_errors(part.errors, least) for part in parts]
    best, chosen = np.zeros(room + 1), []  # the least error of the parts so far, within 0, 1, ... units
    for costs, steps in zip(errors, more):
        options = np.full((len(WIDTHS), room + 1), np.inf)
        for option, cost, step in zip(options, costs, steps):
            if step <= room:
                option[step:] = best[: room + 1 - step] + cost
        chosen.append(options.argmin(0))
        best = options.min(0)
    widths, left = [], room
    for steps, choices in zip(more[::-1], chosen[::-1]):
        i = choices[left]
        widths.append(WIDTHS[i])
        left -= steps[i]
    return widths[::-1]
