r"""Gaussians with independent entries, $q(W) = \prod_{ij} N(M_{ij}, \Omega_{ij}^2)$: divergence and local draws."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_VARIANCE_FLOOR = 1e-12


def standard_deviation(rho: Tensor) -> Tensor:
    r"""Return $\Omega = \mathrm{softplus}(\rho) > 0$, of the shape of `rho`, in float32."""
    return F.softplus(rho.float())


def inverse_softplus(value: float) -> float:
    r"""Return the $\rho$ with $\mathrm{softplus}(\rho)$ = `value` > 0."""
    return value + math.log(-math.expm1(-value))


def kl_divergence(mean: Tensor, std: Tensor, prior_mean: Tensor | float, prior_std: float) -> Tensor:
    r"""Return $\mathrm{KL}(q \,\|\, p)$ in nats, summed over all entries, as a 0-d float32 tensor.

    $$ \sum \log\frac{\sigma_p}{\Omega} + \frac{\Omega^2 + (M - M_p)^2}{2\sigma_p^2} - \frac12 $$

    Args:
        mean, std: mean and positive standard deviation of the posterior, in the same shape.
        prior_mean: mean of the prior, broadcast to `mean`.
        prior_std: standard deviation of the prior, positive.
    """
    std, offset = std.float(), mean.float() - prior_mean
    return (math.log(prior_std) - std.log() + (std.square() + offset.square()) / (2 * prior_std**2) - 0.5).sum()


def local_reparametrization(z: Tensor, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
    r"""Draw $W z$ for every row independently, without drawing $W$ (Kingma et al., 2015, arXiv:1506.02557).

    $$ u = M z + \epsilon \sqrt{\Omega^2 z^2 + 10^{-12}} $$

    Each row has the exact distribution of $W z$, but rows are independent, which they are not with one shared $W$. The
    constant keeps the gradient finite at z = 0.

    Args:
        z: (..., d_in) inputs.
        mean, std: (d_out, d_in) mean and standard deviation of $W$.
        noise: (..., d_out) standard normal noise.
    """
    return z @ mean.T + noise * torch.sqrt(z.square() @ std.square().T + _VARIANCE_FLOOR)
