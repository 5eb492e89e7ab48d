"""Every classification head that Transformers builds survives a merge and an integer export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification

import bayeslora

ENCODER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
DECODER_TOO = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
HEADS: dict[str, tuple[dict[str, Any], list[str]]] = {
    # A head of several layers without a weight of its own.
    "roberta": (ENCODER, ["query", "value"]),
    "electra": ({**ENCODER, "embedding_size": 16}, ["query", "value"]),
    "modernbert": (ENCODER, ["Wqkv"]),
    "t5": (
        {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0},
        ["q", "v"],
    ),
    "bart": (
        {**DECODER_TOO, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32},
        ["q_proj", "v_proj"],
    ),
    "xlm": ({"emb_dim": 16, "n_layers": 1, "n_heads": 2}, ["q_lin", "v_lin"]),
    # A linear head, under a pooler with weights that are saved as well.
    "deberta-v2": (ENCODER, ["query_proj", "value_proj"]),
    # A model that embeds hashes of characters, so that it has no embedding of tokens.
    "canine": (ENCODER, ["query", "value"]),
}
TOKENS = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def adapted(kind: str, config_class: Any, labels: int = 3) -> nn.Module:
    """A classifier whose adapter and head differ from those that a fresh model would have."""
    options, targets = HEADS[kind]
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model(kind, **TOKENS, **options, num_labels=labels)
    )
    children = [name for name, child in base.named_children() if any(True for _ in child.parameters())]
    head = [name for name in children if name != base.base_model_prefix]
    config = config_class(target_modules=targets, modules_to_save=head, task_type="SEQ_CLS", init_weights=False)
    model: nn.Module = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter))
    return model.eval()


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.fixture
def ids() -> Tensor:
    found = torch.randint(5, 60, (3, 8), generator=torch.Generator().manual_seed(0))
    found[:, -1] = TOKENS["eos_token_id"]
    return found


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("labels", [2, 3])  # files leave out the usual two, which BART's class takes for three
def test_a_merged_classifier_is_the_adapted_one(kind: str, labels: int, ids: Tensor, tmp_path: Path) -> None:
    model = adapted(kind, bayeslora.MeLoraConfig, labels)
    expected = logits(model, ids)
    bayeslora.export(model, tmp_path, format="merged", batch={"input_ids": ids})
    reread = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(reread, ids), expected, rtol=0, atol=1e-5)
    unloaded = model.merge_and_unload()  # type: ignore[operator]
    assert type(unloaded) is type(reread)
    torch.testing.assert_close(logits(unloaded, ids), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "labels"), [("roberta", 3), ("deberta-v2", 3), ("bart", 2), ("bart", 3), ("canine", 3)]
)
def test_an_integer_classifier_is_the_adapted_one(kind: str, labels: int, ids: Tensor, tmp_path: Path) -> None:
    model = adapted(kind, bayeslora.BLoraConfig, labels)
    expected = logits(model, ids)
    bayeslora.export(model, tmp_path, format="integer", batch={"input_ids": ids}, unadapted="float32")
    torch.testing.assert_close(logits(bayeslora.load_integer(tmp_path), ids), expected, rtol=0, atol=1e-5)
    bayeslora.export(model, tmp_path / "bytes", format="integer", batch={"input_ids": ids})
    assert torch.isfinite(logits(bayeslora.load_integer(tmp_path / "bytes"), ids)).all()


@pytest.mark.parametrize("kind", ["roberta", "t5"])
def test_an_unloaded_classifier_is_the_base_with_its_trained_head(kind: str, ids: Tensor) -> None:
    model = adapted(kind, bayeslora.BlobConfig)
    with model.disable_adapter():  # type: ignore[operator]
        untrained = logits(model, ids)
    unloaded = model.unload()  # type: ignore[operator]
    assert not any(hasattr(module, "base_layer") for module in unloaded.modules())
    assert not torch.allclose(logits(unloaded, ids), untrained)  # the head stays the trained one
