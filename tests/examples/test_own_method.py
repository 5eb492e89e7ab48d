"""The method of examples/own_method.py does all that a method of the package does, in Python and from the command."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification

import bayeslora
from bayeslora.cli.main import main as command
from bayeslora.methods import METHODS
from tests.examples.test_examples import EXAMPLES, lively_bert_folder, load, review_folder
from tests.methods.registered import forgotten_afterwards, offer

__all__ = ["lively_bert_folder", "review_folder"]


@pytest.fixture(autouse=True)
def nothing_stays_registered() -> Iterator[None]:
    with forgotten_afterwards():
        yield
    sys.modules.pop("own_method", None)


def test_it_trains_closes_gates_and_loads_again(lively_bert_folder: Path, review_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options: dict[str, Any] = {"model": lively_bert_folder, "task": "sst2", "data_dir": review_folder}
    options |= {"output_dir": out, "steps": 60, "learning_rate": 0.01, "sparsity": 0.01}
    result = load("own_method")([f"--{name}={value}" for name, value in options.items()])
    assert result["eval_accuracy"] > 0.8 and 0 < result["mean_rank"] < 8
    base = AutoModelForSequenceClassification.from_pretrained(lively_bert_folder)
    model = PeftModel.from_pretrained(base, out).eval()
    ranks = [layer.rank for layer in bayeslora.describe(model)]
    assert sum(ranks) / len(ranks) == pytest.approx(result["mean_rank"])


def test_it_merges_shrinks_and_exports_as_the_same_function(tmp_path: Path) -> None:
    load("own_method")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    config = METHODS["sora"](r=4, target_modules=["0"], init_weights=False)  # type: ignore[call-arg]
    model, x = get_peft_model(net, config).eval(), torch.randn(5, 6)
    layer = model.base_model.adapted_layers()[0]
    with torch.no_grad():
        layer.sora_gate["default"][1] = 0.001
    model.base_model.step_end(0)
    before = model(x)
    assert [each.rank for each in bayeslora.describe(model)] == [3]
    bayeslora.shrink(model)
    assert layer.sora_A["default"].shape == (3, 6)
    torch.testing.assert_close(model(x), before)
    torch.testing.assert_close(model.merge_and_unload()(x), before, rtol=1e-4, atol=1e-5)


def test_the_command_finds_it_by_its_entry_point(
    lively_bert_folder: Path, review_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed, out = tmp_path / "site", tmp_path / "out"
    offer(installed, "sora", "own_method", (EXAMPLES / "own_method.py").read_text())
    monkeypatch.syspath_prepend(installed)
    options = {"method": "sora", "model": lively_bert_folder, "task": "sst2", "data-dir": review_folder}
    options |= {"output-dir": out, "max-steps": 4, "sparsity": 0.01, "max-length": 16}
    assert command(["train", *(f"--{name}={value}" for name, value in options.items()), "--use-cpu"]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["method"] == "sora" and metrics["title"] == "SoRA"
    assert "import own_method" in (out / "README.md").read_text()
    run = bayeslora.load(out)
    assert len(run.predict(["the film was good"])) == 1
    assert command(["export", str(out), "--format", "lora", f"--output-dir={tmp_path / 'lora'}"]) == 0
