r"""Scores of predictions, in plain NumPy and float64.

Probabilities are (n, C) with rows that sum to 1, labels are (n,) class ids, values are (n,) floats. Every average is
over examples, never over batches. Sums over classes are not divided by C.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bayeslora.errors import BayesLoraError
from bayeslora.evaluation._arrays import BINS, Array, aligned, class_arrays
from bayeslora.evaluation.uncertainty import (
    adaptive_calibration_error,
    area_under_risk_coverage,
    bin_index,
    classwise_calibration_error,
)


def softmax(logits: ArrayLike) -> Array:
    """Softmax over the last axis in float64, stable for logits of any size."""
    values = np.asarray(logits, dtype=np.float64)
    shifted = np.exp(values - values.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))


def accuracy(predicted: ArrayLike, labels: ArrayLike) -> float:
    """Share of examples whose predicted class id is the label."""
    predicted, labels = aligned(predicted, labels)
    return float(np.mean(predicted == labels))


def confusion_matrix(predicted: ArrayLike, labels: ArrayLike, classes: int) -> NDArray[np.int64]:
    """(C, C) counts: row = true class, column = predicted class."""
    predicted, labels = aligned(predicted, labels)
    matrix = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(matrix, (labels.astype(np.int64), predicted.astype(np.int64)), 1)
    return matrix


def matthews_correlation(predicted: ArrayLike, labels: ArrayLike) -> float:
    r"""Matthews' correlation in its form for C classes (Gorodkin, 2004); 0 when either side is constant.

    $$ \frac{n \sum_k c_{kk} - \sum_k t_k p_k}{\sqrt{n^2 - \sum_k p_k^2}\,\sqrt{n^2 - \sum_k t_k^2}} $$

    with the confusion matrix $c$, $t_k$ examples of class $k$ and $p_k$ predictions of class $k$.
    """
    predicted, labels = aligned(predicted, labels)
    count = 1 + int(max(predicted.max(), labels.max()))
    matrix = confusion_matrix(predicted, labels, count).astype(np.float64)
    true, guessed, n = matrix.sum(axis=1), matrix.sum(axis=0), matrix.sum()
    spread = np.sqrt(n**2 - guessed @ guessed) * np.sqrt(n**2 - true @ true)
    return float((n * np.trace(matrix) - true @ guessed) / spread) if spread > 0 else 0.0


def f1(predicted: ArrayLike, labels: ArrayLike, positive: int = 1) -> float:
    """Harmonic mean of precision and recall of one class; 0 when it is neither present nor predicted."""
    predicted, labels = aligned(predicted, labels)
    hits = float(np.sum((predicted == positive) & (labels == positive)))
    total = float(np.sum(predicted == positive) + np.sum(labels == positive))
    return 2 * hits / total if total else 0.0


def pearson(predicted: ArrayLike, values: ArrayLike) -> float:
    """Pearson's correlation; 0 when either side is constant, where the ratio is undefined."""
    predicted, values = aligned(predicted, values)
    if np.ptp(predicted) == 0 or np.ptp(values) == 0:
        return 0.0
    a, b = predicted - predicted.mean(), values - values.mean()
    # Scaled first, so that squares of very small or very large deviations stay inside float64.
    a, b = a / np.abs(a).max(), b / np.abs(b).max()
    return float(np.clip(a @ b / np.sqrt((a @ a) * (b @ b)), -1.0, 1.0))


def spearman(predicted: ArrayLike, values: ArrayLike) -> float:
    """Spearman's rank correlation: Pearson's of the ranks, where ties share their mean rank."""
    predicted, values = aligned(predicted, values)
    return pearson(_ranks(predicted), _ranks(values))


