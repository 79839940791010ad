"""Attention from the packed cache, and the door by which mlx-lm's models reach it."""

import functools

import mlx.core as mx
import numpy as np
import pytest
from support.arrays import to_numpy
from support.backends import BACKENDS
from support.tolerances import TOLERANCE

from mlx_turbo import TurboConfig, TurboKVCache, enable
from mlx_turbo.backends import select, tiled_attention
from mlx_turbo.backends.self_test import random_cached_side, restored_tokens
from mlx_turbo.backends.sides import ONE_SEGMENT
from mlx_turbo.integration import attention
from mlx_turbo.quant import reference

# (8-bit keys lose some float32 digits where a large offset is taken off a dot product)


def random_array(rng, *shape, dtype=mx.float32):
    return mx.array(rng.standard_normal(shape).astype(np.float32)).astype(dtype)


def filled(
    scheme, n_tokens, *, batch=1, heads=2, key_dim=64, value_dim=None, dtype=mx.float32, chunk=None, seed=0, **options
):
    """A cache with n_tokens random tokens and the keys and values it returned last."""
    rng = np.random.default_rng(seed)
    cache = TurboKVCache(scheme, **options)
    k = random_array(rng, batch, heads, n_tokens, key_dim, dtype=dtype)
    v = random_array(rng, batch, heads, n_tokens, value_dim or key_dim, dtype=dtype)
    for at in range(0, n_tokens, chunk or n_tokens):
        kv = cache.update_and_fetch(k[:, :, at : at + (chunk or n_tokens)], v[:, :, at : at + (chunk or n_tokens)])
    return cache, kv if n_tokens > (chunk or n_tokens) else cache.keys_and_values()


def check(queries, keys, values, dtype=mx.float32, **options):
    """attend() against the oracle over what the lazy arrays hold."""
    got = attention.attend(queries, attention.view_of(keys, values), **options)
    mask, sinks = options.get("mask"), options.get("sinks")
    want = reference.attention(
        to_numpy(queries),
        to_numpy(keys),
        to_numpy(values),
        scale=options["scale"],
        mask=mask if mask is None or isinstance(mask, str) else np.array(mask),
        sinks=None if sinks is None else to_numpy(sinks),
    )
    assert got.dtype == queries.dtype and got.shape == want.shape
    assert np.abs(to_numpy(got) - want).max() <= TOLERANCE[dtype] * np.abs(want).max()


@pytest.mark.parametrize(
    "scheme", ["turbo4", "turbo3", "turbo2", "turbo8v4", "turbo0v4", "turbo4v0", "turbo8", "turbo6v5"]
)
def test_every_scheme_attends_as_to_what_it_restores(backend, scheme):
    cache, (keys, values) = filled(scheme, 90, chunk=30, sink=3, recent=9, block=8)
    q = random_array(np.random.default_rng(1), 1, 4, 2, 64)
    check(q, keys, values, scale=0.2, mask="causal")


@pytest.mark.parametrize("mask", [None, "causal", "boolean", "additive"])
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
def test_masks_and_attention_sinks(backend, mask, sinks):
    rng = np.random.default_rng(2)
    cache, (keys, values) = filled("turbo4", 70, chunk=35, batch=2, sink=4, recent=8, block=8)
    q = random_array(rng, 2, 6, 3, 64)
    if mask == "boolean":
        mask = mx.array(rng.random((2, 1, 3, 70)) < 0.6)
    elif mask == "additive":
        mask = random_array(rng, 1, 6, 3, 70)
    check(q, keys, values, scale=0.3, mask=mask, sinks=random_array(rng, 6) if sinks else None)


def test_a_row_that_may_see_nothing_is_zero(backend):
    cache, (keys, values) = filled("turbo4", 40, chunk=20, sink=4, recent=4, block=4)
    q = random_array(np.random.default_rng(3), 1, 2, 2, 64)
    mask = mx.array(np.array([[False], [True]])) & mx.ones((1, 40), mx.bool_)
    out = to_numpy(attention.attend(q, attention.view_of(keys, values), scale=1.0, mask=mask))
    assert not out[:, :, 0].any() and out[:, :, 1].all()


