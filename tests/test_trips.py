"""Files of the package that a call crosses: few enough that a reader can follow it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import bayeslora
from bayeslora.methods.blora.gated_quantizers import Phase

PACKAGE = Path(bayeslora.__file__).parent
BATCH = {"input_ids": torch.arange(12).reshape(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}


def files_crossed(call: Callable[[], Any]) -> list[str]:
    """Files of `bayeslora`, by their paths in it, that run any Python function while `call` does."""
    crossed = set()

    def note(frame: FrameType, event: str, argument: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE):
            crossed.add(str(path.relative_to(PACKAGE)))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return sorted(crossed)


def one_layer_bert(config: Any = None) -> Any:
    """A one-layer BERT with an adapter on query, key and value; by default B-LoRA's."""
    settings = BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50
    )
    targets = ["query", "key", "value"]
    config = config or bayeslora.BLoraConfig(r=4, target_modules=targets, task_type="SEQ_CLS")
    return get_peft_model(BertForSequenceClassification(settings), config)


def test_a_prediction_with_samples_crosses_eight_files() -> None:
    model = one_layer_bert(bayeslora.MeLoraConfig(r=2, target_modules=["query", "key", "value"], task_type="SEQ_CLS"))
    predict = bayeslora.predict  # the package finds its names on first use
    assert len(crossed := files_crossed(lambda: predict(model, BATCH, samples=3))) <= 8, crossed


def in_phase(model: nn.Module, phase: Phase) -> Any:
    """`model` with B-LoRA as it is in one phase of its training."""
    model.train()(**BATCH)
    for layer in model.base_model.adapted_layers():  # type: ignore[union-attr, operator]
        layer.start_learning("default")
        layer.progress("default").advance(phase)
    return model


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("phase", list(Phase))
def test_a_forward_pass_of_blora_crosses_five_files(phase: Phase, is_training: bool) -> None:
    model = in_phase(one_layer_bert(), phase).train(is_training)
    assert len(crossed := files_crossed(lambda: model(**BATCH))) <= 5, crossed


@pytest.mark.parametrize(("form", "most"), [("packed", 9), ("integer", 13)])
def test_exports_cross_few_files(form: str, most: int, tmp_path: Path) -> None:
    # Two of the integer form's are the classifier's own forward pass, which the error is measured with.
    model = in_phase(one_layer_bert(), Phase.FROZEN).eval()
    bayeslora.export(model, tmp_path / "first", format=form, batch=BATCH)
    crossed = files_crossed(lambda: bayeslora.export(model, tmp_path / "out", format=form, batch=BATCH))
    assert len(crossed) <= most, crossed
