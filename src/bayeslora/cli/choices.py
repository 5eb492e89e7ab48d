"""Splits as the model of a run reads them: texts for a classifier, prompts or pairs for multiple choice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bayeslora.cli.inputs import text_columns
from bayeslora.cli.models import Head, RunInfo
from bayeslora.cli.results import EVALUATION
from bayeslora.data import Task, encode_texts, load_files, load_task, load_texts
from bayeslora.data.encode import collated
from bayeslora.data.few_shot import few_shot_pool
from bayeslora.data.tasks import load_choices
from bayeslora.errors import BayesLoraError
from bayeslora.evaluation.multiple_choice import choice_scoring, encode_pairs, encode_prompts, is_multiple_choice


def encoded(
    split: Dataset, task: Task, tokenizer: PreTrainedTokenizerBase, head: Head, length: int, few_shot: int = 0
) -> Dataset:
    """A split of `task` (or other rows of its form) as inputs of a model with this head.

    Args:
        split: rows with the task's text columns.
        task: says which classes there are, and has the rows that few-shot examples are taken from.
        tokenizer: of the model.
        head: of the model.
        length: tokens of the longest input.
        few_shot: examples in each prompt.

    Raises:
        BayesLoraError: few-shot examples for a model that reads no prompt, or rows that do not fit.
    """
    if few_shot and head != "letters":
        raise BayesLoraError(
            f"--few-shot is {few_shot}, but examples are for the prompts of a language model on multiple choice; "
            "leave it out."
        )
    if head == "sequence":
        return encode_texts(split, task.text_columns, tokenizer, length)
    classes = len(task.labels)
    if head == "choices":
        return encode_pairs(split, tokenizer, classes=classes, max_length=length)
    pool = few_shot_pool(task) if few_shot else None
    return encode_prompts(split, tokenizer, classes=classes, max_length=length, few_shot=few_shot, pool=pool)


def encoded_for(split: Dataset, task: Task, tokenizer: PreTrainedTokenizerBase, info: RunInfo) -> Dataset:
    """`encoded` as the run was trained."""
    return encoded(split, task, tokenizer, info.head, info.max_length, info.few_shot)


def choice_rows(file: Path, info: RunInfo, *, answers: bool = False) -> Task:
    """Multiple-choice rows of a file as the split `validation` of a task, with the splits that examples come from."""
    rows = load_choices(file, task_name=info.task_name, answers=answers)
    most = max(len(choices) for choices in rows["choices"])
    if most > len(info.labels):
        raise BayesLoraError(
            f"{file} has a row with {most} choices, but the run was trained on at most {len(info.labels)}; "
            "take the row out."
        )
    splits: dict[str, Dataset] = {}
    if info.few_shot and info.task_name:
        splits = load_task(info.task_name, info.data_dir, train_split=info.train_split).splits
    return _task(info, ("question", "choices"), {**splits, EVALUATION: rows})


def labelled_rows(given: dict[str, Any], info: RunInfo, path: str) -> tuple[Task, str]:
    """The rows of a file, their labels as the ids the run was trained with, and the name of their split."""
    if info.kind == "multiple_choice":
        for name in ("text_column", "label_column"):
            if name in given:
                raise BayesLoraError(f"--{name.replace('_', '-')} is of no use for multiple choice; leave it out.")
        return choice_rows(Path(path), info, answers=True), EVALUATION
    columns, label_column = text_columns(given, info), given.get("label_column", info.label_column)
    # The file stands for the training data too: with the class names given, nothing is learned from it.
    return load_files(path, path, columns, label_column, labels=info.labels or None, kind=info.kind), EVALUATION


def training_batches(
    info: RunInfo, tokenizer: PreTrainedTokenizerBase, count: int, size: int = 32
) -> list[dict[str, Tensor]]:
    """The first batches of what the run was trained on, as inputs of its model.

    Raises:
        BayesLoraError: where these rows are no longer at their place.
    """
    if info.task_name is None:
        if "train_file" not in info.files:
            raise BayesLoraError("its run.json names no training data")
        task, split = labelled_rows({}, info, info.files["train_file"])
    else:
        task, split = load_task(info.task_name, info.data_dir, train_split=info.train_split), "train"
    rows = task.splits[split].select(range(min(len(task.splits[split]), count * size)))
    data = encoded_for(rows, task, tokenizer, info)
    collate = choice_scoring(data, tokenizer).collate if is_multiple_choice(data) else None
    batches = collated(data, np.arange(len(data)), tokenizer, size, collate)
    return [{name: batch[name] for name in tokenizer.model_input_names if name in batch} for batch in batches]


def rows_to_predict(given: dict[str, Any], info: RunInfo, file: Path) -> Task:
    """The rows of a file without labels, in the form that the run takes, as the split `validation` of a task."""
    if info.kind == "multiple_choice":
        if "text_column" in given:
            raise BayesLoraError(
                "--text-column is of no use for multiple choice, whose columns are known; leave it out."
            )
        return choice_rows(file, info)
    columns = text_columns(given, info)
    return _task(info, tuple(columns), {EVALUATION: load_texts(file, columns)})


def _task(info: RunInfo, columns: tuple[str, ...], splits: dict[str, Dataset]) -> Task:
    return Task(info.task, info.kind, columns, "label", info.labels, info.metric, splits)
