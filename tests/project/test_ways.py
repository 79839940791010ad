"""The ways of docs/architecture.md, from mlx-lm's call to a kernel: no file is entered twice on one of them."""

import re
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import base
from support.backends import BACKENDS
from support.caches import random_tokens

import mlx_turbo
from mlx_turbo import TurboConfig, TurboKVCache
from mlx_turbo.backends import kernel_backend, select

PACKAGE = Path(mlx_turbo.__file__).parent
PAGE = PACKAGE.parent / "docs/architecture.md"
SHAPE = dict(heads=2, key_dim=64, value_dim=64)
kernels = pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "oracle"], indirect=True)


def ways_of(call):
    """Call stacks of `call` as files of the package, those that follow each other in one file as one."""
    ways, prefix = set(), f"{PACKAGE}/"

    def profile(frame, event, arg):
        if event == "call" and frame.f_code.co_filename.startswith(prefix):
            files = []
            while frame:
                name = frame.f_code.co_filename
                if name.startswith(prefix) and files[-1:] != [name.removeprefix(prefix)]:
                    files.append(name.removeprefix(prefix))
                frame = frame.f_back
            ways.add(tuple(reversed(files)))

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return ways


def entered_twice(ways):
    return sorted(" -> ".join(way) for way in ways if len(set(way)) < len(way))


def all_ways():
    """{what: ways} of a cache of one sequence, after a first round that builds and checks kernels."""
    rng, out = np.random.default_rng(0), {}

    def tokens(n):
        return random_tokens(rng, n, bias=20, **SHAPE)

    def attend(n, fetched, cache):
        queries = mx.array(rng.standard_normal((1, 4, n, 64)), mx.float32)
        mx.eval(base.scaled_dot_product_attention(queries, *fetched, cache, 0.125, mask="causal" if n > 1 else None))

    for _ in range(2):
        cache = TurboKVCache(TurboConfig("turbo4", 4, 64, 64))
        out["a first chunk is packed"] = ways_of(lambda: cache.update_and_fetch(*tokens(300)))
        out["a token is appended"] = ways_of(lambda: cache.update_and_fetch(*tokens(1)))
        fetched = cache.update_and_fetch(*tokens(1))
        kernel_backend._attend_launches.cache_clear()  # as for the first layer of a step: the others share its plan
        out["a token attends"] = ways_of(lambda: attend(1, fetched, cache))
        out["a chunk is packed"] = ways_of(lambda: cache.update_and_fetch(*tokens(130)))
        fetched = cache.update_and_fetch(*tokens(130))
        out["a chunk attends"] = ways_of(lambda: attend(130, fetched, cache))
        out["tokens are restored"] = ways_of(lambda: mx.eval(cache.keys_and_values()))
        out["packed tokens get fewer bits"] = ways_of(lambda: cache.repack(3, 2))
        exact = TurboKVCache(TurboConfig("turbo0", 4, 64, 64))
        exact.update_and_fetch(*tokens(300))
        out["exact tokens are packed"] = ways_of(lambda: exact.repack(4, 4))
    return out


def documented():
    """The ways that the page shows, as names of files."""
    section = PAGE.read_text().split("\n## The ways")[1].split("\n## ")[0]
    return {tuple(re.findall(r"\w+\.py", line)) for line in section.splitlines() if re.match(r"\w+\.py -> ", line)}


@kernels
def test_no_file_is_entered_twice_on_one_way(backend, door):
    for what, ways in all_ways().items():
        assert entered_twice(ways) == [], what
        assert any(way[-1].startswith("backends/") for way in ways), what  # it got as far as a backend


def test_a_file_that_is_entered_twice_is_found():
    assert entered_twice({("a.py", "b.py"), ("a.py", "b.py", "a.py")}) == ["a.py -> b.py -> a.py"]
    assert ways_of(lambda: select.get_backend("cpu")) == {("backends/select.py",)}


def test_the_ways_of_the_page_are_ways_of_the_code(door):
    recorded = set()
    for name in set(BACKENDS) - {"oracle"}:
        with select.use_backend(BACKENDS[name]):
            recorded |= {tuple(Path(file).name for file in way) for ways in all_ways().values() for way in ways}
    assert len(documented()) >= 10 and sorted(documented() - recorded) == []


def test_the_page_names_every_module():
    page = PAGE.read_text()
    modules = {p.relative_to(PACKAGE) for p in PACKAGE.rglob("*.py") if not p.name.startswith("__")}
    assert [str(m) for m in sorted(modules) if m.name not in page] == []
