"""`train`, `evaluate`, `predict` and `export` with the variational methods, end to end on the tiny BERT."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from bayeslora.cli.main import main
from tests.cli.conftest import Setting

METHODS = {"melora": ["--prior-std", "0.3"], "blob": ["--kl-weight", "0.2"]}


@pytest.fixture(scope="module", params=list(METHODS))
def run(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, setting: Setting
) -> tuple[str, Path]:
    """A finished run of six steps."""
    method = request.param
    folder = tmp_path_factory.mktemp("variational") / method
    steps = ["--max-steps", "6", "--learning-rate", "0.01", *METHODS[method]]
    assert main(["train", "--method", method, *setting.options, *steps, "--output-dir", str(folder)]) == 0
    return method, folder


def test_a_run_holds_what_the_contract_names(run: tuple[str, Path]) -> None:
    method, folder = run
    names = ("config.yaml", "README.md", "report.html", "metrics.json", "history.json", "adapter_model.safetensors")
    assert all((folder / name).stat().st_size > 0 for name in names)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (metrics["method"], metrics["steps"], metrics["samples"]) == (method, 6, 0)
    assert {"accuracy", "nll", "ece", "brier"} <= set(metrics["scores"])
    # query, key and value of two layers of width 32 at rank 8; Me-LoRA's precisions are not trained
    adapter = 6 * (8 * 64 + 64 if method == "melora" else 8 * 96)
    assert metrics["parameters"]["adapter"] == adapter
    assert [layer["rank"] for layer in metrics["layers"]] == [8] * 6
    assert all(set(layer["bits"].values()) == {32} for layer in metrics["layers"])


def test_n_is_the_number_of_training_rows_and_the_log_has_the_divergence(run: tuple[str, Path]) -> None:
    method, folder = run
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == method.upper() and config["num_examples"] == 64
    assert config["prior_std"] == (0.3 if method == "melora" else 0.2)
    assert config["kl_weight"] == (1.0 if method == "melora" else 0.2)
    logged = [entry for entry in json.loads((folder / "history.json").read_text()) if "loss" in entry]
    assert {"kl", "penalty_kl", "kl_warmup", "posterior_std", "signal_to_noise"} <= set(logged[-1])
    assert logged[-1]["kl"] > 0 and logged[-1]["penalty_kl"] > 0


def test_another_number_of_examples_is_told(
    setting: Setting, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--method", "melora", *setting.options, "--max-steps", "1", "--num-examples", "5"]
    with pytest.warns(UserWarning, match="--num-examples is 5, but the loss of the training rows has 64 terms"):
        assert main([*map(str, command), "--output-dir", str(tmp_path / "out")]) == 0


def test_a_run_says_what_it_scores_unless_it_is_to_be_quiet(
    setting: Setting, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--method", "melora", *setting.options, "--max-steps", "1", "--samples", "3"]
    assert main([*command, "--output-dir", str(tmp_path / "told")]) == 0
    assert "melora: scoring 20 rows with 3 samples of the weights\n" in capfd.readouterr().err
    assert main([*command, "--disable-tqdm", "true", "--output-dir", str(tmp_path / "quiet")]) == 0
    assert "scoring" not in capfd.readouterr().err


def test_its_config_says_the_method_and_its_options(run: tuple[str, Path]) -> None:
    method, folder = run
    stored = yaml.safe_load((folder / "config.yaml").read_text())
    assert stored["method"] == method
    assert stored["prior_std" if method == "melora" else "kl_weight"] == (0.3 if method == "melora" else 0.2)


def test_the_adapter_loads_with_peft_and_exports_to_the_same_function(
    run: tuple[str, Path], setting: Setting, tmp_path: Path
) -> None:
    _, folder = run
    assert main(["export", str(folder), "--format", "lora", "--output-dir", str(tmp_path / "lora")]) == 0
    tokens = torch.arange(24).view(3, 8)
    logits = []
    for adapter in (folder, tmp_path / "lora"):
        base = AutoModelForSequenceClassification.from_pretrained(setting.model)
        with torch.no_grad():
            logits.append(PeftModel.from_pretrained(base, adapter).eval()(input_ids=tokens).logits)
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=1e-5)


def test_evaluation_with_samples_and_at_the_mean(
    run: tuple[str, Path], setting: Setting, capfd: pytest.CaptureFixture[str]
) -> None:
    _, folder = run
    found = {}
    options = ["--eval-file", str(setting.dev), "--text-column", "text", "--json"]
    for samples in ("0", "3", "3"):
        capfd.readouterr()
        assert main(["evaluate", str(folder), *options, "--samples", samples]) == 0
        output = json.loads(capfd.readouterr().out)
        assert output["samples"] == int(samples)
        assert found.setdefault(samples, output["scores"]) == output["scores"]
    assert found["0"]["nll"] != found["3"]["nll"]


def test_prediction_with_samples_has_mutual_information(
    run: tuple[str, Path], setting: Setting, tmp_path: Path
) -> None:
    _, folder = run
    output = tmp_path / "out.jsonl"
    arguments = ["predict", str(folder), "--input", str(setting.dev), "--output", str(output), "--samples", "4"]
    assert main(arguments) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(rows) == 20
    assert all(sum(row["probabilities"].values()) == pytest.approx(1.0, abs=1e-5) for row in rows)
    assert all(0 <= row["mutual_information"] <= row["entropy"] for row in rows)
    assert max(row["mutual_information"] for row in rows) > 0
