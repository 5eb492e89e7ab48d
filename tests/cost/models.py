"""Tiny models of each family, as configurations, and a description of an adapted layer that needs no adapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import transformers
from torch import nn

from bayeslora.cost import Operation, build_on_meta, operations

QKV = {
    "bert": ("query", "key", "value"),
    "roberta": ("query", "key", "value"),
    "electra": ("query", "key", "value"),
    "albert": ("query", "key", "value"),
    "distilbert": ("q_lin", "k_lin", "v_lin"),
    "mpnet": ("q", "k", "v"),
    "deberta-v2": ("query_proj", "key_proj", "value_proj"),
    "llama": ("q_proj", "k_proj", "v_proj"),
    "mistral": ("q_proj", "k_proj", "v_proj"),
    "qwen2": ("q_proj", "k_proj", "v_proj"),
    "qwen3": ("q_proj", "k_proj", "v_proj"),
    "phi": ("q_proj", "k_proj", "v_proj"),
    "phi3": ("qkv_proj",),
    "gpt_neox": ("query_key_value",),
    "gpt2": ("c_attn",),
    "gpt_bigcode": ("c_attn",),
    "opt": ("q_proj", "k_proj", "v_proj"),
}

ENCODER: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 60,
    "max_position_embeddings": 40,
}
DECODER: dict[str, Any] = {**ENCODER, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED: dict[str, Any] = {**DECODER, "num_key_value_heads": 2, "head_dim": 8}
OWN: dict[str, dict[str, Any]] = {
    "electra": {**ENCODER, "embedding_size": 16},
    # Four layers of one shared group: every block runs four times.
    "albert": {**ENCODER, "num_hidden_layers": 4, "num_hidden_groups": 1, "embedding_size": 16},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": 60},
    "deberta-v2": {
        **ENCODER,
        "relative_attention": True,
        "position_buckets": 5,
        "pos_att_type": "p2c|c2p",
        "share_att_key": True,
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 60, "n_positions": 40, "pad_token_id": 0},
    "gpt_bigcode": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 60, "n_positions": 40, "pad_token_id": 0},
    "opt": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 48,
        "vocab_size": 60,
        "word_embed_proj_dim": 16,
        "max_position_embeddings": 40,
    },
    "phi": {**DECODER, "partial_rotary_factor": 0.5},
    "gpt_neox": DECODER,
}


def tiny_config(family: str, **changes: Any) -> transformers.PretrainedConfig:
    encoders = {"bert", "roberta", "mpnet"}
    values = OWN.get(family) or (ENCODER if family in encoders else GROUPED)
    config = transformers.AutoConfig.for_model(family, **{**values, **changes})
    config._attn_implementation = "eager"
    return config


@dataclass(frozen=True)
class Layer:
    """What `bayeslora.describe` says of a layer, as far as costs depend on it."""

    name: str
    in_features: int
    out_features: int
    rank: int
    bits: dict[str, int] = field(default_factory=dict)


def adapted(model: nn.Module, names: tuple[str, ...], rank: int, **bits: int) -> list[Layer]:
    """Describe adapters on every layer whose path ends in one of `names`, all at the same rank and widths."""
    found = []
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in names and getattr(module, "weight", None) is not None:
            shape = tuple(module.weight.shape)
            n_in, n_out = shape if isinstance(module, transformers.pytorch_utils.Conv1D) else shape[::-1]
            found.append(Layer(name, n_in, n_out, rank, dict(bits)))
    assert found
    return found


def family_model(family: str, **changes: Any) -> nn.Module:
    return build_on_meta(tiny_config(family, **changes))


def by_name(model: Any, tokens: int, layers: list[Layer] | None = None) -> dict[str, Operation]:
    return {operation.name: operation for operation in operations(model, tokens, layers)}
