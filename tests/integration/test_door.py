"""Our attention beside other programs that wrap or replace mlx-lm's: no circle, nothing stale, in any order."""

import functools
import importlib
import types
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models import base, llama
from support.arrays import to_numpy
from support.strategies import quick

from mlx_turbo import TurboKVCache, use_backend
from mlx_turbo.cache import last_step
from mlx_turbo.integration import attention

NAME = "scaled_dot_product_attention"
RNG = np.random.default_rng(0)
Q = mx.array(RNG.standard_normal((1, 2, 1, 64)), mx.float32)
PLAIN = [mx.array(RNG.standard_normal((1, 2, 20, 64)), mx.float32) for _ in range(2)]


def packed():
    """(a cache, the arrays that its last update returned)"""
    cache = TurboKVCache("turbo8", sink=2, recent=4, block=4)
    cache.update_and_fetch(*(x[:, :, :19] for x in PLAIN))
    return cache, cache.update_and_fetch(*(x[:, :, 19:] for x in PLAIN))


SAVED = {}  # of a program that keeps what it found in a global


def with_global():
    found = SAVED["found"]
    SAVED.setdefault("under", found)

    def function(*args, **options):
        function.calls += 1
        return function.found(*args, **options)

    function.found = found
    return function


def with_closure():
    found = SAVED["found"]

    @functools.wraps(found)
    def function(*args, **options):
        function.calls += 1
        return found(*args, **options)

    return function


class Wrapper:
    def __init__(self):
        self.found = {"attention": [SAVED["found"]]}

    def __call__(self, *args, **options):
        self.calls += 1
        return self.found["attention"][0](*args, **options)


def with_partial():
    function = functools.partial(lambda found, *args, **options: (count(), found(*args, **options))[1], SAVED["found"])
    count = lambda: setattr(function, "calls", function.calls + 1)  # noqa: E731
    return function


def with_mock():
    function = mock.Mock(wraps=SAVED["found"])
    function.calls = 0
    return function


def replacement():
    """Attention of its own, which knows nothing of what was there."""

    def function(queries, keys, values, cache, scale, mask=None, sinks=None):
        function.calls += 1
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)

    return function


WRAPPERS = {
    "global": with_global,
    "closure": with_closure,
    "object": Wrapper,
    "partial": with_partial,
    "mock": with_mock,
}


class Programs:
    """mlx_turbo and other programs, each of which puts its function where it finds one, and may put back what it
    found."""

    def __init__(self, modules):
        attention.uninstall()
        self.modules = modules  # a library's models.base, and a model's module
        self.original = modules[0].scaled_dot_product_attention
        assert modules[1].scaled_dot_product_attention is self.original
        self.theirs = {module: self.original for module in modules}  # what is there without mlx_turbo
        self.others = []  # (module, what is put there, what was there, what would have been without mlx_turbo)
        self.installed = self.fresh = False
        with use_backend("cpu"):
            self.cache, self.lazy = packed()
            self.want = [self.exact(*pair) for pair in (PLAIN, [mx.array(x) for x in self.lazy])]

    @staticmethod
    def exact(keys, values):
        return to_numpy(mx.fast.scaled_dot_product_attention(Q, keys, values, scale=0.1))

    def install(self):
        attention.install()
        attention.install()
        self.installed = self.fresh = True

    def uninstall(self):
        attention.uninstall()
        self.installed = False
        assert all(getattr(module, NAME) is self.theirs[module] for module in self.modules)

    def put(self, which, make):
        module = self.modules[which]
        SAVED["found"] = getattr(module, NAME)
        function = make()
        function.calls = 0
        self.others.append((module, function, SAVED["found"], self.theirs[module]))
        self.theirs[module] = function
        setattr(module, NAME, function)
        self.fresh = False

    def wrap(self, which, kind):
        self.put(which, WRAPPERS[kind])

    def replace(self, which):
        self.put(which, replacement)

    def put_back(self, i):
        """What a program found when it came, whatever came later."""
        if self.others:
            module, _, found, self.theirs[module] = self.others.pop(i % len(self.others))
            setattr(module, NAME, found)
            self.fresh = False

    def put_again(self, i):
        if self.others:
            module, function, *_ = self.others[i % len(self.others)]
            self.theirs[module] = function
            setattr(module, NAME, function)
            self.fresh = False

    def attention_is_right(self):
        for module in self.modules:
            for (keys, values), want in zip((PLAIN, self.lazy), self.want):
                got = to_numpy(getattr(module, NAME)(Q, keys, values, cache=self.cache, scale=0.1, mask=None))
                assert np.allclose(got, want, rtol=0, atol=1e-5)

    def a_program_that_came_last_sees_every_call(self):
        for module in self.modules:
            function = getattr(module, NAME)
            if any(function is put for _, put, *_ in self.others):
                before = function.calls if not isinstance(function, mock.Mock) else function.call_count
                function(Q, *self.lazy, cache=self.cache, scale=0.1, mask=None)
                after = function.calls if not isinstance(function, mock.Mock) else function.call_count
                assert after == before + 1

    def after_installing_packed_rows_are_attended(self):
        if self.installed and self.fresh:
            with mock.patch.object(attention, "attend", side_effect=attention.attend) as used:
                self.modules[0].scaled_dot_product_attention(Q, *self.lazy, cache=self.cache, scale=0.1, mask=None)
            assert used.call_count == 1

    def an_uninstalled_door_does_nothing(self):
        if not self.installed:
            with mock.patch.object(attention, "attend", side_effect=AssertionError):
                for module in self.modules:
                    getattr(module, NAME)(Q, *self.lazy, cache=self.cache, scale=0.1, mask=None)

    def teardown(self):
        for module in self.modules:
            setattr(module, NAME, self.original)
        attention.uninstall()


