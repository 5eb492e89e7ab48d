"""Uncertainty for a finished adapter of any kind: temperature, dropout, ensembles, Laplace, training-free noise."""

from __future__ import annotations

from bayeslora.posthoc.bayesianize import bayesianize
from bayeslora.posthoc.dropout import MCDropout
from bayeslora.posthoc.ensemble import DeepEnsemble
from bayeslora.posthoc.laplace import LaplacePredictor
from bayeslora.posthoc.temperature import TemperatureScaling

__all__ = [
    "DeepEnsemble",
    "LaplacePredictor",
    "MCDropout",
    "TemperatureScaling",
    "bayesianize",
]
