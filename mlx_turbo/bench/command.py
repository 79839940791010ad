"""`mlx-turbo bench`: what ran, how fast, how right, and where the time goes.

    mlx-turbo bench kernels                 quantize, dequantize and attention, ours and MLX's
    mlx-turbo bench kernels --ablate        the attention kernel with one stage taken out at a time
    mlx-turbo bench kernels --tune          the launch parameters this chip likes, kept for later
    mlx-turbo bench generate --kv none mlx4 turbo4
    mlx-turbo bench compare A.json B.json

Exit codes: 0 done, 1 something failed or computed something wrong, 2 wrong input.
"""

import contextlib
import importlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Optional

import mlx.core as mx

from ..backends import select, tuning
from ..backends.attend_launch import MAX_QUERY_TOKENS, attend_unsupported
from ..backends.kernel_backend import KernelBackend
from ..backends.sides import BackendError
from ..cli.common import DEMO_MODEL, AnyPrices, CliError, Parser, for_model, kv_config, load_model
from ..quality.baselines import MLX_LM_BITS
from . import contenders, stages, timing
from .common import (
    LEAST_TOKENS,
    QUICK,
    SCHEMES,
    add_numbers,
    check_output,
    chosen_backends,
    chosen_schemes,
    chosen_sizes,
    describe_backend,
    finish,
    make_parser,
    progress_bar,
)
from .compare import compare
from .generate import measure as measure_generation
from .rows import Row
from .tables import print_generate, print_kernels
from .tune import scheme_contenders, tune_kernels


# ---- kernels ---------------------------------------------------------------------------------------------------
def _kernels_parser() -> Parser:
    parser = make_parser(
        "kernels",
        "Quantize, dequantize and the attention of one decode step and of a prompt chunk on every available backend, "
        "beside MLX's own. Everything is compared with the NumPy oracle; what is wrong is "
        "reported as wrong and not ranked.",
    )
    add_numbers(parser, "--tokens", "1024 4096 16384, on a GPU also 65536", "tokens in the cache")
    add_numbers(parser, "--head-dim", "128, on a GPU also 64 and 256", "numbers per head")
    add_numbers(parser, "--gqa", "4, on a GPU also 1 and 8", "query heads per kv head; there are 8 kv heads")
    add_numbers(
        parser, "--query-tokens", "1", f"query tokens of the step, at most {MAX_QUERY_TOKENS}: a draft has several"
    )
    add_numbers(parser, "--past", "2048 on the CPU, on a GPU also 32768 and 98304", "tokens before a prompt chunk")
    add = parser.add_argument
    add("--chunk", type=int, metavar="N", help="tokens of a prompt chunk (default: 2048 on a GPU, 256 on the CPU)")
    add("--kv", nargs="+", metavar="SCHEME", help=f"schemes to measure (default: {' '.join(SCHEMES)})")
    add(
        "--dtype",
        choices=["float16", "bfloat16", "float32"],
        help="dtype of what is not packed (default: float16 on a GPU, float32 on the CPU, where float16 is slow)",
    )
    add("--backend", choices=select.BACKENDS, help="measure only this one (default: all that are available)")
    add("--ablate", action="store_true", help="also time the attention kernel with one stage taken out (GPUs only)")
    add("--tune", action="store_true", help="first find this chip's best launch parameters and keep them (GPUs only)")
    return parser