@pytest.mark.parametrize(
    "options",
    [dict(sink=0, recent=0, block=1), dict(sink=4, recent=64, block=64), dict(sink=30, recent=2, block=3)],
    ids=str,
)
@pytest.mark.parametrize("n_tokens", [1, 2, 5, 33, 70])
def test_any_split_into_sink_packed_and_recent(backend, options, n_tokens):
    cache, (keys, values) = filled("turbo4", n_tokens, chunk=7, **options)
    if n_tokens < 8:
        keys, values = cache.keys_and_values()
    check(random_array(np.random.default_rng(4), 1, 2, 1, 64), keys, values, scale=0.2)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_half_precision_models(backend, dtype):
    cache, (keys, values) = filled("turbo4", 60, chunk=30, dtype=dtype, sink=4, recent=8, block=8)
    check(random_array(np.random.default_rng(5), 1, 4, 1, 64, dtype=dtype), keys, values, dtype, scale=0.2)


def test_a_prompt_chunk_attends_to_itself_exactly_and_to_the_packed_past(backend):
    cache, _ = filled("turbo4", 50, chunk=50, sink=4, recent=4, block=4)
    rng = np.random.default_rng(6)
    k, v = random_array(rng, 1, 2, 40, 64), random_array(rng, 1, 2, 40, 64)
    keys, values = cache.update_and_fetch(k, v)
    assert np.array_equal(to_numpy(keys)[:, :, -40:], to_numpy(k))
    check(random_array(rng, 1, 4, 40, 64), keys, values, scale=0.2, mask="causal")


@pytest.mark.parametrize("scheme", ["turbo4", "turbo0v4"])
@pytest.mark.parametrize("n_tokens", [2, 8, 12, 258, 266])
def test_keys_and_values_as_models_make_them_transposed(backend, scheme, n_tokens):
    """[B, L, H, D] seen as [B, H, L, D]; lengths that fill a buffer to the last token."""
    rng = np.random.default_rng(10)
    cache = TurboKVCache(scheme, sink=2, recent=0, block=8)
    cache.step = 8
    k, v = (random_array(rng, 1, n_tokens, 2, 64).transpose(0, 2, 1, 3) for _ in range(2))
    cache.update_and_fetch(k, v)
    check(random_array(rng, 1, 2, 1, 64), *cache.keys_and_values(), scale=0.2)
    cache.trim(1)
    for n in (8, 1):  # into a recent buffer that is there and empty
        cache.trim(cache.n_recent)
        k, v = (random_array(rng, 1, n, 2, 64).transpose(0, 2, 1, 3) for _ in range(2))
        check(random_array(rng, 1, 2, 1, 64), *cache.update_and_fetch(k, v), scale=0.2)
    k, v = (random_array(rng, 1, 9, 2, 64).transpose(0, 2, 1, 3) for _ in range(2))
    check(random_array(rng, 1, 9, 2, 64).transpose(0, 2, 1, 3), *cache.update_and_fetch(k, v), scale=0.2, mask="causal")


def test_large_logits_do_not_overflow(backend):
    cache, (keys, values) = filled("turbo4", 60, chunk=30, sink=4, recent=8, block=8)
    check(random_array(np.random.default_rng(7), 1, 2, 1, 64) * 300, keys, values, scale=1.0)


def test_wrong_queries_get_an_error_that_names_them():
    _, (keys, values) = filled("turbo4", 8)
    view = attention.view_of(keys, values)
    for shape in ((1, 3, 1, 64), (2, 2, 1, 64), (1, 2, 1, 32), (2, 1, 64)):
        with pytest.raises(ValueError, match="^queries: got"):
            attention.attend(mx.zeros(shape), view, scale=1.0)


# ---- tiles ---------------------------------------------------------------------------------------------------
def test_tiles_do_not_change_the_result(monkeypatch):
    cache, (keys, values) = filled("turbo4", 700, chunk=350, sink=4, recent=8, block=8)
    q = random_array(np.random.default_rng(8), 1, 4, 20, 64)
    with select.use_backend("cpu"):
        for tile, logit_bytes in ((64, 1 << 25), (64, 4 * 80 * 128), (256, 4 * 80 * 64)):
            monkeypatch.setattr(tiled_attention, "MAX_TILE", tile)
            monkeypatch.setattr(tiled_attention, "LOGIT_BYTES", logit_bytes)
            check(q, keys, values, scale=0.2, mask="causal")
            check(q, keys, values, scale=0.2, sinks=mx.array([0.1, 2.0, -3.0, 9.0]))


def peak_of(run):
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(run())
    return mx.get_peak_memory() - before


def test_memory_of_a_decode_step_is_bounded_whatever_the_length():
    """The bound of tiled_attention: 5 times the logits of a tile and 6 times its float32 keys and values."""
    tile = 2 * 4096 * 2 * 128 * 4
    for n in (4096, 16384):
        assert peak_over(n, 1)[0] <= 6 * tile + 5 * 4 * 8 * 4096 + 8 * 4 * 8 * 128


