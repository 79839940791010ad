"""The launch parameters of attention that are fastest on a chip: the search of `bench kernels --tune`, and their file.

One JSON file in the user's cache folder. An entry holds for one chip, one text of the kernels, one scheme and one pair
of head dims; entries for another text are ignored, and dropped with the next tuning. A tuned kernel is checked against
the reference before its first use like any other.
"""

import hashlib
import json
import os
import sys
import tempfile
import uuid
import warnings
from pathlib import Path
from typing import Any, Callable, Mapping, Optional, Sequence

from .attend_launch import AttendTuning
from .device import device_name
from .sources import metal_source

Tuned = Mapping[tuple[int, int, int, int], AttendTuning]  # by (key bits, value bits, key dim, value dim)

# What is tried, one parameter after the other, the others at the best so far.
CANDIDATES = {
    "simdgroups_per_launch": (512, 1024, 2048, 4096, 8192),
    "simdgroups_per_launch_many_sums": (512, 1024, 2048, 4096, 8192),
    "tokens_per_block": (64, 128, 256, 512),
    "simdgroups": (1, 2, 4, 8),
    "tokens_per_lane": (1, 2, 4),
    "tokens_per_lane_few_rows": (1, 2, 4),
    "accumulators": (32, 64),
    "one_launch_tokens": (0, 512, 1024, 2048),
    "simdgroups_one_launch": (4, 8, 16),
    "rows_per_decode": (8, 16, 32, 64, 256),
}
# Changes below this are noise, and the default is kept.
GAIN = 0.03


def path() -> Path:
    """The file, whether it exists or not. MLX_TURBO_CACHE_DIR names another folder."""
    if folder := os.environ.get("MLX_TURBO_CACHE_DIR"):
        return Path(folder) / "tuning.json"
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/mlx-turbo/tuning.json"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlx-turbo/tuning.json"


def check_path() -> None:
    """Raises OSError where `save` could not write. To be called before what takes minutes."""
    path().parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=path().parent).close()


def kernel_hash() -> str:
    """Tells texts of the attention kernels apart."""
    text = "".join(part for name in ("attend", "merge") for part in metal_source(name))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read() -> list[dict[str, Any]]:
    try:
        entries = json.loads(path().read_text())["entries"]
        return [e for e in entries if isinstance(e, dict)]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as e:
        warnings.warn(f"{path()} is ignored: {type(e).__name__}: {e}", stacklevel=3)
        return []


def _key(entry: Mapping[str, Any]) -> tuple[int, int, int, int]:
    return entry["key_bits"], entry["value_bits"], entry["key_dim"], entry["value_dim"]


def _allowed(values: Mapping[str, Any]) -> bool:
    """Whether `search` could have tried an entry's values: the file may have been edited. How many simdgroups a launch
    has by default, a backend may take from the size of the chip."""
    default = AttendTuning()._asdict()
    return set(values) == set(default) and all(
        type(x) is int
        and (
            x in CANDIDATES[name]
            or x == default[name]
            or (name.startswith("simdgroups_per_launch") and min(CANDIDATES[name]) < x < max(CANDIDATES[name]))
        )
        for name, x in values.items()
    )


def load(chip: Optional[str] = None) -> dict[tuple[int, int, int, int], AttendTuning]:
    """The tunings saved for a chip (default: this one) and these kernels. What cannot be read is ignored."""
    chip, found = chip or device_name(), {}
    for entry in _read():
        try:
            if (entry["chip"], entry["kernels"]) == (chip, kernel_hash()) and _allowed(entry["values"]):
                found[_key(entry)] = AttendTuning(**entry["values"])
        except (KeyError, TypeError, AttributeError):
            continue  # not an entry of ours
    return found


def save(tuned: Tuned, chip: Optional[str] = None) -> Path:
    """Add `tuned`, as `load` returns it, to the file; this chip's entries for other kernels go. Returns the path."""
    chip, kernels = chip or device_name(), kernel_hash()
    kept = [e for e in _read() if e.get("chip") != chip]
    names = "key_bits", "value_bits", "key_dim", "value_dim"
    new = [
        {"chip": chip, "kernels": kernels, **dict(zip(names, key)), "values": values._asdict()}
        for key, values in {**load(chip), **tuned}.items()
    ]
    file = path()
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(f".{uuid.uuid4().hex}")
    draft.write_text(json.dumps({"entries": kept + new}, indent=1))
    os.replace(draft, file)  # another process may be reading
    return file


def changes(values: AttendTuning, default: AttendTuning = AttendTuning()) -> str:
    """What differs from the defaults (of a backend), for people: "simdgroups 8 (default 4)"."""
    return (
        ", ".join(f"{name} {x} (default {d})" for (name, x), d in zip(values._asdict().items(), default) if x != d)
        or "the defaults"
    )


def describe(default: AttendTuning = AttendTuning()) -> str:
    """One line for `doctor` and `bench`. default: of the backend."""
    found = load()
    if not found:
        return "none (bench kernels --tune measures what this chip likes)"
    return "; ".join(
        f"{k} and {v} bits, head_dim {dk}{f'/{dv}' if dv != dk else ''}: {changes(values, default)}"
        for (k, v, dk, dv), values in found.items()
    )


def search(
    time_all: Callable[[Sequence[AttendTuning]], Sequence[Optional[float]]],
    default: AttendTuning = AttendTuning(),
    progress: Optional[Callable[[str], Any]] = None,
) -> tuple[AttendTuning, float]:
    """The fastest tuning, one parameter after the other. time_all(tunings) -> [seconds, or None where one is wrong or
    does not run], measured together. progress(name): called after each parameter. Returns (tuning, its time over the
    default's).

    Raises ValueError if the default does not run."""
    best, ratio = default, 1.0
    for name, values in CANDIDATES.items():
        tried = [best] + [best._replace(**{name: x}) for x in values if x != getattr(best, name)]
        seconds = time_all(tried)
        if seconds[0] is None:
            raise ValueError(f"the tuning {changes(best, default)} does not run")
        fastest = min(t for t in seconds if t is not None)
        if fastest < (1 - GAIN) * seconds[0]:
            ratio *= fastest / seconds[0]
            best = tried[seconds.index(fastest)]
        if progress:
            progress(name)
    return best, ratio
