"""Several labels a row, by the commands: train, evaluate, predict, and load in a new place."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bayeslora
from bayeslora.cli.main import main
from bayeslora.evaluation import multi_label_scores
from tests.cli.conftest import write_jsonl
from tests.conftest import EMPTY_PNG

Refused = Callable[..., str]
WORDS = {"cat": "animal", "dog": "animal", "good": "praise", "tree": "plant"}
LABELS = ["animal", "plant", "praise"]


def rows(count: int) -> list[dict[str, Any]]:
    """Texts of words that give labels, all independent of each other."""
    rng = np.random.default_rng(count)
    found = []
    for _ in range(count):
        words = [word for word in WORDS if rng.uniform() < 0.4] or ["the"]
        found.append({"text": " ".join(words), "topics": sorted({WORDS[word] for word in words if word in WORDS})})
    return found


@pytest.fixture(scope="module")
def run(tiny_bert_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("multi")
    files = {name: write_jsonl(folder / f"{name}.jsonl", rows(n)) for name, n in (("train", 128), ("eval", 24))}
    options = ["--method", "melora", "--model", tiny_bert_folder, "--text-column", "text", "--label-column", "topics"]
    options += ["--train-file", files["train"], "--eval-file", files["eval"], "--samples", 2, "--max-steps", 80]
    options += ["--learning-rate", 0.01, "--per-device-train-batch-size", 32, "--target-modules", "all-linear"]
    options += ["--seed", 0, "--output-dir", folder / "out"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bayeslora.report.page.png_bytes", lambda figure: EMPTY_PNG)
        assert main([str(word) for word in ["train", *options]]) == 0
    return folder / "out"


def test_a_run_learns_labels_that_are_independent(run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["metric"] == "f1_micro" and metrics["labels"] == LABELS and list(metrics["label_scores"]) == LABELS
    assert metrics["scores"]["f1_micro"] > 0.8 > 0.6 > metrics["baseline"]["f1_micro"]
    assert metrics["scores"]["nll"] < metrics["baseline"]["nll"]
    info = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert (info["kind"], info["labels"], info["label_column"]) == ("multi_label", LABELS, "topics")
    config = json.loads((run / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["num_examples"] == 128 * 3, "the loss is a mean over rows and labels"
    page = (run / "report.html").read_text(encoding="utf-8")
    for words in ("Least certain", "By label: 3 yes-or-no decisions a row", "micro F1 (headline)"):
        assert words in page


def test_evaluate_gives_the_scores_of_the_training(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--samples", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert found["scores"] == pytest.approx(metrics["scores"]) and found["label_scores"].keys() == {*LABELS}
    assert main(["evaluate", str(run), "--output-dir", str(run.parent / "scores")]) == 0
    assert "animal" in capsys.readouterr().out and (run.parent / "scores" / "metrics.json").is_file()


def test_predictions_are_a_probability_a_label(run: Path, tmp_path: Path) -> None:
    source = run.parent / "eval.jsonl"
    files = {name: tmp_path / f"p.{name}" for name in ("jsonl", "csv")}
    for path in files.values():
        options = ["--input", str(source), "--output", str(path), "--samples", "3", "--seed", "1"]
        assert main(["predict", str(run), *options]) == 0
    found = [json.loads(line) for line in files["jsonl"].read_text(encoding="utf-8").splitlines()]
    loaded = bayeslora.load(run)
    batch = loaded.tokenizer([row["text"] for row in found], padding=True, return_tensors="pt")
    with torch.no_grad():
        outputs = []
        for draw in range(3):
            with bayeslora.sampling(loaded.model, "batch", seed=1, draws=[draw]):
                outputs.append(loaded.model(**batch).logits.sigmoid())
    expected = torch.stack(outputs).mean(dim=0)
    for row, p in zip(found, expected.tolist(), strict=True):
        assert list(row["probabilities"].values()) == pytest.approx(p, abs=1e-5)
        assert row["label"] == [name for name, value in row["probabilities"].items() if value > 0.5]
        assert row["confidence"] == pytest.approx(min(max(value, 1 - value) for value in p), abs=1e-5)
        assert list(row["entropy"]) == list(row["mutual_information"]) == LABELS
        for name, value in row["probabilities"].items():
            entropy = -sum(q * np.log(q) for q in (value, 1 - value))
            assert row["entropy"][name] == pytest.approx(entropy)
            assert 0 <= row["mutual_information"][name] <= entropy
    with files["csv"].open(newline="", encoding="utf-8") as file:
        (first, *_) = csv.DictReader(file)
    assert json.loads(first["label"]) == found[0]["label"]
    assert float(first["probability_plant"]) == pytest.approx(found[0]["probabilities"]["plant"])
    assert float(first["entropy_plant"]) == pytest.approx(found[0]["entropy"]["plant"])
    truth = [[float(name in row["topics"]) for name in LABELS] for row in found]
    p = [list(row["probabilities"].values()) for row in found]
    assert multi_label_scores(p, truth)["f1_micro"] > 0.8


def test_an_export_predicts_the_same(run: Path, tmp_path: Path) -> None:
    texts = ["the good cat", "tree"]
    expected = bayeslora.load(run).predict(texts)
    for form in ("lora", "packed"):
        folder = tmp_path / form
        assert main(["export", str(run), "--format", form, "--output-dir", str(folder)]) == 0
        loaded = bayeslora.load(folder)
        assert loaded.kind == "multi_label" and loaded.labels == LABELS
        assert torch.allclose(loaded.predict(texts).probabilities, expected.probabilities, atol=1e-5)


def test_an_export_that_differs_does_so_by_the_divergence_of_its_labels(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run), "--format", "lora", "--draws", "1", "--output-dir", str(tmp_path / "drawn")]) == 0
    export = next((tmp_path / "drawn").glob("draw-0"))
    capsys.readouterr()
    assert main(["verify", str(export), "--against", str(run), "--json"]) != 0
    found = json.loads(capsys.readouterr().out)
    texts = [row["text"] for row in rows(24)]
    p, q = (bayeslora.load(folder).predict(texts).probabilities.numpy() for folder in (run, export))
    divergence = (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).sum(axis=1)
    assert found["divergence"] == pytest.approx(divergence.mean(), rel=1e-3) and divergence.mean() > 1e-4
    assert found["changed"] == pytest.approx(((p > 0.5) != (q > 0.5)).any(axis=1).mean())


def test_what_needs_one_label_a_row_is_refused(run: Path, tmp_path: Path, refused: Refused) -> None:
    source = run.parent / "eval.jsonl"
    out = ["--input", source, "--output", tmp_path / "x.jsonl"]
    assert "has several labels a row, but select" in refused("select", run, *out, "--budget", 1)
    assert "has several labels a row, but calibrate needs one" in refused("calibrate", run)
    assert "--shift is given, but the run has several labels a row" in refused("evaluate", run, "--shift")
    assert "lacks conformal.json" in refused("predict", run, *out, "--risk", 0.1)
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": "cat", "topics": ["money"]}])
    assert "has the label 'money', but the labels" in refused("evaluate", run, "--eval-file", other)
