"""Draws of a posterior as plain LoRA adapters: an ensemble for programs that know nothing of posteriors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

import bayeslora
from bayeslora import BayesLoraError, BLoraConfig, export, predict
from bayeslora.cli.main import main
from tests.conftest import build_tiny_llama
from tests.examples.finished_run import make_run
from tests.prediction.models import TARGETS, classifier, inputs, noisy
from tests.processes import run_code

BATCH = inputs()


def of(model: nn.Module, folder: Path) -> Tensor:
    """Probabilities of a plain LoRA adapter."""
    plain = PeftModel.from_pretrained(model, folder).eval()
    assert type(plain.peft_config["default"]) is LoraConfig
    with torch.no_grad():
        return torch.softmax(plain(**BATCH).logits.double(), dim=-1)


@pytest.mark.parametrize(
    ("family", "method", "options"),
    [
        ("bert", "melora", {}),
        ("llama", "melora", {"core": "diagonal", "use_rslora": True}),
        ("llama", "blob", {"alpha_pattern": {"v_proj": 5}}),
        ("gpt2", "blob", {}),
    ],
)
def test_their_mean_is_what_predict_gives(family: str, method: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = noisy(classifier(family), TARGETS[family], method, task_type="SEQ_CLS", **options)
    result = export(model, tmp_path, draws=3, seed=7)
    assert result["draws"] == 3 and result["max_output_error"] < 1e-5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["draw-0", "draw-1", "draw-2"]
    expected = predict(model, BATCH, samples=3, seed=7, per_sample=True)
    found = torch.stack([of(classifier(family), tmp_path / f"draw-{draw}") for draw in range(3)])
    assert expected.sample_probabilities is not None and expected.sample_probabilities.std(dim=0).max() > 1e-3
    torch.testing.assert_close(found, expected.sample_probabilities, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.mean(dim=0), expected.probabilities, atol=1e-5, rtol=0)


def test_a_draw_depends_on_seed_and_number_alone(tmp_path: Path) -> None:
    model = noisy(classifier("bert"), ["query"])
    for name, draws, seed in (("two", 2, 1), ("one", 1, 1), ("other", 1, 2)):
        export(model, tmp_path / name, draws=draws, seed=seed)
    two, second, one, other = (
        load_file(tmp_path / folder / "adapter_model.safetensors")
        for folder in ("two/draw-0", "two/draw-1", "one/draw-0", "other/draw-0")
    )
    assert all(torch.equal(two[key], one[key]) for key in two)
    for another in (second, other):
        assert all(not torch.equal(two[key], another[key]) for key in two if "lora_A" in key)
        assert all(torch.equal(two[key], another[key]) for key in two if "lora_A" not in key)


def test_a_process_without_the_package_computes_the_ensemble(tmp_path: Path) -> None:
    """In the uniform form, at one rank, with the package's import made impossible."""
    config = bayeslora.MeLoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj", "up_proj"], init_weights=False, task_type="CAUSAL_LM",
        initial_std=0.5,
    )  # fmt: skip
    model = get_peft_model(build_tiny_llama(), config).eval()
    build_tiny_llama().save_pretrained(tmp_path / "base")
    export(model, tmp_path / "out", draws=2, seed=3, uniform=True)
    batch = {"input_ids": torch.arange(5, 17).view(2, 6)}
    last = predict(model, batch, samples=2, seed=3, logits=lambda m, b: m(input_ids=b["input_ids"]).logits[:, -1])
    torch.save({"x": batch["input_ids"], "y": last.probabilities}, tmp_path / "outputs.pt")
    code = """
import sys
sys.modules["bayeslora"] = None  # any import of it raises
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
saved, found = torch.load(folder + "/outputs.pt"), []
for draw in ("draw-0", "draw-1"):
    base = AutoModelForCausalLM.from_pretrained(folder + "/base")
    model = PeftModel.from_pretrained(base, folder + "/out/" + draw).eval()
    with torch.no_grad():
        found.append(model(input_ids=saved["x"]).logits[:, -1].double().softmax(-1))
assert not any(name.startswith("bayeslora.") for name in sys.modules)
print("draws apart", (found[0] - found[1]).abs().max().item())
print("largest difference", (sum(found) / 2 - saved["y"]).abs().max().item())
"""
    lines = run_code(code, tmp_path, str(tmp_path)).splitlines()
    assert float(lines[0].rpartition(" ")[2]) > 1e-4
    assert float(lines[1].rpartition(" ")[2]) < 1e-5


