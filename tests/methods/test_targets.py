"""Targets that an adapter would leave out are refused or named."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

import bayeslora
from bayeslora import MeLoraConfig, describe
from bayeslora.errors import BayesLoraError
from bayeslora.methods.targets import fused_weights

SHAPE: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
}
EXPERTS = ["gate_up_proj", "down_proj"]


def mixtral() -> MixtralForCausalLM:
    return MixtralForCausalLM(MixtralConfig(num_local_experts=2, num_experts_per_tok=1, **SHAPE))


def shared_expert() -> Qwen2MoeForCausalLM:
    """A model whose experts are fused, but for one that is made of linear layers of the same names."""
    sizes = {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "num_experts": 2}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(num_experts_per_tok=1, **sizes, **SHAPE))


@pytest.mark.parametrize("config_class", [bayeslora.MeLoraConfig, bayeslora.BLoraConfig, bayeslora.AdaLoraConfig])
def test_fused_experts_are_refused_by_name(config_class: Any) -> None:
    config = config_class(target_modules=["q_proj", *EXPERTS], task_type="CAUSAL_LM")
    with pytest.raises(BayesLoraError, match=r"'down_proj' is model.layers.\*.mlp.experts.down_proj, a tensor"):
        get_peft_model(mixtral(), config)


def test_all_linear_says_which_experts_it_leaves_out() -> None:
    config = bayeslora.MeLoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    with pytest.warns(UserWarning, match=r"leaves out .*experts.gate_up_proj, .*experts.down_proj, fused experts"):
        get_peft_model(mixtral(), config)


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], r".*\.(q_proj|down_proj)"], ids=["names", "pattern"])
def test_a_name_of_linear_layers_and_of_experts_says_which_it_leaves_out(targets: Any) -> None:
    config = bayeslora.MeLoraConfig(target_modules=targets, task_type="CAUSAL_LM")
    with pytest.warns(UserWarning, match=r"leaves out model.layers.\*.mlp.experts.down_proj, fused"):
        model = get_peft_model(shared_expert(), config)
    adapted = model.base_model.named_layers()
    assert {path.rpartition(".")[2] for path in adapted} == {"q_proj", "down_proj"}


def test_a_name_that_matches_nothing_is_said_beside_one_that_does(tmp_path: Any) -> None:
    bert = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = bayeslora.MeLoraConfig(target_modules=["query", "valve"])
    with pytest.warns(UserWarning, match="'valve' matches nothing in the model, did you mean value"):
        model = get_peft_model(BertModel(BertConfig(**bert)), config)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        PeftModel.from_pretrained(BertModel(BertConfig(**bert)), str(tmp_path))  # a saved adapter is what it is
        get_peft_model(BertModel(BertConfig(**bert)), bayeslora.MeLoraConfig(target_modules="all-linear"))


def test_only_stacks_of_matrices_are_fused_weights() -> None:
    model = torch.nn.Module()
    model.kernel = torch.nn.Conv1d(4, 4, 3)
    model.positions = torch.nn.Parameter(torch.zeros(1, 7, 4))
    model.experts = torch.nn.Module()
    model.experts.up = torch.nn.Parameter(torch.zeros(6, 4))  # several experts, one below the other
    model.experts.first = torch.nn.Linear(4, 4)
    model.stack = torch.nn.Parameter(torch.zeros(3, 4, 4))
    assert fused_weights(model) == ["stack", "experts.up"]


def test_all_linear_leaves_out_what_is_trained_whole(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32, "vocab_size": 50}
    base = DistilBertForSequenceClassification(DistilBertConfig(**sizes))
    adapter = MeLoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS")
    model = get_peft_model(base, adapter)  # PEFT trains pre_classifier for its name classifier
    assert not any("pre_classifier" in layer.name for layer in describe(model))
    model.save_pretrained(tmp_path)
    assert "base_model.model.pre_classifier.weight" in load_file(tmp_path / "adapter_model.safetensors")