def test_a_prompt_chunk_takes_the_memory_of_an_uncompressed_one_and_its_layers_past_twice():
    for n in (4096, 16384):
        ours, plain = peak_over(n, 256)
        assert ours <= plain + 2 * 2 * n * 2 * 128 * 4 + 1e6  # in slices, and joined


def peak_over(n, L):
    """Peak bytes of attending with L queries over n tokens on the CPU, of 2 kv heads: packed, and uncompressed."""
    cache, (keys, values) = filled("turbo4", n, chunk=4096, heads=2, key_dim=128)
    view = attention.view_of(keys, values)
    q, *plain = (random_array(np.random.default_rng(9), 1, heads, m, 128) for heads, m in ((8, L), (2, n), (2, n)))
    mx.eval(cache.state, q, plain)
    with select.use_backend("cpu"):
        return (
            peak_of(lambda: attention.attend(q, view, scale=0.1, mask="causal")),
            peak_of(lambda: mx.fast.scaled_dot_product_attention(q, *plain, scale=0.1, mask="causal")),
        )


# ---- means of segments ---------------------------------------------------------------------------------------
def side_with_means(rng, batch, counts, bits, head_dim, segment):
    """A `CachedSide` of 2 heads whose packed tokens stand for their row plus a large mean."""
    side = random_cached_side(rng, (batch, 2, head_dim), counts, bits, mx.float32, segment, seed=5, room=2)
    return side._replace(means=3 * side.means)


@pytest.mark.parametrize("name", list(BACKENDS))
@pytest.mark.parametrize("segment, bits", [(128, (4, 4)), (256, (3, 3)), (ONE_SEGMENT, (8, 3))], ids=str)
@pytest.mark.parametrize("tile", [64, 192, 4096])  # 192: segments end inside of tiles, tiles inside of segments
def test_packed_tokens_are_relative_to_the_mean_of_their_segment(monkeypatch, tile, segment, bits, name):
    monkeypatch.setattr(tiled_attention, "MAX_TILE", tile)
    rng, counts = np.random.default_rng(13), (3, 437, 20)
    keys = side_with_means(rng, 2, counts, bits[0], 72, segment)
    values = side_with_means(rng, 2, counts, bits[1], 100, ONE_SEGMENT)
    k, v = (restored_tokens(side, counts, seed=5) for side in (keys, values))
    attend = BACKENDS["oracle"].attend  # it reads no tiles
    if name != "oracle":
        attend = functools.partial(tiled_attention.tiled_attention, read_rows=BACKENDS[name].read_rows)
    for L, mask in ((1, None), (5, "causal"), (2, rng.random((2, 1, 2, 460)) < 0.7)):
        q = random_array(rng, 2, 4, L, 72)
        want = reference.attention(to_numpy(q), k, v, scale=0.1, mask=mask)
        got = attend(
            q, keys, values, counts, scale=0.1, seed=5, mask=mx.array(mask) if isinstance(mask, np.ndarray) else mask
        )
        assert np.abs(to_numpy(got) - want).max() <= TOLERANCE[mx.float32] * np.abs(want).max()


@pytest.mark.parametrize("which", ["keys", "values"])
def test_one_side_may_have_means_and_means_of_zero_change_nothing(which):
    rng, counts = np.random.default_rng(14), (3, 200, 9)
    sides = [side_with_means(rng, 1, counts, 4, 64, segment) for segment in (128, ONE_SEGMENT)]
    sides = [side._replace(means=mx.zeros_like(side.means)) for side in sides]
    q = random_array(rng, 1, 4, 3, 64)
    outs = []
    for means in (True, False):
        i = ("keys", "values").index(which)
        sides[i] = sides[i] if means else sides[i]._replace(means=None)
        sides[1 - i] = sides[1 - i]._replace(means=None)
        outs.append(
            to_numpy(
                tiled_attention.tiled_attention(
                    q, *sides, counts, select.get_backend("cpu").read_rows, scale=0.1, mask="causal", seed=5
                )
            )
        )
    assert np.allclose(*outs, rtol=0, atol=1e-6 * np.abs(outs[1]).max())


def test_values_with_a_mean_per_segment_are_an_error():
    rng, counts = np.random.default_rng(15), (0, 200, 1)
    keys, values = (side_with_means(rng, 1, counts, 4, 64, 128) for _ in range(2))
    with pytest.raises(ValueError, match="^values: got segments of 128 tokens, allowed is one mean for all 200"):
        tiled_attention.tiled_attention(
            random_array(rng, 1, 2, 1, 64), keys, values, counts, select.get_backend("cpu").read_rows, scale=1.0
        )


