"""PromptStore: the caches of prompts in memory and on disk, in pieces that conversations share."""

import collections
import contextlib
import fcntl
import hashlib
import itertools
import json
import logging
import os
import queue
import secrets
import sqlite3
import sys
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..cache.state import FORMAT_VERSION
from ..integration.prompt_cache import patch_library_of, patch_mlx_lm
from . import cut, files, identity
from .files import Record
from .index import Index

logger = logging.getLogger("mlx_turbo")
VERSION = 1  # of the folder
NOT_GENUINE = "its record is damaged, or of a version of mlx_turbo with another format of caches"
MARK = "store.json"
GROUP = 16_000_000  # bytes of blocks in a file, about
MOST_QUEUED = 2_000_000_000  # bytes that wait to be written
KEPT = 100  # messages about damage and errors
CHECKPOINT = 32  # blocks
READERS = 8  # threads


class Stored(NamedTuple):
    """What `PromptStore.put` did. n_tokens: of the cache. n_blocks: it was cut into. n_new: of these were not stored
    yet. n_bytes: that are new. whole: {number of a cache: why it cannot be cut}; where there are any, the cache is
    found for these tokens and those that begin with them, not for a part of them."""

    n_tokens: int
    n_blocks: int
    n_new: int
    n_bytes: int
    whole: dict[int, str]


class _Job(NamedTuple):
    groups: list[list[tuple[Record, Any]]]
    used: list[str]  # ids that these go on from
    nbytes: int


