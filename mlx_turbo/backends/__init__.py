"""Quantize, restore and attend: Metal kernels and MLX operations, and the choice between them."""
