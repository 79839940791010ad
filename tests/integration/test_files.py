"""Prompt caches in files: what comes back is what was saved, and a file that is not whole is an error that names it."""

import copy
import json
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import mlx_lm.models.cache as lm_cache
import numpy as np
import pytest
from support.arrays import to_numpy
from support.backends import BACKENDS
from support.caches import FAST_BACKENDS, filled, random_tokens, same, snapshot, stored

import mlx_turbo
from mlx_turbo import RotatingTurboKVCache, TurboKVCache, load_prompt_cache, save_prompt_cache, use_backend
from mlx_turbo.cache.state import FORMAT_VERSION
from mlx_turbo.integration.prompt_cache import flatten_caches
from mlx_turbo.integration.sparse_indexer import IndexedCacheList

pytestmark = [pytest.mark.parametrize("backend", FAST_BACKENDS, indirect=True), pytest.mark.usefixtures("door")]


def window(n=50, scheme="turbo4"):
    cache = RotatingTurboKVCache(24, 2, scheme, recent=4, block=4)
    keys, values = random_tokens(np.random.default_rng(1), n)
    cache.update_and_fetch(keys, values)
    return cache


def plain(kind=lm_cache.KVCache, n=9):
    cache = kind()
    cache.update_and_fetch(*random_tokens(np.random.default_rng(2), n))
    return cache


def prompt_cache():
    """A layer of each kind: packed, with means, at other bits, a window, auto undecided, empty, mlx-lm's own, lists."""
    return [
        filled(60),
        filled(200, bias=9),
        filled(30, "turbo8v3", key_dim=80),
        filled(40, "turbo0v2"),
        window(),
        filled(20, "auto"),
        TurboKVCache("turbo2"),
        plain(),
        plain(lambda: lm_cache.RotatingKVCache(6, 2)),
        lm_cache.CacheList(plain(), filled(20)),
        IndexedCacheList(filled(60), plain()),
    ]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "story.safetensors"
    save_prompt_cache(path, prompt_cache(), {"model": "demo", "quotes": '"0.mlx_turbo":"version=1 crc32=00000000"'})
    return path


def arrays(cache):
    return [to_numpy(a) for a in lm_state(cache) if isinstance(a, mx.array)]


def lm_state(cache):
    from mlx.utils import tree_flatten

    return [a for _, a in tree_flatten(cache.state)]


# ---- what comes back ---------------------------------------------------------------------------------------------
def test_what_is_loaded_is_what_was_saved(backend, file):
    loaded, metadata = load_prompt_cache(str(file), return_metadata=True)
    assert metadata == {"model": "demo", "quotes": '"0.mlx_turbo":"version=1 crc32=00000000"'}
    assert [type(c) for c in loaded] == [type(c) for c in prompt_cache()]
    for got, want in zip(flatten_caches(loaded), flatten_caches(prompt_cache()), strict=True):
        assert type(got) is type(want)
        if isinstance(want, TurboKVCache):
            assert got.config == want.config and got.undecided == want.undecided
            assert same(stored(got), stored(want)) and got.offset == want.offset
        else:
            assert same(arrays(got), arrays(want)) and (got.offset, got.size()) == (want.offset, want.size())
    assert [p.name for p in file.parent.iterdir()] == [file.name]


def test_mlx_lm_loads_it_too_and_its_own_files_are_loaded(backend, file, tmp_path):
    theirs, metadata = lm_cache.load_prompt_cache(str(file), return_metadata=True)
    assert metadata["model"] == "demo" and [type(c) for c in theirs] == [type(c) for c in prompt_cache()]
    other = tmp_path / "other.safetensors"
    lm_cache.save_prompt_cache(str(other), prompt_cache(), {"model": "demo"})
    ours, metadata = load_prompt_cache(other, return_metadata=True)
    assert metadata == {"model": "demo"}
    assert all(same(arrays(a), arrays(b)) for a, b in zip(ours, theirs))


@pytest.mark.parametrize("name", ["story", "story.v1", "story.safetensors"])
def test_the_name_ends_as_mlx_lm_s(backend, tmp_path, name):
    save_prompt_cache(tmp_path / name, [filled()])
    assert [p.name for p in tmp_path.iterdir()] == [name.removesuffix(".safetensors") + ".safetensors"]


