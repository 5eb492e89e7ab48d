"""A draw of many weights at once, put into their place for as long as a block runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bayeslora.optim._flat import aligned, local, local_like
from bayeslora.posterior import Noise


class Gaussian(NamedTuple):
    """The posterior of one parameter.

    Attributes:
        size: number of elements.
        parameter: None for one that stays as it is, and only has its share of the numbers.
        mean, deviation: of the parameter's shape.
    """

    size: int
    parameter: nn.Parameter | None = None
    mean: Tensor | None = None
    deviation: Tensor | None = None


@contextmanager
def drawn_weights(posterior: Sequence[Gaussian], seed: int, draw: int, antithetic: bool = False) -> Iterator[None]:
    """Inside, each parameter is `mean + deviation * noise`, cast to its type; outside, bit for bit what it was.

    One call makes the numbers of all parameters, so that a draw depends on their order and sizes alone: an optimizer
    and the posterior saved from it draw the same.

    Args:
        posterior: of every parameter, in order.
        seed: of the draws.
        draw: its number.
        antithetic: draws 2k and 2k + 1 have opposite noise.
    """
    starts, length = aligned([entry.size for entry in posterior])
    noise = Noise("batch", seed, "weights", draws=[draw], antithetic=antithetic)
    numbers = noise.normal(1, (length,), torch.device("cpu"))[0]
    before: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for start, (size, parameter, mean, deviation) in zip(starts, posterior, strict=True):
                if parameter is None or mean is None or deviation is None:
                    continue
                weight = local(parameter.detach())
                before.append((weight, weight.clone()))
                part = numbers[start : start + size].view(parameter.shape)
                weight.copy_(
                    local_like(parameter, mean) + local_like(parameter, deviation) * local_like(parameter, part)
                )
        yield
    finally:
        with torch.no_grad():
            for weight, value in before:
                weight.copy_(value)
