"""The results page's part on calibration: a table for each task, and whether the claims of Me-LoRA hold there."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from intervals import differences, probabilities_of
from patterns import Verdict
from records import TASK_TITLES, Run, check_alike, markdown_table, read_runs, spread
from results_glue import missing

from bayeslora.evaluation.metrics import classification_scores
from bayeslora.evaluation.uncertainty import excess_area

TASKS = ("mrpc", "cola", "rte", "winogrande", "arc_easy")
"""Those of the earlier table."""
CLOZE = "-cloze"
"""Ending of the name of a task that a language model answers by cloze; the older runs answered by letters."""
LANGUAGE = ("winogrande", "arc_easy", "openbookqa")
"""Tasks of the language model; by cloze its classes are the texts of a row's choices."""
MORE_TASKS = ("mrpc", "cola", "rte", "sst2", "qnli", *LANGUAGE, *(f"{task}{CLOZE}" for task in LANGUAGE))
METHODS = {"lora": "LoRA", "melora": "Me-LoRA, learned variances", "blob": "BLoB"}
SAMPLES = 10
ROWS = {
    "lora": "LoRA",
    "temperature": "LoRA + temperature",
    "dropout": f"MC dropout, {SAMPLES} samples",
    "ensemble": "ensemble of the seeds",
    "blob-mean": "BLoB, mean",
    "blob": f"BLoB, {SAMPLES} samples",
    "melora-mean": "Me-LoRA, learned variances, mean",
    "melora": f"Me-LoRA, learned variances, {SAMPLES} samples",
}
TUNED_ROWS = {
    "tuned": "LoRA, tuned",
    "tuned-temperature": "LoRA + temperature",
    "tuned-vector": "LoRA + vector scaling",
    "tuned-isotonic": "LoRA + isotonic",
    "tuned-dropout": "MC dropout",
    "tuned-ensemble": "ensemble of 3",
    "laplace": "Laplace on the head",
    "swag-mean": "SWAG, mean",
    "swag": "SWAG",
    "tfb": "TFB (bayesianize)",
    "ivon-mean": "IVON, mean",
    "ivon": "IVON",
    "blob-mean": "BLoB, mean",
    "blob": "BLoB",
    "melora-closed-mean": "Me-LoRA, mean",
    "melora-closed": "Me-LoRA",
    "melora-closed-temperature": "Me-LoRA + temperature",
    "melora-cores": "Me-LoRA, 4 cores",
    "melora-cores-means": "Me-LoRA, 4 cores without noise",
    "melora-cores-temperature": "Me-LoRA, 4 cores + temperature",
}
"""Rows of the table that a tuned LoRA is the baseline of."""
BASELINE = "tuned-temperature"
MEMBERS = 3
TUNED_SCORES = ("accuracy", "nll", "ece", "brier", "aurc", "excess_aurc")
LOWER_IS_BETTER = TUNED_SCORES[1:]
SCORES = ("accuracy", "ece", "nll", "brier", "aurc")
INTRO = """The models are MiniLM-L6 and, for the multiple-choice tasks, SmolLM2-135M. All rows of a table use the same
layers, steps, learning rate and data (90% of train, 80% by cloze). Temperatures are fitted on the rest. Scores are the
mean ± standard deviation over seeds, as fractions of 1. SmolLM2 answers by letters (it names a choice by letter) or
by cloze (the text of a choice is likely), as the heading says. Where a heading says "guesses", every run is within two
standard errors of guessing, so its table compares how confident each method is when it knows nothing.

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
    by_task = {task: rows_of([run for run in runs if answered(run) == task]) for task in MORE_TASKS}
    tables = {task: by_task[task] for task in TASKS}
    parts = [f"### {title(task, rows)}\n\n{task_table(rows)}" for task, rows in tables.items() if "lora" in rows]
    if any("lora" in rows for rows in tables.values()):
        parts += ["### Claims\n", claims_table(tables)]
    intervals = _differences(folder)
    for task, rows in by_task.items():
        if "tuned" in rows:
            parts.append(f"### {title(task, rows)}, LoRA tuned\n\n{tuned_table(rows)}")
            parts += [differences_table(intervals[task])] if task in intervals else []
    return "\n".join([INTRO, *parts])


def write_differences(folder: Path) -> None:
    """Write the differences of every row to tuned LoRA with a temperature, task by task, beside the runs' folder."""
    runs = read_runs(folder)
    found: dict[str, Any] = {}
    for task in dict.fromkeys(map(answered, runs)):
        rows = rows_of([run for run in runs if answered(run) == task])
        if BASELINE in rows:
            others = [name for name in TUNED_ROWS if name in rows and name != BASELINE]
            found[task] = {name: _against(rows[name], rows[BASELINE], name) for name in others}
    if found:
        _differences_file(folder).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def answered(run: Run) -> str:
    """The task's name, and its ending where a language model has answered by cloze."""
    return str(run["task"]) + (CLOZE if run.get("scoring") == "cloze" else "")


