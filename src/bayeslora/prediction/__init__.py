"""Predictions of an adapted model, with their uncertainty."""

from __future__ import annotations

from bayeslora.prediction.features import features_and_logits
from bayeslora.prediction.generate import Generation, generate
from bayeslora.prediction.predict import Prediction, evaluation_mode, labels_of, predict, sampled_logits
from bayeslora.prediction.predictor import (
    CoreEnsemble,
    Logits,
    ModelPredictor,
    NotFiniteError,
    Predictable,
    Predictor,
    Sampler,
    as_predictor,
    check_one_label,
    check_samples,
)
from bayeslora.prediction.words import word_logits

__all__ = [
    "CoreEnsemble",
    "Generation",
    "Logits",
    "ModelPredictor",
    "NotFiniteError",
    "Predictable",
    "Prediction",
    "Predictor",
    "Sampler",
    "as_predictor",
    "check_one_label",
    "check_samples",
    "evaluation_mode",
    "features_and_logits",
    "generate",
    "labels_of",
    "predict",
    "sampled_logits",
    "word_logits",
]
