r"""Rounding after training on one page: the grid, the best range by exhaustive search, and one rounded layer.

Reference for the tests, in plain torch and float64, sharing no code with the package. The grid of b bits on
$[-\beta, \beta]$ has the step $2\beta / (2^b - 1)$ and the codes $-(2^{b-1} - 1) \dots 2^{b-1} - 1$.
"""

from __future__ import annotations

import torch
from torch import Tensor


def on_grid(x: Tensor, bound: Tensor, bits: int) -> Tensor:
    step = 2 * bound / (2**bits - 1)
    largest = 2 ** (bits - 1) - 1
    return (x / step).round().clamp(-largest, largest) * step


def least_error(x: Tensor, bits: int) -> float:
    """The smallest squared error of `x` on any grid, over 3,000 ranges up to 1.6 times the largest magnitude."""
    bounds = torch.linspace(0.005, 1.6, 3000, dtype=torch.float64) * x.abs().max()
    return min(float((on_grid(x, bound, bits) - x).square().sum()) for bound in bounds)


def rounded_layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    bounds: tuple[Tensor, Tensor | None, Tensor | None],
    bits: tuple[int, int, int],
) -> Tensor:
    """$Q_{out}(Q_w(W) Q_{in}(x) + b)$ with ranges and widths of weight (one range a row), input and output."""
    of_weight, of_input, of_output = bounds
    w = torch.stack([on_grid(row, bound, bits[0]) for row, bound in zip(weight, of_weight.reshape(-1), strict=True)])
    x = x if of_input is None else on_grid(x, of_input, bits[1])
    y = x @ w.T + bias
    return y if of_output is None else on_grid(y, of_output, bits[2])
