"""Calibration, selective prediction and detection against hand computation, brute force and scikit-learn."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bayeslora.errors import BayesLoraError
from bayeslora.evaluation import metrics, uncertainty
from tests.evaluation.test_metrics import random_case

# Few distinct values, so that ties are the rule.
tied = st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=6)
sides = st.lists(st.integers(0, 4), min_size=1, max_size=30)


def two_classes(confidence: list[float], correct: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and labels of a two-class problem with these confidences and hits; class 1 is predicted."""
    p = np.array(confidence)
    return np.stack([1 - p, p], axis=1), np.array(correct)


def test_adaptive_error_of_four_examples_in_two_bins_by_hand() -> None:
    probabilities, labels = two_classes([0.9, 0.6, 0.8, 0.7], [1, 0, 0, 1])
    # Bins {.6, .7} with accuracy 1/2 and {.8, .9} with accuracy 1/2.
    expected = (abs(0.5 - 0.65) + abs(0.5 - 0.85)) / 2
    assert uncertainty.adaptive_calibration_error(probabilities, labels, bins=2) == pytest.approx(expected)


def test_adaptive_error_cuts_an_example_between_two_bins_of_equal_mass() -> None:
    probabilities, labels = two_classes([0.6, 0.8, 1.0], [1, 0, 1])
    # Three examples, two bins of one and a half: the middle one's gap of -.8 is shared.
    expected = (abs(0.4 - 0.4) + abs(-0.4 + 0.0)) / 3
    assert uncertainty.adaptive_calibration_error(probabilities, labels, bins=2) == pytest.approx(expected)


def test_adaptive_error_agrees_with_sorting_and_splitting_where_nothing_ties() -> None:
    probabilities, labels = random_case(4, n=15 * 20, seed=3)
    order = np.argsort(probabilities.max(axis=1))
    hits = (probabilities.argmax(axis=1) == labels)[order].astype(float)
    parts = zip(np.split(hits, 15), np.split(probabilities.max(axis=1)[order], 15), strict=True)
    expected = np.mean([abs(h.mean() - c.mean()) for h, c in parts])
    assert uncertainty.adaptive_calibration_error(probabilities, labels) == pytest.approx(expected)


def test_adaptive_error_of_one_confidence_is_the_plain_gap_and_few_examples_stand_alone() -> None:
    probabilities, labels = two_classes([0.9] * 40, [1] * 30 + [0] * 10)
    assert uncertainty.adaptive_calibration_error(probabilities, labels) == pytest.approx(0.15)
    probabilities, labels = two_classes([0.9, 0.6], [1, 0])
    assert uncertainty.adaptive_calibration_error(probabilities, labels) == pytest.approx((0.1 + 0.6) / 2)


def test_classwise_error_by_hand_and_by_a_loop() -> None:
    probabilities = np.array([[0.6, 0.3, 0.1], [0.6, 0.1, 0.3]])
    # Class 0: one bin at .6 with share 1/2. Class 1: .3 is label 1, .1 is not. Class 2: likewise not.
    labels = [0, 1]
    expected = (abs(0.5 - 0.6) + (abs(0 - 0.3) + abs(1 - 0.1)) / 2 + (abs(0 - 0.1) + abs(0 - 0.3)) / 2) / 3
    assert uncertainty.classwise_calibration_error(probabilities, labels, bins=10) == pytest.approx(expected)
    probabilities, labels = random_case(3, seed=5)
    total = 0.0
    for k, b in itertools.product(range(3), range(15)):
        p = probabilities[:, k]
        inside = (p > b / 15) & (p <= (b + 1) / 15)
        if inside.any():
            total += inside.mean() * abs((labels[inside] == k).mean() - p[inside].mean())
    assert uncertainty.classwise_calibration_error(probabilities, labels) == pytest.approx(total / 3)


def test_classwise_error_sees_a_swap_that_the_predicted_class_does_not() -> None:
    # Right with the stated confidence, but what is left goes to the wrong one of the other two classes.
    probabilities = np.tile([0.6, 0.3, 0.1], (10, 1))
    labels = np.array([0] * 6 + [1] * 1 + [2] * 3)
    assert metrics.expected_calibration_error(probabilities, labels) == pytest.approx(0, abs=1e-12)
    assert uncertainty.classwise_calibration_error(probabilities, labels) == pytest.approx((0 + 0.2 + 0.2) / 3)


def test_calibrated_probabilities_have_errors_that_shrink_with_the_sample() -> None:
    for score in (uncertainty.adaptive_calibration_error, uncertainty.classwise_calibration_error):
        small, large = (score(*random_case(3, n=n, seed=7)) for n in (200, 200_000))
        assert large < 0.005 < small


