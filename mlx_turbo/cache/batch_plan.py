"""What an update of a batch does, decided before anything is changed: the mask needs to know it too."""

from typing import NamedTuple

import numpy as np


class Plan(NamedTuple):
    """What an update with n_new tokens does. Lists have an entry per row.

    decide_bits: whether auto chooses the bits of the keys first. spans: (first, n), which of the new tokens are not
    padding. n_evict: number of oldest packed tokens to evict (windows). pack_before, pack_after: number of tokens to
    pack before and after attention. n_packed, n_recent: the tokens that attention finds, without the new ones, and
    columns: the (sink, packed, recent) columns that hold them.
    """

    n_new: int
    decide_bits: bool
    spans: list[tuple[int, int]]
    n_evict: list[int]
    pack_before: list[int]
    pack_after: list[int]
    n_packed: list[int]
    n_recent: list[int]
    columns: tuple[int, int, int]

    def edges(self, b: int) -> tuple[int, int]:
        """(front, back): the columns front .. back - 1, between row b's packed tokens and its recent ones, are
        empty."""
        front = self.columns[0] + self.n_packed[b] if self.n_packed[b] else 0
        return front, sum(self.columns) - self.n_recent[b] + self.spans[b][0]

    def token_columns(self, b: int) -> np.ndarray:
        """The columns of row b's tokens, in their order, the new ones included: int [n]."""
        front, back = self.edges(b)
        return np.r_[:front, back : sum(self.columns) + sum(self.spans[b])]
