"""Score runs that generate text: the tokens of known answers, and for a named task the answers themselves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from datasets import Dataset

from bayeslora.data import Task
from bayeslora.data.chat import answer_of
from bayeslora.data.text_tasks import NO_ANSWER, REFERENCES, TEXT_TASKS
from bayeslora.evaluation import TextEvaluation, evaluate_text
from bayeslora.evaluation.text_metrics import check_metrics, text_scores
from bayeslora.evaluation.uncertainty import area_under_risk_coverage, risk_coverage_curve
from bayeslora.runs.answers import Answer, Sampling, answer_rows, is_random


@dataclass(frozen=True)
class AnswerEvaluation:
    """Scores of the answers to the rows of a split.

    Attributes:
        scores: those of the task, and the area under risk and coverage (`aurc_…`) by each measure of uncertainty.
        risk_coverage: by measure, `coverage` and `risk`, as in metrics.json. The risk is the mean loss: 1 - F1, or
            1 - ROUGE-L.
        answers: in the order of the rows.
    """

    scores: dict[str, float]
    risk_coverage: dict[str, dict[str, list[float]]]
    answers: list[Answer]


def scored_text(
    predictor: Any, task: Task, rows: Dataset, encoded: Dataset, tokenizer: Any, batch_size: int, sampling: Sampling
) -> dict[str, Any]:
    """Return the part of `metrics.json` about a split, and its number of `rows` and `seconds`.

    The predictor is a model or the posterior of its weights; `encoded` has the split's `rows`, encoded.
    """
    draws = sampling.samples if is_random(predictor) or not sampling.temperature else 0
    tokens: TextEvaluation = evaluate_text(predictor, encoded, tokenizer, batch_size, draws, sampling.seed)
    found = {
        "scores": tokens.scores,
        "samples": sampling.samples,
        "reliability": {"bins": tokens.reliability},
        "risk_coverage": tokens.risk_coverage,
        "uncertainty": tokens.histograms(),
        "rows": tokens.rows,
        "seconds": tokens.seconds,
    }
    if is_answered(task):
        answers = evaluate_answers(predictor, task, rows, tokenizer, batch_size, sampling)
        found["scores"] = {**answers.scores, **tokens.scores}
        found["risk_coverage_by"] = answers.risk_coverage
    return found


def check_text_metrics(task: Task) -> None:
    """Raise `BayesLoraError` if the scores of a task need a package that is missing."""
    if is_answered(task):
        check_metrics(task.metrics)


def evaluate_answers(
    predictor: Any, task: Task, rows: Dataset, tokenizer: Any, batch_size: int, sampling: Sampling
) -> AnswerEvaluation:
    """Answer the rows of a split of a named task, and score the answers against the right ones."""
    answers = answer_rows(predictor, tokenizer, list(rows), sampling_of(task, sampling), batch_size)
    scores, losses = text_scores(task.metrics, [answer.text for answer in answers], references_of(rows))
    measures = uncertainty_of(answers)
    areas = {f"aurc_{name}": area_under_risk_coverage(values, losses) for name, values in measures.items()}
    curves = {name: risk_coverage_curve(values, losses) for name, values in measures.items()}
    return AnswerEvaluation({**scores, **areas}, curves, answers)


def is_answered(task: Task) -> bool:
    """Return whether the answers to the rows of a task are scored; a file alone may have the name of such a task."""
    return task.name in TEXT_TASKS and task.metric == TEXT_TASKS[task.name].metrics[0]


def sampling_of(task: Task, sampling: Sampling) -> Sampling:
    """Return the settings with the maximum length of the task's answers, where none is given."""
    if sampling.max_new_tokens is not None or not is_answered(task):
        return sampling
    return replace(sampling, max_new_tokens=TEXT_TASKS[task.name].max_new_tokens)


def references_of(rows: Dataset) -> list[list[str]]:
    """Return the right answers to each row: those of a named task, otherwise the one that the row ends with."""
    if REFERENCES in rows.column_names:
        return list(rows[REFERENCES])
    known = [(answer_of(row) or "").strip() for row in rows]
    return [[] if answer == NO_ANSWER else [answer] for answer in known]


def uncertainty_of(answers: list[Answer]) -> dict[str, np.ndarray]:
    """Return measures of uncertainty (n,) of answers as wholes, larger is less sure.

    `probability` is minus the log-probability of the answer under the mean of the draws; `mutual_information` the mean
    over its tokens, with draws of the weights; `semantic_entropy` that of the draws' answers.
    """
    found = {"probability": np.array([-answer.mixture_log_probability for answer in answers])}
    if any(answer.draw_log_probabilities for answer in answers):
        means = [np.mean(answer.mutual_information or [0.0]) for answer in answers]
        found["mutual_information"] = np.array(means)
    if any(answer.draws for answer in answers):
        found["semantic_entropy"] = np.array([answer.semantic_entropy or 0.0 for answer in answers])
    return found
