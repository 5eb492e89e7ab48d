"""`export --format packed` and `--format merged` on finished runs: what they write is a run itself, or nothing."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import bayeslora
from bayeslora.cli.main import main
from bayeslora.runs.rows import training_batches

Refused = Callable[..., str]


def _json(capsys: pytest.CaptureFixture[str], *argv: object) -> dict[str, Any]:
    capsys.readouterr()
    assert main([str(argument) for argument in argv]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("method", ["blora", "melora"])
def test_a_packed_run_evaluates_as_the_run_itself(
    method: str, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "packed"
    measured = _json(capsys, "export", runs[method], "--format", "packed", "--output-dir", target, "--json")
    assert measured["file_bytes"] == (target / "adapter_model.safetensors").stat().st_size
    assert json.loads((target / "run.json").read_text())["method"] == method
    AutoTokenizer.from_pretrained(target)
    scores = [_json(capsys, "evaluate", folder, "--json") for folder in (runs[method], target)]
    assert scores[0]["scores"] == scores[1]["scores"]
    assert [layer["bits"] for layer in scores[0].get("layers", [])] == [
        layer["bits"] for layer in scores[1].get("layers", [])
    ]


@pytest.mark.parametrize("method", ["lora", "melora"])
def test_a_merged_run_is_a_transformers_folder_with_a_card(
    method: str, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "merged"
    measured = _json(capsys, "export", runs[method], "--format", "merged", "--output-dir", target, "--json")
    assert measured["max_output_error"] < 1e-5 and measured["inexact"] is None
    assert "exact" in (target / "README.md").read_text()
    assert not (target / "adapter_config.json").exists()
    AutoModelForSequenceClassification.from_pretrained(target)
    scores = [_json(capsys, "evaluate", folder, "--json")["scores"] for folder in (runs[method], target)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


def test_an_inexact_merge_is_refused_unless_allowed_and_then_measured(
    runs: dict[str, Path], tmp_path: Path, refused: Refused, capfd: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "merged"
    line = refused("export", runs["blora"], "--format", "merged", "--output-dir", target)
    assert "quantizes activations" in line and "--allow-error" in line
    assert list(tmp_path.iterdir()) == []
    assert (
        main(["export", str(runs["blora"]), "--format", "merged", "--allow-error", "--output-dir", str(target)]) == 0
    )
    printed = capfd.readouterr().out
    assert "max output error" in printed and "quantizes activations" in printed
    assert "**The merge is not exact**" in (target / "README.md").read_text()


def test_an_integer_run_evaluates_nearly_as_the_run_itself(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "integer"
    argv = ["export", runs["blora"], "--format", "integer", "--output-dir", target, "--json"]
    measured = _json(capsys, *argv, "--unadapted", "float32")
    assert measured["max_output_error"] < 0.01 * measured["max_output"]
    assert measured["file_bytes"] == (target / "integer_model.safetensors").stat().st_size
    scores = [_json(capsys, "evaluate", folder, "--json")["scores"] for folder in (runs["blora"], target)]
    assert scores[0] == pytest.approx(scores[1], abs=0.02)


def test_output_errors_are_those_on_the_runs_own_rows(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--format", "integer", "--json", "--output-dir"]
    plain = _json(capsys, "export", runs["blora"], *argv, tmp_path / "plain")
    calibrated = _json(capsys, "export", runs["blora"], "--calibrate", *argv, tmp_path / "calibrated")
    indices = [json.loads((tmp_path / name / "integer.json").read_text()) for name in ("plain", "calibrated")]
    inputs = [sum("in" in layer["bits"] for layer in index["linear"].values()) for index in indices]
    assert inputs[0] == 0 < inputs[1]
    assert plain["max_output"] == calibrated["max_output"]
    moved = tmp_path / "moved"
    shutil.copytree(runs["blora"], moved)
    info = json.loads((moved / "run.json").read_text())
    info["files" if info["task_name"] is None else "data_dir"] = (
        {"train_file": "gone.jsonl"} if info["task_name"] is None else str(tmp_path / "gone")
    )
    (moved / "run.json").write_text(json.dumps(info))
    capsys.readouterr()
    assert main(["export", str(moved), *argv, str(tmp_path / "dummy")]) == 0
    printed = capsys.readouterr()
    assert "dummy inputs" in printed.err
    found = json.loads(printed.out)
    assert found["max_output"] != plain["max_output"] and found["noise_divergence"] < 0.01
    assert main(["export", str(moved), "--calibrate", *argv, str(tmp_path / "refused")]) == 2
    assert not (tmp_path / "refused").exists()


def test_a_lora_is_cut_to_a_mean_rank_on_its_training_rows(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "small"
    argv = ["--format", "lora", "--mean-rank", 1.5, "--output-dir"]
    measured = _json(capsys, "export", runs["lora"], *argv, target, "--json")
    run = bayeslora.load(runs["lora"])
    batches = training_batches(run.info, run.tokenizer, 32, seed=0)
    wanted = bayeslora.truncate_rank(run.model, mean_rank=1.5, data=batches)
    layers = len(bayeslora.describe(run.model))
    assert sum(layer.rank for layer in bayeslora.describe(wanted)) == round(1.5 * layers)
    found = bayeslora.load(target)
    assert found.info.method == "lora" and measured["mean_rank"] == pytest.approx(1.5, abs=0.1)
    assert measured["ranks"] == {name: 0 for name in measured["ranks"]} | {
        layer.name: layer.rank for layer in bayeslora.describe(wanted)
    }
    assert measured["rows"] == 64 and 0 <= measured["divergence"] < 0.1 and 0 <= measured["changed"] <= 1
    texts = ["a fine film", "a dull film"]
    own = dataclasses.replace(run, model=wanted).predict(texts)
    assert [row.probabilities for row in found.predict(texts)] == [
        pytest.approx(row.probabilities, abs=1e-5) for row in own
    ]


def test_wrong_requests_write_nothing(runs: dict[str, Path], tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "there").mkdir()
    target = ["--output-dir", tmp_path / "out"]
    assert "exists" in refused("export", runs["blora"], "--format", "packed", "--output-dir", tmp_path / "there")
    assert "--allow-error is given" in refused("export", runs["blora"], "--format", "packed", "--allow-error", *target)
    assert "--unadapted is given" in refused(
        "export", runs["blora"], "--format", "lora", "--unadapted", "int8", *target
    )
    assert "--calibrate is given" in refused("export", runs["blora"], "--format", "merged", "--calibrate", *target)
    assert "is 'int4'" in refused("export", runs["blora"], "--format", "integer", "--unadapted", "int4", *target)
    assert "is not a folder" in refused("export", tmp_path / "nothing", "--format", "packed", *target)
    assert "no adapter of bayeslora" in refused("export", runs["lora"], "--format", "packed", *target)
    assert "--mean-rank is 1, but" in refused("export", runs["blora"], "--format", "lora", "--mean-rank", 1, *target)
    assert "--mean-rank and --uniform are given" in refused(
        "export", runs["lora"], "--format", "lora", "--mean-rank", 1, "--uniform", *target
    )
    assert "--mean-rank is given" in refused("export", runs["lora"], "--format", "merged", "--mean-rank", 1, *target)
    assert "mean-rank is 99.0, but must be above 0" in refused(
        "export", runs["lora"], "--format", "lora", "--mean-rank", 99, *target
    )
    assert "fully fine-tuned" in refused("export", runs["full"], "--format", "merged", *target)
    assert "--colour" in refused("export", runs["blora"], "--format", "packed", "--colour", "red", *target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]


def test_a_damaged_packed_run_is_one_line(runs: dict[str, Path], tmp_path: Path, refused: Refused) -> None:
    target = tmp_path / "packed"
    assert main(["export", str(runs["blora"]), "--format", "packed", "--output-dir", str(target)]) == 0
    path = target / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert "checksum" in refused("evaluate", target)
    path.write_bytes(data[:100])
    assert "damaged" in refused("evaluate", target)


BASE_ID = "someone/some-base"
EXPORTS = [("melora", "lora"), ("melora", "merged"), ("blora", "packed"), ("blora", "integer"), ("lora", "onnx")]
ALONE = """
import json, sys, torch

