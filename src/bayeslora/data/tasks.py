"""Tasks: labelled splits from files, a data folder, the hub, or the packaged reviews."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from bayeslora.data import packaged
from bayeslora.data.choices import ANSWER, CHOICES, GROUP, LETTERS, QUESTION, SUBJECT, Cloze, choice_columns
from bayeslora.data.known import KNOWN, Known, known_tables
from bayeslora.data.label_sets import has_label_sets, label_columns, learn_label_sets, rarest, rows_with_sets
from bayeslora.data.labels import Kind, Names, TaskKind, labelled, learn_labels, names_column
from bayeslora.data.spans import marks_spans
from bayeslora.data.split import HoldOut
from bayeslora.data.tables import Source, Table, columns_of, read_table, tell_empty
from bayeslora.data.tagged import learn_tags, rarest_tags, read_tagged, words_of
from bayeslora.data.text_tasks import TEXT_TASKS, text_splits
from bayeslora.errors import BayesLoraError
from bayeslora.vocabulary import COMPLETION, PROMPT, Scoring

LABEL = "label"
"""Name of the label column in every split."""


@dataclass(frozen=True)
class Task:
    """A data set with its splits, labels and metrics.

    Attributes:
        name: name of the task in metrics.json.
        kind: `"classification"`, `"multi_label"`, `"regression"`, `"token_classification"`, `"multiple_choice"` or
            `"generation"`.
        text_columns: one column, or two for pairs; `question` and `choices` (a list of 2 to 5 strings) for multiple
            choice; `messages`, or `prompt` and `completion`, for generation; a column of word lists for tagging.
        label_column: label column in `splits`, whatever its name and type in the files: class ids (int), numbers
            (float), lists with 1 or 0 for each label (float), or lists with the tag id of each word; empty for
            generation.
        labels: class names, index = class id; empty for regression and generation. For multiple choice the letters
            A, B, …, as many as the largest number of choices.
        metric: name of the headline score.
        splits: `train` and `validation`, and maybe `test`, `selection` (after `hold_out`), `ood` (texts without
            labels) and `few_shot` (examples for prompts, in tasks without `train`).
        extra_metrics: names of other usual scores.
        group_column: column of `splits` whose values must not be shared between training and held-out examples.
        scoring: how a language model answers multiple choice: `"letters"` or `"cloze"`.
        cloze: how choices are scored by their text, for `scoring="cloze"`.
        evaluation_rows: numbers (from 0) of the rows that became `validation`, for a task from one file.
        label_numbers: numbers that stand for the labels in the files, if they are not the class ids.
    """

    name: str
    kind: TaskKind
    text_columns: tuple[str, ...]
    label_column: str
    labels: list[str]
    metric: str
    splits: dict[str, Dataset]
    extra_metrics: tuple[str, ...] = ()
    group_column: str | None = None
    scoring: Scoring = "letters"
    cloze: Cloze = Cloze()
    evaluation_rows: list[int] = dataclasses.field(default_factory=list)
    label_numbers: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the headline score and the extra scores."""
        return (self.metric, *self.extra_metrics)

    @property
    def train_split(self) -> Dataset:
        return self.splits["train"]

    @property
    def eval_split(self) -> Dataset:
        """The validation split; use it once, after all choices have been made on the selection split of `hold_out`."""
        return self.splits["validation"]


PACKAGED_TASKS: dict[str, Callable[[], dict[str, dict[str, list[Any]]]]] = {
    "rotten_tomatoes": packaged.packaged_reviews,
    "rotten_tomatoes_small": packaged.small_reviews,
}
TASKS = (*KNOWN, *TEXT_TASKS, *PACKAGED_TASKS)
"""Names of the tasks that `load_task` can load."""


def hub_dataset(task: str | None) -> str | None:
    """Return the hub id of the data set that a known task comes from; None for other data."""
    return KNOWN[task].hub if task in KNOWN else None


