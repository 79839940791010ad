"""What the cache's tests share: random vectors, what a cache holds in NumPy, and the oracle's view of it."""

import collections
import contextlib
import copy
import functools
import pickle
import tempfile

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import stateful
from mlx_lm.models.cache import RotatingKVCache
from support.arrays import to_numpy

from mlx_turbo import Scheme, TurboKVCache, load_prompt_cache, save_prompt_cache
from mlx_turbo.backends import select
from mlx_turbo.backends.self_test import TIE, compare_quantized, compare_vectors
from mlx_turbo.cache import balancing, centering
from mlx_turbo.cache.state import HEADER_NAMES
from mlx_turbo.quant import reference, rotation
from mlx_turbo.quant.scheme import BITS

FAST_BACKENDS = [select.default_name()]  # for tests with many small launches
STEPS = collections.Counter()  # of state machines: how often a rule ran, by (class, rule)
WAYS = "copy", "deepcopy", "pickle", "state", "file"
DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}


def rule(**arguments):
    """hypothesis's rule, counted in STEPS."""

    def decorate(function):
        @functools.wraps(function)
        def counted(machine, **drawn):
            STEPS[type(machine).__name__, function.__name__] += 1
            return function(machine, **drawn)

        return stateful.rule(**arguments)(counted)

    return decorate


def copied(cache, way):
    """A cache that goes on from what this one holds, by one of WAYS."""
    if way in ("copy", "deepcopy"):
        return getattr(copy, way)(cache)
    if way == "pickle":
        return pickle.loads(pickle.dumps(cache))
    if way == "state":
        return type(cache).from_state(cache.state)
    with tempfile.TemporaryDirectory() as folder:
        save_prompt_cache(f"{folder}/a.safetensors", [cache])
        (loaded,) = load_prompt_cache(f"{folder}/a.safetensors")
    assert type(loaded) is type(cache)
    return loaded


def vectors(rng, *shape, dtype=mx.float32):
    """Random vectors [*shape] of `dtype`, with norms that differ from token to token."""
    x = rng.standard_normal(shape) * np.exp(rng.standard_normal((*shape[:-1], 1)))
    return mx.array(x.astype(np.float32)).astype(dtype)


def random_tokens(rng, n, *, batch=1, heads=2, key_dim=32, value_dim=32, dtype=mx.float32, bias=0):
    """Keys and values of n tokens; bias: of every number in the last head of the last row."""
    biased = mx.zeros((batch, heads, 1, 1))
    biased[-1, -1] = bias
    return tuple((vectors(rng, batch, heads, n, dim) + biased).astype(dtype) for dim in (key_dim, value_dim))


def packed_bits(bits, head_dim):
    """The bits of a side: none at a head_dim that stays exact."""
    return bits if 32 <= head_dim <= 576 and head_dim % 4 == 0 else 0


def header(cache):
    """The header of a cache's state as a dict."""
    return dict(zip(HEADER_NAMES, cache.state[0].tolist()))


def stored(cache):
    """What a cache's state holds: for keys and values a dict of sink, codes, scale, means, recent, as NumPy or None."""
    head, arrays, sides = header(cache), iter(cache.state[1:]), []
    key_bits = packed_bits(head["chosen_key_bits"], head["key_dim"])
    value_bits = packed_bits(head["value_bits"], head["value_dim"])
    for bits, n_means in (key_bits, head["key_means"]), (value_bits, head["value_means"]):
        present = dict(
            sink=head["n_sink"],
            codes=head["n_packed"],
            scale=head["n_packed"] and bits,
            means=n_means,
            recent=head["n_recent"],
        )
        side = {}
        for name, n in present.items():
            array = next(arrays) if n else None
            side[name] = None if array is None else np.array(array) if array.dtype == mx.uint32 else to_numpy(array)
        sides.append(side)
    sides[0]["balance"] = to_numpy(next(arrays)) if head["key_balance"] else None
    assert next(arrays, None) is None
    return sides


def snapshot(cache):
    """Everything one can see of a cache, to compare before and after."""
    return cache.offset, cache.nbytes, header(cache), stored(cache)


def same(a, b):
    """Whether two nested structures of plain values and NumPy arrays are equal bit by bit (NaN equals NaN)."""
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b, equal_nan=True)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def same_restored(a, b):
    """`same`, of restored values: where a real GPU runs, within rounding. A kernel with means is another program than
    one without, and a compiler that contracts multiplications and additions rounds the two differently."""
    if getattr(select.get_backend(), "is_real", False):
        return a.dtype == b.dtype and np.allclose(a, b, rtol=0, atol=4e-6 * np.abs(b).max(initial=1), equal_nan=True)
    return same(a, b)


