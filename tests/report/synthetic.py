"""Output folders as `bayeslora train` leaves them, with made-up but plausible numbers."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

MINILM = [f"bert.encoder.layer.{i}.attention.self.{m}" for i in range(6) for m in ("query", "key", "value")]
DEBERTA = [f"deberta.encoder.layer.{i}.attention.self.{m}_proj" for i in range(12) for m in ("query", "key", "value")]
LLAMA = [
    f"model.layers.{i}.{m}"
    for i in range(30)
    for m in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )
]  # fmt: skip
GPT2 = [f"transformer.h.{i}.{m}" for i in range(12) for m in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]


def make_layers(names: list[str], rank: int, quantized: bool, seed: int) -> list[dict[str, Any]]:
    """Widths and ranks in the paper's pattern: adapters narrow, W0 and outputs wider, V and late layers richer."""
    rng = random.Random(seed)
    layers = []
    for position, name in enumerate(names):
        depth = position / len(names)
        rich = 1.0 if ("v" in name.split(".")[-1][:1]) else 0.35
        kept = max(0 if position == 0 else 1, min(rank, round(rank * rich * (0.3 + depth) + rng.uniform(-1, 1))))
        adapter = lambda: rng.choice([2, 2, 4, 4, 8])  # noqa: E731
        bits = dict.fromkeys(("weight", "A", "E", "B", "A_out", "E_out", "out"), 32)
        if quantized:
            bits = {
                "weight": rng.choice([4, 8, 8]), "A": adapter(), "E": adapter(), "B": adapter(),
                "A_out": rng.choice([4, 8]), "E_out": rng.choice([4, 8]), "out": rng.choice([8, 8, 16]),
            }  # fmt: skip
        layers.append(
            {
                "name": name,
                "rank": kept if quantized else rank,
                "initial_rank": rank,
                "bits": bits,
                "in_features": 384,
                "out_features": 384,
                "parameters": rank * 769,
            }  # fmt: skip
        )
    return layers


def make_metrics(
    method: str = "blora",
    names: list[str] | None = None,
    *,
    rank: int = 8,
    seed: int = 0,
    task: str = "rotten_tomatoes",
    accuracy: float = 0.842,
    **changes: Any,
) -> dict[str, Any]:
    names = MINILM if names is None else names
    rng = random.Random(seed)
    counts = [0] * 7 + [38, 61, 74, 92, 110, 160, 231, 384]
    bins = []
    for i, count in enumerate(counts):
        confidence = (i + 0.5) / 15 if count else 0.0
        hit = min(1.0, 0.94 * confidence + rng.uniform(-0.04, 0.04)) if count else 0.0
        edges = {"lower": i / 15, "upper": (i + 1) / 15}
        bins.append({**edges, "count": count, "confidence": confidence, "accuracy": hit})
    metrics: dict[str, Any] = {
        "method": method, "task": task, "model": "sentence-transformers/all-MiniLM-L6-v2", "seed": seed, "steps": 750,
        "scores": {"accuracy": accuracy, "nll": 0.381, "ece": 0.0462, "brier": 0.2312, "f1": accuracy - 0.003},
        "samples": 0, "parameters": {"trainable": 112_128, "adapter": 110_592, "total": 22_825_346},
        "relative_bops": {"adapted": 0.0612, "attention": 0.1843, "encoder": 0.7327, "model": 0.7401},
        "layers": make_layers(names, rank, method == "blora", seed),
        "seconds": {"train": 251.3, "evaluate": 8.7},
        "versions": {"bayeslora": "0.1.0", "torch": "2.13.0", "peft": "0.21.2"},
        "reliability": {"bins": bins}, "labels": ["rotten", "fresh"],
    }  # fmt: skip
    if method == "lora":
        metrics["relative_bops"] = {"adapted": 0.981, "attention": 0.983, "encoder": 0.9943, "model": 0.9945}
    if method == "full":
        metrics["layers"], metrics["relative_bops"] = [], {"attention": 0.96, "encoder": 0.988, "model": 0.9885}
        metrics["parameters"] = {"trainable": 22_713_986, "adapter": 0, "total": 22_713_986}
    metrics.update(changes)
    return metrics


def make_history(
    method: str = "blora",
    steps: int = 750,
    every: int = 10,
    rank: int = 8,
    suffixes: tuple[str, ...] = ("query", "key", "value"),
) -> list[dict[str, Any]]:
    rng = random.Random(7)
    history: list[dict[str, Any]] = []
    warm, frozen = steps * 0.15, steps * 0.75
    for step in range(every, steps + 1, every):
        share = step / steps
        entry: dict[str, Any] = {
            "loss": 0.30 + 0.39 * math.exp(-4 * share) + rng.uniform(-0.05, 0.05), "learning_rate": 1e-3 * (1 - share),
            "grad_norm": 1.0, "epoch": 3 * share, "step": step,
        }  # fmt: skip
        if method == "blora":
            travel = min(1.0, max(0.0, (step - warm) / (frozen - warm)))
            entry["phase"] = 0 if step <= warm else 1 if step <= frozen else 2
            ends = {"weight": 6.9, "A": 3.1, "E": 3.6, "B": 3.4, "A_out": 5.8, "E_out": 6.1, "out": 9.3}
            for kind, end in ends.items():
                entry[f"bits/{kind}"] = 32 * (end / 32) ** min(1.0, 1.25 * travel)
            for bits, end in {4: 0.55, 8: 0.25, 16: 0.04, 32: 0.01}.items():
                middle = 0.45 - 0.05 * math.log2(bits / 8)
                entry[f"gates/{bits}"] = end + (0.96 - end) / (1 + math.exp(9 * (travel - middle)))
            for suffix, end in zip(suffixes, (2.2, 2.6, 5.8, 4, 3, 2, 5), strict=False):
                entry[f"rank/{suffix}"] = rank * (1 + (end / 8 - 1) * travel)
            entry["mean_rank"] = rank * (1 + (3.5 / 8 - 1) * travel)
            entry["mean_bits"] = 5.2
            entry["penalty_bits"], entry["penalty_rank"] = 80.0, 40.0
            entry["relative_bops"] = 0.99 + (0.1843 - 0.99) * min(1.0, 1.25 * travel)
        history.append(entry)
        if step % (steps // 3) == 0:
            evaluated = {"eval_loss": 0.42 - 0.03 * share, "eval_accuracy": 0.80 + 0.04 * share}
            history.append({**evaluated, "step": step, "epoch": 3 * share})
    history.append({"train_runtime": 250.0, "train_loss": 0.4, "step": steps, "epoch": 3.0})
    return history


def write_run(folder: Path, metrics: Any, history: Any = None, config: str | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    method = metrics.get("method", "blora") if isinstance(metrics, dict) else "blora"
    logged = make_history(method) if history is None else history
    (folder / "history.json").write_text(json.dumps(logged), encoding="utf-8")
    if config is not None:
        (folder / "config.yaml").write_text(config, encoding="utf-8")
    return folder
