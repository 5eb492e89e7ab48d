"""The methods: low-rank adapters whose rank, widths or weights are random variables."""

from bayeslora.methods.adalora import AdaLoraConfig
from bayeslora.methods.blob import BlobConfig
from bayeslora.methods.blora import BLoraConfig, BLoraModel
from bayeslora.methods.description import KINDS, LayerDescription
from bayeslora.methods.dylora import DyLoraConfig, at_rank, rank_curve
from bayeslora.methods.melora import MeLoraConfig
from bayeslora.methods.registry import METHODS
from bayeslora.methods.tuner import BayesTuner, TrainingSetup, describe, tuner_of
from bayeslora.methods.variational import has_posterior, posterior_mean, sampling, stochastic_layers

__all__ = [
    "KINDS",
    "METHODS",
    "AdaLoraConfig",
    "BLoraConfig",
    "BLoraModel",
    "BayesTuner",
    "BlobConfig",
    "DyLoraConfig",
    "LayerDescription",
    "MeLoraConfig",
    "TrainingSetup",
    "at_rank",
    "describe",
    "has_posterior",
    "posterior_mean",
    "rank_curve",
    "sampling",
    "stochastic_layers",
    "tuner_of",
]
