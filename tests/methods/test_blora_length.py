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

from bayeslora import BLoraConfig, describe
from bayeslora.methods import TrainingSetup
from bayeslora.methods.blora.decisions import Schedule
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


@pytest.mark.parametrize(
    ("options", "shares"),
    [
        ({}, (0.6, 0.3)),
        ({"mode": "q"}, (0.6, 0.3)),
        ({"mode": "ra"}, (0.9, 0.0)),
        ({"mode": "ra", "gates": "paper"}, (0.6, 0.3)),
        ({"mode": "ra", "freeze_fraction": 0.3}, (0.6, 0.3)),
        ({"mode": "ra", "warmup_fraction": 0.2}, (0.2, 0.0)),
        ({"freeze_fraction": 0.5}, (0.4, 0.5)),
        ({"warmup_fraction": 0.8}, (0.8, 0.1)),
        ({"warmup_fraction": 0.95}, (0.95, 0.0)),
    ],
    ids=str,
)
def test_the_default_phases_fit_the_mode_and_yield_to_a_share_that_is_given(
    options: dict[str, Any], shares: tuple[float, float]
) -> None:
    assert BLoraConfig(**options).phase_shares == pytest.approx(shares)


def test_ranks_alone_are_decided_once_after_the_last_step_of_a_run() -> None:
    begin, end = phases(BLoraConfig(mode="ra"), 400)
    schedule = Schedule.of(begin, end, 400, learns_bits=False)
    assert (begin, end) == (360, 400)
    assert schedule.decisions == (399,) and schedule.progress(399) == 1.0
    assert schedule.passes == {394, 395, 396, 397, 398, 399}  # 3% of 400 steps, at two steps a pass
    assert len(Schedule.of(begin, end, 400, learns_bits=True).decisions) == 4


@pytest.mark.parametrize(("mode", "earlier"), [("ra", False), ("q+ra", True)])
def test_ranks_alone_are_rotated_when_the_warm_up_ends(mode: str, earlier: bool) -> None:
    """The other modes rotate earlier, and observe activations in the new basis."""
    model: Any = trained(0, mode=mode, target_bops=None, warmup_fraction=None, freeze_fraction=0.0)
    run = model.base_model.run_state()
    assert run.warm_up_end - run.rotated_after == (run.warm_up_end // 4 if earlier else 0)


@pytest.mark.parametrize("steps", [23, 24])
def test_a_run_that_learns_ranks_alone_has_all_of_them_until_its_last_step(steps: int) -> None:
    model: Any = trained(steps, mode="ra", target_bops=None, target_rank=1.0, warmup_fraction=None)
    assert model.base_model.is_final == (steps == 24)
    assert sum(layer.rank for layer in describe(model)) == (4 if steps == 24 else 16)


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
