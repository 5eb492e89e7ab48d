"""The part of the results page that compares B-LoRA with a LoRA that is rounded, or cut, after training."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from patterns import BLORA_PATTERNS, pattern_table
from records import TASK_TITLES, Run, grouped, markdown_table, read_runs, score

from bayeslora.report import style

INTRO = """One LoRA of r = 8 on query, key and value is merged and rounded after training (`benchmarks/rounding.py`):
per-channel weights, static inputs, ranges with the least squared error on 128 training rows. Codes are the nearest, or
GPTQ's where all seeds have been rounded so. B-LoRA is trained to the
budgets that these roundings cost (`benchmarks/frontier.py`), in the same number of steps. QAT is the same LoRA trained
with torchao's fake quantizers on its merged weight and on activations, whose ranges are found anew for each token
(`benchmarks/qat.py`). Bit operations are a share of LoRA r = 16 at 32 bits in the scope of the table, counted by one
function. Scores are in per cent, on all held-out
rows.

"""
BYTES = """The same runs by the bytes of their adapted layers: codes at their width, ranges and biases in float32.
B-LoRA was trained for bit operations, not for bytes. Beside it is the best rounding that has no more bytes.
"""
CLOSE = 0.005
"""Share by which a rounding may cost more than the budget, or the bytes, that it is compared at."""
COSTS = (0.01, 0.02, 0.03, 0.05, 0.08)
"""Marks of the figure's axis."""
ENCODERS = {"all-mpnet-base-v2": "MPNet-base (110 million parameters)"}
"""Encoders other than MiniLM, by the names of their folders."""
SCOPES = {"attention": "Attention", "encoder": "Whole encoder"}


def frontier_section(results: Path) -> str:
    """Tables of scores by cost, by task and scope; LoRA at 32 bits first."""
    trained, rounded = read_runs(results / "frontier"), read_runs(results / "rounding")
    if not trained and not rounded:
        return "Not run.\n"
    parts = [INTRO, *_score_tables(results)]
    for folder in sorted(results.glob("frontier-*")):
        if model := ENCODERS.get(folder.name.removeprefix("frontier-")):
            parts += _score_tables(results, folder.name.removeprefix("frontier"), f", {model}")
    if by_bytes := bytes_table(results):
        parts.append(f"**Against bytes**\n\n{BYTES}\n{by_bytes}\n")
    parts += _pattern_tables(trained)
    cut = _cut_table(cut_runs(results))
    return "\n".join([*parts, cut] if cut else parts)


def _score_tables(results: Path, folder: str = "", model: str = "") -> list[str]:
    """Scores by cost, a table for each task and scope, from the folders of one encoder."""
    trained, rounded = read_runs(results / f"frontier{folder}"), read_runs(results / f"rounding{folder}")
    found = []
    for task in dict.fromkeys(run["task"] for run in [*rounded, *trained]):
        for scope, title in SCOPES.items():
            rows = [*_lora_rows(rounded, task, scope), *_rounded_rows(rounded, task, scope)]
            rows += _qat_rows(read_runs(results / f"qat{folder}"), task, scope) + _trained_rows(trained, task, scope)
            if [row for row in rows if not row[0].startswith("LoRA, 32")]:
                rows.sort(key=lambda row: -row[1])
                cells = [
                    [name, f"{cost:.2%}", *(f"{value:.{digits}f}" for value, digits in numbers)]
                    for name, cost, *numbers in rows
                ]
                heading = ["", "BOPs", "score", "NLL", "seeds"]
                found.append(f"**{TASK_TITLES[task]}, {title.lower()}{model}**\n\n{markdown_table(heading, cells)}\n")
    return found


def _means(entries: Sequence[Run]) -> list[tuple[float, int]]:
    """Mean score in per cent, mean NLL, and the number of seeds, each with its digits."""
    likelihoods = [entry["scores"]["nll"] for entry in entries if "nll" in entry["scores"]]
    nll = statistics.fmean(likelihoods) if likelihoods else float("nan")
    return [(statistics.fmean(map(score, entries)), 2), (nll, 3), (len(entries), 0)]


def _of(run: Run, entry: dict[str, Any]) -> Run:
    return {**entry, "metric": run["metric"], "seed": run["seed"], "task": run["task"]}


def _lora_rows(rounded: Iterable[Run], task: str, scope: str) -> list[list[Any]]:
    found = [_of(run, run["lora"]) for run in rounded if run["task"] == task]
    return [["LoRA, 32 bits", found[0]["relative_bops"][scope], *_means(found)]] if found else []


