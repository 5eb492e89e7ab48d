"""The calibration benchmark in small: every method trains, and fills its rows, on the tiny BERT."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import calibration
import harness
import numpy as np
import pytest
import torch
from forms import METHODS, OPTIONS, Remembering
from harness import Training
from intervals import probabilities_of
from peft import get_peft_model
from results_calibration import TUNED_ROWS

import bayeslora
from bayeslora.evaluation.metrics import classification_scores
from tests.conftest import build_tiny_bert, build_tiny_llama, build_tiny_tokenizer

ROWS = {
    "tuned": {"tuned", "tuned-dropout", "laplace"},
    "swag": {"swag", "swag-mean"},
    "ivon": {"ivon", "ivon-mean"},
    "blob": {"blob", "blob-mean"},
    "melora-closed": {"melora-closed", "melora-closed-mean"},
    "melora-cores": {"melora-cores"},
}
"""Rows that a model fills even if it knows nothing of held-out rows, which determine the others."""


BY_CLOZE = {
    **ROWS,
    "tuned": {"tuned", "tuned-temperature", "tuned-dropout"},
    "melora-closed": {"melora-closed", "melora-closed-mean", "melora-closed-temperature"},
    "melora-cores": {"melora-cores", "melora-cores-temperature", "melora-cores-means"},
}
"""The same of a language model, which has learned to prefer one word to the others."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder, and the files of SST-2."""
    folder = tmp_path_factory.mktemp("calibration")
    build_tiny_bert().bert.save_pretrained(folder / "tiny")
    build_tiny_tokenizer().save_pretrained(folder / "tiny")
    (folder / "sst2").mkdir()
    for name, count in (("train", 120), ("validation", 40)):
        rows = [{"text": f"the film was {('good', 'dull')[i % 2]}", "label": i % 2} for i in range(count)]
        (folder / "sst2" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build_tiny_llama().save_pretrained(folder / "tiny-llama")
    build_tiny_tokenizer(causal=True).save_pretrained(folder / "tiny-llama")
    for task in ("arc_easy", "openbookqa"):
        (folder / task).mkdir()
        for name, count in (("train", 120), ("dev", 40), ("test", 10)):
            rows = [item(index) for index in range(count)]
            (folder / task / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def item(index: int) -> dict[str, Any]:
    """A question of two to four choices whose right one is about cats, but for every fifth question."""
    others = ["red house", "dog ran", "mat tree"][: 1 + index % 3]
    place = index % (len(others) + 1)
    choices = [*others[:place], "cat sat", *others[place:]]
    answer = (place + 1) % len(choices) if index % 5 == 0 else place
    return {"question": f"the {('good', 'dull', 'warm')[index % 3]} film", "choices": choices, "answer": answer}


def given(folder: Path, **changes: Any) -> argparse.Namespace:
    defaults = {"data_dir": folder, "tasks": ["sst2"], "methods": list(METHODS), "seeds": [0], "select": False}
    more = {
        "set": [],
        "steps": None,
        "rows": None,
        "without_tfb": False,
        "results": folder / "results" / "calibration",
    }
    return argparse.Namespace(**{**defaults, **more, **changes})


@pytest.mark.parametrize(("stopped", "planned"), [(200, 400), (150, 400), (400, 400)])
def test_a_run_of_its_own_length_has_the_learning_rates_of_one_that_is_stopped(stopped: int, planned: int) -> None:
    whole = calibration.as_many_steps(stopped, planned)
    rates = sum(1 - step / planned for step in range(stopped))
    assert sum(1 - step / whole for step in range(whole)) == pytest.approx(rates, rel=0.01)


@pytest.mark.slow
def test_the_search_sets_the_rate_and_length_of_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "packaged_model", lambda name: folder / "tiny")
    (job,) = calibration.jobs(given(folder, methods=["search"], seeds=[0, 1], steps=8, rows=100)).values()
    found = calibration.run(job)
    assert [each["learning_rate"] for each in found["search"]] == [5e-4, 1e-3, 2e-3] and found["forms"] == {}
    assert all(each["step"] in range(1, 9) for each in found["search"])
    job.folder.mkdir(parents=True)
    (job.folder / "sst2-search-0.json").write_text(json.dumps(found))
    best = min(found["search"], key=lambda each: each["nll"])
    steps = calibration.as_many_steps(best["step"], 8)
    for method in ("tuned", "swag"):
        training, searched = calibration.tuned_settings(replace(job, method=method, options={}, seed=1))
        assert (training.learning_rate, training.steps, searched) == (best["learning_rate"], steps, found["search"])


def test_what_is_remembered_is_of_its_batch_number_of_samples_and_seed() -> None:
    config = bayeslora.MeLoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", init_weights=False)
    model = get_peft_model(build_tiny_bert(), config).eval()
    remembering = Remembering(model)
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    batches += [{**batches[0], "input_ids": ids.flip(0)}, {**batches[0], "attention_mask": torch.tril(ids) // ids}]
    asked = [(batch, samples, seed) for batch in batches for samples, seed in ((3, 0), (3, 1), (0, 0))]
    for batch, samples, seed in asked * 2:
        found, expected = (bayeslora.predict(each, batch, samples, seed) for each in (remembering, model))
        assert torch.equal(found.probabilities, expected.probabilities)
    assert len(remembering.kept) == len(asked)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:IVON can move")  # in eight steps
@pytest.mark.parametrize("method", ROWS)
def test_a_method_fills_its_rows(method: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "packaged_model", lambda name: folder / "tiny")
    job = next(iter(calibration.jobs(given(folder, methods=[method], steps=8, rows=100)).values()))
    found = calibration.run(job)
    assert ROWS[method] <= found["forms"].keys() <= TUNED_ROWS.keys()
    labels = np.asarray(found["labels"])
    for form in found["forms"].values():
        p = probabilities_of(form, len(labels))
        assert classification_scores(p, labels, ())["nll"] == pytest.approx(form["scores"]["nll"], abs=1e-3)
        assert form["passes"] >= 1 and form["numbers"] >= found["parameters"]["adapter"]
    assert len(json.dumps(found)) < 100_000


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:IVON can move")  # in eight steps
@pytest.mark.parametrize(
    ("method", "task", "normalization"),
    [*((method, "arc_easy", "none") for method in ROWS), ("tuned", "openbookqa", "tokens")],
)
def test_a_method_fills_its_rows_by_cloze(
    method: str, task: str, normalization: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "unpack_model", lambda name, where: folder / "tiny-llama")
    ((path, job),) = calibration.jobs(given(folder, tasks=[task], methods=[method], steps=8, rows=100)).items()
    assert path.name == f"{task}-cloze-{method}-0.json"
    found = calibration.run(job)
    assert (found["scoring"], found["normalization"]) == ("cloze", normalization)
    assert found["split"] == "validation" and len(found["labels"]) == 40
    assert BY_CLOZE[method] <= found["forms"].keys() <= TUNED_ROWS.keys()
    if method == "tuned":
        assert "no head" in found["left_out"]["laplace"] and "place" in found["left_out"]["tuned-isotonic"]
        assert {"tuned-vector", "tfb"} <= found["forms"].keys() | found["left_out"].keys()
    rows = [item(index) for index in range(40)]
    for form in found["forms"].values():
        p = probabilities_of(form, 40)
        assert classification_scores(p, np.asarray(found["labels"]), ())["nll"] == pytest.approx(
            form["scores"]["nll"], abs=1e-3
        )
        assert all(p[i, len(row["choices"]) :].sum() < 1e-9 for i, row in enumerate(rows))
    # Of the 16 rows of a step it has learned that cats are right, which one word before a choice does not say.
    assert found["forms"][next(iter(found["forms"]))]["scores"]["nll"] < 1.6


def test_runs_have_names_settings_and_the_schedule_of_their_task(folder: Path) -> None:
    wanted = calibration.jobs(given(folder, tasks=["mrpc", "qnli"], methods=["tuned", "blob"], seeds=[4]))
    assert [path.name for path in wanted] == [f"{t}-{m}-4.json" for t in ("mrpc", "qnli") for m in ("tuned", "blob")]
    job = next(iter(wanted.values()))
    assert job.settings == {"training": vars(Training(480, 2e-3, max_length=96)), "options": {}}
    chosen = calibration.jobs(given(folder, methods=["melora-closed"], select=True, set=["prior_std=0.1"]))
    (path,), (job,) = chosen.keys(), chosen.values()
    assert path.parent.name == "calibration-selection" and path.name == "sst2-melora-closed-prior_std=0.1-0.json"
    assert job.options == {**OPTIONS["melora-closed"], "prior_std": 0.1}


def test_the_committed_files_are_those_of_the_benchmark() -> None:
    """Those around a tuned LoRA are not trained again."""
    methods = ["search", "tuned", "melora-closed", "melora-cores"]
    tuned = given(Path(), tasks=["mrpc", "cola", "rte", "sst2"], methods=methods, seeds=[0])
    tuned.results = calibration.RESULTS
    for path, job in calibration.jobs(tuned).items():
        harness.check_settings(path, job.settings)
        assert path.exists()
