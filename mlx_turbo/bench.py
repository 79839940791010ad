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
import json
import logging
import math
import sys
import textwrap
from pathlib import Path

import mlx.core as mx
import numpy as np

from . import ablation, bench_kernels, bench_plots, ops, plots, timing, tuning
from .cli import DEMO_MODEL, CliError, Parser, _one_line, kv_config, load_model
from .kernels import MAX_QUERY_TOKENS, BackendError, MetalBackend, attend_unsupported
from .ops import get_backend
from .scheme import TurboConfig

LEAST_TOKENS = bench_kernels.N_SINK + bench_kernels.N_RECENT + 28  # 128: exact ones and a few packed ones
SCHEMES = ("turbo4", "turbo3", "turbo2", "turbo8v4")
QUICK = timing.Effort(least=5, most=8, seconds=0.3)


# ---- the command -----------------------------------------------------------------------------------------------
def _parser(name, description):
    parser = Parser(prog=f"mlx-turbo bench {name}", description=description)
    if name != "compare":
        parser.add_argument("--quick", action="store_true", help="within a minute: small sizes, few repeats")
        parser.add_argument("--html", metavar="FILE", help="write the plots and the table as one page")
        parser.add_argument("--png", metavar="FILE", help="write the plots")
    parser.add_argument("--json", action="store_true", help="JSON on standard output, and nothing else there")
    return parser


def _numbers(parser, flag, default, what):
    parser.add_argument(flag, type=int, nargs="+", metavar="N", help=f"{what} (default: {default})")


def _check_output(args):
    """Before anything is measured: whether the plots can be written."""
    for flag in ("html", "png"):
        if file := getattr(args, flag):
            try:
                plots.check_plot(file, f".{flag}")
            except plots.PlotError as e:
                raise CliError(f"--{flag}: {e}") from e


def _chosen(args, name, default, quick, least, most=None):
    values = getattr(args, name) or (quick if args.quick else default)
    for value in values:
        if value < least or most and value > most:
            raise CliError(f"--{name.replace('_', '-')}: got {value}, allowed are whole numbers from {least} "
                           + (f"to {most}" if most else "on"))
    return tuple(dict.fromkeys(values))


def _progress(total, unit):
    from tqdm import tqdm

    return tqdm(total=total, unit=unit, file=sys.stderr, disable=None, leave=False)


def finish(document, args, print_tables):
    """Write what was asked for; returns the exit code."""
    bad = [r for r in document["rows"] if r["status"] != "ok"]
    document["power_after"] = timing.power()
    if args.json:
        print(json.dumps(document, indent=1, allow_nan=False))
    else:
        print_tables(document)
        for name, said in document["power"].items():
            print(f"{name}: {said}")
        print(f"Reproduce: {document['command']} (commit {document['commit'] or 'unknown, an installed package'})\n"
              "The same with --json > bench.json gives the file to attach to an issue (template: benchmark).")
    # launch parameters may be too much for a chip: that they fail is no fault, but to compute something wrong is one
    bad_tunings = [row for row in document.get("tuning", ())
                   if "values" not in row or "wrong" in [left_out["status"] for left_out in row["left_out"]]]
    bad_stages = [row for row in document.get("ablation", ()) if "problem" in row]
    complain([f"{row['status'].upper()}: {describe_row(row)}: {row['problem']}" for row in bad]
             + [f"{left_out['status'].upper()}: {describe_tuning(row, left_out)}: {left_out['problem']}"
                for row in document.get("tuning", ()) for left_out in row["left_out"]]
             + [f"FAILED: stages of {row['scheme']}: {row['problem']}" for row in bad_stages])
    for flag in ("html", "png"):  # last: on a disk that is full nothing else is lost
        if file := getattr(args, flag):
            try:
                bench_plots.write(document, flag, file)
            except OSError as e:
                raise CliError(f"--{flag}: cannot write {file!r}: {e.strerror}") from e
    return 1 if bad or bad_tunings or bad_stages else 0


