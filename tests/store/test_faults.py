"""PromptStore when something goes wrong: it may forget, but what it gives is right."""

import errno
import itertools
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.caches import FAST_BACKENDS
from support.stored import bits, feed, made, tiny_model, tokens_of, trimmed
from support.strategies import quick

from mlx_turbo import PromptStore
from mlx_turbo.store import files, prompt_store
from mlx_turbo.store.prompt_store import MARK

pytestmark = [pytest.mark.parametrize("backend", FAST_BACKENDS, indirect=True), pytest.mark.usefixtures("door")]

N = 500
few_or_many = pytest.mark.parametrize("n", [30, pytest.param(700, marks=pytest.mark.slow)])


def cache_of(tokens, kinds=("turbo", "plain")):
    return feed(made(kinds, "turbo4"), tokens, [])


def known(folder):
    """{number of tokens: the bits of the cache of so many of `tokens_of(N)`}, and the store of them in `folder`."""
    tokens, cache, wanted = tokens_of(N), cache_of(tokens_of(N)), {}
    with PromptStore(folder) as store:
        store.put(tiny_model(), tokens, cache)
        store.flush()
    wanted[N] = bits(cache)
    for n in range(N - 1, 0, -1):
        if (n - 4) % 128 == 0:
            wanted[n] = bits(trimmed(cache, n))
    return wanted


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with a store, and what may be fetched from it."""
    folder = tmp_path_factory.mktemp("whole") / "store"
    return folder, known(folder)


def check(folder, wanted, least=0):
    """What a store in `folder` gives is right; then it takes and gives the whole again. Returns how many tokens it
    had."""
    model, tokens = tiny_model(), tokens_of(N)
    with PromptStore(folder) as store:
        assert len(store.entries()) <= 1
        got, n = store.fetch(model, [*tokens, 1])
        assert n >= least
        if n:
            assert bits(got) == wanted[n]
        if n < N:
            feed(got or (got := made(("turbo", "plain"), "turbo4")), tokens[n:], [])
            store.put(model, tokens, got)
            store.flush()
            assert store.report()["errors"] == []
        again = bits(got)
    with PromptStore(folder) as store:
        got, n_got = store.fetch(model, [*tokens, 1])
        assert n_got == N and bits(got) == again
        assert store.verify() == []
    return n


@few_or_many
def test_no_fault_in_a_file_gives_a_wrong_cache(backend, whole, tmp_path_factory, n):
    settings(quick, max_examples=n)(given(st.data())(lambda data: damage(whole, tmp_path_factory, data)))()


def damage(whole, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("faults") / "store"
    shutil.copytree(whole[0], folder)
    paths = sorted((p for p in folder.iterdir() if p.name != MARK and p.stat().st_size), key=lambda p: p.stat().st_size)
    path = data.draw(st.sampled_from(paths))
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        what = data.draw(st.sampled_from(["flip", "zero", "cut", "swap", "gone", "grow"]))
        at = data.draw(st.integers(0, max(len(raw) - 1, 0)))
        if what == "flip" and raw:
            raw[at] ^= 1 << data.draw(st.integers(0, 7))
        elif what == "zero":
            n = len(raw[at : at + 4096])
            raw[at : at + n] = bytes(n)
        elif what == "swap":
            raw[at : at + 64], raw[:64] = raw[:64], raw[at : at + 64]
        elif what == "cut":
            del raw[at:]
        elif what == "grow":
            raw += b"x"
    path.write_bytes(raw)
    if what == "gone":
        path.unlink()
    check(folder, whole[1])


@few_or_many
def test_a_flipped_bit_of_a_piece_is_found_and_reported(backend, whole, tmp_path_factory, n):
    drawn = given(st.floats(0, 1, exclude_max=True), st.integers(0, 7), st.integers(0, 1))
    settings(quick, max_examples=n)(drawn(lambda at, bit, of: flip(whole, tmp_path_factory, at, bit, of)))()


def flip(whole, tmp_path_factory, at, bit, of_file):
    folder = tmp_path_factory.mktemp("bit") / "store"
    shutil.copytree(whole[0], folder)
    path = sorted(folder.glob("*" + files.SUFFIX))[of_file]
    pieces = [r for r in files.read_records(path)]
    raw = bytearray(path.read_bytes())
    record = pieces[int(at * len(pieces))]
    place = record.offset + int(at * len(pieces) % 1 * record.length)
    raw[place] ^= 1 << bit
    path.write_bytes(raw)
    with PromptStore(folder) as store:
        got, n = store.fetch(tiny_model(), [*tokens_of(N), 1])
        assert n < N and (not n or bits(got) == whole[1][n])
        assert [path.name in message for message in store.report()["damaged"]] == [True]
        assert n == {"root": 0, "end": 388}.get(record.kind, record.n - 128 if record.n > 132 else 0)
    assert check(folder, whole[1]) == n


def test_what_a_version_with_another_format_stored_is_forgotten_and_named(backend, whole, tmp_path, monkeypatch):
    folder = tmp_path / "store"
    shutil.copytree(whole[0], folder)
    monkeypatch.setattr(prompt_store, "FORMAT_VERSION", prompt_store.FORMAT_VERSION + 1)
    with PromptStore(folder) as store:
        assert store.fetch(tiny_model(), [*tokens_of(N), 1])[1] == 0
        said = store.report()["damaged"]
        assert said and all("another format of caches" in message for message in said)
    assert check(folder, whole[1]) == 0


@few_or_many
def test_an_index_that_says_something_else_gives_no_wrong_cache(backend, whole, tmp_path_factory, n):
    """Rows that have a field of another one, as a damaged page might have them."""
    fields = st.sampled_from([["parent"], ["hash"], ["digest"], ["n"], ["kind"], ["file"], ["offset", "length", "crc"]])
    drawn = given(fields, st.integers(0, 4), st.integers(0, 4))
    blocks_of_one_size, circle = example(["offset", "length", "crc"], 2, 3), example(["parent"], 2, 3)
    test = circle(blocks_of_one_size(drawn(lambda f, a, b: exchange(whole, tmp_path_factory, f, a, b))))
    settings(quick, max_examples=n)(test)()


def exchange(whole, tmp_path_factory, fields, a, b):
    folder = tmp_path_factory.mktemp("index") / "store"
    shutil.copytree(whole[0], folder)
    db = sqlite3.connect(folder / "index.db")
    rows = db.execute(f"SELECT id, {', '.join(fields)} FROM records ORDER BY n").fetchall()
    for (id, *_), (_, *others) in (rows[a], rows[b]), (rows[b], rows[a]):
        db.execute(f"UPDATE records SET {', '.join(f'{f} = ?' for f in fields)} WHERE id = ?", [*others, id])
    db.commit()
    db.close()
    check(folder, whole[1])


@pytest.mark.parametrize("which", range(5))
@pytest.mark.parametrize("place", ["-64, length", "offset, -1", "offset, 1 << 60", "1 << 60, length", "0, 0"])
def test_a_place_that_is_not_in_the_file_is_damage(backend, whole, tmp_path, which, place):
    folder = tmp_path / "store"
    shutil.copytree(whole[0], folder)
    db = sqlite3.connect(folder / "index.db")
    ids = [id for (id,) in db.execute("SELECT id FROM records ORDER BY n")]
    db.execute(f"UPDATE records SET (offset, length) = ({place}) WHERE id = ?", [ids[which]])
    db.commit()
    db.close()
    assert check(folder, whole[1]) < N


@pytest.mark.parametrize("until", [0.0, 0.3, 0.9])
def test_a_file_that_is_cut_while_it_is_read_is_damage(backend, whole, tmp_path, monkeypatch, until):
    """Memory-mapped, it would end the process."""
    folder, preadv, cut = tmp_path / "store", os.preadv, []
    shutil.copytree(whole[0], folder)
    path = max(folder.glob("*" + files.SUFFIX), key=lambda p: p.stat().st_size)

    def cut_first(fd, rooms, offset):
        if len(rooms[0]) > 10_000 and not cut:
            cut.append(path.name)
            os.truncate(path, int(until * path.stat().st_size))
        return preadv(fd, rooms, offset)

    monkeypatch.setattr(os, "preadv", cut_first)
    with PromptStore(folder) as store:
        got, n = store.fetch(tiny_model(), [*tokens_of(N), 1])
        assert n < N and (not n or bits(got) == whole[1][n])
        assert cut and path.name in store.report()["damaged"][0]
        store.verify()  # finds a root that was read before
    assert check(folder, whole[1]) == n


def test_bytes_of_an_earlier_reading_do_not_pass_for_what_is_not_there_any_more(backend, whole, monkeypatch):
    (path, *_) = whole[0].glob("*" + files.SUFFIX)
    (record, *_) = files.read_records(path)
    with files.opened(path) as file:
        piece = files.read_piece(file, record)
        monkeypatch.setattr(os, "preadv", lambda *args: 0)
        with pytest.raises(files.DamagedError):
            files.read_piece(file, record, piece)


def test_a_store_is_right_at_every_moment_of_writing(backend, whole, tmp_path, monkeypatch):
    """Copies of the folder in the middle of each write are what a kill at that moment would leave."""
    folder, write, n = tmp_path / "store", files.write_all, itertools.count()
    moments = []

    def copy_folder(*_):
        moments.append(tmp_path / f"moment{next(n)}")
        shutil.copytree(folder, moments[-1])
        for path in moments[-1].glob(".*"):  # of a process that has ended
            path.rename(path.with_suffix(".999999999"))

    def copied_in_the_middle(fd, data):
        view = memoryview(data).cast("B")
        write(fd, view[: len(view) // 2])
        copy_folder()
        write(fd, view[len(view) // 2 :])

    with PromptStore(folder) as store:
        monkeypatch.setattr(files, "write_all", copied_in_the_middle)
        monkeypatch.setattr(files, "sync_folder", copy_folder)  # renamed, and not in the index yet
        store.put(tiny_model(), tokens_of(N), cache_of(tokens_of(N)))
        store.flush()
        monkeypatch.undo()
    assert len(moments) > 10
    for moment in moments:
        with PromptStore(moment) as store:
            assert store.report()["damaged"] == store.verify() == []
    found = [check(moment, whole[1]) for moment in moments]
    assert found[0] == 0 and 388 in found and found[-1] == N and found == sorted(found)
    assert not [p for moment in moments for p in moment.glob(".*")]


def test_what_goes_on_from_something_unwritten_is_not_written_either(backend, tmp_path, monkeypatch):
    folder, model, tokens, write = tmp_path / "store", tiny_model(), tokens_of(900), files.write_file
    both_are_put, failures = threading.Event(), iter([True])

    def fails_once(*args):
        both_are_put.wait(60)
        if next(failures, False):
            raise OSError(errno.EIO, "Input/output error")
        write(*args)

    with PromptStore(folder) as store:
        monkeypatch.setattr(files, "write_file", fails_once)
        cache = cache_of(tokens[:N])
        store.put(model, tokens[:N], cache)
        store.put(model, tokens, feed(cache, tokens[N:], []))
        both_are_put.set()
        store.flush()
        assert [("Input/output" in e, "go on from" in e) for e in store.report()["errors"]] == [
            (True, False),
            (False, True),
        ]
        assert store.report()["nbytes"] == 0 and store.verify() == []
        store.put(model, tokens, cache)
    with PromptStore(folder) as store:
        assert store.fetch(model, [*tokens, 1])[1] == 900 and store.verify() == []


@pytest.mark.parametrize("lost", [["index.db"], ["index.db", "index.db-wal", "index.db-shm"]])
def test_the_index_is_made_anew_from_the_files(backend, whole, tmp_path, lost):
    folder = tmp_path / "store"
    shutil.copytree(whole[0], folder)
    for name in lost:
        folder.joinpath(name).unlink(missing_ok=True)
    assert check(folder, whole[1]) == N


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda folder: folder.joinpath(MARK).write_text('{"version": 7, "key": ""}'), "a store of version 7, this"),
        (lambda folder: folder.joinpath(MARK).write_text('{"version": 1}'), "is damaged"),
        (lambda folder: folder.joinpath(MARK).write_text("x"), "is damaged"),
        (lambda folder: _flip_key(folder / MARK), "is damaged"),
        (lambda folder: folder.joinpath(MARK).unlink(), "neither empty nor a prompt store"),
    ],
)
def test_a_folder_of_another_kind_is_refused_and_left_alone(backend, whole, tmp_path, change, said):
    folder = tmp_path / "store"
    shutil.copytree(whole[0], folder)
    change(folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(ValueError, match=said):
        PromptStore(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def _flip_key(path):
    written = json.loads(path.read_text())
    written["key"] = "0" * 64
    path.write_text(json.dumps(written))


def test_a_folder_that_cannot_be_made_or_written_is_an_error(backend, tmp_path, monkeypatch):
    tmp_path.joinpath("file").write_text("")
    with pytest.raises(OSError):
        PromptStore(tmp_path / "file" / "store")

    def read_only(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(files.os, "open", read_only)
    with pytest.raises(OSError, match="Read-only"):
        PromptStore(tmp_path / "store")


@settings(quick, max_examples=20)
@given(room=st.integers(0, 120_000), again=st.booleans())
def test_a_full_disk_costs_what_was_not_written(backend, whole, tmp_path_factory, room, again):
    folder, tokens, model, wanted = tmp_path_factory.mktemp("full") / "store", tokens_of(N), tiny_model(), whole[1]
    cache, write = cache_of(tokens), files.write_all
    left = room

    def write_until_full(fd, data):
        nonlocal left
        if len(memoryview(data).cast("B")) > left:
            write(fd, memoryview(data).cast("B")[:left])
            left = 0
            raise OSError(errno.ENOSPC, "No space left on device")
        left -= len(memoryview(data).cast("B"))
        write(fd, data)

    with pytest.MonkeyPatch.context() as patch, PromptStore(folder) as store:
        patch.setattr(files, "write_all", write_until_full)
        store.put(model, tokens, cache)
        store.flush()
        full = bool(store.report()["errors"])
        assert not full or "No space left" in store.report()["errors"][0] and store.report()["not_written"]
        got, n = store.fetch(model, [*tokens, 1])  # from memory
        assert n == N and bits(got) == wanted[N]
        if again:
            patch.undo()
            store.put(model, tokens, cache)
            store.flush()
            full = False
    assert not list(folder.glob(".*"))  # nothing half written is left
    n = check(folder, wanted)
    assert full or n == N


def test_disk_and_memory_stay_below_their_limits(backend, tmp_path):
    """The oldest conversation goes first, from its end; the blocks that others share stay."""
    folder, model, common = tmp_path / "store", tiny_model(), tokens_of(400)
    most, memory = 500_000, 150_000
    with PromptStore(folder, max_bytes=most, max_memory_bytes=memory) as store:
        store.put(model, common, cache_of(common))
        for seed in range(1, 9):
            tokens = [*common, *tokens_of(300, seed)]
            cache, n = store.fetch(model, tokens)
            assert n == 400
            store.put(model, tokens, feed(cache, tokens[n:], []))
            store.flush()
            report = store.report()
            on_disk = sum(p.stat().st_size for p in folder.glob("*" + files.SUFFIX))
            assert report["nbytes"] == on_disk <= most and report["memory_nbytes"] <= memory
        assert report["errors"] == report["damaged"] == store.verify() == []
        # the first one's file also has the block up to token 388, which all others go on from
        found = [store.fetch(model, [*common, *tokens_of(300, seed), 1])[1] for seed in range(1, 9)]
        assert found[-2:] == [700, 700] and found[0] == 516 and found[1:] == sorted(found[1:])
    with PromptStore(tmp_path / "other", max_bytes=most) as store:  # blocks are older than what goes on from them
        long = tokens_of(900)
        cache = cache_of(long[:500])
        store.put(model, long[:500], cache)
        store.put(model, long, feed(cache, long[500:], []))
        for seed in range(1, 7):
            store.put(model, tokens_of(300, seed), cache_of(tokens_of(300, seed)))
            store.flush()
            assert store.verify() == []
        assert len(store.entries()) < 8
    with PromptStore(tmp_path / "small", max_bytes=10_000) as store:
        store.put(model, common, cache_of(common))
        store.flush()
        assert "more than max_bytes" in store.report()["errors"][0] and store.report()["nbytes"] == 0


def test_more_than_may_wait_is_not_written_and_comes_with_the_next_put(backend, tmp_path, monkeypatch):
    tokens, model = tokens_of(N), tiny_model()
    with PromptStore(tmp_path / "s") as store:
        monkeypatch.setattr(prompt_store, "MOST_QUEUED", 1000)
        store.put(model, tokens, cache_of(tokens))
        store.flush()
        assert store.report()["not_written"] == 5 and "bytes not written" in store.report()["errors"][0]
        assert store.report()["nbytes"] == 0 and store.fetch(model, [*tokens, 1])[1] == N
        monkeypatch.undo()
        store.put(model, tokens, cache_of(tokens))
    with PromptStore(tmp_path / "s") as store:
        assert store.fetch(model, [*tokens, 1])[1] == N


def test_threads_and_two_stores_on_one_folder(backend, tmp_path):
    folder, model = tmp_path / "store", tiny_model()
    common = tokens_of(400)
    wanted = {}
    for seed in range(6):
        tokens = [*common, *tokens_of(150, seed + 1)]
        wanted[seed] = tokens, bits(cache_of(tokens))
    failed = []

    def work(store, seeds):
        try:
            for seed in seeds:
                tokens, want = wanted[seed]
                store.put(model, tokens, cache_of(tokens))
                got, n = store.fetch(model, [*tokens, 1])
                assert n == 550 and bits(got) == want
        except BaseException as e:
            failed.append(e)

    with PromptStore(folder) as one, PromptStore(folder, max_memory_bytes=0) as other:
        other.put(model, *((wanted[0][0]), cache_of(wanted[0][0])))
        other.flush()
        threads = [threading.Thread(target=work, args=(one, s)) for s in ([0, 1, 2], [3, 4, 5], [5, 0, 3])]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed, failed
        one.flush()
        for tokens, want in wanted.values():
            got, n = other.fetch(model, [*tokens, 1])
            assert n == 550 and bits(got) == want
        assert one.report()["errors"] == other.report()["errors"] == other.verify() == []


WRITER = """
import sys
sys.path[:0] = {paths!r}
from support.stored import feed, made, tiny_model, tokens_of
from mlx_turbo import PromptStore
store, model = PromptStore({folder!r}, max_bytes=2_000_000), tiny_model()
print("ready", flush=True)
for seed in range({first}, {first} + 1000):
    tokens = [*tokens_of(300), *tokens_of(300, seed)]
    store.put(model, tokens, feed(made(("turbo", "plain"), "turbo4"), tokens, [300]))
    store.flush()
    print(seed, flush=True)
