"""The kernel text that MLX generates around the body given to mx.fast.metal_kernel.

A second implementation of mlx/backend/common/metal_kernel.cpp (mlx 0.32); test_simulator_signature.py
compares it, character by character, with what MLX prints.
"""

import mlx.core as mx

# Thread attributes in MLX's order; a parameter is added for each one whose name occurs in the source.
BUILTINS = {
    "dispatch_quadgroups_per_threadgroup": "uint",
    "dispatch_simdgroups_per_threadgroup": "uint",
    "dispatch_threads_per_threadgroup": "uint3",
    "grid_origin": "uint3",
    "grid_size": "uint3",
    "quadgroup_index_in_threadgroup": "uint",
    "quadgroups_per_threadgroup": "uint",
    "simdgroup_index_in_threadgroup": "uint",
    "simdgroups_per_threadgroup": "uint",
    "thread_execution_width": "uint",
    "thread_index_in_quadgroup": "uint",
    "thread_index_in_simdgroup": "uint",
    "thread_index_in_threadgroup": "uint",
    "thread_position_in_grid": "uint3",
    "thread_position_in_threadgroup": "uint3",
    "threadgroup_position_in_grid": "uint3",
    "threadgroups_per_grid": "uint3",
    "threads_per_grid": "uint3",
    "threads_per_simdgroup": "uint",
    "threads_per_threadgroup": "uint3",
}
MSL_TYPE = {
    mx.bool_: "bool",
    mx.uint8: "uint8_t",
    mx.uint16: "uint16_t",
    mx.uint32: "uint32_t",
    mx.uint64: "uint64_t",
    mx.int8: "int8_t",
    mx.int16: "int16_t",
    mx.int32: "int32_t",
    mx.int64: "int64_t",
    mx.float16: "float16_t",
    mx.bfloat16: "bfloat16_t",
    mx.float32: "float",
    mx.complex64: "complex64_t",
}
# Inputs with fewer elements than this travel in the constant address space.
MAX_CONSTANT_ELEMENTS = 8


def generate(name, input_names, output_names, source, header, atomic_outputs, inputs, output_dtypes, template):
    """The text MLX hands to the Metal compiler for one call.

    inputs: arrays, of which dtype, ndim and size matter. template: [(name, bool | int | Dtype), ...].
    Returns (text, name of the kernel in it, expression that names this instantiation, as `kernel<float, 4>`).
    """
    template = template or []
    arguments = ", ".join(_template_argument(value) for _, value in template)
    kernel = _kernel_name(name, arguments, inputs, output_dtypes)
    parameters = _parameters(input_names, inputs, output_names, output_dtypes, source, atomic_outputs)
    text = header
    if template:
        kinds = {int: "int", bool: "bool"}
        declared = ", ".join(f"{kinds.get(type(value), 'typename')} {n}" for n, value in template)
        text += f"template <{declared}>\n"
    text += f"[[kernel]] void {kernel}(\n" + ",\n".join(parameters) + ") {\n" + source + "\n}\n"
    if not template:
        return text, kernel, kernel
    instance = f"{kernel}<{arguments}>"
    text += f'\ntemplate [[host_name("{kernel}")]] [[kernel]] decltype({instance}) {instance};\n'
    return text, kernel, instance


def _template_argument(value):
    return str(int(value)) if isinstance(value, (bool, int)) else MSL_TYPE[value]


def _kernel_name(name, arguments, inputs, output_dtypes):
    kernel = f"custom_kernel_{name}"
    if arguments:
        kernel += "_" + ("_" + arguments).replace(", ", "_").replace("-", "_")
    for array in inputs:
        kind = "s" if array.ndim == 0 else "c" if array.size < MAX_CONSTANT_ELEMENTS else ""
        kernel += f"_{MSL_TYPE[array.dtype]}{kind}"
    return kernel + "".join(f"_{MSL_TYPE[dtype]}" for dtype in output_dtypes)


def _parameters(input_names, inputs, output_names, output_dtypes, source, atomic_outputs):
    buffers = []
    for name, array in zip(input_names, inputs):
        space = "constant" if array.size < MAX_CONSTANT_ELEMENTS else "device"
        buffers.append(f"const {space} {MSL_TYPE[array.dtype]}{'*' if array.ndim else '&'} {name}")
        about = {
            f"{name}_shape": "const constant int* ",
            f"{name}_strides": "const constant int64_t* ",
            f"{name}_ndim": "const constant int& ",
        }
        buffers += [kind + parameter for parameter, kind in about.items() if array.ndim and parameter in source]
    for name, dtype in zip(output_names, output_dtypes):
        element = f"atomic<{MSL_TYPE[dtype]}>" if atomic_outputs else MSL_TYPE[dtype]
        buffers.append(f"device {element}* {name}")
    parameters = [f"  {declaration} [[buffer({i})]]" for i, declaration in enumerate(buffers)]
    return parameters + [f"  {kind} {name} [[{name}]]" for name, kind in BUILTINS.items() if name in source]
