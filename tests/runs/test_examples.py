"""Rows to look at: the right ones, in the right order, reread from their file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

import bayeslora
from bayeslora.data import Task
from bayeslora.errors import BayesLoraError
from bayeslora.evaluation import Evaluation
from bayeslora.runs.examples import Example, Examples, choose_examples, read_examples
from bayeslora.runs.record import read_run

# Right and sure, wrong and sure, wrong and unsure, right and unsure, wrong and surest.
SURE = np.array([0.9, 0.8, 0.55, 0.52, 0.97])
RIGHT = np.array([True, False, False, True, False])


def task(kind: Any, rows: dict[str, list[Any]], labels: list[str]) -> Task:
    columns = tuple(name for name in rows if name != "label")
    return Task("made", kind, columns, "label", labels, "accuracy", {"validation": Dataset.from_dict(rows)})


def evaluation(predictions: Any, labels: Any, samples: int = 0) -> Evaluation:
    nothing = np.zeros(len(labels))
    return Evaluation({}, np.asarray(predictions), np.asarray(labels), [], 0.0, nothing, nothing + 0.25, samples)


def test_the_least_certain_and_the_most_wrong_rows_are_in_order_and_come_back_from_the_file(tmp_path: Path) -> None:
    texts = ["one", "two", "three " * 300, "", "five"]
    of = task("classification", {"text": texts, "label": [1] * 5}, ["bad", "good"])
    of_good = np.where(RIGHT, SURE, 1 - SURE)
    found = choose_examples(evaluation(np.stack([1 - of_good, of_good], 1), [1] * 5, 4), of.eval_split, of, 2)
    found.save(tmp_path)
    assert read_examples(tmp_path) == found
    assert [each.row for each in found.least_certain] == [4, 3]
    assert [each.row for each in found.wrongest] == [5, 2]
    assert found.least_certain[0] == Example(4, {"text": ""}, "good", "good", 0.52, 0.52, 0.25)
    assert found.wrongest[0].predicted == "bad" and found.wrongest[0].of_label == pytest.approx(0.03)
    cut = found.least_certain[1].texts["text"]
    assert len(cut) == 600 and cut.endswith("…")


def test_rows_with_equal_texts_are_one_with_their_number_and_their_other_labels(tmp_path: Path) -> None:
    texts = ["same", "same", "other", "same", "last"]
    of = task("classification", {"text": texts, "label": [1, 1, 1, 0, 1]}, ["bad", "good"])
    bad = [0.6, 0.6, 0.7, 0.6, 0.9]
    found = choose_examples(evaluation([[p, 1 - p] for p in bad], [1, 1, 1, 0, 1]), of.eval_split, of, 2)
    assert [(each.row, each.rows, each.other_labels) for each in found.least_certain] == [(1, 3, ["bad"]), (3, 1, [])]
    assert [(each.row, each.rows) for each in found.wrongest] == [(5, 1), (3, 1)]
    found.save(tmp_path)
    assert read_examples(tmp_path) == found
    of = task("regression", {"text": texts, "label": [1.0, 1.0, 2.0, 3.0, 4.0]}, [])
    found = choose_examples(evaluation([9.0, 9.0, 5.0, 9.0, 4.0], [1.0, 1.0, 2.0, 3.0, 4.0]), of.eval_split, of, 2)
    assert [(each.row, each.rows, each.other_labels) for each in found.wrongest] == [(1, 3, ["3"]), (3, 1, [])]
    of = task("multi_label", {"text": texts[:3], "label": [[1, 0], [1, 0], [0, 1]]}, ["a", "b"])
    found = choose_examples(
        evaluation([[0.4, 0.1], [0.4, 0.1], [0.1, 0.9]], [[1, 0], [1, 0], [0, 1]]), of.eval_split, of, 5
    )
    assert [(each.row, each.rows) for each in found.least_certain] == [(1, 2), (3, 1)]
    assert [(each.row, each.rows) for each in found.wrongest] == [(1, 2)]


def test_held_out_rows_have_their_numbers_in_the_file() -> None:
    of = task("classification", {"text": ["one", "two"], "label": [1, 1]}, ["bad", "good"])
    of = dataclasses.replace(of, evaluation_rows=[3, 8])
    found = choose_examples(evaluation([[0.3, 0.7], [0.6, 0.4]], [1, 1]), of.eval_split, of)
    assert [each.row for each in found.least_certain] == [9, 4] and found.wrongest[0].row == 9


def test_numbers_have_the_largest_errors_and_no_confidence() -> None:
    of = task("regression", {"a": ["x", "y", "z"], "b": ["u", "v", "w"], "label": [1.0, 2.0, 3.0]}, [])
    found = choose_examples(evaluation([1.1, 4.0, 2.0], [1.0, 2.0, 3.0]), of.eval_split, of, 2)
    assert found.least_certain == []
    assert found.wrongest == [Example(2, {"a": "y", "b": "v"}, "2", "4"), Example(3, {"a": "z", "b": "w"}, "3", "2")]


def test_choices_are_one_text() -> None:
    rows = {"question": ["Which?"], "choices": [["this", "that"]], "label": [0]}
    of = task("multiple_choice", rows, ["A", "B", "C"])
    found = choose_examples(evaluation([[0.6, 0.4, 0.0]], [0]), of.eval_split, of)
    assert found.least_certain[0].texts == {"question": "Which?", "choices": "A: this  B: that"}
    assert found.wrongest == []


def test_a_damaged_file_is_told_and_a_missing_one_is_none(tmp_path: Path) -> None:
    assert read_examples(tmp_path) == Examples()
    for content in ("{", '{"wrongest": [{"row": "x"}]}'):
        (tmp_path / "examples.json").write_text(content)
        with pytest.raises(BayesLoraError, match="examples.json is damaged"):
            read_examples(tmp_path)


def test_a_finished_run_keeps_rows_that_its_own_predictions_choose(run_of: Callable[[str], Path]) -> None:
    """Confusion matrix, thresholds and rows of a trained run agree with what the loaded run predicts."""
    folder = run_of("melora")
    run, record = bayeslora.load(folder), read_run(folder)
    rows = [json.loads(line) for line in Path(run.config["eval_file"]).read_text(encoding="utf-8").splitlines()]
    found = run.predict([row["text"] for row in rows])
    sure = [row.confidence or 0.0 for row in found]
    chosen = read_examples(folder)
    assert len(chosen.least_certain) == 5
    first = chosen.least_certain[0]
    assert first.confidence == pytest.approx(min(sure), abs=1e-5)
    assert first.texts["text"] == rows[first.row - 1]["text"] and first.label == rows[first.row - 1]["label"]
    assert sum(map(sum, record.confusion)) == len(rows) == record.rows
    right = sum(row.label == truth["label"] for row, truth in zip(found, rows, strict=True))
    assert sum(record.confusion[i][i] for i in range(len(record.labels))) == right
    assert record.verdict.gain is not None and record.verdict.overconfidence is not None
    assert record.verdict.overconfidence.mean == pytest.approx(np.mean(sure) - right / len(rows), abs=1e-5)
