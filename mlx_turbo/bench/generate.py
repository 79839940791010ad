"""`bench generate`: speed and memory of a model's generation with each of several caches, by context length.

The caches take turns: a round runs each of them once, in an order that rotates. Prompt and generation are timed as
mlx-lm times them: until the first token, and the tokens after it. Before anything is timed every cache is compared with
the uncompressed one: how far the next token's distribution moves, over a few decode steps with the same tokens. That
may hide a fault, a model's next token depending little on what is far away; so attention over what our caches then hold
is also compared with the oracle.
"""

import importlib
import time
from collections.abc import Callable, Mapping
from typing import Any, Optional

import mlx.core as mx
import numpy as np

from ..cli.common import cache_nbytes
from ..integration.prompt_cache import describe, flatten_caches, make_prompt_cache, reports
from ..quality import metrics
from ..quality.baselines import MLX_LM_BITS, MLX_LM_GROUP_SIZE, check_products, make_plain_cache
from ..quant.scheme import TurboConfig
from . import contenders, timing
from .rows import Row

CHECK_TOKENS = 8
WRONG_NATS = 1.0  # a KL divergence beyond is no compression but a fault: turbo2 moves the embedded model by 0.01


def make_cache(model: Any, kv: str, config: Optional[TurboConfig]) -> tuple[list[Any], dict[str, Any]]:
    """(prompt cache, options of mlx_lm.generate.generate_step). kv: "none", "mlx8", "mlx4" or a scheme's name; config:
    the TurboConfig of a scheme, else None."""
    if config is not None:
        return make_prompt_cache(model, config), {}
    if kv not in MLX_LM_BITS:
        return make_plain_cache(model), {}
    check_products()
    options = {"kv_bits": MLX_LM_BITS[kv], "kv_group_size": MLX_LM_GROUP_SIZE, "quantized_kv_start": 0}
    return make_plain_cache(model), options


def run_once(model: Any, prompt: mx.array, n_tokens: int, kv: str, config: Optional[TurboConfig]) -> Row:
    """One generation of n_tokens after `prompt` (token ids): speeds in tokens/s, and bytes."""
    generate_step = importlib.import_module("mlx_lm.generate").generate_step
    mx.clear_cache()
    mx.reset_peak_memory()
    cache, options = make_cache(model, kv, config)
    start = time.perf_counter()
    stamps = []
    for _ in generate_step(prompt, model, max_tokens=n_tokens, prompt_cache=cache, **options):
        stamps.append(time.perf_counter())
    out = {
        "prompt_tps": prompt.size / (stamps[0] - start),
        "generation_tps": (len(stamps) - 1) / (stamps[-1] - stamps[0]),
        "peak_bytes": mx.get_peak_memory(),
        "resident_bytes": mx.get_active_memory(),
    }
    return out | {"cache_bytes": sum(cache_nbytes(c) for c in flatten_caches(cache))}


def decode_steps(
    model: Any, prompt: mx.array, forced: Optional[list[mx.array]], kv: str, config: Optional[TurboConfig]
) -> tuple[mx.array, list[mx.array], list[Any]]:
    """(log probabilities [CHECK_TOKENS, vocabulary] of decode steps after `prompt`, their tokens, the prompt cache).
    forced: the tokens, or None to take the likeliest."""
    generate = importlib.import_module("mlx_lm.generate")
    cache, options = make_cache(model, kv, config)
    quantize = {k: options[k] for k in ("quantized_kv_start", "kv_group_size", "kv_bits")} if options else None
    logits: Any = None
    tokens, rows = [], []
    for at in range(0, prompt.size, 512):
        logits = model(prompt[None, at : at + 512], cache=cache)[:, -1]
        if quantize:
            generate.maybe_quantize_kv_cache(cache, **quantize)
        mx.eval(logits, [c.state for c in cache])
    for i in range(CHECK_TOKENS):
        token = logits.argmax(-1) if forced is None else forced[i]
        tokens.append(token)
        logits = model(token[None], cache=cache)[:, -1]
        if quantize:
            generate.maybe_quantize_kv_cache(cache, **quantize)
        rows.append(metrics.log_probabilities(logits))
        mx.eval(rows[-1])
    return mx.concatenate(rows), tokens, cache


