"""No update waits for the GPU: neither the one that packs the first tokens of a sequence, nor decode steps nor prompt
chunks after it. Counted on the kernel path, with kernels that do nothing."""

import contextlib
import functools
import traceback

import mlx.core as mx
import numpy as np
import pytest
from support.caches import random_tokens
from support.no_kernels import NoKernels

from mlx_turbo import BatchTurboKVCache, RotatingTurboKVCache, TurboConfig, TurboKVCache
from mlx_turbo.backends import select, tiled_attention
from mlx_turbo.cache import auto_bits, packing
from mlx_turbo.integration import attention

LOOKS = "tolist", "item", "__bool__", "__int__", "__float__", "__index__", "__array__", "__dlpack__", "__repr__"


class Waits:
    """`with Waits(monkeypatch) as waits:` - where Python code in the block waited for an array to be computed.

    Waiting for what was started before something else was is left out: that is still running meanwhile. So is what was
    started in an earlier block: what a step gives is computed after its block."""

    def __init__(self, monkeypatch):
        self.patch, self.places, self._started, self._n_earlier = monkeypatch, [], [], 0

    def __enter__(self):
        self._n_earlier = len(self._started)
        patch = self.context = self.patch.context()
        patch = patch.__enter__()
        for module, name in (mx, "eval"), (mx, "synchronize"), (np, "array"), (np, "asarray"):
            patch.setattr(module, name, functools.partial(self._called, getattr(module, name), module is np))
        patch.setattr(mx, "async_eval", functools.partial(self._start, mx.async_eval))
        for name in LOOKS:
            method = getattr(mx.array, name)
            patch.setattr(mx.array, name, lambda *a, _method=method, **options: self._looked(_method, *a, **options))
        return self

    def __exit__(self, *exception):
        self.context.__exit__(*exception)

    def _noted(self, function, *args, **options):
        frame = next(f for f in reversed(traceback.extract_stack()[:-1]) if f.filename != __file__)
        self.places.append(f"{frame.filename}:{frame.lineno} {frame.line}")
        return function(*args, **options)

    def _start(self, original, *arrays):
        self._started.append(_arrays(arrays))
        return original(*arrays)

    def _called(self, original, only_with_arrays, *args, **options):
        given = _arrays(args)
        if only_with_arrays and not given or given and self._were_started(given):
            return original(*args, **options)
        return self._noted(original, *args, **options)

    def _looked(self, method, array, *args, **options):
        look = method if self._were_started([array]) else functools.partial(self._noted, method)
        return look(array, *args, **options)

    def _were_started(self, arrays):
        n = max(self._n_earlier, len(self._started) - 1)
        earlier = {id(a) for started in self._started[:n] for a in started}
        return all(id(a) in earlier for a in arrays)


def _arrays(thing):
    if isinstance(thing, (list, tuple)):
        return [a for x in thing for a in _arrays(x)]
    return [thing] if isinstance(thing, mx.array) else []


class Layer:
    """A cache and the attention of a layer, with random tokens that are there already."""

    def __init__(self, cache, n_rows=1, heads=2, dim=64, bias=0):
        self.cache, self.rng = cache, np.random.default_rng(0)
        self.tokens = functools.partial(
            random_tokens, self.rng, batch=n_rows, heads=heads, key_dim=dim, value_dim=dim, dtype=mx.float16, bias=bias
        )
        self.shape = n_rows, 2 * heads, dim

    def inputs(self, n):
        rows, heads, dim = self.shape
        queries = mx.array(self.rng.standard_normal((rows, heads, n, dim)), mx.float16)
        arrays = queries, *self.tokens(n)
        mx.eval(arrays)
        return arrays

    def attend(self, queries, keys, values):
        mask = self.cache.make_mask(queries.shape[2], return_array=False, window_size=None)
        keys, values = self.cache.update_and_fetch(keys, values)
        return attention.scaled_dot_product_attention(queries, keys, values, self.cache, 0.125, mask)

    def prompt(self, *chunks):
        for n in chunks:
            mx.eval(self.attend(*self.inputs(n)))
        return self

    def batch(self, lengths):
        """A prompt of rows of different lengths, padded at the right."""
        longest = max(lengths)
        self.cache.prepare(lengths=list(lengths), right_padding=[longest - n for n in lengths])
        self.prompt(longest)
        self.cache.finalize()
        return self


SMALL = TurboConfig("turbo4", recent=16, block=16)
LAYERS = {
    "turbo4": lambda: Layer(TurboKVCache()).prompt(300),
    "turbo8v4, centred": lambda: Layer(TurboKVCache("turbo8v4"), bias=30).prompt(1100, 300),
    "exact keys": lambda: Layer(TurboKVCache("turbo0v4")).prompt(300),
    "head_dim 72, of which there is no kernel": lambda: Layer(TurboKVCache("turbo3"), dim=72).prompt(300),
    "auto": lambda: Layer(TurboKVCache("auto")).prompt(300),
    "window": lambda: Layer(RotatingTurboKVCache(256, 4, SMALL)).prompt(400),
    "window, centred": lambda: Layer(RotatingTurboKVCache(256, 4, SMALL), bias=30).prompt(400),
    "batch": lambda: Layer(BatchTurboKVCache("turbo4", [0] * 3), 3).batch([300, 140, 700]),
    "batch, centred": lambda: Layer(BatchTurboKVCache("turbo4", [0] * 3), 3, bias=30).batch([300, 140, 700]),
    "batch, auto": lambda: Layer(BatchTurboKVCache("auto", [0] * 2), 2).batch([300, 600]).prompt(1),
    "batch of windows": lambda: Layer(
        RotatingTurboKVCache.merge([RotatingTurboKVCache(256, 4, SMALL) for _ in range(3)]), 3
    ).batch([300, 140, 700]),
}


