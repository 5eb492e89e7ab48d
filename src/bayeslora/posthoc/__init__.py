"""Uncertainty for a finished adapter of any kind: temperature, dropout, ensembles, Laplace, training-free noise."""

from __future__ import annotations

from bayeslora.posthoc.calibration import MCDropout, TemperatureScaling
from bayeslora.posthoc.ensemble import DeepEnsemble
from bayeslora.posthoc.laplace import LaplacePredictor
from bayeslora.posthoc.training_free import bayesianize

__all__ = [
    "DeepEnsemble",
    "LaplacePredictor",
    "MCDropout",
    "TemperatureScaling",
    "bayesianize",
]
