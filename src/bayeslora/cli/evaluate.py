"""`bayeslora evaluate OUT`: score a finished run without changing it."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

from bayeslora.cli.inputs import print_json
from bayeslora.cli.progress import disable_progress_bars
from bayeslora.data import Task
from bayeslora.errors import counted
from bayeslora.evaluation.tagging import check_span_metrics
from bayeslora.files import check_new, check_writable, new_folder
from bayeslora.report import check_installed
from bayeslora.runs.evaluate_run import (
    OF_ANSWERS,
    domain_of,
    evaluate_run,
    info_to_score,
    load_to_score,
    rows_to_score,
)
from bayeslora.runs.examples import ROWS, Examples, choose_examples
from bayeslora.runs.info import RunInfo, refuse
from bayeslora.runs.record import IN_BRACKETS, METRICS_FILE, RunRecord, Shift, read_run
from bayeslora.runs.rows import outside_rows
from bayeslora.runs.schema import from_json
from bayeslora.runs.score import described
from bayeslora.runs.shift import shift_columns
from bayeslora.runs.text_scores import check_text_metrics, is_answered
from bayeslora.vocabulary import TEXT_TASKS

_SHIFT_SCORES = ("accuracy", "nll", "ece", "brier", "mse", "coverage", "set_size")
"""Scores in the table of `--shift` beside the headline score, if the run has them."""

_OF_CLASSES = (
    *("text_column", "label_column", "ood", "ood_file", "ood_text_column", "few_shot", "report_rows"),
    *("shift", "shift_column", "shift_task", "shift_file", "shift_text_column", "shift_label_column"),
)
"""Options for runs that predict labels."""

_OF_ONE_LABEL = tuple(name for name in _OF_CLASSES if name.startswith(("ood", "shift")))
"""Options for runs with one label a row."""


def run(given: dict[str, Any]) -> int:
    """Run the command with the options `given` on the command line."""
    folder, info = Path(given["folder"]), info_to_score(given)
    target = Path(given["output_dir"]) if "output_dir" in given else None
    if target is not None:
        check_installed()
        check_new(target)
        check_writable(target)
    task, split = rows_to_score(given, info)
    _check_kind(given, task)
    outside = None
    if {"ood", "ood_file"} & given.keys():
        outside = outside_rows(info, task, given.get("ood_file"), given.get("ood_text_column"))
    columns = shift_columns(task, given.get("shift_column"))
    domain = domain_of(given, info)
    disable_progress_bars()
    loaded = load_to_score(given, info)
    found, evaluation = evaluate_run(loaded, task, split, given, outside, domain, columns)
    if target is not None:
        count = given.get("report_rows", ROWS)
        examples = choose_examples(evaluation, task.splits[split], task, count) if evaluation and count else None
        _write(target, folder, found, described(loaded.model), info, examples)
    if given.get("json"):
        print_json(found)
    else:
        _print(found)
    return 0


def _check_kind(given: dict[str, Any], task: Task) -> None:
    """Refuse options of labels for text, and those of answers for other tasks."""
    if task.kind == "generation":
        refuse(given, _OF_CLASSES, "is given, but the run generates text: leave it out")
    if not is_answered(task):
        refuse(given, OF_ANSWERS, f"is given, but only {' and '.join(TEXT_TASKS)} score answers: leave it out")
    if task.kind == "multiple_choice":
        names = ("ood_text_column", "shift_text_column", "shift_label_column")
        refuse(given, names, "is given, but multiple choice fixes it: leave it out")
    if task.kind == "multi_label":
        refuse(given, _OF_ONE_LABEL, "is given, but the run has several labels a row: leave it out")
    if task.kind == "token_classification":
        refuse(given, (*_OF_ONE_LABEL, "few_shot"), "is given, but the run tags words: leave it out")
        check_span_metrics(task.labels)
    check_text_metrics(task)


def _print(found: dict[str, Any]) -> None:
    drawn = f", {counted(found['samples'], 'sample')}" if found["samples"] else ""
    how = f", by {found['scoring']}" if found.get("scoring") else ""
    words = f", {counted(found['words'], 'word')}" if "words" in found else ""
    print(
        f"{found['folder']} on {found['task']} ({found['split']}, {counted(found['rows'], 'row')}{words}{how}{drawn})"
    )
    if "calibrated" in found:
        by = found["calibrated"]
        fitted = counted(by["rows"], "word" if words else "row")
        print(f"  probabilities by {by['by']}, fitted on {fitted} of {by['source']}")
    width, baseline = max(len(name) for name in found["scores"]), found.get("baseline", {})
    for name, value in found["scores"].items():
        print(f"  {name:<{width}}  {value:.4f}" + (f"  ({baseline[name]:.4f})" if name in baseline else ""))
    if baseline:
        print(f"  {IN_BRACKETS}")
    if "label_scores" in found:
        print("\n".join(label_lines(found["label_scores"])))
    if "ood" in found:
        print("\n".join(detection_lines(found["ood"])))
    if "shift" in found:
        print("\n".join(shift_lines(found["shift"], found["metric"])))


def label_lines(found: dict[str, dict[str, float]]) -> list[str]:
    """Return the lines of the `label_scores` block: a table of scores by label."""
    names = list(dict.fromkeys(name for scores in found.values() for name in scores))
    width = max(len(label) for label in found)
    lines = [f"  {'':<{width}}  " + "  ".join(f"{name:>9}" for name in names)]
    for label, scores in found.items():
        cells = (
            f"{scores[name]:9.0f}" if name in ("rows", "spans") else f"{scores.get(name, math.nan):9.4f}"
            for name in names
        )
        lines.append(f"  {label:<{width}}  " + "  ".join(cells))
    return lines


def detection_lines(block: dict[str, Any]) -> list[str]:
    """Return the lines of the `ood` block: a table of all scores, and one for each source."""
    tables = {"all": block["scores"]} | {name: part["scores"] for name, part in block.get("by_source", {}).items()}
    width = max(len(name) for scores in tables.values() for name in (*scores, *tables))
    lines = [f"out of distribution: {block['name']} ({counted(block['rows'], 'row')})"]
    for source, scores in tables.items():
        lines.append(f"  {source if len(tables) > 1 else '':<{width}}   AUROC    AUPR   FPR95")
        for name, values in scores.items():
            lines.append(
                f"  {name:<{width}}  " + "  ".join(f"{values[key]:.4f}" for key in ("auroc", "aupr", "fpr95"))
            )
    return lines


def shift_lines(block: dict[str, Any], metric: str) -> list[str]:
    """Return the lines of the `shift` block: a table of scores by suite and severity."""
    levels = block["levels"]
    names = [name for name in dict.fromkeys((metric, *_SHIFT_SCORES)) if name in levels[-1]["scores"]]
    columns = f" of {', '.join(block['columns'])}" if block["columns"] else ""
    lines = [f"shift{columns} (seed {block['seed']})"]
    lines.append("  suite        severity  " + "  ".join(f"{name:>8}" for name in names))
    for level in levels:
        scores = "  ".join(f"{level['scores'][name]:>{max(8, len(name))}.4f}" for name in names)
        place = f"  {level['name']}" if "name" in level else ""
        lines.append(f"  {level['suite']:<11}  {level['severity']:>8.0%}  {scores}{place}")
    unchanged = from_json(Shift, block).unchanged
    return [*lines, f"  {unchanged}"] if unchanged else lines


def _write(
    target: Path, folder: Path, found: dict[str, Any], model: dict[str, Any], info: RunInfo, examples: Examples | None
) -> None:
    """Write a folder that `compare` reads like a run's: the run's record with these scores."""
    from bayeslora.report import write_report  # which imports Matplotlib

    trained: dict[str, Any] = {"method": info.method, "model": info.model, "labels": info.labels, **model}
    if (folder / METRICS_FILE).is_file():
        trained |= read_run(folder).to_dict()
    seconds = {**trained.get("seconds", {}), "evaluate": found["seconds"]}
    own = {name: value for name, value in found.items() if name not in ("folder", "seed")}
    for name in ("scores_test", "confusion", "verdict"):
        trained.pop(name, None)
    metrics = {**trained, **own, "seconds": seconds, "evaluated": {"folder": str(folder), "seed": found["seed"]}}
    with new_folder(target) as partial:
        RunRecord.from_dict(metrics).save(partial)
        if examples is not None:
            examples.save(partial)
        for name in ("config.yaml", "adapter_config.json"):
            if (folder / name).is_file():
                shutil.copy(folder / name, partial)
        write_report(partial)
