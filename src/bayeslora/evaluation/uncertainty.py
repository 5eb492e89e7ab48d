r"""Scores of a model's uncertainty, in float64: calibration, selective prediction, detection.

Calibration: is confidence a probability? Selective prediction: is the model unsure where it is wrong? Detection: is it
unsure about inputs unlike its training data? Ties are never broken: every score depends only on the set of examples,
and its docstring says how it treats ties.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from bayeslora.errors import BayesLoraError, counted

Array = NDArray[np.float64]
BINS = 15
"""Default number of bins of every calibration error, with equal width or equal mass."""
HISTOGRAM_BINS = 30
CURVE_POINTS = 100


def uncertainties(probabilities: ArrayLike, entropy: ArrayLike, mutual_information: ArrayLike) -> dict[str, Array]:
    """Return a classifier's measures of uncertainty, (n,) each; larger means less sure.

    Args:
        probabilities: (n, C) class probabilities.
        entropy: (n,) entropy of the same predictions, in nats.
        mutual_information: (n,) mutual information of the same predictions, in nats.

    Returns:
        `max_probability`, as 1 - max p; `entropy`; and `mutual_information`, unless it is 0 for every example, as with
        a single set of weights.
    """
    found = {
        "max_probability": 1.0 - np.asarray(probabilities, dtype=np.float64).max(axis=1),
        "entropy": np.asarray(entropy, dtype=np.float64),
    }
    information = np.asarray(mutual_information, dtype=np.float64)
    if np.any(information != 0):
        found["mutual_information"] = information
    return found


def adaptive_calibration_error(probabilities: ArrayLike, labels: ArrayLike, bins: int = BINS) -> float:
    r"""Return the calibration error over bins of equal mass, $\frac1B \sum_b |\text{acc}_b - \text{conf}_b|$.

    Examples are sorted by the predicted class's probability and cut into B bins of n/B examples (Nixon et al., 2019,
    arXiv:1904.01685, for the predicted class alone), so that confidences close to 1 still fill B bins. If a cut falls
    inside an example or a group of equal confidences, each side takes its share of the group's mean: ties are not
    ordered, and all B bins have exactly equal mass for every n. With fewer than B examples, each has a bin of its own.
    """
    chosen, labels = class_arrays(probabilities, labels)
    confidence = chosen.max(axis=1)
    gap = (chosen.argmax(axis=1) == labels) - confidence
    count, total = _cumulative(confidence, gap)
    n = len(gap)
    cuts = np.linspace(0, n, min(bins, n) + 1)
    return float(np.abs(np.diff(np.interp(cuts, count, total))).sum() / n)


def classwise_calibration_error(probabilities: ArrayLike, labels: ArrayLike, bins: int = BINS) -> float:
    r"""Return the calibration error averaged over all classes' probabilities (Kull et al., 2019, arXiv:1910.12656).

    $$ \frac1C \sum_k \sum_b \frac{n_{bk}}{n} \bigl| \text{share of class } k - \text{mean } p_k \bigr| $$

    The bins (lower, upper] of $p_k$ have equal width, with 0 in the lowest. Unlike the expected calibration error, it
    includes the probabilities of the classes that were not predicted.
    """
    chosen, labels = class_arrays(probabilities, labels)
    n, count = chosen.shape
    gaps = -chosen
    gaps[np.arange(n), labels] += 1.0
    index = bin_index(chosen, bins) + bins * np.arange(count)
    sums = np.bincount(index.reshape(-1), weights=gaps.reshape(-1), minlength=bins * count)
    return float(np.abs(sums).sum() / (n * count))


def bin_index(values: Array, bins: int) -> np.ndarray:
    """Return the index of each value's bin among equal-width bins (lower, upper] of [0, 1]; 0 is in the first."""
    edges = np.linspace(0.0, 1.0, bins + 1)
    # The probabilities of a row may sum to 1 + 1e-16, and their maximum may be that too.
    return np.clip(np.searchsorted(edges, values, side="left") - 1, 0, bins - 1)


