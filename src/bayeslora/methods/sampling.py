"""Which weights a model computes with: its posterior mean, or draws from its posterior, by context."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from bayeslora.errors import BayesLoraError
from bayeslora.methods.tuner import tuner_of
from bayeslora.methods.variational import VariationalLayer
from bayeslora.posterior import Noise, Scope


def stochastic_layers(model: nn.Module) -> dict[str, VariationalLayer]:
    """The layers that can draw weights, by their path in the base model; empty for a deterministic model."""
    root = getattr(tuner_of(model), "model", model)
    return {path: module for path, module in root.named_modules() if isinstance(module, VariationalLayer)}


def has_posterior(model: nn.Module) -> bool:
    """Whether there is anything to draw."""
    return bool(stochastic_layers(model))


@contextmanager
def sampling(
    model: nn.Module,
    scope: Scope = "example",
    seed: int | None = None,
    draws: int | Sequence[int] = 1,
    antithetic: bool = False,
) -> Iterator[None]:
    """Inside, every stochastic layer computes with drawn weights, in training and in evaluation mode alike.

    Args:
        model: with an adapter that has a posterior.
        scope: what shares a draw: each row of the batch (`example`), each token (`token`), or all rows (`batch`).
        seed: the same seed replays the same function; None draws anew in every forward pass.
        draws: how many draws of the weights a batch holds, or their numbers; more than one needs scope `batch`, and
            then the rows come in that many groups of equal size, one after the other.
        antithetic: draws in pairs of opposite noise.

    Raises:
        BayesLoraError: for a model without a posterior, or with its mean merged into the base weights; for an unknown
            scope, or draws that do not fit it.
    """
    numbers = range(draws) if isinstance(draws, int) else draws
    if any(layer.merged for layer in stochastic_layers(model).values()):
        raise BayesLoraError(
            "the adapter is merged into the base weights, where only its posterior mean is: call unmerge_adapter first"
        )
    if not has_posterior(model):
        raise BayesLoraError(
            f"{type(model).__name__} has no posterior to draw from, its adapter is deterministic: use one of "
            "bayeslora.MeLoraConfig or bayeslora.BlobConfig, or drop the sampling"
        )
    with _controlled(model, lambda path: Noise(scope, seed, path, numbers, antithetic)):
        yield


@contextmanager
def posterior_mean(model: nn.Module) -> Iterator[None]:
    """Inside, no layer draws anything, not even in training mode; a deterministic model stays as it is."""
    with _controlled(model, lambda path: None):
        yield


@contextmanager
def _controlled(model: nn.Module, noise_of: Callable[[str], Noise | None]) -> Iterator[None]:
    layers = stochastic_layers(model)
    chosen = {path: noise_of(path) for path in layers}
    before = [(layer, layer.is_controlled, layer.noise) for layer in layers.values()]
    try:
        for path, layer in layers.items():
            layer.is_controlled, layer.noise = True, chosen[path]
        yield
    finally:
        for layer, controlled, noise in before:
            layer.is_controlled, layer.noise = controlled, noise
