"""The kernel text that the simulator generates is, character by character, the text that MLX generates.

MLX prints the text, also on Linux, while a function that calls the kernel is exported with verbose=True.
"""

import itertools
import sys

import metalsim
import mlx.core as mx
import pytest
from metalsim.signature import BUILTINS

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="metalsim runs on Linux")

ALL_DTYPES = [
    mx.bool_,
    mx.uint8,
    mx.uint16,
    mx.uint32,
    mx.uint64,
    mx.int8,
    mx.int16,
    mx.int32,
    mx.int64,
    mx.float16,
    mx.bfloat16,
    mx.float32,
    mx.complex64,
]

# name: (arguments of metal_kernel, inputs, output dtypes, template)
CASES = {
    "one input, one output": (
        {"input_names": ["x"], "output_names": ["out"], "source": "out[thread_position_in_grid.x] = x[0];"},
        [mx.zeros((16,))],
        [mx.float32],
        None,
    ),
    "no input": ({"input_names": [], "output_names": ["o"], "source": "o[0] = 1;"}, [], [mx.bool_], None),
    "scalars, small inputs, shapes, strides, a header, atomics and a template": (
        {
            "input_names": ["x", "s", "c", "h"],
            "output_names": ["o", "p"],
            "header": "// h\n",
            "atomic_outputs": True,
            "source": "int n = x_shape[0] + x_ndim + c_strides[0] + h_shape[1] + s_ndim; simd_sum(1); "
            "thread_index_in_simdgroup; threads_per_threadgroup;",
        },
        [
            mx.zeros((16,), mx.float16),
            mx.array(1.0),
            mx.array([1, 2, 3], dtype=mx.int64),
            mx.zeros((2, 4), mx.bfloat16),
        ],
        [mx.uint32, mx.float32],
        [("T", mx.float16), ("N", 7), ("B", True), ("M", -3)],
    ),
    "empty input": (
        {"input_names": ["x"], "output_names": ["o"], "source": "x_ndim; grid_size;"},
        [mx.zeros((0,), mx.uint8)],
        [mx.int8],
        [("F", False)],
    ),
    "every thread attribute": (
        {"input_names": ["x"], "output_names": ["o"], "source": "".join(f"{name};\n" for name in BUILTINS)},
        [mx.zeros((8,))],
        [mx.float32],
        None,
    ),
    "an attribute mentioned only in the header": (
        {
            "input_names": ["x"],
            "output_names": ["o"],
            "source": "o[0] = f(x[0]);",
            "header": "float f(float x) { return x; } // thread_position_in_grid x_shape\n",
        },
        [mx.zeros((8,))],
        [mx.float32],
        None,
    ),
    "a name that contains another input's name": (
        {"input_names": ["x", "xx"], "output_names": ["o"], "source": "xx_shape[0] + x_strides[0];"},
        [mx.zeros((9,)), mx.zeros((7,))],
        [mx.float32],
        None,
    ),
    "every dtype as input and output": (
        {"input_names": [f"i{k}" for k in range(13)], "output_names": [f"o{k}" for k in range(13)], "source": ";"},
        [mx.zeros((8,), dtype) for dtype in ALL_DTYPES],
        ALL_DTYPES,
        None,
    ),
    "every dtype as a template argument": (
        {"input_names": ["x"], "output_names": ["o"], "source": ";"},
        [mx.zeros((8,))],
        [mx.float32],
        [(f"T{k}", dtype) for k, dtype in enumerate(ALL_DTYPES)],
    ),
    **{
        f"{shape} {dtype} with strides={strides}": (
            {
                "input_names": ["keys"],
                "output_names": ["o"],
                "source": "keys_strides[0];" if strides else "keys_shape;",
            },
            [mx.zeros(shape, dtype)],
            [mx.float16],
            [("D", 128)],
        )
        for shape, dtype, strides in itertools.product(
            [(), (1,), (7,), (8,), (2, 4), (1, 2, 3)], [mx.float32, mx.bfloat16, mx.uint32], [False, True]
        )
    },
}


