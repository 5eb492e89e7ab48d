"""Scores of a run on shifted texts and on another domain, by suite and severity."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from torch import nn

from bayeslora.data import Task
from bayeslora.data.choices import QUESTION
from bayeslora.errors import BayesLoraError
from bayeslora.evaluation import Evaluation, shifted
from bayeslora.evaluation.shift import SEVERITIES
from bayeslora.posthoc.conformal import ConformalSets
from bayeslora.runs.decisions import CALIBRATION_FILE, Calibration, calibration_for
from bayeslora.runs.record import DOMAIN, NO_SHIFT

COVERAGE = 0.9
"""Coverage that the conformal sets of `conformal_scores` are for."""
Encode = Callable[[Dataset, Task], Dataset]
"""Function that encodes rows with the columns and labels of a task."""
Score = Callable[[Dataset, Task], Evaluation]
"""Function that scores the run on encoded rows of a task."""


@dataclass(frozen=True)
class Domain:
    """Labelled rows of another source, with the classes of the run."""

    name: str
    task: Task
    rows: Dataset


def shift_columns(task: Task, column: str | None = None) -> list[str]:
    """Return the columns to shift: all texts, of multiple choice the question; or the one that is named.

    Raises:
        BayesLoraError: `column` is not one of them.
    """
    columns = [QUESTION] if task.kind == "multiple_choice" else list(task.text_columns)
    if column is None:
        return columns
    if column not in columns:
        raise BayesLoraError(
            f"--shift-column is {column!r}, but the texts are in {', '.join(columns)}: name one of these"
        )
    return [column]


def conformal_scores(
    folder: Path, model: nn.Module, samples: int, seed: int, uncalibrated: bool = False
) -> Callable[[Evaluation], dict[str, float]]:
    """Return a function that gives coverage and mean size of the run's conformal sets, as `more` of `scored_shift`.

    It gives nothing without `conformal.json`, for a regression, or where that file was made with other samples, for
    another model, or with a map of the probabilities that is left out (`uncalibrated`).
    """
    found = Calibration.load(folder) if (folder / CALIBRATION_FILE).is_file() else None
    sets = None if found is None else found.sets
    if found is not None and isinstance(sets, ConformalSets):
        try:
            calibration_for(folder, samples, seed, decides=True, uncalibrated=uncalibrated)
            found.check_model(folder, model)
        except BayesLoraError as error:
            warnings.warn(f"the coverage of conformal sets is left out, because {error}", stacklevel=2)
            sets = None

    def scores(evaluation: Evaluation) -> dict[str, float]:
        if not isinstance(sets, ConformalSets):
            return {}
        chosen = sets.sets(evaluation.predictions, COVERAGE).numpy()
        held = chosen[np.arange(len(chosen)), evaluation.labels]
        return {"coverage": float(held.mean()), "set_size": float(chosen.sum(axis=1).mean())}

    return scores


def scored_shift(
    plain: Evaluation,
    rows: Dataset,
    task: Task,
    encode: Encode,
    score: Score,
    suites: Sequence[str] = (),
    columns: Sequence[str] = (),
    seed: int = 0,
    domain: Domain | None = None,
    more: Callable[[Evaluation], Mapping[str, float]] = lambda evaluation: {},
) -> dict[str, Any]:
    """Return the `shift` block of `metrics.json`: scores by suite and severity, those without a shift first.

    Args:
        plain: evaluation of `rows` as they are; its scores are those of severity 0.
        rows: of `task`, with labels.
        task: of the run.
        encode, score: for other rows. Rows that a shift does not change for the model are not scored again.
        suites: some of `evaluation.shift.SEVERITIES`, each at all of its levels.
        columns: to shift; see `shift_columns`.
        seed: of the edits.
        domain: also score these rows, as they are.
        more: further scores of an evaluation, by name, such as the coverage of conformal sets.
    """

    def level(suite: str, severity: float, evaluation: Evaluation, **named: Any) -> dict[str, Any]:
        scores = {**evaluation.scores, **more(evaluation)}
        return {"suite": suite, "severity": severity, **named, "rows": len(evaluation.labels), "scores": scores}

    levels = [level(NO_SHIFT, 0.0, plain)]
    before = encode(rows, task) if suites else rows
    for suite in suites:
        for severity in SEVERITIES[suite]:
            after = encode(shifted(rows, columns, suite, severity, seed), task)
            changed = sum(one != other for one, other in zip(before, after, strict=True))
            levels.append(level(suite, severity, score(after, task) if changed else plain, changed=changed))
    if domain is not None:
        evaluation = score(encode(domain.rows, domain.task), domain.task)
        levels.append(level(DOMAIN, 1.0, evaluation, name=domain.name))
    return {"columns": list(columns) if suites else [], "seed": seed, "levels": levels}
