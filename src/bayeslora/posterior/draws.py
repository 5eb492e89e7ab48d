"""Draws of a model's weights: the protocol of objects that make them, and the context that sets the weights to one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from bayeslora.errors import BayesLoraError
from bayeslora.posterior.noise import Noise

_ALIGNED = 16
"""Parts of a flat buffer start at multiples of this many elements; the padding between them is never read."""


class GaussianParameter(NamedTuple):
    r"""The Gaussian of one parameter.

    Attributes:
        size: number of elements.
        parameter: the parameter, or None if it is frozen; a frozen one still uses up its share of random numbers.
        mean, deviation: posterior mean and standard deviation, in the parameter's shape; None if it is frozen.
        columns: (K, *shape) factor L of a covariance shared by all parameters, $\mathrm{diag}(\text{deviation}^2) +
            L^\top L$; None for a diagonal covariance.
    """

    size: int
    parameter: nn.Parameter | None = None
    mean: Tensor | None = None
    deviation: Tensor | None = None
    columns: Tensor | None = None


@runtime_checkable
class PosteriorSource(Protocol):
    """An object that draws a model's weights: an `IVON`, a `SWAG`, or the `WeightPosterior` saved from one."""

    def gaussians(self) -> list[GaussianParameter]:
        """Return the Gaussian of every parameter, in the order of the optimizer that trained them."""

    def sampled(self, seed: int = 0, draw: int = 0, antithetic: bool = False) -> AbstractContextManager[None]:
        """Return a context manager that sets the weights to draw number `draw`, and restores them at the end."""


def unwrapped(optimizer: Any) -> Any:
    """Return the torch optimizer inside accelerate's wrapper, or `optimizer` itself."""
    return getattr(optimizer, "optimizer", optimizer)


def posterior_source(given: object) -> PosteriorSource:
    """Return `given`, without accelerate's wrapper, if it can draw weights.

    Raises:
        BayesLoraError: the object cannot draw weights.
    """
    source = unwrapped(given)
    if isinstance(source, PosteriorSource):
        return source
    raise BayesLoraError(
        f"{type(source).__name__} was given, but a posterior over the weights is needed to draw them: "
        "give a bayeslora.IVON or SWAG, or load_posterior(model, folder)"
    )


@contextmanager
def drawn_weights(
    gaussians: Sequence[GaussianParameter], seed: int, draw: int, antithetic: bool = False
) -> Iterator[None]:
    """Set each parameter to `mean + deviation * noise`, cast to its type, and restore it bit for bit afterwards.

    One call draws the noise of all parameters, so a draw depends only on their order and sizes, and an optimizer gives
    the same draws as the posterior saved from it. All parameters share the K random numbers that multiply `columns`.

    Args:
        gaussians: the Gaussian of every parameter, in order.
        seed: seed of all draws.
        draw: number of the draw.
        antithetic: give draws 2k and 2k + 1 opposite noise.
    """
    starts, length = aligned([entry.size for entry in gaussians])
    noise = Noise("batch", seed, "weights", draws=[draw], antithetic=antithetic)
    device = next((entry.parameter.device for entry in gaussians if entry.parameter is not None), torch.device("cpu"))
    numbers = noise.normal(1, (length,), device)[0]
    shared = _shared_numbers(gaussians, seed, draw, antithetic)
    before: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for start, (size, parameter, mean, deviation, columns) in zip(starts, gaussians, strict=True):
                if parameter is None or mean is None or deviation is None:
                    continue
                weight = local(parameter.detach())
                before.append((weight, weight.clone()))
                part = numbers[start : start + size].view(parameter.shape)
                drawn = local_like(parameter, mean) + local_like(parameter, deviation) * local_like(parameter, part)
                if columns is not None:
                    drawn = drawn + local_like(parameter, torch.tensordot(shared, columns, dims=1))
                weight.copy_(drawn)
        yield
    finally:
        with torch.no_grad():
            for weight, value in before:
                weight.copy_(value)


def _shared_numbers(gaussians: Sequence[GaussianParameter], seed: int, draw: int, antithetic: bool) -> Tensor:
    """Return (K,) standard normal numbers for the columns that the parameters share; K may be 0."""
    count = next((len(entry.columns) for entry in gaussians if entry.columns is not None), 0)
    noise = Noise("batch", seed, "columns", draws=[draw], antithetic=antithetic)
    return noise.normal(1, (count,), torch.device("cpu"))[0]


def aligned(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Return the start of each part of a flat buffer, given the parts' sizes, and the length of the buffer."""
    starts, position = [], 0
    for size in sizes:
        starts.append(position)
        position += -(-size // _ALIGNED) * _ALIGNED
    return starts, position


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a distributed tensor, sharing its memory, or any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return a distributed tensor gathered from all ranks, differentiable, or any other tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_sharded(model: nn.Module) -> bool:
    """Return True if ranks have parts of the parameters of `model`, as under FSDP2."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


@torch.no_grad()
def write(parameter: Tensor, value: Tensor) -> None:
    """Set a parameter, of which each rank may have a part, to `value`, which all ranks hold."""
    local(parameter).copy_(local_like(parameter, value))


def local_like(parameter: Tensor, whole: Tensor) -> Tensor:
    """Return this rank's part of `whole`, which all ranks hold, sharded as `parameter` is and on its device."""
    whole = whole.to(parameter.device)
    if not isinstance(parameter, DTensor) or isinstance(whole, DTensor):
        return local(whole)
    replicated = DTensor.from_local(whole, parameter.device_mesh, [Replicate()] * parameter.device_mesh.ndim)
    return local(replicated.redistribute(placements=parameter.placements))  # each rank cuts: nothing is sent
