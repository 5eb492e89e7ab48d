r"""Scores of predictions in float64, from scikit-learn and SciPy where they have them.

Probabilities are (n, C) with rows that sum to 1, labels are (n,) class ids, values are (n,) floats. Every average is
over examples, never over batches. Sums over classes are not divided by C. Log-likelihood and Brier score are computed
here, because scikit-learn clips probabilities at 2e-16 and rejects those that rounding puts above 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import pearsonr, rankdata
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from bayeslora.errors import BayesLoraError
from bayeslora.evaluation.uncertainty import (
    BINS,
    Array,
    adaptive_calibration_error,
    aligned,
    area_under_risk_coverage,
    bin_index,
    class_arrays,
    classwise_calibration_error,
)


def softmax(logits: ArrayLike) -> Array:
    """Return the softmax over the last axis in float64, stable for logits of any size."""
    values = np.asarray(logits, dtype=np.float64)
    shifted = np.exp(values - values.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))


def matthews_correlation(predicted: ArrayLike, labels: ArrayLike) -> float:
    """Return the Matthews correlation, generalized to C classes (Gorodkin, 2004); 0 if either side is constant."""
    predicted, labels = aligned(predicted, labels)
    return float(matthews_corrcoef(labels, predicted))


def accuracy(predicted: ArrayLike, labels: ArrayLike) -> float:
    """Return the share of examples whose predicted class id is the label."""
    predicted, labels = aligned(predicted, labels)
    return float(accuracy_score(labels, predicted))


def f1(predicted: ArrayLike, labels: ArrayLike) -> float:
    """Return the harmonic mean of precision and recall of class 1; 0 if it is neither present nor predicted."""
    predicted, labels = aligned(predicted, labels)
    return float(f1_score(labels == 1, predicted == 1, zero_division=0))


def pearson(predicted: ArrayLike, values: ArrayLike) -> float:
    """Return Pearson's correlation; 0 if either side is constant, where the ratio is undefined."""
    predicted, values = aligned(predicted, values)
    if np.ptp(predicted) == 0 or np.ptp(values) == 0:
        return 0.0
    return float(pearsonr(predicted, values).statistic)


def spearman(predicted: ArrayLike, values: ArrayLike) -> float:
    """Return Spearman's correlation: Pearson's of the ranks, where ties share their mean rank."""
    predicted, values = aligned(predicted, values)
    return pearson(rankdata(predicted), rankdata(values))


