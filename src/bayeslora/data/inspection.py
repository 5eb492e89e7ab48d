"""Say what training would read from a data file; imports neither torch, NumPy nor `datasets`."""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from bayeslora.data.choices import ANSWER, CHOICES, LABEL, LETTERS, QUESTION, choice_columns
from bayeslora.data.conversations import answered_columns
from bayeslora.data.label_sets import (
    LabelSets,
    has_label_sets,
    label_columns,
    learn_label_sets,
    rarest,
    rows_with_sets,
)
from bayeslora.data.labels import Kind, LabelMap, labelled, learn_labels, names_column
from bayeslora.data.split import HoldOut, is_blank
from bayeslora.data.tables import Table, read_table
from bayeslora.data.tagged import Tags, learn_tags, rarest_tags, read_tagged
from bayeslora.errors import BayesLoraError, Problems
from bayeslora.files import first_columns
from bayeslora.vocabulary import CHOICES_BY_TASK, TAGS, WORDS, choice_form, tagged_form, text_form

_LABELS = ("label", "labels", "class", "category", "target", "intent", "topic", "sentiment")
"""Usual names of a label column, lower case."""
_NUMBERING = re.compile(r"(.*[^a-z])?(u?id|guid|key|nr|no|number|index)|unnamed: 0|", re.IGNORECASE)
"""Usual names of a column that numbers the rows."""
_PAIR = ("text_a", "text_b")
_FEW, _TIMES = 50, 2
"""A column of at most this many different values, each this often on average, may be that of the labels."""
_EXAMPLE = 40

_CHOSEN: Final = "multiple_choice"

_Form = Kind | Literal["multiple_choice"]
CountTokens = Callable[[list[tuple[str, ...]]], list[int]]
"""Function that returns the number of tokens of each row of texts."""


@dataclass(frozen=True)
class Lengths:
    """Lengths of the texts of a row: `median`, the 95th percentile `most`, and `longest`."""

    median: int
    most: int
    longest: int

    @classmethod
    def of(cls, values: Sequence[int]) -> Lengths:
        """Return the lengths of at least one row."""
        ordered = sorted(values)
        return cls(int(statistics.median_low(ordered)), ordered[math.ceil(0.95 * len(ordered)) - 1], ordered[-1])


@dataclass(frozen=True)
class Column:
    """One column: its number of `different` values, of `empty` cells, and an `example`; lengths if it has strings."""

    name: str
    different: int
    empty: int
    example: str
    characters: Lengths | None = None


@dataclass(frozen=True)
class Part:
    """Labelled rows on one side of a split: their number, and by class name; `shared` texts with the training rows.

    Of tagged words `labels` has the number of words by tag.
    """

    rows: int
    labels: dict[str, int] = field(default_factory=dict)
    unlabelled: int = 0
    empty_texts: int = 0
    shared: int = 0
    file: str = ""


@dataclass(frozen=True)
class Texts:
    """Facts about the texts of all rows.

    Attributes:
        repeated: rows whose text, unless it is empty, an earlier row has.
        contradicting: rows whose text, unless it is empty, has several labels.
        characters, tokens: lengths; tokens only with a tokenizer, and then `too_long`, the rows beyond its limit.
    """

    repeated: int
    contradicting: int
    characters: Lengths
    tokens: Lengths | None = None
    too_long: int | None = None


@dataclass(frozen=True)
class Inspection:
    """The rows, columns and labels that training would read.

    Attributes:
        file: the training file.
        rows: number of rows in the file.
        encoding, delimiter: guessed encoding and delimiter; empty if the format has none.
        columns: descriptions of the columns, in the order of the file.
        text_columns, label_column: names of the columns that training would read; None without a label column.
        guessed: those of these names that were not given but guessed.
        kind: `"classification"`, `"multi_label"`, `"regression"` or `"token_classification"`, None without labels;
            `"generation"` for conversations and completions, `"multiple_choice"` for questions with choices.
        numbers: for regression, `least`, `mean`, `most` and `deviation` of the values; otherwise empty.
        training: rows to train on.
        evaluation: rows to score, from the evaluation file or held out; None without either.
        texts: lengths and repetitions of the texts; None without rows to train on.
        notes: warnings that training would give.
        problems: reasons for which training would refuse the data; empty if it would not.
    """

    file: str
    rows: int
    encoding: str
    delimiter: str
    columns: list[Column]
    text_columns: list[str]
    label_column: str | None
    guessed: list[str]
    kind: Kind | Literal["generation", "multiple_choice"] | None
    numbers: dict[str, float]
    training: Part
    evaluation: Part | None
    texts: Texts | None
    notes: list[str]
    problems: list[str]


