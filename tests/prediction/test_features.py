"""Features of classifiers: the input of the head at the token that the model predicts from, beside its logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AutoModelForSequenceClassification,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    RobertaConfig,
)

import bayeslora
from bayeslora.errors import BayesLoraError
from bayeslora.prediction import features_and_logits, predict
from tests.conftest import VOCABULARY, build_tiny_bert, build_tiny_deberta, build_tiny_llama

SIZES: dict[str, Any] = {"vocab_size": len(VOCABULARY), "num_labels": 3, "pad_token_id": 0}
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
CONFIGS: dict[str, tuple[PreTrainedConfig, str]] = {
    "roberta": (RobertaConfig(**SIZES, **SMALL), "classifier.out_proj"),
    "albert": (AlbertConfig(**SIZES, **SMALL, embedding_size=16), "classifier"),
    "distilbert": (DistilBertConfig(**SIZES, dim=16, n_layers=2, n_heads=2, hidden_dim=32), "classifier"),
    "gpt2": (GPT2Config(**SIZES, n_embd=16, n_layer=2, n_head=2), "score"),
    "llama": (LlamaConfig(**SIZES, **SMALL), "score"),
}


def batch(rows: int = 5, length: int = 9) -> dict[str, Tensor]:
    """Rows of different lengths, padded on the right."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, len(VOCABULARY), (rows, length), generator=generator)
    mask = (torch.arange(length) < torch.tensor([[length - row] for row in range(rows)])).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": torch.arange(rows) % 3}


@pytest.mark.parametrize("name", list(CONFIGS))
def test_features_are_what_the_head_reads_where_the_model_predicts(name: str) -> None:
    config, place = CONFIGS[name]
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    head = model.get_submodule(place)
    assert isinstance(head, nn.Linear)
    features, logits = features_and_logits(model, batch())
    assert features.shape == (5, 16) and features.dtype == torch.float64
    torch.testing.assert_close(logits, predict(model, batch()).logits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(head.double()(features), logits, rtol=1e-5, atol=1e-6)


def test_the_features_of_bert_are_its_pooled_output() -> None:
    model = build_tiny_bert(num_labels=3)
    inputs = {name: value for name, value in batch().items() if name != "labels"}
    features, _ = features_and_logits(model, batch())
    with torch.no_grad():
        torch.testing.assert_close(features.float(), model.bert(**inputs).pooler_output)


def test_a_decoders_features_are_those_of_its_last_token_before_the_padding() -> None:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(CONFIGS["llama"][0]).eval()
    rows = batch()
    features, _ = features_and_logits(model, [rows])
    for row in range(5):
        ids = rows["input_ids"][row : row + 1, : 9 - row]
        with torch.no_grad():
            alone = model.model(input_ids=ids).last_hidden_state[:, -1]
        torch.testing.assert_close(features[row : row + 1].float(), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [LoraConfig, bayeslora.MeLoraConfig, bayeslora.BLoraConfig])
@pytest.mark.parametrize("targets", [["query", "value"], ["query", "classifier"]])
def test_adapters_of_the_body_and_of_the_head(config: Any, targets: list[str]) -> None:
    model = get_peft_model(build_tiny_bert(num_labels=3), config(target_modules=targets, r=2))
    for name, parameter in model.named_parameters():
        if "lora" in name:
            nn.init.normal_(parameter, std=0.1)
    features, logits = features_and_logits(model, [batch(), batch(3)])
    assert features.shape == (8, 32)
    torch.testing.assert_close(logits[:5], predict(model, batch()).logits, rtol=1e-4, atol=1e-5)
    again, _ = features_and_logits(model, [batch(), batch(3)])
    torch.testing.assert_close(again, features, rtol=0, atol=0)


def test_a_trained_copy_of_the_head_and_a_wrapped_head_are_found() -> None:
    config = LoraConfig(target_modules=["query_proj"], modules_to_save=["classifier", "pooler"], r=2)
    model = get_peft_model(build_tiny_deberta(num_labels=3), config)
    features, logits = features_and_logits(model, batch())
    head = model.get_submodule("base_model.model.classifier").modules_to_save["default"]
    torch.testing.assert_close(head.double()(features), logits, rtol=1e-5, atol=1e-6)


def test_the_model_is_left_as_it_was() -> None:
    model = build_tiny_bert().train()
    features_and_logits(model, batch())
    assert model.training and not any(module._forward_hooks for module in model.modules())
    assert model(**{name: value for name, value in batch().items() if name != "labels"}).logits.shape == (5, 2)


def test_models_without_such_a_head_are_refused() -> None:
    with pytest.raises(BayesLoraError, match="do not come straight from a linear layer of two or more classes"):
        features_and_logits(build_tiny_bert(num_labels=1), batch())

    class Doubled(nn.Module):
        """Its logits are twice the output of the layer."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = build_tiny_bert()

        def forward(self, **inputs: Tensor) -> Tensor:
            logits: Tensor = self.inner(**inputs).logits
            return 2 * logits[:, :2]

    with pytest.raises(BayesLoraError, match="the logits of Doubled"):
        features_and_logits(Doubled(), batch())
    with pytest.raises(BayesLoraError, match="must be \\(batch, classes\\)"):
        features_and_logits(build_tiny_llama(), batch())
    with pytest.raises(BayesLoraError, match="0 batches"):
        features_and_logits(build_tiny_bert(), [])
