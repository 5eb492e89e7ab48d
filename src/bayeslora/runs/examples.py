"""Choose rows of an evaluation to look at, and keep them with their texts in `examples.json`.

The texts are those of the data. Where they must not be published, train with `--report-rows 0`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
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
        row: its number in the split, from 1.
        texts: by column, cut after 600 characters; the choices of multiple choice in one text; of tagged words the
            word, and the words around it with the word in brackets.
        label: name of the right class, or the number.
        predicted: name of the most probable class, or the number.
        confidence: probability of the predicted class; None for numbers.
        of_label: probability of the right class; None for numbers.
        mutual_information: in nats, with samples of the weights.
    """

    row: int
    texts: dict[str, str]
    label: str
    predicted: str
    confidence: float | None = None
    of_label: float | None = None
    mutual_information: float | None = None


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
    """Return up to `count` rows of each kind.

    Args:
        evaluation: of the rows.
        rows: the split, with its texts.
        task: of the split.
        count: 0 gives none.
    """
    from numpy import abs, arange, argsort, searchsorted, where

    if task.kind == "multi_label":
        return _of_label_sets(evaluation, rows, task, count)
    predictions, labels = evaluation.predictions, evaluation.labels
    if task.kind == "regression":
        order = argsort(-abs(predictions - labels), kind="stable")
        numbers = [
            Example(int(i) + 1, _texts(rows[int(i)], task), f"{labels[i]:.4g}", f"{predictions[i]:.4g}")
            for i in order[:count]
        ]
        return Examples(wrongest=numbers)
    predicted, confidence = predictions.argmax(axis=1), predictions.max(axis=1)
    of_label = predictions[arange(len(labels)), labels]
    # The number of the sentence of each word; of other rows their own.
    of_word = getattr(evaluation, "row", arange(len(labels)))

    def example(i: int) -> Example:
        information = float(evaluation.mutual_information[i]) if evaluation.samples else None
        names = (task.labels[labels[i]], task.labels[predicted[i]])
        row = int(of_word[i])
        texts = _texts(rows[row], task)
        if task.kind == "token_classification":
            texts = _word(rows[row][task.text_columns[0]], i - int(searchsorted(of_word, row)))
        return Example(row + 1, texts, *names, float(confidence[i]), float(of_label[i]), information)

    unsure = argsort(confidence, kind="stable")[:count]
    wrong = where(predicted != labels)[0]
    wrongest = wrong[argsort(of_label[wrong], kind="stable")][:count]
    return Examples(*([example(int(i)) for i in chosen] for chosen in (unsure, wrongest)))


def _of_label_sets(evaluation: Any, rows: Dataset, task: Task, count: int) -> Examples:
    """Return `choose_examples` of rows with several labels, which are as certain as the least certain label."""
    from numpy import argsort, maximum, where

    p, labels = evaluation.predictions, evaluation.labels
    confidence, of_label = maximum(p, 1 - p).min(axis=1), where(labels == 1, p, 1 - p).min(axis=1)

    def names(row: Any) -> str:
        return ", ".join(name for name, has in zip(task.labels, row, strict=True) if has) or "none"

    def example(i: int) -> Example:
        information = float(evaluation.mutual_information[i].max()) if evaluation.samples else None
        said = (names(labels[i]), names(p[i] > 0.5))
        return Example(i + 1, _texts(rows[i], task), *said, float(confidence[i]), float(of_label[i]), information)

    unsure = argsort(confidence, kind="stable")[:count]
    wrong = where(of_label < 0.5)[0]
    wrongest = wrong[argsort(of_label[wrong], kind="stable")][:count]
    return Examples(*([example(int(i)) for i in chosen] for chosen in (unsure, wrongest)))


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
