"""Rows of JSON Lines, JSON, CSV, Parquet and CoNLL files as columns that remember the place of each row."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bayeslora.data.guessing import decode, described, guess_delimiter, rows_of_object, split_off_separator, whole
from bayeslora.errors import BayesLoraError, counted
from bayeslora.files import DOCUMENT_START, conll_columns, conll_fields, first_columns

EXTENSIONS = (".jsonl", ".json", ".csv", ".parquet", ".tsv")
_TAGGED = (".conll", ".bio", ".iob")
"""Extensions that a CoNLL file, which may have any, often has."""
_LONGEST_FIELD = 2**31 - 1


@dataclass
class Table:
    """Columns of equal length from one file.

    Attributes:
        path: the file.
        columns: values by column name.
        places: the place of each row, such as `line 7`.
        untyped: True if every value is a string because the format lacks types (CSV).
        encoding: of the file, guessed; empty for Parquet and rows in memory.
        delimiter: of a CSV file, guessed; empty for others.
    """

    path: Path
    columns: dict[str, list[Any]]
    places: Sequence[str]
    untyped: bool = False
    encoding: str = ""
    delimiter: str = ""

    def __len__(self) -> int:
        return len(self.places)

    def where(self, row: int) -> str:
        return f"{self.path}, {self.places[row]}"

    def select(self, rows: Sequence[int]) -> Table:
        """Return the table with these rows only, by number from 0."""
        columns = {name: [values[row] for row in rows] for name, values in self.columns.items()}
        return dataclasses.replace(self, columns=columns, places=[self.places[row] for row in rows])

    def strings(self, column: str) -> list[str]:
        """Return a column; raise `BayesLoraError` if a value is not a string."""
        for row, value in enumerate(self.columns[column]):
            if not isinstance(value, str):
                seen = "an empty value" if value is None else f"{value!r} of type {type(value).__name__}"
                if isinstance(value, list) and value and all(isinstance(word, str) for word in value):
                    raise BayesLoraError(
                        f"{self.where(row)} has a list of words in column {column!r}, but a string is needed: give "
                        "--kind token-classification if each word has a tag"
                    )
                raise BayesLoraError(
                    f"{self.where(row)} has {seen} in column {column!r}, but a string is needed: "
                    "fill it in or drop the row"
                )
        return self.columns[column]


Source = str | Path | Table | Sequence[Mapping[str, Any]]
"""A data file, rows in memory, or what `read_table` has made of them."""


def columns_of(source: Source) -> list[str]:
    """Return the columns of the first row of a file, or of rows in memory."""
    if isinstance(source, Table):
        return list(source.columns)
    if isinstance(source, (str, Path)):
        return first_columns(source)
    first = next(iter(source), None)
    return list(first) if isinstance(first, Mapping) else []


def read_table(source: Source, wanted: Sequence[str], optional: Sequence[str] | None = ()) -> Table:
    """Read the named columns of a file, in the format of its extension.

    The encoding of a text file and the delimiter of a CSV file are guessed; a warning says them unless they are UTF-8
    and a comma. Half characters, such as half an emoji, become U+FFFD with a warning.

    Args:
        source: a `.jsonl`, `.json`, `.csv` or `.tsv` (with a header) or `.parquet` file; a CoNLL file of any name,
            which is told by its content (`files.conll_columns`), with a row for each sentence; rows in memory, which
            are checked in the same way; or a table that has been read. `.json` is a list of objects, JSON Lines, or
            what `guessing.rows_of_object` reads.
        wanted: columns that every row must have.
        optional: columns to keep if the file has them; None keeps all.

    Raises:
        BayesLoraError: the file is missing, has another extension, is malformed (with the line), lacks a column (with
            the columns that it has), or lacks rows.
    """
    if isinstance(source, Table):
        _check_columns(source.path, list(source.columns), wanted)
        kept = source.columns if optional is None else dict.fromkeys((*wanted, *optional))
        return dataclasses.replace(source, columns={n: source.columns[n] for n in kept if n in source.columns})
    if not isinstance(source, (str, Path)):
        rows = ((f"row {number}", _plain(row)) for number, row in enumerate(source, start=1))
        return _records(Path("the input"), rows, wanted, optional)
    path = Path(source)
    check_data_file(path)
    extension = path.suffix.lower()
    try:
        if extension == ".parquet":
            return _parquet(path, wanted, optional)
        content = path.read_bytes()
    except OSError as error:
        raise BayesLoraError(f"{path} cannot be read ({error.strerror}): check the file") from None
    text, encoding = decode(path, content)
    conll = [] if extension in (".json", ".jsonl") else conll_columns(text, extension)
    if conll:
        table = _conll(path, text, conll, wanted)
    elif extension in (".csv", ".tsv"):
        table = _csv(path, text, wanted, optional)
    else:
        table = _records(path, _json_records(path, text, wanted), wanted, optional)
    unusual = list(described(encoding, "," if extension == ".tsv" else table.delimiter))
    if unusual:
        warnings.warn(f"{path} is read as a file {' and '.join(unusual)}", stacklevel=2)
    return dataclasses.replace(table, encoding=encoding)


def _plain(value: Any) -> Any:
    """Return a value with the scalars and arrays of NumPy in it as Python has them."""
    if type(value).__module__ == "numpy":
        return value.tolist()
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list) else value


def check_data_file(path: Path) -> None:
    """Raise BayesLoraError unless `path` is a file of an extension that `read_table` knows, or in CoNLL's form."""
    if path.is_dir():
        raise BayesLoraError(
            f"{path} is a folder, but a data file is needed: name one file in it, or write a saved data set into one "
            "(dataset.to_parquet)"
        )
    extension = path.suffix.lower()
    if extension in _TAGGED and path.is_file() and not first_columns(path):
        raise BayesLoraError(
            f"{path} is not a CoNLL file, but must have a word and its tags on each line, with as many fields on all "
            "lines, and an empty line between sentences: correct it"
        )
    if extension not in (*EXTENSIONS, *_TAGGED) and not first_columns(path):
        known = ", ".join(EXTENSIONS)
        raise BayesLoraError(f"the extension of {path} is {extension or 'missing'}, but must be {known}: convert it")
    if not path.is_file():
        seen = "is a folder" if path.is_dir() else "does not exist"
        raise BayesLoraError(f"{path} {seen}, but a data file is needed: check the path")


