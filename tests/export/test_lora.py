"""Export as plain LoRA: a process that knows only PEFT computes the same, or what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from bayeslora import BayesLoraError, BLoraConfig, export
from tests.conftest import build_tiny_bert, build_tiny_gpt2
from tests.methods.reference import D_IN, FROZEN, LEARN, RANK, WARM_UP, Tiny, layers_of, randomize, seeded, set_widths
from tests.methods.reference import tiny_model as make_tiny
from tests.processes import run_code

X = torch.randn(3, 5, D_IN, generator=torch.Generator().manual_seed(7))
TOKENS = torch.arange(24).view(2, 12)


def _plain(folder: Path, kind: str = "linear") -> nn.Module:
    model = PeftModel.from_pretrained(seeded(lambda: Tiny(kind)), folder).eval()
    assert type(model.peft_config["default"]) is LoraConfig
    return model


def _adapted(base: nn.Module, targets: list[str], **options: Any) -> nn.Module:
    settings = {"r": RANK, "lora_alpha": 8, "target_modules": targets, "init_weights": False, **options}
    model = get_peft_model(base, BLoraConfig(**settings))
    generator = torch.Generator().manual_seed(3)
    for layer in layers_of(model):
        randomize(layer, generator, FROZEN)
    return model.eval()


@torch.no_grad()
def _uneven(model: nn.Module) -> None:
    """A full rank here, a hole there, so that ranks differ between layers."""
    for index, layer in enumerate(layers_of(model)):
        layer.blora_rank["default"].logits.copy_(torch.tensor([9.0] * 3 + [-9.0 if index % 2 else 9.0]))
        if index % 2:
            layer.blora_E["default"][1] = 0.0


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("phase", [WARM_UP, LEARN, FROZEN])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"lora_alpha": 3, "alpha_pattern": {"second": 20}}])
def test_without_quantizers_it_is_the_same_function(options: Any, phase: Any, kind: str, tmp_path: Path) -> None:
    model = make_tiny(phase, kind, mode="ra", **options).eval()
    _uneven(model)
    result = export(model, tmp_path)
    assert result["ranks"] == {"first": 4, "second": 2}
    torch.testing.assert_close(_plain(tmp_path, kind)(X), model(X), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("phase", [LEARN, FROZEN])
def test_quantized_factors_alone_are_exact(phase: Any, tmp_path: Path) -> None:
    """With base weight and activations at 32 bits the quantized A, E and B are just another A and B."""
    model = make_tiny(phase).eval()
    for layer in layers_of(model):
        set_widths(layer, weight=32, A=2, E=4, B=8, A_out=32, E_out=32, out=32)
    export(model, tmp_path)
    torch.testing.assert_close(_plain(tmp_path)(X), model(X), atol=1e-5, rtol=1e-5)
    b = load_file(tmp_path / "adapter_model.safetensors")["base_model.model.first.lora_B.weight"]
    step = 2 * layers_of(model)[0].blora_quantizers["default"].ranges()[3] / 255
    torch.testing.assert_close(b / step, (b / step).round(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("mode", ["ra", "q+ra", "q"])
def test_the_reported_error_is_the_one_a_plain_lora_makes(mode: str, tmp_path: Path) -> None:
    model = _adapted(build_tiny_bert(), ["query", "key", "value"], mode=mode)
    batch = {"input_ids": TOKENS}
    result = export(model, tmp_path, batch=batch, allow_error=True)
    plain = PeftModel.from_pretrained(build_tiny_bert(), tmp_path).eval()
    with torch.no_grad():
        ours, theirs = model(**batch).logits, plain(**batch).logits
    actual = (ours - theirs).abs().max().item()
    assert result["max_output_error"] == pytest.approx(actual, abs=1e-6)
    assert result["max_output"] == pytest.approx(ours.abs().max().item(), abs=1e-6)
    assert (actual < 1e-5) == (mode == "ra")


@pytest.mark.parametrize(("kind", "listed"), [("weight", "weight 8"), ("E_out", "E_out 8")])
def test_what_lora_cannot_express_is_refused_by_name(kind: str, listed: str, tmp_path: Path) -> None:
    model = make_tiny(FROZEN).eval()
    widths = dict.fromkeys(("weight", "A_out", "E_out", "out"), 32) | dict.fromkeys("AEB", 4)
    for layer in layers_of(model):
        set_widths(layer, **{**widths, kind: 8})
    with pytest.raises(BayesLoraError, match=rf"first quantizes more .*\({listed} bits\).*allow_error=True"):
        export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_a_batch_the_error_is_measured_on_the_models_own_inputs(tmp_path: Path) -> None:
    model = _adapted(build_tiny_bert(), ["query"])
    result = export(model, tmp_path, allow_error=True)
    plain = PeftModel.from_pretrained(build_tiny_bert(), tmp_path).eval()
    inputs = build_tiny_bert().dummy_inputs
    with torch.no_grad():
        actual = (model(**inputs).logits - plain(**inputs).logits).abs().max().item()
    assert actual > 0 and result["max_output_error"] == pytest.approx(actual, abs=1e-6)


def test_where_there_is_nothing_to_measure_on_it_says_so(tmp_path: Path) -> None:
    result = export(make_tiny(FROZEN), tmp_path, allow_error=True)
    assert result["max_output_error"] is None and result["max_output"] is None


def test_measuring_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = _adapted(build_tiny_bert(), ["query"]).train()
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    export(model, tmp_path, allow_error=True)
    assert model.training and all(layer.training for layer in layers_of(model))
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert not any(layer._forward_hooks for layer in layers_of(model))


def test_a_process_that_knows_only_peft_computes_the_same(tmp_path: Path) -> None:
    """GPT-2, whose weights are stored the other way round; ranks that differ; a rank of 0; a trained head."""
    model = _adapted(
        build_tiny_gpt2(),
        ["c_attn", "c_proj"],
        mode="ra",
        modules_to_save=["ln_f"],
        task_type="CAUSAL_LM",
    )
    _uneven(model)
    with torch.no_grad():
        layers_of(model)[2].blora_E["default"].zero_()
        model.base_model.model.transformer.ln_f.modules_to_save["default"].bias.fill_(0.3)
        expected = model(input_ids=TOKENS).logits
    build_tiny_gpt2().save_pretrained(tmp_path / "base")
    ranks = export(model, tmp_path / "lora")["ranks"]
    assert len(set(ranks.values())) > 2
    torch.save({"x": TOKENS, "y": expected}, tmp_path / "outputs.pt")
    code = """
