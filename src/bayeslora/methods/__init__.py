"""The methods: low-rank adapters whose rank, widths or weights are random variables."""

from bayeslora.methods.blob import BlobConfig
from bayeslora.methods.blora import BLoraConfig, BLoraModel
from bayeslora.methods.describe import describe, tuner_of
from bayeslora.methods.description import KINDS, LayerDescription
from bayeslora.methods.melora import MeLoraConfig
from bayeslora.methods.registry import METHODS
from bayeslora.methods.sampling import has_posterior, posterior_mean, sampling, stochastic_layers
from bayeslora.methods.tuner import BayesTuner, Schedule

__all__ = [
    "KINDS",
    "METHODS",
    "BLoraConfig",
    "BLoraModel",
    "BayesTuner",
    "BlobConfig",
    "LayerDescription",
    "MeLoraConfig",
    "Schedule",
    "describe",
    "has_posterior",
    "posterior_mean",
    "sampling",
    "stochastic_layers",
    "tuner_of",
]