names = {}
if sys.argv[1] == "lora":
    sys.modules["bayeslora"] = None  # an import of it would fail
exec(sys.argv[2], names)
model = names["model"].eval()
with torch.no_grad():
    print(json.dumps(model(**{k: torch.tensor(v) for k, v in json.loads(sys.argv[3]).items()}).logits.tolist()))
"""


@pytest.mark.parametrize(("method", "form"), EXPORTS)
def test_an_export_with_a_base_model_id_tells_no_path_of_this_machine(
    method: str, form: str, runs: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if form == "onnx":
        pytest.importorskip("onnxruntime")
    target = tmp_path / "out"
    command = ["export", str(runs[method]), "--format", form, "--output-dir", str(target)]
    assert main([*command, "--base-model-id", BASE_ID, "--license", "apache-2.0"]) == 0
    for path in target.iterdir():
        content = path.read_bytes()
        for place in (tmp_path.parent, runs[method].parent, Path.home(), "/tmp/"):
            assert str(place).encode() not in content, path
    card = ModelCard.load(target / "README.md")
    assert (card.data.base_model, card.data.license) == (BASE_ID, "apache-2.0")
    assert card.data.pipeline_tag == "text-classification" and "bayeslora" in card.data.tags
    assert json.loads((target / "run.json").read_text())["files"] == {}


@pytest.mark.parametrize(("option", "said"), [("--base-model-id", "hub id"), ("--license", "name of one")])
def test_a_name_that_the_hub_would_not_take_is_told_before_the_run_is_loaded(
    option: str, said: str, runs: dict[str, Path], tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bayeslora.cli.export.load_run", None)
    target = tmp_path / "out"
    line = refused("export", runs["melora"], "--format", "lora", "--output-dir", target, option, "not a name")
    assert said in line and not target.exists()


@pytest.mark.parametrize(("method", "form"), [("melora", "lora"), ("blora", "packed"), ("blora", "integer")])
def test_a_stranger_loads_an_export_by_its_card(
    method: str,
    form: str,
    runs: dict[str, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target, run = tmp_path / "out", bayeslora.load(runs[method])
    assert (
        main(["export", str(runs[method]), "--format", form, "--output-dir", str(target), "--base-model-id", BASE_ID])
        == 0
    )
    code, as_run = re.findall(r"```python\n(.*?)```", (target / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    batch = dict(run.tokenizer(["a fine film", "a bad one"], return_tensors="pt", padding=True))
    found = subprocess.run(
        [sys.executable, "-c", ALONE, form, code.replace(BASE_ID, run.info.model), json.dumps(
            {name: value.tolist() for name, value in batch.items()}
        )],
        cwd=target, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    with torch.no_grad():
        expected = run.model(**batch).logits
    tolerance = 0.05 if form == "integer" else 1e-4  # whose other layers have 8 bits
    torch.testing.assert_close(torch.tensor(json.loads(found.stdout)), expected, atol=tolerance, rtol=0)
    for path in target.glob("*.json"):  # instead of the hub
        path.write_text(path.read_text(encoding="utf-8").replace(BASE_ID, run.info.model), encoding="utf-8")
    monkeypatch.chdir(target)
    names: dict[str, Any] = {}
    exec(as_run, names)
    assert (
        names["run"].predict(["a fine film", "a bad one"]).labels == run.predict(["a fine film", "a bad one"]).labels
    )


def test_an_export_may_go_without_its_tokenizer(
    runs: dict[str, Path], tmp_path: Path, refused: Refused, capfd: pytest.CaptureFixture[str]
) -> None:
    target, command = tmp_path / "out", ["export", str(runs["melora"]), "--no-tokenizer", "--format"]
    assert main([*command, "lora", "--output-dir", str(target)]) == 0
    assert not list(target.glob("tokenizer*")) and (target / "run.json").is_file()
    line = refused(*command, "onnx", "--output-dir", tmp_path / "graph")
    assert "--no-tokenizer is given with --format onnx, but needs --format lora or merged" in line
