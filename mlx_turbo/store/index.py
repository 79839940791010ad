"""The index of a prompt store in SQLite: which pieces there are, in which file, and when a file was used last.

It holds nothing that the files do not hold, but for the times; where it is damaged or missing it is made anew from
them.
"""

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .files import SUFFIX, DamagedError, Record, read_records

NAME = "index.db"
_FIELDS = ", ".join(Record._fields)
_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (name TEXT PRIMARY KEY, bytes INTEGER NOT NULL, used REAL NOT NULL);
CREATE TABLE IF NOT EXISTS records (
    id TEXT PRIMARY KEY, parent TEXT, kind TEXT, model TEXT, layout TEXT, hash TEXT, digest TEXT, n INTEGER,
    label TEXT, file TEXT, offset INTEGER, length INTEGER, crc INTEGER);
CREATE INDEX IF NOT EXISTS by_hash ON records (hash);
CREATE INDEX IF NOT EXISTS by_parent ON records (parent);
CREATE INDEX IF NOT EXISTS by_file ON records (file);
CREATE INDEX IF NOT EXISTS by_model ON records (model, kind);
"""
_LEAVES = """
SELECT name FROM files WHERE NOT EXISTS (
    SELECT 1 FROM records p JOIN records c ON c.parent = p.id WHERE p.file = files.name AND c.file != files.name)
ORDER BY used LIMIT 1
"""
_BELOW = """
WITH RECURSIVE below (id) AS (
    VALUES (?) UNION SELECT records.id FROM records JOIN below ON records.parent = below.id)