def test_a_loaded_cache_is_trimmed_copied_and_goes_on_as_the_original(backend, tmp_path):
    save_prompt_cache(tmp_path / "a", [filled(60), window(20)])
    loaded = load_prompt_cache(tmp_path / "a.safetensors")
    for kept, cache in zip((filled(60), window(20)), loaded):
        for n in 3, 9:  # hit, trim to the common prefix, go on; the stored one stays as it is
            before = snapshot(cache)
            ours, theirs = copy.deepcopy(cache), copy.deepcopy(kept)
            assert ours.trim(n) == theirs.trim(n) == n
            for i in range(30):
                new = random_tokens(np.random.default_rng(i), 1 + 5 * (i == 7))
                assert same(
                    [to_numpy(x) for x in ours.update_and_fetch(*new)],
                    [to_numpy(x) for x in theirs.update_and_fetch(*new)],
                )
            assert same(snapshot(cache), before)


@pytest.mark.parametrize("writer, reader", [(a, b) for a in BACKENDS for b in BACKENDS if "oracle" not in (a, b)])
def test_a_file_of_one_backend_has_the_same_codes_in_another(backend, tmp_path, writer, reader):
    with use_backend(BACKENDS[writer]):
        caches = [filled(60, bias=9), filled(40, "turbo3"), window(30)]
        save_prompt_cache(tmp_path / "a.safetensors", caches)
    new = random_tokens(np.random.default_rng(5), 20)
    with use_backend(BACKENDS[reader]):
        for got, want in zip(load_prompt_cache(tmp_path / "a.safetensors"), caches):
            assert same(stored(got), stored(want))
            for x, y in zip(got.update_and_fetch(*new), want.update_and_fetch(*new)):
                np.testing.assert_allclose(to_numpy(x), to_numpy(y), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme, close", [("turbo0", 0), ("turbo8", 0.01), ("turbo4", 0.12)])
def test_a_plain_kv_cache_comes_back(backend, scheme, close):
    cache, theirs = filled(60, scheme), lm_cache.KVCache()
    theirs.update_and_fetch(*random_tokens(np.random.default_rng(0), 60))
    for new in None, random_tokens(np.random.default_rng(5), 3):
        back = cache.to_kv_cache()
        assert type(back) is lm_cache.KVCache and back.offset == cache.offset
        if new:
            back.update_and_fetch(*new)
            theirs.update_and_fetch(*new)
        assert back.offset == theirs.offset
        for got, want in zip((back.keys, back.values), (theirs.keys, theirs.values)):
            assert type(got) is mx.array
            got, want = (to_numpy(x)[:, :, : theirs.offset] for x in (got, want))
            assert np.linalg.norm(got - want) <= close * np.linalg.norm(want)
    assert TurboKVCache(scheme).to_kv_cache().empty()


@pytest.mark.parametrize("scheme, close", [("turbo0", 0.01), ("turbo8", 0.02), ("turbo4", 0.12)])
def test_mlx_lm_s_quantized_cache_is_made_of_the_restored_tokens_and_says_so(backend, scheme, close):
    cache, given = filled(60, scheme), random_tokens(np.random.default_rng(0), 60)
    before = snapshot(cache)
    with pytest.warns(UserWarning, match=rf"\({scheme}\) becomes mlx-lm's QuantizedKVCache \(8 bits, .* 32"):
        quantized = cache.to_quantized(group_size=32, bits=8)
    assert type(quantized) is lm_cache.QuantizedKVCache and (quantized.bits, quantized.group_size) == (8, 32)
    want = cache.to_kv_cache().to_quantized(group_size=32, bits=8)
    new = random_tokens(np.random.default_rng(5), 3)
    fetched = quantized.update_and_fetch(*new)
    for got, want in zip(fetched, want.update_and_fetch(*new)):
        assert same([to_numpy(a) for a in got], [to_numpy(a) for a in want])
    given = [mx.concatenate(pair, axis=2) for pair in zip(given, new)]
    for got, want in zip(fetched, given):
        got, want = to_numpy(mx.dequantize(*got, group_size=32, bits=8)), to_numpy(want)
        assert np.linalg.norm(got - want) <= close * np.linalg.norm(want)
    assert quantized.offset == 63 and same(snapshot(cache), before)


@pytest.mark.filterwarnings("ignore:a TurboKVCache")
def test_what_mlx_lm_has_no_quantized_cache_for_is_refused(backend):
    assert TurboKVCache().to_quantized().empty()
    cache = filled(60)
    for options, match in (dict(group_size=64), "group size 64"), (dict(group_size=32, bits=7), "bits 7"):
        with pytest.raises(ValueError, match=match):
            cache.to_quantized(**options)
    for cache, what in (
        (window(), "window"),
        (TurboKVCache.merge([filled(60)]), "batch"),
        (RotatingTurboKVCache.merge([window()]), "window"),
    ):
        before = cache.state
        with pytest.raises(NotImplementedError, match=f"no quantized cache of a {what}, .* stays turbo4"):
            cache.to_quantized(group_size=32)
        assert same([np.array(a) for a in cache.state], [np.array(a) for a in before])


# ---- writing -----------------------------------------------------------------------------------------------------
class Unwritable(TurboKVCache):
    @property
    def state(self):
        raise RuntimeError("out of memory")


def test_a_failed_save_leaves_the_old_file_and_nothing_else(backend, file):
    before = file.read_bytes()
    with pytest.raises(RuntimeError, match="out of memory"):
        save_prompt_cache(file, [filled(), Unwritable()])
    assert file.read_bytes() == before and [p.name for p in file.parent.iterdir()] == [file.name]


def test_a_save_that_is_killed_leaves_the_old_file(backend, file):
    before = file.read_bytes()
    code = f"""
import os, mlx_turbo.integration.prompt_cache_file as files
from mlx_turbo import TurboKVCache
files._checksum = lambda *args: os._exit(3)
files.save_prompt_cache({str(file)!r}, [TurboKVCache()])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(mlx_turbo.__file__).parents[1])
    assert done.returncode == 3 and file.read_bytes() == before
    load_prompt_cache(file)


def test_threads_and_processes_that_save_one_file_leave_one_of_theirs_at_any_moment(backend, tmp_path):
    file, n_writers = tmp_path / "a.safetensors", 3
    caches = [[filled(30 + 10 * n) for _ in range(1 + n)] for n in range(n_writers)]
    for cache in caches:
        mx.eval([c.state for c in cache])
    save_prompt_cache(file, caches[0])
    code = f"""
import sys
sys.path[:0] = {[str(Path(mlx_turbo.__file__).parents[1]), str(Path(__file__).parents[1])]!r}
from mlx_turbo import save_prompt_cache
from support.caches import filled
cache = [filled(90) for _ in range(5)]
for _ in range(20):
    save_prompt_cache({str(file)!r}, cache)
"""
    others = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    stop, seen, deadline = threading.Event(), set(), time.time() + 60

    def write(n):
        while not stop.is_set():
            save_prompt_cache(file, caches[n])

    with ThreadPoolExecutor(n_writers) as pool:
        writing = [pool.submit(write, n) for n in range(n_writers)]
        try:
            while any(p.poll() is None for p in others) or len(seen) < n_writers + 1:
                assert time.time() < deadline
                loaded = load_prompt_cache(file)
                seen.add((len(loaded), *{c.offset for c in loaded}))
        finally:
            stop.set()
        for done in writing:
            done.result()
    assert [p.returncode for p in others] == [0, 0] and [p.name for p in tmp_path.iterdir()] == [file.name]
    assert seen == {(1, 30), (2, 40), (3, 50), (5, 90)}


def test_without_mlx_turbo_mlx_lm_names_what_to_do(backend, tmp_path):
    """A process of mlx_lm alone: its KeyError is all it says about a class it does not have."""
    kinds = [filled(60), window(), lm_cache.CacheList(plain(), filled(20)), IndexedCacheList(filled(60), plain())]
    for i, cache in enumerate(kinds):
        save_prompt_cache(tmp_path / f"{i}", [cache, filled(30)])
        save_prompt_cache(tmp_path / f"{i} later", [plain(), plain(), cache])
    code = f"""
import pathlib, mlx_lm.models.cache as c
for file in pathlib.Path({str(tmp_path)!r}).iterdir():
    try:
        c.load_prompt_cache(str(file))
    except KeyError as e:
        print(e)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2 * len(kinds)
    assert all("written by mlx_turbo" in line and "mlx-turbo generate" in line for line in lines)


def test_the_checksum_s_name_and_a_missing_folder_are_refused(backend, tmp_path):
    with pytest.raises(ValueError, match="metadata: 'mlx_turbo'"):
        save_prompt_cache(tmp_path / "a", [filled()], {"mlx_turbo": "mine"})
    with pytest.raises((OSError, RuntimeError)):
        save_prompt_cache(tmp_path / "no" / "a", [filled()])
    with pytest.raises(FileNotFoundError):
        load_prompt_cache(tmp_path / "a.safetensors")


def test_the_state_that_mlx_lm_evaluates_has_no_checksum(backend, monkeypatch):
    monkeypatch.setattr(zlib, "crc32", None)
    mx.eval([c.state for c in prompt_cache()])


# ---- damage ------------------------------------------------------------------------------------------------------
def refused(path, data, match="."):
    path.write_bytes(data)
    with pytest.raises(ValueError, match=match) as caught:
        load_prompt_cache(path)
    assert repr(str(path)) in str(caught.value)


def mutations(data, n):
    """n damaged copies of a file's bytes, of each kind in turn."""
    rng, n_header = np.random.default_rng(0), 8 + int.from_bytes(data[:8], "little")
    for i in range(n):
        at, kind = int(rng.integers(8 if i % 3 else n_header, n_header if i % 3 else len(data))), i % 7
        damaged = bytearray(data)
        if kind < 3:  # a bit in the header or the data
            damaged[at] ^= 1 << int(rng.integers(8))
        elif kind == 3:
            del damaged[int(rng.integers(len(data))) :]
        elif kind == 4:
            del damaged[at : at + int(rng.integers(1, 9))]
        elif kind == 5:
            damaged[at:at] = bytes(rng.integers(0, 256, 4, np.uint8))
        else:
            damaged[at : at + 16] = bytes(rng.integers(0, 256, 16, np.uint8))[: len(damaged[at : at + 16])]
        yield bytes(damaged)


def test_300_damaged_files_are_refused(backend, file):
    data = file.read_bytes()
    for damaged in mutations(data, 300):
        refused(file, damaged)
    for at in range(8):
        refused(file, data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    file.write_bytes(data)
    load_prompt_cache(file)


def test_a_damaged_file_of_mlx_lm_s_is_refused_or_loaded_whole(backend, tmp_path):
    """Without a checksum numbers can be wrong, but lengths, classes and headers must fit."""
    file, n_refused = tmp_path / "a.safetensors", 0
    lm_cache.save_prompt_cache(str(file), prompt_cache(), {"model": "demo"})
    data = file.read_bytes()
    for n in *range(0, len(data), len(data) // 60), len(data) - 1:
        refused(file, data[:n], "truncated")
    for damaged in mutations(data, 140):
        file.write_bytes(damaged)
        try:
            assert len(load_prompt_cache(file)) <= len(prompt_cache())
        except ValueError as e:
            n_refused += repr(str(file)) in str(e)
    assert n_refused > 60


def rewritten(data, change):
    """A file's bytes with another header, `change`d as a dict, and a checksum that fits it."""
    n = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + n]), data[8 + n :]
    body = change(header, bytearray(body)) or body
    entry = next((k for k in header.get("__metadata__", {}) if k.endswith(".mlx_turbo")), None)
    if entry and header["__metadata__"][entry].startswith("version=1 "):
        header["__metadata__"][entry] = "version=1 crc32=00000000"
    text = json.dumps(header, separators=(",", ":")).encode()
    whole = len(text).to_bytes(8, "little") + text + bytes(body)
    return whole.replace(
        b'.mlx_turbo":"version=1 crc32=00000000"', b'.mlx_turbo":"version=1 crc32=%08x"' % zlib.crc32(whole), 1
    )


def classes_of(metadata):
    """The keys of the metadata that hold class names."""
    return [k for k, v in metadata.items() if v == "TurboKVCache" or v.endswith("KVCache")]


def test_a_file_that_was_rewritten_whole_is_loaded(backend, file):
    """Else the tests below would see the checksum only."""
    file.write_bytes(rewritten(file.read_bytes(), lambda header, body: None))
    assert len(load_prompt_cache(file)) == len(prompt_cache())


def test_another_version_of_the_file_or_of_a_state_is_refused(backend, tmp_path):
    file = tmp_path / "a.safetensors"
    save_prompt_cache(file, [filled()])
    data = file.read_bytes()
    refused(
        file,
        data.replace(b"version=1", b"version=2"),
        "version 2 of the file format, but this mlx_turbo reads version 1",
    )

    def newer(header, body):
        at = header["0.0"]["data_offsets"][0]
        body[at + 4 : at + 8] = (FORMAT_VERSION + 1).to_bytes(4, "little")
        return body

    refused(file, rewritten(data, newer), f"format version {FORMAT_VERSION + 1}, .* reads 2, 3, {FORMAT_VERSION}")


@pytest.mark.parametrize(
    "name, match",
    [
        ("Foo", "class 'Foo', which the installed mlx-lm does not have"),
        ("deque", "class 'deque'"),
        ("nn", "class 'nn'"),
        ("KVCache", "not the state of a KVCache"),
        ("QuantizedKVCache", "not the state of a QuantizedKVCache"),
        ("ArraysCache", "not the state of a ArraysCache"),
        ("RotatingTurboKVCache", "not the state of a RotatingTurboKVCache"),
    ],
)
def test_a_file_of_another_class_is_refused(backend, tmp_path, name, match):
    file = tmp_path / "a.safetensors"
    save_prompt_cache(file, [filled()])

    def rename(header, body):
        for key in classes_of(header["__metadata__"]):
            header["__metadata__"][key] = name

    refused(file, rewritten(file.read_bytes(), rename), match)


@pytest.mark.parametrize(
    "make, match", [(plain, "not the state of a TurboKVCache"), (window, "not the state of a TurboKVCache")]
)
def test_a_cache_that_says_it_is_ours_is_refused(backend, tmp_path, make, match):
    file = tmp_path / "a.safetensors"
    save_prompt_cache(file, [make()])

    def rename(header, body):
        for key in classes_of(header["__metadata__"]):
            header["__metadata__"][key] = "TurboKVCache"

    refused(file, rewritten(file.read_bytes(), rename), match)


def test_swapped_headers_and_missing_or_foreign_arrays_are_refused(backend, tmp_path):
    file = tmp_path / "a.safetensors"
    save_prompt_cache(file, [filled(60), filled(30), filled(60, "turbo3"), filled(60, heads=3)])
    data = file.read_bytes()
    load_prompt_cache(file)
    layers, n = range(4), 0

    def swap(a, b):
        def change(header, body):
            header[a], header[b] = header[b], header[a]

        return change

    for i in layers:
        for j in layers:
            for part in range(9):
                a, b = f"{i}.{part}", f"{j}.{(part + 1) % 9}"
                refused(file, rewritten(data, swap(a, b)))
                n += 1
    for i in 1, 2:  # the last one has the header of the first
        refused(file, rewritten(data, swap("0.0", f"{i}.0")), "state: ")
    for key in "0.0", "1.4", "2.8":

        def drop(header, body):
            start, end = header.pop(key)["data_offsets"]
            for t in header.values():
                if "data_offsets" in t and t["data_offsets"][0] >= end:
                    t["data_offsets"] = [x - end + start for x in t["data_offsets"]]
            return body[:start] + body[end:]

        refused(file, rewritten(data, drop))
    assert n == 144


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 4,
        b"\0" * 64,
        b"\xff" * 64,
        b"GGUF" + b"\0" * 100,
        b"\x80\x02}q\0." * 9,
        (2).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (4).to_bytes(8, "little") + b"null",
        (9).to_bytes(8, "little") + b'{"a":null',
        (9).to_bytes(8, "little") + b'{"a": {}}',
        (20000).to_bytes(8, "little") + b"[" * 20000,
        (41).to_bytes(8, "little") + b'{"__metadata__":{"0.mlx_turbo":"version"}}'[:41],
    ],
)
def test_something_else_is_refused(backend, tmp_path, data):
    refused(tmp_path / "a.safetensors", data)


def test_weights_and_folders_are_refused(backend, tmp_path):
    mx.save_safetensors(str(tmp_path / "w.safetensors"), {"weight": mx.ones((4, 4))}, {"format": "mlx"})
    refused(tmp_path / "w.safetensors", (tmp_path / "w.safetensors").read_bytes(), "not a prompt cache")
    with pytest.raises(OSError):
        load_prompt_cache(tmp_path)
