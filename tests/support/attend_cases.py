"""Caches with known contents for the tests of the attention kernels, and what attention over them must give."""

from typing import NamedTuple, Optional

import mlx.core as mx
import numpy as np
from support.arrays import to_numpy

from mlx_turbo.backends.self_test import random_array, random_cached_side, restored_tokens, rope_logits, to_float64
from mlx_turbo.backends.sides import ONE_SEGMENT, CachedSide, RopePart
from mlx_turbo.quant import reference

POISON = 24  # rows of capacity behind the last token, filled with what must never be read


class Case(NamedTuple):
    """What `attend` takes, and keys and values [B, Hkv, n_tokens, D] float64 as the oracle sees them."""

    queries: mx.array
    keys: CachedSide
    values: CachedSide
    counts: tuple
    scale: float
    restored: tuple
    rope: Optional[RopePart] = None


def make_latents(bits=(4, 4), dims=(512, 64), rope=True, **options):
    """A case of latents, which are keys and values, and RoPE keys, of bits and dims; without `rope`, none of these.
    options: of `make_case`."""
    case = make_case((bits[0],) * 2, (dims[0],) * 2, **options)
    case = case._replace(values=case.keys, restored=(case.restored[0],) * 2)
    if not rope:
        return case
    rng = np.random.default_rng(options.get("rng_seed", 0) + 1)
    B, heads, L, _ = case.queries.shape
    shape, dtype = (B, case.keys.n_kv_heads, dims[1]), case.queries.dtype
    keys = random_cached_side(rng, shape, case.counts, bits[1], dtype, room=POISON)
    queries = random_array(rng, (B, L, heads, dims[1]), dtype).transpose(0, 2, 1, 3) / 4
    return case._replace(rope=RopePart(queries, keys))


def make_case(
    bits=(4, 4),
    dims=(128, 128),
    counts=(4, 150, 33),
    G=4,
    Hkv=1,
    B=1,
    L=1,
    dtype=mx.float32,
    means=False,
    seed=0,
    rng_seed=0,
    gain=1.0,
    segment=128,
    balanced=False,
):
    """means: packed tokens are relative to one, of the keys to one for each `segment` of them. balanced: the channels
    of the keys are. gain: the logits grow along the sequence, up to this many times their usual size."""
    rng = np.random.default_rng(rng_seed)
    growth = None if gain == 1 else np.linspace(0.01, 1, sum(counts))
    options = dict(seed=seed, room=POISON)
    shape = B, Hkv, dims[0]
    keys = random_cached_side(
        rng, shape, counts, bits[0], dtype, means and segment, growth=growth, balanced=balanced, **options
    )
    values = random_cached_side(rng, (B, Hkv, dims[1]), counts, bits[1], dtype, means and ONE_SEGMENT, **options)
    q = rng.standard_normal((B, L, Hkv * G, dims[0])).astype(np.float32) * 2 * gain
    queries = mx.array(q).astype(dtype).transpose(0, 2, 1, 3)  # as models have them: not row-contiguous
    restored = tuple(restored_tokens(side, counts, seed) for side in (keys, values))
    return Case(queries, keys, values, counts, dims[0] ** -0.5, restored)


def visible(case, mask=None):
    """[.., L, n_tokens]: which tokens a query may see, or with an additive mask what is added to its logits."""
    n, L = sum(case.counts), case.queries.shape[2]
    if mask is None:
        return np.ones((1, 1, L, n), bool)
    if isinstance(mask, str):
        return np.arange(n) <= np.arange(n - L, n)[:, None]
    return np.array(mask if mask.dtype == mx.bool_ else mask.astype(mx.float32))


def expected(case, mask=None, sinks=None):
    """float64 [B, Hq, L, Dv]."""
    q, seen = to_float64(case.queries), visible(case, mask)
    sinks = None if sinks is None else np.array(sinks.astype(mx.float32))
    if case.rope is not None:
        added = rope_logits(case.rope, case.counts)
        seen = np.where(seen, added, -np.inf) if seen.dtype == bool else seen + added
    return reference.attention(q, *case.restored, scale=case.scale, mask=seen, sinks=sinks)


def spoiled(case, side, token, value):
    """The case with a token's key (side 0) or value (1) spoiled in the last kv head of the last batch row: a packed one
    as `quantize` would, an exact one in one number."""
    cached, (n_sink, n_packed, _) = (case.keys, case.values)[side], case.counts
    name, at = next(
        (name, token - first)
        for name, first in (("recent", n_sink + n_packed), ("scale" if cached.bits else "codes", n_sink), ("sink", 0))
        if token >= first
    )
    array = mx.array(getattr(cached, name))
    array[-1, -1, at, 0] = float("nan") if name == "scale" else value
    return case._replace(**{("keys", "values")[side]: cached._replace(**{name: array})})


def check_spoiled(case, attend, most):
    """Masks of every kind, and with each `most` single tokens that are not finite: queries that see one get nothing
    finite, all the others what they get without. attend(case, mask)."""
    (B, heads, L, _), (n_sink, n_packed, n_recent), n = case.queries.shape, case.counts, sum(case.counts)
    rng, seen = np.random.default_rng(0), set()
    some = rng.random((B, heads, L, n)) < 0.5
    added = np.where(some, rng.standard_normal(some.shape), -np.inf).astype(np.float32)
    faults = [
        (side, token)
        for side in (0, 1)
        for token in (0, n_sink, n_sink + n_packed // 2, n_sink + n_packed - 1, n - n_recent // 2 - 1, n - 1)
    ]
    for mask in ("causal", mx.array(some), mx.array(some[:, :1]), mx.array(added)):
        sees, sound = visible(case, mask), to_numpy(attend(case, mask))
        sees = np.broadcast_to(sees if sees.dtype == bool else sees > -1e30, (B, heads, L, n))
        for side, token in rng.permutation(faults)[:most]:
            # an infinite logit may be -infinity: then the token weighs nothing, as with MLX
            value = rng.choice([np.nan, np.inf, -np.inf]) if side else np.nan
            got = to_numpy(attend(spoiled(case, side, int(token), value), mask))
            hit = np.zeros((B, heads, L), bool)
            of_head = slice(heads - heads // case.keys.recent.shape[1], None)
            hit[-1, of_head] = sees[-1, of_head, :, token]
            assert not np.isfinite(got[hit]).all(-1).any(), (mask, side, token)
            np.testing.assert_array_equal(got[~hit], sound[~hit], err_msg=f"{mask}, {side}, {token}")
            seen |= {*hit[-1, of_head].ravel()}
    assert seen == {False, True}
