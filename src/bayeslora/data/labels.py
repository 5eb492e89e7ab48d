"""Class ids and class names, or numbers, from the labels in a file."""

from __future__ import annotations

import dataclasses
import math
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

from bayeslora.data.tables import Table
from bayeslora.errors import BayesLoraError, counted

Kind = Literal["classification", "regression", "multi_label", "token_classification"]
Names = Sequence[str] | Mapping[str, int | None]
"""Class names by id, perhaps with the number that stands for each in the files."""
TaskKind = Kind | Literal["multiple_choice", "generation"]
_INTEGER = re.compile(r"[+-]?\d{1,300}")
_CODE = re.compile(r"0\d+")
_DECIMAL_COMMA = re.compile(r"[+-]?\d+(?:,\d+)?")
_NOTHING = {"", "nan", "<na>", "#n/a"}
"""Spellings of a missing label, which spreadsheets and pandas write; lower case."""
_DOUBTFUL = {"none", "null", "na", "n/a"}
"""Names of a class that may stand for a missing label; lower case."""
_MANY_NUMBERS = 20
"""More different whole numbers than this are told, as they may be amounts and not classes."""
_SLIPS = 10
"""One label in so many that is no whole number is told, as it may be a slip that makes all of them something else."""


def labelled(table: Table, column: str, known: Collection[str] = ()) -> Table:
    """Return the rows that have a label, stripped of blanks around it; a warning counts the others and the blanks.

    A label is missing if it is None, NaN, blank, or the word `nan`, `<NA>` or `#N/A`. Booleans become the strings
    `True` and `False`, as in CSV. A label that is one of the class names in `known` stays as it is.

    Raises:
        BayesLoraError: every row lacks a label, or a label is not a number, a string or a boolean.
    """
    values, known = table.columns[column], set(known)
    found = [_label(table, column, row, value, known) for row, value in enumerate(values)]
    kept = [row for row, value in enumerate(found) if value is not None]
    if not kept:
        raise BayesLoraError(f"{table.path} has 0 rows with a label in column {column!r}, but needs some: fill it in")
    missing = len(found) - len(kept)
    if missing:
        warnings.warn(
            f"{table.path} has {missing:,} of {len(found):,} rows without a label in column {column!r}, "
            f"which are left out (the first is {table.places[found.index(None)]})",
            stacklevel=3,
        )
    blanks = [value for value in values if _has_blanks(value, known)]
    if blanks:
        warnings.warn(
            f"{table.path} has {len(blanks):,} of {len(kept):,} labels with blanks around them, such as "
            f"{blanks[0]!r}, which are stripped",
            stacklevel=3,
        )
    if table.delimiter not in ("", ",") and _has_decimal_commas([found[row] for row in kept]):
        found = [value and value.replace(",", ".") for value in found]
        warnings.warn(f"{table.path} has numbers with decimal commas in column {column!r}", stacklevel=3)
    read = dataclasses.replace(table, columns={**table.columns, column: found})
    return read.select(kept) if missing else read