"""


@pytest.mark.parametrize("rounds", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_processes_that_are_killed_leave_a_store_that_is_right(backend, tmp_path, rounds):
    """Two processes write to one folder and are killed at any moment; what was flushed is there, and all is right."""
    folder, model, tests = tmp_path / "store", tiny_model(), Path(__file__).parents[1]
    rng = random.Random(0)
    for round in range(rounds):
        text = [
            WRITER.format(paths=[str(tests), str(tests.parent)], folder=str(folder), first=1 + 1000 * (2 * round + i))
            for i in range(2)
        ]
        writers = [subprocess.Popen([sys.executable, "-c", t], stdout=subprocess.PIPE, text=True) for t in text]
        last = []
        for writer in writers:
            for _ in range(3):
                line = writer.stdout.readline()
        time.sleep(rng.random() * 0.3)
        for writer in writers:
            os.kill(writer.pid, signal.SIGKILL)
            rest = writer.communicate()[0].split()
            last.append(int((rest or [line])[-1] if (rest or [line])[-1] != "ready" else 0))
        with PromptStore(folder, max_bytes=2_000_000) as store:
            assert store.verify() == [] and store.report()["damaged"] == []
            for seed in last:
                tokens = [*tokens_of(300), *tokens_of(300, seed)]
                got, n = store.fetch(model, [*tokens, 1])
                assert n == 600
                assert bits(got) == bits(feed(made(("turbo", "plain"), "turbo4"), tokens, [300]))
            assert sum(p.stat().st_size for p in folder.glob("*" + files.SUFFIX)) <= 2_000_000 + 100_000
            assert not list(folder.glob(".*"))
