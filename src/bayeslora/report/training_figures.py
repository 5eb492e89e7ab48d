"""Draw a training: gates, widths, ranks and loss over the steps, and the final calibration."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, PercentFormatter

from bayeslora.report import style
from bayeslora.runs.names import order_matrices
from bayeslora.runs.record import History, Reliability, RunRecord
from bayeslora.vocabulary import ALL_KINDS, WIDTHS


def series(history: History, key: str) -> tuple[list[float], list[float]]:
    """Return steps and values of a logged quantity; the last entry wins if a step is logged twice (a resumed run)."""
    found = {entry["step"]: entry[key] for entry in history if key in entry and "step" in entry}
    steps = [step for step in sorted(found) if math.isfinite(found[step])]
    return steps, [found[step] for step in steps]


def phase_spans(history: History) -> list[tuple[int, float, float]]:
    """Return (phase, first step, last step) in order; a span ends where the next begins."""
    steps, phases = series(history, "phase")
    spans: list[tuple[int, float, float]] = []
    for phase, logged in groupby(zip(steps, phases, strict=True), key=lambda entry: int(entry[1])):
        *_, (last, _) = logged
        spans.append((phase, spans[-1][2] if spans else 0.0, last))
    return spans


def gates_figure(run: RunRecord, history: History) -> Figure | None:
    """Draw mean width by kind, gate-open probabilities, mean rank and attention's bit operations over the steps."""
    draw = _history_panels(run, history)
    if not draw:
        return None
    across = style.most_across(min(2, len(draw)))
    lines = math.ceil(len(draw) / across)
    with style.paper_style():
        figure = style.new_figure(style.page_width(), 0.35 + 2.15 * lines)
        all_axes = style.panels(figure, len(draw), across, sharex=True)
        for axes, panel in zip(all_axes, draw, strict=True):
            shade_phases(axes, history)
            panel(axes)
            style.light_grid(axes)
            _step_axis(axes, history)
        for axes in all_axes[-across:]:
            axes.set_xlabel("optimizer step")
            axes.tick_params(labelbottom=True)
    return figure


def _history_panels(run: RunRecord, history: History) -> list[Callable[[Axes], None]]:
    """Return the panels for the logged quantities; without gates, only the ranks, if they changed."""
    logged = {key for entry in history if "step" in entry for key, value in entry.items() if math.isfinite(value)}
    kinds = [kind for kind in ALL_KINDS if f"bits/{kind}" in logged]
    gates = [bits for bits in WIDTHS[1:] if f"gates/{bits}" in logged]
    learns_gates = bool(kinds or gates)
    panels: list[tuple[bool, Callable[[Axes], None]]] = [
        (bool(kinds), partial(_bits_panel, history=history, kinds=kinds)),
        (bool(gates), partial(_gate_panel, history=history, gates=gates)),
        ("mean_rank" in logged and (learns_gates or run.ranks_differ), partial(_rank_panel, history=history, run=run)),
        ("relative_bops" in logged and learns_gates, partial(_bops_panel, history=history)),
    ]
    return [panel for is_drawn, panel in panels if is_drawn]


