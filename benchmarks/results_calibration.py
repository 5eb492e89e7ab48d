"""The results page's part on calibration: a table for each task, and whether the claims of Me-LoRA hold there."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from patterns import Verdict
from records import TASK_TITLES, Run, check_alike, markdown_table, read_runs, spread
from results_glue import missing

from bayeslora.evaluation.metrics import classification_scores

TASKS = ("mrpc", "cola", "rte", "winogrande", "arc_easy")
METHODS = {"lora": "LoRA", "melora": "Me-LoRA", "blob": "BLoB"}
SAMPLES = 10
ROWS = {
    "lora": "LoRA",
    "temperature": "LoRA + temperature",
    "dropout": f"MC dropout, {SAMPLES} samples",
    "ensemble": "ensemble of the seeds",
    "blob-mean": "BLoB, mean",
    "blob": f"BLoB, {SAMPLES} samples",
    "melora-mean": "Me-LoRA, mean",
    "melora": f"Me-LoRA, {SAMPLES} samples",
}
SCORES = ("accuracy", "ece", "nll", "brier", "aurc")
INTRO = """The models are MiniLM-L6 and, for the multiple-choice tasks, SmolLM2-135M. All rows of a table use the same
layers, steps, learning rate and data (90% of train). Temperatures are fitted on the other 10%. Scores are the mean ±
standard deviation over seeds, as fractions of 1. Where a heading says "guesses", every run is within two standard
errors of guessing, so its table compares how confident each method is when it knows nothing.

"""
GUESSING = {"winogrande": 0.5, "arc_easy": 0.25, "openbookqa": 0.25}
"""Accuracy of guesses at the choices of a language model's task."""
POINTS = {"rte": 2.0}
"""Points of accuracy that Me-LoRA may be short of LoRA where it is more than one: RTE is near chance for MiniLM."""

Table = dict[str, list[Run]]
"""By the name of a row, the runs (by seed) that fill it."""


def calibration_section(folder: Path) -> str:
    """All tasks that have been run, and the claims."""
    runs = read_runs(folder)
    if not runs:
        return "Not run.\n"
    tables = {task: rows_of([run for run in runs if run["task"] == task]) for task in TASKS}
    parts = [f"### {title(task, rows)}\n\n{task_table(rows)}" for task, rows in tables.items() if rows]
    return "\n".join([INTRO, *parts, "### Claims\n", claims_table(tables)])


def missing_calibration(folder: Path) -> list[str]:
    titles = {name: f"calibration, {title}" for name, title in METHODS.items()}
    return missing(read_runs(folder), titles, TASKS)


def rows_of(runs: Sequence[Run]) -> Table:
    """One task's runs by the rows that they fill; several of LoRA fill `ensemble` too."""
    found: Table = {}
    for run in sorted(runs, key=lambda each: each["seed"]):
        for name in run["forms"]:
            found.setdefault(name, []).append(run)
    for rows in found.values():
        check_alike(rows)
    if len(found.get("lora", [])) > 1:
        found["ensemble"] = [ensemble(found["lora"])]
    return found


def ensemble(members: Sequence[Run]) -> Run:
    """A run that scores the members' averaged probabilities."""
    mean = np.mean([each["forms"]["lora"]["probabilities"] for each in members], axis=0)
    mean /= mean.sum(axis=1, keepdims=True)  # rounded in the files
    scores = classification_scores(mean, np.asarray(members[0]["labels"]), (members[0]["metric"],))
    parameters = {"adapter": sum(each["parameters"]["adapter"] for each in members)}
    return {**members[0], "forms": {"ensemble": {"scores": scores}}, "parameters": parameters}


def title(task: str, rows: Table) -> str:
    """The task, and of a language model how it answers, and whether no row is better than guesses."""
    if task not in GUESSING:
        return TASK_TITLES[task]
    runs = [(name, run) for name, found in rows.items() for run in found]
    how = f"{TASK_TITLES[task]} by {runs[0][1].get('scoring', 'letters')}"
    guess = GUESSING[task]
    error = (guess * (1 - guess) / len(runs[0][1]["labels"])) ** 0.5
    accuracies = [run["forms"][name]["scores"]["accuracy"] for name, run in runs]
    return f"{how} (guesses)" if all(abs(each - guess) <= 2 * error for each in accuracies) else how


def task_table(rows: Table) -> str:
    first = next(iter(rows.values()))[0]
    training = first["training"]
    columns = list(dict.fromkeys([first["metric"], *SCORES]))
    lines = [
        [
            ROWS[name],
            f"{statistics.fmean(run['parameters']['adapter'] for run in rows[name]):,.0f}",
            str(len(rows["lora"]) if name == "ensemble" else len(rows[name])),
            *(spread(values(rows, name, column), 3) for column in columns),
        ]
        for name in ROWS
        if name in rows
    ]
    head = ["method", "adapter parameters", "seeds", *(column.replace("_", " ") for column in columns)]
    return (
        f"{training['steps']} steps of {training['batch_size']} rows, learning rate {training['learning_rate']:g}; "
        f"{len(first['labels']):,} rows of the {first['split']} split.\n\n{markdown_table(head, lines)}"
    )


def values(rows: Table, name: str, score: str) -> list[float]:
    return [run["forms"][name]["scores"][score] for run in rows.get(name, [])]


def claims_table(tables: Mapping[str, Table]) -> str:
    """Each claim, task by task."""
    tasks = [task for task, rows in tables.items() if rows]
    lines = [
        [claim, *(ask(tables[task], POINTS.get(task, 1.0)).cell for task in tasks)] for claim, ask in CLAIMS.items()
    ]
    return markdown_table(
        ["Me-LoRA, 10 samples", *(title(task, tables[task]) for task in tasks)], lines, left=len(tasks) + 1
    )


def half_the_error(rows: Table, points: float) -> Verdict:
    return _compared(rows, "ece", "lora", lambda ours, other: ours <= other / 2)


def likelier(rows: Table, points: float) -> Verdict:
    return _compared(rows, "nll", "lora", lambda ours, other: ours < other)


def as_accurate(rows: Table, points: float) -> Verdict:
    return _compared(rows, "accuracy", "lora", lambda ours, other: points_short(ours, other) <= points)


def points_short(ours: float, other: float) -> float:
    return round(100 * (other - ours), 9)


def below_blob(rows: Table, points: float) -> Verdict:
    """The error is no larger than BLoB's; asked where our accuracy is not lower than BLoB's by more than `points`."""
    accuracies = [values(rows, name, "accuracy") for name in ("melora", "blob")]
    if all(accuracies) and points_short(*map(statistics.fmean, accuracies)) > points:
        return Verdict(None, "less accurate than BLoB")
    return _compared(rows, "ece", "blob", lambda ours, other: ours <= other)


def _compared(rows: Table, score: str, other: str, holds: Callable[[float, float], bool]) -> Verdict:
    found = [values(rows, name, score) for name in ("melora", other)]
    if not all(found):
        return Verdict(None, "")
    ours, theirs = map(statistics.fmean, found)
    return Verdict(holds(ours, theirs), f"{ours:.3f}, {METHODS[other]} {theirs:.3f}")


CLAIMS = {
    "ECE at most half of LoRA's": half_the_error,
    "NLL below LoRA's": likelier,
    "accuracy within 1 point of LoRA's (2 on RTE), or higher": as_accurate,
    "ECE no larger than BLoB's, at no lower accuracy": below_blob,
}
