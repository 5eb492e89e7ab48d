"""Merged models compute what base and adapter compute, or are refused, or say by how much they do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    GenerationConfig,
    OPTConfig,
    OPTForCausalLM,
)

from bayeslora import AdaLoraConfig, BayesLoraError, BLoraConfig, MeLoraConfig, export
from tests.conftest import build_tiny_bert, build_tiny_gpt2, build_tiny_llama
from tests.methods.reference import FROZEN, RANK, layers_of, randomize, set_widths, tiny_model

TOKENS = torch.arange(24).view(2, 12)
BATCH = {"input_ids": TOKENS}
WIDE = {"A_out": 32, "E_out": 32, "out": 32}


def _blora(base: nn.Module, targets: list[str], **options: Any) -> nn.Module:
    model = get_peft_model(
        base, BLoraConfig(**{"r": RANK, "target_modules": targets, "init_weights": False, **options})
    )
    generator = torch.Generator().manual_seed(3)
    for layer in layers_of(model):
        randomize(layer, generator, FROZEN)
        if options.get("mode") != "ra":
            set_widths(layer, A=2, E=4, B=8, **WIDE)
            if layer.has_plain_weight:
                set_widths(layer, weight=8)
    return model.eval()


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=TOKENS).logits.float()


@pytest.mark.parametrize("mode", ["ra", "q+ra"])
def test_where_no_activation_is_quantized_the_merge_is_exact(mode: str, tmp_path: Path) -> None:
    """The base weight at 8 bits is part of what is merged; a trained head comes along."""
    model = _blora(build_tiny_bert(), ["query", "value"], mode=mode, task_type="SEQ_CLS")
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].bias.copy_(torch.tensor([3.0, -3.0]))
    expected = _logits(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    result = export(model, tmp_path, format="merged", batch=BATCH)
    assert result["inexact"] is None and result["max_output_error"] < 1e-5
    torch.testing.assert_close(
        _logits(AutoModelForSequenceClassification.from_pretrained(tmp_path)), expected, atol=1e-5, rtol=0
    )
    assert (expected - _logits(build_tiny_bert())).abs().max() > 0.1
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(_logits(model), expected) and not layers_of(model)[0].merged
    card = (tmp_path / "README.md").read_text()
    assert "The merge is exact" in card and f"{result['max_output_error']:.3g}" in card and "- blora" in card


@pytest.mark.parametrize("method", ["melora", "adalora"])
def test_other_methods_and_transposed_weights_merge_at_the_mean(method: str, tmp_path: Path) -> None:
    if method == "melora":
        config = MeLoraConfig(r=RANK, target_modules=["c_attn"], init_weights=False, num_examples=9)
    else:
        config = AdaLoraConfig(init_r=RANK, target_r=2, target_modules=["c_attn"], init_weights=False)
    model = get_peft_model(build_tiny_gpt2(), config)
    expected = _logits(model)
    result = export(model.train(), tmp_path, format="merged")
    assert result["max_output_error"] < 1e-5 and model.training
    torch.testing.assert_close(_logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected, atol=1e-5, rtol=0)


def test_quantized_activations_are_refused_or_their_error_is_the_measured_one(tmp_path: Path) -> None:
    model = _blora(build_tiny_llama(), ["q_proj", "v_proj"])
    set_widths(layers_of(model)[1], out=4)
    with pytest.raises(BayesLoraError, match=r"quantizes activations \(out 4 bits\).*allow_error=True"):
        export(model, tmp_path / "out", format="merged")
    assert not (tmp_path / "out").exists()
    result = export(model, tmp_path / "out", format="merged", batch=BATCH, allow_error=True)
    actual = (_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) - _logits(model)).abs().max().item()
    assert actual > 1e-3 and result["max_output_error"] == pytest.approx(actual, abs=1e-6)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "**The merge is not exact**" in card and f"{actual:.3g}" in card
    assert model.peft_config["default"].allow_inexact_merge is False


def test_a_bfloat16_base_rounds_the_sum_and_says_so(tmp_path: Path) -> None:
    model = _blora(build_tiny_llama().bfloat16(), ["q_proj"], mode="ra")
    with pytest.raises(BayesLoraError, match="is bfloat16, to which the sum is rounded"):
        export(model, tmp_path, format="merged")
    assert export(model, tmp_path, format="merged", allow_error=True)["max_output_error"] > 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16


def test_settings_of_generate_that_contradict_each_other_are_saved(tmp_path: Path) -> None:
    """Many models of the hub have a temperature and do not sample; Transformers refuses to save that."""
    model = _blora(build_tiny_llama(), ["q_proj"], mode="ra")
    model.generation_config.temperature, model.generation_config.do_sample = 0.7, False
    export(model, tmp_path, format="merged")
    saved = GenerationConfig.from_pretrained(tmp_path)
    assert (saved.temperature, saved.do_sample) == (0.7, False) and model.generation_config.temperature == 0.7


@pytest.mark.parametrize("targets", [["query", "value"], ["query", "word_embeddings"]])
def test_a_lora_of_peft_is_merged_and_left_as_it_was(targets: list[str], tmp_path: Path) -> None:
    config = LoraConfig(r=RANK, target_modules=targets, init_lora_weights=False, task_type="SEQ_CLS")
    model = get_peft_model(build_tiny_bert(), config).eval()
    expected, state = _logits(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = export(model, tmp_path, format="merged", batch=BATCH)
    assert result["inexact"] is None and result["max_output_error"] < 1e-5
    torch.testing.assert_close(_logits(AutoModelForSequenceClassification.from_pretrained(tmp_path)), expected)
    assert "trained with PEFT's LoRA, merged" in (tmp_path / "README.md").read_text().replace("\n", " ")
    assert all(torch.equal(tensor, state.pop(name)) for name, tensor in model.state_dict().items()) and not state
    with pytest.raises(BayesLoraError, match="the base weight of .* is bfloat16, to which the sum is rounded"):
        export(model.to(torch.bfloat16), tmp_path, format="merged")


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "word_embed_proj_dim": 128, "ffn_dim": 128, "num_hidden_layers": 1}
    config = OPTConfig(
        **sizes, num_attention_heads=4, vocab_size=64, max_position_embeddings=32, init_std=0.1, dropout=0.0
    )
    folder = tmp_path_factory.mktemp("base")
    OPTForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("bits", [4, 8])
def test_a_base_of_few_bits_is_rounded_again_and_measured(bits: int, base_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    settings = BitsAndBytesConfig(
        **({"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32} if bits == 4 else {"load_in_8bit": True})
    )
    base = AutoModelForCausalLM.from_pretrained(base_folder, quantization_config=settings, device_map={"": "cpu"})
    before = _logits(base)
    model = _blora(base, ["q_proj", "v_proj"])
    expected = _logits(model)
    with pytest.raises(BayesLoraError, match=f"has {bits} bits, to which the sum has to be rounded again"):
        export(model, tmp_path, format="merged")
    result = export(model, tmp_path, format="merged", batch=BATCH, allow_error=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"})
    actual = (_logits(merged) - expected).abs().max().item()
    assert result["max_output_error"] == pytest.approx(actual, rel=1e-3, abs=1e-4)
    assert 0 < actual < (expected - before).abs().max()  # nearer to the adapted model than the base was
    assert torch.equal(_logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(_logits(model), before)


def test_a_weight_with_a_second_use_is_found_by_measuring(tmp_path: Path) -> None:
    model = _blora(build_tiny_llama(tie_word_embeddings=True), ["lm_head"], mode="ra")
    with pytest.raises(BayesLoraError, match="second place"):
        export(model, tmp_path / "out", format="merged", batch=BATCH)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_merged_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BayesLoraError, match="Tiny is not a Transformers model"):
        export(tiny_model(FROZEN), tmp_path, format="merged")
    model = _blora(build_tiny_bert(), ["query"], mode="ra")
    model.merge_adapter()
    with pytest.raises(BayesLoraError, match="is merged into .*unmerge_adapter first"):
        export(model, tmp_path, format="merged")
