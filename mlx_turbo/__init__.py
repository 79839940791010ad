"""TurboQuant KV-cache compression for MLX: fewer bytes per token, one line in an mlx-lm program.

import mlx_turbo
cache = mlx_turbo.make_prompt_cache(model, "turbo4")     # beside mlx_lm's function of that name
mlx_turbo.enable(model, "turbo4")                        # for applications that make their own caches
"""

from .backends.select import dequantize, get_backend, quantize, use_backend
from .backends.sides import BackendError
from .cache.batch import BatchTurboKVCache
from .cache.batch_rotating import BatchRotatingTurboKVCache
from .cache.rotating import RotatingTurboKVCache
from .cache.single import TurboKVCache
from .integration.bit_budget import choose_bits
from .integration.prompt_cache import describe, disable, enable, make_prompt_cache
from .integration.prompt_cache_file import load_prompt_cache, save_prompt_cache
from .integration.warming import warm
from .quant.scheme import Scheme, TurboConfig
from .store.prompt_store import PromptStore
from .version import __version__ as __version__

__all__ = [
    "BackendError",
    "BatchRotatingTurboKVCache",
    "BatchTurboKVCache",
    "PromptStore",
    "RotatingTurboKVCache",
    "Scheme",
    "TurboConfig",
    "TurboKVCache",
    "choose_bits",
    "dequantize",
    "describe",
    "disable",
    "enable",
    "get_backend",
    "load_prompt_cache",
    "make_prompt_cache",
    "quantize",
    "save_prompt_cache",
    "use_backend",
    "warm",
]
