"""Constants that several packages share; importing them needs neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, get_args

WIDTHS = (2, 4, 8, 16, 32)
"""Bit-widths of a tensor; 32 means not quantized."""

UNQUANTIZED = WIDTHS[-1]

BASE_WEIGHT = "weight"
"""Kind of the base model's weight, W0."""

KINDS = (BASE_WEIGHT, "A", "E", "B", "A_out", "E_out", "out")
"""Kinds of tensors in an adapted layer, each with a separate width; `A_out`, `E_out` and `out` are outputs."""

ALL_KINDS = (BASE_WEIGHT, "in", *KINDS[1:])
"""`KINDS` and the optional `in`, the layer's input."""

MATRICES = ("A", "E", "B")
"""Kinds that are matrices of the adapter."""

ACTIVATIONS = ("in", "A_out", "E_out", "out")
"""Kinds that each forward pass computes."""

CostScope = Literal["adapted", "attention", "encoder", "model"]
COST_SCOPES: tuple[CostScope, ...] = get_args(CostScope)
"""Parts of a model in which operations are counted; each contains the one before."""

ShiftName = Literal["typos", "truncation", "casing", "punctuation"]
SHIFTS: tuple[ShiftName, ...] = get_args(ShiftName)
"""Suites that shift texts; `evaluation.shift` has their levels."""

SEPARATE_PROJECTIONS = (
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
)
"""Query, key and value projections by their names in the model families."""

FUSED_PROJECTIONS = ("c_attn", "query_key_value", "qkv_proj", "qkv", "Wqkv", "W_pack")
"""Layers that compute query, key and value together."""

QUERY_NAMES = (*(query for query, _, _ in SEPARATE_PROJECTIONS), "q_attn")
KEY_NAMES = tuple(key for _, key, _ in SEPARATE_PROJECTIONS)
VALUE_NAMES = tuple(value for _, _, value in SEPARATE_PROJECTIONS)

METHOD_ENTRY_POINTS = "bayeslora.methods"
"""Group of entry points under which an installed package offers methods: name = module that registers it."""

Scoring = Literal["letters", "cloze"]
"""Way to answer multiple choice with a language model: by the letter of a choice, or by the likelihood of its text."""
Normalization = Literal["none", "tokens", "bytes"]
"""Divisor of the log-likelihood of a choice: nothing, or the length of its text in this unit."""

FORMATS_FOR_OTHERS = ("onnx", "gguf", "torchao")
"""Formats of exports that other programs run."""

MESSAGES, PROMPT, COMPLETION = "messages", "prompt", "completion"
"""Columns of rows to generate text from: a conversation, or a text and what follows it."""


def text_form(columns: Collection[str]) -> tuple[str, ...] | None:
    """Return the columns of a file that a language model learns to write from; None for other files."""
    if MESSAGES in columns:
        return (MESSAGES,)
    return (PROMPT, COMPLETION) if PROMPT in columns and COMPLETION in columns else None


QUESTION, CHOICES, ANSWER = "question", "choices", "answer"
"""Columns of multiple-choice rows: a text, a list of texts, and the index of the right one."""

CHOICES_BY_TASK = (
    "multiple choice is trained by the name of a task: --task arc_easy --data-dir DIR reads DIR/arc_easy/train.jsonl "
    "and dev.jsonl"
)


def choice_form(columns: Collection[str]) -> bool:
    """Return whether a file has the columns of multiple-choice rows."""
    return {QUESTION, CHOICES, ANSWER} <= {*columns}


WORDS = "tokens"
"""Column of rows whose words have a tag each: a list of words."""
TAGS = ("ner_tags", "tags", "labels")
"""Usual columns of their tags, the first that a file has."""
STARTS = "starts"
"""Column, or input, of the places of the words' first tokens in a sequence."""


def tagged_form(columns: Collection[str]) -> tuple[str, str] | None:
    """Return the columns of words and of their tags of a file; None for other files."""
    tags = next((name for name in TAGS if name in columns), None)
    return (WORDS, tags) if tags is not None and WORDS in columns else None


TEXT_TASKS = ("squad", "e2e")
"""Named tasks whose answers are text; `data.text_tasks` describes them."""

Measure = Literal["probability", "mutual_information", "semantic_entropy"]
"""Uncertainty of a written answer as a whole; `runs.text_scores.uncertainty_of` defines each."""
AnswerLoss = Literal["f1", "exact_match", "rouge_l"]
"""Score of a written answer against known ones; its loss is 1 minus it."""
