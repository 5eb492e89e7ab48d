"""What a run's schedule is needed for says so before the run has begun."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

import bayeslora
from bayeslora import BayesLoraError
from bayeslora.methods import TrainingSetup
from bayeslora.training.hooks import cost_in


def model_with(config: Any) -> Any:
    return get_peft_model(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2)), config(target_modules=["0"]))


CALLS: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "AdaLoRA's statistics": (bayeslora.AdaLoraConfig, lambda tuner: tuner.statistics()),
    "AdaLoRA's step": (bayeslora.AdaLoraConfig, lambda tuner: tuner.step_begin(0, 0)),
    "AdaLoRA's allocation": (
        bayeslora.AdaLoraConfig,
        lambda tuner: tuner.allocate(0, torch.optim.SGD([torch.ones(1)])),
    ),
    "Me-LoRA's step": (bayeslora.MeLoraConfig, lambda tuner: tuner.step_begin(0, 0)),
    "B-LoRA's step": (bayeslora.BLoraConfig, lambda tuner: tuner.step_begin(0, 0)),
    "B-LoRA's rates": (bayeslora.BLoraConfig, lambda tuner: tuner.learning_rates),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_needs_the_schedule_asks_for_begin(name: str) -> None:
    config, call = CALLS[name]
    model = model_with(config)
    tuner = model.base_model
    with pytest.raises(BayesLoraError, match=r"call begin\(\) first"):
        call(tuner)
    cost_of = functools.partial(cost_in, model)
    tuner.begin(TrainingSetup(total_steps=100, num_examples=10, has_posterior=True, cost_of=cost_of))
    call(tuner)


def test_a_begin_that_fails_leaves_no_run() -> None:
    tuner = model_with(bayeslora.BLoraConfig).base_model
    with pytest.raises(BayesLoraError, match="training steps"):
        tuner.begin(TrainingSetup(total_steps=2))
    with pytest.raises(BayesLoraError, match=r"call begin\(\) first"):
        tuner.run_state()
