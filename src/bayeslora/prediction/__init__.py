"""What an adapter predicts, and how sure it is."""

from __future__ import annotations

from bayeslora.prediction.predict import Prediction, evaluation_mode, predict

__all__ = ["Prediction", "evaluation_mode", "predict"]
