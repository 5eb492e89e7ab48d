r"""AdaLoRA and its Bayesian scores on one page: one number at a time, in double precision, from the equations.

Reference for the tests, without the package's code:

    W = W0 + s B diag(E) A
    penalty = gamma * mean over all A and B of ||A A^T - I||_F, ||B^T B - I||_F
    I = |w g|,  mean I <- b1 mean I + (1 - b1) I,  U <- b2 U + (1 - b2) |I - mean I|,  s = mean I * U
    S_k = s(E_k) + mean_j s(A_kj) + mean_i s(B_ik)
    b(t) = b0 until t_i, then b_T + (b0 - b_T) (1 - (t - t_i) / (T - t_i - t_f))^3, then b_T from T - t_f

Scores of a posterior come from numerical integration over |theta|, not from the closed forms.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Adapter(NamedTuple):
    """`A` (r, d_in), `E` (r,), `B` (d_out, r)."""

    A: Tensor
    E: Tensor
    B: Tensor
    scaling: float


def forward(x: Tensor, base: Tensor, bias: Tensor | None, adapter: Adapter) -> Tensor:
    weight = base + adapter.scaling * adapter.B @ torch.diag(adapter.E) @ adapter.A
    return x @ weight.T + (0 if bias is None else bias)


def orthogonality(adapters: list[Adapter], weight: float) -> Tensor:
    terms = []
    for adapter in adapters:
        identity = torch.eye(len(adapter.E), dtype=adapter.A.dtype)
        terms.append((adapter.A @ adapter.A.T - identity).square().sum().sqrt())
        terms.append((adapter.B.T @ adapter.B - identity).square().sum().sqrt())
    return weight * torch.stack(terms).mean()


class Averages:
    """Running averages of one element's sensitivity."""

    def __init__(self, beta1: float = 0.85, beta2: float = 0.85) -> None:
        self.beta1, self.beta2 = beta1, beta2
        self.importance = self.uncertainty = 0.0

    def observe(self, weight: float, gradient: float) -> None:
        seen = abs(weight * gradient)
        self.importance = self.beta1 * self.importance + (1 - self.beta1) * seen
        self.uncertainty = self.beta2 * self.uncertainty + (1 - self.beta2) * abs(seen - self.importance)

    @property
    def score(self) -> float:
        return self.importance * self.uncertainty


def posterior_score(importance: str, mean: float, std: float) -> float:
    """The score of one element with posterior N(mean, std^2)."""
    if importance == "snr":
        return abs(mean) / std
    if importance == "magnitude":
        return abs(mean)
    if importance == "inverse_std":
        return 1 / std
    first, variance = absolute_moments(mean, std)
    return first if importance == "mean_abs" else first / math.sqrt(variance)


def absolute_moments(mean: float, std: float, points: int = 20_001) -> tuple[float, float]:
    """Mean and variance of |theta|: the trapezoid rule over twelve standard deviations to each side."""
    z = np.linspace(-12.0, 12.0, points)
    density = np.exp(-z * z / 2)
    density /= density.sum()
    absolute = np.abs(mean + std * z)
    first = float((density * absolute).sum())
    return first, float((density * (absolute - first) ** 2).sum())


def budget(step: int, tinit: int, tfinal: int, total: int, initial: int, target: int) -> int:
    if step <= tinit:
        return initial
    if step >= total - tfinal:
        return target
    share = 1 - (step - tinit) / (total - tfinal - tinit)
    return math.floor(target + (initial - target) * share**3)


def triplets(a: Tensor, e: Tensor, b: Tensor) -> list[float]:
    """S_k from element scores."""
    return [
        e[k].item() + sum(v.item() for v in a[k]) / a.shape[1] + sum(v.item() for v in b[:, k]) / b.shape[0]
        for k in range(len(e))
    ]


def kept(scores: list[list[float]], allowed: int) -> list[list[bool]]:
    """The `allowed` highest of all layers' ranks."""
    order = sorted(((-s, layer, k) for layer, row in enumerate(scores) for k, s in enumerate(row)))
    chosen = {(layer, k) for _, layer, k in order[:allowed]}
    return [[(layer, k) in chosen for k in range(len(row))] for layer, row in enumerate(scores)]
