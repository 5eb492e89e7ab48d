"""Finished adapters: uncertainty (calibration, dropout, ensembles, Laplace, noise), decisions, rounding, ranks."""

from __future__ import annotations

from bayeslora.posthoc.acquisition import select_rows
from bayeslora.posthoc.bayesianize import bayesianize
from bayeslora.posthoc.calibrators import IsotonicCalibration, VectorScaling
from bayeslora.posthoc.conformal import ConformalIntervals, ConformalSets
from bayeslora.posthoc.dropout import MCDropout
from bayeslora.posthoc.ensemble import DeepEnsemble
from bayeslora.posthoc.laplace import LaplacePredictor
from bayeslora.posthoc.loss import LossControl
from bayeslora.posthoc.risk import RiskControl
from bayeslora.posthoc.rounding import ActivationCounts, RoundedModel, round_after_training
from bayeslora.posthoc.temperature import TemperatureScaling
from bayeslora.posthoc.truncation import truncate_rank

__all__ = [
    "ActivationCounts",
    "ConformalIntervals",
    "ConformalSets",
    "DeepEnsemble",
    "IsotonicCalibration",
    "LaplacePredictor",
    "LossControl",
    "MCDropout",
    "RiskControl",
    "RoundedModel",
    "TemperatureScaling",
    "VectorScaling",
    "bayesianize",
    "round_after_training",
    "select_rows",
    "truncate_rank",
]
