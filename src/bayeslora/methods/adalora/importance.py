r"""Score a weight by its gradients or by its Gaussian posterior, and choose the ranks that a budget keeps.

With a posterior $N(\mu, \sigma^2)$ an element scores

- `snr`: $|\mu| / \sigma$,
- `snr_abs`: the signal-to-noise ratio of $|\theta|$, $E|\theta| / \sqrt{\mu^2 + \sigma^2 - (E|\theta|)^2}$ with
  $E|\theta| = \mu\,\mathrm{erf}(\mu / \sigma\sqrt2) + \sigma\sqrt{2/\pi}\,\exp(-\mu^2 / 2\sigma^2)$,
- `magnitude`: $|\mu|$, `inverse_std`: $1 / \sigma$, `mean_abs`: $E|\theta|$,

and without one AdaLoRA's `sensitivity` (arXiv:2303.10512, Equations 8 to 11): with $I = |w \cdot \partial L / \partial
w|$, $\bar I \leftarrow \beta_1 \bar I + (1 - \beta_1) I$ and $\bar U \leftarrow \beta_2 \bar U + (1 - \beta_2) |I -
\bar I|$, the product $\bar I \bar U$. The scores of the posterior are those of arXiv:2409.10673.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from bayeslora.methods.allocation import falling

Importance = Literal["sensitivity", "snr", "snr_abs", "magnitude", "inverse_std", "mean_abs"]
IMPORTANCES: tuple[str, ...] = get_args(Importance)
NEED_STD = ("snr", "snr_abs", "inverse_std", "mean_abs")
"""Scores that a weight without a posterior does not have."""

_SMALLEST_STD = 1e-30
"""Keeps ratios finite in float32 where a posterior has collapsed to a point."""


def score_of_posterior(importance: Importance, mean: Tensor, std: Tensor | None) -> Tensor:
    """The score of every element, of the shape of `mean`; `std` may be None for `magnitude` alone."""
    magnitude = mean.abs()
    if importance == "magnitude":
        return magnitude
    if std is None:
        raise ValueError(f"{importance} needs standard deviations")
    std = std.clamp_min(_SMALLEST_STD)
    if importance == "inverse_std":
        return std.reciprocal()
    ratio = magnitude / std
    if importance == "snr":
        return ratio
    excess = _excess(ratio)
    if importance == "mean_abs":
        return magnitude + std * excess
    # Var|theta| / sigma^2 = 1 + t^2 - (t + d)^2, written so that nothing cancels where the ratio t is large.
    return (ratio + excess) / (1 - excess * (2 * ratio + excess)).sqrt()


def _excess(ratio: Tensor) -> Tensor:
    r"""$(E|\theta| - |\mu|) / \sigma$ at $t = |\mu| / \sigma$, from $\sqrt{2/\pi}$ at 0 down to 0."""
    near = ratio.clamp_max(20.0)  # beyond, it is 0 in double precision, and erfc times a huge ratio would not be
    return math.sqrt(2 / math.pi) * torch.exp(-near.square() / 2) - near * torch.erfc(near / math.sqrt(2))


def triplet_scores(a: Tensor, diagonal: Tensor, b: Tensor) -> Tensor:
    """Score (..., r) of each rank: its diagonal entry's, and the means over its row of A and its column of B.

    Args:
        a: scores of A (..., r, d_in).
        diagonal: scores of the diagonal (..., r).
        b: scores of B (..., d_out, r).
    """
    return diagonal + a.mean(-1) + b.mean(-2)


@torch.no_grad()
def sensitivities(weights: Sequence[Tensor], gradients: Sequence[Tensor], scale: float = 1.0) -> list[Tensor]:
    """|w g| of every element, with gradients that are still multiplied by the loss scale `scale`."""
    products = torch._foreach_mul(list(weights), list(gradients))
    torch._foreach_abs_(products)
    if scale != 1.0:
        torch._foreach_div_(products, scale)
    return list(products)


@torch.no_grad()
def update_averages(
    importances: Sequence[Tensor],
    uncertainties: Sequence[Tensor],
    observed: Sequence[Tensor],
    beta1: float,
    beta2: float,
) -> None:
    """Move the running averages, in place, by what was observed in one step; `observed` is used up."""
    torch._foreach_lerp_(list(importances), list(observed), 1 - beta1)
    torch._foreach_sub_(list(observed), list(importances))
    torch._foreach_abs_(list(observed))
    torch._foreach_lerp_(list(uncertainties), list(observed), 1 - beta2)


def budget_at(step: int, start: int, end: int, initial: int, target: int) -> int:
    r"""Ranks allowed after `step` optimizer steps.

    $b_0$ until `start`, then $b_T + (b_0 - b_T) (1 - (t - t_i) / (T' - t_i))^3$, rounded down, and $b_T$ from the
    `end` $T'$ on.
    """
    if step <= start:
        return initial
    if step >= end:
        return target
    return int(falling((step - start) / (end - start), initial, target))


def kept_ranks(scores: Tensor, budget: int) -> Tensor:
    """Boolean mask over `scores` with exactly `budget` entries True, the highest; of equals the first."""
    keep = torch.zeros_like(scores, dtype=torch.bool)
    keep[torch.sort(scores, descending=True, stable=True).indices[:budget]] = True
    return keep
