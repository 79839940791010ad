"""Every model family of the installed mlx-lm, small and random: our caches against mlx-lm's own, through prefill,
decode, verification of draft tokens and trimming."""
import copy
import functools
import re
import sys
import warnings
from pathlib import Path

import families
import mlx.core as mx
import mlx_lm
import mlx_lm.models.cache as lm_cache
import numpy as np
import pytest
from cache_tools import FAST_BACKENDS
from conftest import BACKENDS, to_numpy
from mlx_turbo import RotatingTurboKVCache, TurboConfig, TurboKVCache, describe, make_prompt_cache, use_backend
from mlx_turbo.models import members

TOKENS = mx.array(np.random.default_rng(0).integers(0, families.VOCABULARY, (1, 60)))
WINDOW = dict(sink=2, recent=4, block=4)  # so small that each chunk of the prompt is packed, and windows of 16 tokens
TRIM = 9  # reaches into the packed tokens
PACKED = ("turbo8", "turbo4", "turbo3", "turbo2")
NAMES = families.all_names()
REST = [n for n in NAMES if n not in families.NAMED and n not in families.NOT_BUILT]
each_family = pytest.mark.parametrize(
    "name", [*(n for n in families.NAMED if n in NAMES), *(pytest.param(n, marks=pytest.mark.slow) for n in REST)])
pytestmark = pytest.mark.parametrize("backend", FAST_BACKENDS, indirect=True)


@functools.lru_cache(1)
def mlx_lm_s(name):
    """(model, its logits with mlx-lm's own cache) of a family."""
    model = families.build(name)
    return model, walk(model, lambda: lm_cache.make_prompt_cache(model))


def walk(model, make_cache):
    """Logits by phase, {phase: [L, vocabulary]}: of a prompt's first chunk, of one that attends to packed tokens
    ("prefill"), of single tokens ("decode"), of three at once ("verify"), and after some were taken back ("trim").

    Rings that are full cannot be trimmed, so models with sliding windows trim a shorter text; without "trim" where no
    text can be (linear and state-space layers)."""
    phases, cache, at = {}, make_cache(), 0

    def run(phase, *lengths):
        nonlocal at
        for n in lengths:
            logits = to_numpy(model(TOKENS[:, at:at + n], cache=cache)[0])
            phases[phase] = np.concatenate([phases[phase], logits]) if phase in phases else logits
            at += n

    run("prompt", 24)
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


def compressed(model, config):
    """Our prompt cache for a model; a warning that nothing is compressed has to be true."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cache = make_prompt_cache(model, TurboConfig.of(config, **WINDOW))
    nothing = not any(isinstance(c, TurboKVCache) for c in members(cache))
    assert [str(w.message)[:21] for w in caught] == ["nothing is compressed"] * nothing
    return cache


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
        packed = [c.report()["packed"] for c in members(caches[0]) if isinstance(c, TurboKVCache)]
        least = [8 if isinstance(c, RotatingTurboKVCache) else 30 for c in members(caches[0])
                 if isinstance(c, TurboKVCache)]
        assert all(n >= few for n, few in zip(packed, least)), packed
    if not packed:
        assert set(errors.values()) == {0}
        return
    assert 0 < errors["turbo8"] < 0.1, errors
    assert errors["turbo8"] < errors["turbo2"] / 4 and errors["turbo4"] < errors["turbo2"], errors


@each_family
def test_every_plain_layer_and_window_is_compressed_and_the_others_are_named(backend, name):
    model, _ = mlx_lm_s(name)
    theirs, ours = lm_cache.make_prompt_cache(model), compressed(model, "turbo4")
    kept = [c for c in ours if not any(isinstance(m, TurboKVCache) for m in members([c]))]
    assert len(ours) == len(theirs)
    if not hasattr(lm_cache.KVCache, "keys_and_values") and name in ("afm7", "gemma3n"):
        assert kept == ours  # mlx-lm 0.31 unpacks the state of these
        return
    taken = {lm_cache.KVCache: TurboKVCache, lm_cache.RotatingKVCache: RotatingTurboKVCache}
    assert [type(c) for c in ours] == [taken.get(type(c), type(c)) for c in theirs]
    text = describe(ours)
    assert text.startswith(f"{len(ours) - len(kept)} of {len(ours)} layers compressed")
    left = [type(m).__name__ for m in members(ours) if not isinstance(m, TurboKVCache)]
    assert bool(left) == ("; " in text)  # the reason follows
    whole = [type(c).__name__ for c in kept]  # a CacheList of which nothing is compressed may count as one
    for kind in left:
        assert f"{kind} ({left.count(kind)})" in text or f"CacheList ({whole.count('CacheList')})" in text


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in families.NAMED if n in NAMES])
@pytest.mark.parametrize("kernels", [n for n in ("simulated", "metal") if n in BACKENDS])
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
    if tuple(map(int, mlx_lm.__version__.split(".")[:2])) >= (0, 32):  # 0.31 does not know all of them
        assert set(families.NAMED) <= set(NAMES)


@pytest.mark.slow
def test_the_table_of_models_says_what_happens(backend):
    """For the families that are in docs/models.md and here, with an mlx-lm like the one it was printed with."""
    if tuple(map(int, mlx_lm.__version__.split(".")[:2])) < (0, 32):
        return
    sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
    import model_table

    page = re.findall(r"^\| (.*) \| (.*) \| (.*) \|$", model_table.PAGE.read_text(), re.M)
    said = {name: row[:2] for row in page[1:] for name in row[2].split()}
    found = {name: tuple(kind or "nothing" for kind in row[:2]) for row in model_table.rows() for name in row[2]}
    assert set(families.NAMED) <= set(said) & set(found)
    assert {name: said[name] for name in found if name in said} == {name: found[name] for name in found if name in said}
