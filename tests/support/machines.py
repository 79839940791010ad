"""State machines that do to a cache, in any order, what mlx-lm does to it, against lists of tokens."""

import functools

import mlx.core as mx
import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition
from support.arrays import to_numpy
from support.caches import (
    WAYS,
    ListModel,
    copied,
    few_keys_are_balanced,
    fewer,
    held_nbytes,
    queries_of,
    random_tokens,
    rule,
    same,
    snapshot,
)
from support.rows import Rows
from support.strategies import CONFIGS, SHAPES

from mlx_turbo import RotatingTurboKVCache, Scheme, TurboConfig, TurboKVCache

BATCHES = dict(
    keys=st.sampled_from([0, 2, 4, 8]),
    values=st.sampled_from([0, 3, 4]),
    recent=st.integers(0, 6),
    block=st.integers(1, 6),
    n=st.integers(1, 3),
    centre=st.booleans(),
    shape=SHAPES,
)


def drawn_bits(data, scheme):
    """Arguments of `repack`, for keys, values or both."""
    bits = dict(key_bits=st.sampled_from(fewer(scheme.key_bits)), value_bits=st.sampled_from(fewer(scheme.value_bits)))
    return data.draw(st.fixed_dictionaries({}, optional=bits))


class CacheMachine(RuleBasedStateMachine):
    """Everything mlx-lm does to a cache, in any order."""

    @initialize(config=CONFIGS, shape=SHAPES, one=st.sampled_from([True, True, False]))
    def start(self, config, shape, one):
        shape = {**shape, "batch": 1} if one else shape  # which caches that are merged have
        self.model, self.shape, self.rng = ListModel(TurboKVCache(config)), shape, np.random.default_rng(0)
        self.model.cache.repackable = True
        self.others = []  # (cache, its snapshot): copies must never notice what happens to the original

    def _replace(self, cache):
        self.others = [*self.others[-2:], (self.model.cache, snapshot(self.model.cache))]
        self.model.cache = cache
        self.model.check()

    @rule(n=st.one_of(st.just(1), st.integers(1, 20)))
    def append(self, n):
        self.model.append(*random_tokens(self.rng, n, **self.shape))

    @precondition(lambda self: self.model.offset)
    @rule()
    def append_nothing(self):
        self.model.append(*random_tokens(self.rng, 0, **self.shape))

    @rule(n=st.one_of(st.integers(0, 4), st.integers(0, 60)))
    def trim(self, n):
        self.model.trim(n)

    @rule(way=st.sampled_from(WAYS))
    def go_on_with_a_copy(self, way):
        self._replace(copied(self.model.cache, way))

    @rule(data=st.data())
    def repack(self, data):
        self.model.repack(**drawn_bits(data, self.model.config.scheme))

    # ---- what a program does that takes it for mlx-lm's KVCache ------------------------------------------------
    @precondition(lambda self: self.model.offset)
    @rule(step=st.integers(1, 9))
    def read_in_blocks(self, step):
        cache = self.model.cache
        for tokens, want in zip((cache.keys, cache.values), cache.keys_and_values()):
            blocks = [tokens[:, :, i : i + step] for i in range(0, cache.offset, step)]
            assert isinstance(tokens, mx.array) and mx.array_equal(mx.concatenate(blocks, axis=2), want, equal_nan=True)

    @precondition(lambda self: self.model.offset)
    @rule(data=st.data(), order=st.permutations(["keys", "values", "offset"]))
    def trim_by_slicing(self, data, order):
        cache, n = self.model.cache, data.draw(st.integers(0, self.model.offset))
        new = dict(keys=cache.keys[..., :n, :], values=cache.values[..., :n, :], offset=n)
        for name in order[: data.draw(st.integers(1, 3))]:
            if n or name == "offset" or not cache.empty():
                setattr(cache, name, new[name])
        self.model.trimmed_to(n)

    @precondition(lambda self: self.model.offset)
    @rule(data=st.data(), side=st.sampled_from([0, 1]))
    def replace_tokens(self, data, side):
        """None of them, as mlx-lm's pipeline models do, or some."""
        model, name = self.model, ("keys", "values")[side]
        changed = data.draw(st.lists(st.integers(0, model.offset - 1), max_size=3, unique=True))
        tokens, new = getattr(model.cache, name), random_tokens(self.rng, model.offset, **self.shape)[side]
        if data.draw(st.booleans()):
            for i in changed:
                tokens[..., i : i + 1, :] = new[:, :, i : i + 1]
            assert mx.array_equal(tokens[:, :, changed], new[:, :, changed]) if changed else True
        else:
            here = mx.array([i in changed for i in range(model.offset)])[:, None]
            setattr(model.cache, name, mx.depends(mx.where(here, new, tokens), mx.array(3.0) + 1))
        model.given[side][:, :, changed] = to_numpy(new)[:, :, changed]
        model.replaced(side, changed)
        model.check()

    @precondition(lambda self: self.shape["batch"] == 1)
    @rule(n=st.integers(1, 30), first=st.booleans())
    def go_on_from_a_batch(self, n, first):
        """Merged with another, extracted again."""
        other = TurboKVCache(self.model.config)
        other.update_and_fetch(*random_tokens(self.rng, n, **self.shape))
        caches = [self.model.cache, other] if first else [other, self.model.cache]
        self._replace(TurboKVCache.merge(caches).extract(0 if first else 1))

    @rule()
    def look_at_an_earlier_copy(self):
        if self.others:
            cache, before = self.others[-1]
            assert same(snapshot(cache), before)

    def teardown(self):
        for cache, before in getattr(self, "others", []):
            assert same(snapshot(cache), before)


