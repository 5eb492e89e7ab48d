"""Predictions of a run: the labels and their uncertainty."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bayeslora.prediction import Prediction


@dataclass(frozen=True)
class PredictedRow:
    """The prediction for one row.

    Attributes:
        label: name of the most probable class; the value for regression.
        probabilities: of each class, in the order of the run's `labels`; None for regression.
        entropy: of `probabilities` in nats; None for regression.
        expected_entropy: aleatoric part of the entropy, in nats; None for regression.
        mutual_information: epistemic part of the entropy, in nats; None for regression.
        std: standard deviation over the samples, for regression; None for classes.
    """

    label: str | float
    probabilities: list[float] | None = None
    entropy: float | None = None
    expected_entropy: float | None = None
    mutual_information: float | None = None
    std: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that `bayeslora predict` writes; `std` for regression only."""
        return {name: value for name, value in vars(self).items() if name != "std" or value is not None}


class Predictions(Sequence[PredictedRow]):
    """Predictions for n rows, in their order; indexed and iterated by row.

    Attributes:
        prediction: the underlying tensors, for calibration, conformal sets and metrics.
        labels: (n) names of the most probable classes; values for regression.
    """

    def __init__(self, prediction: Prediction, names: Sequence[str]) -> None:
        self.prediction = prediction
        self._regression = prediction.probabilities.shape[1] == 0
        found = prediction.labels.tolist()
        self.labels: list[str] | list[float] = found if self._regression else [names[index] for index in found]

    @property
    def probabilities(self) -> Tensor:
        """(n, C) in the order of the run's `labels`; (n, 0) for regression."""
        return self.prediction.probabilities

    @property
    def entropy(self) -> Tensor:
        """(n,) in nats; 0 for regression."""
        return self.prediction.entropy

    @property
    def expected_entropy(self) -> Tensor:
        """(n,) in nats, the aleatoric part of the entropy; 0 for regression."""
        return self.prediction.expected_entropy

    @property
    def mutual_information(self) -> Tensor:
        """(n,) in nats, the epistemic part of the entropy; 0 for regression and without samples."""
        return self.prediction.mutual_information

    def __len__(self) -> int:
        return len(self.prediction)

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[number] for number in range(*row.indices(len(self)))]
        label, prediction = self.labels[row], self.prediction
        if self._regression:
            return PredictedRow(label, std=float(prediction.std[row]))
        return PredictedRow(
            label,
            prediction.probabilities[row].tolist(),
            float(prediction.entropy[row]),
            float(prediction.expected_entropy[row]),
            float(prediction.mutual_information[row]),
        )

    def __iter__(self) -> Iterator[PredictedRow]:
        return (self[row] for row in range(len(self)))

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, self.labels[:3])) + (", …" if len(self) > 3 else "")
        return f"Predictions({len(self)} rows: {shown})"
