"""Optimizers that learn a posterior over the weights they train, and that posterior on disk."""

from __future__ import annotations

from bayeslora.optim._flat import local
from bayeslora.optim.ivon import IVON
from bayeslora.optim.saved import (
    POSTERIOR_FILE,
    DrawsWeights,
    NamedPosterior,
    SavedPosterior,
    draws_of,
    posterior_of,
    save_posterior,
    unwrapped,
)

__all__ = [
    "IVON",
    "POSTERIOR_FILE",
    "DrawsWeights",
    "NamedPosterior",
    "SavedPosterior",
    "draws_of",
    "local",
    "posterior_of",
    "save_posterior",
    "unwrapped",
]