def complain(lines):
    for line in lines:
        print(f"mlx-turbo: {line}", file=sys.stderr)


def describe_tuning(row, left_out):
    """The name of launch parameters that were tried and are not ranked."""
    return f"tuning {row['scheme']}, head_dim {row['head_dim']}, {left_out['changes']}"


def describe_row(row):
    """A row's name in a sentence."""
    if "context" in row:
        return f"{row['name']} at {row['context']} tokens"
    gqa = f", GQA {row['gqa']}" if row["gqa"] else ""
    where = f"head_dim {row['head_dim']}{gqa}, {_queries(row)}{row['tokens']} tokens"
    return f"{row['operation']} {row['name']} by {row['column']} ({where})"


def _queries(row):
    """For a name: how many query tokens, where there are several."""
    n = row["query_tokens"] or 1
    return f"{n} query tokens, " if n > 1 else ""


# ---- kernels ---------------------------------------------------------------------------------------------------
def _kernels_parser():
    parser = _parser("kernels", "Quantize, dequantize and the attention of one decode step on every backend there is, "
                                "beside MLX's own. Everything is compared with the NumPy oracle; what is wrong is "
                                "reported as wrong and not ranked.")
    _numbers(parser, "--tokens", "1024 4096 16384, on Metal also 65536", "tokens in the cache")
    _numbers(parser, "--head-dim", "128, on Metal also 64 and 256", "numbers per head")
    _numbers(parser, "--gqa", "4, on Metal also 1 and 8", "query heads per kv head; there are 8 kv heads")
    _numbers(parser, "--query-tokens", "1", f"of the step, {MAX_QUERY_TOKENS} at most: a draft to verify has several")
    add = parser.add_argument
    add("--kv", nargs="+", metavar="SCHEME", help=f"(default: {' '.join(SCHEMES)})")
    add("--dtype", choices=["float16", "bfloat16", "float32"],
        help="of what is not packed (default: float16 on Metal, float32 on the CPU, where float16 is slow)")
    add("--backend", choices=["metal", "cpu"], help="this one only (default: all that there are)")
    add("--ablate", action="store_true", help="also time the attention kernel with one stage taken out (Metal only)")
    add("--tune", action="store_true", help="first find this chip's best launch parameters and keep them (Metal only)")
    return parser


def _backends(choice):
    if choice:
        return [get_backend(choice)]
    return [get_backend(name) for name in ("metal", "cpu") if name == "cpu" or not ops.metal_unavailable()]


def _describe(backend, on_cpu=True):
    """on_cpu: the CPU fallback runs on the CPU, also where MLX's default device is the GPU."""
    with mx.stream(mx.cpu) if on_cpu and backend.name == "cpu" else contextlib.nullcontext():
        described = backend.describe()
    return f"simulated {described}" if bench_kernels.column_of(backend).startswith("simulated") else described


def _schemes(names):
    out = []
    for name in dict.fromkeys(names):
        try:
            scheme = TurboConfig.of(name).scheme
        except ValueError:
            scheme = None
        if scheme is None or not scheme.key_bits or not scheme.value_bits or name == "auto":
            raise CliError(f"--kv: got {name!r}, allowed are schemes that pack keys and values: turboN and turboKvV "
                           "with N, K, V in (2, 3, 4, 8), for example turbo4, turbo8v4")
        out.append(scheme)
    return tuple(out)


