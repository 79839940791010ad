"""How the caches meet mlx-lm: prompt caches, attention, files, warm-up. mlx_lm is imported late."""
