"""Every model family of the installed mlx-lm, small and random: our caches against mlx-lm's own, through prefill,
decode, verification of draft tokens, trimming and files. Batches are in test_batch.py."""

import copy
import functools
import sys
import warnings
from pathlib import Path

import mlx.core as mx
import mlx_lm
import mlx_lm.models.cache as lm_cache
import numpy as np
import pytest
from support import families
from support.arrays import to_numpy
from support.backends import BACKENDS
from support.caches import FAST_BACKENDS
from support.families import WRITES_EMPTY_ARRAYS, compressed

from mlx_turbo import (
    RotatingTurboKVCache,
    TurboConfig,
    TurboKVCache,
    describe,
    disable,
    enable,
    make_prompt_cache,
    save_prompt_cache,
    use_backend,
)
from mlx_turbo.backends.select import GPUS
from mlx_turbo.integration.prompt_cache import flatten_caches

TOKENS = mx.array(np.random.default_rng(0).integers(0, families.VOCABULARY, (1, 340)))
TRIM = 9  # reaches into the packed tokens
PACKED = ("turbo8", "turbo4", "turbo3", "turbo2")
OTHERS = ("auto", "turbo8v4", "turbo0v4")  # the default; keys of other bits than values
NAMES = families.all_names()
OLD = tuple(map(int, mlx_lm.__version__.split(".")[:2])) < (0, 32)  # it does not have all families, nor the same
IN_LISTS = (
    "baichuan_m1",
    "deepseek_v32",
    "falcon_h1",
    "glm_moe_dsa",
    "longcat_flash",
    "longcat_flash_ngram",
    "minimax_m3_vl",
)  # the families with CacheLists
REST = [n for n in NAMES if n not in families.NAMED and n not in families.NOT_BUILT]
each_family = pytest.mark.parametrize(
    "name", [*(n for n in families.NAMED if n in NAMES), *(pytest.param(n, marks=pytest.mark.slow) for n in REST)]
)
pytestmark = pytest.mark.parametrize("backend", FAST_BACKENDS, indirect=True)


@functools.lru_cache(1)
def mlx_lm_s(name):
    """(model, its logits with mlx-lm's own cache) of a family."""
    model = families.build(name)
    return model, walk(model, lambda: lm_cache.make_prompt_cache(model))


def walk(model, make_cache, n_prompt=24):
    """Logits by phase, {phase: [L, vocabulary]}: of a prompt's first chunk, of one that attends to packed tokens
    ("prefill"), of single tokens ("decode"), of three at once ("verify"), and after some were taken back ("trim").

    Rings that are full cannot be trimmed, so models with sliding windows trim a shorter text; without "trim" where no
    text can be (linear and state-space layers)."""
    phases, cache, at = {}, make_cache(), 0

    def run(phase, *lengths):
        nonlocal at
        for n in lengths:
            logits = to_numpy(model(TOKENS[:, at : at + n], cache=cache)[0])
            phases[phase] = np.concatenate([phases[phase], logits]) if phase in phases else logits
            at += n

    run("prompt", n_prompt)
    run("prefill", 11)
    run("decode", *[1] * 6)
    run("verify", 3)
    if not lm_cache.can_trim_prompt_cache(cache):
        cache, at = make_cache(), 0
        run("short prompt", 12, 1)
    if lm_cache.can_trim_prompt_cache(cache):
        assert lm_cache.trim_prompt_cache(cache, TRIM) == TRIM
        at -= TRIM
        run("trim", 1, 1, 5, 1)
    return phases


def error(got, want):
    """Relative error of the logits of a token, the median over those that attend to packed tokens: an expert or a
    top-k that flips at one token does not decide."""
    phases = [phase for phase in ("prefill", "decode", "verify", "trim") if phase in want]
    a, b = (np.concatenate([p[phase] for phase in phases]) for p in (got, want))
    held = np.isfinite(b[0])  # phi3small's special tokens have -inf
    return np.median(np.linalg.norm(a[:, held] - b[:, held], axis=1) / np.linalg.norm(b[:, held], axis=1))


