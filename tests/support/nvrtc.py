"""NVRTC, NVIDIA's compiler, from its wheel: the kernels compiled for a GPU that is not there, as MLX would.

The text around a kernel is a second implementation of mlx/backend/cuda/custom_kernel.cpp (MLX 0.32), the options are
those of jit_module.cpp. MLX's own header device/utils.cuh, which needs 2 seconds of headers behind it, is replaced by
what a kernel of ours uses of it."""

import ctypes
import functools
import re
from importlib import metadata
from typing import NamedTuple

import mlx.core as mx

ARCHITECTURES = "sm_80", "sm_90a"  # as MLX names them
CUDA_TYPE = {mx.float16: "__half", mx.bfloat16: "__nv_bfloat16", mx.float32: "float", mx.bool_: "bool"} | {
    getattr(mx, f"{sign}int{bits}"): f"{sign}int{bits}_t" for sign in ("", "u") for bits in (8, 16, 32, 64)
}
UTILS = """
#include <cuda_bf16.h>
#include <cuda_fp16.h>
typedef signed char int8_t; typedef short int16_t; typedef int int32_t; typedef long int64_t;
typedef unsigned char uint8_t; typedef unsigned short uint16_t; typedef unsigned int uint32_t;
typedef unsigned long uint64_t;
namespace mlx::core::cu {
template <class T> struct Ten {
  T x[10];
  __device__ constexpr const T &operator[](int i) const { return x[i]; }
};
using Shape = Ten<int32_t>;
using Strides = Ten<int64_t>;
}
"""


class Resources(NamedTuple):
    """What a kernel asks of a multiprocessor. registers: of a thread. Bytes: spilled registers (stores and loads), the
    stack, shared memory."""

    registers: int
    spills: int
    stack: int
    shared: int


def kernel_text(name, input_names, output_names, source, header, inputs, output_dtypes, template):
    """The text that MLX compiles for one call of mx.fast.cuda_kernel's kernel, and the kernel's name in it.

    inputs: arrays, of which dtype and ndim matter. template: [(name, bool | int | Dtype), ...]."""
    kernel, parameters = "custom_kernel_" + name + "".join(_hashed(value) for _, value in template), []
    for n, a in zip(input_names, inputs):
        parameters.append(f"const {CUDA_TYPE[a.dtype]}* {n}")
        for kind, about in (("Shape", "shape"), ("Strides", "strides"), ("int", "ndim")):
            if a.ndim and f"{n}_{about}" in source:
                parameters.append(f"const __grid_constant__ {kind} {n}_{about}")
    parameters += [f"{CUDA_TYPE[dtype]}* {n}" for n, dtype in zip(output_names, output_dtypes)]
    constants = "".join(f"  {_constant(n, value)};\n" for n, value in template)
    joined = ",\n".join(f"    {p}" for p in parameters)
    text = (
        f"{UTILS}{header}namespace mlx::core::cu {{\n\n__global__ void {kernel}(\n{joined}) {{\n"
        f"{constants}\n{source}\n}}\n\n}} // namespace mlx::core::cu\n"
    )
    return text, f"mlx::core::cu::{kernel}"


def _hashed(value):
    if isinstance(value, bool):
        return "_t" if value else "_f"
    return f"_{value if isinstance(value, int) else str(value).removeprefix('mlx.core.')}"


def _constant(name, value):
    if isinstance(value, bool):
        return f"constexpr bool {name} = {str(value).lower()}"
    return f"constexpr int {name} = {value}" if isinstance(value, int) else f"using {name} = {CUDA_TYPE[value]}"


@functools.lru_cache(maxsize=None)
def _library():
    """(NVRTC, the folder of CUDA's headers). Raises RuntimeError where the packages are not installed."""
    try:
        files = [f for p in ("nvidia-cuda-nvrtc", "nvidia-cuda-runtime") for f in metadata.files(p)]
    except metadata.PackageNotFoundError as e:
        raise RuntimeError(f'{e.name} is not installed: pip install -e ".[cuda-test]"') from None

    def located(pattern):
        return [str(f.locate()) for f in files if re.fullmatch(pattern, f.name)]

    for builtins in located(r"libnvrtc-builtins\.so.*"):
        ctypes.CDLL(builtins, mode=ctypes.RTLD_GLOBAL)  # NVRTC does not look beside itself
    (library,), (header,) = located(r"libnvrtc\.so.*"), located(r"cuda_fp16\.h")
    return ctypes.CDLL(library), header.removesuffix("/cuda_fp16.h")


def version():
    """Of NVRTC, as "13.0"."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _library()[0].nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


@functools.lru_cache(maxsize=None)  # models of different shapes have kernels in common
def compile_for(architecture, text, name):
    """`Resources` of the kernel `name`. Raises RuntimeError with the compiler's messages if there are errors. One
    program at a time: threads would wait for NVRTC's lock."""
    nvrtc, headers = _library()
    options = [
        "--device-as-default-execution-space",
        f"--gpu-architecture={architecture}",
        f"--include-path={headers}",
        "--ptxas-options=-v",
    ]
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernel.cu", 0, None, None)
    try:
        nvrtc.nvrtcAddNameExpression(program, name.encode())
        failed = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * 4)(*map(str.encode, options)))
        size = ctypes.c_size_t()
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, buffer)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    log = buffer.value.decode()
    if failed:
        raise RuntimeError(f"{name} for {architecture}\n{log}")
    stack, stores, loads = map(int, re.search(r"(\d+) bytes stack.*?(\d+) .*? stores, (\d+) .*? loads", log).groups())
    registers = int(re.search(r"Used (\d+) registers", log)[1])
    shared = re.search(r"(\d+) bytes smem", log)
    return Resources(registers, stores + loads, stack, int(shared[1]) if shared else 0)
