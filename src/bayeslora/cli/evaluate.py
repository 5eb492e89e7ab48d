"""`bayeslora evaluate OUT`: score a finished run without changing it."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn

from bayeslora.cli.inputs import load_run, refuse
from bayeslora.cli.progress import disable_progress_bars
from bayeslora.data import Task
from bayeslora.data.known import KNOWN
from bayeslora.errors import BayesLoraError, counted
from bayeslora.evaluation import Evaluation, evaluate
from bayeslora.evaluation.tagging import check_span_metrics
from bayeslora.files import check_new, check_writable, finite, new_folder
from bayeslora.prediction import check_samples
from bayeslora.report import check_installed
from bayeslora.runs.answers import Sampling
from bayeslora.runs.decisions import CALIBRATION_FILE, Calibration, calibration_for
from bayeslora.runs.examples import ROWS, Examples, choose_examples
from bayeslora.runs.info import RUN_FILE, RunInfo
from bayeslora.runs.record import IN_BRACKETS, METRICS_FILE, RunRecord, Shift, read_run
from bayeslora.runs.rows import (
    EVALUATION,
    OutsideRows,
    answering,
    encode_for,
    evaluation_task,
    labelled_rows,
    named_task,
    outside_rows,
    own_rows,
    scored_part,
)
from bayeslora.runs.schema import from_json
from bayeslora.runs.score import answered, described, foreign_scores, scored
from bayeslora.runs.shift import Domain, conformal_scores, scored_shift, shift_columns
from bayeslora.runs.text_scores import check_text_metrics, is_answered, scored_text
from bayeslora.runs.zero_shot import UNTRAINED, load_untrained, untrained_info
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

_OF_ANSWERS = ("temperature", "cluster_with", "similarity")
"""Options for tasks whose answers are written."""


def run(given: dict[str, Any]) -> int:
    """Run the command with the options `given` on the command line."""
    folder, size = Path(given["folder"]), given.get("batch_size", 64)
    info = _info(given)
    target = _target(given)
    task, split = rows_to_score(given, info)
    part = part_scored(given, info, split)
    _check_kind(given, task)
    outside = _outside(given, info, task)
    columns = shift_columns(task, given.get("shift_column"))
    domain = _domain(given, info)
    disable_progress_bars()
    if info.method == UNTRAINED:
        loaded = load_untrained(info, given.get("device_map"))
    else:
        loaded = replace(load_run(folder, given), info=info)
    uncalibrated = given.get("uncalibrated", False)
    calibration, samples, seed = _calibration(given, info, loaded.model)
    predictor = loaded.predictor if calibration is None else calibration.around(loaded.predictor)
    if not given.get("temperature"):
        check_samples(predictor, samples)

    def encode(rows: Dataset, of: Task) -> Dataset:
        return encode_for(rows, of, loaded.tokenizer, loaded.info)

    def score(encoded: Dataset, of: Task) -> Any:
        return evaluate(predictor, encoded, of, loaded.tokenizer, size, samples, seed)

    rows, evaluation = task.splits[split], None
    encoded = encode(rows, task)
    if info.kind == "generation":
        sampling = Sampling(samples, seed, **{name: given[name] for name in _OF_ANSWERS if name in given})
        measured = scored_text(predictor, task, rows, encoded, loaded.tokenizer, size, sampling)
    else:
        evaluation = score(encoded, task)
        measured = {**scored(evaluation), "seconds": evaluation.seconds}
    found = {
        **{"folder": str(folder), "method": info.method, "task": task.name, "split": part},
        "rows": measured.pop("rows"),
        **answered(info),
        **({} if calibration is None else _calibrated(calibration, source_of(given, task, part))),
        "seed": seed,
        "metric": task.metric,
        **measured,
    }
    if outside is not None and isinstance(evaluation, Evaluation):
        found |= foreign_scores(loaded, predictor, task, split, evaluation, outside, size, seed)
    if ("shift" in given or domain is not None) and isinstance(evaluation, Evaluation):
        suites = given.get("shift", [])
        more = conformal_scores(folder, loaded.model, samples, seed, uncalibrated)
        found["shift"] = scored_shift(evaluation, rows, task, encode, score, suites, columns, seed, domain, more)
    if target is not None:
        count = given.get("report_rows", ROWS)
        examples = choose_examples(evaluation, rows, task, count) if evaluation and count else None
        _write(target, folder, found, described(loaded.model), info, examples)
    if given.get("json"):
        print(json.dumps(finite(found), indent=2, ensure_ascii=False))
    else:
        _print(found)
    return 0


def part_scored(given: dict[str, Any], info: RunInfo, split: str) -> str:
    """Return which rows of the run's own files are scored; of others their split."""
    own = None if {"eval_file", "task"} & given.keys() else scored_part(info)
    return own or split


def _check_kind(given: dict[str, Any], task: Task) -> None:
    """Refuse options of labels for text, and those of answers for other tasks."""
    if task.kind == "generation":
        refuse(given, _OF_CLASSES, "is given, but the run generates text: leave it out")
    if not is_answered(task):
        refuse(given, _OF_ANSWERS, f"is given, but only {' and '.join(TEXT_TASKS)} score answers: leave it out")
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


