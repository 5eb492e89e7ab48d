"""Choose rows of an evaluation to look at, and keep them with their texts in `examples.json`.

The texts are those of the data. Where they must not be published, train with `--report-rows 0`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayeslora.errors import BayesLoraError
from bayeslora.files import save_json
from bayeslora.runs.schema import Mismatch, from_json, to_json

if TYPE_CHECKING:
    from datasets import Dataset

    from bayeslora.data import Task
    from bayeslora.evaluation import Evaluation, MultiLabelEvaluation

EXAMPLES_FILE = "examples.json"
ROWS = 5
"""Default number of rows of each kind."""
_LONGEST = 600  # characters of a text
_AROUND = 12  # words on each side of one


@dataclass(frozen=True)
class Example:
    """A row of the evaluation split and what the model says of it.

    Attributes:
        row: its number from 1, in the split, or in the file that the split was held out from.
        texts: by column, cut after 600 characters; the choices of multiple choice in one text; of tagged words the
            word, and the words around it with the word in brackets.
        label: name of the right class, or the number.
        predicted: name of the most probable class, or the number.
        confidence: probability of the predicted class; None for numbers.
        of_label: probability of the right class; None for numbers.
        mutual_information: in nats, with samples of the weights.
        rows: number of rows, or of words in equal sentences, with these texts; `other_labels` are those of the others.
    """

    row: int
    texts: dict[str, str]
    label: str
    predicted: str
    confidence: float | None = None
    of_label: float | None = None
    mutual_information: float | None = None
    rows: int = 1
    other_labels: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Examples:
    """Rows that the model is least certain of, and those where it is most wrong, each in this order.

    The latter give the right class the lowest probability among wrong predictions, or have the largest errors.
    """

    least_certain: list[Example] = field(default_factory=list)
    wrongest: list[Example] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Write `folder/examples.json`."""
        save_json(folder / EXAMPLES_FILE, to_json(self))


def choose_examples(
    evaluation: Evaluation | MultiLabelEvaluation, rows: Dataset, task: Task, count: int = ROWS
) -> Examples:
    """Return up to `count` rows of each kind from a split of the task; of rows with equal texts the first."""
    from numpy import abs, arange, argsort, searchsorted

    if task.kind == "multi_label":
        return _of_label_sets(evaluation, rows, task, count)
    predictions, labels = evaluation.predictions, evaluation.labels
    if task.kind == "regression":
        order = argsort(-abs(predictions - labels), kind="stable")
        numbers = [f"{label:.4g}" for label in labels]
        alike = _Alike(_keys(rows, task), numbers)

        def number(i: int) -> Example:
            return Example(_number(i, task), _texts(rows[i], task), numbers[i], f"{predictions[i]:.4g}")

        return Examples(wrongest=alike.first(order, count, number))
    predicted, confidence = predictions.argmax(axis=1), predictions.max(axis=1)
    of_label = predictions[arange(len(labels)), labels]
    # The number of the sentence of each word; of other rows their own.
    of_word = getattr(evaluation, "row", arange(len(labels)))
    keys = _keys(rows, task)
    places = [(keys[row], i - int(searchsorted(of_word, row))) for i, row in enumerate(map(int, of_word))]

    def example(i: int) -> Example:
        information = float(evaluation.mutual_information[i]) if evaluation.samples else None
        names = (task.labels[labels[i]], task.labels[predicted[i]])
        row = int(of_word[i])
        texts = _texts(rows[row], task)
        if task.kind == "token_classification":
            texts = _word(rows[row][task.text_columns[0]], places[i][1])
        return Example(_number(row, task), texts, *names, float(confidence[i]), float(of_label[i]), information)

    alike = _Alike(places, [task.labels[label] for label in labels])
    return alike.examples(count, example, confidence, of_label, predicted != labels)


