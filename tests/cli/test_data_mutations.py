"""Data files with a changed cell, or a changed form: read as they stand, told, or refused, by every command alike.

A value that a reader takes for another one, a row that it leaves out, or a task that becomes another, needs a note.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from bayeslora.data import Task
from bayeslora.errors import BayesLoraError
from bayeslora.runs import train as training
from tests.cli.changed_data import (
    KINDS,
    SCORED,
    TRAINED,
    Kind,
    Row,
    Trial,
    as_it_stands,
    cells,
    meaning,
    same,
    written,
)
from tests.cli.conftest import write_jsonl
from tests.cli.mutating import Case, Ended, Machine, spread, tried


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


def trained_forms(kind: Kind) -> tuple[str, ...]:
    """Return the formats of training files."""
    return (".jsonl",) if kind.task else kind.forms


def forms(generator: random.Random) -> dict[Any, list[Trial]]:
    """Return files of another form: encodings, line ends, delimiters, damage."""
    groups: dict[Any, list[Trial]] = {}
    for name, kind in KINDS.items():
        for form in trained_forms(kind):
            rows = kind.rows(TRAINED)
            content = written(rows, form)
            trial = Trial(f"{name}{form} ", name, form, content, rows)
            others = _retyped(rows) if form == ".parquet" else _reformed(content, rows, form)
            for what, changed in others.items():
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


def _retyped(rows: list[Row]) -> dict[str, bytes]:
    """Return Parquet files whose columns have other types, as far as these can hold their values."""
    table = pyarrow.table({name: [row[name] for row in rows] for name in rows[0]})
    kinds = {
        str(kind): kind
        for kind in (
            *(pyarrow.int8(), pyarrow.uint64(), pyarrow.float16(), pyarrow.float32(), pyarrow.float64()),
            *(pyarrow.decimal128(12, 4), pyarrow.bool_(), pyarrow.string(), pyarrow.large_string(), pyarrow.binary()),
            *(pyarrow.timestamp("s"), pyarrow.date64(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())),
            *(
                pyarrow.list_(pyarrow.int64()),
                pyarrow.large_list(pyarrow.string()),
                pyarrow.list_(pyarrow.string(), 2),
            ),
        )
    }
    found = {}
    for name in table.column_names:
        place = table.column_names.index(name)
        for what, kind in kinds.items():
            try:
                column = table.column(name).cast(kind)
                found[f"with {name} as {what}"] = _parquet(table.set_column(place, name, column))
            except pyarrow.ArrowException:
                continue
        dropped = table.drop_columns([name])
        found |= {
            f"with {name} in capitals": _parquet(dropped.append_column(name.upper(), table.column(name))),
            f"with {name} twice": _parquet(table.append_column(name, table.column(name))),
            f"without {name}": _parquet(dropped),
            f"with nulls as {name}": _parquet(table.set_column(place, name, pyarrow.nulls(len(table)))),
        }
    return found | {
        "in groups": _parquet(table, row_group_size=3),
        "without rows": _parquet(table.slice(0, 0)),
        "with an index": _parquet(table.append_column("__index_level_0__", pyarrow.array(range(len(table))))),
    }


def _parquet(table: pyarrow.Table, **options: Any) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file, **options)
    return file.getvalue()


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
        file = self._file(trial)
        file.write_bytes(trial.content)
        self.loaded.clear()
        words = self._train(trial, str(file))
        ended = self.machine.run(words)
        if ended.fault:
            return "", ended.fault
        if ended.status != 2 or len(ended.errors) != 1 or not ended.errors[0].startswith("bayeslora: "):
            return "", f"status {ended.status}: {ended.errors}"
        if [path for path in self.machine.folder.iterdir() if path != file]:
            return "", f"wrote {list(self.machine.folder.iterdir())}"
        notes = [note for note in ended.notes if str(file) in note]
        told = self._read(trial, notes) if self.loaded else ""
        self.said = ended.errors[0]
        return ("read" if self.loaded and not notes else "told" if self.loaded else "refused"), (
            told or (self._inspected(trial, file) if trial.split == "train" and not KINDS[trial.kind].task else "")
        )

    def _file(self, trial: Trial) -> Path:
        """Return where the data are to be written; that of a task of a name is in its folder, with the others."""
        task = KINDS[trial.kind].task
        if not task:
            return self.machine.folder / f"data{trial.form}"
        folder = self.machine.folder.parent / "data" / task
        folder.mkdir(parents=True, exist_ok=True)
        files = {split: folder / f"{name}.jsonl" for split, name in (("train", "train"), ("validation", "dev"))}
        for split, path in files.items():
            shutil.copy(self.whole[f"{trial.kind}-{split}"], path)
        return files[trial.split]

    def _train(self, trial: Trial, file: str) -> list[str]:
        files = {
            "train": str(self.whole[f"{trial.kind}-train"]),
            "validation": str(self.whole[f"{trial.kind}-validation"]),
        }
        files[trial.split] = file
        if KINDS[trial.kind].task:
            named = (f"--task={KINDS[trial.kind].task}", f"--data-dir={Path(file).parent.parent}")
            return ["train", "--method=lora", "--model=unread", *named, "--output-dir=out"]
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
            return "" if trial.form == ".parquet" else _damage(found, expected, kind, notes)
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
        usual |= {"choices": "multiple_choice"}
        expected = usual.get(trial.kind, "classification")
        return "" if task.kind == expected else f"silently a task of {task.kind}, not of {expected}"

    def _inspected(self, trial: Trial, file: Path) -> str:
        """Return where `inspect` says another thing than `train` does; it also describes rows without answers."""
        if (
            not self.loaded
            and trial.form == ".parquet"
            and ("lacks column" in self.said or "columns named" in self.said or "-column is missing" in self.said)
        ):
            return ""
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
    """Return what is wrong with the rows of a file of which one byte was changed, or the end is cut off.

    That of a Parquet file, without check sums, may change whatever it likes.
    """
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
    trainable = {group: some for group, some in cells(generator).items() if group[1] in trained_forms(KINDS[group[0]])}
    many = spread(trainable, count * 3 // 4, seed), spread(forms(generator), count - count * 3 // 4, seed)
    for trials in many:
        for trial in trials:
            yield trial.name, functools.partial(laboratory.attempt, trial)


def test_unchanged_files_are_read_to_the_letter(machine: Machine, loaded: list[Task]) -> None:
    laboratory = Laboratory(machine, loaded)
    for name, kind in KINDS.items():
        for form in trained_forms(kind):
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
