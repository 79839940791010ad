"""The contenders of `bench kernels`: every operation on every backend, beside MLX's own, each compared with an oracle.

Every contender is checked before it is timed; one that fails or is wrong, or that MLX has no implementation of on this
device, becomes a row that says so, without a figure.
All kv heads are compared up to ORACLE_TOKENS tokens; beyond, where the oracle takes minutes, the first and the last.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any, Callable, NamedTuple, Optional

import mlx.core as mx
import numpy as np

from ..backends import mlx_ops
from ..backends.attend_launch import SEGMENT_STEP
from ..backends.device import float32_is_tf32
from ..backends.select import GPUS
from ..backends.self_test import (
    ATTEND_TOLERANCE,
    TOLERANCE,
    attend_tolerance,
    compare_quantized,
    compare_vectors,
    relative_error,
    restored_tokens,
    to_float64,
    too_large,
)
from ..backends.sides import ONE_SEGMENT, CachedSide, PackedSide, QuantizeSide, WrongResultError
from ..cache.view import KVView
from ..integration import attention
from ..quality.baselines import NotOnThisDevice, check_products
from ..quant import reference
from ..quant.scheme import Scheme
from . import timing
from .rows import Row

N_KV_HEADS = 8
N_SINK, N_RECENT = 4, 96  # exact tokens, as a cache with its defaults has on average
COLD_BYTES = {"gpu": 256 << 20, "cpu": 32 << 20}  # calls go through this many bytes of caches, as a model's layers do
MAX_COPIES = 8
NUMPY_TOKENS = 1024  # beyond, the reference would take longer than everything else together
ORACLE_TOKENS = 4096  # beyond, two kv heads are compared with the oracle, not all
FALLBACK_TOKENS = 4096  # beyond, where a GPU is measured, the CPU fallback would take most of the time
PACK_TOKENS = 4096  # quantize and dequantize: a prompt chunk is no longer
# Largest error of MLX's own attention, relative to the largest output: 16-bit logits and weights where it is quantized.
MLX_TOLERANCE = {mx.float32: 1e-4, mx.float16: 5e-3, mx.bfloat16: 4e-2}
MLX_QUANTIZED_TOLERANCE = {mx.float32: 1e-4, mx.float16: 3e-2, mx.bfloat16: 2e-1}


def _mlx_tolerance(dtype, table=MLX_TOLERANCE):
    return table[mx.float16 if dtype == mx.float32 and float32_is_tf32() else dtype]


Checked = tuple[float, float, Optional[str]]  # error, allowed, what is wrong or None


class Contender(NamedTuple):
    """One row. run(calls): makes so many calls and returns their arrays. check(): (error, allowed, problem or None).
    nbytes: of one call's cache reads, or of all its input and output. column: what computes it, as printed."""

    name: str
    column: str
    run: timing.Run
    check: Callable[[], Checked]
    nbytes: int
    cache_bytes: Optional[int] = None
    on_cpu: bool = False  # also where MLX's default device is the GPU
    lazy: bool = True  # whether `run` only builds a graph


class Grid(NamedTuple):
    """What to measure."""

    tokens: tuple[int, ...]
    head_dims: tuple[int, ...]
    gqa: tuple[int, ...]
    schemes: tuple[Scheme, ...]
    dtype: mx.Dtype
    query_tokens: tuple[int, ...] = (1,)
    past: tuple[int, ...] = ()  # tokens before a prompt chunk of so many:
    chunk: int = 2048


def column_of(backend: Any) -> str:
    """What a backend's column is called. Only real kernels on a real GPU are called Metal or CUDA."""
    if title := GPUS.get(backend.name):
        return title if backend.is_real else f"simulated {title}"
    return {"cpu": "CPU fallback"}.get(backend.name, backend.name)


def _device(contender):
    return mx.stream(mx.cpu) if contender.on_cpu else contextlib.nullcontext()