def inspect_file(
    file: str | Path,
    text_columns: Sequence[str] | None = None,
    label_column: str | None = None,
    *,
    eval_file: str | Path | None = None,
    held_out: HoldOut | None = None,
    labels: Sequence[str] | None = None,
    kind: Kind | None = None,
    count_tokens: CountTokens | None = None,
    max_length: int = 128,
) -> Inspection:
    """Return what `load_files` would read with the same arguments.

    Args:
        file: the training file.
        text_columns: one or two; None takes `text`, or `text_a` and `text_b`, or the column with the longest texts.
        label_column: None takes `label` or another usual name, or the only other column whose few values repeat.
        eval_file, held_out, labels, kind: as for `load_files`.
        count_tokens: counts the tokens of rows, except for multiple choice; None leaves these counts out.
        max_length: maximum input length of the model in tokens; `too_long` counts the rows beyond it.

    Raises:
        BayesLoraError: the file cannot be read, or lacks a named column.
    """
    problems = Problems()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        labelling = label_columns(label_column, first_columns(file)) if label_column else ()
        named = [*(text_columns or ()), *labelling]
        group = [held_out.group_column] if held_out and held_out.group_column else []
        table = read_table(file, [*named, *group], None)
        columns = {name: _column(name, values) for name, values in table.columns.items()}
        answers = None if text_columns else text_form(columns)
        texts, label, form = _read_columns(table, columns, list(text_columns or answers or ()), label_column, kind)
        found = _Rows(table, _texts(table, texts), None, [], 0)
        with problems.collected():
            if label is not None and label_column is None:
                read_table(file, [*texts, label])  # a row may lack a column that was guessed from others
            found = _Rows.answers(table) if answers else _Rows.read(table, texts, label, labels, form)
        training, evaluation = Part(len(found.texts)), None
        with problems.collected():
            training, evaluation = _parts(found, texts, label, held_out, eval_file)
    return Inspection(
        file=str(file),
        rows=len(table),
        encoding=table.encoding,
        delimiter=table.delimiter,
        columns=list(columns.values()),
        text_columns=texts,
        label_column=label,
        guessed=[name for name in (*texts, label) if name is not None and name not in (label_column, *named)],
        kind="generation" if answers else form if form == _CHOSEN else found.map.kind if found.map else None,
        numbers=_summary(found.values if found.map and found.map.kind == "regression" else []),
        training=training,
        evaluation=evaluation,
        texts=_facts(found, count_tokens if form != _CHOSEN else None, max_length) if found.texts else None,
        notes=list(dict.fromkeys(str(warning.message) for warning in caught)),
        problems=[*problems],
    )


def _check_tagged(table: Table, words: str, tags: str) -> None:
    """Raise if the usual columns of words and tags are not there, and no other was named."""
    for name, what, option in ((words, "words", "--text-column"), (tags, "tags", "--label-column")):
        if name not in table.columns:
            raise BayesLoraError(f"{table.path} lacks column {name!r}, but needs one of {what}: name it with {option}")


