"""A run of B-LoRA that is too short to choose well says so, and what it says is right."""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

from bayeslora import BLoraConfig
from bayeslora.methods import TrainingSetup
from bayeslora.methods.blora.length import LEAST_ROWS, SPREAD, phases, shortfall
from bayeslora.methods.blora.model import Batch
from bayeslora.training.hooks import cost_in
from tests.methods.evidence_models import trained

SHORT = r"training steps are few for B-LoRA to choose well: "


@pytest.mark.parametrize("options", [{}, {"mode": "ra"}, {"warmup_fraction": 0.2}, {"freeze_fraction": 0.1}])
@pytest.mark.parametrize("steps", [300, 1000])
@pytest.mark.parametrize("rows", [None, 16, 32])
def test_runs_as_long_as_the_demo_say_nothing(steps: int, rows: int | None, options: dict[str, Any]) -> None:
    assert shortfall(BLoraConfig(**options), steps, rows) is None


@pytest.mark.parametrize(
    ("steps", "rows", "lacks", "remedy"),
    [
        (60, None, "8 steps for the gates leave less than the configured 90% to the other phases", "80 steps"),
        (
            300,
            8,
            "the last decision rests on about 21 rows of evidence, a relative error of about 69%",
            "534 steps, or",
        ),
        (6, 16, "there is time for 1 of 4 decisions, the last decision rests on about 16 rows", "80 steps, or for 80"),
    ],
)
def test_what_is_lacking_and_needed_is_one_sentence(steps: int, rows: int | None, lacks: str, remedy: str) -> None:
    sentence = shortfall(BLoraConfig(), steps, rows)
    assert sentence is not None and "\n" not in sentence
    assert lacks in sentence and f": train for at least {remedy}" in sentence


@pytest.mark.parametrize("options", [{}, {"warmup_fraction": 0.1, "freeze_fraction": 0.1}, {"warmup_fraction": 0.69}])
@pytest.mark.parametrize(("steps", "rows"), [(10, 4), (30, 12), (200, 8), (299, 15), (3, 1)])
def test_what_it_asks_for_is_enough_and_little_less_is_not(steps: int, rows: int, options: dict[str, Any]) -> None:
    config = BLoraConfig(**options)
    sentence = shortfall(config, steps, rows)
    assert sentence is not None
    needed = int(sentence.partition("at least ")[2].split()[0])
    assert shortfall(config, needed, rows) is None
    assert shortfall(config, needed - 1, rows) is not None
    if "or for" in sentence:
        fewest, batch = (int(word) for word in sentence.rpartition("or for ")[2].split() if word.isdigit())
        assert shortfall(config, fewest, batch) is None
        assert shortfall(config, fewest, batch - 1) is not None


def test_the_gates_may_take_from_the_other_phases_but_not_silently() -> None:
    assert phases(BLoraConfig(), 60) == (35, 43)
    assert shortfall(BLoraConfig(), 79, 32) is not None
    assert shortfall(BLoraConfig(), 80, 32) is None


def test_the_error_that_it_names_is_not_below_that_of_a_tiny_model() -> None:
    """Of 100 independent estimates from `LEAST_ROWS` rows each, for every width and component."""
    model: Any = trained(steps=8).train()
    tuner = model.base_model
    estimates = []
    for step in range(100):
        tokens = torch.randint(5, 30, (int(LEAST_ROWS), 8))
        tuner.run_state().found = {}
        given: dict[str, Any] = {"input_ids": tokens, "labels": tokens[:, 0] % 2}
        tuner._measure(tuner.model, Batch(lambda m, given=given: m(**given), given, len(tokens)), 1000 + step)
        sums = tuner.run_state().found.values()
        estimates.append(torch.cat([s[name].flatten() for s in sums for name in ("width_sums", "rank_sums")]))
    found = torch.stack(estimates)
    error = (found.std(0) / found.mean(0))[found.mean(0) > 0].median()
    # A Gaussian's would be the lower bound.
    assert 0.9 * math.sqrt(2 / LEAST_ROWS) < error < math.sqrt(SPREAD / LEAST_ROWS)


def begun(setup: dict[str, Any], **options: Any) -> Any:
    model = get_peft_model(
        nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2)), BLoraConfig(target_modules=["0"], **options)
    )
    model.base_model.begin(TrainingSetup(cost_of=functools.partial(cost_in, model), **setup))
    return model


def test_known_rows_are_judged_before_training_in_one_warning() -> None:
    with pytest.warns(
        UserWarning, match=f"20 {SHORT}.*, there is time for 3 of 4.*, the last decision rests"
    ) as found:
        begun({"total_steps": 20, "rows": 4})
    assert len(found) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        begun({"total_steps": 300, "rows": 32})
        begun({"total_steps": 300, "rows": None})
        begun({"total_steps": 20, "rows": 4}, gates="paper")


@pytest.mark.parametrize(("rows", "expected"), [(None, 1), (15, 1), (16, 0)])
def test_unknown_rows_are_counted_at_the_first_decision(rows: int | None, expected: int) -> None:
    """The model trains on 16 rows for 24 steps, 8 at least of them with its gates; 15 are too few."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        trained(steps=12, rows=rows, batch=16 if rows else 12)
    assert len([each for each in found if "24 training steps are few" in str(each.message)]) == expected


def test_an_adapter_that_has_made_its_choices_is_not_warned_about() -> None:
    model: Any = trained(steps=24)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        setup = TrainingSetup(total_steps=20, rows=1, cost_of=functools.partial(cost_in, model))
        model.base_model.begin(setup)