@each_family
def test_a_lossless_scheme_gives_mlx_lm_s_logits(backend, name):
    model, want = mlx_lm_s(name)
    got = walk(model, lambda: compressed(model, "turbo0"))
    assert list(got) == list(want)  # trimmed where mlx-lm can trim
    if not OLD:
        assert families.cell(name, "trim") == (
            "yes" if "short prompt" not in want else families.UNTIL_FULL if "trim" in want else families.CANNOT_TRIM
        )
    for phase in want:
        np.testing.assert_allclose(got[phase], want[phase], rtol=1e-5, atol=1e-5, err_msg=phase)


@each_family
def test_packed_schemes_stay_as_close_as_their_bits_allow(backend, name):
    model, want = mlx_lm_s(name)
    errors = {}
    for scheme in PACKED:
        caches = []
        got = walk(model, lambda: caches.append(compressed(model, scheme)) or caches[-1])
        assert list(got) == list(want)
        assert not any(np.isnan(logits).any() for logits in got.values())
        errors[scheme] = error(got, want)
        packed = [c.report()["packed"] for c in flatten_caches(caches[0]) if isinstance(c, TurboKVCache)]
        least = [
            8 if isinstance(c, RotatingTurboKVCache) else 30
            for c in flatten_caches(caches[0])
            if isinstance(c, TurboKVCache)
        ]
        assert all(n >= few for n, few in zip(packed, least)), packed
    if not packed:
        assert set(errors.values()) == {0}
        return
    assert 0 < errors["turbo8"] < 0.1, errors
    assert errors["turbo8"] < errors["turbo2"] / 4 and errors["turbo4"] < errors["turbo2"], errors


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in NAMES if n not in families.NOT_BUILT])
def test_auto_and_keys_of_other_bits_than_values_pack_too(backend, name):
    """The prompt is so long that auto decides."""
    model, want = mlx_lm_s(name)
    for scheme in OTHERS:
        caches = []
        got = walk(model, lambda: caches.append(compressed(model, scheme)) or caches[-1], n_prompt=280)
        assert list(got) == list(want)
        assert not any(np.isnan(logits).any() for logits in got.values())
        ours = [c for c in flatten_caches(caches[0]) if isinstance(c, TurboKVCache)]
        assert all(c.report()["packed"] >= 200 for c in ours if not isinstance(c, RotatingTurboKVCache))


@each_family
def test_every_plain_cache_and_window_is_compressed_and_the_others_are_named(backend, name):
    model, _ = mlx_lm_s(name)
    theirs, ours = lm_cache.make_prompt_cache(model), compressed(model, "turbo4")
    kept = [c for c in ours if not any(isinstance(m, TurboKVCache) for m in flatten_caches([c]))]
    assert len(ours) == len(theirs)
    if not hasattr(lm_cache.KVCache, "keys_and_values") and name in ("afm7", "gemma3n"):
        assert kept == ours  # mlx-lm 0.31 unpacks the state of these
        return
    taken = {lm_cache.KVCache: TurboKVCache, lm_cache.RotatingKVCache: RotatingTurboKVCache}
    for layer, own in zip(theirs, ours):
        want = [taken.get(type(c), type(c)) for c in flatten_caches([layer])]
        if type(own) is not type(layer) and not isinstance(own, TurboKVCache):
            assert type(own) is lm_cache.IndexedCacheList
            want[-1] = lm_cache.KVCache  # the indexer's
        assert [type(c) for c in flatten_caches([own])] == want
    text = describe(ours)
    assert text.startswith(f"{len(ours) - len(kept)} of {len(ours)} layers compressed")
    left = [type(c).__name__ for c in flatten_caches(ours) if not isinstance(c, TurboKVCache)]
    assert bool(left) == (" stays uncompressed: " in text) and "does not know" not in text
    for kind in left:
        assert f"{kind} ({left.count(kind)}) stays uncompressed: " in text  # the reason follows


