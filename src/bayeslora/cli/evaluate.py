"""`bayeslora evaluate OUT`: the scores of a finished run, which stays as it is."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from bayeslora.cli.choices import encoded_for, labelled_rows
from bayeslora.cli.folders import new_folder
from bayeslora.cli.inputs import positive_batch
from bayeslora.cli.models import RunInfo, with_posterior
from bayeslora.cli.ood import detected, detection_lines, outside_rows
from bayeslora.cli.results import EVALUATION, described, finite, save_json, scored
from bayeslora.cli.untrained import load, run_info
from bayeslora.data import Task, load_task
from bayeslora.errors import BayesLoraError
from bayeslora.evaluation import evaluate, predict_dataset
from bayeslora.prediction import check_samples


def run(given: dict[str, Any]) -> int:
    """The command; `given` are the options on the command line."""
    folder = Path(given["folder"])
    batch_size = positive_batch(given)
    info = run_info(given)
    target = _target(given)
    task, split = _task(given, info)
    outside = outside_rows(given, info, task)
    model, tokenizer, info = load(given, info)
    samples, seed = given.get("samples", 0), given.get("seed", 0)
    predictor = with_posterior(model, folder)
    check_samples(predictor, samples)
    data = encoded_for(task.splits[split], task, tokenizer, info)
    evaluation = evaluate(predictor, data, task, tokenizer, batch_size, samples, seed)
    found = {
        "folder": str(folder),
        "method": info.method,
        "task": task.name,
        "split": split,
        "rows": len(data),
        "seed": seed,
        "metric": task.metric,
        **scored(evaluation),
        "seconds": evaluation.seconds,
    }
    if outside is not None:
        foreign = encoded_for(outside.rows, outside.task, tokenizer, info)
        prediction = predict_dataset(predictor, foreign, tokenizer, batch_size, samples, seed)
        found["uncertainty"] = evaluation.histograms(prediction)
        found["ood"] = detected(outside, evaluation, prediction)
    if target is not None:
        _write(target, folder, found, described(model), info)
    if given.get("json"):
        print(json.dumps(finite(found), indent=2, ensure_ascii=False))
        return 0
    drawn = f", {samples} samples" if samples else ""
    print(f"{folder} on {task.name} ({split}, {found['rows']} rows{drawn})")
    width = max(len(name) for name in evaluation.scores)
    for name, value in evaluation.scores.items():
        print(f"  {name:<{width}}  {value:.4f}")
    if "ood" in found:
        print("\n".join(detection_lines(found["ood"])))
    return 0


def _target(given: dict[str, Any]) -> Path | None:
    """`--output-dir`, refused before any work is done where it exists."""
    if "output_dir" not in given:
        return None
    target = Path(given["output_dir"])
    if target.exists():
        raise BayesLoraError(f"output folder {target} exists; name a new one or delete it.")
    return target


def _write(target: Path, folder: Path, found: dict[str, Any], model: dict[str, Any], info: RunInfo) -> None:
    """The scores as a folder that `compare` reads like the run's own: its facts, with these scores in their place."""
    from bayeslora.report import write_figures

    trained: dict[str, Any] = {"method": info.method, "model": info.model, "labels": info.labels, **model}
    if (folder / "metrics.json").is_file():
        trained |= json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    seconds = {**trained.get("seconds", {}), "evaluate": found["seconds"]}
    own = {name: value for name, value in found.items() if name not in ("folder", "seed")}
    metrics = {**trained, **own, "seconds": seconds, "evaluated": {"folder": str(folder), "seed": found["seed"]}}
    for name in ("scores_test", "confusion"):
        metrics.pop(name, None)
    with new_folder(target) as partial:
        save_json(partial / "metrics.json", metrics)
        for name in ("config.yaml", "adapter_config.json"):
            if (folder / name).is_file():
                shutil.copy(folder / name, partial)
        write_figures(partial)


def _task(given: dict[str, Any], info: RunInfo) -> tuple[Task, str]:
    """The rows to score on: a file, a named task, or what the run was trained with."""
    if "eval_file" in given:
        for name in ("task", "data_dir", "split"):
            if name in given:
                raise BayesLoraError(f"--eval-file contradicts --{name.replace('_', '-')}; give one of them.")
        return labelled_rows(given, info, given["eval_file"])
    if "task" not in given and info.task_name is None:
        if "data_dir" in given or "split" in given:
            raise BayesLoraError("the run was trained on files, which have no named splits; give --eval-file.")
        task, split = labelled_rows(given, info, info.files["eval_file"])
        # The run's own rows, under the name that the run gives them.
        return replace(task, name=info.task), split
    for name in ("text_column", "label_column"):
        if name in given:
            raise BayesLoraError(f"--{name.replace('_', '-')} is of use only with --eval-file; leave it out.")
    name = str(given.get("task", info.task_name))
    own = name == info.task_name
    task = load_task(
        name, given.get("data_dir", info.data_dir if own else None), train_split=info.train_split if own else None
    )
    # Letters are the same for every multiple-choice task, and an item says how many of them it has.
    fits = task.kind == info.kind and (task.kind == "multiple_choice" or list(task.labels) == info.labels)
    if not fits:
        raise BayesLoraError(
            f"task {name} has labels {', '.join(task.labels) or 'none'}, but the run was trained on "
            f"{', '.join(info.labels) or 'numbers'}; name a task with the same labels."
        )
    split = given.get("split", EVALUATION)
    if split not in task.splits:
        raise BayesLoraError(f"task {name} has no split {split!r}; its splits are {', '.join(task.splits)}.")
    return task, split
