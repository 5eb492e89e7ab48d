"""Calibration of a run: saved in its folder, read again, used by `predict`, and refused where it does not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bayeslora
from bayeslora import BayesLoraError
from bayeslora.runs.decisions import Calibration, model_digest
from tests.runs.conftest import NAMES, tickets, trained, write_rows

TEXTS = [row["text"] for row in tickets(12, seed=3)]
RunOf = Callable[[str], Path]


@pytest.fixture
def folder(run_of: RunOf, tmp_path: Path) -> Path:
    """A copy of a finished run that a test may write into."""
    target = tmp_path / "out"
    shutil.copytree(run_of("melora"), target)
    return target


def test_a_calibration_in_the_folder_gives_sets_and_rows_for_a_person(folder: Path) -> None:
    run = bayeslora.load(folder)
    file = write_rows(folder.parent / "calibration.jsonl", tickets(60, seed=7))
    made = run.calibrate(file, samples=3, seed=2)
    assert (made.rows, made.samples, made.seed, made.score, made.labels) == (60, 3, 2, "lac", NAMES)
    again = bayeslora.load(folder)
    found = again.predict(TEXTS, coverage=0.8, risk=0.5)
    plain = run.predict(TEXTS, samples=3, seed=2)
    assert torch.equal(found.probabilities, plain.probabilities)  # the samples and the seed of the calibration
    labelled = bayeslora.ConformalSets("lac", 0.8)
    rows = tickets(60, seed=7)
    prediction = run.predict([row["text"] for row in rows], samples=3, seed=2).prediction
    truth = [NAMES.index(row["label"]) for row in rows]
    expected = labelled.fit(prediction, truth).sets(plain.prediction)
    assert [row.set for row in found] == [[NAMES[i] for i in range(6) if row[i]] for row in expected]
    asked = bayeslora.RiskControl(0.5).fit(prediction, truth).ask_a_human(plain.prediction)
    assert [row.ask_a_human for row in found] == asked.tolist()
    assert found[0].to_dict()["set"] == found[0].set and "interval" not in found[0].to_dict()
    assert run.predict(TEXTS[0], coverage=0.8)[0].ask_a_human is None
    assert "set" not in run.predict(TEXTS[0], risk=0.5)[0].to_dict()


def test_any_coverage_and_risk_can_be_asked_for_later(folder: Path) -> None:
    run = bayeslora.load(folder)
    run.calibrate(tickets(120, seed=7))
    counts = [sum(len(row.set) for row in run.predict(TEXTS, coverage=level)) for level in (0.5, 0.9, 0.99)]  # type: ignore[arg-type]
    assert counts == sorted(counts) and counts[0] < counts[-1]
    calibration = Calibration.load(folder)
    answered = [calibration.threshold(level).coverage for level in (0.2, 0.9, 0.99)]
    assert answered == sorted(answered) and answered[-1] > 0
    assert calibration.threshold(0.8, delta=0.9).coverage >= calibration.threshold(0.8, delta=1e-9).coverage


@pytest.mark.parametrize(("score", "by_class"), [("lac", True), ("aps", False)])
def test_what_is_saved_is_what_is_read(folder: Path, score: Any, by_class: bool) -> None:
    run = bayeslora.load(folder)
    made = run.calibrate(tickets(60, seed=7), score=score, by_class=by_class, save=False)
    assert not (folder / "conformal.json").exists()
    made.save(folder)
    read = Calibration.load(folder)
    prediction = run.predict(TEXTS).prediction
    assert read.score == score and read.source == "60 rows" and read.fingerprint == made.fingerprint
    assert read.decide(prediction, 0.8, 0.6) == made.decide(prediction, 0.8, 0.6)
    content = json.loads((folder / "conformal.json").read_text(encoding="utf-8"))
    assert content["rows"] == 60 and content["by_class"] == by_class and content["labels"] == NAMES
    assert all(scores == sorted(scores) and len(scores) == 10 for scores in content["scores"])


def test_a_calibration_is_of_one_model_one_number_of_samples_and_one_seed(folder: Path) -> None:
    run = bayeslora.load(folder)
    with pytest.raises(BayesLoraError, match=r"lacks conformal\.json.*`bayeslora calibrate .*out` first"):
        run.predict(TEXTS, coverage=0.9)
    shutil.copytree(folder, folder.with_name("plain"), ignore=shutil.ignore_patterns("run.json"))
    with pytest.raises(BayesLoraError, match=r"plain lacks conformal\.json.*: call `calibrate` of the loaded model"):
        Calibration.load(folder.with_name("plain"))
    run.calibrate(tickets(24, seed=7), samples=3)
    with pytest.raises(BayesLoraError, match=r"samples is 5, but .*conformal\.json was made with 3"):
        run.predict(TEXTS, samples=5, coverage=0.9)
    with pytest.raises(BayesLoraError, match="samples is 0"):
        run.predict(TEXTS, samples=0, risk=0.1)
    with pytest.raises(BayesLoraError, match="seed is 1"):
        run.predict(TEXTS, seed=1, coverage=0.9)
    assert run.predict(TEXTS, samples=5)[0].set is None  # other predictions are as they were
    with torch.no_grad():
        next(p for name, p in run.model.named_parameters() if "modules_to_save" in name).add_(1.0)
    with pytest.raises(BayesLoraError, match="was made for the model .*: calibrate again"):
        run.predict(TEXTS, coverage=0.9)


@pytest.mark.parametrize("method", ["melora", "blora", "lora", "full"])
def test_the_digest_of_a_model_is_that_of_its_weights(run_of: RunOf, tmp_path: Path, method: str) -> None:
    """Also after its values have been sampled, and never that of values that are drawn while it is loaded."""
    folder = tmp_path / "out"
    shutil.copytree(run_of(method), folder)
    first, second = bayeslora.load(folder), bayeslora.load(folder)
    first.predict(TEXTS, samples=2 if method in ("melora", "lora") else 0)
    assert model_digest(first.model, folder) == model_digest(second.model, folder)
    (folder / "posterior.safetensors").write_bytes(b"other")
    assert model_digest(first.model, folder) != model_digest(second.model, folder.parent)


def test_rows_of_the_training_are_refused(run_of: RunOf, folder: Path) -> None:
    run = bayeslora.load(folder)
    with pytest.raises(BayesLoraError, match="was trained on them"):
        run.calibrate(run_of("melora").parent / "melora.jsonl")
    copy = shutil.copy(run_of("melora").parent / "melora.jsonl", folder.with_name("copy.jsonl"))
    with pytest.raises(BayesLoraError, match="was trained on them"):
        run.calibrate(copy)
    new = json.dumps({"text": "the dog was a dull cat of good plot", "label": "bug"})
    shuffled = copy.with_name("shuffled.jsonl")
    shuffled.write_text("".join(reversed(copy.read_text().splitlines(keepends=True))) + new + "\n")
    with pytest.warns(UserWarning, match=r"(\d+) of the \d+ rows of .*shuffled.jsonl are training rows too") as told:
        run.calibrate(shuffled)
    rows = len(shuffled.read_text().splitlines())
    assert any(f"{rows - 1} of the {rows} rows" in str(each.message) for each in told)
    with pytest.raises(BayesLoraError, match="score is residual, but must be lac or aps"):
        run.calibrate(tickets(12, 0), score="residual")
    with pytest.raises(BayesLoraError, match="row 1 has the label 'other'"):
        run.calibrate([{"text": "good", "label": "other"}])
    with pytest.raises(BayesLoraError, match="coverage is 1.5, but must be between 0 and 1"):
        run.calibrate(tickets(12, 0), save=True)
        run.predict(TEXTS, coverage=1.5)
    with pytest.raises(BayesLoraError, match="risk is 0, but must be between 0 and 1"):
        run.predict(TEXTS, risk=0)


@pytest.mark.parametrize(
    "damage", ["{", "[]", '{"version": 1}', '{"version": 1, "score": "lac", "samples": 0, "seed": 0}']
)
def test_a_damaged_file_is_told_in_one_line(folder: Path, damage: str) -> None:
    (folder / "conformal.json").write_text(damage)
    with pytest.raises(BayesLoraError, match=r"conformal\.json is damaged .*: run `bayeslora calibrate` again"):
        Calibration.load(folder)
    (folder / "conformal.json").write_text('{"version": 99}')
    with pytest.raises(BayesLoraError, match="newer version"):
        Calibration.load(folder)


def test_numbers_have_intervals(tmp_path: Path, tiny_bert_folder: Path) -> None:
    rows = [{"text": row["text"], "label": (index % 7) / 7} for index, row in enumerate(tickets(40, 0))]
    run = bayeslora.load(trained(tmp_path / "numbers", tiny_bert_folder, rows))
    other = [{"text": row["text"], "label": (index % 5) / 5} for index, row in enumerate(tickets(40, 1))]
    made = run.calibrate(other, samples=4, score="scaled")
    assert made.score == "scaled" and made.risk is None and Calibration.load(run.folder).score == "scaled"
    for row in run.predict(TEXTS, coverage=0.9):
        assert row.interval is not None and row.interval[0] < row.label < row.interval[1]  # type: ignore[operator]
        assert row.to_dict()["interval"] == row.interval and row.set is None
    with pytest.warns(UserWarning, match="the intervals have no bounds"):
        assert run.predict(TEXTS, coverage=0.99)[0].interval == [None, None]
    with pytest.raises(BayesLoraError, match="a risk is given, but the run predicts numbers"):
        run.predict(TEXTS, risk=0.1)
    with pytest.raises(BayesLoraError, match="by_class is given"):
        run.calibrate(other, by_class=True)