class WindowMachine(RuleBasedStateMachine):
    """Everything mlx-lm does to a window, in any order: beside it a list of all tokens and a TurboKVCache that evicts
    none."""

    @initialize(
        window=st.integers(1, 40),
        keep=st.integers(0, 3),
        recent=st.integers(0, 6),
        block=st.integers(1, 6),
        bits=st.sampled_from([(0, 0), (4, 4), (3, 8), (0, 2)]),
        centre=st.booleans(),
        bias=st.sampled_from([0, 20]),
    )
    def start(self, window, keep, recent, block, bits, centre, bias):
        config, self.bias = TurboConfig(Scheme(*bits), keep, recent, block, centre=centre), bias
        self.cache, self.all = RotatingTurboKVCache(window + keep, keep, config), ListModel(TurboKVCache(config))
        self.rng = np.random.default_rng(0)

    @rule(n=st.one_of(st.just(1), st.integers(1, 9), st.integers(10, 60)), times=st.integers(1, 3))
    def append(self, n, times):
        for _ in range(times):
            tokens, cache, before = random_tokens(self.rng, n, bias=self.bias), self.cache, self.cache.offset
            mask = cache.make_mask(n, return_array=True)
            with few_keys_are_balanced():
                fetched = cache.update_and_fetch(*tokens)
                cache.observe(queries_of(tokens[0]), 0.1)
            everything = self.all.append(*tokens)
            n_seen = min(before + 1, cache.max_size) if n == 1 else min(before, cache.max_size - 1) + n
            assert cache.offset == before + n and (mask is None or mask.shape[-1] == n_seen)
            self.each_sees_the_kept_and_the_newest(mask, n, n_seen)
            self.are_newest(fetched, everything, n_seen)

    def each_sees_the_kept_and_the_newest(self, mask, n, n_seen):
        cache, n_kept = self.cache, min(self.cache.keep, n_seen)
        token = np.r_[:n_kept, cache.offset - (n_seen - n_kept) : cache.offset]  # of each column
        query = np.arange(cache.offset - n, cache.offset)[:, None]
        want = (token <= query) & ((token < cache.keep) | (token > query - cache.window))
        got = np.ones((n, n_seen), bool) if mask is None else np.broadcast_to(np.array(mask), (n, n_seen))
        np.testing.assert_array_equal(got, want)

    def are_newest(self, fetched, everything, n_seen):
        for got, x in zip(fetched, everything):
            n_kept = min(self.cache.keep, n_seen)
            newest = x[:, :, x.shape[2] - (n_seen - n_kept) :]
            assert mx.array_equal(got, mx.concatenate([x[:, :, :n_kept], newest], axis=2))

    @invariant()
    def what_it_holds_is_the_newest(self):
        cache = self.cache
        assert cache.offset == self.all.offset and cache.size() == min(cache.offset, cache.max_size)
        assert cache.nbytes == held_nbytes(cache)
        if cache.offset:
            held = cache.keys_and_values()
            assert held[0].shape[2] >= cache.size()
            self.are_newest(held, self.all.cache.keys_and_values(), held[0].shape[2])

    @rule(n=st.integers(0, 20))
    def trim(self, n):
        if self.cache.is_trimmable():
            want = min(n, self.cache.offset)
            self.all.trim(n)
            assert self.cache.trim(n) == want

    @rule(way=st.sampled_from(WAYS))
    def go_on_with_a_copy(self, way):
        self.cache = copied(self.cache, way)

    @rule(data=st.data())
    def repack(self, data):
        """Exact tokens are not packed as in the cache that evicts none, once some are evicted."""
        bits, scheme = drawn_bits(data, self.cache.config.scheme), self.cache.config.scheme
        if self.cache.n_evicted:
            bits = {name: b for name, b in bits.items() if getattr(scheme, name)}
        with few_keys_are_balanced():
            self.cache.repack(**bits)
        self.all.repack(**bits)

    @precondition(lambda self: self.cache.offset)
    @rule()
    def read_all(self):
        for tokens, want in zip((self.cache.keys, self.cache.values), self.cache.keys_and_values()):
            assert mx.array_equal(tokens, want)

    @rule(n=st.integers(1, 60))
    def go_on_from_a_batch(self, n):
        """Merged with another, extracted again."""
        other = RotatingTurboKVCache(self.cache.max_size, self.cache.keep, self.cache.config)
        other.update_and_fetch(*random_tokens(self.rng, n))
        self.cache = self.cache.merge([other, self.cache]).extract(1)


