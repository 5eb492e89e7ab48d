"""What is said of predictions first: gains, gaps and thresholds with known answers, intervals that hold."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binom

from bayeslora.evaluation import findings


def two_classes(confidence: NDArray[Any], predicted: NDArray[Any]) -> NDArray[np.float64]:
    """Probabilities of two classes whose predicted one has the confidence."""
    found = np.stack([1 - confidence, confidence], axis=1)
    return np.where(predicted[:, None] == 1, found, found[:, ::-1])


def test_the_confusion_matrix_has_true_classes_in_rows() -> None:
    assert findings.confusion([0, 1, 1, 2], [0, 0, 0, 2], 4) == [[1, 2, 0, 0], [0] * 4, [0, 0, 1, 0], [0] * 4]


def test_the_gain_is_that_of_a_paired_table_worked_by_hand() -> None:
    """Ten rows, label 1 seven times; the model has two of the zeros and loses one of the ones: b = 2, c = 1."""
    labels = np.array([1] * 7 + [0] * 3)
    predicted = np.array([1] * 6 + [0] + [0, 0, 1])
    gain = findings.gain_in_accuracy(predicted, labels)
    half = 1.959963985 * math.sqrt((3 / 12 + 2 / 12 - (1 / 12) ** 2) / 12)
    assert gain["mean"] == pytest.approx(0.1)
    assert (gain["low"], gain["high"]) == (pytest.approx(1 / 12 - half), pytest.approx(1 / 12 + half))


def test_a_constant_model_gains_nothing_and_its_interval_has_zero() -> None:
    gain = findings.gain_in_accuracy([1] * 50, [1] * 30 + [0] * 20)
    assert gain["mean"] == 0 and gain["low"] < 0 < gain["high"] < 0.1


@pytest.mark.parametrize("rows", [40, 300])
def test_the_interval_of_the_gain_holds_the_truth_in_most_draws(rows: int) -> None:
    """A model right in 80% on labels that are 1 in 60%, drawn 400 times: 95% has a standard error of 1.1%."""
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        labels = (generator.random(rows) < 0.6).astype(int)
        predicted = np.where(generator.random(rows) < 0.8, labels, 1 - labels)
        gain = findings.gain_in_accuracy(predicted, labels)
        held += gain["low"] <= 0.2 <= gain["high"]
    assert 0.92 <= held / 400 <= 0.985


@pytest.mark.parametrize("rows", [40, 150])
def test_the_interval_of_the_gap_holds_the_truth_as_often_as_it_says(rows: int) -> None:
    """Exactly, over all numbers of right rows: a model right in 80% and 85% sure has a gap of 0.05."""
    held = 0.0
    for right in range(rows + 1):
        predicted = np.array([1] * right + [0] * (rows - right))
        gap = findings.overconfidence(two_classes(np.full(rows, 0.85), predicted), np.ones(rows, int))
        held += binom.pmf(right, rows, 0.8) * (gap["low"] <= 0.05 <= gap["high"])
    assert 0.92 <= held <= 0.98  # between two numbers of rows the share jumps


def test_without_an_error_the_gap_is_not_told_as_underconfidence() -> None:
    """Twenty rows right with a confidence of 0.97 do not show that the model is right more often than that."""
    gap = findings.overconfidence(two_classes(np.full(20, 0.97), np.ones(20, int)), np.ones(20, int))
    assert gap["mean"] == pytest.approx(-0.03) and gap["low"] < 0 < gap["high"]


def test_a_threshold_separates_the_rows_that_are_always_right() -> None:
    """900 rows are right with 0.95, 100 wrong with 0.6: 5% is kept above 0.6, 1% too, and 20% by all rows."""
    confidence = np.array([0.95] * 900 + [0.6] * 100)
    predicted, labels = np.ones(1000, int), np.array([1] * 900 + [0] * 100)
    found = {each["risk"]: each for each in findings.thresholds(two_classes(confidence, predicted), labels)}
    assert list(found) == list(findings.RISKS)
    assert found[0.05] == {"risk": 0.05, "confidence": pytest.approx(0.6), "coverage": 0.9, "errors": 0.0}
    assert found[0.2]["confidence"] == 0 and found[0.2]["coverage"] == 1 and found[0.2]["errors"] == 0.1
    few = findings.thresholds(two_classes(confidence[:40], predicted[:40]), labels[:40])
    assert few[0]["confidence"] == 2 and few[0]["coverage"] == 0, "40 rows cannot show 1%"


def test_the_verdict_of_numbers_is_that_of_plain_numpy() -> None:
    generator = np.random.default_rng(1)
    truth = generator.normal(3, 2, 400)
    predicted = truth + generator.normal(0, 0.5, 400)
    verdict = findings.of_numbers(predicted, truth)["verdict"]
    saved = (truth - truth.mean()) ** 2 - (truth - predicted) ** 2
    assert verdict["gain"]["mean"] == pytest.approx(truth.var() - ((truth - predicted) ** 2).mean())
    assert verdict["gain"]["high"] - verdict["gain"]["mean"] == pytest.approx(1.966 * saved.std(ddof=1) / 20, rel=1e-3)
    width = verdict["spread"]["half_width"]
    assert width == np.sort(np.abs(truth - predicted))[math.ceil(401 * 0.9) - 1]
    fresh = np.abs(generator.normal(0, 0.5, 100_000))
    assert (fresh <= width).mean() == pytest.approx(0.9, abs=0.04)
    assert verdict["spread"]["observed"] == pytest.approx(0.9, abs=0.05)


def test_few_numbers_have_no_spread_and_one_has_no_interval() -> None:
    assert findings.of_numbers([1.0, 2.0], [1.0, 3.0])["verdict"]["spread"] is None
    assert findings.of_numbers([1.0], [1.0])["verdict"] == {"gain": None, "spread": None}
    assert findings.of_numbers(range(10), range(10))["verdict"]["spread"]["observed"] is None
