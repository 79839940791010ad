"""TurboKVCache: a key-value cache for mlx-lm models that holds most tokens packed.

    [ sink: exact ] [ packed ] [ recent: exact ]

The first `sink` tokens and at least the newest `recent` ones stay as they came, in the model's dtype; what leaves
the recent window is quantized from those exact values, once, so the stored codes do not depend on how the prompt was
cut into chunks. Every array is [B, n_kv_heads, tokens, *]: one token's bits never leave its row.
"""

import warnings

import mlx.core as mx
import numpy as np

from ..backends import select
from ..backends.select import QuantizeSide, check_vectors, get_backend
from ..backends.sides import CachedSide
from ..quant.scheme import SCALES, Scheme, TurboConfig
from . import auto_bits, centering
from .packing import _dtypes, _make_sides, _may_choose, _write
from .state import _HEADER, FORMAT_VERSION, MAGIC, _read_config, _read_header, _restore
from .view import KVView, LazyKV, _Unread


def which_are_centred(caches):
    """Of [(cache, its `_new_means`)], for each {side: whether any head of a row is centred, by row}. Those that have not
    packed yet decide it here, all at once: the only time, but for auto's, that a sequence waits for its tokens."""
    fresh = [new for cache, new in caches if not cache.n_packed]
    decided = iter(centering.rows_worth_it([use for new in fresh for _, use in new.values()]))
    return [{i: [True] if cache.n_packed else next(decided) for i in new} for cache, new in caches]


