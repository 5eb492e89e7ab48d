"""Write the comparison as Markdown, LaTeX and CSV: scores and costs by setting and run, and paired differences."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from bayeslora.report import text

Column = tuple[str, str, Callable[[float | None], str]]

_SCORES: list[Column] = [
    ("score", "score", text.number),
    ("nll", "NLL", text.number),
    ("ece", "ECE", text.number),
    ("adaptive_ece", "adaptive ECE", text.number),
    ("classwise_ece", "class-wise ECE", text.number),
    ("brier", "Brier", text.number),
    ("aurc", "AURC", text.number),
    *(
        (f"ood_{name.lower().replace(' ', '_')}_auroc", f"OOD AUROC, {name}", text.number)
        for name in ("max probability", "entropy", "mutual information", "energy")
        + ("Mahalanobis", "relative Mahalanobis", "nearest neighbors")
    ),
]
_COSTS: list[Column] = [
    ("trainable_parameters", "trainable", text.count),
    ("adapter_median_bits", "A, E, B bits (median)", text.compact),
    ("mean_rank", "mean rank", text.compact),
    ("attention_bops", "attention BOPs", text.percent),
    ("encoder_bops", "encoder BOPs", text.percent),
    ("train_seconds", "seconds", text.compact),
]
# Costs that are equal for all seeds are shown without "± 0"; scores always with their deviation.
_ALWAYS_SPREAD = frozenset(name for name, _, _ in _SCORES)
_BOPS = "BOPs: bit operations, as a share of the same scope of the same model under LoRA r = 16 at 32 bits."
_LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "−": "$-$",
    "–": "--", "…": r"\ldots{}", **{mark: f"\\{mark}" for mark in "&%$#_{}"},
}  # fmt: skip


class Part(NamedTuple):
    """One table: its title, heads, cells, and how many of the first columns hold text."""

    title: str
    head: list[str]
    rows: list[list[str]]
    left: int


def parts(table: dict[str, Any]) -> list[Part]:
    """Return the tables for the content of `table.json`; empty columns are left out."""
    found = []
    for title, columns in (("Scores", _SCORES), ("Cost", _COSTS)):
        shown = [column for column in columns if any(run.get(column[0]) is not None for run in table["runs"])]
        if shown:
            found += _of_settings_and_runs(table, title, shown)
    return [*found, *_of_differences(table)]


def markdown(table: dict[str, Any]) -> str:
    """Return `table.md`."""
    lines = []
    for part in parts(table):
        rule = "|---" * part.left + "|---:" * (len(part.head) - part.left) + "|"
        lines += [f"## {part.title}", "", _markdown_row(part.head), rule, *map(_markdown_row, part.rows), ""]
    return "\n".join([*lines, _BOPS, ""])


def latex(table: dict[str, Any]) -> str:
    """Return `table.tex`: a tabular for each part, in the commands of the package booktabs, without floats."""
    lines = ["% \\usepackage{booktabs}"]
    for part in parts(table):
        aligned = "l" * part.left + "r" * (len(part.head) - part.left)
        lines += ["", f"% {part.title}", f"\\begin{{tabular}}{{{aligned}}}"]
        lines += ["\\toprule", _latex_row(part.head), "\\midrule"]
        lines += [*map(_latex_row, part.rows), "\\bottomrule", "\\end{tabular}"]
    return "\n".join([*lines, "", f"% {_BOPS}", ""])


def comma_separated(table: dict[str, Any]) -> str:
    """Return `table.csv`: a row a run, with every number in full."""
    names = list(dict.fromkeys(name for run in table["runs"] for name in run))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table["runs"])
    return out.getvalue()


def _of_settings_and_runs(table: dict[str, Any], title: str, columns: Sequence[Column]) -> list[Part]:
    titles = [name for _, name, _ in columns]
    found = []
    several = any(len(group["seeds"]) > 1 for group in table["groups"])
    if several:
        rows = [
            [group["setting"], group["where"], text.score_name(group["metric"]), str(len(group["seeds"])),
             *(_spread(name, group.get(name), shown) for name, _, shown in columns)]
            for group in table["groups"]
        ]  # fmt: skip
        head = ["method", "task", "metric", "seeds", *titles]
        found.append(Part(f"{title}: mean ± standard deviation over seeds", head, rows, 3))
    rows = []
    for run in table["runs"]:
        seed = "–" if run["seed"] is None else str(run["seed"])
        numbers = [shown(run.get(name)) for name, _, shown in columns]
        rows.append([run["setting"], run["where"], text.score_name(run["metric"]), seed, *numbers, run["folder"]])
    head = ["method", "task", "metric", "seed", *titles, "folder"]
    found.append(Part(f"{title}: every run" if several else title, head, rows, 3))
    return found


def _of_differences(table: dict[str, Any]) -> list[Part]:
    shown = [column for column in _SCORES if any(row.get(column[0]) for row in table["differences"])]
    found = []
    for baseline in dict.fromkeys(row["baseline"] for row in table["differences"]):
        rows = [
            [row["setting"], row["where"], text.score_name(row["metric"]), str(len(row["seeds"])),
             *(_interval(row.get(name)) for name, _, _ in shown)]
            for row in table["differences"]
            if row["baseline"] == baseline
        ]  # fmt: skip
        title = f"Scores minus those of {baseline} with the same seed: mean and 95 % interval"
        found.append(Part(title, ["method", "task", "metric", "seeds", *(name for _, name, _ in shown)], rows, 3))
    return found


def _interval(found: dict[str, Any] | None) -> str:
    if found is None:
        return "–"
    low, high = found["low"], found["high"]
    return _signed(found["mean"]) + ("" if low is None else f" ({_signed(low)} to {_signed(high)})")


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _spread(name: str, number: dict[str, Any] | None, shown: Callable[[float | None], str]) -> str:
    if number is None:
        return "–"
    mean = shown(number["mean"])
    if number["sd"] is None or (not number["sd"] and name not in _ALWAYS_SPREAD):
        return mean
    return f"{mean.removesuffix(' %')} ± {shown(number['sd'])}"


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(text.markdown_text(cell) for cell in cells) + " |"


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(re.sub(".", lambda mark: _LATEX.get(mark[0], mark[0]), cell) for cell in cells) + r" \\"
