"""Codes that make up for the errors of earlier columns, against the least squares they come from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bayeslora.quantization import codes, gptq_codes, grid_step, optimal_range, repeated
from bayeslora.quantization.gptq import DAMPING


def inputs_like(d_in: int, rows: int, seed: int) -> Tensor:
    """Correlated inputs with a mean, such as those of a layer after a nonlinearity."""
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rows, d_in, generator=draw) @ torch.randn(d_in, d_in, generator=draw) / d_in**0.5
    return mixed.relu() * torch.rand(d_in, generator=draw).add(0.2)


def by_least_squares(weight: Tensor, steps: Tensor, bits: int, moments: Tensor) -> Tensor:
    """Round one column after the other; give all that are left the values that are best beside the errors so far."""
    d_in, level = weight.shape[1], 2 ** (bits - 1) - 1
    moments = moments.double() + DAMPING * moments.double().diagonal().mean() * torch.eye(d_in, dtype=torch.float64)
    order = moments.diagonal().argsort(descending=True).tolist()
    values, found = weight.double(), torch.zeros(weight.shape, dtype=torch.int8)
    error = torch.zeros_like(values)
    for place, column in enumerate(order):
        done, left = order[:place], order[place:]
        if done:
            change = torch.linalg.solve(moments[left][:, left], moments[left][:, done] @ error[:, done].T).T
            values = values.index_copy(1, torch.tensor(left), weight.double()[:, left] - change)
        found[:, column] = (values[:, column] / steps[:, column]).round().clamp(-level, level).to(torch.int8)
        error[:, column] = found[:, column] * steps[:, column] - weight[:, column].double()
    return found


@pytest.mark.parametrize(("bits", "groups"), [(2, 1), (4, 1), (4, 3), (8, 1)])
def test_codes_are_those_of_least_squares_column_by_column(bits: int, groups: int) -> None:
    weight = torch.randn(7, 12, generator=torch.Generator().manual_seed(1))
    x = inputs_like(12, 300, seed=2)
    bound = optimal_range(weight.reshape(7 * groups, -1), bits, dim=1).view(7, groups)
    steps = repeated(grid_step(bound, bits), weight).expand(weight.shape)
    expected = by_least_squares(weight, steps, bits, x.T @ x)
    assert torch.equal(gptq_codes(weight, bound, bits, 17.0 * (x.T @ x)), expected)  # of any scale


def test_more_columns_than_a_block_change_the_output_less_than_the_nearest_codes() -> None:
    weight = torch.randn(40, 150, generator=torch.Generator().manual_seed(3))
    x = inputs_like(150, 4000, seed=4)
    bound = optimal_range(weight, 2, dim=1)

    def error(found: Tensor) -> float:
        return float(((found * grid_step(bound, 2) - weight) @ x.T).square().mean())

    found, nearest = gptq_codes(weight, bound, 2, x.T @ x), codes(weight, bound, 2)
    assert error(found) < 0.5 * error(nearest)
    expected = by_least_squares(weight, grid_step(bound, 2).expand(weight.shape), 2, x.T @ x)
    assert float((found != expected).float().mean()) < 0.01  # ties alone


def test_without_correlation_the_nearest_codes_are_the_best() -> None:
    weight = torch.randn(5, 70, generator=torch.Generator().manual_seed(5))
    bound = optimal_range(weight, 4, dim=1)
    assert torch.equal(gptq_codes(weight, bound, 4, torch.eye(70)), codes(weight, bound, 4).to(torch.int8))


def test_moments_of_no_inputs_and_of_few_rows_give_valid_codes() -> None:
    weight = torch.randn(5, 70, generator=torch.Generator().manual_seed(6))
    bound = optimal_range(weight, 2, dim=1)
    few = inputs_like(70, 2, seed=7)
    for moments in (torch.zeros(70, 70), few.T @ few):
        found = gptq_codes(weight, bound, 2, moments)
        assert found.dtype == torch.int8 and int(found.abs().max()) == 1