def load_task(name: str, data_dir: str | Path | None = None, *, train_split: str | None = None) -> Task:
    """Load a known task from files, from the hub or from a package.

    With `data_dir`, the splits are the files `data_dir/name/{train,dev,test}.jsonl`. Their fields are `text`, or
    `text_a` and `text_b`, with `label` and `label_text`; for multiple choice `question`, `choices`, `answer` and maybe
    `subject`. `test` may be missing. SST-2's training file is `train_sentences.jsonl` if that exists. MNLI's second
    validation split, from genres that its training data lack, is `dev_mismatched`. TREC, Subj and AG News have no
    development set: without a file `dev`, their split `validation` is the test set.

    Without `data_dir`, the splits come from the hub, except test sets with hidden labels. SNLI's rows without a gold
    label (-1) are dropped. WinoGrande's sentences are cut at their gap: the question is the text before it, a choice
    is the option with the rest of the sentence. MMLU has no training data here; its dev split becomes `few_shot`.

    `rotten_tomatoes` is packaged and does not accept `data_dir`; `rotten_tomatoes_small` has 4,000 of its training
    lines and 1,000 of its validation lines. `squad` and `e2e` require `data_dir`; their splits have the columns
    `prompt`, `completion` and `references`.

    Args:
        name: one of `TASKS`.
        data_dir: folder with a subfolder of files for the task; None loads the task from the hub or a package.
        train_split: training file of a task that has several: WinoGrande's `train_xs`, `train_s` (default), `train_m`.

    Raises:
        BayesLoraError: the name or training file is unknown, a file is missing or malformed, or the hub is offline.
    """
    if name not in TASKS:
        raise BayesLoraError(f"{name!r} is not a known task: use one of {', '.join(TASKS)}, or name data files")
    if name in PACKAGED_TASKS:
        for what, given in (("data folder", data_dir), ("training split", train_split)):
            if given is not None:
                raise BayesLoraError(f"{name} is packaged data, but the {what} {given} was given: leave it out")
        return _packaged_task(name)
    if name in TEXT_TASKS:
        if train_split is not None:
            raise BayesLoraError(f"{name} has one training split, but {train_split} was given: leave it out")
        metrics = TEXT_TASKS[name].metrics
        splits = text_splits(name, data_dir)
        return Task(name, "generation", (PROMPT, COMPLETION), "", [], metrics[0], splits, extra_metrics=metrics[1:])
    known = KNOWN[name]
    tables = known_tables(known, data_dir, train_split)
    if known.kind == "multiple_choice":
        return _choice_task(known, tables)
    assert known.kind != "generation"
    return _build(
        name, tables, known.text_columns, (LABEL,), kind=known.kind, names=known.labels or None, metrics=known.metrics
    )


def load_files(
    train_file: Source,
    eval_file: Source | None,
    text_columns: str | Sequence[str],
    label_column: str,
    *,
    test_file: Source | None = None,
    labels: Names | None = None,
    kind: Kind | None = None,
    held_out: HoldOut | Sequence[int] | None = None,
) -> Task:
    """Load a task from data files (in the format of their extension) or from rows in memory.

    Class ids follow the sorted labels; numbers are sorted by value, and named by the column `<label_column>_text` if
    it exists. Fractional numbers make the task a regression. In CSV, labels are numbers if all of them can be read as
    numbers. Rows without a label are left out. Warnings count these rows and the empty texts.

    Args:
        train_file: file or rows to train on, which decide the labels that exist.
        eval_file: file or rows of the split `validation`; None takes it from the training file, as `held_out` says.
        text_columns: one name, or two for pairs.
        label_column: name of the label column. A column of lists, or the names of several columns of 0 and 1
            (`"joy,anger"`), gives each row several labels.
        test_file: file or rows of the split `test`.
        labels: class names in the order of their ids, to fix that order or to allow classes without training rows; or
            with the number that stands for each in the files, which is otherwise its id.
        kind: `"classification"`, `"multi_label"`, `"regression"`, or `"token_classification"` for lists of words with
            lists of tags; None lets the training labels decide between the first three.
        held_out: rows of the training file to use as `validation`: a share, or their numbers (from 0).

    Raises:
        BayesLoraError: a file cannot be used; the message has its name and line.
    """
    own = label_columns(label_column, columns_of(train_file))
    for name in own:
        columns = _checked_columns(text_columns, name)
    _check_labels(labels)
    if (eval_file is None) == (held_out is None):
        raise BayesLoraError("eval_file and held_out are both given or both missing, but one is needed: give one")
    files = {"train": train_file, "validation": eval_file, "test": test_file}
    name = Path(train_file).name if isinstance(train_file, (str, Path)) else "rows"
    group = [held_out.group_column] if isinstance(held_out, HoldOut) and held_out.group_column else []
    if kind == "token_classification":
        return _build_tagged(name, files, columns, label_column, labels, held_out, group)
    names = names_column(label_column, columns)
    tables = {
        split: read_table(file, (*columns, *own, *(group if split == "train" else ())), [names] if names else [])
        for split, file in files.items()
        if file is not None
    }
    return _build(name, tables, columns, own, kind=kind, names=labels, held_out=held_out)


def _check_labels(labels: Names | None) -> None:
    if labels is not None and (len(labels) < 2 or len(set(labels)) != len(labels)):
        raise BayesLoraError(
            f"the labels are {list(labels)}, but must be at least 2 different names: list every class once"
        )