def area_under_risk_coverage(uncertainty: ArrayLike, wrong: ArrayLike) -> float:
    r"""Return the AURC $\frac1n \sum_{i=1}^n \frac1i \sum_{j \le i} e_{(j)}$: 0 is best, chance gives the error rate.

    It is the mean over i = 1, …, n of the error rate among the i examples that the model is surest of (Geifman and
    El-Yaniv, 2018, arXiv:1805.08206). It depends on the error rate and on the order of the examples; `excess_area`
    removes the effect of the error rate. With ties, it is the expectation over all orders of examples with equal
    uncertainty, so a constant uncertainty has the error rate as its area.

    Args:
        uncertainty: (n,) larger = less sure.
        wrong: (n,) 1 for an error and 0 otherwise, or any loss.
    """
    scores, losses = aligned(uncertainty, wrong)
    count, total = _cumulative(scores, losses)
    answered = np.arange(1, len(losses) + 1)
    return float(np.mean(np.interp(answered, count, total) / answered))


def excess_area(uncertainty: ArrayLike, wrong: ArrayLike) -> float:
    """Return the E-AURC: the AURC minus that of the best order, to compare methods with different accuracies."""
    _, losses = aligned(uncertainty, wrong)
    return area_under_risk_coverage(uncertainty, wrong) - area_under_risk_coverage(losses, losses)


def risk_coverage_curve(
    uncertainty: ArrayLike, wrong: ArrayLike, points: int = CURVE_POINTS
) -> dict[str, list[float]]:
    """Return the error rate among the examples that a model is surest of, as a function of their share.

    Returns:
        `coverage` (1/points, …, 1) and `risk`, lists of `points` numbers, as in metrics.json. Ties are treated as in
        `area_under_risk_coverage`. If a coverage ends inside an example, that part of the example counts.
    """
    scores, losses = aligned(uncertainty, wrong)
    count, total = _cumulative(scores, losses)
    coverage = np.arange(1, points + 1) / points
    answered = coverage * len(losses)
    return {"coverage": coverage.tolist(), "risk": (np.interp(answered, count, total) / answered).tolist()}


def detection_scores(inside: ArrayLike, outside: ArrayLike) -> dict[str, float]:
    r"""Return how well an uncertainty separates out-of-distribution examples (positives) from in-distribution ones.

    Args:
        inside: (n,) uncertainty of in-distribution examples, larger = less sure.
        outside: (m,) uncertainty of out-of-distribution examples.

    Returns:
        `auroc`: probability that an outside example is less sure than an inside one; a tie counts one half.
        `aupr`: average precision, $\sum_t (R_t - R_{t-1}) P_t$ over the distinct thresholds, so tied examples are
        flagged together. Chance gives m / (n + m), so compare it only at equal n and m.
        `fpr95`: share of inside examples flagged at the highest threshold that flags at least 95 % of the outside ones
        (Hendrycks et al., 2019, arXiv:1812.04606, who also count the outside as positive); ties are flagged.

    Raises:
        BayesLoraError: one side lacks examples, or a value is not finite.
    """
    negative, positive = _side(inside, "in-distribution"), _side(outside, "out-of-distribution")
    truth = np.repeat([0, 1], [len(negative), len(positive)])
    scores = np.concatenate([negative, positive])
    flagged_inside, flagged_outside, _ = roc_curve(truth, scores, drop_intermediate=False)
    return {
        "auroc": float(roc_auc_score(truth, scores)),
        "aupr": float(average_precision_score(truth, scores)),
        "fpr95": float(flagged_inside[np.argmax(flagged_outside >= 0.95 - 1e-12)]),
    }


def detection(inside: Mapping[str, Array], outside: Mapping[str, Array]) -> dict[str, dict[str, float]]:
    """Return `detection_scores` for each measure from `uncertainties` that both sides have."""
    return {name: detection_scores(inside[name], outside[name]) for name in inside if name in outside}


