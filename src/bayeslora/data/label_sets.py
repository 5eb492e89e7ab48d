"""Several labels a row: a column of lists, or a column of 0 and 1 for each label."""

from __future__ import annotations

import ast
import contextlib
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from bayeslora.data.labels import Kind, Names, unknown_label
from bayeslora.data.tables import Table
from bayeslora.errors import BayesLoraError

_SEPARATORS = ("|", ";", ",")
"""Between the labels of a cell, the first that any cell of a file has."""
_YES, _NO = {"1", "1.0", "true", "yes"}, {"0", "0.0", "false", "no"}
"""Spellings of whether a row has a label; lower case."""
_ENTRY = re.compile(r"""('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[\w.+-]+)(\s+(?=['"\w.+-]))?""")
"""An entry of a list, and the blanks between it and the next one where there is no comma."""


@dataclass
class LabelSets:
    """Meaning of the labels of rows that have several.

    Attributes:
        columns: one column of lists, or one of 0 and 1 for each of `names`.
        names: of the labels.
        named: True if the caller gave the names.
    """

    columns: tuple[str, ...]
    names: list[str]
    named: bool = False

    @property
    def kind(self) -> Kind:
        """Always `"multi_label"`."""
        return "multi_label"

    def apply(self, table: Table) -> list[list[float]]:
        """Return for each row 1 for the labels that it has and 0 for the others, in the order of `names`.

        Raises:
            BayesLoraError: a label is not among `names`, or a value is neither 0 nor 1.
        """
        if len(self.columns) > 1:
            return [[float(_is_set(table, name, row)) for name in self.columns] for row in range(len(table))]
        known = {name: place for place, name in enumerate(self.names)}
        found = []
        for row, labels in enumerate(_lists(table, self.columns[0], known)):
            if unknown := next((label for label in labels if label not in known), None):
                raise unknown_label(table, row, unknown, self.names, self.named)
            found.append([float(name in labels) for name in self.names])
        return found


def has_label_sets(table: Table, columns: Sequence[str], kind: str | None) -> bool:
    """Return whether the rows have several labels each: by their columns, by lists in them, or by the kind asked."""
    known = [value for value in table.columns[columns[0]] if not _is_missing(value)]
    lists = bool(known) and all(isinstance(value, list) for value in known)
    return kind == "multi_label" or kind is None and (len(columns) > 1 or lists)


def rows_with_sets(table: Table, columns: Sequence[str]) -> Table:
    """Return the rows whose labels are known, with a warning that counts the others.

    An empty list, and an empty cell of a CSV file, is a row without any of the labels. A missing value (null) is
    unknown.
    """
    if len(columns) > 1:
        return table
    values = table.columns[columns[0]]
    kept = [row for row, value in enumerate(values) if not _is_missing(value)]
    if not kept:
        raise BayesLoraError(f"{table.path} has 0 rows with labels in column {columns[0]!r}, but needs some: add them")
    if missing := len(values) - len(kept):
        warnings.warn(
            f"{table.path} has {missing:,} of {len(values):,} rows without labels in column {columns[0]!r}, "
            "which are left out: write an empty list where a row has none of them",
            stacklevel=3,
        )
        return table.select(kept)
    return table


def learn_label_sets(table: Table, columns: Sequence[str], names: Names | None = None) -> LabelSets:
    """Learn the labels from the training data: those in the lists, sorted, or the names of the columns.

    Raises:
        BayesLoraError: there are less than 2 labels, names are given for columns, or a value is not a label.
    """
    if len(columns) > 1:
        if names is not None and list(names) != list(columns):
            raise BayesLoraError(
                f"the labels are {', '.join(names)}, but the label columns name them already: leave the labels out"
            )
        return LabelSets(tuple(columns), list(columns))
    _check_not_flags(table, columns[0])
    counts = Counter(label for labels in _lists(table, columns[0], names or ()) for label in labels)
    found = list(names) if names is not None else sorted(counts, key=_by_value)
    if len(found) < 2:
        raise BayesLoraError(
            f"the lists in column {columns[0]!r} of {table.path} have {len(found)} different labels, but training "
            "needs 2: check the column"
        )
    return LabelSets(tuple(columns), found, named=names is not None)


