"""Tasks, scores, and the runner that brings a model and a task together."""

from __future__ import annotations

from bayeslora.evaluation.packaged import packaged_model
from bayeslora.evaluation.runner import (
    Evaluation,
    compute_metrics_for,
    encode,
    encode_texts,
    evaluate,
    predict_dataset,
    uncertainties_of,
)
from bayeslora.evaluation.tasks import TASKS, Task, hold_out, load_files, load_task, load_texts

__all__ = [
    "TASKS",
    "Evaluation",
    "Task",
    "compute_metrics_for",
    "encode",
    "encode_texts",
    "evaluate",
    "hold_out",
    "load_files",
    "load_task",
    "load_texts",
    "packaged_model",
    "predict_dataset",
    "uncertainties_of",
]
