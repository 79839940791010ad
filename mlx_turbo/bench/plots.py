"""Plots of `bench` documents, as a PNG or in a page: what was compared and what won shows at a glance.

matplotlib is the extra `plot` and is imported late.
"""

import html
import io
import json
import textwrap
from typing import Any

from ..backends.select import GPUS
from ..quality.style import BLUE, GRAY, NAMES, ORANGE, PALE_BLUE, RED, color, open_frame
from .rows import Row, describe_row

SIMULATED = tuple(f"simulated {title}" for title in GPUS.values())
LINES = {"CPU fallback": (0, (4, 2)), **dict.fromkeys(SIMULATED, (0, (1, 1)))}  # GPUs and MLX: solid
RATIO = "x: over uncompressed; bold: best"


def write(document: Row, kind: str, file: Any) -> None:
    """Write the plots of a document as kind "png" or, with the table, as "html"."""
    import matplotlib

    matplotlib.use("Agg")
    figure = (kernels_figure if document["benchmark"] == "kernels" else generate_figure)(document)
    if kind == "png":
        figure.savefig(file, format="png", dpi=130)
        return
    with matplotlib.rc_context({"svg.fonttype": "path"}):
        svg = io.StringIO()
        figure.savefig(svg, format="svg")
    with open(file, "w", encoding="utf-8") as f:
        f.write(_page(document, svg.getvalue()[svg.getvalue().index("<svg") :]))


# ---- words ---------------------------------------------------------------------------------------------------
def _than(ratio, more, less):
    """A ratio in words: "1.8x faster than"."""
    if 0.97 < ratio < 1.03:
        return "as fast as"
    return f"{ratio:.1f}x {more} than" if ratio > 1 else f"{1 / ratio:.1f}x {less} than"


def shown_group(document: Row) -> tuple[int, int, int]:
    """(head_dim, gqa, query tokens) of the attention that is plotted: 128, 4 and the fewest if they were measured."""
    rows = [r for r in document["rows"] if r["operation"] == "attention"]
    head_dims, gqas, steps = (sorted({r[k] for r in rows}) for k in ("head_dim", "gqa", "query_tokens"))
    return 128 if 128 in head_dims else head_dims[-1], 4 if 4 in gqas else gqas[-1], steps[0]


def headlines(document: Row) -> list[str]:
    """What won, in one sentence for each backend of ours, at the longest context."""
    kernels = document["benchmark"] == "kernels"
    if kernels:
        shown = shown_group(document)
        rows = [
            r
            for r in document["rows"]
            if r["operation"] == "attention"
            and "median_seconds" in r
            and (r["head_dim"], r["gqa"], r["query_tokens"]) == shown
        ]
        at, base, speed = "tokens", "uncompressed", lambda r: 1 / r["median_seconds"]
    else:
        rows = [r for r in document["rows"] if "generation_tps" in r]
        at, base, speed = "context", "none", lambda r: r.get("generation_tps_ratio", 0.0)
    # a simulated kernel's time says nothing, and the reference is no contender
    rows = [r for r in rows if r.get("column") not in ("NumPy reference", *SIMULATED)]
    rows = [r for r in rows if r[at] == max(q[at] for q in rows)]
    plain = next((r for r in rows if r["name"] == base), None)
    if plain is None:
        return ["Nothing was measured."]
    ours: dict[Any, list[Row]] = {}
    lines, dtype = [], document["rows"][0]["dtype"] if kernels else document["dtype"]
    for r in rows:
        if r["name"].startswith(("turbo", "auto")):
            ours.setdefault(r.get("column", document.get("column")), []).append(r)
    for column, candidates in ours.items():
        best = max(candidates, key=speed)
        lines.append(
            f"At {best[at]:,} tokens, {best['name']} ({column}) is "
            f"{_than(speed(best) / speed(plain), 'faster', 'slower')} the uncompressed cache ({dtype}) and "
            f"{plain['cache_bytes'] / best['cache_bytes']:.1f}x smaller."
        )
    fastest, smallest = (
        NAMES.get(r["name"], r["name"]) for r in (max(rows, key=speed), min(rows, key=lambda r: r["cache_bytes"]))
    )
    lines.append(
        f"Fastest of all: {fastest}. Smallest: {smallest}."
        + ("" if {*GPUS.values()} & {*ours} else " No GPU here: the kernels this is about were not measured.")
    )
    return lines


