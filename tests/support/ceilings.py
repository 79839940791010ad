"""Ceilings that a change must not break: operations counted in the simulator, and registers that NVIDIA's compiler
allots."""

from mlx_turbo.backends.attend_launch import FEW_SUMS

# Operations per value of quantize and dequantize, all classes together, counted on 64 vectors. D = 128 needs 7
# butterfly stages, 96 and 80 two rounds of 6 and idle lanes.

QUANTIZE_CEILING = {
    (128, 2): 26.9,
    (128, 3): 31.8,
    (128, 4): 37.4,
    (128, 5): 40.4,
    (128, 6): 44.4,
    (128, 8): 48.5,
    (64, 4): 36.2,
    (256, 4): 38.7,
    (96, 4): 46.9,
    (80, 4): 50.8,
    (576, 4): 59.6,
}

DEQUANTIZE_CEILING = {
    (128, 2): 17.6,
    (128, 3): 18.3,
    (128, 4): 17.9,
    (128, 5): 20.2,
    (128, 6): 20.8,
    (128, 8): 20.3,
    (64, 4): 16.7,
    (256, 4): 19,
    (96, 4): 27,
    (80, 4): 30.5,
    (576, 4): 39.8,
}

# The same of statistics, on 512 vectors, by head_dim: of each value a sum and a square; positions, and who is there.
STATISTICS_CEILING = {128: 10.1, 64: 10.5, 80: 15.3, 256: 7.7, 576: 7.0}

# The same of requantize, by (head_dim, bits, fewer bits).
REQUANTIZE_CEILING = {
    (128, 8, 6): 39.5,
    (128, 6, 4): 32.9,
    (128, 4, 3): 24.3,
    (128, 3, 2): 19.5,
    (128, 8, 5): 35.6,
    (128, 5, 3): 26.7,
    (64, 6, 4): 32.8,
    (256, 6, 4): 33,
    (80, 6, 4): 35.6,
    (576, 6, 4): 33.8,
}

# Operations of MLX that the first chunk takes in a layer with kernels, by configuration; each output of a kernel counts
# as one. With `auto`, up to the choice.
FIRST_CHUNK_CEILING = {"turbo4, not balanced": 85, "turbo4": 179, "auto": 155}

# Registers of a thread with NVRTC 13.0, at most, for sm_80 and sm_90a, by the variant of a kernel (collector.Kernel).
# python scripts/cuda_registers.py --ceilings prints the table.
REGISTERS = {
    "attend": 255,
    "attend, one launch": 255,
    "attend, tiles": 255,
    "merge": 120,
    "quantize": 72,
    "dequantize": 64,
    "statistics": 96,
    "requantize": 64,
}


def registers_allowed(kernel):
    """Of a collector.Kernel."""
    t = kernel.template
    if kernel.variant in ("quantize", "requantize") and max(t.get("D", 0), t.get("D0", 0), t.get("D1", 0)) > 512:
        return 120  # a lane has 32 dims: measured 116, without spills
    return 128 if few_sums(kernel) else REGISTERS[kernel.variant]


def few_sums(kernel):
    """Whether the launch bounds of cuda.py leave attention 128 registers."""
    t = kernel.template
    return "ROWS" in t and t["ROWS"] * t["DIMS_PER_LANE"] <= FEW_SUMS and not t["SHARED_TILES"]


def spills_allowed(kernel):
    """Bytes stored and loaded. With 128 registers a few numbers wait in memory while the loops over tokens run: so a
    step takes less time on an H100 than with 168 registers and fewer warps. Where more than 8 simdgroups share tiles,
    168 registers are all there are for each; where fewer do, a little more than 255 are needed."""
    t = kernel.template
    if few_sums(kernel):
        return 200
    if t.get("SHARED_TILES"):
        return 448 if t["SIMDGROUPS"] > 8 else 160
    return 8 if "ROWS" in t else 0
