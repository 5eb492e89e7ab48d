"""Draw why each gate is open or closed: its evidence against what closing it saves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bayeslora.report import style
from bayeslora.runs.record import GateRecord, RunRecord
from bayeslora.vocabulary import ACTIVATIONS, ALL_KINDS

_WIDTH = 4.6  # inches: type stays readable on a narrow screen
_DECADES = 5  # drawn below the least threshold


@dataclass(frozen=True)
class EvidenceSummary:
    """The prices of a run's gates and how clearly they are decided.

    Attributes:
        width_price: λ in nats of mean loss for all of the baseline's cost; None without gates of widths.
        rank_threshold: least and largest Δ in nats at which a component opens; None without gates of ranks.
        gates: their number.
        sure: number of gates with a probability below 0.05 or above 0.95; None if probabilities are unknown.
    """

    width_price: float | None
    rank_threshold: tuple[float, float] | None
    gates: int
    sure: int | None


def summarize_evidence(run: RunRecord) -> EvidenceSummary | None:
    """Return the prices of a run and how many gates are clearly decided; None if no gate was decided by evidence."""
    if not run.gates:
        return None
    widths, ranks = _split(run)
    thresholds = [gate.price * gate.saving for gate in ranks]
    known = [gate.is_sure for gate in run.gates if gate.is_sure is not None]
    return EvidenceSummary(
        width_price=widths[0].price if widths else None,
        rank_threshold=(min(thresholds), max(thresholds)) if ranks else None,
        gates=len(run.gates),
        sure=sum(known) if known else None,
    )


def evidence_figure(run: RunRecord) -> Figure | None:
    """Draw Δ of every gate: of widths against what closing it saves, of ranks from the largest to the smallest."""
    widths, ranks = _split(run)
    widths = [gate for gate in widths if gate.saving > 0]  # the others cost nothing, and no price decides them
    heights = [height for gates, height in ((widths, 3.3), (ranks, 2.2)) if gates]
    if not heights:
        return None
    with style.paper_style():
        width = min(_WIDTH, style.page_width())
        figure = style.new_figure(width, 0.6 + sum(heights))
        grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
        if widths:
            _draw_widths(figure.add_subplot(grid[0]), widths)
        if ranks:
            _draw_ranks(figure.add_subplot(grid[-1]), ranks)
        kinds = [kind for kind in ALL_KINDS if any(gate.kind == kind for gate in widths)]
        handles = [_handle(kind, style.KIND_LABELS[kind], style.KIND_STYLE[kind][0], True) for kind in kinds]
        handles += [_handle("", "open", style.GREY, True), _handle("", "closed", style.GREY, False)]
        handles.append(Line2D([], [], color=style.INK, linewidth=1.1, label=r"price $\lambda w$"))
        columns = 5 if width == _WIDTH else 4
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, handletextpad=0.2, columnspacing=1.2)
    return figure


def _split(run: RunRecord) -> tuple[list[GateRecord], list[GateRecord]]:
    widths = [gate for gate in run.gates if gate.kind in ALL_KINDS]
    return widths, [gate for gate in run.gates if gate.kind == "rank"]


def _draw_widths(axes: Axes, gates: Sequence[GateRecord]) -> None:
    low = _log_axis(axes, gates)
    for kind in ALL_KINDS:
        for is_open in (False, True):
            chosen = [gate for gate in gates if gate.kind == kind and gate.is_open == is_open]
            color = style.KIND_STYLE[kind][0]
            axes.scatter(
                [gate.saving for gate in chosen], [max(gate.delta, low) for gate in chosen], s=11,
                marker=_marker(kind), facecolors=color if is_open else "none", edgecolors=color, linewidths=0.7,
                alpha=0.75, clip_on=False,
            )  # fmt: skip
    axes.set_xscale("log")
    if price := gates[0].price:
        ends = np.array(axes.get_xlim())
        axes.plot(ends, price * ends, color=style.INK, linewidth=1.1)
        axes.set_xlim(*ends)
    axes.set_xlabel("what closing the gate saves, share of the baseline's cost")
    axes.set_title("Widths: evidence against saving")


def _draw_ranks(axes: Axes, gates: Sequence[GateRecord]) -> None:
    low = _log_axis(axes, gates)
    ordered = sorted(gates, key=lambda gate: -gate.delta)
    place = np.arange(1, len(ordered) + 1)
    for is_open in (False, True):
        chosen = [(x, max(gate.delta, low)) for x, gate in zip(place, ordered, strict=True) if gate.is_open == is_open]
        axes.scatter(
            [x for x, _ in chosen], [y for _, y in chosen], s=11, marker="o", linewidths=0.7, clip_on=False,
            facecolors=style.GREY if is_open else "none", edgecolors=style.GREY,
        )  # fmt: skip
    axes.step(
        place, [max(gate.price * gate.saving, low) for gate in ordered], where="mid", color=style.INK, linewidth=1.1
    )
    axes.set_xlabel("component, by evidence")
    axes.set_title("Ranks: evidence against the price")


def _log_axis(axes: Axes, gates: Sequence[GateRecord]) -> float:
    """Set a logarithmic axis for Δ and return its lower end, where smaller values are drawn."""
    deltas = [gate.delta for gate in gates if gate.delta > 0]
    thresholds = [gate.price * gate.saving for gate in gates if gate.price * gate.saving > 0]
    least, largest = min([*deltas, *thresholds], default=1e-6), max([*deltas, *thresholds], default=1.0)
    low = max(least, min(thresholds, default=largest) / 10**_DECADES)
    axes.set_yscale("log")
    axes.set_ylim(low, 2 * largest)
    axes.set_ylabel(r"evidence $\Delta$ (nats)")
    style.light_grid(axes, "both")
    return low


def _marker(kind: str) -> str:
    return "^" if kind in ACTIVATIONS else "o"


def _handle(kind: str, label: str, color: str, is_open: bool) -> Line2D:
    return Line2D(
        [], [], linestyle="", marker=_marker(kind), markersize=4, markerfacecolor=color if is_open else "none",
        markeredgecolor=color, label=label,
    )  # fmt: skip