def ivon_trained(config: Any) -> tuple[nn.Module, bayeslora.IVON]:
    model = get_peft_model(classifier("bert"), config)
    optimizer = bayeslora.IVON(bayeslora.parameter_groups(model, lr=0.1, weight_decay=1e-3), lr=0.1, ess=2.0)
    optimizer.sample()
    model(**BATCH, labels=torch.tensor([0, 1, 2, 1])).loss.backward()
    optimizer.step()
    return model.eval(), optimizer


@pytest.mark.parametrize("method", ["lora", "blora"])
def test_a_deterministic_adapter_is_drawn_from_ivons_posterior(method: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"r": 2, "target_modules": ["query"], "task_type": "SEQ_CLS"}
    config = LoraConfig(**options) if method == "lora" else BLoraConfig(**options, mode="ra")
    model, optimizer = ivon_trained(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export(model, tmp_path, draws=2, seed=5, posterior=optimizer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    expected = predict(model, BATCH, samples=2, seed=5, optimizer=optimizer, per_sample=True)
    assert expected.sample_probabilities is not None and expected.sample_probabilities.std(dim=0).max() > 1e-3
    found = torch.stack([of(classifier("bert"), tmp_path / f"draw-{draw}") for draw in range(2)])
    torch.testing.assert_close(found, expected.sample_probabilities, atol=1e-5, rtol=0)


def lines(folder: Path, rows: Path, *options: str) -> Tensor:
    """Probabilities as the command `predict` writes them."""
    target = rows.with_name(f"{folder.name}.out.jsonl")
    assert main(["predict", str(folder), "--input", str(rows), "--output", str(target), *options]) == 0
    return torch.tensor([list(json.loads(line)["probabilities"].values()) for line in target.read_text().splitlines()])


def test_the_command_writes_runs_that_average_to_the_sampled_prediction(
    tmp_path: Path, tiny_bert_folder: Path
) -> None:
    source, out = make_run(tmp_path / "run", tiny_bert_folder), tmp_path / "out"
    options = ["--format", "lora", "--draws", "2", "--seed", "4", "--output-dir", str(out)]
    assert main(["export", str(source), *options]) == 0
    rows = tmp_path / "run.jsonl"
    found = torch.stack([lines(out / name, rows) for name in ("draw-0", "draw-1")])
    assert (found[0] - found[1]).abs().max() > 1e-3
    expected = lines(source, rows, "--samples", "2", "--seed", "4")
    torch.testing.assert_close(found.mean(dim=0), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["lora", "--seed", "4"], "--seed is 4, but nothing is drawn"),
        (["packed", "--draws", "4"], "--draws is given with --format packed, but needs --format lora"),
        (["packed", "--uniform"], "--uniform is given with --format packed, but needs --format lora"),
    ],
)
def test_the_command_refuses_options_that_would_do_nothing(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(tmp_path), "--output-dir", str(tmp_path / "out"), "--format", *options]) == 2
    assert message in capsys.readouterr().err


def test_bad_requests_are_one_sentence(tmp_path: Path) -> None:
    deterministic = get_peft_model(classifier("bert"), BLoraConfig(r=2, target_modules=["query"]))
    with pytest.raises(BayesLoraError, match="draws is 3, but the adapter is deterministic"):
        export(deterministic, tmp_path / "out", draws=3)
    stochastic = noisy(classifier("bert"), ["query"])
    for draws in (0, -1, 1.5, True):
        with pytest.raises(BayesLoraError, match="a whole number of at least 1"):
            export(stochastic, tmp_path / "out", draws=draws)
    with pytest.raises(BayesLoraError, match="the seed is 'x'"):
        export(stochastic, tmp_path / "out", draws=1, seed="x")
    with pytest.raises(BayesLoraError, match="dict was given, but a posterior over the weights is needed"):
        export(stochastic, tmp_path / "out", draws=1, posterior={})
    stochastic.merge_adapter()
    with pytest.raises(BayesLoraError, match="merged"):
        export(stochastic, tmp_path / "out", draws=1)
    assert not (tmp_path / "out").exists()
