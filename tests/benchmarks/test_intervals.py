"""Intervals of differences: weighted scores are the library's on repeated rows, and pairs cancel what they share."""

from __future__ import annotations

import numpy as np
import pytest
from intervals import differences, encoded, probabilities_of, weighted_scores

from bayeslora.evaluation.metrics import classification_scores
from bayeslora.evaluation.uncertainty import excess_area


def predictions(n: int = 120, classes: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities with ties, and labels that agree with them more often than not."""
    generator = np.random.default_rng(seed)
    p = generator.dirichlet(np.full(classes, 0.5), size=n).round(1) + 1e-3
    p /= p.sum(axis=1, keepdims=True)
    return p, np.array([generator.choice(classes, p=row) for row in p])


@pytest.mark.parametrize("classes", [2, 3])
def test_scores_of_a_weighting_are_those_of_the_repeated_rows(classes: int) -> None:
    p, labels = predictions(classes=classes)
    weights = np.random.default_rng(1).multinomial(120, np.full(120, 1 / 120), size=4).astype(float)
    weights[0] = 1
    found = weighted_scores(p, labels, weights)
    for index, each in enumerate(weights):
        rows = np.repeat(np.arange(120), each.astype(int))
        expected = classification_scores(p[rows], labels[rows], ("accuracy",))
        expected["excess_aurc"] = excess_area(1 - p[rows].max(1), p[rows].argmax(1) != labels[rows])
        for score, values in found.items():
            assert values[index] == pytest.approx(expected[score], abs=1e-9), score


@pytest.mark.parametrize("classes", [2, 4])
def test_a_file_holds_probabilities_in_few_bytes(classes: int) -> None:
    p, _ = predictions(1000, classes)
    p[0] = np.eye(classes)[1] * (1 - 1e-9) + 1e-9 / classes
    text = encoded(p)
    assert len(text) < 2.7 * 1000 * (classes - 1) + 10
    np.testing.assert_allclose(probabilities_of({"log_odds": text}, 1000), p, atol=2e-3)
    rounded = {"probabilities": p.round(5).tolist()}
    np.testing.assert_allclose(probabilities_of(rounded, 1000), p, atol=2e-5)


def test_equal_predictions_do_not_differ_and_a_shared_difficulty_cancels() -> None:
    p, labels = predictions(400, 2)
    for low_high in differences([p, p], [p, p], labels, 200).values():
        assert low_high == [0.0, 0.0, 0.0]
    sharper = p**1.5 / (p**1.5).sum(axis=1, keepdims=True)
    value, low, high = differences([sharper, sharper], [p, p], labels, 400)["nll"]
    assert value > 0 and low > 0  # the labels were drawn from p
    alone = weighted_scores(p, labels, np.random.default_rng(0).multinomial(400, np.full(400, 1 / 400), 400) + 0.0)
    assert high - low < np.ptp(np.quantile(alone["nll"], [0.025, 0.975]))


@pytest.mark.slow
def test_intervals_cover_as_often_as_they_say() -> None:
    """The difference in likelihood of two fixed predictors over fresh rows: its mean is known from many rows."""
    generator = np.random.default_rng(5)

    def drawn(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        truth = generator.uniform(0.05, 0.95, size=n)
        one = np.stack([1 - truth, truth], axis=1)
        other = np.stack([1 - 0.5 * (truth + 0.5), 0.5 * (truth + 0.5)], axis=1)
        return one, other, (generator.uniform(size=n) < truth).astype(int)

    one, other, labels = drawn(200_000)
    rows = np.arange(len(labels))
    expected = float(np.mean(np.log(other[rows, labels]) - np.log(one[rows, labels])))
    inside = 0
    for _ in range(100):
        one, other, labels = drawn(200)
        _, low, high = differences([one], [other], labels)["nll"]
        inside += low <= expected <= high
    assert 88 <= inside <= 100
