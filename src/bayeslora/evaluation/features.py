r"""Scores of how foreign an input is, from the features of one pass; larger means more foreign.

Let $f$ be the features of an input (`prediction.features_and_logits`), $\mu_k$ the mean of class k's training
features, $\Sigma$ their covariance around the class means, $\mu_0$ and $\Sigma_0$ the mean and covariance of all of
them, and $\ell$ the logits. With $d_\Sigma(f, \mu) = (f - \mu)^\top \Sigma^{-1} (f - \mu)$:

| score | formula | source |
|---|---|---|
| `energy` | $-\log \sum_k e^{\ell_k}$ | Liu et al., 2020, arXiv:2010.03759 |
| `mahalanobis` | $\min_k d_\Sigma(f, \mu_k)$ | Lee et al., 2018, arXiv:1807.03888 |
| `relative_mahalanobis` | $\min_k d_\Sigma(f, \mu_k) - d_{\Sigma_0}(f, \mu_0)$ | Ren et al., 2021, arXiv:2106.09022 |
| `nearest_neighbors` | distance to the k-th nearest training row | Sun et al., 2022, arXiv:2204.06507 |

The distance to a training row is that of the normalized features $f / \lVert f \rVert$. Where the papers use the
sample covariance S around the class means, $\Sigma = (1 - s) S + s \, \frac{\text{tr} S}{d} I$ is shrunk here: the
features of a fine-tuned classifier vary in few directions, and a few thousand rows do not fill the others. The sum of
$\Sigma$ and the covariance of the class means is $\Sigma_0$; with s = 0 it is the papers'. Shrunk by itself it would
have other variances where no row lies, and their difference, far from all rows, would count as relative distance.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from scipy.linalg import LinAlgError, cholesky, solve_triangular
from scipy.special import logsumexp
from sklearn.covariance import ledoit_wolf
from sklearn.neighbors import NearestNeighbors

from bayeslora.errors import BayesLoraError, counted
from bayeslora.files import write_atomically
from bayeslora.prediction import Predictable, features_and_logits, labels_of

Array = NDArray[np.float64]
NEIGHBORS = 10
_LEAST_SHRINKAGE = 1e-6


def _distances(features: Array, means: Array, factor: Array) -> Array:
    """Return (n, C) squared Mahalanobis distances to (C, d) means, by the lower Cholesky factor of the covariance."""
    points, centers = (solve_triangular(factor, x.T, lower=True).T for x in (features, means))
    return np.stack([((points - center) ** 2).sum(axis=1) for center in centers], axis=1)


def _shrunk(deviations: Array, shrinkage: float | None) -> Array:
    """Return the covariance of (n, d) deviations from a mean; None chooses the shrinkage (Ledoit and Wolf, 2004)."""
    covariance = deviations.T @ deviations / len(deviations)
    if shrinkage is None:
        shrinkage = max(float(ledoit_wolf(deviations, assume_centered=True)[1]), _LEAST_SHRINKAGE)
    size = len(covariance)
    found: Array = (1 - shrinkage) * covariance + shrinkage * np.trace(covariance) / size * np.eye(size)
    return found


def _factor(covariance: Array) -> Array:
    try:
        return np.asarray(cholesky(covariance, lower=True))
    except LinAlgError:
        raise BayesLoraError(
            f"the covariance of {len(covariance)} features is singular, but must be invertible: give more rows or a "
            "larger shrinkage"
        ) from None


class FeatureSpace:
    """Features of the training rows, to which the distances of other rows are measured.

    Args:
        features: (n, d) features of the training rows.
        labels: (n,) class ids of the training rows.
        neighbors: k of `nearest_neighbors`, at most n; None takes 10, or n if that is less.
        shrinkage: shrinkage of the covariance, in [0, 1]; None estimates it (Ledoit and Wolf, 2004). With 0,
            Mahalanobis distances do not depend on an invertible affine map of all features.

    Raises:
        BayesLoraError: a shape or an option is wrong, a feature is not finite, or a covariance is singular.
    """

    def __init__(
        self, features: ArrayLike, labels: ArrayLike, neighbors: int | None = None, shrinkage: float | None = None
    ) -> None:
        self.features = np.asarray(features, dtype=np.float64)
        self.labels = np.asarray(labels).astype(np.int64).reshape(-1)
        if self.features.ndim != 2 or len(self.features) != len(self.labels) or len(self.labels) < 2:
            raise BayesLoraError(
                f"features have shape {self.features.shape} for {counted(len(self.labels), 'label')}, but must "
                "be (rows, features): give one row for each label, at least 2"
            )
        _check_finite(self.features)
        if shrinkage is not None and not 0 <= shrinkage <= 1:
            raise BayesLoraError(f"shrinkage is {shrinkage}, but must be between 0 and 1: give None to choose it")
        self.neighbors = min(NEIGHBORS, len(self.labels)) if neighbors is None else neighbors
        if not 1 <= self.neighbors <= len(self.labels):
            raise BayesLoraError(
                f"neighbors is {neighbors}, but must be between 1 and the number of rows, {len(self.labels)}: "
                "give fewer neighbors or more rows"
            )
        self.shrinkage = shrinkage
        classes = np.unique(self.labels, return_inverse=True)[1]
        self._means = np.stack([self.features[classes == k].mean(axis=0) for k in range(classes.max() + 1)])
        self._center = self.features.mean(axis=0, keepdims=True)
        within = _shrunk(self.features - self._means[classes], shrinkage)
        shares, apart = np.bincount(classes) / len(classes), self._means - self._center
        self._within, self._total = _factor(within), _factor(within + (apart.T * shares) @ apart)
        self._nearest = NearestNeighbors(n_neighbors=self.neighbors).fit(_normalized(self.features))

    def scores(self, features: ArrayLike, logits: ArrayLike) -> dict[str, Array]:
        """Return the scores (n,) by name, for the features (n, d) and logits (n, C) of n rows."""
        points = np.asarray(features, dtype=np.float64)
        if points.ndim != 2 or points.shape[1] != self.features.shape[1]:
            raise BayesLoraError(
                f"features have shape {points.shape}, but must be (rows, {self.features.shape[1]}): "
                "take them from the model that the training features are from"
            )
        _check_finite(points)
        nearest = _distances(points, self._means, self._within).min(axis=1)
        return {
            "energy": -np.asarray(logsumexp(np.asarray(logits, dtype=np.float64), axis=1)),
            "mahalanobis": nearest,
            "relative_mahalanobis": nearest - _distances(points, self._center, self._total)[:, 0],
            "nearest_neighbors": self._nearest.kneighbors(_normalized(points))[0][:, -1],
        }


class FeatureDetector:
    """Detect inputs unlike the training data by the features of a sequence classifier; call `fit` first.

    ```python
    detector = bayeslora.FeatureDetector(model).fit(train_loader)
    foreign = detector.score(loader)["mahalanobis"]      # (n,), larger means more foreign
    ```

    Scoring takes one pass with the mean weights, without samples.

    Args:
        model: a sequence classifier of two or more classes, with or without an adapter.
        neighbors, shrinkage: see `FeatureSpace`.
    """

    def __init__(self, model: Predictable, neighbors: int | None = None, shrinkage: float | None = None) -> None:
        self.model, self.neighbors, self.shrinkage = model, neighbors, shrinkage
        self.space: FeatureSpace | None = None

    def fit(self, loader: Mapping[str, Any] | Iterable[Mapping[str, Any]]) -> FeatureDetector:
        """Fit the detector to rows that the model was trained on, and return self; a few thousand are enough.

        Args:
            loader: a batch or batches with `labels`.

        Raises:
            BayesLoraError: labels are missing, or the logits do not come straight from a linear layer.
        """
        batches = [loader] if isinstance(loader, Mapping) else list(loader)
        labels = labels_of(batches)
        features, _ = features_and_logits(self.model, batches)
        self.space = FeatureSpace(features.numpy(), labels.numpy(), self.neighbors, self.shrinkage)
        return self

    def score(self, loader: Mapping[str, Any] | Iterable[Mapping[str, Any]]) -> dict[str, Array]:
        """Return the scores `energy`, `mahalanobis`, `relative_mahalanobis` and `nearest_neighbors`, (n,) each.

        Raises:
            BayesLoraError: `fit` was not called, or the batches do not fit the model.
        """
        features, logits = features_and_logits(self.model, loader)
        return self._fitted().scores(features.numpy(), logits.numpy())

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write the training rows' features and labels to a safetensors file; features become float32."""
        space = self._fitted()
        options = {"neighbors": space.neighbors, "shrinkage": space.shrinkage}
        tensors = {"features": torch.from_numpy(space.features).float(), "labels": torch.from_numpy(space.labels)}
        with write_atomically(file) as path:
            save_file(tensors, path, {"feature_detector": json.dumps(options)})

    @classmethod
    def load(cls, model: Predictable, file: str | os.PathLike[str]) -> FeatureDetector:
        """Load a fitted detector; with the same model it gives the same scores as the saved one.

        Raises:
            BayesLoraError: the file is missing, damaged, or not a detector's.
        """
        try:
            with safe_open(file, framework="pt") as opened:
                options = json.loads(opened.metadata()["feature_detector"])
                features, labels = (opened.get_tensor(name).numpy() for name in ("features", "labels"))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise BayesLoraError(
                f"{os.fspath(file)} cannot be read ({type(error).__name__}), but must be a file that "
                "FeatureDetector.save wrote: save the detector again"
            ) from error
        detector = cls(model, options["neighbors"], options["shrinkage"])
        detector.space = FeatureSpace(features, labels, **options)
        return detector

    def _fitted(self) -> FeatureSpace:
        if self.space is None:
            raise BayesLoraError("the detector is not fitted, but needs training rows: call fit with some first")
        return self.space


def _normalized(features: Array) -> Array:
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.maximum(norms, np.finfo(np.float64).tiny)


def _check_finite(features: Array) -> None:
    broken = int((~np.isfinite(features)).any(axis=1).sum())
    if broken:
        raise BayesLoraError(
            f"the features of {broken} of {len(features)} rows are not finite, but must be: train with a smaller "
            "learning rate or in float32"
        )