def _against(runs: Sequence[Run], others: Sequence[Run], name: str) -> dict[str, Any]:
    """The differences of one row to the baseline, over the seeds that both have."""
    one, other = ({run["seed"]: run for run in each} for each in (runs, others))
    seeds = sorted(one.keys() & other.keys())
    if not seeds or any(one[seed]["labels"] != other[seed]["labels"] for seed in seeds):
        return {"seeds": []}
    labels = np.asarray(one[seeds[0]]["labels"], dtype=np.int64)
    ours = [probabilities_of(one[seed]["forms"][name], len(labels)) for seed in seeds]
    theirs = [probabilities_of(other[seed]["forms"][BASELINE], len(labels)) for seed in seeds]
    return {"seeds": seeds, **differences(ours, theirs, labels)}


def _differences_file(folder: Path) -> Path:
    return folder.with_name(folder.name + "-differences.json")


def _differences(folder: Path) -> dict[str, Any]:
    path = _differences_file(folder)
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def missing_calibration(folder: Path) -> list[str]:
    titles = {name: f"calibration, {title}" for name, title in METHODS.items()}
    return missing([run for run in read_runs(folder) if answered(run) == run["task"]], titles, TASKS)


def rows_of(runs: Sequence[Run]) -> Table:
    """One task's runs by the rows that they fill; several of LoRA fill `ensemble` too."""
    found: Table = {}
    for run in sorted(runs, key=lambda each: each["seed"]):
        for name in run["forms"]:
            found.setdefault(name, []).append(run)
    for rows in found.values():
        check_alike(rows)
    if len(found.get("lora", [])) > 1:
        found["ensemble"] = [ensemble(found["lora"], "lora", "ensemble")]
    if len(members := found.get("tuned", [])) >= MEMBERS:
        # One for each seed: that seed's and the next two in a circle. With three seeds all are the same.
        circle = [*members, *members[: MEMBERS - 1]]
        groups = [circle[start : start + MEMBERS] for start in range(len(members))]
        found["tuned-ensemble"] = [ensemble(group, "tuned", "tuned-ensemble") for group in groups]
    return found


def ensemble(members: Sequence[Run], form: str, name: str) -> Run:
    """A run called as the first member's that scores the members' averaged probabilities."""
    labels = np.asarray(members[0]["labels"])
    mean = np.mean([probabilities_of(each["forms"][form], len(labels)) for each in members], axis=0)
    scores = classification_scores(mean, labels, (members[0]["metric"],))
    excess = excess_area(1 - mean.max(axis=1), mean.argmax(axis=1) != labels)
    parameters = {"adapter": sum(each["parameters"]["adapter"] for each in members)}
    own = {
        "scores": {**scores, "excess_aurc": excess},
        "passes": len(members),
        "numbers": parameters["adapter"],
        "probabilities": mean.tolist(),
    }
    seconds = sum(each.get("seconds", 0.0) for each in members)
    return {**members[0], "forms": {name: own}, "parameters": parameters, "seconds": seconds}