def problems(document: Row) -> list[str]:
    """What failed or was wrong, each once."""
    return [f"{r['status'].upper()}, not ranked: {describe_row(r)}" for r in document["rows"] if r["status"] != "ok"]


# ---- drawing -------------------------------------------------------------------------------------------------
def _figure(document, title, n_panels, subtitle):
    import matplotlib.pyplot as plt

    bad = problems(document)
    shown = bad[:3] + ([f"and {len(bad) - 3} more"] if len(bad) > 3 else [])
    rows = -(-n_panels // 2)
    top = 1.15 + 0.24 * (len(headlines(document)) + len(shown))
    height = 3.7 * rows + top + 0.45
    figure, axes = plt.subplots(rows, 2, figsize=(12.5, height), squeeze=False)
    figure.subplots_adjust(
        left=0.07, right=0.87, top=1 - (top + 0.25) / height, bottom=0.95 / height, wspace=0.62, hspace=0.48
    )
    y = 1 - 0.38 / height
    figure.text(0.03, y, title, fontsize=17, weight="bold")
    for text, style in [
        *((t, dict(fontsize=12, weight="bold", color=BLUE)) for t in headlines(document)),
        *((t, dict(fontsize=11, weight="bold", color=RED)) for t in shown),
        (subtitle, dict(fontsize=9, color=GRAY)),
    ]:
        y -= 0.27 / height
        figure.text(0.03, y, text, **style)
    machine = document["machine"]
    versions = (
        f"mlx-turbo {machine['mlx_turbo']} ({document['commit'] or 'installed'}), MLX {machine['mlx']}, "
        f"mlx-lm {machine['mlx-lm']}, {document['date'][:10]}"
    )
    figure.text(0.03, 0.2 / height, f"{document['command']}    {versions}", fontsize=8, color=GRAY)
    axes = list(axes.flat)
    for ax in axes[n_panels:]:
        ax.remove()
    for ax in axes[:n_panels]:
        open_frame(ax)
        ax.grid(alpha=0.25)
    return figure, axes


def _label_ends(ax, ends):
    """Names beside the right ends of lines instead of a legend, pushed apart. ends: [(y, text, color, whether it is the
    best)], y in data."""
    figure = ax.figure
    figure.canvas.draw()  # so that the limits are final
    step, top = 0.062, 0.97  # of the axes' height; above are titles
    places = sorted(
        (ax.transAxes.inverted().transform(ax.transData.transform((ax.get_xlim()[1], y)))[1], *end) for y, *end in ends
    )
    low, heights = -1.0, []
    for place, *_ in places:
        low = max(place, low + step)
        heights.append(low)
    over = max(0.0, heights[-1] - top) if heights else 0.0
    for i in range(len(heights) - 1, -1, -1):  # back down where they left the axes
        heights[i] = min(heights[i], (heights[i + 1] - step) if i + 1 < len(heights) else heights[i] - over)
    for (_, text, c, best), height in zip(places, heights):
        ax.annotate(
            text,
            (1.02, height),
            xycoords="axes fraction",
            color=c,
            fontsize=8.5,
            va="center",
            annotation_clip=False,
            weight="bold" if best else "normal",
        )


def _lines(ax, rows, x, value, key, label, names, best, band=None):
    """One line per key(row). Returns what `_label_ends` writes at their ends. best: min or max; band: (low, high)."""
    series, ends = {}, []
    for row in rows:
        series.setdefault(key(row), []).append(row)
    for which, points in series.items():
        points.sort(key=lambda r: r[x])
        xs, ys, c = [r[x] for r in points], [value(r) for r in points], color(points[0]["name"], names)
        style = LINES.get(points[0].get("column"), "-")
        ax.plot(xs, ys, color=c, marker="o", markersize=4, linewidth=2, linestyle=style)
        if band:
            low, high = zip(*(band(r) for r in points))
            ax.fill_between(xs, low, high, color=c, alpha=0.15, linewidth=0)
        ends.append((ys[-1], label(points[-1]), c, xs[-1]))
    last = max(end for *_, end in ends)
    winner = best(y for y, _, _, end in ends if end == last)
    ends = [(y, text, c, (y, end) == (winner, last)) for y, text, c, end in ends]
    ticks = sorted({r[x] for r in rows})
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, [f"{t:,}" for t in ticks])
    ax.minorticks_off()
    ax.set_xlabel("tokens in the context")
    return ends


