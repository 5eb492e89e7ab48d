"""Write the comparison as Markdown: scores and costs, averaged over seeds and for every run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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
    ("ood_max_probability_auroc", "OOD AUROC, max probability", text.number),
    ("ood_entropy_auroc", "OOD AUROC, entropy", text.number),
    ("ood_mutual_information_auroc", "OOD AUROC, mutual information", text.number),
    ("ood_energy_auroc", "OOD AUROC, energy", text.number),
    ("ood_mahalanobis_auroc", "OOD AUROC, Mahalanobis", text.number),
    ("ood_relative_mahalanobis_auroc", "OOD AUROC, relative Mahalanobis", text.number),
    ("ood_nearest_neighbors_auroc", "OOD AUROC, nearest neighbors", text.number),
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


def markdown(table: dict[str, Any]) -> str:
    """Return `table.md` for the content of `table.json`; empty columns are left out."""
    lines: list[str] = []
    for title, columns in (("Scores", _SCORES), ("Cost", _COSTS)):
        shown = [column for column in columns if any(run.get(column[0]) is not None for run in table["runs"])]
        if shown:
            lines += _part(table, title, shown)
    lines += ["BOPs: bit operations, as a share of the same scope of the same model under LoRA r = 16 at 32 bits."]
    return "\n".join([*lines, ""])


def _part(table: dict[str, Any], title: str, columns: Sequence[Column]) -> list[str]:
    titles = [name for _, name, _ in columns]
    lines: list[str] = []
    if any(len(group["seeds"]) > 1 for group in table["groups"]):
        lines += [f"## {title}: mean ± standard deviation over seeds", ""]
        lines += _table_head(["method", "task", "metric", "seeds", *titles], 3)
        for group in table["groups"]:
            cells = [group["setting"], group["where"], text.score_name(group["metric"]), str(len(group["seeds"]))]
            cells += [_spread(name, group.get(name), shown) for name, _, shown in columns]
            lines.append(_table_row(cells))
        lines += ["", f"## {title}: every run", ""]
    else:
        lines += [f"## {title}", ""]
    lines += _table_head(["method", "task", "metric", "seed", *titles, "folder"], 3)
    for run in table["runs"]:
        cells = [run["setting"], run["where"], text.score_name(run["metric"])]
        cells.append("–" if run["seed"] is None else str(run["seed"]))
        cells += [shown(run.get(name)) for name, _, shown in columns]
        lines.append(_table_row([*cells, run["folder"]]))
    return [*lines, ""]


def _spread(name: str, number: dict[str, Any] | None, shown: Callable[[float | None], str]) -> str:
    if number is None:
        return "–"
    mean = shown(number["mean"])
    if number["sd"] is None or (not number["sd"] and name not in _ALWAYS_SPREAD):
        return mean
    return f"{mean.removesuffix(' %')} ± {shown(number['sd'])}"


def _table_head(titles: Sequence[str], left: int) -> list[str]:
    return [_table_row(titles), "|" + "|".join("---" if i < left else "---:" for i in range(len(titles))) + "|"]


def _table_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(text.markdown_text(cell) for cell in cells) + " |"
