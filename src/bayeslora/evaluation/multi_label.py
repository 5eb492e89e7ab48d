r"""Scores of predictions with several labels a row.

Each of n rows has a yes or no for each of L labels: n L decisions, with probabilities $p_{il}$ of yes that do not sum
to 1 over a row. A decision is yes above one half. `nll`, `brier`, `ece` and `aurc` are those of the decisions: the
mean of $-\log$ of the probability of the right answer, in nats; the mean of $(p_{il} - y_{il})^2$; and the calibration
error and the area under risk and coverage with $\max(p_{il}, 1 - p_{il})$ as the confidence.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import f1_score, precision_recall_fscore_support, roc_auc_score

from bayeslora.errors import BayesLoraError
from bayeslora.evaluation.metrics import calibration_gap, confidence_bins
from bayeslora.evaluation.uncertainty import (
    Array,
    area_under_risk_coverage,
    by_correctness,
    histograms,
    risk_coverage_curve,
)


@dataclass(frozen=True)
class MultiLabelEvaluation:
    """Scores of a multi-label model on a split, with its predictions in the split's order.

    Attributes:
        scores: scores by name, from the function `multi_label_scores`.
        predictions: (n, L) probability of each label, averaged over samples.
        labels: (n, L) 1 for the labels of a row, otherwise 0.
        label_scores: scores of each label by its name, from the function `label_scores`.
        seconds: wall time of the forward passes.
        entropy: (n, L) entropy of each yes-or-no decision, in nats.
        mutual_information: (n, L) the part of `entropy` due to disagreement of the samples; 0 without samples.
        samples: number of draws from the posterior for each prediction; 0 is the posterior mean.
        baseline: scores of the best constant prediction: for every row, each label's share of the rows.
    """

    scores: dict[str, float]
    predictions: Array
    labels: Array
    label_scores: dict[str, dict[str, float]]
    seconds: float
    entropy: Array
    mutual_information: Array
    samples: int = 0
    baseline: dict[str, float] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.labels)

    @property
    def reliability(self) -> list[dict[str, Any]]:
        """Confidence bins over decisions, as in metrics.json."""
        return confidence_bins(*_decided(self.predictions, self.labels))

    @property
    def risk_coverage(self) -> dict[str, list[float]]:
        """Share of wrong decisions as a function of coverage, the most confident first, as in metrics.json."""
        confidence, correct = _decided(self.predictions, self.labels)
        return risk_coverage_curve(-confidence, ~correct)

    def histograms(self) -> dict[str, dict[str, Any]]:
        """Return histograms of entropy and mutual information of right and wrong decisions, as in metrics.json."""
        _, correct = _decided(self.predictions, self.labels)
        measures = {"entropy": self.entropy.ravel()}
        if self.samples:
            measures["mutual_information"] = self.mutual_information.ravel()
        return histograms(by_correctness(measures, correct), 2)


def multi_label_scores(probabilities: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """Return the scores of a multi-label model on n rows with L possible labels.

    Args:
        probabilities: (n, L) probability of each label.
        labels: (n, L) 1 for the labels of a row, otherwise 0.

    Returns:
        `f1_micro` (over all decisions together), `f1_macro` (mean over labels; 0 for a label that is neither present
        nor predicted), `exact_match` (share of rows with every label right), `label_accuracy` (share of right
        decisions), `nll`, `brier`, `ece` and `aurc`.

    Raises:
        BayesLoraError: the shapes differ, or a probability is not between 0 and 1.
    """
    chosen, truth = _checked(probabilities, labels)
    predicted = chosen > 0.5
    confidence, correct = _decided(chosen, truth)
    macro = [f1_score(*both, zero_division=0) for both in zip(truth.T, predicted.T, strict=True)]
    return {
        "f1_micro": float(f1_score(truth.ravel(), predicted.ravel(), zero_division=0)),
        "f1_macro": float(np.mean(macro)),
        "exact_match": float((predicted == truth).all(axis=1).mean()),
        "label_accuracy": float(correct.mean()),
        "nll": float(_losses(chosen, truth).mean()),
        "brier": float(((chosen - truth) ** 2).mean()),
        "ece": calibration_gap(confidence_bins(confidence, correct)),
        "aurc": area_under_risk_coverage(-confidence, ~correct),
    }


def label_scores(probabilities: ArrayLike, labels: ArrayLike, names: list[str]) -> dict[str, dict[str, float]]:
    """Return `precision`, `recall`, `f1`, `nll`, `rows` (how many have the label) and `auroc` of each label, by name.

    `auroc` is missing for a label that all rows or no rows have.
    """
    chosen, truth = _checked(probabilities, labels)
    found = {}
    for name, p, y in zip(names, chosen.T, truth.T, strict=True):
        scores = precision_recall_fscore_support(y, p > 0.5, average="binary", zero_division=0)
        found[name] = {key: float(score) for key, score in zip(("precision", "recall", "f1"), scores, strict=False)}
        found[name] |= {"nll": float(_losses(p, y).mean()), "rows": float(y.sum())}
        if 0 < y.mean() < 1:
            found[name]["auroc"] = float(roc_auc_score(y, p))
    return found


def baseline_of_labels(labels: ArrayLike) -> dict[str, float]:
    """Return the scores of the best constant prediction: each label's share of the rows."""
    truth = np.asarray(labels, dtype=np.float64)
    scores = multi_label_scores(np.tile(truth.mean(axis=0), (len(truth), 1)), truth)
    return {name: value for name, value in scores.items() if name not in ("ece", "aurc")}


def _losses(probabilities: Array, labels: Array) -> Array:
    of_right = np.where(labels == 1, probabilities, 1 - probabilities)
    return -np.log(np.maximum(of_right, np.finfo(np.float64).tiny))


def _decided(probabilities: Array, labels: Array) -> tuple[Array, NDArray[np.bool_]]:
    """Return the confidence (n L,) of each decision, and whether it is right."""
    correct = (probabilities > 0.5) == (labels == 1)
    return np.maximum(probabilities, 1 - probabilities).ravel(), np.asarray(correct.ravel())


def _checked(probabilities: ArrayLike, labels: ArrayLike) -> tuple[Array, Array]:
    chosen, truth = np.asarray(probabilities, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    if chosen.ndim != 2 or chosen.shape != truth.shape or not chosen.size:
        raise BayesLoraError(
            f"the shapes of probabilities and labels are {chosen.shape} and {truth.shape}, but must be the same "
            "(rows, labels): give a value for each label of each row"
        )
    if not ((chosen >= 0) & (chosen <= 1)).all() or not np.isin(truth, (0, 1)).all():
        raise BayesLoraError("a probability is not between 0 and 1 or a label not 0 or 1, but must be: correct it")
    return chosen, truth