def _plain_log(ax, which="y"):
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis = getattr(ax, f"{which}axis")
    getattr(ax, f"set_{which}scale")("log")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,g}"))


def kernels_figure(document: Row) -> Any:
    """Time and memory against context, roofline, packing and, if measured, stages."""
    head_dim, gqa, query_tokens = shown_group(document)
    ok = [
        r
        for r in document["rows"]
        if "median_seconds" in r and r["head_dim"] == head_dim and r["column"] != "NumPy reference"
    ]
    attention = [r for r in ok if (r["operation"], r["gqa"], r["query_tokens"]) == ("attention", gqa, query_tokens)]
    packing = [r for r in ok if r["operation"] in ("quantize", "dequantize")]
    names = list(dict.fromkeys(r["name"] for r in attention))
    ablation = [row for row in document.get("ablation", []) if "seconds" in row]
    kv_heads, dtype = document["rows"][0]["kv_heads"], document["rows"][0]["dtype"]
    machine = document["machine"]
    figure, axes = _figure(
        document,
        "Attention over a compressed KV cache: speed and memory",
        4 + bool(ablation),
        f"{machine['chip']}, {machine['system']}.  {document['backend']}.  {kv_heads} kv heads of {head_dim}, {gqa} "
        f"query heads each, {dtype}",
    )

    def label(r):
        mine = r["name"].startswith("turbo")
        return f"{r['name']} ({r['column']})" if mine else NAMES.get(r["name"], r["name"])

    def timed_label(r):
        return label(r) + (f"  {r['times_uncompressed']:.2f}x" if "times_uncompressed" in r else "")

    dense = {r["tokens"]: r["cache_bytes"] for r in attention if r["name"] == "uncompressed"}

    def sized_label(r):
        return r["name"] + (f"  {r['cache_bytes'] / dense[r['tokens']]:.2f}x" if r["tokens"] in dense else "")

    if not attention or not packing:
        for ax in axes[:4]:
            ax.set_axis_off()
        axes[0].text(0, 0.5, "Too much failed to plot the rest: see the rows.", color=RED)
        return figure

    ax = axes[0]
    ends = _lines(
        ax,
        attention,
        "tokens",
        lambda r: r["median_seconds"] * 1e3,
        label,
        timed_label,
        names,
        min,
        lambda r: (r["low_seconds"] * 1e3, r["high_seconds"] * 1e3),
    )
    _plain_log(ax)
    ax.set_ylabel("milliseconds")
    step = "one generated token" if query_tokens == 1 else f"{query_tokens} verified tokens"
    ax.set_title(f"Attention of {step}, one layer\nlower is better; {RATIO}", loc="left", fontsize=11)
    _label_ends(ax, ends)

    ax = axes[1]
    once = list({(r["name"], r["tokens"]): {**r, "column": None} for r in attention}.values())
    ends = _lines(ax, once, "tokens", lambda r: r["cache_bytes"] / 1e6, lambda r: r["name"], sized_label, names, min)
    _plain_log(ax)
    ax.set_ylabel("MB")
    ax.set_title(f"Memory of the cache, one layer\nlower is better; {RATIO}", loc="left", fontsize=11)
    _label_ends(ax, ends)

    _roofline(
        axes[2],
        [r for r in attention if r["tokens"] == max(r["tokens"] for r in attention)],
        document,
        head_dim,
        gqa * query_tokens,
        label,
        names,
    )
    _packing_bars(axes[3], packing, names)
    if ablation:
        _stages(axes[4], ablation)
    return figure


