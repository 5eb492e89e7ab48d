"""Tasks, scores, and the runner that brings a model and a task together."""

from __future__ import annotations

from bayeslora.evaluation.choice_trainer import ChoiceTrainer
from bayeslora.evaluation.few_shot import few_shot_pool
from bayeslora.evaluation.multiple_choice import (
    ChoicePrompt,
    LetterLogits,
    PairLogits,
    choice_scoring,
    encode_pairs,
    encode_prompts,
    letter_ids,
)
from bayeslora.evaluation.packaged import packaged_model, unpack_model
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
    "ChoicePrompt",
    "ChoiceTrainer",
    "Evaluation",
    "LetterLogits",
    "PairLogits",
    "Task",
    "choice_scoring",
    "compute_metrics_for",
    "encode",
    "encode_pairs",
    "encode_prompts",
    "encode_texts",
    "evaluate",
    "few_shot_pool",
    "hold_out",
    "letter_ids",
    "load_files",
    "load_task",
    "load_texts",
    "packaged_model",
    "predict_dataset",
    "uncertainties_of",
    "unpack_model",
]
