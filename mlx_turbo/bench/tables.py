"""The tables and lines that the benchmarks print."""

import math
from collections.abc import Iterable

from . import stages
from .rows import Row, describe_queries, describe_tuning


def ranked(rows: Iterable[Row]) -> list[Row]:
    """Rows by time, those that failed or are wrong last."""
    return sorted(rows, key=lambda r: r.get("median_seconds", math.inf))


def kernel_groups(rows: Iterable[Row]) -> dict[tuple, list[Row]]:
    """{(operation, head_dim, gqa, query tokens, tokens): rows}."""
    out: dict[tuple, list[Row]] = {}
    for row in rows:
        key = tuple(row[k] for k in ("operation", "head_dim", "gqa", "query_tokens", "tokens"))
        out.setdefault(key, []).append(row)
    return out


def print_kernels(document: Row) -> None:
    """The document of `bench kernels`, in tables by operation and size."""
    measured = document["measured"]
    print(heading(document))
    print(
        f"Copy: {measured['copy_gb_per_s']:.1f} GB/s ({measured['copy']}). Floor of a call: "
        f"{measured['floor_seconds'] * 1e6:.1f} us ({measured['floor']}), of an evaluation "
        f"{measured['evaluation_seconds'] * 1e6:.0f} us."
    )
    for row in document.get("tuning", ()):
        if "changes" in row:
            print(
                f"Tuned {row['scheme']}, head_dim {row['head_dim']}: {row['changes']}, "
                f"{row['time_over_default']:.2f} of the default's time"
            )
        for left_out in row["left_out"]:
            print(
                f"  - {describe_tuning(row, left_out)}: {left_out['status'].upper()}: "
                f"{left_out['problem'].partition(chr(10))[0]}"
            )
    for (operation, head_dim, gqa, _, tokens), rows in kernel_groups(document["rows"]).items():
        what = f"{operation}, keys and values"
        if gqa:
            what = f"attention of one decode step, {describe_queries(rows[0])}GQA {gqa}"
        prefill = operation == "prefill"
        if prefill:
            what = f"attention of a prompt chunk of {rows[0]['query_tokens']} tokens, GQA {gqa}"
        over = f"{tokens} tokens" + " before the chunk" * prefill
        print(f"\n{what}: {rows[0]['kv_heads']} kv heads of {head_dim}, {over}, {rows[0]['dtype']}")
        print(
            f"{'':>4}{'cache':<16}{'computed by':<18}{'ms':>10}{'+-':>6}{'GB/s':>8}{'of copy':>9}"
            + (f"{'time':>8}{'bytes':>8}" if gqa else "")
            + f"{'error':>10}{'Python us':>11}"
            + (f"{'peak MB':>9}" if prefill else "")
        )
        base = next((r for r in rows if r["name"] == "uncompressed"), {})
        before = None
        for place, row in enumerate(ranked(rows), 1):
            if "median_seconds" not in row:
                print(
                    f"{'-':>3} {row['name']:<16}{row['column']:<18}{row['status'].upper()}: "
                    f"{row['problem'].partition(chr(10))[0]}"
                )
                continue
            relative = ""
            if gqa:
                times = row.get("times_uncompressed")
                relative = (f"{times:>7.2f}x" if times else f"{'':>8}") + f"{row['bytes'] / base['bytes']:>7.2f}x"
            error = f"{row['error']:>10.1e}" if row["column"] != "NumPy reference" else f"{'oracle':>10}"
            tied, before = "=" if before and row["low_seconds"] <= before["high_seconds"] else " ", row
            print(
                f"{place:>3}{tied}{row['name']:<16}{row['column']:<18}{row['median_seconds'] * 1e3:>10.3f}"
                f"{row['uncertainty']:>6.0%}{row['gb_per_s']:>8.3g}{100 * row['bandwidth_share']:>8.2g}%{relative}"
                + error
                + (f"{row['python_seconds'] * 1e6:>11.0f}" if row["python_seconds"] else " " * 11 * prefill)
                + (f"{row['peak_bytes'] / 1e6:>9.1f}" if prefill else "")
            )
    for row in document.get("ablation", ()):
        print(
            f"\nStages of attention, {row['scheme']} on {row['column']}: head_dim {row['head_dim']}, "
            f"GQA {row['gqa']}, {row['tokens']} tokens"
        )
        for stage, seconds in row.get("seconds", {}).items():
            print(
                f"  {stage:<14}{seconds * 1e3:>10.3f} ms{seconds / row['seconds']['full']:>7.0%}  "
                f"{stages.STAGES[stage][0]}"
            )
        print(f"  {row['verdict'] if 'seconds' in row else 'FAILED: ' + row['problem'].partition(chr(10))[0]}")
    print(
        "\n=: quartiles overlap with those of the row above. ms: median of a call. +-: half the 95 % interval of the "
        "median.\nGB/s: bytes of the cache (packing: all input and output) over time. of copy: of the copy's GB/s. "
        "time, bytes:\nover the uncompressed cache. error: largest, against the oracle, by the largest number "
        "(mx.quantize: in steps).\nPython us: of building a call, where it is not in the ms: in a model the GPU "
        "works meanwhile. peak: of MLX's memory\nduring a call, beyond what is there before it."
    )