# ---- the door ------------------------------------------------------------------------------------------------
@pytest.fixture
def installed():
    attention.install()
    yield
    attention.uninstall()


def test_only_a_caches_own_keys_and_values_as_it_holds_them_now_take_the_packed_path():
    cache, (keys, values) = filled("turbo4", 20)
    other, (other_keys, other_values) = filled("turbo4", 20)
    view = attention.view_of(keys, values)
    assert view is not None and view.counts == (cache.n_sink, cache.n_packed, cache.n_recent)
    assert attention.view_of(keys[..., :], values) is None  # a model's own slice
    assert attention.view_of(keys.astype(mx.float16), values) is None
    assert attention.view_of(values, keys) is None and attention.view_of(values, values) is None
    both = attention.view_of(keys, keys)  # as latents
    assert both.keys is both.values is view.keys and both.rope is view.values
    assert attention.view_of(keys, other_values) is None
    cache.trim(1)
    assert attention.view_of(keys, values) is None  # the cache has moved on
    assert to_numpy(keys).shape[2] == 20  # but the arrays are what they were


def test_installing_twice_is_installing_once_and_can_be_undone():
    import mlx_lm.models.base as base
    import mlx_lm.models.llama as llama

    attention.uninstall()
    original = base.scaled_dot_product_attention
    assert original is not attention.scaled_dot_product_attention
    for _ in range(2):
        attention.install()
        for module in (base, llama):
            assert module.scaled_dot_product_attention is attention.scaled_dot_product_attention
    attention.uninstall()
    assert base.scaled_dot_product_attention is original and llama.scaled_dot_product_attention is original


def test_plain_arrays_and_other_caches_reach_the_original(installed, monkeypatch):
    import mlx_lm.models.base as base

    calls = []
    monkeypatch.setattr(attention, "_original", lambda *a, **k: calls.append(k))
    cache, (keys, values) = filled("turbo4", 20)
    q = mx.zeros((1, 2, 1, 64))
    base.scaled_dot_product_attention(q, keys[..., :], values, cache, scale=1.0, mask=None)
    base.scaled_dot_product_attention(q, mx.zeros((1, 2, 3, 64)), mx.zeros((1, 2, 3, 64)), None, 1.0, None)
    assert len(calls) == 2
    base.scaled_dot_product_attention(q, keys, values, cache, scale=1.0, mask=None)
    assert len(calls) == 2


def tiny_llama(head_dim=64, heads=4, kv_heads=2):
    from mlx_lm.models import llama

    mx.random.seed(0)
    model = llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=64,
            num_hidden_layers=2,
            intermediate_size=96,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            rms_norm_eps=1e-5,
            vocab_size=50,
            head_dim=head_dim,
        )
    )
    mx.eval(model.parameters())
    return model


def tiny_gpt_oss():
    from mlx_lm.models import gpt_oss

    mx.random.seed(0)
    model = gpt_oss.Model(
        gpt_oss.ModelArgs(
            num_hidden_layers=2,
            num_local_experts=2,
            num_experts_per_tok=1,
            vocab_size=50,
            hidden_size=64,
            intermediate_size=64,
            head_dim=64,
            num_attention_heads=4,
            num_key_value_heads=2,
            sliding_window=8,
        )
    )
    for layer in model.model.layers:
        layer.self_attn.sinks = mx.random.normal(layer.self_attn.sinks.shape)
    mx.eval(model.parameters())
    return model


@pytest.mark.parametrize(
    "make", [tiny_llama, lambda: tiny_llama(80, 4, 1), tiny_gpt_oss], ids=["llama", "llama head_dim 80", "gpt_oss"]
)
def test_a_models_logits_are_the_same_from_packed_rows_and_from_restored_arrays(backend, make, monkeypatch):
    from mlx_turbo import TurboConfig, make_prompt_cache

    model, used, attend = make(), [], attention.attend
    monkeypatch.setattr(attention, "attend", lambda *a, **k: (used.append(1), attend(*a, **k))[1])
    tokens = mx.array(np.random.default_rng(0).integers(0, 50, (1, 40)))

    def logits(door):
        cache = make_prompt_cache(model, TurboConfig("turbo4", sink=2, recent=4, block=4))
        (attention.install if door else attention.uninstall)()
        try:
            out = [model(tokens[:, a:b], cache=cache) for a, b in ((0, 20), (20, 34), (34, 37), (37, 38), (38, 40))]
            return to_numpy(mx.concatenate(out, axis=1))
        finally:
            attention.uninstall()

    plain = logits(door=False)
    assert not used
    packed = logits(door=True)
    assert used and np.abs(packed - plain).max() < 2e-4 * np.abs(plain).max()


