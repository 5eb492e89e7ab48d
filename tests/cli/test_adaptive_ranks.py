"""`train` with AdaLoRA and DyLoRA on the tiny BERT, what they save, and a rank cut out by `export --rank`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import bayeslora
from bayeslora import at_rank
from bayeslora.cli.main import main
from tests.cli.conftest import Setting

TOKENS = torch.arange(5, 29).view(2, 12)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, setting: Setting) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    own = {
        "dylora": ["--r", "4"],
        "bayes_adalora": ["--importance", "sensitivity", "--init-r", "4", "--target-r", "2"],
    }
    for method, options in own.items():
        steps = ["--max-steps", "12", "--learning-rate", "0.01", *options]
        assert main(["train", "--method", method, *setting.options, *steps, "--output-dir", str(folder / method)]) == 0
    return {method: folder / method for method in own}


def test_adalora_saves_the_ranks_of_its_budget_and_no_others(runs: dict[str, Path]) -> None:
    layers = json.loads((runs["bayes_adalora"] / "metrics.json").read_text(encoding="utf-8"))["layers"]
    assert sum(layer["rank"] for layer in layers) == 2 * len(layers)
    pattern = json.loads((runs["bayes_adalora"] / "adapter_config.json").read_text(encoding="utf-8"))["rank_pattern"]
    assert pattern == {layer["name"]: layer["rank"] for layer in layers}
    assert len(set(pattern.values())) > 1


def test_a_score_that_adamw_has_no_posterior_for_is_refused_in_one_line(
    setting: Setting, tmp_path: Path, refused: Callable[..., str]
) -> None:
    out = tmp_path / "out"
    line = refused("train", "--method", "bayes_adalora", *setting.options, "--max-steps", "12", "--output-dir", out)
    assert "--importance snr_abs needs the posterior" in line
    assert line.endswith("or use --importance sensitivity or magnitude") and not out.exists()
    assert "--r is given, but belongs to" in refused(
        "train", "--method", "bayes_adalora", "--r", "8", *setting.options, "--output-dir", out
    )


def test_a_rank_is_cut_out_by_export(runs: dict[str, Path], tmp_path: Path, refused: Callable[..., str]) -> None:
    target = tmp_path / "rank-2"
    assert main(["export", str(runs["dylora"]), "--format", "lora", "--rank", "2", "--output-dir", str(target)]) == 0
    model = bayeslora.load(runs["dylora"]).model.eval()
    plain = PeftModel.from_pretrained(bayeslora.load(runs["dylora"]).model.unload(), target).eval()
    assert plain.peft_config["default"].r == 2
    with at_rank(model, 2), torch.no_grad():
        torch.testing.assert_close(plain(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)
    lost = ["--format", "lora", "--output-dir", tmp_path / "x"]
    assert "rank 9 is not among the ranks 1 to 4" in refused("export", runs["dylora"], "--rank", "9", *lost)
    assert "was trained with bayes_adalora" in refused("export", runs["bayes_adalora"], "--rank", "2", *lost)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("method", "options"),
    [("dylora", ["--r", "4"]), ("bayes_adalora", ["--init-r", "4", "--target-r", "2"])],
)
def test_ivon_trains_them_and_its_posterior_follows_the_ranks(
    method: str, options: list[str], setting: Setting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", ["--output-dir", str(tmp_path / "run")]
    ivon = ["--optim", "ivon", "--ivon-ess", "5", "--max-steps", "12", "--samples", "2"]
    assert main(["train", "--method", method, *ivon, *options, *setting.options, *out]) == 0
    layers = json.loads((run / "metrics.json").read_text(encoding="utf-8"))["layers"]
    deviations = load_file(run / "posterior.safetensors")
    for layer in layers:
        (name,) = (key for key in deviations if layer["name"] in key and key.endswith("_A"))
        assert len(deviations[name]) == layer["rank"]
    capsys.readouterr()
    assert main(["evaluate", str(run), "--samples", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 2
