"""Scores of importance against numerical integration and at their extremes, and the budget that they fill."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bayeslora.methods.adalora.importance import (
    IMPORTANCES,
    NEED_STD,
    budget_at,
    kept_ranks,
    score_of_posterior,
    sensitivities,
    triplet_scores,
    update_averages,
)
from tests.oracles import adalora as oracle

OF_POSTERIOR = [name for name in IMPORTANCES if name != "sensitivity"]
CASES = [(0.0, 1.0), (0.3, 1.0), (-0.3, 1.0), (1.0, 1.0), (-2.5, 0.5), (0.02, 0.01), (4.0, 1.0), (0.05, 0.01)]


def _score(name: str, mean: float, std: float, dtype: torch.dtype = torch.float64) -> float:
    return float(score_of_posterior(name, torch.tensor(mean, dtype=dtype), torch.tensor(std, dtype=dtype)))  # type: ignore[arg-type]


@pytest.mark.parametrize(("mean", "std"), CASES)
@pytest.mark.parametrize("name", OF_POSTERIOR)
def test_a_score_is_that_of_the_integrated_gaussian(name: str, mean: float, std: float) -> None:
    assert _score(name, mean, std) == pytest.approx(oracle.posterior_score(name, mean, std), rel=1e-6)
    assert _score(name, mean, std, torch.float32) == pytest.approx(_score(name, mean, std), rel=2e-6)


def test_at_mean_zero_the_ratio_is_that_of_the_half_normal_distribution() -> None:
    expected = math.sqrt(2 / math.pi) / math.sqrt(1 - 2 / math.pi)
    assert _score("snr_abs", 0.0, 1e-3) == pytest.approx(expected, rel=1e-12)
    assert _score("mean_abs", 0.0, 1e-3) == pytest.approx(1e-3 * math.sqrt(2 / math.pi), rel=1e-12)


def test_every_score_is_finite_and_ordered_in_single_precision() -> None:
    means = torch.cat([torch.zeros(1), torch.logspace(-20, 4, 49), -torch.logspace(-20, 4, 49)])
    mean, std = torch.meshgrid(means, torch.logspace(-30, 3, 67), indexing="ij")
    found = {name: score_of_posterior(name, mean, std) for name in OF_POSTERIOR}  # type: ignore[arg-type]
    for name, score in found.items():
        assert score.isfinite().all() and (score >= 0).all()
        exact = score_of_posterior(name, mean.double(), std.double())  # type: ignore[arg-type]
        torch.testing.assert_close(score.double(), exact, rtol=1e-4, atol=1e-30)
    assert (found["snr_abs"] >= found["snr"]).all() and (found["mean_abs"] >= mean.abs()).all()


def test_far_from_zero_both_ratios_agree_where_the_printed_variance_would_cancel() -> None:
    mean, std = torch.tensor(1.0), torch.tensor(1e-5)
    first = mean * torch.erf(mean / (std * math.sqrt(2)))
    assert float(mean**2 + std**2 - first**2) == 0.0  # what the equation gives as it is printed
    assert _score("snr_abs", 1.0, 1e-5, torch.float32) == pytest.approx(1e5, rel=1e-6)


@pytest.mark.parametrize("mean", [0.0, 1e-38, 1.0, 1e4])
def test_a_posterior_that_has_collapsed_to_a_point_has_finite_scores(mean: float) -> None:
    for name in OF_POSTERIOR:
        assert math.isfinite(_score(name, mean, 0.0, torch.float32))


def test_only_the_magnitude_does_without_deviations() -> None:
    assert float(score_of_posterior("magnitude", torch.tensor(-3.0), None)) == 3.0
    for name in NEED_STD:
        with pytest.raises(ValueError, match=f"{name} needs standard deviations"):
            score_of_posterior(name, torch.ones(2), None)  # type: ignore[arg-type]


def test_averages_follow_the_recursion_of_one_element() -> None:
    weights = [torch.randn(3, 2), torch.randn(4)]
    importances = [torch.zeros_like(w) for w in weights]
    uncertainties = [torch.zeros_like(w) for w in weights]
    elements = [[oracle.Averages(0.8, 0.6) for _ in range(w.numel())] for w in weights]
    for _ in range(4):
        gradients = [torch.randn_like(w) for w in weights]
        update_averages(importances, uncertainties, sensitivities(weights, gradients), 0.8, 0.6)
        for tensors in zip(elements, weights, gradients, strict=True):
            for element, weight, gradient in zip(tensors[0], tensors[1].flatten(), tensors[2].flatten(), strict=True):
                element.observe(weight.item(), gradient.item())
    for expected, importance, uncertainty in zip(elements, importances, uncertainties, strict=True):
        score = (importance * uncertainty).flatten()
        torch.testing.assert_close(score, torch.tensor([e.score for e in expected]), atol=1e-6, rtol=1e-5)


def test_a_loss_scale_does_not_change_a_sensitivity() -> None:
    weights, gradients = [torch.randn(5)], [torch.randn(5)]
    scaled = sensitivities(weights, [gradients[0] * 1024], scale=1024.0)
    assert torch.equal(scaled[0], sensitivities(weights, gradients)[0])


def test_a_rank_has_the_score_of_its_entry_and_the_means_of_its_row_and_column() -> None:
    a, e, b = torch.rand(2, 3, 5), torch.rand(2, 3), torch.rand(2, 4, 3)
    expected = [oracle.triplets(a[layer], e[layer], b[layer]) for layer in range(2)]
    torch.testing.assert_close(triplet_scores(a, e, b), torch.tensor(expected))


@pytest.mark.parametrize(("tinit", "tfinal", "between"), [(0, 0, 1), (0, 7, 40), (13, 0, 25), (5, 9, 1), (10, 30, 97)])
@pytest.mark.parametrize(("initial", "target"), [(2, 1), (24, 16), (432, 71)])
def test_the_budget_falls_from_the_first_to_the_last_on_the_cubic(
    tinit: int, tfinal: int, between: int, initial: int, target: int
) -> None:
    total = tinit + between + tfinal
    found = [budget_at(t, tinit, total - tfinal, initial, target) for t in range(total + 1)]
    assert found == [oracle.budget(t, tinit, tfinal, total, initial, target) for t in range(total + 1)]
    assert found[0] == initial and found[-1] == target and sorted(found, reverse=True) == found


@pytest.mark.parametrize("values", [[0.0], [0.0] * 5, [1.0, 7.0, 1.0, 2.5, 1.0, 0.0], [3.0, 2.0, 1.0]])
def test_exactly_the_budget_is_kept_even_among_equals(values: list[float]) -> None:
    for budget in range(len(values) + 1):
        mask = kept_ranks(torch.tensor(values), budget).tolist()
        assert mask == oracle.kept([values], budget)[0] and sum(mask) == budget


def test_equal_scores_keep_the_earliest() -> None:
    scores: Tensor = torch.zeros(6)
    assert kept_ranks(scores, 2).tolist() == [True, True, False, False, False, False]
