"""Prices of packing (integration/bit_budget.py), which take a while to measure, in files that later starts read.

A file for each model, calibration text and configuration. It is used only if all of these and its checksum are right;
anything else is measured again, and its file replaced.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from ..backends.select import get_backend
from ..cache.state import FORMAT_VERSION
from ..integration import bit_budget
from ..quant.scheme import PACKED_BITS, TurboConfig
from ..store import files
from ..store.identity import identity_of, label_of
from ..store.prompt_store import default_folder

VERSION = 1  # of the files, and of how prices are measured
MOST_BYTES = 1 << 24

Part = tuple[int, int]  # layer, and 0 for keys or 1 for values


class KeptPrices(NamedTuple):
    """`bit_budget.Prices` that were measured: by which backend, on which day, and in how many seconds."""

    n_layers: int
    heads: Mapping[Part, Sequence[tuple[int, int]]]
    found: Mapping[Part, Mapping[int, float]]
    backend: str
    date: str
    seconds: float

    @classmethod
    def of(cls, prices: Any, seconds: float) -> "KeptPrices":
        """Of prices that were measured just now."""
        found = prices.errors(lambda: None)
        return cls(prices.n_layers, prices.heads, found, get_backend().name, time.strftime("%Y-%m-%d"), seconds)

    def errors(self, progress: Callable[[], Any]) -> Mapping[Part, Mapping[int, float]]:
        """As of `bit_budget.Prices`."""
        return self.found

    def as_plain(self) -> dict[str, Any]:
        """As JSON has it."""
        parts = [[*part, [[*h] for h in heads], sorted(self.found[part].items())] for part, heads in self.heads.items()]
        measured = {"backend": self.backend, "date": self.date, "seconds": round(self.seconds, 1)}
        return measured | {"n_layers": self.n_layers, "parts": parts}

    @classmethod
    def from_plain(cls, plain: Any) -> "KeptPrices":
        """The inverse of `as_plain`. Raises ValueError, KeyError or TypeError for anything else."""
        n_layers, heads, found = plain["n_layers"], {}, {}
        for layer, side, of_caches, errors in plain["parts"]:
            part, by_width = (layer, side), {width: float(error) for width, error in errors}
            if not 0 <= layer < n_layers or side not in (0, 1) or part in found or not by_width:
                raise ValueError(f"prices of a part {part} in {n_layers} layers")
            if not set(by_width) <= set(PACKED_BITS) or not all(0 <= e < math.inf for e in by_width.values()):
                raise ValueError(f"prices of a part: {by_width}")
            heads[part], found[part] = [(int(n), int(dim)) for n, dim in of_caches], by_width
        return cls(n_layers, heads, found, str(plain["backend"]), str(plain["date"]), float(plain["seconds"]))


def prices_folder() -> Path:
    """Where they lie: beside the prompt store's default folder."""
    return default_folder().with_name("prices")


class PriceFile:
    """The file of a model's prices. tokens: of the calibration text. config: without its budget."""

    def __init__(self, model: Any, tokens: Sequence[int], config: TurboConfig) -> None:
        measuring = [VERSION, FORMAT_VERSION, bit_budget.MOST, bit_budget.READ, bit_budget.FIRST, bit_budget.LARGE]
        self._label = label_of(model)
        self._of = json.loads(
            json.dumps(
                {
                    "measuring": measuring,
                    "model": identity_of(model),
                    "text": _digest([*tokens]),
                    "config": asdict(config),
                }
            )
        )
        self.path = prices_folder() / f"{_digest(self._of)}.json"

    def read(self) -> KeptPrices | None:
        """What it holds; None if there is none. Raises ValueError or OSError for a file that is damaged or foreign."""
        if not self.path.exists():
            return None
        if self.path.stat().st_size > MOST_BYTES:
            raise ValueError(f"{self.path.stat().st_size:,} bytes are no prices")
        try:
            said = json.loads(self.path.read_text(encoding="utf-8"))
            if said["of"] != self._of:
                raise ValueError("it is of something else")
            if said["digest"] != _digest(said["prices"]):
                raise ValueError("its checksum is wrong")
            return KeptPrices.from_plain(said["prices"])
        except (KeyError, TypeError, RecursionError) as e:
            raise ValueError(f"{type(e).__name__}: {e}") from e

    def write(self, prices: KeptPrices) -> None:
        """Replace it, whole or not at all. Raises OSError, and ValueError for prices that are not finite."""
        plain = prices.as_plain()
        said = {"label": self._label, "of": self._of, "digest": _digest(plain), "prices": plain}
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        files.replace_private(self.path, json.dumps(said, allow_nan=False, indent=1))


def may_keep() -> bool:
    """False where several machines would have to find the same, as all measure together."""
    return mx.distributed.init().size() == 1


def _digest(plain: Any) -> str:
    return hashlib.blake2b(json.dumps(plain, sort_keys=True).encode(), digest_size=16).hexdigest()
