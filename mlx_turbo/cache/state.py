"""The state of a cache as arrays: its header, and the one reader for the states of single caches and batches."""

from typing import Any, NamedTuple

import mlx.core as mx

from ..backends import select
from ..backends.sides import Balance
from ..quant.scheme import BITS, SCALES, TurboConfig, words_per_row
from .packing import Side, allowed_dtypes, bits_at, make_sides, may_choose_bits, n_segments, write

MAGIC, FORMAT_VERSION = 0x54554B56, 4  # "TUKV"
READABLE_VERSIONS = 2, 3, FORMAT_VERSION
BATCH_MAGIC = 0x54554B42  # "TUKB"
WINDOW_MAGIC, BATCH_WINDOW_MAGIC = 0x54554B57, 0x54554B52  # "TUKW", "TUKR"
HEADER_NAMES = (
    "magic",
    "version",
    "key_bits",
    "value_bits",
    "sink",
    "recent",
    "block",
    "seed",
    "scale",
    "centre",
    "auto",
    "chosen_key_bits",
    "n_sink",
    "n_packed",
    "n_recent",
    "key_dim",
    "value_dim",
    "key_dtype",
    "value_dtype",
    "key_means",
    "value_means",
    "balance",
    "key_balance",
)
SINCE_VERSION_3 = {"balance": 1, "key_balance": 0, "balanced": 0}  # what a state of version 2 stands for
# of a batch; n_until: -1 if not right-padded
ROW_NAMES = ("n_packed", "n_recent", "n_pad", "n_until", "key_means", "value_means", "balanced")


class State(NamedTuple):
    """A state that was read and found consistent. counts: (n_sink, n_packed, n_recent), of a batch its columns. rows:
    of a batch, {name in row_names: a list with an entry per row}. own: attributes of the cache's class."""

    config: TurboConfig
    undecided: bool
    sides: list[Side]
    counts: tuple[int, int, int]
    rows: dict[str, list[int]]
    own: dict[str, Any]


def read_state(arrays: list, cache: Any) -> State:
    """Reads what the `state` of a cache of the same class as `cache` is.

    Raises ValueError for arrays that are not one, or do not fit together.
    """
    header = _read_header(arrays[0] if arrays else None, cache)
    config, key_bits = _read_config(header)
    own = cache.own_state(header, config)
    counts = header["n_sink"], header["n_packed"], header["n_recent"]
    rows = {}
    if cache.row_names:
        array: Any = arrays[1] if len(arrays) > 1 else None
        rows = _read_rows(array, _names_of(cache.row_names, header["version"]))
        rows = {"balanced": [0] * len(rows["n_packed"])} | rows
        if not _rows_fit(rows, counts, config, key_bits, own):
            raise ValueError(f"state: the header names {counts} columns, the rows {array.tolist()}, with {config}")
    elif not _counts_fit(counts, config, key_bits):
        raise ValueError(f"state: the header names {counts} sink, packed and recent tokens, with {config}")
    sides = make_sides(config, None if key_bits < 0 else key_bits)
    for side, name in zip(sides, ("key_dim", "value_dim")):
        if header[name]:
            side.bits = bits_at(side.bits, header[name])
    arrays, balance = list(arrays[2 if rows else 1 :]), None
    if header["key_balance"]:
        balance = arrays.pop() if arrays else None
    _restore_sides(sides, iter(arrays), counts, header, config)
    if header["key_balance"]:
        sides[0].balance = _read_balance(balance, sides[0])
    if sum(counts):
        (batch, heads), others = sides[0].recent.shape[:2], sides[1].recent.shape[:2]
        if (batch, heads) != others or rows and batch != len(rows["n_packed"]):
            whose = "keys, values and rows" if rows else "keys and values"
            raise ValueError(f"state: {whose} have different batch sizes or numbers of kv heads")
    return State(config, key_bits < 0, sides, counts, rows, own)


def _read_header(array, cache):
    kind = type(cache).__name__
    if not isinstance(array, mx.array) or array.dtype != mx.int32 or array.ndim != 1 or array.size < 2:
        raise ValueError(f"state: the first array is not the header of a {kind}")
    numbers = array.tolist()
    if numbers[0] != cache.magic:
        raise ValueError(f"state: not the state of a {kind}")
    names = _names_of(cache.header_names, numbers[1])
    if numbers[1] not in READABLE_VERSIONS or len(numbers) != len(names):
        known = ", ".join(map(str, READABLE_VERSIONS))
        raise ValueError(f"state: format version {numbers[1]}, this version of mlx_turbo reads {known}")
    header = SINCE_VERSION_3 | dict(zip(names, numbers))
    if numbers[1] < 4 and 8 in (header["key_bits"], header["value_bits"], header["chosen_key_bits"]):
        raise ValueError(
            f"state: format version {numbers[1]} with 8 bits, whose levels are others since version 4: this version of "
            "mlx_turbo cannot read it. The prompt has to be computed again"
        )
    return header


def _names_of(names, version):
    return [name for name in names if version != 2 or name not in SINCE_VERSION_3]