def text_printed_by_mlx(options, inputs, output_dtypes, template, capfd, tmp_path):
    kernel = mx.fast.metal_kernel(name="k", **options)
    call = {
        "output_dtypes": output_dtypes,
        "output_shapes": [(4,)] * len(output_dtypes),
        "grid": (4, 1, 1),
        "threadgroup": (4, 1, 1),
        "verbose": True,
    } | ({"template": template} if template else {})
    capfd.readouterr()
    mx.export_function(str(tmp_path / "f.mlxfn"), lambda *arrays: kernel(inputs=list(arrays), **call), *inputs)
    printed = capfd.readouterr().out
    assert printed.startswith("Generated source code for `k`:\n```\n"), printed
    return printed.split("```\n", 1)[1].rsplit("```", 1)[0]


@pytest.mark.parametrize("name", CASES)
def test_the_generated_text_is_the_text_mlx_generates(name, capfd, tmp_path):
    options, inputs, output_dtypes, template = CASES[name]
    expected = text_printed_by_mlx(options, inputs, output_dtypes, template, capfd, tmp_path)
    text, _, _ = metalsim.generate(
        "k",
        options["input_names"],
        options["output_names"],
        options["source"],
        options.get("header", ""),
        options.get("atomic_outputs", False),
        inputs,
        output_dtypes,
        template,
    )
    assert text.strip() == expected.strip()


def test_verbose_prints_what_mlx_prints(capfd, tmp_path):
    options = {"input_names": ["x"], "output_names": ["o"], "source": "o[thread_position_in_grid.x] = x[0];"}
    expected = text_printed_by_mlx(options, [mx.zeros((8,))], [mx.float32], None, capfd, tmp_path)
    metalsim.metal_kernel("k", **options)(
        inputs=[mx.zeros((8,))],
        output_shapes=[(4,)],
        output_dtypes=[mx.float32],
        grid=(4, 1, 1),
        threadgroup=(4, 1, 1),
        verbose=True,
    )
    printed = capfd.readouterr().out
    assert printed.split("```\n", 1)[1].rsplit("```", 1)[0].strip() == expected.strip()


@pytest.mark.parametrize(
    "options", [{"output_names": []}, {"compile_options": {"speed": 1}}, {"compile_options": {"math_mode": "loose"}}]
)
def test_a_kernel_that_mlx_refuses_is_refused_with_the_same_words(options):
    options = {"name": "k", "input_names": ["x"], "output_names": ["o"], "source": ";"} | options
    with pytest.raises(ValueError) as by_mlx:
        mx.fast.metal_kernel(**options)
    with pytest.raises(ValueError) as by_metalsim:
        metalsim.metal_kernel(**options)
    assert str(by_metalsim.value).strip() == str(by_mlx.value).strip()


@pytest.mark.parametrize("wrong", [{"inputs": []}, {"output_shapes": []}, {"output_dtypes": [mx.float32] * 2}])
def test_a_call_that_mlx_refuses_is_refused_with_the_same_words(wrong, tmp_path):
    options = {"name": "k", "input_names": ["x"], "output_names": ["o"], "source": ";"}
    call = {
        "inputs": [mx.zeros((8,))],
        "output_shapes": [(4,)],
        "output_dtypes": [mx.float32],
        "grid": (4, 1, 1),
        "threadgroup": (4, 1, 1),
    } | wrong
    with pytest.raises(ValueError) as by_mlx:
        mx.export_function(str(tmp_path / "f.mlxfn"), lambda: mx.fast.metal_kernel(**options)(**call))
    with pytest.raises(ValueError) as by_metalsim:
        metalsim.metal_kernel(**options)(**call)
    assert str(by_metalsim.value).strip() == str(by_mlx.value).strip()
