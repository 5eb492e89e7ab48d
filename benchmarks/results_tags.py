"""The table of tagged words: spans and words, by method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from records import markdown_table, read_runs

METHODS = {"lora": "LoRA", "blora": "B-LoRA", "melora": "Me-LoRA"}
SCORES = {"span_f1": "span F1", "accuracy": "accuracy", "nll": "NLL", "ece": "ECE", "aurc": "AURC"}


def tags_section(results: Path) -> str:
    """The scores of each run, and what they are of; empty where there are none."""
    runs = {run["method"]: run for run in read_runs(results / "tags")}
    if not runs:
        return ""
    rows = [["always the most frequent tag", *_cells(next(iter(runs.values()))["baseline"])]]
    for method, title in METHODS.items():
        if run := runs.get(method):
            rows.append([title, *_cells(run["scores"])])
            if "sampled" in run:
                rows.append([f"{title}, {run['sampled']['samples']} samples", *_cells(run["sampled"]["scores"])])
    first = next(iter(runs.values()))
    return f"{_line(first)}\n{markdown_table(['', *SCORES.values()], rows)}"


def _cells(scores: dict[str, float]) -> list[str]:
    return [f"{scores[name]:.3f}" if name in scores else "–" for name in SCORES]


def _line(run: dict[str, Any]) -> str:
    return (
        f"MiniLM, {run['steps']} steps of 32 addresses; scored are {run['words']:,} words of {run['rows']:,} other "
        f"addresses, {len(run['label_scores'])} kinds of span, seed {run['seed']}.\n"
    )
