"""What an adapter predicts, and how sure it is."""

from __future__ import annotations

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

__all__ = [
    "Logits",
    "Prediction",
    "Predictor",
    "Sampler",
    "as_predictor",
    "check_samples",
    "evaluation_mode",
    "predict",
    "sampled_logits",
]
