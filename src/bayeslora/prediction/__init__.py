"""What an adapter predicts, and how sure it is."""

from __future__ import annotations

from bayeslora.prediction.ensemble import DeepEnsemble
from bayeslora.prediction.generate import Generation, generate
from bayeslora.prediction.laplace import LaplacePredictor
from bayeslora.prediction.posthoc import MCDropout, TemperatureScaling
from bayeslora.prediction.predict import (
    Logits,
    Predictor,
    Sampler,
    as_predictor,
    check_samples,
    evaluation_mode,
    predict,
    sampled_logits,
)
from bayeslora.prediction.result import Prediction
from bayeslora.prediction.tfb import bayesianize
from bayeslora.prediction.weights import WeightPosterior, load_posterior

__all__ = [
    "DeepEnsemble",
    "Generation",
    "LaplacePredictor",
    "Logits",
    "MCDropout",
    "Prediction",
    "Predictor",
    "Sampler",
    "TemperatureScaling",
    "WeightPosterior",
    "as_predictor",
    "bayesianize",
    "check_samples",
    "evaluation_mode",
    "generate",
    "load_posterior",
    "predict",
    "sampled_logits",
]
