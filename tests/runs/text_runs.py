"""Conversations and completions about the colours of things, and runs that learn them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import LoraConfig

import bayeslora
from bayeslora.runs.plan import RunOptions, TrainPlan
from bayeslora.runs.train import train
from tests.runs.conftest import write_rows

COLOURS = {"cat": "red", "dog": "blue", "tree": "green"}
ASKED = "what is the cat ?"


def chat(count: int) -> list[dict[str, Any]]:
    """Questions about the colour of a thing, of one or two turns."""
    rows = []
    for index in range(count):
        turns = []
        for thing in list(COLOURS)[index % 3 :][: 1 + index % 2]:
            turns.append({"role": "user", "content": f"what is the {thing} ?"})
            turns.append({"role": "assistant", "content": f"the {thing} is {COLOURS[thing]}"})
        rows.append({"messages": turns})
    return rows


def pairs(count: int) -> list[dict[str, Any]]:
    things = list(COLOURS)
    return [
        {"prompt": f"the {things[index % 3]} is", "completion": f" {COLOURS[things[index % 3]]}"}
        for index in range(count)
    ]


def trained(folder: Path, base: Path, rows: list[dict[str, Any]], method: str, **options: Any) -> Path:
    config_class: Any = {**bayeslora.METHODS, "lora": LoraConfig, "full": None}[method]
    plan = TrainPlan(
        RunOptions(
            method=method,
            model=str(base),
            train_file=str(write_rows(folder.parent / f"{folder.name}.jsonl", rows)),
            output_dir=str(folder),
            samples=options.pop("samples", 0),
        ),
        {}
        if config_class is None
        else {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "up_proj", "lm_head"]},
        {
            "max_steps": options.pop("steps", 40),
            "learning_rate": 2e-2 if config_class else 1e-2,
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 8,
            "gradient_accumulation_steps": options.pop("accumulation", 1),
            "seed": 0,
            "report_to": ["none"],
            "save_strategy": "no",
            "logging_steps": 1,
        },
        config_class,
        options.pop("ivon", None),
    )
    assert not options
    train(plan)
    return folder


def pairs_as_chat(count: int) -> list[dict[str, Any]]:
    ask, tell = {"role": "user", "content": "who ?"}, {"role": "assistant", "content": "cat"}
    return [{"messages": [ask, tell]}] * count
