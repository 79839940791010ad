"""Pictures of quality: KL divergence against size, and KL divergence by configuration.

matplotlib is an optional extra, imported when a picture is asked for.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .style import BLUE, DARK_GRAY, LIGHT_GRAY, PlotError, add_titles, open_frame, save_png

GROUP_COLORS = ("#c8641e", "#3c8c3c", "#7a3fa0")  # of groups other than "mlx_turbo"
MARKERS = "osD^"

Point = tuple[str, str, float, float, float | None]
Bar = tuple[str, float, float | None, str]


def _new_figure(size: tuple[float, float], dpi: int) -> tuple[Any, Any]:
    """A figure that no window shows, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _plain(y: float) -> str:
    """0.000033, not 3.3e-05."""
    from numpy import format_float_positional

    return format_float_positional(y, 2, fractional=False, trim="-")


def quality_plot(file: str | Path, points: Sequence[Point], title: str, subtitle: str, footer: str) -> None:
    """KL divergence (log axis) against bits per value, one labeled point each.

    points: (label, group, bits, kld, standard error of kld or None); a group shares its color and marker. Points with a
    KLD of 0 have no place on a log axis and are left out. title, subtitle and footer should say what was measured, on
    what and by whom. Raises PlotError if nothing is left to show or the file cannot be written.
    """
    from matplotlib.ticker import FuncFormatter

    points = [p for p in points if p[3] > 0]
    if not points:
        raise PlotError("no cache differs from the uncompressed one, so there is nothing to show on a log axis")
    figure, axes = _new_figure((8, 5.6), dpi=150)
    groups, others = list(dict.fromkeys(p[1] for p in points)), iter(GROUP_COLORS)
    for group, marker in zip(groups, MARKERS):
        color = BLUE if group == "mlx_turbo" else next(others)
        _draw_group(axes, [p for p in points if p[1] == group], group, marker, color)
    axes.set_yscale("log")
    low, high = min(p[3] for p in points), max(p[3] for p in points)
    axes.set_ylim(low / 2.5, high * 2.5)
    axes.set_xlim(0, max(p[2] for p in points) * 1.25)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _plain(y)))
    axes.grid(True, which="major", color=LIGHT_GRAY, linewidth=0.8)
    axes.set_axisbelow(True)
    open_frame(axes)
    axes.set_xlabel("bits per number resident in a KV cache of 32,768 tokens (uncompressed: 16)")
    axes.set_ylabel("KL divergence from the uncompressed cache\nnats per token, lower is better")
    if len(groups) > 1:
        axes.legend(frameon=False, loc="best")
    add_titles(figure, axes, title, subtitle, footer)
    save_png(figure, file)


def _draw_group(axes: Any, points: list[Point], group: str, marker: str, color: str) -> None:
    labels, _, bits, kld, errors = zip(*sorted(points, key=lambda p: p[2]))
    axes.errorbar(
        bits,
        kld,
        yerr=None if None in errors else errors,
        color=color,
        marker=marker,
        markersize=8,
        linewidth=0,
        elinewidth=1.4,
        capsize=3,
        label=group,
    )
    for label, x, y in zip(labels, bits, kld):
        axes.annotate(
            f"{label}\n{x:.2f} bits, {_plain(y)}",
            (x, y),
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=color,
        )


def bar_plot(file: str | Path, panels: Sequence[tuple[str, Sequence[Bar]]], title: str, footer: str) -> None:
    """KL divergence (log axis) of each row, from top to bottom; panels side by side, with the same rows.

    panels: (subtitle, [(label, kld, standard error or None, note), ...]). Raises PlotError for a KLD of 0, for panels
    whose labels differ, or if the file cannot be written.
    """
    labels = {tuple(row[0] for row in rows) for _, rows in panels}
    if len(labels) != 1 or not min(labels) or min(row[1] for _, rows in panels for row in rows) <= 0:
        raise PlotError("every panel needs the same rows, and each a KL divergence above 0 on a log axis")
    n_rows = len(panels[0][1])
    figure, first = _new_figure((4 + 5 * len(panels), 1.8 + 0.27 * n_rows), dpi=130 if len(panels) == 1 else 90)
    figure.delaxes(first)
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for i, (axes, (subtitle, rows)) in enumerate(zip(all_axes, panels)):
        names, kld, errors, notes = zip(*rows)
        widths = [error or 0 for error in errors]
        axes.barh(range(n_rows), kld, xerr=widths if any(widths) else None, color=BLUE, ecolor=DARK_GRAY, height=0.65)
        for y, (x, error, note) in enumerate(zip(kld, widths, notes)):
            axes.text((x + error) * 1.15, y, f"{x:.2g}, {note}", va="center", fontsize=8, color=DARK_GRAY)
        axes.set_yticks(range(n_rows), names, fontsize=9)
        axes.set_xscale("log")
        axes.set_xlim(min(kld) / 2, max(kld) * 8)
        axes.set_xlabel("KL divergence from the uncompressed cache,\nnats per token (shorter is better)")
        open_frame(axes)
        add_titles(figure, axes, "" if i else title, subtitle, footer)
    all_axes[0].invert_yaxis()
    save_png(figure, file)
