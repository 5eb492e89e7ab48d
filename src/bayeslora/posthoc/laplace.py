r"""Laplace approximation of a finished model's last layer, in closed form.

Around the trained head's weights $\theta^*$, bias included, the posterior is $N(\theta^*, (H + \lambda I)^{-1})$ with
the prior precision $\lambda$ and the generalized Gauss-Newton matrix H of the training data (MacKay, 1992; Daxberger
et al., 2021, arXiv:2106.14806). With the features $\phi_n$ that the head sees, a 1 appended for the bias, and class
probabilities $p_n$,

$$ H = \sum_n \Lambda_n \otimes \phi_n \phi_n^\top, \qquad \Lambda_n = \mathrm{diag}(p_n) - p_n p_n^\top, $$

for a classifier, and $\Lambda_n = 1 / s^2$ for a regression with noise variance $s^2$. The logits are linear in the
weights, so H is the Hessian itself. For a regression the approximation is exact where $\theta^*$ minimizes the
penalized loss. $\lambda$, and $s^2$ of a regression, maximize the logarithm of the marginal likelihood

$$ \log p(y \mid \theta^*) - \tfrac{\lambda}{2} \lVert\theta^*\rVert^2 + \tfrac{P}{2} \log \lambda
   - \tfrac12 \log \det (H + \lambda I). $$

The features come from one pass over the data, with any adapter, which stays as it is: at the mean of its posterior.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from scipy.optimize import minimize, minimize_scalar
from torch import Tensor, nn

from bayeslora.errors import BayesLoraError, counted
from bayeslora.methods.variational import posterior_mean
from bayeslora.prediction import Logits, ModelPredictor, Sampler, labels_of, sampled_logits
from bayeslora.prediction.batched_sampling import replaced_forward
from bayeslora.prediction.features import last_layer
from bayeslora.prediction.predict import values_of

Structure = Literal["full", "kron", "diag"]
_TOLERANCES = {torch.bfloat16: 3e-2, torch.float16: 5e-3}
_TOLERANCE = 1e-3
"""Largest difference between the logits and the head's output, relative to the largest logit, by type."""
_LOG_RANGE = (math.log(1e-8), math.log(1e8))
"""Range in which the prior precision and the noise variance are sought."""


@dataclass(frozen=True)
class Curvature:
    r"""A decomposition $H = Q\,\mathrm{diag}(e)\,Q^\top$ over the head's weights (C, D), float64.

    Attributes:
        eigenvalues: e, (C, D).
        left, right: with Kronecker factors, Q = left ⊗ right, (C, C) and (D, D); both None for the identity.
        whole: Q, (C·D, C·D), for the full matrix; otherwise None.
    """

    eigenvalues: Tensor
    left: Tensor | None = None
    right: Tensor | None = None
    whole: Tensor | None = None

    @classmethod
    def of(cls, structure: Structure, features: Tensor, curvatures: Tensor) -> Curvature:
        r"""Decompose $\sum_n \Lambda_n \otimes \phi_n \phi_n^\top$, or its approximation by `structure`.

        Args:
            structure: full, kron (sums of Λ and of φ φᵀ, over n) or diag.
            features: φ, (n, D).
            curvatures: Λ, (n, C, C).
        """
        classes, width = curvatures.shape[1], features.shape[1]
        if structure == "diag":
            return cls(torch.einsum("ncc,nd->cd", curvatures, features.square()))
        if structure == "kron":
            outer, left = torch.linalg.eigh(curvatures.sum(dim=0) / len(features))
            inner, right = torch.linalg.eigh(features.T @ features)
            return cls(torch.outer(outer.clamp_min(0), inner.clamp_min(0)), left, right)
        matrix = torch.empty(classes, width, classes, width, dtype=features.dtype)
        for a in range(classes):
            for b in range(a, classes):
                block = (features * curvatures[:, a, b, None]).T @ features
                matrix[a, :, b], matrix[b, :, a] = block, block  # symmetric in a and b, and in the features
        values, whole = torch.linalg.eigh(matrix.view(classes * width, classes * width))
        return cls(values.clamp_min(0).view(classes, width), whole=whole)

    def rotate(self, weights: Tensor) -> Tensor:
        """Return Q w for weights (..., C, D) in the eigenbasis."""
        if self.whole is not None:
            return (weights.flatten(-2) @ self.whole.T).view(weights.shape)
        if self.left is None or self.right is None:
            return weights
        return self.left @ weights @ self.right.T

    def logit_covariance(self, features: Tensor, precision: float) -> Tensor:
        """Return the covariance (n, C, C) of the logits at `features` (n, D), under the prior precision."""
        variances = 1 / (self.eigenvalues + precision)
        if self.whole is not None:
            classes, width = variances.shape
            scaled = (self.whole * variances.flatten().sqrt()).view(classes, width, -1)
            jacobian = torch.einsum("nd,cdk->nck", features, scaled)
            return jacobian @ jacobian.mT
        if self.left is None or self.right is None:
            return torch.diag_embed(features.square() @ variances.T)
        along = (features @ self.right).square() @ variances.T
        return torch.einsum("ak,nk,bk->nab", self.left, along, self.left)