class BatchMachine(RuleBasedStateMachine):
    """Everything mlx-lm does to a batch of caches, in any order."""

    @initialize(sink=st.integers(0, 3), **BATCHES)
    def start(self, keys, values, sink, recent, block, n, centre, shape):
        self.make = TurboConfig(f"turbo{keys}v{values}", sink, recent, block, centre=centre)
        self.begin(n, shape)

    def begin(self, n, shape):
        self.shape = {name: x for name, x in shape.items() if name != "batch"}
        self.rows, self.n_made = Rows(self.make, n, repackable=True, **self.shape), 0

    @rule(n=st.integers(1, 5))
    def decode(self, n):
        for _ in range(n):
            self.rows.update([1] * len(self.rows.alone))

    @rule(data=st.data())
    def prompt(self, data):
        B = len(self.rows.alone)
        lengths = data.draw(st.lists(st.integers(0, 24), min_size=B, max_size=B).filter(any))
        self.rows.update(lengths, cut=data.draw(st.integers(0, max(lengths))))

    @precondition(lambda self: len(self.rows.alone) < 5)
    @rule(data=st.data(), n=st.integers(1, 2), padded=st.booleans())
    def extend(self, data, n, padded):
        self.n_made += 1
        other = Rows(self.make, n, seed=self.n_made, **self.shape)
        lengths = data.draw(st.lists(st.integers(0, 24), min_size=n, max_size=n))
        if any(lengths):
            other.update(lengths, [max(lengths) - k for k in lengths] if padded else None)
        other.repack(*vars(self.rows.batch.config.scheme).values())
        if data.draw(st.booleans()):
            other, self.rows = self.rows, other
        self.rows.extend(other)

    @rule(data=st.data())
    def repack(self, data):
        self.rows.repack(**drawn_bits(data, self.rows.batch.config.scheme))

    @rule(data=st.data())
    def filter(self, data):
        every = st.permutations(range(len(self.rows.alone)))
        rows = data.draw(every)
        self.rows.filter(rows[: data.draw(st.integers(1, len(rows)))])

    @rule()
    def merge_what_is_extracted(self):
        extracted = [self.rows.batch.extract(b) for b in range(len(self.rows.alone))]
        self.rows.batch = extracted[0].merge(extracted)
        self.rows.check()

    @rule(n=st.one_of(st.integers(0, 4), st.integers(0, 40)))
    def trim(self, n):
        self.rows.trim(n)

    @rule(way=st.sampled_from(WAYS))
    def go_on_with_a_copy(self, way):
        self.rows.batch = copied(self.rows.batch, way)
        if way in ("state", "file"):  # without the queries of tokens that are not packed yet
            self.rows.alone = [copied(cache, "state") for cache in self.rows.alone]
        self.rows.check()

    @rule()
    def read_all(self):
        """`keys` and `values` in the columns of mlx-lm's batches."""
        batch = self.rows.batch
        for name in "keys", "values":
            tokens = getattr(batch, name)
            assert tokens is None or tokens.shape[2] == batch._idx
            for b, alone in enumerate(self.rows.alone):
                if not alone.empty():
                    want, n = to_numpy(getattr(alone, name)), alone.size()
                    sink = min(alone.config.sink, n)
                    want = np.concatenate([want[:, :, :sink], want[:, :, want.shape[2] - n + sink :]], axis=2)
                    assert same(to_numpy(tokens)[b : b + 1, :, batch._idx - n :], want)
                    assert not to_numpy(tokens)[b, :, : batch._idx - n].any()


class WindowsMachine(BatchMachine):
    """Everything mlx-lm does to a batch of windows, in any order."""

    @initialize(window=st.integers(1, 40), keep=st.integers(0, 3), **BATCHES)
    def start(self, keys, values, window, keep, recent, block, n, centre, shape):
        config = TurboConfig(f"turbo{keys}v{values}", keep, recent, block, centre=centre)
        self.make = functools.partial(RotatingTurboKVCache, window + keep, keep, config)
        self.begin(n, shape)

    @invariant()
    def buffers_are_bounded(self):
        batch = self.rows.batch
        if batch._sides[0].codes is not None:
            longest_chunk = 24
            assert batch._sides[0].codes.shape[2] <= batch.room + max(longest_chunk, batch.step) + batch.step

    @precondition(lambda self: self.rows.batch.is_trimmable())
    @rule(n=st.one_of(st.integers(0, 4), st.integers(0, 40)))
    def trim(self, n):
        self.rows.trim(n)
