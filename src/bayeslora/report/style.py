"""Style shared by all figures: sizes in inches at paper width, fonts, and colour-blind-safe colours."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
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
_SCREEN_WIDTH = 3.7
_is_narrow = ContextVar("is_narrow", default=False)

# Okabe and Ito's palette without yellow, which is invisible on white.
INK = "#222222"
PAPER = "#fffffe"  # not pure white, which is the colour of text on dark cells: on a dark page only paper turns dark
CELL_INK = "#212121"  # of text on light cells, which stay light on a dark page
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
PHASE_COLORS = {0: "#f6efdf", 1: PAPER, 2: "#e6eef5"}
UNCHANGED = "#dddddd"
# Variables of the report's style sheet, which has a light and a dark value for each.
_VARIABLES = {
    INK: "ink", PAPER: "paper", LIGHT: "grid", GREY: "grey", BLUE: "blue", UNCHANGED: "unchanged",
    PHASE_COLORS[0]: "warm-up", PHASE_COLORS[2]: "frozen",
}  # fmt: skip


def paper_style() -> AbstractContextManager[None]:
    """Apply `paper.mplstyle` in a `with` block; restore the caller's settings afterwards."""
    return matplotlib.style.context(Path(__file__).with_name("paper.mplstyle"), after_reset=True)


def page_width() -> float:
    """Return the largest width of a figure in inches, which is smaller for a narrow screen."""
    return _SCREEN_WIDTH if _is_narrow.get() else PAGE_WIDTH


def most_across(count: int) -> int:
    """Return how many panels of `count` fit beside each other: all, or one on a narrow screen."""
    return 1 if _is_narrow.get() else count


@contextmanager
def narrow() -> Iterator[None]:
    """Draw figures for a narrow screen in a `with` block."""
    token = _is_narrow.set(True)
    try:
        yield
    finally:
        _is_narrow.reset(token)


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


def inline_svg(figure: Figure, name: str) -> str:
    """Return the figure as an SVG element for an HTML page, with text as outlines and without a size or references.

    Colours of ink and paper become variables of the page, so that a dark page has dark figures. The `name` is a prefix
    of the ids, which must be unique on the page.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "bayeslora"}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    drawn = buffer.getvalue()
    extra = r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->"
    drawn = re.sub(extra, "", drawn[drawn.index("<svg") :], flags=re.DOTALL)
    head, rest = drawn.split(">", 1)
    box = re.search(r'viewBox="[^"]+"', head)
    assert box is not None
    rest = re.sub(r'\bid="', f'id="{name}-', rest).replace("xlink:href", "href")
    rest = rest.replace('href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    for color, variable in _VARIABLES.items():
        rest = rest.replace(f": {color}", f": var(--{variable})")
    return f"<svg {box[0]}>" + re.sub(r"\s*\n\s*", "\n", rest).strip()


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
    return CELL_INK if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.22 else "white"


def light_grid(axes: Axes, axis: str = "y") -> None:
    """Draw faint lines behind the data, along one axis."""
    axes.set_axisbelow(True)
    axes.grid(axis=axis, color=LIGHT, linewidth=0.7)  # type: ignore[arg-type]
