"""How far a result may be from the oracle's, relative to the largest number of the result.

The package's own checks, which run on a user's machine too, have their table in mlx_turbo/backends/self_test.py; tests
of kernels use that one.
"""

import mlx.core as mx

# Attention by MLX operations, of an output type: float32 sums of a few hundred products, then one rounding.
TOLERANCE = {mx.float32: 5e-5, mx.float16: 2e-3, mx.bfloat16: 1.6e-2}
# MLX's own Metal kernels in the simulator, by the type of their inputs: they sum in float32, in another order.
MLX_KERNELS = {"float": 1e-5, "float16_t": 2e-3, "bfloat16_t": 1.6e-2}
# Logits of mlx-lm's own test models, of random weights, with turbo8 and with mlx-lm's caches, relative to their range,
# with the same experts chosen: 0.031 in phimoe, where it is most. Where all stays exact: float32 in another order.
LOGITS_TURBO8 = 0.05
ROUNDING_OF_LOGITS = 1e-4
