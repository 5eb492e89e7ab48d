r"""Hard-concrete bit gates and straight-through rank gates.

A bit gate is a Bernoulli variable relaxed to the hard-concrete distribution (Louizos et al., 2018), as Bayesian Bits
(van Baalen et al., 2020) uses it: with $u \sim U(0, 1)$ and a logit $\phi$,

$$ z = \mathrm{clamp}((\zeta_1 - \zeta_2)\,\sigma((\log u - \log(1 - u) + \phi) / \tau) + \zeta_2, 0, 1). $$

Algorithm 2 of the Bayesian-LoRA paper prints the divisor as `b` (line 6) and as $\beta$ (line 9); both stand for the
temperature $\tau$. Equation 9's $\sigma(\phi)$ stands for $P(z > 0) = \sigma(\phi - \tau \log(-\zeta_2 / \zeta_1))$.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bayeslora.vocabulary import WIDTHS

TEMPERATURE = 2 / 3
STRETCH = (-0.1, 1.1)
CLOSED_THRESHOLD = 0.34

_SHIFT = TEMPERATURE * math.log(-STRETCH[0] / STRETCH[1])

OPEN_LOGIT = _SHIFT + math.log((1 - CLOSED_THRESHOLD) / CLOSED_THRESHOLD)
"""A gate is open in evaluation if and only if its logit exceeds this (about -0.9353)."""

SURE_LOGIT = 20.0
"""Logit of a gate that stays open (or, negated, closed): the noise that training draws lies within 14."""

GATED_WIDTHS = WIDTHS[1:]
"""Widths with a gate; two bits are always there."""


def hard_concrete(logits: Tensor, uniform: Tensor) -> Tensor:
    """Relaxed gates `z` in [0, 1] for `logits` of any shape and `uniform` noise of the same shape in (0, 1).

    Differentiable in `logits`; the gradient is exactly zero where `z` is clamped to 0 or 1.
    """
    low, high = STRETCH
    noise = uniform.log() - (-uniform).log1p()
    return (torch.sigmoid((noise + logits) / TEMPERATURE) * (high - low) + low).clamp(0, 1)


def open_probability(logits: Tensor) -> Tensor:
    r"""$P(z > 0) = \sigma(\phi - \tau \log(-\zeta_2 / \zeta_1)) = \sigma(\phi + 1.5986)$, of the shape of `logits`."""
    return torch.sigmoid(logits - _SHIFT)


def opened(logits: Sequence[float]) -> int:
    """Number of gates that evaluation and deployment see open, from the narrowest up to the first closed one.

    A gate is open iff $P(z = 0)$ is below 0.34, that is iff its logit exceeds `OPEN_LOGIT`.
    """
    closed = (position for position, logit in enumerate(logits) if not logit > OPEN_LOGIT)
    return next(closed, len(logits))


def evaluation_width(logits: Sequence[float]) -> int:
    """Bits of a tensor in evaluation, from the logits of its gates of 4, 8, 16 and 32 bits."""
    return WIDTHS[opened(logits)]


def fixed_logits(bits: int) -> list[float]:
    """Logits of gates that stay at `bits`: no noise reaches across them, and the penalty has no gradient there."""
    return [SURE_LOGIT if width <= bits else -SURE_LOGIT for width in GATED_WIDTHS]


def nested_probability(logits: Tensor) -> Tensor:
    r"""$\prod_{j \le b} P(z_j > 0)$ for `logits` of shape (..., widths), the factors of the penalty in Equation 15."""
    return open_probability(logits).cumprod(-1)


def rank_gates(logits: Tensor) -> Tensor:
    r"""$G_1 = 1$, $G_i = \mathrm{round}(\prod_{j=2}^{i} \sigma(\xi_j))$ for `logits` $\xi$ (r,): Algorithm 1, line 2.

    The rounding passes gradients straight through. The result never increases along the rank, so pruning takes from
    the tail. `logits[0]` has no effect (the paper's $\xi_1$ does not exist: every module starts at rank one), and
    Equation 11's further cumulative product of the rounded gates is left out because it would change nothing.
    """
    open_ = torch.sigmoid(logits[1:]).cumprod(0)
    gates = open_ + (torch.round(open_) - open_).detach()
    return torch.cat([torch.ones_like(logits[:1]), gates])


def rank_probability(logits: Tensor) -> Tensor:
    r"""$\prod_{j=2}^{i} \sigma(\xi_j)$ for `logits` (..., r), with 1 in the first place: the rank penalty's terms."""
    open_ = torch.sigmoid(logits[..., 1:]).cumprod(-1)
    return torch.cat([torch.ones_like(logits[..., :1]), open_], dim=-1)
