"""Cards of exports of any model, and names for their base and license."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from bayeslora import BayesLoraError, BLoraConfig, MeLoraConfig, export
from bayeslora.data import packaged_model
from bayeslora.data.packaged import ENCODER_PACKAGE
from bayeslora.model_card import check_license
from tests.conftest import build_tiny_bert, build_tiny_tokenizer
from tests.methods.reference import D_IN, FROZEN, Tiny, seeded, tiny_model


def test_a_card_of_a_model_that_is_not_of_transformers_says_what_to_give(tmp_path: Path) -> None:
    model = tiny_model(FROZEN).eval()
    export(model, tmp_path, format="packed")
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert "# base: the Tiny that was adapted" in code
    names = {"base": seeded(Tiny)}
    exec(code.replace('"."', repr(str(tmp_path))), names)
    x = torch.randn(3, D_IN, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(names["model"](x), model(x), atol=1e-6, rtol=0)


def test_the_name_of_the_base_is_for_the_files_alone(tmp_path: Path) -> None:
    config = MeLoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    model = get_peft_model(build_tiny_bert(), config).eval()
    before = model.peft_config["default"].base_model_name_or_path
    export(model, tmp_path, format="lora", draws=2, base_model_id="someone/some-base")
    assert model.peft_config["default"].base_model_name_or_path == before
    for folder in (tmp_path / "draw-0", tmp_path / "draw-1"):
        written = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        assert written["base_model_name_or_path"] == "someone/some-base"
        assert "# Plain LoRA for `someone/some-base`" in (folder / "README.md").read_text(encoding="utf-8")
    assert not (tmp_path / "README.md").exists()


@pytest.mark.parametrize("form", ["lora", "merged", "integer", "onnx"])
def test_a_card_says_that_its_error_is_that_of_dummy_inputs(form: str, tmp_path: Path) -> None:
    if form == "onnx":
        pytest.importorskip("onnxruntime")
    config = BLoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    model = get_peft_model(build_tiny_bert(), config).eval()
    rows = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 10]]), "attention_mask": torch.ones(2, 3, dtype=torch.int64)}
    options = {"tokenizer": build_tiny_tokenizer()} if form == "onnx" else {}
    for folder, batch in (("without", None), ("with", rows)):
        measured = export(model, tmp_path / folder, format=form, batch=batch, **options)
        card = (tmp_path / folder / "README.md").read_text(encoding="utf-8")
        assert (batch is None) == ("dummy_inputs" in measured) == ("dummy inputs, not on your data" in card)
        assert card.count("Measured ") == card.count("% of the answers change") == 1
        assert measured["divergence"] >= 0


@pytest.mark.parametrize("form", ["lora", "merged"])
def test_a_model_of_images_has_no_dummy_inputs(form: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    base = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4))
    config = MeLoraConfig(r=2, target_modules=["q_proj"], init_weights=False)
    model = get_peft_model(base, config).eval()
    assert export(model, tmp_path / "without", format=form)["max_output_error"] is None
    assert "was not measured" in (tmp_path / "without" / "README.md").read_text(encoding="utf-8")
    images = {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
    assert export(model, tmp_path / "with", format=form, batch=images)["max_output_error"] < 1e-5


def test_the_error_of_an_encoder_decoder_is_measured_on_a_training_batch(tmp_path: Path) -> None:
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 30}
    base = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    model = get_peft_model(base, MeLoraConfig(r=2, target_modules=["q"], init_weights=False)).eval()
    generator = torch.Generator().manual_seed(0)
    batch = {name: torch.randint(2, 30, (2, 5), generator=generator) for name in ("input_ids", "labels")}
    measured = export(model, tmp_path, format="merged", batch=batch)
    assert measured["max_output_error"] < 1e-5
    assert measured["max_output"] == pytest.approx(float(model(**batch).logits.abs().max()), rel=1e-5)


@pytest.mark.parametrize("name", ["", "a/b/c", "a b", "\udcff", "-a", "/home/me/model", "x" * 200])
def test_what_is_no_name_on_the_hub_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(BayesLoraError, match="but must be a hub id: give one such as"):
        export(tiny_model(FROZEN), tmp_path / "out", format="packed", base_model_id=name)
    assert not (tmp_path / "out").exists()
    if name.strip("x"):
        with pytest.raises(BayesLoraError, match="must be the hub's name of one: give one such as apache-2.0"):
            check_license(name)


@pytest.mark.parametrize("form", ["lora", "merged", "packed", "integer"])
def test_a_tokenizer_lies_beside_a_model_exported_from_python(form: str, tmp_path: Path) -> None:
    config = MeLoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    if form == "integer":
        config = BLoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    model = get_peft_model(build_tiny_bert(), config).eval()
    export(model, tmp_path / "one", format=form, tokenizer=build_tiny_tokenizer())
    text = "w1 w2"
    found = AutoTokenizer.from_pretrained(tmp_path / "one")(text)["input_ids"]
    assert found == build_tiny_tokenizer()(text)["input_ids"]
    if form == "lora":
        export(model, tmp_path / "two", format=form, tokenizer=build_tiny_tokenizer(), draws=2)
        assert all((tmp_path / "two" / f"draw-{k}" / "tokenizer.json").is_file() for k in range(2))
    if form == "merged":
        card = (tmp_path / "one" / "README.md").read_text(encoding="utf-8")
        (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        names: dict[str, Any] = {}
        exec(code.replace('"."', repr(str(tmp_path / "one"))), names)
        ids = torch.tensor([[5, 6, 7]])
        torch.testing.assert_close(names["model"].eval()(ids).logits, model(input_ids=ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", ["lora", "packed"])
def test_the_card_finds_a_base_that_pip_has_installed(form: str, tmp_path: Path) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(packaged_model("minilm"), num_labels=3)
    model = get_peft_model(base, MeLoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")).eval()
    ids = torch.tensor([[5, 6, 7]])
    expected = model(input_ids=ids).logits
    export(model, tmp_path, format=form)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f"`{ENCODER_PACKAGE}`" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace('"."', repr(str(tmp_path))), names)
    torch.testing.assert_close(names["model"](input_ids=ids).logits, expected, atol=1e-5, rtol=0)
