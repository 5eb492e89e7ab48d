"""Protocol of the predictors that `predict` calls, and the predictor around a model and its posterior."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from bayeslora._peft import BaseTunerLayer
from bayeslora.errors import BayesLoraError, counted
from bayeslora.methods.variational import has_posterior, member_count, posterior_mean
from bayeslora.posterior import WeightPosterior, posterior_source
from bayeslora.posterior.saved import check_unmerged
from bayeslora.prediction.batched_sampling import BatchedSampler, first_token_only

Logits = Callable[[nn.Module, Mapping[str, Tensor]], Any]
"""Function from the model and a batch of B rows to class logits (B, C), or (B, W, C) for W words in each row; -inf
marks a class that a row does not have."""

MULTI_LABEL = "multi_label_classification"
"""The `problem_type` of Transformers' models with several labels a row."""

Sampler = Callable[[Mapping[str, Tensor]], Tensor]
"""Function from a batch of B rows to the logits of S samples: (S, B, C), or (S, B, W, C) for W words in each row."""


@runtime_checkable
class Predictor(Protocol):
    """An object that `predict` accepts, such as a post-hoc method around a trained model.

    Attributes:
        model: the module that `predict` puts in evaluation mode; batches are moved to its device.
    """

    @property
    def model(self) -> nn.Module: ...

    def check_samples(self, samples: int) -> None:
        """Raise `BayesLoraError` if the predictor cannot draw this number of samples."""

    def sampler(self, samples: int, seed: int, antithetic: bool, read: Logits) -> Sampler:
        """Return a function from a batch to the logits of S >= 1 samples, for one run over the data.

        `predict` calls it in evaluation mode without gradients. `read` returns the (B, C) logits of one forward pass.
        """


class ModelPredictor:
    """Predictor with a model's posterior mean, or with draws from the posterior of its adapter or of an optimizer.

    `predict` makes one for a plain model. Make one yourself to wrap it in another predictor, as in
    `TemperatureScaling(ModelPredictor(model, ivon))`. A draw is the same function for every batch, batch size and
    process. Each draw from `source` takes a forward pass of its own, because all trained weights differ.

    Args:
        model: the model whose weights are drawn.
        source: the model's `IVON` or `SWAG`, or a saved `WeightPosterior`; None uses the adapter's own posterior.

    Raises:
        BayesLoraError: `source` has no posterior.
    """

    def __init__(self, model: nn.Module, source: object | None = None) -> None:
        self.model = model
        self.source = None if source is None else posterior_source(source)

    def check_samples(self, samples: int) -> None:
        if samples == 0:
            return
        if self.source is not None:
            check_unmerged(self.model)
        elif not has_posterior(self.model):
            configs = getattr(self.model, "peft_config", None)
            configs = configs.values() if isinstance(configs, Mapping) else []
            kinds = sorted({str(getattr(config.peft_type, "value", config.peft_type)) for config in configs})
            what = f"the adapter ({', '.join(kinds)})" if kinds else f"the model ({type(self.model).__name__})"
            raise BayesLoraError(
                f"samples is {samples}, but {what} is deterministic and lacks a posterior: use samples=0"
            )

    def sampler(self, samples: int, seed: int, antithetic: bool, read: Logits) -> Sampler:
        source = self.source
        if samples and source is None:
            return _of_draws(BatchedSampler(self.model, read, seed, antithetic), samples)

        def logits(batch: Mapping[str, Tensor]) -> Tensor:
            found = []
            with posterior_mean(self.model):
                if source is None or not samples:
                    return torch.stack([read(self.model, batch)])
                with first_token_only(self.model):
                    for draw in range(samples):
                        with source.sampled(seed, draw, antithetic):
                            found.append(read(self.model, batch))
            return torch.stack(found)

        return logits


