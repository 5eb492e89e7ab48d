"""Sentences whose words have a tag each: lists of words and of tags in files and in memory."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bayeslora.data.label_sets import listed, rarest
from bayeslora.data.labels import Kind, LabelMap, Names, learn_labels
from bayeslora.data.tables import Source, Table, columns_of, read_table
from bayeslora.errors import BayesLoraError, counted
from bayeslora.vocabulary import TAGS, tagged_form

OFFSETS = "offsets"
"""Column of the places of words in their text, pairs of numbers of characters; empty where the words were given."""
TEXT = "text"
_TAG = "tag"


@dataclass(frozen=True)
class Tags:
    """Meaning of the tags of words.

    Attributes:
        columns: of the words and of their tags.
        map: the ids of the tags.
    """

    columns: tuple[str, str]
    map: LabelMap

    @property
    def names(self) -> list[str]:
        """Names of the tags, index = id."""
        return self.map.names

    @property
    def kind(self) -> Kind:
        """Always `"token_classification"`."""
        return "token_classification"

    def apply(self, table: Table) -> list[list[int]]:
        """Return the ids of the tags of each row.

        Raises:
            BayesLoraError: a tag is missing from the training data, or a row has more or fewer tags than words.
        """
        ids = iter(self.map.apply(_flat(table, self.columns), _TAG))
        return [[next(ids) for _ in words] for words in words_of(table, self.columns[0])]


def learn_tags(table: Table, columns: tuple[str, str], names: Names | None = None) -> Tags:
    """Learn the tags of the training rows: sorted, or in the order of the `names`, which ids may also index.

    Raises:
        BayesLoraError: a row lacks words, or has more or fewer tags than words; or there are less than 2 tags.
    """
    return Tags(columns, learn_labels(_flat(table, columns), _TAG, None, names, "classification"))


def read_tagged(source: Source, columns: tuple[str, str], more: Sequence[str] = ()) -> Table:
    """Read the words and the tags of a file under the names `columns`, and the columns `more`.

    Where the tags' name is a usual one, a file may have them under another usual one, as a CoNLL file does.

    Raises:
        BayesLoraError: as `read_table`.
    """
    known = columns_of(source)
    usual = columns[1] in TAGS and columns[1] not in known
    own = (tagged_form(known) if usual else None) or columns
    table = read_table(source, (*own, *more))
    names = zip((*columns, *more), (*own, *more), strict=True)
    return dataclasses.replace(table, columns={new: table.columns[old] for new, old in names})


def rarest_tags(ids: Sequence[Sequence[int]], count: int) -> list[int]:
    """Return for each row its rarest tag, as a class to stratify by."""
    return rarest([[float(tag in row) for tag in range(count)] for row in ids])


def words_of(table: Table, column: str) -> list[list[str]]:
    """Return the words of each row: a list of them, or a text that is split at its blanks.

    Raises:
        BayesLoraError: a row has 0 words, or one of them is empty or no text.
    """
    return [_words(table, column, row) for row in range(len(table))]


def words_to_tag(table: Table, column: str) -> dict[str, list[Any]]:
    """Return the words of each row in `column`, and the places in their text where that is given, in `offsets`.

    A row has its words or a text in `column`, or a text in the column `text`.

    Raises:
        BayesLoraError: as `words_of`, or the table has neither column.
    """
    own = column if column in table.columns else TEXT
    if own not in table.columns:
        found = ", ".join(table.columns) or "none"
        raise BayesLoraError(f"{table.path} has columns {found}, but needs {column} or {TEXT}: rename one of them")
    words = words_of(table, own)
    texts = table.columns[own]
    return {column: words, OFFSETS: [_offsets(*each) for each in zip(texts, words, strict=True)]}


def _words(table: Table, column: str, row: int) -> list[str]:
    words = _entries(table, column, row, str)  # [1] is a word between brackets
    if not isinstance(words, list):
        seen = "an empty value" if words is None else f"{str(words)[:40]!r}"
        raise BayesLoraError(
            f"{table.where(row)} has {seen} in column {column!r}, but a list of words is needed: correct the row"
        )
    if not words:
        raise BayesLoraError(f"{table.where(row)} has 0 words in column {column!r}, but needs 1: drop the row")
    for number, word in enumerate(words, start=1):
        if not isinstance(word, str) or not word.strip():
            raise BayesLoraError(
                f"{table.where(row)}, word {number} is {word!r}, but must be a text that is not empty: correct the row"
            )
    return words


def _entries(table: Table, column: str, row: int, kind: type = object) -> Any:
    """Return the list that a text spells, with an entry of the `kind`, or its parts between blanks; or the value."""
    value = table.columns[column][row]
    if not isinstance(value, str):
        return value
    found = listed(table, column, row, kind)
    return value.split() if found is None else found


def _offsets(text: Any, words: list[str]) -> list[list[int]]:
    if not isinstance(text, str) or text.split() != words:
        return []
    return [list(found.span()) for found in re.finditer(r"\S+", text)]  # as str.split() does


def _flat(table: Table, columns: tuple[str, str]) -> Table:
    """Return a table with a row for each word, which has its tag."""
    tags: list[Any] = []
    places: list[str] = []
    for row, words in enumerate(words_of(table, columns[0])):
        own = _entries(table, columns[1], row)
        if not isinstance(own, list):
            raise BayesLoraError(
                f"{table.where(row)} has {str(own)[:40]!r} in column {columns[1]!r}, but a list of tags is needed: "
                "correct the row"
            )
        if len(own) != len(words):
            raise BayesLoraError(
                f"{table.where(row)} has {counted(len(words), 'word')} but {counted(len(own), 'tag')}, but each "
                "word needs one: correct the row"
            )
        here = [f"{table.places[row]}, word {number}" for number in range(1, len(words) + 1)]
        tags += [_tag(table.path, place, tag) for place, tag in zip(here, own, strict=True)]
        places += here
    tags = list(map(str, tags)) if table.untyped else tags
    return Table(table.path, {_TAG: tags}, places, untyped=table.untyped)


def _tag(path: Path, place: str, tag: Any) -> str | int:
    if isinstance(tag, str) and tag.strip():
        return tag.strip()
    if isinstance(tag, int) and not isinstance(tag, bool) and tag >= 0:
        return tag
    raise BayesLoraError(
        f"{path}, {place} has the tag {tag!r}, but a text or a whole number of at least 0 is needed: correct the row"
    )
