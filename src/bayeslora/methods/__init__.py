"""The methods: low-rank adapters whose rank, widths or weights are random variables."""

from bayeslora.methods.adalora import AdaLoraConfig
from bayeslora.methods.allocation import Allocation, CostModel, Evidence, Product, allocate, least_share
from bayeslora.methods.blob import BlobConfig
from bayeslora.methods.blora import BLoraConfig, BLoraModel
from bayeslora.methods.config import AdapterConfig
from bayeslora.methods.description import KINDS, GateDescription, LayerDescription, PosteriorWidth
from bayeslora.methods.dylora import DyLoraConfig, at_rank, rank_curve
from bayeslora.methods.layer import BayesLayer, add_update
from bayeslora.methods.melora import MeLoraConfig
from bayeslora.methods.registry import METHODS, register_method
from bayeslora.methods.tuner import BayesTuner, TrainingSetup, describe, tuner_of
from bayeslora.methods.variational import has_posterior, member_count, posterior_mean, sampling, stochastic_layers

__all__ = [
    "KINDS",
    "METHODS",
    "AdaLoraConfig",
    "AdapterConfig",
    "Allocation",
    "BLoraConfig",
    "BLoraModel",
    "BayesLayer",
    "BayesTuner",
    "BlobConfig",
    "CostModel",
    "DyLoraConfig",
    "Evidence",
    "GateDescription",
    "LayerDescription",
    "MeLoraConfig",
    "PosteriorWidth",
    "Product",
    "TrainingSetup",
    "add_update",
    "allocate",
    "at_rank",
    "describe",
    "has_posterior",
    "least_share",
    "member_count",
    "posterior_mean",
    "rank_curve",
    "register_method",
    "sampling",
    "stochastic_layers",
    "tuner_of",
]