def _json_records(path: Path, text: str, wanted: Sequence[str]) -> Iterator[tuple[str, Any]]:
    if path.suffix.lower() == ".json" and text.lstrip()[:1] in ("[", "{"):
        try:
            content = _parsed(text)
        except ValueError as error:
            # After a whole first object there is a second: JSON Lines.
            if text.lstrip()[0] == "[" or not str(error).startswith("Extra data"):
                raise _not_json(path, error, "correct the file", getattr(error, "lineno", 1)) from None
        else:
            kind, entries = rows_of_object(content, wanted) if isinstance(content, dict) else ("entry", content)
            yield from ((f"{kind} {number}", entry) for number, entry in enumerate(entries, start=1))
            return
    # Not splitlines(): JSON strings may hold U+2028 and other characters that it treats as line ends.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", _parsed(line)
        except ValueError as error:
            raise _not_json(path, error, "write one object a line", number, getattr(error, "colno", 1)) from None


def _parsed(text: str) -> Any:
    """Return the value that a JSON text stands for; raise ValueError if it is none, or repeats a key of an object."""
    try:
        return json.loads(text, object_pairs_hook=_with_each_key_once)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _with_each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"repeats the key {next(name for name in names if names.count(name) > 1)!r}")
    return found


def _not_json(path: Path, error: ValueError, remedy: str, line: int, column: int | None = None) -> BayesLoraError:
    reason = getattr(error, "msg", str(error)) + (f" at column {column}" if column else "")
    return BayesLoraError(f"{path}, line {line} is not valid JSON ({reason}): {remedy}")


