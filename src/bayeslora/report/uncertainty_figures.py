"""Draw uncertainty: risk by coverage, histograms, and detection of out-of-distribution inputs.

Figures of one run and of several share their panels. A figure without data is None.
"""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from bayeslora.report import style
from bayeslora.report.text import measure_name, score_name
from bayeslora.report.verdict import MAIN_RISK, threshold
from bayeslora.runs.record import DOMAIN, NO_SHIFT, Histogram, RunRecord

Curve = Sequence[tuple[float, float]]
_GROUPS = {"correct": "right", "wrong": "wrong", "ood": "out of distribution"}
_OUTLINES: dict[str, dict[str, Any]] = {
    "wrong": {"color": style.ORANGE, "linestyle": "-"},
    "ood": {"color": style.INK, "linestyle": (0, (3, 1.2))},
}
"""Lines of the groups that are not filled."""
_MARKERS = {
    "max_probability": "o", "entropy": "s", "mutual_information": "D",
    "energy": "^", "mahalanobis": "v", "relative_mahalanobis": "P", "nearest_neighbors": "X",
}  # fmt: skip
_COLORS = dict(zip(_MARKERS, style.CYCLE, strict=True))
_LINES = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class Selection:
    """Risk-coverage curve of one setting, (coverage, error rate) averaged over seeds, and its mean AURC."""

    label: str
    task: str
    curve: Curve
    area: float | None


@dataclass(frozen=True)
class Detections:
    """Detection of out-of-distribution inputs in one setting: AUROC of each seed by measure of uncertainty."""

    label: str
    task: str
    auroc: dict[str, list[float]]


def selective_figure(run: RunRecord) -> Figure | None:
    """Draw the error rate among the most confident predictions by their share, with the AURC in the title."""
    if run.risk_coverage_by:
        return _answers_figure(run)
    curve = run.risk_coverage.points
    if not curve:
        return None
    with style.paper_style():
        figure = style.new_figure(style.COLUMN_WIDTH + 0.3, 2.9)
        axes = figure.add_subplot()
        _curve(axes, curve, style.BLUE, "-", "most confident first")
        final = curve[-1][1]
        axes.axhline(final, color=style.INK, linewidth=0.9, linestyle="--", label="in any order")
        chosen = threshold(run)
        if chosen is not None and chosen.coverage:
            axes.plot(chosen.coverage, chosen.errors, "o", color=style.ORANGE, clip_on=False, zorder=3,
                      label=f"threshold for {100 * MAIN_RISK:g} %")  # fmt: skip
        _selection_axes(axes, final)
        area = run.scores.get("aurc")
        axes.set_title("Selective prediction" if area is None else f"AURC {area:.4f}")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, handlelength=1.8)
    return figure


def _answers_figure(run: RunRecord) -> Figure:
    """Draw the mean loss among the surest answers by their share, a curve for each measure of uncertainty."""
    with style.paper_style():
        figure = style.new_figure(style.COLUMN_WIDTH + 0.6, 3.2)
        axes = figure.add_subplot()
        curves = run.risk_coverage_by.items()
        for (name, curve), color, dashes in zip(curves, style.CYCLE, ("-", "--", "-."), strict=False):
            _curve(axes, curve.points, color, dashes, measure_name(name))
        final = next(iter(run.risk_coverage_by.values())).points[-1][1]
        axes.axhline(final, color=style.INK, linewidth=0.9, linestyle=":", label="in any order")
        _selection_axes(axes, final)
        axes.set_ylabel("mean loss among them")
        axes.set_title("Selective answers")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, handlelength=1.8)
    return figure


def uncertainty_figure(run: RunRecord) -> Figure | None:
    """Draw the uncertainty of correct and wrong predictions and, if scored, of out-of-distribution inputs."""
    panels = [
        (_with_auroc(measure_name(m), run.detection.get(m, {}).get("auroc")), m, h)
        for m, h in run.uncertainty.items()
        if _filled(h)
    ]
    return _histogram_figure([panels], across=style.most_across(len(panels)) if panels else 0)


def histograms_figure(panels: Sequence[tuple[str, str, Histogram, float | None]]) -> Figure | None:
    """Draw (label, measure, histogram, AUROC) of several settings, one block of panels per measure."""
    panels = [panel for panel in panels if _filled(panel[2])]
    measures = list(dict.fromkeys(measure for _, measure, _, _ in panels))
    blocks = [
        [
            (f"{textwrap.fill(label, 24)}\n{_with_auroc('', auroc)}".rstrip(), m, h)
            for label, m, h, auroc in panels
            if m == measure
        ]
        for measure in measures
    ]
    most = max(map(len, blocks), default=0)
    return _histogram_figure(blocks, across=4 if most in (4, 7, 8) else min(3, most))


