"""The Metal simulator hands a kernel the same memory that MLX would, and keeps its cache in order."""

import os
import subprocess
import sys
from pathlib import Path

import metalsim
import mlx.core as mx
import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="metalsim runs on Linux")

BASE = mx.arange(2 * 6 * 8, dtype=mx.float32).reshape(2, 6, 8)
VIEWS = {
    "the whole buffer": lambda a: a,
    "a slice of the middle axis": lambda a: a[:, :4, :],
    "a slice that starts at an offset": lambda a: a[:, 2:5, 3:],
    "a row-contiguous slice at an offset": lambda a: a[1:],
    "every second row": lambda a: a[:, ::2],
    "a reversed axis": lambda a: a[:, ::-1],
    "two reversed axes, one with a step": lambda a: a[::-1, :, ::-2],
    "a transposed array": lambda a: a.swapaxes(1, 2),
    "a broadcast axis": lambda a: mx.broadcast_to(a[:, :1], (2, 5, 8)),
    "a broadcast scalar": lambda a: mx.broadcast_to(a[1, 2, 3], (2, 3, 4)),
    "axes of length 1": lambda a: a[:1, 3:4],
    "a small slice, bound as constant": lambda a: a[0, ::3, 1:3],
}
GATHER = """
    uint i = thread_position_in_grid.x;
    uint rest = i;
    long at = 0;
    for (int d = x_ndim - 1; d >= 0; d--) { at += (rest % x_shape[d]) * x_strides[d]; rest /= x_shape[d]; }
    out[i] = x[at];"""


def gather(array, **options):
    """Copy `array` through its own shape and strides."""
    kernel = metalsim.metal_kernel("gather", ["x"], ["out"], GATHER, **options)
    (out,) = kernel(
        inputs=[array],
        output_shapes=[array.shape],
        output_dtypes=[array.dtype],
        grid=(array.size, 1, 1),
        threadgroup=(32, 1, 1),
    )
    return out


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.uint8])
@pytest.mark.parametrize("ensure_row_contiguous", [True, False])
@pytest.mark.parametrize("name", VIEWS)
def test_a_view_is_read_through_its_strides(name, ensure_row_contiguous, dtype):
    view = VIEWS[name](BASE.astype(dtype))
    out = gather(view, ensure_row_contiguous=ensure_row_contiguous)
    assert out.dtype == dtype
    assert mx.array_equal(out, view)


def test_a_view_that_is_not_copied_reads_every_byte_of_a_broadcast_row_once_per_use():
    view = mx.broadcast_to(BASE[:, :1], (2, 5, 8))
    gather(view, ensure_row_contiguous=False)
    reads = metalsim.last().reads["x"]
    assert len(reads) == 4 * (6 * 8 + 8)  # from the first row of batch 0 to the first row of batch 1
    assert sorted(set(reads.tolist())) == [0, 5]


def test_a_read_outside_a_view_is_out_of_bounds_although_its_buffer_goes_on():
    source = "uint i = thread_position_in_grid.x; out[i] = x[i + 12];"
    kernel = metalsim.metal_kernel("beyond", ["x"], ["out"], source, ensure_row_contiguous=False)
    with pytest.raises(metalsim.MSLError, match="out-of-bounds read of 4 bytes at byte 80 of 'x' .80 bytes"):
        kernel(
            inputs=[BASE[0, :3, :4]],
            output_shapes=[(16,)],
            output_dtypes=[mx.float32],
            grid=(16, 1, 1),
            threadgroup=(16, 1, 1),
        )


def test_a_vector_load_from_a_view_at_an_odd_offset_is_misaligned():
    source = "uint i = thread_position_in_grid.x; out[i] = ((const device float4*)x)[i].x;"
    kernel = metalsim.metal_kernel("aligned", ["x"], ["out"], source)
    call = {"output_shapes": [(4,)], "output_dtypes": [mx.float32], "grid": (4, 1, 1), "threadgroup": (4, 1, 1)}
    flat = BASE.reshape(-1)
    assert kernel(inputs=[flat[4:20]], **call)[0].tolist() == [4, 8, 12, 16]
    with pytest.raises(metalsim.MSLError, match="misaligned"):
        kernel(inputs=[flat[5:21]], **call)


def test_scalars_and_lists_are_taken_as_inputs_like_by_mlx():
    source = "uint i = thread_position_in_grid.x; out[i] = a * b[i] + c;"
    kernel = metalsim.metal_kernel("scalars", ["a", "b", "c"], ["out"], source)
    (out,) = kernel(
        inputs=[2.5, mx.array([1.0, 2.0]), 3],
        output_shapes=[[2]],
        output_dtypes=[mx.float32],
        grid=(2, 1, 1),
        threadgroup=(2, 1, 1),
        stream=mx.cpu,
    )
    assert out.tolist() == [5.5, 8.0]


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16, mx.int32, mx.uint8])
def test_outputs_begin_with_init_value(dtype):
    source = "uint i = thread_position_in_grid.x; if (i % 2) out[i] = x[0];"
    kernel = metalsim.metal_kernel("init", ["x"], ["out"], source)
    (out,) = kernel(
        inputs=[mx.array([9.0])],
        output_shapes=[(4,)],
        output_dtypes=[dtype],
        grid=(4, 1, 1),
        threadgroup=(4, 1, 1),
        init_value=3,
    )
    assert out.dtype == dtype and out.tolist() == [3, 9, 3, 9]


def test_an_array_type_that_is_not_simulated_is_an_error_and_not_a_wrong_answer():
    with pytest.raises(metalsim.MSLError, match="complex64"):
        gather(mx.zeros((8,), mx.complex64))


PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import metalsim, mlx.core as mx
for k in range(3):
    kernel = metalsim.metal_kernel("k", [], ["out"], f"out[thread_position_in_grid.x] = {k};")
    (out,) = kernel(inputs=[], output_shapes=[(32,)], output_dtypes=[mx.float32], grid=(32, 1, 1),
                    threadgroup=(32, 1, 1))
    assert out.tolist() == [k] * 32
"""


def test_several_processes_may_fill_one_cache_at_the_same_time(tmp_path):
    command = [sys.executable, "-c", PROGRAM, str(Path(__file__).parents[1])]
    env = os.environ | {"METALSIM_CACHE": str(tmp_path / "cache")}
    processes = [subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    left = sorted(path.suffix for path in (tmp_path / "cache").iterdir())
    assert left == [".json"] * 3 + [".so"] * 4  # three kernels and the runtime; no temporary directories


def test_on_another_system_the_import_works_and_the_first_use_says_why_not():
    program = (
        "import platform, sys; sys.path.insert(0, sys.argv[1]); platform.system = lambda: 'Darwin'\n"
        "import metalsim, mlx.core as mx\n"
        "kernel = metalsim.metal_kernel('k', [], ['out'], 'out[0] = 1;')\n"
        "try: kernel(inputs=[], output_shapes=[(1,)], output_dtypes=[mx.float32], grid=(1, 1, 1), "
        "threadgroup=(1, 1, 1))\n"
        "except RuntimeError as e: print(e)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(Path(__file__).parents[1])], capture_output=True, text=True
    )
    assert "metalsim runs on Linux" in done.stdout and "mx.fast.metal_kernel" in done.stdout, done.stderr
