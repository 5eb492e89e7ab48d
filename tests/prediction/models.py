"""Tiny classifiers of several families with adapters whose noise shows, and inputs for them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    Qwen2Config,
    Qwen2ForSequenceClassification,
)

import bayeslora
from bayeslora.methods.variational import stochastic_layers
from bayeslora.posterior import Noise
from tests.conftest import build_tiny_bert, build_tiny_deberta

DECODER: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}


def classifier(family: str, layers: int = 3, num_labels: int = 3) -> nn.Module:
    """A classifier with `layers` blocks and random weights."""
    torch.manual_seed(0)
    shape = {"num_hidden_layers": layers, "num_labels": num_labels}
    model: nn.Module
    if family == "bert":
        model = build_tiny_bert(**shape)
    elif family == "deberta":
        model = build_tiny_deberta(**shape)
    elif family == "llama":
        model = LlamaForSequenceClassification(LlamaConfig(**DECODER, **shape))
    elif family == "qwen2":
        model = Qwen2ForSequenceClassification(Qwen2Config(**DECODER, **shape))
    else:
        sizes = {"n_layer": layers, "n_embd": 32, "n_head": 4, "n_positions": 64, "vocab_size": 60}
        model = GPT2ForSequenceClassification(
            GPT2Config(pad_token_id=0, bos_token_id=2, eos_token_id=3, num_labels=num_labels, **sizes)
        )
    return model.eval()


TARGETS = {
    "bert": ["query", "value"],
    "deberta": ["value_proj", "dense"],
    "llama": ["q_proj", "v_proj"],
    "qwen2": ["q_proj", "down_proj"],
    "gpt2": ["c_attn"],
}


def noisy(base: nn.Module, targets: list[str], method: str = "melora", **settings: Any) -> nn.Module:
    """`base` with a variational adapter, in evaluation mode, whose draws differ visibly."""
    config = {"melora": bayeslora.MeLoraConfig, "blob": bayeslora.BlobConfig}[method]
    settings = {"prior_std": 1.0, **settings}  # what deviations in closed form start at
    model = get_peft_model(base, config(r=4, target_modules=targets, init_weights=False, **settings))
    with torch.no_grad():
        for layer in stochastic_layers(model).values():
            layer.B("default").mul_(3)
            for container in ("melora_rho", "blob_G"):
                if "default" in getattr(layer, container, {}):
                    getattr(layer, container)["default"].fill_(0.5)
    return model.eval()


def inputs(rows: int = 4, length: int = 7, vocabulary: int = 60) -> dict[str, Tensor]:
    """Token ids with padding on the right, of different lengths."""
    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(4, vocabulary, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        cut = length - row % 3
        ids[row, cut:], mask[row, cut:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def merged_draw(model: nn.Module, seed: int, draw: int) -> nn.Module:
    """The base model with weight draw number `draw` in its weights: nothing random, no adapter, no hooks."""
    merged = copy.deepcopy(model)
    with torch.no_grad():
        for path, layer in stochastic_layers(merged).items():
            drawn = layer.drawn_A("default", Noise("batch", seed, path, [draw]))
            delta = layer.scaling["default"] * layer.B("default") @ drawn
            layer.base_layer.weight.add_(delta.T if layer.is_transposed else delta)
            layer.B("default").zero_()
    return merged.unload()
