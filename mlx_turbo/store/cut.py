"""A prompt cache in pieces, and a prompt cache of pieces.

    root     what was decided for the sequence: classes, configurations, auto's bits, balance, the mean of the values
    blocks   128 tokens each, of the layers that can be cut: packed rows, or the rows of mlx-lm's KVCache. They begin
             after the sink, where a segment of keys begins, so that a block holds the mean its keys are relative to
    end      the rest of one cut: the tokens after the last block, and whole, what cannot be cut; the queries that a
             cache which has not packed yet will decide by

Layers that can be cut: TurboKVCache, windows that have not evicted anything, mlx-lm's KVCache. All others go into the
end as they are: windows that have, states, and mlx-lm's other caches.
"""

import functools
import hashlib
import importlib
import inspect
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..backends.select import EXACT_DTYPES
from ..cache.centering import SEGMENT
from ..cache.packing import bits_at, n_segments
from ..cache.rotating import Window
from ..cache.single import TurboKVCache
from ..integration.libraries import is_cache
from ..integration.prompt_cache import flatten_caches
from ..quant.scheme import Scheme, words_per_row
from .raw import DTYPES, NAMES, from_tree, join, row_hashes, split, to_raw, to_tree, unwritten

BLOCK = SEGMENT  # tokens
ALL = 1 << 60  # packed tokens of a layer, as far as a block is concerned
_PARTS = "sink", "codes", "scale", "means", "recent"
_COUNTS = "n_sink", "n_packed", "n_recent"
MODULES = ("mlx_lm.models.cache", "mlx_vlm.models.cache")  # whose classes are found again, besides ours


class Contents(NamedTuple):
    """A prompt cache of n tokens, ready to be cut. spec: the root's JSON object. fixed: its arrays. held: for each
    cache, the arrays [1, H, *, D] that blocks and ends are cut from, by name. n_packed: of each cache. whole: {index of
    a cache: (the tree of its state, its arrays)}. observed: the same of the queries that a TurboKVCache waits to use.
    why: {index: why it cannot be cut}."""

    n: int
    spec: dict[str, Any]
    fixed: list[mx.array]
    held: list[dict[str, mx.array]]
    n_packed: list[int]
    whole: dict[int, tuple[Any, list[mx.array]]]
    observed: dict[int, tuple[Any, list[mx.array]]]
    why: dict[int, str]


# ---- reading a prompt cache --------------------------------------------------------------------------------------
def layout_of(prompt_cache: Sequence[Any]) -> str:
    """32 hex digits for the classes and configurations of a prompt cache, whatever it holds."""
    found = []
    for cache in flatten_caches(prompt_cache):
        own = {name: getattr(cache, name, None) for name in ("max_size", "keep", "chunk_size", "group_size", "bits")}
        found.append([_class_name(cache), _config_of(cache) if isinstance(cache, TurboKVCache) else None, own])
    text = json.dumps([_tree_of(prompt_cache, iter(range(len(found)))), found])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _config_of(cache: TurboKVCache) -> str:
    """Caches under a budget of memory go on from whatever another one under the same budget has packed."""
    if cache.share is None:
        return repr(cache.config)
    budget = cache.share.budget
    exact = replace(cache.config, scheme=Scheme(0, 0))
    return f"{exact!r} in {budget.limit} bytes down to {budget.floor.name}"


def read(prompt_cache: Sequence[Any], n: int) -> Contents:
    """What a prompt cache of n tokens holds.

    Raises ValueError if it holds another number of tokens, is a batch, or of a class that cannot be found again.
    """
    caches = flatten_caches(prompt_cache)
    if not caches:
        raise ValueError("cache: got no layers")
    spec: dict[str, Any] = {"tree": _tree_of(prompt_cache, iter(range(len(caches)))), "slots": []}
    out = Contents(n, spec, [], [], [], {}, {}, {})
    for i, cache in enumerate(caches):
        _check(cache, i, n)
        slot, held, n_packed = _read_one(cache, i, out)
        spec["slots"].append({"class": _class_name(cache), **slot})
        out.held.append(held)
        out.n_packed.append(n_packed)
        if isinstance(cache, TurboKVCache) and cache.observed is not None:
            arrays: list[mx.array] = []
            out.observed[i] = to_tree(cache.observed, arrays), arrays
    spec["first"] = max((slot["sink"] for slot in spec["slots"] if slot["kind"] == "turbo"), default=0)
    spec["cut"] = not out.why
    return out


