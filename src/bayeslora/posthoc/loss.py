r"""Answer only where the model is sure enough that the mean loss of the answers stays below a level.

The loss of an answer is between 0 and 1, such as 1 - F1. A row is answered if its uncertainty is below a threshold λ:
*with probability at least 1 - δ over the calibration rows, the expected loss of an answered row is at most r.*

As in `RiskControl`, λ is one of 20 thresholds, at which 5%, 10%, …, 100% of the calibration rows are answered, and the
largest share is taken whose p-value for "the expected loss exceeds r" is at most δ/20 (Learn then Test; Angelopoulos
et al., 2021, arXiv:2110.01052). With the mean loss $\hat R$ of the m answered rows, the p-value is Hoeffding's and
Bentkus's,

$$ p = \min\left(e^{-m\,h(\min(\hat R, r), r)},\; e\,P(\mathrm{Bin}(m, r) \le \lceil m \hat R \rceil)\right), \qquad
   h(a, b) = a \log\frac{a}{b} + (1 - a) \log\frac{1 - a}{1 - b}, $$

and if each loss is 0 or 1 the exact $P(\mathrm{Bin}(m, r) \le m \hat R)$.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import xlogy
from scipy.stats import binom

from bayeslora.errors import BayesLoraError
from bayeslora.posthoc.conformal import check_share
from bayeslora.posthoc.risk import SHARES, tested


@dataclass(frozen=True)
class LossThreshold:
    """The uncertainty below which rows are answered, and what that means for the calibration rows.

    Attributes:
        uncertainty: rows below it are answered; infinity answers all rows, minus infinity none.
        coverage: share of the calibration rows that are answered.
        risk: mean loss of the answered calibration rows; 0 if none is answered.
        rows: number of calibration rows.
    """

    uncertainty: float
    coverage: float
    risk: float
    rows: int


class LossControl:
    """Decides which answers to leave to a person, so that the mean loss of the others stays below a level.

    Args:
        uncertainty: (n,) uncertainty of the answers to calibration rows; larger means less sure.
        losses: (n,) losses of these answers, between 0 and 1.
        delta: probability, over calibration sets, that the level is exceeded.

    Raises:
        BayesLoraError: there are no rows, a value is not finite, or a loss is not between 0 and 1.
    """

    def __init__(self, uncertainty: ArrayLike, losses: ArrayLike, delta: float = 0.05) -> None:
        values, found = np.asarray(uncertainty, dtype=np.float64), np.asarray(losses, dtype=np.float64)
        if not (values.ndim == found.ndim == 1 and 0 < len(values) == len(found)):
            raise BayesLoraError(
                f"the shapes of uncertainty and losses are {values.shape} and {found.shape}, but must be (rows,), "
                "with at least 1 row: give a value of each for every row"
            )
        if not (np.isfinite(values).all() and ((found >= 0) & (found <= 1)).all()):
            raise BayesLoraError("an uncertainty is not finite or a loss not between 0 and 1, but must be: correct it")
        order = np.argsort(values, kind="stable")
        self.uncertainty: NDArray[np.float64] = values[order]
        self.losses: NDArray[np.float64] = found[order]
        self.delta = check_share("delta", delta)

    def threshold(self, risk: float) -> LossThreshold:
        """Return the highest tested threshold that keeps the risk; its uncertainty is minus infinity if none does.

        Raises:
            BayesLoraError: the risk is not between 0 and 1.
        """
        check_share("risk", risk)
        n = len(self.losses)
        for limit, answered in tested(self.uncertainty):
            if loss_p_value(self.losses[:answered], risk) <= self.delta / SHARES:
                return LossThreshold(limit, answered / n, float(self.losses[:answered].mean()), n)
        return LossThreshold(-math.inf, 0.0, 0.0, n)

    def ask_a_human(self, uncertainty: ArrayLike, risk: float) -> NDArray[np.bool_]:
        """Return (n,) booleans: True for rows whose uncertainty is at or above the threshold."""
        return np.asarray(uncertainty, dtype=np.float64) >= self.threshold(risk).uncertainty

    def lowest(self) -> float:
        """Return the lowest risk at which any calibration row is answered; 1 if there is no lower one."""
        return min((self._lowest(self.losses[:answered]) for _, answered in tested(self.uncertainty)), default=1.0)

    def _lowest(self, losses: NDArray[np.float64]) -> float:
        low, high = float(losses.mean()), 1.0
        for _ in range(30):  # halvings of the interval: to 1e-9
            middle = (low + high) / 2
            passes = 0 < middle < 1 and loss_p_value(losses, middle) <= self.delta / SHARES
            low, high = (low, middle) if passes else (middle, high)
        return high


def loss_p_value(losses: NDArray[np.float64], risk: float) -> float:
    """Return the p-value of "the expected loss exceeds `risk`" for independent losses (m,) between 0 and 1."""
    m, total = len(losses), float(losses.sum())
    if np.isin(losses, (0.0, 1.0)).all():
        return float(binom.cdf(total, m, risk))
    mean = min(total / m, risk)
    distance = xlogy(mean, mean / risk) + xlogy(1 - mean, (1 - mean) / (1 - risk))
    bentkus = math.e * binom.cdf(math.ceil(total), m, risk)
    return float(min(1.0, math.exp(-m * distance), bentkus))
