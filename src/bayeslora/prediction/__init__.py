"""What an adapter predicts, and how sure it is."""

from __future__ import annotations

from bayeslora.prediction.predict import Prediction, check_samples, evaluation_mode, predict

__all__ = ["Prediction", "check_samples", "evaluation_mode", "predict"]
