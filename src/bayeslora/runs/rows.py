"""Read and encode rows for a run: texts or pairs, questions with choices, or conversations and completions."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bayeslora.data import Task, encode_generation, encode_texts, load_files, load_generation, load_task, load_texts
from bayeslora.data.choices import CHOICES, QUESTION, Cloze
from bayeslora.data.encode import collated
from bayeslora.data.encode_words import encode_words
from bayeslora.data.generation import answered_rows, text_task
from bayeslora.data.known import KNOWN
from bayeslora.data.tables import EXTENSIONS, Source, Table, columns_of, read_table
from bayeslora.data.tagged import TEXT, words_to_tag
from bayeslora.data.tasks import load_choices
from bayeslora.data.text_tasks import TEXT_TASKS
from bayeslora.errors import BayesLoraError, Problems, counted, option
from bayeslora.evaluation.cloze import copies, is_cloze
from bayeslora.evaluation.multiple_choice import choice_scoring, encode_choices, encode_pairs, is_multiple_choice
from bayeslora.files import file_digest
from bayeslora.runs.base import LANGUAGE_HEADS
from bayeslora.runs.info import UNKNOWN, Head, RunInfo
from bayeslora.vocabulary import Normalization, Scoring

EVALUATION, TEST = "validation", "test"
OUT_OF_DISTRIBUTION = "ood"
FITTED_ROWS = 2000
"""Number of training rows that scores by features are fitted to."""
_BATCH_ROWS = 32
_SOURCE = "source"
_TEXT_COLUMNS = {1: ["text"], 2: ["text_a", "text_b"]}
"""Column names by number of texts, for a folder that does not name them."""


def encode_split(
    split: Dataset, task: Task, tokenizer: PreTrainedTokenizerBase, head: Head, length: int, few_shot: int = 0
) -> Dataset:
    """Tokenize a split of `task`, or other rows with its columns, for a model with this head.

    An input has at most `length` tokens. The task has the classes, says how choices are scored by their text, and has
    the rows of the `few_shot` examples in each prompt.

    Raises:
        BayesLoraError: few-shot examples for a model without prompts, or rows that do not fit.
    """
    if few_shot and head not in LANGUAGE_HEADS:
        raise BayesLoraError(
            f"--few-shot is {few_shot}, but only language models on multiple choice have prompts: leave it out"
        )
    if head == "text":
        return encode_generation(split, tokenizer, length)
    if head == "words":
        return encode_words(split, task.text_columns[0], tokenizer, length)
    if head == "sequence":
        return encode_texts(split, task.text_columns, tokenizer, length)
    if head == "choices":
        return encode_pairs(split, tokenizer, classes=len(task.labels), max_length=length)
    task = asked(task, "cloze" if head == "cloze" else "letters", None)
    return encode_choices(split, task, tokenizer, max_length=length, few_shot=few_shot)


def asked(task: Task, scoring: Scoring | None, normalization: Normalization | None) -> Task:
    """Return the task with another way for language models to answer; None keeps that of the task."""
    if normalization is not None:
        task = replace(task, cloze=replace(task.cloze, normalization=normalization))
    return task if scoring is None else replace(task, scoring=scoring)


def check_task_asked(name: str | None, given: Mapping[str, Any]) -> None:
    """Raise `BayesLoraError` if options about answers to multiple choice are given for another task, None for files.

    They are the fields of `RunOptions` in `given`; one that is None or 0 is not given.
    """
    choices = {known.name: known for known in KNOWN.values() if known.kind == "multiple_choice"}
    if name in choices:
        return
    trained = ", ".join(name for name, known in choices.items() if "train" in known.splits)
    Problems(
        f"{option(field)} is {value}, but is only for language models on multiple choice ({trained}): leave it out, "
        "or name one of these as --task"
        for field, value in given.items()
        if value
    ).tell()


def check_asked(head: Head, scoring: Scoring | None, normalization: Normalization | None) -> None:
    """Raise `BayesLoraError` if a model with this head does not answer as asked."""
    if scoring is not None and head not in LANGUAGE_HEADS:
        raise BayesLoraError(
            f"--scoring is {scoring}, but only language models on multiple choice answer by letters or cloze: leave "
            "it out"
        )
    if normalization is not None and head != "cloze":
        raise BayesLoraError(
            f"--normalization is {normalization}, but only scores by cloze have one: add --scoring cloze or leave it "
            "out"
        )


def answering(info: RunInfo, scoring: Scoring | None, normalization: Normalization | None) -> RunInfo:
    """Return the run with another way to answer multiple choice; None keeps that of the training.

    Raises:
        BayesLoraError: the run is not a language model on multiple choice, or only scores by cloze are normalized.
    """
    if scoring is not None and info.scoring is not None:
        known = KNOWN.get(info.task_name or "")
        usual = info.cloze if info.head == "cloze" else known and known.cloze or Cloze()
        kept = usual if scoring == "cloze" else Cloze("")
        info = replace(info, head=scoring, context=kept.context, normalization=kept.normalization)
    check_asked(info.head, scoring, normalization)
    return info if normalization is None else replace(info, normalization=normalization)


def encode_for(split: Dataset, task: Task, tokenizer: PreTrainedTokenizerBase, info: RunInfo) -> Dataset:
    """Tokenize `split` with the settings that the run was trained with."""
    if info.head == "cloze":
        task = replace(task, cloze=info.cloze)
    return encode_split(split, task, tokenizer, info.head, info.max_length, info.few_shot)


def rows_to_predict(inputs: Any, info: RunInfo, text_columns: list[str] | None = None) -> Task:
    """Read rows without labels as the split `validation` of a task that fits the run.

    The inputs are those of `Run.predict`, or the `table_to_predict` of a file. The text columns are by default those
    of the training.

    Raises:
        BayesLoraError: there are 0 rows, a column is missing, or a value has the wrong type.
    """
    _check_labels(info)
    if not isinstance(inputs, (Path, Table)):
        inputs = _records(inputs, info)
    if info.kind == "multiple_choice":
        return _choices(inputs, info)
    columns = _checked_columns(text_columns, info) or _guessed_columns(inputs)
    if info.kind == "token_classification":
        words = words_to_tag(read_table(inputs, (), [columns[0], TEXT]), columns[0])
        return _task(info, tuple(columns), {EVALUATION: Dataset.from_dict(words)})
    return _task(info, tuple(columns), {EVALUATION: load_texts(inputs, columns)})


def table_to_predict(file: Path, info: RunInfo, text_columns: list[str] | None = None) -> Table:
    """Read a file with all its columns, after checking that those to predict on are there.

    Raises:
        BayesLoraError: as `rows_to_predict`.
    """
    _check_labels(info)
    if info.kind == "multiple_choice":
        return read_table(file, (QUESTION, CHOICES), None)
    if info.kind == "token_classification":
        return read_table(file, text_columns or (), None)
    return read_table(file, _checked_columns(text_columns, info) or _guessed_columns(file), None)


def named_task(name: str, info: RunInfo, data_dir: str | None) -> Task:
    """Return a named task; it must have the kind and the labels of the run."""
    task = load_task(name, data_dir, train_split=info.train_split if name == info.task_name else None)
    # All multiple-choice tasks share their letters; each item has its number of choices.
    fits = task.kind == info.kind and (task.kind == "multiple_choice" or list(task.labels) == info.labels)
    if not fits:
        raise BayesLoraError(
            f"task {name} has labels {', '.join(task.labels) or 'none'}, but the run was trained on "
            f"{', '.join(info.labels) or 'numbers'}: name a task with the same labels"
        )
    return task


def labelled_rows(
    info: RunInfo, file: Source, text_columns: list[str] | None = None, label_column: str | None = None,
    held_out: Sequence[int] = (),
) -> Task:  # fmt: skip
    """Read the rows of a file, or in memory, as the split `validation`; labels become the ids of the run.

    Those of a run that generates text have answers instead of labels. If some rows were `held_out`, only they are in
    the split, and the others in `train`.
    """
    if info.kind == "generation":
        rows = answered_rows(file)
        task = text_task(info.task, tuple(rows.column_names), {EVALUATION: rows})
        known = TEXT_TASKS.get(info.task_name or "")
        return task if known is None else replace(task, metric=known.metrics[0], extra_metrics=known.metrics[1:])
    if info.kind == "multiple_choice":
        return _choices(Path(file) if isinstance(file, str) else file, info, answers=True)
    columns = _checked_columns(text_columns, info) or _guessed_columns(file)
    label = label_column or info.label_column
    if info.task == UNKNOWN and not label_column and (there := columns_of(file)) and label not in there:
        raise _unnamed(file, there, "the label", "label_column")
    kind = info.kind if info.kind in ("regression", "multi_label", "token_classification") else "classification"
    # `load_files` needs training data too; with the class names given, it learns nothing from them.
    named = {name: info.label_numbers.get(name) for name in info.labels} if info.label_numbers else info.labels
    options: dict[str, Any] = {"labels": named or None, "kind": kind, "held_out": held_out or None}
    try:
        return load_files(file, None if held_out else file, columns, label, **options)
    except BayesLoraError as error:
        if info.task != UNKNOWN or info.labels[:1] != ["LABEL_0"] or " has the label " not in str(error):
            raise
        raise BayesLoraError(f"{error}, or name the classes by load(…, labels=…)") from error


def evaluation_task(info: RunInfo, text_columns: list[str] | None = None, label_column: str | None = None) -> Task:
    """Return the evaluation rows of a run on files as the split `validation`; of text maybe a tenth of its file.

    Raises:
        BayesLoraError: their file is missing, or was changed after they had been split off the training rows.
    """
    if info.evaluation_rows:
        return _split_file(info, text_columns, label_column)
    if info.kind == "generation" and "eval_file" not in info.files:
        return load_generation(_file(info, "train_file"))
    return labelled_rows(info, _file(info, "eval_file"), text_columns, label_column)


def _file(info: RunInfo, name: str, what: str = "rows to score", mend: str = "give --eval-file") -> str:
    """Return the file of a run that trained on files."""
    if name not in info.files:
        raise BayesLoraError(f"run.json does not name the {what}, but they are needed: {mend}")
    return info.files[name]


def _split_file(info: RunInfo, text_columns: list[str] | None = None, label_column: str | None = None) -> Task:
    """Return the training and the evaluation rows of a run on one file."""
    file = _file(info, "train_file")
    if Path(file).is_file() and file_digest(file) != info.train_digest:
        raise BayesLoraError(
            f"{file} has changed, but the run's own evaluation rows are rows of it: restore it, or give --eval-file"
        )
    return labelled_rows(info, file, text_columns, label_column, info.evaluation_rows)


def check_not_training(info: RunInfo, source: str, task: Task, split: str) -> None:
    """Raise if the rows of a split were trained on: the same file or a split for training; warn of single rows.

    Args:
        source: of the rows, perhaps a file.
        task: with the split.
    """
    file = Path(info.files.get("train_file", ""))
    known = {info.train_digest, file_digest(file) if file.is_file() else None}
    same_file = Path(source).is_file() and file_digest(source) in known  # or a copy
    if same_file or split.startswith("train"):
        raise BayesLoraError(
            f"the rows are those of {source if same_file else split}, but the run was trained on them: calibrate on "
            "rows that it has not seen"
        )
    try:
        trained = _training_split(info)[1]
    except BayesLoraError:  # it is elsewhere
        return
    rows = task.splits[split]
    columns = [name for name in rows.column_names if name in trained.column_names]
    seen = {str(row) for row in trained.select_columns(columns)}
    count = sum(str(row) in seen for row in rows.select_columns(columns))
    if count:
        warnings.warn(
            f"{count} of the {counted(len(rows), 'row')} of {source} are training rows too: their errors are too few",
            stacklevel=1,  # the command looks before it loads the model, and would else say it twice
        )


def training_batches(
    info: RunInfo, tokenizer: PreTrainedTokenizerBase, count: int, seed: int | None = None
) -> list[dict[str, Tensor]]:
    """Return `count` batches of 32 training rows, as inputs of the model: the first, or with a seed a random choice.

    Raises:
        BayesLoraError: the training rows cannot be found.
    """
    if seed is None:
        task, training = _training_split(info)
        rows = training.select(range(min(len(training), count * _BATCH_ROWS)))
    else:
        task, rows = training_rows(info, count * _BATCH_ROWS, seed)
    data = encode_for(rows, task, tokenizer, info)
    collate = choice_scoring(data, tokenizer).collate if is_multiple_choice(data) else None
    batches = collated(data, np.arange(len(data)), tokenizer, _BATCH_ROWS, collate)
    if is_cloze(data):
        sequences = (copies(batch) for batch in batches)
        return [{"input_ids": ids, "attention_mask": mask} for ids, mask, _, _ in sequences]
    return [{name: batch[name] for name in tokenizer.model_input_names if name in batch} for batch in batches]


def training_rows(info: RunInfo, count: int = FITTED_ROWS, seed: int = 0) -> tuple[Task, Dataset]:
    """Return the run's task, and `count` of its training rows in their order, or all if there are no more.

    Raises:
        BayesLoraError: the training rows cannot be found.
    """
    task, rows = _training_split(info)
    if len(rows) > count:
        rows = rows.select(np.sort(np.random.default_rng(seed).choice(len(rows), count, replace=False)))
    return task, rows


def _training_split(info: RunInfo) -> tuple[Task, Dataset]:
    if info.task_name is None:
        file = _file(info, "train_file", "training data", "train the run again")
        if info.kind != "generation" and not info.evaluation_rows:
            task = labelled_rows(info, file)
            return task, task.splits[EVALUATION]
        generates = info.kind == "generation"
        task = load_generation(file, info.files.get("eval_file")) if generates else _split_file(info)
        return task, task.train_split
    task = load_task(info.task_name, info.data_dir, train_split=info.train_split)
    if "train" not in task.splits:
        raise BayesLoraError(f"{info.task_name} lacks training rows, but they are needed: name a run with such rows")
    return task, task.splits["train"]


@dataclass(frozen=True)
class OutsideRows:
    """Out-of-distribution rows with the columns of `task`; `sources` names the source of each row, if known."""

    name: str
    rows: Dataset
    task: Task
    sources: list[str]


def outside_rows(
    info: RunInfo, task: Task, file: str | Path | None, text_columns: list[str] | None = None
) -> OutsideRows:
    """Read out-of-distribution rows from a file, by default those of the task.

    Raises:
        BayesLoraError: the task does not have such rows, or the run is a regression.
    """
    if info.kind == "regression":
        raise BayesLoraError(
            "the run predicts numbers, but detection needs the uncertainty of classes: leave --ood and --ood-file out"
        )
    if file is None:
        if OUT_OF_DISTRIBUTION not in task.splits:
            raise BayesLoraError(f"--ood is given, but {task.name} lacks a split for it: give --ood-file")
        rows = task.splits[OUT_OF_DISTRIBUTION]
        sources = list(rows[_SOURCE]) if _SOURCE in rows.column_names else []
        return OutsideRows(f"{task.name} {OUT_OF_DISTRIBUTION}", rows, task, sources)
    if info.kind == "multiple_choice":
        items = _choices(Path(file), info)
        return OutsideRows(str(file), items.eval_split, items, [])
    columns = _checked_columns(text_columns, info, "--ood-text-column")
    return OutsideRows(str(file), load_texts(file, columns), replace(task, text_columns=tuple(columns)), [])


def scored_part(info: RunInfo) -> str | None:
    """Return which rows score a run that was trained on files; None for a named task, whose splits have names."""
    if "train_file" not in info.files:
        return None
    return f"rows of {Path(info.files['eval_file']).name}" if "eval_file" in info.files else "held-out rows"


def _check_labels(info: RunInfo) -> None:
    if info.kind == "generation":
        raise BayesLoraError(
            "the run generates text, but labels need a classifier: use `bayeslora generate`, or run.generate(…)"
        )


def _choices(source: Path | Table | Sequence[Mapping[str, Any]], info: RunInfo, *, answers: bool = False) -> Task:
    """Read multiple-choice rows as the split `validation` of a task, with the splits for few-shot examples."""
    rows = load_choices(source, task_name=info.task_name, answers=answers)
    most = max(len(choices) for choices in rows["choices"])
    if most > len(info.labels):
        raise BayesLoraError(
            f"{_named(source)} has a row with {most} choices, but the run was trained on at most {len(info.labels)}: "
            "remove the row"
        )
    splits: dict[str, Dataset] = {}
    if info.few_shot and info.task_name:
        splits = load_task(info.task_name, info.data_dir, train_split=info.train_split).splits
    return _task(info, (QUESTION, CHOICES), {**splits, EVALUATION: rows})


def _task(info: RunInfo, columns: tuple[str, ...], splits: dict[str, Dataset]) -> Task:
    assert info.kind != "generation"
    return Task(info.task, info.kind, columns, "label", info.labels, info.metric, splits)


def _checked_columns(given: list[str] | None, info: RunInfo, name: str = "--text-column") -> list[str]:
    """Return the given columns, by default those of the training; check that their number is the same."""
    if given is None or not info.text_columns:
        return given or info.text_columns
    if len(given) != len(info.text_columns):
        raise BayesLoraError(
            f"{name} names {counted(len(given), 'column')}, but the run was trained on "
            f"{len(info.text_columns)}: name as many"
        )
    return given


def _guessed_columns(source: Source) -> list[str]:
    """Return the text columns for a run without names: `text_a` and `text_b` if the rows have both, or `text`."""
    there = columns_of(source)
    found = next((columns for columns in (_TEXT_COLUMNS[2], _TEXT_COLUMNS[1]) if {*columns} <= {*there}), None)
    if found is None and there:
        raise _unnamed(source, there, "the text", "text_columns")
    return found or _TEXT_COLUMNS[1]  # of a file that cannot be read, as reading it will say


def _unnamed(source: Source, there: list[str], what: str, argument: str) -> BayesLoraError:
    return BayesLoraError(
        f"{_named(source)} has the columns {', '.join(there)}, but nothing says which is {what}: give load(…, "
        f"{argument}=…)"
    )


def _named(source: Source) -> str:
    return str(source if isinstance(source, (str, Path)) else getattr(source, "path", "the input"))


def _records(inputs: Any, info: RunInfo) -> list[Mapping[str, Any]]:
    """Convert texts, pairs and rows to rows with named columns."""
    pairs = len(info.text_columns) != 1 and info.kind != "multiple_choice"
    if isinstance(inputs, str):
        if inputs.endswith(EXTENSIONS) and Path(inputs).is_file():
            raise BayesLoraError(
                f"{inputs!r} is a text here, but a file of that name exists: give pathlib.Path({inputs!r}) to read it"
            )
        inputs = [inputs]
    elif isinstance(inputs, Mapping) or (pairs and isinstance(inputs, tuple) and _is_pair(inputs)):
        inputs = [inputs]
    if not isinstance(inputs, Iterable) or type(inputs).__name__ == "DataFrame":
        raise BayesLoraError(
            f"the input is of type {type(inputs).__name__}, but must be a text or a sequence of texts, pairs or rows: "
            "give a list, a datasets.Dataset or a pathlib.Path"
        )
    rows = [_record(number, value, info) for number, value in enumerate(inputs, start=1)]
    if not rows:
        raise BayesLoraError("the input has 0 rows, but must have at least 1: give a text")
    return rows


def _record(number: int, value: Any, info: RunInfo) -> Mapping[str, Any]:
    if isinstance(value, Mapping):
        if info.kind == "token_classification" and info.text_columns[0] not in value and TEXT in value:
            return {info.text_columns[0]: value[TEXT]}
        return dict(value)
    if info.kind == "token_classification" and isinstance(value, (str, list, tuple)):
        return {info.text_columns[0]: value if isinstance(value, str) else list(value)}
    parts = [value] if isinstance(value, str) else list(value) if _is_pair(value) else []
    columns = info.text_columns or _TEXT_COLUMNS.get(len(parts), [])
    if info.kind == "multiple_choice" or not parts or len(parts) != len(columns):
        seen = {0: f"of type {type(value).__name__}", 1: "one text", 2: "two texts"}[len(parts)]
        wanted = {1: "one text (a string)", 2: "two texts (a tuple of two strings)"}.get(
            len(columns), "a text or a pair"
        )
        if info.kind == "multiple_choice":
            wanted = "a row with question and choices (a dict)"
        if info.kind == "token_classification":
            wanted = "a text, or a list of words"
        raise BayesLoraError(f"row {number} is {seen}, but must be {wanted}: give rows like those of the training")
    return dict(zip(columns, parts, strict=True))


def _is_pair(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(text, str) for text in value)