@pytest.mark.parametrize("name", [n for n in IN_LISTS if n in NAMES])
def test_in_a_list_those_caches_stay_whose_values_nothing_depends_on(backend, name):
    """Logits with NaN in the values of one cache after the other, over more tokens than an indexer lets through."""
    model = families.build(name)
    ours, n_stay = compressed(model, "turbo4"), 0
    for i, layer in enumerate(ours):
        for j, own in enumerate(layer.caches if hasattr(layer, "caches") else ()):
            cache = lm_cache.make_prompt_cache(model)
            theirs = cache[i][j]
            if type(theirs) not in (lm_cache.KVCache, lm_cache.RotatingKVCache):
                continue

            def update(keys, values, update=theirs.update_and_fetch):
                keys, values = update(keys, values)
                return keys, values * float("nan")

            theirs.update_and_fetch = update
            logits = mx.concatenate([model(TOKENS[:, :30], cache=cache), model(TOKENS[:, 30:31], cache=cache)], axis=1)
            assert mx.isnan(logits).any().item() == isinstance(own, TurboKVCache), (i, j)
            n_stay += not isinstance(own, TurboKVCache)
    assert n_stay == {"deepseek_v32": 4, "glm_moe_dsa": 4, "minimax_m3_vl": 2}.get(name, 0)


class Masked(lm_cache.KVCache):
    """All tokens, in a layer that sees the first `keep` and the newest, max_size in all: a window by its mask."""

    def __init__(self, max_size, keep):
        super().__init__()
        self.max_size, self.keep = max_size, keep

    def make_mask(self, N, return_array=False, window_size=None):
        token, query = mx.arange(self.offset + N), mx.arange(self.offset, self.offset + N)[:, None]
        window = self.max_size - self.keep
        if N > 1 and window_size is not None and not self.keep:  # as in mlx-lm: the model's window, of what is held
            return (token <= query) & (token > query - window_size) & (token > self.offset - window)
        mask = (token <= query) & ((token < self.keep) | (token > query - window))
        return mask if window_size is None else mask & (token > query - window_size)


@each_family
@pytest.mark.parametrize("max_kv_size", [20, 12])  # longer and shorter than the families' own windows
def test_max_kv_size_limits_what_every_layer_sees_or_says_which_not(backend, name, max_kv_size):
    """Also where the model makes its own caches, and for an enabled model by mlx-lm's own function."""
    model = families.build(name)
    own = lm_cache.make_prompt_cache(model)
    config = TurboConfig("turbo0", recent=2, block=2)  # windows of 12 tokens are compressed too

    def masked(cache):
        if type(cache) is lm_cache.KVCache:
            return Masked(max_kv_size, 4)
        if type(cache) is lm_cache.RotatingKVCache:
            return Masked(min(cache.max_size, max_kv_size), cache.keep)
        return cache

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cache = make_prompt_cache(model, config, max_kv_size)
        enabled = lm_cache.make_prompt_cache(enable(model, config), max_kv_size)
    disable(model)
    said = [str(w.message) for w in caught if str(w.message).startswith("max_kv_size=")]
    assert [type(c) for c in flatten_caches(enabled)] == [type(c) for c in flatten_caches(cache)]
    unlimited = {
        i
        for i, layer in enumerate(cache)
        for c in flatten_caches([layer])
        if not hasattr(c, "max_size") and type(c).__name__ not in ("ArraysCache", "ChunkedKVCache")
    }
    if unlimited:
        assert name in ("afm7", "deepseek_v32", "deepseek_v41", "glm_moe_dsa", "minimax_m3_vl")
        assert len(said) == 2 and said[0].startswith(
            f"max_kv_size={max_kv_size} does not limit layers {', '.join(map(str, sorted(unlimited)))}: "
        )
        own = [copy.deepcopy(c) for c in own]
    else:
        assert said == []
        own = [type(c)(*map(masked, c.caches)) if hasattr(c, "caches") else masked(c) for c in own]
    at = 0
    for n in 13, 20, 1, 1, 1, 7, 1:
        got, want = (to_numpy(model(TOKENS[:, at : at + n], cache=c)) for c in (cache, own))
        np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
        at += n


