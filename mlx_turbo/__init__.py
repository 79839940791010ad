"""TurboQuant KV-cache compression for MLX: fewer bytes per token, one line in an mlx-lm program.

    import mlx_turbo
    cache = mlx_turbo.make_prompt_cache(model, "turbo4")     # beside mlx_lm's function of that name
    mlx_turbo.enable(model, "turbo4")                        # for applications that make their own caches
"""
from .batch import BatchTurboKVCache
from .batch_rotating import BatchRotatingTurboKVCache
from .cache import TurboKVCache
from .files import load_prompt_cache, save_prompt_cache
from .kernels import BackendError
from .models import describe, disable, enable, make_prompt_cache
from .ops import dequantize, get_backend, quantize, use_backend
from .rotating import RotatingTurboKVCache
from .scheme import Scheme, TurboConfig
from .warming import warm

__version__ = "0.1.0"

__all__ = ["BackendError", "BatchRotatingTurboKVCache", "BatchTurboKVCache", "RotatingTurboKVCache", "Scheme",
           "TurboConfig", "TurboKVCache", "dequantize", "describe", "disable", "enable", "get_backend",
           "load_prompt_cache", "make_prompt_cache", "quantize", "save_prompt_cache", "use_backend",
           "warm"]
