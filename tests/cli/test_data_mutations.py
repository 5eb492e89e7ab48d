"""Data files with a changed cell, or a changed form: read as they stand, told, or refused, by every command alike.

A value that a reader takes for another one, a row that it leaves out, or a task that becomes another, needs a note.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import math
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from bayeslora.data import Task
from bayeslora.errors import BayesLoraError
from bayeslora.runs import train as training
from tests.cli.conftest import review_rows, write_jsonl
from tests.cli.mutating import Case, Ended, Machine, spread, tried
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
    forms: tuple[str, ...] = (".jsonl", ".json", ".csv", ".tsv")


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


TEXT = ("--text-column=text",)
KINDS = {
    "ids": Kind(lambda count: list(review_rows(count, 3)), TEXT),
    "names": Kind(_named, TEXT),
    "pairs": Kind(_two, ("--text-column=text_a,text_b",)),
    "numbers": Kind(_numbers, TEXT),
    "sets": Kind(_sets, TEXT),
    "marks": Kind(_marks, (*TEXT, "--label-column=joy,anger"), label="joy,anger"),
    "tags": Kind(_tagged, (), label="tags", forms=(".jsonl", ".json")),
    "chat": Kind(chat, (), label="", generates=True, forms=(".jsonl", ".json")),
    "prompts": Kind(pairs, (), label="", generates=True),
}
TRAINED, SCORED = 24, 12


class Loaded(BayesLoraError):
    """The rows have been read: what would follow takes longer."""


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Task]:
    """The task that `train` has read; it then ends."""
    found: list[Task] = []
    read = training._load_data

    def load(plan: Any) -> Task:
        found.append(read(plan))
        raise Loaded("the rows are read")

    monkeypatch.setattr(training, "_load_data", load)
    return found


@pytest.fixture
def machine(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path / "machine", capfd, monkeypatch)


def written(rows: list[Row], form: str) -> bytes:
    """Return a data file; `MISSING` is no key, and in CSV an empty cell."""
    if form in (".jsonl", ".json"):
        lines = [json.dumps({k: v for k, v in row.items() if v is not MISSING}) for row in rows]
        text = f"[{', '.join(lines)}]" if form == ".json" else "".join(line + "\n" for line in lines)
        return text.encode()
    stream = io.StringIO(newline="")
    cells = [[cell(value) for value in row.values()] for row in rows]
    has_returns = any("\r" in value for row in cells for value in row)  # which older Pythons do not quote
    quoting: Any = csv.QUOTE_ALL if has_returns else csv.QUOTE_MINIMAL
    writer = csv.writer(stream, delimiter="\t" if form == ".tsv" else ",", lineterminator="\n", quoting=quoting)
    writer.writerows([list(rows[0]), *cells])
    return stream.getvalue().encode("utf-8", "surrogatepass")


def cell(value: Any) -> str:
    """Return the text of a CSV cell."""
    if value is MISSING or value is None:
        return ""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return "|".join(value)
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
        named = labels if task.kind == "regression" else [task.labels[number] for number in labels]
    return [(*(row[name] for name in task.text_columns), label) for row, label in zip(rows, named, strict=True)]


def _turns(messages: list[Row]) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"]) for turn in messages]


def as_it_stands(row: Row, kind: Kind, form: str) -> Any:
    """Return the meaning of a row, read to the letter; `MISSING` within it can be met by nothing."""
    if kind.generates:
        if "messages" not in row:
            return tuple(row[name] if form in (".jsonl", ".json") else cell(row[name]) for name in row)
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
    if kind.label == "tags":
        return (row["tokens"], row["tags"])
    is_json = form in (".jsonl", ".json")
    texts = [row[name] for name in kind.options[0].partition("=")[2].split(",")]
    labels = [row[name] for name in kind.label.split(",")]
    if not is_json:
        texts = [cell(text) for text in texts]
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
    """Return the words or tags of a cell: a list of them, or a text of several."""
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


def cells(generator: random.Random) -> dict[Any, list[Trial]]:
    """Return files with one changed cell, by kind, form and column."""
    groups: dict[Any, list[Trial]] = {}
    for name, kind in KINDS.items():
        for form in kind.forms:
            for column in kind.rows(1)[0]:
                for value in MESSAGES if column == "messages" else CELLS:
                    groups.setdefault((name, form, column), []).append(_changed(name, form, column, value, generator))
            if name == "chat":
                for field, values in TURNS.items():
                    for value in values:
                        groups.setdefault((name, form, field), []).append(_turned(form, field, value, generator))
    return groups


def _changed(name: str, form: str, column: str, value: Any, generator: random.Random) -> Trial:
    split = generator.choice(["train", "validation"])
    rows = KINDS[name].rows(TRAINED if split == "train" else SCORED)
    number = generator.randrange(len(rows))
    rows[number] = {**rows[number], column: value}
    shown = "missing" if value is MISSING else repr(value)[:60]
    described = f"{name}{form}, {split} row {number}, {column} = {shown}"
    return Trial(described, name, form, written(rows, form), rows, number, split=split)


def _turned(form: str, field: str, value: Any, generator: random.Random) -> Trial:
    rows = chat(TRAINED)
    number = generator.randrange(len(rows))
    turns = [dict(turn) for turn in rows[number]["messages"]]
    place = generator.randrange(len(turns))
    turns[place][field] = value
    if value is MISSING:
        del turns[place][field]
    rows[number] = {"messages": turns}
    described = f"chat{form}, row {number}, {field} of turn {place} = {'missing' if value is MISSING else repr(value)}"
    return Trial(described, "chat", form, written(rows, form), rows, number)


def forms(generator: random.Random) -> dict[Any, list[Trial]]:
    """Return files of another form: encodings, line ends, delimiters, damage."""
    groups: dict[Any, list[Trial]] = {}
    for name, kind in KINDS.items():
        for form in kind.forms:
            rows = kind.rows(TRAINED)
            content = written(rows, form)
            trial = Trial(f"{name}{form} ", name, form, content, rows)
            for what, changed in _reformed(content, rows, form).items():
                groups.setdefault((form, what), []).append(replace(trial, name=trial.name + what, content=changed))
            for _ in range(12):
                place = generator.randrange(len(content))
                byte = bytes([content[place] ^ (1 << generator.randrange(8))])
                for what, changed in {
                    f"cut at {place}": content[:place],
                    f"flipped at {place}": content[:place] + byte + content[place + 1 :],
                    f"without {place}": content[:place] + content[place + 1 :],
                    f"NUL at {place}": content[:place] + b"\0" + content[place:],
                }.items():
                    damaged = replace(trial, name=trial.name + what, content=changed, damaged=True)
                    groups.setdefault((name, form, what.split()[0]), []).append(damaged)
    return groups


def _reformed(content: bytes, rows: list[Row], form: str) -> dict[str, bytes]:
    text = content.decode()
    found = {
        "with a mark": b"\xef\xbb\xbf" + content,
        "in UTF-16": text.encode("utf-16"),
        "in UTF-16 without a mark": text.encode("utf-16-le"),
        "in UTF-32": text.encode("utf-32"),
        "with \\r\\n": content.replace(b"\n", b"\r\n"),
        "without an end": content.rstrip(b"\n"),
        "with blank lines": content.replace(b"\n", b"\n\n"),
        "empty": b"",
        "white": b" \n\n\t\n",
        "null": b"null",
        "zeros": bytes(2000),
        "packed": b"PK\x03\x04" + bytes(range(256)) * 4,
        "deep": b"[" * 100_000,
    }
    if form == ".jsonl":
        found |= {
            "a list": written(rows, ".json"),
            "with a blank at each end": content.replace(b"\n", b" \n"),
            "with a number": content + b"1\n",
            "with a list": content + b"[1]\n",
            "with null": content + b"null\n",
            "joined": content.replace(b"\n", b" "),
            "with commas": content.replace(b"\n", b",\n"),
            "a comment": b"// rows\n" + content,
            "a key twice": content.replace(b"{", b'{"label": 0, "text": "bad", ', 1),
            "with huge digits": content + b'{"text": "good", "label": ' + b"9" * 5000 + b"}\n",
        }
    if form in (".csv", ".tsv"):
        delimiter = "\t" if form == ".tsv" else ","
        header, _, body = text.partition("\n")
        quoted = io.StringIO(newline="")
        csv.writer(quoted, delimiter=delimiter, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(
            csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        )
        found |= {
            "quoted": quoted.getvalue().encode(),
            "without a header": body.encode(),
            "header alone": header.encode(),
            "header in capitals": f"{header.upper()}\n{body}".encode(),
            "header with blanks": f"{header.replace(delimiter, ' ' + delimiter + ' ')}\n{body}".encode(),
            "header twice": f"{header}\n{text}".encode(),
            "columns twice": f"{header}{delimiter}{header}\n".encode()
            + b"".join(f"{line}{delimiter}{line}\n".encode() for line in body.splitlines()),
            "a field more": text.replace("\n", f"{delimiter}x\n", 3).encode(),
            "an open quote": (text + '"good').encode(),
            **{f"with {mark!r}": _delimited(text, delimiter, mark) for mark in ";|,\t"},
            "with sep=;": b"sep=;\n" + _delimited(text, delimiter, ";"),
        }
    return found


def _delimited(text: str, delimiter: str, mark: str) -> bytes:
    stream = io.StringIO(newline="")
    csv.writer(stream, delimiter=mark, lineterminator="\n").writerows(
        csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    )
    return stream.getvalue().encode()


class Laboratory:
    """Tries files with the commands; the rows of the unchanged ones are read once."""

    def __init__(self, machine: Machine, loaded: list[Task]) -> None:
        self.machine, self.loaded, self.said = machine, loaded, ""
        self.whole: dict[str, Path] = {}
        folder = machine.folder.parent
        for name, kind in KINDS.items():
            for split, count in (("train", TRAINED), ("validation", SCORED)):
                self.whole[f"{name}-{split}"] = write_jsonl(folder / f"{name}-{split}.jsonl", kind.rows(count))

    def attempt(self, trial: Trial) -> tuple[str, str]:
        """Return how a trial has ended, and what is wrong."""
        for path in self.machine.folder.iterdir():
            path.unlink()
        file = self.machine.folder / f"data{trial.form}"
        file.write_bytes(trial.content)
        self.loaded.clear()
        words = self._train(trial, str(file))
        ended = self.machine.run(words)
        if ended.fault:
            return "", ended.fault
        if ended.status != 2 or len(ended.errors) != 1 or not ended.errors[0].startswith("bayeslora: "):
            return "", f"status {ended.status}: {ended.errors}"
        if sorted(path.name for path in self.machine.folder.iterdir()) != [file.name]:
            return "", f"wrote {list(self.machine.folder.iterdir())}"
        notes = [note for note in ended.notes if str(file) in note]
        told = self._read(trial, notes) if self.loaded else ""
        self.said = ended.errors[0]
        return ("read" if self.loaded and not notes else "told" if self.loaded else "refused"), (
            told or (self._inspected(trial, file) if trial.split == "train" else "")
        )

    def _train(self, trial: Trial, file: str) -> list[str]:
        files = {
            "train": str(self.whole[f"{trial.kind}-train"]),
            "validation": str(self.whole[f"{trial.kind}-validation"]),
        }
        files[trial.split] = file
        return [
            *("train", "--method=lora", "--model=unread", *_named_columns(trial)),
            *(f"--train-file={files['train']}", f"--eval-file={files['validation']}", "--output-dir=out"),
        ]

    def _read(self, trial: Trial, notes: list[str]) -> str:
        """Return what was read as something else without a note."""
        (task,), kind = self.loaded, KINDS[trial.kind]
        found = meaning(task, trial.split)
        expected = [as_it_stands(row, kind, trial.form) for row in trial.rows]
        if trial.damaged:
            return _damage(found, expected, kind, notes)
        if notes:
            others = [row for number, row in enumerate(expected) if number != trial.row]
            lost = [row for row in others if not any(same(each, row, kind) for each in found)]
            return f"told {notes}, but {len(lost)} other rows changed: {lost[:2]}" if lost and task.kind != "x" else ""
        if len(found) != len(expected):
            return f"{len(found)} of {len(expected)} rows without a word"
        wrong = [(each, row) for each, row in zip(found, expected, strict=True) if not same(each, row, kind)]
        if wrong:
            return f"silently {str(wrong[0][0])[:150]}, where the file has {str(wrong[0][1])[:150]}"
        text = [part for each in found for part in (each if kind.generates else each[:-1]) if part == ""]
        return (
            f"{len(text)} empty texts without a word"
            if text and trial.kind != "prompts"
            else self._same_kind(trial, task)
        )

    def _same_kind(self, trial: Trial, task: Task) -> str:
        usual = {"numbers": "regression", "sets": "multi_label", "marks": "multi_label"}
        usual |= {"chat": "generation", "prompts": "generation", "tags": "token_classification"}
        expected = usual.get(trial.kind, "classification")
        return "" if task.kind == expected else f"silently a task of {task.kind}, not of {expected}"

    def _inspected(self, trial: Trial, file: Path) -> str:
        """Return where `inspect` says another thing than `train` does."""
        words = [
            "inspect",
            str(file),
            *_named_columns(trial),
            f"--eval-file={self.whole[f'{trial.kind}-validation']}",
            "--json",
        ]
        ended = self.machine.run(words)
        if ended.fault:
            return f"inspect: {ended.fault}"
        if bool(ended.status) == bool(self.loaded) or ended.status and len(ended.errors) != 1:
            return f"inspect has status {ended.status} {ended.errors}, train says {self.said}"
        if not self.loaded:
            return ""
        return _disagreement(self.loaded[0], ended)


def _named_columns(trial: Trial) -> list[str]:
    lists = trial.kind == "sets" and trial.form in (".csv", ".tsv")
    return [*KINDS[trial.kind].options, *(["--kind=multi_label"] if lists else [])]


def _damage(found: list[Any], expected: list[Any], kind: Kind, notes: list[str]) -> str:
    """Return what is wrong with the rows of a file of which one byte was changed, or the end is cut off."""
    other = [row for row in found if not any(same(row, each, kind) for each in expected)]
    if len(other) > 1 and not notes:
        return f"{len(other)} rows changed without a word: {other[:2]}"
    return ""


def _disagreement(task: Task, ended: Ended) -> str:
    said = json.loads(ended.printed)
    rows = task.train_split
    if said["kind"] != task.kind or said["training"]["rows"] != len(rows):
        return f"inspect says {said['kind']} {said['training']['rows']} rows, train {task.kind} {len(rows)}"
    if task.kind == "classification":
        counts = {name: rows["label"].count(number) for number, name in enumerate(task.labels)}
        if said["training"]["labels"] != counts:
            return f"inspect counts {said['training']['labels']}, train {counts}"
    return ""


def _cases(laboratory: Laboratory, count: int, seed: int) -> Iterator[Case]:
    generator = random.Random(seed)
    many = spread(cells(generator), count * 3 // 4, seed), spread(forms(generator), count - count * 3 // 4, seed)
    for trials in many:
        for trial in trials:
            yield trial.name, functools.partial(laboratory.attempt, trial)


def test_unchanged_files_are_read_to_the_letter(machine: Machine, loaded: list[Task]) -> None:
    laboratory = Laboratory(machine, loaded)
    for name, kind in KINDS.items():
        for form in kind.forms:
            rows = kind.rows(TRAINED)
            assert laboratory.attempt(Trial("", name, form, written(rows, form), rows)) in (
                ("read", ""),
                ("told", ""),
            ), (name, form)


def test_a_changed_data_file_is_read_told_or_refused(machine: Machine, loaded: list[Task]) -> None:
    counts, wrong = tried(list(_cases(Laboratory(machine, loaded), 80, seed=0)))
    assert not wrong, "\n".join(wrong)
    assert min(counts["read"], counts["told"], counts["refused"]) > 3, counts


PARTS = 4


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_many_changed_data_files(
    machine: Machine, loaded: list[Task], part: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """400 of them; `BAYESLORA_MUTATIONS` is another number of all, `BAYESLORA_SEED` another choice."""
    count, seed = int(os.environ.get("BAYESLORA_MUTATIONS", "400")), int(os.environ.get("BAYESLORA_SEED", "1"))
    cases = list(_cases(Laboratory(machine, loaded), count, seed))
    counts, wrong = tried(cases[part::PARTS])
    with capfd.disabled():
        print(f"data, part {part + 1} of {PARTS}: {dict(counts)}")
        print("\n".join(wrong))
    assert not wrong
