"""The MMLU benchmark: what is wrong with its prompts is said before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mmlu
import pytest

from bayeslora import BayesLoraError
from tests.conftest import build_tiny_llama, build_tiny_tokenizer

SHORT = {"question": "who sat", "choices": ["cat", "dog", "tree", "hat"], "answer": 1, "subject": "animals"}


def job(folder: Path, questions: list[str], **settings: Any) -> mmlu.Job:
    task = folder / "mmlu"
    task.mkdir()
    for split, rows in (("dev", [SHORT] * 5), ("test", [{**SHORT, "question": each} for each in questions])):
        named = [{**row, "question": f"{row['question']} {index}"} for index, row in enumerate(rows)]
        (task / f"{split}.jsonl").write_text("\n".join(map(json.dumps, named)) + "\n")
    return mmlu.Job("lora", 0, folder, **settings)


def test_a_question_that_is_too_long_ends_a_run_before_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mmlu, "load", lambda row: (build_tiny_llama(), build_tiny_tokenizer(causal=True)))
    monkeypatch.setattr(mmlu, "fine_tune", lambda *given: pytest.fail("it trains"))
    with pytest.raises(BayesLoraError, match="question 2 .* questions are not cut"):
        mmlu.run(job(tmp_path, ["what is it", "the " * 60], max_length=50))


def test_prompts_are_those_of_each_number_of_examples(tmp_path: Path) -> None:
    tokenizer = build_tiny_tokenizer(causal=True)
    asked = job(tmp_path, ["what is it"] * 3, per_subject=2, max_length=120)
    found = mmlu.encoded_prompts(tokenizer, mmlu.load_task("mmlu", tmp_path), asked)
    assert {shots: len(rows) for shots, (rows, _) in found.items()} == {"0": 2, "5": 2}
    assert found["0"][1] == 0 and len(found["5"][0][0]["input_ids"]) > len(found["0"][0][0]["input_ids"])
