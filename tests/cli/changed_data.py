"""Data files of every kind of task and format, their cells changed, and what each row should be read as."""

from __future__ import annotations

import csv
import io
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow
import pyarrow.parquet

from bayeslora.data import Task
from tests.cli.conftest import review_rows
from tests.evaluation.choice_items import items
from tests.runs.text_runs import chat, pairs

MISSING = object()
Row = dict[str, Any]
CELLS: tuple[Any, ...] = (
    *(MISSING, None, True, False, 0, 1, 2, -1, 0.5, 1.0, -0.0, 1e308, 10**30, math.nan, math.inf, -math.inf),
    *(
        "",
        " ",
        "\t",
        "\u00a0",
        "x",
        "good",
        "bad",
        "0",
        "1",
        "1.0",
        " 1 ",
        "+1",
        "01",
        "1e0",
        "1,0",
        "1_0",
        "0x1",
        "-",
    ),
    *("nan", "NaN", "None", "null", "NULL", "N/A", "<NA>", "inf", "true", "False", "yes", "joy", "joy|joy", "joy|x"),
    *("\0", "\x07", "\x1b[31m", "\u2028", "\ufeff1", "\ud83d", "😀", "\u202e", "e\u0301", "１", "٣", "a\r\nb", "\r"),
    *('"', "'", '"quoted"', ",", ";", "\\", "=1+1", "<b>", "{question}", "[SEP]", "a" * 100_000, "word " * 3000),
    *([], [[]], [0], ["joy"], ["joy", "joy"], ["x"], ["joy", None], [[["joy"]]], {}, {"a": 1}, {"text": "good"}),
)
MESSAGES: tuple[Any, ...] = (
    *(MISSING, None, "", "hello", 1, [], {}, [None], ["who ?"], [[]], [{}], [{"role": "user"}], [{"content": "x"}]),
    *([{"from": "human", "value": "x"}], [{"role": "user", "content": "who ?"}]),
    [{"role": "assistant", "content": "cat"}],
)
OPTIONS: tuple[Any, ...] = (
    *(MISSING, None, [], {}, "", "cat", 1, True, ["cat"], ["cat", "cat"], ["cat", ""], ["cat", " "], ["cat", None]),
    *(["cat", 1], ["cat", ["dog"]], ["cat", "\ud83d"], ["cat", "a\0b"], ["cat", "\u2028"], ["cat", "word " * 3000]),
    *(["cat"] * 6, ["cat", "dog", "house", "tree", "red"], {"text": ["cat", "dog"], "label": ["A", "B"]}),
)
TURNS: dict[str, tuple[Any, ...]] = {
    "role": (MISSING, None, "", 1, "User", "bot", "system", "tool", "assistant", "user", [], "\0"),
    "content": (MISSING, None, "", " ", 1, 0.5, True, [], [{"type": "text", "text": "x"}], {}, "\ud83d", "a\0b", "x"),
    "tool_calls": ([], [{"type": "function", "function": {"name": "f", "arguments": "{}"}}], None),
    "weight": (0, 1, None),
    "name": ("Ann", "", None),
}


@dataclass(frozen=True)
class Kind:
    """A kind of task: rows, the columns that a command line names, and how labels are compared."""

    rows: Callable[[int], list[Row]]
    options: tuple[str, ...]
    label: str = "label"
    generates: bool = False
    forms: tuple[str, ...] = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
    task: str = ""
    """Name of the task, where its rows are read from a folder."""

    @property
    def texts(self) -> list[str]:
        """Names of the text columns."""
        return ["question", "choices"] if self.task else self.options[0].partition("=")[2].split(",")


def _named(count: int) -> list[Row]:
    return [{**row, "label": ("bad", "good")[int(row["label"])]} for row in review_rows(count, 3)]  # type: ignore[call-overload]


def _two(count: int) -> list[Row]:
    return [{"text_a": row["text"], "text_b": f"is it {i} ?", "label": row["label"]} for i, row in _counted(count)]


def _counted(count: int) -> list[tuple[int, Row]]:
    return list(enumerate(review_rows(count, 4)))


def _numbers(count: int) -> list[Row]:
    return [{"text": row["text"], "label": 0.25 + i / 2} for i, row in _counted(count)]


def _sets(count: int) -> list[Row]:
    return [
        {"text": row["text"], "label": (["joy"], ["anger", "joy"], ["anger"])[i % 3]} for i, row in _counted(count)
    ]


def _marks(count: int) -> list[Row]:
    return [{"text": row["text"], "joy": i % 2, "anger": int(i % 3 == 0)} for i, row in _counted(count)]


def _tagged(count: int) -> list[Row]:
    tags = {"movie": "B-WORK", "film": "B-WORK", "plot": "B-PART"}
    words = [str(row["text"]).split() for row in review_rows(count, 5)]
    return [{"tokens": each, "tags": [tags.get(word, "O") for word in each]} for each in words]


