"""Draw several runs: scores against costs, and reliability diagrams side by side."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from bayeslora.report import style
from bayeslora.report.text import number, score_name
from bayeslora.report.training_figures import draw_reliability, wilson_interval
from bayeslora.runs.record import Reliability

_MARKERS = "osD^vPX*<>hp"
_HOLLOW: dict[str, Any] = {"markerfacecolor": "none", "markeredgewidth": 1.3}  # runs of equal cost and score show both


@dataclass(frozen=True)
class Point:
    """One run: label of its setting, task, headline metric, score, and relative bit operations of attention (0..1).

    `rows` is the number of rows that were scored; 0 if it is unknown.
    """

    label: str
    task: str
    metric: str
    score: float
    bops: float
    rows: int = 0

    def interval(self) -> tuple[float, float] | None:
        """Return how far the 95 % interval of an accuracy over its rows reaches below and above it."""
        if self.metric != "accuracy" or not self.rows:
            return None
        low, high = wilson_interval(self.score, self.rows)
        return self.score - low, high - self.score


def score_figure(points: Sequence[Point]) -> Figure | None:
    """Draw scores against the bit operations of attention, one panel per task.

    Small markers are runs, large ones the mean of a setting. Bars show one sample standard deviation over seeds, and
    of a single run the 95 % interval of its accuracy. Runs without a cost or score are left out.
    """
    points = [p for p in points if math.isfinite(p.score) and math.isfinite(p.bops)]
    if not points:
        return None
    tasks = list(dict.fromkeys(p.task for p in points))
    labels = list(dict.fromkeys(p.label for p in points))
    across = min(3, len(tasks))
    lines = math.ceil(len(tasks) / across)
    width = style.page_width() if across > 1 else 4.6
    legend_columns = max(1, min(len(labels), int(width / (0.055 * max(map(len, labels)) + 0.5))))
    height = 0.2 + 2.6 * lines + 0.2 * math.ceil(len(labels) / legend_columns)
    looks = {label: (style.CYCLE[i % len(style.CYCLE)], _MARKERS[i % len(_MARKERS)]) for i, label in enumerate(labels)}
    notes = ["cost: of LoRA r = 16 at 32 × 32 bits"] if across > 2 else []
    with style.paper_style():
        figure = style.new_figure(width, height)
        for axes, task in zip(style.panels(figure, len(tasks), across), tasks, strict=True):
            here = [p for p in points if p.task == task]
            for label in dict.fromkeys(p.label for p in here):
                color, marker = looks[label]
                runs = [p for p in here if p.label == label]
                costs, scores = [100 * p.bops for p in runs], [p.score for p in runs]
                bars: float | list[list[float]] | None = None
                if len(runs) > 1:
                    notes.append("bars: one standard deviation over seeds")
                    bars = statistics.stdev(scores)
                    axes.plot(costs, scores, linestyle="", marker=marker, markersize=3, markeredgewidth=0,
                              color=color, alpha=0.45)  # fmt: skip
                elif (reach := runs[0].interval()) is not None:
                    notes.append("bars of one run: 95 % interval over its rows")
                    bars = [[reach[0]], [reach[1]]]
                axes.errorbar(
                    statistics.fmean(costs), statistics.fmean(scores),
                    xerr=statistics.stdev(costs) if len(runs) > 1 else None, yerr=bars,
                    color=color, marker=marker, markersize=6.5, linestyle="", elinewidth=1.1, capsize=2.5,
                    **_HOLLOW,
                )  # fmt: skip
            axes.set_title(task)
            axes.set_xlabel("attention bit operations, %" + ("" if across > 2 else " of LoRA r = 16, 32 × 32"))
            axes.set_ylabel(score_name(here[0].metric))
            axes.set_xlim(0, max(106.0, 106 * max(p.bops for p in here)))
            axes.margins(y=0.25)
            axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
            style.light_grid(axes, "both")
        handles = [
            Line2D([], [], linestyle="", color=color, marker=marker, markersize=6, label=label, **_HOLLOW)
            for label, (color, marker) in looks.items()
        ]
        title = "; ".join(dict.fromkeys(notes)) or None
        figure.legend(handles=handles, loc="outside lower center", ncols=legend_columns, handletextpad=0.3,
                      title=title, title_fontsize=7)  # fmt: skip
    return figure


def reliability_figure(diagrams: Sequence[tuple[str, Reliability, float]]) -> Figure | None:
    """Draw (label, reliability pooled over seeds, mean ECE of the seeds) on shared axes, titled by label and ECE."""
    drawn = [diagram for diagram in diagrams if diagram[1].filled]
    if not drawn:
        return None
    across = min(3, len(drawn))
    lines = math.ceil(len(drawn) / across)
    with style.paper_style():
        figure = style.new_figure({1: 3.4, 2: 5.2}.get(across, style.page_width()), 0.45 + 2.55 * lines)
        all_axes = style.panels(figure, len(drawn), across, sharex=True, sharey=True)
        for position, (axes, (label, reliability, error)) in enumerate(zip(all_axes, drawn, strict=True)):
            draw_reliability(axes, reliability)
            axes.set_title(f"{textwrap.fill(label, 34)}\nECE {number(error)}", fontsize=8)
            axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
            axes.set_ylabel("accuracy" if position % across == 0 else "")
            if position >= len(drawn) - across:
                axes.set_xlabel("confidence")
                axes.tick_params(labelbottom=True)
        handles, names = all_axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=2 if across < 3 else 4)
    return figure
