"""One suite over all backends: the NumPy oracle, the MLX fallback, the Metal kernels in the simulator (metalsim), and,
where there is one, a real GPU, of Metal or CUDA. With MLX_TURBO_REQUIRE_METAL=1 or MLX_TURBO_REQUIRE_CUDA=1 a missing
one is an error.

MLX is told to compute float32 products exactly (MLX_ENABLE_TF32), as the tolerances have it; what TF32 costs is tested
with planted rounding."""

import os

os.environ.setdefault("MLX_ENABLE_TF32", "0")  # before MLX reads it

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's: its threads spin, and a busy core costs them five times

import importlib.util
import sys

import metalsim
import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.utils import dequantize_model
from support.backends import BACKENDS, SIMULATED
from support.models import DEMO_MODEL
from support.parts import part_of
from support.vlm import VERSION, unpacked

from mlx_turbo.backends import select
from mlx_turbo.cache import centering
from mlx_turbo.cli import kept_prices, main
from mlx_turbo.integration import attention, prompt_cache


def pytest_addoption(parser):
    parser.addoption("--part", metavar="K/N", help="every N-th test from the K-th on: of a suite run in N shares")


@pytest.hookimpl(trylast=True)  # of what -m and -k leave
def pytest_collection_modifyitems(config, items):
    if part := config.getoption("part"):
        mine = part_of(items, part)
        config.hook.pytest_deselected(items=[item for item in items if item not in set(mine)])
        items[:] = mine


@pytest.fixture(params=list(BACKENDS))
def backend(request):
    """Each backend in turn, in use for the whole test."""
    with select.use_backend(BACKENDS[request.param]) as chosen:
        yield chosen


@pytest.fixture
def simulated():
    """The Metal kernels in the simulator."""
    if "simulated" not in BACKENDS:
        pytest.skip("the simulator runs on Linux; here the kernels run on the GPU")
    with select.use_backend(SIMULATED) as chosen:
        yield chosen


@pytest.fixture
def kernels():
    """The kernels on CUDA where there is CUDA, else in the simulator."""
    name = next((name for name in ("cuda", "simulated") if name in BACKENDS), None)
    if not name:
        pytest.skip("needs CUDA, or the simulator, which runs on Linux")
    with select.use_backend(BACKENDS[name]) as chosen:
        yield chosen


@pytest.fixture
def door():
    """Our classes and our attention in mlx-lm for the whole test, its own after it."""
    prompt_cache.patch_mlx_lm()
    yield
    attention.uninstall()


@pytest.fixture(scope="session")
def vlm(request):
    """The package mlx_vlm: the installed one, or else its wheel."""
    if importlib.util.find_spec("mlx_vlm") is None:
        folder = unpacked(request.config.cache.mkdir("packages") / f"mlx_vlm-{VERSION}")
        sys.path.append(str(folder))
    import mlx_vlm

    return mlx_vlm


@pytest.fixture
def generated_texts(monkeypatch):
    """The set of Metal texts that the simulator is handed during the test."""
    texts, generate = set(), metalsim.launch.generate

    def remember(*args, **options):
        out = generate(*args, **options)
        texts.add(out[0])
        return out

    monkeypatch.setattr(metalsim.launch, "generate", remember)
    return texts


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """run(*argv) -> (exit code, stdout, stderr) of the command, in this process. It keeps prices in a new folder."""
    monkeypatch.setattr(kept_prices, "prices_folder", lambda: tmp_path / "prices")

    def run(*argv):
        capsys.readouterr()
        try:
            code = main.main([str(a) for a in argv])
        except SystemExit as e:  # argparse's --help and --version
            code = e.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def short_segments(monkeypatch):
    """Segments of 8 tokens, so that few tokens meet several. The attention kernel does not run with these."""
    monkeypatch.setattr(centering, "SEGMENT", 8)
    monkeypatch.setattr(centering, "FEWEST", 4)


@pytest.fixture(scope="module")
def demo():
    """(model, tokenizer) of the embedded model in float32: what MLX's CPU is fastest in."""
    model, tokenizer = mlx_lm.load(str(DEMO_MODEL))
    model = dequantize_model(model)
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    return model, tokenizer
