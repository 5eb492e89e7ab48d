"""Parameter counts: the published figures from configurations alone, and PEFT's own counts."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers
from torch import nn

import bayeslora
from bayeslora.cost import build_on_meta, count_parameters
from bayeslora.methods import LayerDescription, describe
from tests.cost.models import tiny_config

DEBERTA_V3_BASE = transformers.DebertaV2Config(
    hidden_size=768,
    num_hidden_layers=12,
    intermediate_size=3072,
    num_attention_heads=12,
    vocab_size=128100,
    relative_attention=True,
    position_buckets=256,
    pos_att_type="p2c|c2p",
    share_att_key=True,
)


def adapter_parameters(config: transformers.PretrainedConfig, r: int, targets: str | list[str]) -> int:
    """Parameters of a LoRA of rank r on the model of a configuration."""
    model = peft.get_peft_model(build_on_meta(config), peft.LoraConfig(r=r, target_modules=targets))
    return count_parameters(model)["adapter"]


def adapter_matrices(layers: list[LayerDescription]) -> int:
    """Parameters of A and B alone."""
    return sum(layer.rank * (layer.in_features + layer.out_features) for layer in layers)


def test_deberta_v3_base_at_rank_8_has_442368() -> None:
    """Eq. 23 of the paper: 6 · r · l · d for query, key and value."""
    assert 6 * 8 * 12 * 768 == 442_368
    assert adapter_parameters(DEBERTA_V3_BASE, 8, ["query_proj", "key_proj", "value_proj"]) == 442_368


@pytest.mark.parametrize(("r", "expected"), [(2, 331_776), (3, 497_664), (8, 1_327_104), (12, 1_990_656)])
def test_deberta_v3_base_with_all_six_matrices(r: int, expected: int) -> None:
    """Eq. 22: on q, k, v and the output projection r · 2d, on both feed-forward matrices r · (d + d_ffn)."""
    assert r * 12 * (4 * 2 * 768 + 2 * (768 + 3072)) == expected
    layers = r"encoder\.layer\.\d+\..*(_proj|dense)"
    assert adapter_parameters(DEBERTA_V3_BASE, r, layers) == expected
    assert adapter_parameters(DEBERTA_V3_BASE, r, ["query_proj", "key_proj", "value_proj", "dense"]) == expected


def test_dylora_counts_two_matrices() -> None:
    """The paper's .29M for DyLoRA is rank 8 on queries and values alone."""
    assert adapter_parameters(DEBERTA_V3_BASE, 8, ["query_proj", "value_proj"]) == 4 * 8 * 12 * 768 == 294_912


@pytest.mark.parametrize(
    ("hidden", "intermediate", "layers", "heads", "expected"),
    [(4096, 11008, 32, 32, 4_483_072), (5120, 13824, 40, 40, 6_850_560)],
)
def test_llama_2_at_rank_8(hidden: int, intermediate: int, layers: int, heads: int, expected: int) -> None:
    """LoRA on query, value and lm_head of the 7B and 13B models, as published with Me-LoRA."""
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=32000,
    )
    assert 8 * (layers * 4 * hidden + hidden + 32000) == expected
    assert adapter_parameters(config, 8, ["q_proj", "v_proj", "lm_head"]) == expected


@pytest.mark.parametrize("target", [["query", "value"], r".*\.(query|dense)", "all-linear", ["c_attn"], ["wte"]])
def test_the_count_is_what_peft_then_creates(target: list[str] | str) -> None:
    family = "gpt2" if target in (["c_attn"], ["wte"]) else "bert"
    auto = transformers.AutoModelForCausalLM if family == "gpt2" else transformers.AutoModelForMaskedLM
    model = auto.from_config(tiny_config(family, tie_word_embeddings=False))
    lora = peft.LoraConfig(r=5, target_modules=target, fan_in_fan_out=family == "gpt2")
    adapter = peft.get_peft_model(model, lora)
    expected = adapter.get_nb_trainable_parameters()[0]
    assert count_parameters(adapter)["adapter"] == expected == adapter_matrices(describe(adapter))


def test_counts_of_a_peft_model_are_pefts() -> None:
    model = transformers.AutoModelForSequenceClassification.from_config(tiny_config("bert"))
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert count_parameters(model) == {"trainable": whole, "adapter": 0, "total": whole}
    adapter = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["query"], modules_to_save=["classifier"])
    )
    counts = count_parameters(adapter)
    head = 32 * 2 + 2
    # Two layers of r · (d_in + d_out), and a trained copy of the head beside the original.
    assert counts == {"trainable": 2 * 4 * 64 + head, "adapter": 2 * 4 * 64, "total": whole + 2 * 4 * 64 + head}
    assert (counts["trainable"], counts["total"]) == adapter.get_nb_trainable_parameters()


def test_an_adapter_that_is_not_trained_is_still_an_adapter() -> None:
    model = transformers.AutoModel.from_config(tiny_config("bert"))
    adapter = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["query"]))
    adapter.requires_grad_(False)
    assert count_parameters(adapter)["trainable"] == 0
    assert count_parameters(adapter)["adapter"] == 2 * 4 * 64


def test_what_a_layer_holds_beside_its_matrices_counts_as_adapter() -> None:
    """AdaLoRA has a diagonal E and one rank number in each of the two layers."""
    model = transformers.AutoModel.from_config(tiny_config("bert"))
    config = peft.AdaLoraConfig(init_r=4, target_r=2, target_modules=["query"], total_step=100)
    adapter = peft.get_peft_model(model, config)
    assert count_parameters(adapter)["adapter"] == 2 * (4 * 64 + 4 + 1)


def test_everything_a_b_lora_learns_counts_as_adapter() -> None:
    model = transformers.AutoModelForSequenceClassification.from_config(tiny_config("bert"))
    config = bayeslora.BLoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
    adapter = peft.get_peft_model(model, config)
    counts, layers = count_parameters(adapter), describe(adapter)
    assert adapter_matrices(layers) == 4 * 4 * 64
    assert adapter_matrices(layers) < counts["adapter"] == sum(layer.parameters for layer in layers)
    assert counts["trainable"] == counts["adapter"] + 32 * 2 + 2
    assert (counts["trainable"], counts["total"]) == adapter.get_nb_trainable_parameters()


def test_shared_tensors_count_once() -> None:
    model = build_on_meta(tiny_config("gpt2"))
    assert model.lm_head.weight is model.transformer.wte.weight
    assert count_parameters(model)["total"] == sum(p.numel() for p in model.parameters())


def test_weights_packed_in_four_bits_count_as_weights() -> None:
    layer = nn.Linear(8, 6, bias=False)
    packed = nn.Parameter(torch.zeros(24, 1, dtype=torch.uint8), requires_grad=False)
    packed.quant_state = type("State", (), {"shape": torch.Size((6, 8))})()
    layer.weight = packed
    assert count_parameters(layer) == {"trainable": 0, "adapter": 0, "total": 48}
