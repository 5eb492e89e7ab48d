"""The results page's part on foreign texts: AUROC by score and kind of text, and the best score named."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from records import TASK_TITLES, Run, check_alike, markdown_table, read_runs, spread

SAMPLES = 10
TASKS = {"rotten_tomatoes": "Rotten Tomatoes", "sst2": TASK_TITLES["sst2"], "mrpc": TASK_TITLES["mrpc"]}
METHODS = {"lora": "LoRA", "melora": "Me-LoRA"}
FORMS = {
    "lora": "LoRA",
    "dropout": f"MC dropout, {SAMPLES} samples",
    "melora-mean": "Me-LoRA, mean",
    "melora": f"Me-LoRA, {SAMPLES} samples",
    "features": "{}, features",
}
SCORES = {
    "max_probability": "1 − max probability",
    "entropy": "entropy",
    "mutual_information": "mutual information",
    "energy": "energy",
    "mahalanobis": "Mahalanobis",
    "relative_mahalanobis": "relative Mahalanobis",
    "nearest_neighbors": "nearest neighbors",
}
INTRO = """AUROC of foreign texts against the task's evaluation split: mean ± standard deviation over seeds, and 0.5 is
chance. The last column is the mean over the kinds of text. The model is MiniLM-L6.

"""

Row = tuple[str, str, str]
"""Method, form and score of a line."""


def ood_section(folder: Path) -> str:
    """A table for each task that has been run, each with its best score."""
    runs = read_runs(folder)
    if not runs:
        return "Not run.\n"
    parts = []
    for task, title in TASKS.items():
        of_task = [run for run in runs if run["task"] == task]
        if of_task:
            parts.append(f"### {title}\n\n{task_table(of_task)}")
    return "\n".join([INTRO, *parts])


def task_table(runs: Sequence[Run]) -> str:
    """One task's lines, by method, form and score."""
    by_method = {method: [run for run in runs if run["method"] == method] for method in METHODS}
    for of_method in by_method.values():
        check_alike(of_method)
    rows = [
        (method, form, score)
        for method in METHODS
        for form in FORMS
        for score in SCORES
        if any(score in next(iter(found["detection"].values())) for found in found_in(by_method[method], form))
    ]
    first = runs[0]
    kinds = [kind for kind in first["rows"] if kind != "in"]
    lines, means = [], {}
    for method, form, score in rows:
        by_kind = [aurocs(by_method[method], form, score, kind) for kind in kinds]
        over_kinds = [statistics.fmean(values) for values in zip(*by_kind, strict=True)]
        title = f"{FORMS[form].format(METHODS[method])}: {SCORES[score]}"
        means[title] = statistics.fmean(over_kinds)
        lines.append([title, str(len(over_kinds)), *(spread(values, 3) for values in by_kind), spread(over_kinds, 3)])
    best = max(means, key=lambda title: means[title])
    training = first["training"]
    return (
        f"{training['steps']} steps of {training['batch_size']} rows, learning rate {training['learning_rate']:g}; "
        f"{first['rows']['in']} ordinary rows. Best on average: {best} ({means[best]:.3f}).\n\n"
        f"{markdown_table(['score', 'seeds', *kinds, 'mean'], lines)}"
    )


def found_in(runs: Sequence[Run], form: str) -> list[Run]:
    return [run["forms"][form] for run in runs if form in run["forms"]]


def aurocs(runs: Sequence[Run], form: str, score: str, kind: str) -> list[float]:
    """The AUROC of each seed that has the score."""
    found = (each["detection"][kind].get(score) for each in found_in(runs, form))
    return [values["auroc"] for values in found if values is not None]
