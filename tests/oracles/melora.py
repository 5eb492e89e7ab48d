r"""Me-LoRA on one page: the weight of every draw is written out in full, and applied to one token at a time.

Reference for the tests, from the equations and without the package's code:

    W = W0 + s B C A,   C = M + Omega o eps,   Omega = log(1 + exp(rho)),   prior C ~ N(I, sigma_p^2)

A diagonal core is a vector c = m + omega o eps, C = diag(c), with the prior c ~ N(1, sigma_p^2).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Adapter(NamedTuple):
    """`A` (r, d_in), `B` (d_out, r), `M` and `rho` both (r, r) or both (r,)."""

    A: Tensor
    B: Tensor
    M: Tensor
    rho: Tensor
    scaling: float

    @property
    def omega(self) -> Tensor:
        return torch.log1p(torch.exp(self.rho))

    def core(self, eps: Tensor | None) -> Tensor:
        """C (r, r) under the noise `eps`; None: its mean."""
        drawn = self.M if eps is None else self.M + self.omega * eps
        return torch.diag(drawn) if drawn.ndim == 1 else drawn


def weight(adapter: Adapter, base: Tensor, eps: Tensor | None) -> Tensor:
    """W (d_out, d_in) of one draw."""
    return base + adapter.scaling * (adapter.B @ adapter.core(eps) @ adapter.A)


def forward(x: Tensor, base: Tensor, bias: Tensor | None, adapter: Adapter, noise: list[Tensor | None]) -> Tensor:
    """y (rows, tokens, d_out) for `x` (rows, tokens, d_in), row i under the weight of `noise[i]`."""
    rows = []
    for row, eps in zip(x, noise, strict=True):
        drawn = weight(adapter, base, eps)
        rows.append(torch.stack([drawn @ token + (0 if bias is None else bias) for token in row]))
    return torch.stack(rows)


def token_forward(x: Tensor, base: Tensor, bias: Tensor | None, adapter: Adapter, noise: Tensor) -> Tensor:
    """The same with a draw for each token: C z is Gaussian with mean M z and variance sum_j Omega_ij^2 z_j^2.

    `noise` (rows, tokens, r) are the standard normal numbers of C z itself; a diagonal core's are those of c.
    """
    outputs = []
    for row, eps_row in zip(x, noise, strict=True):
        for token, eps in zip(row, eps_row, strict=True):
            z = adapter.A @ token
            if adapter.M.ndim == 1:
                u = (adapter.M + adapter.omega * eps) * z
            else:
                variance = torch.stack(
                    [sum(adapter.omega[i, j] ** 2 * z[j] ** 2 for j in range(len(z))) for i in range(len(z))]
                )
                u = adapter.M @ z + eps * variance.sqrt()
            y = base @ token + adapter.scaling * (adapter.B @ u)
            outputs.append(y if bias is None else y + bias)
    return torch.stack(outputs).view(*x.shape[:-1], -1)


def kl(adapter: Adapter, prior_std: float) -> float:
    """The divergence, an entry at a time."""
    prior_mean = torch.eye(len(adapter.M)) if adapter.M.ndim == 2 else torch.ones(len(adapter.M))
    total = 0.0
    entries = zip(adapter.M.flatten(), adapter.omega.flatten(), prior_mean.flatten(), strict=True)
    for mean, omega, centre in entries:
        m, o, c = float(mean), float(omega), float(centre)
        total += math.log(prior_std / o) + (o**2 + (m - c) ** 2) / (2 * prior_std**2) - 0.5
    return total


def parameters(d_in: int, d_out: int, r: int, diagonal: bool = False) -> int:
    """The abstract's count, and the one with two vectors for the core."""
    return r * (d_in + d_out) + 2 * (r if diagonal else r * r)
