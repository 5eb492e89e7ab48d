"""Risk control: thresholds by hand and against a plain search, and the guarantees counted over many splits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import beta, binom

from bayeslora.errors import BayesLoraError
from bayeslora.posthoc import RiskControl
from bayeslora.posthoc.risk import SHARES


def rows(confidence: np.ndarray, wrong: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of two classes with this confidence, and labels."""
    return np.stack([confidence, 1 - confidence], axis=1), wrong.astype(int)


def draws(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A model whose error rate falls with its confidence, and then rises where it is surest."""
    generator = np.random.default_rng(seed)
    confidence = generator.uniform(0.5, 1.0, count)
    return confidence, generator.random(count) < error_rate(confidence)


def error_rate(confidence: np.ndarray) -> np.ndarray:
    return np.where(confidence > 0.97, 0.2, 0.5 * (1 - confidence))


def true_risk(threshold: float) -> float:
    """The integral of `error_rate` above the threshold, over its length."""
    left_out = max(threshold, 0.5)
    if left_out > 0.97:
        return 0.2
    return (0.25 * ((1 - left_out) ** 2 - 0.03**2) + 0.2 * 0.03) / (1 - left_out)


def test_of_answers_is_the_largest_share_whose_upper_bound_is_below_the_risk() -> None:
    for seed in range(20):
        confidence, wrong = draws(400, seed)
        found = RiskControl(0.2, delta=0.1).fit(*rows(confidence, wrong)).threshold()
        order = np.argsort(-confidence)
        allowed = [0]
        for answered in range(20, 401, 20):
            errors = wrong[order[:answered]].sum()
            # Clopper and Pearson's upper bound, from the beta distribution instead of the binomial.
            if errors < answered and beta.ppf(1 - 0.1 / SHARES, errors + 1, answered - errors) <= 0.2:
                allowed.append(answered)
        assert round(found.coverage * 400) == max(allowed) and found.rows == 400
        assert (confidence > found.confidence).sum() == max(allowed)
        assert found.risk == pytest.approx(wrong[order[: max(allowed)]].mean() if max(allowed) else 0)


@pytest.mark.parametrize("of", ["answers", "rows"])
def test_the_lowest_risk_is_where_rows_begin_to_be_answered(of: Any) -> None:
    for seed, count in ((0, 400), (1, 60), (2, 3), (3, 1)):
        confidence, wrong = draws(count, seed)
        control = RiskControl(of=of).fit(*rows(confidence.round(1), wrong))
        lowest = control.lowest()
        assert 0 < lowest < 1
        assert control.threshold(lowest - 1e-6).coverage == 0 < control.threshold(lowest + 1e-6).coverage
    assert RiskControl().fit(*rows(np.full(20, 0.9), np.ones(20, dtype=bool))).lowest() == 1


def test_rows_of_equal_confidence_are_answered_together_or_not_at_all() -> None:
    confidence = np.repeat([0.9, 0.8, 0.7], 200)
    wrong = np.repeat([False, True, True], 200)
    found = RiskControl(0.1).fit(*rows(confidence, wrong)).threshold()
    assert found.coverage == pytest.approx(1 / 3) and found.confidence == 0.8 and found.risk == 0


def test_of_rows_by_hand() -> None:
    """(errors + 1) / (n + 1) at most 0.3 allows two errors of nine rows."""
    confidence = np.array([0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55])
    wrong = np.array([False, True, False, True, False, True, False, True, False])
    control = RiskControl(0.3, of="rows").fit(*rows(confidence, wrong))
    assert control.threshold().confidence == pytest.approx(0.7)
    assert control.ask_a_human(rows(confidence, wrong)[0]).tolist() == [False] * 5 + [True] * 4
    assert control.threshold(0.09).coverage == 0 and control.threshold(0.5).coverage == 1


def test_the_answers_keep_the_risk_in_all_but_a_share_delta_of_calibration_sets() -> None:
    """The true risk of a threshold is known. Where the observed risk is that asked for, many sets would fail."""
    sets = [rows(*draws(300, seed)) for seed in range(150)]
    for delta in (0.05, 0.5):
        found = [RiskControl(0.12, delta=delta).fit(*each).threshold() for each in sets]
        failed = sum(true_risk(each.confidence) > 0.12 for each in found if each.coverage)
        assert failed <= binom.ppf(0.999, 150, delta)
    assert failed > 0 and np.mean([each.coverage for each in found]) > 0.15


def test_the_risk_is_kept_on_held_out_rows_in_95_of_100_splits() -> None:
    kept, answered = 0, []
    for seed in range(100):
        confidence, wrong = draws(1000, seed)
        control = RiskControl(0.15).fit(*rows(confidence[:500], wrong[:500]))
        asked = control.ask_a_human(rows(confidence[500:], wrong[500:])[0]).numpy()
        kept += asked.all() or wrong[500:][~asked].mean() <= 0.15
        answered.append(1 - asked.mean())
    assert kept >= 95 and np.mean(answered) > 0.3


def test_errors_among_all_rows_stay_below_the_risk_on_average_and_close_to_it() -> None:
    shares = []
    for seed in range(400):
        confidence, wrong = draws(300, seed)
        control = RiskControl(0.1, of="rows").fit(*rows(confidence[:100], wrong[:100]))
        asked = control.ask_a_human(rows(confidence[100:], wrong[100:])[0]).numpy()
        shares.append((wrong[100:] & ~asked).mean())
    error = 4 * np.std(shares) / 20
    assert 0.1 - 2 / 101 - error <= np.mean(shares) <= 0.1 + error


def test_a_model_without_errors_answers_from_the_stated_number_of_rows_on() -> None:
    needed = 117  # .95^117 = .0025 = .05 / 20
    sure = np.linspace(0.9, 0.99, needed)
    right = np.zeros(needed, dtype=bool)
    assert RiskControl(0.05).fit(*rows(sure, right)).threshold().coverage == 1
    one_less = RiskControl(0.05).fit(*rows(sure[1:], right[1:])).threshold()
    assert one_less.coverage == 0 and one_less.confidence > 1


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: RiskControl(0.0), "risk is 0.0, but must be between 0 and 1"),
        (lambda: RiskControl(delta=1.0), "delta is 1.0"),
        (lambda: RiskControl(of="all"), "of is 'all', but must be answers or rows"),  # type: ignore[arg-type]
        (lambda: RiskControl().threshold(), "call fit first"),
        (lambda: RiskControl().fit(np.eye(2), [0, 1]).threshold(2.0), "risk is 2.0"),
        (lambda: RiskControl().fit(np.eye(2), [[0], [1]]), "several labels"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(call: Any, sentence: str) -> None:
    with pytest.raises(BayesLoraError, match=sentence):
        call()