@each_family
def test_a_saved_prompt_cache_goes_on_as_it_would_have(backend, name, tmp_path):
    """Read by mlx-lm's own function, with packed tokens and full windows."""
    model, file = families.build(name), str(tmp_path / "a.safetensors")
    if families.cell(name, "save, load") != "yes":
        cache = lm_cache.make_prompt_cache(model)
        model(TOKENS[:, :24], cache=cache)
        lm_cache.save_prompt_cache(file, cache)
        with pytest.raises(KeyError, match=type(cache[0]).__name__):
            lm_cache.load_prompt_cache(file)
        return
    cache = compressed(model, "turbo4")
    for at, n in (0, 24), (24, 11), (35, 1):
        model(TOKENS[:, at : at + n], cache=cache)
    if not WRITES_EMPTY_ARRAYS and any(type(c) is lm_cache.IndexedCacheList for c in cache):
        plain = lm_cache.make_prompt_cache(model)
        model(TOKENS[:, :24], cache=plain)
        for c in plain, cache:  # the old MLX writes no arrays without numbers, such as an indexer's values
            with pytest.raises(ValueError, match="cannot serialize an empty array"):
                lm_cache.save_prompt_cache(file, c)
        return
    save_prompt_cache(file, cache, {"model": name})
    loaded = lm_cache.load_prompt_cache(file)
    assert describe(loaded) == describe(cache).partition("; attention of the last step")[0]
    for at, n in [(36 + i, 1) for i in range(6)] + [(42, 3), (45, 7)]:
        got, want = (to_numpy(model(TOKENS[:, at : at + n], cache=c)) for c in (loaded, cache))
        np.testing.assert_array_equal(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in families.NAMED if n in NAMES])
@pytest.mark.parametrize("kernels", [n for n in ("simulated", *GPUS) if n in BACKENDS])
def test_the_kernels_agree_with_the_fallback(backend, name, kernels):
    """On the shapes, masks and sinks of whole models: the fused kernel, in the simulator where there is no GPU."""
    model, _ = mlx_lm_s(name)
    for scheme in ("turbo4", "turbo8v4"):
        logits = []
        for chosen in (BACKENDS["cpu"], BACKENDS[kernels]):
            with use_backend(chosen):
                cache = compressed(model, scheme)
                logits.append(walk(model, lambda: copy.deepcopy(cache)))
        assert error(*logits) < 1e-3


@pytest.mark.parametrize("name", [n for n in families.NOT_BUILT if n in NAMES])
def test_a_family_is_left_out_only_if_it_cannot_run_here(backend, name):
    if backend.name == "metal" and name in families.ONLY_METAL:
        return
    with pytest.raises((AttributeError, RuntimeError, ValueError, SystemExit)):
        families.build(name)(TOKENS[:, :4])


def test_no_named_family_is_missing(backend):
    if not OLD:
        assert set(families.NAMED) <= set(NAMES)


@pytest.mark.slow
def test_the_table_of_models_says_what_happens(backend):
    """For the families that are in docs/models.md and here, with an mlx-lm like the one it was printed with."""
    if OLD:
        return
    sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
    import model_table

    said = {name: cells for *cells, names in model_table.read(model_table.PAGE.read_text()) for name in names}
    found = {name: cells for *cells, names in model_table.rows() for name in names}
    assert set(families.NAMED) <= set(said) & set(found)
    assert {name: said[name] for name in found if name in said} == {name: found[name] for name in found if name in said}


def test_every_exception_is_of_a_family_that_is_built(backend):
    for phase, reasons in families.EXCEPTIONS.items():
        names = " ".join(reasons.values()).split()
        assert phase in families.PHASES and len(names) == len(set(names))
        assert OLD or set(names) <= set(NAMES) - set(families.NOT_BUILT)
