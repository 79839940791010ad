"""How far a result may be from the oracle's."""

import mlx.core as mx

TOLERANCE = {mx.float32: 5e-5, mx.float16: 2e-3, mx.bfloat16: 1.6e-2}  # of the output type, relative to the largest