def test_area_under_risk_coverage_by_hand() -> None:
    # Errors at ranks 2 and 4 of 4: risks 0, 1/2, 1/3, 1/2.
    assert uncertainty.area_under_risk_coverage([0.1, 0.2, 0.3, 0.4], [0, 1, 0, 1]) == pytest.approx((1 / 3 + 1) / 4)
    best = uncertainty.area_under_risk_coverage([0.1, 0.2, 0.3, 0.4], [0, 0, 1, 1])
    assert best == pytest.approx((1 / 3 + 1 / 2) / 4)
    assert uncertainty.excess_area([0.1, 0.2, 0.3, 0.4], [0, 1, 0, 1]) == pytest.approx((1 / 3 + 1) / 4 - best)
    assert uncertainty.excess_area([1, 2, 3, 4], [0, 0, 1, 1]) == pytest.approx(0, abs=1e-12)


def test_a_constant_uncertainty_has_the_error_rate_at_every_coverage() -> None:
    wrong = [0, 1, 1, 0, 0, 0, 0, 0]
    assert uncertainty.area_under_risk_coverage([3.0] * 8, wrong) == pytest.approx(0.25)
    curve = uncertainty.risk_coverage_curve([3.0] * 8, wrong, points=5)
    assert curve["coverage"] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert curve["risk"] == pytest.approx([0.25] * 5)


@settings(deadline=None)
@given(tied)
def test_ties_give_the_expectation_over_the_orders_of_what_ties(rows: list[tuple[int, bool]]) -> None:
    """Every order of the examples, those that respect the uncertainty counted, in exact fractions."""
    areas = []
    for order in itertools.permutations(rows):
        if [key for key, _ in order] == sorted(key for key, _ in rows):
            errors = itertools.accumulate(int(wrong) for _, wrong in order)
            areas.append(sum(Fraction(e, i) for i, e in enumerate(errors, 1)) / len(rows))
    expected = float(sum(areas) / len(areas))
    keys, wrong = zip(*rows, strict=True)
    assert uncertainty.area_under_risk_coverage(keys, wrong) == pytest.approx(expected, abs=1e-12)


@settings(deadline=None)
@given(tied, st.randoms(use_true_random=False))
def test_scores_do_not_depend_on_the_order_of_the_examples(rows: list[tuple[int, bool]], random: Any) -> None:
    shuffled = list(rows)
    random.shuffle(shuffled)
    found = []
    for case in (rows, shuffled):
        keys, wrong = zip(*case, strict=True)
        probabilities, labels = two_classes([0.5 + 0.12 * (key + 1) for key in keys], [int(not w) for w in wrong])
        curve = uncertainty.risk_coverage_curve(keys, wrong, points=7)["risk"]
        adaptive = uncertainty.adaptive_calibration_error(probabilities, labels, bins=4)
        found.append([*curve, adaptive, uncertainty.excess_area(keys, wrong)])
    assert found[0] == pytest.approx(found[1], abs=1e-12)


def test_the_curve_ends_at_the_error_rate_and_its_mean_nears_the_area() -> None:
    generator = np.random.default_rng(0)
    scores = generator.random(2000)
    wrong = generator.random(2000) < scores / 2
    curve = uncertainty.risk_coverage_curve(scores, wrong)
    assert len(curve["risk"]) == 100 and curve["coverage"][-1] == 1.0
    assert curve["risk"][-1] == pytest.approx(wrong.mean())
    assert np.mean(curve["risk"]) == pytest.approx(uncertainty.area_under_risk_coverage(scores, wrong), abs=0.01)


def test_detection_by_hand() -> None:
    found = uncertainty.detection_scores([0.1, 0.2, 0.3, 0.4], [0.35, 0.5])
    # .5 is above all four, .35 above three. Flagging from .5 down: precisions 1 and 2/3 at the two recalls.
    assert found["auroc"] == pytest.approx(7 / 8)
    assert found["aupr"] == pytest.approx((1 + 2 / 3) / 2)
    assert found["fpr95"] == pytest.approx(1 / 4)


def test_detection_of_ties_by_hand() -> None:
    found = uncertainty.detection_scores([1.0, 2.0], [2.0, 3.0])
    # Pairs: (1,2) and (1,3) and (2,3) won, (2,2) half. Both twos are flagged together.
    assert found["auroc"] == pytest.approx(3.5 / 4)
    assert found["aupr"] == pytest.approx(1 / 2 + 1 / 2 * 2 / 3)
    assert found["fpr95"] == pytest.approx(1 / 2)
    constant = uncertainty.detection_scores([0.0] * 30, [0.0] * 10)
    assert constant == {"auroc": 0.5, "aupr": pytest.approx(0.25), "fpr95": 1.0}


