"""Scores of several labels a row: known answers, and those of each label as a task of its own."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from bayeslora.errors import BayesLoraError
from bayeslora.evaluation import label_scores, multi_label_scores
from bayeslora.evaluation.multi_label import MultiLabelEvaluation, baseline_of_labels

P = np.array([[0.9, 0.2, 0.6], [0.4, 0.8, 0.1], [0.7, 0.3, 0.2]])
Y = np.array([[1.0, 0, 0], [1, 1, 0], [1, 0, 0]])


def test_scores_have_the_values_that_are_counted_by_hand() -> None:
    found = multi_label_scores(P, Y)
    # Yes to (0, 0), (0, 2), (1, 1) and (2, 0), three of them right; four labels are there.
    assert found["f1_micro"] == pytest.approx(2 * 3 / (4 + 4))
    assert found["f1_macro"] == pytest.approx((2 * 2 / (2 + 3) + 1 + 0) / 3)
    assert found["exact_match"] == pytest.approx(1 / 3) and found["label_accuracy"] == pytest.approx(7 / 9)
    right = [0.9, 0.8, 0.4, 0.4, 0.8, 0.9, 0.7, 0.7, 0.8]
    assert found["nll"] == pytest.approx(-sum(map(math.log, right)) / 9)
    assert found["brier"] == pytest.approx(sum((1 - p) ** 2 for p in right) / 9)


def test_each_label_is_scored_as_if_it_were_alone() -> None:
    rng = np.random.default_rng(0)
    labels = (rng.uniform(size=(60, 3)) < (0.3, 0.5, 0.0)).astype(float)
    p = np.clip(rng.uniform(size=(60, 3)) * 0.6 + labels * 0.3, 0.01, 0.99)
    found = label_scores(p, labels, ["a", "b", "c"])
    for place, name in enumerate("ab"):
        assert found[name]["auroc"] == pytest.approx(roc_auc_score(labels[:, place], p[:, place]))
        assert found[name]["nll"] == pytest.approx(log_loss(labels[:, place], p[:, place]))
        assert found[name]["rows"] == labels[:, place].sum()
    assert "auroc" not in found["c"] and found["c"]["f1"] == 0
    assert np.mean([found[name]["nll"] for name in "abc"]) == pytest.approx(multi_label_scores(p, labels)["nll"])


def test_the_baseline_is_the_entropy_of_the_labels() -> None:
    shares = Y.mean(axis=0)
    entropies = [-sum(p * math.log(p) for p in (s, 1 - s) if p > 0) for s in shares]
    assert baseline_of_labels(Y)["nll"] == pytest.approx(np.mean(entropies))
    assert baseline_of_labels(Y)["brier"] == pytest.approx(np.mean(shares * (1 - shares)))


def test_decisions_are_counted_once_each() -> None:
    nothing = np.zeros_like(P)
    found = MultiLabelEvaluation(multi_label_scores(P, Y), P, Y, {}, 0.0, nothing + 0.1, nothing, samples=2)
    assert sum(b["count"] for b in found.reliability) == 9
    assert found.risk_coverage["risk"][-1] == pytest.approx(2 / 9)
    assert sum(found.histograms()["mutual_information"]["wrong"]) == 2


def test_what_is_no_set_of_probabilities_is_refused() -> None:
    with pytest.raises(BayesLoraError, match=r"\(3, 3\) and \(3, 2\)"):
        multi_label_scores(P, Y[:, :2])
    for p, y in ((P + 0.5, Y), (P, Y + 0.5), (P * math.nan, Y)):
        with pytest.raises(BayesLoraError, match="a probability is not between 0 and 1 or a label not 0 or 1"):
            multi_label_scores(p, y)


def test_one_label_is_scored_as_one_of_several() -> None:
    p, truth = np.array([[0.1], [0.2], [0.3], [0.9]]), np.array([[0.0], [0], [1], [0]])
    found = multi_label_scores(p, truth)
    assert found["f1_micro"] == found["f1_macro"] == label_scores(p, truth, ["a"])["a"]["f1"] == 0
