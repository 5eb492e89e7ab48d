"""The goals of `train --goal`: a method with its options, why, and what to do with the run."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from bayeslora.errors import Problems, close_matches


@dataclass(frozen=True)
class Goal:
    """Options of `train`, the reason for them, and the next command."""

    options: dict[str, Any]
    because: str
    then: str


_SMALL = {"method": "blora", "quantize_input": True, "per_channel": True, "target_bops": 0.03}
_TEMPERATURE = "bayeslora calibrate OUT --temperature --eval-file HELD_OUT"
GOALS = {
    "small": Goal(
        _SMALL,
        "B-LoRA with a budget of 3% of the bit operations, where rounding a LoRA costs points (to 8 bits it is free)",
        "bayeslora export OUT --format onnx --output-dir DIR",
    ),
    "calibrated": Goal(
        {"method": "lora"},
        "LoRA with a temperature, one number that is fitted on held-out rows, is as well calibrated as any",
        _TEMPERATURE,
    ),
    "both": Goal(
        _SMALL,
        "B-LoRA with a budget of 3% of the bit operations, and a temperature that is fitted on held-out rows",
        _TEMPERATURE,
    ),
    "ranks": Goal(
        {"method": "lora", "r": 8},
        "LoRA of rank 8, whose ranks are cut after training by what they are worth to the predictions",
        "bayeslora export OUT --format lora --mean-rank 1.5 --output-dir DIR",
    ),
    "draws": Goal(
        {"method": "melora", "samples": 10},
        "Me-LoRA, one adapter whose draws say how much of a doubt is due to the weights",
        "bayeslora predict OUT --samples 10 --input ROWS --output ANSWERS",
    ),
}


def with_goal(given: dict[str, Any], problems: Problems) -> dict[str, Any]:
    """Return options in which the goal's own, and what it stands for, are filled in; those that are given stay."""
    name = given.get("goal")
    rest = {key: value for key, value in given.items() if key != "goal"}
    if name is None:
        return rest
    if name not in GOALS:
        near = close_matches(str(name), GOALS)
        problems.append(f"--goal is {name!r}, but must be {', '.join(GOALS)}: choose one of them{near}")
        return rest
    if "method" in given:
        problems.append("--goal is given with --method, but it chooses the method: leave one out")
        return rest
    goal = GOALS[name]
    warnings.warn(f"--goal {name}: {goal.because}; afterwards `{goal.then}`", stacklevel=2)
    return {**goal.options, **rest}
