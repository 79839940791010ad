"""A suite run in shares: --part K/N."""

import re

import pytest


def part_of(items, part):
    """The items of a part "K/N", with those of the other N - 1 parts all of them, each once."""
    found = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", part)
    k, n = map(int, found.groups()) if found else (1, 0)
    if k > n:
        raise pytest.UsageError(f"--part: got {part!r}, allowed are 1/N to N/N")
    return items[k - 1 :: n]
