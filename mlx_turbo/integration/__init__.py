"""How the caches meet mlx-lm."""
