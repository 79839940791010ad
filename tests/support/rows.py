"""A batch and, beside it, each of its rows alone."""

import functools

import mlx.core as mx
import numpy as np
from support.arrays import to_numpy
from support.caches import few_keys_are_balanced, held_nbytes, queries_of, random_tokens, same, same_restored

from mlx_turbo import TurboConfig, TurboKVCache
from mlx_turbo.quant import rotation


def state_of(cache):
    """A cache's state in NumPy."""
    return [np.array(a) if a.dtype in (mx.int32, mx.uint32) else to_numpy(a) for a in cache.state]


# Of a packed vector's error, relative to its norm, by bits: half as much again as the largest of 3 million random
# vectors of 32, 64 and 96 dims, but with 2 bits 0.95.
LARGEST_ERROR = {0: 0.0, 2: 0.95, 3: 0.65, 4: 0.45, 5: 0.34, 6: 0.24, 8: 0.18}


def check_restored(cache, given, passed=((), ())):
    """The tokens that a cache of one row restores are those of a list, keys and values [1, H, offset, D], as near as
    what was packed can be: a token centered and balanced as its head is. A token in another's place is at 1. passed:
    the bits that packed keys and values had before."""
    assert given[0].shape[2] == cache.offset
    packed_at = cache.config.scheme.key_bits, cache.config.scheme.value_bits  # and raised from there, with auto
    for got, want, side, bits, before in zip(cache.keys_and_values(), given, cache._sides, packed_at, passed):
        rounding = {mx.float32: 1e-6, mx.float16: 2**-11, mx.bfloat16: 2**-8}[got.dtype]
        got, n_kept = to_numpy(got), min(cache.config.sink, got.shape[2])
        want = np.concatenate([want[:, :, :n_kept], want[:, :, want.shape[2] - (got.shape[2] - n_kept) :]], axis=2)
        factors = 1 if side.balance is None else to_numpy(side.balance.factors)
        got, want = got * factors, want * factors
        means = np.zeros((1, 1)) if side.means is None else rotation.unrotate(to_numpy(side.means), cache.config.seed)
        packed = np.linalg.norm(want[..., None, :] - means[..., None, :, :], axis=-1).max(-1)  # whichever mean was its
        most = LARGEST_ERROR[min(bits, side.bits)] * packed + rounding * np.linalg.norm(want, axis=-1)
        most = most + LARGEST_ERROR[side.bits] * packed * (side.bits > bits)
        for b in before:  # each of what the one before made of it, which may be longer by as much
            most = most * (1 + LARGEST_ERROR[b]) + LARGEST_ERROR[b] * packed
        error = np.linalg.norm(got - want, axis=-1)
        assert (error <= most).all() and (side.bits or error.max() == 0), (bits, side.bits, (error - most).max())


