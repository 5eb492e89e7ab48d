"""Result files made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

KINDS = ("weight", "A", "E", "B", "A_out", "E_out", "out")
TRAINING = {"steps": 345, "learning_rate": 1e-3, "batch_size": 32, "max_length": 128}


def layer(block: int, matrix: str, rank: int = 8, **bits: int) -> dict[str, Any]:
    return {
        "name": f"bert.encoder.layer.{block}.attention.self.{matrix}",
        "in_features": 4, "out_features": 4, "rank": rank, "initial_rank": 8, "parameters": 64,
        "bits": {**dict.fromkeys(KINDS, 32), **bits},
    }  # fmt: skip


def run(method: str = "lora", seed: int = 0, accuracy: float = 0.8, **changes: Any) -> dict[str, Any]:
    layers = [layer(block, matrix) for block in (0, 1) for matrix in ("query", "key", "value")]
    return {
        "task": "mrpc", "method": method, "seed": seed, "options": {}, "model": "minilm", "training": TRAINING,
        "optimizer": {"name": "adamw"}, "target_modules": ["query"], "metric": "accuracy", "held_out": 100,
        "scores": {"accuracy": accuracy, "f1": 0.9, "nll": 0.5, "ece": 0.05},
        "relative_bops": {"adapted": 0.2, "attention": 0.25, "encoder": 0.6, "model": 0.7},
        "median_adapter_bits": 4, "mean_rank": 6.5, "layers": layers, "seconds": 100.0, "processor_seconds": 80.0,
        "peak_memory_bytes": 800_000_000, "parameters": {"trainable": 1000, "adapter": 900, "total": 5000},
        **changes,
    }  # fmt: skip


def write(folder: Path, *runs: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for each in runs:
        name = "-".join(str(each[key]) for key in ("task", "method", "seed"))
        extra = "-".join(str(value) for value in each["options"].values())
        (folder / f"{name}{extra}.json").write_text(json.dumps(each), encoding="utf-8")
