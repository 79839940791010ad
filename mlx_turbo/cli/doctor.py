"""`mlx-turbo doctor`: what is installed, which backend runs, and whether its kernels agree with the reference."""

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from ..backends import select
from ..backends.attend import attend_sides
from ..backends.attend_launch import SEGMENT_STEP
from ..backends.select import get_backend
from ..backends.self_test import (
    attend_tolerance,
    compare_quantized,
    compare_statistics,
    compare_vectors,
    packed_side,
    random_array,
    random_cached_side,
    reference_rows,
    relative_error,
    restored_tokens,
    rope_logits,
    to_float64,
    too_large,
)
from ..backends.sides import ONE_SEGMENT, BackendError, CachedSide, QuantizeSide, RopePart
from ..cache.view import KVView
from ..integration import attention
from ..quant import reference
from ..quant.scheme import PACKED_BITS
from .common import Parser, print_message
from .provenance import machine

HEAD_DIMS = (32, 64, 72, 80, 96, 112, 128, 160, 192, 256, 512, 576)
ATTEND_HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256, 512)
# two sides in one launch: ((head_dim, bits, has mean), ...); 192/128 and 512/64 are keys and values of MLA models
PAIRS = (
    ((128, 4, False), (128, 4, False)),
    ((128, 8, True), (128, 4, False)),
    ((64, 3, False), (64, 2, True)),
    ((192, 8, False), (128, 4, True)),
    ((512, 4, True), (64, 2, False)),
    ((80, 4, False), (80, 3, False)),
)
# bits of keys and values: all pairs, but 5 and 6 bits each beside itself, the other and some
SCHEMES = (
    *((k, v) for k in (0, 2, 3, 4, 8) for v in (0, 2, 3, 4, 8) if k or v),
    *((5, 5), (6, 6), (6, 5), (5, 6), (8, 6), (8, 5), (6, 4), (5, 3), (4, 5), (0, 6), (5, 0)),
)
BATCH, N_KV_HEADS = 2, 3
# bits of latents, heads, dtype
LATENTS = ((8, 16, mx.float16), (3, 2, mx.float32), (4, 128, mx.float16), (0, 20, mx.bfloat16), (6, 4, mx.bfloat16))
ONE_LAUNCH, TWO_LAUNCHES = 90, 1100  # tokens, sink and recent included, for which attention takes one launch or two


class Check(NamedTuple):
    """One launch to compare with the reference. sides: one or two of (head_dim, bits, has mean)."""

    operation: str
    sides: tuple[tuple[int, int, bool], ...]
    dtype: mx.Dtype
    n_tokens: int

    @property
    def group(self) -> str:
        """The line of the summary that counts this check."""
        sides = "keys and values, " if len(self.sides) == 2 else ""
        return f"{self.operation}, {sides}{dtype_name(self.dtype)}"

    def __str__(self) -> str:
        sides = " and ".join(f"head_dim {d}, {b} bits{', mean' if m else ''}" for d, b, m in self.sides)
        return f"{self.operation} {sides}, {dtype_name(self.dtype)}, {self.n_tokens} tokens"


class RequantizeCheck(NamedTuple):
    """Packed rows of `bits` with `fewer`, to compare with the reference."""

    head_dim: int
    bits: int
    fewer: int

    @property
    def group(self) -> str:
        """The line of the summary that counts this check."""
        return "requantize"

    def __str__(self) -> str:
        return f"requantize head_dim {self.head_dim}, {self.bits} to {self.fewer} bits"


class AttendCheck(NamedTuple):
    """Attention over one cache to compare with the reference. keys, values: (bits, head_dim). n_tokens: 4 sink, the
    packed ones, 20 recent. mask: None, "causal", "boolean" or "additive". means: packed tokens are centered. rope:
    (bits, head_dim) of RoPE keys beside latents, which are keys and values; None: keys and values are two."""

    keys: tuple[int, int]
    values: tuple[int, int]
    heads_per_kv_head: int
    n_queries: int
    n_tokens: int
    mask: str | None
    sinks: bool
    means: bool
    dtype: mx.Dtype
    rope: tuple[int, int] | None = None

    @property
    def group(self) -> str:
        """The line of the summary that counts this check."""
        return f"attend, {'latents, ' if self.rope else ''}{dtype_name(self.dtype)}"

    def __str__(self) -> str:
        names = ("latents", "RoPE keys") if self.rope else ("keys", "values")
        sides = " and ".join(
            f"{name} of head_dim {d}, {b} bits" for name, (b, d) in zip(names, (self.keys, self.rope or self.values))
        )
        return (
            f"attend {sides}, {self.heads_per_kv_head} heads per kv head, {self.n_queries} query tokens, "
            f"{self.n_tokens} tokens, mask {self.mask}, sinks {self.sinks}, means {self.means}, "
            f"{dtype_name(self.dtype)}"
        )


