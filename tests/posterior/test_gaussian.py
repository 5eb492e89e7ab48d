"""Gaussian posteriors against torch.distributions, and against drawing the weights for real."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal
from torch.distributions.kl import kl_divergence as reference_kl

from bayeslora.posterior import inverse_softplus, kl_divergence, local_reparametrization, standard_deviation


@given(
    seed=st.integers(0, 1000),
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=2),
    prior_std=st.floats(0.01, 10),
    prior_mean=st.floats(-3, 3),
)
@settings(max_examples=40, deadline=None)
def test_the_divergence_is_that_of_torch_distributions(
    seed: int, shape: list[int], prior_std: float, prior_mean: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(shape, generator=generator)
    std = torch.rand(shape, generator=generator) * 2 + 0.01
    expected = reference_kl(Normal(mean, std), Normal(torch.full(shape, prior_mean), prior_std)).sum()
    actual = kl_divergence(mean, std, prior_mean, prior_std)
    assert actual.shape == () and actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_the_divergence_of_the_prior_from_itself_is_zero_and_has_no_gradient() -> None:
    mean, std = torch.eye(3, requires_grad=True), torch.full((3, 3), 0.2, requires_grad=True)
    value = kl_divergence(mean, std, torch.eye(3), 0.2)
    assert value.item() == pytest.approx(0.0, abs=1e-5)
    for gradient in torch.autograd.grad(value, [mean, std]):
        assert gradient.abs().max() < 1e-4


def test_the_divergence_is_summed_in_float32_whatever_the_parameters_are() -> None:
    mean, std = torch.ones(64, 64, dtype=torch.bfloat16), torch.full((64, 64), 0.25, dtype=torch.bfloat16)
    value = kl_divergence(mean, std, 1.0, 0.5)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(64 * 64 * (math.log(2) + 0.125 - 0.5), rel=1e-5)


@pytest.mark.parametrize("value", [1e-6, 1e-3, 0.05, 0.07, 1.0, 3.0, 40.0])
def test_inverse_softplus_inverts_the_standard_deviation(value: float) -> None:
    assert standard_deviation(torch.tensor(inverse_softplus(value))).item() == pytest.approx(value, rel=2e-3)
    assert math.log1p(math.exp(inverse_softplus(value))) == pytest.approx(value, rel=1e-9)


def test_standard_deviations_are_positive_and_float32() -> None:
    rho = torch.linspace(-60, 60, 121, dtype=torch.bfloat16)
    std = standard_deviation(rho)
    assert std.dtype == torch.float32 and (std > 0).all()
    torch.testing.assert_close(std, torch.log1p(torch.exp(rho.double())).float(), rtol=1e-5, atol=0)


def test_local_reparametrization_has_the_mean_and_variance_of_drawn_weights() -> None:
    draws, z = 40_000, torch.tensor([[0.5, -1.5, 2.0], [0.0, 1.0, 0.0]])
    mean, std = torch.randn(4, 3), torch.rand(4, 3) + 0.1
    by_weight = (mean + std * torch.randn(draws, 4, 3)) @ z.T  # (draws, out, rows)
    noise = torch.randn(draws, len(z), 4)
    local = local_reparametrization(z.expand(draws, -1, -1), mean, std, noise).transpose(1, 2)
    tolerance = 5 / draws**0.5
    for one in (by_weight, local):
        deviation = (z**2 @ (std**2).T).sqrt().T
        assert ((one.mean(0) - mean @ z.T) / deviation).abs().max() < tolerance
        assert (one.var(0) / deviation**2 - 1).abs().max() < 2 * tolerance


def test_rows_of_a_local_draw_are_independent_where_those_of_one_weight_are_not() -> None:
    """Equal rows get equal outputs from one weight, and different ones from this."""
    z, std = torch.ones(2, 3), torch.ones(1, 3)
    noise = torch.randn(20_000, 2, 1)
    u = local_reparametrization(z, torch.zeros(1, 3), std, noise[0])
    assert not torch.equal(u[0], u[1])
    u = local_reparametrization(z.expand(len(noise), -1, -1), torch.zeros(1, 3), std, noise)[..., 0]
    assert torch.corrcoef(u.T)[0, 1].abs() < 0.04


def test_the_gradient_at_zero_input_is_finite() -> None:
    z = torch.zeros(2, 3, requires_grad=True)
    std = torch.rand(4, 3, requires_grad=True)
    local_reparametrization(z, torch.ones(4, 3), std, torch.randn(2, 4)).sum().backward()
    assert z.grad is not None and z.grad.isfinite().all() and std.grad.isfinite().all()
