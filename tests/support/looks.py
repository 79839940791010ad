"""Looking at a cache for the first time after an update, which does what the update put off. Each look returns the
cache to go on with: the same one, or one that was made of it."""

import functools
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
from support.caches import WAYS, copied

from mlx_turbo import TurboKVCache


def _at(look):
    return lambda cache: (look(cache), cache)[1]


def _in_another_thread(cache):
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: mx.eval(cache.state)).result()


def _joined_with_nothing(cache):
    n = cache.n_rows
    cache.extend(type(cache)(cache.config, [0]))
    cache.filter(range(n))


_FIRST_LOOKS = {
    "nbytes": _at(lambda cache: cache.nbytes),
    "another thread": _at(_in_another_thread),
    "trim": _at(lambda cache: cache.trim(0)),
    "keys": _at(lambda cache: mx.eval(cache.keys)),
    "tokens": _at(lambda cache: mx.eval(cache.keys_and_values())),
    "not finite": _at(lambda cache: cache.not_finite()),
    "nothing": lambda cache: cache,
    **{way: functools.partial(copied, way=way) for way in WAYS},
}
FIRST_LOOKS_AT_ONE = _FIRST_LOOKS | {"merge": lambda cache: cache.merge([cache, cache]).extract(1)}
FIRST_LOOKS_AT_TWO = _FIRST_LOOKS | {
    "extract": lambda cache: TurboKVCache.merge([cache.extract(0), cache.extract(1)]),
    "filter": _at(lambda cache: cache.filter([0, 1])),
    "extend": _at(_joined_with_nothing),
}