def by_correctness(measures: Mapping[str, Array], correct: NDArray[np.bool_]) -> dict[str, dict[str, Array]]:
    """Return the measures of the examples that are `correct`, (n,), and those of the `wrong` ones."""
    groups = {"correct": correct, "wrong": ~correct}
    return {group: {name: values[rows] for name, values in measures.items()} for group, rows in groups.items()}


def histograms(groups: Mapping[str, Mapping[str, Array]], classes: int) -> dict[str, dict[str, Any]]:
    """Return histograms of entropy and mutual information for groups of examples, on shared bins, as in metrics.json.

    Args:
        groups: measures from `uncertainties` for each group, such as `correct`, `wrong` and `ood`.
        classes: number of classes C. The bins of the entropy end at its maximum, log C. Those of mutual information,
            which is often far smaller, end at the last of log C, log C / 2, log C / 4, … that is not exceeded.

    Returns:
        For each measure, `edges` (31 numbers, in nats) and a list of 30 counts for each group.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in ("entropy", "mutual_information"):
        members = {group: values[name] for group, values in groups.items() if name in values}
        if not members:
            continue
        top = math.log(max(classes, 2))
        if name == "mutual_information":
            highest = max((float(values.max()) for values in members.values() if len(values)), default=0.0)
            while 0 < highest <= top / 2:
                top /= 2
        edges = np.linspace(0.0, top, HISTOGRAM_BINS + 1)
        counts = {g: np.histogram(np.clip(values, 0.0, top), edges)[0].tolist() for g, values in members.items()}
        found[name] = {"edges": edges.tolist(), **counts}
    return found


def aligned(predicted: ArrayLike, labels: ArrayLike) -> tuple[Array, Array]:
    """Return both arguments as flat float64 arrays, after checking that their lengths are equal and at least 1."""
    a = np.asarray(predicted, dtype=np.float64).reshape(-1)
    b = np.asarray(labels, dtype=np.float64).reshape(-1)
    if len(a) != len(b) or not len(a):
        raise BayesLoraError(
            f"got {counted(len(a), 'prediction')} for {counted(len(b), 'label')}, but each needs one: "
            "give as many, and at least one"
        )
    return a, b


def class_arrays(probabilities: ArrayLike, labels: ArrayLike) -> tuple[Array, NDArray[np.int64]]:
    """Return (n, C) probabilities in float64 and (n,) class ids, after checking that the ids are in 0..C-1."""
    chosen = np.asarray(probabilities, dtype=np.float64)
    ids = np.asarray(labels).astype(np.int64).reshape(-1)
    if chosen.ndim != 2 or len(chosen) != len(ids) or not len(ids):
        raise BayesLoraError(
            f"probabilities have shape {chosen.shape} for {counted(len(ids), 'label')}, but must be (n, classes): "
            "give one row for each label"
        )
    if ids.min() < 0 or ids.max() >= chosen.shape[1]:
        raise BayesLoraError(
            f"label ids run from {ids.min()} to {ids.max()}, but the model has {chosen.shape[1]} classes: "
            "use the labels the model was trained with"
        )
    return chosen, ids


def _cumulative(keys: Array, values: Array) -> tuple[Array, Array]:
    """Return the cumulative count and sum of `values` after each distinct key in rising order, both from 0.

    Interpolate linearly between two keys for the expected sum over all orders of the tied examples.
    """
    _check_finite(keys, "uncertainties")
    _, index, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    sums = np.bincount(index, weights=values)
    return np.concatenate([[0.0], np.cumsum(sizes)]), np.concatenate([[0.0], np.cumsum(sums)])


def _side(scores: ArrayLike, name: str) -> Array:
    values = np.asarray(scores, dtype=np.float64).reshape(-1)
    if not len(values):
        raise BayesLoraError(f"0 {name} uncertainties were given, but at least 1 is needed: give examples")
    _check_finite(values, f"{name} uncertainties")
    return values


def _check_finite(values: Array, name: str) -> None:
    broken = int((~np.isfinite(values)).sum())
    if broken:
        raise BayesLoraError(f"{broken} of {len(values)} {name} are not finite, but must be: drop those examples")
