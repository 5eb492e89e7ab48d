"""Draw the ranks, bit-widths and costs of an adapter; a figure without data is None."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from bayeslora.report import style
from bayeslora.runs.names import order_matrices, shortest_labels, stack_labels
from bayeslora.runs.record import LayerRecord, RunRecord

_SCOPE_TEXT = {
    "adapted": "adapted matrices",
    "attention": "attention\n(with scores and values)",
    "encoder": "encoder: all blocks\n(with feed-forward, output)",
    "model": "whole model\n(with head)",
}
_UNCHANGED: dict[str, Any] = {"facecolor": style.UNCHANGED, "edgecolor": style.GREY, "hatch": "////"}


class LayerGrid:
    """Grid of adapted matrices for the maps of ranks and widths: one row per block, one column per matrix."""

    def __init__(self, layers: Sequence[LayerRecord]) -> None:
        stacks = stack_labels(layer.address.stack for layer in layers if layer.address.index is not None)
        order = list(stacks)
        # Modules outside all blocks (a head) come last, at the top of the figure.
        self.rows: list[tuple[str, int | None]] = sorted(
            set(map(_row_of, layers)),
            key=lambda row: (len(order), 0) if row[1] is None else (order.index(row[0]), row[1]),
        )
        self.columns = order_matrices(layer.address.matrix for layer in layers)
        labels = shortest_labels(self.columns)
        self.column_labels = [labels[column] for column in self.columns]
        self.row_labels = [
            "no block" if index is None else f"{stacks[stack]} {index}".strip() for stack, index in self.rows
        ]
        self._cells: dict[tuple[int, int], list[LayerRecord]] = defaultdict(list)
        for layer in layers:
            row = self.rows.index(_row_of(layer))
            self._cells[row, self.columns.index(layer.address.matrix)].append(layer)

    def values(self, of: Callable[[LayerRecord], float | None]) -> np.ndarray:
        """Return an array [rows, columns]: the mean of matrices that share a cell (experts), NaN for empty cells."""
        grid = np.full((len(self.rows), len(self.columns)), np.nan)
        for cell, layers in self._cells.items():
            found = [value for value in map(of, layers) if value is not None]
            if found:
                grid[cell] = statistics.fmean(found)
        return grid


def _row_of(layer: LayerRecord) -> tuple[str, int | None]:
    return ("" if layer.address.index is None else layer.address.stack), layer.address.index


def rank_figure(run: RunRecord) -> Figure | None:
    """Draw the effective rank of each adapted matrix, block × matrix, with the first block at the bottom."""
    if not run.layers or not (run.ranks_differ or run.is_quantized):
        return None
    grid = LayerGrid(run.layers)
    ranks = grid.values(lambda layer: layer.rank)
    started = [layer.initial_rank for layer in run.layers]
    lowest, highest = min(started), max(started)
    rows, columns = ranks.shape
    cell_height = _cell_height(rows)
    longest = max(len(label) for label in grid.column_labels)
    rotate = longest * 0.075 > 0.78
    cell_width = min(0.78, (style.page_width() - 1.6) / columns)
    width = min(style.page_width(), max(style.COLUMN_WIDTH, 1.5 + cell_width * columns))
    rotate = rotate or longest * 0.07 > (width - 1.5) / columns
    height = 0.95 + cell_height * rows + (0.055 * longest if rotate else 0.0)
    with style.paper_style():
        figure = style.new_figure(width, max(height, 1.9))
        axes = figure.add_subplot()
        norm = Normalize(0, max(highest, 1))
        mesh = draw_cells(axes, ranks, style.rank_colormap(), norm, digits=_digits(ranks), size=_font(cell_height))
        label_grid(axes, grid, rotate)
        axes.set_title("Effective rank", pad=6)
        bar = figure.colorbar(mesh, ax=axes, pad=0.03, aspect=max(10, rows * 1.6))
        bar.set_label(f"rank (started at {lowest if lowest == highest else f'{lowest} to {highest}'})")
        step = next(s for s in (1, 2, 4, 8, 16, 32, 64, 128, 1024) if highest / s <= 8)
        bar.set_ticks(list(range(0, highest + 1, step)))
        bar.outline.set_visible(False)  # type: ignore[operator]
        if np.isnan(ranks).any():
            figure.text(0.995, 0.995, "· not adapted", ha="right", va="top", fontsize=7, color=style.GREY)
    return figure


def bits_figure(run: RunRecord) -> Figure | None:
    """Draw the width in bits of each kind of tensor, block × kind, one panel per matrix (Q, K, V, …)."""
    if not run.is_quantized:
        return None
    grid = LayerGrid(run.layers)
    by_kind = {kind: grid.values(lambda layer, kind=kind: layer.bits.get(kind)) for kind in run.kinds}  # type: ignore[misc]
    panels = [np.stack([by_kind[kind][:, j] for kind in run.kinds], axis=1) for j in range(len(grid.columns))]
    # Few wide panels are easier to read than many narrow ones, and a single panel on the last line looks lost.
    lines = math.ceil(len(panels) / (4 if len(run.kinds) <= 7 else 3))
    across = style.most_across(math.ceil(len(panels) / lines))
    lines = math.ceil(len(panels) / across)
    rows = len(grid.rows)
    cell_height = _cell_height(rows * lines)
    width = style.page_width() if across > 1 else style.COLUMN_WIDTH + 0.3
    height = 0.75 + lines * (0.62 + cell_height * rows)
    colors, norm = style.width_colormap()
    with style.paper_style():
        figure = style.new_figure(width, max(height, 2.0))
        all_axes = style.panels(figure, len(panels), across, sharey=True)
        for position, (axes, panel) in enumerate(zip(all_axes, panels, strict=True)):
            size = min(_font(cell_height), 6.5)
            draw_cells(axes, panel, colors, norm, digits=_digits(panel), size=size)
            label_grid(axes, grid, False, [style.KIND_LABELS.get(kind, kind) for kind in run.kinds])
            axes.tick_params(axis="x", labelsize=7)
            axes.set_title(grid.column_labels[position], pad=4)
            if position % across:
                axes.set_ylabel("")
                axes.tick_params(labelleft=False)
        handles = [
            Patch(facecolor=color, edgecolor=style.GREY, linewidth=0.5, label=f"{bits} bits")
            for bits, color in style.WIDTH_COLORS.items()
        ]
        handles[-1].set_label("32 bits (not quantized)")
        columns = 5 if width > style.COLUMN_WIDTH + 1 else 3
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, handlelength=1.2, columnspacing=1.4)
    return figure


def cost_figure(run: RunRecord) -> Figure | None:
    """Draw bit operations by scope as a share of the same model under LoRA of rank 16 at 32 × 32 bits.

    A wider scope includes parts without adapters, whose cost is unchanged. If a scope consists of a part with relative
    cost c and an unchanged rest, its relative cost is s = c·f + (1 − f), hence that part's share of the baseline is
    f = (1 − s)/(1 − c). The rest, 1 − f, is hatched.
    """
    known = {scope: run.relative_bops.get(scope, math.nan) for scope in _SCOPE_TEXT}
    shares = {scope: share for scope, share in known.items() if math.isfinite(share)}
    if not shares:
        return None
    with style.paper_style():
        figure = style.new_figure(style.page_width(), 0.95 + 0.48 * len(shares))
        axes = figure.add_subplot()
        for position, (scope, share) in enumerate(shares.items()):
            rest = 100 * unadapted_share(run, scope)
            changed = 100 * share - rest
            axes.barh(position, 100, height=0.56, color="none", edgecolor=style.GREY, linewidth=0.6, linestyle=":")
            axes.barh(position, changed, height=0.56, color=style.BLUE)
            if rest > 0:
                axes.barh(position, rest, left=changed, height=0.56, linewidth=0, **_UNCHANGED)
            inside = 100 * share > 84
            axes.text(
                100 * share + (-1.2 if inside else 1.2), position, f"{100 * share:.1f} %",
                va="center", ha="right" if inside else "left", fontweight="bold",
                color=style.INK if rest > 0 or not inside else "white",
                bbox={"facecolor": style.PAPER, "edgecolor": "none", "pad": 1.2} if inside and rest > 0 else None,
            )  # fmt: skip
        axes.axvline(100, color=style.INK, linewidth=0.9)
        axes.set_yticks(range(len(shares)), [_SCOPE_TEXT[scope] for scope in shares])
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.invert_yaxis()
        axes.set_xlim(0, max(104.0, 100 * max(shares.values()) * 1.06))
        unit = "% of LoRA r = 16 at 32 × 32 bits"
        axes.set_xlabel(f"bit operations, {unit} (same scope)" if figure.get_figwidth() > 5 else unit)
        axes.set_title("Cost by scope")
        handles = [Patch(facecolor=style.BLUE, label="with the adapter" if run.layers else "no adapter")]
        if any(unadapted_share(run, scope) > 0 for scope in shares):
            handles.append(Patch(**_UNCHANGED, label="not adapted: unchanged"))
        figure.legend(handles=handles, loc="outside lower center", ncols=2, handlelength=1.6)
    return figure


def unadapted_share(run: RunRecord, scope: str) -> float:
    """Return the part of a scope's relative cost (0..1) in modules without adapters; 0 if unknown."""
    core = _core_scope(run)
    order = list(_SCOPE_TEXT)
    if core is None or scope not in run.relative_bops or order.index(scope) <= order.index(core):
        return 0.0
    share, inner = run.relative_bops[scope], run.relative_bops[core]
    if abs(1 - inner) < 1e-6:
        return 0.0
    rest = 1 - (1 - share) / (1 - inner)
    return rest if 0 < rest <= min(1.0, share) else 0.0


