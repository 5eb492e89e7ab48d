"""Rotation of an update into its singular value decomposition: the same function in another basis."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bayeslora.methods.blora.rotation import Factors, rotate, rotated

SHAPES = [(12, 10, 4), (5, 9, 5), (3, 9, 7), (9, 3, 7), (4, 4, 8), (6, 6, 1), (6, 5, 0)]
"""d_in, d_out and r: with r smaller than, equal to and larger than a dimension, and 0."""


def random_factors(d_in: int, d_out: int, rank: int, dtype: torch.dtype = torch.float32) -> Factors:
    a, e, b = torch.randn(rank, d_in), torch.randn(rank), torch.randn(d_out, rank)
    return Factors(a.to(dtype), e.to(dtype), b.to(dtype))


def product(factors: Factors) -> Tensor:
    a, e, b = (factor.detach().double() for factor in factors)
    return b @ torch.diag(e) @ a


def sizes(factors: Factors) -> Tensor:
    """Singular values (r,) of rotated factors: the lengths of the columns of B."""
    return factors.B.detach().double().norm(dim=0)


def assert_rotated(old: Factors, new: Factors) -> None:
    scale = product(old).norm().clamp_min(1e-12)
    assert (product(new) - product(old)).norm() / scale <= 1e-6
    assert [new.A.shape, new.E.shape, new.B.shape] == [old.A.shape, old.E.shape, old.B.shape]
    assert (new.E == 1).all()
    values = sizes(new)
    assert (values[:-1] >= values[1:] - 1e-6 * scale).all()
    spectrum = torch.linalg.svdvals(product(old))
    used = min(len(spectrum), len(new.E))
    torch.testing.assert_close(values[:used], spectrum[:used], rtol=1e-5, atol=1e-5 * float(scale))
    assert not values[used:].any()
    rows, columns = new.A[:used].detach().double(), new.B[:, :used].detach().double()
    torch.testing.assert_close(rows @ rows.T, torch.eye(used).double(), rtol=0, atol=1e-5)
    gram = columns.T @ columns
    torch.testing.assert_close(gram, torch.diag(gram.diagonal()), rtol=0, atol=1e-5 * float(scale) ** 2)


@pytest.mark.parametrize(("d_in", "d_out", "rank"), SHAPES)
def test_the_update_stays_with_unit_rows_orthogonal_columns_and_sorted_values(
    d_in: int, d_out: int, rank: int
) -> None:
    old = random_factors(d_in, d_out, rank)
    assert_rotated(old, rotated(old))


@pytest.mark.parametrize("closed", [[0], [1, 3], [0, 1, 2, 3]])
@pytest.mark.parametrize("factor", ["E", "B", "A"])
def test_components_of_zero_come_last(factor: str, closed: list[int]) -> None:
    old = random_factors(12, 10, 4)
    {"E": old.E, "B": old.B.T, "A": old.A}[factor][closed] = 0.0
    new = rotated(old)
    assert all(tensor.isfinite().all() for tensor in new)
    assert (product(new) - product(old)).norm() <= 1e-6 * product(old).norm().clamp_min(1.0)
    assert (sizes(new)[4 - len(closed) :] < 1e-6).all() and (sizes(new)[: 4 - len(closed)] > 0.1).all()
    again = rotated(new)
    torch.testing.assert_close(sizes(again), sizes(new), rtol=1e-5, atol=1e-6)


def test_equal_components_stay_apart() -> None:
    """Repeated singular values have no basis of their own; any orthonormal one will do."""
    q = torch.linalg.qr(torch.randn(12, 12)).Q
    old = Factors(q[:4].clone(), torch.ones(4), q[4:8].T.clone())
    assert_rotated(old, rotated(old))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept_and_rotated_in_double(dtype: torch.dtype) -> None:
    old = random_factors(12, 10, 4, dtype)
    new = rotated(old)
    assert {tensor.dtype for tensor in new} == {dtype}
    assert (product(new) - product(old)).norm() / product(old).norm() < 0.02


# The optimizer --------------------------------------------------------------------------------------------------


def trained(optimizer_class: Any, **options: Any) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    """Factors after a few steps of an optimizer."""
    parameters = [nn.Parameter(factor) for factor in random_factors(12, 10, 4)]
    optimizer = optimizer_class(parameters, lr=1e-2, **options)
    target = torch.randn(10, 12)
    for _ in range(3):
        a, e, b = parameters
        (b @ torch.diag(e) @ a - target).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return parameters, optimizer


def gradients(factors: list[Tensor], weights: Tensor) -> tuple[Tensor, ...]:
    a, e, b = (factor.detach().double().requires_grad_() for factor in factors)
    return torch.autograd.grad((b @ torch.diag(e) @ a * weights).sum(), [a, e, b])


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}])
def test_moments_are_mixed_as_the_gradients_are(options: dict[str, Any]) -> None:
    """A mean of gradients changes by M, which maps gradients; one of squares by the squares of M."""
    (a, e, b), optimizer = trained(torch.optim.AdamW, **options)
    before = [p.detach().clone() for p in (a, e, b)]
    firsts = {name: optimizer.state[p]["exp_avg"].clone() for name, p in (("a", a), ("b", b))}
    moments = {name: optimizer.state[p]["exp_avg_sq"].clone() for name, p in (("a", a), ("b", b))}
    steps = {name: optimizer.state[p]["step"].clone() for name, p in (("a", a), ("b", b))}
    rotate(a, e, b, optimizer)
    assert_rotated(Factors(*before), Factors(a, e, b))

    # M from the gradients themselves: any gradient of the product gives those of both bases.
    of_old, of_new = [], []
    for seed in range(4):
        weights = torch.randn(10, 12, generator=torch.Generator().manual_seed(seed)).double()
        of_old.append(gradients(before, weights))
        of_new.append(gradients([a, e, b], weights))
    mix_b = torch.linalg.lstsq(torch.cat([g[2] for g in of_old]), torch.cat([g[2] for g in of_new])).solution
    mix_a = torch.linalg.lstsq(torch.cat([g[0].T for g in of_old]), torch.cat([g[0].T for g in of_new])).solution
    for old, new in zip(of_old, of_new, strict=True):
        torch.testing.assert_close(old[2] @ mix_b, new[2], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close((old[0].T @ mix_a).T, new[0], rtol=1e-4, atol=1e-4)
    means = {"b": firsts["b"].double() @ mix_b, "a": mix_a.T @ firsts["a"].double()}
    expected = {"b": moments["b"].double() @ mix_b.square(), "a": mix_a.square().T @ moments["a"].double()}
    for name, p in (("a", a), ("b", b)):
        state = optimizer.state[p]
        torch.testing.assert_close(state["exp_avg_sq"].double(), expected[name], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(state["exp_avg"].double(), means[name], rtol=1e-3, atol=1e-5)
        assert state["step"] == steps[name] and state["exp_avg"].dtype == state["exp_avg_sq"].dtype == p.dtype
    assert e not in optimizer.state


@pytest.mark.parametrize(
    ("optimizer_class", "options"),
    [
        (torch.optim.AdamW, {"amsgrad": True}),
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.RMSprop, {}),
        (torch.optim.Adagrad, {}),
        (torch.optim.SGD, {}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else str(value),
)
def test_the_state_of_other_optimizers_is_dropped_and_they_go_on(
    optimizer_class: Any, options: dict[str, Any]
) -> None:
    (a, e, b), optimizer = trained(optimizer_class, **options)
    old = Factors(*(p.detach().clone() for p in (a, e, b)))
    rotate(a, e, b, optimizer)
    assert not any(optimizer.state.get(p) for p in (a, e, b))
    assert_rotated(old, Factors(a, e, b))
    (b @ torch.diag(e) @ a).square().sum().backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in (a, e, b))


@pytest.mark.parametrize(("d_in", "d_out", "rank"), SHAPES)
@pytest.mark.parametrize("closed", [False, True])
def test_adam_goes_on_after_any_rotation(d_in: int, d_out: int, rank: int, closed: bool) -> None:
    """With components of zero, more of them than a dimension has, or none."""
    parameters = [nn.Parameter(factor) for factor in random_factors(d_in, d_out, rank)]
    a, e, b = parameters
    if closed:
        e.data[::2] = 0.0
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(3):
        (b @ torch.diag(e) @ a).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    if closed:
        e.data[::2] = 0.0
    before = product(Factors(a, e, b))
    rotate(a, e, b, optimizer)
    assert (product(Factors(a, e, b)) - before).norm() <= 1e-6 * before.norm().clamp_min(1.0)
    (b @ torch.diag(e) @ a).sum().backward()
    optimizer.step()
    for p in parameters:
        assert p.isfinite().all() and all(torch.as_tensor(v).isfinite().all() for v in optimizer.state[p].values())


def test_an_optimizer_without_state_is_left_without() -> None:
    parameters = [nn.Parameter(factor) for factor in random_factors(12, 10, 4)]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    rotate(*parameters, optimizer)
    assert not optimizer.state