class TurboKVCache:
    """A KV cache of one layer, in the place of mlx_lm.models.cache.KVCache.

    config: a scheme's name ("turbo4", "turbo8v4", ...), a Scheme or a TurboConfig. Options (sink, recent, block,
    seed) replace what the configuration says.

    Raises ValueError for an unknown scheme or option.
    """

    step = 256  # tokens by which the packed buffers grow

    def __init__(self, config="turbo4", **options):
        self.config = TurboConfig.of(config, **options)
        self.version = 0  # changes with every update: a view of an older version must not be read
        self.attended_version = None  # set by attention.attend
        self._unread = _Unread()
        self._clear()

    def _clear(self):
        self._sides = _make_sides(self.config)
        self.n_sink = self.n_packed = self.n_recent = 0
        self.undecided = _may_choose(self.config)  # auto has not chosen the bits of the keys yet; nothing is packed
        self._observed, self._errors, self._by = None, {}, None

    @property
    def offset(self):
        """Tokens in the cache."""
        return self.n_sink + self.n_packed + self.n_recent

    # ---- update ----------------------------------------------------------------------------------------------
    def update_and_fetch(self, keys, values):
        """Append keys [B, n_kv_heads, L, Dk] and values [B, n_kv_heads, L, Dv] (post-RoPE; float16, bfloat16 or
        float32, with turbo0 whole numbers too) and return all tokens, the new ones exactly as given.

        The older tokens come as lazy arrays: dequantizing costs nothing unless they are read.

        A token that is not finite, or too large for a float16 scale once it is packed, does what it does in mlx-lm's
        cache: queries that see it get nothing finite, other rows and heads do not notice. `report` tells of it; nothing
        is waited for to find it.

        Raises TypeError or ValueError, with the cache unchanged, for wrong shapes, dtypes or head dims, and for a batch,
        number of heads, head_dim or dtype other than before.
        """
        self._check(keys, values)
        new, n_new = (keys, values), keys.shape[2]
        if n_new == 0:
            return self.keys_and_values() if self.offset else new
        first = self.offset == 0
        n_to_sink = min(self.config.sink - self.n_sink, n_new)
        n_to_recent = n_new - n_to_sink
        if self.undecided and (
            self.n_recent > self._capacity()
            or (self.n_recent + n_to_recent > self._capacity() and n_to_recent <= self.config.block)
        ):
            self._decide()  # nobody showed us the queries of the chunk, or it is a decode step that must pack
        capacity = self.config.recent + self.config.block
        if self.n_recent + n_to_recent <= capacity or self.undecided:
            view = None
        elif n_to_recent <= self.config.block:  # make room: what is appended stays exact until a later update
            self._pack([side.recent[:, :, : self.n_recent] for side in self._sides])
            view = None
        else:  # a prompt chunk: attended exactly now, packed at once
            tails = [x[:, :, n_to_sink:] for x in new]
            if self.n_recent:
                tails = [
                    mx.concatenate([side.recent[:, :, : self.n_recent], t], axis=2)
                    for side, t in zip(self._sides, tails)
                ]
            view = self.n_packed, tails
            self._pack(tails)
        for side, x in zip(self._sides, new):
            if n_to_sink:
                side.sink = _write(side.sink, self.n_sink, x[:, :, :n_to_sink], self.config.sink)
            if view is None:
                x = x[:, :, n_to_sink:] if n_to_sink else x
                side.recent = _write(side.recent, self.n_recent, x, capacity)
        self.n_sink += n_to_sink
        if view is None:
            self.n_recent += n_to_recent
        self.version += 1
        if first or view:
            self._evaluate()
        if first:
            return self._fetch(new=new) if self.undecided else new
        return self._fetch(*view or ())

    def _pack(self, tails):
        """Quantize all but the newest `recent` tokens of `tails` (exact tokens after the packed ones, per side) and
        keep those in new recent buffers. Raises before anything is changed."""
        self._unread.forget()
        n_pack = tails[0].shape[2] - self.config.recent
        new = self._new_means(tails, n_pack)
        means = self._means(new, *which_are_centred([(self, new)]))
        packed = self._quantize([tail[:, :, :n_pack] for tail in tails], means)
        for side, tail, mean, (codes, scale) in zip(self._sides, tails, means, packed):
            side.means = mean
            side.codes = _write(side.codes, self.n_packed, codes, self.step)
            if scale is not None:
                side.scale = _write(side.scale, self.n_packed, scale, self.step)
            side.recent = _write(None, 0, tail[:, :, n_pack:], self.config.recent + self.config.block)
        self.n_packed += n_pack
        self.n_recent = self.config.recent

    def _evaluate(self):
        """Start computing new buffers that the arrays we return do not read: another thread cannot evaluate them,
        and until then they would hold what they are computed from."""
        mx.async_eval([side.buffers() for side in self._sides], self._observed_queries())

    def _check(self, keys, values):
        for x, name, side in ((keys, "keys", self._sides[0]), (values, "values", self._sides[1])):
            had = side.recent
            if (
                had is not None
                and isinstance(x, mx.array)
                and x.dtype == had.dtype
                and x.ndim == 4
                and x.shape[:2] == had.shape[:2]
                and x.shape[3] == had.shape[3]
            ):
                continue  # a decode step
            check_vectors(x, name, any_head_dim=side.bits == 0, dtypes=_dtypes(self.config))
            if had is not None:
                for what, was, now in (
                    ("batch size", had.shape[0], x.shape[0]),
                    ("number of kv heads", had.shape[1], x.shape[1]),
                    ("head_dim", had.shape[3], x.shape[3]),
                    ("dtype", had.dtype, x.dtype),
                ):
                    if was != now:
                        raise ValueError(f"{name}: {what} {now}, but this cache holds tokens with {what} {was}")
        if keys.shape[:3] != values.shape[:3]:
            raise ValueError(
                f"values: got {tuple(values.shape)}, expected [batch, n_kv_heads, tokens] as keys {tuple(keys.shape)}"
            )

    def _new_means(self, tails, n_pack):
        """{side: (means of the segments that the first n_pack of `tails` begin [B, H, S, D], which rows and heads are
        centred [B, H, 1, 1])}, lazily.

        Whether a row and head is centred is decided when its first tokens are packed, from all that are at hand; a
        segment's mean when its first token is packed.
        """
        new = {}
        for i, side in enumerate(self._sides):
            n_had, n = (-(-n_tokens // side.segment) for n_tokens in (self.n_packed, self.n_packed + n_pack))
            if not self.config.centre or not side.bits or n == n_had or self.n_packed and side.means is None:
                continue
            summary = centering.summarize(tails[i], self.n_packed, side.segment)
            begun = 1 if self.n_packed % side.segment else 0
            use = (side.means[:, :, :1] != 0).any(-1, keepdims=True) if self.n_packed else centering.worth_it(*summary)
            new[i] = summary[0][:, :, begun:][:, :, : n - n_had], use
        return new

    def _means(self, new, centred):
        """The means of each side (None: not centred) with those of `_new_means` and `which_are_centred`."""
        means = [side.means if self.n_packed else None for side in self._sides]
        for i, (segments, use) in new.items():
            if any(centred[i]):
                segment = self._sides[i].segment
                segments = centering.stored(segments, use, self.config.seed)
                means[i] = _write(means[i], -(-self.n_packed // segment), segments, max(self.step // segment, 1))
        return means

    def _quantize(self, tails, means):
        """Codes and scale of each side, [] and None for one that stays exact. One launch for both sides, unless keys
        have means."""
        out, seed = [(tail, None) for tail in tails], self.config.seed
        by_segment = means[0] is not None
        together = [i for i, side in enumerate(self._sides) if side.bits and not (i == 0 and by_segment)]
        if by_segment:
            out[0] = self._quantize_by_segment(tails[0], self._sides[0], means[0])
        if together:
            sides = [
                QuantizeSide(
                    tails[i], self._sides[i].bits, None if means[i] is None else centering.plain(means[i], seed)
                )
                for i in together
            ]
            for i, result in zip(together, select.quantize_sides(sides, seed, scale=self.config.scale)):
                out[i] = result
        return out

    def _quantize_by_segment(self, x, side, means):
        """Codes and scale of x [B, H, n, D], which become packed tokens n_packed ...: segments as if they were heads."""
        (B, H, n, D), seed, segment = x.shape, self.config.seed, side.segment
        begun, whole, rest = centering.spans(self.n_packed, n, segment)
        at, s, parts = 0, self.n_packed // segment, []
        for n_tokens, n_segments in (begun, 1), (whole * segment, whole), (rest, 1):
            if n_tokens:
                mean = centering.plain(means[:, :, s : s + n_segments], seed).reshape(B, H * n_segments, 1, D)
                piece = x[:, :, at : at + n_tokens].reshape(B, H * n_segments, -1, D)
                (quantized,) = select.quantize_sides(
                    [QuantizeSide(piece, side.bits, mean)], seed, scale=self.config.scale
                )
                parts.append([a.reshape(B, H, n_tokens, -1) for a in quantized])
                at, s = at + n_tokens, s + n_segments
        return tuple(mx.concatenate(a, axis=2) for a in zip(*parts))

    # ---- auto ------------------------------------------------------------------------------------------------
    def observe(self, queries, scale, sinks=None):
        """See the queries [B, n_heads, L, Dk] of the newest L tokens: `auto` chooses by them. From attention.py."""
        if not self.undecided:
            return
        n, (counts,) = queries.shape[2], self._counts()
        held = sum(counts)
        if n > 1:  # one token's queries are evaluated with the step, and kept as they are
            sample = auto_bits.sample_queries(n)
            queries, positions = mx.take(queries, mx.array(sample), axis=2), [held - n + i for i in sample]
            mx.async_eval(queries)
        else:
            positions = [held - 1]
        seen = self._observed[0] if self._observed else []
        self._observed = auto_bits.newest([*seen, (queries, positions)]), scale, sinks
        if self.n_recent > self._capacity():
            self._decide()

    def _observed_queries(self):
        """What `observe` holds on to, arrays; none once auto has chosen. (The attention sinks are the model's.)"""
        return [queries for queries, _ in self._observed[0]] if self._observed else []

    def _capacity(self):
        """Tokens from which on recent ones are packed."""
        capacity = self.config.recent + self.config.block
        return max(capacity, auto_bits.FEWEST) if self.undecided else capacity

    @property
    def packs_beyond(self):
        """As long as the cache holds no more tokens than this, all are exact."""
        return self.config.sink + self._capacity()

    def _decide(self):
        """Choose the bits of the keys, and pack what has waited for that. Without queries (nobody called `observe`) by
        the keys alone."""
        parts = [(side.sink, side.recent[:, :, : self.n_recent]) for side in self._sides]
        keys = mx.concatenate([parts[0][0][:, :, : self.n_sink], parts[0][1]], axis=2) if self.n_sink else parts[0][1]
        bits, self._errors, self._by = auto_bits.choose_by(keys, self.config, self._observed)
        self._sides[0].bits, self.undecided, self._observed = bits, False, None
        if self.n_recent > self._capacity():
            self._pack([recent for _, recent in parts])

    # ---- fetch -----------------------------------------------------------------------------------------------
    def _fetch(self, n_packed=None, tails=None, new=None):
        """All tokens of both sides as `LazyKV`: sink, the first n_packed packed ones, and the exact `tails`
        (the recent ones, if not given). new: the same as arrays, if there are any."""
        sides, n_recent = [], self.n_recent if tails is None else tails[0].shape[2]
        for i, side in enumerate(self._sides):
            tail = side.recent if tails is None else mx.contiguous(tails[i])
            sides.append(
                CachedSide(side.sink, side.codes, side.scale, tail, side.bits, side.head_dim, side.means, side.segment)
            )
        counts = self.n_sink, self.n_packed if n_packed is None else n_packed, n_recent
        view = self._view(sides, counts)
        if not any(side.bits for side in sides):
            return tuple(view.restore())  # nothing is packed: mlx-lm's own attention, to the bit
        packed = self._unread.get(view) if view.counts[1] else None
        return tuple(LazyKV(x, view, i) for i, x in enumerate(new or view.restore(packed)))

    def _view(self, sides, counts):
        return KVView(*sides, counts, self.config.seed, self, self.version)

    def keys_and_values(self):
        """All tokens, [B, n_kv_heads, offset, D] of keys and of values, packed ones dequantized lazily."""
        if self.offset == 0:
            raise ValueError("the cache is empty: it does not know the shape of its keys and values yet")
        return self._fetch()

    # ---- the rest of mlx-lm's contract -----------------------------------------------------------------------
    @property
    def keys(self):
        """The exact recent keys' buffer (None while empty). mlx-lm's pipeline models read and set it to tie the
        cache's update to another computation; it is not the history: that is `keys_and_values`."""
        return self._sides[0].recent

    @keys.setter
    def keys(self, buffer):
        self._sides[0].recent = buffer

    @property
    def values(self):
        """As `keys`."""
        return self._sides[1].recent

    @values.setter
    def values(self, buffer):
        self._sides[1].recent = buffer

    def is_trimmable(self):
        return True

    def trim(self, n):
        """Forget the newest n tokens, or all if there are fewer; returns how many were forgotten."""
        trimmed = n = min(max(int(n), 0), self.offset)
        self.version += 1
        self._unread.forget()
        if n == self.offset:
            self._clear()
            return trimmed
        for name in ("n_recent", "n_packed", "n_sink"):
            take = min(n, getattr(self, name))
            setattr(self, name, getattr(self, name) - take)
            n -= take
        return trimmed

    def make_mask(self, *args, **kwargs):
        """The mask for the next N tokens: as mlx_lm.models.cache.KVCache."""
        from mlx_lm.models.cache import create_attention_mask

        return create_attention_mask(*args, offset=self.offset, **kwargs)

    @classmethod
    def merge(cls, caches):
        """A BatchTurboKVCache whose rows are `caches`: mlx-lm batches caches that have this."""
        from .batch import BatchTurboKVCache

        return BatchTurboKVCache.merge(caches)

    def size(self):
        return self.offset

    def empty(self):
        return self.offset == 0

    @property
    def nbytes(self):
        """Bytes of all buffers, unused room included, and of the queries that auto has observed, until it chooses."""
        return sum(side.nbytes for side in self._sides) + sum(queries.nbytes for queries in self._observed_queries())

    def _counts(self):
        """(n_sink, n_packed, n_recent) of each sequence."""
        return [(self.n_sink, self.n_packed, self.n_recent)]

    def _seen_counts(self):
        """The same, of the tokens that a query sees."""
        return self._counts()

    def _columns_of_rows(self):
        """(n_sink, n_packed, n_recent) columns of the buffers, and of each row the columns with its tokens, in order."""
        counts = self.n_sink, self.n_packed, self.n_recent
        n_rows = 1 if self.empty() else self._sides[0].recent.shape[0]
        return counts, [np.arange(sum(counts))] * n_rows

    def not_finite(self):
        """{"keys": [tokens of row 0, ...], "values": [...]}: how many tokens a query sees that are not finite, or were
        too large for a float16 scale when they were packed, in some head. Looked up in what is stored, and so it costs
        nothing until somebody asks; this waits for the tokens to be computed."""
        columns, rows = self._columns_of_rows()
        seen, found = self._seen_counts(), {}
        for name, side in zip(("keys", "values"), self._sides):
            buffers = side.sink, side.codes if side.scale is None else side.scale, side.recent
            bad = [(~mx.isfinite(a[:, :, :n])).any((1, 3)) for a, n in zip(buffers, columns) if n]
            bad = np.array(mx.concatenate(bad, axis=1)) if bad else np.zeros((len(rows), 0), bool)
            found[name] = []
            for b, row in enumerate(rows):
                n_sink, *others = seen[b % len(seen)]
                found[name].append(int(bad[b, row[:n_sink]].sum() + bad[b, row[len(row) - sum(others) :]].sum()))
        return found

    def report(self):
        """What the cache holds, as a dict of plain values: scheme (as it is, auto's choice included); tokens, of which
        sink, packed and recent; nbytes; uncompressed_nbytes (what mlx-lm's KVCache, which grows by 256 tokens, would
        hold); packed_bits_per_value (of keys and values, from the arrays themselves); centred (sides with means);
        not_finite (tokens, by side and row, see there: this waits for them to be computed); auto (None, or how the bits
        were chosen); backend; attention ("fused", or why a decode step is not)."""
        values = packed_bits = uncompressed = 0
        n_tokens = [sum(counts) for counts in self._seen_counts()]
        n_sink, n_packed, n_recent = map(sum, zip(*self._seen_counts()))
        for side in self._sides:
            if side.recent is None:
                continue
            per_token = side.recent.shape[0] * side.recent.shape[1] * side.head_dim
            values += per_token
            uncompressed += self._uncompressed_capacity(max(n_tokens)) * per_token * side.recent.dtype.size
            if side.codes is not None:
                arrays = [a for a in (side.codes, side.scale, side.means) if a is not None]
                packed_bits += 8 * sum(a.nbytes for a in arrays) / side.codes.shape[2]
        return {
            "scheme": Scheme(*(side.bits for side in self._sides)).name,
            "tokens": sum(n_tokens),
            "sink": n_sink,
            "packed": n_packed,
            "recent": n_recent,
            "nbytes": self.nbytes,
            "uncompressed_nbytes": uncompressed,
            "packed_bits_per_value": packed_bits / values if values else 0.0,
            "centred": [name for name, side in zip(("keys", "values"), self._sides) if side.means is not None],
            "not_finite": self.not_finite(),
            "auto": self._auto_report(),
            "backend": get_backend().describe(),
            "attention": self._attention(),
        }

    def _uncompressed_capacity(self, n_tokens):
        """Tokens for which the cache in whose place this one is has room, once it holds n_tokens."""
        return -(-n_tokens // 256) * 256

    def _auto_report(self):
        if not _may_choose(self.config):
            return None
        return {"undecided": self.undecided, "target": auto_bits.TARGET, "error": dict(self._errors), "by": self._by}

    def _attention(self):
        if self.empty() or not any(side.bits for side in self._sides):
            return "mlx-lm's own: nothing is packed"
        return get_backend().why_not_fused(*((side.bits, side.head_dim) for side in self._sides), 1) or "fused"

    def to_kv_cache(self):
        """A plain mlx_lm KVCache with the same tokens, packed ones restored in the model's dtype."""
        from mlx_lm.models.cache import KVCache

        cache = KVCache()
        if self.offset:
            cache.keys, cache.values = (mx.array(x) for x in self.keys_and_values())
            cache.offset = self.offset
        return cache

    never_quantized = None  # or what mlx-lm has no quantized cache of

    def to_quantized(self, group_size=64, bits=4):
        """An mlx_lm QuantizedKVCache made of the restored tokens, as KVCache.to_quantized: mlx-lm's `kv_bits` calls it,
        whoever asks for both is warned. This cache stays as it is.

        Raises ValueError for bits that MLX has not and a head_dim that is no multiple of group_size, and
        NotImplementedError for windows and batches, of which mlx-lm has no quantized ones.
        """
        if self.never_quantized:
            raise NotImplementedError(
                f"to_quantized: mlx-lm has no quantized cache of a {self.never_quantized}, which "
                f"kv_bits asks for; without kv_bits this one stays {self.config.name}"
            )
        from mlx_lm.models.cache import QuantizedKVCache

        cache = QuantizedKVCache(group_size, bits)
        if self.offset:
            cache.keys, cache.values = (mx.quantize(x, group_size, bits) for x in self.keys_and_values())
            cache.offset = self.offset
        warnings.warn(
            f"a TurboKVCache ({self.config.name}) becomes mlx-lm's QuantizedKVCache ({bits} bits, groups of "
            f"{group_size}), made of its restored tokens: without kv_bits it stays {self.config.name}",
            stacklevel=2,
        )
        return cache

    # ---- state -----------------------------------------------------------------------------------------------
    magic, header_names = MAGIC, _HEADER

    def _header(self, counts):
        scheme, config = self.config.scheme, self.config
        filled = sum(counts) > 0
        dims = [side.head_dim if filled else 0 for side in self._sides]
        dtypes = [select.EXACT_DTYPES.index(side.recent.dtype) if filled else 0 for side in self._sides]
        n_means = [0 if side.means is None else -(-counts[1] // side.segment) for side in self._sides]
        return [
            self.magic,
            FORMAT_VERSION,
            scheme.key_bits,
            scheme.value_bits,
            config.sink,
            config.recent,
            config.block,
            config.seed,
            SCALES.index(config.scale),
            config.centre,
            config.auto,
            -1 if self.undecided else self._sides[0].bits,
            *counts,
            *dims,
            *dtypes,
            *n_means,
        ]

    def _arrays(self, counts):
        arrays, (n_sink, n_packed, n_recent) = [], counts
        for side in self._sides:
            parts = (
                (side.sink, n_sink),
                (side.codes, n_packed),
                (side.scale, n_packed),
                (side.means, -(-n_packed // side.segment)),
                (side.recent, n_recent),
            )
            arrays += [a[:, :, :n] for a, n in parts if a is not None and n]  # never the object we write into
        return arrays

    @property
    def state(self):
        """Everything as a list of arrays: an int32 header, then per side sink, codes, scale, means and recent, cut to
        the tokens they hold; parts without tokens are left out."""
        counts = self.n_sink, self.n_packed, self.n_recent
        return [mx.array(self._header(counts), mx.int32), *self._arrays(counts)]

    @state.setter
    def state(self, arrays):
        header = _read_header(arrays[0] if arrays else None, self)
        config, key_bits = _read_config(header)
        own = self._own_state(header, config)
        rest = iter(arrays[1:])
        sides = _make_sides(config, None if key_bits < 0 else key_bits)
        counts = header["n_sink"], header["n_packed"], header["n_recent"]
        full = counts[2] > config.recent + config.block and not _may_choose(config)  # auto's wait until the next update
        if min(counts) < 0 or counts[0] > config.sink or full or (key_bits < 0 and counts[1]):
            raise ValueError(f"state: the header names {counts} sink, packed and recent tokens, with {config}")
        try:
            for side, name in zip(sides, ("key", "value")):
                _restore(side, rest, counts, header, name, config)
        except StopIteration:
            raise ValueError("state: arrays are missing") from None
        if next(rest, None) is not None:
            raise ValueError("state: more arrays than the header says")
        if sum(counts) and sides[0].recent.shape[:2] != sides[1].recent.shape[:2]:
            raise ValueError("state: keys and values have different batch sizes or numbers of kv heads")
        self.config, self._sides, self.undecided = config, sides, key_bits < 0
        self.n_sink, self.n_packed, self.n_recent = counts
        self.version, self.attended_version, self._unread = 0, None, _Unread()
        self._observed, self._errors, self._by = None, {}, None
        vars(self).update(own)
        self._evaluate()

    def _own_state(self, header, config):
        """Attributes that the header of a subclass has besides; raises ValueError for what does not fit."""
        return {}

    @property
    def meta_state(self):  # mlx-lm 0.31 saves it; the header is in `state`
        return ""

    @meta_state.setter
    def meta_state(self, value):
        pass

    @classmethod
    def from_state(cls, state, meta_state=None):
        """A cache from the `state` of another. Raises ValueError for arrays that are not one."""
        cache = cls.__new__(cls)
        cache.state = state
        return cache
