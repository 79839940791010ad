"""`auto`: how many bits the keys of a layer need, measured on the first prompt chunk with its own queries.

Bits are raised along LADDER until the error of the attention weights (attention_error.py) of the worst kv head is at
most TARGET. The keys are balanced as they will be (balancing.py).

TARGET is calibrated on the embedded model and on copies of it with hostile keys (tests/constructed_models.py): a layer
at 0.02 costs the model's output a KL divergence of 0.003; healthy layers have 0.0001 to 0.008.
"""

from typing import Optional

import mlx.core as mx

from ..backends.sides import Balance
from ..quant.scheme import TurboConfig
from .attention_error import Observed, attention_error, key_error

LADDER = (4, 8, 0)  # bits of keys; the last resort is 0 = exact
TARGET = 0.02  # nats
FEWEST = 256  # tokens needed to decide: on fewer, biases that turn with the position hardly show


def choose_key_bits(
    keys: mx.array, config: TurboConfig, observed: Optional[Observed] = None, balance: Optional[Balance] = None
) -> tuple[int, dict[int, float], str]:
    """(bits, {bits tried: error in nats}, what the choice is based on) for the keys [B, n_kv_heads, N, D] of a layer.
    Waits for each error, which happens once in the life of a cache.

    observed: for `attention_error`, or None: then `key_error` decides. balance: of the keys' channels.
    """
    errors: dict[int, float] = {}
    by = f"{len(observed.positions)} queries" if observed else "the keys alone"
    for bits in LADDER[:-1]:
        if bits < config.scheme.key_bits:
            continue
        if observed is None:
            error = key_error(keys, bits, config)
        else:
            error = attention_error(observed, keys, bits, config, balance)
        errors[bits] = error.max().item()  # type: ignore[assignment]  # a float32 scalar
        if errors[bits] <= TARGET:
            return bits, errors, by
    return LADDER[-1], errors, by
