"""Names for kernels that stand for one text each, where MLX does not see to that."""

import functools
import re
from types import ModuleType
from typing import Any, Callable


def kernel_maker(mlx: ModuleType, name: str, since: tuple[int, int, int]) -> Callable[..., Any]:
    """mlx.fast.<name>, with the types of a call in the names of its kernels if the module `mlx` is older than `since`.

    There MLX names a kernel by its template values only, though its text depends on the types of inputs and outputs
    too. Metal (before 0.32.0, ml-explore/mlx#3662) forgets the pipeline of the one text when it meets the other, which
    commands that wait may still use; CUDA (before 0.32.2, ml-explore/mlx#4273) launches the wrong one.
    """
    version = tuple(int(n) for n in re.findall(r"\d+", mlx.__version__)[:3])
    maker = getattr(mlx.fast, name)
    return maker if version >= since else functools.partial(_named_by_types, maker)


def _named_by_types(maker: Callable[..., Any], name: str, *texts: Any, **options: Any) -> Callable[..., Any]:
    kernels: dict[Any, Callable[..., Any]] = {}

    def call(*, inputs, output_dtypes, **arguments):
        # MLX passes arrays without dims and those of less than 8 elements in other ways
        types = tuple((a.dtype, a.ndim == 0, a.size < 8) for a in inputs), tuple(output_dtypes)
        if types not in kernels:
            kinds = [(dtype, "s" * scalar + "c" * small) for dtype, scalar, small in types[0]]
            suffix = "_".join(
                str(dtype).removeprefix("mlx.core.") + how
                for dtype, how in [*kinds, *((dtype, "") for dtype in types[1])]
            )
            kernels[types] = maker(f"{name}_{suffix}", *texts, **options)
        return kernels[types](inputs=inputs, output_dtypes=output_dtypes, **arguments)

    return call