CLASSIFICATION_METRICS: dict[str, Callable[[ArrayLike, ArrayLike], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews_correlation": matthews_correlation,
}
"""Metrics that compare predicted class ids with labels, by the name that a task uses."""


def negative_log_likelihood(probabilities: ArrayLike, labels: ArrayLike) -> float:
    r"""Return the mean of $-\log p(\text{label})$ in nats; probability 0 counts as the smallest float64."""
    chosen, labels = class_arrays(probabilities, labels)
    picked = chosen[np.arange(len(labels)), labels]
    return float(-np.mean(np.log(np.maximum(picked, np.finfo(np.float64).tiny))))


def brier(probabilities: ArrayLike, labels: ArrayLike) -> float:
    r"""Return the Brier score $\frac1n \sum_i \sum_k (p_{ik} - [k = y_i])^2$, which is 0 to 2 (Brier, 1950)."""
    chosen, labels = class_arrays(probabilities, labels)
    errors = chosen.copy()
    errors[np.arange(len(labels)), labels] -= 1.0
    return float(np.mean(np.sum(errors**2, axis=1)))


def reliability_bins(probabilities: ArrayLike, labels: ArrayLike, bins: int = BINS) -> list[dict[str, Any]]:
    """Return a reliability diagram: equal-width bins (lower, upper] of the predicted class's probability.

    Returns:
        One dict per bin: `lower`, `upper`, `count`, and mean `confidence` and `accuracy`, None in an empty bin.
    """
    chosen, labels = class_arrays(probabilities, labels)
    return confidence_bins(chosen.max(axis=1), chosen.argmax(axis=1) == labels, bins)


def confidence_bins(confidence: ArrayLike, correct: ArrayLike, bins: int = BINS) -> list[dict[str, Any]]:
    """Return the bins of `reliability_bins`, given the confidence (n,) of each prediction and whether it is right."""
    confidence, correct = aligned(confidence, correct)
    index = bin_index(confidence, bins)
    result: list[dict[str, Any]] = []
    for position, (lower, upper) in enumerate(itertools.pairwise(np.linspace(0.0, 1.0, bins + 1).tolist())):
        inside = index == position
        count = int(inside.sum())
        means = {"confidence": confidence, "accuracy": correct}
        found = {name: float(values[inside].mean()) if count else None for name, values in means.items()}
        result.append({"lower": lower, "upper": upper, "count": count, **found})
    return result


def expected_calibration_error(probabilities: ArrayLike, labels: ArrayLike, bins: int = BINS) -> float:
    r"""Return the calibration error (ECE) $\sum_b \frac{n_b}{n} |\text{acc}_b - \text{conf}_b|$ (Guo et al., 2017)."""
    return calibration_gap(reliability_bins(probabilities, labels, bins))


def calibration_gap(bins: Sequence[Mapping[str, Any]]) -> float:
    """Return the mean absolute gap between accuracy and confidence of the bins, weighted by their counts."""
    filled = [b for b in bins if b["count"]]
    total = sum(b["count"] for b in filled)
    return float(sum(b["count"] * abs(b["accuracy"] - b["confidence"]) for b in filled) / total)


def classification_scores(
    probabilities: ArrayLike, labels: ArrayLike, metrics: Sequence[str] = ("accuracy",)
) -> dict[str, float]:
    """Return the headline and calibration scores of a classifier; the given `metrics` come first.

    Args:
        probabilities: (n, C) class probabilities.
        labels: (n,) class ids.
        metrics: some of `"accuracy"`, `"f1"` (of class 1) and `"matthews_correlation"`; `accuracy` is always added.

    Returns:
        The metrics, `accuracy`, `nll`, `ece`, `adaptive_ece`, `classwise_ece`, `brier` and `aurc` (with the predicted
        class's probability as confidence).
    """
    chosen, labels = class_arrays(probabilities, labels)
    predicted = chosen.argmax(axis=1)
    unknown = [name for name in metrics if name not in CLASSIFICATION_METRICS]
    if unknown:
        known = ", ".join(CLASSIFICATION_METRICS)
        raise BayesLoraError(f"the metric is {unknown[0]!r}, but those of classification are {known}: use one of them")
    scores = {name: CLASSIFICATION_METRICS[name](predicted, labels) for name in (*metrics, "accuracy")}
    scores["nll"] = negative_log_likelihood(chosen, labels)
    scores["ece"] = expected_calibration_error(chosen, labels)
    scores["adaptive_ece"] = adaptive_calibration_error(chosen, labels)
    scores["classwise_ece"] = classwise_calibration_error(chosen, labels)
    scores["brier"] = brier(chosen, labels)
    scores["aurc"] = area_under_risk_coverage(-chosen.max(axis=1), predicted != labels)
    return scores


def baseline_scores(labels: ArrayLike, classes: int, metrics: Sequence[str] = ("accuracy",)) -> dict[str, float]:
    """Return the scores of the best constant prediction: the class shares of the labels, for every example.

    It predicts the most frequent class, and its `nll` is the entropy of the labels. Calibration errors are left out,
    because the shares are calibrated, and so is `aurc`, because all confidences are equal.

    Args:
        labels: (n,) class ids; if `classes` is 0, values, whose mean is then predicted.
        classes: number of classes C, or 0 for regression.
        metrics: as for `classification_scores`.
    """
    values = np.asarray(labels)
    if not classes:
        return regression_scores(np.full(len(values), values.mean(dtype=np.float64)), values)
    shares = np.bincount(values, minlength=classes) / len(values)
    scores = classification_scores(np.tile(shares, (len(values), 1)), values, metrics)
    return {name: scores[name] for name in dict.fromkeys((*metrics, "accuracy", "nll", "brier"))}


def regression_scores(predicted: ArrayLike, values: ArrayLike) -> dict[str, float]:
    """Return the correlations `pearson` and `spearman` and the mean squared error `mse`."""
    predicted, values = aligned(predicted, values)
    return {
        "pearson": pearson(predicted, values),
        "spearman": spearman(predicted, values),
        "mse": float(np.mean((predicted - values) ** 2)),
    }