def held_nbytes(thing, seen=None):
    """Bytes of all mx.arrays that can be reached from an object's attributes, each counted once."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return 0
    seen.add(id(thing))
    if isinstance(thing, mx.array):
        return thing.nbytes
    if isinstance(thing, dict):
        return sum(held_nbytes(x, seen) for x in thing.values())
    if isinstance(thing, (list, tuple, set)):
        return sum(held_nbytes(x, seen) for x in thing)
    return held_nbytes(vars(thing), seen) if hasattr(thing, "__dict__") else 0


class RotatingThatSeesKept(RotatingKVCache):
    """mlx-lm's window, but tokens late in a chunk see what those that come one by one do: the first `keep` and the
    newest, max_size in all."""

    def make_mask(self, N, window_size=None, return_array=False):
        mask = super().make_mask(N, window_size, return_array)
        if N == 1 or not isinstance(mask, mx.array):
            return mask
        column = mx.arange(mask.shape[-1])
        query = column[-N:, None]
        return (column <= query) & ((column < self.keep) | (column > query - (self.max_size - self.keep)))


class ListModel:
    """A cache in a few lines of NumPy: the tokens as they were given, in a list per side, and which are packed.

    Compares a TurboKVCache with it after every step. It knows nothing of buffers, chunks or blocks.
    """

    def __init__(self, cache):
        self.cache = cache
        self.clear()

    @property
    def config(self):
        return self.cache.config

    def clear(self):
        self.given, self.untrimmed, self.dtypes = None, True, None
        self.repacked = {}, {}  # of keys, of values: {token: (codes, scale)} that were given to it

    @property
    def offset(self):
        return 0 if self.given is None else self.given[0].shape[2]

    def append(self, keys, values):
        """Append to both, compare what comes back, then everything the cache holds. Returns what came back."""
        new, before = (keys, values), header(self.cache)
        given = [to_numpy(x) for x in new]
        old, self.dtypes = self.offset, [x.dtype for x in new]
        self.given = given if old == 0 else [np.concatenate(p, axis=2) for p in zip(self.given, given)]
        with few_keys_are_balanced():
            fetched = self.cache.update_and_fetch(keys, values)
            if keys.shape[2]:
                self.cache.observe(queries_of(keys), 0.1)
        # what was packed before, or to make room, comes back restored, all the rest as it was given; a chunk too
        # large for the recent window is packed only after it has been returned, and so are the first tokens
        after = header(self.cache)
        small = keys.shape[2] - (after["n_sink"] - before["n_sink"]) <= self.config.block and before["n_packed"]
        self._check_fetched(fetched, after["n_sink"], (after if small else before)["n_packed"])
        for x, want in zip(fetched, given):
            np.testing.assert_array_equal(to_numpy(x)[:, :, old:], want)
        self.check()
        return fetched

    def trim(self, n):
        want = min(max(n, 0), self.offset)
        assert self.cache.trim(n) == want
        self.trimmed_to(self.offset - want)

    def trimmed_to(self, n):
        """The cache was trimmed to n tokens in another way than by `trim`."""
        if n == 0:
            self.clear()
        elif n < self.offset:
            self.given, self.untrimmed = [x[:, :, :n] for x in self.given], False
            self.repacked = tuple({t: row for t, row in side.items() if t < n} for side in self.repacked)
        self.check()

    def replaced(self, side, tokens):
        """Tokens of a side, from 0 on, were set to others."""
        for t in tokens:
            self.repacked[side].pop(t, None)

    def repack(self, **bits):
        """Fewer bits of both: what was packed gets them as the oracle says, what was exact is packed for the first
        time."""
        before, first = stored(self.cache), header(self.cache)["n_sink"]
        had, asked = self._bits() if self.offset else (0, 0), self.config.scheme
        with few_keys_are_balanced():
            self.cache.repack(**bits)
        want = Scheme(bits.get("key_bits", asked.key_bits), bits.get("value_bits", asked.value_bits))
        assert self.config.scheme == want
        now = self._bits() if self.offset else (0, 0)
        for i, (side, old, new, a, b) in enumerate(zip(self.repacked, before, stored(self.cache), had, now)):
            if a != b and a and new["codes"] is not None:
                rows = reference.from_packed(old["codes"], old["scale"], a, self.given[i].shape[3])
                error = compare_quantized(new["codes"], new["scale"], reference.requantize(rows, b))
                assert error is None, error
                assert same([old["means"], old.get("balance")], [new["means"], new.get("balance")])
                for t in range(new["codes"].shape[2]):
                    side[first + t] = new["codes"][:, :, t], new["scale"][:, :, t]
        self.check()

    def check(self):
        """The cache's counters, what it stores, and what it restores."""
        cache, config, head = self.cache, self.config, header(self.cache)
        assert cache.offset == self.offset == head["n_sink"] + head["n_packed"] + head["n_recent"]
        assert cache.size() == self.offset and cache.empty() == (self.offset == 0)
        assert cache.nbytes == held_nbytes(cache)
        if not self.offset:
            return
        assert head["n_sink"] == min(config.sink, self.offset)
        assert head["n_recent"] <= config.recent + config.block
        if self.untrimmed:
            assert head["n_recent"] >= min(config.recent, self.offset - head["n_sink"])
        first, last = head["n_sink"], head["n_sink"] + head["n_packed"]
        bits = self._bits()
        for i, (side, x, bits) in enumerate(zip(stored(cache), self.given, bits)):
            for part, want in (("sink", x[:, :, :first]), ("recent", x[:, :, last:])):
                if want.shape[2]:
                    np.testing.assert_array_equal(side[part], want)
            if last > first and not bits:
                np.testing.assert_array_equal(side["codes"], x[:, :, first:last])
            elif last > first:
                mean, balance = self._mean(side, i, last - first), side.get("balance")
                x = x[:, :, first:last]
                want = reference.quantize(x, bits, rotation=config.seed, mean=mean, balance=balance)
                codes, scale, once = side["codes"].copy(), side["scale"].copy(), want.packed()
                for at, row in ((t - first, row) for t, row in self.repacked[i].items() if t < last):
                    assert same(row, (codes[:, :, at], scale[:, :, at]))
                    codes[:, :, at], scale[:, :, at, 0] = once[:, :, at], want.scale[:, :, at]
                tie = TIE  # and what float32 makes of the difference to a mean that is far from 0
                if mean is not None and (spread := np.std(x - mean)):
                    tie += 4 * 2**-24 * np.linalg.norm(mean, axis=-1).max() / spread
                error = compare_quantized(codes, scale, want, tie)
                assert error is None, error
        self._check_fetched(cache.keys_and_values(), head["n_sink"], head["n_packed"])

    def _mean(self, side, i, n):
        """What the first n packed tokens are relative to: float64 [B, H, n, D], or None."""
        if side["means"] is None:
            return None
        segment = centering.segment_of(i)
        means = rotation.unrotate(side["means"][:, :, np.arange(n) // segment].astype(np.float64), self.config.seed)
        return means if side.get("balance") is None else means / side["balance"]

    def _bits(self):
        scheme = self.config.scheme
        return [packed_bits(b, x.shape[3]) for b, x in zip((scheme.key_bits, scheme.value_bits), self.given)]

    def _check_fetched(self, fetched, n_sink, n_packed):
        bits = self._bits()
        for i, (x, want, side, b, dtype) in enumerate(zip(fetched, self.given, stored(self.cache), bits, self.dtypes)):
            assert x.dtype == dtype and tuple(x.shape) == want.shape
            x, first, last = to_numpy(x), n_sink, n_sink + n_packed
            np.testing.assert_array_equal(x[:, :, :first], want[:, :, :first])
            np.testing.assert_array_equal(x[:, :, last:], want[:, :, last:])
            if n_packed and not b:
                np.testing.assert_array_equal(x[:, :, first:last], want[:, :, first:last])
            elif n_packed:
                restored = restore(
                    side["codes"][:, :, :n_packed], side["scale"][:, :, :n_packed], b, x.shape[3], self.config.seed
                )
                mean = self._mean(side, i, n_packed)
                restored = restored if side.get("balance") is None else restored / side["balance"]
                restored = restored if mean is None else restored + mean
                error = compare_vectors(x[:, :, first:last], restored, dtype)
                assert error is None, error


def restore(codes, scale, bits, head_dim, seed=0):
    """The oracle's vectors of packed rows: float64 [B, H, n, head_dim]."""
    return reference.dequantize(reference.from_packed(codes, scale, bits, head_dim, rotation=seed))


@contextlib.contextmanager
def few_keys_are_balanced():
    """Inside this context keys are balanced however few there are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(balancing, "FEWEST", 2)
        yield


def fewer(bits):
    """What bits can become by `repack`, themselves included."""
    return [b for b in BITS if not bits or 0 < b <= bits]


def queries_of(keys, n_rows=2):
    """Queries [B, n_rows * H, n, D] that look at other channels than keys [B, H, n, D] are large in."""
    D = keys.shape[3]
    return mx.repeat(keys[..., ::-1], n_rows, axis=1) * mx.linspace(0.7, 1.4, D).astype(keys.dtype)


def filled(n=40, scheme="turbo4", seed=0, sink=2, recent=4, block=4, chunk=None, **options):
    """A cache of n random tokens."""
    cache = TurboKVCache(scheme, sink=sink, recent=recent, block=block)
    keys, values = random_tokens(np.random.default_rng(seed), n, **options)
    for i in range(0, n, chunk or n):
        cache.update_and_fetch(keys[:, :, i : i + (chunk or n)], values[:, :, i : i + (chunk or n)])
    return cache