class CoreEnsemble:
    """Predictor that averages over the K cores of an adapter, each without noise; `samples` must be K or 0.

    A prediction costs K forward passes. Without this predictor, `predict(model, …)` uses the mean core in one pass, or
    draws that include the noise of each core.

    Args:
        model: a model with an adapter of `MeLoraConfig(cores=K)`.

    Raises:
        BayesLoraError: the adapter has a single core, or none.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.size = model, member_count(model)
        if self.size < 2:
            raise BayesLoraError(
                "the adapter has no more than one core, but an ensemble needs two: train with "
                "bayeslora.MeLoraConfig(cores=4), or predict without CoreEnsemble"
            )

    def check_samples(self, samples: int) -> None:
        if samples not in (0, self.size):
            raise BayesLoraError(
                f"samples is {samples}, but the ensemble's samples are its {self.size} cores: give "
                f"samples={self.size}, or 0 for the same"
            )

    def sampler(self, samples: int, seed: int, antithetic: bool, read: Logits) -> Sampler:
        return _of_draws(BatchedSampler(self.model, read, seed, scale=0.0), self.size)


def _of_draws(batched: BatchedSampler, count: int) -> Sampler:
    """Return the sampler of the draws 0 … `count` - 1."""

    def draws(batch: Mapping[str, Tensor]) -> Tensor:
        with first_token_only(batched.model):
            return batched.logits(batch, range(count))

    return draws


Predictable = nn.Module | Predictor | WeightPosterior
"""Anything that `predict` accepts: a model, a predictor, or the saved posterior of a model's weights."""


def as_predictor(model: Predictable) -> Predictor:
    """Return the predictor itself, or the `ModelPredictor` of a model or of a saved posterior."""
    if isinstance(model, nn.Module):
        return ModelPredictor(model)
    if isinstance(model, WeightPosterior):
        return ModelPredictor(model.model, model)
    if isinstance(model, Predictor):
        return model
    raise BayesLoraError(
        f"{type(model).__name__} was given, but a model or a predictor is needed: give a model, or a predictor "
        "around it"
    )


def problem_type(model: nn.Module) -> str | None:
    """Return what the configuration of `model`, or of the model inside it, says about its outputs, or None."""
    configs = (getattr(module, "config", None) for module in model.modules())
    return next((getattr(config, "problem_type", None) for config in configs if config is not None), None)


def check_one_label(model: nn.Module) -> None:
    """Raise `BayesLoraError` for a multi-label model, where the classes must exclude each other."""
    if problem_type(model) == MULTI_LABEL:
        raise BayesLoraError(
            f"the model gives several labels a row (problem_type is {MULTI_LABEL!r}), but this needs one of several "
            "classes: use bayeslora.predict, which gives the probability of each label"
        )


def check_samples(model: Predictable, samples: int) -> None:
    """Check that `predict` can draw this many samples from the model, before any work is done.

    Raises:
        BayesLoraError: the number is negative or fractional, or above 0 for a model without a posterior.
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 0:
        raise BayesLoraError(
            f"samples is {samples!r}, but must be a whole number of at least 0: give 0 for the mean weights"
        )
    as_predictor(model).check_samples(samples)


class NotFiniteError(BayesLoraError):
    """The outputs of a model are not finite."""


def check_finite(logits: Tensor, model: nn.Module, of: str = "example") -> None:
    """Raise `NotFiniteError` if logits (S, n, C) of n rows have NaN, infinity or minus infinity alone in a row."""
    broken = int((~logits.amax(dim=-1).isfinite()).any(dim=0).sum()) if logits.numel() else 0
    if broken:
        tensors = [*model.named_parameters(), *model.named_buffers()]
        name = next((name for name, each in tensors if each.is_floating_point() and not each.isfinite().all()), None)
        where = "" if name is None else f" ({name} is not)"
        raise NotFiniteError(
            f"the model's outputs are not finite for {broken} of {counted(logits.shape[1], of)}, but must be{where}: "
            "train with a smaller learning rate or in float32, or load the adapter again"
        )


def check_adapters(model: nn.Module) -> None:
    """Raise `NotFiniteError` if a weight of an adapter is not finite, which attention on a CPU may hide."""
    for path, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        for name, each in cast(nn.Module, module).named_parameters():
            if not name.startswith("base_layer.") and type(each) is nn.Parameter and not each.isfinite().all():
                raise NotFiniteError(
                    f"{path}.{name} has values that are not finite, but all must be: load the adapter again, or train "
                    "with a smaller learning rate or in float32"
                )
