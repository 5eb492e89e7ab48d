"""Figures of the results page, from the records of the runs."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter
from records import GLUE_TASKS, MMLU_ROWS, SHOTS, TASK_TITLES, Run, grouped

from bayeslora.report import style
from bayeslora.report.comparison_figures import Point, score_figure
from bayeslora.report.figures import LayerGrid, draw_cells, label_grid
from bayeslora.runs.names import matrix_role
from bayeslora.runs.record import LayerRecord
from bayeslora.runs.schema import from_json
from bayeslora.vocabulary import ALL_KINDS

RANKED = {
    "blora-q+ra": "B-LoRA q + ra",
    "blora-ra": "B-LoRA ra",
    "adalora": "AdaLoRA",
    "bayes_adalora": "Bayesian AdaLoRA",
}
QUANTIZED = "blora-q+ra"
CHANCE = 0.25
ROLES = {"q": "Q", "k": "K", "v": "V", "qkv": "QKV", "output": "O", "gate": "gate", "up": "up", "down": "down"}


def records_of(runs: Iterable[Run]) -> list[LayerRecord]:
    """The layers of all runs; a `LayerGrid` shows means over those that share a cell."""
    return [from_json(LayerRecord, layer) for run in runs for layer in run["layers"]]


def ranks_figure(runs: Sequence[Run]) -> Figure | None:
    """Mean rank over seeds by block and matrix: a line of panels a task, B-LoRA and AdaLoRA side by side."""
    found = {key: group for key, group in grouped(runs, "task", "method").items() if key[1] in RANKED}
    tasks = [task for task in GLUE_TASKS if any(key[0] == task for key in found)]
    methods = [method for method in RANKED if any(key[1] == method for key in found)]
    if not tasks:
        return None
    highest = max(layer.initial_rank for group in found.values() for layer in records_of(group))
    with style.paper_style():
        figure = style.new_figure(style.PAGE_WIDTH if len(methods) > 1 else 3.4, 0.5 + 1.65 * len(tasks))
        panels = figure.subplots(len(tasks), len(methods), squeeze=False)
        colors, norm = style.rank_colormap(), Normalize(0, highest)
        for i, task in enumerate(tasks):
            for j, method in enumerate(methods):
                axes = panels[i, j]
                if (task, method) not in found:
                    axes.set_axis_off()
                    continue
                grid = LayerGrid(records_of(found[task, method]))
                ranks = grid.values(lambda layer: layer.rank)
                narrow = len(grid.columns) > 4
                names = [ROLES.get(matrix_role(column) or "", column.split(".")[-2:][0]) for column in grid.columns]
                draw_cells(axes, ranks, colors, norm, digits=1, size=4.6 if narrow else 6.0)
                label_grid(axes, grid, narrow, names)
                axes.tick_params(axis="both", labelsize=6)
                axes.set_title(f"{TASK_TITLES[task]}, {RANKED[method]}", pad=4, fontsize=7)
                if j:
                    axes.set_ylabel("")
        bar = figure.colorbar(ScalarMappable(norm, colors), ax=panels, pad=0.01, aspect=40)
        bar.set_label("effective rank, mean over seeds")
        bar.outline.set_visible(False)
    return figure


def bits_figure(runs: Sequence[Run]) -> Figure | None:
    """For each kind of tensor the share of matrices (over seeds) at each width, a panel a task."""
    by_task = {
        task: [run for run in runs if run["task"] == task and run["method"] == QUANTIZED] for task in GLUE_TASKS
    }
    by_task = {task: group for task, group in by_task.items() if group}
    if not by_task:
        return None
    with style.paper_style():
        figure = style.new_figure(style.PAGE_WIDTH, 2.4)
        panels = figure.subplots(1, len(by_task), squeeze=False, sharey=True)[0]
        for axes, (task, group) in zip(panels, by_task.items(), strict=True):
            layers = records_of(group)
            kinds = [kind for kind in ALL_KINDS if kind in layers[0].bits]
            for position, kind in enumerate(kinds):
                widths = [layer.bits[kind] for layer in layers]
                left = 0.0
                for bits, color in style.WIDTH_COLORS.items():
                    share = statistics.fmean(width == bits for width in widths)
                    axes.barh(position, share, left=left, color=color, edgecolor=style.GREY, linewidth=0.4)
                    left += share
            axes.set_yticks(range(len(kinds)), [style.KIND_LABELS[kind] for kind in kinds])
            axes.set_title(TASK_TITLES[task])
            axes.set_xlim(0, 1)
            axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
            axes.set_xticks([0, 0.5, 1])
        panels[0].invert_yaxis()
        handles = [
            Patch(facecolor=color, edgecolor=style.GREY, linewidth=0.5, label=f"{bits} bits")
            for bits, color in style.WIDTH_COLORS.items()
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=5, handlelength=1.2)
    return figure


def cost_figure(runs: Sequence[Run], titles: Mapping[str, str]) -> Figure | None:
    """Score against attention's bit operations, a panel a task."""
    order = {method: index for index, method in enumerate(titles)}
    points = [
        Point(titles[run["method"]], TASK_TITLES[run["task"]], run["metric"], run["scores"][run["metric"]],
              run["relative_bops"]["attention"])
        for run in sorted(runs, key=lambda each: (GLUE_TASKS.index(each["task"]), order[each["method"]]))
    ]  # fmt: skip
    return score_figure(points)


def mmlu_figure(runs: Sequence[Run]) -> Figure | None:
    """Accuracy without and with examples, a pair of bars a row; the line is guessing among four."""
    by_row = {row: [run for run in runs if run["method"] == row] for row in MMLU_ROWS}
    by_row = {row: group for row, group in by_row.items() if group}
    if not by_row:
        return None
    colors = dict(zip(SHOTS, (style.BLUE, style.ORANGE), strict=True))
    with style.paper_style():
        figure = style.new_figure(1.6 + 1.0 * len(by_row), 2.6)
        axes = figure.add_subplot()
        for index, shots in enumerate(SHOTS):
            values = [[100 * run["shots"][shots]["accuracy"] for run in group] for group in by_row.values()]
            places = [position + 0.38 * (index - 0.5) for position in range(len(values))]
            spreads = [statistics.stdev(each) if len(each) > 1 else 0.0 for each in values]
            means = [statistics.fmean(each) for each in values]
            axes.bar(places, means, 0.36, yerr=spreads, color=colors[shots], ecolor=style.INK, capsize=2,
                     label=f"{shots}-shot")  # fmt: skip
        axes.axhline(100 * CHANCE, color=style.GREY, linewidth=0.9, linestyle="--", label="guessing")
        axes.set_xticks(range(len(by_row)), [MMLU_ROWS[row].replace(", ", ",\n") for row in by_row])
        axes.set_ylabel("accuracy, %")
        axes.set_title("MMLU")
        style.light_grid(axes)
        figure.legend(loc="outside lower center", ncols=3)
    return figure