def _roundings(rounded: Iterable[Run], task: str, scope: str) -> dict[str, list[Run]]:
    """The scores of each rounding of a task, by its name; those that not all of the task's seeds have are left out."""
    groups: dict[str, list[Run]] = {}
    runs = [run for run in rounded if run["task"] == task]
    for run in runs:
        for entry in run["rounded"]:
            if entry["scope"] == scope:
                by = " by GPTQ" if entry.get("rounding") == "gptq" else ""
                name = f"LoRA, rounded {entry['setting']}{by}, outputs {entry.get('output_bits')}"
                groups.setdefault(name, []).append(_of(run, entry))
    return {name: group for name, group in groups.items() if len(group) == len(runs)}


def _rounded_rows(rounded: Iterable[Run], task: str, scope: str) -> list[list[Any]]:
    groups = _roundings(rounded, task, scope)
    return [[name, group[0]["relative_bops"][scope], *_means(group)] for name, group in groups.items()]


def _qat_rows(trained: Iterable[Run], task: str, scope: str) -> list[list[Any]]:
    """LoRA under quantization-aware training, which rounds query, key and value."""
    groups: dict[str, list[Run]] = {}
    for run in trained:
        if run["task"] == task and scope == "attention":
            groups.setdefault("LoRA, QAT at {}, outputs {}".format(*run["setting"].split("/")), []).append(run)
    return [[name, group[0]["relative_bops"][scope], *_means(group)] for name, group in groups.items()]


def _trained_rows(trained: Iterable[Run], task: str, scope: str) -> list[list[Any]]:
    groups: dict[float, list[Run]] = {}
    for run in trained:
        if run["task"] == task and run["options"]["bops_scope"] == scope:
            groups.setdefault(run["options"]["target_bops"], []).append(run)
    return [
        [f"**B-LoRA**, mean rank {statistics.fmean(run['mean_rank'] for run in group):.1f}",
         statistics.fmean(run["relative_bops"][scope] for run in group), *_means(group)]
        for group in groups.values()
    ]  # fmt: skip


def budget_rows(results: Path, scope: str) -> dict[tuple[str, float], dict[str, str]]:
    """By task and budget, the scores of the best rounding and the best QAT that cost no more, and of B-LoRA.

    Each has its number of seeds in parentheses. LoRA at 32 bits stands at a budget of 1, as a rounding.
    """
    trained, rounded = read_runs(results / "frontier"), read_runs(results / "rounding")
    found = {}
    for task in dict.fromkeys(run["task"] for run in [*rounded, *trained]):
        for _, _, (value, _), _, (seeds, _) in _lora_rows(rounded, task, scope):
            found[task, 1.0] = {"rounded": f"{value:.1f} ({seeds})"}
        others = {"rounded": _rounded_rows(rounded, task, scope)}
        others["QAT"] = _qat_rows(read_runs(results / "qat"), task, scope)
        for _, cost, (value, _), _, (seeds, _) in _trained_rows(trained, task, scope):
            cells = found.setdefault((task, round(cost, 3)), {})
            for name, rows in others.items():
                cheap = [row[2:] for row in rows if row[1] <= cost * (1 + CLOSE)]
                if cheap:
                    best = max(cheap, key=lambda row: row[0][0])
                    cells[name] = f"{best[0][0]:.1f} ({best[2][0]})"
            cells["B-LoRA"] = f"{value:.1f} ({seeds})"
    return found


def layer_bytes(layer: dict[str, Any]) -> float:
    """Bytes of one layer of B-LoRA, counted as `rounding.py` counts a rounded one.

    Codes at their width; in float32 the bias, a range for each channel of W0 and row of A, and one for each other
    tensor.
    """
    d_in, d_out, rank, bits = layer["in_features"], layer["out_features"], layer["rank"], layer["bits"]
    codes = d_in * d_out * bits["weight"] + rank * (d_in * bits["A"] + bits["E"] + d_out * bits["B"])
    ranges = d_out + rank + len(bits) - 2  # all kinds but W0 and A have one
    return codes / 8 + 4 * (d_out + ranges)


def bytes_table(results: Path) -> str:
    """B-LoRA of every budget beside the best rounding whose adapted layers have no more bytes."""
    trained, rounded = read_runs(results / "frontier"), read_runs(results / "rounding")
    lines = []
    for (task, scope, _), group in grouped(
        [{**run, "scope": run["options"]["bops_scope"], "budget": run["options"]["target_bops"]} for run in trained],
        "task", "scope", "budget",
    ).items():  # fmt: skip
        size = statistics.fmean(sum(map(layer_bytes, run["layers"])) for run in group)
        others = _roundings(rounded, task, scope).values()
        fits = [each for each in others if each[0]["bytes"]["layers"] <= size * (1 + CLOSE)]
        best = max(map(_means, fits), default=None)
        simple = "–" if best is None else f"{best[0][0]:.1f} ({best[2][0]})"
        own = _means(group)
        lines.append((task, scope, -size, simple, f"{own[0][0]:.1f} ({own[2][0]})"))
    head = ["", "", "MB", "rounded", "B-LoRA"]
    rows = [[TASK_TITLES[t], SCOPES[s], f"{-size / 1e6:.2f}", *scores] for t, s, size, *scores in sorted(lines)]
    return markdown_table(head, rows, left=2) if rows else ""


