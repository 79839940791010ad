"""The caches that ours are compared with: mlx-lm's plain cache, and its QuantizedKVCache as mlx8 and mlx4."""

from typing import Any

import mlx.core as mx

MLX_LM_BITS = {"mlx8": 8, "mlx4": 4}
NO_PRODUCT = "[quantized_matmul] No implementation"  # MLX on CUDA, of shapes that a QuantizedKVCache needs
MLX_LM_GROUP_SIZE = 64  # numbers that share a scale in mlx-lm's QuantizedKVCache, its default


def make_plain_cache(model: Any) -> list[Any]:
    """mlx-lm's own prompt cache for `model`, uncompressed."""
    from mlx_lm.models.cache import make_prompt_cache

    return make_prompt_cache(model)


def make_quantized_cache(model: Any, name: str) -> list[Any]:
    """A prompt cache of QuantizedKVCache for `model`. name: a key of MLX_LM_BITS."""
    from mlx_lm.models.cache import QuantizedKVCache

    return [QuantizedKVCache(MLX_LM_GROUP_SIZE, MLX_LM_BITS[name]) for _ in model.layers]


def why_not_quantized(model: Any) -> str | None:
    """Why mlx-lm's QuantizedKVCache cannot serve this model here, or None. Reads a few tokens."""
    from mlx_lm.models.cache import KVCache

    caches = make_plain_cache(model)
    if others := sorted({type(c).__name__ for c in caches} - {KVCache.__name__}):
        return f"mlx-lm quantizes only models whose caches are all plain KVCaches, and this one has {', '.join(others)}"
    mx.eval(model(mx.array([[0]]), cache=caches))
    dims = sorted({a.shape[-1] for c in caches for a in (c.keys, c.values)})
    if wrong := [d for d in dims if d % MLX_LM_GROUP_SIZE]:
        return f"mlx-lm quantizes in groups of {MLX_LM_GROUP_SIZE}, and head_dim {wrong[0]} is not a multiple of that"
    try:
        for name in MLX_LM_BITS:
            quantized = make_quantized_cache(model, name)
            for tokens in ([0, 0], [0]):  # a prompt, and a decode step
                mx.eval(model(mx.array([tokens]), cache=quantized))
    except RuntimeError as e:
        if NO_PRODUCT not in str(e):
            raise
        return f"MLX cannot compute with mlx-lm's QuantizedKVCache on this device: {e}"
    return None
