"""Ceilings that a change must not break: operations counted in the simulator, and registers that NVIDIA's compiler
allots."""

# Operations per value of quantize and dequantize, all classes together, counted on 64 vectors. D = 128 needs 7
# butterfly stages, 96 and 80 two rounds of 6 and idle lanes.

QUANTIZE_CEILING = {
    (128, 2): 26.9,
    (128, 3): 31.8,
    (128, 4): 37.4,
    (128, 8): 29.4,
    (64, 4): 36.2,
    (256, 4): 38.7,
    (96, 4): 46.8,
    (80, 4): 50.5,
    (576, 4): 59.6,
}

DEQUANTIZE_CEILING = {
    (128, 2): 17.6,
    (128, 3): 18.3,
    (128, 4): 17.9,
    (128, 8): 17.3,
    (64, 4): 16.7,
    (256, 4): 19,
    (96, 4): 27,
    (80, 4): 30.5,
    (576, 4): 39.8,
}

# Registers of a thread with NVRTC 13.0, at most, for sm_80 and sm_90a, by the variant of a kernel (collector.Kernel)
# and, of attention, by its rows: those of the least number that is not smaller. A thread has 255.
# python scripts/cuda_registers.py --ceilings prints the table.
REGISTERS = {
    "attend": {1: 144, 2: 168, 3: 184, 4: 216, 5: 168, 7: 232, 8: 255},
    "attend, one launch": {1: 152, 2: 144, 3: 184, 4: 208, 5: 168, 7: 200, 8: 255},
    "attend, tiles": {4: 184, 6: 144, 7: 184, 8: 255, 12: 208},
    "merge": 72,
    "quantize": 72,
    "dequantize": 64,
}


def registers_allowed(kernel):
    """Of a collector.Kernel."""
    allowed = REGISTERS[kernel.variant]
    return (
        allowed
        if isinstance(allowed, int)
        else next(n for rows, n in allowed.items() if rows >= kernel.template["ROWS"])
    )


def spills_allowed(kernel):
    """Bytes stored and loaded. Decoded tiles of 256 dims for 8 rows are a little more than registers hold."""
    t = kernel.template
    return 24 if t.get("SHARED_TILES") and (t["ROWS"], t["KEY_DIM"]) == (8, 256) else 0
