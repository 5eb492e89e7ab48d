"""Temperature scaling: calibrated confidence for a finished classifier of any kind."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Self

from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from bayeslora.errors import BayesLoraError
from bayeslora.prediction import (
    Logits,
    Predictable,
    Sampler,
    as_predictor,
    check_one_label,
    check_samples,
    labels_of,
    sampled_logits,
)


class CalibrationMap:
    """A predictor around another one, with a map of its outputs that is fitted on held-out rows.

    Args:
        model: a model or another predictor.
    """

    def __init__(self, model: Predictable) -> None:
        self.predictor = as_predictor(model)
        self.model = self.predictor.model
        check_one_label(self.model)

    def check_samples(self, samples: int) -> None:
        check_samples(self.predictor, samples)

    def sampler(self, samples: int, seed: int, antithetic: bool, read: Logits) -> Sampler:
        inner = self.predictor.sampler(samples, seed, antithetic, read)
        return lambda batch: self.mapped(inner(batch))

    def mapped(self, logits: Tensor) -> Tensor:
        """Return the map of the logits (S, B, C) of S samples."""
        raise NotImplementedError

    def fit(
        self,
        loader: Mapping[str, Any] | Iterable[Mapping[str, Any]],
        samples: int = 0,
        seed: int = 0,
        logits: Logits | None = None,
    ) -> Self:
        """Fit the map to held-out labels, and return self.

        Args:
            loader: a batch or batches with `labels`, of data that the model was not trained on.
            samples, seed, logits: the arguments that `predict` will get.

        Raises:
            BayesLoraError: labels are missing or not classes, or the rows do not determine the map.
        """
        batches = [loader] if isinstance(loader, Mapping) else list(loader)
        labels = labels_of(batches)
        check_samples(self.predictor, samples)
        return self.fit_logits(sampled_logits(self.predictor, batches, samples, seed, logits=logits), labels)

    def fit_logits(self, outputs: Tensor, labels: Tensor) -> Self:
        """Do what `fit` does, from the logits (S, n, C) of S samples, float64, and class ids (n,)."""
        raise NotImplementedError

    @property
    def numbers(self) -> dict[str, Any]:
        """Return the fitted numbers, for JSON and `from_numbers`."""
        raise NotImplementedError

    @classmethod
    def from_numbers(cls, model: Predictable, numbers: Mapping[str, Any]) -> Self:
        """Return the predictor with `numbers` around another model or predictor."""
        raise NotImplementedError


class TemperatureScaling(CalibrationMap):
    """Predictor that divides logits by one temperature, fitted on held-out data (Guo et al., 2017, arXiv:1706.04599).

    With the mean weights, only the confidence changes and the most probable class stays the same. With samples, the
    logits of each sample are divided before their probabilities are averaged.

    Args:
        model: a model or another predictor.
        temperature: T > 0; above 1 lowers the confidence. `fit` sets it to maximize the likelihood of held-out labels.
            It fails if the model predicts all labels correctly or none better than by chance.
    """

    bounds = (0.02, 50.0)
    """Smallest and largest temperature that `fit` tries."""

    def __init__(self, model: Predictable, temperature: float = 1.0) -> None:
        if not temperature > 0:
            raise BayesLoraError(f"the temperature is {temperature}, but must be positive: give 1 to change nothing")
        super().__init__(model)
        self.temperature = float(temperature)

    def mapped(self, logits: Tensor) -> Tensor:
        check_classes(logits)
        return logits / self.temperature

    def fit_logits(self, outputs: Tensor, labels: Tensor) -> Self:
        check_classes(outputs)
        low, high = (math.log(bound) for bound in self.bounds)

        def nll(log_temperature: float) -> float:
            return predictive_nll(outputs / math.exp(log_temperature), labels)

        inside = float(minimize_scalar(nll, bounds=(low, high), method="bounded", options={"xatol": 1e-5}).x)
        best = min(low, high, inside, key=nll)  # a bound if the likelihood is flat from there on
        if min(best - low, high - best) < 1e-3:
            raise BayesLoraError(
                f"the best temperature for the {len(labels)} held-out examples is {math.exp(best):.3g}, but must be "
                f"inside the range {self.bounds}: use more examples, or others"
            )
        self.temperature = math.exp(best)
        return self

    @property
    def numbers(self) -> dict[str, Any]:
        return {"temperature": self.temperature}

    @classmethod
    def from_numbers(cls, model: Predictable, numbers: Mapping[str, Any]) -> Self:
        return cls(model, numbers["temperature"])


def check_classes(logits: Tensor) -> None:
    if logits.shape[-1] == 1:
        raise BayesLoraError("the model has 1 output (a regression), but must have classes: use a classifier")


def predictive_nll(logits: Tensor, labels: Tensor) -> float:
    """Return the mean over examples of -log of the mean probability over samples, in nats, for (S, n, C) logits."""
    return float(predictive_loss(logits, labels))


def predictive_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return what `predictive_nll` returns, as a 0-d tensor with a gradient."""
    log_p = logits.log_softmax(dim=-1).logsumexp(dim=0) - math.log(len(logits))
    return nn.functional.nll_loss(log_p, labels)