class LaplacePredictor:
    r"""Predictor with a last-layer Laplace approximation; call `fit` first.

    A sample is a draw of the head's weights, the same for every batch; all samples share one forward pass. With 0
    samples, the predictor uses the head as trained or, with `probit`, the probit approximation. A variational adapter
    below the head stays at its mean.

    Args:
        model: a classifier or regressor whose outputs come from a linear layer, possibly from that of one token.
        structure: structure of the curvature, a matrix with C (d + 1) rows for d features and C classes: `full`
            decomposes the matrix, `kron` its two Kronecker factors, and `diag` keeps only the diagonal. None means
            `full` up to 2,048 rows and `kron` beyond.
        prior_precision: $\lambda$ > 0; None chooses it by the marginal likelihood of the training data.
        probit: with 0 samples, average over the posterior in closed form. For classes k and i whose logits differ by
            $\mu_k - \mu_i$ with variance $v_{ki}$,
            $p_k = 1 / \sum_i \exp((\mu_i - \mu_k) / \sqrt{1 + \pi v_{ki} / 8})$, normalized (MacKay, 1992, for two
            classes; Lu et al., 2020, arXiv:2006.07584, for more).

    Attributes:
        prior_precision: $\lambda$; after `fit`, the value in use.
        noise_variance: noise variance $s^2$ of a regression, after `fit`; None for a classifier.
        log_marginal_likelihood: log marginal likelihood at these values, after `fit`.
    """

    def __init__(
        self,
        model: nn.Module,
        structure: Structure | None = None,
        prior_precision: float | None = None,
        *,
        probit: bool = False,
    ) -> None:
        if structure not in (None, "full", "kron", "diag"):
            raise BayesLoraError(f"structure is {structure!r}, but must be full, kron or diag: give 'kron'")
        if prior_precision is not None and not prior_precision > 0:
            raise BayesLoraError(f"prior_precision is {prior_precision}, but must be positive: give None to choose it")
        self.model, self.structure, self.prior_precision, self.probit = model, structure, prior_precision, probit
        self._chosen = prior_precision is None
        self.noise_variance: float | None = None
        self.log_marginal_likelihood: float | None = None
        self._head: nn.Linear | None = None
        self._curvature: Curvature | None = None

    def check_samples(self, samples: int) -> None:
        if (samples or self.probit) and self._curvature is None:
            raise BayesLoraError(f"samples is {samples}, but the posterior is not fitted: call fit with training data")

    def fit(self, loader: Mapping[str, Any] | Iterable[Mapping[str, Any]]) -> LaplacePredictor:
        """Fit the posterior to the data that the model was trained on, and return self.

        Args:
            loader: a batch or batches with `labels`: class ids, or numbers for a model with one output.

        Raises:
            BayesLoraError: labels are missing or of the wrong kind, or the logits do not come from a linear layer.
        """
        batches = [loader] if isinstance(loader, Mapping) else list(loader)
        values = values_of(batches)
        head = _find_head(self.model, batches[0])
        labels = values if head.out_features == 1 else labels_of(batches)
        with _identity(head):
            features = sampled_logits(ModelPredictor(self.model), batches, 0)[0]
        if len(labels) != len(features):
            raise BayesLoraError(
                f"got {counted(len(labels), 'label')} for {counted(len(features), 'row')}: give one for each row"
            )
        self._fit(head, _with_bias(head, features), labels)
        return self

    def _fit(self, head: nn.Linear, features: Tensor, labels: Tensor) -> None:
        """Decompose the curvature at features (n, D), and choose what is to be chosen."""
        weights = _weights(head)
        logits = features @ weights.T
        is_regression = len(weights) == 1
        # The decomposition of a full matrix of 2,048 rows takes seconds.
        structure = self.structure or ("full" if weights.numel() <= 2048 else "kron")
        if is_regression:
            curvatures, fixed = torch.ones(len(features), 1, 1, dtype=torch.float64), 0.0
            residual = float((logits[:, 0] - labels).square().sum())
        else:
            p = logits.softmax(dim=-1)
            curvatures = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
            fixed, residual = -float(nn.functional.cross_entropy(logits, labels, reduction="sum")), 0.0
        curvature = Curvature.of(structure, features, curvatures)
        evidence = Evidence(curvature.eigenvalues, float(weights.square().sum()), fixed, residual, len(features))
        given = None if self._chosen else self.prior_precision
        precision, noise = evidence.maximize(given, is_regression)
        self.log_marginal_likelihood = evidence.value(precision, noise)
        self.prior_precision, self.noise_variance = precision, noise
        if noise is not None:
            curvature = Curvature(curvature.eigenvalues / noise, curvature.left, curvature.right, curvature.whole)
        self._head, self._curvature = head, curvature

    def sampler(self, samples: int, seed: int, antithetic: bool, read: Logits) -> Sampler:
        if antithetic:
            raise BayesLoraError("antithetic is True, but Laplace draws cannot be paired: leave it out")
        if samples == 0 and not self.probit:
            return ModelPredictor(self.model).sampler(0, seed, False, read)
        head, curvature, precision = self._head, self._curvature, self.prior_precision
        assert head is not None and curvature is not None and precision is not None  # check_samples
        weights = _weights(head)
        if samples:
            # One draw after the other, so that a draw does not depend on how many there are.
            generator = torch.Generator().manual_seed(seed)
            numbers = torch.stack([torch.randn(weights.shape, generator=generator) for _ in range(samples)]).double()
            weights = weights + curvature.rotate(numbers * (curvature.eigenvalues + precision).rsqrt())

        def logits(batch: Mapping[str, Tensor]) -> Tensor:
            with posterior_mean(self.model), _identity(head):
                features = _with_bias(head, read(self.model, batch).cpu().double())
            if samples:
                return torch.einsum("bd,scd->sbc", features, weights)
            mean = features @ weights.T
            return probit_logits(mean, curvature.logit_covariance(features, precision)).unsqueeze(0)

        return logits


