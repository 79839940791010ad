"""How the kernels in metal/ are reached on an NVIDIA GPU: their text in CUDA, launched by mx.fast.cuda_kernel.

The Metal text is the only one. `translate` puts cuda/prelude.cuh in front of it, which defines what Metal has and CUDA
has not, and changes the text by these rules, in this order:

  1. `threadgroup T name[..];` at the start of a line of the body, a variable: `__shared__`.
  2. The address spaces `device`, `constant`, `thread` and `threadgroup` go: CUDA's pointers know none.
  3. Of functions that became equal by that (overloads for two address spaces) the first stays.
  4. `_Pragma("clang loop unroll(full)")` and `(disable)` become `_Pragma("unroll")` and `_Pragma("unroll 1")`.
  5. A number of type half, `1.65625h`, becomes `half(1.65625f)`.

Attention gets __launch_bounds__, which say how many registers the compiler may use (`launch_bounds`).

What is left over of Metal then is an error that names its line: an attribute, a pragma of clang, an #include, a
function or a position (`simd_...`, `..._in_grid`) that the prelude does not define.
"""

import functools
import math
import re
from typing import Any, Callable, Mapping, Optional, Sequence

import mlx.core as mx

from .attend_launch import FEW_SUMS, AttendTuning
from .device import multiprocessors
from .kernel_backend import KernelBackend
from .kernel_names import kernel_maker
from .sides import BackendError
from .sources import cuda_prelude

NAMES_TYPES = 0, 32, 2  # MLX that tells kernels apart by the types of their inputs
SIMDGROUP = 32
MULTIPROCESSORS = 132  # of an H100: where the driver does not tell
# Warps of attention on a multiprocessor of 65,536 registers: 128 registers a thread, 255 with many sums
WARPS, WARPS_MANY_SUMS = 16, 8
MOST_BLOCKS = 65_535  # along y or z of a grid

SHARED = re.compile(r"^(\s*)threadgroup (?=\w+ \w+\[)", re.M)
ADDRESS_SPACE = re.compile(r"\b(?:device|constant|thread|threadgroup)\b *")
# MLX writes the kernel's first line, and leaves no room for bounds in it
BOUNDED = "#undef __global__\n#define __global__ __attribute__((global)) __launch_bounds__({}, {})\n"
HALF = re.compile(r"(?<![\w.])(\d+\.\d*|\.\d+|\d+)h\b")
PRAGMAS = {
    '_Pragma("clang loop unroll(full)")': '_Pragma("unroll")',
    '_Pragma("clang loop unroll(disable)")': '_Pragma("unroll 1")',
}
# What no rule knows, and why. Names of Metal's own functions and positions are compared with the prelude.
UNKNOWN = {
    r"\[\[": "an attribute",
    r"#\s*(?:include|import)\b": "an #include",
    r"clang": "a pragma of clang",
    r"\bmetal\s*::|\bnamespace\s+metal\b": "Metal's namespace",
    r"\b(?:kernel|vertex|fragment|threadgroup_imageblock|ray_data|object_data)\b": "a word of Metal",
}
OF_METAL = re.compile(
    r"\b(?:(?:simd|quad|simdgroup|quadgroup|threadgroup|atomic|as|dispatch|mem|fast|precise|metal)_\w+"
    r"|(?:fast|precise)::\w+|\w+_(?:in|per)_(?:grid|threadgroup|simdgroup|quadgroup)|grid_size|grid_origin|thread_execution_width)\b"
)


class CudaBackend(KernelBackend):
    """The kernels in metal/ on this machine's NVIDIA GPU."""

    def __init__(
        self,
        cuda_kernel: Optional[Callable[..., Any]] = None,
        tuned: Optional[Mapping[tuple[int, int, int, int], AttendTuning]] = None,
    ):
        """cuda_kernel: with the arguments of mx.fast.cuda_kernel, which it takes the place of."""
        metal_kernel = functools.partial(
            metal_kernel_on_cuda, cuda_kernel or kernel_maker(mx, "cuda_kernel", NAMES_TYPES)
        )
        is_real = cuda_kernel is None and mx.cuda.is_available()
        super().__init__(metal_kernel, "cuda", "CUDA", is_real=is_real, tuned=tuned)
        n = (multiprocessors() if is_real else None) or MULTIPROCESSORS
        self.tuning = AttendTuning(
            tokens_per_block=64, simdgroups_per_launch=WARPS * n, simdgroups_per_launch_many_sums=WARPS_MANY_SUMS * n
        )


