"""Style shared by all figures: sizes in inches at paper width, fonts, and colour-blind-safe colours."""

from __future__ import annotations

import io
import math
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import BoundaryNorm, Colormap, LinearSegmentedColormap, ListedColormap, to_rgb
from matplotlib.figure import Figure

from bayeslora.vocabulary import WIDTHS

DPI = 200
PAGE_WIDTH = 7.0
COLUMN_WIDTH = 3.4

# Okabe and Ito's palette without yellow, which is invisible on white.
INK = "#222222"
GREY = "#8a8a8a"
LIGHT = "#ececec"
BLUE = "#0072b2"
ORANGE = "#d55e00"
GREEN = "#009e73"
PINK = "#cc79a7"
SKY = "#56b4e9"
AMBER = "#e69f00"
OLIVE = "#7a7a1a"
CYCLE = (BLUE, ORANGE, GREEN, PINK, SKY, AMBER, INK)

# Light to dark in equal steps of lightness, so that the order is visible in grey-scale.
_RAMP = ("#fdfbd0", "#a8dbb5", "#41b3c4", "#2a74b2", "#202c74")
WIDTH_COLORS = dict(zip(WIDTHS, _RAMP, strict=True))

# A weight and its output share a colour; the output is dashed.
KIND_STYLE: dict[str, tuple[str, str]] = {
    "weight": (INK, "-"), "A": (BLUE, "-"), "E": (ORANGE, "-"), "B": (GREEN, "-"), "in": (PINK, "--"),
    "out": (INK, "--"), "A_out": (BLUE, "--"), "E_out": (ORANGE, "--"),
}  # fmt: skip
KIND_LABELS = {
    "weight": r"$W_0$", "A": r"$A$", "E": r"$E$", "B": r"$B$", "in": r"$\mathrm{in}$",
    "out": r"$\mathrm{out}$", "A_out": r"$A_\mathrm{out}$", "E_out": r"$E_\mathrm{out}$",
}  # fmt: skip
PHASE_NAMES = {0: "warm-up", 1: "gates learn", 2: "frozen"}
PHASE_COLORS = {0: "#f6efdf", 1: "#ffffff", 2: "#e6eef5"}


def paper_style() -> AbstractContextManager[None]:
    """Apply `paper.mplstyle` in a `with` block; restore the caller's settings afterwards."""
    return matplotlib.style.context(Path(__file__).with_name("paper.mplstyle"), after_reset=True)


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of `width` × `height` inches with an Agg canvas; leaves the state of pyplot unchanged."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def panels(figure: Figure, count: int, across: int, **options: Any) -> list[Axes]:
    """Return axes of `count` panels, `across` per line; the rest of the last line is empty."""
    found = list(figure.subplots(math.ceil(count / across), across, squeeze=False, **options).flat)
    for axes in found[count:]:
        axes.set_axis_off()
    return found[:count]


def png_bytes(figure: Figure) -> bytes:
    """Return the figure as PNG of inches × DPI pixels without metadata, so that equal data give equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def pdf_bytes(figure: Figure) -> bytes:
    """Return the figure as PDF, for print, without dates, so that equal data give equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="pdf", metadata=dict.fromkeys(("Creator", "Producer", "CreationDate")))
    return buffer.getvalue()


def rank_colormap() -> Colormap:
    """Return a continuous colormap of the bit-width colours."""
    return LinearSegmentedColormap.from_list("bayeslora_ranks", list(_RAMP))


def width_colormap() -> tuple[ListedColormap, BoundaryNorm]:
    """Return five colours for 2, 4, 8, 16 and 32 bits; widths in between take the next higher colour."""
    return ListedColormap(list(WIDTH_COLORS.values())), BoundaryNorm([0, 2.5, 4.5, 8.5, 16.5, 64.5], 5)


def text_color_on(color: Any) -> str:
    """Return dark or white text for contrast on `color`, by relative luminance."""
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color))
    return INK if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.22 else "white"


def light_grid(axes: Axes, axis: str = "y") -> None:
    """Draw faint lines behind the data, along one axis."""
    axes.set_axisbelow(True)
    axes.grid(axis=axis, color=LIGHT, linewidth=0.7)  # type: ignore[arg-type]
