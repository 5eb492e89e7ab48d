"""Weights in torchao's layout: the learned codes, read by Transformers and torchao alone, as the card says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForTokenClassification,
    GenerationConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from bayeslora import BayesLoraError, BLoraConfig, export
from bayeslora.quantization import codes, grid_step
from tests.conftest import build_tiny_bert, build_tiny_gpt2, build_tiny_llama, build_tiny_tokenizer
from tests.methods.reference import FROZEN, layers_of, randomize, set_widths

pytest.importorskip("torchao")
IDS = {"input_ids": torch.arange(24).view(2, 12) % 20, "attention_mask": torch.ones(2, 12, dtype=torch.long)}
LLAMA = ["q_proj", "k_proj", "v_proj", "down_proj"]


def _blora(base: nn.Module, targets: list[str], bits: int = 8, **options: Any) -> nn.Module:
    """A frozen adapter whose base weights have codes, and nothing else is rounded."""
    config = BLoraConfig(r=4, target_modules=targets, init_weights=False, **options)
    model = get_peft_model(base, config).eval()
    generator = torch.Generator().manual_seed(3)
    for layer in layers_of(model):
        randomize(layer, generator, FROZEN)
        kinds = layer.quantizers("default").kinds
        set_widths(layer, **{kind: bits if kind == "weight" else 32 for kind in kinds})
    return model


def _logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**IDS).logits


@pytest.mark.parametrize(("bits", "per_channel"), [(8, True), (8, False), (4, True)])
def test_the_files_hold_the_learned_codes(bits: int, per_channel: bool, tmp_path: Path) -> None:
    model = _blora(build_tiny_llama(), LLAMA, bits, per_channel=per_channel, task_type="CAUSAL_LM")
    before = _logits(model)
    found = export(model, tmp_path, format="torchao", unadapted="float32", batch=IDS)
    assert torch.equal(_logits(model), before)
    assert found["changed"] == 0 and found["divergence"] < 1e-6 and found["max_output_error"] < 1e-4
    assert found["widened"] == (None if bits == 8 else "weight 4 as 8") and found["left_out"] is None
    assert found["weights"] == len(layers_of(model)) == 8

    base = AutoModelForCausalLM.from_pretrained(tmp_path)
    for path, layer in model.base_model.named_layers("default").items():
        weight, held = layer.get_base_weight(), base.get_submodule(path).weight
        bound = layer.packed_tensors("default").ranges["weight"]
        assert type(held).__name__ == "Int8Tensor"
        assert torch.equal(held.qdata.int(), codes(weight, bound, bits))
        assert torch.equal(held.scale, grid_step(bound, bits).expand_as(held.scale))


def test_a_stranger_loads_it_by_its_card(tmp_path: Path) -> None:
    """In a process that cannot import this library."""
    model = _blora(build_tiny_llama(), LLAMA, task_type="CAUSAL_LM")
    found = export(model, tmp_path, format="torchao", tokenizer=build_tiny_tokenizer(), batch=IDS, allow_error=True)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    code = (
        f"import sys, json, torch\nsys.modules['bayeslora'] = None\n{program}\n"
        "ids = torch.arange(24).view(2, 12) % 20\n"
        "with torch.no_grad(): print(json.dumps(model(input_ids=ids).logits.tolist()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    answers = torch.tensor(json.loads(done.stdout))
    assert (answers - _logits(model)).abs().max() == pytest.approx(found["max_output_error"], rel=1e-3)
    rank = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"]
    assert f"--max-lora-rank {rank} " in card and f"{found['weights']} matrices" in card
    assert found["weights"] == 14 and (tmp_path / "tokenizer.json").is_file()
    assert not re.search(r"/tmp|/root", card + (tmp_path / "config.json").read_text())


def test_a_classifier_keeps_its_trained_head(tmp_path: Path) -> None:
    model = _blora(build_tiny_bert(), ["query", "key", "value"], task_type="SEQ_CLS")
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.mul_(3).add_(0.1)
    found = export(model, tmp_path, format="torchao", unadapted="float32", batch=IDS)
    assert found["max_output_error"] < 1e-4 and found["changed"] == 0
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(base.classifier.weight) is nn.Parameter


def test_what_the_layout_cannot_hold_is_refused_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(model: nn.Module, said: str, **options: Any) -> None:
        with pytest.raises(BayesLoraError, match=said):
            export(model, tmp_path / "no", format="torchao", batch=IDS, **options)
        assert not (tmp_path / "no").exists()

    grouped = _blora(build_tiny_llama(), LLAMA, group_size=8, task_type="CAUSAL_LM")
    refused(grouped, "q_proj is in groups of inputs, but torchao's int8 layout has one step for each row")
    refused(_blora(build_tiny_gpt2(), ["c_attn"], task_type="CAUSAL_LM"), r"c_attn is stored as \(d_in, d_out\), but")
    wide = _blora(build_tiny_llama(), LLAMA, 16, task_type="CAUSAL_LM")
    refused(wide, "no base weight has a learned width of at most 8 bits, but torchao's layout is for those: export 'm")
    refused(wide, "unadapted is 'int4', but must be int8 or float32: choose one", unadapted="int4")
    with monkeypatch.context() as patch:
        patch.setattr("torchao.quantization.Int8Tensor.optional_tensor_data_names", [])
        refused(wide, "torchao is older than 0.17, whose int8 layout vLLM reads: pip install -U torchao")
    plain = get_peft_model(build_tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    refused(plain, "has no adapter of bayeslora, but this format needs one")

    coarse = _blora(build_tiny_llama(), LLAMA, task_type="CAUSAL_LM")
    for layer in layers_of(coarse):
        set_widths(layer, out=2)
        layer.quantizers("default").set_range("out", torch.tensor(40.0))
    refused(
        coarse, r"the torchao form diverges by .* nats from the model and changes \d+\.\d% of the answers, but 0\.01"
    )
    found = export(coarse, tmp_path / "yes", format="torchao", batch=IDS, allow_error=True)
    assert found["left_out"] == "activations (out 2 bits)" and found["divergence"] > 0.01


def test_settings_of_generate_that_contradict_each_other_are_saved(tmp_path: Path) -> None:
    """Many models of the hub have a temperature and do not sample; Transformers refuses to save that."""
    model = _blora(build_tiny_llama(), LLAMA)
    model.generation_config.temperature, model.generation_config.do_sample = 0.7, False
    export(model, tmp_path, format="torchao", allow_error=True)
    saved = GenerationConfig.from_pretrained(tmp_path)
    assert (saved.temperature, saved.do_sample) == (0.7, False) and model.generation_config.temperature == 0.7


def test_a_classifier_of_tokens_is_measured_at_each_of_them(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    base = BertForTokenClassification(BertConfig(**sizes, vocab_size=30, num_labels=4))
    model = _blora(base, ["query"], task_type="TOKEN_CLS", per_channel=True)
    found = export(model, tmp_path, format="torchao", batch=IDS, allow_error=True)
    assert found["rows"] == 2 and found["max_output_error"] < 0.1 and "loss_before" not in found


def test_an_encoder_decoder_is_measured_at_the_tokens_of_its_decoder(tmp_path: Path) -> None:
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 30}
    base = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    model = _blora(base, ["q"], task_type="SEQ_2_SEQ_LM", per_channel=True)
    batch = {**IDS, "labels": torch.arange(10).view(2, 5)}
    found = export(model, tmp_path, format="torchao", batch=batch, allow_error=True)
    expected = F.cross_entropy(model(**batch).logits[:, :-1].flatten(0, 1), batch["labels"][:, :-1].flatten())
    assert found["rows"] == 2 and found["loss_before"] == pytest.approx(float(expected), rel=1e-4)