def _tree_of(layers, numbers):
    return [
        {"class": _class_name(c), "caches": _tree_of(c.caches, numbers)} if hasattr(c, "caches") else next(numbers)
        for c in layers
    ]


def _class_name(cache):
    return f"{type(cache).__module__}:{type(cache).__qualname__}"


def _check(cache, i, n):
    kind = type(cache)
    if kind.__module__ not in MODULES and not kind.__module__.startswith("mlx_turbo."):
        raise ValueError(f"cache: layer {i} is a {kind.__module__}.{kind.__qualname__}, which cannot be found again")
    offset = getattr(cache, "offset", None)
    if "Batch" in kind.__name__ or isinstance(offset, mx.array):
        raise ValueError(f"cache: layer {i} is a {kind.__name__}, a batch; put its rows one by one (`extract`)")
    if offset and offset != n:
        raise ValueError(f"tokens: got {n}, but layer {i} of the cache holds {offset}")


def _read_one(cache, i, out):
    """(what the root says of a cache, its arrays, number of packed tokens)"""
    arrays: list[mx.array] = []
    if isinstance(cache, TurboKVCache):
        if not cache.empty() and not (isinstance(cache, Window) and not cache.is_trimmable()):
            return _read_turbo(cache, i, out)
    elif is_cache(cache, "KVCache") and cache.keys is not None:
        keys, values = cache.keys[..., : cache.offset, :], cache.values[..., : cache.offset, :]
        held = {"keys": keys, "values": values}
        _check_row(held, i)
        described = {name: [a.shape[1], a.shape[3], NAMES[a.dtype]] for name, a in held.items()}
        return {"kind": "plain", "arrays": described}, held, 0
    tree = to_tree([cache.state, getattr(cache, "meta_state", "")], arrays)
    if getattr(cache, "offset", None) == 0:  # a layer that is not used
        slot = {"kind": "empty", "state": tree, "at": [len(out.fixed), len(arrays)]}
        out.fixed.extend(arrays)
        return slot, {}, 0
    out.whole[i] = tree, arrays
    out.why[i] = "a window that has evicted tokens" if isinstance(cache, Window) else f"a {type(cache).__name__}"
    return {"kind": "whole"}, {}, 0


def _check_row(held, i):
    rows = {a.shape[0] for a in held.values()}
    if rows != {1}:
        raise ValueError(f"cache: layer {i} holds {max(rows)} sequences; put the caches of one")


def _read_turbo(cache, i, out):
    state = cache.state
    header = dict(zip(cache.header_names, state[0].tolist()))
    arrays, held = iter(state[1:]), {}
    n_sink, n_packed, n_recent = (header[name] for name in _COUNTS)
    for side in ("key", "value"):
        counts = n_sink, n_packed, n_packed * bool(_bits(header, side)), header[f"{side}_means"], n_recent
        held.update((f"{side}.{part}", next(arrays)) for part, n in zip(_PARTS, counts) if n)
    _check_row(held, i)
    fixed = [held.pop("value.means")] if "value.means" in held else []
    fixed += [next(arrays)] if header["key_balance"] else []
    header |= dict.fromkeys(_COUNTS, 0) | {f"{s}_means": int(header[f"{s}_means"] > 0) for s in ("key", "value")}
    n_heads = next(iter(held.values())).shape[1]
    slot = {
        "kind": "turbo",
        "header": header,
        "names": list(cache.header_names),
        "sink": cache.config.sink,
        "arrays": _arrays_of(header, n_heads),
        "at": [len(out.fixed), len(fixed)],
    }
    out.fixed.extend(fixed)
    return slot, held, n_packed