class StatisticsCheck(NamedTuple):
    """Sums by segment to compare with the reference. segment: tokens that share a mean."""

    head_dim: int
    segment: int
    dtype: mx.Dtype
    n_tokens: int

    @property
    def group(self) -> str:
        """The line of the summary that counts this check."""
        return f"statistics, {dtype_name(self.dtype)}"

    def __str__(self) -> str:
        of = "one segment" if self.segment == ONE_SEGMENT else f"segments of {self.segment}"
        return f"statistics head_dim {self.head_dim}, {of}, {dtype_name(self.dtype)}, {self.n_tokens} tokens"


def dtype_name(dtype: mx.Dtype) -> str:
    """ "float16", not "mlx.core.float16"."""
    return str(dtype).removeprefix("mlx.core.")


class Model(NamedTuple):
    """What a widely used model asks of the kernels: its heads as published, and key bits that `auto` may choose.

    n_tokens: for one launch or for two. means: keys and values are centered. n_drafts: the number of draft tokens
    verified in one step."""

    names: str
    head_dim: int
    heads_per_kv_head: int
    dtype: mx.Dtype
    key_bits: int
    n_tokens: int
    means: bool = False
    n_drafts: int = 0
    sinks: bool = False


# Each head_dim with keys at 4 and 8 bits and exact ones; values have 4 bits, as in turbo4, turbo8v4 and auto. 5 and 6
# bits are left to --all. docs/compiling.md lists them.
MODELS = (
    Model("Llama 3 8B, Mistral 7B", 128, 4, mx.float16, 4, ONE_LAUNCH),
    Model("Qwen3 8B", 128, 4, mx.bfloat16, 4, TWO_LAUNCHES, n_drafts=3),
    Model("Llama 3 70B, Qwen3 32B", 128, 8, mx.float16, 8, TWO_LAUNCHES, means=True),
    Model("Qwen3 30B-A3B", 128, 8, mx.bfloat16, 0, ONE_LAUNCH),
    Model("Gemma 3 4B and 12B", 256, 2, mx.bfloat16, 4, ONE_LAUNCH),
    Model("Qwen3.5 35B-A3B, Qwen3-Next 80B-A3B", 256, 8, mx.bfloat16, 8, TWO_LAUNCHES),
    Model("Gemma 3 1B", 256, 4, mx.float16, 0, TWO_LAUNCHES),
    Model("gpt-oss 20b and 120b", 64, 8, mx.bfloat16, 4, TWO_LAUNCHES, sinks=True),
    Model("Llama 3.2 1B", 64, 4, mx.float16, 8, ONE_LAUNCH),
    Model("Qwen2.5 0.5B", 64, 7, mx.bfloat16, 0, ONE_LAUNCH, means=True),
)


AnyCheck = Check | RequantizeCheck | AttendCheck | StatisticsCheck


def quick_checks() -> list[AnyCheck]:
    """What MODELS need: packing, restoring, and decode attention with one launch and with two."""
    checks: list[AnyCheck] = []
    for model in MODELS:
        bits = [b for b in (model.key_bits, 4) if b]
        packed = tuple((model.head_dim, b, model.means) for b in bits)
        # keys with means are packed alone, by segment (cache/centering.py); their rows are restored without the means
        checks += [
            Check("quantize", sides, model.dtype, 37)
            for sides in (((side,) for side in packed) if model.means else (packed,))
        ]
        checks += [
            StatisticsCheck(model.head_dim, segment, model.dtype, 300) for segment in (SEGMENT_STEP, ONE_SEGMENT)
        ]
        checks.append(Check("dequantize", tuple((model.head_dim, b, False) for b in bits), model.dtype, 37))
        sides = (model.key_bits, model.head_dim), (4, model.head_dim)
        checks += [
            AttendCheck(
                *sides,
                model.heads_per_kv_head,
                n_queries,
                model.n_tokens,
                "causal",
                model.sinks,
                model.means,
                model.dtype,
            )
            for n_queries in sorted({1, 1 + model.n_drafts})
        ]
    checks.append(_latent_check(4, 16, mx.bfloat16))  # of DeepSeek V3, Kimi K2, GLM 4.7 Flash
    return list(dict.fromkeys(checks))


