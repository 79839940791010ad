"""The mathematics in NumPy: schemes, levels, rotations, and the reference that every backend is tested against."""