def measure(
    contenders: Sequence[Contender], effort: timing.Effort, facts: Row, bandwidth: Optional[float] = None
) -> list[Row]:
    """Rows of the contenders of one group. facts: what they have in common. bandwidth: of a copy, GB/s, if known."""
    rows: list[Row] = []
    runs: dict[int, timing.Run] = {}
    for c in contenders:
        row = {**facts, "name": c.name, "column": c.column, "bytes": c.nbytes, "cache_bytes": c.cache_bytes}
        rows.append(row)
        try:
            with _device(c):
                error, allowed, problem = c.check()
        except Exception as e:  # a kernel may fail in any way; the others must still be measured
            row |= failure(e)
            continue
        row |= {"error": float(error) if np.isfinite(error) else None, "allowed": allowed}
        if problem:
            row |= {"status": "wrong", "problem": problem}
            continue
        row["status"] = "ok"
        runs[len(rows) - 1] = timed(c)
        if facts["operation"] == "prefill":
            row["peak_bytes"] = _peak(runs[len(rows) - 1])
    try:
        timings = timing.interleave(runs, effort) if runs else {}
    except RuntimeError as e:  # out of memory, a GPU that hangs: whose fault it was is not known
        timings = {}
        for i in runs:
            rows[i] |= {"status": "failed", "problem": f"while its group was timed: {e}"}
    for i, t in timings.items():
        gigabytes = rows[i]["bytes"] / t.median / 1e9
        rows[i] |= {
            **{f"{name}_seconds": getattr(t, name) for name in ("median", "low", "high")},
            "n": t.n,
            "calls": t.calls,
            "uncertainty": t.uncertainty,
            "python_seconds": t.python,
            "gb_per_s": gigabytes,
        }
        if bandwidth:
            rows[i]["bandwidth_share"] = gigabytes / bandwidth
    base = next((r for r in rows if r["name"] == "uncompressed" and "median_seconds" in r), None)
    for row in rows:
        if base and "median_seconds" in row:
            row["times_uncompressed"] = row["median_seconds"] / base["median_seconds"]
    return rows


def _peak(run: timing.Run) -> int:
    """Bytes that MLX takes for a call, at most, beyond what is there."""
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    out = run(1)
    if out is not None:
        mx.eval(out)
    return mx.get_peak_memory() - before


def failure(e: Exception) -> Row:
    """What a row says of an exception."""
    if isinstance(e, NotOnThisDevice):
        return {"status": "not run", "problem": str(e)}
    return {"status": "wrong" if isinstance(e, WrongResultError) else "failed", "problem": f"{type(e).__name__}: {e}"}


def timed(contender: Contender) -> timing.Run:
    """What timing.sample takes: where the graph is all that `run` builds, its evaluation is timed."""
    return contender.run if contender.lazy else functools.partial(_run_and_evaluate, contender)


def _run_and_evaluate(contender, calls):
    with _device(contender):
        out = contender.run(calls)
        if out is not None:
            mx.eval(out)


def _is_lazy(backend):
    """The fallback evaluates tiles on its way, the simulator everything."""
    return getattr(backend, "is_real", False)


# ---- data ------------------------------------------------------------------------------------------------------
def _random_rows(key, n_tokens, bits, head_dim):
    """(codes, scale) of [1, N_KV_HEADS, n_tokens]: codes drawn at random, which costs no quantizing; numbers near 1."""
    codes = mx.random.randint(0, 2**bits, (1, N_KV_HEADS, n_tokens, head_dim), key=mx.random.key(key))
    scale = mx.random.uniform(0.3, 0.9, (1, N_KV_HEADS, n_tokens, 1), key=mx.random.key(key + 1))
    out = mlx_ops.pack(codes.astype(mx.uint32), bits), scale.astype(mx.float16)
    mx.eval(out)
    return out


def _normal(key, shape, dtype):
    x = mx.random.normal(shape, key=mx.random.key(key)).astype(dtype)
    mx.eval(x)
    return x


