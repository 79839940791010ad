"""`auto`: how many bits the keys of a layer need, measured on the first prompt chunk with its own queries.

Bits are raised along LADDER until the error of the attention weights (attention_error.py) of the worst kv head is at
most TARGET. The keys are balanced as they will be (balancing.py).

TARGET is calibrated on trained models (docs/quality.md): the layers of SmolLM2 and Qwen2.5-Coder have 0.003 to 0.06
at 4 bits, and with this target they take a mean of 4.4 to 4.6 bits per number at 32K tokens. A bit more divides the
error by 3 to 4. Values keep the bits of the configuration: packed keys cost these models 3 to 5 times as much as packed
values, and the error of the attention's output tells nothing about which layer's values matter.
"""

from typing import Optional

import mlx.core as mx

from ..backends.sides import Balance
from ..quant.scheme import TurboConfig
from .attention_error import Attention, Observed, key_error

LADDER = (4, 5, 6, 8, 0)  # bits of keys; the last resort is 0 = exact
TARGET = 0.009  # nats; random keys and queries of norm sqrt(D) have 0.008 at 4 bits
FEWEST = 256  # tokens needed to decide: on fewer, biases that turn with the position hardly show


def choose_key_bits(
    keys: mx.array, config: TurboConfig, observed: Optional[Observed] = None, balance: Optional[Balance] = None
) -> tuple[int, dict[int, float], str]:
    """(bits, {bits tried: error in nats}, what the choice is based on) for the keys [B, n_kv_heads, N, D] of a layer.
    Waits for each error, which happens once in the life of a cache.

    observed: for `Attention`, or None: then `key_error` decides. balance: of the keys' channels.
    """
    errors: dict[int, float] = {}
    by = f"{len(observed.positions)} queries" if observed else "the keys alone"
    attention = Attention(observed, keys, config) if observed else None
    for bits in LADDER[:-1]:
        if bits < config.scheme.key_bits:
            continue
        error = attention.error(bits, balance) if attention else key_error(keys, bits, config)
        errors[bits] = error.max().item()  # type: ignore[assignment]  # a float32 scalar
        if errors[bits] <= TARGET:
            return bits, errors, by
    return LADDER[-1], errors, by