import sys, warnings
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
warnings.filterwarnings("error", category=UserWarning, module="peft")
folder = sys.argv[1]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder + "/base"), folder + "/lora").eval()
saved = torch.load(folder + "/outputs.pt")
assert not any(name.partition(".")[0] == "bayeslora" for name in sys.modules)
print("largest difference", (model(input_ids=saved["x"]).logits - saved["y"]).abs().max().item())
"""
    assert float(run_code(code, tmp_path, str(tmp_path)).rpartition("difference ")[2]) < 1e-5


def test_the_folder_is_what_peft_writes(tmp_path: Path) -> None:
    model = _adapted(build_tiny_bert(), ["query", "value"], mode="ra", task_type="SEQ_CLS")
    _uneven(model)
    export(model, tmp_path)
    reference = get_peft_model(
        build_tiny_bert(), LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
    )
    reference.save_pretrained(tmp_path / "peft")
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "peft"))
    assert ours.keys() == theirs.keys()
    written, theirs = (
        json.loads((folder / "adapter_config.json").read_text()) for folder in (tmp_path, tmp_path / "peft")
    )
    assert written.keys() == theirs.keys()
    assert written["peft_type"] == "LORA" and written["task_type"] == "SEQ_CLS"
    assert set(written["target_modules"]) == {"query", "value"}
    assert written["inference_mode"] is True


def test_a_trained_head_comes_along(tmp_path: Path) -> None:
    model = _adapted(build_tiny_bert(), ["query"], mode="ra", task_type="SEQ_CLS")
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].bias.copy_(torch.tensor([3.0, -3.0]))
    export(model, tmp_path)
    plain = PeftModel.from_pretrained(build_tiny_bert(), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            plain(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits, atol=1e-5, rtol=1e-5
        )


def test_trained_biases_come_along(tmp_path: Path) -> None:
    model = _adapted(build_tiny_bert(), ["query"], mode="ra", bias="all")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".bias") and p.requires_grad:
                p.add_(torch.linspace(-0.5, 0.5, p.numel()))
        expected = model(input_ids=TOKENS).logits
    export(model, tmp_path)
    plain = PeftModel.from_pretrained(build_tiny_bert(), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=TOKENS).logits, expected, atol=1e-5, rtol=1e-5)


def test_exporting_shrunk_and_unshrunk_gives_one_result(tmp_path: Path) -> None:
    from bayeslora import shrink

    model = make_tiny(FROZEN, mode="ra").eval()
    _uneven(model)
    export(model, tmp_path / "one")
    shrink(model)
    export(model, tmp_path / "two")
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_the_named_adapter_is_exported_and_not_the_active_one(tmp_path: Path) -> None:
    model = make_tiny(FROZEN, mode="ra").eval()
    model.add_adapter("other", BLoraConfig(r=2, target_modules=["first"], mode="ra", init_weights=False))
    export(model, tmp_path, adapter_name="other")
    model.set_adapter("other")
    torch.testing.assert_close(_plain(tmp_path)(X), model(X), atol=1e-5, rtol=1e-5)
    model.set_adapter("default")
    with pytest.raises(BayesLoraError, match="no adapter 'nobody'"):
        export(model, tmp_path, adapter_name="nobody")


def test_the_named_adapters_error_is_measured_whatever_is_active(tmp_path: Path) -> None:
    model = _adapted(build_tiny_bert(), ["query"], mode="ra")
    model.add_adapter("other", BLoraConfig(r=2, target_modules=["query"], mode="ra", init_weights=False))
    model.set_adapter("default")
    result = export(model, tmp_path, adapter_name="other")
    assert result["max_output_error"] < 1e-5
    assert model.active_adapter == "default"


def test_bad_requests_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BayesLoraError, match="format is 'tflite', but must be one of .*lora"):
        export(make_tiny(), tmp_path, format="tflite")
    with pytest.raises(BayesLoraError, match="has no adapter of bayeslora"):
        export(Tiny(), tmp_path)
    with pytest.raises(BayesLoraError, match="use its folder, or export it as merged or onnx"):
        export(get_peft_model(Tiny(), LoraConfig(target_modules=["first"])), tmp_path)
