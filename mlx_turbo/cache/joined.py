"""Tokens that lie in several arrays, one behind the other, without a copy of all of them."""

from typing import Sequence, Union

import mlx.core as mx


class Joined:
    """parts: at least one array [B, H, n, D]. Of the tokens of all it has the `shape`, and slices [:, :, a:b]."""

    def __init__(self, parts: Sequence[mx.array]) -> None:
        self.parts = [part for part in parts if part.shape[2]] or list(parts[:1])
        self.shape = (*parts[0].shape[:2], sum(part.shape[2] for part in parts), parts[0].shape[3])

    def __getitem__(self, where: tuple[slice, slice, slice]) -> mx.array:
        first, end, _ = where[2].indices(self.shape[2])
        at, pieces = 0, []
        for part in self.parts:
            n = part.shape[2]
            if first < at + n and at < end:
                pieces.append(part[:, :, max(first - at, 0) : end - at])
            at += n
        return mx.concatenate(pieces, axis=2) if len(pieces) > 1 else pieces[0] if pieces else self.parts[0][:, :, :0]


Tokens = Union[mx.array, Joined]