@dataclass(frozen=True)
class _Rows:
    """Labelled rows of a file: texts, meaning of the labels, class ids or numbers; `unlabelled` counts the others."""

    table: Table
    texts: list[tuple[str, ...]]
    map: LabelMap | LabelSets | Tags | None
    values: list[Any]
    unlabelled: int

    @classmethod
    def read(
        cls, table: Table, texts: list[str], label: str | None, names: Sequence[str] | None, kind: _Form | None
    ) -> _Rows:
        if kind == _CHOSEN:
            return cls.choices(table)
        if not texts:
            raise BayesLoraError(f"{table.path} lacks a column of texts, but needs one: name another file")
        if kind == "token_classification" and label is not None:
            tags = learn_tags(table, (texts[0], label), names)
            return cls(table, _texts(table, texts), tags, _values(tags, table, label), 0)
        for name in texts:
            table.strings(name)
        if label is None:
            return cls(table, _texts(table, texts), None, [], 0)
        own = label_columns(label, list(table.columns))
        learned: LabelMap | LabelSets
        if has_label_sets(table, own, kind):
            read = rows_with_sets(table, own)
            learned = learn_label_sets(read, own, names)
        else:
            read = labelled(table, label, names or ())
            learned = learn_labels(read, label, names_column(label, texts), names, kind)
        return cls(read, _texts(read, texts), learned, _values(learned, read, label), len(table) - len(read))

    @classmethod
    def answers(cls, table: Table) -> _Rows:
        """Return rows to generate text from."""
        columns = answered_columns(table)
        return cls(table, _texts(dataclasses.replace(table, columns=columns), list(columns)), None, [], 0)

    @classmethod
    def choices(cls, table: Table) -> _Rows:
        """Return multiple-choice rows, whose classes are the letters of the choices."""
        warnings.warn(CHOICES_BY_TASK, stacklevel=1)
        columns = choice_columns(table)
        names = list(LETTERS[: max(map(len, columns[CHOICES]))])
        texts = _texts(dataclasses.replace(table, columns=columns), [QUESTION, CHOICES])
        letters = LabelMap("classification", names, {n: n for n in range(len(names))})
        return cls(table, texts, letters, columns[LABEL], 0)

    def part(self, rows: Sequence[int], **more: Any) -> Part:
        """Return the rows of one side."""
        names = self.map.names if self.map else []
        values = [self.values[row] for row in rows] if names else []
        counts = Counter(number for value in values for number in (value if isinstance(value, tuple) else (value,)))
        empty = sum(not any(map(str.strip, self.texts[row])) for row in rows)
        return Part(len(rows), {name: counts[index] for index, name in enumerate(names)}, empty_texts=empty, **more)


def _values(labels: LabelMap | LabelSets | Tags, table: Table, column: str) -> list[Any]:
    """Return the class id or the number of each row, or the numbers of its labels or tags where it has several."""
    if isinstance(labels, Tags):
        return [tuple(ids) for ids in labels.apply(table)]
    if isinstance(labels, LabelMap):
        return labels.apply(table, column)
    return [tuple(label for label, has in enumerate(row) if has) for row in labels.apply(table)]


def _parts(
    found: _Rows, texts: list[str], label: str | None, held_out: HoldOut | None, eval_file: str | Path | None
) -> tuple[Part, Part | None]:
    """Return the rows to train on and those to score."""
    numbers = range(len(found.texts))
    held: list[int] = []
    evaluation = None
    if held_out is not None and found.values:
        classes = found.values if found.map and found.map.names else [0] * len(numbers)
        if isinstance(found.map, LabelSets):
            classes = rarest(found.map.apply(found.table))
        elif isinstance(found.map, Tags):
            classes = rarest_tags(found.values, len(found.map.names))
        held = held_out.rows(found.table, classes, tuple(texts))
        known = {found.texts[row] for row in {*numbers} - {*held}}
        evaluation = found.part(held, shared=sum(found.texts[row] in known for row in held))
    elif eval_file is not None:
        read = other = _evaluation_table(found, texts, label, eval_file)
        # What labels mean is not known if those to learn from cannot be read.
        if isinstance(found.map, LabelSets):
            read = rows_with_sets(other, found.map.columns)
        elif isinstance(found.map, LabelMap) and label:
            read = labelled(other, label, found.map.names if found.map.named else ())
        values = _values(found.map, read, label) if found.map and label else []
        rows = _Rows(read, _texts(read, texts), found.map, values, len(other) - len(read))
        known = set(found.texts)
        evaluation = rows.part(
            range(len(rows.texts)),
            unlabelled=rows.unlabelled,
            shared=sum(text in known for text in rows.texts),
            file=str(eval_file),
        )
    return found.part(sorted({*numbers} - {*held}), unlabelled=found.unlabelled), evaluation