"""
_MANY = 500  # values in one statement


class Index:
    """All methods may be called from several threads; several processes may have one open. Raises sqlite3.Error."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._lock = folder, threading.RLock()
        try:
            self._open()
        except sqlite3.DatabaseError:
            self._remove()
            self._open()
        self.skipped = self.reconcile()

    def _open(self):
        path = self.folder / NAME
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))  # SQLite gives its other files the same mode
        self._db = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
        try:
            # quick_check would not see that an index of a table disagrees with it
            if self._db.execute("PRAGMA integrity_check").fetchone() != ("ok",):
                raise sqlite3.DatabaseError("damaged")
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")  # what a power cut takes is found again in the files
            self._db.executescript(_SCHEMA)
            self._db.execute(f"SELECT {_FIELDS} FROM records LIMIT 1").fetchall()
        except BaseException:
            self._db.close()
            raise

    def _remove(self):
        for suffix in ("", "-wal", "-shm"):
            self.folder.joinpath(NAME + suffix).unlink(missing_ok=True)

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._db.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Any]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def reconcile(self) -> list[str]:
        """Take in files that the index does not know, and forget those that are gone. Returns what is wrong with the
        files that cannot be read; they are removed."""
        there = {p.name: p for p in self.folder.glob(f"*{SUFFIX}")}
        wrong = []
        with self._lock:
            # of a process that ended between a file and its records there is a row in `files` only
            known = {name for (name,) in self._db.execute("SELECT DISTINCT file FROM records")}
            reserved = {name for (name,) in self._db.execute("SELECT name FROM files")}
        for name in there.keys() - known:
            try:
                size, used = there[name].stat().st_size, there[name].stat().st_mtime
                records = read_records(there[name])
            except FileNotFoundError:
                continue
            except (DamagedError, ValueError, TypeError) as e:
                wrong.append(str(e))
                there[name].unlink(missing_ok=True)
                continue
            self.add(name, size, records, used)
        for name in (known | reserved) - there.keys():
            self.forget_file(name)
        return wrong

    # ---- reading -----------------------------------------------------------------------------------------------
    def _select(self, where: str, values: Sequence[Any] = ()) -> list[Record]:
        with self._lock:
            return [Record(*row) for row in self._db.execute(f"SELECT {_FIELDS} FROM records {where}", values)]

    def _select_many(self, column: str, values: Iterable[str]) -> list[Record]:
        values, found = list(values), []
        for i in range(0, len(values), _MANY):
            part = values[i : i + _MANY]
            found += self._select(f"WHERE {column} IN ({','.join('?' * len(part))})", part)
        return found

    def of_ids(self, ids: Iterable[str]) -> list[Record]:
        """The records of these ids, as far as there are any."""
        return self._select_many("id", ids)

    def of_hashes(self, hashes: Iterable[str]) -> list[Record]:
        """The records whose tokens have one of these hashes."""
        return self._select_many("hash", hashes)

    def of_parents(self, ids: Iterable[str]) -> list[Record]:
        """The records that go on from one of these."""
        return self._select_many("parent", ids)

    def roots(self, model: str) -> list[Record]:
        """The roots of a model."""
        return self._select("WHERE model = ? AND kind = 'root'", [model])

    def all(self) -> list[Record]:
        """All records."""
        return self._select("ORDER BY file, offset")

    def count(self) -> dict[str, int]:
        """{kind: number of records}"""
        with self._lock:
            return dict(self._db.execute("SELECT kind, COUNT(*) FROM records GROUP BY kind").fetchall())

    def files(self) -> dict[str, tuple[int, float]]:
        """{name: (bytes, when it was used last)}"""
        with self._lock:
            return {name: (n, used) for name, n, used in self._db.execute("SELECT name, bytes, used FROM files")}

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        with self._lock:
            return self._db.execute("SELECT COALESCE(SUM(bytes), 0) FROM files").fetchone()[0]

    # ---- writing -----------------------------------------------------------------------------------------------
    def reserve(self, name: str, nbytes: int, most: int) -> list[str] | None:
        """Make room for a file, within `most` bytes in all: files that nothing goes on from go first, those that were
        not used for the longest time before others. Returns the names of files to remove; None, and nothing is done, if
        there cannot be room."""
        gone: list[str] = []
        with self._writing() as db:
            if nbytes > most:
                return None
            while db.execute("SELECT COALESCE(SUM(bytes), 0) FROM files").fetchone()[0] + nbytes > most:
                leaf = db.execute(_LEAVES).fetchone()
                if leaf is None:
                    raise sqlite3.DatabaseError("the index has a circle")
                self._forget(db, leaf[0])
                gone.append(leaf[0])
            db.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?)", [name, nbytes, time.time()])
        return gone

    def add(self, name: str, nbytes: int, records: Sequence[Record], used: float | None = None) -> None:
        """Take in a file that lies in the folder."""
        with self._writing() as db:
            when = time.time() if used is None else used
            db.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?)", [name, nbytes, when])
            marks = ",".join("?" * len(Record._fields))
            db.executemany(f"INSERT OR IGNORE INTO records VALUES ({marks})", records)

    def touch(self, files: Iterable[str]) -> None:
        """Note that files are used now."""
        with self._writing() as db:
            db.executemany("UPDATE files SET used = ? WHERE name = ?", [(time.time(), name) for name in files])

    def forget_file(self, name: str) -> None:
        """Forget a file and what it holds."""
        with self._writing() as db:
            self._forget(db, name)

    @staticmethod
    def _forget(db, name):
        db.execute("DELETE FROM records WHERE file = ?", [name])
        db.execute("DELETE FROM files WHERE name = ?", [name])

    def forget(self, id: str) -> list[str]:
        """Forget a piece and all that goes on from it. Returns the names of files that hold nothing else."""
        with self._writing() as db:
            touched = {f for (f,) in db.execute(f"{_BELOW} SELECT file FROM records WHERE id IN below", [id])}
            db.execute(f"{_BELOW} DELETE FROM records WHERE id IN below", [id])
            gone = [
                f for f in touched if not db.execute("SELECT 1 FROM records WHERE file = ? LIMIT 1", [f]).fetchone()
            ]
            for name in gone:
                db.execute("DELETE FROM files WHERE name = ?", [name])
        return gone