def _check_not_flags(table: Table, column: str) -> None:
    """Refuse lists of one 0 or 1 for each of all labels, which would be read as the labels 0 and 1."""
    values = table.columns[column]
    length = len(values[0]) if isinstance(values[0], list) else 0
    if length > 1 and all(isinstance(value, list) and len(value) == length for value in values):
        if all(flag in (0, 1) for value in values for flag in value if not isinstance(flag, (list, dict))):
            raise BayesLoraError(
                f"every row of {table.path} has {length} numbers 0 or 1 in column {column!r}, but a list holds the "
                "labels that its row has: write their names, or one column of 0 and 1 for each label"
            )


def rarest(sets: Sequence[Sequence[float]]) -> list[int]:
    """Return for each row the number of its rarest label, -1 without any, as a class to stratify by."""
    counts = [sum(row[label] for row in sets) for label in range(len(sets[0]))]
    return [min((label for label, has in enumerate(row) if has), key=lambda n: counts[n], default=-1) for row in sets]


def _lists(table: Table, column: str, known: Collection[str]) -> list[list[str]]:
    """Return the labels of each row as texts; a row's labels are different. A cell may be one of the `known` names."""
    values = [[v.strip()] if isinstance(v, str) and v.strip() in known else v for v in table.columns[column]]
    texts = [value for value in values if isinstance(value, str)]
    separator = next((mark for mark in _SEPARATORS if any(mark in text for text in texts)), _SEPARATORS[0])
    return [_labels(table, column, row, value, separator) for row, value in enumerate(values)]


def _labels(table: Table, column: str, row: int, value: Any, separator: str) -> list[str]:
    if isinstance(value, str):
        text = value.strip()
        parts = listed(table, column, row) if text.startswith("[") else text.split(separator)
        value = [item for item in parts if item != ""] if parts is not None else None
        value = None if parts and text and not value else value  # separators alone are not the text of no labels
    is_list = isinstance(value, list) and all(isinstance(item, (str, int)) for item in value)
    names = [str(item).strip() for item in value] if is_list else []
    if not is_list or not all(names):
        raise BayesLoraError(
            f"{table.where(row)} has {str(table.columns[column][row])[:40]!r} in column {column!r}, but a list of "
            "labels is needed, each a text or a whole number: correct the row"
        )
    return list(dict.fromkeys(names))


def listed(table: Table, column: str, row: int, kind: type = object) -> list[Any] | None:
    """Return the list that a text spells as JSON, Python or pandas write it; None for others.

    One without any entry of the `kind` is no list, unless it is empty.

    Raises:
        BayesLoraError: a comma is missing between two entries, as NumPy writes them.
    """
    text = table.columns[column][row].strip()
    if not (text.startswith("[") and text.endswith("]")):
        return None
    separated = _ENTRY.sub(lambda entry: f"{entry[1]}," if entry[2] else entry[0], text)
    found = _parsed(separated)
    if found and not any(isinstance(entry, kind) for entry in found):
        return None
    if found and separated != text:
        raise BayesLoraError(
            f"{table.where(row)} has {text[:40]!r} in column {column!r}, but a list with commas between its entries "
            "is needed: write NumPy arrays as lists (tolist)"
        )
    return found


def _parsed(text: str) -> list[Any] | None:
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            found = read(text)
            return found if isinstance(found, list) else None
    return None


def _is_set(table: Table, column: str, row: int) -> bool:
    value = table.columns[column][row]
    text = str(value).strip().lower()
    if text not in _YES | _NO:
        raise BayesLoraError(
            f"{table.where(row)} has {value!r} in column {column!r}, but 0 or 1 is needed: correct the row"
        )
    return text in _YES


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _by_value(name: str) -> tuple[float, str]:
    return (float(name), name) if name.isdecimal() else (math.inf, name)


def label_columns(name: str, known: Sequence[str]) -> tuple[str, ...]:
    """Return the columns that `a,b,c` names; one if the file, whose columns are `known`, has a column of that name."""
    parts = tuple(part.strip() for part in name.split(","))
    if len(parts) == 1 or name in known:
        return (name,)
    if not all(parts) or len(set(parts)) != len(parts):
        raise BayesLoraError(f"the label columns are {name!r}, but must be different names: write each once")
    return parts
