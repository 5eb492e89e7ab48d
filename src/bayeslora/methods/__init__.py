"""The methods: low-rank adapters whose rank, widths or weights are random variables."""

from bayeslora.methods.blora import BLoraConfig, BLoraModel
from bayeslora.methods.describe import describe, tuner_of
from bayeslora.methods.description import KINDS, LayerDescription
from bayeslora.methods.registry import METHODS
from bayeslora.methods.tuner import BayesTuner, Schedule

__all__ = [
    "KINDS",
    "METHODS",
    "BLoraConfig",
    "BLoraModel",
    "BayesTuner",
    "LayerDescription",
    "Schedule",
    "describe",
    "tuner_of",
]
