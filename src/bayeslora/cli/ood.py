"""Out-of-distribution texts for `bayeslora evaluate`: where they come from, and how well a run notices them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from bayeslora.cli.choices import choice_rows
from bayeslora.cli.inputs import text_columns
from bayeslora.cli.models import RunInfo
from bayeslora.data import Task, load_texts
from bayeslora.errors import BayesLoraError
from bayeslora.evaluation import Evaluation, uncertainties_of
from bayeslora.evaluation.uncertainty import detection
from bayeslora.prediction import Prediction

SPLIT = "ood"
_SOURCE = "source"


@dataclass(frozen=True)
class Outside:
    """Rows unlike those a run was trained on, in the form of `task`; `sources` names a kind for each of them."""

    name: str
    rows: Dataset
    task: Task
    sources: list[str]


def outside_rows(given: dict[str, Any], info: RunInfo, task: Task) -> Outside | None:
    """What `--ood` or `--ood-file` asks for; None where neither is given.

    Raises:
        BayesLoraError: both are given, the task has no such texts, or the run has no classes.
    """
    if "ood" not in given and "ood_file" not in given:
        if "ood_text_column" in given:
            raise BayesLoraError("--ood-text-column is of use only with --ood-file; add it or leave this out.")
        return None
    if info.kind == "regression":
        raise BayesLoraError(
            "the run predicts numbers, and detection needs the uncertainty of classes; leave --ood and --ood-file out."
        )
    if "ood" not in given:
        return _from_file(given, info, task, Path(given["ood_file"]))
    for name in ("ood_file", "ood_text_column"):
        if name in given:
            raise BayesLoraError(f"--{name.replace('_', '-')} contradicts --ood; give one of them.")
    if SPLIT not in task.splits:
        raise BayesLoraError(f"task {task.name} has no out-of-distribution split; give such texts with --ood-file.")
    rows = task.splits[SPLIT]
    sources = list(rows[_SOURCE]) if _SOURCE in rows.column_names else []
    return Outside(f"{task.name} {SPLIT}", rows, task, sources)


def _from_file(given: dict[str, Any], info: RunInfo, task: Task, file: Path) -> Outside:
    if info.kind == "multiple_choice":
        if "ood_text_column" in given:
            raise BayesLoraError("--ood-text-column is of no use for multiple choice; leave it out.")
        items = choice_rows(file, info)
        return Outside(str(file), items.eval_split, items, [])
    columns = text_columns(given, info, "ood_text_column")
    return Outside(str(file), load_texts(file, columns), replace(task, text_columns=tuple(columns)), [])


def detected(outside: Outside, evaluation: Evaluation, prediction: Prediction) -> dict[str, Any]:
    """The `ood` block of metrics.json: AUROC, AUPR and FPR95 by measure of uncertainty, in all and by source."""
    inside, found = evaluation.uncertainties, uncertainties_of(prediction)
    block: dict[str, Any] = {
        "name": outside.name,
        "rows": len(outside.rows),
        "rows_in": len(evaluation.labels),
        "scores": detection(inside, found),
    }
    sources = np.asarray(outside.sources)
    kinds = list(dict.fromkeys(outside.sources))
    if len(kinds) > 1:
        block["by_source"] = {
            kind: {
                "rows": int((sources == kind).sum()),
                "scores": detection(inside, {name: values[sources == kind] for name, values in found.items()}),
            }
            for kind in kinds
        }
    return block


def detection_lines(block: dict[str, Any]) -> list[str]:
    """The block as text: a table of scores, and one more for each source."""
    tables = {"all": block["scores"]} | {name: part["scores"] for name, part in block.get("by_source", {}).items()}
    width = max(len(name) for scores in tables.values() for name in (*scores, *tables))
    lines = [f"out of distribution: {block['name']} ({block['rows']} rows)"]
    for source, scores in tables.items():
        lines.append(f"  {source if len(tables) > 1 else '':<{width}}   AUROC    AUPR   FPR95")
        for name, values in scores.items():
            lines.append(
                f"  {name:<{width}}  " + "  ".join(f"{values[key]:.4f}" for key in ("auroc", "aupr", "fpr95"))
            )
    return lines