def heading(document: Row) -> str:
    """What was measured where, in a line or two."""
    machine = document["machine"]
    return (
        f"mlx-turbo {machine['mlx_turbo']}, MLX {machine['mlx']}, mlx-lm {machine['mlx-lm']} on {machine['chip']}, "
        f"{machine['system']}\nBackends: {document['backend']}\nAttention tuning: {machine['attention tuning']}"
    )


def print_generate(document: Row) -> None:
    """The document of `bench generate`, in tables by context."""
    print(
        f"{heading(document)}\n{document['model']}, {document['dtype']}; median of {document['rounds']} interleaved "
        "rounds"
    )
    for context in dict.fromkeys(r["context"] for r in document["rows"]):
        rows = [r for r in document["rows"] if r["context"] == context]
        print(f"\nprompt of {context} tokens, {rows[0]['generated']} generated")
        print(
            f"{'':>4}{'cache':<14}{'generation':>11}{'ratio':>7}{'spread':>8}{'prompt':>10}{'ratio':>7}"
            f"{'cache MB':>10}{'held MB':>9}{'peak MB':>9}{'KLD nats':>10}"
        )
        order = sorted(rows, key=lambda r: -r.get("generation_tps", -1))
        before = None
        for place, r in enumerate(order, 1):
            if "generation_tps" not in r:
                print(f"{'-':>3} {r['name']:<14}{r['status'].upper()}: {r['problem'].partition(chr(10))[0]}")
                continue
            low, high = r["generation_tps_quartiles"]
            ratios = [
                f"{r[f'{what}_ratio']:>6.2f}x" if f"{what}_ratio" in r else f"{'':>7}"
                for what in ("generation_tps", "prompt_tps")
            ]
            tied, before = "=" if before and high >= before["generation_tps_quartiles"][0] else " ", r
            print(
                f"{place:>3}{tied}{r['name']:<14}{r['generation_tps']:>11.1f}{ratios[0]}"
                f"{(high - low) / r['generation_tps']:>8.0%}{r['prompt_tps']:>10.0f}{ratios[1]}"
                f"{r['cache_bytes'] / 1e6:>10.2f}{r['resident_bytes'] / 1e6:>9.0f}{r['peak_bytes'] / 1e6:>9.0f}"
                f"{r['kld']:>10.5f}"
            )
    print(
        "\n=: quartiles overlap with those of the row above. generation, prompt: tokens/s. ratio: to uncompressed, "
        "same round.\nspread: between quartiles. held, peak: of MLX's memory, the model included, after and during "
        "it. KLD: of the next\ntoken, from the uncompressed cache."
    )
