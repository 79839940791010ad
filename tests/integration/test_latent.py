"""Multi-head latent attention: a decode step attends to packed latents, which serve as keys and as values, and to
packed RoPE keys, and restores none of them."""

import mlx.core as mx
import mlx_lm.models.cache as lm_cache
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models import base
from support import families
from support.arrays import to_numpy
from support.backends import BACKENDS
from support.models import tokens_of

from mlx_turbo import RotatingTurboKVCache, TurboConfig, TurboKVCache, make_prompt_cache
from mlx_turbo.backends import select
from mlx_turbo.backends.self_test import attend_tolerance, relative_error
from mlx_turbo.cache import view as views
from mlx_turbo.integration.prompt_cache import flatten_caches
from mlx_turbo.quant import reference

CONFIG = TurboConfig("turbo8", 2, 4, 4)
NAMES = ["deepseek_v3", "glm4_moe_lite", "mistral4", "kimi_linear", "longcat_flash"]
OTHERS = ["bailing_hybrid", "bailing_moe_v3", "kimi_k25", "kimi_k3", "kimi_vl", "longcat_flash_ngram"]
KINDS = {"cpu": "tiles", "oracle": "fused", "simulated": "fused", "metal": "fused", "cuda": "fused"}
of_families = pytest.mark.parametrize(
    "name", [*NAMES, *(pytest.param(n, marks=pytest.mark.slow) for n in OTHERS if n in families.all_names())]
)


@pytest.fixture(params=list(BACKENDS))
def kernels(request, door):
    with select.use_backend(BACKENDS[request.param]):
        yield request.param


@pytest.fixture
def spoil(monkeypatch):
    """spoil(0): whoever reads restored latents gets NaN; spoil(0, 1): restored RoPE keys too."""

    def spoil(*sides):
        restore = views.restore

        def spoiled(*args, **options):
            return [x * float("nan") if i in sides else x for i, x in enumerate(restore(*args, **options))]

        monkeypatch.setattr(views, "restore", spoiled)

    return spoil


def ways(cache):
    ours = [c for c in flatten_caches(cache) if isinstance(c, TurboKVCache)]
    return {c.report()["attention"].partition(":")[0] for c in ours}


@of_families
def test_a_decode_step_attends_to_packed_latents_and_rope_keys_and_restores_none(kernels, name, spoil):
    model, tokens = families.build(name), tokens_of(30, 90)
    want, got = lm_cache.make_prompt_cache(model), make_prompt_cache(model, CONFIG)
    for cache in want, got:
        mx.eval(model(tokens[:, :24], cache=cache))
    spoil(0, 1)
    for i in range(24, 28):
        a, b = (to_numpy(model(tokens[:, i : i + 1], cache=cache)) for cache in (got, want))
        assert relative_error(a, b) < 0.5  # 8 bits, and nothing is NaN
        assert ways(got) == {KINDS[kernels]}
    assert np.isnan(to_numpy(model(tokens[:, 28:], cache=got))).all()  # two tokens: the model multiplies the latents
    assert ways(got) == {"restored"}


def latents(rng, n, dims, shift=0.0, dtype=mx.float32, batch=1):
    return [mx.array((rng.standard_normal((batch, 1, n, d)) + shift).astype(np.float32)).astype(dtype) for d in dims]


def decode(cache, fetched, nope, rope, mask=None, scale=0.2):
    """What the models do with a token's queries."""
    latent, k_pe = fetched
    logits = (rope * scale) @ k_pe.swapaxes(-1, -2)
    if mask is not None:
        logits = mx.where(mask, logits, mx.array(mx.finfo(logits.dtype).min, logits.dtype))
    return base.scaled_dot_product_attention(nope, latent, latent, cache, scale=scale, mask=logits)


def wanted(fetched, nope, rope, mask=None, scale=0.2):
    """The same by the oracle, of restored tokens."""
    latent, k_pe, nope, rope = (to_numpy(x).astype(np.float64) for x in (*fetched, nope, rope))
    added = scale * rope @ k_pe.swapaxes(-1, -2)
    added = added if mask is None else np.where(np.array(mask), added, -np.inf)
    return reference.attention(nope, latent, latent, scale=scale, mask=added)


SCHEMES = ["turbo4", "turbo8v4", "turbo3v2", "turbo0v4", "turbo4v0"]


