"""Data files with a changed cell, given to finished runs: `predict`, `evaluate` and `generate`.

Every other row is answered as before. The changed row is answered as its text stands, or a note is about the file, or
the command ends with status 2, one line, and no file written.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import math
import os
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch

import bayeslora
from bayeslora.cli import evaluate as evaluating
from bayeslora.cli.main import main
from bayeslora.data import Task
from tests.cli.changed_data import (
    KINDS,
    LISTS,
    MISSING,
    SCORED,
    TRAINED,
    Kind,
    Row,
    Trial,
    as_it_stands,
    cell,
    cells,
    meaning,
    same,
)
from tests.cli.conftest import write_jsonl
from tests.cli.mutating import Case, Machine, spread, tried

DRAWN = ("names", "tags", "choices", "prompts")
"""Kinds whose runs are of Me-LoRA, and answer with draws of the weights."""
COMMANDS = ("answer", "evaluate")
"""`answer` is `predict`, or `generate` for a run that generates text."""
UNANSWERED = ("label", "joy", "anger", "tags", "answer", "completion")
"""Columns of what is to be predicted: they do not change an answer."""


class Runs:
    """A finished run of each kind, made when it is needed, and its answers to the unchanged rows."""

    def __init__(self, folder: Path, encoder: Path, talker: Path) -> None:
        self.folder, self._models = folder, {False: encoder, True: talker}

    @functools.cache  # noqa: B019
    def of(self, name: str) -> bayeslora.Run:
        kind, out = KINDS[name], self.folder / f"run-{name}"
        data = self.folder / (f"{kind.task}" if kind.task else name)
        data.mkdir()
        for split, count in (("train", TRAINED), ("dev", SCORED)):
            write_jsonl(data / f"{split}.jsonl", kind.rows(count))
        files = [f"--train-file={data}/train.jsonl", f"--eval-file={data}/dev.jsonl", *kind.options]
        named = [f"--task={kind.task}", f"--data-dir={self.folder}"] if kind.task else files
        method = "melora" if name in DRAWN else "lora"
        model = f"--model={self._models[kind.generates or bool(kind.task)]}"
        options = ["--max-steps=4", "--learning-rate=0.02", f"--output-dir={out}"]
        assert main(["train", f"--method={method}", model, *named, *options]) == 0
        return bayeslora.load(out)

    @functools.cache  # noqa: B019
    def answers(self, name: str) -> list[dict[str, Any]]:
        """Return the answers to the unchanged rows."""
        return [self.answer(name, row) for row in KINDS[name].rows(SCORED)]

    def answer(self, name: str, row: Row) -> dict[str, Any]:
        """Return the answer to one row: by hand where its texts go to an encoder, otherwise by the library."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self._answer(name, row)

    def _answer(self, name: str, row: Row) -> dict[str, Any]:
        kind, run = KINDS[name], self.of(name)
        draws: dict[str, int] = {"samples": 2, "seed": 5} if name in DRAWN else {}
        if kind.generates:
            (said,) = run.generate([row], max_new_tokens=3, **draws)  # type: ignore[arg-type]
            return said.to_dict()
        columns = ["tokens"] if name == "tags" else kind.texts
        (found,) = run.predict([{column: row[column] for column in columns}], **draws).records()  # type: ignore[attr-defined]
        if not draws:
            probabilities = found["probabilities"] or {"": found["label"]}
            assert list(probabilities.values()) == pytest.approx(self._by_hand(name, row), abs=1e-5)
        return found

    def _by_hand(self, name: str, row: Row) -> list[float]:
        run = self.of(name)
        texts = [[row[column]] for column in KINDS[name].texts]  # as a batch: Transformers drops an empty second text
        batch = run.tokenizer(*texts, truncation=True, max_length=run.info.max_length, return_tensors="pt")
        with torch.no_grad():
            logits = run.model(**batch).logits[0]
        if run.kind == "regression":
            return logits.tolist()
        return (logits.sigmoid() if run.kind == "multi_label" else logits.softmax(-1)).tolist()


