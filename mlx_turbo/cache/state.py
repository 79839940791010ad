"""The header of a cache's state, and the way back from it."""

import mlx.core as mx

from ..backends import select
from ..quant.scheme import BITS, SCALES, TurboConfig, words_per_row
from .packing import _dtypes, _may_choose, _write

MAGIC, FORMAT_VERSION = 0x54554B56, 2  # "TUKV"
_HEADER = (
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
)


def _read_header(array, cache):
    kind = type(cache).__name__
    if not isinstance(array, mx.array) or array.dtype != mx.int32 or array.ndim != 1 or array.size < 2:
        raise ValueError(f"state: the first array is not the header of a {kind}")
    numbers = array.tolist()
    if numbers[0] != cache.magic:
        raise ValueError(f"state: not the state of a {kind}")
    if numbers[1] != FORMAT_VERSION or len(numbers) != len(cache.header_names):
        raise ValueError(f"state: format version {numbers[1]}, this version of mlx_turbo reads {FORMAT_VERSION}")
    return dict(zip(cache.header_names, numbers))


def _read_config(header):
    """(TurboConfig, the bits of keys: -1 while auto has not chosen)"""
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
        auto=bool(header["auto"]),
    )
    chosen = header["chosen_key_bits"]
    if chosen not in ((-1, *BITS) if _may_choose(config) else (config.scheme.key_bits,)):
        raise ValueError(f"state: the header names {chosen} bits for keys, with {config}")
    return config, chosen


def _restore(side, arrays, counts, header, name, config):
    """Fill `side` ("key" or "value") from the iterator `arrays`, as `state` wrote it; checks every shape and dtype."""
    n_sink, n_packed, n_recent = counts
    if not n_sink + n_packed + n_recent:
        return
    head_dim, dtype, n_means = (header[f"{name}_{what}"] for what in ("dim", "dtype", "means"))
    if dtype not in range(len(_dtypes(config))):
        raise ValueError(f"state: the header names dtype number {dtype}, there are {len(_dtypes(config))} for {config}")
    if n_means not in ((0, -(-n_packed // side.segment)) if side.bits else (0,)):
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
        side.sink = _write(None, 0, take(n_sink, head_dim, dtype), config.sink)
    if n_packed and side.bits:
        side.codes = take(n_packed, words_per_row(side.bits, head_dim), mx.uint32)
        side.scale = take(n_packed, 1, mx.float16)
        if n_means:
            side.means = take(n_means, head_dim, mx.float16)
    elif n_packed:
        side.codes = take(n_packed, head_dim, dtype)
    recent = take(n_recent, head_dim, dtype) if n_recent else mx.zeros((*batch, 0, head_dim), dtype)
    side.recent = _write(None, 0, recent, config.recent + config.block)