def test_the_rate_at_95_percent_flags_19_of_20_and_no_fewer() -> None:
    outside = list(range(1, 21))
    inside = [0.5, 1.5, 2.5]
    # 19 of 20 lie at 2 and above, where one of three inside lies too.
    assert uncertainty.detection_scores(inside, outside)["fpr95"] == pytest.approx(1 / 3)
    assert uncertainty.detection_scores(inside, outside[1:])["fpr95"] == pytest.approx(1 / 3)
    assert uncertainty.detection_scores([2.5, 2.5], outside[:10])["fpr95"] == 1.0


@settings(deadline=None)
@given(sides, sides)
def test_detection_agrees_with_scikit_learn(inside: list[int], outside: list[int]) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    truth = [0] * len(inside) + [1] * len(outside)
    scores = [value / 7 for value in (*inside, *outside)]
    found = uncertainty.detection_scores(scores[: len(inside)], scores[len(inside) :])
    assert found["auroc"] == pytest.approx(sklearn.roc_auc_score(truth, scores))
    assert found["aupr"] == pytest.approx(sklearn.average_precision_score(truth, scores))
    false, true, _ = sklearn.roc_curve(truth, scores, drop_intermediate=False)
    assert found["fpr95"] == pytest.approx(false[true >= 0.95 - 1e-12].min())


@settings(deadline=None)
@given(sides, sides)
def test_detection_sees_only_the_order_and_turns_round_with_it(inside: list[int], outside: list[int]) -> None:
    found = uncertainty.detection_scores(inside, outside)
    stretched = uncertainty.detection_scores(np.exp(inside), np.exp(outside))
    assert stretched == pytest.approx(found)
    turned = uncertainty.detection_scores([-v for v in inside], [-v for v in outside])
    assert turned["auroc"] == pytest.approx(1 - found["auroc"])
    assert 0 <= found["fpr95"] <= 1 and 0 < found["aupr"] <= 1


def test_measures_of_uncertainty_leave_out_what_is_nowhere_above_zero() -> None:
    probabilities = [[0.75, 0.25], [0.5, 0.5]]
    without = uncertainty.uncertainties(probabilities, [0.56, 0.69], [0.0, 0.0])
    assert list(without) == ["max_probability", "entropy"]
    assert without["max_probability"].tolist() == [0.25, 0.5]
    found = uncertainty.uncertainties(probabilities, [0.56, 0.69], [0.0, 0.1])
    assert list(found) == ["max_probability", "entropy", "mutual_information"]
    assert list(uncertainty.detection(found, without)) == ["max_probability", "entropy"]


def test_histograms_count_every_example_on_shared_edges() -> None:
    right = uncertainty.uncertainties([[1.0, 0.0], [0.5, 0.5]], [0.0, math.log(2) + 1e-16], [0.0, 0.02])
    other = uncertainty.uncertainties([[0.5, 0.5]], [math.log(2)], [0.05])
    found = uncertainty.histograms({"correct": right, "wrong": {k: v[:0] for k, v in right.items()}, "ood": other}, 2)
    assert list(found) == ["entropy", "mutual_information"]
    entropy, information = found["entropy"], found["mutual_information"]
    assert entropy["edges"][0] == 0 and entropy["edges"][-1] == pytest.approx(math.log(2))
    assert entropy["correct"][0] == 1 and entropy["correct"][-1] == 1 and sum(entropy["wrong"]) == 0
    assert sum(entropy["ood"]) == 1 and len(entropy["edges"]) == 31
    # .05 lies below log(2) / 8 = .0866 and above log(2) / 16.
    assert information["edges"][-1] == pytest.approx(math.log(2) / 8)
    assert sum(information["correct"]) == 2


def test_bad_input_is_named() -> None:
    with pytest.raises(BayesLoraError, match="0 out-of-distribution uncertainties were given"):
        uncertainty.detection_scores([1.0], [])
    with pytest.raises(BayesLoraError, match="1 of 2 in-distribution uncertainties are not finite"):
        uncertainty.detection_scores([1.0, math.nan], [1.0])
    with pytest.raises(BayesLoraError, match="1 of 2 uncertainties are not finite"):
        uncertainty.area_under_risk_coverage([math.nan, 0.0], [0, 1])
    with pytest.raises(BayesLoraError, match="got 2 predictions for 1 label,"):
        uncertainty.area_under_risk_coverage([0.1, 0.2], [0])