class Counter:
    """Tries files with the commands."""

    def __init__(self, machine: Machine, runs: Runs, read: list[Task]) -> None:
        self.machine, self.runs, self.read = machine, runs, read

    def attempt(self, trial: Trial, command: str, generator: random.Random) -> tuple[str, str]:
        """Return how a trial has ended, and what is wrong."""
        for path in self.machine.folder.iterdir():
            path.unlink()
        kind, name = KINDS[trial.kind], trial.kind
        run = self.runs.of(name)
        self.runs.answers(name)
        file = self.machine.folder / f"data{trial.form}"
        file.write_bytes(trial.content)
        size = f"--batch-size={generator.choice((1, 5, 64))}"
        draws = ["--samples=2", "--seed=5"] if name in DRAWN else []
        out = generator.choice(("out.jsonl",) if kind.generates else ("out.jsonl", "out.csv", "out.tsv"))
        if command == "evaluate":
            words = ["evaluate", str(run.folder), f"--eval-file={file}", "--json", size, *draws]
        else:
            words = ["generate" if kind.generates else "predict", str(run.folder), f"--input={file}", size, *draws]
            words += [f"--output={out}", *(["--max-new-tokens=3"] if kind.generates else [])]
        self.read.clear()
        ended, fault = self.machine.fault(words)
        notes = [note for note in ended.notes if str(file) in note]
        if fault or ended.status == 2:
            return "refused", fault
        try:
            if command == "evaluate":
                fault = self._scored(trial, json.loads(ended.printed), notes)
            else:
                fault = self._answered(trial, self.machine.folder / out, notes)
        except (AssertionError, KeyError, ValueError, TypeError) as error:
            fault = f"{type(error).__name__}: {str(error)[:300]}"
        return "told" if notes else "read", fault

    def _scored(self, trial: Trial, found: dict[str, Any], notes: list[str]) -> str:
        """Return what is wrong with the scores: another reading of a row, or other numbers than its answers give."""
        (task,), kind = self.read, KINDS[trial.kind]
        read, stands = meaning(task, "validation"), [as_it_stands(row, kind, trial.form) for row in trial.rows]
        others = [row for number, row in enumerate(stands) if number != trial.row]
        if lost := [row for row in others if not any(same(each, row, kind) for each in read)]:
            return f"{len(lost)} other rows changed: {str(lost[0])[:150]}"
        if found["rows"] != len(read) or (len(read) != len(stands) and not notes):
            return f"{found['rows']} rows scored, {len(read)} of {len(stands)} read, notes {notes}"
        if not notes:
            for each, row in zip(read, stands, strict=True):
                if not same(each, row, kind):
                    return f"silently {str(each)[:150]}, where the file has {str(row)[:150]}"
                if not kind.generates and any(text == "" for text in each[:-1]):
                    return "an empty text without a word"
        return self._other_scores(trial, found["scores"], read)

    def _other_scores(self, trial: Trial, scores: dict[str, float], read: list[Any]) -> str:
        """Return how the scores differ from those of each row's own answer to what was read."""
        if KINDS[trial.kind].generates or trial.kind in ("tags", "sets", "marks"):
            return ""
        task = self.runs.of(trial.kind)
        columns, losses = KINDS[trial.kind].texts, []
        for *texts, label in read:
            answer = self.runs.answer(trial.kind, dict(zip(columns, texts, strict=True)))
            if task.kind == "regression":
                losses.append((answer["label"] - label) ** 2)
            else:
                name = task.labels[label] if task.kind == "multiple_choice" else label
                losses.append(-math.log(answer["probabilities"][name]))
        expected, measured = sum(losses) / len(losses), scores["mse" if task.kind == "regression" else "nll"]
        if measured is None or not math.isclose(measured, expected, rel_tol=1e-3, abs_tol=1e-4):
            return f"the loss is {measured}, but that of the rows' answers {expected}"
        return ""

    def _answered(self, trial: Trial, out: Path, notes: list[str]) -> str:
        """Return what is wrong with the rows written."""
        kind, rows = KINDS[trial.kind], answered(out)
        if len(rows) != len(trial.rows):
            return f"{len(rows)} answers to {len(trial.rows)} rows"
        expected = self.runs.answers(trial.kind)
        in_file = as_stored(trial)
        for number, (found, row) in enumerate(zip(rows, in_file, strict=True)):
            is_changed = number == trial.row and not self._is_answered_alike(trial)
            if is_changed and notes:
                continue
            if is_changed and (fault := self._not_to_the_letter(trial, found)):
                return fault
            wanted = self.runs.answer(trial.kind, given(row, kind, trial.form)) if is_changed else expected[number]
            wanted = {name: value for name, value in wanted.items() if name != "reference"}
            if fault := differs(found, wanted, out.suffix):
                return f"row {number}: {fault}"
            if (
                "completion" in row
                and found.get("reference") != given(row, kind, trial.form).get("completion")
                and not notes
            ):
                return f"reference is {found.get('reference')!r}, where the file has {row['completion']!r}"
            if not kind.generates and not notes and (fault := self._lost(trial, found, row, out.suffix)):
                return f"row {number}: {fault}"
        return ""

    @staticmethod
    def _is_answered_alike(trial: Trial) -> bool:
        before = _rows(trial.kind)[trial.row]
        return all(name in UNANSWERED or value == before[name] for name, value in trial.rows[trial.row].items())

    @staticmethod
    def _not_to_the_letter(trial: Trial, found: Row) -> str:
        kind, row = KINDS[trial.kind], given(trial.rows[trial.row], KINDS[trial.kind], trial.form)
        if kind.generates:
            turns = row.get("messages", [])
            asked = turns[:-1] if turns and turns[-1]["role"] == "assistant" else turns
            texts = [asked[-1]["content"]] if "messages" in row else [row["prompt"]]
        else:
            texts = [row[name] for name in (["tokens"] if trial.kind == "tags" else kind.texts)]
        parts = [part for text in texts for part in (text if isinstance(text, list) else [text])]
        if not parts or not all(isinstance(part, str) and part.strip() for part in parts):
            return f"{str(texts)[:100]} was answered without a word: {str(found)[:100]}"
        return ""

    @staticmethod
    def _lost(trial: Trial, found: Row, row: Row, suffix: str) -> str:
        """Return which column of the input is not in the output as it was."""
        between = "|" if "label" in row else " " if trial.form == ".tsv" else None
        for name, value in row.items():
            kept = found.get(f"input_{name}", found.get(name)) if name in ("label", "set") else found.get(name)
            value = value if trial.form in LISTS else cell(value, between)
            value = None if value is MISSING else value
            if suffix == ".jsonl":
                wanted = None if isinstance(value, float) and not math.isfinite(value) else value
                fits = kept == wanted
            else:
                fits = kept == as_text(value)
            if not fits:
                return f"column {name} has {str(kept)[:80]!r}, where the file has {str(value)[:80]!r}"
        return ""


