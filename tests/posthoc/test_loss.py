"""Thresholds that keep the mean loss of answers below a level: known p-values, and guarantees that are counted."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom

from bayeslora.errors import BayesLoraError
from bayeslora.posthoc import RiskControl
from bayeslora.posthoc.loss import LossControl, loss_p_value


def test_losses_of_0_and_1_have_the_exact_binomial_tail() -> None:
    losses = np.array([0.0] * 18 + [1.0] * 2)
    assert loss_p_value(losses, 0.3) == pytest.approx(float(binom.cdf(2, 20, 0.3)))
    assert loss_p_value(np.zeros(10), 0.2) == pytest.approx(0.8**10)


def test_other_losses_have_the_smaller_of_both_bounds() -> None:
    losses = np.full(50, 0.1)
    hoeffding = math.exp(-50 * (0.1 * math.log(0.1 / 0.3) + 0.9 * math.log(0.9 / 0.7)))
    bentkus = math.e * float(binom.cdf(5, 50, 0.3))
    assert loss_p_value(losses, 0.3) == pytest.approx(min(hoeffding, bentkus)) and hoeffding != bentkus
    assert loss_p_value(losses, 0.05) == 1, "a mean above the level says nothing against it"
    assert loss_p_value(np.full(400, 1e-9), 0.02) == pytest.approx(
        0.98**400, rel=1e-3
    )  # Hoeffding's, near a loss of 0


def test_errors_give_the_threshold_of_risk_control() -> None:
    rng = np.random.default_rng(0)
    uncertainty = rng.uniform(size=300)
    wrong = rng.uniform(size=300) < uncertainty / 3
    ours = LossControl(uncertainty, wrong)
    other = RiskControl().fit(np.stack([1 - uncertainty / 2, uncertainty / 2], axis=1), wrong.astype(int))
    for risk in (0.05, 0.1, 0.2):
        assert ours.threshold(risk).coverage == other.threshold(risk).coverage
        assert ours.threshold(risk).risk == pytest.approx(other.threshold(risk).risk)
    assert ours.lowest() == pytest.approx(other.lowest(), abs=1e-6)
    assert LossControl(uncertainty, wrong).threshold(ours.lowest() - 1e-6).coverage == 0
    assert LossControl(uncertainty, wrong).threshold(ours.lowest() + 1e-6).coverage > 0


def test_the_mean_loss_of_new_answers_exceeds_the_level_at_most_as_often_as_said() -> None:
    """Losses that are not 0 or 1, with a mean that rises with the uncertainty: the true risk is known."""
    rng = np.random.default_rng(1)
    risk, answered, exceeded = 0.4, 0, 0
    for _ in range(200):
        uncertainty = rng.uniform(size=200)
        control = LossControl(uncertainty, rng.beta(2 * uncertainty + 0.02, 2 * (1 - uncertainty) + 0.02), delta=0.1)
        limit = min(control.threshold(risk).uncertainty, 1.0)
        # E[loss | u] = (2 u + 0.02) / 2.04, so that below a limit its mean is (limit + 0.02) / 2.04.
        answered += limit > 0
        exceeded += limit > 0 and (limit + 0.02) / 2.04 > risk
    assert answered > 150 and exceeded <= 20


def test_rows_at_the_threshold_are_left_to_a_person() -> None:
    control = LossControl([0.0] * 60 + [1.0] * 40, [0.0] * 60 + [1.0] * 40)
    found = control.threshold(0.2)
    assert (found.uncertainty, found.coverage, found.risk, found.rows) == (1.0, 0.6, 0.0, 100)
    assert control.ask_a_human([0.0, 0.999, 1.0, 2.0], 0.2).tolist() == [False, False, True, True]
    assert control.threshold(0.9).uncertainty == math.inf and not control.ask_a_human([1e9], 0.9).any()
    assert control.threshold(0.01).uncertainty == -math.inf and control.ask_a_human([0.0], 0.01).all()


def test_what_is_no_loss_is_refused() -> None:
    for losses in ([1.5, 0.0], [-0.1, 0.0], [math.nan, 0.0]):
        with pytest.raises(BayesLoraError, match="a loss not between 0 and 1"):
            LossControl([1.0, 2.0], losses)
    with pytest.raises(BayesLoraError, match="not finite"):
        LossControl([math.inf, 2.0], [0.0, 0.0])
    with pytest.raises(BayesLoraError, match=r"\(0,\) and \(0,\), but must be \(rows,\)"):
        LossControl([], [])
    with pytest.raises(BayesLoraError, match="risk is 1.5"):
        LossControl([1.0], [0.0]).threshold(1.5)
