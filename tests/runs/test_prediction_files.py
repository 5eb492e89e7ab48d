"""Files of predictions: every column of the rows stays, whatever its name."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

from bayeslora.data.tables import Table, read_table
from bayeslora.runs.answers import Answer
from bayeslora.runs.prediction_files import answer_lines, write_predictions
from tests.cli.conftest import write_jsonl


def test_a_column_that_is_renamed_takes_no_other_ones_name(tmp_path: Any) -> None:
    write_jsonl(tmp_path / "in.jsonl", [{"text": "x", "input_label": "first", "label": "truth"}])
    table: Table = read_table(tmp_path / "in.jsonl", [], None)
    found: Any = SimpleNamespace(records=lambda: [{"label": "guess", "confidence": 0.5}])
    assert write_predictions(tmp_path / "out.jsonl", table, found) == {"label": "input_input_label"}
    row = json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8"))
    assert row == {
        "text": "x",
        "input_label": "first",
        "input_input_label": "truth",
        "label": "guess",
        "confidence": 0.5,
    }


def test_an_answer_keeps_both_columns_as_well() -> None:
    answer = Answer("?", "yes", ["yes"], [0.0], [0.0], -0.1, -0.1)
    (line,) = answer_lines([{"prompt": "?", "text": "mine", "input_text": "also mine"}], [answer])
    row = json.loads(line)
    assert (row["text"], row["input_text"], row["input_input_text"]) == ("yes", "also mine", "mine")