def risk_coverage_figure(selections: Sequence[Selection]) -> Figure | None:
    """Draw risk-coverage curves of several settings on shared axes, one panel per task."""
    drawn = [s for s in selections if s.curve]
    if not drawn:
        return None
    tasks = list(dict.fromkeys(s.task for s in drawn))
    across = min(2, len(tasks))
    lines = math.ceil(len(tasks) / across)
    longest = max(sum(s.task == task for s in drawn) for task in tasks)
    with style.paper_style():
        width = style.page_width() if across > 1 else 4.6
        figure = style.new_figure(width, lines * (2.5 + 0.16 * longest))
        looks = {label: i for i, label in enumerate(dict.fromkeys(s.label for s in drawn))}
        for axes, task in zip(style.panels(figure, len(tasks), across), tasks, strict=True):
            here = [s for s in drawn if s.task == task]
            for s in here:
                i = looks[s.label]
                # Curves may overlap: the lower one is visible between the dashes.
                dashes = _LINES[i % len(_LINES)]
                label = s.label if s.area is None else f"{s.label}: AURC {s.area:.4f}"
                _curve(axes, s.curve, style.CYCLE[i % len(style.CYCLE)], dashes, label)
            _selection_axes(axes, max(s.curve[-1][1] for s in here))
            axes.set_title(task)
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), handlelength=1.8, labelspacing=0.3)
    return figure


def detection_figure(found: Sequence[Detections]) -> Figure | None:
    """Draw the AUROC of out-of-distribution detection by measure, one line per setting, one panel per task.

    Small markers are seeds, large ones their mean, bars one sample standard deviation.
    """
    drawn = [d for d in found if d.auroc]
    if not drawn:
        return None
    tasks = list(dict.fromkeys(d.task for d in drawn))
    rows = [[d for d in drawn if d.task == task] for task in tasks]
    measures = [m for m in _MARKERS if any(m in d.auroc for d in drawn)]
    values = [value for d in drawn for values in d.auroc.values() for value in values]
    with style.paper_style():
        step = min(0.2, 0.8 / len(measures))
        height = 0.75 + sum(0.35 + max(0.34, 0.1 * len(measures)) * len(row) for row in rows)
        figure = style.new_figure(style.page_width() * 0.8, max(height, 1.7))
        ratios = [len(row) + 0.8 for row in rows]
        all_axes = figure.subplots(len(tasks), 1, squeeze=False, sharex=True, height_ratios=ratios)[:, 0]
        for axes, task, row in zip(all_axes, tasks, rows, strict=True):
            for position, setting in enumerate(row):
                for offset, measure in enumerate(measures):
                    place = position + step * (offset - (len(measures) - 1) / 2)
                    _marks(axes, setting.auroc.get(measure, []), place, measure)
            axes.set_yticks(range(len(row)), [textwrap.fill(d.label, 40) for d in row])
            axes.set_ylim(len(row) - 0.5, -0.5)
            axes.tick_params(axis="y", length=0)
            axes.axvline(0.5, color=style.INK, linewidth=0.9, linestyle="--")
            axes.set_title(task)
            style.light_grid(axes, "x")
        all_axes[-1].set_xlim(max(0.0, min(0.48, *values) - 0.02), 1.0)
        all_axes[-1].set_xlabel("AUROC (0.5: chance)")
        handles = [
            Line2D([], [], linestyle="", color=_COLORS[m], marker=_MARKERS[m], markersize=6, label=measure_name(m))
            for m in measures
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=3, handletextpad=0.3)
    return figure


def shift_figure(run: RunRecord) -> Figure | None:
    """Draw accuracy (or the headline score) and ECE by level of shift, one line per suite; a domain is dashed."""
    plain = None if run.shift is None else run.shift.of(NO_SHIFT)
    if run.shift is None or plain is None or len(run.shift.levels) < 2:
        return None
    names = ["accuracy" if "accuracy" in plain.scores else run.metric, *(["ece"] if "ece" in plain.scores else [])]
    with style.paper_style():
        across = style.most_across(len(names))
        lines = len(names) // across
        figure = style.new_figure(style.page_width() if len(names) > 1 else style.COLUMN_WIDTH, 0.4 + 2.5 * lines)
        all_axes = style.panels(figure, len(names), across)
        for axes, name in zip(all_axes, names, strict=True):
            for index, (suite, levels) in enumerate(run.shift.suites.items()):
                values = [plain.scores[name], *(level.scores[name] for level in levels)]
                axes.plot(range(len(values)), values, color=style.CYCLE[index], marker="os^D"[index % 4],
                          markersize=4, label=suite)  # fmt: skip
            domain = run.shift.of(DOMAIN)
            if domain is not None:
                axes.axhline(domain.scores[name], color=style.INK, linewidth=0.9, linestyle="--", label=DOMAIN)
            axes.set_xticks(range(4), ["none", "1", "2", "3"])
            axes.set_xlabel("level of shift")
            axes.set_ylabel(score_name(name))
            style.light_grid(axes)
        handles, labels = all_axes[0].get_legend_handles_labels()
        columns = 5 if across > 1 else 3
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=1.8)
    return figure


