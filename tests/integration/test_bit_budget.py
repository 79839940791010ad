"""`auto:BITS`: the bits go where a model's output needs them, and are the same for every sequence of the model."""

import mlx.core as mx
import pytest
from support import families
from support.arrays import to_numpy
from support.caches import FAST_BACKENDS
from support.models import gemma3, llama, tokens_of

import mlx_turbo
from mlx_turbo import PromptStore, Scheme, TurboConfig, TurboKVCache, choose_bits, describe, make_prompt_cache
from mlx_turbo.integration import bit_budget
from mlx_turbo.integration.prompt_cache import flatten_caches, scheme_bits

fast = pytest.mark.parametrize("backend", FAST_BACKENDS, indirect=True)
TOKENS = tokens_of(bit_budget.FEWEST)[0]
CONFIG = TurboConfig("auto:4.25", sink=2, recent=8, block=8)


def uneven(where=1, factor=8.0, **args):
    """A model whose output depends on the attention of one layer far more than on that of the others."""
    model = llama(num_hidden_layers=3, **args)
    for i, layer in enumerate(model.layers):
        layer.self_attn.o_proj.weight *= factor if i == where else 1 / factor
    mx.eval(model.parameters())
    return model


def divergence(model, cache, tokens=None):
    """KL divergence of the last 64 of TOKENS, behind the others in `cache`, from exact caches."""
    log_p = []
    for c in (make_prompt_cache(model, "turbo0"), cache):
        model(TOKENS[None, :-64], cache=c)
        logits = model(TOKENS[None, -64:], cache=c)[0].astype(mx.float32)
        log_p.append(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    return (mx.exp(log_p[0]) * (log_p[0] - log_p[1])).sum(-1).mean().item()


@pytest.mark.parametrize("where", [0, 2])
def test_the_bits_go_where_the_model_needs_them(backend, where):
    model = uneven(where)
    config = choose_bits(model, TOKENS, CONFIG)
    bits = [s.key_bits + s.value_bits for s in config.schemes]
    assert bits[where] > max(bits[:where] + bits[where + 1 :]) and sum(bits) == 24
    cache = make_prompt_cache(model, config)
    assert [c.config for c in cache] == [config.for_layer(i, 3) for i in range(3)]
    assert divergence(model, cache) < divergence(model, make_prompt_cache(model, TurboConfig("turbo4", 2, 8, 8)))
    assert scheme_bits(cache) == 4.25 and "on average 4.250 bits per number" in describe(cache)
    assert [c.report()["scheme"] for c in cache] == [s.name for s in config.schemes]


@fast
def test_the_same_tokens_lead_to_the_same_choice_and_the_model_stays_as_it_is(backend):
    model = uneven()
    model.set_dtype(mx.bfloat16)
    before = [to_numpy(x) for x in (model.model.embed_tokens.weight, model.layers[1].mlp.up_proj.weight)]
    first, second = (choose_bits(model, tokens, CONFIG) for tokens in (TOKENS, TOKENS.tolist()))
    assert first == second
    after = model.model.embed_tokens.weight, model.layers[1].mlp.up_proj.weight
    assert [x.dtype for x in after] == [mx.bfloat16] * 2
    assert all((a == to_numpy(b)).all() for a, b in zip(before, after))


def test_the_rounding_of_16_bits_does_not_decide():
    """The prices of a model in bfloat16 are those of the same weights in float32."""
    found = []
    for dtype in (mx.bfloat16, mx.float32):
        model = uneven()
        model.set_dtype(mx.bfloat16)
        model.set_dtype(dtype)
        prices = bit_budget.Prices(model, TOKENS, CONFIG)
        found.append([e for by_width in prices.errors(lambda: None).values() for e in by_width.values()])
    assert found[0] == pytest.approx(found[1], rel=0.02)


@fast
def test_more_bits_lose_less(backend):
    model = uneven()
    prices = bit_budget.Prices(model, TOKENS, CONFIG)
    lost = []
    for bits in (2.25, 3.25, 4.25, 5.25, 6.25, 8.25):
        config = bit_budget.spend(TurboConfig(f"auto:{bits}", sink=2, recent=8, block=8), prices)
        cache = make_prompt_cache(model, config)
        lost.append(divergence(model, cache))
        assert scheme_bits(cache) == bits
    assert all(more < less for less, more in zip(lost, lost[1:]))


@fast
def test_a_part_that_costs_much_is_measured_with_more_bits(backend, monkeypatch):
    monkeypatch.setattr(bit_budget, "LARGE", 1e-12)
    errors = bit_budget.Prices(uneven(), TOKENS, CONFIG).errors(lambda: None)
    assert list(errors[1, 0]) == [3, 4, 5, 6, 8]
    assert sorted(errors[1, 0].values(), reverse=True) == list(errors[1, 0].values())


FAMILIES = [
    "gemma3_text",
    "gemma3n",
    "gpt_oss",
    "deepseek_v3",
    "deepseek_v32",
    "falcon_h1",
    "qwen3_next",
    "kimi_linear",
]


@fast
@pytest.mark.parametrize("name", [n for n in FAMILIES if n in families.all_names()])
def test_windows_latents_states_and_shared_layers(backend, name):
    """What stays as the library makes it does not count, and what is packed is at most the budget."""
    model = families.build(name)
    tokens = TOKENS % families.VOCABULARY
    config = choose_bits(model, tokens, TurboConfig("auto:4.9", sink=2, recent=4, block=2))
    cache = make_prompt_cache(model, config)
    model(tokens[None], cache=cache)
    ours = [c for c in flatten_caches(cache) if isinstance(c, TurboKVCache)]
    average = scheme_bits(ours)
    sides = [side for c in ours for side in c._sides if side.recent is not None and side.bits]
    step = max(side.recent.shape[1] * side.head_dim * (2 if side.bits == 6 else 1) for side in sides)
    assert 4.9 - step / sum(side.recent.shape[1] * side.head_dim for side in sides) < average <= 4.9
    assert all(c.n_packed for c in ours if not c.empty())


@fast
def test_a_window_that_is_too_short_to_be_packed_does_not_count(backend):
    model = gemma3(sliding_window=16)
    tokens = TOKENS % 100
    config = choose_bits(model, tokens, CONFIG)
    cache = make_prompt_cache(model, config)
    packed = [i for i, c in enumerate(cache) if isinstance(c, TurboKVCache)]
    assert packed == [2, 5]
    model(tokens[None], cache=cache)
    assert scheme_bits([cache[i] for i in packed]) == 4.25
    assert [s for i, s in enumerate(config.schemes) if i not in packed] == [Scheme(4, 4)] * 4


@fast
def test_every_cache_of_the_model_has_the_same_widths(backend, tmp_path):
    """Enabled, in a batch, taken out of it, in a file, in a store."""
    model = uneven()
    config = choose_bits(model, TOKENS, CONFIG)
    names = [s.name for s in config.schemes]
    mlx_turbo.enable(model, config)
    from mlx_lm.models.cache import make_prompt_cache as of_mlx_lm

    caches = [of_mlx_lm(model) for _ in range(2)]
    for cache, n in zip(caches, (150, 90)):
        model(TOKENS[None, :n], cache=cache)
    merged = [type(a).merge([a, b]) for a, b in zip(*caches)]
    rows = [[batch.extract(i) for batch in merged] for i in range(2)]
    file = str(tmp_path / "file.safetensors")
    mlx_turbo.save_prompt_cache(file, caches[0])
    store = PromptStore(tmp_path / "store")
    store.put(model, TOKENS[:150].tolist(), caches[0])
    stored, rest = store.fetch(model, TOKENS[:160].tolist(), of_mlx_lm(model))
    other = make_prompt_cache(model, choose_bits(model, TOKENS, TurboConfig("auto:3.25", sink=2, recent=8, block=8)))
    assert store.fetch(model, TOKENS[:160].tolist(), other)[0] is None
    store.close()
    for cache in (*rows, mlx_turbo.load_prompt_cache(file), stored):
        assert [c.report()["scheme"] for c in cache] == names
    for i, cache in enumerate(rows):
        for a, b in zip(cache, caches[i]):
            assert all((to_numpy(x) == to_numpy(y)).all() for x, y in zip(a.keys_and_values(), b.keys_and_values()))


def test_chosen_schemes_can_be_kept():
    model = uneven()
    config = choose_bits(model, TOKENS, CONFIG)
    names = [str(s) for s in config.schemes]  # JSON keeps these
    caches = [make_prompt_cache(model, c) for c in (config, TurboConfig(schemes=names, sink=2, recent=8, block=8))]
    assert [c.config for c in caches[0]] == [c.config for c in caches[1]]


def test_progress_is_told_of_each_part():
    n = []
    choose_bits(uneven(), TOKENS, CONFIG, progress=lambda: n.append(1))
    assert len(n) >= 6


def test_what_needs_a_choice_says_so():
    model = llama()
    for make in (make_prompt_cache, mlx_turbo.enable):
        with pytest.raises(ValueError, match=r"mlx_turbo.choose_bits\(model, tokens, 'auto:4.5'\) returns"):
            make(model, "auto:4.5")
    assert "make_cache" not in vars(model)
    with pytest.raises(ValueError, match=r"choose_bits"):
        TurboKVCache("auto:4.5")
    with pytest.raises(ValueError, match=r"schemes: .* make_prompt_cache"):
        TurboKVCache(TurboConfig(schemes=["turbo4"]))
    with pytest.raises(ValueError, match="schemes: got 1, and the model has 2 layers"):
        make_prompt_cache(model, TurboConfig(schemes=["turbo4"]))


def test_what_choose_bits_refuses():
    model = llama()
    with pytest.raises(ValueError, match="config: got 'auto', expected a budget, for example 'auto:4.5'"):
        choose_bits(model, TOKENS, "auto")
    with pytest.raises(ValueError, match="tokens: got 319, at least 320 are needed to choose the bits of auto:4.5"):
        choose_bits(model, TOKENS[:-1], "auto:4.5")
    with pytest.raises(ValueError, match="config: got 'auto:2.2', .* take 2.25 bits per number even at 2 bits"):
        choose_bits(model, TOKENS, "auto:2.2")


def test_the_text_of_the_package_is_long_enough(demo_tokenizer):
    assert len(bit_budget.calibration_tokens(demo_tokenizer)) >= bit_budget.MOST


@pytest.fixture(scope="module")
def demo_tokenizer():
    from mlx_lm.utils import load_tokenizer
    from support.models import DEMO_MODEL

    return load_tokenizer(DEMO_MODEL)
