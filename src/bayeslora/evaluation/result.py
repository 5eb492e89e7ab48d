"""Scores of a classifier or a regression on a split, with the predictions behind them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bayeslora.evaluation import findings
from bayeslora.evaluation.uncertainty import by_correctness, histograms, risk_coverage_curve, uncertainties
from bayeslora.prediction import Prediction


@dataclass(frozen=True)
class Evaluation:
    """Scores of a model on a split, with its predictions and the labels, in the split's order.

    Attributes:
        scores: scores by name, the task's headline first.
        predictions: (n, C) class probabilities, averaged over samples; (n,) values for regression.
        labels: (n,) class ids or values.
        reliability: confidence bins as in metrics.json; empty for regression.
        seconds: wall time of the forward passes.
        entropy: (n,) entropy of the predictions, in nats; 0 for regression.
        mutual_information: (n,) the part of `entropy` due to disagreement of the samples, in nats; 0 without samples.
        samples: number of draws from the posterior for each prediction; 0 is the posterior mean.
        baseline: scores of the best constant prediction for these labels, from `metrics.baseline_scores`.
    """

    scores: dict[str, float]
    predictions: NDArray[np.float64]
    labels: NDArray[Any]
    reliability: list[dict[str, Any]]
    seconds: float
    entropy: NDArray[np.float64]
    mutual_information: NDArray[np.float64]
    samples: int = 0
    baseline: dict[str, float] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.labels)

    @property
    def expected_entropy(self) -> NDArray[np.float64]:
        """Aleatoric part (n,) of the entropy, in nats: the mean entropy of the samples' predictions."""
        return self.entropy - self.mutual_information

    @property
    def uncertainties(self) -> dict[str, NDArray[np.float64]]:
        """Measures of uncertainty, (n,) each, from `uncertainty.uncertainties`; {} for regression."""
        if self.predictions.ndim == 1:
            return {}
        return uncertainties(self.predictions, self.entropy, self.mutual_information)

    @property
    def risk_coverage(self) -> dict[str, list[float]]:
        """Error rate as a function of coverage, the most confident examples first, as in metrics.json."""
        if self.predictions.ndim == 1:
            return {}
        return risk_coverage_curve(self.uncertainties["max_probability"], ~self._correct)

    @property
    def findings(self) -> dict[str, Any]:
        """Confusion matrix and verdict, as in metrics.json."""
        of = findings.of_numbers if self.predictions.ndim == 1 else findings.of_classes
        return of(self.predictions, self.labels)

    def histograms(self, outside: Prediction | None = None) -> dict[str, dict[str, Any]]:
        """Return histograms of entropy and mutual information of `correct`, `wrong` and `ood` predictions.

        Args:
            outside: predictions for out-of-distribution inputs, by the same model with as many samples.
        """
        if self.predictions.ndim == 1:
            return {}
        groups = by_correctness(self.uncertainties, self._correct)
        if outside is not None:
            groups["ood"] = uncertainties_of(outside)
        return histograms(groups, self.predictions.shape[1])

    @property
    def _correct(self) -> NDArray[np.bool_]:
        return np.asarray(self.predictions.argmax(axis=1) == self.labels)


def uncertainties_of(prediction: Prediction) -> dict[str, NDArray[np.float64]]:
    """Return a classifier's measures of uncertainty; see `uncertainty.uncertainties`."""
    return uncertainties(
        prediction.probabilities.numpy(), prediction.entropy.numpy(), prediction.mutual_information.numpy()
    )