def loss_figure(run: RunRecord, history: History) -> Figure | None:
    """Draw training and evaluation loss (of the task only) over the steps, and the headline score if it was logged."""
    train, evaluation = series(history, "loss"), series(history, "eval_loss")
    score = series(history, f"eval_{run.metric}")
    if len(train[0]) < 2 and len(evaluation[0]) < 2:
        return None
    with_score = len(score[0]) > 1
    with style.paper_style():
        across = style.most_across(2 if with_score else 1)
        lines = 2 // across if with_score else 1
        figure = style.new_figure(style.page_width() if with_score else style.COLUMN_WIDTH + 0.3, 2.7 * lines)
        all_axes = style.panels(figure, 2 if with_score else 1, across)
        axes = all_axes[0]
        shade_phases(axes, history)
        if train[0]:
            noisy = len(train[0]) >= 30
            axes.plot(*train, color=style.BLUE, alpha=0.35 if noisy else 1.0, linewidth=0.9 if noisy else 1.4,
                      label="training" if not noisy else None)  # fmt: skip
            if noisy:
                window = max(5, len(train[0]) // 20) | 1
                axes.plot(train[0], _running_mean(train[1], window), color=style.BLUE,
                          label=f"training, mean of {window} logs")  # fmt: skip
        if evaluation[0]:
            axes.plot(*evaluation, color=style.ORANGE, marker="o", markersize=3.5, clip_on=False, label="evaluation")
        axes.set_ylabel("loss (nats)" if "nll" in run.scores else "loss")
        axes.set_title("Loss", pad=12)
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, handlelength=1.6, columnspacing=1.2)
        if with_score:
            shade_phases(all_axes[1], history)
            all_axes[1].plot(*score, color=style.GREEN, marker="o", markersize=3.5, clip_on=False)
            all_axes[1].set_ylabel(run.metric.replace("_", " "))
            all_axes[1].set_title("Score on the evaluation split", pad=12)
        for axes in all_axes:
            style.light_grid(axes)
            _step_axis(axes, history)
            axes.set_xlabel("optimizer step")
    return figure


def calibration_figure(run: RunRecord) -> Figure | None:
    """Draw accuracy by equal-width bins of confidence, with their counts below and the ECE in the title."""
    bins = run.reliability.bins
    if not run.reliability.filled:
        return None
    with style.paper_style():
        figure = style.new_figure(style.COLUMN_WIDTH + 0.3, 4.6)
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3.2, 1])
        draw_reliability(upper, run.reliability)
        handles, labels = upper.get_legend_handles_labels()
        order = sorted(range(len(labels)), key=lambda i: ["acc", "gap", "95 ", "per"].index(labels[i][:3]))
        figure.legend([handles[i] for i in order], [labels[i] for i in order], loc="outside lower center", ncols=2,
                      handlelength=1.4)  # fmt: skip
        upper.set_title(f"ECE {run.scores.get('ece', run.reliability.ece):.3f}  ({len(bins)} bins)")
        lower.bar([b.lower for b in bins], [b.count for b in bins], align="edge",
                  width=[(b.upper - b.lower) * 0.94 for b in bins], color=style.GREY)  # fmt: skip
        lower.set_ylabel("examples")
        lower.set_xlabel("confidence (probability of the predicted class)")
        lower.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        style.light_grid(lower)
        figure.align_ylabels()
    return figure


def draw_reliability(axes: Axes, reliability: Reliability) -> None:
    """Draw accuracy by bin of confidence, its gap to the mean confidence, and its Wilson 95 % interval."""
    filled = reliability.filled
    left = [b.lower for b in filled]
    width = [(b.upper - b.lower) * 0.94 for b in filled]
    axes.bar(left, [b.accuracy for b in filled], width=width, align="edge", color=style.SKY, label="accuracy")
    for color, sign, label in ((style.ORANGE, 1, "gap: too sure"), (style.GREEN, -1, "gap: not sure enough")):
        gaps = [(b.confidence - b.accuracy if sign * (b.confidence - b.accuracy) > 0 else 0.0) for b in filled]
        if any(gaps):
            axes.bar(left, gaps, bottom=[b.accuracy for b in filled], width=width, align="edge",
                     facecolor="none", edgecolor=color, linewidth=0.7, hatch="/////", label=label)  # fmt: skip
    centres = [x + w / 2 for x, w in zip(left, width, strict=True)]
    low, high = zip(*(wilson_interval(b.accuracy, b.count) for b in filled), strict=True)
    axes.vlines(centres, low, high, color=style.INK, linewidth=0.9, label="95 % interval")
    axes.plot([0, 1], [0, 1], color=style.INK, linewidth=0.9, linestyle="--", label="perfect calibration")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_ylabel("accuracy")
    style.light_grid(axes)


