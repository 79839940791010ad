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
from typing import Optional

import mlx.core as mx

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


def choose(keys: Tokens, config: TurboConfig, bits: int, observed: Optional[Observed]) -> Optional[mx.array]:
    """Factors for keys [B, n_kv_heads, N, D] of tokens 0 .. N - 1 that are to be packed at `bits`, lazily: float32
    [B, n_kv_heads, 1, D]. Of equal energy: packed keys are as large as without. None where nothing can be chosen."""
    if not config.balance or not bits or observed is None or keys.shape[2] < FEWEST:
        return None
    observed = observed._replace(queries=mx.contiguous(observed.queries))
    attention = Attention(observed, keys, config)
    exponents, margins = (mx.array(x)[:, None, None, None, None] for x in (EXPONENTS, MARGINS))
    of_queries, of_keys = _rms(attention)
    candidates = _normalized(of_queries, of_keys, exponents)
    together = Balance(mx.flatten(candidates, 0, 1))  # measured at once: these are many small operations
    errors = attention.error(min(bits, MOST_BITS), together).reshape(candidates.shape[:3])
    best = mx.argmin(errors[..., None, None] * margins, axis=0, keepdims=True)
    return mx.take_along_axis(candidates, best, axis=0)[0]


def _rms(attention):
    """Root mean squares [B, H, 1, D] of the channels of queries and of centered keys, each times a number."""
    x, centers = attention.sample.keys, attention.sample.centers
    if centers is not None:
        means = mx.where(centers[1], centers[0], 0)
        x = mx.flatten(mx.unflatten(x, 2, (means.shape[2], -1)) - means[..., None, :], 2, 3)
    return [_floored(mx.square(a).sum(2, keepdims=True)) for a in (attention.queries, x)]


def _floored(squares):
    return mx.sqrt(mx.maximum(squares, FLOOR**2 * squares.mean(-1, keepdims=True)))


def _normalized(of_queries, of_keys, exponent):
    s = (of_queries / of_keys) ** (exponent / 2)
    k = mx.square(of_keys)
    s = s * mx.sqrt(k.sum(-1, keepdims=True) / (k * mx.square(s)).sum(-1, keepdims=True))
    return mx.where((s > 0) & (s < math.inf), s, 1)
