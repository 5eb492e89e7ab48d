"""Calibration on the results page: tables and verdicts are those of the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from intervals import encoded
from results_calibration import calibration_section, missing_calibration, rows_of, write_differences

from bayeslora.errors import BayesLoraError
from bayeslora.evaluation.metrics import classification_scores

from .files import TRAINING, write

LABELS = [0, 0, 1, 1]


def scores(accuracy: float, ece: float, nll: float) -> dict[str, float]:
    return {"accuracy": accuracy, "ece": ece, "nll": nll, "brier": 0.3, "aurc": 0.1}


def run(method: str, seed: int, found: dict[str, float], task: str = "mrpc", **changes: Any) -> dict[str, Any]:
    probabilities = [[0.9, 0.1], [0.6, 0.4], [0.6, 0.4], [0.2, 0.8]]
    return {
        "task": task, "method": method, "seed": seed, "options": {}, "training": TRAINING, "metric": "accuracy",
        "split": "test", "labels": LABELS, "parameters": {"adapter": 1000},
        "forms": {method: {"scores": found, "probabilities": probabilities}}, **changes,
    }  # fmt: skip


def test_a_row_is_the_mean_over_seeds_and_lora_makes_an_ensemble(tmp_path: Path) -> None:
    write(tmp_path, *(run("lora", seed, scores(0.7 + seed / 10, 0.2, 0.6)) for seed in range(2)))
    text = calibration_section(tmp_path)
    assert "345 steps of 32 rows, learning rate 0.001; 4 rows of the test split." in text
    assert "| LoRA | 1,000 | 2 | 0.750 ± 0.071 | 0.200 ± 0.000 |" in text
    assert "| ensemble of the seeds | 2,000 | 2 | 0.750 |" in text  # of the averaged probabilities: 3 of 4 right


@pytest.mark.parametrize(
    ("task", "ours", "verdicts"),
    [
        ("mrpc", scores(0.79, 0.10, 0.5), ["holds", "holds", "holds", "holds"]),
        ("mrpc", scores(0.78, 0.11, 0.6), ["does not hold", "does not hold", "does not hold", "does not hold"]),
        ("rte", scores(0.78, 0.10, 0.5), ["holds", "holds", "holds", "holds"]),
        ("mrpc", scores(0.77, 0.10, 0.5), ["holds", "holds", "does not hold", "–"]),
    ],
)
def test_verdicts_compare_means(task: str, ours: dict[str, float], verdicts: list[str], tmp_path: Path) -> None:
    others = {"lora": scores(0.80, 0.20, 0.6), "blob": scores(0.789, 0.10, 0.55)}
    write(tmp_path, *(run(name, 0, found, task) for name, found in [*others.items(), ("melora", ours)]))
    lines = calibration_section(tmp_path).splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("| Me-LoRA, 10 samples"))
    cells = [line.split(" | ")[1].removesuffix(" |") for line in lines if line.startswith("| ") and " LoRA's" in line]
    cells += [line.split(" | ")[1] for line in lines if "BLoB's" in line]
    assert start and [cell.split(":")[0] for cell in cells] == verdicts


def test_without_files_nothing_is_claimed_and_all_is_missing(tmp_path: Path) -> None:
    assert calibration_section(tmp_path) == "Not run.\n"
    assert [line.split(": ")[1] for line in missing_calibration(tmp_path)] == ["all"] * 3


def test_runs_of_different_length_are_refused(tmp_path: Path) -> None:
    runs = [run("lora", seed, scores(0.8, 0.1, 0.5), training={**TRAINING, "steps": 10 + seed}) for seed in range(2)]
    write(tmp_path, *runs)
    with pytest.raises(BayesLoraError, match="different settings"):
        rows_of([{**json.loads(path.read_text()), "file": path.name} for path in sorted(tmp_path.glob("*.json"))])


def test_a_tuned_lora_is_the_baseline_of_a_table_with_costs_and_intervals(tmp_path: Path) -> None:
    folder = tmp_path / "calibration"
    sure = np.array([[0.9, 0.1], [0.8, 0.2], [0.2, 0.8], [0.3, 0.7]])
    unsure = np.array([[0.6, 0.4], [0.6, 0.4], [0.4, 0.6], [0.4, 0.6]])

    def form(p: np.ndarray, passes: int) -> dict[str, Any]:
        found = classification_scores(p, np.array(LABELS), ("accuracy",))
        own = {"passes": passes, "numbers": 1002, "fit_seconds": 2.0, "log_odds": encoded(p)}
        return {"scores": {**found, "excess_aurc": 0.0}, **own}

    for seed in range(3):
        forms = {"tuned": form(unsure, 1), "tuned-temperature": form(unsure, 1)}
        search = [{"learning_rate": 1e-3, "step": 10, "nll": 0.5, "seconds": 40.0}] * 3
        tuned = run("tuned", seed, {}, forms=forms, seconds=50.0, search=search)
        write(folder, tuned, run("swag", seed, {}, forms={"swag": form(sure, 10)}, seconds=60.0))
    write_differences(folder)
    text = calibration_section(folder)
    assert "in 120 seconds that the table leaves out" in text and "### Claims" not in text
    assert "| SWAG | 3 | 1.000 ± 0.000 | 0.227 ± 0.000 |" in text and "| 62 | 10 | 1,002 |" in text
    assert "| ensemble of 3 | 3 | 1.000 ± 0.000 | 0.511 ± 0.000 |" in text and "| 150 | 3 | 3,000 |" in text
    line = next(line for line in text.splitlines() if line.startswith("| SWAG | 3 | +0.000 [+0.000, +0.000] | **-0.2"))
    assert line.count("**") >= 2


def test_runs_on_other_rows_are_not_compared(tmp_path: Path) -> None:
    folder = tmp_path / "calibration"
    p = np.array([[0.9, 0.1], [0.8, 0.2], [0.2, 0.8], [0.3, 0.7]])
    own = {"scores": scores(1.0, 0.1, 0.2), "log_odds": encoded(p)}
    write(folder, run("tuned", 0, {}, forms={"tuned": own, "tuned-temperature": own}))
    write(folder, run("swag", 0, {}, forms={"swag": own}, labels=[1, 0, 1, 1]))
    write_differences(folder)
    found = json.loads((tmp_path / "calibration-differences.json").read_text())
    assert found["mrpc"]["swag"] == {"seeds": []} and found["mrpc"]["tuned"]["seeds"] == [0]


def test_a_task_by_cloze_has_a_table_of_its_own_beside_the_one_by_letters(tmp_path: Path) -> None:
    folder = tmp_path / "calibration"
    p = np.array([[0.9, 0.1], [0.8, 0.2], [0.2, 0.8], [0.3, 0.7]])
    known = {"scores": {**scores(1.0, 0.2, 0.2), "excess_aurc": 0.0}, "log_odds": encoded(p)}
    guessed = {"scores": scores(0.25, 0.1, 1.4), "log_odds": encoded(p)}
    for method in ("lora", "blob"):
        write(folder, run(method, 0, {}, "arc_easy", forms={method: guessed}))
    by_cloze = {"scoring": "cloze", "normalization": "none", "training": {**TRAINING, "steps": 64}, "seconds": 9.0}
    search = [{"learning_rate": 1e-3, "step": 10, "nll": 0.5, "seconds": 40.0}]
    for method in ("tuned", "blob"):
        forms = {method: known, **({"tuned-temperature": known} if method == "tuned" else {})}
        own = {"search": search, "left_out": {"laplace": "there is no head"}}
        found = run(method, 0, {}, "arc_easy", forms=forms, **by_cloze, **own)
        (folder / f"arc_easy-cloze-{method}-0.json").write_text(json.dumps(found))
    per_token = run("tuned", 0, {}, "openbookqa", forms={"tuned": known}, search=search, **by_cloze)
    write(folder, {**per_token, "normalization": "tokens"})
    write_differences(folder)
    text = calibration_section(folder)
    assert "### ARC-easy by letters (guesses)\n" in text and "### ARC-easy by cloze, LoRA tuned\n" in text
    assert "### OpenBookQA by cloze per token, LoRA tuned\n" in text
    assert "Left out:\n\n- Laplace on the head: there is no head\n" in text
    assert list(json.loads((tmp_path / "calibration-differences.json").read_text())) == ["arc_easy-cloze"]
    letters, _, cloze = text.partition("### ARC-easy by cloze")
    assert "| BLoB, 10 samples |" in letters and "64 steps" not in letters
    assert "| BLoB | 1 | 1.000 |" in cloze and "At most 64 steps" in cloze
    assert "- calibration, BLoB: MRPC, CoLA, RTE, WinoGrande, ARC-easy (seed 1, 2)" in missing_calibration(folder)
