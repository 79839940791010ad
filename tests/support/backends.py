"""The backends that the tests run: the oracle in the shape of one, the MLX operations, the kernels simulated and real.

With MLX_TURBO_REQUIRE_METAL=1 or MLX_TURBO_REQUIRE_CUDA=1 a missing GPU is an error."""

import os
import sys

import metalsim
import mlx.core as mx
import numpy as np
import pytest
from support.arrays import to_numpy

from mlx_turbo.backends import select
from mlx_turbo.backends.cuda import CudaBackend
from mlx_turbo.backends.metal import MetalBackend
from mlx_turbo.backends.mlx_ops import CpuBackend
from mlx_turbo.backends.self_test import factors_of, means_of, restored_tokens, rope_logits
from mlx_turbo.quant import reference
from mlx_turbo.quant.scheme import SCALES


class OracleBackend:
    """The NumPy reference in the shape of a backend."""

    name, tiles_ahead = "oracle", 1

    def describe(self):
        return "oracle (NumPy, float64)"

    def quantize(self, sides, seed=0, scale=SCALES[0]):
        outs = []
        for side in sides:
            mean = means_of(side)
            x = to_numpy(side.x).astype(np.float64)
            finite = np.isfinite(x).all(-1, keepdims=True)
            with np.errstate(over="ignore"):
                q = reference.quantize(
                    np.where(finite, x, 0),
                    side.bits,
                    rotation=seed,
                    mean=mean,
                    balance=factors_of(side),
                    scale=scale,
                    scale_dtype=np.float64,
                )
                scales = np.where(finite, q.scale[..., None], np.nan).astype(np.float16)
            scales = np.where(np.isfinite(scales), scales, np.float16(np.nan))
            outs.append((mx.array(q.packed()), mx.array(scales)))
        return outs

    def statistics(self, x, first, segment):
        return tuple(mx.array(a.astype(np.float32)) for a in reference.statistics(to_numpy(x), first, segment))

    def requantize(self, side, bits, scale=SCALES[0]):
        rows = reference.from_packed(np.array(side.codes), np.array(side.scale), side.bits, side.head_dim)
        new = reference.requantize(rows, bits, scale=scale)
        return mx.array(new.packed()), mx.array(new.scale[..., None].astype(np.float16))

    def dequantize(self, sides, first, length, dtype, seed=0):
        outs = []
        for side in sides:
            codes, scale = (np.array(a[:, :, first : first + length]) for a in (side.codes, side.scale))
            mean = None if side.mean is None else np.array(side.mean)
            balance = factors_of(side)
            q = reference.from_packed(codes, scale, side.bits, side.head_dim, rotation=seed, mean=mean, balance=balance)
            with np.errstate(invalid="ignore"):  # of vectors that are not finite
                outs.append(mx.array(reference.dequantize(q).astype(np.float32)).astype(dtype))
        return outs

    def restore(self, keys, values, counts, seed=0, first=0):
        """No launch does both sides at once."""

    def why_not_fused(self, keys, values, n_query_tokens):
        return None

    def attend(self, queries, keys, values, counts, *, scale, mask=None, sinks=None, seed=0, rope=None):
        if mask is not None and not isinstance(mask, str):
            mask = np.array(mask) if mask.dtype == mx.bool_ else to_numpy(mask)
        with np.errstate(invalid="ignore"):
            if rope is not None:
                assert mask is None or mask.dtype == bool
                added = rope_logits(rope, counts, seed)
                mask = added if mask is None else np.where(mask, added, -np.inf)
            restored = [restored_tokens(side, counts, seed) for side in (keys, values)]
            out = reference.attention(
                to_numpy(queries), *restored, scale=scale, mask=mask, sinks=None if sinks is None else to_numpy(sinks)
            )
        return mx.array(out.astype(np.float32)).astype(queries.dtype)


def new_kernels():
    """A backend of kernels: on CUDA where MLX has it, else in the simulator."""
    return CudaBackend() if not select.unavailable("cuda") else MetalBackend(metalsim.metal_kernel)


SIMULATED = MetalBackend(metalsim.metal_kernel)

SIMULATED.describe = lambda: "simulated metal (metalsim)"

BACKENDS = {"oracle": OracleBackend(), "cpu": CpuBackend()}

# The simulator's code generation is for Linux. A machine with a GPU runs the kernels themselves.
if sys.platform != "darwin" and select.unavailable("cuda"):
    BACKENDS["simulated"] = SIMULATED

for name, backend in (("metal", MetalBackend), ("cuda", CudaBackend)):
    if not (why := select.unavailable(name)):
        BACKENDS[name] = backend()
    elif os.environ.get(f"MLX_TURBO_REQUIRE_{name.upper()}") == "1":
        raise pytest.UsageError(f"MLX_TURBO_REQUIRE_{name.upper()}=1, but {why}")
