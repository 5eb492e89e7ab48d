"""Calibration maps with more freedom than a temperature, for a finished classifier: vector scaling and isotonic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from scipy.optimize import minimize
from sklearn.isotonic import IsotonicRegression
from torch import Tensor

from bayeslora.errors import BayesLoraError
from bayeslora.posthoc.temperature import CalibrationMap, check_classes, predictive_loss
from bayeslora.prediction import Predictable

_LEAST_ROWS = 10
"""Fewest held-out rows of each class: with fewer the maps fit the rows and not the model's errors."""


class VectorScaling(CalibrationMap):
    r"""Predictor that scales and shifts the logit of each class (Guo et al., 2017, arXiv:1706.04599).

    $$ z'_c = w_c z_c + b_c, \qquad w_c > 0, \quad \textstyle\sum_c b_c = 0 $$

    Unlike a temperature, this corrects classes that are predicted too often, and may change the most probable class.
    With samples, it maps the logits of each sample.

    `fit` maximizes the likelihood of held-out labels. It needs at least 10 rows of each class, and at least one row
    that is predicted wrongly.

    Args:
        model: a model or another predictor.

    Attributes:
        weight, bias: w and b, (C,) float64; None before `fit`.
    """

    bounds = (0.02, 50.0)
    """Smallest and largest factor that `fit` tries; the largest also bounds the size of the offsets."""

    weight: Tensor | None = None
    bias: Tensor | None = None

    def check_samples(self, samples: int) -> None:
        _check_fitted(self, self.weight)
        super().check_samples(samples)

    def mapped(self, logits: Tensor) -> Tensor:
        assert self.weight is not None and self.bias is not None  # check_samples
        return _affine(logits.to("cpu", torch.float64), self.weight, self.bias)

    def fit_logits(self, outputs: Tensor, labels: Tensor) -> Self:
        _check_rows(outputs, labels)
        classes = outputs.shape[2]

        def objective(values: np.ndarray) -> tuple[float, np.ndarray]:
            both = torch.tensor(values, requires_grad=True)
            loss = predictive_loss(_affine(outputs, both[:classes], both[classes:] - both[classes:].mean()), labels)
            (gradient,) = torch.autograd.grad(loss, both)
            return float(loss.detach()), gradient.numpy()

        low, high = self.bounds
        limits = [(low, high)] * classes + [(-high, high)] * classes
        start = np.concatenate([np.ones(classes), np.zeros(classes)])
        best = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=limits).x
        loss, smaller = objective(best)[0], best * np.repeat([0.5, 1.0], classes)
        # Where every row is right, larger factors are always likelier, if ever less so; huge logits need smaller ones.
        if np.abs(best).max() > 0.999 * high or objective(2 * best)[0] <= loss or objective(smaller)[0] < loss - 0.001:
            raise BayesLoraError(
                f"the best factors and offsets for the {len(labels)} held-out examples are beyond a bound, but "
                f"factors must be inside {self.bounds} and offsets below {high:g}: use more examples, or others"
            )
        found = torch.from_numpy(best)
        self.weight, self.bias = found[:classes], found[classes:] - found[classes:].mean()
        return self

    @property
    def numbers(self) -> dict[str, Any]:
        _check_fitted(self, self.weight)
        assert self.weight is not None and self.bias is not None
        return {"weight": self.weight.tolist(), "bias": self.bias.tolist()}

    @classmethod
    def from_numbers(cls, model: Predictable, numbers: Mapping[str, Any]) -> Self:
        found = cls(model)
        found.weight, found.bias = (torch.tensor(numbers[name], dtype=torch.float64) for name in ("weight", "bias"))
        return found


class IsotonicCalibration(CalibrationMap):
    """Predictor that maps the probability of each class by a non-decreasing function and renormalizes the result.

    Each class has its own function: an isotonic regression of "is it this class?" on the probability (Zadrozny and
    Elkan, 2002). It can have any shape, and needs more rows than a temperature: some hundreds, with 10 of each class.
    Its values stay 1 / (n + 2) away from 0 and 1, so that one mistake does not make the likelihood zero. Rows on a
    flat part get equal probabilities, so the order of predictions by confidence, and with it AURC, becomes coarser.

    Samples are averaged before they are mapped, so the result has no mutual information.

    Args:
        model: a model or another predictor.

    Attributes:
        maps: the C fitted regressions; empty before `fit`.
    """

    maps: Sequence[IsotonicRegression] = ()

    def check_samples(self, samples: int) -> None:
        _check_fitted(self, self.maps or None)
        super().check_samples(samples)

    def mapped(self, logits: Tensor) -> Tensor:
        p = logits.to("cpu", torch.float64).softmax(dim=-1).mean(dim=0).numpy()
        if p.shape[1] != len(self.maps):
            raise BayesLoraError(
                f"the model has {p.shape[1]} classes, but was fitted with {len(self.maps)}: fit again"
            )
        found = np.stack([each.predict(p[:, c]) for c, each in enumerate(self.maps)], axis=1)
        # A class that a row lacks has probability 0, and keeps it.
        return torch.from_numpy(np.where(p > 0, found, 0.0)).log().unsqueeze(0)

    def fit_logits(self, outputs: Tensor, labels: Tensor) -> Self:
        _check_rows(outputs, labels)
        p, is_class = outputs.softmax(dim=-1).mean(dim=0).numpy(), labels.numpy()
        edge = 1 / (len(labels) + 2)
        self.maps = [
            IsotonicRegression(y_min=edge, y_max=1 - edge, out_of_bounds="clip").fit(p[:, c], is_class == c)
            for c in range(p.shape[1])
        ]
        return self

    @property
    def numbers(self) -> dict[str, Any]:
        """Return the fitted numbers, for JSON and `from_numbers`: the corners of each class's function."""
        _check_fitted(self, self.maps or None)
        return {"maps": [{"x": m.X_thresholds_.tolist(), "y": m.y_thresholds_.tolist()} for m in self.maps]}

    @classmethod
    def from_numbers(cls, model: Predictable, numbers: Mapping[str, Any]) -> Self:
        found = cls(model)
        # The corners rise, so that a fit to them goes through each.
        found.maps = [IsotonicRegression(out_of_bounds="clip").fit(m["x"], m["y"]) for m in numbers["maps"]]
        return found


def _check_rows(outputs: Tensor, labels: Tensor) -> None:
    """Refuse held-out rows with fewer than 10 of a class."""
    check_classes(outputs)
    classes = outputs.shape[2]
    counts = torch.bincount(labels, minlength=classes)
    if len(counts) > classes or int(counts.min()) < _LEAST_ROWS:
        rarest = int(counts.argmin())
        raise BayesLoraError(
            f"{int(counts[rarest])} of the {len(labels)} held-out rows are of class {rarest}, but each of the "
            f"{classes} classes needs at least {_LEAST_ROWS}: give more rows, or use TemperatureScaling"
        )


def _affine(logits: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return w z + b by class; the logit -inf of a class that a row lacks stays, and has no gradient."""
    absent = torch.isneginf(logits)
    return (logits.masked_fill(absent, 0.0) * weight + bias).masked_fill(absent, -math.inf)


def _check_fitted(predictor: object, fitted: object) -> None:
    if fitted is None:
        raise BayesLoraError(f"{type(predictor).__name__} is not fitted, but must be: call fit with held-out data")