class PromptStore:
    """Prompt caches that outlive the process.

    folder: where they lie; made if it is not there, readable by its owner only. None: `default_folder()`. max_bytes: of
    its files; those that nothing was fetched from for the longest time go first. max_memory_bytes: of the pieces that
    are also held in memory.

    A cache is stored in blocks of 128 tokens, and what comes before and after them. Caches that go on from the same
    blocks share them. `fetch` at the end of a cache that was `put` gives that cache, bit for bit; at the end of a
    block it gives what `trim` to that number of tokens makes of it.

    Several threads and several processes may use one folder. Writing happens in a thread of its own: `flush` waits for
    it. What goes wrong there (a full disk) is in `report()`, and the pieces stay in memory.

    Raises OSError if the folder cannot be made or written, and ValueError if it holds something else, or is of another
    version.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        max_bytes: int = 50_000_000_000,
        max_memory_bytes: int = 2_000_000_000,
    ) -> None:
        for name, value in (("max_bytes", max_bytes), ("max_memory_bytes", max_memory_bytes)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name}: got {value!r}, allowed are whole numbers from 0 on")
        self.folder = default_folder() if folder is None else Path(folder)
        self.max_bytes, self.max_memory_bytes = max_bytes, max_memory_bytes
        self._lock = threading.RLock()
        self._memory: collections.OrderedDict[str, tuple[Record, np.ndarray]] = collections.OrderedDict()
        self._memory_bytes = 0
        self._ids_of_hash: dict[str, set[str]] = {}
        self._ids_of_parent: dict[str, set[str]] = {}
        self._counts = dict.fromkeys(("puts", "fetches", "hits", "tokens_asked", "tokens_found", "not_written"), 0)
        self._damaged: collections.deque[str] = collections.deque(maxlen=KEPT)
        self._errors: collections.deque[str] = collections.deque(maxlen=KEPT)
        self._key = _open_folder(self.folder)
        with _locked(self.folder):
            _remove_leftovers(self.folder)
            self._index = Index(self.folder)
        self._damaged.extend(self._index.skipped)
        self._jobs: queue.Queue[_Job | None] = queue.Queue()
        self._pending: collections.Counter[str] = collections.Counter()  # ids that wait to be written
        self._queued_bytes = 0
        self._closed = False
        self._writer = threading.Thread(target=self._write_jobs, name="mlx_turbo-store", daemon=True)
        self._writer.start()

    def __enter__(self) -> "PromptStore":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def flush(self) -> None:
        """Wait until all that was put is written, or could not be."""
        self._jobs.join()

    def close(self) -> None:
        """Write what was put, and close the files. Nothing can be put or fetched afterwards."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._jobs.put(None)
        self._writer.join()
        self._index.close()

    # ---- putting -----------------------------------------------------------------------------------------------
    def put(self, model: Any, tokens: Sequence[int], cache: Sequence[Any]) -> Stored:
        """Store a prompt cache of one sequence, which holds these tokens. It is copied here, in the thread that made
        it, as far as it is not stored yet; the disk is not waited for.

        model: a loaded model of mlx-lm or mlx-vlm (what it was made from does not matter: its numbers are compared).
        tokens: all that the cache holds; they must say everything that the cache depends on. (Those of a picture do
        not: do not store prompts with pictures.)

        Raises ValueError for a number of tokens that is not the cache's, a batch, and classes of caches that are not
        mlx-lm's, mlx-vlm's or ours.
        """
        numbers = identity.as_tokens(tokens)
        if not len(numbers):
            raise ValueError("tokens: got none")
        contents = cut.read(cache, len(numbers))
        payloads = {"root": cut.root_payload(contents), "end": cut.end_payload(contents)}
        chain = self._records(model, numbers, contents, cut.layout_of(cache), payloads)
        pieces = {record.id: payloads[record.kind] for record in (chain[0], chain[-1])}
        with self._lock:
            self._check_open()
            on_disk = self._on_disk(chain)
            wanted = [k for k, r in enumerate(chain[1:-1]) if r.id not in on_disk and r.id not in self._memory]
        blocks = cut.block_payloads(contents, wanted)
        pieces |= {chain[1 + k].id: data for k, data in zip(wanted, blocks)}
        with self._lock:
            self._check_open()
            self._counts["puts"] += 1
            new = [r for r in chain if r.id in pieces and r.id not in on_disk and r.id not in self._memory]
            self._enqueue(chain, pieces, on_disk)
            for record in reversed(chain):  # the first pieces as those used last: what goes on from them goes first
                self._remember(record, pieces.get(record.id))
        n_new = sum(record.kind == "block" for record in new)
        return Stored(len(numbers), len(chain) - 2, n_new, sum(len(pieces[r.id]) for r in new), contents.why)

    def checkpoints(
        self, model: Any, tokens: Sequence[int], cache: Sequence[Any], n: int = 0, every: int = CHECKPOINT
    ) -> Callable[[int, int], None]:
        """A function for mlx-lm's `prompt_progress_callback` that puts the cache of a long prompt while it is computed,
        after every `every` blocks: a process that ends in between goes on from the newest one.

        model, cache: as for `put`. tokens: of the whole prompt, of which the cache holds the first n already. every: a
        number of blocks of 128 tokens; a cache is put where the prompt's next chunk ends after them.

        Raises ValueError for an `every` below 1; the function raises what `put` does.
        """
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every: got {every!r}, expected a number of blocks of at least 1")
        last = 0

        def progress(done: int, total: int) -> None:
            nonlocal last
            if done - last >= every * cut.BLOCK and done < total:  # at the end the first answer is in the cache too
                last = done
                self.put(model, tokens[: n + done], cache)

        return progress

    def _on_disk(self, chain: list[Record]) -> set[str]:
        """The ids of records that are on disk, or wait to be written."""
        wanted = {record.id: record for record in chain}
        for record in self._from_index(self._index.of_ids, wanted):
            if _of_tokens(record) != _of_tokens(wanted[record.id]):
                self._forget(record, "its record is damaged")  # and what goes on from it
        return {r.id for r in self._from_index(self._index.of_ids, wanted)} | {i for i in wanted if i in self._pending}

    def _records(
        self, model: Any, tokens: np.ndarray, contents: cut.Contents, layout: str, payloads: dict[str, bytes]
    ) -> list[Record]:
        """The records of a cache: root, blocks and end. payloads: the bytes of root and end."""
        of, key = identity.identity_of(model), self._key
        hash, first = identity.first_hash(key, of, contents.spec["first"]), contents.spec["first"]
        label, digest = identity.label_of(model), _digest(payloads["root"])
        chain, done = [self._record("", "root", of, layout, hash, digest, first, label)], 0
        for k, digest in enumerate(cut.block_digests(contents)):
            begin, done = cut.edges_of(contents.spec, k)
            hash = identity.next_hash(key, hash, tokens[begin:done])
            chain.append(self._record(chain[-1].id, "block", of, layout, hash, digest, done))
        hash, digest = identity.end_hash(key, hash, tokens[done:]), _digest(payloads["end"])
        return [*chain, self._record(chain[-1].id, "end", of, layout, hash, digest, len(tokens))]

    def _record(
        self, parent: str, kind: str, model: str, layout: str, hash: str, digest: str, n: int, label: str = ""
    ) -> Record:
        record = Record("", parent, kind, model, layout, hash, digest, n, label)
        return record._replace(id=self._id_of(record))

    def _id_of(self, r: Record) -> str:
        return identity.keyed(
            self._key, "id", FORMAT_VERSION, r.parent, r.kind, r.model, r.layout, r.hash, r.digest, r.n, r.label
        )

    def _enqueue(self, chain: list[Record], pieces: dict[str, bytes], on_disk: set[str]) -> None:
        """Have the pieces written that are not on disk, blocks in groups and the end in a file of its own."""
        groups: list[list[tuple[Record, Any]]] = []
        size = GROUP
        for record in chain:
            if record.id in on_disk:
                continue
            data: Any = pieces.get(record.id)
            if data is None and record.id in self._memory:
                data = self._memory[record.id][1]
            if data is None:  # dropped from memory since it was looked up: the next put brings it
                break
            if size >= GROUP or record.kind == "end" and groups[-1][-1][0].kind != "root":
                groups.append([])
                size = 0
            groups[-1].append((record, data))
            size += len(data)
        nbytes = sum(len(data) for group in groups for _, data in group)
        if self._queued_bytes + nbytes > MOST_QUEUED:
            self._counts["not_written"] += sum(map(len, groups))
            self._note(self._errors, f"{nbytes} bytes not written: {self._queued_bytes} wait already")
            return
        self._queued_bytes += nbytes
        self._pending.update(record.id for group in groups for record, _ in group)
        self._jobs.put(_Job(groups, [record.id for record in chain], nbytes))

    # ---- writing, in a thread ------------------------------------------------------------------------------------
    def _write_jobs(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                self._touch(job.used)
                for group in job.groups:
                    self._write_group(group)
            except Exception as e:
                self._note(self._errors, f"not written: {type(e).__name__}: {e}")
                with self._lock:
                    self._counts["not_written"] += sum(map(len, job.groups))
            finally:
                with self._lock:
                    self._queued_bytes -= job.nbytes
                    for group in job.groups:
                        for record, _ in group:
                            self._pending[record.id] -= 1
                            if not self._pending[record.id]:
                                del self._pending[record.id]
                self._jobs.task_done()
        self._jobs.task_done()

    def _touch(self, ids: list[str]) -> None:
        self._index.touch({record.file for record in self._index.of_ids(ids)})

    def _write_group(self, group: list[tuple[Record, Any]]) -> None:
        there = {record.id for record in self._index.of_ids([record.id for record, _ in group])}
        group = [(record, data) for record, data in group if record.id not in there]  # another process was faster
        if not group:
            return
        name, head, records, nbytes = files.plan_file([(r, data) for r, data in group])
        gone = self._index.reserve(name, nbytes, self.max_bytes)
        if gone is None:
            raise OSError(f"{nbytes} bytes are more than max_bytes, {self.max_bytes}")
        try:
            self._unlink(gone)
            own = {record.id for record in records}
            outside = {record.parent for record in records} - own - {""}
            if len(self._index.of_ids(outside)) < len(outside):
                raise OSError("what they go on from is not on disk")
            files.write_file(self.folder, name, head, records, [data for _, data in group])
            self._index.add(name, nbytes, records)
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self._index.forget_file(name)
            self._unlink([name])
            raise

    def _unlink(self, names: Iterable[str]) -> None:
        for name in names:
            self.folder.joinpath(name).unlink(missing_ok=True)

    # ---- memory ------------------------------------------------------------------------------------------------
    def _remember(self, record: Record, data: Any) -> None:
        """Hold a piece in memory, as the one that was used last."""
        if record.id in self._memory:
            self._memory.move_to_end(record.id)
            return
        if data is None or len(data) > self.max_memory_bytes:
            return
        self._memory[record.id] = record, np.frombuffer(data, np.uint8)
        self._memory_bytes += len(data)
        self._ids_of_hash.setdefault(record.hash, set()).add(record.id)
        self._ids_of_parent.setdefault(record.parent, set()).add(record.id)
        while self._memory_bytes > self.max_memory_bytes:
            self._drop_from_memory(next(iter(self._memory)))

    def _drop_from_memory(self, id: str) -> None:
        record, data = self._memory.pop(id)
        self._memory_bytes -= len(data)
        for ids, name in (self._ids_of_hash, record.hash), (self._ids_of_parent, record.parent):
            ids[name].discard(id)
            if not ids[name]:
                del ids[name]

    # ---- fetching ----------------------------------------------------------------------------------------------
    def fetch(
        self, model: Any, tokens: Sequence[int], like: Sequence[Any] | None = None, more_than: int = 0
    ) -> tuple[Any, int]:
        """(a prompt cache of the first n tokens, n) for the largest n that is stored, at least one less than there are
        tokens: the model goes on with `tokens[n:]`. (None, 0) if nothing is.

        like: a prompt cache as the model gets it now; only caches of the same classes and configurations are found.
        None: any. more_than: a cache of so many tokens or fewer is of no use, and is not read.

        A piece that is damaged is not used but forgotten, with all that goes on from it, and `report()` names it.
        """
        numbers, of = identity.as_tokens(tokens), identity.identity_of(model)
        patch_library_of(model)  # the caches that come back need our attention
        layout = None if like is None else cut.layout_of(like)
        with self._lock:
            self._check_open()
            self._counts["fetches"] += 1
            self._counts["tokens_asked"] += len(numbers)
            found = self._fetch(of, numbers, layout, more_than)
            self._counts["hits"] += found[1] > 0
            self._counts["tokens_found"] += found[1]
            return found

    def _fetch(self, of: str, tokens: np.ndarray, layout: str | None, more_than: int) -> tuple[Any, int]:
        lost: set[str] = set()
        while True:  # a damaged piece may be needed by several candidates: look again without it
            for n, chain in self._candidates(of, tokens, layout):
                if min(n, len(tokens) - 1) <= more_than:
                    return None, 0
                if lost & {record.id for record in chain}:
                    continue
                try:
                    if (chain[-1].kind == "block" or n == len(tokens)) and not self._spec(chain[0])["cut"]:
                        continue
                    caches = self._load(chain)
                except _Lost as e:
                    if not isinstance(e, _Evicted):
                        self._forget(e.record, str(e))
                    lost.add(e.record.id)
                    break
                except LookupError as e:
                    self._note(self._errors, str(e))
                    lost.add(chain[-1].id)
                    continue
                if n == len(tokens):
                    for cache in caches:
                        cache.trim(1)
                    n -= 1
                return caches, n
            else:
                return None, 0

    def _candidates(self, of: str, tokens: np.ndarray, layout: str | None) -> Iterator[tuple[int, list[Record]]]:
        """(n, records from the root on) of what can be made of the pieces that are known, the longest first."""
        n_max = len(tokens) - 1
        hashes: dict[str, tuple[int, int]] = {}  # {hash: (tokens up to there, first)}
        roots = {r.id: r for r in self._from_index(self._index.roots, of)}
        roots |= {r.id: r for r, _ in self._memory.values() if r.kind == "root" and r.model == of}
        for first in {root.n for root in roots.values()}:
            last = identity.first_hash(self._key, of, first)
            hashes[last] = 0, first
            for k in range(max(n_max - first, 0) // cut.BLOCK):
                a, b = cut.edges_of({"first": first}, k)
                last = identity.next_hash(self._key, last, tokens[a:b])
                hashes[last] = b, first
        nodes = {r.id: r for r in self._known(self._index.of_hashes, self._ids_of_hash, hashes)}
        nodes = {i: r for i, r in nodes.items() if r.kind != "end" and self._genuine(r)}
        found = []
        for record in self._known(self._index.of_parents, self._ids_of_parent, nodes):
            if record.kind == "end" and record.n <= len(tokens):
                before = nodes[record.parent]
                rest = tokens[hashes[before.hash][0] : record.n]
                if record.hash == identity.end_hash(self._key, before.hash, rest) and self._genuine(record):
                    found.append((record.n, record))
        found += [(hashes[r.hash][0], r) for r in nodes.values() if r.kind == "block"]
        for n, record in sorted(found, key=lambda f: (min(f[0], n_max), f[1].kind == "end", f[0]), reverse=True):
            if layout in (None, record.layout):
                chain = self._walk(record, nodes)
                if chain is not None:
                    yield n, chain

    def _walk(self, record: Record, nodes: dict[str, Record]) -> list[Record] | None:
        """The records from the root on to this one; None if one is missing, or if they go in a circle, as damaged ones
        may."""
        chain = [record]
        while chain[-1].kind != "root":
            if chain[-1].parent not in nodes or len(chain) > len(nodes):
                return None
            chain.append(nodes[chain[-1].parent])
        return chain[::-1]

    def _spec(self, root: Record) -> dict[str, Any]:
        try:
            return cut.split(self._payload(root))[0]
        except ValueError as e:
            raise _Lost(root, str(e)) from e

    def _genuine(self, record: Record) -> bool:
        """Whether a record is what was written: its id follows from the rest."""
        if self._id_of(record) == record.id:
            return True
        self._forget(record, NOT_GENUINE)
        return False

    def _load(self, chain: Sequence[Record]) -> list[Any]:
        """The prompt cache that records make, root first."""
        blocks = [record for record in chain if record.kind == "block"]
        data = {record.id: self._payload(record) for record in (chain[0], chain[-1]) if record.kind != "block"}
        ends = itertools.accumulate(record.length for record in chain)
        kept = {record.id for record, end in zip(chain, ends) if end <= self.max_memory_bytes}
        try:
            assembly = cut.Assembly(data[chain[0].id], len(blocks), data.get(chain[-1].id))
            data |= self._put_blocks(blocks, assembly, kept)
            caches = assembly.caches()
        except (ValueError, KeyError, IndexError, TypeError) as e:
            raise _Lost(chain[-1], f"its pieces do not fit together: {e}") from e
        for record in reversed(chain):
            self._remember(record, data.get(record.id) if record.id in kept else None)
        with contextlib.suppress(sqlite3.Error):
            self._touch([record.id for record in chain])
        return caches

    def _put_blocks(self, blocks: Sequence[Record], assembly: cut.Assembly, kept: set[str]) -> dict[str, np.ndarray]:
        """Put blocks into an assembly. Returns {id: bytes} of those in `kept`."""

        def put(run: list[tuple[int, Record]]) -> dict[str, np.ndarray]:
            found = {}
            for data, (k, record) in zip(self._read([record for _, record in run], kept), run):
                assembly.put(k, data)
                if record.id in kept:
                    found[record.id] = data
            return found

        runs = [list(run) for _, run in itertools.groupby(enumerate(blocks), key=lambda block: block[1].file)]
        with ThreadPoolExecutor(READERS) as pool:  # reading, checksums and copies do not need Python's lock
            return {id: data for found in pool.map(put, runs) for id, data in found.items()}

    def _payload(self, record: Record) -> np.ndarray:
        """The bytes of a piece."""
        (data,) = self._read([record], {record.id})
        return data

    def _read(self, records: Sequence[Record], kept: Collection[str]) -> Iterator[np.ndarray]:
        """The bytes of pieces that lie in one file, or are in memory. Those of a piece that is not in `kept` are gone
        when the next one is asked for."""
        file = room = None
        with contextlib.ExitStack() as opened:
            for record in records:
                if record.id in self._memory:
                    yield self._memory[record.id][1]
                    continue
                if not record.file:
                    raise _Lost(record, "it was only in memory, and is not any more")
                try:
                    if file is None:
                        file = opened.enter_context(files.opened(self.folder / record.file))
                    data = files.read_piece(file, record, room)
                except (OSError, ValueError) as e:
                    gone = isinstance(e, FileNotFoundError) and all(
                        r.file != record.file for r in self._from_index(self._index.of_ids, [record.id])
                    )
                    raise (_Evicted if gone else _Lost)(record, str(e)) from e
                yield data
                room = None if record.id in kept else data

    def _known(self, of_index: Any, of_memory: dict[str, set[str]], keys: Iterable[str]) -> list[Record]:
        keys = list(keys)
        found = {r.id: r for r in self._from_index(of_index, keys)}
        for key in keys:
            for i in of_memory.get(key, ()):
                found.setdefault(i, self._memory[i][0])
        return list(found.values())

    def _from_index(self, read: Any, *arguments: Any) -> list[Record]:
        """What the index says; nothing if it cannot be read, which `report` then says."""
        try:
            return read(*arguments)
        except sqlite3.Error as e:
            self._note(self._errors, f"the index: {e}")
            return []

    def _forget(self, record: Record, why: str) -> None:
        self._note(self._damaged, why if record.file and record.file in why else f"{record.file or 'memory'}: {why}")
        below = [record.id]
        for i in below:
            below += self._ids_of_parent.get(i, ())
        for i in below:
            if i in self._memory:
                self._drop_from_memory(i)
        try:
            self._unlink(self._index.forget(record.id))
        except (sqlite3.Error, OSError) as e:
            self._note(self._errors, f"the index: {e}")

    def _note(self, where: "collections.deque[str]", what: str) -> None:
        logger.warning("prompt store %s: %s", self.folder, what)
        where.append(what)

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the store is closed")

    # ---- looking at it -----------------------------------------------------------------------------------------
    def report(self) -> dict[str, Any]:
        """What the store holds and did, as a dict of plain values: folder; nbytes and n_files on disk; blocks and ends
        there; memory_nbytes; puts, fetches, hits, tokens_asked and tokens_found since it was opened; queued_nbytes,
        that wait to be written; not_written, pieces that could not be; damaged and errors, the newest messages."""
        with self._lock:
            self._check_open()
            n_pieces = self._index.count()
            return {
                "folder": str(self.folder),
                "nbytes": self._index.nbytes,
                "n_files": len(self._index.files()),
                "blocks": n_pieces.get("block", 0),
                "ends": n_pieces.get("end", 0),
                "memory_nbytes": self._memory_bytes,
                "queued_nbytes": self._queued_bytes,
                **self._counts,
                "damaged": list(self._damaged),
                "errors": list(self._errors),
            }

    def entries(self) -> list[dict[str, Any]]:
        """The caches on disk that can be fetched to their last token, each as a dict: id; model, its identity; label,
        the model in words; tokens; nbytes of the pieces it is made of; shared_nbytes, of those that others need too;
        used, in seconds since 1970. The one used last comes first."""
        with self._lock:
            self._check_open()
            records = {r.id: r for r in self._index.all()}
            used = self._index.files()
        chains = {r.id: self._walk(r, records) for r in records.values() if r.kind == "end"}
        needed = collections.Counter(r.id for chain in chains.values() if chain for r in chain)
        out = [
            {
                "id": i,
                "model": chain[0].model,
                "label": chain[0].label,
                "tokens": chain[-1].n,
                "nbytes": sum(r.length for r in chain),
                "shared_nbytes": sum(r.length for r in chain if needed[r.id] > 1),
                "used": used.get(chain[-1].file, (0, 0.0))[1],
            }
            for i, chain in chains.items()
            if chain
        ]
        return sorted(out, key=lambda e: -e["used"])

    def load_entry(self, id: str) -> list[Any]:
        """The prompt cache of one of `entries()`. Raises KeyError if there is none of this id, and ValueError if it is
        damaged."""
        patch_mlx_lm()
        with self._lock:
            self._check_open()
            records = {r.id: r for r in self._index.all()}
            chain = self._walk(records[id], records)
            try:
                if chain is None:
                    raise _Lost(records[id], "what it goes on from is gone")
                return self._load(chain)
            except _Lost as e:
                if not isinstance(e, _Evicted):
                    self._forget(e.record, str(e))
                raise ValueError(f"{id}: {e}") from e

    def verify(self) -> list[str]:
        """Read everything on disk, and forget what is damaged and what goes on from something that is gone. Returns
        what was, one message each."""
        with self._lock:
            self._check_open()
            wrong, room = self._index.reconcile(), None
            self._damaged.extend(wrong)
            for record in sorted(self._index.all(), key=_depth):
                why = None if self._id_of(record) == record.id else f"{record.file}: {NOT_GENUINE}"
                try:
                    with files.opened(self.folder / record.file) as file:
                        room = files.read_piece(file, record, room)
                except (OSError, ValueError) as e:
                    why = str(e)
                if record.kind != "root" and not self._index.of_ids([record.parent]):
                    why = f"{record.file}: what a {record.kind} goes on from is gone"
                if why is not None and self._index.of_ids([record.id]):  # not gone with one before it
                    self._forget(record, why)
                    wrong.append(why)
            return wrong

    def delete(self, model: str | None = None, older_than: float | None = None, id: str | None = None) -> int:
        """Delete from memory and disk. model: what belongs to this model's identity. older_than: files not used for so
        many seconds. id: one of `entries()`, with what no other needs. All that are given must be true of what goes;
        none: everything. Returns the bytes that are free on disk then."""
        self.flush()
        with self._lock:
            self._check_open()
            before, records = self._index.nbytes, {r.id: r for r in self._index.all()}
            used, now = self._index.files(), time.time()
            if older_than is not None:
                records = {i: r for i, r in records.items() if now - used.get(r.file, (0, now))[1] > older_than}
            doomed = {i for i, r in records.items() if model in (None, r.model)}
            if id is not None:
                if id not in records:
                    raise KeyError(f"id: {id!r} is none of the entries")
                doomed &= {r.id for r in self._walk(records[id], records) or [records[id]]}
            n_children = collections.Counter(r.parent for r in self._index.all())
            for r in sorted((records[i] for i in doomed), key=_depth, reverse=True):
                if not n_children[r.id]:  # what others go on from stays
                    n_children[r.parent] -= 1
                    self._unlink(self._index.forget(r.id))
            if id is None and older_than is None:
                on_disk = {r.id for r in self._index.all()}
                for i, (r, _) in list(self._memory.items()):
                    if i not in on_disk and model in (None, r.model):
                        self._drop_from_memory(i)
            for i in doomed & self._memory.keys():
                self._drop_from_memory(i)
            return before - self._index.nbytes


class _Lost(Exception):
    def __init__(self, record: Record, why: str) -> None:
        super().__init__(why)
        self.record = record


class _Evicted(_Lost):
    """A piece that was removed, to make room or by `delete`, after the index was asked for it: no damage."""


def _of_tokens(record: Record) -> Record:
    """A record without the place of its bytes."""
    return record._replace(file="", offset=0, length=0, crc=0)


def _depth(record: Record) -> tuple[int, int]:
    """Greater for what goes on from a record than for the record."""
    return ("root", "block", "end").index(record.kind), record.n


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


# ---- the folder ------------------------------------------------------------------------------------------------------
def default_folder() -> Path:
    """Where prompts are stored if nothing else is said: below the user's folder for caches."""
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/mlx-turbo/prompts"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlx-turbo/prompts"


def _open_folder(folder: Path) -> bytes:
    """Make a folder a store, if it is new, and return its key. Raises OSError and ValueError."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    mark = folder / MARK
    if not mark.exists():
        if any(p.suffix != ".new" for p in folder.iterdir()) and not mark.exists():
            raise ValueError(f"folder: {str(folder)!r} is neither empty nor a prompt store")
        os.chmod(folder, 0o700)
        key = secrets.token_hex(32)
        text = json.dumps({"version": VERSION, "key": key, "crc": zlib.crc32(key.encode())})
        temporary = folder / f".{uuid.uuid4().hex}.new"
        files.write_private(temporary, text)
        with contextlib.suppress(FileExistsError):  # another process was faster
            os.link(temporary, mark)
        temporary.unlink()
        files.sync_folder(folder)
    try:
        written = json.loads(mark.read_bytes())
        version, key = written["version"], written["key"]
        if version != VERSION:
            raise ValueError(f"folder: {str(folder)!r} is a store of version {version}, this mlx_turbo reads {VERSION}")
        if zlib.crc32(key.encode()) != written["crc"]:
            raise KeyError("crc")
        return bytes.fromhex(key)
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise ValueError(
            f"folder: {str(mark)!r} is damaged; without its key nothing can be found. Delete the folder"
        ) from e


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time."""
    fd = os.open(folder / "lock", os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _remove_leftovers(folder: Path) -> None:
    """Remove what processes were writing when they ended."""
    for path in folder.glob(f".*{files.SUFFIX}.*"):
        try:
            os.kill(int(path.suffix[1:]), 0)
        except (ValueError, ProcessLookupError):
            path.unlink(missing_ok=True)
        except PermissionError:  # alive, and another user's
            pass