def _pattern_tables(trained: Sequence[Run]) -> list[str]:
    """The paper's patterns by budget, over all tasks and seeds."""
    found = []
    for scope, title in SCOPES.items():
        own = [run for run in trained if run["options"]["bops_scope"] == scope]
        budgets = sorted({run["options"]["target_bops"] for run in own}, reverse=True)
        groups = {f"{b:.2%}": [run for run in own if run["options"]["target_bops"] == b] for b in budgets}
        if groups:
            found.append(pattern_table(f"B-LoRA by evidence, {title.lower()}", groups, BLORA_PATTERNS))
    return found


def cut_runs(results: Path) -> list[Run]:
    """One run with its cuts for each task and seed; those of `--only-cuts` are newer than those beside roundings."""
    runs = [*read_runs(results / "rounding"), *read_runs(results / "cut")]
    found = {(run["task"], run["seed"]): run for run in runs}
    return [found[key] for key in sorted(found)]


def _cut_table(rounded: Sequence[Run]) -> str:
    rows = []
    for run in rounded:
        for entry in run["cut"]:
            asked = f"mean rank {entry['mean_rank']:.2g}" if "rank" not in entry else f"rank {entry['rank']} in each"
            asked += ", by data" if "data_rows" in entry else ""
            likelihood = f"{entry['scores']['nll']:.3f}" if "nll" in entry["scores"] else "–"
            rows.append(
                [TASK_TITLES[run["task"]], str(run["seed"]), asked, f"{score(_of(run, entry)):.2f}", likelihood]
            )
    if not rows:
        return ""
    return (
        "**LoRA cut by SVD, or by data, without training on**\n\n"
        + markdown_table(["", "seed", "cut to", "score", "NLL"], rows)
        + "\n"
    )


def frontier_figure(results: Path) -> Figure | None:
    """Score against bit operations: a panel for each task and scope that have been trained."""
    trained = read_runs(results / "frontier")
    pairs = dict.fromkeys((run["task"], run["options"]["bops_scope"]) for run in trained)
    shown = [(task, scope) for task in dict.fromkeys(task for task, _ in pairs) for scope in SCOPES]
    return _panels(results, [pair for pair in shown if pair in pairs])


def first_figure(results: Path) -> Figure | None:
    """The panels of attention alone where a LoRA has been rounded, for the first screen of the README."""
    trained, rounded = read_runs(results / "frontier"), read_runs(results / "rounding")
    tasks = {run["task"] for run in trained} & {run["task"] for run in rounded}
    return _panels(results, [(task, "attention") for task in ("sst2", "mrpc") if task in tasks])


def _panels(results: Path, shown: Sequence[tuple[str, str]]) -> Figure | None:
    if not shown:
        return None
    trained, rounded = read_runs(results / "frontier"), read_runs(results / "rounding")
    with style.paper_style():
        lines = math.ceil(len(shown) / 2)
        figure = style.new_figure(style.PAGE_WIDTH, 2.4 * lines + 0.2)
        panels = figure.subplots(lines, 2, squeeze=False).flatten()
        for axes, (task, scope) in zip(panels, shown, strict=False):
            curves = {
                "B-LoRA": _trained_rows(trained, task, scope),
                "LoRA, rounded": _rounded_rows(rounded, task, scope),
                "LoRA, QAT": _qat_rows(read_runs(results / "qat"), task, scope),
            }
            for (name, rows), marker in zip(curves.items(), ("o-", "s", "^"), strict=True):
                points = sorted((row[1], row[2][0]) for row in rows)
                if points:
                    axes.plot(*zip(*points, strict=True), marker, label=name, markersize=4)
            for row in _lora_rows(rounded, task, scope):
                axes.axhline(row[2][0], color="0.5", linestyle="--", linewidth=1, label="LoRA, 32 bits")
            axes.set_xscale("log")
            axes.set_xticks(COSTS, [f"{cost:.0%}" for cost in COSTS])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_title(f"{TASK_TITLES[task]}, {SCOPES[scope].lower()}")
            axes.set_xlabel("bit operations")
            axes.set_ylabel("score")
            style.light_grid(axes)
        for axes in panels[len(shown) :]:
            axes.set_axis_off()
        named: dict[str, Any] = {}
        for axes in panels:
            handles, names = axes.get_legend_handles_labels()
            named = dict(zip(names, handles, strict=True)) | named
        figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=4)
    return figure
