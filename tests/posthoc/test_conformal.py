"""Conformal sets and intervals: quantiles by hand, coverage counted over many splits, and what is refused."""

from __future__ import annotations

import hashlib
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import beta

from bayeslora.errors import BayesLoraError
from bayeslora.posthoc import ConformalIntervals, ConformalSets
from bayeslora.posthoc.conformal import conformal_quantile
from bayeslora.prediction.predict import summarize


def draws(rows: int, classes: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of a model that is too sure, and labels: class 0 is common, the last rare and hard."""
    generator = np.random.default_rng(seed)
    labels = generator.choice(classes, rows, p=np.array([8, 4, 2, 1][:classes]) / sum([8, 4, 2, 1][:classes]))
    logits = generator.normal(size=(rows, classes))
    logits[np.arange(rows), labels] += np.array([3.0, 2.0, 1.5, 0.5])[labels]
    sure = np.exp(2 * logits)
    return sure / sure.sum(axis=1, keepdims=True), labels


def covered(sets: torch.Tensor, labels: np.ndarray) -> np.ndarray:
    return sets.numpy()[np.arange(len(labels)), labels]


@pytest.mark.parametrize(
    ("rows", "coverage", "rank"),
    [(9, 0.9, 9), (10, 0.9, 10), (19, 0.95, 19), (99, 0.9, 90), (100, 0.9, 91), (4, 0.8, 4)],
)
def test_the_quantile_is_the_score_of_the_right_rank(rows: int, coverage: float, rank: int) -> None:
    scores = np.random.default_rng(0).permutation(np.arange(1.0, rows + 1))
    assert conformal_quantile(scores, coverage) == rank == math.ceil(round((rows + 1) * coverage, 9))


def test_too_few_rows_put_all_labels_in_the_set_and_say_so() -> None:
    probabilities, labels = draws(18)
    assert conformal_quantile(np.zeros(18), 0.95) == math.inf
    sets = ConformalSets(coverage=0.95).fit(probabilities, labels)
    with pytest.warns(UserWarning, match=r"18 calibration rows are too few for a coverage of 0.95 \(at least 19\)"):
        assert sets.sets(probabilities).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not ConformalSets(coverage=0.95).fit(*draws(19)).sets(probabilities).all()
    intervals = ConformalIntervals(0.9).fit([1.0, 2.0], [1.5, 2.0])
    with pytest.warns(UserWarning, match="the intervals have no bounds"):
        assert torch.isinf(intervals.intervals([0.0])).all()


def test_lac_sets_by_hand() -> None:
    calibration = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    sets = ConformalSets("lac", 0.6).fit(calibration, [0, 0, 1, 1])
    assert sets.rows == 4 and [scores.tolist() for scores in sets.scores] == [
        pytest.approx([0.1, 0.2]),
        pytest.approx([0.3, 0.6]),
    ]
    assert sets.thresholds() == pytest.approx(np.array([0.3, 0.3]))  # rank 3 of .1 .2 .3 .6
    assert sets.thresholds(0.8) == pytest.approx(np.array([0.6, 0.6]))
    new = np.array([[0.75, 0.25], [0.5, 0.5], [0.1, 0.9]])
    assert sets.sets(new).tolist() == [[True, False], [True, False], [False, True]]
    sets.allow_empty = True
    assert sets.sets(new).tolist() == [[True, False], [False, False], [False, True]]
    assert sets.sets(new, 0.8).tolist() == [[True, False], [True, True], [False, True]]


def test_aps_scores_are_what_is_above_a_label_and_a_share_of_it() -> None:
    probabilities = np.array([[0.2, 0.5, 0.3], [0.1, 0.1, 0.8]])
    plain = ConformalSets("aps", randomized=False).fit(probabilities, [0, 2])
    assert plain.scores[0] == pytest.approx([1.0]) and plain.scores[2] == pytest.approx([0.8])
    random = ConformalSets("aps", seed=5).fit(probabilities, [2, 2])
    u = [
        int.from_bytes(hashlib.blake2b(row.tobytes(), digest_size=8, key=b"5").digest(), "little") / 2**64
        for row in probabilities
    ]
    assert random.scores[2] == pytest.approx(np.sort([0.5 + u[0] * 0.3, u[1] * 0.8]))


@pytest.mark.parametrize(
    ("score", "options"),
    [
        ("lac", {}),
        ("lac", {"by_class": True}),
        ("aps", {}),
        ("aps", {"randomized": False}),
        ("aps", {"by_class": True}),
    ],
)
def test_the_coverage_asked_for_is_kept_over_splits_and_not_exceeded(score: Any, options: dict[str, Any]) -> None:
    """The mean over 200 splits is within four standard errors of [1 - α, 1 - α + 1 / (n + 1)]."""
    kept, of_last, rows = [], [], 199
    for split in range(200):
        probabilities, labels = draws(rows + 400, seed=split)
        sets = ConformalSets(score, 0.9, allow_empty=True, seed=split, **options)
        sets.fit(probabilities[:rows], labels[:rows])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the rare class has 12 rows on average, sometimes fewer than 9
            inside = covered(sets.sets(probabilities[rows:]), labels[rows:])
        kept.append(inside.mean())
        of_last.append(inside[labels[rows:] == 3].mean())
    error = 4 * np.std(kept) / math.sqrt(len(kept))
    slack = 0.03 if "by_class" in options else 1 / (rows + 1)  # each class has its own n
    assert 0.9 - error <= np.mean(kept) <= 0.9 + slack + error
    assert (np.mean(of_last) >= 0.9 - 4 * np.std(of_last) / math.sqrt(200)) == ("by_class" in options)


def test_the_coverage_of_one_calibration_set_has_the_beta_distribution() -> None:
    """Scores that are uniform have their own value as the coverage: no test rows are needed."""
    generator = np.random.default_rng(0)
    found = [conformal_quantile(generator.random(99), 0.9) for _ in range(2000)]
    expected = beta(90, 10)
    for share in (0.1, 0.5, 0.9):
        assert np.mean(np.array(found) <= expected.ppf(share)) == pytest.approx(share, abs=0.035)


def test_randomized_sets_are_smaller_with_two_classes_and_repeat() -> None:
    """Where more than a share α is wrong, the plain score of the quantile is 1, which is that of all labels."""
    probabilities, labels = draws(600, 2)
    labels[::6] = 1 - labels[::6]
    sets = ConformalSets("aps", 0.9, seed=1).fit(probabilities[:300], labels[:300])
    first = sets.sets(probabilities[300:])
    assert torch.equal(first, sets.sets(probabilities[300:]))
    plain = ConformalSets("aps", 0.9, randomized=False).fit(probabilities[:300], labels[:300])
    assert first.sum() < 500 and plain.sets(probabilities[300:]).sum() > 590
    sets.seed = 2
    assert not torch.equal(first, sets.sets(probabilities[300:]))


@pytest.mark.parametrize("seed", [0, 5])
def test_a_row_has_the_same_set_in_any_call(seed: int) -> None:
    """Rows that come one by one are covered as often as in one call, whatever the seed."""
    inside = []
    for split in range(20):
        probabilities, labels = draws(600, 3, seed=split)
        sets = ConformalSets("aps", 0.8, allow_empty=True, seed=seed).fit(probabilities[:500], labels[:500])
        together = sets.sets(probabilities[500:])
        one_by_one = torch.cat([sets.sets(row[None]) for row in probabilities[500:]])
        assert torch.equal(together, one_by_one)
        inside.append(covered(one_by_one, labels[500:]).mean())
    assert np.mean(inside) == pytest.approx(0.8, abs=0.03)


def test_a_class_that_a_row_does_not_have_is_in_no_set() -> None:
    logits = torch.tensor([[[1.0, 0.5, -math.inf], [1.0, 0.5, 0.0]]])
    sets = ConformalSets("lac", 0.9).fit(*draws(5, 3))
    with pytest.warns(UserWarning, match="all labels are in every set"):
        found = sets.sets(summarize(logits))
    assert found.tolist() == [[True, True, False], [True, True, True]]


def test_classes_with_too_few_rows_are_in_every_set_and_counted() -> None:
    probabilities, labels = draws(60)
    keep = np.flatnonzero((labels != 3) | (np.cumsum(labels == 3) <= 2))
    sets = ConformalSets("lac", 0.8, by_class=True).fit(probabilities[keep], labels[keep])
    with pytest.warns(UserWarning, match=r"2 calibration rows are too few .*: 1 of 4 labels are in every set"):
        found = sets.sets(probabilities)
    assert found[:, 3].all() and not found[:, 0].all()


def test_intervals_cover_and_scaled_ones_follow_the_deviation() -> None:
    kept, widths = {False: [], True: []}, {}
    for split in range(100):
        generator = np.random.default_rng(split)
        noise = generator.uniform(0.1, 2.0, 600)
        centre = generator.normal(size=600)
        truth = centre + noise * generator.normal(size=600)
        values = torch.from_numpy(centre + noise * np.array([[-1.0], [1.0]]))  # two samples, `noise` from their mean
        prediction = summarize(values.unsqueeze(-1))
        first = summarize(values[:, :199].unsqueeze(-1))
        for scaled, shares in kept.items():
            bounds = ConformalIntervals(0.9, scaled).fit(first, truth[:199]).intervals(prediction).numpy()[199:]
            shares.append(((bounds[:, 0] <= truth[199:]) & (truth[199:] <= bounds[:, 1])).mean())
            widths[scaled] = bounds[:, 1] - bounds[:, 0]
    for shares in kept.values():
        assert 0.9 - 0.01 <= np.mean(shares) <= 0.915
    assert np.ptp(widths[False]) < 1e-9 and np.corrcoef(widths[True], noise[199:])[0, 1] > 0.999


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda p, y: ConformalSets().fit(p, np.eye(4)[y]), r"labels have shape \(20, 4\).*several labels a row"),
        (lambda p, y: ConformalSets().fit(p * 1.5, y), "sums to 1.5, but must sum to 1"),
        (lambda p, y: ConformalSets().fit(p[:3], y), "got 3 predictions for 20 labels"),
        (lambda p, y: ConformalSets().fit(p, y + 1), "labels run from 1 to 4"),
        (lambda p, y: ConformalSets().fit(p, y + 0.5), "must be class ids"),
        (lambda p, y: ConformalSets().sets(p), "call fit first"),
        (
            lambda p, y: ConformalSets(coverage=0.5).fit(p, y).sets(p[:, :3] / p[:, :3].sum(1, keepdims=True)),
            "3 classes",
        ),
        (lambda p, y: ConformalSets(coverage=1.0), "coverage is 1.0, but must be between 0 and 1"),
        (lambda p, y: ConformalSets("raps"), "score is 'raps'"),  # type: ignore[arg-type]
        (lambda p, y: ConformalSets().fit(summarize(torch.zeros(1, 3, 1)), [0, 0, 0]), "ConformalIntervals"),
        (lambda p, y: ConformalIntervals().fit(summarize(torch.zeros(1, 3, 2)), [0, 0, 0]), "use ConformalSets"),
        (
            lambda p, y: ConformalIntervals(scaled=True).fit(summarize(torch.zeros(1, 3, 1)), [0, 0, 0]),
            "deviation is 0",
        ),
        (lambda p, y: ConformalIntervals(scaled=True).fit([1.0], [1.0]), "give a Prediction"),
        (lambda p, y: ConformalIntervals().fit([1.0, 2.0], [1.0]), "got 2 predictions for 1 label,"),
        (
            lambda p, y: ConformalIntervals().fit([1.0, 2.0], [1.0, float("nan")]),
            "a label is nan or infinite, but must be a number: leave such rows out",
        ),
        (lambda p, y: ConformalIntervals().intervals([1.0]), "call fit first"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(call: Any, sentence: str) -> None:
    with pytest.raises(BayesLoraError, match=sentence) as caught:
        call(*draws(20))
    assert "\n" not in str(caught.value) and not str(caught.value).endswith(".")