MODULE, WHICH = st.integers(0, 1), st.integers(0, 9)
STEPS = st.one_of(
    st.just(("install",)),
    st.just(("uninstall",)),
    st.tuples(st.just("wrap"), MODULE, st.sampled_from(sorted(WRAPPERS))),
    st.tuples(st.just("replace"), MODULE),
    st.tuples(st.just("put_back"), WHICH),
    st.tuples(st.just("put_again"), WHICH),
)


@pytest.fixture(params=["mlx_lm", "mlx_vlm"])
def modules(request):
    if request.param == "mlx_lm":
        return base, llama
    request.getfixturevalue("vlm")
    return importlib.import_module("mlx_vlm.models.base"), importlib.import_module("mlx_vlm.models.qwen3_vl.language")


@settings(quick, max_examples=100)
@given(steps=st.lists(STEPS, min_size=6, max_size=16))
def test_programs_in_any_order(modules, steps):
    with use_backend("cpu"):
        programs = Programs(modules)
        try:
            for name, *args in steps:
                getattr(programs, name)(*args)
                programs.attention_is_right()
                programs.a_program_that_came_last_sees_every_call()
                programs.after_installing_packed_rows_are_attended()
                programs.an_uninstalled_door_does_nothing()
        finally:
            programs.teardown()


@pytest.fixture
def clean():
    attention.uninstall()
    before = {module: getattr(module, NAME) for module in attention._model_modules()}
    yield
    for module, function in before.items():
        setattr(module, NAME, function)
    attention.uninstall()


def test_two_programs_that_each_wrap_what_they_find_again_and_again_do_not_call_in_a_circle(clean, modules):
    """The other one keeps what it found where we cannot see it, in a file say."""
    store, base = types.ModuleType("hidden_store"), modules[0]

    def function(*args, **options):
        return importlib.import_module("hidden_store").found(*args, **options)

    def other():
        if base.scaled_dot_product_attention is not function:
            store.found, base.scaled_dot_product_attention = base.scaled_dot_product_attention, function

    with mock.patch.dict("sys.modules", hidden_store=store), use_backend("cpu"):
        cache, lazy = packed()
        for _ in range(4):
            attention.install()
            other()
            for keys, values in (PLAIN, lazy):
                got = base.scaled_dot_product_attention(Q, keys, values, cache=cache, scale=0.1, mask=None)
                want = mx.fast.scaled_dot_product_attention(Q, mx.array(keys), mx.array(values), scale=0.1)
                assert np.allclose(to_numpy(got), to_numpy(want), rtol=0, atol=1e-5)


def test_mlx_lm_s_own_function_is_below_ours_again_after_another_one_was(clean):
    original = base.scaled_dot_product_attention
    for _ in range(2):
        base.scaled_dot_product_attention = other = replacement()
        attention.install()  # over the other one, and over mlx-lm's in the model's module
        attention.uninstall()
        assert base.scaled_dot_product_attention is other
        base.scaled_dot_product_attention = original
        attention.install()
        assert base.scaled_dot_product_attention is attention.scaled_dot_product_attention
        assert attention._original is original
        attention.uninstall()
        assert base.scaled_dot_product_attention is original


def test_installing_again_and_again_over_other_functions_adds_nothing(clean):
    attention.install()
    n = len(attention._doors)
    with use_backend("cpu"):
        for _ in range(5):
            attention.install()
            SAVED["found"] = base.scaled_dot_product_attention
            wrapped = with_closure()
            wrapped.calls = 0
            base.scaled_dot_product_attention = wrapped
            attention.install()
            assert base.scaled_dot_product_attention is wrapped
    assert len(attention._doors) == n
    attention.uninstall()
    assert base.scaled_dot_product_attention is wrapped


def test_a_models_own_function_of_that_name_is_left_alone(clean, monkeypatch):
    module = types.ModuleType("mlx_lm.models.own")
    module.scaled_dot_product_attention = own = lambda q, k, v: None
    monkeypatch.setitem(importlib.sys.modules, module.__name__, module)
    attention.install()
    assert module.scaled_dot_product_attention is own


def test_only_an_open_door_notes_what_a_model_did_with_a_cache(clean):
    attention.install()
    door, cache, x = base.scaled_dot_product_attention, TurboKVCache(recent=64, block=64), mx.ones((1, 2, 300, 64))
    with use_backend("cpu"):
        cache.update_and_fetch(x, x)
        cache.update_and_fetch(x[:, :, :1], x[:, :, :1])
        keys, values = cache.update_and_fetch(x[:, :, :1], x[:, :, :1])
        notes = []
        for close in (attention.uninstall, attention.install):
            close()
            door(x[:, :, :1], keys[:], values[:], cache, 0.125)
            notes.append(cache.last_attention)
    assert notes == [last_step.ELSEWHERE, last_step.BY_THE_MODEL]
