"""Which backend runs: chosen in one place, never changed in silence."""

import mlx.core as mx
import numpy as np
import pytest
from support.backends import BACKENDS

from mlx_turbo.backends import select, self_test, sides
from mlx_turbo.backends.metal import MetalBackend
from mlx_turbo.backends.sides import BackendError
from mlx_turbo.cache.batch import BatchTurboKVCache
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
    options = dict(sink=0, recent=0, block=4)
    at_once, waits, batch = (
        TurboKVCache("turbo4", **options, balance=False),
        TurboKVCache("turbo4", **options),
        BatchTurboKVCache("turbo4", [0] * X.shape[0], **options),
    )
    with select.use_backend(MetalBackend(failing_build)):
        for cache in at_once, waits, batch:
            cache.update_and_fetch(X[:, :, :2], X[:, :, :2])
        with pytest.raises(BackendError):
            at_once.update_and_fetch(X, X)
        assert at_once.offset == 2 and at_once.n_packed == 0
        for cache in waits, batch:
            cache.update_and_fetch(X, X)
            for look in (lambda c: c.observe(X, 0.1), lambda c: c.settle(), lambda c: c.update_and_fetch(X, X)) * 2:
                with pytest.raises(BackendError):
                    look(cache)
                assert cache.size() == 2 + X.shape[2] and cache.packed_columns == 0
    for cache in waits, batch:
        assert cache.nbytes and cache.packed_columns == 2  # nothing was lost


@pytest.mark.parametrize("name", ["quantize", "dequantize", "statistics"])
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

        def launch_statistics(self, x, first, segment):
            sums, energy = oracle.statistics(x, first, segment)
            return self._spoil(sums), energy

        def launch_dequantize(self, prepared, first, length, dtype, seed):
            return [self._spoil(x) for x in oracle.dequantize([s for s, _ in prepared], first, length, dtype, seed)]

    with select.use_backend(Wrong()), pytest.raises(BackendError, match="disagrees with the NumPy reference"):
        if name == "quantize":
            select.quantize(X, 4)
        elif name == "statistics":
            select.statistics(X, 0, 128)
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


@pytest.fixture
def gpu(request, monkeypatch):
    """The name of a GPU's backend, the only one that MLX has, if it can be believed."""
    for name in select.GPUS:
        monkeypatch.setattr(getattr(mx, name), "is_available", lambda name=name: name == request.param)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.delenv("MLX_TURBO_BACKEND", raising=False)
    monkeypatch.setattr(select, "_backends", {})
    return request.param


EACH_GPU = pytest.mark.parametrize("gpu", select.GPUS, indirect=True)


@EACH_GPU
def test_a_gpu_of_the_other_kind_is_refused(gpu, monkeypatch):
    other, says = {
        "metal": ("cuda", r'no CUDA.*pip install "mlx-turbo\[cuda13\]" \(or \[cuda12\]\)'),
        "cuda": ("metal", "no Metal"),
    }[gpu]
    with pytest.raises(BackendError, match=f"^backend: '{other}' was asked for, but this build of MLX has {says}"):
        select.get_backend(other)
    monkeypatch.setenv("MLX_TURBO_BACKEND", other)
    with pytest.raises(BackendError, match=f"^MLX_TURBO_BACKEND: '{other}' was asked for"):
        select.quantize(X, 4)


def test_the_environment_variable_chooses_and_a_wrong_value_is_refused(monkeypatch):
    monkeypatch.setenv("MLX_TURBO_BACKEND", "cpu")
    assert select.get_backend().name == "cpu"
    monkeypatch.setenv("MLX_TURBO_BACKEND", "gpu")
    with pytest.raises(ValueError, match="^MLX_TURBO_BACKEND: got 'gpu', allowed are 'metal', 'cuda' and 'cpu'"):
        select.get_backend()


@EACH_GPU
def test_a_gpu_is_taken_where_there_is_one_and_the_cpu_where_the_default_device_is_the_cpu(gpu, monkeypatch):
    title = {"metal": "Metal", "cuda": "CUDA"}[gpu]
    chosen = select.get_backend()
    assert (chosen.name, chosen.title, chosen.is_real) == (gpu, title, True)
    assert select.why_default() == f"{title} is available"
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    assert select.get_backend().name == "cpu"
    assert select.unavailable(gpu) == select.why_default() == "MLX's default device is the CPU"


@pytest.mark.parametrize("gpu", ["none"], indirect=True)
def test_the_cpu_is_taken_where_there_is_no_gpu_and_it_is_said_why(gpu):
    assert select.get_backend().name == select.default_name() == "cpu"
    assert "no Metal and no CUDA" in select.why_default()


@EACH_GPU
def test_a_kernel_that_fails_names_the_gpu_and_what_it_computes_on(gpu, monkeypatch):
    """Under CUDA nothing may say Metal."""
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "a chip"})
    monkeypatch.setattr(mx.fast, f"{gpu}_kernel", failing_build)
    assert select.get_backend().describe() == f"{gpu} (a chip)"
    with pytest.raises(BackendError) as e:
        select.quantize(X, 4)
    title = select.GPUS[gpu]
    assert str(e.value).startswith(f"the {title} kernel does not build or run: quantize.metal with head_dim 64")
    assert "on a chip\n" in str(e.value)


@pytest.mark.parametrize("gpu", ["none"], indirect=True)
def test_a_cuda_build_that_another_one_lies_over_is_named(gpu, monkeypatch, tmp_path):
    """mlx-cpu and mlx-cuda-13 hold the same file."""
    (tmp_path / "mlx/lib").mkdir(parents=True)
    library, about = tmp_path / "mlx/lib/libmlx.so", tmp_path / "mlx_cuda_13-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: mlx-cuda-13\nVersion: 1.0\n")
    (about / "RECORD").write_text("mlx/lib/libmlx.so,sha256=x,7\nmlx/__init__.py,sha256=x,1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    library.write_text("of CUDA")
    assert select.overwritten() is None and "no CUDA" in select.unavailable("cuda")
    library.write_text("of the CPU")
    assert "mlx-cuda-13 is installed, but another build of MLX was installed over it" in select.overwritten()
    with pytest.raises(BackendError, match="'cuda' was asked for, but mlx-cuda-13 is installed, but another build"):
        select.get_backend("cuda")


def test_the_chosen_backend_is_restored_when_a_block_ends_badly():
    before = select.get_backend()
    with pytest.raises(KeyError), select.use_backend(BACKENDS["oracle"]):
        assert select.get_backend() is BACKENDS["oracle"]
        raise KeyError
    assert select.get_backend() is before
