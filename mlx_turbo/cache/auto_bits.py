"""`auto`: how many bits the keys of a layer need, measured on the first prompt chunk with its own queries.

Bits are raised along LADDER until the error of the attention weights (attention_error.py) of the worst kv head is at
most TARGET. The keys are balanced as they will be (balancing.py).

TARGET is calibrated on trained models (docs/quality.md): the layers of SmolLM2 and Qwen2.5-Coder have 0.003 to 0.06
at 4 bits, and with this target they take a mean of 4.4 to 4.6 bits per number at 32K tokens. A bit more divides the
error by 3 to 4. Values keep the bits of the configuration: packed keys cost these models 3 to 5 times as much as packed
values, and the error of the attention's output tells nothing about which layer's values matter.
"""

from typing import Any, NamedTuple, Optional

import mlx.core as mx

from ..backends.sides import Balance
from ..quant.scheme import TurboConfig
from .attention_error import Attention, Observed, key_errors

LADDER = (4, 5, 6, 8, 0)  # bits of keys; the last resort is 0 = exact
TARGET = 0.009  # nats; random keys and queries of norm sqrt(D) have 0.008 at 4 bits
FEWEST = 256  # tokens needed to decide: on fewer, biases that turn with the position hardly show
MOST_HELD = 4096  # exact tokens that wait for the choice until somebody asks; with more they are packed at once


class Measured(NamedTuple):
    """The errors of a layer's keys. bits: those of LADDER that may be chosen. errors: nats, float32 [len(bits)], not
    computed yet. by: what they are based on."""

    bits: list[int]
    errors: mx.array
    by: str


def measure(
    keys: mx.array, config: TurboConfig, observed: Optional[Observed] = None, balance: Optional[Balance] = None
) -> Measured:
    """What choosing the bits of the keys [B, n_kv_heads, N, D] of a layer needs, lazily: the errors of all bits, though
    the first may do, so that nothing waits for one before the next is begun.

    observed: for `Attention`, or None: then `key_errors` decide. balance: of the keys' channels.
    """
    ladder = [bits for bits in LADDER[:-1] if bits >= config.scheme.key_bits]
    errors = Attention(observed, keys, config).errors(ladder, balance) if observed else key_errors(keys, ladder, config)
    by = f"{len(observed.positions)} queries" if observed else "the keys alone"
    return Measured(ladder, errors.max((1, 2)), by)


def choose_key_bits(measured: Measured) -> tuple[int, dict[int, float], str]:
    """(bits, {bits tried: error in nats}, what the choice is based on). Waits for the errors."""
    errors: Any = measured.errors.tolist()
    n = next((i for i, error in enumerate(errors) if error <= TARGET), len(errors))
    tried = dict(zip(measured.bits[: n + 1], errors))
    return (measured.bits[n] if n < len(errors) else LADDER[-1]), tried, measured.by
