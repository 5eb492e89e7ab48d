"""Fitted ranges: known optima for a Gaussian, and never a range that divides by zero."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bayeslora.quantization import (
    codes,
    grid_step,
    magnitude_counts,
    optimal_range,
    optimal_ranges,
    quantize,
    range_of_counts,
    ranges,
)
from tests.oracles import blora as oracle

# The same examples every time, on a busy machine too.
repeatable = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=40,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rmse(x: Tensor, range: Tensor, bits: int) -> float:
    """In float64 and through the reference, so that only the range is on trial."""
    return (oracle.fixed_width(x.double(), range.double(), bits) - x.double()).square().mean().sqrt().item()


def least_rmse(x: Tensor, bits: int) -> float:
    """The best of 500 ranges up to one and a half times the largest magnitude.

    No larger range is needed: there, at two bits, the outer level reaches the largest magnitude.
    """
    x = x.double()
    candidates = torch.linspace(0.003, 1.5, 500, dtype=torch.float64)[:, None] * x.abs().max()
    return (oracle.fixed_width(x, candidates, bits) - x).square().mean(1).min().sqrt().item()


def least_gaussian_rmse(bits: int) -> tuple[float, float]:
    """Best range and error for a standard Gaussian, by numerical integration over its density."""
    x = torch.linspace(-8, 8, 40_001, dtype=torch.float64)
    density = torch.exp(-(x**2) / 2) / math.sqrt(2 * math.pi) * (x[1] - x[0])
    error, bound = min(
        (((oracle.fixed_width(x, bound, bits) - x).square() * density).sum().sqrt().item(), bound.item())
        for bound in torch.linspace(1.0, 5.0, 401, dtype=torch.float64)
    )
    return bound, error


@pytest.mark.parametrize(
    ("bits", "known", "error", "tolerance"), [(2, 1.85, 0.44, 0.15), (4, 2.65, 0.11, 0.15), (8, 3.9, 0.009, 0.3)]
)
def test_the_range_of_a_gaussian_is_the_known_optimum(bits: int, known: float, error: float, tolerance: float) -> None:
    best_range, best_error = least_gaussian_rmse(bits)
    assert best_range == pytest.approx(known, abs=0.1)
    assert best_error == pytest.approx(error, rel=0.05)
    x = gaussian(100_000)
    found = optimal_range(x, bits)
    assert found.shape == () and found.dtype == torch.float32
    assert found.item() == pytest.approx(best_range, abs=tolerance)
    assert rmse(x, found, bits) == pytest.approx(best_error, rel=0.02)


@pytest.mark.parametrize(("bits", "factor"), [(2, 1.8), (4, 1.5), (8, 1.05)])
def test_the_largest_magnitude_is_a_poor_range_for_a_gaussian_at_low_widths(bits: int, factor: float) -> None:
    x = gaussian(100_000)
    absmax = optimal_range(x, bits, method="absmax")
    assert rmse(x, absmax, bits) > factor * rmse(x, optimal_range(x, bits), bits)


def test_the_largest_magnitude_at_two_bits_loses_the_known_85_percent_of_a_gaussian() -> None:
    x = gaussian(100_000)
    assert rmse(x, optimal_range(x, 2, method="absmax"), 2) == pytest.approx(0.85, abs=0.05)


@repeatable
@given(st.integers(0, 2**31), st.floats(-6, 6), st.sampled_from([2, 4, 8, 16, 32]), st.sampled_from(["mse", "absmax"]))
def test_a_range_scales_with_its_tensor(seed: int, exponent: float, bits: int, method: str) -> None:
    x, scale = gaussian(200, seed=seed), 2.0 ** round(exponent)
    expected = scale * optimal_range(x, bits, method).item()
    assert optimal_range(scale * x, bits, method).item() == pytest.approx(expected)


@repeatable
@given(st.integers(0, 2**31), st.integers(1, 40))
def test_absmax_is_the_largest_magnitude_at_every_width(seed: int, size: int) -> None:
    x = gaussian(size, seed=seed)
    for bits in (2, 4, 8, 16, 32):
        assert optimal_range(x, bits, method="absmax").item() == x.abs().max().item()


@settings(repeatable, max_examples=15)
@given(st.integers(0, 2**31), st.integers(1, 64), st.sampled_from([2, 4, 8]), st.sampled_from([1.0, 3.0]))
def test_the_range_is_within_a_tenth_of_the_least_error_whatever_the_tensor(
    seed: int, size: int, bits: int, tail: float
) -> None:
    """Small tensors, such as the diagonal of one module, and heavy tails, such as activations with outliers."""
    x = gaussian(size, seed=seed)
    x = x.sign() * x.abs() ** tail
    scale = x.square().mean().sqrt().item()
    assert rmse(x, optimal_range(x, bits), bits) <= 1.1 * least_rmse(x, bits) + 0.02 * scale


def test_equal_magnitudes_are_exact_at_two_bits_with_a_range_of_three_halves() -> None:
    x = torch.tensor([0.4, -0.4, 0.4, 0.4])
    assert rmse(x, optimal_range(x, 2), 2) <= 0.02 * 0.4


@pytest.mark.parametrize("shape", [(512, 512), (768, 768), (2048, 1024)])
def test_the_range_of_a_large_matrix_sees_all_of_its_columns(shape: tuple[int, int]) -> None:
    """Input features differ in scale in a real weight matrix, so a sample must not be a sample of few columns."""
    x = gaussian(*shape)
    x[:, :: shape[1] // 128] *= 0.05
    order = torch.randperm(x.numel(), generator=torch.Generator().manual_seed(0))
    shuffled = x.reshape(-1)[order]
    assert rmse(x, optimal_range(x, 4), 4) <= 1.1 * rmse(x, optimal_range(shuffled, 4), 4)


@pytest.mark.parametrize("method", ["mse", "absmax"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_range_a_row_is_the_range_of_the_row(method: str, bits: int) -> None:
    x = gaussian(6, 500) * torch.logspace(-3, 2, 6)[:, None]
    found = optimal_range(x, bits, method, dim=1)
    assert found.shape == (6, 1)
    for row in range(6):
        assert found[row, 0].item() == pytest.approx(optimal_range(x[row], bits, method).item(), rel=1e-5)


def test_ranges_of_rows_beat_one_range_where_rows_differ_in_scale() -> None:
    x = gaussian(16, 300) * torch.logspace(-2, 0, 16)[:, None]
    rows, single = optimal_range(x, 4, dim=1), optimal_range(x, 4)
    relative = [((quantize(x, r, 4) - x).norm(dim=1) / x.norm(dim=1)).mean().item() for r in (rows, single)]
    assert relative[0] < 0.2 * relative[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["mse", "absmax"])
def test_zeros_get_a_small_positive_range_in_every_dtype(dtype: torch.dtype, method: str) -> None:
    x = torch.zeros(4, 8, dtype=dtype)
    one, rows = optimal_range(x, 8, method), optimal_range(x, 8, method, dim=1)
    assert one.shape == () and rows.shape == (4, 1)
    for found in (one, rows):
        assert found.dtype == torch.float32
        assert ((found > 0) & (found < 1e-3)).all()


def test_a_row_of_zeros_does_not_disturb_the_others() -> None:
    x = gaussian(3, 64)
    x[1] = 0
    found = optimal_range(x, 4, dim=1)
    assert torch.isfinite(found).all() and (found > 0).all()
    assert found[0, 0].item() == pytest.approx(optimal_range(x[0], 4).item(), rel=1e-5)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0)])
@pytest.mark.parametrize("method", ["mse", "absmax"])
def test_empty_tensors_get_a_positive_range(shape: tuple[int, ...], method: str) -> None:
    assert optimal_range(torch.zeros(shape), 8, method).item() > 0
    if len(shape) == 2:
        rows = optimal_range(torch.zeros(shape), 8, method, dim=1)
        assert rows.shape == (shape[0], 1) and (rows > 0).all()


def test_a_range_carries_no_gradient_and_leaves_its_tensor_alone() -> None:
    x = gaussian(64).requires_grad_()
    before = x.detach().clone()
    assert not optimal_range(x, 4).requires_grad
    assert torch.equal(x, before)


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
def test_counts_of_parts_give_the_range_of_the_whole(bits: int) -> None:
    x = torch.randn(5, 4000) * torch.tensor([0.1, 0.5, 1.0, 2.0, 3.0]).unsqueeze(1)
    largest = x.abs().max()
    counts = sum(magnitude_counts(part, largest) for part in x)
    assert torch.equal(range_of_counts(counts, largest, bits), optimal_range(x, bits))


@pytest.mark.parametrize("bits", [3, 5, 6])
def test_widths_between_those_with_gates_are_grids_too(bits: int) -> None:
    x = torch.randn(1000, requires_grad=True)
    bound = torch.tensor(2.0)
    found = quantize(x, bound, bits)
    assert torch.equal(found.detach(), codes(x, bound, bits) * grid_step(bound, bits))
    assert len(found.unique()) <= 2**bits - 1
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert torch.equal(gradient, (x.abs() <= bound).float())


@pytest.mark.parametrize("shape", [(0,), (3, 7), (40, 100)])
@pytest.mark.parametrize("method", ["mse", "absmax"])
def test_ranges_of_several_widths_are_those_of_each(shape: tuple[int, ...], method: Literal["mse", "absmax"]) -> None:
    x = gaussian(*shape)
    together = optimal_ranges(x, (2, 4, 8, 16), method)
    assert together == [optimal_range(x, bits, method) for bits in (2, 4, 8, 16)]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rows_that_are_searched_at_once_get_the_ranges_of_rows_searched_alone(bits: int) -> None:
    x = gaussian(24, 1000) * torch.logspace(-2, 2, 24).unsqueeze(1)  # too large for one operation
    together = optimal_range(x, bits, dim=1)
    alone = torch.cat([optimal_range(row.unsqueeze(0), bits, dim=1) for row in x])
    torch.testing.assert_close(together, alone, rtol=0.0026, atol=0.0)  # a quarter percent: neighbours may tie


@pytest.mark.parametrize("count", [2, 8, 32, 128])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_ranges_that_cannot_be_best_are_left_out_of_the_search(
    count: int, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = torch.Generator().manual_seed(count)
    rows = torch.randn(300, count, generator=draw) ** 3
    rows[:100, 0] *= 30
    found = optimal_range(rows, bits, dim=1)
    monkeypatch.setattr(ranges, "_least_share", lambda count, bits: 0.0)
    assert torch.equal(found, optimal_range(rows, bits, dim=1))
