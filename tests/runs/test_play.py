"""One text at a time: the reply agrees with `predict`, and with the calibration and the detector of the folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import bayeslora
from bayeslora.errors import BayesLoraError
from bayeslora.report.play import reply_html
from bayeslora.runs.play import DETECTOR_FILE, Playground
from bayeslora.runs.rows import training_batches
from tests.runs.conftest import tickets

TEXT = tickets(6, 3)[4]["text"]


def test_a_reply_is_the_prediction_with_its_draws(run_of: Callable[[str], Path]) -> None:
    run = bayeslora.load(run_of("melora"))
    reply, row = Playground(run, samples=4).label(TEXT), run.predict(TEXT, samples=4)[0]
    assert reply.label == row.label and reply.confidence == pytest.approx(row.confidence)
    assert reply.probabilities == pytest.approx(dict(zip(run.labels, row.probabilities, strict=True)))
    assert list(reply.probabilities.values()) == sorted(reply.probabilities.values(), reverse=True)
    assert len(reply.draws) == 4 and sum(reply.draws) / 4 == pytest.approx(reply.confidence, abs=1e-6)
    assert reply.mutual_information == pytest.approx(row.mutual_information)
    assert reply.ask_a_human is None and reply.foreign is None
    assert Playground(run).draws == 10


def test_calibration_and_detector_of_the_folder_are_used(run_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run_of("blora"), folder)
    run = bayeslora.load(folder)
    assert Playground(run).draws == 0, "a deterministic run"
    run.calibrate(tickets(48, 7))
    batches = training_batches(run.info, run.tokenizer, 2)
    labels = [run.labels.index(row["label"]) for row in tickets(48, 0)]
    for number, batch in enumerate(batches):
        batch["labels"] = torch.tensor(labels[32 * number : 32 * number + len(batch["input_ids"])])
    bayeslora.FeatureDetector(run.model).fit(batches).save(folder / DETECTOR_FILE)
    known, foreign = (Playground(run).label(text) for text in (TEXT, "no no no no no no no ending"))
    assert known.ask_a_human == run.predict(TEXT, risk=0.05)[0].ask_a_human is not None
    assert known.draws == [] and known.mutual_information is None
    assert known.foreign is not None and foreign.foreign is not None and foreign.foreign >= known.foreign


def test_what_the_page_cannot_ask_is_told(run_of: Callable[[str], Path]) -> None:
    with pytest.raises(BayesLoraError, match="deterministic"):
        Playground(bayeslora.load(run_of("blora")), samples=3)


def test_the_html_shows_and_escapes(run_of: Callable[[str], Path]) -> None:
    html = reply_html(Playground(bayeslora.load(run_of("melora")), samples=3).label("<script>"))
    assert "3 draws of the weights" in html and "legal / GDPR" in html and "<script" not in html
    assert html.count('class="line"') == 6
