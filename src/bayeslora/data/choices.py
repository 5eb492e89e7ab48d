"""Multiple-choice rows of a table: a question, two to five choices, and the index of the correct one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from bayeslora.data.tables import Table, tell_empty
from bayeslora.errors import BayesLoraError, counted
from bayeslora.vocabulary import ANSWER, CHOICES, QUESTION, Normalization

SUBJECT, LABEL = "subject", "label"
GROUP = "group"
"""Column of related items that a split must keep together."""
LETTERS = ("A", "B", "C", "D", "E")
"""Letters of the choices, in order; an item has at most as many choices."""
GAP = "_"
"""Mark for the place of the choice in a sentence."""
ENDING = "ending"
"""Column of the text that follows the choice in a sentence with a gap."""


@dataclass(frozen=True)
class Cloze:
    """Rule for scoring each choice by the likelihood of its text.

    Attributes:
        context: text before a choice, a `str.format` template with `question`. It must not end in whitespace, because
            the choice follows after one space.
        normalization: `"none"` for the sum of the tokens' log-likelihoods, which favours short choices; `"tokens"` for
            their mean; `"bytes"` for the sum divided by the length of the text in UTF-8 bytes, which does not depend
            on the tokenizer.

    Raises:
        BayesLoraError: the context ends in whitespace, or the normalization is unknown.
    """

    context: str = "Question: {question}\nAnswer:"
    normalization: Normalization = "none"

    def __post_init__(self) -> None:
        if self.context[-1:].isspace():
            raise BayesLoraError(
                f"the context is {self.context!r}, but must not end in white space: leave the space out, which "
                "belongs to the choice's first token"
            )
        if self.normalization not in get_args(Normalization):
            raise BayesLoraError(
                f"normalization is {self.normalization!r}, but must be {', '.join(get_args(Normalization))}: give one"
            )


def choice_columns(table: Table, *, gap: bool = False, labelled: bool = True) -> dict[str, list[Any]]:
    """Return the columns of a multiple-choice split.

    Args:
        table: has `question`, `choices` and, unless `labelled` is False, `answer`; may have `subject` and `id`.
        gap: True if the questions are sentences with one `_`. Each is cut there (`fill_gap`), and rows whose ids
            differ only after the last hyphen, such as the twins of a WinoGrande sentence, share a value in `group`.
            `ending` is the text after the gap.
        labelled: False for rows to predict on.

    Returns:
        `question`, `choices` and, if the table has them, `label` (index of the correct choice), `subject`, `group`,
        `ending`.

    Raises:
        BayesLoraError: a row is not a multiple-choice item; the message names its place.
    """
    questions = table.strings(QUESTION)
    choices = [_choices(table, row, value) for row, value in enumerate(table.columns[CHOICES])]
    columns: dict[str, list[Any]] = {QUESTION: questions, CHOICES: choices}
    tell_empty(table, questions, QUESTION)
    tell_empty(table, [min(each, key=lambda choice: len(choice.strip())) for each in choices], CHOICES)
    if gap:
        filled = [_fill(table, row, *item) for row, item in enumerate(zip(questions, choices, strict=True))]
        columns = {QUESTION: [stem for stem, _ in filled], CHOICES: [endings for _, endings in filled]}
        columns[ENDING] = [question.partition(GAP)[2].rstrip() for question in questions]
        if "id" in table.columns:
            columns[GROUP] = [str(name).rpartition("-")[0] or str(name) for name in table.columns["id"]]
    if labelled:
        answers = enumerate(zip(table.columns[ANSWER], choices, strict=True))
        columns[LABEL] = [_answer(table, row, answer, options) for row, (answer, options) in answers]
    if SUBJECT in table.columns:
        columns[SUBJECT] = [str(value) for value in table.columns[SUBJECT]]
    return columns


def fill_gap(sentence: str, choices: list[str]) -> tuple[str, list[str]]:
    """Cut a sentence at its gap `_` into the text before it, and each choice followed by the text after it.

    A language model and a pair encoder then both judge a choice by how the sentence continues with it, and read the
    shared beginning once.
    """
    before, _, after = sentence.partition(GAP)
    return before.strip(), [choice + after.rstrip() for choice in choices]


def _fill(table: Table, row: int, question: str, choices: list[str]) -> tuple[str, list[str]]:
    if question.count(GAP) != 1:
        raise BayesLoraError(
            f"{table.where(row)} has {counted(question.count(GAP), 'gap')} {GAP!r} in its question, but needs "
            "1: correct it"
        )
    return fill_gap(question, choices)


def _choices(table: Table, row: int, value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(choice, str) for choice in value):
        raise BayesLoraError(
            f"{table.where(row)} has {value!r} in column {CHOICES!r}, but needs a list of strings: correct the row"
        )
    if not 2 <= len(value) <= len(LETTERS):
        raise BayesLoraError(
            f"{table.where(row)} has {counted(len(value), 'choice')}, but needs 2 to {len(LETTERS)}: correct the row"
        )
    return value


def _answer(table: Table, row: int, value: Any, choices: list[str]) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(choices):
        raise BayesLoraError(
            f"{table.where(row)} has the answer {value!r}, but needs the index of one of its {len(choices)} "
            f"choices (0 to {len(choices) - 1}): correct the row"
        )
    return value
