"""Balance: factors for the channels of keys before they are rotated; queries are divided by them.

A rotation spreads the error of a packed key evenly over its channels, so that the error of a logit is in proportion to
(sum q_i^2 / s_i^2) (sum k_i^2 s_i^2) for factors s, which is least at s_i = sqrt(rms of q_i / rms of k_i), by the
inequality of Cauchy and Schwarz. In some models (Qwen2.5) a few channels of the keys are large and queries hardly look
at them: there this is worth as much as a bit or two. In others the square root of s is better, or no factors at all, so
each kv head gets what errs least (attention_error.py). Every choice is exact for exact keys: q.k = (q / s).(k s).

Chosen when the first keys of a sequence are packed, by the queries that were shown until then; without queries, or with
too few keys, there is no balance. The factors stay the same as long as packed tokens are held.
"""

import math
from typing import NamedTuple, Optional

import mlx.core as mx
import numpy as np

from ..backends.rotate import constant
from ..backends.sides import Balance
from ..quant.scheme import TurboConfig
from . import centering
from .attention_error import Attention, Observed
from .joined import Tokens

EXPONENTS = (0.0, 0.5, 1.0)  # of s
FLOOR = 1e-3  # of a head's rms, the least that counts as that of a channel: some models have channels that are all 0
MARGINS = (0.9, 1, 1)  # factors must bring the error below this share of that without: so few queries tell no less
MOST_BITS = 4  # at which the errors are compared: with more they are rounding
FEWEST = centering.FEWEST  # keys


class Chosen(NamedTuple):
    """factors: of the channels of keys, float32 [B, n_kv_heads, 1, D]. error: of the attention weights if the keys are
    packed at MOST_BITS, or fewer if they are to have fewer: nats, float32 [B, n_kv_heads]. attention: which measured
    it."""

    factors: mx.array
    error: mx.array
    attention: Attention


def choose(keys: Tokens, config: TurboConfig, bits: int, observed: Optional[Observed]) -> Optional[Chosen]:
    """How keys [B, n_kv_heads, N, D] of tokens 0 .. N - 1 that are to be packed at `bits` are balanced, lazily. Factors
    are of equal energy: packed keys are as large as without. None where nothing can be chosen."""
    if not config.balance or not bits or observed is None or keys.shape[2] < FEWEST:
        return None
    observed = observed._replace(queries=mx.contiguous(observed.queries))
    attention = Attention(observed, keys, config)
    candidates = _candidates(attention.queries, attention.sample.centered)
    errors = attention.errors([min(bits, MOST_BITS)], candidates)  # of all at once: these are many small operations
    best = mx.argmin(errors * constant(_column, MARGINS, 3), axis=0, keepdims=True)
    factors, error = (
        mx.take_along_axis(x, i, axis=0)[0] for x, i in ((candidates, best[..., None, None]), (errors, best))
    )
    return Chosen(factors, error, attention)


def balance_of(chosen: Optional[Chosen]) -> Optional[Balance]:
    """What keys are packed with, if anything was chosen."""
    return None if chosen is None else Balance(chosen.factors)


def _candidates(queries, keys):
    """Factors [exponents, B, H, 1, D] by each of EXPONENTS, from queries and centered keys [B, H, *, D]."""
    of_queries, of_keys = (_floored(mx.square(a).sum(2, keepdims=True)) for a in (queries, keys))
    s = (of_queries / of_keys) ** (constant(_column, tuple(e / 4 for e in EXPONENTS), 5))
    s = s * mx.sqrt(of_keys.sum(-1, keepdims=True) / (of_keys * mx.square(s)).sum(-1, keepdims=True))
    return mx.where((s > 0) & (s < math.inf), s, 1)


def _column(numbers, n_axes):
    """Numbers of the first of so many axes, float32."""
    return np.array(numbers, np.float32).reshape(-1, *[1] * (n_axes - 1))


def _floored(squares):
    """Squares of channels [B, H, 1, D], each at least FLOOR^2 of the mean of all."""
    return mx.maximum(squares, squares.sum(-1, keepdims=True) * (FLOOR**2 / squares.shape[-1]))
