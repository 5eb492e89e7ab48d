"""A map of a run's probabilities (temperature, vector scaling, isotonic) as numbers that `conformal.json` holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bayeslora.errors import BayesLoraError
from bayeslora.posthoc.calibrators import IsotonicCalibration, VectorScaling
from bayeslora.posthoc.temperature import TemperatureScaling
from bayeslora.prediction import Predictable

ScalingName = Literal["temperature", "vector", "isotonic"]
SCALINGS: tuple[ScalingName, ...] = get_args(ScalingName)
Calibrator = TemperatureScaling | VectorScaling | IsotonicCalibration
_CLASSES: dict[ScalingName, type[Calibrator]] = {
    "temperature": TemperatureScaling,
    "vector": VectorScaling,
    "isotonic": IsotonicCalibration,
}
_SPLIT = 0x53504C
"""Stream of the random numbers of `halves`, independent of others with the same seed."""


@dataclass(frozen=True)
class Scaling:
    """A fitted map of probabilities.

    Attributes:
        name: kind of map: `temperature`, `vector` or `isotonic`.
        rows: number of rows that the map was fitted on.
        numbers: fitted numbers, as JSON holds them: `temperature`; `weight` and `bias`; or `maps`.
    """

    name: ScalingName
    rows: int
    numbers: dict[str, Any]

    @classmethod
    def fitted(cls, name: ScalingName, model: Predictable, logits: Tensor, labels: Tensor) -> Scaling:
        """Fit the map to held-out rows.

        Args:
            name: kind of map: `temperature`, `vector` or `isotonic`.
            model: a model or another predictor.
            logits: (S, n, C) logits of the model's samples, as `sampled_logits` returns them.
            labels: (n,) class ids.

        Raises:
            BayesLoraError: the name is unknown, or there are too few rows to fit the map.
        """
        return cls(name, len(labels), _class_of(name)(model).fit_logits(logits, labels).numbers)

    def around(self, model: Predictable) -> Calibrator:
        """Return `model` wrapped in the map, as a predictor."""
        return _class_of(self.name).from_numbers(model, self.numbers)

    def __str__(self) -> str:
        if self.name == "temperature":
            return f"temperature {self.numbers['temperature']:.4g}"
        return "vector scaling" if self.name == "vector" else "isotonic map"


def halves(rows: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split rows at random in two: the numbers of those for the map, and of the others, at least as many."""
    order = np.random.default_rng([seed, _SPLIT]).permutation(rows)
    return np.sort(order[: rows // 2]), np.sort(order[rows // 2 :])


def _class_of(name: ScalingName) -> type[Calibrator]:
    if name not in _CLASSES:
        raise BayesLoraError(
            f"scaling is {name!r}, but must be {', '.join(SCALINGS[:-1])} or {SCALINGS[-1]}: name one"
        )
    return _CLASSES[name]