@functools.cache
def _rows(name: str) -> list[Row]:
    return KINDS[name].rows(SCORED)


def given(row: Row, kind: Kind, form: str) -> Row:
    """Return what a reader makes of a row to the letter."""
    if form in LISTS:
        return {name: value for name, value in row.items() if value is not MISSING}
    between = "|" if "label" in row else " " if form == ".tsv" else None
    return {name: cell(value, between) for name, value in row.items()}


def as_stored(trial: Trial) -> list[Row]:
    """Return the rows as the types of the file's columns hold them."""
    if trial.form != ".parquet":
        return trial.rows
    return pyarrow.parquet.read_table(io.BytesIO(trial.content)).to_pylist()


def as_text(value: Any) -> str:
    """Return the cell of a CSV file for a value of the input."""
    if value is None:
        return ""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (bool, list, dict)) else str(value)


def answered(path: Path) -> list[Row]:
    """Return the rows of a file of answers."""
    text = path.read_bytes().decode("utf-8-sig")
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.split("\n") if line]
    csv.field_size_limit(2**31 - 1)
    return list(csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix == ".tsv" else ","))


def differs(found: Row, wanted: dict[str, Any], suffix: str) -> str:
    """Return in what an answer differs from the one that a row had alone."""
    for name, value in wanted.items():
        if suffix == ".jsonl":
            there = found.get(name)
        elif name == "probabilities":
            value = list((value or {}).values())
            there = [float(cell) for column, cell in found.items() if column.startswith("probability_")]
        elif isinstance(value, (list, dict, str)) and name in found:
            there = json.loads(found[name]) if isinstance(value, list) else found[name]
        elif isinstance(value, float):
            there = float(found[name])
        else:
            continue
        if name in ("words", "spans"):
            there, value = without_places(there), without_places(value)
        if not alike(there, value):
            return f"{name} is {str(there)[:120]}, but {str(value)[:120]} was the row's alone"
    return ""


def without_places(answer: Any) -> Any:
    """Return words without their places in a text, which a list of words has not."""
    return [{k: v for k, v in each.items() if k != "characters"} for each in answer] if answer else answer


def alike(one: Any, other: Any) -> bool:
    """Return whether two answers are equal, numbers up to the rounding of another batch."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-3, abs_tol=1e-4)
    if isinstance(one, list) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(alike(one[name], other[name]) for name in one)
    return bool(one == other)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_bert_folder: Path, tiny_causal_folder: Path) -> Runs:
    return Runs(tmp_path_factory.mktemp("finished"), tiny_bert_folder, tiny_causal_folder)


@pytest.fixture
def counter(machine: Machine, finished: Runs, monkeypatch: pytest.MonkeyPatch) -> Counter:
    read: list[Task] = []
    rows_to_score = evaluating.rows_to_score

    def watched(*arguments: Any) -> tuple[Task, str]:
        task, split = rows_to_score(*arguments)
        read.append(task)
        return task, split

    monkeypatch.setattr(evaluating, "rows_to_score", watched)
    return Counter(machine, finished, read)


def _cases(counter: Counter, count: int, seed: int) -> Iterator[Case]:
    generator = random.Random(seed)
    groups = {
        (*group, command): [(trial, command) for trial in trials]
        for command in COMMANDS
        for group, trials in cells(generator, ["validation"]).items()
    }
    for trial, command in spread(groups, count, seed):
        yield f"{command} {trial.name}", functools.partial(counter.attempt, trial, command, random.Random(trial.name))


def test_a_changed_row_is_answered_as_it_stands_or_told_or_refused(counter: Counter) -> None:
    counts, wrong = tried(list(_cases(counter, 60, seed=0)))
    assert not wrong, "\n".join(wrong)
    assert min(counts["read"], counts["refused"]) > 10 and counts["told"] > 1, counts


@pytest.mark.slow
def test_many_changed_rows(counter: Counter, capfd: pytest.CaptureFixture[str]) -> None:
    """400 of them; `BAYESLORA_MUTATIONS` is another number, `BAYESLORA_SEED` another choice."""
    count, seed = int(os.environ.get("BAYESLORA_MUTATIONS", "400")), int(os.environ.get("BAYESLORA_SEED", "1"))
    counts, wrong = tried(list(_cases(counter, count, seed)))
    with capfd.disabled():
        print(f"rows: {dict(counts)}")
        print("\n".join(wrong))
    assert not wrong
