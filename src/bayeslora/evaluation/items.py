"""Parts of prompts, cloze items and pairs: texts to tokens, few-shot examples that fit, and common columns."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn

from bayeslora.data.choices import CHOICES, LABEL, LETTERS, QUESTION
from bayeslora.data.few_shot import Row
from bayeslora.errors import BayesLoraError
from bayeslora.methods.tuner import RowLoss, tuner_of

PRESENT = "choice_mask"
"""Column and batch key of the mask, (C,) or (B, C), of the choices that an item has."""
DEFAULT_PROMPT_LENGTH = 2048

Batch = Mapping[str, Tensor]
ClassLogits = Callable[[nn.Module, Batch], Tensor]
Encoded = TypeVar("Encoded")


def fitted(
    rows: Sequence[Row],
    examples: Sequence[list[Row]],
    encode: Callable[[list[tuple[Row, list[Row]]]], list[Encoded]],
    length: Callable[[Encoded], int],
    max_length: int,
) -> list[Encoded]:
    """Encode rows after their examples; those that are too long lose examples from the front, with one warning.

    `encode` takes pairs of an item and its examples, and `length` gives the number of tokens of an encoded item.

    Raises:
        BayesLoraError: an item alone is longer than `max_length`.
    """
    found = encode(list(zip(rows, examples, strict=True)))
    shortened = 0
    for index, (row, shown) in enumerate(zip(rows, examples, strict=True)):
        shortened += length(found[index]) > max_length
        while (tokens := length(found[index])) > max_length:
            if not shown:
                raise BayesLoraError(
                    f"question {index + 1} ({row[QUESTION][:40]!r}…) has {tokens} tokens, but max_length is "
                    f"{max_length} and questions are not cut: raise max_length to at least {tokens}"
                )
            shown = shown[1:]
            found[index] = encode([(row, shown)])[0]
    if shortened:
        warnings.warn(
            f"{shortened} of {len(rows)} prompts lost few-shot examples, to fit in {max_length} tokens: "
            "raise max_length to keep them all",
            stacklevel=3,
        )
    return found


def check_classes(rows: Sequence[Row], classes: int) -> None:
    """Raise `BayesLoraError` unless `classes` is 2 to 5 and no row has more choices."""
    most = max((len(row[CHOICES]) for row in rows), default=0)
    if not 2 <= classes <= len(LETTERS) or most > classes:
        raise BayesLoraError(
            f"classes is {classes} and an item has {most} choices, but at least as many classes are needed, and 2 to "
            f"{len(LETTERS)}: give another number of classes"
        )


def tokenize(texts: list[str], tokenizer: Any) -> list[list[int]]:
    """Tokenize without special tokens at the end of a text, because more text comes next."""
    encoded = tokenizer(texts, return_special_tokens_mask=True)
    result = []
    for ids, special in zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True):
        end = max((place for place, is_special in enumerate(special, start=1) if not is_special), default=0)
        result.append(list(ids[:end]))
    return result


def with_labels(columns: dict[str, list[Any]], split: Dataset, rows: Sequence[Row], classes: int) -> Dataset:
    """Return a data set of `columns`, `choice_mask` and, if `split` has it, `label`."""
    columns[PRESENT] = [[1] * len(row[CHOICES]) + [0] * (classes - len(row[CHOICES])) for row in rows]
    if LABEL in split.column_names:
        columns[LABEL] = [row[LABEL] for row in rows]
    return Dataset.from_dict(columns)


def targets(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Return `choice_mask` (B, C) and, if known, `labels` (B,) of encoded rows.

    Raises:
        BayesLoraError: the rows lack `choice_mask`.
    """
    if PRESENT not in rows[0]:
        raise BayesLoraError(
            f"the rows have the columns {', '.join(rows[0])}, but {PRESENT!r} is needed to tell absent choices: "
            "encode with encode_prompts, encode_cloze or encode_pairs, and train with remove_unused_columns=False"
        )
    found = {PRESENT: torch.tensor([row[PRESENT] for row in rows])}
    if LABEL in rows[0]:
        found["labels"] = torch.tensor([row[LABEL] for row in rows])
    return found


def trained_logits(model: nn.Module, class_logits: ClassLogits, batch: Batch, labels: Tensor | None = None) -> Tensor:
    """Return `class_logits(model, batch)`, and in training let the model's adapter know that the loss is over them.

    B-LoRA's evidence then draws a row's label among its choices, not tokens from the vocabulary.

    Args:
        model: perhaps with one of this library's adapters.
        class_logits: function from a model and a batch to (B, C) logits.
        batch: its inputs.
        labels: (B,) indices of the right choices, if known: then the gradients of training count as evidence too.
    """
    tuner = tuner_of(model) if model.training and torch.is_grad_enabled() else None
    if tuner is None or tuner.row_loss is not None:
        return class_logits(model, batch)
    return tuner.row_logits(model, RowLoss(lambda each: class_logits(each, batch), batch, labels))


def innermost(model: nn.Module) -> Any:
    """Return the model inside PEFT's and distributed wrappers."""
    inner: Any = model
    while isinstance(inner, PeftModel) or isinstance(getattr(inner, "module", None), nn.Module):
        inner = inner.get_base_model() if isinstance(inner, PeftModel) else inner.module
    return inner


def forward_names(model: nn.Module) -> frozenset[str]:
    """Return the arguments that the innermost model's forward takes; wrappers only declare `**kwargs`."""
    return frozenset(inspect.signature(innermost(model).forward).parameters)