def test_attention_over_latents_is_that_of_the_oracle(kernels):
    """Of any scheme and type, also in a window that drops tokens, and with a mask over the products, as in a batch."""

    @settings(max_examples=8 if kernels != "cpu" else 40, deadline=None, derandomize=True, database=None)
    @given(st.data())
    def check(data):
        pick = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
        fewer = kernels == "simulated"  # a kernel each to compile
        dims = (64, 32) if fewer else pick((64, 32), (512, 64), (160, 48))
        heads, dtype = (4, 16)[pick(0, 1)], mx.float32 if fewer else pick(mx.float32, mx.float16, mx.bfloat16)
        scheme, batch = pick(*(SCHEMES[:1] if fewer else SCHEMES)), pick(1, 2)
        rng, options = np.random.default_rng(data.draw(st.integers(0, 99))), dict(sink=2, recent=40, block=8)
        cache = TurboKVCache(scheme, **options)
        if pick(False, True):
            cache = RotatingTurboKVCache(150, 0, scheme, recent=40, block=8)
        cache.update_and_fetch(*latents(rng, pick(100, 200, 330), dims, dtype=dtype, batch=batch))
        for _ in range(pick(1, 9)):
            fetched = cache.update_and_fetch(*latents(rng, 1, dims, dtype=dtype, batch=batch))
        q = [mx.array(rng.standard_normal((batch, heads, 1, d)).astype(np.float32)).astype(dtype) for d in dims]
        mask = mx.array(rng.random((batch, 1, 1, fetched[0].shape[2])) < 0.7) if pick(False, True) else None
        got, want = decode(cache, fetched, *q, mask), wanted(fetched, *q, mask)
        assert got.dtype == dtype and ways([cache]) == {KINDS[kernels]}
        allowed = attend_tolerance(dtype, fused=kernels != "cpu")
        allowed += {mx.float32: 0, mx.float16: 0.01, mx.bfloat16: 0.06}[dtype]  # of products, and of restored tokens
        assert relative_error(to_numpy(got), want) <= allowed

    check()


def test_latents_are_neither_centered_nor_balanced_and_the_report_says_so(kernels):
    rng = np.random.default_rng(0)
    for config in ("turbo4", "auto"):
        for n_prompt, n_steps in (
            (400, 1),
            (30, 400),
        ):  # a chunk; tokens whose queries come before they are packed
            cache = TurboKVCache(config, sink=2, recent=8, block=64)
            fetched = cache.update_and_fetch(*latents(rng, n_prompt, (64, 32), shift=5))
            for _ in range(n_steps if kernels == "cpu" else min(n_steps, 1)):
                q = [mx.array(rng.standard_normal((1, 4, 1, d)).astype(np.float32)) for d in (64, 32)]
                fetched = cache.update_and_fetch(*latents(rng, 1, (64, 32), shift=5))
                mx.eval(decode(cache, fetched, *q))
            report = cache.report()
            assert report["centred"] == [] and report["balance"] == "off: latents serve as keys and values"
    ordinary = TurboKVCache("turbo4", sink=2, recent=8, block=64)
    ordinary.update_and_fetch(*latents(rng, 400, (64, 64), shift=5))
    assert ordinary.report()["centred"] == ["keys", "values"]


@pytest.mark.parametrize("shifts", [(5, 5), (5, 0), (0, 5)], ids=str)
def test_what_is_centered_all_the_same_is_restored(kernels, monkeypatch, shifts):
    """As in a file of an earlier version: sums of latents cannot have means by segment, and the kernel takes none of
    RoPE keys."""
    rng = np.random.default_rng(1)

    def biased(n):
        return [x + shift for x, shift in zip(latents(rng, n, (64, 32)), shifts)]

    with monkeypatch.context() as patch:
        patch.setattr("mlx_turbo.cache.packing.are_latents", lambda *shape: False)
        cache = TurboKVCache("turbo4", sink=2, recent=8, block=64)
        cache.update_and_fetch(*biased(400))
    assert cache.report()["centred"] == [name for name, shift in zip(("keys", "values"), shifts) if shift]
    cache = TurboKVCache.from_state(cache.state)
    for _ in range(80):  # and go on to be
        fetched = cache.update_and_fetch(*biased(1))
    q = [mx.array(rng.standard_normal((1, 4, 1, d)).astype(np.float32)) for d in (64, 32)]
    got, want = decode(cache, fetched, *q), wanted(cache.keys_and_values(), *q)
    assert ways([cache]) == {"restored" if shifts[0] else KINDS[kernels]}
    assert relative_error(to_numpy(got), want) < 1e-4


