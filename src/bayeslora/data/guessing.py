"""Guess the encoding, the delimiter and the layout of a data file that a stranger wrote; imports the standard library.

A guess that is wrong must be visible, so `tables.read_table` says each one that is not the usual: UTF-8 and commas.
"""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bayeslora.errors import BayesLoraError
from bayeslora.files import SEPARATOR_LINE, encoding_of

UTF8, WINDOWS = "utf-8", "windows-1252"
DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "vertical bar"}
"""Delimiters that are tried, in this order, and their names."""
_SAMPLE = 50
"""Records that a delimiter is tried on."""
_WRAPPERS = ("data", "rows", "records", "examples")
_SURROGATES = re.compile("[\ud800-\udfff]")


def decode(path: Path, content: bytes) -> tuple[str, str]:
    """Return the text of a file and its encoding.

    A byte-order mark decides; then UTF-16 without one, by the zero bytes of its first letters; then UTF-8 if every
    byte fits, and Windows-1252 (the single-byte encoding of western Excel) if more bytes are foreign to UTF-8 than
    letters beyond ASCII fit it.

    Raises:
        BayesLoraError: the file is damaged UTF-8, or in an encoding of another kind.
    """
    encoding = encoding_of(content)
    try:
        return content.decode(encoding or UTF8), encoding or UTF8
    except UnicodeDecodeError as error:
        wrong = error
    if not encoding:
        loose = content.decode(UTF8, "surrogateescape")
        foreign = len(_SURROGATES.findall(loose))
        if foreign > sum(not letter.isascii() for letter in loose) - foreign:
            try:
                return content.decode("cp1252"), WINDOWS
            except UnicodeDecodeError:
                pass
    name = encoding.upper() or "UTF-8"
    raise BayesLoraError(f"{path} is not {name} at byte {wrong.start}, but must be: save it as UTF-8")


def split_off_separator(text: str) -> tuple[str, str | None]:
    """Return the text without a first line `sep=;`, and the delimiter that the line names."""
    found = SEPARATOR_LINE.match(text)
    return (text[found.end() :], found[1]) if found else (text, None)


def guess_delimiter(text: str, wanted: Sequence[str] = ()) -> str:
    """Return the delimiter of a CSV file: the first that gives a header with the `wanted` columns.

    Without such a one it is the delimiter that cuts most records into as many fields as the header has; among equals,
    the one with most fields. A file that none of them cuts has one column, and the delimiter is a comma.
    """
    scores: dict[str, tuple[bool, float, int]] = {}
    for delimiter in DELIMITERS:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        try:
            header, *records = [record for record in itertools.islice(reader, _SAMPLE) if record]
        except (csv.Error, ValueError):
            continue
        if len(header) > 1:
            named = bool(wanted) and {*wanted} <= {name.strip() for name in header}
            even = sum(len(record) == len(header) for record in records) / max(1, len(records))
            # What has the columns is not judged by its records: their mistakes are told with their lines.
            scores[delimiter] = (named, 1.0 if named else even, 0 if named else len(header))
    return max(scores, key=lambda delimiter: scores[delimiter]) if scores else ","


def rows_of_object(content: dict[str, Any], wanted: Sequence[str]) -> tuple[str, list[Any]]:
    """Return what an entry of a JSON object is called, and its rows.

    It may be an object of rows under a key such as `data`, or one of pandas' layouts: columns, records by index,
    lists, or `split` (`columns` and `data`). Anything else is one row.
    """
    values = list(content.values())
    for key in _WRAPPERS:
        inner = content.get(key)
        if isinstance(inner, list) and inner and all(isinstance(row, dict) for row in inner):
            return "entry", inner
    if isinstance(content.get("columns"), list) and isinstance(content.get("data"), list):
        return "row", [dict(zip(content["columns"], row, strict=False)) for row in content["data"]]
    if values and all(isinstance(value, dict) and value.keys() == values[0].keys() for value in values):
        if wanted and {*wanted} <= {*values[0]} or not wanted and all(key.isdigit() for key in content):
            return "row", values
        return "row", [{name: column[key] for name, column in content.items()} for key in values[0]]
    if values and all(isinstance(value, list) and len(value) == len(values[0]) for value in values):
        if not any(isinstance(entry, dict) for value in values for entry in value):
            return "row", [dict(zip(content, row, strict=True)) for row in zip(*values, strict=True)]
    return "entry", [content]


def whole(value: Any) -> Any:
    """Return a value of a row with U+FFFD in place of half characters, which no file can hold."""
    if isinstance(value, str):
        return value if value.isascii() else _SURROGATES.sub("\ufffd", value)
    if isinstance(value, list):
        return [whole(entry) for entry in value]
    if isinstance(value, dict):
        return {whole(name): whole(entry) for name, entry in value.items()}
    return value


def described(encoding: str, delimiter: str) -> Iterator[str]:
    """Yield what is not usual about a file: its encoding and delimiter."""
    if encoding not in (UTF8, "utf-8-sig"):
        yield f"in {encoding}"
    if delimiter not in ("", ","):
        yield f"with {DELIMITERS.get(delimiter, repr(delimiter))}s between its fields"
