"""Scores of a model on a task, and multiple choice."""

from __future__ import annotations

from bayeslora.evaluation.choice_trainer import ChoiceTrainer
from bayeslora.evaluation.cloze import ClozeLogits, encode_cloze
from bayeslora.evaluation.features import FeatureDetector, FeatureSpace
from bayeslora.evaluation.multi_label import MultiLabelEvaluation, label_scores, multi_label_scores
from bayeslora.evaluation.multiple_choice import (
    ChoicePrompt,
    LetterLogits,
    PairLogits,
    choice_scoring,
    encode_choices,
    encode_pairs,
    encode_prompts,
    letter_ids,
)
from bayeslora.evaluation.result import Evaluation, uncertainties_of
from bayeslora.evaluation.scoring import (
    compute_metrics_for,
    dataset_features,
    dataset_logits,
    evaluate,
    predict_dataset,
)
from bayeslora.evaluation.shift import shifted
from bayeslora.evaluation.tagging import TaggingEvaluation, tagging_scores
from bayeslora.evaluation.text import TextEvaluation, evaluate_text
from bayeslora.evaluation.text_metrics import text_scores

__all__ = [
    "ChoicePrompt",
    "ChoiceTrainer",
    "ClozeLogits",
    "Evaluation",
    "FeatureDetector",
    "FeatureSpace",
    "LetterLogits",
    "MultiLabelEvaluation",
    "PairLogits",
    "TaggingEvaluation",
    "TextEvaluation",
    "choice_scoring",
    "compute_metrics_for",
    "encode_choices",
    "encode_cloze",
    "dataset_features",
    "dataset_logits",
    "encode_pairs",
    "encode_prompts",
    "evaluate",
    "evaluate_text",
    "label_scores",
    "letter_ids",
    "multi_label_scores",
    "predict_dataset",
    "shifted",
    "tagging_scores",
    "text_scores",
    "uncertainties_of",
]