def metal_kernel_on_cuda(
    cuda_kernel: Callable[..., Any],
    name: str,
    input_names: list[str],
    output_names: list[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
) -> Callable[..., Any]:
    """A kernel as mx.fast.metal_kernel makes it, from the same text. What it returns takes what that takes, and raises
    BackendError for a threadgroup that is not 32 threads wide or more than 65,535 threadgroups along z."""
    header, body = translate(header, source)
    texts = input_names, output_names, body
    if not name.startswith("turbo_attend"):  # bench's ablations have longer names
        kernel = cuda_kernel(name, *texts, header, ensure_row_contiguous)

        def call(*, grid, threadgroup, **arguments):
            return kernel(**launch_arguments(name, grid, threadgroup), **arguments)

        return call
    kernels: dict[tuple[int, int], Callable[..., Any]] = {}
    seen: dict[int, tuple[Any, tuple[int, int]]] = {}  # by id of a template, which is kept: callers pass the same ones

    def call_bounded(*, grid, threadgroup, template, **arguments):
        if id(template) not in seen:
            seen[id(template)] = template, launch_bounds(template, threadgroup[1])
        bounds = seen[id(template)][1]
        if bounds not in kernels:
            kernels[bounds] = cuda_kernel(
                "{}_{}_{}".format(name, *bounds), *texts, header + BOUNDED.format(*bounds), ensure_row_contiguous
            )
        return kernels[bounds](template=template, **launch_arguments(name, grid, threadgroup), **arguments)

    return call_bounded


def launch_bounds(template: Sequence[tuple[str, Any]], simdgroups: int) -> tuple[int, int]:
    """__launch_bounds__ of attention: threads of a threadgroup, and how many of those a multiprocessor has room for:
    with few sums per lane, so many that the compiler takes no more than 128 registers."""
    values = dict(template)
    few = values["ROWS"] * values["DIMS_PER_LANE"] <= FEW_SUMS and not values["SHARED_TILES"]
    return SIMDGROUP * simdgroups, max(WARPS // simdgroups, 1) if few else 1


@functools.lru_cache(maxsize=64)  # the layers of a step launch alike
def launch_arguments(name: str, grid: tuple[int, int, int], threadgroup: tuple[int, int, int]) -> dict[str, Any]:
    """MLX's grid, in threads: Metal's threadgroups along y lie along x (prelude.cuh). Metal cuts the last threadgroup
    where the grid ends and CUDA does not: ours divide the grid, or threads would write beyond it."""
    if grid[0] != SIMDGROUP or threadgroup[0] != SIMDGROUP:
        raise BackendError(f"{name}: got a grid {grid} of threadgroups {threadgroup}, expected both {SIMDGROUP} wide")
    height, depth = math.gcd(grid[1], threadgroup[1]), math.gcd(grid[2], threadgroup[2])
    if grid[2] // depth > MOST_BLOCKS:
        raise BackendError(f"{name}: got {grid[2]} threadgroups along z, CUDA allows {MOST_BLOCKS}")
    return dict(grid=(SIMDGROUP * (grid[1] // height), height, grid[2]), threadgroup=(SIMDGROUP, height, depth))


@functools.lru_cache(maxsize=None)
def translate(header: str, body: str) -> tuple[str, str]:
    """(header, body) of a Metal kernel, without comments, for mx.fast.cuda_kernel.

    Raises BackendError, naming the line, for a construct that no rule knows."""
    prelude, positions = cuda_prelude()
    header, body = (_checked(text, prelude + positions) for text in (header, body))
    header = "".join(_once(_definitions(_without_metal(header))))
    body = _without_metal(SHARED.sub(r"\1__shared__ ", body))
    return f"{prelude}{header}}}  // namespace turbo\n", positions + body


def _checked(text: str, prelude: str) -> str:
    """The text with CUDA's pragmas. Raises BackendError for what no rule knows."""
    for metal, cuda in PRAGMAS.items():
        text = text.replace(metal, cuda)
    for line in text.splitlines():
        for pattern, what in UNKNOWN.items():
            if re.search(pattern, line):
                raise BackendError(f"metal/ in CUDA: no rule of backends/cuda.py for {what}: {line}")
        for name in OF_METAL.findall(line):
            if not re.search(rf"\b{name.rpartition(':')[2]}\b", prelude):
                raise BackendError(f"metal/ in CUDA: cuda/prelude.cuh does not define {name}: {line}")
    return text


def _without_metal(text: str) -> str:
    text = ADDRESS_SPACE.sub("", text)
    return HALF.sub(lambda m: f"half({m[1] if '.' in m[1] else m[1] + '.0'}f)", text)


def _definitions(text: str) -> list[str]:
    """The text in pieces: each ends behind a function, or what else stands between braces at the outermost level."""
    pieces, start, depth = [], 0, 0
    for m in re.finditer(r"[{}]", text):
        depth += 1 if m[0] == "{" else -1
        if depth == 0:
            pieces.append(text[start : m.end()])
            start = m.end()
    return [*pieces, text[start:]]


def _once(pieces: list[str]) -> list[str]:
    seen, kept = set(), []
    for piece in pieces:
        function = piece.lstrip(";\n ")
        if function.endswith("}") and function in seen:
            continue
        seen.add(function)
        kept.append(piece)
    return kept