def _of_label_sets(evaluation: Any, rows: Dataset, task: Task, count: int) -> Examples:
    """Return `choose_examples` of rows with several labels, which are as certain as the least certain label."""
    from numpy import maximum, where

    p, labels = evaluation.predictions, evaluation.labels
    confidence, of_label = maximum(p, 1 - p).min(axis=1), where(labels == 1, p, 1 - p).min(axis=1)

    def names(row: Any) -> str:
        return ", ".join(name for name, has in zip(task.labels, row, strict=True) if has) or "none"

    def example(i: int) -> Example:
        information = float(evaluation.mutual_information[i].max()) if evaluation.samples else None
        said = (names(labels[i]), names(p[i] > 0.5))
        return Example(
            _number(i, task), _texts(rows[i], task), *said, float(confidence[i]), float(of_label[i]), information
        )

    alike = _Alike(_keys(rows, task), list(map(names, labels)))
    return alike.examples(count, example, confidence, of_label, of_label < 0.5)


class _Alike:
    """Rows, or words, with equal texts, of which one is shown."""

    def __init__(self, keys: Sequence[Any], labels: Sequence[str]) -> None:
        self._keys, self._labels = keys, labels
        self._members: dict[Any, list[int]] = {}
        for number, key in enumerate(keys):
            self._members.setdefault(key, []).append(number)

    def examples(self, count: int, example: Callable[[int], Example], sure: Any, right: Any, wrong: Any) -> Examples:
        """Return the first `count` by confidence `sure`, and of those that are `wrong` by the probability `right`."""
        by_right = right.argsort(kind="stable")
        orders = (sure.argsort(kind="stable"), by_right[wrong[by_right]])
        return Examples(*(self.first(order, count, example) for order in orders))

    def first(self, order: Iterable[Any], count: int, example: Callable[[int], Example]) -> list[Example]:
        """Return the first `count` with different texts, in this order, with what is known of those like them."""
        firsts: dict[Any, int] = {}
        for number in map(int, order):
            if len(firsts) == count:
                break
            firsts.setdefault(self._keys[number], number)
        found = []
        for key, number in firsts.items():
            labels = {self._labels[each] for each in self._members[key]} - {self._labels[number]}
            found.append(replace(example(number), rows=len(self._members[key]), other_labels=sorted(labels)))
        return found


def _number(row: int, task: Task) -> int:
    """Return the number of a row of the split for a person to find it by."""
    return (task.evaluation_rows[row] if task.evaluation_rows else row) + 1


def _keys(rows: Dataset, task: Task) -> list[str]:
    """Return the texts of each row in one string."""
    return list(map(repr, zip(*(rows[column] for column in task.text_columns), strict=True)))


def read_examples(folder: Path) -> Examples:
    """Return the content of `folder/examples.json`; without the file there are none.

    Raises:
        BayesLoraError: the file is damaged.
    """
    path = Path(folder) / EXAMPLES_FILE
    if not path.is_file():
        return Examples()
    try:
        found: Examples = from_json(Examples, json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, OSError) as error:  # a Mismatch is a ValueError
        reason = error if isinstance(error, Mismatch) else f"not valid JSON, {error}"
        raise BayesLoraError(f"{path} is damaged ({reason}), but must hold rows with texts: delete it") from error
    return found


def _texts(row: dict[str, Any], task: Task) -> dict[str, str]:
    return {column: _shown(row[column], task.labels) for column in task.text_columns}


def _word(words: Sequence[str], place: int) -> dict[str, str]:
    """Return a word, and the words around it."""
    before, after = words[max(0, place - _AROUND) : place], words[place + 1 : place + 1 + _AROUND]
    return {"word": _shown(words[place], ()), "in": _shown(" ".join([*before, f"[{words[place]}]", *after]), ())}


def _shown(value: str | Sequence[str], letters: Sequence[str]) -> str:
    text = value if isinstance(value, str) else "  ".join(f"{a}: {b}" for a, b in zip(letters, value, strict=False))
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
