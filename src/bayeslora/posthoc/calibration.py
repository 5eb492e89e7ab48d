r"""Uncertainty for a finished model of any kind: Monte-Carlo dropout and temperature scaling.

Both are predictors: `bayeslora.predict(MCDropout(model), loader, samples=10)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bayeslora.errors import BayesLoraError
from bayeslora.methods.sampling import posterior_mean
from bayeslora.prediction.predict import Logits, Predictor, Sampler, as_predictor, check_samples, sampled_logits

_LABELS = ("labels", "label", "label_ids")


class MCDropout:
    """Monte-Carlo dropout (Gal and Ghahramani, 2016, arXiv:1506.02142): dropout stays on and is averaged over.

    Every dropout module of the model with a positive rate takes part, the adapter's and the base model's; dropout
    inside fused attention kernels, which is no module, stays off. A variational adapter stays at its mean. A sample
    drops the same for the same seed and batch; unlike a draw from a posterior it depends on how the data are batched.
    0 samples is the model without dropout.

    Args:
        model: trained with dropout.

    Raises:
        BayesLoraError: no dropout module has a positive rate: every sample would be the same.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._dropouts = [m for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
        rates = sorted({module.p for module in self._dropouts})
        if not any(rates):
            seen = "0 in every dropout module" if rates else "absent, there are no dropout modules"
            raise BayesLoraError(
                f"the dropout rate is {seen}, one above 0 is needed for Monte-Carlo dropout: train with lora_dropout"
            )

    @property
    def model(self) -> nn.Module:
        return self._model

    def check_samples(self, samples: int) -> None:
        """Any number will do."""

    def sampler(self, samples: int, seed: int, antithetic: bool, read: Logits) -> Sampler:
        if antithetic:
            raise BayesLoraError("antithetic is True, but dropout has no opposite: leave it out")

        def passes(batch: Mapping[str, Tensor]) -> Tensor:
            with posterior_mean(self.model):
                if samples == 0:
                    only: Tensor = read(self.model, batch)
                    return only.unsqueeze(0)
                device = next(iter(batch.values())).device
                with self._dropping(), torch.random.fork_rng([device] if device.type == "cuda" else []):
                    torch.manual_seed(seed)
                    return torch.stack([read(self.model, batch) for _ in range(samples)])

        return passes

    @contextmanager
    def _dropping(self) -> Iterator[None]:
        modes = [(module, module.training) for module in self._dropouts]
        for module in self._dropouts:
            module.train()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


class TemperatureScaling:
    """Logits divided by one temperature, fitted on held-out data (Guo et al., 2017, arXiv:1706.04599).

    The most probable class stays the same, only the confidence changes. Around another predictor the logits of each
    of its samples are divided.

    Args:
        model: a model or another predictor.
        temperature: T > 0; above 1 softens. Usually left to `fit`.
    """

    bounds = (0.02, 50.0)
    """Temperatures that `fit` looks between."""

    def __init__(self, model: nn.Module | Predictor, temperature: float = 1.0) -> None:
        if not temperature > 0:
            raise BayesLoraError(f"the temperature is {temperature}, a positive number is needed")
        self.predictor, self.temperature = as_predictor(model), float(temperature)

    @property
    def model(self) -> nn.Module:
        return self.predictor.model

    def check_samples(self, samples: int) -> None:
        check_samples(self.predictor, samples)

    def sampler(self, samples: int, seed: int, antithetic: bool, read: Logits) -> Sampler:
        inner = self.predictor.sampler(samples, seed, antithetic, read)

        def scaled(batch: Mapping[str, Tensor]) -> Tensor:
            logits = inner(batch)
            if logits.shape[-1] == 1:
                raise BayesLoraError("the model has 1 output, a regression: temperature scaling is for classifiers")
            return logits / self.temperature

        return scaled

    def fit(
        self,
        loader: Mapping[str, Any] | Iterable[Mapping[str, Any]],
        samples: int = 0,
        seed: int = 0,
        logits: Logits | None = None,
    ) -> TemperatureScaling:
        """Set the temperature that gives held-out labels the least negative log-likelihood; returns itself.

        Args:
            loader: a batch or batches with `labels`, of data that the model was not trained on.
            samples, seed, logits: as they will be given to `predict`.

        Raises:
            BayesLoraError: no labels, labels that are no classes, or a likelihood that is best at a bound, as it is
                where every held-out label is predicted right, or none better than by chance.
        """
        batches = [loader] if isinstance(loader, Mapping) else list(loader)
        labels = labels_of(batches)
        check_samples(self.predictor, samples)
        found = sampled_logits(self.predictor, batches, samples, seed, logits=logits)
        low, high = (math.log(bound) for bound in self.bounds)
        best = golden_section(lambda t: negative_log_likelihood(found / math.exp(t), labels), low, high)
        if min(best - low, high - best) < 1e-3:
            raise BayesLoraError(
                f"the best temperature is {math.exp(best):.3g}, at the edge of what is looked through: the held-out "
                f"{len(labels)} examples say nothing about confidence, use more or others"
            )
        self.temperature = math.exp(best)
        return self


def labels_of(batches: Iterable[Mapping[str, Any]]) -> Tensor:
    """(n,) class ids of all batches, int64 on the CPU; raises `BayesLoraError` where there are none."""
    found = []
    for batch in batches:
        given = next((batch[name] for name in _LABELS if batch.get(name) is not None), None)
        if given is None:
            raise BayesLoraError(
                f"a batch has {', '.join(batch)} and no labels, which are needed here: use held-out data with labels"
            )
        labels = torch.as_tensor(given)
        if labels.is_floating_point():
            raise BayesLoraError(f"labels are {labels.dtype}, class ids are needed: this is for classifiers")
        found.append(labels.reshape(-1).to("cpu", torch.int64))
    if not found:
        raise BayesLoraError("the loader gave 0 batches, at least 1 is needed: check the data set behind it")
    return torch.cat(found)


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> float:
    """Mean over examples of -log of the mean probability over samples, in nats, for (S, n, C) logits."""
    log_p = logits.log_softmax(dim=-1).logsumexp(dim=0) - math.log(len(logits))
    return float(nn.functional.nll_loss(log_p, labels))


def golden_section(function: Callable[[float], float], low: float, high: float, tolerance: float = 1e-5) -> float:
    """Where a function with one minimum between `low` and `high` has it, to `tolerance`."""
    ratio = (math.sqrt(5) - 1) / 2
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = function(left), function(right)
    while high - low > tolerance:
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = function(right)
    return (low + high) / 2
