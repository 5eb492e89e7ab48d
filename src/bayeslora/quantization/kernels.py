r"""The loops over large tensors behind the quantizer, written for few passes over memory.

Inside the range $\partial Q_b / \partial \beta = (\mathrm{round}(x / s_b) - x / s_b)\, s_b / \beta$, which is
$(Q_b(x) - x) / \beta$, and outside it is $\mathrm{sign}(x) = \mathrm{clamp}(x) / \beta$. With $\bar{g}$ the gradient
of $x$, which is the incoming $g$ inside and 0 outside, the gradient of the range is therefore

$$ (\sum_b w_b \langle \bar{g}, Q_b(x) - x \rangle + \langle g - \bar{g}, \mathrm{clamp}(x) \rangle) / \beta: $$

inner products and no masks. All tensors are float32; a range is 0-d for a flat `x`, or broadcasts to a matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

Number = Tensor | float
"""A scalar: a Python number where reading it costs nothing (on the CPU), a 0-d or broadcast tensor elsewhere."""


def mixture(x: Tensor, bound: Tensor, terms: list[tuple[Tensor | None, int | None]]) -> Tensor:
    """Weighted sum of grids: `terms` of (weight, level), level None for the clipped identity, weight None for 1."""
    out: Tensor | None = None
    for weight, level in terms:
        if level is None:
            factor, term = _number(torch.ones_like(bound)), _clip(x, _number(bound))
        else:
            factor = _step(bound, level)
            term = torch.div(x, factor).round_().clamp_(-level, level)
        factor = factor if weight is None else factor * _number(weight)
        out = term.mul_(factor) if out is None else _add_scaled(out, term, factor)
    assert out is not None
    return out


def input_gradient(grad: Tensor, x: Tensor, bound: Tensor) -> Tensor:
    """Straight through inside the range, boundary included, and 0 outside."""
    limit = _number(torch.nextafter(bound, torch.full_like(bound, torch.inf)))
    if isinstance(limit, float):
        return torch.ops.aten.hardtanh_backward(grad, x, -limit, limit)  # one pass, no mask in memory
    return torch.where(x.abs() > bound, 0.0, grad)


def mixture_gradients(
    grad: Tensor, x: Tensor, bound: Tensor, terms: list[tuple[Tensor | None, int | None]]
) -> tuple[Tensor, Tensor, list[Number]]:
    r"""Gradients of `mixture` with respect to x, to the range (of its shape) and to each term's weight.

    The weights' gradients lack the same $\langle \bar{g}, x \rangle$ each: weights that sum to one do not feel it, and
    without it no digits are lost in the difference of two nearly equal sums.
    """
    grad_x = input_gradient(grad, x, bound)
    outside = _inner(grad - grad_x, _clip(x, _number(bound)), bound)
    grad_bound, grad_weights = outside, []
    for weight, level in terms:
        if level is None:
            grad_weights.append(outside)
            continue
        step = _step(bound, level)
        error = torch.div(x, step).round_().clamp_(-level, level).mul_(step).sub_(x)
        inside = _inner(grad_x, error, bound)
        grad_bound = grad_bound + (inside if weight is None else _number(weight) * inside)
        grad_weights.append(inside + outside * (level / (level + 0.5)))
    return grad_x, torch.as_tensor(grad_bound, dtype=bound.dtype, device=bound.device) / bound, grad_weights


def _step(bound: Tensor, level: int) -> Number:
    r"""$2 \beta / (2^b - 1)$ for level $2^{b-1} - 1$, in float32 on every path, so that codes agree everywhere."""
    return _number(bound / (level + 0.5))


def _number(value: Tensor) -> Number:
    return value.item() if value.ndim == 0 and value.device.type == "cpu" else value


def _clip(x: Tensor, bound: Number) -> Tensor:
    return torch.clamp(x, -bound, bound)  # type: ignore[arg-type]


def _add_scaled(out: Tensor, term: Tensor, factor: Number) -> Tensor:
    return out.addcmul_(term, factor) if isinstance(factor, Tensor) else out.add_(term, alpha=factor)


def _inner(a: Tensor, b: Tensor, bound: Tensor) -> Number:
    """Inner product of `a` and `b` over everything that shares one entry of the range."""
    return _number(torch.dot(a, b)) if bound.ndim == 0 else (a * b).sum_to_size(bound.shape)