def _choices(count: int) -> list[Row]:
    return [{**{name: row[name] for name in ("question", "choices")}, "answer": row["label"]} for row in items(count)]


TEXT = ("--text-column=text",)
LISTS = (".jsonl", ".json", ".parquet")
"""Formats that have lists."""
KINDS = {
    "ids": Kind(lambda count: list(review_rows(count, 3)), TEXT),
    "names": Kind(_named, TEXT),
    "pairs": Kind(_two, ("--text-column=text_a,text_b",)),
    "numbers": Kind(_numbers, TEXT),
    "sets": Kind(_sets, TEXT),
    "marks": Kind(_marks, (*TEXT, "--label-column=joy,anger"), label="joy,anger"),
    "tags": Kind(_tagged, (), label="tags"),
    "choices": Kind(_choices, (), label="answer", forms=LISTS, task="arc_easy"),
    "chat": Kind(chat, (), label="", generates=True, forms=LISTS),
    "prompts": Kind(pairs, (), label="", generates=True),
}
TRAINED, SCORED = 24, 12


def written(rows: list[Row], form: str) -> bytes:
    """Return a data file; `MISSING` is no key, in CSV an empty cell, in Parquet null.

    Raises:
        pyarrow.ArrowException: a column of Parquet cannot hold these values.
    """
    if form == ".parquet":
        columns = {name: [None if row[name] is MISSING else row[name] for row in rows] for name in rows[0]}
        file = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table(columns), file)
        return file.getvalue()
    if form in LISTS:
        lines = [json.dumps({k: v for k, v in row.items() if v is not MISSING}) for row in rows]
        text = f"[{', '.join(lines)}]" if form == ".json" else "".join(line + "\n" for line in lines)
        return text.encode()
    stream = io.StringIO(newline="")
    between = "|" if "label" in rows[0] else " " if form == ".tsv" and "tags" in rows[0] else None
    cells = [[cell(value, between) for value in row.values()] for row in rows]
    has_returns = any("\r" in value for row in cells for value in row)  # which older Pythons do not quote
    quoting: Any = csv.QUOTE_ALL if has_returns else csv.QUOTE_MINIMAL
    writer = csv.writer(stream, delimiter="\t" if form == ".tsv" else ",", lineterminator="\n", quoting=quoting)
    writer.writerows([list(rows[0]), *cells])
    return stream.getvalue().encode("utf-8", "surrogatepass")


def cell(value: Any, between: str | None = "|") -> str:
    """Return the text of a CSV cell; a list of texts has this between them, or is JSON."""
    if value is MISSING or value is None:
        return ""
    if between is not None and isinstance(value, list) and all(isinstance(item, str) for item in value):
        return between.join(value)
    return json.dumps(value) if isinstance(value, (list, dict)) else str(value)


def meaning(task: Task, split: str) -> list[Any]:
    """Return what the rows of a split were read as: texts, and names or numbers."""
    rows = task.splits[split]
    if task.kind == "generation":
        return [_turns(row["messages"]) if "messages" in row else (row["prompt"], row["completion"]) for row in rows]
    labels = rows[task.label_column]
    if task.kind == "token_classification":
        named: list[Any] = [[task.labels[number] for number in each] for each in labels]
    elif task.kind == "multi_label":
        named = [{name for name, has in zip(task.labels, row, strict=True) if has} for row in labels]
    else:
        named = (
            labels if task.kind in ("regression", "multiple_choice") else [task.labels[number] for number in labels]
        )
    return [(*(row[name] for name in task.text_columns), label) for row, label in zip(rows, named, strict=True)]


def _turns(messages: list[Row]) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"]) for turn in messages]


def as_it_stands(row: Row, kind: Kind, form: str) -> Any:
    """Return the meaning of a row, read to the letter; `MISSING` within it can be met by nothing."""
    if kind.generates:
        if "messages" not in row:
            return tuple(row[name] if form in LISTS else cell(row[name], None) for name in row)
        turns = row["messages"]
        fits = isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns)
        extra = (
            fits
            and any(turn.get(name) for turn in turns for name in ("tool_calls", "name"))
            or (fits and any(turn.get("weight") not in (None, 1) for turn in turns))
        )
        if not fits or extra:
            return MISSING
        return [(turn.get("role", MISSING), turn.get("content", MISSING)) for turn in turns]
    is_json = form in LISTS
    if kind.label == "tags":
        between = " " if form == ".tsv" else None
        return tuple(row[name] if is_json else cell(row[name], between) for name in ("tokens", "tags"))
    texts = [row[name] for name in kind.texts]
    labels = [row[name] for name in kind.label.split(",")]
    if not is_json:
        between = "|" if "label" in row else None
        texts = [cell(text, between) for text in texts]
        labels = [
            cell(label) if isinstance(label, (list, dict)) and kind.rows is not _sets else label for label in labels
        ]
    return (*texts, labels)


