"""The mathematics in NumPy: schemes, levels, rotations, and the oracle of every test."""