def _checked(x, n_tokens):
    """The kv heads of x [B, n_kv_heads, *] that are compared with the oracle where there are n_tokens: a view of it."""
    return x if n_tokens <= ORACLE_TOKENS else x[:, :: max(x.shape[1] - 1, 1)]


def _checked_queries(x, n_kv_heads, n_tokens):
    """The query heads [B, heads, L, D] of those kv heads."""
    B, n_heads, L, D = x.shape
    return _checked(x.reshape(B, n_kv_heads, n_heads // n_kv_heads, L, D), n_tokens).reshape(B, -1, L, D)


def _compared(side, counts, n_tokens=None):
    """The kv heads of a `CachedSide` that are compared with the oracle, of the first batch row."""
    n_tokens = n_tokens or sum(counts)
    arrays = {
        name: _checked(array[:1], n_tokens) for name, array in side._asdict().items() if isinstance(array, mx.array)
    }
    return side._replace(**arrays)


def check_cache(cache, backend=None):
    """(error, allowed, problem or None) of attention over what a TurboKVCache holds, against the oracle. The logits are
    small, so that every token has weight."""
    view = cache.keys_and_values()[0].view
    k, v = (restored_tokens(_compared(side, view.counts), view.counts, view.seed) for side in (view.keys, view.values))
    head_dim, dtype = view.keys.head_dim, view.keys.recent.dtype
    shape = (view.keys.recent.shape[0], view.keys.recent.shape[1], 1, head_dim)
    scale = 1.0 / np.linalg.norm(k, axis=-1).mean()
    queries = _normal(6, shape, dtype)
    got = attention.attend(queries, view, scale=float(scale), backend=backend)
    got, asked = (to_float64(_checked(a[:1], sum(view.counts))) for a in (got, queries))
    want = reference.attention(asked, k, v, scale=scale)
    return _verdict(relative_error(got, want), 10 * (ATTEND_TOLERANCE + TOLERANCE[dtype]))


def _copies(arrays, device):
    """The arrays copied as often as it takes that calls find nothing in a processor's cache: a list of lists. Each copy
    fills its buffer, as a cache of mlx-lm does: on CUDA, MLX attends more slowly to one that does not, and
    would take larger buffers that are free."""
    size = sum(a.nbytes for a in arrays)
    n = min(MAX_COPIES, max(1, -(-COLD_BYTES[device] // size)))
    mx.eval(arrays)
    mx.clear_cache()
    copies = [[a + 0 for a in arrays] for _ in range(n)]
    mx.eval(copies)
    return copies


def _verdict(error, allowed):
    return error, allowed, too_large(error, allowed)


# ---- attention -------------------------------------------------------------------------------------------------
def _attend_chain(call, queries, caches):
    """run(calls): each call's output is the next one's queries, as a model's layers depend on each other."""

    def run(calls):
        q = queries
        for i in range(calls):
            q = call(q, caches[i % len(caches)])
        return q

    return run


def attention_contenders(
    grid: Grid, backends: Sequence[Any], n_tokens: int, head_dim: int, device: str
) -> dict[tuple[int, int], list[Contender]]:
    """{(gqa, query tokens): contenders} of one decode step over caches of n_tokens, the queries being the last."""
    scale, steps = head_dim**-0.5, [(g, n) for g in grid.gqa for n in grid.query_tokens]
    queries = {(g, n): 2 * _normal(5, (1, N_KV_HEADS * g, n, head_dim), grid.dtype) for g, n in steps}
    out: dict[tuple[int, int], list[Contender]] = {step: [] for step in steps}
    wants: dict[tuple[str, tuple[int, int]], np.ndarray] = {}

    def oracle(what, step, k, v):
        if (what, step) not in wants:
            asked = _checked_queries(queries[step], N_KV_HEADS, n_tokens)
            wants[what, step] = reference.attention(to_float64(asked), k(), v(), scale=scale, mask=_mask(step[1]))
        return wants[what, step]

    def check(call, cache, what, step, k, v, allowed):
        got = call(queries[step], cache)
        if got.shape != queries[step].shape:
            return np.inf, allowed, f"output of shape {got.shape}, expected {queries[step].shape}"
        got = to_float64(_checked_queries(got, N_KV_HEADS, n_tokens))
        return _verdict(relative_error(got, oracle(what, step, k, v)), allowed)

    def add(name, column, call, caches, k, v, allowed, nbytes, on_cpu=False, lazy=True):
        for step, contenders in out.items():
            contenders.append(
                Contender(
                    name,
                    column,
                    _attend_chain(call, queries[step], caches),
                    functools.partial(check, call, caches[0], name, step, k, v, allowed),
                    nbytes,
                    nbytes,
                    on_cpu,
                    lazy,
                )
            )

    # MLX's own
    dense = [_normal(i, (1, N_KV_HEADS, n_tokens, head_dim), grid.dtype) for i in (0, 1)]
    caches = _copies(dense, device)
    k, v = (functools.cache(lambda x=x: to_float64(_checked(x, n_tokens))) for x in dense)
    add(
        "uncompressed",
        f"MLX {dtype_name(grid.dtype)}",
        lambda q, kv: mx.fast.scaled_dot_product_attention(q, *kv, scale=scale, mask=_mask(q.shape[2])),
        caches,
        k,
        v,
        _mlx_tolerance(grid.dtype),
        sum(a.nbytes for a in dense),
    )
    group_size = mlx_group_size(head_dim)
    for bits in (8, 4) if group_size else ():
        affine = [a for x in dense for a in mx.quantize(x, group_size=group_size, bits=bits)]
        mx.eval(affine)
        k, v = (
            functools.cache(
                lambda x=affine[i : i + 3], bits=bits: affine_values([_checked(a, n_tokens) for a in x], bits)
            )
            for i in (0, 3)
        )
        add(
            f"mlx-lm {bits} bit",
            "mlx-lm",
            functools.partial(_mlx_lm_attend, scale, group_size, bits),
            _copies(affine, device),
            k,
            v,
            _mlx_tolerance(grid.dtype, MLX_QUANTIZED_TOLERANCE),
            sum(a.nbytes for a in affine),
        )

    # ours
    for scheme in grid.schemes:
        sides = (scheme.key_bits, scheme.value_bits)
        arrays = _our_arrays(scheme, dense)
        nbytes = sum(a.nbytes for a in arrays)
        views = [_our_view(scheme, copy, head_dim) for copy in _copies(arrays, device)]
        k, v = _restored(views[0])
        allowed = attend_tolerance(grid.dtype)
        for backend in backends:
            if device == "gpu" and backend.name == "cpu" and n_tokens > FALLBACK_TOKENS:
                continue
            add(
                scheme.name,
                column_of(backend),
                functools.partial(_attend, backend, scale),
                views,
                k,
                v,
                allowed,
                nbytes,
                backend.name == "cpu",
                _is_lazy(backend),
            )
        if n_tokens <= NUMPY_TOKENS:
            for step, contenders in out.items():
                contenders.append(_numpy_attention(scheme.name, arrays, sides, head_dim, queries[step], scale, nbytes))
    return out


def _our_arrays(scheme, dense):
    """The arrays of a cache of as many tokens as `dense` has, whose exact ones are those of `dense`."""
    arrays = []
    for x, key, bits in zip(dense, (10, 12), (scheme.key_bits, scheme.value_bits)):
        n_packed = x.shape[2] - N_SINK - N_RECENT
        arrays += [x[:, :, :N_SINK] + 0, *_random_rows(key, n_packed, bits, x.shape[3]), x[:, :, -N_RECENT:] + 0]
    mx.eval(arrays)
    return arrays


def _our_view(scheme, arrays, head_dim):
    keys, values = (
        CachedSide(*part, bits, head_dim, None, segment)
        for part, bits, segment in (
            (arrays[:4], scheme.key_bits, SEGMENT_STEP),
            (arrays[4:], scheme.value_bits, ONE_SEGMENT),
        )
    )
    return KVView(keys, values, (N_SINK, arrays[1].shape[2], N_RECENT), 0, None, 0)


def _restored(view, n_tokens=None):
    """Functions that give keys and values as the oracle sees them, of the heads that are compared."""
    return [
        functools.cache(lambda side=side: restored_tokens(_compared(side, view.counts, n_tokens), view.counts))
        for side in (view.keys, view.values)
    ]


def _mask(n_query_tokens):
    """As models give it."""
    return "causal" if n_query_tokens > 1 else None


def _attend(backend, scale, queries, view):
    return attention.attend(queries, view, scale=scale, mask=_mask(queries.shape[2]), backend=backend)


def _mlx_lm_attend(scale, group_size, bits, queries, cache):
    from mlx_lm.models.base import quantized_scaled_dot_product_attention

    check_products()
    return quantized_scaled_dot_product_attention(  # it scales the queries in place
        mx.array(queries),
        tuple(cache[:3]),
        tuple(cache[3:]),
        scale=scale,
        mask=_mask(queries.shape[2]),
        group_size=group_size,
        bits=bits,
    )


def _numpy_attention(name, arrays, bits, head_dim, queries, scale, nbytes):
    sides = []
    for i in (0, 1):
        sink, codes, scales, recent = (
            np.array(a.astype(mx.float32) if a.dtype == mx.bfloat16 else a) for a in arrays[4 * i : 4 * i + 4]
        )
        sides.append((sink, codes, scales, recent))
    q = to_float64(queries)

    def run(calls):
        for _ in range(calls):
            k, v = (
                np.concatenate(
                    [sink, reference.dequantize(reference.from_packed(codes, scales, bits[i], head_dim)), recent],
                    axis=2,
                )
                for i, (sink, codes, scales, recent) in enumerate(sides)
            )
            reference.attention(q, k, v, scale=scale, mask=_mask(q.shape[2]))

    return Contender(name, "NumPy reference", run, lambda: (0.0, 0.0, None), nbytes, nbytes, lazy=False)


# ---- a prompt chunk over a packed past -------------------------------------------------------------------------
def prefill_contenders(
    grid: Grid, backends: Sequence[Any], past: int, head_dim: int, device: str
) -> dict[int, list[Contender]]:
    """{gqa: contenders} of the attention of grid.chunk query tokens, causal, over `past` tokens before them and
    themselves. Our caches hold the chunk as they do after a model's layer has written it: packed but for its newest
    tokens. Five query tokens of the first and the last kv head are compared with the oracle."""
    n_tokens, scale = past + grid.chunk, head_dim**-0.5
    compared = np.array(sorted({0, 1, grid.chunk // 2, grid.chunk - 2, grid.chunk - 1}))
    seen = np.arange(n_tokens) <= past + compared[:, None]
    dense = [_normal(i, (1, N_KV_HEADS, n_tokens, head_dim), grid.dtype) for i in (0, 1)]
    queries = {g: 2 * _normal(5, (1, N_KV_HEADS * g, grid.chunk, head_dim), grid.dtype) for g in grid.gqa}
    out: dict[int, list[Contender]] = {g: [] for g in grid.gqa}

    def heads(x):
        return to_float64(_checked_queries(x[:, :, mx.array(compared)], N_KV_HEADS, ORACLE_TOKENS + 1))

    def check(call, cache, g, k, v, allowed):
        want = reference.attention(heads(queries[g]), k(), v(), scale=scale, mask=seen)
        return _verdict(relative_error(heads(call(queries[g], cache)), want), allowed)

    def add(name, column, call, caches, k, v, allowed, nbytes, on_cpu=False):
        for g, contenders in out.items():
            checked = functools.partial(check, call, caches[0], g, k, v, allowed)
            run = _attend_chain(call, queries[g], caches)
            # ours starts its tiles while it builds the graph: of all, Python is part of the time
            contenders.append(Contender(name, column, run, checked, nbytes, nbytes, on_cpu, lazy=False))

    k, v = (functools.cache(lambda x=x: to_float64(_checked(x, ORACLE_TOKENS + 1))) for x in dense)
    add(
        "uncompressed",
        f"MLX {dtype_name(grid.dtype)}",
        lambda q, kv: mx.fast.scaled_dot_product_attention(q, *kv, scale=scale, mask="causal"),
        _copies(dense, device),
        k,
        v,
        _mlx_tolerance(grid.dtype),
        sum(a.nbytes for a in dense),
    )
    for scheme in grid.schemes:
        arrays = _our_arrays(scheme, dense)
        views = [_our_view(scheme, copy, head_dim) for copy in _copies(arrays, device)]
        k, v = _restored(views[0], ORACLE_TOKENS + 1)
        for backend in backends:
            if device == "gpu" and backend.name == "cpu":
                continue  # it would take most of the time
            add(
                scheme.name,
                column_of(backend),
                functools.partial(_attend, backend, scale),
                views,
                k,
                v,
                attend_tolerance(grid.dtype, grid.chunk),
                sum(a.nbytes for a in arrays),
                backend.name == "cpu",
            )
    return out


# ---- quantize and dequantize -------------------------------------------------------------------------------------
def _independent(call, inputs):
    """run(calls): calls that do not depend on each other."""
    return lambda calls: [call(inputs[i % len(inputs)]) for i in range(calls)]


def packing_contenders(
    grid: Grid, backends: Sequence[Any], n_tokens: int, head_dim: int, device: str
) -> list[tuple[str, str, list[Contender]]]:
    """[(operation, scheme's name, contenders)]: keys and values of n_tokens in one call."""
    dense = _copies([_normal(i, (1, N_KV_HEADS, n_tokens, head_dim), grid.dtype) for i in (0, 1)], device)
    exact = [to_float64(_checked(x, n_tokens)) for x in dense[0]]
    dense_bytes, group_size = sum(a.nbytes for a in dense[0]), mlx_group_size(head_dim)
    out = []
    for scheme in grid.schemes:
        bits = scheme.key_bits, scheme.value_bits
        wants = [reference.quantize(x, b) for x, b in zip(exact, bits)]
        rows = _copies([a for i in (0, 1) for a in _random_rows(10 + 2 * i, n_tokens, bits[i], head_dim)], device)
        restored = []
        for i in (0, 1):
            codes, scale = (np.array(_checked(a, n_tokens)) for a in rows[0][2 * i : 2 * i + 2])
            restored.append(reference.dequantize(reference.from_packed(codes, scale, bits[i], head_dim)))
        packed_bytes = sum(a.nbytes for a in rows[0])
        quantize, dequantize = [], []
        for backend in backends:
            on_cpu, lazy = backend.name == "cpu", _is_lazy(backend)
            pack = functools.partial(_quantize, backend, bits)
            unpack = functools.partial(_dequantize, backend, bits, head_dim, n_tokens, grid.dtype)
            quantize.append(
                Contender(
                    scheme.name,
                    column_of(backend),
                    _independent(pack, dense),
                    functools.partial(_check_quantize, pack, dense[0], wants),
                    dense_bytes + packed_bytes,
                    None,
                    on_cpu,
                    lazy,
                )
            )
            dequantize.append(
                Contender(
                    scheme.name,
                    column_of(backend),
                    _independent(unpack, rows),
                    functools.partial(_check_dequantize, unpack, rows[0], restored, grid.dtype),
                    dense_bytes + packed_bytes,
                    None,
                    on_cpu,
                    lazy,
                )
            )
        if n_tokens <= NUMPY_TOKENS:
            quantize.append(_numpy_quantize(scheme.name, dense[0], bits, dense_bytes + packed_bytes))
            dequantize.append(_numpy_dequantize(scheme.name, rows[0], bits, head_dim, dense_bytes + packed_bytes))
        if group_size:
            affine = [
                [a for x, b in zip(copy, bits) for a in mx.quantize(x, group_size=group_size, bits=b)] for copy in dense
            ]
            mx.eval(affine)
            affine_bytes = sum(a.nbytes for a in affine[0])
            name = "affine " + "/".join(str(b) for b in dict.fromkeys(bits)) + " bit"
            pack = functools.partial(_affine_quantize, bits, group_size)
            unpack = functools.partial(_affine_dequantize, bits, group_size)
            quantize.append(
                Contender(
                    name,
                    "mx.quantize",
                    _independent(pack, dense),
                    functools.partial(_check_affine_quantize, pack, dense[0], exact, bits, grid.dtype),
                    dense_bytes + affine_bytes,
                )
            )
            dequantize.append(
                Contender(
                    name,
                    "mx.dequantize",
                    _independent(unpack, affine),
                    functools.partial(_check_affine_dequantize, unpack, affine[0], bits, grid.dtype),
                    dense_bytes + affine_bytes,
                )
            )
        out += [("quantize", scheme.name, quantize), ("dequantize", scheme.name, dequantize)]
    return out


def _quantize(backend, bits, xs):
    return backend.quantize([QuantizeSide(x, b) for x, b in zip(xs, bits)])


def _dequantize(backend, bits, head_dim, n_tokens, dtype, rows):
    sides = [PackedSide(*rows[2 * i : 2 * i + 2], bits[i], head_dim) for i in (0, 1)]
    return backend.dequantize(sides, 0, n_tokens, dtype)


def _check_quantize(call, xs, wants):
    """The error is that of the scales, where no code is another because of a tie: that moves the scale, too."""
    worst, problems = 0.0, []
    for (codes, scale), want in zip(call(xs), wants, strict=True):
        codes, scale = (np.array(_checked(a, codes.shape[2])) for a in (codes, scale))
        problems.append(compare_quantized(codes, scale, want))
        equal = (reference.unpack(codes, want.bits, want.codes.shape[-1]) == want.codes).all(-1)
        error = np.abs(scale[..., 0].astype(np.float64) - want.scale)[equal]
        worst = max(worst, float(error.max(initial=0.0) / want.scale.max()))
    return worst, 1e-3, next(filter(None, problems), None)


def _check_dequantize(call, rows, wants, dtype):
    worst, problems = 0.0, []
    for got, want in zip(call(rows), wants, strict=True):
        got = to_float64(_checked(got, got.shape[2]))
        problems.append(compare_vectors(got, want, dtype))
        worst = max(worst, relative_error(got, want))
    return worst, TOLERANCE[dtype], next(filter(None, problems), None)


def _numpy_quantize(name, xs, bits, nbytes):
    xs = [to_float64(x) for x in xs]

    def run(calls):
        for _ in range(calls):
            for x, b in zip(xs, bits):
                reference.quantize(x, b).packed()

    return Contender(name, "NumPy reference", run, lambda: (0.0, 0.0, None), nbytes, lazy=False)


def _numpy_dequantize(name, rows, bits, head_dim, nbytes):
    rows = [np.array(a) for a in rows]

    def run(calls):
        for _ in range(calls):
            for i in (0, 1):
                reference.dequantize(reference.from_packed(*rows[2 * i : 2 * i + 2], bits[i], head_dim))

    return Contender(name, "NumPy reference", run, lambda: (0.0, 0.0, None), nbytes, lazy=False)


# ---- MLX's affine quantization -----------------------------------------------------------------------------------
def mlx_group_size(head_dim: int) -> Optional[int]:
    """mlx-lm's default, or the largest that divides head_dim; None if mx.quantize cannot do it."""
    return next((g for g in (64, 32) if head_dim % g == 0), None)


def affine_values(quantized: Sequence[mx.array], bits: int) -> np.ndarray:
    """float64 numbers of what mx.quantize returned (words, scales, biases): codes as a stream of bits, lowest first."""
    words = np.array(quantized[0])
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1, bitorder="little")
    codes = stream.reshape(*words.shape[:-1], -1, bits) @ (1 << np.arange(bits))
    scales, biases = (to_float64(a)[..., None] for a in quantized[1:])
    groups = codes.reshape(*scales.shape[:-1], -1)
    return (groups * scales + biases).reshape(codes.shape)


def _affine_quantize(bits, group_size, xs):
    return [mx.quantize(x, group_size=group_size, bits=b) for x, b in zip(xs, bits)]


def _affine_dequantize(bits, group_size, arrays):
    return [mx.dequantize(*arrays[3 * i : 3 * i + 3], group_size=group_size, bits=bits[i]) for i in (0, 1)]


def _check_affine_quantize(call, xs, exact, bits, dtype):
    """Every number within its step: rounding moves it by half of one, by the rest MLX's choice of the step; and what
    rounding the step to its dtype adds over all steps."""
    worst, allowed = 0.0, 1.1 + 2 ** max(bits) * {mx.float32: 0, mx.float16: 2**-11, mx.bfloat16: 2**-8}[dtype]
    for arrays, want, b in zip(call(xs), exact, bits, strict=True):
        words, scales, biases = (_checked(a, a.shape[2]) for a in arrays)
        step = np.abs(to_float64(scales))[..., None]
        error = np.abs(affine_values((words, scales, biases), b) - want).reshape(*step.shape[:-1], -1)
        worst = max(worst, float((error / step).max()))
    return worst, allowed, None if worst <= allowed else f"off by {worst:.1f} steps, allowed are {allowed:.1f}"


def _check_affine_dequantize(call, arrays, bits, dtype):
    worst = 0.0
    for i, got in enumerate(call(arrays)):
        want = affine_values([_checked(a, a.shape[2]) for a in arrays[3 * i : 3 * i + 3]], bits[i])
        worst = max(worst, relative_error(to_float64(_checked(got, got.shape[2])), want))
    return _verdict(worst, 2 * TOLERANCE[dtype])


def dtype_name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def groups(grid: Grid, backends: Sequence[Any], device: str) -> Iterator[tuple[Row, list[Contender]]]:
    """Yields (facts, contenders) of every group that is measured together, in the order of the report."""
    for head_dim in grid.head_dims:
        for n_tokens in grid.tokens:
            common = {"head_dim": head_dim, "kv_heads": N_KV_HEADS, "tokens": n_tokens, "dtype": dtype_name(grid.dtype)}
            for (g, n), contenders in attention_contenders(grid, backends, n_tokens, head_dim, device).items():
                yield {"operation": "attention", "gqa": g, "query_tokens": n, "scheme": None, **common}, contenders
            if n_tokens <= max(PACK_TOKENS, min(grid.tokens)):
                for operation, scheme, contenders in packing_contenders(grid, backends, n_tokens, head_dim, device):
                    yield (
                        {"operation": operation, "gqa": None, "query_tokens": None, "scheme": scheme, **common},
                        contenders,
                    )

        for past in grid.past:
            common |= {"operation": "prefill", "query_tokens": grid.chunk, "scheme": None, "tokens": past}
            for g, contenders in prefill_contenders(grid, backends, past, head_dim, device).items():
                yield {"gqa": g, **common}, contenders


def n_groups(grid: Grid) -> int:
    """How many groups `groups` yields."""
    packing = [n for n in grid.tokens if n <= max(PACK_TOKENS, min(grid.tokens))]
    return len(grid.head_dims) * (
        len(grid.tokens) * len(grid.gqa) * len(grid.query_tokens)
        + len(packing) * 2 * len(grid.schemes)
        + len(grid.past) * len(grid.gqa)
    )
