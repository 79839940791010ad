"""What reports say of attention is what the last step did; and a cache that is attended without ours says so, once."""

import warnings

import mlx.core as mx
import mlx_lm.models.cache as lm_cache
import pytest
from support import families
from support.backends import BACKENDS
from support.models import llama, tokens_of

from mlx_turbo import TurboConfig, TurboKVCache, describe, enable, make_prompt_cache
from mlx_turbo.backends import select
from mlx_turbo.cache import last_step
from mlx_turbo.integration import attention

CONFIG = TurboConfig("turbo4", 4, 8, 8)
NOTHING = "exact: nothing is packed"
DECODE = {"cpu": "tiles: the CPU fallback reads packed rows tile by tile", "simulated": "fused", "metal": "fused"}


@pytest.fixture(params=[name for name in BACKENDS if name != "oracle"])
def kernels(request):
    with select.use_backend(BACKENDS[request.param]):
        yield request.param


def says(cache):
    return [c.report()["attention"] for c in cache]


def test_a_report_says_what_the_last_step_did(kernels, door, monkeypatch):
    model, tokens = llama(64), tokens_of(200)
    cache = make_prompt_cache(model, CONFIG)
    assert says(cache) == ["nothing yet"] * 2 and "attention" not in describe(cache)
    at = 0
    for n, way in (
        (6, NOTHING),
        (60, NOTHING),  # attended before it is packed
        (1, DECODE[kernels]),
        (30, "restored: a chunk of 30 tokens"),
        (3, DECODE[kernels]),
    ):
        mx.eval(model(tokens[:, at : at + n], cache=cache))
        at += n
        assert says(cache) == [way] * 2, n
        what, _, why = way.partition(": ")
        text = f"; attention of the last step: {what} in 2 layers" + (f" ({why})" if why else "")
        assert describe(cache) == "2 of 2 layers compressed" + ("" if way == NOTHING else text)
    for c in cache:
        c.trim(2)
    assert says(cache) == [DECODE[kernels]] * 2
    batch = [c.merge([c, c]) for c in cache]
    assert says(batch) == ["nothing yet"] * 2
    mx.eval(model(mx.repeat(tokens[:, :1], 2, axis=0), cache=batch))
    assert says(batch) == [DECODE[kernels]] * 2
    monkeypatch.setenv("MLX_TURBO_MAX_RESTORED_BYTES", "1000")
    mx.eval(model(tokens[:, at : at + 20], cache=cache))
    assert all(
        way.startswith("tiles: a past of ") and way.endswith(" at most 1,000 are restored") for way in says(cache)
    )


def test_layers_that_differ_are_counted_apart(door):
    """A layer that is exact, one that a kernel serves, and one whose tokens were read elsewhere."""
    with select.use_backend("cpu"):
        model, tokens = llama(64, num_hidden_layers=3), tokens_of(80)
        cache = make_prompt_cache(model, CONFIG)
        cache[0] = TurboKVCache("turbo0")
        for n in (70, 1):
            mx.eval(model(tokens[:, :n], cache=cache))
        for _ in range(2):
            cache[2].update_and_fetch(*(mx.zeros((1, 2, 1, 64)) for _ in range(2)))
        assert [way.partition(":")[0] for way in says(cache)] == ["exact", "tiles", "not by mlx_turbo"]
        assert "tiles in 1 layer (the CPU fallback reads packed rows tile by tile), not by mlx_turbo in 1" in describe(
            cache
        )


def test_a_model_that_makes_other_arrays_of_its_keys_is_not_called_fused(door):
    """Issue 20: multi-head latent attention multiplies its latents where it has several tokens, which reads its whole
    cache, and the report said "fused"."""
    with select.use_backend("cpu"):
        model = families.build("deepseek_v3")
        cache = make_prompt_cache(model, TurboConfig("turbo4", 2, 4, 4))
        for n, kind in (24, "restored"), (1, "tiles"), (2, "restored"), (1, "tiles"):
            mx.eval(model(tokens_of(n, 90), cache=cache))
            assert {way.partition(":")[0] for way in says(cache)} == {kind}
            assert f"attention of the last step: {kind} in 4 layers" in describe(cache)


def test_a_cache_that_is_used_without_our_attention_warns_once_with_what_mends_it(monkeypatch):
    monkeypatch.setattr(last_step, "_warned", False)
    attention.uninstall()
    with select.use_backend("cpu"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, tokens = llama(64), tokens_of(80)
        cache = [TurboKVCache(CONFIG) for _ in model.layers]

        def run(cache, *lengths):
            for n in lengths:
                mx.eval(model(tokens[:, :n], cache=cache))
            return [str(w.message) for w in caught if "mlx_turbo" in str(w.message)]

        assert run(cache, 10, 60) == []
        said = run(cache, 1, 1)
        assert len(said) == 1 and said[0].endswith("Before the model is called: mlx_turbo.enable(model)")
        assert len(run([TurboKVCache(CONFIG) for _ in model.layers], 60, 1, 1)) == 1
        assert {way.partition(":")[0] for way in says(cache)} == {"not by mlx_turbo"}
        enable(model)  # what it says
        try:
            monkeypatch.setattr(last_step, "_warned", False)
            assert len(run(cache, 1, 1)) == 1 and {way.partition(":")[0] for way in says(cache)} == {"tiles"}
            assert len(run(lm_cache.make_prompt_cache(model), 60, 1, 1)) == 1
        finally:
            attention.uninstall()
