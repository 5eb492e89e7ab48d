"""The benchmarks of decisions: what a file of each holds, on predictions made up here and on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import active
import conformal
import numpy as np
import pytest
from harness import Training

from tests.benchmarks.test_rounding import rows


def test_made_up_predictions_are_covered_and_keep_their_risk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conformal, "SPLITS", 20)
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(300, 3)) * 2
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = [int(generator.choice(3, p=row)) for row in probabilities]
    run = {"task": "mrpc", "seed": 0, "labels": labels, "forms": {"lora": {"probabilities": probabilities.tolist()}}}
    (record,) = conformal.measured(run)
    assert json.loads(json.dumps(record)) and list(record["sets"]) == ["lac", "aps", "lac by class"]
    for name in ("lac", "aps"):
        for each in record["sets"][name]:
            assert abs(each["mean"] - each["expected"]) < 4 * each["standard_error"] and each["within"] >= 15
        sizes = [each["size"] for each in record["sets"][name]]
        assert sizes == sorted(sizes)
    assert all(each["kept"] >= 18 for each in record["risks"])
    assert "MRPC" in conformal.tables([record, record])


@pytest.mark.slow
@pytest.mark.parametrize("way", ["mutual_information", "random"])
def test_a_run_adds_the_rows_that_it_chooses(tmp_path: Path, tiny_bert_folder: Path, way: str) -> None:
    (tmp_path / "mrpc").mkdir()
    (tmp_path / "mrpc" / "train.jsonl").write_text(rows(40), encoding="utf-8")
    (tmp_path / "mrpc" / "dev.jsonl").write_text(rows(16), encoding="utf-8")
    training = Training(steps=2, max_length=32)
    job = active.Job("mrpc", way, 1, tmp_path, training, (6, 10, 14), 30, 3, str(tiny_bert_folder))  # type: ignore[arg-type]
    found = json.loads(json.dumps(active.run(job)))
    assert [len(each["chosen"]) for each in found["rounds"]] == [6, 10, 14]
    chosen = [set(each["chosen"]) for each in found["rounds"]]
    assert chosen[0] < chosen[1] < chosen[2] and max(chosen[2]) < 40
    other = json.loads(json.dumps(found))
    other["seed"] = 2
    for each in other["rounds"]:
        each["scores"]["accuracy"] += 0.01
    assert "| MRPC | 14 |" in active.table([found, other])
