"""The benchmark of generated answers: its rows, what a file holds, and the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import text
from harness import Training
from results_text import text_section

from bayeslora.evaluation.uncertainty import area_under_risk_coverage
from tests.conftest import build_tiny_llama, build_tiny_tokenizer

QUESTION = {"context": "the cat sat and the dog ran .", "answers": ["cat"]}


def job(folder: Path, method: str, **settings: Any) -> text.Job:
    (folder / "squad").mkdir(parents=True)
    for split, count in (("train", 12), ("dev", 1), ("test", 9)):
        rows = [{**QUESTION, "question": f"who {'sat ' * (index % 3)}?"} for index in range(count)]
        rows[0]["context"] = "the " * 300
        (folder / "squad" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    training = Training(steps=2, learning_rate=1e-3, batch_size=2, max_length=64)
    return text.Job("squad", method, 0, folder, training, 6)


def test_a_file_has_the_loss_and_the_uncertainty_of_each_row_and_no_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        text, "packaged_language_model", lambda: (build_tiny_llama(), build_tiny_tokenizer(causal=True))
    )
    found = text.run(job(tmp_path / "data", "melora"))
    assert (found["trained_rows"], found["held_out"], found["draws_weights"]) == (11, 6, True), (
        "long rows are left out"
    )
    losses, scores = np.array(found["rows"]["loss"]), found["scores"]
    assert scores["risk"] == pytest.approx(1 - scores["f1"]) == pytest.approx(losses.mean())
    for name in ("probability", "mutual_information", "semantic_entropy"):
        area = area_under_risk_coverage(np.array(found["rows"][name]), losses)
        assert scores[f"aurc_{name}"] == pytest.approx(area)
    assert "sat" not in json.dumps({name: value for name, value in found.items() if name != "history"})
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "squad-melora-0.json").write_text(json.dumps(found))
    assert f"| Me-LoRA | {100 * scores['exact_match']:.1f}" in text_section(tmp_path)


def test_the_table_has_scores_in_per_cent_with_errors_and_a_dash_for_what_a_method_lacks(tmp_path: Path) -> None:
    shared = {
        "task": "e2e", "seed": 0, "training": {"steps": 80, "batch_size": 4}, "held_out": 60,
        "sampling": {"samples": 5, "temperature": 1.0},
    }  # fmt: skip
    scores = {"bleu": 0.4, "rouge_l": 0.55, "risk": 0.45, "aurc_probability": 0.4, "aurc_semantic_entropy": 0.42}
    run = {**shared, "method": "lora", "scores": scores, "errors": {"risk": 0.02, "aurc_probability": 0.03}}
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "e2e-lora-0.json").write_text(json.dumps(run))
    printed = text_section(tmp_path)
    assert "| LoRA | 40.0 | 55.0 (2.0) | 45.0 (2.0) | 40.0 (3.0) | – | 42.0 |" in printed and "seed 0. In" in printed
    assert text_section(tmp_path / "none") == ""


def test_every_run_answers_the_same_rows() -> None:
    from datasets import Dataset

    rows = Dataset.from_dict({"number": list(range(100))})
    first, again = text.some(rows, 10)["number"][:], text.some(rows, 10)["number"][:]
    assert first == again == sorted(set(first)) and len(first) == 10 and first != list(range(10))
