"""`train`: what a finished run holds, and that its config gives the same run again."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from bayeslora.cli.main import main
from tests.cli.conftest import Setting, review_rows, write_jsonl
from tests.processes import start_command

METHODS = ("lora", "blora", "full")


@pytest.mark.parametrize("method", METHODS)
def test_a_run_holds_what_the_contract_names(runs: dict[str, Path], method: str) -> None:
    run = runs[method]
    weights = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    for name in ("config.yaml", "README.md", "report.html", "metrics.json", "history.json", "run.json", weights):
        assert (run / name).stat().st_size > 0, name
    assert list(run.glob("*.png"))
    assert not (run / "checkpoints").exists()
    assert not (run / "seconds.json").exists()
    assert not run.with_name(f"{method}.partial").exists()


@pytest.mark.parametrize("method", METHODS)
def test_metrics_have_the_documented_keys(runs: dict[str, Path], method: str) -> None:
    metrics = json.loads((runs[method] / "metrics.json").read_text())
    assert (metrics["method"], metrics["seed"], metrics["samples"]) == (method, 0, 0)
    assert metrics["steps"] == (30 if method == "blora" else 6)
    assert {"accuracy", "nll", "ece", "brier"} <= set(metrics["scores"])
    assert set(metrics["parameters"]) == {"trainable", "adapter", "total"}
    assert set(metrics["relative_bops"]) == {"adapted", "attention", "encoder", "model"}
    assert set(metrics["seconds"]) == {"train", "evaluate"}
    assert {"bayeslora", "torch", "transformers", "peft"} <= set(metrics["versions"])
    assert len(metrics["layers"]) == (0 if method == "full" else 6)  # 2 layers, query key value
    for layer in metrics["layers"]:
        assert {"name", "rank", "bits"} <= set(layer)
        assert set(layer["bits"]) == {"weight", "A", "E", "B", "A_out", "E_out", "out"}
    assert sum(row["count"] for row in metrics["reliability"]["bins"]) == 20


def test_a_run_too_short_to_choose_well_says_so_on_stderr(setting: Setting, tmp_path: Path) -> None:
    """In a process of its own: pytest would catch the warning."""
    short = ["--method", "blora", "--max-steps", "12", "--per-device-train-batch-size", "4", "--output-dir", "out"]
    process = start_command(tmp_path / "log", tmp_path, "train", *setting.options, *short)
    process.join(300)
    printed = (tmp_path / "log").read_text()
    assert process.exitcode == 0, printed
    said = [line for line in printed.splitlines() if "are few for" in line]
    assert len(said) == 1 and said[0].startswith(
        "bayeslora: note: 12 training steps are few for B-LoRA to choose well"
    )
    assert said[0].endswith("or for 80 with 16 rows in each")


def test_history_is_the_trainers_log(runs: dict[str, Path]) -> None:
    history = json.loads((runs["blora"] / "history.json").read_text())
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) == 30
    assert all(math.isfinite(loss) for loss in losses)
    assert {"mean_bits", "mean_rank", "relative_bops"} <= {name for entry in history for name in entry}


def test_an_adapter_is_an_ordinary_peft_folder(runs: dict[str, Path], setting: Setting) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(setting.model)
    model = PeftModel.from_pretrained(base, runs["lora"]).eval()
    saved = load_file(runs["lora"] / "adapter_model.safetensors")
    loaded = {name: value for name, value in model.state_dict().items() if "lora_B.default" in name}
    assert len(loaded) == 6
    for name, value in loaded.items():
        assert torch.equal(value, saved[name.replace("lora_B.default", "lora_B")])
        assert value.abs().sum() > 0


def test_a_card_loads_the_run_and_tells_no_path_of_this_machine(
    runs: dict[str, Path], setting: Setting, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    card = (runs["melora"] / "README.md").read_text(encoding="utf-8")
    assert str(setting.model.parent) not in card and f"base_model: {setting.model.name}\n" in card
    assert card.startswith("---\n") and "# Me-LoRA on train.jsonl\n" in card
    assert yaml.safe_load(card.split("---\n")[1])["tags"] == ["bayeslora", "melora", "lora"]
    code = card.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(runs["melora"])
    capsys.readouterr()
    exec(compile(code, "README.md", "exec"), {})
    label, *probabilities = capsys.readouterr().out.split()
    assert label in ("0", "1") and len(probabilities) == 2
    assert json.loads((runs["melora"] / "metrics.json").read_text())["title"] == "Me-LoRA"


@pytest.mark.parametrize("method", ["blora", "lora"])
def test_the_written_config_gives_the_same_run(runs: dict[str, Path], tmp_path: Path, method: str) -> None:
    again = tmp_path / "again"
    assert main(["train", "--config", str(runs[method] / "config.yaml"), "--output-dir", str(again)]) == 0
    first, second = (load_file(run / "adapter_model.safetensors") for run in (runs[method], again))
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
    assert (again / "config.yaml").read_text() == (runs[method] / "config.yaml").read_text()
    scores = [json.loads((run / "metrics.json").read_text())["scores"] for run in (runs[method], again)]
    assert scores[0] == scores[1]


def test_any_field_of_config_and_trainer_reaches_them(setting: Setting, tmp_path: Path) -> None:
    out = tmp_path / "out"
    own = ["--r", "4", "--target-modules", "query,value", "--use-rslora", "--rank-pattern", "{query: 2}"]
    trainer = ["--max-steps", "2", "--weight-decay=0.1", "--lr_scheduler_type", "constant", "--seed", "3"]
    assert main(["train", "--method", "lora", *setting.options, *own, *trainer, "--output-dir", str(out)]) == 0
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], sorted(config["target_modules"]), config["use_rslora"]) == (4, ["query", "value"], True)
    recorded = yaml.safe_load((out / "config.yaml").read_text())
    assert (recorded["weight_decay"], recorded["seed"], recorded["rank_pattern"]) == (0.1, 3, {"query": 2})
    metrics = json.loads((out / "metrics.json").read_text())
    assert sorted({layer["rank"] for layer in metrics["layers"]}) == [2, 4]
    history = json.loads((out / "history.json").read_text())
    assert [entry["learning_rate"] for entry in history if "loss" in entry] == [1e-3, 1e-3]


def test_four_micro_batches_train_as_one_batch(setting: Setting, tmp_path: Path) -> None:
    common = ["--optim", "sgd", "--learning-rate", "0.1", "--max-grad-norm", "0", "--max-steps", "3"]
    ends = []
    for batch, accumulation in (("32", "1"), ("8", "4")):
        out = tmp_path / accumulation
        sizes = ["--per-device-train-batch-size", batch, "--gradient-accumulation-steps", accumulation]
        assert main(["train", "--method", "lora", *setting.options, *common, *sizes, "--output-dir", str(out)]) == 0
        ends.append(load_file(out / "adapter_model.safetensors"))
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="is about machines without an accelerator")
@pytest.mark.parametrize("method", ["melora", "blora"])
def test_bfloat16_needs_no_word_about_the_cpu_on_a_machine_without_a_gpu(
    method: str, setting: Setting, tmp_path: Path
) -> None:
    """And what is scored and checked is the model that others load: no autocast, its own attention."""
    command = ["train", "--method", method, *setting.options, "--bf16", "true", "--max-steps", "12"]
    assert main([*command, "--output-dir", str(tmp_path / "run")]) == 0
    loss = json.loads((tmp_path / "run" / "history.json").read_text())[-1]["train_loss"]
    assert 0 < loss < 10
    assert "use_cpu" not in yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())


def test_the_best_model_of_blora_is_one_of_the_frozen_phase(setting: Setting, tmp_path: Path) -> None:
    saving = ["--load_best_model_at_end", "true", "--eval_strategy", "steps", "--eval_steps", "3"]
    options = [
        "--max-steps",
        "30",
        "--learning-rate",
        "0",
        "--target-bops",
        "0.1",
        "--output-dir",
        str(tmp_path / "out"),
    ]
    assert main(["train", "--method", "blora", *setting.options, *saving, *options]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["relative_bops"]["attention"] <= 0.1


def test_a_pair_and_a_test_file_and_kept_checkpoints(setting: Setting, tmp_path: Path) -> None:
    rows = [
        {"left": row["text"], "right": "the film", "y": ("no", "yes")[int(str(row["label"]))]}
        for row in review_rows(40, 2)
    ]
    data = write_jsonl(tmp_path / "pairs.jsonl", rows)
    files = ["--train-file", data, "--eval-file", data, "--test-file", data, "--text-column", "left,right"]
    options = [
        *files,
        "--label-column",
        "y",
        "--max-steps",
        "2",
        "--keep-checkpoints",
        "--output-dir",
        tmp_path / "out",
    ]
    assert main(["train", "--method", "lora", "--model", str(setting.model), *map(str, options)]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["labels"] == ["no", "yes"]
    assert metrics["scores_test"] == pytest.approx(metrics["scores"])
    assert len(list((tmp_path / "out" / "checkpoints").glob("checkpoint-*"))) == 2


def test_an_empty_name_of_the_label_column_is_refused(
    setting: Setting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", review_rows(8, 2))
    files = ["--train-file", str(data), "--eval-file", str(data), "--text-column", "text", "--label-column", ""]
    options = ["--method", "lora", "--model", str(setting.model), "--output-dir", str(tmp_path / "out")]
    assert main(["train", *options, *files]) == 2
    said = "--label-column is empty, but must be a column's name: leave it out for the column label"
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_numbers_as_labels_make_a_regression(setting: Setting, tmp_path: Path) -> None:
    rows = [{"text": row["text"], "label": float(str(row["label"])) + 0.5} for row in review_rows(32, 3)]
    data = write_jsonl(tmp_path / "numbers.jsonl", rows)
    files = ["--train-file", str(data), "--eval-file", str(data), "--text-column", "text"]
    out = tmp_path / "out"
    options = [*files, "--max-steps", "2", "--output-dir", str(out)]
    assert main(["train", "--method", "lora", "--model", str(setting.model), *options]) == 0
    assert "pearson" in json.loads((out / "metrics.json").read_text())["scores"]
    target = tmp_path / "predictions.jsonl"
    assert main(["predict", str(out), "--input", str(data), "--output", str(target)]) == 0
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    assert len(lines) == 32
    assert all(isinstance(line["label"], float) and line["probabilities"] is None for line in lines)


def test_modules_the_checkpoint_lacks_are_trained_and_saved(setting: Setting, tmp_path: Path) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(setting.model)
    folder = tmp_path / "headless"
    base.base_model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    for file in setting.model.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    from safetensors.torch import save_file

    without_pooler = {name: value for name, value in weights.items() if not name.startswith("pooler")}
    save_file(without_pooler, folder / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out"
    options = [*setting.options[2:], "--max-steps", "2", "--output-dir", str(out)]
    assert main(["train", "--method", "lora", "--model", str(folder), *options]) == 0
    saved = load_file(out / "adapter_model.safetensors")
    assert any("pooler" in name for name in saved)
    assert main(["evaluate", str(out)]) == 0
