"""Multiple-choice rows out of a table: questions, two to five choices each, the index of the right one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bayeslora.data.tables import Table
from bayeslora.errors import BayesLoraError

QUESTION, CHOICES, ANSWER, SUBJECT, LABEL = "question", "choices", "answer", "subject", "label"
GROUP = "group"
"""Column of items that belong together and must not be told apart by a split."""
LETTERS = ("A", "B", "C", "D", "E")
"""What choices are called, in their order; an item has at most as many."""
GAP = "_"
"""Mark in a sentence for the place of the choice."""


@dataclass(frozen=True)
class ChoiceFiles:
    """A published multiple-choice task: which files of a data folder can be which split, and whether it has gaps."""

    files: Mapping[str, tuple[str, ...]]
    gap: bool = False

    @property
    def train_files(self) -> tuple[str, ...]:
        return self.files.get("train", ())


_TRAIN_DEV_TEST = {"train": ("train",), "validation": ("dev", "validation"), "test": ("test",)}
CHOICE_FILES = {
    "winogrande": ChoiceFiles({"train": ("train_s", "train_xs", "train_m"), "validation": ("dev",)}, gap=True),
    "arc_easy": ChoiceFiles(_TRAIN_DEV_TEST),
    "openbookqa": ChoiceFiles(_TRAIN_DEV_TEST),
    # Five examples a subject, for prompts: nothing to train on.
    "mmlu": ChoiceFiles({"few_shot": ("dev",), "test": ("test",)}),
}


def choice_columns(table: Table, *, gap: bool = False, labelled: bool = True) -> dict[str, list[Any]]:
    """The columns of a multiple-choice split.

    Args:
        table: has `question`, `choices` and, unless `labelled` is False, `answer`; may have `subject` and `id`.
        gap: the questions are sentences with one `_`. Each is cut there (`fill_gap`), and rows whose ids differ only
            after the last hyphen, such as the two twins of a WinoGrande sentence, get one value in a column `group`.
        labelled: False for rows to predict on.

    Returns:
        `question`, `choices` and, where the table says them, `label` (index of the right choice), `subject`, `group`.

    Raises:
        BayesLoraError: a row that is not a multiple-choice item, with its place.
    """
    questions = [_question(table, row, value) for row, value in enumerate(table.columns[QUESTION])]
    choices = [_choices(table, row, value) for row, value in enumerate(table.columns[CHOICES])]
    columns: dict[str, list[Any]] = {QUESTION: questions, CHOICES: choices}
    if gap:
        filled = [_fill(table, row, *item) for row, item in enumerate(zip(questions, choices, strict=True))]
        columns = {QUESTION: [stem for stem, _ in filled], CHOICES: [endings for _, endings in filled]}
        if "id" in table.columns:
            columns[GROUP] = [str(name).rpartition("-")[0] or str(name) for name in table.columns["id"]]
    if labelled:
        answers = enumerate(zip(table.columns[ANSWER], choices, strict=True))
        columns[LABEL] = [_answer(table, row, answer, options) for row, (answer, options) in answers]
    if SUBJECT in table.columns:
        columns[SUBJECT] = [str(value) for value in table.columns[SUBJECT]]
    return columns


def fill_gap(sentence: str, choices: list[str]) -> tuple[str, list[str]]:
    """Cut a sentence at its gap `_`: the text before it, and each choice followed by the text after it.

    So a choice is judged by how the sentence goes on with it, by a language model and by a pair encoder alike, and
    the shared beginning is read once.
    """
    before, _, after = sentence.partition(GAP)
    return before.strip(), [choice + after.rstrip() for choice in choices]


def _fill(table: Table, row: int, question: str, choices: list[str]) -> tuple[str, list[str]]:
    if question.count(GAP) != 1:
        raise BayesLoraError(
            f"{table.where(row)} has {question.count(GAP)} gaps {GAP!r} in its question, but needs 1: correct it"
        )
    return fill_gap(question, choices)


def _question(table: Table, row: int, value: Any) -> str:
    if not isinstance(value, str):
        seen = "an empty value" if value is None else f"{value!r} of type {type(value).__name__}"
        raise BayesLoraError(
            f"{table.where(row)} has {seen} in column {QUESTION!r}, but a string is needed: fill it in or drop the row"
        )
    return value


def _choices(table: Table, row: int, value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(choice, str) for choice in value):
        raise BayesLoraError(f"{table.where(row)} needs a list of strings in column {CHOICES!r}: correct the row")
    if not 2 <= len(value) <= len(LETTERS):
        raise BayesLoraError(
            f"{table.where(row)} has {len(value)} choices, but needs 2 to {len(LETTERS)}: correct the row"
        )
    return value


def _answer(table: Table, row: int, value: Any, choices: list[str]) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(choices):
        raise BayesLoraError(
            f"{table.where(row)} has the answer {value!r}, but needs the index of one of its {len(choices)} "
            f"choices (0 to {len(choices) - 1}): correct the row"
        )
    return value
