"""Gaussian posteriors over weights: their formulas, their seeded noise, draws of them, and their files."""

from __future__ import annotations

from bayeslora.posterior.draws import GaussianParameter, PosteriorSource, drawn_weights, posterior_source, unwrapped
from bayeslora.posterior.gaussian import inverse_softplus, kl_divergence, local_reparametrization, standard_deviation
from bayeslora.posterior.noise import SCOPES, IndivisibleBatchError, Noise, PassDraws, Scope
from bayeslora.posterior.saved import POSTERIOR_FILE, WeightPosterior, load_posterior, save_posterior

__all__ = [
    "POSTERIOR_FILE",
    "SCOPES",
    "GaussianParameter",
    "IndivisibleBatchError",
    "Noise",
    "PassDraws",
    "PosteriorSource",
    "Scope",
    "WeightPosterior",
    "drawn_weights",
    "inverse_softplus",
    "kl_divergence",
    "load_posterior",
    "local_reparametrization",
    "posterior_source",
    "save_posterior",
    "standard_deviation",
    "unwrapped",
]
