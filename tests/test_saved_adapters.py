"""What version 0.1.0 saved still loads, and computes what it computed then.

`fixtures/adapters/` holds adapters of every method, exports and whole runs, and beside them the outputs that they had
when they were written; `fixtures/make_adapters.py` is the script that wrote them, once. Seeds draw other numbers since
then, for noise is a function of its place now: `expected/draws/` holds what the same files give with these, and
`fixtures/make_draws.py` wrote it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

import bayeslora
from bayeslora.cli.main import main

FOLDER = Path(__file__).parent / "fixtures" / "adapters"
RUNS = sorted(path.parent.name for path in FOLDER.glob("*/run.json"))
ADAPTERS = sorted({path.parent.name for path in FOLDER.glob("*/adapter_config.json")} - set(RUNS))
EXPORTS = sorted(path.parent.name for path in FOLDER.glob("*/integer_model.safetensors"))
DRAWS = FOLDER / "expected" / "draws"
STOCHASTIC = sorted(path.stem for path in DRAWS.glob("*.safetensors"))
TOLERANCE = 1e-6
IVON_TOLERANCE = 5e-6
"""Of draws of all weights: processors differ in the last bits of their noise."""


def base() -> nn.Module:
    return AutoModelForSequenceClassification.from_pretrained(FOLDER / "base")


def loaded(name: str) -> nn.Module:
    return PeftModel.from_pretrained(base(), FOLDER / name).eval()


def inputs() -> dict[str, Tensor]:
    return load_file(FOLDER / "inputs.safetensors")


def expected(name: str) -> dict[str, Tensor]:
    return load_file(FOLDER / "expected" / f"{name}.safetensors")


def assert_close(found: Tensor, wanted: Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)


def described(model: nn.Module) -> list[dict[str, Any]]:
    return [layer.to_dict() for layer in bayeslora.describe(model)]


def test_every_method_has_two_adapters_or_more() -> None:
    kinds = [json.loads((FOLDER / name / "adapter_config.json").read_text())["peft_type"] for name in ADAPTERS]
    for method in (*bayeslora.METHODS, "lora"):
        assert kinds.count(method.upper()) >= 2, method
    assert len(STOCHASTIC) == 7 and len(EXPORTS) == 2 and len(RUNS) == 2


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_has_the_logits_and_the_description_that_it_was_saved_with(name: str) -> None:
    model, wanted = loaded(name), expected(name)
    with torch.no_grad():
        assert_close(model(**inputs()).logits, wanted["logits"])
    assert_close(bayeslora.predict(model, inputs()).logits.float(), wanted["logits"])
    assert described(model) == json.loads((FOLDER / "expected" / f"{name}.json").read_text())


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_is_saved_again_as_it_was(name: str, tmp_path: Path) -> None:
    loaded(name).save_pretrained(tmp_path)
    if name == "packed":  # which is saved unpacked
        old = bayeslora.load_packed(FOLDER / name)
    else:
        old = load_file(FOLDER / name / "adapter_model.safetensors")
    # A factor of a penalty that nothing reads any more.
    old = {key: tensor for key, tensor in old.items() if not key.endswith("blora_progress.penalty_scale")}
    new = load_file(tmp_path / "adapter_model.safetensors")
    assert new.keys() == old.keys()
    for key, tensor in old.items():
        assert torch.equal(new[key], tensor), key
    before, after = (json.loads((folder / "adapter_config.json").read_text()) for folder in (FOLDER / name, tmp_path))
    if before["peft_type"] != "LORA":  # whose fields are PEFT's to change
        assert before.keys() <= after.keys()
    # PEFT writes sets in any order and names the classifier once more each time.
    for key in ("target_modules", "modules_to_save"):
        assert set(after[key]) == set(before[key])
    same = before.keys() & after.keys() - {
        "target_modules",
        "modules_to_save",
        "peft_version",
        "base_model_name_or_path",
    }
    assert {key: after[key] for key in same} == {key: before[key] for key in same}


@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_seed_draws_the_weights_that_it_drew_then(name: str) -> None:
    model, wanted, tolerance = loaded(name), load_file(DRAWS / f"{name}.safetensors"), TOLERANCE
    if (FOLDER / name / "posterior.safetensors").exists():
        tolerance = IVON_TOLERANCE
        prediction = bayeslora.predict(bayeslora.load_posterior(model, FOLDER / name), inputs(), samples=3, seed=0)
    else:
        prediction = bayeslora.predict(model, inputs(), samples=3, seed=0)
    assert_close(prediction.probabilities, wanted["probabilities"], tolerance)
    assert_close(prediction.mutual_information, wanted["mutual_information"], tolerance)
    assert wanted["mutual_information"].max() > 1e-4  # the draws differ
    other = bayeslora.predict(model, inputs()).probabilities
    assert (other - wanted["probabilities"]).abs().max() > 1e-4  # and are not the mean


@pytest.mark.parametrize(("name", "rank"), [("dylora-plain", 2), ("dylora-frozen", 5)])
def test_a_lower_rank_of_dylora_has_the_logits_that_it_had_then(name: str, rank: int) -> None:
    model, wanted = loaded(name), expected(name)
    with bayeslora.at_rank(model, rank), torch.no_grad():
        assert_close(model(**inputs()).logits, wanted[f"logits_at_rank_{rank}"])


def test_a_packed_adapter_is_the_state_of_the_model_that_loads_it() -> None:
    state = bayeslora.load_packed(FOLDER / "packed")
    held = get_peft_model_state_dict(loaded("packed"))
    assert state.keys() == held.keys()
    for key, tensor in held.items():
        assert torch.equal(state[key], tensor), key


@pytest.mark.parametrize("name", EXPORTS)
def test_an_integer_model_has_the_logits_that_it_was_saved_with(name: str) -> None:
    with torch.no_grad():
        assert_close(bayeslora.load_integer(FOLDER / name)(**inputs()).logits, expected(name)["logits"])


@pytest.mark.parametrize("form", ["packed", "integer"])
def test_an_adapter_is_exported_to_the_file_that_it_was_exported_to_then(form: str, tmp_path: Path) -> None:
    options = {} if form == "packed" else {"batch": inputs(), "calibration": [inputs()]}
    bayeslora.export(loaded("blora-frozen"), tmp_path, format=form, **options)
    file = {"packed": "adapter_model.safetensors", "integer": "integer_model.safetensors"}[form]
    new, old = load_file(tmp_path / file), load_file(FOLDER / form / file)
    assert new.keys() == old.keys()
    for key, tensor in old.items():
        torch.testing.assert_close(new[key], tensor, rtol=0, atol=TOLERANCE)


def command(*argv: str) -> None:
    assert main([*argv]) == 0


@pytest.mark.parametrize("name", RUNS)
def test_a_run_has_the_scores_that_it_ended_with(
    name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(FOLDER)  # to which the run's model and rows are relative
    metrics = json.loads(Path(name, "metrics.json").read_text())
    command("evaluate", name, "--samples", str(metrics["samples"]), "--json")
    scores = json.loads(capfd.readouterr().out)["scores"]
    wanted = json.loads((DRAWS / "scores.json").read_text()) if metrics["samples"] else metrics["scores"]
    assert scores == pytest.approx(wanted, rel=0, abs=TOLERANCE)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_predicts_what_it_predicted_then(name: str, tmp_path: Path) -> None:
    samples = ["--samples", "3" if "melora" in name else "0"]
    files = ["--input", str(FOLDER / "dev.jsonl"), "--output", str(tmp_path / "rows.jsonl")]
    command("predict", str(FOLDER / name), "--model", str(FOLDER / "base"), *files, *samples)
    found = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    file = DRAWS / f"{name}.jsonl" if "melora" in name else FOLDER / "expected" / f"{name}.jsonl"
    wanted = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["label"] for row in found] == [row["label"] for row in wanted]
    for row in found:
        row["probabilities"] = list(row["probabilities"].values())
    for key in ("probabilities", "entropy", "mutual_information"):
        assert_close(torch.tensor([row[key] for row in found]), torch.tensor([row[key] for row in wanted]))


def test_runs_are_compared(tmp_path: Path) -> None:
    command("compare", *(str(FOLDER / name) for name in RUNS), "--output-dir", str(tmp_path / "table"))
    table = (tmp_path / "table" / "table.md").read_text()
    assert "B-LoRA" in table and "Me-LoRA" in table


def test_the_options_of_a_run_start_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER)
    out = tmp_path / "again"
    # The file is from before variances were in closed form by default.
    command("train", "--config", "run-melora/config.yaml", "--variance", "learned", "--output-dir", str(out))
    again, then = (json.loads((folder / "metrics.json").read_text()) for folder in (out, FOLDER / "run-melora"))
    assert then.keys() <= again.keys()
    assert again["layers"] == then["layers"] and again["parameters"] == then["parameters"]
    # Since then a seed starts where LoRA starts with it, so scores are compared with those of a run from now.
    command("train", "--config", str(out / "config.yaml"), "--output-dir", str(tmp_path / "third"))
    third = json.loads((tmp_path / "third" / "metrics.json").read_text())
    assert third["scores"] == pytest.approx(again["scores"], abs=1e-6)
    assert third["scores"].keys() == then["scores"].keys()
