"""One suite over all backends: the NumPy oracle, the MLX fallback, the Metal kernels in the simulator (metalsim),
and, where there is one, a real Metal GPU. With MLX_TURBO_REQUIRE_METAL=1 a missing GPU is an error."""

import os
import re
import sys

import metalsim
import mlx.core as mx
import numpy as np
import pytest

from mlx_turbo.backends import select
from mlx_turbo.backends.metal import MetalBackend
from mlx_turbo.backends.mlx_ops import CpuBackend
from mlx_turbo.backends.self_test import restored_tokens
from mlx_turbo.cli import main
from mlx_turbo.integration import attention, prompt_cache
from mlx_turbo.quant import reference
from mlx_turbo.quant.scheme import SCALES


def to_numpy(x):
    """An mx.array as float32 NumPy (bfloat16 has no NumPy type)."""
    return np.array(x.astype(mx.float32))


class OracleBackend:
    """The NumPy reference in the shape of a backend."""

    name = "oracle"

    def describe(self):
        return "oracle (NumPy, float64)"

    def quantize(self, sides, seed=0, scale=SCALES[0]):
        outs = []
        for side in sides:
            mean = None if side.mean is None else np.array(side.mean)
            x = to_numpy(side.x).astype(np.float64)
            finite = np.isfinite(x).all(-1, keepdims=True)
            with np.errstate(over="ignore"):
                q = reference.quantize(
                    np.where(finite, x, 0), side.bits, rotation=seed, mean=mean, scale=scale, scale_dtype=np.float64
                )
                scales = np.where(finite, q.scale[..., None], np.nan).astype(np.float16)
            scales = np.where(np.isfinite(scales), scales, np.float16(np.nan))
            outs.append((mx.array(q.packed()), mx.array(scales)))
        return outs

    def dequantize(self, sides, first, length, dtype, seed=0):
        outs = []
        for side in sides:
            codes, scale = (np.array(a[:, :, first : first + length]) for a in (side.codes, side.scale))
            mean = None if side.mean is None else np.array(side.mean)
            q = reference.from_packed(codes, scale, side.bits, side.head_dim, rotation=seed, mean=mean)
            with np.errstate(invalid="ignore"):  # of vectors that are not finite
                outs.append(mx.array(reference.dequantize(q).astype(np.float32)).astype(dtype))
        return outs

    def why_not_fused(self, keys, values, n_query_tokens):
        return None

    def attend(self, queries, keys, values, counts, *, scale, mask=None, sinks=None, seed=0):
        if mask is not None and not isinstance(mask, str):
            mask = np.array(mask) if mask.dtype == mx.bool_ else to_numpy(mask)
        with np.errstate(invalid="ignore"):
            restored = [restored_tokens(side, counts, seed) for side in (keys, values)]
            out = reference.attention(
                to_numpy(queries), *restored, scale=scale, mask=mask, sinks=None if sinks is None else to_numpy(sinks)
            )
        return mx.array(out.astype(np.float32)).astype(queries.dtype)


SIMULATED = MetalBackend(metalsim.metal_kernel)
SIMULATED.describe = lambda: "simulated metal (metalsim)"
BACKENDS = {"oracle": OracleBackend(), "cpu": CpuBackend()}
if sys.platform != "darwin":  # the simulator's code generation is for Linux; a Mac runs the kernels themselves
    BACKENDS["simulated"] = SIMULATED
if not select.metal_unavailable():
    BACKENDS["metal"] = MetalBackend()
elif os.environ.get("MLX_TURBO_REQUIRE_METAL") == "1":
    raise pytest.UsageError(f"MLX_TURBO_REQUIRE_METAL=1, but {select.metal_unavailable()}")


def pytest_addoption(parser):
    parser.addoption("--part", metavar="K/N", help="every N-th test from the K-th on: of a suite run in N shares")


def part_of(items, part):
    """The items of a part "K/N", with those of the other N - 1 parts all of them, each once."""
    found = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", part)
    k, n = map(int, found.groups()) if found else (1, 0)
    if k > n:
        raise pytest.UsageError(f"--part: got {part!r}, allowed are 1/N to N/N")
    return items[k - 1 :: n]


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
def door():
    """Our classes and our attention in mlx-lm for the whole test, its own after it."""
    prompt_cache.patch_mlx_lm()
    yield
    attention.uninstall()


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
def run(capsys):
    """run(*argv) -> (exit code, stdout, stderr) of the command, in this process."""

    def run(*argv):
        capsys.readouterr()
        try:
            code = main.main([str(a) for a in argv])
        except SystemExit as e:  # argparse's --help and --version
            code = e.code
        return code, *capsys.readouterr()

    return run
