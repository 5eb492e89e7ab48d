"""`bayeslora plan`: from a folder or a bare config.json, the numbers of metrics.json before there is a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bayeslora.cli.main import main
from bayeslora.cli.plan import size

Refused = Callable[..., str]


@pytest.fixture
def llama_config(tmp_path: Path) -> Path:
    """A small Llama as a bare config.json: no architectures, no weights, no tokenizer."""
    values = {"model_type": "llama", "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**values, "num_hidden_layers": 2, "num_attention_heads": 4}))
    return path


def planned(capfd: pytest.CaptureFixture[str], *argv: object) -> dict[str, Any]:
    capfd.readouterr()
    assert main(["plan", *(str(argument) for argument in argv), "--tokens", "8", "--json"]) == 0
    return dict(json.loads(capfd.readouterr().out))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_plan_has_the_numbers_that_the_run_then_has(
    runs: dict[str, Path], tiny_bert_folder: Path, capfd: pytest.CaptureFixture[str], method: str
) -> None:
    metrics = json.loads((runs[method] / "metrics.json").read_text())
    capfd.readouterr()
    arguments = ["--model", str(tiny_bert_folder), "--method", method, "--tokens", "128", "--json"]
    assert main(["plan", *arguments]) == 0
    plan = json.loads(capfd.readouterr().out)
    for key in ("method", "model", "parameters", "relative_bops", "layers"):
        assert plan[key] == metrics[key], key
    weights = runs[method] / ("model.safetensors" if method == "full" else "adapter_model.safetensors")
    assert plan["bytes"]["file"] == weights.stat().st_size


def test_options_of_the_method_change_the_plan(llama_config: Path, capfd: pytest.CaptureFixture[str]) -> None:
    targets = "q_proj,v_proj,lm_head"
    full = planned(capfd, "--model", llama_config, "--method", "melora", "--target-modules", targets, "--r", 4)
    diagonal = planned(
        capfd, "--model", llama_config, "--method=melora", "--target_modules", targets, "--r=4", "--core", "diagonal"
    )
    pairs = 4 * (4 * (32 + 32) + 4 * 4) + 4 * (32 + 50) + 4 * 4
    assert full["parameters"]["trainable"] == pairs
    assert diagonal["parameters"]["trainable"] == pairs - 5 * (4 * 4 - 4)
    assert (full["task_type"], full["class"]) == ("CAUSAL_LM", "LlamaForCausalLM")


def test_a_task_brings_its_head(llama_config: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", llama_config, "--method", "lora", "--task-type", "seq_cls", "--num-labels", 5]
    plan = planned(capfd, *arguments)
    assert plan["parameters"]["trainable"] == plan["parameters"]["adapter"] + 5 * 32


def test_the_table_names_what_it_counts(llama_config: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    assert main(["plan", "--model", str(llama_config), "--method", "blora", "--batch-size", "2", "--tokens", "8"]) == 0
    text = capfd.readouterr().out
    assert "rank 8 on 6 layers: q_proj, k_proj, v_proj" in text
    assert "memory for a step on 2 x 8 tokens" in text
    for name in ("trainable", "activations, about", "on disk", "in 16 bits", "relative to LoRA r=16"):
        assert name in text


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, "unknown"), (0, "0 bytes"), (999, "999 bytes"), (17_949_512, "17.95 MB"), (113_478_150_156, "113 GB")],
)
def test_sizes_are_decimal(count: int | None, text: str) -> None:
    assert size(count) == text


def test_models_that_are_none(refused: Refused, tmp_path: Path) -> None:
    assert "--model" in refused("plan")
    assert "is not a model" in refused("plan", "--model", tmp_path / "absent")
    assert "does not exist" in refused("plan", "--model", tmp_path / "absent.json")
    (tmp_path / "hollow").mkdir()
    assert "lacks config.json" in refused("plan", "--model", tmp_path / "hollow")
    for name, content, said in (
        ("words.json", "not JSON", "is not valid JSON"),
        ("list.json", "[1]", "but must hold an object"),
        ("adapter.json", '{"peft_type": "LORA"}', "lacks model_type"),
        ("unknown.json", '{"model_type": "no_such_model"}', "cannot read"),
        ("broken.json", '{"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}', "transformers cannot"),
        ("weights.bin", "", "must be a configuration"),
    ):
        (tmp_path / name).write_text(content)
        assert said in refused("plan", "--model", tmp_path / name), name


def test_options_that_are_wrong(refused: Refused, llama_config: Path) -> None:
    def plan(*argv: object) -> str:
        return refused("plan", "--model", llama_config, *argv)

    assert "did you mean melora" in plan("--method", "mellora")
    assert "'vallue', but matches nothing" in plan("--method", "lora", "--target-modules", "q_proj,vallue")
    assert "matches nothing" in plan("--method", "lora", "--target-modules", "no.*match")
    assert "--r is 0" in plan("--r", 0)
    assert "--r is -1" in plan("--r", -1)
    assert "--tokens is 0" in plan("--tokens", 0)
    assert "--batch-size is 'many'" in plan("--batch-size", "many")
    assert "unknown option --lora-alhpa, did you mean --lora-alpha" in plan("--lora-alhpa", 4)
    assert "--core is given, but belongs to --method melora" in plan("--method", "lora", "--core", "full")
    assert "did you mean seq_cls" in plan("--task-type", "seq_clss")
    assert "--mode" in plan("--method", "blora", "--mode", "qq")
    assert "--target-bops is 2.0, but must be between 0 and 1" in plan("--target-bops", 2)
    assert "--dtype is 'int3'" in plan("--dtype", "int3")
    assert "--device is 'tpu'" in plan("--device", "tpu")
