"""Rows of JSON Lines, JSON, CSV and Parquet files as columns that remember the place of each row."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bayeslora.errors import BayesLoraError

EXTENSIONS = (".jsonl", ".json", ".csv", ".parquet")


@dataclass
class Table:
    """Columns of equal length from one file.

    Attributes:
        path: the file.
        columns: values by column name.
        places: the place of each row, such as `line 7`.
        untyped: True if every value is a string because the format lacks types (CSV).
    """

    path: Path
    columns: dict[str, list[Any]]
    places: Sequence[str]
    untyped: bool = False

    def __len__(self) -> int:
        return len(self.places)

    def where(self, row: int) -> str:
        return f"{self.path}, {self.places[row]}"

    def strings(self, column: str) -> list[str]:
        """Return a column; raise `BayesLoraError` if a value is not a string."""
        for row, value in enumerate(self.columns[column]):
            if not isinstance(value, str):
                seen = "an empty value" if value is None else f"{value!r} of type {type(value).__name__}"
                raise BayesLoraError(
                    f"{self.where(row)} has {seen} in column {column!r}, but a string is needed: "
                    "fill it in or drop the row"
                )
        return self.columns[column]


def read_table(
    path: str | Path | Sequence[Mapping[str, Any]], wanted: Sequence[str], optional: Sequence[str] = ()
) -> Table:
    """Read the named columns of a file, in the format of its extension.

    Args:
        path: a `.jsonl`, `.json` (a list of objects, or JSON Lines), `.csv` (with a header) or `.parquet` file; or
            rows in memory, which are checked in the same way.
        wanted: columns that every row must have.
        optional: columns to keep if the file has them.

    Raises:
        BayesLoraError: the file is missing, has another extension, is malformed (with the line), lacks a column (with
            the columns that it has), or lacks rows.
    """
    if not isinstance(path, (str, Path)):
        rows = ((f"row {number}", row) for number, row in enumerate(path, start=1))
        return _records(Path("the input"), rows, wanted, optional)
    path = Path(path)
    extension = path.suffix.lower()
    if extension not in EXTENSIONS:
        known = ", ".join(EXTENSIONS)
        raise BayesLoraError(f"the extension of {path} is {extension or 'missing'}, but must be {known}: convert it")
    if not path.is_file():
        seen = "is a folder" if path.is_dir() else "does not exist"
        raise BayesLoraError(f"{path} {seen}, but a data file is needed: check the path")
    try:
        if extension == ".parquet":
            return _parquet(path, wanted, optional)
        with path.open(encoding="utf-8-sig", newline="") as stream:
            if extension == ".csv":
                return _csv(path, stream, wanted, optional)
            text = stream.read()
    except UnicodeDecodeError as error:
        raise BayesLoraError(f"{path} is not UTF-8 at byte {error.start}, but must be: save it as UTF-8") from None
    except OSError as error:
        raise BayesLoraError(f"{path} cannot be read ({error.strerror}): check the file") from None
    return _records(path, _json_records(path, text), wanted, optional)


def _json_records(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        try:
            entries = json.loads(text)
        except json.JSONDecodeError as error:
            raise BayesLoraError(
                f"{path}, line {error.lineno} is not valid JSON ({error.msg}): correct the file"
            ) from None
        yield from ((f"entry {number}", entry) for number, entry in enumerate(entries, start=1))
        return
    # Not splitlines(): JSON strings may hold U+2028 and other characters that it treats as line ends.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line)
        except json.JSONDecodeError as error:
            raise BayesLoraError(
                f"{path}, line {number} is not valid JSON ({error.msg} at column {error.colno}): "
                "write one object a line"
            ) from None


def _records(path: Path, records: Iterator[tuple[str, Any]], wanted: Sequence[str], optional: Sequence[str]) -> Table:
    columns: dict[str, list[Any]] = {name: [] for name in (*wanted, *optional)}
    seen: set[str] = set()
    places = []
    for place, record in records:
        if not isinstance(record, dict):
            kind = type(record).__name__
            raise BayesLoraError(f"{path}, {place} is a {kind}, but must be an object: name its columns")
        for name in wanted:
            if name not in record:
                raise _missing(f"{path}, {place}", name, list(record))
        for name, values in columns.items():
            values.append(record.get(name))
        seen.update(record)
        places.append(place)
    _check_rows(path, len(places))
    return Table(path, {name: values for name, values in columns.items() if name in seen}, places)


def _csv(path: Path, stream: Iterator[str], wanted: Sequence[str], optional: Sequence[str]) -> Table:
    reader = csv.reader(stream, strict=True)
    rows: list[list[str]] = []
    places = []
    try:
        header = next(reader, [])
        if not header:
            raise BayesLoraError(f"{path} is empty, but needs a header line: name the columns in it")
        _check_columns(path, header, wanted)
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise BayesLoraError(
                    f"{path}, line {reader.line_num} has {len(row)} fields, but the header has {len(header)}: "
                    "quote fields that hold commas"
                )
            rows.append(row)
            places.append(f"line {reader.line_num}")
    except csv.Error as error:
        raise BayesLoraError(f"{path}, line {reader.line_num} is not valid CSV ({error}): correct the line") from None
    _check_rows(path, len(rows))
    kept = [name for name in (*wanted, *optional) if name in header]
    return Table(path, {name: [row[header.index(name)] for row in rows] for name in kept}, places, untyped=True)


def _parquet(path: Path, wanted: Sequence[str], optional: Sequence[str]) -> Table:
    # Imported here: only Parquet needs it, and it is slow to load.
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = list(file.schema_arrow.names)
            _check_columns(path, names, wanted)
            table = file.read(columns=[name for name in (*wanted, *optional) if name in names])
    except pyarrow.ArrowException as error:
        reason = str(error).split("\n")[0].rstrip(".")
        raise BayesLoraError(f"{path} is not a valid Parquet file ({reason}): write it again") from None
    _check_rows(path, table.num_rows)
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    return Table(path, columns, [f"row {number}" for number in range(1, table.num_rows + 1)])


def _check_rows(path: Path, count: int) -> None:
    if not count:
        raise BayesLoraError(f"{path} has 0 rows, but at least 1 is needed: check how the file was made")


def _check_columns(path: Path, names: Sequence[str], wanted: Sequence[str]) -> None:
    for name in wanted:
        if name not in names:
            raise _missing(str(path), name, names)
        if list(names).count(name) > 1:
            count = list(names).count(name)
            raise BayesLoraError(f"{path} has {count} columns named {name!r}, but must have 1: rename the others")


def _missing(place: str, name: str, columns: Sequence[str]) -> BayesLoraError:
    found = ", ".join(columns) or "none"
    return BayesLoraError(f"{place} lacks column {name!r}, but has columns {found}: name one of them")