def _records(
    path: Path, records: Iterable[tuple[str, Any]], wanted: Sequence[str], optional: Sequence[str] | None
) -> Table:
    names = dict.fromkeys((*wanted, *(optional or ())))
    rows: list[dict[str, Any]] = []
    places = []
    for place, record in records:
        if not isinstance(record, Mapping):
            kind = type(record).__name__
            raise BayesLoraError(f"{path}, {place} is a {kind}, but must be an object: name its columns")
        for name in wanted:
            if name not in record:
                raise _missing(f"{path}, {place}", name, list(map(str, record)))
        rows.append({name: record[name] for name in (record if optional is None else names) if name in record})
        places.append(place)
    _check_rows(path, len(places))
    found = {name for row in rows for name in row}
    names |= dict.fromkeys(name for row in rows for name in row)
    mended = [whole(row) for row in rows]
    halves = [number for number, (row, new) in enumerate(zip(rows, mended, strict=True)) if row != new]
    if halves:
        warnings.warn(
            f"{path} has half characters, such as half an emoji, in {counted(len(halves), 'row')} "
            f"(first {places[halves[0]]}), which are replaced by U+FFFD",
            stacklevel=3,
        )
    return Table(path, {name: [row.get(name) for row in mended] for name in names if name in found}, places)


def _csv(path: Path, text: str, wanted: Sequence[str], optional: Sequence[str] | None) -> Table:
    text, delimiter = split_off_separator(text)
    delimiter = delimiter or ("\t" if path.suffix.lower() == ".tsv" else guess_delimiter(text, wanted))
    csv.field_size_limit(_LONGEST_FIELD)  # by default a text of 131,072 characters is refused
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[list[str]] = []
    places = []
    repeated = []
    try:
        header = [name.strip() for name in next(reader, [])]
        if not header:
            raise BayesLoraError(f"{path} is empty, but needs a header line: name the columns in it")
        _check_columns(path, header, wanted)
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                kind = {",": "commas", ";": "semicolons", "\t": "tabs"}.get(delimiter, repr(delimiter))
                raise BayesLoraError(
                    f"{path}, line {reader.line_num} has {counted(len(row), 'field')}, but the header has "
                    f"{len(header)}: quote fields that hold {kind}"
                )
            if len(row) > 1 and row[0].strip() == header[0] and [cell.strip() for cell in row] == header:
                repeated.append(reader.line_num)  # of a file that was put behind another one
                continue
            rows.append(row)
            places.append(f"line {reader.line_num}")
    except csv.Error as error:
        raise BayesLoraError(f"{path}, line {reader.line_num} is not valid CSV ({error}): correct the line") from None
    _check_rows(path, len(rows))
    if repeated:
        warnings.warn(
            f"{path} repeats its header in {counted(len(repeated), 'line')} (first line {repeated[0]}), which "
            f"{'is' if len(repeated) == 1 else 'are'} left out",
            stacklevel=3,
        )
    # An unnamed column that is empty, as a delimiter at the end of each line makes, is not told.
    told = [n for at, n in enumerate(header) if n or at == header.index(n) or any(row[at].strip() for row in rows)]
    kept = _kept_columns(path, told, wanted, optional)
    columns = {name: [row[header.index(name)] for row in rows] for name in kept}
    return Table(path, columns, places, untyped=True, delimiter=delimiter)


def _conll(path: Path, text: str, columns: list[str], wanted: Sequence[str]) -> Table:
    """Return a table with a list of words and lists of their tags in each row."""
    _check_columns(path, columns, wanted)
    rows: list[list[list[str]]] = []
    places = []
    is_open = False
    for number, raw in enumerate(text.split("\n"), start=1):
        line = raw.strip()
        if not line or line.startswith(DOCUMENT_START):
            is_open = False
            continue
        fields = conll_fields(line)
        if len(fields) != len(columns):
            raise BayesLoraError(
                f"{path}, line {number} has {counted(len(fields), 'field')}, but the first line has {len(columns)}: "
                "write a word and its tags on each line, and an empty line between sentences"
            )
        if not is_open:
            rows.append([[] for _ in columns])
            places.append(f"line {number}")
            is_open = True
        for values, field in zip(rows[-1], fields, strict=True):
            values.append(field)
    _check_rows(path, len(rows))
    return Table(path, {name: [row[place] for row in rows] for place, name in enumerate(columns)}, places)