def _latent_check(bits: int, heads: int, dtype: mx.Dtype, n_tokens: int = TWO_LAUNCHES) -> AttendCheck:
    return AttendCheck((bits, 512), (bits, 512), heads, 1, n_tokens, None, False, False, dtype, (min(bits or 4, 4), 64))


def all_checks() -> list[AnyCheck]:
    """The quick ones, then every kernel."""
    packing: list[AnyCheck] = [*_packing_checks(), *_requantize_checks(), *_statistics_checks()]
    return list(dict.fromkeys([*quick_checks(), *packing, *_attention_checks()]))


def _statistics_checks() -> list[StatisticsCheck]:
    """Every head_dim in bfloat16, all dtypes at 64 and 128."""
    kinds = [(d, mx.bfloat16) for d in HEAD_DIMS] + [(d, t) for d in (64, 128) for t in (mx.float16, mx.float32)]
    return [StatisticsCheck(d, s, dtype, 300) for d, dtype in kinds for s in (SEGMENT_STEP, ONE_SEGMENT)]


def _requantize_checks() -> list[RequantizeCheck]:
    """Each bit width to each lower one at head_dim 128; one of these at the others."""
    steps = [(a, b) for a in PACKED_BITS for b in PACKED_BITS if a > b]
    others = [RequantizeCheck(d, *steps[4 * i % len(steps)]) for i, d in enumerate(HEAD_DIMS)]
    return list(dict.fromkeys([*(RequantizeCheck(128, *step) for step in steps), *others]))


def _packing_checks() -> list[Check]:
    """Every head_dim and bit width in bfloat16; all dtypes at 64 and 128, with and without mean; two sides."""
    checks = []
    for operation in ("quantize", "dequantize"):
        single = [
            (d, b, (i + j) % 2 == 0, mx.bfloat16) for i, d in enumerate(HEAD_DIMS) for j, b in enumerate(PACKED_BITS)
        ]
        single += [
            (d, b, mean, dtype)
            for d in (64, 128)
            for b in PACKED_BITS
            for dtype in (mx.float16, mx.float32)
            for mean in (False, True)
        ]
        # 1 token: decoding; 37: not a multiple of any tile
        checks += [
            Check(operation, ((d, b, mean),), dtype, 1 if i % 5 == 0 else 37)
            for i, (d, b, mean, dtype) in enumerate(single)
        ]
        checks += [Check(operation, pair, dtype, 37) for pair in PAIRS for dtype in (mx.bfloat16, mx.float32)]
    return checks


def _attention_checks() -> list[AttendCheck]:
    """Every head_dim with three schemes, those of SCHEMES at 64 and 128. Short caches take one launch, long ones two; a
    prompt chunk of 40 tokens goes tile by tile."""
    checks = []
    masks, groups = (None, "causal", "boolean", "additive"), (1, 4, 8, 5, 2)
    combinations = [(bits, (d, d)) for d in ATTEND_HEAD_DIMS for bits in ((4, 4), (8, 4), (3, 2))]
    combinations += [((k, v), (d, d)) for d in (64, 128) for k, v in SCHEMES]
    combinations += [((4, 4), (192, 128)), ((8, 4), (64, 256))]
    for i, ((k_bits, v_bits), (k_dim, v_dim)) in enumerate(combinations):
        checks.append(
            AttendCheck(
                (k_bits, k_dim),
                (v_bits, v_dim),
                groups[i % 5],
                (1, 3, 40)[i % 3],
                TWO_LAUNCHES if i % 6 == 3 else ONE_LAUNCH,
                masks[i % 4],
                i % 3 == 1,
                i // 4 % 2 == 1,
                (mx.bfloat16, mx.float16, mx.float32)[i % 7 % 3],
            )
        )
    # many rows, which share decoded tiles; queries are in threadgroup memory or, from 48 rows on, in device memory
    for keys, values, heads, n_queries in (
        ((4, 128), (4, 128), 4, 6),
        ((8, 128), (4, 128), 8, 16),
        ((3, 256), (2, 256), 4, 16),
        ((4, 576), (4, 512), 16, 2),
    ):
        checks.append(AttendCheck(keys, values, heads, n_queries, ONE_LAUNCH, "causal", False, True, mx.bfloat16))
    return [*checks, *(_latent_check(b, g, d, ONE_LAUNCH) for b, g, d in LATENTS)]