def load_texts(file: Source, text_columns: str | Sequence[str]) -> Dataset:
    """Read the texts of a data file (or of rows) without labels, to predict on; other columns are dropped.

    Raises:
        BayesLoraError: a file cannot be used; the message has its name and line.
    """
    columns = _checked_columns(text_columns)
    table = read_table(file, columns)
    _tell_empty_texts(table, columns)
    return Dataset.from_dict(_texts(table, columns))


def hold_out(task: Task, fraction: float = 0.1, seed: int = 0) -> Task:
    """Return the task with part of `train` moved to a new split `selection`, for choosing hyperparameters and epochs.

    Classification tasks are stratified by class, and every class keeps at least one training example; other tasks are
    split at random. If the task has a `group_column`, whole groups are moved instead (about `fraction` of the
    examples, not stratified), because related examples on both sides would make the choice look too good.

    Raises:
        BayesLoraError: `fraction` is outside (0, 1), the task already has the split, or there are too few examples.
    """
    if not 0 < fraction < 1:
        raise BayesLoraError(f"fraction is {fraction}, but must be between 0 and 1: give the share to hold out")
    if "selection" in task.splits:
        raise BayesLoraError(f"the task {task.name!r} already has a selection split: hold out from the task as loaded")
    train = task.train_split
    generator = np.random.default_rng(seed)
    if task.group_column is not None:
        held = _whole_groups(np.asarray(train[task.group_column]), fraction, generator)
    elif task.kind == "classification":
        held = _stratified(np.asarray(train[task.label_column]), fraction, generator)
    else:
        held = generator.permutation(len(train))[: max(1, round(fraction * len(train)))]
    if not 0 < len(held) < len(train):
        raise BayesLoraError(
            f"{fraction} of {len(train)} training examples is to be held out, but both parts need at least 1: "
            "use another fraction or more data"
        )
    chosen = np.zeros(len(train), dtype=bool)
    chosen[held] = True
    splits = {
        **task.splits,
        "train": train.select(np.flatnonzero(~chosen)),
        "selection": train.select(np.flatnonzero(chosen)),
    }
    return dataclasses.replace(task, splits=splits)


def _stratified(labels: np.ndarray, fraction: float, generator: np.random.Generator) -> np.ndarray:
    held = []
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        held.append(members[: min(max(1, round(fraction * len(members))), len(members) - 1)])
    return np.concatenate(held)


def _whole_groups(groups: np.ndarray, fraction: float, generator: np.random.Generator) -> np.ndarray:
    names, members, counts = np.unique(groups, return_inverse=True, return_counts=True)
    order = generator.permutation(len(names))
    taken = order[np.cumsum(counts[order]) <= max(fraction * len(groups), counts[order[0]])]
    return np.flatnonzero(np.isin(members, taken))


def _build(
    name: str, tables: dict[str, Table], text_columns: tuple[str, ...], label_columns: tuple[str, ...], *,
    kind: Kind | None = None, names: Names | None = None,
    metrics: Sequence[str] = (), held_out: HoldOut | Sequence[int] | None = None,
) -> Task:  # fmt: skip
    """Return a task of texts with one label each, or with several."""
    several = has_label_sets(tables["train"], label_columns, kind)
    if len(label_columns) > 1 and not several:
        raise BayesLoraError(
            f"the label columns are {', '.join(label_columns)}, but {kind} has one: name one column, or give kind "
            "multi_label"
        )
    ids: dict[str, list[Any]]
    numbers: dict[str, int] = {}
    if several:
        read = {split: rows_with_sets(table, label_columns) for split, table in tables.items()}
        sets = learn_label_sets(read["train"], label_columns, names)
        ids = {split: sets.apply(table) for split, table in read.items()}
        found, classes, metrics = sets.names, rarest(ids["train"]), ("f1_micro", "f1_macro", "exact_match")
        kind = "multi_label"
    else:
        (column,) = label_columns
        read = {split: labelled(table, column, names or ()) for split, table in tables.items()}
        labels = learn_labels(read["train"], column, names_column(column, text_columns), names, kind)
        ids = {split: labels.apply(table, column) for split, table in read.items()}
        found, classes, kind = labels.names, ids["train"] if labels.names else [0] * len(read["train"]), labels.kind
        numbers = labels.numbers
        metrics = metrics or (("pearson", "spearman") if kind == "regression" else ("accuracy",))
    for table in read.values():
        _tell_empty_texts(table, text_columns)
    splits = {
        split: Dataset.from_dict({**_texts(table, text_columns), LABEL: ids[split]}) for split, table in read.items()
    }
    task = Task(name, kind, text_columns, LABEL, found, metrics[0], splits, tuple(metrics[1:]), label_numbers=numbers)
    return _with_held_out(task, tables["train"], read["train"], classes, held_out)


