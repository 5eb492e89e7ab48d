"""Gaussian posteriors over tensors, and the seeded noise that draws from them: tensors in, tensors out."""

from __future__ import annotations

from bayeslora.posterior.gaussian import (
    inverse_softplus,
    kl_divergence,
    local_reparametrization,
    standard_deviation,
)
from bayeslora.posterior.noise import SCOPES, Noise, Scope, UnfoldableError

__all__ = [
    "SCOPES",
    "Noise",
    "Scope",
    "UnfoldableError",
    "inverse_softplus",
    "kl_divergence",
    "local_reparametrization",
    "standard_deviation",
]
