"""Bit gates and rank gates against their definitions, Monte Carlo and the one-page reference."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bayeslora.quantization import (
    OPEN_LOGIT,
    hard_concrete,
    nested_probability,
    open_probability,
    opened,
    rank_gates,
    rank_probability,
)
from tests.oracles import blora as oracle

# The same examples every time, on a busy machine too.
repeatable = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=60,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)
logit = st.floats(-9, 9, width=32)
noise = st.floats(2**-20, 1 - 2**-20, width=32)

DRAWS = 200_000
# Five standard errors of a proportion from DRAWS draws.
MONTE_CARLO = 5 * 0.5 / math.sqrt(DRAWS)


def leaf(values: list[float] | Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.as_tensor(values, dtype=dtype).detach().clone().requires_grad_()


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@repeatable
@given(logit, noise)
def test_a_gate_and_its_gradient_equal_the_reference(phi: float, u: float) -> None:
    value, reference = leaf([phi]), leaf([phi], torch.float64)
    gate = hard_concrete(value, torch.tensor([u]))
    expected = oracle.hard_concrete(reference, torch.tensor([u], dtype=torch.float64))
    gate.backward()
    expected.backward()
    torch.testing.assert_close(gate.double(), expected, rtol=1e-5, atol=2e-6)
    if abs(expected.item() - 0.5) < 0.5 - 1e-5:  # float32 may fall on either side of the clamp's corner
        torch.testing.assert_close(value.grad.double(), reference.grad, rtol=1e-4, atol=1e-5)


@repeatable
@given(logit, noise)
def test_the_gradient_of_a_gate_is_the_slope_of_the_stretched_sigmoid_and_zero_where_clamped(
    phi: float, u: float
) -> None:
    value = leaf([phi], torch.float64)
    gate = hard_concrete(value, torch.tensor([u], dtype=torch.float64))
    gate.backward()
    smooth = 1 / (1 + math.exp(-(math.log(u) - math.log(1 - u) + phi) * 1.5))
    stretched = 1.2 * smooth - 0.1
    slope = 1.2 * smooth * (1 - smooth) * 1.5 if 0 < stretched < 1 else 0.0
    assert gate.item() == pytest.approx(min(1.0, max(0.0, stretched)), abs=1e-9)
    assert value.grad.item() == pytest.approx(slope, abs=1e-9)


@pytest.mark.parametrize("u", [0.0, 1.0, 1e-38, 1 - 2**-24])
@pytest.mark.parametrize("phi", [-50.0, 0.0, 6.0, 50.0])
def test_extreme_noise_and_logits_give_finite_gates_and_gradients(phi: float, u: float) -> None:
    value = leaf([phi])
    gate = hard_concrete(value, torch.tensor([u]))
    gate.backward()
    assert 0 <= gate.item() <= 1
    assert torch.isfinite(value.grad).all()


@pytest.mark.parametrize("phi", [-6.0, -2.0, -0.9353, 0.0, 1.0, 3.0, 6.0])
def test_the_probability_of_an_open_gate_is_its_frequency(phi: float) -> None:
    gates = hard_concrete(torch.full((DRAWS,), phi, dtype=torch.float64), uniform(DRAWS))
    frequency = (gates > 0).double().mean().item()
    assert open_probability(torch.tensor(phi)).item() == pytest.approx(frequency, abs=MONTE_CARLO)
    # The distribution of z is symmetric about 1/2 under a change of sign of the logit.
    assert (gates == 1).double().mean().item() == pytest.approx(
        1 - open_probability(torch.tensor(-phi)).item(), abs=MONTE_CARLO
    )


@repeatable
@given(logit)
def test_the_probability_of_an_open_gate_equals_the_reference(phi: float) -> None:
    value, reference = leaf([phi]), leaf([phi], torch.float64)
    probability, expected = open_probability(value), oracle.open_probability(reference)
    probability.backward()
    expected.backward()
    torch.testing.assert_close(probability.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(value.grad.double(), reference.grad, rtol=1e-4, atol=1e-6)


def test_the_shift_of_the_open_probability_is_1_5986() -> None:
    assert open_probability(torch.tensor(-1.5986)).item() == pytest.approx(0.5, abs=1e-5)
    assert open_probability(torch.tensor(0.0)).item() == pytest.approx(0.8318, abs=1e-4)


def test_the_evaluation_threshold_is_where_a_gate_is_shut_with_probability_0_34() -> None:
    def shut(phi: float) -> float:
        """P(z = 0): the logistic noise leaves the sigmoid at 0.1 / 1.2 or below."""
        boundary = math.log((0.1 / 1.2) / (1 - 0.1 / 1.2)) * 2 / 3 - phi
        return 1 / (1 + math.exp(-boundary))

    low, high = -10.0, 10.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if shut(middle) > 0.34 else (low, middle)
    assert low == pytest.approx(-0.9353, abs=5e-5)
    assert OPEN_LOGIT == pytest.approx(low, abs=1e-6)
    gates = evaluation_gates(torch.tensor([low - 1e-4, low + 1e-4]))
    assert gates.tolist() == [0.0, 1.0]


def evaluation_gates(logits: torch.Tensor) -> torch.Tensor:
    return torch.tensor([opened([value]) for value in logits.tolist()], dtype=logits.dtype)


def test_a_sampled_gate_at_the_threshold_is_shut_in_34_of_100_draws() -> None:
    gates = hard_concrete(torch.full((DRAWS,), OPEN_LOGIT, dtype=torch.float64), uniform(DRAWS, seed=1))
    assert (gates == 0).double().mean().item() == pytest.approx(0.34, abs=MONTE_CARLO)


@repeatable
@given(st.lists(logit, min_size=4, max_size=4))
def test_evaluation_gates_are_zero_or_one_and_open_more_likely_than_not_shut(phi: list[float]) -> None:
    logits = torch.tensor(phi)
    gates = evaluation_gates(logits)
    assert gates.dtype == logits.dtype and set(gates.tolist()) <= {0.0, 1.0}
    shut = 1 - oracle.open_probability(logits.double())
    clear = (shut - 0.34).abs() > 1e-6
    assert torch.equal((gates == 1)[clear], (shut < 0.34)[clear])


def test_nested_probabilities_are_the_frequencies_of_chains_of_open_gates() -> None:
    logits = torch.tensor([2.0, 0.0, -1.0, 0.5])
    gates = hard_concrete(logits.double().expand(DRAWS, 4), uniform(DRAWS, 4, seed=2))
    frequency = (gates > 0).double().cumprod(-1).mean(0)
    torch.testing.assert_close(nested_probability(logits).double(), frequency, rtol=0, atol=MONTE_CARLO)


@repeatable
@given(st.lists(st.lists(logit, min_size=4, max_size=4), min_size=1, max_size=5))
def test_nested_probabilities_sum_to_the_reference_penalty(phi: list[list[float]]) -> None:
    value, reference = leaf(phi), leaf(phi, torch.float64)
    nested = nested_probability(value)
    assert nested.shape == value.shape
    assert (nested[..., 1:] <= nested[..., :-1]).all()
    weights = oracle.bit_weights("bits", torch.ones(len(phi), dtype=torch.float64))
    penalty, expected = (nested * weights.float()).sum(), oracle.bit_penalty(reference, weights)
    penalty.backward()
    expected.backward()
    torch.testing.assert_close(penalty.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(value.grad.double(), reference.grad, rtol=1e-4, atol=1e-5)


def test_the_reference_bit_weights_are_constant_or_grow_with_bits_and_work() -> None:
    macs = torch.tensor([10.0, 40.0])
    assert oracle.bit_weights("const", macs).tolist() == [[1, 1, 1, 1]] * 2
    assert oracle.bit_weights("bits", macs).tolist() == [[4, 8, 16, 32]] * 2
    assert oracle.bit_weights("bops", macs).tolist() == [[1, 2, 4, 8], [4, 8, 16, 32]]


@repeatable
@given(st.lists(logit, min_size=2, max_size=12))
@example([-9.0] * 4)
@example([6.0] * 8)
def test_rank_gates_and_their_gradient_equal_the_reference(xi: list[float]) -> None:
    value, reference = leaf(xi), leaf(xi, torch.float64)
    gates, expected = rank_gates(value), oracle.rank_gates(reference)
    upstream = uniform(len(xi), seed=3) - 0.5
    gates.backward(upstream.float())
    expected.backward(upstream)
    products = torch.sigmoid(reference.detach()[1:]).cumprod(0)
    clear = torch.cat([torch.ones(1, dtype=torch.bool), (products - 0.5).abs() > 1e-5])
    torch.testing.assert_close(gates.double()[clear], expected[clear], rtol=0, atol=1e-6)
    torch.testing.assert_close(value.grad.double(), reference.grad, rtol=1e-4, atol=1e-6)


@repeatable
@given(st.lists(logit, min_size=1, max_size=12))
def test_rank_gates_are_zero_or_one_and_open_from_the_head(xi: list[float]) -> None:
    gates = rank_gates(torch.tensor(xi))
    assert gates.shape == (len(xi),)
    assert gates[0] == 1
    assert set(gates.tolist()) <= {0.0, 1.0}
    assert (gates[1:] <= gates[:-1]).all()


def test_the_first_rank_is_open_and_unmoved_whatever_its_logit() -> None:
    for first in (-100.0, 0.0, 100.0):
        value = leaf([first, 6.0, 6.0])
        gates = rank_gates(value)
        gates.sum().backward()
        assert gates.tolist() == [1.0, 1.0, 1.0]
        assert value.grad[0] == 0


def test_the_straight_through_gradient_of_a_rank_gate_is_that_of_the_product_before_rounding() -> None:
    value = leaf([6.0, 1.0, 0.5, -0.3], torch.float64)
    rank_gates(value)[3].backward()
    sigmoid = [1 / (1 + math.exp(-v)) for v in (1.0, 0.5, -0.3)]
    product = math.prod(sigmoid)
    torch.testing.assert_close(
        value.grad, torch.tensor([0.0] + [product * (1 - s) for s in sigmoid], dtype=torch.float64)
    )


def test_rank_gates_of_no_ranks_are_empty() -> None:
    assert rank_gates(torch.zeros(0)).shape == (0,)


@repeatable
@given(st.lists(logit, min_size=1, max_size=12))
def test_the_rank_penalty_equals_the_reference(xi: list[float]) -> None:
    value, reference = leaf(xi), leaf(xi, torch.float64)
    penalty, expected = rank_probability(value).sum(), oracle.rank_penalty(reference)
    torch.testing.assert_close(penalty.double(), expected, rtol=1e-5, atol=1e-6)
    if len(xi) > 1:
        penalty.backward()
        expected.backward()
        torch.testing.assert_close(value.grad.double(), reference.grad, rtol=1e-4, atol=1e-6)


def ranks_under_the_penalty_alone(optimizer: type[torch.optim.Optimizer], rank: int, lr: float) -> list[int]:
    logits = torch.nn.Parameter(torch.full((rank,), 6.0))
    steps = optimizer([logits], lr=lr)
    ranks = []
    for _ in range(1000):
        gates = rank_gates(logits.detach())
        ranks.append(int(gates.sum()))
        assert gates.tolist() == [1.0] * ranks[-1] + [0.0] * (rank - ranks[-1])
        if ranks[-1] == 1:
            break
        steps.zero_grad()
        rank_probability(logits).sum().backward()
        steps.step()
    assert ranks[0] == rank and ranks[-1] == 1
    return ranks


@pytest.mark.parametrize("rank", [2, 8, 16])
def test_the_penalty_alone_prunes_one_rank_at_a_time_from_the_tail_down_to_one(rank: int) -> None:
    """With Adam, whose normalised steps move every logit alike."""
    ranks = ranks_under_the_penalty_alone(torch.optim.Adam, rank, lr=0.05)
    assert {before - after for before, after in zip(ranks[:-1], ranks[1:], strict=True)} == {0, 1}


def test_under_plain_gradient_descent_too_the_penalty_never_gives_a_rank_back() -> None:
    """One at a time does not hold here: the first logits, which are in every product, have the largest gradients."""
    ranks = ranks_under_the_penalty_alone(torch.optim.SGD, rank=8, lr=1.0)
    assert all(after <= before for before, after in zip(ranks[:-1], ranks[1:], strict=True))