def wilson_interval(share: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the Wilson score interval of a proportion, which is valid for small counts and shares of 0 and 1."""
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def shade_phases(axes: Axes, history: History) -> None:
    """Shade the warm-up, gate and frozen phases and label them above the axes."""
    spans = phase_spans(history)
    if len({phase for phase, _, _ in spans}) < 2:
        return
    last = spans[-1][2]
    for phase, begin, end in spans:
        axes.axvspan(begin, end, color=style.PHASE_COLORS.get(phase, style.PAPER), linewidth=0, zorder=0)
        if end - begin > 0.12 * last:
            axes.text((begin + end) / 2, 1.015, style.PHASE_NAMES.get(phase, str(phase)), ha="center", va="bottom",
                      transform=axes.get_xaxis_transform(), fontsize=6.5, color=style.GREY)  # fmt: skip
    for _, begin, _ in spans[1:]:
        axes.axvline(begin, color=style.GREY, linewidth=0.6, linestyle=":")


def _bits_panel(axes: Axes, history: History, kinds: Sequence[str]) -> None:
    for kind in kinds:
        color, dashes = style.KIND_STYLE[kind]
        axes.plot(*series(history, f"bits/{kind}"), color=color, linestyle=dashes, label=style.KIND_LABELS[kind])
    axes.set_yscale("log", base=2)
    axes.set_ylim(1.8, 36)
    axes.yaxis.set_major_locator(FixedLocator([2, 4, 8, 16, 32]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
    axes.set_ylabel("mean width (bits)")
    axes.set_title("Bit-widths", pad=12)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=1.8, labelspacing=0.35)


def _gate_panel(axes: Axes, history: History, gates: Sequence[int]) -> None:
    colors = {4: style.SKY, 8: style.GREEN, 16: style.ORANGE, 32: style.INK}
    for bits in gates:
        axes.plot(*series(history, f"gates/{bits}"), color=colors[bits], label=f"$z_{{{bits}}}$")
    axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel(r"mean $P(z > 0)$")
    axes.set_title("Gates open", pad=12)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=1.8, labelspacing=0.35)


def _rank_panel(axes: Axes, history: History, run: RunRecord) -> None:
    logged = dict.fromkeys(key for entry in history for key in entry)
    suffixes = order_matrices(key.removeprefix("rank/") for key in logged if key.startswith("rank/"))
    axes.plot(*series(history, "mean_rank"), color=style.INK, linewidth=1.8, label="all")
    colors = [color for color in style.CYCLE if color != style.INK] + [style.OLIVE]
    if 1 < len(suffixes) <= len(colors):
        for suffix, color in zip(suffixes, colors, strict=False):
            axes.plot(*series(history, f"rank/{suffix}"), color=color, linewidth=1.1, label=suffix)
    highest = max((layer.initial_rank for layer in run.layers), default=0)
    axes.set_ylim(0, max([*series(history, "mean_rank")[1], highest]) * 1.06)
    axes.set_ylabel("mean effective rank")
    axes.set_title("Ranks", pad=12)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=1.4, labelspacing=0.35)


def _bops_panel(axes: Axes, history: History) -> None:
    steps, shares = series(history, "relative_bops")
    axes.plot(steps, shares, color=style.BLUE, linewidth=1.8)
    axes.annotate(f"{100 * shares[-1]:.1f} %", (steps[-1], shares[-1]), xytext=(3, 0), textcoords="offset points",
                  va="center", fontsize=7.5, fontweight="bold", color=style.BLUE, annotation_clip=False)  # fmt: skip
    axes.set_ylim(0, max(1.05, max(shares) * 1.05))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    axes.set_ylabel("share of LoRA r = 16, 32 bits")
    axes.set_title("Bit operations of attention", pad=12)


def _step_axis(axes: Axes, history: History) -> None:
    last = max((entry["step"] for entry in history if "step" in entry), default=1.0)
    axes.set_xlim(0, last)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """Return the centred running mean; the window shrinks at both ends so that the curve covers all steps."""
    near = [min(window // 2, i, len(values) - 1 - i) for i in range(len(values))]
    return [statistics.fmean(values[i - reach : i + reach + 1]) for i, reach in enumerate(near)]