def attention_problem(prompt_cache: list[Any]) -> Optional[str]:
    """What is wrong with attention over the first, middle and last compressed layer, or None. To exact ones MLX's own
    attends."""
    ours = [(i, cache) for i, cache, report, _ in reports(prompt_cache) if report and report["scheme"] != "turbo0"]
    for i, cache in dict([ours[0], ours[len(ours) // 2], ours[-1]]).items() if ours else ():
        problem = contenders.check_cache(cache)[2]
        if problem:
            return f"attention over what layer {i} holds disagrees with the oracle: {problem}"
    return None


def check(model: Any, prompt: mx.array, caches: Mapping[str, Optional[TurboConfig]]) -> dict[str, Row]:
    """{kv: {"status", "kld" or "problem", "layers"}} of {kv: config}: decode steps against the uncompressed cache."""
    try:
        want, forced, _ = decode_steps(model, prompt, None, "none", None)
    except Exception as e:  # out of memory at this context, for example: shorter ones are still worth having
        failed = f"there is nothing to compare with, the uncompressed cache fails: {type(e).__name__}: {e}"
        return {kv: {"status": "failed", "problem": failed} for kv in caches}
    out: dict[str, Row] = {}
    for kv, config in caches.items():
        try:
            got, _, cache = decode_steps(model, prompt, forced, kv, config)
            kld = float(metrics.kl_divergence(want, got).mean())
            problem = attention_problem(cache)
        except Exception as e:  # a kernel may fail in any way, a model may not support a cache: the others go on
            out[kv] = contenders.failure(e)
            continue
        if not kld <= WRONG_NATS:  # also NaN
            problem = (
                f"the next token's distribution is {kld:.2f} nats from the uncompressed cache's, beyond "
                f"{WRONG_NATS:g} something computes wrong"
            )
        out[kv] = {
            "status": "wrong" if problem else "ok",
            "kld": kld if np.isfinite(kld) else None,
            "layers": describe(cache) if config else None,
        }
        if problem:
            out[kv]["problem"] = problem
    return out


def measure(
    model: Any,
    tokens: list[int],
    contexts: tuple[int, ...],
    n_tokens: int,
    caches: Mapping[str, Optional[TurboConfig]],
    rounds: int,
    progress: Optional[Callable[[], Any]] = None,
) -> list[Row]:
    """Rows by context and cache. tokens: ids of a long text. caches: {name: TurboConfig or None}, "none" first."""
    rows: list[Row] = []
    for context in contexts:
        prompt = mx.array((tokens * (context // len(tokens) + 1))[:context])
        checked = check(model, prompt, caches)
        names = [kv for kv in caches if checked[kv]["status"] == "ok"]
        runs: dict[str, list[Row]] = {kv: [] for kv in names}
        start = time.perf_counter()

        def run(kv: str, n: int) -> Optional[Row]:
            # a cache that fails, out of memory for example, has no speed; the others go on
            try:
                return run_once(model, prompt, n, kv, caches[kv])
            except Exception as e:
                checked[kv] |= {"status": "failed", "problem": f"while it was timed: {type(e).__name__}: {e}"}
                del runs[kv]
                return None

        while "none" in runs and time.perf_counter() - start < timing.WARM_UP_SECONDS:
            run("none", min(n_tokens, 4))
        for i in range(rounds):
            shift = i % len(names) if names else 0
            for kv in names[shift:] + names[:shift]:
                if kv in runs and (found := run(kv, n_tokens)):
                    runs[kv].append(found)
                if progress:
                    progress()
        for kv in caches:
            row: Row = {"context": context, "generated": n_tokens, "name": kv, "n": rounds, **checked[kv]}
            for what in ("prompt_tps", "generation_tps") if kv in runs else ():
                rates = [run[what] for run in runs[kv]]
                low, row[what], high = (float(x) for x in np.percentile(rates, (25, 50, 75)))
                row[f"{what}_quartiles"] = [low, high]
                if "none" in runs:  # of the same round: what slows both does not count
                    ratios = [rate / base[what] for rate, base in zip(rates, runs["none"])]
                    row[f"{what}_ratio"] = float(np.median(ratios))
            for what in ("peak_bytes", "resident_bytes", "cache_bytes") if kv in runs else ():
                row[what] = max(run[what] for run in runs[kv])
            rows.append(row)
    return rows
