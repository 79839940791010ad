"""Files of a prompt store: each holds some pieces, says itself what they are, and appears whole or not at all.

    magic | length of the header, uint32 | its CRC-32, uint32 | header: JSON | pieces, each from a multiple of ALIGN on

A piece has a CRC-32 of its id and its bytes: bytes of another piece do not pass for it.
"""

import contextlib
import json
import os
import uuid
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MAGIC = b"MLXTURB1"
SUFFIX = ".pieces"
ALIGN = 64
MOST_HEADER = 1 << 28


class Record(NamedTuple):
    """What is known of a piece. id: 32 hex digits, of all that follows up to `n`. parent: the id of the piece it goes
    on from; "" of a root. kind: "root", "block" or "end". model, layout: whose (identity.py, cut.py). hash: of the
    tokens. digest: of its bits. n: tokens up to its end; of a root the first token of a second block, less 128. label:
    of a root, the model in words. file, offset, length, crc: where its bytes are."""

    id: str
    parent: str
    kind: str
    model: str
    layout: str
    hash: str
    digest: str
    n: int
    label: str = ""
    file: str = ""
    offset: int = 0
    length: int = 0
    crc: int = 0


class DamagedError(ValueError):
    """Bytes are not what was written."""


def checksum(id: str, data: Any) -> int:
    """CRC-32 of a piece's id and bytes."""
    return zlib.crc32(data, zlib.crc32(id.encode()))


def write_all(fd: int, data: Any) -> None:
    """Write all of `data`, however often the system takes a part. Raises OSError."""
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(fd, view) :]


def sync_folder(folder: Path) -> None:
    """Make names in a folder outlive a power cut."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def plan_file(pieces: Sequence[tuple[Record, Any]]) -> tuple[str, bytes, list[Record], int]:
    """(name, header, records with their places, bytes) of the file that pieces will make."""
    name = uuid.uuid4().hex + SUFFIX
    records = [r._replace(file=name, length=len(data), crc=checksum(r.id, data)) for r, data in pieces]
    begin = 0
    for _ in range(3):  # the header's own length decides where the pieces lie; it settles at once or in a second round
        at, placed = begin, []
        for r in records:
            at = -(-at // ALIGN) * ALIGN
            placed.append(r._replace(offset=at))
            at += r.length
        text = json.dumps([r._replace(file="") for r in placed]).encode()
        size = len(MAGIC) + 8 + len(text)
        if begin >= size:
            break
        begin = -(-(size + 16 * len(records)) // ALIGN) * ALIGN  # offsets may take more digits now
    head = MAGIC + len(text).to_bytes(4, "little") + zlib.crc32(text).to_bytes(4, "little") + text
    return name, head, placed, at


def write_file(folder: Path, name: str, head: bytes, records: Sequence[Record], pieces: Sequence[Any]) -> None:
    """Write a planned file under a temporary name, wait until the disk has it, and rename it. Raises OSError; then
    nothing is left."""
    temporary = folder / f".{name}.{os.getpid()}"
    try:
        fd = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        try:
            write_all(fd, head)
            at = len(head)
            for record, data in zip(records, pieces):
                write_all(fd, bytes(record.offset - at))
                write_all(fd, data)
                at = record.offset + record.length
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, folder / name)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(folder)


def write_private(path: Path, text: str) -> None:
    """Make a file that its owner alone can read, and have it on the disk. Raises OSError, also if there is one."""
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    try:
        write_all(fd, text.encode())
        os.fsync(fd)
    finally:
        os.close(fd)


def replace_private(path: Path, text: str) -> None:
    """Replace a file that its owner alone can read, whole or not at all. Raises OSError."""
    temporary = path.with_name(f".{uuid.uuid4().hex}.new")
    try:
        write_private(temporary, text)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def read_records(path: Path) -> list[Record]:
    """The records of a file. Raises DamagedError if its header is not what was written, and OSError."""
    with open(path, "rb") as file:
        start = file.read(len(MAGIC) + 8)
        n, crc = (int.from_bytes(start[i : i + 4], "little") for i in (len(MAGIC), len(MAGIC) + 4))
        if start[: len(MAGIC)] != MAGIC or len(start) < len(MAGIC) + 8 or n > MOST_HEADER:
            raise DamagedError(f"{path.name}: not a file of a prompt store")
        text = file.read(n)
    if len(text) != n or zlib.crc32(text) != crc:
        raise DamagedError(f"{path.name}: its header is damaged")
    return [Record(*fields)._replace(file=path.name) for fields in json.loads(text)]


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """A file that is read. Raises OSError."""
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


def read_piece(fd: int, record: Record, room: np.ndarray | None = None) -> np.ndarray:
    """The bytes of a piece, uint8 [record.length], from its open file. They take the place of what is at the beginning
    of uint8 `room`, if it is long enough, so that no new memory is needed for each piece.

    Raises DamagedError unless they are there and their checksum is right, and OSError.
    """
    damaged = DamagedError(f"{record.file}: a {record.kind} of {record.n} tokens is damaged")
    if not 0 <= record.offset <= record.offset + record.length <= os.fstat(fd).st_size:
        raise damaged
    if room is None or len(room) < record.length:
        room = np.empty(record.length, np.uint8)
    piece, n = room[: record.length], 0
    while n < record.length and (got := os.preadv(fd, [piece.data[n:]], record.offset + n)):
        n += got
    if n < record.length or checksum(record.id, piece) != record.crc:
        raise damaged
    return piece