def _parquet(path: Path, wanted: Sequence[str], optional: Sequence[str] | None) -> Table:
    # Imported here: only Parquet needs it, and it is slow to load.
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = list(file.schema_arrow.names)
            _check_columns(path, names, wanted)
            kept = _kept_columns(path, names, wanted, optional)
            table = file.read(columns=kept)
    except pyarrow.ArrowException as error:
        reason = str(error).split("\n")[0].rstrip(".")
        raise BayesLoraError(f"{path} is not a valid Parquet file ({reason}): write it again") from None
    _check_rows(path, table.num_rows)
    features = _features(table.schema.metadata or {})
    columns = {
        name: [_named(value, features.get(name)) for value in table.column(table.column_names.index(name)).to_pylist()]
        for name in kept
    }
    return Table(path, columns, [f"row {number}" for number in range(1, table.num_rows + 1)])


def tell_empty(table: Table, texts: Sequence[Any], column: str) -> None:
    """Warn if some of the texts, one of each row and from this column, are empty or blank."""
    empty = sum(isinstance(text, str) and not text.strip() for text in texts)
    if empty:
        warnings.warn(
            f"{table.path} has {empty:,} of {len(table):,} rows with an empty text in column {column!r}", stacklevel=4
        )


def _check_rows(path: Path, count: int) -> None:
    if not count:
        raise BayesLoraError(f"{path} has 0 rows, but at least 1 is needed: check how the file was made")


def _check_columns(path: Path, names: Sequence[str], wanted: Sequence[str]) -> None:
    for name in wanted:
        if name not in names:
            raise _missing(str(path), name, names)
        if list(names).count(name) > 1:
            count = list(names).count(name)
            raise BayesLoraError(
                f"{path} has {counted(count, 'column')} named {name!r}, but must have 1: rename the others"
            )


def _features(metadata: Mapping[bytes, bytes]) -> dict[str, Any]:
    """Return the types of the columns as `datasets` writes them into Parquet; none where another program wrote it."""
    try:
        found = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def _named(value: Any, feature: Any) -> Any:
    """Return the name of a class for its number, or those of a list; -1 is a missing label there."""
    inner = feature[0] if isinstance(feature, list) and feature else feature
    if not isinstance(inner, dict) or value is None:
        return value
    if isinstance(value, list):
        return [_named(each, inner.get("feature", inner)) for each in value]
    names = inner.get("names")
    if inner.get("_type") != "ClassLabel" or not isinstance(names, list) or not isinstance(value, int):
        return value
    return names[value] if 0 <= value < len(names) else None if value == -1 else value


def _kept_columns(
    path: Path, names: Sequence[str], wanted: Sequence[str], optional: Sequence[str] | None
) -> list[str]:
    """Return the columns to read, each once: those named, or with None all, of which a warning names the doubles."""
    if optional is not None:
        kept = [name for name in dict.fromkeys((*wanted, *optional)) if name in names]
        _check_columns(path, names, kept)
        return kept
    doubles = [name for name in dict.fromkeys(names) if list(names).count(name) > 1]
    if doubles:
        warnings.warn(
            f"{path} has several columns named {' and '.join(map(repr, doubles))}, of which the first is read",
            stacklevel=5,
        )
    return list(dict.fromkeys(names))


def _missing(place: str, name: str, columns: Sequence[str]) -> BayesLoraError:
    found = ", ".join(columns) or "none"
    how = f" with --{name}-column" if name in ("text", "label") and not place.startswith("the input, ") else ""
    return BayesLoraError(f"{place} lacks column {name!r}, but has columns {found}: name one of them{how}")