def tuned_table(rows: Table) -> str:
    """Scores and costs of the rows around a tuned LoRA."""
    first = rows["tuned"][0]
    lines = []
    for name, title in TUNED_ROWS.items():
        runs = rows.get(name, [])
        if not runs:
            continue
        seconds = [run["seconds"] + run["forms"][name].get("fit_seconds", 0.0) for run in runs]
        lines.append(
            [
                title,
                str(len(runs)),
                *(spread([_score(run, name, score) for run in runs], 3) for score in TUNED_SCORES),
                f"{statistics.fmean(seconds):,.0f}",
                str(runs[0]["forms"][name].get("passes", SAMPLES if name == "blob" else 1)),
                f"{runs[0]['forms'][name].get('numbers', runs[0]['parameters']['adapter']):,}",
            ]
        )
    scores = [score.replace("_", " ") for score in TUNED_SCORES]
    head = ["method", "seeds", *scores, "seconds to train", "passes to predict", "parameters"]
    search = statistics.fmean(sum(each["seconds"] for each in run["search"]) for run in rows["tuned"])
    training = first["training"]
    return (
        f"At most {training['steps']} steps of {training['batch_size']} rows; {len(first['labels']):,} rows of the "
        f"{first['split']} split. The learning rate and length of all methods are LoRA's best on held-out rows of "
        f"train, found with seed 0 in {search:,.0f} seconds that the table leaves out.\n\n"
        f"{markdown_table(head, lines)}{left_out(rows)}"
    )


def left_out(rows: Table) -> str:
    """The rows that no run fills, each with the reason that the files give."""
    reasons = {name: why for run in rows["tuned"] for name, why in run.get("left_out", {}).items()}
    lines = [f"- {TUNED_ROWS[name]}: {why}" for name, why in reasons.items() if name not in rows]
    return "\nLeft out:\n\n" + "\n".join(lines) + "\n" if lines else ""


def _score(run: Run, name: str, score: str) -> float:
    """A score of a row; older files lack the excess of the area, but have the probabilities."""
    form = run["forms"][name]
    if score in form["scores"]:
        return float(form["scores"][score])
    labels = np.asarray(run["labels"])
    p = probabilities_of(form, len(labels))
    return excess_area(1 - p.max(axis=1), p.argmax(axis=1) != labels)


def differences_table(found: Mapping[str, Any]) -> str:
    """Differences to the baseline with their intervals; bold where the interval excludes zero."""
    lines = []
    for name, title in TUNED_ROWS.items():
        if found.get(name, {}).get("seeds"):
            cells = (_difference(score, *found[name][score]) for score in TUNED_SCORES)
            lines.append([title, str(len(found[name]["seeds"])), *cells])
    head = ["minus LoRA + temperature", "seeds", *(score.replace("_", " ") for score in TUNED_SCORES)]
    return (
        "Difference and its 95% interval (bootstrap over rows and seeds, paired). Bold: better, the interval excludes "
        f"zero; italic: worse. Where an interval includes zero it is a tie.\n\n{markdown_table(head, lines)}"
    )


def _difference(score: str, value: float, low: float, high: float) -> str:
    text = f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"
    if low <= 0 <= high:
        return text
    is_better = (value < 0) == (score in LOWER_IS_BETTER)
    return f"**{text}**" if is_better else f"*{text}*"


def title(task: str, rows: Table) -> str:
    """The task, and of a language model how it answers, and whether no row is better than guesses."""
    task = task.removesuffix(CLOZE)
    if task not in GUESSING:
        return TASK_TITLES[task]
    runs = [(name, run) for name, found in rows.items() for run in found]
    unit = {"tokens": " per token", "bytes": " per byte"}.get(runs[0][1].get("normalization", ""), "")
    how = f"{TASK_TITLES[task]} by {runs[0][1].get('scoring', 'letters')}{unit}"
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