def _read_config(header):
    """(TurboConfig, bits of the keys: -1 while auto has not chosen)"""
    if header["scale"] not in range(len(SCALES)):
        raise ValueError(f"state: the header names scale rule {header['scale']}, there are {len(SCALES)}")
    config = TurboConfig(
        f"turbo{header['key_bits']}v{header['value_bits']}",
        header["sink"],
        header["recent"],
        header["block"],
        header["seed"],
        SCALES[header["scale"]],
        bool(header["centre"]),
        bool(header["balance"]),
        auto=bool(header["auto"]),
    )
    chosen = header["chosen_key_bits"]
    if chosen not in ((-1, *BITS) if may_choose_bits(config) else (config.scheme.key_bits,)):
        raise ValueError(f"state: the header names {chosen} bits for keys, with {config}")
    return config, chosen


def _read_rows(array, names):
    if (
        not isinstance(array, mx.array)
        or array.dtype != mx.int32
        or array.ndim != 2
        or array.shape[0] == 0
        or array.shape[1] != len(names)
    ):
        raise ValueError(f"state: the second array is not int32 [B, {len(names)}], the counts of the rows")
    return {name: list(numbers) for name, numbers in zip(names, zip(*array.tolist()))}


def _counts_fit(counts, config, key_bits):
    n_sink, n_packed, n_recent = counts
    full = n_recent > config.recent + config.block and not may_choose_bits(config)  # auto's wait until the next update
    return min(counts) >= 0 and n_sink <= config.sink and not full and (key_bits >= 0 or not n_packed)


def _rows_fit(rows, columns, config, key_bits, own):
    n_packed, n_recent, n_pad, until = (rows[name] for name in ("n_packed", "n_recent", "n_pad", "n_until"))
    n_evicted = rows.get("n_forgotten", [0] * len(n_packed))
    if min(n_packed + n_recent + n_pad + n_evicted) < 0 or min(until) < -1 or (-1 in until and max(until) >= 0):
        return False
    longest = max(n_packed)
    if (config.sink if longest else 0, longest) != columns[:2] or max(n_recent) > columns[2]:
        return False
    held = [(config.sink if packed else 0) + packed + recent for packed, recent in zip(n_packed, n_recent)]
    if any(gone and n < own["max_size"] - 1 for gone, n in zip(n_evicted, held)):
        return False  # only a full window evicts
    return key_bits >= 0 or not longest


def _read_balance(factors, side):
    want = "float32 [B, H, 1, D]"
    if side.recent is not None:
        want = f"float32 {(*side.recent.shape[:2], 1, side.head_dim)}"
    got = "nothing" if factors is None else f"{str(factors.dtype).split('.')[-1]} {tuple(factors.shape)}"
    if side.recent is None or not side.bits or got != want:
        raise ValueError(f"state: got {got} as the balance of the keys, expected {want} of packed keys")
    return Balance(factors)


def _restore_sides(sides, arrays, counts, header, config):
    try:
        for side, name in zip(sides, ("key", "value")):
            _restore(side, arrays, counts, header, name, config)
    except StopIteration:
        raise ValueError("state: arrays are missing") from None
    if next(arrays, None) is not None:
        raise ValueError("state: more arrays than the header says")


def _restore(side, arrays, counts, header, name, config):
    """Fill `side` ("key" or "value") from the iterator `arrays`, as `state` wrote it; checks every shape and dtype."""
    n_sink, n_packed, n_recent = counts
    if not n_sink + n_packed + n_recent:
        return
    head_dim, dtype, n_means = (header[f"{name}_{what}"] for what in ("dim", "dtype", "means"))
    dtypes = allowed_dtypes(config)
    if dtype not in range(len(dtypes)):
        raise ValueError(f"state: the header names dtype number {dtype}, there are {len(dtypes)} for {config}")
    if n_means not in ((0, n_segments(n_packed, side.segment)) if side.bits else (0,)):
        raise ValueError(f"state: the header names {n_means} means of {name}s, with {n_packed} packed tokens")
    dtype, batch = select.EXACT_DTYPES[dtype], None

    def take(n, width, want):
        nonlocal batch
        a = next(arrays)
        if a.ndim != 4 or a.shape[2:] != (n, width) or a.dtype != want or batch not in (None, a.shape[:2]):
            raise ValueError(
                f"state: got {a.dtype} {tuple(a.shape)}, expected {want} {(*(batch or ('B', 'H')), n, width)}"
            )
        batch = a.shape[:2]
        return a[:, :, :n]  # an object of our own: it is written into

    if n_sink:
        side.sink = write(None, 0, take(n_sink, head_dim, dtype), config.sink)
    if n_packed and side.bits:
        side.codes = take(n_packed, words_per_row(side.bits, head_dim), mx.uint32)
        side.scale = take(n_packed, 1, mx.float16)
        if n_means:
            side.means = take(n_means, head_dim, mx.float16)
    elif n_packed:
        side.codes = take(n_packed, head_dim, dtype)
    recent = take(n_recent, head_dim, dtype) if n_recent else mx.zeros((*batch, 0, head_dim), dtype)
    side.recent = write(None, 0, recent, config.recent + config.block)
