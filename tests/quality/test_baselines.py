"""The caches that ours are compared with: exact ends around another cache, and caches by import path."""

import json
import sys

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import KVCache, QuantizedKVCache, RotatingKVCache
from support.models import gemma3, llama

from mlx_turbo import TurboKVCache
from mlx_turbo.quality import baselines, metrics
from mlx_turbo.quality.baselines import ExactEndsCache

HEADS, DIM = 2, 64


def tokens(n, seed):
    """Keys and values [1, HEADS, n, DIM] without meaning."""
    return [mx.random.normal((1, HEADS, n, DIM), key=mx.random.key(2 * seed + i)) for i in range(2)]


def exact_columns(cache, chunks):
    """For each chunk that passes through a cache, which tokens `update_and_fetch` returns as they were: bool [N]."""
    given, out = [tokens(n, i) for i, n in enumerate(chunks)], []
    for i in range(len(chunks)):
        seen = cache.update_and_fetch(*given[i])
        whole = [mx.concatenate([pair[side] for pair in given[: i + 1]], axis=2) for side in (0, 1)]
        out.append([np.array((x == w).all((0, 1, 3))).tolist() for x, w in zip(seen, whole)])
        assert cache.offset == sum(chunks[: i + 1])
    return out


# ---- the same exact tokens -----------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(0, 5), st.integers(0, 20), st.integers(1, 20))
def test_the_same_tokens_are_exact_as_in_our_cache_at_every_step(chunks, sink, recent, block):
    ours = TurboKVCache("turbo4", sink=sink, recent=recent, block=block)
    theirs = ExactEndsCache(QuantizedKVCache(64, 4), sink, recent, block)
    assert exact_columns(theirs, chunks) == exact_columns(ours, chunks)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_packing_without_loss_keeps_every_token_in_its_place(chunks):
    assert all(map(all, sum(exact_columns(ExactEndsCache(KVCache(), 3, 8, 8), chunks), [])))


def test_what_is_packed_is_mlx_lm_s_own_quantization():
    cache, (keys, values) = ExactEndsCache(QuantizedKVCache(64, 4), 2, 8, 8), tokens(60, 0)
    cache.update_and_fetch(keys[:, :, :40], values[:, :, :40])
    seen, _ = cache.update_and_fetch(keys[:, :, 40:44], values[:, :, 40:44])
    expected = mx.dequantize(*mx.quantize(keys[:, :, 2:32], 64, 4), 64, 4)
    assert (seen[:, :, 2:32] == expected).all() and cache.make_mask(3, return_array=True).shape == (3, 47)


def test_its_bits_are_those_of_the_packed_tokens_and_of_buffers_for_the_exact_ones():
    cache = ExactEndsCache(QuantizedKVCache(64, 4), 4, 64, 64)
    for i in range(20):
        cache.update_and_fetch(*(x.astype(mx.bfloat16) for x in tokens(30, i)))
    bytes_of_exact = 2 * HEADS * DIM * 2 * (4 + 64 + 64)
    assert cache.nbytes == cache.packed.nbytes + bytes_of_exact
    assert metrics.resident_bits([cache]) == 8 * cache.nbytes / (2 * HEADS * DIM * 600)
    assert metrics.packed_bits([cache]) == 4.5
    assert metrics.projected_bits([cache]) == pytest.approx(4.5 + 16 * 132 / 32768)  # 128 whole steps packed


def test_layers_without_a_plain_cache_keep_theirs():
    model = gemma3()
    caches = baselines.keep_exact(model, model.make_cache(), 4, 8, 8)
    assert [type(c) for c in caches] == [
        RotatingKVCache if type(c) is RotatingKVCache else ExactEndsCache for c in model.make_cache()
    ]
    assert any(type(c) is ExactEndsCache for c in caches)


class Opaque(KVCache):
    """Returns something that only its own attention can read."""

    def update_and_fetch(self, keys, values):
        super().update_and_fetch(keys, values)
        return None, None


def test_a_cache_that_returns_no_arrays_cannot_get_exact_ends():
    with pytest.raises(ValueError, match=r"Opaque.update_and_fetch returned NoneType; .* \[batch, n_kv_heads, 12, "):
        ExactEndsCache(Opaque(), 0, 8, 8).update_and_fetch(*tokens(20, 0))


# ---- which tokens are exact, measured ------------------------------------------------------------------------
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 5), st.integers(0, 30), st.integers(1, 30), st.integers(1, 40))
def test_exact_tokens_are_what_the_configuration_says(sink, recent, block, chunk):
    plain = KVCache()
    plain.update_and_fetch(*tokens(4, 0))
    found = metrics.exact_tokens(
        lambda: [TurboKVCache("turbo3", sink=sink, recent=recent, block=block)], [plain], chunk, 256
    )
    assert (found.first, found.chunk) == (sink, True)
    low, high = found.newest
    assert recent <= low <= high <= recent + block
    if chunk > block:
        assert low == high == recent