def kernels(argv, backends=None):
    """`mlx-turbo bench kernels`. backends: those to measure instead of the machine's."""
    args = _kernels_parser().parse_args(argv)
    _check_output(args)
    schemes = _schemes(args.kv or SCHEMES[:1 if args.quick else None])
    backends = backends or _backends(args.backend)
    on_metal = any(isinstance(b, MetalBackend) and b.is_real for b in backends)
    metal = next((b for b in backends if isinstance(b, MetalBackend)), None)
    for flag in ("ablate", "tune"):
        if getattr(args, flag) and metal is None:
            raise BackendError(f"--{flag}: is about the Metal kernel, but "
                               f"{ops.metal_unavailable() or 'only the CPU fallback was asked for'}")
    if args.tune and on_metal:
        try:
            tuning.check_path()
        except OSError as e:
            raise CliError(f"--tune: cannot keep what it finds in {str(tuning.path())!r}: {e.strerror}") from e
    grid = bench_kernels.Grid(
        _chosen(args, "tokens", (1024, 4096, 16384, 65536)[:4 if on_metal else 3], (256, 1024), LEAST_TOKENS),
        _chosen(args, "head_dim", (64, 128, 256) if on_metal else (128,), (128,), 32),
        _chosen(args, "gqa", (1, 4, 8) if on_metal else (4,), (4,), 1), schemes,
        getattr(mx, args.dtype or ("float16" if on_metal else "float32")),
        _chosen(args, "query_tokens", (1,), (1,), 1, MAX_QUERY_TOKENS))
    for head_dim in grid.head_dims:
        if why := attend_unsupported(4, 4, head_dim, head_dim, 1):
            raise CliError(f"--head-dim: {why}")
    effort = QUICK if args.quick else timing.Effort()
    described = "; ".join(_describe(b) for b in backends)
    device = "gpu" if on_metal else "cpu"
    with contextlib.nullcontext() if on_metal else mx.stream(mx.cpu):
        document = timing.header("kernels", ["kernels", *argv], described)
        document["measured"] = timing.measure_machine(on_metal, effort, (64 if args.quick else 256) << 20)
        document["effort"] = effort._asdict()
        if args.tune:
            document["tuning"] = _tune(grid, metal, device, effort)
        document["rows"] = _measure_kernels(grid, backends, device, effort, document["measured"]["copy_gb_per_s"])
        if args.ablate:
            document["ablation"] = ablate(grid, metal, device, effort)
    return finish(document, args, print_kernels)


def _measure_kernels(grid, backends, device, effort, bandwidth):
    rows = []
    with _progress(bench_kernels.n_groups(grid), "group") as bar:
        for facts, contenders in bench_kernels.groups(grid, backends, device):
            bar.set_description(f"{facts['operation']}, {facts['tokens']} tokens")
            rows += bench_kernels.measure(contenders, effort, facts, bandwidth)
            bar.update()
    return rows


def _attend_contenders(grid, backends, scheme, n_tokens, head_dim, device):
    """[[Contender of each backend] for each GQA factor and number of query tokens of the grid] of one scheme's
    attention."""
    groups = bench_kernels.attention_contenders(grid._replace(schemes=(scheme,)), backends, n_tokens, head_dim, device)
    return [[c for c in contenders if c.name == scheme.name and c.column != "NumPy reference"]
            for contenders in groups.values()]


def ablate(grid, metal, device, effort):
    """Rows {scheme, head_dim, gqa, tokens, seconds: {stage: s}, verdict} at the longest context; "problem" in the place
    of the last two where a stage does not run."""
    rows, head_dim, n_tokens = [], grid.head_dims[0], max(grid.tokens)
    for scheme in grid.schemes:
        gqa = next((g for g in sorted(grid.gqa, reverse=True)
                    if ablation.covers(metal, scheme, head_dim, g)), 1)
        stages = [ablation.AblatedBackend(stage, metal) for stage in ablation.STAGES]
        runs, = _attend_contenders(grid._replace(gqa=(gqa,), query_tokens=(1,)), stages, scheme, n_tokens, head_dim,
                                   device)
        row = {"scheme": scheme.name, "head_dim": head_dim, "gqa": gqa, "tokens": n_tokens,
               "column": bench_kernels.column_of(metal)}
        rows.append(row)
        try:
            timings = timing.interleave({stage: bench_kernels.timed(c) for stage, c in zip(ablation.STAGES, runs,
                                                                                            strict=True)}, effort)
        except (RuntimeError, ValueError) as e:  # what was measured before must not be lost
            row["problem"] = f"{type(e).__name__}: {e}"
            continue
        row["seconds"] = {stage: t.median for stage, t in timings.items()}
        row["verdict"] = (ablation.verdict(row["seconds"]) if metal.is_real else
                          "Times of the simulator say nothing about a GPU.")
    return rows