def _roofline(ax, rows, document, head_dim, n_queries, label, names):
    """n_queries: per kv head."""
    bandwidth = document["measured"]["copy_gb_per_s"]
    points = []
    for r in rows:
        flops = 4 * head_dim * n_queries * r["kv_heads"] * r["tokens"]  # two products, a multiply and an add each
        points.append((flops / r["bytes"], flops / r["median_seconds"] / 1e9, r))
    x0, x1 = min(p[0] for p in points) / 2, max(p[0] for p in points) * 2
    ax.plot([x0, x1], [x0 * bandwidth, x1 * bandwidth], color="#888888", linewidth=2)
    ax.annotate(
        f"grey: the memory's speed\n(a copy, {bandwidth:,.0f} GB/s)",
        (0.02, 0.97),
        xycoords="axes fraction",
        fontsize=8.5,
        color=GRAY,
        va="top",
    )
    for x, y, r in points:
        ax.plot([x], [y], "o" if r["column"] != "CPU fallback" else "s", color=color(r["name"], names), markersize=8)
    _plain_log(ax)
    _plain_log(ax, "x")
    ax.set_xlim(x0, x1)
    ax.set_ylim(min(p[1] for p in points) / 2, x1 * bandwidth * 4)
    ax.set_xlabel("flop per byte of the cache (more compressed: to the right)")
    ax.set_ylabel("GFLOP/s")
    ax.set_title(
        f"Roofline at {rows[0]['tokens']:,} tokens, and the share of the memory's speed\nhigher is better; on "
        "the line: bound by memory",
        loc="left",
        fontsize=11,
    )
    best = max(y for _, y, _ in points)
    _label_ends(
        ax,
        [
            (y, f"{label(r)}  {100 * r['bandwidth_share']:.2g} %", color(r["name"], names), y == best)
            for _, y, r in points
        ],
    )


def _packing_bars(ax, rows, names):
    longest, on_gpu = max(r["tokens"] for r in rows), any(r["column"] in GPUS.values() for r in rows)
    rows = [r for r in rows if r["tokens"] == longest and not (on_gpu and r["column"] == "CPU fallback")]
    bars = [
        (
            f"{r['operation']}  {r['name']}  ({r['column']})"
            if r["name"].startswith("turbo")
            else f"{r['operation']}  {r['name']}  (MLX)",
            r["gb_per_s"],
            color(r["name"], names) if r["name"].startswith("turbo") else ORANGE,
        )
        for r in sorted(rows, key=lambda r: (r["operation"] == "quantize", r["gb_per_s"]))
    ]
    bars = list(dict.fromkeys(bars))
    ax.barh(range(len(bars)), [b[1] for b in bars], color=[b[2] for b in bars])
    ax.set_yticks([])
    ax.set_xlim(0, 1.5 * max(b[1] for b in bars))
    for i, (text, value, _) in enumerate(bars):
        figures = f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
        ax.annotate(
            f"{text}  {figures}",
            (value, i),
            xytext=(4, 0),
            textcoords="offset points",
            fontsize=8,
            va="center",
            annotation_clip=False,
        )
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("GB/s, read and written")
    ax.set_title(f"Packing and restoring {longest:,} tokens\nhigher is better", loc="left", fontsize=11)


def _stages(ax, ablation):
    row = ablation[0]
    full = row["seconds"]["full"]
    stages = list(row["seconds"].items())[::-1]
    values = [100 * seconds / full for _, seconds in stages]
    ax.barh(range(len(stages)), values, color=[BLUE if s == "full" else PALE_BLUE for s, _ in stages])
    ax.set_yticks([])
    for i, (value, (stage, seconds)) in enumerate(zip(values, stages)):
        name = "the whole kernel" if stage == "full" else stage
        text, inside = f"{value:.0f} % ({seconds * 1e3:,.3f} ms)", value > 25
        ax.annotate(
            name if inside else f"{name}  {text}",
            (0 if inside else value, i),
            xytext=(4, 0),
            textcoords="offset points",
            fontsize=9,
            va="center",
            color="white" if stage == "full" else "black",
        )
        if inside:
            ax.annotate(text, (value, i), xytext=(4, 0), textcoords="offset points", fontsize=9, va="center")
    ax.set_xlim(0, max(values) * 1.35)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("% of the kernel's time, with a stage taken out")
    ax.set_title(
        f"Where the time goes: {row['scheme']} on {row['column']}, {row['tokens']:,} tokens\n"
        + "\n".join(textwrap.wrap(row["verdict"], 70)),
        loc="left",
        fontsize=11,
    )


