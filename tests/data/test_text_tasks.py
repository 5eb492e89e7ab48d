"""SQuAD and E2E from a folder: prompts, what is learned, and the right answers that are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bayeslora.data import load_task
from bayeslora.errors import BayesLoraError

ASKED = {"id": "1", "context": "The cat sat.", "question": "Who sat?"}
SQUAD = [
    {**ASKED, "answers": ["The cat", "cat"], "answer_start": [0, 4]},
    {**ASKED, "answers": {"text": ["cat"], "answer_start": [4]}},  # the hub's form
    {**ASKED, "answers": []},  # version 2: there is none
    {**ASKED, "answers": ["a plausible one"], "is_impossible": True},
]
E2E = [{"id": 0, "input": "name[Aromi], food[Thai]", "references": ["Aromi is Thai.", "Thai food: Aromi."]}]


def folder(path: Path, name: str, rows: list[dict[str, Any]], splits: tuple[str, ...] = ("train", "dev")) -> Path:
    (path / name).mkdir(parents=True)
    for split in splits:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (path / name / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return path


def test_a_question_is_asked_after_its_text_and_may_have_no_answer(tmp_path: Path) -> None:
    task = load_task("squad", folder(tmp_path, "squad", SQUAD))
    assert (task.kind, task.metrics, set(task.splits)) == (
        "generation",
        ("f1", "exact_match"),
        {"train", "validation"},
    )
    rows = list(task.train_split)
    assert {row["prompt"] for row in rows} == {"Context: The cat sat.\nQuestion: Who sat?\nAnswer:"}
    assert [row["completion"] for row in rows] == [" The cat", " cat", " no answer", " no answer"]
    assert [row["references"] for row in rows] == [["The cat", "cat"], ["cat"], [], []]


def test_every_text_of_the_training_data_is_learned_and_a_row_is_scored_once(tmp_path: Path) -> None:
    task = load_task("e2e", folder(tmp_path, "e2e", E2E, ("train", "dev", "test")))
    assert task.metrics == ("bleu", "rouge_l") and set(task.splits) == {"train", "validation", "test"}
    assert task.train_split["completion"][:] == [" Aromi is Thai.", " Thai food: Aromi."]
    for split in ("validation", "test"):
        (row,) = task.splits[split]
        assert row["prompt"] == "Data: name[Aromi], food[Thai]\nText:" and row["references"] == E2E[0]["references"]


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(BayesLoraError, match="squad is read from a folder, but none is given"):
        load_task("squad")
    with pytest.raises(BayesLoraError, match=r"e2e/train\.jsonl does not exist"):
        load_task("e2e", tmp_path)
    with pytest.raises(BayesLoraError, match="line 1 has 'cat' as right answers|line 1 has cat as right answers"):
        load_task("squad", folder(tmp_path, "squad", [{**ASKED, "answers": "cat"}]))
