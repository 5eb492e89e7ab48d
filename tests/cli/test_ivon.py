"""`train --optim ivon` with plain LoRA, and what the other commands make of the posterior it leaves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from bayeslora.cli.arguments import build_plan
from bayeslora.cli.main import main
from tests.cli.conftest import Setting, write_jsonl

OPTIONS = ["--method", "lora", "--optim", "ivon", "--r", "2", "--max-steps", "3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, setting: Setting) -> Path:
    """A finished run; a small `ess`, so that the samples differ."""
    folder = tmp_path_factory.mktemp("ivon") / "run"
    own = ["--ivon-ess", "2", "--ivon-beta2", "0.9", "--samples", "2"]
    assert main(["train", *OPTIONS, *own, *setting.options, "--output-dir", str(folder)]) == 0
    return folder


def test_a_run_has_a_posterior_and_was_scored_with_it(folder: Path) -> None:
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["samples"] == 2
    assert (folder / "posterior.safetensors").stat().st_size > 1000
    logged = [entry for entry in json.loads((folder / "history.json").read_text()) if "loss" in entry]
    assert logged[-1]["posterior_std"] > 0.1


def test_its_config_gives_the_run_again(folder: Path) -> None:
    stored = yaml.safe_load((folder / "config.yaml").read_text())
    assert (stored["optim"], stored["ivon_ess"], stored["ivon_beta2"]) == ("ivon", 2.0, 0.9)
    again = build_plan({"config": str(folder / "config.yaml"), "output_dir": "elsewhere"})
    assert again.record() == stored
    assert again.ivon is not None and again.ivon.keywords()["betas"] == (0.9, 0.9)


def test_predictions_draw_from_it_and_are_certain_without_samples(
    folder: Path, setting: Setting, tmp_path: Path
) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": "the film was good"}, {"text": "the plot was dull"}])
    found = {}
    for samples in (0, 3):
        target = tmp_path / f"{samples}.jsonl"
        options = ["--input", str(rows), "--output", str(target), "--samples", str(samples)]
        assert main(["predict", str(folder), *options]) == 0
        found[samples] = [json.loads(line)["mutual_information"] for line in target.read_text().splitlines()]
    assert max(found[0]) == 0 and min(found[3]) > 1e-5


def test_scores_with_samples_are_those_of_training(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(folder), "--samples", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    trained = json.loads((folder / "metrics.json").read_text())
    assert found["scores"]["nll"] == pytest.approx(trained["scores"]["nll"], rel=1e-4)


def test_options_of_ivon_need_it(setting: Setting, tmp_path: Path, refused: Callable[..., str]) -> None:
    out = ["--output-dir", tmp_path / "out"]
    line = refused("train", "--method", "lora", *setting.options, "--ivon-ess", "5", *out)
    assert "--ivon-ess" in line and "--optim ivon" in line
    plan = build_plan({"method": "lora", "model": "m", "task": "mrpc", "output_dir": "o", "optim": "adafactor"})
    assert plan.training_options["optim"] == "adafactor" and plan.ivon is None
