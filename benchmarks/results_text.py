"""The table of generated answers: scores, and the areas under risk and coverage by measure of uncertainty."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from records import Run, check_alike, grouped, markdown_table, read_runs

TASKS = {"squad": "SQuAD", "e2e": "E2E"}
METHODS = {"lora": "LoRA", "blora": "B-LoRA", "melora": "Me-LoRA"}
SCORES = {
    "squad": {"exact_match": "exact match", "f1": "F1"},
    "e2e": {"bleu": "BLEU", "rouge_l": "ROUGE-L"},
}
MEASURES = {
    "risk": "risk of all",
    "aurc_probability": "AURC: probability",
    "aurc_mutual_information": "mutual information",
    "aurc_semantic_entropy": "semantic entropy",
}


def text_section(results: Path) -> str:
    """A table for each task that has runs, with what they are of; empty where there are none."""
    runs = read_runs(results / "text")
    parts = []
    for task, title in TASKS.items():
        own = [run for run in runs if run["task"] == task]
        if own:
            parts += [_line(title, own), text_table(own)]
    return "\n".join(parts)


def text_table(runs: Sequence[Run]) -> str:
    """Scores and areas in per cent, by method, with the standard errors over rows in parentheses."""
    groups = grouped(runs, "method")
    names = {**SCORES[runs[0]["task"]], **MEASURES}
    rows = []
    for method, title in METHODS.items():
        if group := groups.get((method,)):
            check_alike(group)
            rows.append([title, *(_cell(group, name) for name in names)])
    return markdown_table([TASKS[runs[0]["task"]], *names.values()], rows)


def _cell(runs: Sequence[Run], name: str) -> str:
    known = [100 * run["scores"][name] for run in runs if name in run["scores"]]
    if not known:
        return "–"
    same = {"f1": "risk", "rouge_l": "risk"}.get(name, name)  # the risk is 1 minus these
    errors = [100 * run["errors"][same] for run in runs if same in run["errors"]]
    mean = f"{statistics.fmean(known):.1f}"
    return f"{mean} ({statistics.fmean(errors):.1f})" if errors else mean


def _line(title: str, runs: Sequence[Run]) -> str:
    first, seeds = runs[0], sorted({run["seed"] for run in runs})
    training, sampling = first["training"], first["sampling"]
    return (
        f"{title}: SmolLM2-135M, {training['steps']} steps of {training['batch_size']} rows, {first['held_out']} test "
        f"rows, {sampling['samples']} samples at temperature "
        f"{sampling['temperature']:g}, "
        f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}. In per cent, with standard "
        "errors over the rows.\n"
    )
