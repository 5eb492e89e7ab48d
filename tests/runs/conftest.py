"""Runs on the tiny BERT: six kinds of tickets, told apart by a word."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

import bayeslora
from bayeslora.runs.plan import IvonOptions, RunOptions, TrainPlan
from bayeslora.runs.train import train

NAMES = ["billing", "bug", "legal / GDPR", "login", "refund", "shipping"]
WORDS = ["cat", "dog", "tree", "house", "red", "blue"]


def tickets(count: int, seed: int) -> list[dict[str, Any]]:
    generator = random.Random(seed)
    rows = []
    for index in range(count):
        topic = index % len(NAMES)
        text = f"the {generator.choice(['film', 'plot', 'music'])} was {WORDS[topic]} {WORDS[topic]}"
        rows.append({"text": text, "label": NAMES[topic]})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def trained(folder: Path, base: Path, rows: list[dict[str, Any]], method: str = "melora", **options: Any) -> Path:
    """Train on the rows for a few steps; `ivon`, `kind`, `text_column` are options of the plan, others of a config."""
    config_class = {**bayeslora.METHODS, "lora": LoraConfig, "full": None}[method]
    file = write_rows(folder.parent / f"{folder.name}.jsonl", rows)
    plan = TrainPlan(
        RunOptions(
            method=method,
            model=str(base),
            train_file=str(file),
            eval_file=str(file),
            text_column=options.pop("text_column", ["text"]),
            label_column="label",
            kind=options.pop("kind", None),
            output_dir=str(folder),
        ),
        options.pop("method_options", {} if config_class is None else {"r": 4, "lora_alpha": 8}),
        {
            "max_steps": options.pop("steps", 4),
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 16,
            "per_device_eval_batch_size": 64,
            "seed": 0,
            "report_to": ["none"],
            "save_strategy": "no",
        },
        config_class,
        options.pop("ivon", None),
    )
    assert not options
    train(plan)
    return folder


@pytest.fixture(autouse=True)
def _undrawn_figures(undrawn_figures: None) -> None:
    """Only the runs of whole modules draw the figures of their reports."""


@pytest.fixture(scope="session")
def run_of(tmp_path_factory: pytest.TempPathFactory, tiny_bert_folder: Path) -> Callable[[str], Path]:
    """The folder of a finished run of a method on the tickets, trained when first asked for."""
    parent = tmp_path_factory.mktemp("runs")

    def folder(method: str) -> Path:
        target = parent / method
        if not target.exists():
            ivon = IvonOptions(ivon_hess_init=0.5, ivon_clip_radius=50.0) if method == "lora" else None
            gates = {"warmup_fraction": 0.2, "freeze_fraction": 0.2, "bit_penalty": 1e-4, "rank_penalty": 1e-5}
            more = {"method_options": {"r": 4, "lora_alpha": 8, **gates}, "steps": 20} if method == "blora" else {}
            trained(target, tiny_bert_folder, tickets(48, 0), method, ivon=ivon, **more)
        return target

    return folder
