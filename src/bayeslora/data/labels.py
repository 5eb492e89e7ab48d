"""From the labels in a file to class ids and class names, or to numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bayeslora.data.tables import Table
from bayeslora.errors import BayesLoraError

Kind = Literal["classification", "regression"]
_INTEGER = re.compile(r"[+-]?\d+")


@dataclass
class LabelMap:
    """The meaning of the training labels, to be applied to other files as well.

    Attributes:
        kind: whether labels are classes or numbers.
        names: class names, index = class id; empty for regression.
        ids: class id by the value in the file; empty for regression.
        named: the caller gave the names, so classes may be missing from the training data.
    """

    kind: Kind
    names: list[str]
    ids: dict[Any, int]
    named: bool = False

    def apply(self, table: Table, column: str) -> list[Any]:
        """Class ids (int) or numbers (float), a row each.

        Raises:
            BayesLoraError: a label that the training data does not have, or for regression one that is not a number.
        """
        values = _values(table, column)
        if self.kind == "regression":
            return [_number(value, table, row) for row, value in enumerate(values)]
        # The training labels decide how labels without a type are read, not what else is in this file.
        integers = table.untyped and all(isinstance(key, int) for key in self.ids)
        result = []
        for row, raw in enumerate(values):
            value = int(raw) if integers and _INTEGER.fullmatch(raw.strip()) else raw
            if value not in self.ids:
                known = ", ".join(repr(key) for key in list(self.ids)[:20])
                source = "that were named" if self.named else "of the training data"
                raise BayesLoraError(
                    f"{table.where(row)} has the label {value!r}, which is none of the labels {source} ({known}): "
                    "correct the label or take the row out"
                )
            result.append(self.ids[value])
        return result


def learn_labels(
    table: Table, column: str, names_column: str | None = None, names: Sequence[str] | None = None,
    kind: Kind | None = None,
) -> LabelMap:  # fmt: skip
    """Read the meaning of labels off the training data.

    Strings become ids in order of first appearance, integers in their numerical order. Numbers with a fraction are
    targets of a regression.

    Args:
        table: the training data.
        column: the label's column in `table`.
        names_column: a column of `table` that spells each integer label out.
        names: class names, where the caller knows them. String labels are looked up in them; integers too where all
            the names are integers, through `names_column` where it says otherwise, and else index them.
        kind: decided by the labels when None.

    Raises:
        BayesLoraError: labels that are missing, neither all strings nor all integers (nor all numbers), have several
            names, or are all the same.
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
    if names:
        spelled = _spelled(table, values, names_column) if types == {int} else {}
        return LabelMap("classification", list(names), _named_ids(names, values, spelled), named=True)
    distinct = sorted(set(values)) if types == {int} else list(dict.fromkeys(values))
    if len(distinct) < 2:
        raise BayesLoraError(
            f"every label in {table.path} is {distinct[0]!r}, but training needs 2 classes: check the file"
        )
    spelled = _spelled(table, values, names_column) if types == {int} else {}
    return LabelMap(
        "classification",
        [spelled.get(value, str(value)) for value in distinct],
        {value: index for index, value in enumerate(distinct)},
    )


def _values(table: Table, column: str) -> list[Any]:
    """Return the labels as the file has them; raises where one is missing."""
    values = table.columns[column]
    for row, value in enumerate(values):
        if value is None or value == "":
            raise BayesLoraError(f"{table.where(row)} needs a label in column {column!r}: fill it in or drop the row")
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise BayesLoraError(
                f"{table.where(row)} has the label {value!r} of type {type(value).__name__}, "
                "but it must be an integer, a string or a number: correct the row"
            )
    return values


def _typed(table: Table, values: list[Any]) -> list[Any]:
    """The labels; of a file without types, numbers where all of them are numbers."""
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
    said = {value: names.index(name) for value, name in spelled.items() if name in names}
    return ids if all(ids.get(value) == index for value, index in said.items()) else said


def _number(value: Any, table: Table, row: int) -> float:
    if isinstance(value, str) and not (table.untyped and _is_number(value)):
        raise BayesLoraError(
            f"{table.where(row)} has the label {value!r}, but regression needs a number: correct the row"
        )
    if not math.isfinite(float(value)):
        raise BayesLoraError(
            f"{table.where(row)} has the label {value!r}, but regression needs a finite number: correct the row"
        )
    return float(value)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    # float() also takes "nan", "infinity" and "1_0", which in a file of class names are words.
    return bool(re.match(r"[+-]?[\d.]", text)) and "_" not in text


def _spelled(table: Table, values: list[Any], names_column: str | None) -> dict[Any, str]:
    names: dict[Any, str] = {}
    if names_column is None or names_column not in table.columns:
        return names
    for row, (value, name) in enumerate(zip(values, table.columns[names_column], strict=True)):
        if not isinstance(name, str) or names.setdefault(value, name) != name:
            raise BayesLoraError(
                f"{table.where(row)} calls the label {value!r} {name!r}, but each label needs one name "
                f"in column {names_column!r}"
            )
    return names
