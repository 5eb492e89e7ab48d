"""Predictions of an adapted model, with their uncertainty."""

from __future__ import annotations

from bayeslora.prediction.generate import Generation, generate
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
from bayeslora.prediction.weights import WeightPosterior, load_posterior

__all__ = [
    "Generation",
    "Logits",
    "Prediction",
    "Predictor",
    "Sampler",
    "WeightPosterior",
    "as_predictor",
    "check_samples",
    "evaluation_mode",
    "generate",
    "load_posterior",
    "predict",
    "sampled_logits",
]
