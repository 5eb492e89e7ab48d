"""`train --swag` with plain LoRA: a posterior that the other commands draw from, exact after an interruption."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import bayeslora
from bayeslora.cli.arguments import build_plan
from bayeslora.cli.main import main
from tests.cli.conftest import Setting
from tests.cli.test_resume import _interrupt_at

OPTIONS = ["--method", "lora", "--swag", "4", "--r", "2", "--max-steps", "16", "--learning-rate", "0.01"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, setting: Setting) -> Path:
    folder = tmp_path_factory.mktemp("swag") / "run"
    out = ["--samples", "2", "--output-dir", str(folder)]
    assert main(["train", *OPTIONS, *setting.options, *out]) == 0
    return folder


def test_a_run_has_a_posterior_and_was_scored_with_it(folder: Path) -> None:
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["samples"] == 2
    run = bayeslora.load(folder)
    posterior = run.predictor
    assert isinstance(posterior, bayeslora.WeightPosterior)
    assert {len(columns) for columns in posterior.columns.values()} == {4}
    assert posterior.columns.keys() == posterior.deviations.keys()
    stored = yaml.safe_load((folder / "config.yaml").read_text())
    assert stored["swag"] == 4
    assert build_plan({"config": str(folder / "config.yaml"), "output_dir": "elsewhere"}).record() == stored


def test_scores_with_samples_are_those_of_training(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(folder), "--samples", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    trained = json.loads((folder / "metrics.json").read_text())
    assert found["scores"]["nll"] == pytest.approx(trained["scores"]["nll"], rel=1e-4)


def test_a_resumed_run_has_the_same_posterior(
    folder: Path, setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = ["--samples", "2", "--output-dir", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        _interrupt_at(patch, 13, signal.SIGINT)
        assert main(["train", *OPTIONS, *setting.options, *out]) == 130
    assert main(["train", *OPTIONS, *setting.options, *out, "--resume"]) == 0
    for name in ("adapter_model.safetensors", "posterior.safetensors"):
        one, other = load_file(folder / name), load_file(tmp_path / "out" / name)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_what_cannot_go_together_is_refused(setting: Setting, tmp_path: Path, refused: Callable[..., str]) -> None:
    run = ["train", "--method", "lora", *setting.options, "--output-dir", str(tmp_path / "out")]
    assert "--swag and --optim ivon are given" in refused(*run, "--swag", "4", "--optim", "ivon")
    assert "--swag is 1, but must be at least 2" in refused(*run, "--swag", "1")
    best = ["--load-best-model-at-end", "--eval-strategy", "steps", "--eval-steps", "2", "--save-steps", "2"]
    assert "SWAG averages the last iterates" in refused(*run, "--swag", "4", "--max-steps", "8", *best)
