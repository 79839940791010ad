"""Is a backend right? Comparison with the NumPy reference, for first use, `doctor`, `bench` and the tests."""

import mlx.core as mx
import numpy as np

from ..quant import codebook, reference

# Largest error of a restored vector, relative to its largest number: rounding of the output type, and of about ten
# float32 operations.
TOLERANCE = {mx.float32: 5e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}
# Largest error of attention, relative to the largest output, by bits of the keys: float32 sums of up to D products;
# with 8 bits a constant of 1152 times the sum of the query is taken off the dot product.
ATTEND_TOLERANCE = {0: 4e-6, 2: 4e-6, 3: 4e-6, 4: 4e-6, 8: 4e-5}


def compare_vectors(got, want, dtype):
    """What is wrong with restored vectors `got` [..., D] against the oracle's, or None."""
    error = np.abs(got - want).max(-1) / np.maximum(np.abs(want).max(-1), 1e-30)
    if not (error <= TOLERANCE[dtype]).all():  # also for NaN
        return f"relative error {error.max():.1e}, allowed is {TOLERANCE[dtype]:.0e}"
    return None


def compare_quantized(words, scale, want, tie=2e-5):
    """What is wrong with packed rows `words` and `scale` [..., 1] against a reference `Quantized`, or None.

    Codes must be equal, except by one where the oracle is within `tie` (relative) of the midpoint of two levels;
    padding bits must be 0. Scales must be within one float16 rounding; two where codes differ, and what the other
    codes move <y, c> by, which the scale may be divided by.
    """
    codes = reference.unpack(words, want.bits, want.codes.shape[-1]).astype(int)
    if not np.array_equal(reference.pack(codes, want.bits), words):
        return "bits that belong to no dim are set"
    off = (codes != want.codes) & (want.scale[..., None] != 0)
    moved = 0.0
    if off.any():
        # the vector as the oracle saw it, in units of its levels
        u = want.normalized
        middle = codebook.thresholds(want.levels)[np.minimum(codes, want.codes)[off]]
        wrong = (np.abs(codes - want.codes)[off] > 1) | (np.abs(u[off] - middle) > tie * np.maximum(np.abs(middle), 1))
        if wrong.any():
            return f"{int(wrong.sum())} of {codes.size} codes differ away from ties"
        had, has = ((u * want.levels[c]).sum(-1) for c in (want.codes, codes))
        moved = np.abs(np.divide(had, has, out=np.ones_like(has), where=has > 0) - 1) * want.scale
    step = np.spacing(np.maximum(np.abs(want.scale), 6e-5).astype(np.float16)).astype(np.float64)
    error = (np.abs(scale[..., 0].astype(np.float64) - want.scale) - moved) / step
    if not (error <= 1 + off.any(-1)).all():
        return f"scale off by {error.max():.1f} float16 roundings"
    return None