def _info(given: dict[str, Any]) -> RunInfo:
    """Read the run in the folder, or describe an untrained language model on a multiple-choice task.

    `--few-shot`, `--scoring` and `--normalization` override those that the run was trained with.
    """
    folder = Path(given["folder"])
    known = KNOWN.get(given.get("task", ""))
    if (folder / RUN_FILE).is_file() or known is None or known.kind != "multiple_choice":
        info = RunInfo.load(folder)
        info = replace(info, few_shot=given.get("few_shot", info.few_shot))
    else:
        info = untrained_info(str(given["folder"]), str(given["task"]), given.get("few_shot", 0))
    return answering(info, given.get("scoring"), given.get("normalization"))


def _outside(given: dict[str, Any], info: RunInfo, task: Task) -> OutsideRows | None:
    """Return the rows that `--ood` or `--ood-file` asks for."""
    if "ood" not in given and "ood_file" not in given:
        return None
    if info.kind == "multiple_choice":
        refuse(given, ("ood_text_column",), "is given, but multiple choice fixes it: leave it out")
    file = None if "ood" in given else Path(given["ood_file"])
    return outside_rows(info, task, file, given.get("ood_text_column"))


def _domain(given: dict[str, Any], info: RunInfo) -> Domain | None:
    """Return the rows that `--shift-task` or `--shift-file` names."""
    if "shift_task" in given:
        task = named_task(given["shift_task"], info, given.get("data_dir", info.data_dir))
        return Domain(task.name, task, task.splits[EVALUATION])
    if "shift_file" not in given:
        return None
    if info.kind == "multiple_choice":
        names = ("shift_text_column", "shift_label_column")
        refuse(given, names, "is given, but multiple choice fixes it: leave it out")
    file, columns = given["shift_file"], given.get("shift_text_column")
    task = labelled_rows(info, file, columns, given.get("shift_label_column"))
    return Domain(str(file), task, task.splits[EVALUATION])


def _calibration(given: dict[str, Any], info: RunInfo, model: nn.Module) -> tuple[Calibration | None, int, int]:
    """Return the calibration whose map the scores use, if there is one, the number of samples and the seed."""
    folder = Path(given["folder"])
    found, samples, seed = calibration_for(
        folder, given.get("samples"), given.get("seed"), uncalibrated=given.get("uncalibrated", False)
    )
    if found is not None:
        if info != RunInfo.load(folder):
            raise BayesLoraError(
                f"{folder / CALIBRATION_FILE} has a {found.scaling} for answers as trained, but others are asked for: "
                "add --uncalibrated"
            )
        found.check_model(folder, model)
    # Without samples any seed is that of the calibration; this one shifts texts.
    return found, samples, given.get("seed", seed)


def _calibrated(calibration: Calibration, source: str) -> dict[str, Any]:
    """Return the `calibrated` block of `metrics.json`; warn if the rows of `source` are those of the calibration."""
    scaling, unit = calibration.scaling, "words" if calibration.sets is None else "rows"
    assert scaling is not None
    if source == calibration.source:
        warnings.warn(
            f"the {scaling} was fitted on {scaling.rows} of these {unit}, so that they have better scores than others",
            stacklevel=2,
        )
    return {"calibrated": {"by": str(scaling), "rows": scaling.rows, "source": calibration.source}}


def source_of(given: dict[str, Any], task: Task, part: str) -> str:
    """Return where the rows to score come from: the file, or the task and the part of it."""
    return str(given.get("eval_file", f"{task.name}, {part}"))


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


def _target(given: dict[str, Any]) -> Path | None:
    """Return `--output-dir`; it must not exist."""
    if "output_dir" not in given:
        return None
    check_installed()
    target = Path(given["output_dir"])
    check_new(target)
    check_writable(target)
    return target


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


def rows_to_score(given: dict[str, Any], info: RunInfo) -> tuple[Task, str]:
    """Return the rows to score and their split, from a file, a named task or the run's data."""
    if "eval_file" in given:
        if info.kind == "multiple_choice":
            refuse(given, ("text_column", "label_column"), "is given, but multiple choice fixes it: leave it out")
        return labelled_rows(info, given["eval_file"], given.get("text_column"), given.get("label_column")), EVALUATION
    if "task" not in given and info.task_name is None:
        if "data_dir" in given or "split" in given:
            raise BayesLoraError("--data-dir or --split is given, but the run was trained on files: give --eval-file")
        if info.kind == "generation":
            return own_rows(info), EVALUATION
        task = evaluation_task(info, given.get("text_column"), given.get("label_column"))
        return replace(task, name=info.task), EVALUATION
    refuse(given, ("text_column", "label_column"), "is given, but needs --eval-file: add that or leave this out")
    name = str(given.get("task", info.task_name))
    own = name == info.task_name
    task = named_task(name, info, given.get("data_dir", info.data_dir if own else None))
    split = given.get("split", EVALUATION)
    if split not in task.splits:
        raise BayesLoraError(f"--split is {split!r}, but task {name} has {', '.join(task.splits)}: name one of these")
    return task, split
