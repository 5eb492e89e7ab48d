"""The uniform form of plain LoRA: one rank, no patterns, the same function, and nothing that a server cannot load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from bayeslora import BayesLoraError, BLoraConfig, MeLoraConfig, export
from bayeslora.export.lora import SERVED_RANKS
from tests.conftest import build_tiny_bert, build_tiny_llama
from tests.methods.reference import layers_of

TOKENS = torch.arange(24).view(2, 12)
TARGETS = ["q_proj", "v_proj", "down_proj"]


def language_model(targets: Any = TARGETS, r: int = 4, **options: Any) -> nn.Module:
    """A B-LoRA Llama without quantizers, whose layers have ranks r, r - 1, 0, r, …"""
    settings = {"r": r, "lora_alpha": 6, "target_modules": targets, "init_weights": False, "mode": "ra"}
    model = get_peft_model(build_tiny_llama(), BLoraConfig(**{**settings, "task_type": "CAUSAL_LM", **options}))
    with torch.no_grad():
        for index, layer in enumerate(layers_of(model)):
            layer.blora_E["default"].uniform_(0.5, 1.5)
            if index % 3 == 1:
                layer.blora_E["default"][0] = 0.0
            if index % 3 == 2:
                layer.blora_E["default"].zero_()
    return model.eval()


def settings(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "adapter_config.json").read_text()))


def differ(model: nn.Module, folder: Path) -> float:
    plain = PeftModel.from_pretrained(build_tiny_llama(), folder).eval()
    assert type(plain.peft_config["default"]) is LoraConfig
    with torch.no_grad():
        return float((model(input_ids=TOKENS).logits - plain(input_ids=TOKENS).logits).abs().max())


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"alpha_pattern": {"v_proj": 20}, "rank_pattern": {"q_proj": 2}}]
)
def test_it_is_the_same_function_at_one_rank_and_scaling_one(options: dict[str, Any], tmp_path: Path) -> None:
    model = language_model(**options)
    result = export(model, tmp_path, uniform=True)
    assert len(set(result["ranks"].values())) > 1
    assert result["max_output_error"] < 1e-5 and differ(model, tmp_path) < 1e-5
    written = settings(tmp_path)
    assert written["r"] == written["lora_alpha"] == 8
    assert not written["rank_pattern"] and not written["alpha_pattern"] and not written["use_rslora"]
    assert written["modules_to_save"] is None and written["bias"] == "none" and not written["use_dora"]
    assert sorted(written["target_modules"]) == sorted(TARGETS)


def test_every_tensor_is_a_matrix_of_that_rank(tmp_path: Path) -> None:
    """Names and shapes as the three loaders want them: llama.cpp scales by alpha over the tensor's own rank."""
    export(language_model(), tmp_path, uniform=True)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * len(TARGETS)
    for key, tensor in tensors.items():
        assert key.startswith("base_model.model.model.layers.")
        kind = key.rpartition(".lora_")[2]
        assert kind in ("A.weight", "B.weight")
        assert tensor.shape[0 if kind == "A.weight" else 1] == settings(tmp_path)["r"]
        assert tensor.is_contiguous() and tensor.dtype == torch.float32


@pytest.mark.parametrize(("rank", "expected"), [(1, 8), (8, 8), (9, 16), (33, 64), (300, 320), (600, 600)])
def test_the_rank_is_the_next_one_that_servers_reserve(rank: int, expected: int, tmp_path: Path) -> None:
    config = MeLoraConfig(r=rank, target_modules=["q_proj"], task_type="CAUSAL_LM")
    export(get_peft_model(build_tiny_llama(num_hidden_layers=1), config), tmp_path, uniform=True)
    assert settings(tmp_path)["r"] == expected
    assert expected in SERVED_RANKS or expected == rank


def test_a_pattern_of_targets_becomes_their_names(tmp_path: Path) -> None:
    export(language_model(r".*\.(q|v)_proj"), tmp_path / "all", uniform=True)
    assert sorted(settings(tmp_path / "all")["target_modules"]) == ["q_proj", "v_proj"]
    one = language_model(r".*\.1\.self_attn\.q_proj")
    export(one, tmp_path / "one", uniform=True)
    assert settings(tmp_path / "one")["target_modules"] == ["model.layers.1.self_attn.q_proj"]
    assert differ(one, tmp_path / "one") < 1e-5


def test_a_posteriors_mean_has_the_form_too(tmp_path: Path) -> None:
    config = MeLoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, task_type="CAUSAL_LM", init_weights=False)
    model = get_peft_model(build_tiny_llama(), config).eval()
    export(model, tmp_path, uniform=True)
    assert settings(tmp_path)["r"] == 8 and differ(model, tmp_path) < 1e-5


@pytest.mark.parametrize(
    ("options", "what"), [({"modules_to_save": ["lm_head"]}, "lm_head"), ({"bias": "all"}, "bias")]
)
def test_what_else_was_trained_is_refused_before_anything_is_written(
    options: dict[str, Any], what: str, tmp_path: Path
) -> None:
    with pytest.raises(BayesLoraError, match=f"also trains .*{what}.*without uniform"):
        export(language_model(**options), tmp_path / "out", uniform=True)
    assert not (tmp_path / "out").exists()


def test_a_classifiers_head_is_refused(tmp_path: Path) -> None:
    config = BLoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", mode="ra")
    with pytest.raises(BayesLoraError, match="also trains classifier"):
        export(get_peft_model(build_tiny_bert(), config), tmp_path / "out", uniform=True)
