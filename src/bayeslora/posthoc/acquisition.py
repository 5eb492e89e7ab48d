r"""Choose the rows to label next (active learning).

`mutual_information` is BALD (Houlsby et al., 2011, arXiv:1112.5745): it takes rows on which the draws of the weights
are sure of different labels. The best rows are often alike, and after the label of one, those of the others tell
little. Rows are therefore chosen one after another: each is worth its mutual information $I_i$ times the share of its
disagreement that the rows chosen before leave open,

$$ I_i \cdot \operatorname{tr}(D_i M^{-1} D_i^\top), \qquad
M = 1 + \tfrac{1}{\varepsilon} \textstyle\sum_{j \text{ chosen}} D_j^\top D_j. $$

The C × S matrix $D_i$ holds the deviations $(p_{ik}^s - \bar p_{ik}) / \sqrt{\bar p_{ik}}$ of S draws from their mean,
divided by its norm. The trace is the variance left in a Gaussian model in which a chosen row shows its deviations with
a relative noise of ε. It is 1 for the first row, so that this is the one of BALD, near ε for a duplicate of a chosen
row, and 1 for a row on which other draws deviate. The joint mutual information of the batch (BatchBALD; Kirsch et al.,
2019, arXiv:1906.08158) would take the labels of duplicates as independent; its cost grows exponentially, and at log S
further rows are worth nothing.

A sentence whose words are tagged is worth the mean over its W words, so that long ones are not taken for their length
(as Shen et al., 2018, arXiv:1707.05928, normalize theirs). Its $I_i$ is the mean mutual information, and its $D_i$ has
those of the words below each other, each times the root of its word's share of the information.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bayeslora.errors import BayesLoraError, counted
from bayeslora.posthoc.conformal import class_probabilities
from bayeslora.prediction import Prediction

SelectionScore = Literal["mutual_information", "entropy", "margin", "random"]
NOISE = 0.1
"""ε, the relative noise with which a chosen row shows how the draws deviate."""


def select_rows(
    prediction: Prediction,
    budget: int,
    score: SelectionScore = "mutual_information",
    seed: int = 0,
    rows: ArrayLike | None = None,
) -> list[int]:
    """Return the indices of the rows to label next, in order of priority.

    Args:
        prediction: predictions for n unlabelled rows; `mutual_information` needs at least 2 samples and
            `per_sample=True`.
        budget: number of rows to choose, at most n; with `rows`, number of sentences.
        score: `mutual_information`, large and from rows that differ from each other; `entropy`, the largest first;
            `margin`, the smallest difference between the two most probable classes first; or `random`.
        seed: seed for `random`.
        rows: (n,) sentence number of each predicted word, from 0 and in order, as `bayeslora.data.word_rows` returns
            it. Sentences are then chosen instead of words, by the mean score of their words.

    Raises:
        BayesLoraError: the prediction is a regression, has fewer rows than `budget`, or lacks samples.
    """
    probabilities = class_probabilities(prediction)
    of_row = np.arange(len(probabilities)) if rows is None else np.asarray(rows, dtype=np.int64)
    if len(of_row) != len(probabilities) or of_row[0] or not np.isin(np.diff(of_row), (0, 1)).all():
        raise BayesLoraError(
            f"rows has {counted(len(of_row), 'number')} for {counted(len(probabilities), 'prediction')}, but needs "
            "one for each, from 0 and in order: give word_rows of the encoded sentences"
        )
    count = int(of_row[-1]) + 1
    if isinstance(budget, bool) or not 1 <= budget <= count:
        raise BayesLoraError(f"budget is {budget}, but must be from 1 to {count}, the number of rows: give fewer")
    if score == "mutual_information":
        return _spread(prediction, budget, of_row)
    if score == "random":
        keys = np.random.default_rng(seed).permutation(count).astype(np.float64)
    elif score == "entropy":
        keys = -row_means(prediction.entropy, of_row)
    elif score == "margin":
        ordered = np.sort(probabilities, axis=1)
        keys = row_means(ordered[:, -1] - ordered[:, -2], of_row)
    else:
        raise BayesLoraError(
            f"score is {score!r}, but must be mutual_information, entropy, margin or random: give one of these"
        )
    return [int(row) for row in np.argsort(keys, kind="stable")[:budget]]


def row_means(values: ArrayLike, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the mean of (n,) values of words over each sentence; `rows` are the numbers of the words' sentences."""
    return np.asarray(np.bincount(rows, weights=values) / np.bincount(rows), dtype=np.float64)


def _spread(prediction: Prediction, budget: int, rows: NDArray[np.int64]) -> list[int]:
    """Choose by mutual information; of rows that are worth the same, the first."""
    if prediction.sample_probabilities is None or len(prediction.sample_probabilities) < 2:
        raise BayesLoraError(
            "the prediction lacks the probabilities of 2 or more samples, but mutual_information needs them: predict "
            "with samples=10 and per_sample=True, or choose by entropy"
        )
    information = prediction.mutual_information.numpy()
    worth = row_means(information, rows)
    whole = (worth * np.bincount(rows))[rows]
    shares = np.divide(information, whole, out=np.zeros_like(whole), where=whole > 0).clip(0)
    directions = _deviations(prediction.sample_probabilities.numpy()) * np.sqrt(shares)[:, None, None]
    firsts = np.searchsorted(rows, np.arange(len(worth) + 1))
    precision = np.eye(directions.shape[2])
    chosen: list[int] = []
    for _ in range(budget):
        left = np.bincount(rows, np.einsum("ncs,ncs->n", directions @ np.linalg.inv(precision), directions))
        # A row on which all samples agree has nothing left; it is still chosen before those that have been.
        best = int(np.argmax(worth * np.maximum(left, 1e-12)))
        chosen.append(best)
        worth[best] = -np.inf
        seen = directions[firsts[best] : firsts[best + 1]].reshape(-1, len(precision))
        precision += seen.T @ seen / NOISE
    return chosen


def _deviations(samples: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return D (n, C, S) of (S, n, C) probabilities; 0 for a row on which all samples agree."""
    mean = samples.mean(axis=0)
    scaled = (samples - mean) / np.sqrt(np.where(mean > 0, mean, 1))
    size = np.sqrt((scaled**2).sum(axis=(0, 2)))
    return np.moveaxis(scaled / np.where(size > 0, size, 1)[:, None], 0, 2)
