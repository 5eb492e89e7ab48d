"""Predictions of a run: the labels and their uncertainty."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from bayeslora.errors import counted
from bayeslora.prediction import Prediction


@dataclass(frozen=True)
class PredictedRow:
    """The prediction for one row.

    Attributes:
        label: name of the most probable class; for regression the predicted value; for a multi-label run the list of
            labels whose probability is above one half.
        probabilities: probability of each class, in the order of the run's `labels`; None for regression.
        entropy: entropy of `probabilities` in nats; None for regression; one number per label for a multi-label run.
        expected_entropy: aleatoric part of `entropy`, in the same form.
        mutual_information: epistemic part of `entropy`, in the same form.
        std: standard deviation over the samples, for regression; None for classes.
        set: names of the labels in the conformal set, if a coverage was given; otherwise None.
        interval: lower and upper bound of a regression, if a coverage was given; None stands for an infinite bound.
        ask_a_human: whether a person should decide, if a risk was given; otherwise None.
    """

    label: str | float | list[str]
    probabilities: list[float] | None = None
    entropy: float | list[float] | None = None
    expected_entropy: float | list[float] | None = None
    mutual_information: float | list[float] | None = None
    std: float | None = None
    set: list[str] | None = None
    interval: list[float | None] | None = None
    ask_a_human: bool | None = None

    @property
    def confidence(self) -> float | None:
        """Probability of `label`; for a multi-label run the smallest max(p, 1 - p) of a label; None for regression."""
        if self.probabilities is None:
            return None
        if isinstance(self.label, list):
            return min(max(p, 1 - p) for p in self.probabilities)
        return max(self.probabilities)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name; `std` and the fields after it are left out if they are None."""
        optional = ("std", "set", "interval", "ask_a_human")
        return {name: value for name, value in vars(self).items() if name not in optional or value is not None}


@dataclass
class Decisions:
    """Decisions for n rows; a kind of decision that was not asked for is an empty list.

    Attributes:
        sets: conformal set of each row, as names of labels.
        intervals: lower and upper bound of each row; None stands for an infinite bound.
        ask_a_human: for each row, whether a person should decide it.
    """

    sets: list[list[str]] = field(default_factory=list)
    intervals: list[list[float | None]] = field(default_factory=list)
    ask_a_human: list[bool] = field(default_factory=list)

    def of(self, row: int) -> dict[str, Any]:
        """Return the decisions about one row, by the names of the fields of `PredictedRow`."""
        columns: dict[str, list[Any]] = {"set": self.sets, "interval": self.intervals, "ask_a_human": self.ask_a_human}
        return {name: values[row] for name, values in columns.items() if values}


class Predictions(Sequence[PredictedRow]):
    """Predictions for n rows, in the order of the input: a sequence of `PredictedRow`.

    Attributes:
        prediction: the underlying tensors, for calibration, conformal sets and metrics.
        labels: n names of the most probable classes; values for regression; lists of names for a multi-label run.
        decisions: conformal sets and `ask_a_human`, if they were asked for.
    """

    def __init__(self, prediction: Prediction, names: Sequence[str], decisions: Decisions | None = None) -> None:
        self.prediction, self.decisions = prediction, decisions or Decisions()
        self._names = list(names)
        self._regression = prediction.probabilities.shape[1] == 0
        found = prediction.labels.tolist()
        self.labels: list[str] | list[float] | list[list[str]]
        if self._regression:
            self.labels = found
        elif prediction.labels.ndim == 2:
            self.labels = [[name for name, has in zip(names, row, strict=True) if has] for row in found]
        else:
            self.labels = [names[index] for index in found]

    @property
    def probabilities(self) -> Tensor:
        """Class probabilities (n, C), in the order of the run's `labels`; (n, 0) for regression."""
        return self.prediction.probabilities

    @property
    def entropy(self) -> Tensor:
        """Entropy (n,) in nats; 0 for regression; (n, C) for a multi-label run, like its two parts below."""
        return self.prediction.entropy

    @property
    def expected_entropy(self) -> Tensor:
        """Aleatoric part (n,) of the entropy in nats; 0 for regression."""
        return self.prediction.expected_entropy

    @property
    def mutual_information(self) -> Tensor:
        """Epistemic part (n,) of the entropy in nats; 0 for regression and without samples."""
        return self.prediction.mutual_information

    def __len__(self) -> int:
        return len(self.prediction)

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[number] for number in range(*row.indices(len(self)))]
        label, prediction, decided = self.labels[row], self.prediction, self.decisions.of(row)
        if self._regression:
            return PredictedRow(label, std=float(prediction.std[row]), **decided)
        return PredictedRow(
            label,
            prediction.probabilities[row].tolist(),
            prediction.entropy[row].tolist(),
            prediction.expected_entropy[row].tolist(),
            prediction.mutual_information[row].tolist(),
            **decided,
        )

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield what `bayeslora predict` writes for each row: `to_dict`, plus the confidence and the label names.

        Label names are the keys of `probabilities`, and for a multi-label run also of the entropies.
        """
        several = self.prediction.labels.ndim == 2
        by_label = ("probabilities", *(("entropy", "expected_entropy", "mutual_information") if several else ()))
        for row in self:
            found = {"label": row.label, "confidence": row.confidence, **row.to_dict()}
            named = {name: found[name] and dict(zip(self._names, found[name], strict=True)) for name in by_label}
            yield {**found, **named}

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, self.labels[:3])) + (", …" if len(self) > 3 else "")
        return f"Predictions({counted(len(self), 'row')}: {shown})"