def generate_figure(document: Row) -> Any:
    """Speed and memory of generation against context."""
    rows = [r for r in document["rows"] if "generation_tps" in r]
    names, machine = list(dict.fromkeys(r["name"] for r in rows)), document["machine"]
    figure, axes = _figure(
        document,
        f"Generation with a compressed KV cache: {document['model']}",
        4,
        f"{machine['chip']}, {machine['system']}.  {document['backend']}.  {document['dtype']}, "
        f"{document['rows'][0]['generated']} tokens generated, median of {document['rounds']} interleaved rounds",
    )
    if not rows:
        for ax in axes[:4]:
            ax.set_axis_off()
        return figure

    plain = {r["context"]: r for r in rows if r["name"] == "none"}

    def label(r, what):
        name, ratio = NAMES.get(r["name"], r["name"]), r.get(f"{what}_ratio")  # of speeds: in the same round
        if not what.endswith("tps") and r["context"] in plain:
            ratio = r[what] / plain[r["context"]][what]
        return f"{name}  {ratio:.2f}x" if ratio else name

    for ax, what, factor, unit, title, better in (
        (axes[0], "generation_tps", 1, "tokens/s", "Generation speed", "higher"),
        (axes[1], "cache_bytes", 1e-6, "MB", "Memory of the cache", "lower"),
        (axes[2], "prompt_tps", 1, "tokens/s", "Reading the prompt", "higher"),
        (axes[3], "peak_bytes", 1e-6, "MB", "Peak memory, the model included", "lower"),
    ):
        speed = what.endswith("tps")
        ends = _lines(
            ax,
            rows,
            "context",
            lambda r: r[what] * factor,
            lambda r: r["name"],
            lambda r: label(r, what),
            names,
            max if speed else min,
            (lambda r: r[f"{what}_quartiles"]) if speed else None,
        )
        if what == "cache_bytes":
            _plain_log(ax)
        else:
            ax.set_ylim(bottom=0)
        ax.set_ylabel(unit)
        ax.set_title(f"{title}\n{better} is better; {RATIO}", loc="left", fontsize=11)
        _label_ends(ax, ends)
    return figure


# ---- the page ------------------------------------------------------------------------------------------------
def _page(document, svg):
    columns = [
        k
        for k in (
            "operation",
            "name",
            "column",
            "context",
            "tokens",
            "head_dim",
            "gqa",
            "query_tokens",
            "median_seconds",
            "uncertainty",
            "gb_per_s",
            "bandwidth_share",
            "times_uncompressed",
            "generation_tps",
            "generation_tps_ratio",
            "prompt_tps",
            "prompt_tps_ratio",
            "cache_bytes",
            "peak_bytes",
            "error",
            "kld",
            "status",
            "problem",
        )
        if any(k in r for r in document["rows"])
    ]

    def cell(x):
        return f"{x:.4g}" if isinstance(x, float) else "" if x is None else str(x)

    body = "\n".join(
        f"<tr class={r['status']}>" + "".join(f"<td>{html.escape(cell(r.get(k)))}" for k in columns)
        for r in document["rows"]
    )
    facts = {k: v for k, v in document.items() if k != "rows"}
    return f"""<!doctype html><meta charset="utf-8"><title>mlx-turbo bench {document["benchmark"]}</title>
<style>body {{ font: 14px system-ui; margin: 2em }} svg {{ max-width: 100%; height: auto }}
td, th {{ padding: 2px 8px; text-align: right }} tr.wrong, tr.failed {{ color: #c00000; font-weight: bold }}</style>
{svg}
<h2>All rows</h2>
<table><tr>{"".join(f"<th>{k}" for k in columns)}</tr>
{body}</table>
<h2>What ran</h2><pre>{html.escape(json.dumps(facts, indent=1))}</pre>
"""
