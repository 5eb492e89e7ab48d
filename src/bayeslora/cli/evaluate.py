"""`bayeslora evaluate OUT`: the scores of a finished run; nothing is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bayeslora.cli.coercion import coerce
from bayeslora.cli.models import RunInfo, load_run
from bayeslora.cli.results import EVALUATION, finite
from bayeslora.errors import BayesLoraError
from bayeslora.evaluation import Task, encode_texts, evaluate, load_files, load_task
from bayeslora.prediction import check_samples


def run(given: dict[str, Any]) -> int:
    """The command; `given` are the options on the command line."""
    folder = Path(given["folder"])
    batch_size = positive_batch(given)
    info = RunInfo.load(folder)
    task, split = _task(given, info)
    model, tokenizer, info = load_run(folder, given.get("model"))
    samples = given.get("samples", 0)
    check_samples(model, samples)
    data = encode_texts(task.splits[split], task.text_columns, tokenizer, info.max_length)
    evaluation = evaluate(model, data, task, tokenizer, batch_size=batch_size)
    found = {
        "folder": str(folder),
        "method": info.method,
        "task": task.name,
        "split": split,
        "rows": len(data),
        "samples": samples,
        "metric": task.metric,
        "scores": evaluation.scores,
        "reliability": {"bins": evaluation.reliability},
        "seconds": evaluation.seconds,
    }
    if given.get("json"):
        print(json.dumps(finite(found), indent=2, ensure_ascii=False))
        return 0
    print(f"{folder} on {task.name} ({split}, {found['rows']} rows)")
    width = max(len(name) for name in evaluation.scores)
    for name, value in evaluation.scores.items():
        print(f"  {name:<{width}}  {value:.4f}")
    return 0


def positive_batch(given: dict[str, Any]) -> int:
    """`--batch-size`, 64 by default."""
    size = int(given.get("batch_size", 64))
    if size < 1:
        raise BayesLoraError(f"--batch-size is {size}; give at least 1.")
    return size


def text_columns(given: dict[str, Any], info: RunInfo) -> list[str]:
    """`--text-column`, by default the columns the run was trained on; as many as those."""
    if "text_column" not in given:
        return info.text_columns
    columns = coerce("text_column", given["text_column"], list[str])
    if len(columns) != len(info.text_columns):
        raise BayesLoraError(
            f"--text-column names {len(columns)} columns, but the run was trained on {len(info.text_columns)}; "
            "name as many."
        )
    return list(columns)


def _task(given: dict[str, Any], info: RunInfo) -> tuple[Task, str]:
    """The rows to score on: a file, a named task, or what the run was trained with."""
    if "eval_file" in given:
        for name in ("task", "data_dir", "split"):
            if name in given:
                raise BayesLoraError(f"--eval-file contradicts --{name.replace('_', '-')}; give one of them.")
        return _from_file(given, info, given["eval_file"])
    if "task" not in given and info.task_name is None:
        if "data_dir" in given or "split" in given:
            raise BayesLoraError("the run was trained on files, which have no named splits; give --eval-file.")
        return _from_file(given, info, info.files["eval_file"])
    for name in ("text_column", "label_column"):
        if name in given:
            raise BayesLoraError(f"--{name.replace('_', '-')} is of use only with --eval-file; leave it out.")
    name = str(given.get("task", info.task_name))
    task = load_task(name, given.get("data_dir", info.data_dir if name == info.task_name else None))
    if list(task.labels) != info.labels:
        raise BayesLoraError(
            f"task {name} has labels {', '.join(task.labels) or 'none'}, but the run was trained on "
            f"{', '.join(info.labels) or 'numbers'}; name a task with the same labels."
        )
    split = given.get("split", EVALUATION)
    if split not in task.splits:
        raise BayesLoraError(f"task {name} has no split {split!r}; its splits are {', '.join(task.splits)}.")
    return task, split


def _from_file(given: dict[str, Any], info: RunInfo, path: str) -> tuple[Task, str]:
    """The rows of a file, their labels as the ids the run was trained with."""
    columns, label_column = text_columns(given, info), given.get("label_column", info.label_column)
    # The file stands for the training data too: with the class names given, nothing is learned from it.
    return load_files(path, path, columns, label_column, labels=info.labels or None, kind=info.kind), EVALUATION