def kernels(argv: Sequence[str], backends: Optional[list[Any]] = None) -> int:
    """`mlx-turbo bench kernels`. backends: those to measure instead of the machine's."""
    args = _kernels_parser().parse_args(argv)
    check_output(args)
    schemes = chosen_schemes(args.kv or SCHEMES[: 1 if args.quick else None])
    backends = backends or chosen_backends(args.backend)
    gpu = next((b for b in backends if isinstance(b, KernelBackend)), None)
    on_gpu = gpu is not None and gpu.is_real
    for flag in ("ablate", "tune"):
        if getattr(args, flag) and gpu is None:
            reason = "only the CPU fallback was asked for" if args.backend == "cpu" else select.why_default()
            raise BackendError(f"--{flag}: is about the kernels on a GPU, but {reason}")
    if args.tune and on_gpu:
        try:
            tuning.check_path()
        except OSError as e:
            raise CliError(f"--tune: cannot keep what it finds in {str(tuning.path())!r}: {e.strerror}") from e
    grid = contenders.Grid(
        chosen_sizes(args, "tokens", (1024, 4096, 16384, 65536)[: 4 if on_gpu else 3], (256, 1024), LEAST_TOKENS),
        chosen_sizes(args, "head_dim", (64, 128, 256) if on_gpu else (128,), (128,), 32),
        chosen_sizes(args, "gqa", (1, 4, 8) if on_gpu else (4,), (4,), 1),
        schemes,
        getattr(mx, args.dtype or ("float16" if on_gpu else "float32")),
        chosen_sizes(args, "query_tokens", (1,), (1,), 1, MAX_QUERY_TOKENS),
        chosen_sizes(args, "past", (2048, 32768, 98304)[: 3 if on_gpu else 1], (512,), LEAST_TOKENS),
        args.chunk if args.chunk is not None else 64 if args.quick else 2048 if on_gpu else 256,
    )
    if grid.chunk <= MAX_QUERY_TOKENS:
        raise CliError(f"--chunk: got {grid.chunk}, allowed are whole numbers from {MAX_QUERY_TOKENS + 1} on")
    for head_dim in grid.head_dims:
        if why := attend_unsupported(4, 4, head_dim, head_dim, 1):
            raise CliError(f"--head-dim: {why}")
    effort = QUICK if args.quick else timing.Effort()
    described = "; ".join(describe_backend(b) for b in backends)
    device = "gpu" if on_gpu else "cpu"
    with contextlib.nullcontext() if on_gpu else mx.stream(mx.cpu):
        document = timing.header("kernels", ["kernels", *argv], described)
        document["measured"] = timing.measure_machine(
            gpu if on_gpu else None, effort, (64 if args.quick else 256) << 20
        )
        document["effort"] = effort._asdict()
        if args.tune and gpu:
            document["tuning"] = tune_kernels(grid, gpu, device, effort)
        document["rows"] = _measure_kernels(grid, backends, device, effort, document["measured"]["copy_gb_per_s"])
        if args.ablate and gpu:
            document["ablation"] = ablate(grid, gpu, device, effort)
    return finish(document, args, print_kernels)


def _measure_kernels(
    grid: contenders.Grid, backends: list[Any], device: str, effort: timing.Effort, bandwidth: float
) -> list[Row]:
    rows: list[Row] = []
    with progress_bar(contenders.n_groups(grid), "group") as bar:
        for facts, group in contenders.groups(grid, backends, device):
            bar.set_description(f"{facts['operation']}, {facts['tokens']} tokens")
            rows += contenders.measure(group, effort, facts, bandwidth)
            bar.update()
    return rows


def ablate(grid: contenders.Grid, gpu: KernelBackend, device: str, effort: timing.Effort) -> list[Row]:
    """Rows {scheme, head_dim, gqa, tokens, seconds: {stage: s}, verdict} at the longest context; "problem" in the place
    of the last two where a stage does not run."""
    rows: list[Row] = []
    head_dim, n_tokens = grid.head_dims[0], max(grid.tokens)
    for scheme in grid.schemes:
        gqa = next((g for g in sorted(grid.gqa, reverse=True) if stages.covers(gpu, scheme, head_dim, g)), 1)
        ablated = [stages.AblatedBackend(stage, gpu) for stage in stages.STAGES]
        (runs,) = scheme_contenders(
            grid._replace(gqa=(gqa,), query_tokens=(1,)), ablated, scheme, n_tokens, head_dim, device
        )
        row: Row = {
            "scheme": scheme.name,
            "head_dim": head_dim,
            "gqa": gqa,
            "tokens": n_tokens,
            "column": contenders.column_of(gpu),
        }
        rows.append(row)
        try:
            timings = timing.interleave(
                {stage: contenders.timed(c) for stage, c in zip(stages.STAGES, runs, strict=True)}, effort
            )
        except (RuntimeError, ValueError) as e:  # what was measured before must not be lost
            row["problem"] = f"{type(e).__name__}: {e}"
            continue
        row["seconds"] = {stage: t.median for stage, t in timings.items()}
        row["verdict"] = (
            stages.verdict(row["seconds"]) if gpu.is_real else "Times of the simulator say nothing about a GPU."
        )
    return rows