def _vectors(rng: np.random.Generator, n_tokens: int, head_dim: int) -> np.ndarray:
    """Like a model's keys, float32 [B, H, n_tokens, head_dim]: some large dims. The last vector is zero."""
    x = rng.standard_normal((BATCH, N_KV_HEADS, n_tokens, head_dim))
    x[..., :: head_dim // 4] *= 20
    x[-1, -1, -1] = 0
    return x.astype(np.float32)


def _mean(rng: np.random.Generator, head_dim: int, has_mean: bool) -> np.ndarray | None:
    return rng.standard_normal((BATCH, N_KV_HEADS, 1, head_dim)).astype(np.float32) if has_mean else None


def _run_attend_check(check: AttendCheck, backend: Any) -> tuple[str | None, float]:
    rng, counts = np.random.default_rng(0), (4, check.n_tokens - 24, 20)
    keys, values = (
        random_cached_side(rng, (1, 2, head_dim), counts, bits, check.dtype, check.means * segment)
        for (bits, head_dim), segment in ((check.keys, SEGMENT_STEP), (check.values, ONE_SEGMENT))
    )
    shape = (1, 2 * check.heads_per_kv_head, check.n_queries)
    queries = random_array(rng, (*shape, check.keys[1]), check.dtype)
    mask: str | np.ndarray | None = check.mask
    if check.rope:
        return _run_latent_check(check, backend, queries, keys, counts, rng)
    if mask == "boolean":
        mask = rng.random((1, 1, check.n_queries, check.n_tokens)) < 0.7
    elif mask == "additive":
        mask = rng.standard_normal((1, shape[1], check.n_queries, check.n_tokens)).astype(np.float32)
    sinks = None
    if check.sinks:
        sinks = np.array(mx.array(rng.standard_normal(shape[1])).astype(check.dtype).astype(mx.float32))
    options = dict(scale=check.keys[1] ** -0.5)
    got = attention.attend(
        queries,
        KVView(keys, values, counts, 0, None, 0),
        backend=backend,
        **options,
        mask=mask if mask is None or isinstance(mask, str) else mx.array(mask),
        sinks=None if sinks is None else mx.array(sinks).astype(check.dtype),
    )
    restored = (restored_tokens(side, counts) for side in (keys, values))
    want = reference.attention(to_float64(queries), *restored, mask=mask, sinks=sinks, **options)
    error = relative_error(to_float64(got), want)
    fused = not backend.why_not_fused(check.keys, check.values, check.n_queries)
    return too_large(error, attend_tolerance(check.dtype, check.n_queries, fused)), error


def _run_latent_check(
    check: AttendCheck,
    backend: Any,
    queries: mx.array,
    latents: CachedSide,
    counts: tuple[int, int, int],
    rng: np.random.Generator,
) -> tuple[str | None, float]:
    assert check.rope is not None
    bits, head_dim = check.rope
    keys = random_cached_side(rng, (1, 2, head_dim), counts, bits, check.dtype)
    rope = RopePart(random_array(rng, (*queries.shape[:3], head_dim), check.dtype), keys)
    options = dict(scale=check.keys[1] ** -0.5)
    got = attend_sides(queries, latents, latents, counts, backend=backend, rope=rope, **options)
    restored, added = restored_tokens(latents, counts), rope_logits(rope, counts)
    want = reference.attention(to_float64(queries), restored, restored, mask=added, **options)
    error = relative_error(to_float64(got), want)
    fused = not backend.why_not_fused(check.keys, check.keys, check.n_queries)
    return too_large(error, attend_tolerance(check.dtype, check.n_queries, fused)), error


def run_check(check: AnyCheck, backend: Any) -> tuple[str | None, float]:
    """(what is wrong or None, the largest relative error) of one check. Raises what the backend raises.

    The error is that of the sums for statistics (relative to the largest of a head), of the scales for quantize and
    requantize, of the vectors (relative to their largest number) for dequantize, of the output (likewise) for attend.
    """
    if isinstance(check, AttendCheck):
        return _run_attend_check(check, backend)
    if isinstance(check, StatisticsCheck):
        return _run_statistics_check(check, backend)
    if isinstance(check, RequantizeCheck):
        return _run_requantize_check(check, backend)
    run = _run_quantize_check if check.operation == "quantize" else _run_dequantize_check
    problems, worst = run(check, backend)
    return next(filter(None, problems), None), worst


def _run_statistics_check(check: StatisticsCheck, backend: Any) -> tuple[str | None, float]:
    rng, first = np.random.default_rng(0), 37
    x = mx.array(_vectors(rng, check.n_tokens, check.head_dim).swapaxes(1, 2)).astype(check.dtype).swapaxes(1, 2)
    sums, energy = backend.statistics(x, first, check.segment)
    return compare_statistics(to_float64(sums), to_float64(energy), to_float64(x), first, check.segment)


def _run_quantize_check(check: Check, backend: Any) -> tuple[Sequence[str | None], float]:
    rng, seed = np.random.default_rng(0), len(check.sides) - 1
    sides, wants, problems, worst = [], [], [], 0.0
    for head_dim, bits, has_mean in check.sides:
        # as a model's projection leaves them: [B, L, H, D] in memory
        x = mx.array(_vectors(rng, check.n_tokens, head_dim).swapaxes(1, 2))
        x = x.astype(check.dtype).swapaxes(1, 2)
        mean = _mean(rng, head_dim, has_mean)
        sides.append(QuantizeSide(x, bits, None if mean is None else mx.array(mean)))
        wants.append(reference_rows(sides[-1], seed))
    for (codes, scale), want in zip(backend.quantize(sides, seed), wants, strict=True):
        codes, scale = np.array(codes), np.array(scale)
        problems.append(compare_quantized(codes, scale, want))
        error = np.abs(scale[..., 0].astype(np.float64) - want.scale) / np.maximum(want.scale, 1e-30)
        worst = max(worst, float(error.max()))
    return problems, worst


def _run_requantize_check(check: RequantizeCheck, backend: Any) -> tuple[str | None, float]:
    rows = reference.quantize(_vectors(np.random.default_rng(0), 37, check.head_dim), check.bits)
    want = reference.requantize(rows, check.fewer)
    codes, scale = map(np.array, backend.requantize(packed_side(rows), check.fewer))
    error = np.abs(scale[..., 0].astype(np.float64) - want.scale) / np.maximum(want.scale, 1e-30)
    return compare_quantized(codes, scale, want), float(error.max())


def _run_dequantize_check(check: Check, backend: Any) -> tuple[Sequence[str | None], float]:
    rng, seed = np.random.default_rng(0), len(check.sides) - 1
    sides, wants, worst = [], [], 0.0
    problems: list[str | None] = []
    first = 3  # row of a buffer with spare room, as in a cache
    for head_dim, bits, has_mean in check.sides:
        x = _vectors(rng, check.n_tokens + first + 2, head_dim)
        rows = reference.quantize(x, bits, rotation=seed, mean=_mean(rng, head_dim, has_mean))
        wants.append(reference.dequantize(rows)[:, :, first : first + check.n_tokens])
        sides.append(packed_side(rows))
    outs = backend.dequantize(sides, first, check.n_tokens, check.dtype, seed)
    for got, want in zip(outs, wants, strict=True):
        if got.dtype != check.dtype:
            problems.append(f"got {got.dtype}, expected {check.dtype}")
        got = np.array(got.astype(mx.float32))
        problems.append(compare_vectors(got, want, check.dtype))
        error = np.abs(got - want).max(-1) / np.maximum(np.abs(want).max(-1), 1e-30)
        worst = max(worst, float(error.max()))
    return problems, worst


def _why(choice: str | None) -> str:
    if choice:
        return f"--backend {choice}"
    if os.environ.get("MLX_TURBO_BACKEND"):
        return f"MLX_TURBO_BACKEND={os.environ['MLX_TURBO_BACKEND']}"
    return select.why_default()


# ---- the command -------------------------------------------------------------------------------------------
def _build_parser() -> Parser:
    parser = Parser(
        prog="mlx-turbo doctor",
        description="Print versions, device and backend, build the kernels that widely used models need, and compare "
        "each with the NumPy reference. The exit code is 1 if a kernel disagrees or does not build.",
    )
    parser.add_argument("--all", action="store_true", help="check every kernel (over 300, takes minutes)")
    parser.add_argument("--backend", choices=select.BACKENDS, help="backend to check (default: the one in use)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument("--verbose", action="store_true", help="print a line for every check")
    return parser


def _examine(
    checks: Sequence[AnyCheck], backend: Any, say: Callable[..., None], verbose: bool
) -> tuple[dict[str, dict[str, Any]], list[tuple[str, str]]]:
    """Run the checks. Returns groups (name -> {"checks", "failed", "worst"}) and [(check, problem)]."""
    groups: dict[str, dict[str, Any]] = {}
    failures: list[tuple[str, str]] = []
    # None: on a terminal only
    for check in tqdm(checks, "building and checking", unit="kernel", leave=False, disable=verbose or None):
        try:
            problem, worst = run_check(check, backend)
        except Exception as e:  # a kernel may fail in any way; the rest must still be checked
            problem, worst = str(e) if isinstance(e, BackendError) else f"{type(e).__name__}: {e}", 0.0
        group = groups.setdefault(check.group, {"checks": 0, "failed": 0, "worst": 0.0})
        group["checks"] += 1
        group["worst"] = max(group["worst"], worst if math.isfinite(worst) else math.inf)
        if problem:
            group["failed"] += 1
            failures.append((str(check), problem))
        if verbose:
            say(f"  {'FAILED' if problem else 'ok':<7}{check}  {worst:.1e}")
    return groups, failures


def _say_failures(failures: list[tuple[str, str]], say: Callable[..., None]) -> None:
    """Each failed check by name; a compiler message shared by several is printed once."""
    by_detail: dict[str, list[tuple[str, str]]] = {}
    for check, problem in failures:
        head, _, detail = problem.partition("\n")
        by_detail.setdefault(detail, []).append((check, head))
    for detail, failed in by_detail.items():
        for check, head in failed:
            say(f"FAILED  {check}: {head}")
        if detail:
            say(detail)


def _verdict(n_failed: int, n_checks: int, n_all: int, with_all: bool, where: str) -> str:
    if n_failed:
        return (
            f"NOT OK: {n_failed} of {max(n_checks, 1)} checks ({n_all} with --all) failed on {where}. Please report "
            "this with the output above."
        )
    if with_all:
        return f"OK: all {n_checks} checks agree with the reference on {where}"
    return (
        f"OK: {n_checks} of {n_all} checks agree with the reference on {where} (what widely used models need; --all "
        "also runs the rest)"
    )


def _print_json(report: dict[str, Any]) -> None:
    for group in report["groups"].values():
        group["worst"] = group["worst"] if math.isfinite(group["worst"]) else None  # JSON has no infinity
    print(json.dumps(report, indent=2))


def main(argv: Sequence[str] | None = None, backend: Any = None) -> int:
    """Run the command; returns its exit code. backend: the object to check instead of the backend in use."""
    args = _build_parser().parse_args(argv)
    tic = time.perf_counter()

    def say(line: str = "") -> None:
        if not args.json:
            print(line, flush=True)

    facts = machine()
    for name, value in facts.items():
        say(f"{name}: {value}")
    why = "passed by the caller" if backend else _why(args.backend)
    warnings: list[str] = []
    groups: dict[str, dict[str, Any]] = {}
    failures: list[tuple[str, str]] = []
    try:
        backend = backend or get_backend(args.backend)
    except BackendError as e:
        failures = [("backend", str(e))]
    description = backend.describe() if backend else "none"
    say(f"backend: {description}, because: {why}")
    if backend:
        for gpu, title in select.GPUS.items():
            if getattr(mx, gpu).is_available() and backend.name != gpu:
                warnings.append(f"THIS MACHINE HAS {title.upper()}, BUT IT IS NOT USED: {why}")
        if not mx.cuda.is_available() and (problem := select.overwritten()):
            warnings.append(problem)
    for warning in warnings:
        say(f"\n*** {warning} ***")
        print_message(f"warning: {warning}")
    say()
    checks, n_all = (all_checks() if args.all else quick_checks()), len(all_checks())
    if backend:
        groups, failures = _examine(checks, backend, say, args.verbose)
    for name, group in groups.items():
        verdict = f"{group['failed']} FAILED" if group["failed"] else "ok"
        say(f"{name:<38}{group['checks']:>4} checks  {verdict:<10} worst relative error {group['worst']:.1e}")
    _say_failures(failures, say)
    n_checks, seconds = sum(g["checks"] for g in groups.values()), time.perf_counter() - tic
    if args.json:
        _print_json(
            {
                "ok": not failures,
                "machine": facts,
                "warnings": warnings,
                "seconds": round(seconds, 3),
                "backend": {"name": getattr(backend, "name", None), "description": description, "why": why},
                "checks": n_checks,
                "checks_with_all": n_all,
                "groups": groups,
                "failures": [{"check": check, "problem": problem} for check, problem in failures],
            }
        )
    say("\n" + _verdict(len(failures), n_checks, n_all, args.all, f"{description}, {seconds:.1f} s"))
    for warning in warnings if not failures else ():
        say(f"*** {warning} ***")
    return 1 if failures else 0