@dataclass(frozen=True)
class Evidence:
    """Logarithm of the marginal likelihood, as a function of the prior precision and a regression's noise variance.

    Attributes:
        eigenvalues: those of H; for a regression of H times the noise variance.
        norm: squared norm of the weights.
        fixed: log-likelihood of a classifier's labels; 0 for a regression.
        residual: sum of a regression's squared residuals.
        rows: n.
    """

    eigenvalues: Tensor
    norm: float
    fixed: float
    residual: float
    rows: int

    def value(self, precision: float, noise: float | None) -> float:
        """Return the logarithm at a prior precision and, for a regression, a noise variance."""
        likelihood, values = self.fixed, self.eigenvalues
        if noise is not None:
            likelihood = -0.5 * (self.rows * math.log(2 * math.pi * noise) + self.residual / noise)
            values = values / noise
        shrinkage = float(torch.log1p(values / precision).sum())
        return likelihood - 0.5 * (precision * self.norm + shrinkage)

    def maximize(self, precision: float | None, is_regression: bool) -> tuple[float, float | None]:
        """Return the best prior precision, unless one is given, and the best noise variance of a regression."""
        if not is_regression:
            if precision is None:
                precision = math.exp(
                    minimize_scalar(lambda x: -self.value(math.exp(x), None), bounds=_LOG_RANGE, method="bounded").x
                )
            return precision, None
        noise = math.log(max(self.residual / self.rows, math.exp(_LOG_RANGE[0])))
        if precision is not None:
            near = (max(noise - 10, _LOG_RANGE[0]), min(noise + 10, _LOG_RANGE[1]))
            found = minimize_scalar(lambda x: -self.value(precision, math.exp(x)), bounds=near, method="bounded")
            return precision, math.exp(found.x)
        both = minimize(
            lambda x: -self.value(math.exp(x[0]), math.exp(x[1])),
            np.array([0.0, noise]),
            method="Nelder-Mead",
            bounds=[_LOG_RANGE, _LOG_RANGE],
            options={"xatol": 1e-6, "fatol": 1e-9},
        )
        return math.exp(both.x[0]), math.exp(both.x[1])