CLASSIFICATION_METRICS: dict[str, Callable[[ArrayLike, ArrayLike], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews_correlation": matthews_correlation,
}
"""Metrics of predicted class ids that a task can name."""


def negative_log_likelihood(probabilities: ArrayLike, labels: ArrayLike) -> float:
    r"""Mean over examples of $-\log p(\text{label})$, in nats; probability 0 counts as the smallest float64."""
    chosen, labels = class_arrays(probabilities, labels)
    picked = chosen[np.arange(len(labels)), labels]
    return float(-np.mean(np.log(np.maximum(picked, np.finfo(np.float64).tiny))))


def brier(probabilities: ArrayLike, labels: ArrayLike) -> float:
    r"""Brier score, $\frac1n \sum_i \sum_k (p_{ik} - [k = y_i])^2$: 0 to 2, summed over classes (Brier, 1950)."""
    chosen, labels = class_arrays(probabilities, labels)
    errors = chosen.copy()
    errors[np.arange(len(labels)), labels] -= 1.0
    return float(np.mean(np.sum(errors**2, axis=1)))


def reliability_bins(probabilities: ArrayLike, labels: ArrayLike, bins: int = BINS) -> list[dict[str, Any]]:
    """Equal-width bins (lower, upper] of the predicted class's probability, as metrics.json holds them.

    Returns:
        One dict a bin: `lower`, `upper`, `count`, and mean `confidence` and `accuracy`, None in an empty bin.
    """
    chosen, labels = class_arrays(probabilities, labels)
    confidence = chosen.max(axis=1)
    correct = (chosen.argmax(axis=1) == labels).astype(np.float64)
    edges = np.linspace(0.0, 1.0, bins + 1)
    index = bin_index(confidence, bins)
    result: list[dict[str, Any]] = []
    for position in range(bins):
        inside = index == position
        count = int(inside.sum())
        result.append(
            {
                "lower": float(edges[position]),
                "upper": float(edges[position + 1]),
                "count": count,
                "confidence": float(confidence[inside].mean()) if count else None,
                "accuracy": float(correct[inside].mean()) if count else None,
            }
        )
    return result


def expected_calibration_error(probabilities: ArrayLike, labels: ArrayLike, bins: int = BINS) -> float:
    r"""Expected calibration error, $\sum_b \frac{n_b}{n} |\text{acc}_b - \text{conf}_b|$ (Guo et al., 2017)."""
    filled = [b for b in reliability_bins(probabilities, labels, bins) if b["count"]]
    total = sum(b["count"] for b in filled)
    return float(sum(b["count"] * abs(b["accuracy"] - b["confidence"]) for b in filled) / total)


def classification_scores(
    probabilities: ArrayLike, labels: ArrayLike, metrics: Sequence[str] = ("accuracy",)
) -> dict[str, float]:
    """Headline and calibration scores of a classifier; the task's own `metrics` come first.

    Args:
        probabilities: (n, C).
        labels: (n,) class ids.
        metrics: names out of `"accuracy"`, `"f1"` (of class 1) and `"matthews_correlation"`; the accuracy is always
            among the scores.

    Returns:
        The metrics, `accuracy`, `nll`, `ece`, `adaptive_ece`, `classwise_ece`, `brier` and `aurc` (of the predicted
        class's probability).
    """
    chosen, labels = class_arrays(probabilities, labels)
    predicted = chosen.argmax(axis=1)
    unknown = [name for name in metrics if name not in CLASSIFICATION_METRICS]
    if unknown:
        known = ", ".join(CLASSIFICATION_METRICS)
        raise BayesLoraError(f"{unknown[0]!r} is no metric for classification: use one of {known}")
    scores = {name: CLASSIFICATION_METRICS[name](predicted, labels) for name in (*metrics, "accuracy")}
    scores["nll"] = negative_log_likelihood(chosen, labels)
    scores["ece"] = expected_calibration_error(chosen, labels)
    scores["adaptive_ece"] = adaptive_calibration_error(chosen, labels)
    scores["classwise_ece"] = classwise_calibration_error(chosen, labels)
    scores["brier"] = brier(chosen, labels)
    scores["aurc"] = area_under_risk_coverage(-chosen.max(axis=1), predicted != labels)
    return scores


def regression_scores(predicted: ArrayLike, values: ArrayLike) -> dict[str, float]:
    """`pearson`, `spearman` and the mean squared error `mse`."""
    predicted, values = aligned(predicted, values)
    return {
        "pearson": pearson(predicted, values),
        "spearman": spearman(predicted, values),
        "mse": float(np.mean((predicted - values) ** 2)),
    }


def _ranks(values: Array) -> Array:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[inverse])