class Rows:
    """A batch cache and, beside it, each of its rows alone in a cache that `make` makes, and a list of its tokens;
    compares them after every step."""

    def __init__(self, make, n_rows, seed=0, repackable=False, **shape):
        self.shape, self.rng = shape, np.random.default_rng(seed)
        make = functools.partial(TurboKVCache, make) if isinstance(make, TurboConfig) else make
        self.alone = [make() for _ in range(n_rows)]
        for cache in self.alone:
            cache.repackable = repackable
        self.passed = set(), set()  # bits of keys and of values that it had
        self.batch, self.given = self.alone[0].merge(self.alone), [None] * n_rows
        self.bias = [float(i % 3 == 1) * 20 for i in range(n_rows)]

    def update(self, lengths, left=None, cut=0):
        """Feed row b lengths[b] tokens, padded at the right, or at the left where `left` says how many; in two chunks
        if cut > 0, of which the first has `cut` tokens."""
        B, width = len(self.alone), max(n + pad for n, pad in zip(lengths, left or [0] * len(lengths)))
        left = left or [0] * B
        rows = [random_tokens(self.rng, width, **self.shape, bias=bias) for bias in self.bias]
        new = [mx.concatenate(side) for side in zip(*rows)]
        if any(left):
            self.batch.prepare(left_padding=left)
        right = [width - pad - n for n, pad in zip(lengths, left)]
        if any(right):
            self.batch.prepare(lengths=[width - n for n in right], right_padding=right)
        edges = [0, cut, width] if 0 < cut < width else [0, width]
        for at, end in zip(edges, edges[1:]):
            pads = [min(max(pad - at, 0), end - at) for pad in left]
            lives = [max(min(pad + n, end) - max(pad, at), 0) for n, pad in zip(lengths, left)]
            with few_keys_are_balanced():
                self._chunk([x[:, :, at:end] for x in new], lives, pads, [max(pad - at, 0) for pad in left])
        self.batch.finalize()
        self.check()

    def _chunk(self, new, lengths, left, to_come):
        width = new[0].shape[2]
        before, mask = [c.offset for c in self.alone], self.batch.array_mask(width)
        said = self.batch.make_mask(width)
        if said is None:  # of latents: nothing is masked
            assert width == 1 and self.batch.holds_latents and mask.all().item()
        else:
            assert mx.array_equal(said, mask).item()
        assert self.batch.offset.tolist() == [n - pad for n, pad in zip(before, to_come)]
        fetched = self.batch.update_and_fetch(*new)
        self.batch.attended_version = self.batch.version  # as if attention.attend had read them
        assert mask.dtype == mx.bool_ and mask.shape == (len(self.alone), 1, width, fetched[0].shape[2])
        for b, (n, pad, cache) in enumerate(zip(lengths, left, self.alone)):
            if n == 0:
                continue
            given = [to_numpy(x[b : b + 1, :, pad : pad + n]) for x in new]
            self.given[b] = given if not before[b] else [np.concatenate(p, axis=2) for p in zip(self.given[b], given)]
            mine, seen = cache.make_mask(n, return_array=True, window_size=None), np.array(mask[b, 0])[pad : pad + n]
            want = cache.update_and_fetch(*(x[b : b + 1, :, pad : pad + n] for x in new))
            mine = np.ones((1, want[0].shape[2]), bool) if mine is None else np.array(mine)
            for got, x in zip(fetched, want):
                assert got.dtype == x.dtype
                got, x = to_numpy(got)[b : b + 1], to_numpy(x)
                columns = zip(seen, mine, strict=True)
                assert all(same_restored(got[:, :, ours], x[:, :, theirs]) for ours, theirs in columns)
            cache.observe(queries_of(new[0])[b : b + 1, :, pad : pad + n], 0.1)
        self.batch.observe(queries_of(new[0]), 0.1)
        assert [x.shape for x in fetched] == [x.shape for x in self.batch.keys_and_values()]

    def check(self):
        batch, alone = self.batch, self.alone
        assert batch.offset.dtype == mx.int32 and batch.offset.tolist() == [c.offset for c in alone]
        assert batch.size() == max(c.size() for c in alone) and batch.empty() == all(c.empty() for c in alone)
        assert batch.nbytes == held_nbytes([batch._sides, batch._observed])
        for b, (cache, given) in enumerate(zip(alone, self.given, strict=True)):
            extracted = batch.extract(b)
            assert same(state_of(extracted), state_of(cache)), b
            if cache.offset:
                check_restored(extracted, given, self.passed)
        if not batch.empty():
            fetched = batch.keys_and_values()
            for b, cache in enumerate(alone):
                live = (batch.shown or batch.plan(0)).token_columns(b)
                if cache.offset:
                    for got, want in zip(fetched, cache.keys_and_values()):
                        got, want = to_numpy(got)[b : b + 1, :, live], to_numpy(want)
                        n_sink = min(
                            cache.config.sink, want.shape[2]
                        )  # a window of the batch has empty columns besides
                        newest = got[:, :, got.shape[2] - (want.shape[2] - n_sink) :]
                        assert same_restored(np.concatenate([got[:, :, :n_sink], newest], axis=2), want)

    def repack(self, key_bits=None, value_bits=None):
        for side, bits in zip(self.passed, vars(self.batch.config.scheme).values()):
            side.add(bits)
        for cache in [self.batch, *self.alone]:
            with few_keys_are_balanced():
                cache.repack(key_bits, value_bits)
        self.check()

    def extend(self, other):
        before = state_of(other.batch)
        self.batch.extend(other.batch)
        assert same(state_of(other.batch), before)
        self.alone += other.alone
        self.passed = tuple(map(set.union, self.passed, other.passed))
        self.given += other.given
        self.bias += other.bias
        self.check()

    def filter(self, rows):
        self.batch.filter(rows)
        self.alone, self.given, self.bias = ([x[b] for b in rows] for x in (self.alone, self.given, self.bias))
        self.check()

    def trim(self, n):
        assert self.batch.trim(n) == max(cache.trim(n) for cache in self.alone)
        self.given = [given and [x[:, :, : max(x.shape[2] - n, 0)] for x in given] for given in self.given]
        self.check()


def check_that_twins_go_their_own_way(rows, twins):
    """Copies of the batch of `rows`: what one does is not seen in another."""
    before = state_of(rows.batch)
    for twin in twins:
        assert same(state_of(twin), before)
        rng = np.random.default_rng(0)
        for n in (1, 12, 1):
            twin.update_and_fetch(*random_tokens(rng, n, batch=len(rows.alone)))
        assert same(state_of(rows.batch), before)
    assert same(*map(state_of, twins))
    rows.check()
