r"""Answer only where the model is sure enough that errors stay below a level; leave the other rows to a person.

A row is answered if the confidence, the probability of the predicted class, is above a threshold λ. Which errors stay
below the level r is one of two things, each with the guarantee of its sentence:

- `of="answers"`: *with probability at least 1 - δ over the calibration rows, at most a share r of the answers is
  wrong*, $P(\text{wrong} \mid \text{confidence} > λ) \le r$. For j = 1, …, 20, let λ be the confidence of the
  calibration row at which the j/20 surest rows end. Given λ, the m rows above it are independent draws, so the number
  k of errors among them is binomial, and $P(\mathrm{Bin}(m, r) \le k)$ is a p-value for "the error rate exceeds r".
  The largest share with a p-value of at most δ/20 is answered. With 20 tests at this level (Bonferroni), the
  probability that any of them errs is at most δ (Learn then Test; Angelopoulos et al., 2021, arXiv:2110.01052). The
  upper Clopper-Pearson bound of the error rate at level 1 - δ/20 is at most r exactly where the test passes.
- `of="rows"`: *of all rows, the expected share of those that are answered and wrong is at most r*. λ is the smallest
  with $(\text{errors above } λ + 1) / (n + 1) \le r$ (conformal risk control; Angelopoulos et al., 2022,
  arXiv:2208.02814). The expectation is over the calibration rows, too. A model with fewer errors answers all rows.

Both hold for every model, if calibration rows and new rows come from the same source.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.stats import beta, binom
from torch import Tensor

from bayeslora.errors import BayesLoraError
from bayeslora.posthoc.conformal import check_share, class_probabilities, labelled_probabilities
from bayeslora.prediction import Prediction

SHARES = 20
"""Number of shares of rows that are tested: 5%, 10%, …, 100%."""
ALL, NONE = 0.0, 2.0
"""Thresholds that every confidence is above, and that none is above."""


@dataclass(frozen=True)
class Threshold:
    """The confidence above which rows are answered, and what that means for the calibration rows.

    Attributes:
        confidence: rows above it are answered; 0 answers all rows, 2 none.
        coverage: share of the calibration rows that are answered.
        risk: error rate of the answered calibration rows; 0 if none is answered.
        rows: number of calibration rows.
    """

    confidence: float
    coverage: float
    risk: float
    rows: int


class RiskControl:
    """Decides which rows to leave to a person, so that the errors in the others stay below a level.

    By default, at most a share `risk` of the answers is wrong, with probability 1 - `delta` over calibration sets.

    Args:
        risk: the level, between 0 and 1; each call can give another one.
        of: `answers` (default) bounds the error rate among the answered rows, with probability 1 - `delta`; `rows`
            bounds the expected share of all rows that are answered and wrong.
        delta: probability, over calibration sets, that the bound of `answers` does not hold.
    """

    def __init__(self, risk: float = 0.05, of: Literal["answers", "rows"] = "answers", delta: float = 0.05) -> None:
        if of not in ("answers", "rows"):
            raise BayesLoraError(f"of is {of!r}, but must be answers or rows: give 'answers'")
        self.risk, self.of, self.delta = check_share("risk", risk), of, check_share("delta", delta)
        self.confidence: NDArray[np.float64] = np.empty(0)
        """Confidence of the calibration rows, from the surest down; empty before `fit`."""
        self.wrong: NDArray[np.bool_] = np.empty(0, dtype=bool)
        """Whether the predicted class of each of these rows is wrong; empty before `fit`."""

    def fit(self, calibration: Prediction | ArrayLike, labels: ArrayLike) -> RiskControl:
        """Keep confidence and errors of labelled rows that the model was not trained on, and return self.

        Args:
            calibration: predictions made in the way that later ones will be, or (n, C) probabilities.
            labels: (n,) class ids.
        """
        probabilities, ids = labelled_probabilities(calibration, labels)
        confidence = probabilities.max(axis=1)
        order = np.argsort(-confidence, kind="stable")
        self.confidence, self.wrong = confidence[order], (probabilities.argmax(axis=1) != ids)[order]
        return self

    def threshold(self, risk: float | None = None) -> Threshold:
        """Return the lowest threshold that keeps the risk; its `confidence` is 2 if none does.

        Raises:
            BayesLoraError: `fit` has not been called, or the risk is not between 0 and 1.
        """
        level = self.risk if risk is None else check_share("risk", risk)
        if not len(self.confidence):
            raise BayesLoraError("the risk control lacks calibration rows, but needs them: call fit first")
        chosen = self._of_answers(level) if self.of == "answers" else self._of_rows(level)
        answered = self.confidence > chosen
        errors = self.wrong[answered]
        rate = float(errors.mean()) if len(errors) else 0.0
        return Threshold(chosen, float(answered.mean()), rate, len(answered))

    def ask_a_human(self, prediction: Prediction | ArrayLike, risk: float | None = None) -> Tensor:
        """Return (n,) booleans: True for rows whose confidence is at or below the threshold."""
        confidence = class_probabilities(prediction).max(axis=1)
        return torch.from_numpy(confidence <= self.threshold(risk).confidence)

    def lowest(self) -> float:
        """Return the lowest risk at which any calibration row is answered; 1 if there is no lower one.

        With this model and this number of rows, no threshold keeps a lower risk.
        """
        if self.of == "rows":
            surest = self.confidence == self.confidence.max(initial=0)
            return min(1.0, float(self.wrong[surest].sum() + 1) / (len(self.confidence) + 1))
        sums = [(int(self.wrong[:answered].sum()), answered) for _, answered in tested(-self.confidence)]
        bounds = (beta.ppf(1 - self.delta / SHARES, wrong + 1, rows - wrong) for wrong, rows in sums if wrong < rows)
        return float(min(bounds, default=1.0))

    def _of_answers(self, level: float) -> float:
        for limit, answered in tested(-self.confidence):
            if binom.cdf(self.wrong[:answered].sum(), answered, level) <= self.delta / SHARES:
                return max(ALL, -limit)
        return NONE

    def _of_rows(self, level: float) -> float:
        allowed = math.floor(level * (len(self.confidence) + 1) - 1 + 1e-9)
        if allowed < 0:
            return NONE
        errors = self.confidence[self.wrong]
        return float(errors[allowed]) if allowed < len(errors) else ALL


def tested(uncertainty: NDArray[np.float64]) -> Iterator[tuple[float, int]]:
    """Yield the thresholds that are tested, from the highest down, and how many rows are below each.

    Args:
        uncertainty: (n,) of the calibration rows, in ascending order.
    """
    n = len(uncertainty)
    for share in range(SHARES, 0, -1):
        first_left_out = n * share // SHARES
        limit = float(uncertainty[first_left_out]) if first_left_out < n else math.inf
        if answered := int(np.searchsorted(uncertainty, limit, side="left")):
            yield limit, answered