def test_products_with_other_keys_are_a_mask_like_any_other(kernels):
    """Of another cache, of this one before an update, with its latents, or changed by the model."""
    rng, dims = np.random.default_rng(2), (64, 32)
    cache, other = (TurboKVCache("turbo4", sink=2, recent=8, block=64) for _ in range(2))
    for c in cache, other:
        c.update_and_fetch(*latents(rng, 300, dims))
    older = cache.keys_and_values()
    cache.trim(1)
    fetched, others = (c.update_and_fetch(*latents(rng, 1, dims)) for c in (cache, other))
    nope, rope = (mx.array(rng.standard_normal((1, 4, 1, d)).astype(np.float32)) for d in dims)
    latent, k_pe = fetched
    masks = [
        rope @ others[1].swapaxes(2, 3)[..., :-1],
        rope @ older[1].swapaxes(-2, -1),
        nope @ latent.swapaxes(-1, -2),
        (rope @ k_pe.swapaxes(-1, -2)) * 2,
        rope @ (k_pe.swapaxes(-1, -2) * 2),
    ]
    assert type(k_pe.swapaxes(0, 1)) is type(masks[3]) is mx.array  # no product of theirs is with keys
    n, restored = cache.offset, to_numpy(cache.keys_and_values()[0]).astype(np.float64)
    for mask in masks:
        assert mask.shape == (1, 4, 1, n)
        want = reference.attention(to_numpy(nope), restored, restored, scale=0.2, mask=to_numpy(mask))
        got = base.scaled_dot_product_attention(nope, latent, latent, cache=None, scale=0.2, mask=mask)
        assert relative_error(to_numpy(got), want) < 1e-5


@pytest.mark.parametrize("lengths", [(33, 21), (26, 26), (30,)], ids=str)
def test_rows_of_a_batch_attend_to_packed_latents_too(kernels, spoil, lengths):
    """Of different lengths the model masks its products, so it reads the RoPE keys, and no latent. Of equal ones there
    is no mask, and it reads neither."""
    model, tokens = families.build("deepseek_v3"), tokens_of(40, 90)
    alone, equal = [make_prompt_cache(model, CONFIG) for _ in lengths], len(set(lengths)) == 1
    for cache, n in zip(alone, lengths):
        mx.eval(model(tokens[:, :n], cache=cache))
    batch = [layer[0].merge(list(layer)) for layer in zip(*alone)]
    spoil(0, 1) if equal else spoil(0)
    unread = set()
    for i in range(35, 40):
        step = tokens[:, i : i + 1]
        assert (batch[0].make_mask(1, return_array=True) is None) == equal
        got = to_numpy(model(mx.concatenate([step] * len(alone)), cache=batch))
        want = np.concatenate([to_numpy(model(step, cache=cache)) for cache in alone])
        assert relative_error(got, want) < 1e-4 and ways(batch) == {KINDS[kernels]}
        assert equal or all(c._unread.packed is None for c in batch)  # restored RoPE keys are not kept
        unread |= {c._unread.packed is not None for cache in alone for c in cache}
    assert True in unread  # of a sequence of its own, nothing was restored


def test_latents_and_rope_keys_are_restored_apart(kernels, monkeypatch):
    """One launch for both computes both, whichever is read."""
    rng, together = np.random.default_rng(3), []
    restore = type(select.get_backend()).restore
    monkeypatch.setattr(
        type(select.get_backend()), "restore", lambda *a, **o: together.append(a[2].head_dim) or restore(*a, **o)
    )
    for dims in (64, 32), (64, 64):
        cache = TurboKVCache("turbo4", sink=2, recent=8, block=64)
        cache.update_and_fetch(*latents(rng, 200, dims))
        mx.eval(cache.update_and_fetch(*latents(rng, 1, dims)))
    assert set(together) == {64}  # of values: only those of the ordinary cache


def test_minicpm3_and_others_that_cache_whole_keys_are_fused_as_any_model(door):
    """They have no latent in their caches."""
    with select.use_backend("cpu"):
        for name in "minicpm3", "deepseek_v2":
            model, tokens = families.build(name), tokens_of(30, 90)
            cache = make_prompt_cache(model, CONFIG)
            for n in 24, 1:
                mx.eval(model(tokens[:, :n], cache=cache))
            assert ways(cache) == {"tiles"} and not any(c.holds_latents for c in cache)
            assert type(lm_cache.make_prompt_cache(model)[0]) is lm_cache.KVCache