def _bits(header, side):
    bits = header["value_bits"] if side == "value" else max(header["chosen_key_bits"], 0)
    return bits_at(bits, header[f"{side}_dim"])


def _arrays_of(header, n_heads):
    """{name: [H, D, dtype]} of what blocks and ends hold of a TurboKVCache, in order."""
    out = {}
    for side in ("key", "value"):
        dim, bits = header[f"{side}_dim"], _bits(header, side)
        exact = [n_heads, dim, NAMES[EXACT_DTYPES[header[f"{side}_dtype"]]]]
        out[f"{side}.sink"] = exact
        out[f"{side}.codes"] = [n_heads, words_per_row(bits, dim), "uint32"] if bits else exact
        if bits:
            out[f"{side}.scale"] = [n_heads, 1, "float16"]
        if side == "key" and header["key_means"]:
            out["key.means"] = [n_heads, dim, "float16"]
        out[f"{side}.recent"] = exact
    return out


# ---- blocks and ends -------------------------------------------------------------------------------------------------
def _rows(name, slot, first, last, n_packed):
    """(first row, number of rows) of array `name` that belong to tokens first .. last - 1, of which those of the layer
    with n_packed packed ones."""
    return _rows_of_part(name.partition(".")[2], slot.get("sink", 0), first, last, n_packed)


