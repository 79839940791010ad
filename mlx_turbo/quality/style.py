"""How pictures look, in `eval`, `bench` and scripts alike: colors, fonts, frames, and files that can be written."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BLUE, TEAL, PURPLE, PINK = "#0050c8", "#00a0a0", "#6a3fc0", "#c040a0"  # ours
BLACK, BROWN, ORANGE = "#222222", "#c05a00", "#f0a030"  # uncompressed, and mlx-lm's quantized caches
RED, PALE_BLUE, GRAY, LIGHT_GRAY, DARK_GRAY = "#c00000", "#9db9e8", "#666666", "#dddddd", "#444444"

COLORS = {
    "uncompressed": BLACK,
    "none": BLACK,
    "mlx-lm 8 bit": BROWN,
    "mlx8": BROWN,
    "mlx-lm 4 bit": ORANGE,
    "mlx4": ORANGE,
    "turbo4": BLUE,
    "turbo8v4": TEAL,
    "turbo3": PURPLE,
    "turbo2": PINK,
}
OTHERS = ("#508020", "#a03030", "#407090", "#807020")
NAMES = {"none": "uncompressed", "mlx8": "mlx-lm 8 bit", "mlx4": "mlx-lm 4 bit"}


class PlotError(ValueError):
    """A picture that cannot be made; the message says why."""


def color(name: str, names: Sequence[str]) -> str:
    """The color of a cache; one without a color of its own gets one by its place among such in `names`."""
    others = [n for n in names if n not in COLORS]
    return COLORS.get(name) or OTHERS[others.index(name) % len(OTHERS)]


def open_frame(axes: Any) -> None:
    """Leave only the left and bottom lines of the frame."""
    axes.spines[["top", "right"]].set_visible(False)


def add_titles(figure: Any, axes: Any, title: str, subtitle: str, footer: str) -> None:
    """Title and subtitle above the axes, the footer (wrapped) below the figure."""
    axes.set_title(f"{title}\n", loc="left", fontsize=13, fontweight="bold")
    axes.text(0, 1.02, subtitle, transform=axes.transAxes, fontsize=9, color=DARK_GRAY)
    footer = "\n".join(textwrap.wrap(footer, 140, break_on_hyphens=False))
    figure.supxlabel(footer, x=0.01, ha="left", fontsize=7, color=GRAY)


def check_plot(file: str | Path, ending: str = ".png") -> None:
    """Raises PlotError if a picture cannot be written to `file`. Call it before doing the work that it shows."""
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
            'plots need matplotlib, which is not installed: pip install "mlx-turbo[plot]" (or pip install matplotlib)'
        ) from e


def save_png(figure: Any, file: str | Path) -> None:
    """Write a matplotlib figure as a PNG. Raises PlotError if the file cannot be written."""
    try:
        figure.savefig(file, format="png")
    except OSError as e:
        raise PlotError(f"cannot write {str(file)!r}: {e}") from e
