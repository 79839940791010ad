"""`auto`: how many bits the keys of a layer need, measured on the first prompt chunk with its own queries.

Bits are raised along LADDER until the error of the attention weights (attention_error.py) of the worst kv head is at
most TARGET. The keys are balanced as they will be (balancing.py). Two widths are measured, and what is between them is
taken to follow the mean squared error of rounding (quant/budget.py), down from 8 bits, where the error is small.

TARGET is calibrated on trained models (docs/quality.md): the layers of SmolLM2 and Qwen2.5-Coder have 0.003 to 0.06
at 4 bits, and with this target they take a mean of 4.4 to 4.6 bits per number at 32K tokens. A bit more divides the
error by 3 to 4. Values keep the bits of the configuration: packed keys cost these models 3 to 5 times as much as packed
values, and the error of the attention's output tells nothing about which layer's values matter.
"""

import math
from typing import Any, NamedTuple, Optional

import mlx.core as mx

from ..quant.budget import WIDTHS, expected_errors
from ..quant.scheme import TurboConfig
from .attention_error import Attention, Observed, key_errors
from .balancing import Chosen

LADDER = (4, 5, 6, 8, 0)  # bits of keys; the last resort is 0 = exact
MEASURED = 4, 8
TARGET = 0.009  # nats; random keys and queries of norm sqrt(D) have 0.008 at 4 bits
FEWEST = 256  # tokens needed to decide: on fewer, biases that turn with the position hardly show
MOST_HELD = 4096  # exact tokens that wait for the choice until somebody asks; with more they are packed at once


class Measured(NamedTuple):
    """The errors of a layer's keys. bits: those of LADDER that may be chosen. errors: nats at each width of MEASURED,
    float32, not computed yet. by: what they are based on."""

    bits: list[int]
    errors: mx.array
    by: str


def measure(
    keys: mx.array, config: TurboConfig, observed: Optional[Observed] = None, chosen: Optional[Chosen] = None
) -> Measured:
    """What choosing the bits of the keys [B, n_kv_heads, N, D] of a layer needs, lazily: both errors, though the first
    may do, so that nothing waits for one before the other is begun.

    observed: for `Attention`, or None: then `key_errors` decide. chosen: how the keys are balanced, at MEASURED[0].
    """
    if chosen is not None:
        errors = mx.concatenate([chosen.error[None], chosen.attention.errors(MEASURED[1:], chosen.factors[None])])
    elif observed is not None:
        errors = Attention(observed, keys, config).errors(MEASURED)
    else:
        errors = key_errors(keys, MEASURED, config)
    by = "the keys alone" if observed is None else f"{len(observed.positions)} queries"
    return Measured([bits for bits in LADDER[:-1] if bits >= config.scheme.key_bits], errors.max((1, 2)), by)


def choose_key_bits(measured: Measured) -> tuple[int, dict[int, float], str]:
    """(bits, {bits tried: error in nats}, what the choice is based on). Waits for the errors."""
    values: Any = measured.errors.tolist()
    errors = {bits: error if math.isfinite(error) else math.inf for bits, error in zip(MEASURED, values)}
    expected, tried = dict(zip(WIDTHS, expected_errors(errors))), {}
    for bits in measured.bits:
        tried[bits] = expected[bits]
        if tried[bits] <= TARGET:
            return bits, tried, measured.by
    return LADDER[-1], tried, measured.by
