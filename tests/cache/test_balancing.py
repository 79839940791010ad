"""Channels of keys are balanced by the queries that look at them: what it is worth, when it happens, what it leaves as
it is. That balanced keys are packed and restored as the oracle does, in any history and batch, is tested there."""

import re

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from support.arrays import to_numpy
from support.caches import FAST_BACKENDS, same
from support.ceilings import FIRST_CHUNK_CEILING
from support.no_kernels import Unevaluated

from mlx_turbo import RotatingTurboKVCache, TurboKVCache
from mlx_turbo.backends import select
from mlx_turbo.cache import balancing
from mlx_turbo.cache.attention_error import Attention
from mlx_turbo.cache.state import FORMAT_VERSION
from mlx_turbo.integration import attention
from mlx_turbo.quant import reference

fast = pytest.mark.parametrize("backend", FAST_BACKENDS, indirect=True)
HEADS, KV_HEADS, D, N = 4, 2, 64, 400


def tokens(seed=0, n=N, loud=30.0):
    """Queries, keys and values of one sequence. In 4 channels of the first kv head keys are `loud` times as large as in
    the others, and queries as much smaller."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((1, h, n, D)) for h in (HEADS, KV_HEADS, KV_HEADS))
    channels = rng.permutation(D)[:4]
    k[:, 0, :, channels] *= loud
    q[:, : HEADS // KV_HEADS, :, channels] /= loud
    return tuple(mx.array(x.astype(np.float32)) for x in (q, k, v))


def feed(cache, q, k, v, chunk, observed=True):
    """The output of attention for each chunk, as a model with our attention gets it."""
    for at in range(0, k.shape[2], chunk):
        part = [x[:, :, at : at + chunk] for x in (q, k, v)]
        if observed:
            keys, values = cache.update_and_fetch(*part[1:])
            mask = "causal" if part[0].shape[2] > 1 else None
            out = attention.scaled_dot_product_attention(part[0], keys, values, cache, scale=D**-0.5, mask=mask)
        else:
            out = cache.update_and_fetch(*part[1:])
    return out


def error(cache, q, k, v):
    """How far attention of the newest queries is from that with exact keys, relative."""
    keys, values = (to_numpy(x) for x in cache.keys_and_values())
    got, want = (
        reference.attention(to_numpy(q[:, :, -32:]), keys, values, scale=D**-0.5, mask="causal")
        for keys, values in ((keys, to_numpy(v)), (to_numpy(k), to_numpy(v)))
    )
    return np.sqrt(np.square(got - want).mean() / np.square(want).mean())


@fast
@pytest.mark.parametrize("chunk", [N, 200, 64, 1])
@pytest.mark.parametrize("bits", [2, 4])
def test_loud_channels_cost_nothing_where_queries_do_not_look(backend, bits, chunk):
    """Whether the keys come in one chunk, in several, or one by one."""
    attention.install()
    x, errors = tokens(), {}
    for balance in (False, True):
        cache = TurboKVCache(f"turbo{bits}", balance=balance)
        feed(cache, *x, chunk)
        errors[balance] = error(cache, *x)
    assert cache.report()["balance"].endswith("of 2 kv heads") and not cache.report()["balance"].startswith("0")
    quiet = tokens(loud=1.0)
    cache = TurboKVCache(f"turbo{bits}")
    feed(cache, *quiet, chunk)
    assert errors[True] < 1.3 * error(cache, *quiet) and errors[False] > 3 * errors[True]


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(spread=st.floats(0, 1), seed=st.integers(0, 99), bits=st.sampled_from([2, 3, 4, 8]))
def test_how_a_model_shares_a_logit_between_keys_and_queries_does_not_matter(spread, seed, bits):
    """The factors undo what multiplies keys and divides queries: codes and scales stay what they were."""
    q, k, _ = tokens(seed, n=130, loud=1.0)
    t = mx.array(np.exp(spread * np.random.default_rng(seed).standard_normal((1, KV_HEADS, 1, D))).astype(np.float32))
    q, k = q * mx.linspace(0.2, 2, D), k * mx.linspace(3, 0.1, D)
    config = TurboKVCache(f"turbo{bits}", centre=False).config
    restored = []
    for keys, queries in ((k, q), (k * t, q / mx.repeat(t, HEADS // KV_HEADS, axis=1))):
        observed = balancing.Observed(queries, list(range(130)), D**-0.5, None)
        sampled = Attention(observed, keys, config)
        factors = balancing._candidates(sampled.queries, sampled.sample.centered)[-1]
        packed = reference.quantize(to_numpy(keys), bits, balance=to_numpy(factors).astype(np.float64))
        restored.append(reference.dequantize(packed))
    differ = np.abs(restored[1] / to_numpy(t) - restored[0]) > 1e-3 * np.abs(restored[0]).max()
    assert differ.any(-1).mean() < 0.02  # vectors with a number so near the middle of two levels that rounding decides


@fast
def test_without_queries_there_is_no_balance_and_the_report_says_so(backend):
    x = tokens()
    cache = TurboKVCache("turbo4")
    assert cache.report()["balance"] == "nothing yet"
    feed(cache, *x, 200, observed=False)
    assert cache.report()["balance"] == "no queries were seen before keys were packed"
    assert TurboKVCache("turbo0v4").report()["balance"] == "keys are exact"
    assert TurboKVCache("turbo4", balance=False).report()["balance"] == "off"


@fast
def test_the_balance_stays_as_long_as_packed_tokens_do(backend):
    attention.install()
    x = tokens()
    cache = TurboKVCache("turbo4", sink=4)
    feed(cache, *x, 200)
    factors = cache._sides[0].balance.factors
    feed(cache, *tokens(seed=1), 64)
    assert cache._sides[0].balance.factors is factors
    cache.trim(cache.offset - 5)
    assert cache._sides[0].balance.factors is factors
    cache.trim(1)
    assert cache._sides[0].balance is None and cache.wants_queries
    feed(cache, *x, 200)
    assert cache._sides[0].balance is not None and not cache.wants_queries


@fast
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_not_finite_does_not_choose(backend, side, bad):
    attention.install()
    x = list(tokens())
    spoiled = mx.array(x[side])
    spoiled[0, :, -1, 3] = bad
    caches = [TurboKVCache("turbo4", recent=64) for _ in range(2)]
    for cache, some in zip(caches, (x, [*x[:side], spoiled, *x[side + 1 :]]), strict=True):
        feed(cache, *some, N)
    want, got = (to_numpy(c._sides[0].balance.factors) for c in caches)
    assert np.isfinite(got).all() and (got > 0).all()
    assert np.abs(np.log(got / want)).max() < 0.3  # of one query in 16, or one key in 400


@fast
def test_a_window_is_balanced_too(backend):
    attention.install()
    x, errors = tokens(), []
    for balance in (False, True):
        caches = RotatingTurboKVCache(256, 0, "turbo4", balance=balance), RotatingTurboKVCache(256, 0, "turbo0")
        got, want = (to_numpy(feed(cache, *x, 80)) for cache in caches)
        errors.append(np.abs(got - want).max())
    assert errors[0] > 2 * errors[1]


FREE = "Broadcast Squeeze Reshape ExpandDims Transpose Flatten Unflatten View Depends Slice Split".split()


@pytest.mark.parametrize("name", FIRST_CHUNK_CEILING)
def test_the_operations_of_a_first_chunk_stay_few(monkeypatch, tmp_path, name):
    attention.install()
    scheme, started = name.partition(",")[0], []
    q, k, v = (mx.random.normal((1, heads, 1024, 64)).astype(mx.float16) for heads in (4, 2, 2))
    with select.use_backend(Unevaluated()):
        for count in False, True:  # constants are computed at their first use
            cache = TurboKVCache(scheme, balance="not balanced" not in name)
            mx.eval(q, k, v)
            with monkeypatch.context() as patch:
                patch.setattr(mx, "eval", started.append)
                patch.setattr(mx, "async_eval", lambda *arrays: started.append(arrays))
                keys, values = cache.update_and_fetch(k, v)
                out = attention.scaled_dot_product_attention(q, keys, values, cache, 0.1, "causal")
            if not count:
                mx.eval(out, started)
                started.clear()
    mx.export_to_dot(str(tmp_path / "graph.dot"), out, *(a for _, a in tree_flatten(started)))
    kinds = re.findall(r'label ?= ?"([A-Za-z]+)', (tmp_path / "graph.dot").read_text())
    n = sum(kind not in FREE for kind in kinds)
    assert 0.9 * FIRST_CHUNK_CEILING[name] < n <= FIRST_CHUNK_CEILING[name]


@fast
def test_a_state_without_a_balance_is_read(backend):
    """Files of version 2."""
    cache = TurboKVCache("turbo4")
    feed(cache, *tokens(), 200, observed=False)
    header, *arrays = cache.state
    numbers = header.tolist()
    assert numbers[1] == FORMAT_VERSION
    old = [mx.array([numbers[0], 2, *numbers[2:-2]], mx.int32), *arrays]
    loaded = TurboKVCache.from_state(old)
    assert loaded.config == cache.config
    assert same([to_numpy(a) for a in loaded.state[1:]], [to_numpy(a) for a in arrays])