def has_unadapted_part(run: RunRecord) -> bool:
    """Return whether the cost figure has a hatched part."""
    return any(unadapted_share(run, scope) > 0 for scope in run.relative_bops)


def _core_scope(run: RunRecord) -> str | None:
    """Return the narrowest scope with all adapters, if known; attention's products change with Q, K and V."""
    if not run.layers:
        return None
    if all(layer.address.role in ("q", "k", "v", "qkv") for layer in run.layers):
        core = "attention"
    elif all(layer.address.index is not None for layer in run.layers):
        core = "encoder"
    else:
        return None
    return core if core in run.relative_bops else None


def draw_cells(
    axes: Axes, values: np.ndarray, colors: Colormap, norm: Normalize, digits: int, size: float
) -> QuadMesh:
    """Draw a grid of coloured cells with their values, and a point in empty cells."""
    mesh = axes.pcolormesh(np.ma.masked_invalid(values), cmap=colors, norm=norm, edgecolors=style.PAPER, linewidth=0.8)
    for (row, column), value in np.ndenumerate(values):
        if math.isnan(value):
            axes.text(column + 0.5, row + 0.5, "·", ha="center", va="center", color=style.GREY, fontsize=size)
        elif size >= 4.5:
            color = style.text_color_on(colors(norm(value)))
            axes.text(
                column + 0.5, row + 0.46, f"{value:.{digits}f}", ha="center", va="center", color=color, fontsize=size
            )
    return mesh


def label_grid(axes: Axes, grid: LayerGrid, rotate: bool, columns: Sequence[str] | None = None) -> None:
    """Label the rows of a grid by block and its columns by matrix (or `columns`)."""
    labels = list(columns) if columns is not None else grid.column_labels
    slanted: dict[str, Any] = {"rotation": 40, "rotation_mode": "anchor", "ha": "right"} if rotate else {}
    axes.set_xticks(np.arange(len(labels)) + 0.5, labels, **slanted)
    axes.set_yticks(np.arange(len(grid.rows)) + 0.5, grid.row_labels)
    axes.set_ylabel("layer")
    axes.tick_params(length=0, pad=3)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _cell_height(rows: int) -> float:
    """Return the row height in inches: 0.24, or less to fit the figure on one page."""
    return max(0.085, min(0.24, 7.6 / max(rows, 1)))


def _font(cell_height: float) -> float:
    return min(7.5, cell_height * 72 * 0.62)


def _digits(values: np.ndarray) -> int:
    finite = values[np.isfinite(values)]
    return 0 if np.allclose(finite, np.round(finite)) else 1