@pytest.fixture
def stub(door):
    with select.use_backend(NoKernels()) as backend:
        yield backend


@pytest.fixture(autouse=True)
def auto_is_content(monkeypatch):
    monkeypatch.setattr(auto_bits, "TARGET", 1e9)  # what kernels that do nothing restore is far off


def packed(cache):
    return cache.report()["packed"]


def decode(layer, n, waits):
    """n decode steps; what a step gives is computed as a model does, outside of `waits`."""
    steps = [layer.inputs(1) for _ in range(4)]
    for i in range(n):
        with waits:
            out = layer.attend(*steps[i % len(steps)])
        mx.eval(out)


@pytest.mark.parametrize("name", LAYERS)
def test_a_thousand_decode_steps_wait_for_nothing(monkeypatch, stub, name):
    layer = LAYERS[name]()
    cache = layer.cache
    decode(layer, 130, contextlib.nullcontext())  # constants are computed at their first use
    before, version = packed(cache), cache.version
    report = cache.report()
    assert before and not cache.undecided and ("centred" in name) == bool(report["centred"])
    assert report["attention"].partition(":")[0] == ("tiles" if "no kernel" in name else "fused")
    decode(layer, 1000, waits := Waits(monkeypatch))
    assert waits.places == []
    assert cache.version == version + 1000 and ("window" in name or packed(cache) > before + 900)


@pytest.mark.parametrize("name", LAYERS)
def test_prompt_chunks_over_a_packed_past_wait_for_nothing(monkeypatch, stub, name):
    """Over restored tokens, and in tiles, one computed while the next is prepared; drafts of 5 tokens too."""
    for tiles in False, True:
        monkeypatch.setenv("MLX_TURBO_MAX_RESTORED_BYTES", "0" if tiles else str(1 << 30))
        check_prompt_chunks(monkeypatch, LAYERS[name](), tiles)


def check_prompt_chunks(monkeypatch, layer, tiles):
    waits = Waits(monkeypatch)
    monkeypatch.setattr(tiled_attention, "MAX_TILE", 64)
    layer.prompt(100, 5)  # constants are computed at their first use
    for n in (200, 400, 5, 5, 40):
        given = layer.inputs(n)
        with waits:
            out = layer.attend(*given)
        mx.eval(out)
    assert waits.places == [] and (len(waits._started) > 8 or not tiles)


@pytest.mark.parametrize("scheme", ["turbo4", "auto"])
@pytest.mark.parametrize("make", [TurboKVCache, lambda scheme: BatchTurboKVCache(scheme, [0])])
@pytest.mark.parametrize("bias", [0, 30])
def test_the_first_chunks_of_a_prompt_wait_for_nothing(monkeypatch, stub, scheme, make, bias):
    """Nor does reading the state of a layer after each chunk, as mlx-lm does, while later layers are being computed."""
    Layer(make(scheme), bias=bias).prompt(300, 300, 1)
    layers, waits = [Layer(make(scheme), bias=bias) for _ in range(3)], Waits(monkeypatch)
    for n in 300, 300, 1, 1:
        given = [layer.inputs(n) for layer in layers]
        with waits:
            out = [layer.attend(*x) for layer, x in zip(layers, given)]
            states = [layer.cache.state for layer in layers[:-1]]
        mx.eval(out, states, layers[-1].cache.state)
        assert waits.places == [], n
    for layer in layers:
        assert layer.cache._sides[0].balance is not None and packed(layer.cache) == 532, "the keys were not packed"
        assert bool(layer.cache.report()["centred"]) == bool(bias)


def test_a_sequence_that_begins_with_single_tokens_waits_for_nothing(monkeypatch, stub):
    decode(Layer(TurboKVCache(), bias=30), 140, contextlib.nullcontext())
    layer, waits = Layer(TurboKVCache(), bias=30).prompt(1), Waits(monkeypatch)
    decode(layer, 400, waits)
    assert waits.places == [] and packed(layer.cache) > 200 and layer.cache.report()["centred"]


def test_rows_that_come_and_go_make_the_others_wait_for_nothing(monkeypatch, stub):
    layer, waits = LAYERS["batch, centred"]().prompt(1), Waits(monkeypatch)
    new = Layer(TurboKVCache(), bias=30).prompt(200, 1).cache
    decode(layer, 30, waits)
    with waits:
        layer.cache.filter([2, 0])
        layer.cache.extend(TurboKVCache.merge([new]))
    decode(layer, 300, waits)
    assert waits.places == []


@pytest.mark.parametrize(
    "look",
    [
        lambda a: a.tolist(),
        lambda a: mx.eval(a),
        lambda a: bool(a.all()),
        repr,
        lambda a: np.array(a),
        lambda a: a[0].item(),
        lambda a: np.asarray([a]),
    ],
    ids=range(7),
)
def test_looking_at_a_scale_when_it_is_made_would_be_seen(monkeypatch, stub, look):
    """The fault that these tests are for: each block that was packed was looked at."""
    layer, quantize = LAYERS["turbo4"](), packing.quantize_tokens

    def looking(*args):
        out = quantize(*args)
        look(mx.isfinite(out[0][1]).reshape(-1))
        return out

    monkeypatch.setattr(packing, "quantize_tokens", looking)
    decode(layer, 200, waits := Waits(monkeypatch))
    assert len(waits.places) >= 3
