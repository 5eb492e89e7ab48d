"""Published tasks of generation from a data folder: SQuAD, whose answers are short, and E2E, texts from data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from bayeslora.data.tables import Table, read_table
from bayeslora.errors import BayesLoraError
from bayeslora.vocabulary import COMPLETION, PROMPT

REFERENCES = "references"
"""Column of the right answers of a row, of which an answer may meet any; empty where the right answer is none."""
NO_ANSWER = "no answer"
"""Answer of a model to a question that its text does not answer."""
_SPLITS = {"train": ("train",), "validation": ("dev", "validation"), "test": ("test",)}

Row = Mapping[str, Any]


@dataclass(frozen=True)
class TextTask:
    """One task of generation.

    Attributes:
        columns: that its files must have.
        optional: columns that they may have.
        prompt: function from a row to the text that the model continues.
        answers: function from a row to its right answers.
        learns_all: True if each of the right answers is a training row, not only the first.
        metrics: the headline score, then the other.
        max_new_tokens: maximum length of an answer in tokens.
    """

    columns: tuple[str, ...]
    optional: tuple[str, ...]
    prompt: Callable[[Row], str]
    answers: Callable[[Row], Any]
    learns_all: bool
    metrics: tuple[str, str]
    max_new_tokens: int


def _question(row: Row) -> str:
    return f"Context: {row['context']}\nQuestion: {row['question']}\nAnswer:"


def _spans(row: Row) -> Any:
    """Return the answers of a question in SQuAD's form, or in that of the hub; none if it is impossible."""
    given = row["answers"]
    if row.get("is_impossible"):
        return []
    return given.get("text") if isinstance(given, Mapping) else given


TEXT_TASKS = {
    "squad": TextTask(
        ("context", "question", "answers"), ("is_impossible",), _question, _spans, False, ("f1", "exact_match"), 32
    ),
    "e2e": TextTask(
        ("input", REFERENCES), (), lambda row: f"Data: {row['input']}\nText:", lambda row: row[REFERENCES], True,
        ("bleu", "rouge_l"), 96,
    ),
}  # fmt: skip


def text_splits(name: str, data_dir: str | Path | None) -> dict[str, Dataset]:
    """Return the splits of one of `TEXT_TASKS` with the columns `prompt`, `completion` and `references`.

    The folder has `name/{train,dev,test}.jsonl`; `test` may be missing.

    Raises:
        BayesLoraError: there is no folder, or a file is missing or malformed.
    """
    if data_dir is None:
        raise BayesLoraError(
            f"{name} is read from a folder, but none is given: give data_dir, with {name}/train.jsonl"
        )
    task, folder = TEXT_TASKS[name], Path(data_dir) / name
    splits = {}
    for split, names in _SPLITS.items():
        found = next((path for path in (folder / f"{file}.jsonl" for file in names) if path.is_file()), None)
        if found is not None or split != "test":
            table = read_table(found or folder / f"{names[0]}.jsonl", task.columns, task.optional)
            splits[split] = _rows(table, task, each=task.learns_all and split == "train")
    return splits


def _rows(table: Table, task: TextTask, *, each: bool) -> Dataset:
    columns: dict[str, list[Any]] = {PROMPT: [], COMPLETION: [], REFERENCES: []}
    for number in range(len(table)):
        row = {name: values[number] for name, values in table.columns.items()}
        references = task.answers(row)
        if not isinstance(references, list) or not all(isinstance(text, str) and text.strip() for text in references):
            raise BayesLoraError(
                f"{table.where(number)} has {str(references)[:40]} as right answers, but a list of texts is needed: "
                "correct the row"
            )
        for text in (references if each else references[:1]) or [NO_ANSWER]:
            columns[PROMPT].append(task.prompt(row))
            columns[COMPLETION].append(f" {text.strip()}")
            columns[REFERENCES].append(references)
    return Dataset.from_dict(columns)
