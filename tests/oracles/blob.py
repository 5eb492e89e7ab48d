r"""BLoB on one page: weights written out in full, flipout one token at a time, the published alternation as a loop.

Reference for the tests, from the equations and without the package's code:

    W = W0 + s B A,   A_ij = M_ij + G_ij^2 eps_ij,   prior A_ij ~ N(0, sigma_p^2)
    flipout:  y = W0 x + b + s B (M x + ((x o r) (Omega o eps)^T) o t)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Adapter(NamedTuple):
    """`M` and `G` (r, d_in), `B` (d_out, r)."""

    M: Tensor
    G: Tensor
    B: Tensor
    scaling: float


def weight(adapter: Adapter, base: Tensor, eps: Tensor | None) -> Tensor:
    """W (d_out, d_in) of one draw; None: the mean."""
    a = adapter.M if eps is None else adapter.M + adapter.G * adapter.G * eps
    return base + adapter.scaling * (adapter.B @ a)


def forward(x: Tensor, base: Tensor, bias: Tensor | None, adapter: Adapter, noise: list[Tensor | None]) -> Tensor:
    """y (rows, tokens, d_out) for `x` (rows, tokens, d_in), row i under the weight of `noise[i]`."""
    rows = []
    for row, eps in zip(x, noise, strict=True):
        drawn = weight(adapter, base, eps)
        rows.append(torch.stack([drawn @ token + (0 if bias is None else bias) for token in row]))
    return torch.stack(rows)


def flipout(
    x: Tensor, base: Tensor, bias: Tensor | None, adapter: Adapter, eps: Tensor, r: Tensor, t: Tensor
) -> Tensor:
    """One draw `eps` (r, d_in) for all, decorrelated by the signs `r` of `x`'s shape and `t` (rows, tokens, r)."""
    perturbation = adapter.G * adapter.G * eps
    outputs = []
    for row, signs_in, signs_out in zip(x, r, t, strict=True):
        for token, s_in, s_out in zip(row, signs_in, signs_out, strict=True):
            hidden = adapter.M @ token + (perturbation @ (token * s_in)) * s_out
            y = base @ token + adapter.scaling * (adapter.B @ hidden)
            outputs.append(y if bias is None else y + bias)
    return torch.stack(outputs).view(*x.shape[:-1], -1)


def kl(adapter: Adapter, prior_std: float) -> float:
    """The divergence, an entry at a time."""
    total = 0.0
    for mean, root in zip(adapter.M.flatten(), adapter.G.flatten(), strict=True):
        m, omega = float(mean), float(root) ** 2
        total += math.log(prior_std / omega) + (omega**2 + m**2) / (2 * prior_std**2) - 0.5
    return total


def cycle_weights(length: int) -> list[float]:
    """pi_i = 2^i / (2^K - 1), i = 0 ... K - 1."""
    return [2**i / (2**length - 1) for i in range(length)]


def kl_step(adapter: Adapter, prior_std: float, rate: float) -> Adapter:
    """Plain gradient descent on the divergence by hand: dKL/dM = M / sp^2, dKL/dG = 2 G^3 / sp^2 - 2 / G."""
    gradient_m = adapter.M / prior_std**2
    gradient_g = 2 * adapter.G**3 / prior_std**2 - 2 / adapter.G
    return adapter._replace(M=adapter.M - rate * gradient_m, G=adapter.G - rate * gradient_g)


def parameters(d_in: int, d_out: int, r: int) -> int:
    return 2 * r * d_in + r * d_out
