"""PNG files. matplotlib is an optional extra, imported when a picture is asked for."""

import textwrap
from pathlib import Path


class PlotError(ValueError):
    """A picture that cannot be made; the message says why."""


def check_plot(file, ending=".png"):
    """Raises PlotError if a picture cannot be written to `file`: to be called before the work that it shows."""
    file = Path(file)
    if file.suffix.lower() != ending:
        raise PlotError(f"{str(file)!r} does not end in {ending}")
    existed = file.exists()
    try:
        with file.open("ab"):
            pass
    except OSError as e:
        raise PlotError(f"cannot write {str(file)!r}: {e.strerror}") from e
    if not existed:
        file.unlink()
    try:
        import matplotlib  # noqa: F401
    except ImportError as e:
        raise PlotError(
            'a picture needs matplotlib, which is not installed: pip install "mlx-turbo[plot]" '
            "(or pip install matplotlib)"
        ) from e


def quality_plot(file, points, title, subtitle, footer):
    """KL divergence (log axis) against bits per value, a labelled point each.

    points: (label, group, bits, kld, standard error of kld or None); a group shares colour and marker. Points with a
    KLD of 0 have no place on a log axis and are left out. title, subtitle and footer should say what was measured, on
    what and by whom. Raises PlotError if nothing is left to show or the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter
    from numpy import format_float_positional

    def plain(y):  # 0.000033, not 3.3e-05
        return format_float_positional(y, 2, fractional=False, trim="-")

    points = [p for p in points if p[3] > 0]
    if not points:
        raise PlotError("no cache differs from the uncompressed one: nothing to show on a log axis")
    figure = Figure(figsize=(8, 5.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    groups = list(dict.fromkeys(p[1] for p in points))
    others = iter(("#c8641e", "#3c8c3c", "#7a3fa0"))
    for group, marker in zip(groups, "osD^"):
        colour = "#0050c8" if group == "mlx_turbo" else next(others)  # as in bench_plots.py
        label, _, bits, kld, error = zip(*sorted((p for p in points if p[1] == group), key=lambda p: p[2]))
        axes.errorbar(
            bits,
            kld,
            yerr=None if None in error else error,
            color=colour,
            marker=marker,
            markersize=8,
            linewidth=0,
            elinewidth=1.4,
            capsize=3,
            label=group,
        )
        for name, x, y in zip(label, bits, kld):
            axes.annotate(
                f"{name}\n{x:.2f} bits, {plain(y)}",
                (x, y),
                xytext=(9, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
                color=colour,
            )
    axes.set_yscale("log")
    low, high = min(p[3] for p in points), max(p[3] for p in points)
    axes.set_ylim(low / 2.5, high * 2.5)
    axes.set_xlim(0, max(p[2] for p in points) * 1.25)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: plain(y)))
    axes.grid(True, which="major", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_xlabel("bits per number resident in a KV cache of 32,768 tokens (uncompressed: 16)")
    axes.set_ylabel("KL divergence from the uncompressed cache\nnats per token, lower is better")
    if len(groups) > 1:
        axes.legend(frameon=False, loc="best")
    axes.set_title(f"{title}\n", loc="left", fontsize=13, fontweight="bold")
    axes.text(0, 1.02, subtitle, transform=axes.transAxes, fontsize=9, color="#444444")
    footer = "\n".join(textwrap.wrap(footer, 140, break_on_hyphens=False))
    figure.supxlabel(footer, x=0.01, ha="left", fontsize=7, color="#666666")
    _save(figure, file)


def bar_plot(file, rows, title, subtitle, footer):
    """KL divergence (log axis) of each row, from top to bottom. rows: (label, kld, standard error or None, note)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not rows or min(row[1] for row in rows) <= 0:
        raise PlotError("every row needs a KL divergence above 0 on a log axis")
    figure = Figure(figsize=(9, 1.5 + 0.27 * len(rows)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    labels, kld, error, notes = zip(*rows)
    axes.barh(
        range(len(rows)), kld, xerr=None if None in error else error, color="#0050c8", ecolor="#444444", height=0.65
    )
    for y, (x, bar, note) in enumerate(zip(kld, error, notes)):
        axes.text((x + (bar or 0)) * 1.15, y, f"{x:.2g}, {note}", va="center", fontsize=8, color="#444444")
    axes.set_yticks(range(len(rows)), labels, fontsize=9)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(min(kld) / 2, max(kld) * 8)
    axes.set_xlabel("KL divergence from the uncompressed cache, nats per token: shorter is better")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_title(f"{title}\n", loc="left", fontsize=13, fontweight="bold")
    axes.text(0, 1.01, subtitle, transform=axes.transAxes, fontsize=9, color="#444444")
    figure.supxlabel(
        "\n".join(textwrap.wrap(footer, 140, break_on_hyphens=False)), x=0.01, ha="left", fontsize=7, color="#666666"
    )
    _save(figure, file)


def _save(figure, file):
    try:
        figure.savefig(file, format="png")
    except OSError as e:
        raise PlotError(f"cannot write {str(file)!r}: {e}") from e