def same(found: Any, stands: Any, kind: Kind) -> bool:
    """Return whether a row was read to the letter."""
    if kind.generates or stands is MISSING:
        return bool(found == stands)
    if kind.label == "tags":
        return all(list(map(str, one)) == _parts(other) for one, other in zip(found, stands, strict=True))
    *texts, label = found
    *given, labels = stands
    if texts != given:
        return False
    if kind.label == "joy,anger":
        marks = dict(zip(("joy", "anger"), labels, strict=True))
        return all((name in label) == _is_yes(value) for name, value in marks.items())
    if isinstance(label, set):
        value = labels[0]
        return bool(
            label == (set(map(str, value)) if isinstance(value, list) else set(cell(value).strip().split("|")) - {""})
        )
    return not isinstance(labels[0], (list, dict)) and _equal(label, labels[0])


def _parts(value: Any) -> list[str] | None:
    """Return the words or tags of a cell: a list of them, or a text of several, or of a list as JSON."""
    if isinstance(value, str) and value.startswith('["'):
        value = json.loads(value)
    parts = value.split() if isinstance(value, str) else value
    return [str(part).strip() for part in parts] if isinstance(parts, list) else None


def _is_yes(value: Any) -> bool | None:
    text = str(value).strip().lower()
    return True if text in ("1", "1.0", "true", "yes") else False if text in ("0", "0.0", "false", "no") else None


def _equal(found: Any, given: Any) -> bool:
    """Return whether a label is what a cell says: the same word, or the same number."""
    if given in (None, MISSING) or given != given or str(given).strip() == "":
        return False
    if isinstance(given, bool) or str(given).strip().lower() in ("true", "false"):
        return str(found).lower() == str(given).strip().lower() or found == float(str(given).strip().lower() == "true")
    try:
        return float(found) == float(given)
    except (ValueError, OverflowError):
        return str(found) == str(given).strip()


@dataclass
class Trial:
    """A data file to try, and the rows that it should hold."""

    name: str
    kind: str
    form: str
    content: bytes
    rows: list[Row]
    row: int = -1
    """Number of the changed row; -1 where the form of the whole file is changed."""
    damaged: bool = False
    """True where bytes are changed at random: one row may then be another one, or be gone."""
    split: str = "train"


def cells(generator: random.Random, splits: Sequence[str] = ("train", "validation")) -> dict[Any, list[Trial]]:
    """Return files with one changed cell, by kind, form and column."""
    groups: dict[Any, list[Trial | None]] = {}
    for name, kind in KINDS.items():
        for form in kind.forms:
            for column in kind.rows(1)[0]:
                for value in {"messages": MESSAGES, "choices": OPTIONS}.get(column, CELLS):
                    split = generator.choice(splits)
                    trial = changed(name, form, column, value, split, generator)
                    groups.setdefault((name, form, column), []).append(trial)
            if name == "chat":
                for field, values in TURNS.items():
                    for value in values:
                        trial = turned(form, field, value, generator.choice(splits), generator)
                        groups.setdefault((name, form, field), []).append(trial)
    return {group: [trial for trial in trials if trial is not None] for group, trials in groups.items()}


def changed(name: str, form: str, column: str, value: Any, split: str, generator: random.Random) -> Trial | None:
    """Return a file with this value in this column of some row; None if the format cannot hold it."""
    rows = KINDS[name].rows(TRAINED if split == "train" else SCORED)
    number = generator.randrange(len(rows))
    rows[number] = {**rows[number], column: value}
    shown = "missing" if value is MISSING else repr(value)[:60]
    return _trial(f"{name}{form}, {split} row {number}, {column} = {shown}", name, form, rows, number, split)


def turned(form: str, field: str, value: Any, split: str, generator: random.Random) -> Trial | None:
    """Return a file of conversations with this value in a message."""
    rows = chat(TRAINED if split == "train" else SCORED)
    number = generator.randrange(len(rows))
    turns = [dict(turn) for turn in rows[number]["messages"]]
    place = generator.randrange(len(turns))
    turns[place][field] = value
    if value is MISSING:
        del turns[place][field]
    rows[number] = {"messages": turns}
    shown = "missing" if value is MISSING else repr(value)
    described = f"chat{form}, {split} row {number}, {field} of turn {place} = {shown}"
    return _trial(described, "chat", form, rows, number, split)


def _trial(described: str, name: str, form: str, rows: list[Row], number: int, split: str) -> Trial | None:
    try:
        content = written(rows, form)
    except (pyarrow.ArrowException, UnicodeError, OverflowError, TypeError):
        return None
    return Trial(described, name, form, content, rows, number, split=split)
