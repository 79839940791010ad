"""mlx-turbo store: list, verify, export and delete."""

import json
import re

import pytest
from support.caches import FAST_BACKENDS
from support.stored import bits, feed, made, tiny_model, tokens_of

from mlx_turbo import PromptStore, load_prompt_cache
from mlx_turbo.store import files
from mlx_turbo.store.prompt_store import default_folder

pytestmark = [pytest.mark.parametrize("backend", FAST_BACKENDS, indirect=True), pytest.mark.usefixtures("door")]


@pytest.fixture
def store(tmp_path, monkeypatch, run):
    """store(*argv) of a folder with two conversations of one model, which share blocks, and one of another."""
    model, tokens = tiny_model(), tokens_of(900)
    with PromptStore(tmp_path / "store") as store:
        cache = feed(made(["turbo", "plain"], "turbo4"), tokens[:500], [])
        store.put(model, tokens[:500], cache)
        store.put(model, tokens, feed(cache, tokens[500:], []))
        store.put(tiny_model(1), tokens, cache)
    return lambda *argv: run("store", *argv, "--store", tmp_path / "store")


def entries(store):
    return json.loads(store("list", "--json")[1])["entries"]


def test_list_names_the_caches_and_what_they_share(backend, store):
    code, out, _ = store("list")
    rows = re.findall(
        r"^([0-9a-f]{8}) +(\d+) +([0-9.]+) +([0-9.]+)  .* ([0-9a-f]{8}) \(Linear, 0.0M numbers\)$", out, re.M
    )
    assert code == 0 and "3 caches, 12 blocks" in out and sorted(int(n) for _, n, *_ in rows) == [500, 900, 900]
    assert len({model for *_, model in rows}) == 2
    assert all((float(shared) > 0) == (e["shared_nbytes"] > 50_000) for (*_, shared, _), e in zip(rows, entries(store)))


def test_verify_says_what_is_damaged_and_forgets_it(backend, store, tmp_path):
    assert store("verify")[:2] == (0, "12 blocks and 3 ends are as they were written, 0 were damaged\n")
    path = max((tmp_path / "store").glob("*" + files.SUFFIX), key=lambda p: p.stat().st_size)
    record = files.read_records(path)[-1]
    raw = bytearray(path.read_bytes())
    raw[record.offset] ^= 1
    path.write_bytes(raw)
    code, out, _ = store("verify")
    assert code == 1 and f"{path.name}: a block of {record.n} tokens is damaged" in out
    assert store("verify")[0] == 0 and len(entries(store)) < 3


def test_an_exported_cache_is_a_file_of_mlx_lm_s(backend, store, tmp_path):
    (short,) = [e for e in entries(store) if e["tokens"] == 500]
    assert store("export", short["id"][:10], tmp_path / "a.safetensors")[0] == 0
    want = feed(made(["turbo", "plain"], "turbo4"), tokens_of(900)[:500], [])
    assert bits(load_prompt_cache(tmp_path / "a.safetensors")) == bits(want)


def test_delete_by_id_model_age_and_all(backend, store, tmp_path):
    first = entries(store)
    (short,) = [e for e in first if e["tokens"] == 500]
    other = next(m for m in {e["model"] for e in first} if m != short["model"])
    assert store("delete", "--older-than", "1h")[1].startswith("0.0 MB are free") and len(entries(store)) == 3
    assert store("delete", "--model", other[:8])[0] == 0
    assert {e["model"] for e in entries(store)} == {short["model"]}
    assert store("delete", short["id"][:8])[0] == 0
    assert [e["tokens"] for e in entries(store)] == [900]
    assert store("delete", "--all")[1].endswith(" 0.0 MB are left\n") and entries(store) == []
    assert not list((tmp_path / "store").glob("*" + files.SUFFIX))


@pytest.mark.parametrize(
    "argv, said",
    [
        (["delete"], "delete: say what"),
        (["delete", "--all", "--older-than", "1h"], "delete: say what"),
        (["delete", "--older-than", "soon"], "--older-than: got 'soon', expected a number with m, h or d"),
        (["delete", "zz"], "delete: 0 in this store begin with 'zz', expected one"),
        (["delete", "--model", ""], "delete: say what"),
        (["export", "0"], "export: got 1 names, expected 2"),
        (["list", "--all"], "list: --all, --model and --older-than go with delete"),
        (["verify", "x"], "verify: got 1 names, expected 0"),
        (["show"], "invalid choice: 'show'"),
    ],
)
def test_wrong_arguments_are_one_line(backend, store, argv, said):
    code, out, err = store(*argv)
    assert code == 2 and said in err and err.count("\n") == 1 and out == ""


def test_a_folder_without_a_store_is_not_made(backend, run, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    code, _, err = run("store", "list")
    assert code == 2 and f"there is no prompt store in {str(default_folder())!r}" in err
    assert not default_folder().exists() and tmp_path in default_folder().parents