@functools.lru_cache(maxsize=1 << 16)  # the layers of a model have the same rows in a block
def _rows_of_part(part, sink, first, last, n_packed):
    if part == "means":  # a segment's mean goes with its first token
        edges = [-(-max(min(n, sink + n_packed) - sink, 0) // SEGMENT) for n in (first, last)]
    else:
        start, end = {"sink": (0, sink), "": (0, ALL), "recent": (sink + n_packed, ALL)}.get(
            part, (sink, sink + n_packed)
        )
        edges = [min(max(n, start), end) - start for n in (first, last)]
    return edges[0], max(edges[1] - edges[0], 0)


def n_blocks(contents: Contents) -> int:
    """How many blocks a prompt cache can be cut into."""
    cut = [(s, p) for s, p in zip(contents.spec["slots"], contents.n_packed) if s["kind"] in ("turbo", "plain")]
    ends = [slot["sink"] + n_packed if slot["kind"] == "turbo" else contents.n for slot, n_packed in cut]
    return max(min(ends, default=0) - contents.spec["first"], 0) // BLOCK


def edges_of(spec: dict[str, Any], block: int) -> tuple[int, int]:
    """The first token of a block, and the one after its last."""
    first = spec["first"]
    return (first + block * BLOCK if block else 0), first + (block + 1) * BLOCK


def _slots(spec):
    return [(i, slot) for i, slot in enumerate(spec["slots"]) if slot["kind"] in ("turbo", "plain")]


def block_digests(contents: Contents) -> list[str]:
    """Of each block a digest of all of its bits. The rows stay where they are."""
    n = n_blocks(contents)
    digests = [hashlib.blake2b(digest_size=16) for _ in range(n)]
    end = edges_of(contents.spec, n - 1)[1] if n else 0
    for i, slot in _slots(contents.spec) if n else ():
        for name in slot["arrays"]:
            _, count = _rows(name, slot, 0, end, ALL)
            if not count:
                continue
            hashes = row_hashes(contents.held[i][name][:, :, :count])
            for k, digest in enumerate(digests):
                at, count = _rows(name, slot, *edges_of(contents.spec, k), ALL)
                digest.update(hashes[at : at + count].tobytes())
    return [digest.hexdigest() for digest in digests]


def block_payloads(contents: Contents, blocks: Sequence[int]) -> list[bytes]:
    """The bytes of some blocks, in ascending order."""
    parts: list[list[bytes]] = [[] for _ in blocks]
    for i, slot in _slots(contents.spec) if blocks else ():
        for name in slot["arrays"]:
            edges = [_rows(name, slot, *edges_of(contents.spec, k), ALL) for k in blocks]
            start, end = edges[0][0], sum(edges[-1])
            if end > start:
                raw = to_raw(contents.held[i][name][0, :, start:end])
                for part, (at, count) in zip(parts, edges):
                    part.append(raw[:, at - start : at - start + count].tobytes())
    return [b"".join(part) for part in parts]


def end_payload(contents: Contents) -> bytes:
    """The bytes of what comes after the last block."""
    first = edges_of(contents.spec, n_blocks(contents) - 1)[1] if n_blocks(contents) else 0
    arrays: list[mx.array] = []
    meta: dict[str, Any] = {"n": contents.n, "n_packed": contents.n_packed}
    for name in ("whole", "observed"):
        meta[name] = {}
        for i, (tree, own) in getattr(contents, name).items():
            meta[name][str(i)] = [tree, len(arrays), len(own)]
            arrays.extend(own)
    parts = [join(meta, arrays)]
    for i, slot in _slots(contents.spec):
        for name in slot["arrays"]:
            at, count = _rows(name, slot, first, contents.n, contents.n_packed[i])
            if count:
                parts.append(to_raw(contents.held[i][name][0, :, at : at + count]).tobytes())
    return b"".join(parts)


def root_payload(contents: Contents) -> bytes:
    """The bytes of what was decided."""
    return join(contents.spec, contents.fixed)


# ---- a prompt cache of pieces ----------------------------------------------------------------------------------------
class Assembly:
    """A prompt cache that is made of pieces: of a root, of n_blocks blocks from the first one on, and of an end after
    the last of them, or None: then the cache has no recent tokens.

    What the caches will hold is allocated first. `put` copies the rows of a block to their places in it: the only copy
    on their way from where they were read to MLX. All pieces are uint8.

    Raises ValueError if root and end do not fit together.
    """

    def __init__(self, root: np.ndarray, n_blocks: int, end: np.ndarray | None) -> None:
        self._spec, self._fixed, _ = split(root)
        self._meta, self._own, at = ({}, [], 0) if end is None else split(end)
        if end is None and not (self._spec["cut"] and n_blocks):
            raise ValueError("an end is missing")
        edges = [edges_of(self._spec, k) for k in range(n_blocks)]
        n = edges[-1][1] if edges else 0
        self._n, self._missing = self._meta.get("n", n), set(range(n_blocks))
        self._layers: list[tuple[int, dict[str, _Rows]]] = []
        found: dict[Any, list[tuple[int, int]]] = {}  # the layers of a model have the same rows
        for i, slot in _slots(self._spec):
            n_packed = n - slot.get("sink", 0) if end is None else self._meta["n_packed"][i]
            layer = {}
            for name, (n_heads, width, dtype_name) in slot["arrays"].items():
                same = name.partition(".")[2], slot.get("sink"), n_packed
                if same not in found:
                    found[same] = [_rows(name, slot, *e, ALL) for e in edges]
                    found[same] += [] if end is None else [_rows(name, slot, n, self._n, n_packed)]
                layer[name] = _Rows(n_heads, width, DTYPES[dtype_name], found[same])
            self._layers.append((n_packed, layer))
        self._rows = [rows for _, layer in self._layers for rows in layer.values() if rows.n]
        if end is not None:
            self._copy(n_blocks, end, at)

    def put(self, block: int, data: np.ndarray) -> None:
        """Take the rows of a block, each of which is put once. May be called from several threads. Raises ValueError
        for another number of bytes than it has."""
        self._copy(block, data, 0)
        self._missing.remove(block)

    def _copy(self, piece, data, at):
        for rows in self._rows:
            at = rows.copy(piece, data, at)
        if at != len(data):
            raise ValueError(f"a piece of {len(data)} bytes, expected {at}")

    def caches(self) -> list[Any]:
        """The prompt cache; all blocks have been put. Raises ValueError if the pieces do not fit together, and
        LookupError for a class that is not found."""
        if self._missing:
            raise ValueError(f"blocks {sorted(self._missing)} are missing")
        caches, layers = [], iter(self._layers)
        for i, slot in enumerate(self._spec["slots"]):
            kind = _class_of(slot["class"])
            if slot["kind"] == "empty":
                at, count = slot["at"]
                caches.append(_of_state(kind, *from_tree(slot["state"], self._fixed[at : at + count])))
            elif slot["kind"] == "whole":
                tree, at, count = self._meta["whole"][str(i)]
                caches.append(_of_state(kind, *from_tree(tree, self._own[at : at + count])))
            else:
                n_packed, layer = next(layers)
                arrays = {name: rows.array() for name, rows in layer.items() if rows.n or slot["kind"] == "plain"}
                if slot["kind"] == "plain":
                    cache = kind()
                    cache.update_and_fetch(arrays["keys"], arrays["values"])
                    caches.append(cache)
                else:
                    at, count = slot["at"]
                    caches.append(_turbo(kind, slot, arrays, self._fixed[at : at + count], self._n, n_packed))
        for number, (tree, at, count) in self._meta.get("observed", {}).items():
            caches[int(number)].observed = from_tree(tree, self._own[at : at + count])
        return _build(self._spec["tree"], caches)


class _Rows:
    """The rows of an array [1, n_heads, n, width], which lie in pieces. spans: of each piece the first row and their
    number. Raises ValueError unless they follow each other."""

    def __init__(self, n_heads: int, width: int, dtype: mx.Dtype, spans: Sequence[tuple[int, int]]) -> None:
        self.n = 0
        for at, count in spans:
            if count and at != self.n:
                raise ValueError(f"rows from {at} on follow {self.n} others")
            self.n += count
        self.shape, self.dtype, self.spans = (1, n_heads, self.n, width), dtype, spans
        if self.n:
            self.row, self.nbytes = width * dtype.size, n_heads * width * dtype.size  # of a head, of all
            self.memory, view = unwritten(self.n * self.nbytes)
            self.view = view.reshape(n_heads, -1)

    def copy(self, piece: int, data: np.ndarray, at: int) -> int:
        """Take the rows of a piece, which begin at byte `at` of its data; the byte after them."""
        first, count = self.spans[piece]
        end = at + count * self.nbytes
        if end > len(data):
            raise ValueError(f"a piece of {len(data)} bytes, expected more")
        if count:
            self.view[:, first * self.row : (first + count) * self.row] = data[at:end].reshape(len(self.view), -1)
        return end

    def array(self) -> mx.array:
        """The array, all of whose rows were copied."""
        return self.memory.view(self.dtype).reshape(self.shape) if self.n else mx.zeros(self.shape, self.dtype)


def _turbo(kind, slot, arrays, fixed, n, n_packed):
    n_sink, header, fixed = min(slot["sink"], n), dict(slot["header"]), iter(fixed)
    header.update(n_sink=n_sink, n_packed=n_packed, n_recent=n - n_sink - n_packed)
    header["key_means"] *= n_segments(n_packed, SEGMENT)
    if header["value_means"]:
        arrays["value.means"] = next(fixed)
    names = [f"{side}.{part}" for side in ("key", "value") for part in _PARTS]
    numbers = mx.array([int(header[name]) for name in slot["names"]], mx.int32)
    return _of_state(kind, [numbers, *(arrays[name] for name in names if name in arrays), *fixed], "")


def _of_state(kind, state, meta_state):
    if "meta_state" in inspect.signature(kind.from_state).parameters:  # mlx-lm 0.31, and ours
        return kind.from_state(state, meta_state)
    return kind.from_state(state)


def _class_of(name):
    module, _, name = name.partition(":")
    if module not in MODULES and not module.startswith("mlx_turbo."):
        raise ValueError(f"a class of {module}")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as e:
        raise LookupError(f"{module}.{name} is not there: {e}") from e


def _build(tree, caches):
    return [caches[t] if isinstance(t, int) else _class_of(t["class"])(*_build(t["caches"], caches)) for t in tree]