def test_the_embedded_models_logits_are_the_same_from_packed_rows_and_from_restored_arrays(backend):
    """Head_dim 128, bfloat16 weights computed in float32: a prompt, then decode and verification steps."""
    import mlx_lm
    from mlx_lm.utils import dequantize_model

    from mlx_turbo import make_prompt_cache
    from mlx_turbo.cli import common

    model, tokenizer = mlx_lm.load(str(common.DEMO_MODEL))
    model = dequantize_model(model)
    model.set_dtype(mx.float32)
    tokens = mx.array(tokenizer.encode((common.DEMO_MODEL / "stories.txt").read_text())[:160])[None]
    results = []
    for door in (True, False):
        cache = make_prompt_cache(model, TurboConfig("turbo4", balance=False))  # without the door no queries are seen
        if not door:
            attention.uninstall()
        out = [
            model(tokens[:, a:b], cache=cache) for a, b in ((0, 100), (100, 150), (150, 151), (151, 155), (155, 160))
        ]
        results.append(to_numpy(mx.concatenate(out, axis=1)))
    attention.uninstall()
    assert cache[0].n_packed and np.abs(results[0] - results[1]).max() < 1e-4 * np.abs(results[1]).max()


def test_enabling_a_model_opens_the_door():
    import mlx_lm.models.base as base

    attention.uninstall()
    enable(tiny_llama(), "turbo4")
    assert base.scaled_dot_product_attention is attention.scaled_dot_product_attention
    attention.uninstall()


@pytest.mark.parametrize("n_new", [1, 20], ids=["decoding", "a prompt chunk"])
def test_packing_after_attention_does_not_copy_the_packed_tokens(n_new):
    """The arrays that the last step returned and nobody read must not hold on to the codes that are written into."""
    with select.use_backend("cpu"):
        cache = filled("turbo4", 32700, chunk=8192, key_dim=128, sink=4, recent=8, block=8)[0]
        rng, codes = np.random.default_rng(11), sum(side.codes.nbytes for side in cache._sides)
        capacity, n_packed = cache._sides[0].codes.shape[2], cache.n_packed
        for n in [1] * 8 + [n_new]:
            kv = [random_array(rng, 1, 2, n, 128) for _ in range(2)]
            mx.eval(kv, cache.state)
            mx.synchronize()
            before = mx.get_active_memory()
            mx.reset_peak_memory()
            keys, values = cache.update_and_fetch(*kv)
            mx.eval(cache.state)
            mx.synchronize()
            used = mx.get_peak_memory() - before
            mx.eval(attention.attend(random_array(rng, 1, 4, 1, 128), attention.view_of(keys, values), scale=0.1))
            del keys, values
        assert n_packed < cache.n_packed <= capacity == cache._sides[0].codes.shape[2]
        assert used < 0.5 * codes, (used, codes)


def test_what_was_returned_again_unread_is_right_after_trimming_into_the_packed_tokens(backend):
    """As many packed tokens as before, but other ones."""
    cache, (keys, values) = filled("turbo4", 40, chunk=20, sink=2, recent=4, block=4)
    rng = np.random.default_rng(12)
    q = random_array(rng, 1, 2, 1, 64)
    check(q, keys, values, scale=0.2)
    counts = cache.n_packed
    cache.trim(20)
    while cache.n_packed < counts:
        keys, values = cache.update_and_fetch(*(random_array(rng, 1, 2, 2, 64) for _ in range(2)))
    assert cache.n_packed == counts
    restored = [to_numpy(x) for x in cache.keys_and_values()[0].view.restore()]
    assert all(np.array_equal(to_numpy(x), want) for x, want in zip((keys, values), restored))
    check(q, keys, values, scale=0.2)


def test_tokens_that_a_model_reads_are_not_kept_restored():
    """One layer after another reads its tokens: no restored copy is left in a cache."""
    with select.use_backend("cpu"):
        cache = filled("turbo4", 5000, chunk=1024, key_dim=128, sink=4, recent=8, block=8)[0]
        rng = np.random.default_rng(13)
        for _ in range(3):
            kv = [random_array(rng, 1, 2, 1, 128) for _ in range(2)]
            mx.eval(kv, cache.state)
            before = mx.get_active_memory()
            mx.eval(cache.update_and_fetch(*kv))
            mx.synchronize()
            assert mx.get_active_memory() - before < 2 * 5000 * 128 * 4
