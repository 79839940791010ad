"""Which backend runs: chosen in one place, never changed in silence."""

import mlx.core as mx
import numpy as np
import pytest
from support.backends import BACKENDS

from mlx_turbo.backends import select, self_test, sides
from mlx_turbo.backends.metal import MetalBackend
from mlx_turbo.backends.sides import BackendError
from mlx_turbo.cache.single import TurboKVCache

X = mx.array(np.random.default_rng(0).standard_normal((1, 1, 4, 64)).astype(np.float32))


def failing_build(*args, **kwargs):
    def launch(**call):
        raise RuntimeError("[metal::Device] Unable to build metal library from source\nprogram_source:7: error: no")

    return launch


def test_a_kernel_that_does_not_build_is_an_error_with_the_compilers_message_every_time():
    with select.use_backend(MetalBackend(failing_build)):
        for _ in range(2):
            with pytest.raises(BackendError) as e:
                select.quantize(X, 4)
            assert "quantize.metal with head_dim 64, 4 bits" in str(e.value)
            assert "program_source:7: error: no" in str(e.value)
        with pytest.raises(BackendError, match="dequantize.metal"):
            select.dequantize(mx.zeros((1, 1, 4, 8), mx.uint32), mx.zeros((1, 1, 4, 1), mx.float16), 4, head_dim=64)


def test_a_cache_on_a_broken_backend_raises_and_stays_as_it_was():
    cache = TurboKVCache("turbo4", sink=0, recent=0, block=4)
    with select.use_backend(MetalBackend(failing_build)):
        cache.update_and_fetch(X[:, :, :2], X[:, :, :2])
        with pytest.raises(BackendError):
            cache.update_and_fetch(X, X)
        assert cache.offset == 2 and cache.n_packed == 0


@pytest.mark.parametrize("name", ["quantize", "dequantize"])
@pytest.mark.parametrize("fault", ["zeros", "last vector", "scale"])
def test_a_kernel_that_computes_something_wrong_is_an_error(name, fault):
    """What M1 did to kernels with too many registers: no error, wrong numbers."""
    oracle = BACKENDS["oracle"]

    class Wrong(MetalBackend):
        def _spoil(self, x):
            if fault == "zeros":
                return mx.zeros_like(x)
            if fault == "last vector":
                keep = mx.arange(x.shape[2])[:, None] < x.shape[2] - 1
                return mx.where(keep, x, mx.zeros_like(x))
            return x * 1.02 if x.dtype != mx.uint32 else x

        def launch_quantize(self, prepared, *options):
            return [tuple(map(self._spoil, out)) for out in oracle.quantize([s for s, _ in prepared], *options)]

        def launch_dequantize(self, prepared, first, length, dtype, seed):
            return [self._spoil(x) for x in oracle.dequantize([s for s, _ in prepared], first, length, dtype, seed)]

    with select.use_backend(Wrong()), pytest.raises(BackendError, match="disagrees with the NumPy reference"):
        if name == "quantize":
            select.quantize(X, 4)
        else:
            codes, scale = oracle.quantize([sides.QuantizeSide(X, 4)])[0]
            select.dequantize(codes, scale, 4, head_dim=64)


def test_a_right_kernel_passes_its_self_test_once_per_specialization(simulated, monkeypatch):
    checks = []
    for name in ("check_quantize", "check_dequantize"):
        check = getattr(self_test, name)
        monkeypatch.setattr(self_test, name, lambda *a, c=check, n=name: (checks.append(n), c(*a))[1])
    with select.use_backend(MetalBackend(simulated.metal_kernel)):
        for _ in range(2):
            codes, scale = select.quantize(X, 4)
            select.dequantize(codes, scale, 4, head_dim=64)
    assert checks == ["check_quantize", "check_dequantize"]


def test_metal_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    with pytest.raises(BackendError, match="^backend: 'metal' was asked for, but this build of MLX has no Metal"):
        select.get_backend("metal")
    monkeypatch.setenv("MLX_TURBO_BACKEND", "metal")
    with pytest.raises(BackendError, match="^MLX_TURBO_BACKEND: 'metal' was asked for"):
        select.quantize(X, 4)


def test_the_environment_variable_chooses_and_a_wrong_value_is_refused(monkeypatch):
    monkeypatch.setenv("MLX_TURBO_BACKEND", "cpu")
    assert select.get_backend().name == "cpu"
    monkeypatch.setenv("MLX_TURBO_BACKEND", "gpu")
    with pytest.raises(ValueError, match="^MLX_TURBO_BACKEND: got 'gpu', allowed are 'metal' and 'cpu'"):
        select.get_backend()


def test_metal_is_taken_where_there_is_metal_and_the_cpu_where_the_default_device_is_the_cpu(monkeypatch):
    monkeypatch.delenv("MLX_TURBO_BACKEND", raising=False)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert select.get_backend().name == "metal"
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    assert select.get_backend().name == "cpu"


def test_the_chosen_backend_is_restored_when_a_block_ends_badly():
    before = select.get_backend()
    with pytest.raises(KeyError), select.use_backend(BACKENDS["oracle"]):
        assert select.get_backend() is BACKENDS["oracle"]
        raise KeyError
    assert select.get_backend() is before