def probit_logits(mean: Tensor, covariance: Tensor) -> Tensor:
    """Return logits (n, C) of the class probabilities averaged over Gaussian logits; C = 1 returns the mean.

    Args:
        mean: (n, C).
        covariance: (n, C, C).
    """
    variances = covariance.diagonal(dim1=-2, dim2=-1)
    between = (variances.unsqueeze(2) + variances.unsqueeze(1) - 2 * covariance).clamp_min(0)
    differences = mean.unsqueeze(1) - mean.unsqueeze(2)  # [n, k, i] is class i's logit minus class k's
    if mean.shape[1] == 1:
        return mean
    return -(differences / (1 + math.pi / 8 * between).sqrt()).logsumexp(dim=-1)


def _weights(head: nn.Linear) -> Tensor:
    """Return the head's weights with the bias as the last column, (C, D) float64 on the CPU."""
    parts = [head.weight.detach()] + ([] if head.bias is None else [head.bias.detach().unsqueeze(1)])
    return torch.cat([part.cpu().double() for part in parts], dim=1)


def _with_bias(head: nn.Linear, features: Tensor) -> Tensor:
    """Return features (n, d), with a column of ones if the head has a bias."""
    return features if head.bias is None else torch.cat([features, torch.ones_like(features[:, :1])], dim=1)


def _find_head(model: nn.Module, batch: Mapping[str, Any]) -> nn.Linear:
    """Return the linear layer that the logits come from: the last one that runs, checked on a batch."""
    head, expected, dtype = last_layer(ModelPredictor(model), batch, nn.Linear)
    if head is not None and head.out_features == expected.shape[1]:
        with _identity(head):
            features = sampled_logits(ModelPredictor(model), batch, 0)[0]
        if features.shape[1] == head.in_features:
            found = _with_bias(head, features) @ _weights(head).T
            tolerance = _TOLERANCES.get(dtype, _TOLERANCE)
            if torch.allclose(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())):
                return head
    raise BayesLoraError(
        f"the logits of {type(model).__name__} do not come straight from a linear layer, but last-layer Laplace needs "
        "one: use a sequence classifier or regressor without an adapter on its head"
    )


def _identity(head: nn.Module) -> AbstractContextManager[None]:
    """Make the head return its input, so that the model's logits are its features."""
    return replaced_forward(head, lambda x: x)
