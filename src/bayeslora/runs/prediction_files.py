"""Write predictions and answers beside the rows they are for, as JSON Lines or CSV."""

from __future__ import annotations

import csv
import json
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from bayeslora.data.tables import Table
from bayeslora.files import finite, write_atomically
from bayeslora.runs.answers import Answer
from bayeslora.runs.predictions import Predictions
from bayeslora.runs.tagging import Taggings
from bayeslora.vocabulary import COMPLETION, MESSAGES, PROMPT

_SEPARATED = {".csv": ",", ".tsv": "\t"}
_KEPT = "input_"
"""Prefix of a column of the rows that has the name of one of the predictions."""


def write_predictions(path: Path, table: Table, predictions: Predictions | Taggings) -> dict[str, str]:
    """Write a row for each prediction: the columns of the table, then those of the prediction.

    A path that ends in `.csv` or `.tsv` becomes a file with a header, in which each probability has a column
    `probability_<label>`, an interval the columns `lower` and `upper`, and a set is a JSON list, as are several labels
    of a row, the words with their tags and the spans. A `.csv` has the delimiter of the table if that is one, and a
    byte-order mark, which Excel needs, unless the table is plain UTF-8. Other paths become JSON Lines, with
    `probabilities` as an object by label. The file is written completely or not at all.

    Returns:
        The columns of the table that have another name there, `input_<name>`, because a prediction has theirs.
    """
    separated = path.suffix.lower() in _SEPARATED
    found = [_flat(row) if separated else row for row in predictions.records()]
    names = _beside(table.columns, found[0])
    rows = (
        {**{names[name]: values[number] for name, values in table.columns.items()}, **row}
        for number, row in enumerate(found)
    )
    with write_atomically(path) as partial:
        if separated:
            _write_separated(partial, _SEPARATED[path.suffix.lower()], table, rows)
        else:
            with partial.open("w", encoding="utf-8") as file:
                for row in rows:
                    file.write(json.dumps(finite(row), ensure_ascii=False, default=str) + "\n")
    return {name: new for name, new in names.items() if new != name}


def answer_lines(rows: Sequence[Mapping[str, Any]], answers: Sequence[Answer]) -> list[str]:
    """Return a line of JSON for each answer, after the columns of its row that were not read."""
    taken = {field.name for field in fields(Answer)}
    read = {MESSAGES, PROMPT, COMPLETION}
    lines = []
    for row, answer in zip(rows, answers, strict=True):
        names = _beside(row, taken)
        kept = {names[name]: value for name, value in row.items() if name not in read}
        lines.append(json.dumps(finite({**kept, **answer.to_dict()}), ensure_ascii=False, default=str) + "\n")
    return lines


def _beside(columns: Collection[str], taken: Container[str]) -> dict[str, str]:
    """Return the names that columns of the rows have beside the results, whose names are `taken`."""
    names = {name: name for name in columns if name not in taken}
    for name in [name for name in columns if name in taken]:
        new = _KEPT + name
        while new in taken or new in names.values():
            new = _KEPT + new
        names[name] = new
    return names


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """Return a prediction with a value for each column of a CSV file; those that are None have no column."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if name == "probabilities" or isinstance(value, dict):
            prefix = "probability" if name == "probabilities" else name
            flat |= {f"{prefix}_{label}": p for label, p in (value or {}).items()}
        elif name == "interval":
            flat |= {"lower": value[0], "upper": value[1]}
        elif value is not None:
            flat[name] = value
    return flat


def _write_separated(path: Path, delimiter: str, table: Table, rows: Iterator[dict[str, Any]]) -> None:
    if delimiter == "," and table.delimiter and table.path.suffix.lower() == ".csv":
        delimiter = table.delimiter
    encoding = "utf-8" if table.encoding in ("", "utf-8") else "utf-8-sig"
    found = list(rows)
    lines = [list(found[0]), *([_cell(value) for value in row.values()] for row in found)]
    # The module quotes a field for the end of a line that it writes, but not for a lone return, which ends one too.
    returns = any("\r" in cell for line in lines for cell in line if isinstance(cell, str))
    quoting: Any = csv.QUOTE_ALL if returns else csv.QUOTE_MINIMAL
    with path.open("w", encoding=encoding, newline="") as file:
        csv.writer(file, delimiter=delimiter, lineterminator="\n", quoting=quoting).writerows(lines)


def _cell(value: Any) -> Any:
    if isinstance(value, bool) or isinstance(value, (list, dict)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return value