# ---- generate --------------------------------------------------------------------------------------------------
def _generate_parser() -> Parser:
    parser = make_parser(
        "generate",
        "Prompt and generation speed and memory of a model with each of several KV caches, by "
        "context length. The caches take turns; ratios are to the uncompressed one in the "
        "same round.",
    )
    add = parser.add_argument
    add("--model", help="a local folder or a Hugging Face id (default: the embedded demo model)")
    add(
        "--kv",
        nargs="+",
        metavar="CACHE",
        help="none (uncompressed), mlx8 and mlx4 (mlx-lm's own) and schemes (default: none mlx8 mlx4 turbo4 turbo8v4)",
    )
    add_numbers(parser, "--context", "512 2048, on a GPU also 8192 and 32768", "tokens of the prompt")
    add("--tokens", type=int, metavar="N", help="number of tokens to generate (default: 128)")
    add("--rounds", type=int, metavar="N", help="number of runs of each cache (default: 5)")
    add("--backend", choices=select.BACKENDS, help="what runs our caches (default: the GPU's if there is one)")
    add("--kv-sink", type=int, metavar="N", help="number of leading tokens kept exact")
    add("--kv-recent", type=int, metavar="N", help="minimum number of newest tokens kept exact")
    return parser


def generate(argv: Sequence[str], backends: Optional[list[Any]] = None) -> int:
    """`mlx-turbo bench generate`. backends: a list of the one to measure instead of the machine's."""
    args = _generate_parser().parse_args(argv)
    check_output(args)
    names = list(
        dict.fromkeys(["none", *(args.kv or (["turbo4"] if args.quick else ["mlx8", "mlx4", "turbo4", "turbo8v4"]))])
    )
    try:
        caches = {kv: None if kv in MLX_LM_BITS else kv_config(kv, args) for kv in names}
    except CliError as e:
        quantized = f"; or {', '.join(MLX_LM_BITS)} for its quantized ones"
        raise CliError(f"{e}{quantized if str(e).startswith('--kv:') else ''}") from e
    on_gpu = select.default_name() in select.GPUS
    contexts = chosen_sizes(args, "context", (512, 2048, 8192, 32768)[: 4 if on_gpu else 2], (128, 384), 2)
    for flag, default, quick, least in (("tokens", 128, 16, 2), ("rounds", 5, 3, 1)):
        value = getattr(args, flag)
        setattr(args, flag, (quick if args.quick else default) if value is None else value)
        if getattr(args, flag) < least:
            raise CliError(f"--{flag}: got {getattr(args, flag)}, allowed are whole numbers from {least} on")
    load = importlib.import_module("mlx_lm.utils").load
    model, tokenizer = load_model(load, args.model or DEMO_MODEL, "--model")
    limit = getattr(getattr(model, "args", None), "max_position_embeddings", None)
    if limit and max(contexts) + args.tokens > limit:
        raise CliError(
            f"--context: got {max(contexts)}, and {args.tokens} generated tokens, but the model was made for {limit}"
        )
    if not on_gpu:
        model.set_dtype(mx.float32)  # 16-bit arithmetic is slow on the CPU, for every cache
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)  # a text longer than the context
    tokens = tokenizer.encode((DEMO_MODEL / "stories.txt").read_text()[:20_000])
    with select.use_backend(backends[0] if backends else args.backend) as backend:
        document = timing.header("generate", ["generate", *argv], describe_backend(backend, on_cpu=False))
        fallback = on_gpu and backend.name == "cpu"
        document |= {
            "model": (args.model or "embedded demo model").replace(str(Path.home()), "~"),
            "column": "fallback in MLX operations" if fallback else contenders.column_of(backend),
            "dtype": "float32" if not on_gpu else "the model's dtype",
            "rounds": args.rounds,
        }
        prices: AnyPrices = {}
        caches = {kv: for_model(config, model, tokenizer, prices) for kv, config in caches.items()}
        with progress_bar(len(contexts) * args.rounds * len(names), "run") as bar:
            document["rows"] = measure_generation(
                model, tokens, contexts, args.tokens, caches, args.rounds, progress=bar.update
            )
    return finish(document, args, print_generate)


BENCHMARKS: dict[str, Callable[[Sequence[str]], int]] = {"kernels": kernels, "generate": generate, "compare": compare}


def main(argv: Sequence[str]) -> int:
    """`mlx-turbo bench`; returns the exit code."""
    parser = Parser(
        prog="mlx-turbo bench",
        description="Benchmarks: kernels (quantize, dequantize, attention), "
        "generate (a model with several caches), compare (two files of --json).",
    )
    parser.add_argument("benchmark", choices=BENCHMARKS, metavar="BENCHMARK", help=", ".join(BENCHMARKS))
    if not argv or argv[0].startswith("-"):
        parser.parse_args(argv)
    name = parser.parse_args(argv[:1]).benchmark
    return BENCHMARKS[name](argv[1:])
