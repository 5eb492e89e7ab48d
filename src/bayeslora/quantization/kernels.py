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


def round_to_grid(x: Tensor, bound: Tensor, level: int) -> Tensor:
    """`x` on the grid with codes from `-level` to `level` = 2^(bits - 1) - 1 over the range `bound`."""
    step = bound / (level + 0.5)  # 2 * bound / (2^bits - 1)
    return torch.div(x, step).round_().clamp_(-level, level).mul_(step)


def clip(x: Tensor, bound: Tensor) -> Tensor:
    """`x` clipped to the range: the 32-bit term."""
    return torch.clamp(x, -bound, bound)


def input_gradient(grad: Tensor, x: Tensor, bound: Tensor) -> Tensor:
    """Straight through inside the range, boundary included, and 0 outside."""
    if bound.ndim == 0 and x.device.type == "cpu":
        limit = torch.nextafter(bound, torch.full_like(bound, torch.inf)).item()
        return torch.ops.aten.hardtanh_backward(grad, x, -limit, limit)  # one pass, no mask in memory
    return torch.where(x.abs() > bound, 0.0, grad)


def mixture(x: Tensor, bound: Tensor, terms: list[tuple[Tensor | None, int | None]]) -> Tensor:
    """Weighted sum of grids: `terms` of (weight, level), level None for the clipped identity, weight None for 1."""
    out: Tensor | None = None
    for weight, level in terms:
        term = clip(x, bound) if level is None else round_to_grid(x, bound, level)
        if weight is not None:
            term = term.mul_(weight)
        out = term if out is None else out.add_(term)
    assert out is not None
    return out


def mixture_gradients(
    grad: Tensor, x: Tensor, bound: Tensor, terms: list[tuple[Tensor | None, int | None]]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Gradients of `mixture` with respect to x, to the range (of its shape) and to each term's weight."""
    grad_x = input_gradient(grad, x, bound)
    clipped = clip(x, bound)
    grad_bound = _inner(grad - grad_x, clipped, bound)
    grad_weights = []
    for weight, level in terms:
        if level is None:
            grad_weights.append(_inner(grad, clipped, bound).sum())
            continue
        value = round_to_grid(x, bound, level)
        if weight is not None:
            grad_weights.append(_inner(grad, value, bound).sum())
        slope = _inner(grad_x, value.sub_(x), bound)
        grad_bound = grad_bound + (slope if weight is None else weight * slope)
    return grad_x, grad_bound / bound, grad_weights


def _inner(a: Tensor, b: Tensor, bound: Tensor) -> Tensor:
    """Inner product of `a` and `b` over everything that shares one entry of the range."""
    return torch.dot(a, b) if bound.ndim == 0 else (a * b).sum_to_size(bound.shape)
