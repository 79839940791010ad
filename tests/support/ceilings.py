"""Operations per value of quantize and dequantize, all classes together, counted on 64 vectors: ceilings that a change
must not break. D = 128 needs 7 butterfly stages, 96 and 80 two rounds of 6 and idle lanes."""

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
