"""A temperature or another map saved with a run: fitted on one half of the rows, used from then on, and left out."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bayeslora
from bayeslora import BayesLoraError, ConformalSets, IsotonicCalibration, TemperatureScaling, VectorScaling
from bayeslora.prediction import predict
from bayeslora.runs.decisions import Calibration
from bayeslora.runs.scaling import Scaling, ScalingName, halves
from tests.posthoc.test_calibration import Fixed
from tests.runs.conftest import NAMES, tickets, trained

TEXTS = [row["text"] for row in tickets(12, seed=3)]


def noisy_tickets(count: int, seed: int) -> list[dict[str, Any]]:
    """Tickets of which every fifth has the label of the next topic, so that no row can be predicted with certainty."""
    rows = tickets(count, seed)
    return [
        {**row, "label": rows[(i + 1) % count]["label"] if i % 5 == 0 else row["label"]} for i, row in enumerate(rows)
    ]


@pytest.fixture(scope="session")
def taught(tmp_path_factory: pytest.TempPathFactory, tiny_bert_folder: Path) -> Path:
    """A run that has learned the tickets, surer than their noise allows."""
    return trained(tmp_path_factory.mktemp("runs") / "taught", tiny_bert_folder, tickets(48, 0), steps=40)


@pytest.fixture
def folder(taught: Path, tmp_path: Path) -> Path:
    """A copy of that run that a test may write into."""
    return Path(shutil.copytree(taught, tmp_path / "out"))


def test_rows_are_split_in_two_at_random() -> None:
    first, second = halves(101, seed=0)
    assert (len(first), len(second)) == (50, 51) and sorted([*first, *second]) == list(range(101))
    assert 10 < (first < 50).sum() < 40 and not np.array_equal(first, halves(101, seed=1)[0])
    assert np.array_equal(first, halves(101, seed=0)[0])


def test_the_temperature_is_the_likeliest_of_one_half_and_the_sets_are_those_of_the_other(folder: Path) -> None:
    run, rows = bayeslora.load(folder), noisy_tickets(120, seed=7)
    plain = run.predict([row["text"] for row in rows]).prediction.logits
    truth = torch.tensor([NAMES.index(row["label"]) for row in rows])
    before = run.predict(TEXTS).prediction.logits
    made = run.calibrate(rows, scaling="temperature", seed=5)
    first, second = halves(120, seed=5)
    assert made.scaling is not None and made.scaling.rows == made.rows == 60
    temperature = made.scaling.numbers["temperature"]

    def nll(t: float) -> float:
        return float(torch.nn.functional.cross_entropy(plain[first] / t, truth[first]))

    assert nll(temperature) < min(nll(1.01 * temperature), nll(0.99 * temperature)) and temperature != 1
    again = bayeslora.load(folder)
    found = again.predict(TEXTS, coverage=0.8)
    torch.testing.assert_close(found.probabilities, (before / temperature).softmax(-1), rtol=1e-6, atol=1e-9)
    sets = ConformalSets("lac", 0.8).fit((plain[second] / temperature).softmax(-1), truth[second])
    expected = sets.sets((before / temperature).softmax(-1))
    assert [row.set for row in found] == [[NAMES[i] for i in range(6) if row[i]] for row in expected]
    assert torch.equal(again.predict(TEXTS).probabilities, found.probabilities)
    assert torch.equal(again.predict(TEXTS, uncalibrated=True).prediction.logits, before)


@pytest.mark.parametrize("name", ["temperature", "isotonic"])
def test_a_map_in_the_folder_is_used(folder: Path, name: ScalingName) -> None:
    run, rows = bayeslora.load(folder), noisy_tickets(240, seed=7)
    made = run.calibrate(rows, samples=3, scaling=name)
    read = Calibration.load(folder)
    assert read.scaling == made.scaling and read.samples == 3
    content = json.loads((folder / "conformal.json").read_text(encoding="utf-8"))
    assert content["version"] == 2 and content["rows"] == content["scaling"]["rows"] == 120
    found = run.predict(TEXTS)  # with the samples of the calibration
    plain = run.predict(TEXTS, samples=3, uncalibrated=True)
    assert (found.probabilities - plain.probabilities).abs().max() > 1e-3
    torch.testing.assert_close(found.probabilities.sum(-1), torch.ones(12).double())


@pytest.mark.parametrize("name", ["temperature", "vector", "isotonic"])
def test_the_map_that_is_read_is_the_one_that_was_fitted(name: ScalingName) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(400, 3, generator=generator).double()
    labels = torch.multinomial((0.5 * logits).softmax(-1), 1, generator=generator)[:, 0]
    made = Scaling.fitted(name, Fixed(), logits[None], labels)
    classes = {"temperature": TemperatureScaling, "vector": VectorScaling, "isotonic": IsotonicCalibration}
    fitted = classes[name](Fixed()).fit({"x": logits, "labels": labels})
    read = Scaling(**json.loads(json.dumps(dataclasses.asdict(made)))).around(Fixed())
    data = {"x": torch.randn(1000, 3, generator=generator).double()}
    torch.testing.assert_close(predict(read, data).probabilities, predict(fitted, data).probabilities)


def test_the_coverage_is_that_of_the_half_the_sets_are_calibrated_on() -> None:
    """Counted: with n rows and no ties, the mean coverage is ⌈(n + 1) · .9⌉ / (n + 1), whatever the map's rows."""
    generator = torch.Generator().manual_seed(0)
    held = []
    for repetition in range(150):
        logits = 3 * torch.randn(300, 4, generator=generator).double()
        labels = torch.multinomial((logits / 2).softmax(-1), 1, generator=generator)[:, 0]
        first, second = halves(100, seed=repetition)
        scaling = Scaling.fitted("temperature", Fixed(), logits[None, first], labels[first])
        p = (logits / scaling.numbers["temperature"]).softmax(-1)
        sets = ConformalSets("lac", 0.9, allow_empty=True).fit(p[second], labels[second]).sets(p[100:])
        held.append(float(sets[torch.arange(200), labels[100:]].double().mean()))
    assert np.mean(held) == pytest.approx(46 / 51, abs=0.012)  # the mean's standard error is .004


