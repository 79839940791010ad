"""What an update of a batch does, decided before anything is changed."""

from typing import NamedTuple

import numpy as np


class _Plan(NamedTuple):
    """What an update with n_new tokens does; the mask must know before. Lists are per row.

    spans: (first, n), the tokens that are not padding. forget: how many of the oldest packed tokens go (of windows).
    before, after: how many are packed before and after attention. n_packed, n_recent: as attention finds them, without
    the new tokens, and columns: (sink, packed, recent) then.
    """

    n_new: int
    decide: bool
    spans: list
    forget: list
    before: list
    after: list
    n_packed: list
    n_recent: list
    columns: tuple

    def edges(self, b):
        """Columns of row b between which all are dead: (after its packed tokens, of its first recent one)."""
        front = self.columns[0] + self.n_packed[b] if self.n_packed[b] else 0
        return front, sum(self.columns) - self.n_recent[b] + self.spans[b][0]

    def live(self, b):
        """The columns with the tokens of row b, in their order, the new ones included: int [n]."""
        front, back = self.edges(b)
        return np.r_[:front, back : sum(self.columns) + sum(self.spans[b])]
