"""The arrays that scores are computed from, checked once."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bayeslora.errors import BayesLoraError

Array = NDArray[np.float64]
BINS = 15
"""Number of bins of every calibration error, equal-width or equal-mass."""


def aligned(predicted: ArrayLike, labels: ArrayLike) -> tuple[Array, Array]:
    """Two flat float64 arrays of one length, at least 1."""
    a = np.asarray(predicted, dtype=np.float64).reshape(-1)
    b = np.asarray(labels, dtype=np.float64).reshape(-1)
    if len(a) != len(b) or not len(a):
        raise BayesLoraError(f"{len(a)} predictions for {len(b)} labels: one each is needed, and at least one")
    return a, b


def class_arrays(probabilities: ArrayLike, labels: ArrayLike) -> tuple[Array, NDArray[np.int64]]:
    """(n, C) probabilities in float64 and (n,) class ids that lie in 0..C-1."""
    chosen = np.asarray(probabilities, dtype=np.float64)
    ids = np.asarray(labels).astype(np.int64).reshape(-1)
    if chosen.ndim != 2 or len(chosen) != len(ids) or not len(ids):
        raise BayesLoraError(
            f"probabilities of shape {chosen.shape} for {len(ids)} labels: (n, classes) for n labels is needed"
        )
    if ids.min() < 0 or ids.max() >= chosen.shape[1]:
        raise BayesLoraError(
            f"label ids run from {ids.min()} to {ids.max()}, but the model has {chosen.shape[1]} classes: "
            "use the labels the model was trained with"
        )
    return chosen, ids
