"""Several labels a row: what lists, cells and columns of 0 and 1 mean, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bayeslora.data import HoldOut, load_files
from bayeslora.data.inspection import inspect_file
from bayeslora.data.tasks import Task
from bayeslora.errors import BayesLoraError

ROWS: list[dict[str, Any]] = [
    {"text": "a", "topics": ["sport", "money"]},
    {"text": "b", "topics": []},
    {"text": "c", "topics": ["art"]},
    {"text": "d", "topics": ["money", "money"]},
]
AS_NUMBERS = [[0, 1, 1], [0, 0, 0], [1, 0, 0], [0, 1, 0]]


def load(rows: Any, column: str = "topics", **options: Any) -> Task:
    return load_files(rows, rows, "text", column, **options)


def test_a_column_of_lists_has_the_labels_of_each_row() -> None:
    task = load(ROWS)
    assert (task.kind, task.labels, task.metric) == ("multi_label", ["art", "money", "sport"], "f1_micro")
    assert task.train_split["label"][:] == AS_NUMBERS and task.train_split.column_names == ["text", "label"]
    named = load(ROWS, labels=["sport", "art", "money", "law"])
    assert named.labels == ["sport", "art", "money", "law"] and named.train_split["label"][0] == [1, 0, 1, 0]
    numbers = load([{"text": "a", "topics": [10, 9]}, {"text": "b", "topics": [True, 9]}])
    assert numbers.labels == ["9", "10", "True"]


@pytest.mark.parametrize(
    "cells", [["sport|money", "", "art", "money"], ['["sport","money"]', "[]", '["art"]', "money"]]
)
def test_cells_of_a_csv_file_hold_lists_if_that_is_said(cells: list[str], tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    quoted = ['"' + cell.replace('"', '""') + '"' for cell in cells]
    file.write_text("text,topics\n" + "".join(f"{t},{c}\n" for t, c in zip("abcd", quoted, strict=True)))
    task = load(file, kind="multi_label")
    assert task.labels == ["art", "money", "sport"] and task.train_split["label"][:] == AS_NUMBERS


def test_columns_of_0_and_1_are_labels_in_the_order_they_are_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("text,joy,fear,anger\na,1,0,1\nb,0,0,0\nc,1.0,true,False\n")
    task = load(file, "fear,joy")
    assert (task.kind, task.labels) == ("multi_label", ["fear", "joy"])
    assert task.train_split["label"][:] == [[0, 1], [0, 0], [1, 1]]
    one = load_files([{"text": "a", "x,y": 0}, {"text": "b", "x,y": 1}], None, "text", "x,y", held_out=[1])
    assert (one.kind, one.labels) == ("classification", ["0", "1"]), "a column may have a comma in its name"


def test_rows_without_a_list_are_left_out_and_counted() -> None:
    with pytest.warns(UserWarning, match="1 of 5 rows without labels in column 'topics'"):
        task = load_files([*ROWS, {"text": "e", "topics": None}], ROWS, "text", "topics")
    assert len(task.train_split) == 4


def test_a_share_is_held_out_with_every_label_still_in_training() -> None:
    rows = [{"text": str(n), "topics": ["often"] + ["seldom"] * (n % 10 == 0)} for n in range(100)]
    task = load_files(rows, None, "text", "topics", held_out=HoldOut(0.2))
    held = task.eval_split["label"][:]
    assert len(held) == 20 and sum(label[1] for label in held) == 2 and len(task.evaluation_rows) == 20
    again = load_files(rows, None, "text", "topics", held_out=task.evaluation_rows)
    assert again.eval_split[:] == task.eval_split[:]


def test_what_is_no_set_of_labels_is_refused(tmp_path: Path) -> None:
    for rows, column, said in (
        ([{"text": "a", "topics": ["x", ["y"]]}], "topics", r"row 1 has \"\['x', \['y'\]\]\" in column 'topics'"),
        ([{"text": "a", "topics": ["x"]}, {"text": "b", "topics": [""]}], "topics", "row 2 has"),
        ([{"text": "a", "topics": ["x"]}], "topics", "have 1 different labels, but training needs 2"),
        ([{"text": "a", "x": 1, "y": 2}], "x,y", "row 1 has 2 in column 'y', but 0 or 1 is needed"),
        ([{"text": "a", "x": 1, "y": None}], "x,y", "row 1 has None in column 'y'"),
        ([{"text": "a", "x": 1, "y": 0}], "x,x", "must be different names"),
        ([{"text": "a", "x": 1}], "x,y", "y"),
    ):
        with pytest.raises(BayesLoraError, match=said):
            load(rows, column)
    with pytest.raises(BayesLoraError, match="row 3 has the label 'art', but the labels that are known are"):
        load(ROWS, labels=["sport", "money"])
    with pytest.raises(BayesLoraError, match="label columns name them already"):
        load([{"text": "a", "x": 1, "y": 0}], "x,y", labels=["a", "b"])
    with pytest.raises(BayesLoraError, match="but classification has one"):
        load([{"text": "a", "x": 1, "y": 0}], "x,y", kind="classification")
    for nothing in ("|", " | |", '[""]'):  # an empty cell and [] are no labels, but separators alone are a slip
        cells = [{"text": "a", "topics": "x|y"}, {"text": "b", "topics": nothing}]
        with pytest.raises(BayesLoraError, match="row 2 has .* in column 'topics', but a list of labels is needed"):
            load(cells, "topics", kind="multi_label")


def test_inspect_counts_each_label(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    found = inspect_file(file, ["text"], "topics", eval_file=file)
    assert found.kind == "multi_label" and found.training.labels == {"art": 1, "money": 2, "sport": 1}
    assert found.evaluation is not None and found.evaluation.labels == found.training.labels and not found.problems
    file.write_text("".join(json.dumps({"text": str(n), "x": n % 2, "y": 1}) + "\n" for n in range(10)))
    found = inspect_file(file, ["text"], "x,y", held_out=HoldOut(0.2))
    assert found.evaluation is not None and not found.problems and found.guessed == []
    assert found.training.labels == {"x": 4, "y": 8} and found.evaluation.labels == {"x": 1, "y": 2}


@pytest.mark.parametrize("flags", [[[1, 0], [0, 1]], [[1, 0, 0], [0, 0, 0]], [[True, False], [False, False]]])
def test_lists_of_0_and_1_are_not_read_as_the_labels_0_and_1(flags: list[list[int]]) -> None:
    rows = [{"text": "a", "topics": each} for each in flags]
    with pytest.raises(BayesLoraError, match="0 or 1 in column 'topics', but .*: write their names, or one column of"):
        load(rows)


def test_lists_of_the_labels_0_and_1_are_sets() -> None:
    task = load([{"text": "a", "topics": each} for each in ([0], [1], [0, 1], [])])
    assert task.train_split["label"][:] == [[1, 0], [0, 1], [1, 1], [0, 0]]


def test_a_cell_without_commas_as_numpy_writes_it_is_refused() -> None:
    rows = [{"text": "a", "topics": "['art']"}, {"text": "b", "topics": "['art' 'sport']"}]
    with pytest.raises(BayesLoraError, match="row 2 has .* in column 'topics', but a list with commas between its"):
        load(rows, kind="multi_label")
    mixed = load([{"text": "a", "topics": "[\"it's\", 'b c']"}, {"text": "b", "topics": "[1, 2]"}], kind="multi_label")
    assert mixed.labels == ["1", "2", "b c", "it's"]


def test_a_cell_that_is_one_of_the_known_names_is_not_divided() -> None:
    names = ["billing", "login, sso", "[x]"]
    rows = [{"text": str(n), "topics": cell} for n, cell in enumerate([" login, sso", "billing", "[x]", ""])]
    task = load(rows, kind="multi_label", labels=names)
    assert task.train_split["label"][:] == [[0, 1, 0], [1, 0, 0], [0, 0, 1], [0, 0, 0]]
    several = load([*rows, {"text": "e", "topics": "billing|login, sso"}], kind="multi_label", labels=names)
    assert several.train_split["label"][-1] == [1, 1, 0]
    lists = [{"text": "a", "topics": ["login, sso", "billing"]}]
    learned = load_files(lists, rows[:2], "text", "topics", kind="multi_label")
    assert learned.eval_split["label"][:] == [[0, 1], [1, 0]]