def mean_curve(curves: Sequence[Curve]) -> list[tuple[float, float]]:
    """Return the mean over seeds at each coverage; the first curve if their coverages differ."""
    curves = [curve for curve in curves if curve]
    if not curves:
        return []
    coverages = [[x for x, _ in curve] for curve in curves]
    if any(coverage != coverages[0] for coverage in coverages):
        return list(curves[0])
    risks = [statistics.fmean(y for _, y in column) for column in zip(*curves, strict=True)]
    return list(zip(coverages[0], risks, strict=True))


def pooled_histogram(histograms: Sequence[Histogram]) -> Histogram | None:
    """Return the sum over seeds of the groups that all have; the first histogram if the edges differ."""
    if not histograms:
        return None
    first = histograms[0]
    if any(h.edges != first.edges for h in histograms):
        return first
    groups = [g for g in first.counts if all(g in h.counts for h in histograms)]
    return Histogram(
        first.edges,
        **{g: [sum(column) for column in zip(*(h.counts[g] for h in histograms), strict=True)] for g in groups},
    )


def _histogram_figure(blocks: Sequence[Sequence[tuple[str, str, Histogram]]], across: int) -> Figure | None:
    """Draw blocks of (title, measure, histogram); each block starts a new line."""
    if not any(blocks):
        return None
    lines = [math.ceil(len(block) / across) for block in blocks]
    with style.paper_style():
        width = {1: style.COLUMN_WIDTH + 0.3, 2: 5.6}.get(across, style.page_width())
        figure = style.new_figure(width, 0.35 + (2.1 if across < 3 else 1.95) * sum(lines))
        grid = figure.subplots(sum(lines), across, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for number, block in enumerate(blocks):
            for position, (title, measure, histogram) in enumerate(block):
                axes = grid[sum(lines[:number]) + position // across, position % across]
                axes.set_axis_on()
                _histogram(axes, histogram)
                axes.set_title(title, fontsize=8 if across > 2 else None)
                axes.set_xlabel(f"{measure_name(measure)} (nats)")
                axes.set_ylabel("share of examples" if position % across == 0 else "")
        shown = [histogram for block in blocks for _, _, histogram in block]
        present = [group for group in _GROUPS if any(sum(h.counts.get(group, [])) for h in shown)]
        handles = [_group_look(group) for group in present]
        figure.legend(handles=handles, loc="outside lower center", ncols=3, handlelength=1.6)
    return figure


def _filled(histogram: Histogram) -> bool:
    return any(sum(counts) for counts in histogram.counts.values())


def _histogram(axes: Axes, histogram: Histogram) -> None:
    """Draw each group as shares of its total, so that a few errors are visible next to many correct answers."""
    edges = histogram.edges
    for group in _GROUPS:
        counts = histogram.counts.get(group, [])
        total = sum(counts)
        if not total:
            continue
        shares = [count / total for count in counts]
        if group == "correct":
            axes.stairs(shares, edges, fill=True, color=style.SKY, alpha=0.75)
        else:
            axes.stairs(shares, edges, linewidth=1.4, **_OUTLINES[group])
    # The axis ends at the last bin with more than 0.2% of a group.
    last = max(i for i in range(len(edges) - 1) if any(c[i] > 0.002 * sum(c) for c in histogram.counts.values()))
    right = edges[last + 1]
    axes.set_xlim(edges[0] - 0.01 * right, 1.01 * right)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    style.light_grid(axes)


def _group_look(group: str) -> Patch | Line2D:
    if group == "correct":
        return Patch(facecolor=style.SKY, alpha=0.75, label=_GROUPS[group])
    return Line2D([], [], label=_GROUPS[group], **_OUTLINES[group])


def _curve(axes: Axes, curve: Curve, color: str, dashes: object, label: str) -> None:
    axes.plot([x for x, _ in curve], [y for _, y in curve], color=color, linestyle=dashes, label=label)


def _selection_axes(axes: Axes, final: float) -> None:
    axes.set_xlim(0, 1)
    axes.set_ylim(0, max(axes.get_ylim()[1], final * 1.15, 0.01))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    axes.set_xlabel("coverage: share of examples answered")
    axes.set_ylabel("error rate among them")
    style.light_grid(axes)


def _marks(axes: Axes, values: Sequence[float], height: float, measure: str) -> None:
    if not values:
        return
    color, marker = _COLORS[measure], _MARKERS[measure]
    if len(values) > 1:
        axes.plot(values, [height] * len(values), linestyle="", marker=marker, markersize=2.5, markeredgewidth=0,
                  color=color, alpha=0.45)  # fmt: skip
    deviation = statistics.stdev(values) if len(values) > 1 else None
    axes.errorbar(statistics.fmean(values), height, xerr=deviation, color=color, marker=marker, markersize=5.5,
                  linestyle="", elinewidth=1.1, capsize=2.5, markeredgecolor=style.PAPER,
                  markeredgewidth=0.6)  # fmt: skip


def _with_auroc(title: str, auroc: float | None) -> str:
    return ", ".join(filter(None, (title, "" if auroc is None else f"AUROC {auroc:.3f}")))
