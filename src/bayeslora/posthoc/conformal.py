r"""Conformal prediction: sets of labels, or intervals, that contain the truth as often as asked for.

A calibration set of n labelled rows, which the model was not trained on, gives n scores $s_i = s(x_i, y_i)$. A larger
score is a worse fit. Let $\hat q$ be the k-th smallest of them, $k = \lceil (n + 1)(1 - \alpha) \rceil$. A new row
from the same source then has (Vovk et al., 2005; Lei et al., 2018, arXiv:1604.04173)

$$ P(s(x, y) \le \hat q) \ge 1 - \alpha, $$

and at most $1 - \alpha + \tfrac{1}{n + 1}$ if no two scores are equal. This holds for every model, every n and every
distribution. The probability is over the calibration rows and the new row together. With one calibration set, the
share of new rows that are covered is random: without ties it has the distribution Beta(k, n + 1 - k). Where n is too
small, k > n, $\hat q$ is infinite and everything is in the set.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from bayeslora.errors import BayesLoraError, counted
from bayeslora.prediction import Prediction

Array = NDArray[np.float64]
SetScore = Literal["lac", "aps"]


def check_share(name: str, value: float) -> float:
    """Return `value`; raise `BayesLoraError` unless it is between 0 and 1."""
    if not 0 < value < 1:
        raise BayesLoraError(f"{name} is {value}, but must be between 0 and 1: give 0.9 for 90%")
    return value


def rank_of_quantile(rows: int, coverage: float) -> int:
    r"""Return $\lceil (n + 1)(1 - \alpha) \rceil$ for n calibration rows and the coverage $1 - \alpha$."""
    # 10 · 0.9 must stay 9 with floating-point numbers.
    return math.ceil((rows + 1) * coverage - 1e-9)


def conformal_quantile(scores: ArrayLike, coverage: float) -> float:
    """Return the score that a new row stays at or below with probability `coverage`; infinity if there are too few.

    Args:
        scores: (n,) of calibration rows.
        coverage: between 0 and 1.
    """
    ordered = np.sort(np.asarray(scores, dtype=np.float64))
    rank = rank_of_quantile(len(ordered), check_share("coverage", coverage))
    return float(ordered[rank - 1]) if rank <= len(ordered) else math.inf


class ConformalSets:
    r"""Conformal prediction for classes: sets of labels that contain the right one with probability `coverage`.

    | `score` | score of label k | size of the sets |
    |---|---|---|
    | `lac` | $1 - p_k$ (Sadinle et al., 2019, arXiv:1609.00451) | smallest on average |
    | `aps` | $\sum_{j: p_j > p_k} p_j + u\,p_k$ (Romano et al., 2020, arXiv:2006.02544) | larger for harder rows |

    A set holds the labels whose score is at most the quantile of the calibration scores. For `aps`, u is uniform in
    (0, 1) for each row if `randomized`, and otherwise 1. With u = 1, rows with equal probabilities have the same set,
    but with few classes many scores are 1, and the sets are larger. Of equal probabilities those of lower ids count as
    larger.

    Args:
        score: `lac` or `aps`.
        coverage: $1 - \alpha$; each call of `sets` can give another one.
        by_class: use a separate quantile for each class, so that the coverage holds within each class (Mondrian; Vovk,
            2012, arXiv:1209.2673). A class with too few calibration rows is in every set.
        randomized: whether u is random, for `aps`.
        allow_empty: leave a set empty if no label has a low enough score. By default such a set becomes the most
            probable label, which can only raise the coverage.
        seed: seed of u, which is a hash of it and of the row's prediction: a row has the same u in any call.
    """

    def __init__(
        self,
        score: SetScore = "lac",
        coverage: float = 0.9,
        by_class: bool = False,
        *,
        randomized: bool = True,
        allow_empty: bool = False,
        seed: int = 0,
    ) -> None:
        if score not in ("lac", "aps"):
            raise BayesLoraError(f"score is {score!r}, but must be lac or aps: give 'lac' for the smallest sets")
        self.score, self.coverage, self.by_class = score, check_share("coverage", coverage), by_class
        self.randomized, self.allow_empty, self.seed = randomized, allow_empty, seed
        self.scores: list[Array] = []
        """Sorted calibration scores of each class; empty before `fit`."""

    @property
    def rows(self) -> int:
        """Number of calibration rows."""
        return sum(map(len, self.scores))

    def fit(self, calibration: Prediction | ArrayLike, labels: ArrayLike) -> ConformalSets:
        """Keep the scores of labelled rows that the model was not trained on, and return self.

        Args:
            calibration: predictions made in the way that later ones will be, or (n, C) probabilities.
            labels: (n,) class ids.

        Raises:
            BayesLoraError: rows have several labels each, probabilities do not sum to 1, or labels are not class ids.
        """
        probabilities, ids = labelled_probabilities(calibration, labels)
        of_labels = self._of_classes(calibration, probabilities)[np.arange(len(ids)), ids]
        self.scores = [np.sort(of_labels[ids == number]) for number in range(probabilities.shape[1])]
        return self

    def thresholds(self, coverage: float | None = None) -> Array:
        """Return each class's threshold (C,): a label with a score up to it is in the set.

        With too few calibration rows, a threshold is infinite and a `UserWarning` is given.
        """
        wanted = self.coverage if coverage is None else check_share("coverage", coverage)
        if not self.scores:
            raise BayesLoraError("the sets lack calibration scores, but need them: call fit first")
        groups = self.scores if self.by_class else [np.concatenate(self.scores)]
        found = np.array([conformal_quantile(scores, wanted) for scores in groups])
        if np.isinf(found).any():
            what = f"{int(np.isinf(found).sum())} of {len(found)} labels are" if self.by_class else "all labels are"
            warnings.warn(_too_few(min(map(len, groups)), wanted, f"{what} in every set"), UserWarning, stacklevel=3)
        return found if self.by_class else np.full(len(self.scores), found)

    def sets(self, prediction: Prediction | ArrayLike, coverage: float | None = None) -> Tensor:
        """Return (n, C) booleans: True where the class is in the set of the row.

        A class that a row does not have (a logit of -inf) is not in its set.

        Args:
            prediction: prediction by the calibrated predictor, or (n, C) probabilities.
            coverage: coverage of the sets, by default that of the constructor.

        Raises:
            BayesLoraError: the calibration has another number of classes, or `fit` has not been called.
        """
        thresholds = self.thresholds(coverage)
        probabilities = class_probabilities(prediction)
        if probabilities.shape[1] != len(thresholds):
            raise BayesLoraError(
                f"the prediction has {probabilities.shape[1]} classes, but the calibration has {len(thresholds)}: "
                "use the model that was calibrated"
            )
        chosen = self._of_classes(prediction, probabilities) <= thresholds
        if isinstance(prediction, Prediction):
            chosen &= ~torch.isneginf(prediction.logits).numpy()
        if not self.allow_empty:
            empty = ~chosen.any(axis=1)
            chosen[empty, probabilities[empty].argmax(axis=1)] = True
        return torch.from_numpy(chosen)

    def _of_classes(self, prediction: Prediction | ArrayLike, probabilities: Array) -> Array:
        """Return the score (n, C) of every class."""
        if self.score == "lac":
            return 1 - probabilities
        u = np.ones(len(probabilities))
        if self.randomized:  # by logits, where there are any: they still differ where probabilities are all 0 and 1
            told_apart = prediction.logits.numpy() if isinstance(prediction, Prediction) else probabilities
            u = _uniform(np.ascontiguousarray(told_apart), self.seed)
        order = np.argsort(-probabilities, axis=1, kind="stable")
        ranked = np.take_along_axis(probabilities, order, axis=1)
        scores = np.empty_like(ranked)
        np.put_along_axis(scores, order, np.cumsum(ranked, axis=1) - ranked + u[:, None] * ranked, axis=1)
        return scores


class ConformalIntervals:
    r"""Conformal prediction for regression: intervals that contain the true value with probability `coverage`.

    The score is $|y - \hat y|$, so all intervals have the same width. With `scaled` it is $|y - \hat y| / \sigma$,
    σ being the standard deviation of the samples (Lei et al., 2018): intervals are wider where the samples disagree.

    Args:
        coverage: $1 - \alpha$; each call of `intervals` can give another one.
        scaled: divide the score by the standard deviation of the samples.
    """

    def __init__(self, coverage: float = 0.9, scaled: bool = False) -> None:
        self.coverage, self.scaled = check_share("coverage", coverage), scaled
        self.scores: Array = np.empty(0)
        """Sorted calibration scores; empty before `fit`."""

    @property
    def rows(self) -> int:
        """Number of calibration rows."""
        return len(self.scores)

    def fit(self, calibration: Prediction | ArrayLike, labels: ArrayLike) -> ConformalIntervals:
        """Keep the scores of labelled rows that the model was not trained on, and return self.

        Args:
            calibration: predictions made in the way that later ones will be, or (unless `scaled`) n predicted values.
            labels: (n,) true values.

        Raises:
            BayesLoraError: the prediction is a classifier's, lacks a standard deviation, or does not fit the labels,
                or a label is not finite.
        """
        values, scale = self._read(calibration)
        truth = np.asarray(labels, dtype=np.float64).reshape(-1)
        if len(truth) != len(values) or not len(truth):
            raise BayesLoraError(
                f"got {counted(len(values), 'prediction')} for {counted(len(truth), 'label')}, but each "
                "needs one: give as many"
            )
        if not np.isfinite(truth).all():
            raise BayesLoraError("a label is nan or infinite, but must be a number: leave such rows out")
        self.scores = np.sort(np.abs(truth - values) / scale)
        return self

    def intervals(self, prediction: Prediction | ArrayLike, coverage: float | None = None) -> Tensor:
        """Return lower and upper bounds (n, 2); infinite, with a `UserWarning`, if there are too few calibration rows.

        Args:
            prediction: prediction by the calibrated predictor, or (unless `scaled`) n predicted values.
            coverage: coverage of the intervals, by default that of the constructor.
        """
        wanted = self.coverage if coverage is None else check_share("coverage", coverage)
        if not self.rows:
            raise BayesLoraError("the intervals lack calibration scores, but need them: call fit first")
        values, scale = self._read(prediction)
        half = conformal_quantile(self.scores, wanted) * scale
        if np.isinf(half).any():
            warnings.warn(_too_few(self.rows, wanted, "the intervals have no bounds"), UserWarning, stacklevel=2)
        return torch.from_numpy(np.stack([values - half, values + half], axis=1))

    def _read(self, prediction: Prediction | ArrayLike) -> tuple[Array, Array]:
        """Return the predicted numbers and what scores are divided by, (n,) each."""
        if not isinstance(prediction, Prediction):
            if self.scaled:
                raise BayesLoraError("numbers are given, but scaled needs their deviations too: give a Prediction")
            values = np.asarray(prediction, dtype=np.float64).reshape(-1)
            return values, np.ones_like(values)
        if prediction.probabilities.shape[1]:
            raise BayesLoraError("the prediction is of classes, but intervals need numbers: use ConformalSets")
        values, deviation = prediction.labels.numpy(), prediction.std.numpy()
        if self.scaled and not (deviation > 0).all():
            raise BayesLoraError(
                f"the standard deviation is 0 for {int((deviation <= 0).sum())} of {len(values)} rows, but must be "
                "positive for scaled intervals: predict with samples, or leave scaled out"
            )
        return values, deviation if self.scaled else np.ones_like(values)


def labelled_probabilities(prediction: Prediction | ArrayLike, labels: ArrayLike) -> tuple[Array, NDArray[np.int64]]:
    """Return (n, C) probabilities and (n,) class ids, checked.

    Raises:
        BayesLoraError: rows have several labels each, labels are not class ids, or the probabilities cannot be used.
    """
    probabilities = class_probabilities(prediction)
    given: Any = np.asarray(labels)
    if given.ndim != 1:
        raise BayesLoraError(
            f"the labels have shape {given.shape}, but must be (n,), one class id a row: tasks with several labels a "
            "row are not supported"
        )
    if len(given) != len(probabilities) or not len(given):
        raise BayesLoraError(
            f"got {counted(len(probabilities), 'prediction')} for {counted(len(given), 'label')}, but "
            "each needs one: give as many, and at least one"
        )
    ids = given.astype(np.int64)
    if (ids != given).any() or ids.min() < 0 or ids.max() >= probabilities.shape[1]:
        raise BayesLoraError(
            f"the labels run from {given.min()} to {given.max()}, but must be class ids from 0 to "
            f"{probabilities.shape[1] - 1}: use the labels that the model was trained with"
        )
    return probabilities, ids


def class_probabilities(prediction: Prediction | ArrayLike) -> Array:
    """Return (n, C) probabilities of a classifier, float64.

    Raises:
        BayesLoraError: the prediction is of numbers, or rows do not sum to 1, as those of several labels a row.
    """
    if isinstance(prediction, Prediction) and prediction.labels.ndim == 2:
        raise BayesLoraError(
            "the prediction has several labels a row, but this needs one of several classes: decide each label by its "
            "column of probabilities"
        )
    found = prediction.probabilities.numpy() if isinstance(prediction, Prediction) else prediction
    probabilities = np.asarray(found, dtype=np.float64)
    if probabilities.ndim != 2 or probabilities.shape[1] < 2:
        raise BayesLoraError(
            f"the probabilities have shape {probabilities.shape}, but must be (n, classes) with at least 2 classes: "
            "give a classifier's prediction, and ConformalIntervals that of a regression"
        )
    sums = probabilities.sum(axis=1)
    wrong = ~(np.abs(sums - 1) <= 1e-3)  # also where a sum is NaN
    if wrong.any():
        raise BayesLoraError(
            f"a row of probabilities sums to {sums[wrong][0]:.3g}, but must sum to 1: tasks with several labels a row "
            "are not supported"
        )
    return probabilities


def _uniform(rows: NDArray[Any], seed: int) -> Array:
    """Return a number in [0, 1) for each row (n, …), by a hash of its bytes."""
    key = str(seed).encode()
    hashes = b"".join(hashlib.blake2b(row.tobytes(), digest_size=8, key=key).digest() for row in rows)
    return (np.frombuffer(hashes, dtype="<u8") >> np.uint64(11)) / 2.0**53


def _too_few(rows: int, coverage: float, consequence: str) -> str:
    least = math.ceil(coverage / (1 - coverage) - 1e-9)
    return f"{rows} calibration rows are too few for a coverage of {coverage:g} (at least {least}): {consequence}"