def _evaluation_table(found: _Rows, texts: list[str], label: str | None, file: str | Path) -> Table:
    if isinstance(found.map, Tags):
        return read_tagged(file, found.map.columns)
    own = label_columns(label, list(found.table.columns)) if label else ()
    table = read_table(file, [*texts, *own])
    if text_form(texts) and not label:
        _Rows.answers(table)
    elif choice_form([*texts, *own]):
        choice_columns(table)
    return table


def _facts(found: _Rows, count_tokens: CountTokens | None, max_length: int) -> Texts:
    labels: dict[tuple[str, ...], set[Any]] = {}
    texts = [text for text in found.texts if any(map(str.strip, text))]
    for text, value in zip(found.texts, found.values or [None] * len(found.texts), strict=True):
        labels.setdefault(text, set()).add(value)
    tokens = count_tokens(found.texts) if count_tokens else None
    return Texts(
        repeated=len(texts) - len(set(texts)),
        contradicting=sum(len(labels[text]) > 1 for text in texts),
        characters=Lengths.of([sum(map(len, text)) for text in found.texts]),
        tokens=Lengths.of(tokens) if tokens else None,
        too_long=sum(count > max_length for count in tokens) if tokens else None,
    )


def _texts(table: Table, columns: Sequence[str]) -> list[tuple[str, ...]]:
    return list(zip(*(map(_text, table.columns[name]) for name in columns), strict=True))


def _text(value: Any) -> str:
    """Return a text, or the contents of the messages of a conversation, or words between blanks."""
    if isinstance(value, list) and value and isinstance(value[0], str):
        return " ".join(map(str, value))
    if isinstance(value, list):
        return "\n".join(str(message.get("content") or "") for message in value if isinstance(message, dict))
    return str(value or "")


def _column(name: str, values: list[Any]) -> Column:
    filled = [value for value in values if not is_blank(value)]
    strings = [value for value in filled if isinstance(value, str)]
    example = " ".join(str(filled[0]).split()) if filled else ""
    return Column(
        name,
        len(set(map(repr, filled))),
        len(values) - len(filled),
        example if len(example) <= _EXAMPLE else example[: _EXAMPLE - 1] + "…",
        Lengths.of(list(map(len, strings))) if strings else None,
    )


def _read_columns(
    table: Table, columns: dict[str, Column], texts: list[str], label: str | None, kind: Kind | None
) -> tuple[list[str], str | None, _Form | None]:
    """Return the columns of the texts and of the labels, and the kind that the columns tell, if not named."""
    if not texts and label is None and kind is None and choice_form(columns):
        return [QUESTION, CHOICES], ANSWER, _CHOSEN
    if not texts and kind is None and tagged_form(columns):
        kind = "token_classification"
    if kind == "token_classification":
        words, tags = tagged_form(columns) or (WORDS, TAGS[0])
        texts, label = texts or [words], label or tags
        _check_tagged(table, texts[0], label)
        return texts, label, kind
    if not texts:
        texts = _guessed_texts(columns, label)
    elif text_form(texts) is not None:
        return texts, label, kind
    return texts, label or _guessed_label(columns, len(table), texts), kind


def _guessed_texts(columns: dict[str, Column], label: str | None) -> list[str]:
    for names in ((("text",)), _PAIR):
        if {*names} <= columns.keys():
            return list(names)
    lengths = {name: column.characters.median for name, column in columns.items() if column.characters}
    lengths.pop(label or "", None)
    return [max(lengths, key=lengths.__getitem__)] if lengths else []


def _guessed_label(columns: dict[str, Column], rows: int, texts: list[str]) -> str | None:
    for usual in _LABELS:
        if found := [name for name in columns if name.lower() == usual and name not in texts]:
            return found[0]
    few = [
        name
        for name, column in columns.items()
        if name not in texts
        and not _NUMBERING.fullmatch(name)
        and 2 <= column.different <= min(_FEW, (rows - column.empty) // _TIMES)
    ]
    return few[0] if len(few) == 1 else None


def _summary(values: list[float]) -> dict[str, float]:
    summaries: dict[str, Callable[[list[float]], float]]
    summaries = {"least": min, "mean": statistics.fmean, "most": max, "deviation": statistics.pstdev}
    return {name: of(values) for name, of in summaries.items()} if values else {}
