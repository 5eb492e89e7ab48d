"""Scores against hand computation, known answers, and scikit-learn and SciPy where they are installed."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bayeslora.errors import BayesLoraError
from bayeslora.evaluation import metrics


def random_case(classes: int, n: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    probabilities = generator.dirichlet(np.full(classes, 0.7), size=n)
    labels = np.array([generator.choice(classes, p=row) for row in probabilities])
    return probabilities, labels


def test_binary_scores_of_four_examples_by_hand() -> None:
    probabilities = [[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7]]
    labels = [0, 1, 1, 1]
    scores = metrics.classification_scores(probabilities, labels, ("accuracy", "f1", "matthews_correlation"))
    calibration = ["nll", "ece", "adaptive_ece", "classwise_ece", "brier", "aurc"]
    assert list(scores) == ["accuracy", "f1", "matthews_correlation", *calibration]
    assert scores["accuracy"] == 0.75
    assert scores["f1"] == pytest.approx(2 * 2 / (2 + 3))
    # True positives 2, true negatives 1, false positives 0, false negatives 1.
    assert scores["matthews_correlation"] == pytest.approx((2 * 1 - 0) / math.sqrt(2 * 3 * 1 * 2))
    assert scores["nll"] == pytest.approx(-(math.log(0.9) + math.log(0.8) + math.log(0.4) + math.log(0.7)) / 4)
    assert scores["brier"] == pytest.approx(2 * (0.1**2 + 0.2**2 + 0.6**2 + 0.3**2) / 4)
    # Each example is alone in its bin, so each contributes |correct - confidence|.
    assert scores["ece"] == pytest.approx((0.1 + 0.2 + 0.6 + 0.3) / 4)
    assert scores["adaptive_ece"] == pytest.approx(scores["ece"])
    assert scores["classwise_ece"] == pytest.approx(scores["ece"])
    # The one error is the least confident of the four: risks 0, 0, 0, 1/4.
    assert scores["aurc"] == pytest.approx(1 / 16)


def test_three_classes_by_hand() -> None:
    probabilities = [[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [0.2, 0.6, 0.2]]
    labels = [0, 2, 0]
    scores = metrics.classification_scores(probabilities, labels)
    assert scores["accuracy"] == pytest.approx(2 / 3)
    assert scores["nll"] == pytest.approx(-(math.log(0.5) + math.log(0.7) + math.log(0.2)) / 3)
    brier = (0.25 + 0.0625 + 0.0625) + (0.01 + 0.04 + 0.09) + (0.64 + 0.36 + 0.04)
    assert scores["brier"] == pytest.approx(brier / 3)


def test_a_uniform_prediction_has_the_entropy_of_chance() -> None:
    uniform = np.full((30, 5), 0.2)
    labels = np.arange(30) % 5
    scores = metrics.classification_scores(uniform, labels)
    assert scores["nll"] == pytest.approx(math.log(5))
    assert scores["brier"] == pytest.approx(0.8)
    assert scores["ece"] == pytest.approx(0.0, abs=1e-12)
    # All tie, so no order helps: the error rate of always saying the first class.
    assert scores["aurc"] == pytest.approx(0.8)


def test_a_certain_prediction_scores_zero_when_right_and_finitely_badly_when_wrong() -> None:
    certain = np.eye(2)[[0, 1, 1]]
    right = metrics.classification_scores(certain, [0, 1, 1])
    assert [right[name] for name in ("nll", "ece", "adaptive_ece", "classwise_ece", "brier", "aurc")] == [0.0] * 6
    wrong = metrics.classification_scores(certain, [1, 0, 0])
    assert (wrong["ece"], wrong["adaptive_ece"], wrong["classwise_ece"]) == (1.0, 1.0, 1.0)
    assert (wrong["brier"], wrong["aurc"]) == (2.0, 1.0)
    assert 500 < wrong["nll"] < math.inf


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_class_scores_agree_with_scikit_learn(classes: int) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    probabilities, labels = random_case(classes)
    predicted = probabilities.argmax(axis=1)
    assert metrics.accuracy(predicted, labels) == pytest.approx(sklearn.accuracy_score(labels, predicted))
    expected = sklearn.matthews_corrcoef(labels, predicted)
    assert metrics.matthews_correlation(predicted, labels) == pytest.approx(expected)
    loss = sklearn.log_loss(labels, probabilities, labels=range(classes))
    assert metrics.negative_log_likelihood(probabilities, labels) == pytest.approx(loss)

    if classes == 2:
        assert metrics.f1(predicted, labels) == pytest.approx(sklearn.f1_score(labels, predicted))
        # scikit-learn's score for two classes counts one of them, ours both.
        half = sklearn.brier_score_loss(labels, probabilities[:, 1])
        assert metrics.brier(probabilities, labels) == pytest.approx(2 * half)


def test_calibration_error_agrees_with_a_loop_over_bins() -> None:
    probabilities, labels = random_case(3)
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    expected = 0.0
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        if inside.any():
            expected += inside.sum() / len(labels) * abs(correct[inside].mean() - confidence[inside].mean())
    assert metrics.expected_calibration_error(probabilities, labels) == pytest.approx(expected)


def test_reliability_bins_are_closed_above_and_cover_every_example() -> None:
    # 0.8 and 1.0 are edges of ten bins, so they belong to the bins that end there.
    probabilities = np.array([[0.8, 0.2], [0.0, 1.0], [0.5, 0.5], [1 + 1e-16, 0.0]])
    bins = metrics.reliability_bins(probabilities, [0, 1, 1, 1], bins=10)
    assert [b["count"] for b in bins] == [0, 0, 0, 0, 1, 0, 0, 1, 0, 2]
    assert bins[7]["lower"] == pytest.approx(0.7) and bins[7]["upper"] == pytest.approx(0.8)
    assert bins[9]["accuracy"] == 0.5 and bins[9]["confidence"] == pytest.approx(1.0)
    assert bins[0]["confidence"] is None and bins[0]["accuracy"] is None
    assert len(metrics.reliability_bins(probabilities, [0, 1, 1, 1])) == 15


def test_correlations_by_hand_and_with_ties() -> None:
    assert metrics.pearson([1, 2, 3], [10, 20, 30]) == pytest.approx(1.0)
    assert metrics.pearson([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    assert metrics.pearson([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4.
    assert metrics.spearman([1, 5, 5, 9], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert metrics.spearman([1, 2, 3], [1, 10, 1000]) == pytest.approx(1.0)


def test_correlations_agree_with_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(1)
    values = generator.integers(0, 6, size=300).astype(float)
    predicted = values + generator.normal(size=300)
    assert metrics.pearson(predicted, values) == pytest.approx(stats.pearsonr(predicted, values).statistic)
    assert metrics.spearman(predicted, values) == pytest.approx(stats.spearmanr(predicted, values).statistic)
    scores = metrics.regression_scores(predicted, values)
    assert list(scores) == ["pearson", "spearman", "mse"]
    assert scores["mse"] == pytest.approx(np.mean((predicted - values) ** 2))


def test_correlations_of_a_constant_are_zero_and_not_nan() -> None:
    assert metrics.pearson([2.0, 2.0, 2.0], [1.0, 2.0, 3.0]) == 0.0
    assert metrics.spearman([1.0, 2.0, 3.0], [5.0, 5.0, 5.0]) == 0.0
    assert metrics.matthews_correlation([1, 1, 1], [0, 1, 0]) == 0.0
    assert metrics.f1([0, 0], [0, 0]) == 0.0


def test_correlation_survives_values_whose_squares_underflow() -> None:
    assert metrics.pearson(np.array([1.0, 2.0, 3.0]) * 1e-200, [1.0, 2.0, 3.0]) == pytest.approx(1.0)


def test_softmax_is_stable_and_in_float64() -> None:
    result = metrics.softmax(np.array([[1000.0, 1000.0], [-1e4, 0.0]], dtype=np.float32))
    assert result.dtype == np.float64
    assert result.tolist() == [[0.5, 0.5], [0.0, 1.0]]


def test_scores_refuse_what_cannot_be_scored() -> None:
    with pytest.raises(BayesLoraError, match="got 3 predictions for 2 labels"):
        metrics.accuracy([1, 0, 1], [1, 0])
    with pytest.raises(BayesLoraError, match="from 0 to 2, but the model has 2 classes"):
        metrics.classification_scores([[0.5, 0.5], [0.5, 0.5]], [0, 2])
    with pytest.raises(BayesLoraError, match="the metric is 'rouge', but"):
        metrics.classification_scores([[0.5, 0.5]], [0], ("rouge",))
