"""Bootstrapped intervals of the differences between calibration's rows, from the probabilities that their files hold.

A replicate draws rows and seeds with replacement, the same for both sides of a difference, so that what is common to
them cancels. Scores of a replicate are weighted: a row that is drawn twice counts twice.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bayeslora.evaluation.metrics import softmax
from bayeslora.evaluation.uncertainty import BINS, bin_index

Array = NDArray[np.float64]
REPLICATES = 1000
LEVEL = 0.95
SCORES = ("accuracy", "nll", "ece", "brier", "aurc", "excess_aurc")
LARGEST = 60.0
"""Log odds in a file are at most this."""


def encoded(probabilities: Array) -> str:
    """Probabilities (n, C) as base64 of the 16-bit log odds of classes 1 … C - 1 to class 0: 3 bytes a row for two."""
    logs = np.log(np.maximum(probabilities, 1e-300))
    odds = np.clip(logs[:, 1:] - logs[:, :1], -LARGEST, LARGEST)
    return base64.b64encode(odds.astype("<f2").tobytes()).decode()


def probabilities_of(form: Mapping[str, Any], rows: int) -> Array:
    """What a file's form holds, (n, C); older files have the probabilities as such, rounded."""
    if "probabilities" in form:
        p = np.asarray(form["probabilities"], dtype=np.float64)
        return np.asarray(p / p.sum(axis=1, keepdims=True))
    odds = np.frombuffer(base64.b64decode(form["log_odds"]), dtype="<f2").astype(np.float64).reshape(rows, -1)
    return softmax(np.concatenate([np.zeros((rows, 1)), odds], axis=1))


def weighted_scores(p: Array, labels: NDArray[np.int64], weights: Array) -> dict[str, Array]:
    """Scores (B,) of predictions (n, C) under B weightings of the rows, (B, n), whole numbers that sum to n."""
    n = len(labels)
    wrong = (p.argmax(axis=1) != labels).astype(np.float64)
    truth = np.eye(p.shape[1])[labels]
    nll = -np.log(np.maximum(p[np.arange(n), labels], np.finfo(np.float64).tiny))
    area = _area(p.max(axis=1), wrong, weights)
    errors = weights @ wrong
    return {
        "accuracy": 1 - errors / n,
        "nll": weights @ nll / n,
        "ece": _calibration_error(p.max(axis=1), 1 - wrong, weights),
        "brier": weights @ ((p - truth) ** 2).sum(axis=1) / n,
        "aurc": area,
        "excess_aurc": area - _best_area(errors, n),
    }


def _calibration_error(confidence: Array, right: Array, weights: Array) -> Array:
    member = np.eye(BINS)[bin_index(confidence, BINS)]
    return np.asarray(np.abs(weights @ (member * (right - confidence)[:, None])).sum(axis=1) / len(right))


def _harmonic(n: int) -> Array:
    """The sums of 1 / i up to i = 0 … n."""
    return np.concatenate([[0.0], np.cumsum(1 / np.arange(1, n + 1))])


def _area(confidence: Array, wrong: Array, weights: Array) -> Array:
    """The area under risk and coverage; rows of equal confidence count in random order.

    Within a group of w rows with e errors, after C rows with E errors, the risk at row k is (E + e k / w) / (C + k).
    """
    n = len(wrong)
    _, group = np.unique(-confidence, return_inverse=True)
    starts = np.flatnonzero(np.diff(np.sort(group), prepend=-1))
    order = np.argsort(group, kind="stable")
    size = np.add.reduceat(weights[:, order], starts, axis=1)
    errors = np.add.reduceat((weights * wrong)[:, order], starts, axis=1)
    counted, seen = np.cumsum(size, axis=1) - size, np.cumsum(errors, axis=1) - errors
    rate = np.divide(errors, size, out=np.zeros_like(errors), where=size > 0)
    sums = _harmonic(n)
    whole, before = (counted + size).astype(int), counted.astype(int)
    return np.asarray((rate * size + (seen - rate * counted) * (sums[whole] - sums[before])).sum(axis=1) / n)


def _best_area(errors: Array, n: int) -> Array:
    right = n - errors
    sums = _harmonic(n)
    return np.asarray((errors - right * (sums[n] - sums[right.astype(int)])) / n)


def differences(
    ours: Sequence[Array], theirs: Sequence[Array], labels: NDArray[np.int64], replicates: int = REPLICATES
) -> dict[str, list[float]]:
    """By score: the mean difference over seeds, and the ends of its interval.

    Args:
        ours, theirs: probabilities (n, C) by seed, the same seeds in both.
        labels: (n,).
    """
    generator = np.random.default_rng(0)
    n, seeds = len(labels), len(ours)
    rows = generator.multinomial(n, np.full(n, 1 / n), size=replicates).astype(np.float64)
    shares = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=replicates) / seeds
    rows, shares = np.vstack([np.ones(n), rows]), np.vstack([np.full(seeds, 1 / seeds), shares])
    total = {score: np.zeros(len(rows)) for score in SCORES}
    for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        a, b = weighted_scores(one, labels, rows), weighted_scores(other, labels, rows)
        for score in SCORES:
            total[score] += shares[:, index] * (a[score] - b[score])
    ends = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    return {score: [float(v[0]), *np.quantile(v[1:], ends).tolist()] for score, v in total.items()}