def test_exact_tokens_of_other_caches():
    plain = KVCache()
    plain.update_and_fetch(*tokens(4, 0))
    for make, expected in (
        (lambda: [QuantizedKVCache(64, 4)], metrics.ExactTokens(0, (0, 0), False)),
        (lambda: [KVCache()], "all"),
        (lambda: [TurboKVCache("turbo0")], "all"),
        (lambda: [TurboKVCache("turbo0v4", sink=3, recent=9, block=9)], metrics.ExactTokens(3, (9, 9), True)),
        (lambda: [Opaque()], None),
    ):
        assert metrics.exact_tokens(make, [plain], 20, 200) == expected
    assert metrics.exact_tokens(lambda: [KVCache()], [RotatingKVCache(8)], 20, 200) is None


# ---- caches by import path -----------------------------------------------------------------------------------
FOREIGN = """
import mlx.core as mx
from mlx_lm.models.cache import KVCache

class Rounding(KVCache):
    def update_and_fetch(self, keys, values):
        return super().update_and_fetch(mx.round(keys * 4) / 4, mx.round(values * 4) / 4)

def make(model):
    return [Rounding() for _ in model.layers]

class NotACache:
    offset = 0

held = KVCache()
held.offset = 7

def short(model): return [KVCache()]
def dictionary(model): return {}
def not_caches(model): return [NotACache() for _ in model.layers]
def full(model): return [held for _ in model.layers]
def raises(model): raise KeyError("codebook")
number = 3
"""


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """A module `foreign_cache` in the working directory."""
    (tmp_path / "foreign_cache.py").write_text(FOREIGN)
    (tmp_path / "broken_cache.py").write_text("import no_such_kernel_library")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "foreign_cache", raising=False)
    yield "foreign_cache"
    sys.modules.pop("foreign_cache", None)


@pytest.mark.parametrize(
    "path, words",
    [
        ("foreign_cache:", "expected package.module:factory"),
        (":make", "expected package.module:factory"),
        ("foreign_cache:make()", "expected package.module:factory"),
        ("no_such_module:make", "cannot import 'no_such_module'"),
        ("broken_cache:make", "No module named 'no_such_kernel_library'"),
        ("foreign_cache:absent", "'absent' in 'foreign_cache' does not exist"),
        ("foreign_cache:number", "'number' in 'foreign_cache' is not a function"),
    ],
)
def test_a_path_that_leads_nowhere_says_where_it_ends(foreign, path, words):
    before = list(sys.path)
    with pytest.raises(ValueError) as error:
        baselines.import_factory(path)
    assert words in str(error.value) and sys.path == before


@pytest.mark.parametrize(
    "name, words",
    [
        ("short", "returned 1 caches for a model with 2 layers"),
        ("dictionary", "returned dict for a model with 2 layers"),
        ("not_caches", "NotACache of layer 0 has no update_and_fetch; factory(model) returns"),
        ("full", "layer 0 already holds 7 tokens"),
        ("raises", "foreign_cache:raises raised KeyError: 'codebook'"),
    ],
)
def test_a_factory_that_breaks_the_contract_is_told_how(foreign, name, words):
    path = f"{foreign}:{name}"
    with pytest.raises(ValueError) as error:
        baselines.make_foreign_cache(llama(), baselines.import_factory(path), path)
    assert words in str(error.value)


def test_any_cache_stands_in_the_same_run(foreign, run):
    kv = ["turbo4", f"{foreign}:make", f"{foreign}:make+exact"]
    argv = ["--tokens", 120, "--chunk", 24, "--kv-recent", 16, "--kv-block", 16, "--kv", *kv]
    code, out, err = run("eval", *argv, "--json")
    assert code == 0, err
    rows = {row["kv"]: row for row in json.loads(out)["results"]}
    assert list(rows) == ["none", *kv]
    alone, with_exact = rows[kv[1]], rows[kv[2]]
    assert 0 < with_exact["kld"] < alone["kld"]
    assert with_exact["exact"] == rows["turbo4"]["exact"] == {"first": 4, "newest": [16, 16], "chunk": True}
    assert alone["exact"] == {"first": 0, "newest": [0, 0], "chunk": False}
    assert alone["resident_bits_per_value"] == rows["none"]["resident_bits_per_value"]  # it is a KVCache
    assert alone["resident_bits_per_value_32k"] is None
    code, out, err = run("eval", "--tokens", 20, "--kv", f"{foreign}:short")
    assert (code, out) == (2, "") and "--kv: foreign_cache:short returned 1 caches for a model with 4 layers" in err