def _tune(grid, metal, device, effort):
    """Find, keep and use the best tuning of each scheme and head dim. Returns rows for the document."""
    rows, tuned = [], {}
    grid = grid._replace(tokens=tuple(dict.fromkeys((grid.tokens[0], grid.tokens[len(grid.tokens) // 2]))))
    quick = effort._replace(most=effort.least, seconds=0.2)
    with _progress(len(grid.schemes) * len(grid.head_dims) * len(tuning.CANDIDATES), "parameter") as bar:
        for scheme in grid.schemes:
            for head_dim in grid.head_dims:
                problems = {}

                def time_all(tunings):
                    seconds, found = time_tunings(grid, metal, scheme, head_dim, device, quick, tunings)
                    problems.update(found)
                    return seconds
                row = {"scheme": scheme.name, "head_dim": head_dim}
                rows.append(row)
                try:
                    best, ratio = tuning.search(time_all, progress=lambda name: bar.update())
                except ValueError:
                    if not problems:
                        raise
                    best, ratio = None, None
                row["left_out"] = [{"changes": tuning.changes(values), **bad} for values, bad in problems.items()]
                if best is not None:
                    tuned[scheme.key_bits, scheme.value_bits, head_dim, head_dim] = best
                    row |= {"values": best._asdict(), "changes": tuning.changes(best), "time_over_default": ratio}
    if metal.is_real:
        tuning.save(tuned)
    metal.tuned |= tuned
    return rows


def time_tunings(grid, metal, scheme, head_dim, device, effort, tunings):
    """([geometric mean of the seconds over the grid's contexts, GQA factors and query tokens, or None where a tuning is
    wrong or does not run], {tuning: {"status", "problem"}} of those)."""
    backends, problems = [], {}
    for values in tunings:
        backend = MetalBackend(None if metal.is_real else metal._metal_kernel)
        backend.tuning, backend.tuned = values, {}
        backends.append(backend)
    logs = np.zeros(len(tunings))
    for n_tokens in grid.tokens:
        for contenders in _attend_contenders(grid, backends, scheme, n_tokens, head_dim, device):
            runs = {}
            for i, c in enumerate(contenders):
                try:
                    wrong = c.check()[2]
                    bad = {"status": "wrong", "problem": wrong} if wrong else None
                except Exception as e:  # too many threads for the chip's registers, for example
                    bad = bench_kernels.failure(e)
                if bad:
                    logs[i] = math.inf
                    problems.setdefault(tunings[i], bad)
                else:
                    runs[i] = bench_kernels.timed(c)
            try:
                timings = timing.interleave(runs, effort, 0.2) if runs else {}
            except RuntimeError as e:  # whose fault it was is not known
                bad = {"status": "failed", "problem": f"while a group was timed: {e}"}
                problems.update({tunings[i]: bad for i in runs})
                logs[list(runs)] = math.inf
                continue
            for i, t in timings.items():
                logs[i] += math.log(t.median)
    n = len(grid.tokens) * len(grid.gqa) * len(grid.query_tokens)
    return [None if math.isinf(x) else math.exp(x / n) for x in logs], problems


# ---- tables ----------------------------------------------------------------------------------------------------
def ranked(rows):
    """Rows by time, those that failed or are wrong last."""
    return sorted(rows, key=lambda r: r.get("median_seconds", math.inf))


def kernel_groups(rows):
    """{(operation, head_dim, gqa, query tokens, tokens): rows}."""
    out = {}
    for row in rows:
        key = tuple(row[k] for k in ("operation", "head_dim", "gqa", "query_tokens", "tokens"))
        out.setdefault(key, []).append(row)
    return out


def print_kernels(document):
    measured = document["measured"]
    print(heading(document))
    print(f"Copy: {measured['copy_gb_per_s']:.1f} GB/s ({measured['copy']}). Floor of a call: "
          f"{measured['floor_seconds'] * 1e6:.1f} us ({measured['floor']}), of an evaluation "
          f"{measured['evaluation_seconds'] * 1e6:.0f} us.")
    for row in document.get("tuning", ()):
        if "changes" in row:
            print(f"Tuned {row['scheme']}, head_dim {row['head_dim']}: {row['changes']}, "
                  f"{row['time_over_default']:.2f} of the default's time")
        for left_out in row["left_out"]:
            print(f"  - {describe_tuning(row, left_out)}: {left_out['status'].upper()}: "
                  f"{left_out['problem'].partition(chr(10))[0]}")
    for (operation, head_dim, gqa, _, tokens), rows in kernel_groups(document["rows"]).items():
        what = (f"attention of one decode step, {_queries(rows[0])}GQA {gqa}" if gqa else
                f"{operation}, keys and values")
        print(f"\n{what}: {rows[0]['kv_heads']} kv heads of {head_dim}, {tokens} tokens, {rows[0]['dtype']}")
        print(f"{'':>4}{'cache':<16}{'computed by':<18}{'ms':>10}{'+-':>6}{'GB/s':>8}{'of copy':>9}"
              + (f"{'time':>8}{'bytes':>8}" if gqa else "") + f"{'error':>10}{'Python us':>11}")
        base = next((r for r in rows if r["name"] == "uncompressed"), None)
        before = None
        for place, row in enumerate(ranked(rows), 1):
            if "median_seconds" not in row:
                print(f"{'-':>3} {row['name']:<16}{row['column']:<18}{row['status'].upper()}: "
                      f"{row['problem'].partition(chr(10))[0]}")
                continue
            relative = ""
            if gqa:
                times = row.get("times_uncompressed")
                relative = (f"{times:>7.2f}x" if times else f"{'':>8}") + f"{row['bytes'] / base['bytes']:>7.2f}x"
            error = f"{row['error']:>10.1e}" if row["column"] != "NumPy reference" else f"{'oracle':>10}"
            tied, before = "=" if before and row["low_seconds"] <= before["high_seconds"] else " ", row
            print(f"{place:>3}{tied}{row['name']:<16}{row['column']:<18}{row['median_seconds'] * 1e3:>10.3f}"
                  f"{row['uncertainty']:>6.0%}{row['gb_per_s']:>8.3g}{100 * row['bandwidth_share']:>8.2g}%{relative}"
                  + error
                  + (f"{row['python_seconds'] * 1e6:>11.0f}" if row["python_seconds"] else ""))
    for row in document.get("ablation", ()):
        print(f"\nStages of attention, {row['scheme']} on {row['column']}: head_dim {row['head_dim']}, "
              f"GQA {row['gqa']}, {row['tokens']} tokens")
        for stage, seconds in row.get("seconds", {}).items():
            print(f"  {stage:<14}{seconds * 1e3:>10.3f} ms{seconds / row['seconds']['full']:>7.0%}  "
                  f"{ablation.STAGES[stage][0]}")
        print(f"  {row['verdict'] if 'seconds' in row else 'FAILED: ' + row['problem'].partition(chr(10))[0]}")
    print("\n=: quartiles overlap with those of the row above. ms: median of a call. +-: half the 95 % interval of the "
          "median.\nGB/s: bytes of the cache (packing: all input and output) over time. of copy: of the copy's GB/s. "
          "time, bytes:\nover the uncompressed cache. error: largest, against the oracle, by the largest number "
          "(mx.quantize: in steps).\nPython us: of building a call, where it is not in the ms: in a model the GPU "
          "works meanwhile.")


def heading(document):
    """What was measured where, in a line or two."""
    machine = document["machine"]
    return (f"mlx-turbo {machine['mlx_turbo']}, MLX {machine['mlx']}, mlx-lm {machine['mlx-lm']} on {machine['chip']}, "
            f"{machine['system']}\nBackends: {document['backend']}\nAttention tuning: {machine['attention tuning']}")


# ---- generate --------------------------------------------------------------------------------------------------
def _generate_parser():
    parser = _parser("generate", "Prompt and generation speed and memory of a model with each of several KV caches, by "
                                 "context length. The caches take turns; ratios are to the uncompressed one in the "
                                 "same round.")
    add = parser.add_argument
    add("--model", help="a local folder or a Hugging Face id (default: the embedded demo model)")
    add("--kv", nargs="+", metavar="CACHE",
        help="none (uncompressed), mlx8 and mlx4 (mlx-lm's own) and schemes (default: none mlx8 mlx4 turbo4 turbo8v4)")
    _numbers(parser, "--context", "512 2048, on Metal also 8192 and 32768", "tokens of the prompt")
    add("--tokens", type=int, metavar="N", help="to generate (default: 128)")
    add("--rounds", type=int, metavar="N", help="so often each cache runs (default: 5)")
    add("--backend", choices=["metal", "cpu"], help="of our caches (default: metal where it is)")
    add("--kv-sink", type=int, metavar="N", help="so many first tokens stay exact")
    add("--kv-recent", type=int, metavar="N", help="at least so many of the newest tokens stay exact")
    return parser


def generate(argv, backends=None):
    """`mlx-turbo bench generate`. backends: a list of the one to measure instead of the machine's."""
    from . import bench_generate

    args = _generate_parser().parse_args(argv)
    _check_output(args)
    names = list(dict.fromkeys(["none", *(args.kv or (["turbo4"] if args.quick else
                                                      ["mlx8", "mlx4", "turbo4", "turbo8v4"]))]))
    try:
        caches = {kv: None if kv in bench_generate.MLX_LM else kv_config(kv, args) for kv in names}
    except CliError as e:
        quantized = f"; or {', '.join(bench_generate.MLX_LM)}: its quantized ones"
        raise CliError(f"{e}{quantized if str(e).startswith('--kv:') else ''}") from e
    metal = not ops.metal_unavailable()
    contexts = _chosen(args, "context", (512, 2048, 8192, 32768)[:4 if metal else 2], (128, 384), 2)
    for flag, default, quick, least in (("tokens", 128, 16, 2), ("rounds", 5, 3, 1)):
        value = getattr(args, flag)
        setattr(args, flag, (quick if args.quick else default) if value is None else value)
        if getattr(args, flag) < least:
            raise CliError(f"--{flag}: got {getattr(args, flag)}, allowed are whole numbers from {least} on")
    load = importlib.import_module("mlx_lm.utils").load
    model, tokenizer = load_model(load, args.model or DEMO_MODEL, "--model")
    limit = getattr(getattr(model, "args", None), "max_position_embeddings", None)
    if limit and max(contexts) + args.tokens > limit:
        raise CliError(f"--context: got {max(contexts)}, and {args.tokens} generated tokens, but the model was made "
                       f"for {limit}")
    if not metal:
        model.set_dtype(mx.float32)  # 16-bit arithmetic is slow on the CPU, for every cache
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)  # a text longer than the context
    tokens = tokenizer.encode((DEMO_MODEL / "stories.txt").read_text()[:20_000])
    with ops.use_backend(backends[0] if backends else args.backend) as backend:
        document = timing.header("generate", ["generate", *argv], _describe(backend, on_cpu=False))
        on_gpu = metal and backend.name == "cpu"
        document |= {"model": (args.model or "embedded demo model").replace(str(Path.home()), "~"),
                     "column": "fallback in MLX operations" if on_gpu else bench_kernels.column_of(backend),
                     "dtype": "float32" if not metal else "the model's dtype", "rounds": args.rounds}
        with _progress(len(contexts) * args.rounds * len(names), "run") as bar:
            document["rows"] = bench_generate.measure(model, tokens, contexts, args.tokens, caches, args.rounds,
                                                      progress=bar.update)
    return finish(document, args, print_generate)


def print_generate(document):
    print(f"{heading(document)}\n{document['model']}, {document['dtype']}; median of {document['rounds']} interleaved "
          "rounds")
    for context in dict.fromkeys(r["context"] for r in document["rows"]):
        rows = [r for r in document["rows"] if r["context"] == context]
        print(f"\nprompt of {context} tokens, {rows[0]['generated']} generated")
        print(f"{'':>4}{'cache':<14}{'generation':>11}{'ratio':>7}{'spread':>8}{'prompt':>10}{'ratio':>7}"
              f"{'cache MB':>10}{'held MB':>9}{'peak MB':>9}{'KLD nats':>10}")
        order = sorted(rows, key=lambda r: -r.get("generation_tps", -1))
        before = None
        for place, r in enumerate(order, 1):
            if "generation_tps" not in r:
                print(f"{'-':>3} {r['name']:<14}{r['status'].upper()}: {r['problem'].partition(chr(10))[0]}")
                continue
            low, high = r["generation_tps_quartiles"]
            ratios = [f"{r[f'{what}_ratio']:>6.2f}x" if f"{what}_ratio" in r else f"{'':>7}"
                      for what in ("generation_tps", "prompt_tps")]
            tied, before = "=" if before and high >= before["generation_tps_quartiles"][0] else " ", r
            print(f"{place:>3}{tied}{r['name']:<14}{r['generation_tps']:>11.1f}{ratios[0]}"
                  f"{(high - low) / r['generation_tps']:>8.0%}{r['prompt_tps']:>10.0f}{ratios[1]}"
                  f"{r['cache_bytes'] / 1e6:>10.2f}{r['resident_bytes'] / 1e6:>9.0f}{r['peak_bytes'] / 1e6:>9.0f}"
                  f"{r['kld']:>10.5f}")
    print("\n=: quartiles overlap with those of the row above. generation, prompt: tokens/s. ratio: to uncompressed, "
          "same round.\nspread: between quartiles. held, peak: of MLX's memory, the model included, after and during "
          "it. KLD: of the next\ntoken, from the uncompressed cache.")


# ---- compare ---------------------------------------------------------------------------------------------------
KEYS = {"kernels": ("operation", "scheme", "name", "column", "head_dim", "gqa", "query_tokens", "tokens", "dtype"),
        "generate": ("context", "generated", "name")}


def _read(name, file):
    try:
        document = json.loads(Path(file).read_text())
    except (OSError, ValueError) as e:
        raise CliError(f"{name}: cannot read {file!r}: {_one_line(e)}") from e
    document = document if isinstance(document, dict) else {}
    fields, rows = KEYS.get(str(document.get("benchmark"))), document.get("rows")
    rows = rows if isinstance(rows, list) and all(isinstance(row, dict) for row in rows) else [{}]
    if "query_tokens" in (fields or ()):
        for row in rows:  # in files of before there was a choice: one
            row.setdefault("query_tokens", row.get("gqa") and 1)
    if not fields or document.get("format") != 1 or not {"machine", "backend", "command", "commit", "date",
                                                         "rows"} <= document.keys() or any(
            not {*fields, "status"} <= row.keys() for row in rows):
        raise CliError(f"{name}: {file!r} is not what mlx-turbo bench --json writes")
    return document


def _figure(row, benchmark):
    """(seconds of a call or per token, low, high), or None for a row without."""
    if benchmark == "kernels":
        return tuple(row[f"{x}_seconds"] for x in ("median", "low", "high")) if "median_seconds" in row else None
    if "generation_tps" not in row:
        return None
    low, high = row["generation_tps_quartiles"]
    return 1 / row["generation_tps"], 1 / high, 1 / low


def compare(argv):
    """`mlx-turbo bench compare A.json B.json`: the same rows of two documents."""
    parser = _parser("compare", "The rows that two files of bench --json have in common: the time of B over that of A.")
    parser.add_argument("a", metavar="A.json")
    parser.add_argument("b", metavar="B.json")
    args = parser.parse_args(argv)
    a, b = _read("A.json", args.a), _read("B.json", args.b)
    if a["benchmark"] != b["benchmark"]:
        raise CliError(f"B.json: {args.a!r} is of bench {a['benchmark']}, {args.b!r} of bench {b['benchmark']}")
    keys = KEYS[a["benchmark"]]
    olds = {tuple(r[k] for k in keys): r for r in a["rows"]}
    rows = []
    for new in b["rows"]:
        key = tuple(new[k] for k in keys)
        if key not in olds:
            continue
        old = olds[key]
        was, now = (_figure(r, a["benchmark"]) for r in (old, new))
        row = dict(zip(keys, key)) | {"status_a": old["status"], "status_b": new["status"]}
        if was and now:
            apart = now[1] > was[2] or now[2] < was[1]
            row |= {"seconds_a": was[0], "seconds_b": now[0], "ratio": now[0] / was[0],
                    "verdict": ("slower" if now[0] > was[0] else "faster") if apart else "within the spread"}
        else:
            row["verdict"] = "not compared: " + "; ".join(f"{n} is {r['status']}" for n, r in (("A", old), ("B", new))
                                                          if r["status"] != "ok")
        rows.append(row)
    if not rows:
        raise CliError(f"B.json: {args.a!r} and {args.b!r} have no row in common")
    different = {name: (a["machine"].get(name), b["machine"].get(name))
                 for name in ("chip", "system", "mlx", "mlx-lm", "mlx_turbo", "attention tuning")
                 if a["machine"].get(name) != b["machine"].get(name)}
    different |= {name: (a.get(name), b.get(name)) for name in ("commit", "backend", "model", "power")
                  if a.get(name) != b.get(name)}
    bad = [f"{letter}: {row['status'].upper()}: {describe_row(row)}: {row.get('problem')}"
           for letter, document in (("A", a), ("B", b)) for row in document["rows"] if row["status"] != "ok"]
    if args.json:
        print(json.dumps({"benchmark": a["benchmark"], "command": timing.command(["compare", *argv]),
                          **{letter: {k: v for k, v in d.items() if k != "rows"} for letter, d in (("a", a), ("b", b))},
                          "different": different, "rows": rows, "bad": bad}, indent=1))
        complain(bad)
        return 1 if bad else 0
    for letter, document in (("A", a), ("B", b)):
        print(f"{letter}: {document['command']} (commit {document['commit'] or 'unknown'}, {document['date']})\n"
              f"{textwrap.indent(heading(document), '   ')}")
    for name, (x, y) in different.items():
        print(f"different {name}: A {x}; B {y}")
    print(f"{'A ms':>10}{'B ms':>10}{'B / A':>8}  {'':<18}")
    for row in rows:
        figures = (f"{row['seconds_a'] * 1e3:>10.3f}{row['seconds_b'] * 1e3:>10.3f}{row['ratio']:>8.2f}"
                   if "ratio" in row else f"{'-':>10}{'-':>10}{'-':>8}")
        print(f"{figures}  {row['verdict']:<18} {describe_row(row)}")
    print(f"\n{len(rows)} rows in common, {len(a['rows'])} in A, {len(b['rows'])} in B. faster, slower: the quartiles "
          "do not overlap.")
    complain(bad)
    return 1 if bad else 0


BENCHMARKS = {"kernels": kernels, "generate": generate, "compare": compare}


def main(argv):
    """`mlx-turbo bench`; returns the exit code."""
    parser = Parser(prog="mlx-turbo bench", description="Benchmarks: kernels (quantize, dequantize, attention), "
                    "generate (a model with several caches), compare (two files of --json).")
    parser.add_argument("benchmark", choices=BENCHMARKS, metavar="BENCHMARK", help=", ".join(BENCHMARKS))
    if not argv or argv[0].startswith("-"):
        parser.parse_args(argv)
    name = parser.parse_args(argv[:1]).benchmark
    return BENCHMARKS[name](argv[1:])