def _build_tagged(
    name: str, files: dict[str, Source | None], text_columns: tuple[str, ...], tag_column: str,
    names: Names | None, held_out: HoldOut | Sequence[int] | None, group: Sequence[str],
) -> Task:  # fmt: skip
    """Return a task of words with a tag each."""
    if len(text_columns) > 1:
        raise BayesLoraError(f"the text columns are {', '.join(text_columns)}, but words are in one: name one column")
    columns = (text_columns[0], tag_column)
    tables = {
        split: read_tagged(file, columns, group if split == "train" else ())
        for split, file in files.items()
        if file is not None
    }
    tags = learn_tags(tables["train"], columns, names)
    splits = {
        split: Dataset.from_dict({columns[0]: words_of(table, columns[0]), LABEL: tags.apply(table)})
        for split, table in tables.items()
    }
    classes, table = rarest_tags(splits["train"][LABEL], len(tags.names)), tables["train"]
    metric = "span_f1" if marks_spans(tags.names) else "accuracy"
    task = Task(name, "token_classification", text_columns, LABEL, tags.names, metric, splits)
    return _with_held_out(task, table, table, classes, held_out)


def _with_held_out(
    task: Task, table: Table, read: Table, classes: Sequence[Any], held_out: HoldOut | Sequence[int] | None
) -> Task:
    """Divide the training split, the labelled rows `read` of `table`."""
    if held_out is None:
        return task
    number_at = {place: number for number, place in enumerate(table.places)}
    numbers = [number_at[place] for place in read.places]
    if isinstance(held_out, HoldOut):
        held = held_out.rows(read, classes, task.text_columns)
    else:
        recorded = set(held_out)
        held = [row for row, number in enumerate(numbers) if number in recorded]
    if not 0 < len(held) < len(read):
        raise BayesLoraError(
            f"{len(held)} of the {len(read)} labelled rows of {table.path} are held out, but both parts need at least "
            "1: give an evaluation file"
        )
    whole, kept = task.train_split, sorted({*range(len(read))} - {*held})
    splits = {**task.splits, "train": whole.select(kept), "validation": whole.select(held)}
    return dataclasses.replace(task, splits=splits, evaluation_rows=[numbers[row] for row in held])


def _texts(table: Table, text_columns: tuple[str, ...]) -> dict[str, list[Any]]:
    return {name: table.strings(name) for name in text_columns}


def _tell_empty_texts(table: Table, text_columns: tuple[str, ...]) -> None:
    for name in text_columns:
        tell_empty(table, table.columns[name], name)


def _checked_columns(text_columns: str | Sequence[str], label_column: str | None = None) -> tuple[str, ...]:
    columns = (text_columns,) if isinstance(text_columns, str) else tuple(text_columns)
    if len(columns) not in (1, 2) or len(set(columns)) != len(columns):
        raise BayesLoraError(f"the text columns are {list(columns)}, but must be one or two different ones: name them")
    if label_column in columns:
        raise BayesLoraError(f"the label column {label_column!r} is a text column too, but must not be: name another")
    if LABEL in columns:
        raise BayesLoraError(f"a text column is {LABEL!r}, but only the label may be: rename it in the files")
    return columns


def load_choices(file: Source, *, task_name: str | None = None, answers: bool = False) -> Dataset:
    """Read multiple-choice rows of a data file: columns `question`, `choices`, and `subject` if the file has it.

    Args:
        file: `.jsonl`, `.json` or `.parquet`; or rows.
        task_name: task with rows of the same form; for `winogrande`, questions are cut at their gap `_`.
        answers: also read the column `answer` as `label`; otherwise the rows are to predict on.

    Raises:
        BayesLoraError: a file cannot be used; the message has its name and line.
    """
    gap = task_name in KNOWN and KNOWN[task_name].gap
    table = read_table(file, (QUESTION, CHOICES, ANSWER) if answers else (QUESTION, CHOICES), (SUBJECT,))
    return Dataset.from_dict(choice_columns(table, gap=gap, labelled=answers))


def _choice_task(known: Known, tables: Mapping[str, Table]) -> Task:
    splits = {split: Dataset.from_dict(choice_columns(table, gap=known.gap)) for split, table in tables.items()}
    letters = list(LETTERS[: max(len(choices) for split in splits.values() for choices in split[CHOICES])])
    return Task(
        known.name, "multiple_choice", known.text_columns, LABEL, letters, known.metrics[0], splits,
        group_column=GROUP if "train" in splits and GROUP in splits["train"].column_names else None,
        scoring="cloze" if known.cloze else "letters",
        cloze=known.cloze or Cloze(),
    )  # fmt: skip


def _packaged_task(name: str) -> Task:
    splits = {split: Dataset.from_dict(columns) for split, columns in PACKAGED_TASKS[name]().items()}
    labels = list(packaged.LABELS)
    return Task(name, "classification", ("text",), LABEL, labels, "accuracy", splits, group_column="film")