def test_what_a_map_is_not_for_is_refused(folder: Path) -> None:
    run, rows = bayeslora.load(folder), noisy_tickets(60, seed=7)
    with pytest.raises(BayesLoraError, match="scaling is 'platt', but must be temperature, vector or isotonic"):
        run.calibrate(rows, scaling="platt")  # type: ignore[arg-type]
    with pytest.raises(BayesLoraError, match="held-out rows are of class .*needs at least 10"):
        run.calibrate(rows, scaling="isotonic")
    assert not (folder / "conformal.json").exists()
    run.calibrate(rows, samples=2, scaling="temperature")
    with pytest.raises(BayesLoraError, match=r"samples is 5, but .* made with 2: .*give uncalibrated=True"):
        run.predict(TEXTS, samples=5)
    with pytest.raises(BayesLoraError, match="uncalibrated is given, but the sets and the risk .* by temperature"):
        run.predict(TEXTS, coverage=0.9, uncalibrated=True)
    run.predict(TEXTS, samples=5, uncalibrated=True)
    with torch.no_grad():
        next(p for name, p in run.model.named_parameters() if "modules_to_save" in name).add_(1.0)
    with pytest.raises(BayesLoraError, match="was made for the model .*: calibrate again, or give uncalibrated=True"):
        run.predict(TEXTS)
    run.calibrate(rows)  # replaces the file, and with it the map
    assert run.predict(TEXTS, samples=5)[0].set is None
    assert json.loads((folder / "conformal.json").read_text(encoding="utf-8"))["version"] == 1
    numbers = [{**row, "label": 0.5} for row in rows]
    regression = dataclasses.replace(run, info=dataclasses.replace(run.info, kind="regression", labels=[]))
    with pytest.raises(BayesLoraError, match="scaling is temperature, but the run predicts numbers"):
        regression.calibrate(numbers, scaling="temperature")