def _label(table: Table, column: str, row: int, value: Any, known: Collection[str]) -> Any:
    """Return a label as the rest of this module reads it; None for a missing one."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, str):
        value = value if value in known else value.strip()
        return None if value.lower() in _NOTHING and value not in known else value
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, Decimal):  # as databases write numbers
        return float(value)
    if not isinstance(value, (int, float)):
        raise BayesLoraError(
            f"{table.where(row)} has the label {value!r} of type {type(value).__name__} in column {column!r}, "
            "but it must be an integer, a string or a number: correct the row"
        )
    return value


def _has_decimal_commas(values: list[str]) -> bool:
    return all(map(_DECIMAL_COMMA.fullmatch, values)) and any("," in value for value in values)


def _has_blanks(value: Any, known: Collection[str]) -> bool:
    if not isinstance(value, str) or value in known:
        return False
    return value != value.strip() and value.strip().lower() not in _NOTHING


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

    @property
    def numbers(self) -> dict[str, int]:
        """The number that stands for each name in the files, where it is neither the class id nor the name."""
        found = [(self.names[index], raw, index) for raw, index in self.ids.items() if isinstance(raw, int)]
        told = any(str(raw) != name and raw != index for name, raw, index in found)
        return {name: raw for name, raw, _ in found} if told else {}

    def apply(self, table: Table, column: str) -> list[Any]:
        """Return the class id (int) or number (float) of each row of a `labelled` table.

        A label may be spelled in another way than in the training data if that is plain: `1`, `"1"` and `1.0`; `True`
        and `true`.

        Raises:
            BayesLoraError: a label is missing from the training data or, for regression, is not a number.
        """
        values = table.columns[column]
        if self.kind == "regression":
            return [_number(value, table, row) for row, value in enumerate(values)]
        truths = {key.lower(): key for key in self.ids if isinstance(key, str)}
        truths = truths if truths.keys() == {"true", "false"} else {}
        result = []
        for row, raw in enumerate(values):
            found = next((key for key in _spellings(raw, truths) if key in self.ids), None)
            if found is None:
                raise unknown_label(table, row, raw, list(self.ids), self.named)
            result.append(self.ids[found])
        return result


def unknown_label(table: Table, row: int, label: Any, known: list[Any], named: bool) -> BayesLoraError:
    """Return the error for a label that is not among the `known` ones, which are from the caller if `named`."""
    source = "that are known" if named else "of the training data"
    return BayesLoraError(
        f"{table.where(row)} has the label {label!r}, but the labels {source} are {', '.join(map(repr, known[:20]))}: "
        "correct the label or drop the row"
    )


def _spellings(value: Any, truths: dict[str, str]) -> list[Any]:
    """Return a label as it may be a key of the training labels: itself, as a number, and as strings."""
    if isinstance(value, str):
        number = _as_number(value) if _is_number(value) else value
        return [value, number, str(number), truths.get(value.lower(), value)]
    number = int(value) if isinstance(value, float) and value.is_integer() else value
    return [number, str(number), str(value)]


def names_column(label_column: str, text_columns: Collection[str]) -> str | None:
    """Return the column that may have the name of each integer label, unless it is one of the texts."""
    name = f"{label_column}_text"
    return None if name in text_columns else name


def learn_labels(
    table: Table, column: str, names_column: str | None = None, names: Names | None = None, kind: Kind | None = None,
) -> LabelMap:  # fmt: skip
    """Learn the meaning of labels from the training data.

    Classes have their ids in sorted order, numbers by value, whatever the order of the rows. Numbers are targets of a
    regression if any has a fraction; whole numbers are classes, also those written 1.0.

    Args:
        table: the training data, `labelled`.
        column: the label's column in `table`.
        names_column: column of `table` with the name of each integer label.
        names: class names, if the caller knows them. String labels are looked up in them, and so are numbers if all
            any name is a number. Otherwise integers index the names, unless `names` or `names_column` map them
            differently.
        kind: None lets the labels decide.

    Raises:
        BayesLoraError: labels are neither all strings nor all numbers, have several names, or are all equal.
    """
    values = _typed(table, table.columns[column])
    numbers = all(isinstance(value, (int, float)) for value in values)
    asked = kind is not None
    if kind is None:
        fractions = numbers and any(isinstance(value, float) for value in values)
        kind = "regression" if fractions and not names else "classification"
    if not asked and not names:
        _tell_mixture(table, column, values, kind)
    if kind == "regression":
        return LabelMap("regression", [], {})
    if not numbers and not all(isinstance(value, str) for value in values):
        row = next(i for i, value in enumerate(values) if isinstance(value, str) != isinstance(values[0], str))
        raise BayesLoraError(
            f"{table.where(row)} has the label {values[row]!r}, but labels are all integers or all strings: "
            "write every label the same way"
        )
    spelled = _spelled(table, values, names_column) if numbers else {}
    if names:
        return LabelMap("classification", list(names), _named_ids(table, names, values, spelled), named=True)
    by_value = numbers or all(map(_is_number, values))
    distinct = sorted(set(values), key=lambda value: (float(value) if by_value else 0.0, value))
    if len(distinct) < 2:
        raise BayesLoraError(
            f"every label in {table.path} is {distinct[0]!r}, but training needs 2 classes: check the file"
        )
    if not asked:
        _tell_doubts(table, column, values)
    return LabelMap(
        "classification",
        [spelled.get(value, str(value)) for value in distinct],
        {value: index for index, value in enumerate(distinct)},
    )


def _tell_doubts(table: Table, column: str, values: list[Any]) -> None:
    """Warn where labels that become classes may be numbers to predict, or no labels."""
    counts = Counter(values)
    for name in sorted({str(value) for value in counts if str(value).lower() in _DOUBTFUL}):
        warnings.warn(
            f"{table.path} has {counted(counts[name], 'row')} with the label {name!r}, which is read as a class: "
            "leave the cell empty if they have no label",
            stacklevel=4,
        )
    if isinstance(values[0], str):
        _tell_twins(table, column, sorted(counts))
        _tell_other_columns(table, column, counts)
        return
    decimals = any(isinstance(raw, float) or (isinstance(raw, str) and "." in raw) for raw in table.columns[column])
    if decimals or len(counts) > max(_MANY_NUMBERS, len(values) // 10):
        warnings.warn(
            f"{table.path} has {len(counts):,} different whole numbers in column {column!r}, which are read as "
            "classes: give --kind regression to predict them as numbers",
            stacklevel=4,
        )


def _tell_other_columns(table: Table, column: str, counts: Counter[str]) -> None:
    """Warn of names that are written as lists, or of which most rows have one of their own."""
    lists = [name for name in counts if name.startswith("[") and name.endswith("]")]
    rows = counts.total()
    if 2 * sum(counts[name] for name in lists) > rows:
        warnings.warn(
            f"{table.path} has lists such as {lists[0][:40]!r} in column {column!r}, each of which is read as "
            "the name of one class: give --kind multi_label if they are the labels of a row",
            stacklevel=5,
        )
    elif len(counts) > max(_MANY_NUMBERS, rows // 2):
        warnings.warn(
            f"{table.path} has {len(counts):,} different labels in {rows:,} rows of column {column!r}, which are read "
            "as classes: name another column if this one holds no classes",
            stacklevel=5,
        )


def _tell_twins(table: Table, column: str, names: list[str]) -> None:
    """Warn of names that look alike: they differ in case, in the Unicode form of a letter, or in what is not seen."""
    first: dict[str, str] = {}
    for name in names:
        seen = "".join(letter for letter in name if unicodedata.category(letter) != "Cf")
        other = first.setdefault(unicodedata.normalize("NFKC", seen).casefold(), name)
        if other != name:
            warnings.warn(
                f"{table.path} has the labels {other!a} and {name!a} in column {column!r}, which are read as two "
                "classes: write them the same way if they are one",
                stacklevel=5,
            )


def _tell_mixture(table: Table, column: str, values: list[Any], kind: Kind) -> None:
    """Warn where few labels, which may be slips, decide that all are classes or that all are numbers."""
    if kind == "regression":
        few = [row for row, value in enumerate(values) if not float(value).is_integer()]
        if len(few) * _SLIPS <= len(values):
            warnings.warn(
                f"{table.path} has {len(few):,} of {len(values):,} labels with a fraction in column {column!r} (first "
                f"{table.places[few[0]]}, {values[few[0]]!r}), so that all are read as numbers to predict: correct "
                "them, or give --kind classification",
                stacklevel=4,
            )
        return
    words = [row for row, value in enumerate(values) if isinstance(value, str) and not _is_number(value)]
    if not words and isinstance(values[0], str) and not all(float(value).is_integer() for value in values):
        warnings.warn(
            f"{table.path} has numbers with a fraction as texts in column {column!r} (first {table.places[0]}, "
            f"{values[0]!r}), which are read as names of classes: write them unquoted, or give --kind regression",
            stacklevel=4,
        )
    if 0 < len(values) - len(words) < len(words) and _has_fractions(values):
        slip = next(row for row, value in enumerate(values) if _is_number(str(value)))
        warnings.warn(
            f"{table.path} has {len(values) - len(words):,} of {len(values):,} labels that are numbers in column "
            f"{column!r} (first {table.places[slip]}, {values[slip]!r}), which are read as names of classes too: "
            "correct them",
            stacklevel=4,
        )
    elif 0 < len(words) < len(values) and (len(words) * _SLIPS <= len(values) or _has_fractions(values)):
        warnings.warn(
            f"{table.path} has {len(values) - len(words):,} of {len(values):,} labels that are numbers in column "
            f"{column!r}, but {table.places[words[0]]} has {values[words[0]]!r}, so that all are read as names of "
            "classes: correct the others, or give --kind regression",
            stacklevel=4,
        )


def _has_fractions(values: list[Any]) -> bool:
    return any(isinstance(value, str) and _is_number(value) and "." in value for value in values)


def _typed(table: Table, values: list[Any]) -> list[Any]:
    """Return the labels, as numbers if all of them are; whole floats become integers if all numbers are whole.

    Whole numbers with zeros in front, such as 01, are codes and stay as they are written.
    """
    if all(isinstance(value, str) and _INTEGER.fullmatch(value) for value in values):
        if any(_CODE.fullmatch(value) for value in values):
            return values
    if table.untyped and all(_is_number(value) for value in values):
        values = [_as_number(value) for value in values]
    elif not all(isinstance(value, (int, float)) for value in values):
        return values
    if all(isinstance(value, int) or value.is_integer() for value in values):
        return [int(value) for value in values]
    return values


def _as_number(text: str) -> int | float:
    if _INTEGER.fullmatch(text):
        return int(text)
    number = float(text)
    return int(number) if number.is_integer() else number


def _named_ids(table: Table, names: Names, values: list[Any], spelled: dict[Any, str]) -> dict[Any, int]:
    ids: dict[Any, int] = {name: index for index, name in enumerate(names)}
    # A file may lack the words among names such as 1, 2 and other, so that all its labels are numbers.
    if all(isinstance(value, str) for value in values) or {str(value) for value in values} <= ids.keys():
        return ids
    # Numbers are ids, unless some are names themselves (grades called "1" to "5") or the file spells them out.
    if any(_is_number(name) for name in names):
        return {_as_number(name) if _is_number(name) else name: index for name, index in ids.items()}
    stated = {value: ids[name] for value, name in spelled.items() if name in ids}
    if isinstance(names, Mapping):
        for value, name in spelled.items():
            if name not in ids:
                raise BayesLoraError(
                    f"{table.path} calls the label {value!r} {name!r}, but the labels that are known are "
                    f"{', '.join([*names][:20])}: write the names as they are there"
                )
        return {**{number: ids[name] for name, number in names.items() if number is not None}, **stated}
    is_index = all(value == index for value, index in stated.items())
    return {index: index for index in ids.values()} if is_index else stated


def _number(value: Any, table: Table, row: int) -> float:
    is_word = isinstance(value, str) and not _is_number(value)
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
    labels: dict[str, Any] = {}
    if names_column is None or names_column not in table.columns:
        return names
    for row, (value, name) in enumerate(zip(values, table.columns[names_column], strict=True)):
        alone = isinstance(name, str) and names.setdefault(value, name) == name
        if not alone or (name and labels.setdefault(name, value) != value):
            raise BayesLoraError(
                f"{table.where(row)} calls the label {value!r} {name!r}, but each label needs one name of its own "
                f"in column {names_column!r}: correct the row"
            )
    return {value: name for value, name in names.items() if name}
