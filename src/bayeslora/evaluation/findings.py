r"""Summarize predictions for the person who will act on them: gain over a constant, confidence, rows to hand over.

Every interval is a 95% interval over rows, for the model as it is; it says nothing about another training run.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest, norm
from scipy.stats import t as student_t

from bayeslora.evaluation.uncertainty import aligned, class_arrays
from bayeslora.posthoc.conformal import conformal_quantile
from bayeslora.posthoc.risk import RiskControl

RISKS = (0.01, 0.02, 0.05, 0.1, 0.2)
"""Levels of the error rate among answers that a threshold is chosen for."""
COVERAGE = 0.9
_LEVEL = 0.95


def confusion(predicted: ArrayLike, labels: ArrayLike, classes: int) -> list[list[int]]:
    """Return the number of examples by true class (rows) and predicted class (columns), (C, C)."""
    pairs = np.asarray(labels, dtype=np.int64) * classes + np.asarray(predicted, dtype=np.int64)
    counts: list[list[int]] = np.bincount(pairs, minlength=classes**2).reshape(classes, classes).tolist()
    return counts


def gain_in_accuracy(predicted: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    r"""Return how far the accuracy is above that of the most frequent label, with its interval.

    Both answer the same rows, so the interval is that of a paired difference. With b rows that only the model has
    right and c that only the constant has right, $\tilde b = (b + 1)/(n + 2)$, $\tilde c = (c + 1)/(n + 2)$, it is
    $\tilde b - \tilde c \pm z \sqrt{(\tilde b + \tilde c - (\tilde b - \tilde c)^2)/(n + 2)}$ (Bonett and Price, 2012,
    *Adjusted Wald Confidence Interval for a Difference of Binomial Proportions Based on Paired Data*).

    Args:
        predicted: (n,) class ids.
        labels: (n,) class ids; of equally frequent ones the lowest is the constant.

    Returns:
        `mean`, `low` and `high`, as shares of the rows.
    """
    chosen, truth = (np.asarray(ids, dtype=np.int64) for ids in (predicted, labels))
    right, constant = chosen == truth, truth == np.bincount(truth).argmax()
    rows = len(truth)
    only_model, only_constant = int((right & ~constant).sum()), int((constant & ~right).sum())
    b, c = (only_model + 1) / (rows + 2), (only_constant + 1) / (rows + 2)
    half = float(norm.ppf((1 + _LEVEL) / 2)) * math.sqrt((b + c - (b - c) ** 2) / (rows + 2))
    return {
        "mean": (only_model - only_constant) / rows,
        "low": max(-1.0, b - c - half),
        "high": min(1.0, b - c + half),
    }


def overconfidence(probabilities: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """Return mean confidence minus accuracy, with its interval: above 0 the model is surer than it is right.

    The interval is Wilson's of the accuracy, taken from the mean confidence of these rows. Rows that are too sure and
    rows that are not sure enough offset each other here; the calibration error counts both.

    Args:
        probabilities: (n, C).
        labels: (n,) class ids.
    """
    chosen, ids = class_arrays(probabilities, labels)
    confidence = float(chosen.max(axis=1).mean())
    right = int((chosen.argmax(axis=1) == ids).sum())
    accuracy = binomtest(right, len(ids)).proportion_ci(_LEVEL, method="wilson")
    return {
        "mean": confidence - right / len(ids),
        "low": confidence - float(accuracy.high),
        "high": confidence - float(accuracy.low),
    }


def thresholds(probabilities: ArrayLike, labels: ArrayLike) -> list[dict[str, float]]:
    """Return the confidence above which errors stay below each level of `RISKS`, by `posthoc.RiskControl`.

    Returns:
        For each level `risk`, the threshold's `confidence` (0 answers all rows, 2 none), and of these rows the share
        above it, `coverage`, and the error rate among those, `errors`.
    """
    control = RiskControl().fit(probabilities, labels)
    return [
        {"risk": risk, "confidence": chosen.confidence, "coverage": chosen.coverage, "errors": chosen.risk}
        for risk, chosen in zip(RISKS, map(control.threshold, RISKS), strict=True)
    ]


def of_classes(probabilities: ArrayLike, labels: ArrayLike) -> dict[str, Any]:
    """Return the blocks `confusion` and `verdict` of metrics.json for (n, C) probabilities and (n,) class ids."""
    chosen, ids = class_arrays(probabilities, labels)
    predicted = chosen.argmax(axis=1)
    return {
        "confusion": confusion(predicted, ids, chosen.shape[1]),
        "verdict": {
            "gain": gain_in_accuracy(predicted, ids),
            "overconfidence": overconfidence(chosen, ids),
            "thresholds": thresholds(chosen, ids),
        },
    }


def of_numbers(predicted: ArrayLike, values: ArrayLike) -> dict[str, Any]:
    r"""Return the block `verdict` of metrics.json for (n,) predicted and true numbers.

    `gain` is how far the mean squared error is below that of the mean number, with Student's interval of the paired
    differences. `spread` is half the width of an interval around each prediction that holds at least 90% of new rows
    from the same source (split conformal prediction, `posthoc.ConformalIntervals`); None with fewer than 9 rows. Its
    `observed` share is measured: each half of the rows, drawn at random, sets the width for the other.
    """
    numbers, truth = aligned(predicted, values)
    errors = np.abs(numbers - truth)
    saved = (truth.mean() - truth) ** 2 - errors**2
    mean = float(saved.mean())
    half = math.inf
    if len(saved) > 1:
        half = float(student_t.ppf((1 + _LEVEL) / 2, len(saved) - 1) * saved.std(ddof=1) / math.sqrt(len(saved)))
    width = conformal_quantile(errors, COVERAGE)
    spread = {"coverage": COVERAGE, "half_width": width, "observed": _crossed(errors)}
    gain = {"mean": mean, "low": mean - half, "high": mean + half} if math.isfinite(half) else None
    return {"verdict": {"gain": gain, "spread": spread if math.isfinite(width) else None}}


def _crossed(errors: NDArray[np.float64]) -> float | None:
    """Return the share of rows within the width that the other half of the rows gives; None where one is too small."""
    order = np.random.default_rng(0).permutation(len(errors))
    first, second = errors[order[::2]], errors[order[1::2]]
    widths = [conformal_quantile(half, COVERAGE) for half in (second, first)]
    if not all(map(math.isfinite, widths)):
        return None
    return float(np.concatenate([first <= widths[0], second <= widths[1]]).mean())
