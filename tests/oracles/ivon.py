r"""IVON on one page, an element at a time in Python floats, which are float64.

Reference for the tests, from the equations and without the package's code. For one weight with mean m, momentum g and
Hessian h, after t - 1 steps, and draws theta_1 ... theta_S with the gradients of the loss there:

    sigma^2 = 1 / (lambda (h + delta))
    g_hat = mean_s grad_s,   h_hat = mean_s grad_s (theta_s - m) / sigma^2
    g <- beta1 g + (1 - beta1) g_hat
    h <- beta2 h + (1 - beta2) h_hat + 1/2 (1 - beta2)^2 (h - h_hat)^2 / (h + delta)
    m <- m - lr clip((g / (1 - beta1^t) + delta m) / (h + delta), +-xi)

with the new h in the last line, and lr times (h_0 + delta) where the rate is rescaled.
"""

from __future__ import annotations

import math
from typing import NamedTuple


class Options(NamedTuple):
    lr: float
    ess: float
    hess_init: float
    betas: tuple[float, float]
    weight_decay: float
    clip_radius: float = math.inf
    rescale_lr: bool = True


class Weight(NamedTuple):
    """One element after `t` steps."""

    m: float
    g: float
    h: float
    t: int = 0


def deviation(weight: Weight, options: Options) -> float:
    """sigma."""
    return 1 / math.sqrt(options.ess * (weight.h + options.weight_decay))


def step(weight: Weight, draws: list[float], gradients: list[float], options: Options) -> Weight:
    """The element after one more step."""
    m, g, h, t = weight
    beta1, beta2 = options.betas
    delta = options.weight_decay
    variance = deviation(weight, options) ** 2
    g_hat = sum(gradients) / len(gradients)
    h_hat = sum(grad * (theta - m) / variance for theta, grad in zip(draws, gradients, strict=True)) / len(draws)
    g = beta1 * g + (1 - beta1) * g_hat
    h = beta2 * h + (1 - beta2) * h_hat + 0.5 * (1 - beta2) ** 2 * (h - h_hat) ** 2 / (h + delta)
    newton = (g / (1 - beta1 ** (t + 1)) + delta * m) / (h + delta)
    lr = options.lr * (options.hess_init + delta if options.rescale_lr else 1)
    return Weight(m - lr * max(-options.clip_radius, min(options.clip_radius, newton)), g, h, t + 1)
