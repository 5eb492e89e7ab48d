"""Class ids and class names, or numbers, from the labels in a file."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bayeslora.data.tables import Table
from bayeslora.errors import BayesLoraError

Kind = Literal["classification", "regression"]
TaskKind = Kind | Literal["multiple_choice", "generation"]
_INTEGER = re.compile(r"[+-]?\d+")


@dataclass
class LabelMap:
    """Meaning of the training labels, to apply to other files as well.

    Attributes:
        kind: `"classification"` or `"regression"`.
        names: class names, index = class id; empty for regression.
        ids: class id by label in the file; empty for regression.
        named: True if the caller gave the names; classes may then be missing from the training data.
    """

    kind: Kind
    names: list[str]
    ids: dict[Any, int]
    named: bool = False

    def apply(self, table: Table, column: str) -> list[Any]:
        """Return the class id (int) or number (float) of each row.

        Raises:
            BayesLoraError: a label is missing from the training data or, for regression, is not a number.
        """
        values = _values(table, column)
        if self.kind == "regression":
            return [_number(value, table, row) for row, value in enumerate(values)]
        # The training labels decide how untyped labels are read, not the other labels of this file.
        integers = table.untyped and all(isinstance(key, int) for key in self.ids)
        result = []
        for row, raw in enumerate(values):
            value = int(raw) if integers and _INTEGER.fullmatch(raw.strip()) else raw
            if value not in self.ids:
                known = ", ".join(repr(key) for key in list(self.ids)[:20])
                source = "that were named" if self.named else "of the training data"
                raise BayesLoraError(
                    f"{table.where(row)} has the label {value!r}, but the labels {source} are {known}: "
                    "correct the label or drop the row"
                )
            result.append(self.ids[value])
        return result


def learn_labels(
    table: Table, column: str, names_column: str | None = None, names: Sequence[str] | None = None,
    kind: Kind | None = None,
) -> LabelMap:  # fmt: skip
    """Learn the meaning of labels from the training data.

    Strings become ids in order of first appearance, integers in numerical order. Numbers with a fraction are targets
    of a regression.

    Args:
        table: the training data.
        column: the label's column in `table`.
        names_column: column of `table` with the name of each integer label.
        names: class names, if the caller knows them. String labels are looked up in them, and so are integers if all
            names are integers. Otherwise integers index the names, unless `names_column` maps them differently.
        kind: None lets the labels decide.

    Raises:
        BayesLoraError: labels are missing, are neither all strings nor all integers (nor all numbers), have several
            names, or are all equal.
    """
    values = _typed(table, _values(table, column))
    if kind is None:
        numbers = all(isinstance(value, (int, float)) for value in values)
        fractions = numbers and any(isinstance(value, float) for value in values)
        kind = "regression" if fractions and not names else "classification"
    if kind == "regression":
        return LabelMap("regression", [], {})
    types = {type(value) for value in values}
    if types not in ({int}, {str}):
        row = next(i for i, value in enumerate(values) if type(value) is not type(values[0]) or types == {float})
        raise BayesLoraError(
            f"{table.where(row)} has the label {values[row]!r}, but labels are all integers or all strings: "
            "write every label the same way"
        )
    spelled = _spelled(table, values, names_column) if types == {int} else {}
    if names:
        return LabelMap("classification", list(names), _named_ids(names, values, spelled), named=True)
    distinct = sorted(set(values)) if types == {int} else list(dict.fromkeys(values))
    if len(distinct) < 2:
        raise BayesLoraError(
            f"every label in {table.path} is {distinct[0]!r}, but training needs 2 classes: check the file"
        )
    return LabelMap(
        "classification",
        [spelled.get(value, str(value)) for value in distinct],
        {value: index for index, value in enumerate(distinct)},
    )


def _values(table: Table, column: str) -> list[Any]:
    """Return the labels as the file has them; raise if one is missing or has another type."""
    values = table.columns[column]
    for row, value in enumerate(values):
        if value is None or value == "":
            raise BayesLoraError(
                f"{table.where(row)} is empty in column {column!r}, but needs a label: fill it in or drop the row"
            )
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise BayesLoraError(
                f"{table.where(row)} has the label {value!r} of type {type(value).__name__}, "
                "but it must be an integer, a string or a number: correct the row"
            )
    return values


def _typed(table: Table, values: list[Any]) -> list[Any]:
    """Return the labels, as numbers if the file is untyped and all of them are numbers."""
    if table.untyped:
        stripped = [value.strip() for value in values]
        if all(_INTEGER.fullmatch(value) for value in stripped):
            return [int(value) for value in stripped]
        if all(_is_number(value) for value in stripped):
            return [float(value) for value in stripped]
    return values


def _named_ids(names: Sequence[str], values: list[Any], spelled: dict[Any, str]) -> dict[Any, int]:
    if all(isinstance(value, str) for value in values):
        return {name: index for index, name in enumerate(names)}
    # Integers are ids, unless they are the names themselves (grades called "1" to "5") or the file spells them out.
    if all(_INTEGER.fullmatch(name) for name in names):
        return {int(name): index for index, name in enumerate(names)}
    ids = {index: index for index in range(len(names))}
    stated = {value: names.index(name) for value, name in spelled.items() if name in names}
    return ids if all(ids.get(value) == index for value, index in stated.items()) else stated


def _number(value: Any, table: Table, row: int) -> float:
    is_word = isinstance(value, str) and not (table.untyped and _is_number(value))
    if is_word or not math.isfinite(float(value)):
        raise BayesLoraError(
            f"{table.where(row)} has the label {value!r}, but regression needs a finite number: correct the row"
        )
    return float(value)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    # float() also accepts "nan", "infinity" and "1_0", which are words in a file of class names.
    return bool(re.match(r"[+-]?[\d.]", text)) and "_" not in text


def _spelled(table: Table, values: list[Any], names_column: str | None) -> dict[Any, str]:
    names: dict[Any, str] = {}
    if names_column is None or names_column not in table.columns:
        return names
    for row, (value, name) in enumerate(zip(values, table.columns[names_column], strict=True)):
        if not isinstance(name, str) or names.setdefault(value, name) != name:
            raise BayesLoraError(
                f"{table.where(row)} calls the label {value!r} {name!r}, but each label needs one name "
                f"in column {names_column!r}: correct the row"
            )
    return names
