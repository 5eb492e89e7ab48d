"""One seed starts methods with LoRA's factors where PEFT's LoRA starts; some train as it does for a while."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from bayeslora import (
    BayesLoop,
    BLoraConfig,
    DyLoraConfig,
    MeLoraConfig,
    parameter_groups,
)
from tests.conftest import build_tiny_bert

LAYERS: dict[str, Any] = {"task_type": "SEQ_CLS", "r": 4, "lora_alpha": 8, "target_modules": ["query", "value"]}
STEPS = 200
"""Of the whole run; the first 20 are compared."""


def started(config: Any) -> tuple[Any, Tensor]:
    """Return a model with that adapter, and the next random number."""
    torch.manual_seed(0)
    model = get_peft_model(build_tiny_bert(), config)
    return model, torch.rand(1)


def factors(model: Any, letter: str) -> list[Tensor]:
    named = [(name.lower(), value) for name, value in model.named_parameters()]
    return [value for name, value in named if f"lora_{letter}." in name]


@pytest.mark.parametrize("config_class", [BLoraConfig, DyLoraConfig, MeLoraConfig])
def test_a_seed_gives_the_same_start_as_lora(config_class: Any) -> None:
    ours, after = started(config_class(**LAYERS))
    theirs, expected = started(LoraConfig(**LAYERS))
    assert torch.equal(after, expected), "random numbers from here on would be others: dropout, for one"
    found, wanted = factors(ours, "a"), factors(theirs, "a")
    assert len(found) == len(wanted) == 4
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def trained(config: Any) -> Any:
    model, _ = started(config)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2))
    loop = None if type(config) is LoraConfig else BayesLoop(model, optimizer, total_steps=STEPS, num_examples=500)
    for step in range(20):
        tokens = torch.randint(5, 30, (16, 8), generator=torch.Generator().manual_seed(step))
        if loop:
            loop.step_begin()
        model(input_ids=tokens, labels=tokens[:, 0] % 2).loss.backward()
        if loop:
            loop.before_optimizer_step()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        if loop:
            loop.step_end()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize(
    ("config", "held"),
    [
        (BLoraConfig(mode="ra", target_rank=1.0, **LAYERS), "e"),
        (BLoraConfig(mode="q", quantize_input=True, **LAYERS), "e"),
        (MeLoraConfig(**LAYERS), "m"),
    ],
    ids=["ranks alone, before the rotation", "widths, before the rotation", "Me-LoRA, before the noise"],
)
def test_training_is_that_of_lora(config: Any, held: str) -> None:
    ours, theirs = trained(config), trained(LoraConfig(**LAYERS))
    for letter in "ab":
        found, wanted = factors(ours, letter), factors(theirs, letter)
        assert all(value.any() for value in wanted)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    for value in factors(ours, held):
        start = torch.eye(len(value)) if value.ndim == 2 else torch.ones(len(value))
        assert torch.equal(value, start)
