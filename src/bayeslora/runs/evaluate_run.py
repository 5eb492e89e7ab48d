"""Score a finished run again, or an untrained language model, as the options of `bayeslora evaluate` say."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn

from bayeslora.data import Task
from bayeslora.data.known import KNOWN
from bayeslora.errors import BayesLoraError
from bayeslora.evaluation import Evaluation, MultiLabelEvaluation, evaluate
from bayeslora.prediction import check_samples
from bayeslora.runs.answers import Sampling
from bayeslora.runs.base import (
    LANGUAGE_HEADS,
    base_of,
    check_device_map,
    head_for,
    load_tokenizer,
    longest_input,
    ready,
    resolve_model,
)
from bayeslora.runs.decisions import CALIBRATION_FILE, Calibration, calibration_for
from bayeslora.runs.info import RUN_FILE, RunInfo, refuse
from bayeslora.runs.rows import (
    EVALUATION,
    OutsideRows,
    answering,
    encode_for,
    evaluation_task,
    labelled_rows,
    named_task,
    scored_part,
)
from bayeslora.runs.run import Run, load
from bayeslora.runs.score import answered, foreign_scores, scored
from bayeslora.runs.shift import Domain, conformal_scores, scored_shift
from bayeslora.runs.text_scores import scored_text

UNTRAINED = "none"
"""Method of a model that no run has trained."""
OF_ANSWERS = ("temperature", "cluster_with", "similarity")
"""Options for tasks whose answers are written."""


def info_to_score(given: Mapping[str, Any]) -> RunInfo:
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


def untrained_info(model: str, task: str, few_shot: int = 0) -> RunInfo:
    """Describe an untrained model on a multiple-choice task as a run; `load_to_score` sets `max_length`.

    It answers as usual for the task.

    Raises:
        BayesLoraError: the base model is not a language model; its head would be random.
    """
    usual = KNOWN[task].cloze
    if head_for("multiple_choice", resolve_model(model), model) not in LANGUAGE_HEADS:
        raise BayesLoraError(
            f"{model} is not a run of `bayeslora train`, but an untrained model must be a language model: "
            "name a run or a language model"
        )
    return RunInfo(
        method=UNTRAINED,
        model=model,
        task=task,
        kind="multiple_choice",
        metric="accuracy",
        text_columns=["question", "choices"],
        label_column="label",
        labels=[],
        max_length=0,
        dtype="float32",
        base_fingerprint="",
        base_name=model,
        task_name=task,
        few_shot=few_shot,
        head="cloze" if usual else "letters",
        **(asdict(usual) if usual else {"context": ""}),
    )


def load_to_score(given: Mapping[str, Any], info: RunInfo) -> Run:
    """Load the run that `info_to_score` has read, or the base model that it describes."""
    if info.method != UNTRAINED:
        return replace(load(given["folder"], given.get("model"), device_map=given.get("device_map")), info=info)
    tokenizer = load_tokenizer(resolve_model(info.model), info.model)
    check_device_map(given.get("device_map"))
    base = base_of(info, info.model, tokenizer, given.get("device_map"))
    info.max_length = longest_input(base.model, tokenizer, None, info.head)
    return Run(Path(info.model), ready(base.model), tokenizer, info)


def rows_to_score(given: Mapping[str, Any], info: RunInfo) -> tuple[Task, str]:
    """Return the rows to score and their split, from a file, a named task or the run's data."""
    if "eval_file" in given:
        if info.kind == "multiple_choice":
            refuse(given, ("text_column", "label_column"), "is given, but multiple choice fixes it: leave it out")
        return labelled_rows(info, given["eval_file"], given.get("text_column"), given.get("label_column")), EVALUATION
    if "task" not in given and info.task_name is None:
        if "data_dir" in given or "split" in given:
            raise BayesLoraError("--data-dir or --split is given, but the run was trained on files: give --eval-file")
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


def part_scored(given: Mapping[str, Any], info: RunInfo, split: str) -> str:
    """Return which rows of the run's own files are scored; of others their split."""
    own = None if {"eval_file", "task"} & given.keys() else scored_part(info)
    return own or split


def source_of(given: Mapping[str, Any], task: Task, part: str) -> str:
    """Return where the rows to score come from: the file, or the task and the part of it."""
    return str(given.get("eval_file", f"{task.name}, {part}"))


def domain_of(given: Mapping[str, Any], info: RunInfo) -> Domain | None:
    """Return the rows that `--shift-task` or `--shift-file` names."""
    if "shift_task" in given:
        task = named_task(given["shift_task"], info, given.get("data_dir", info.data_dir))
        return Domain(task.name, task, task.splits[EVALUATION])
    if "shift_file" not in given:
        return None
    file, columns = given["shift_file"], given.get("shift_text_column")
    task = labelled_rows(info, file, columns, given.get("shift_label_column"))
    return Domain(str(file), task, task.splits[EVALUATION])


def evaluate_run(
    loaded: Run,
    task: Task,
    split: str,
    given: Mapping[str, Any],
    outside: OutsideRows | None = None,
    domain: Domain | None = None,
    columns: Sequence[str] = (),
) -> tuple[dict[str, Any], Evaluation | MultiLabelEvaluation | None]:
    """Return what a new `metrics.json` says of the predictions, and the evaluation; None of generated text.

    Args:
        loaded: the run, with its `info` as `info_to_score` gives it.
        task, split: from `rows_to_score`.
        given: options of `bayeslora evaluate`, by name.
        outside, domain: further rows, from `outside_rows` and `domain_of`.
        columns: texts to shift.

    Raises:
        BayesLoraError: the model, the calibration or the samples are not those that are needed.
    """
    info, tokenizer, size = loaded.info, loaded.tokenizer, given.get("batch_size", 64)
    part = part_scored(given, info, split)
    calibration, samples, seed = _calibration(given, info, loaded.model)
    predictor = loaded.predictor if calibration is None else calibration.around(loaded.predictor)
    if not given.get("temperature"):
        check_samples(predictor, samples)

    def encode(rows: Dataset, of: Task) -> Dataset:
        return encode_for(rows, of, tokenizer, info)

    def score(encoded: Dataset, of: Task) -> Any:
        return evaluate(predictor, encoded, of, tokenizer, size, samples, seed)

    rows, evaluation = task.splits[split], None
    encoded = encode(rows, task)
    if info.kind == "generation":
        sampling = Sampling(samples, seed, **{name: given[name] for name in OF_ANSWERS if name in given})
        measured = scored_text(predictor, task, rows, encoded, tokenizer, size, sampling)
    else:
        evaluation = score(encoded, task)
        measured = {**scored(evaluation), "seconds": evaluation.seconds}
    found = {
        **{"folder": str(given["folder"]), "method": info.method, "task": task.name, "split": part},
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
        suites, uncalibrated = given.get("shift", []), given.get("uncalibrated", False)
        more = conformal_scores(Path(given["folder"]), loaded.model, samples, seed, uncalibrated)
        found["shift"] = scored_shift(evaluation, rows, task, encode, score, suites, columns, seed, domain, more)
    return found, evaluation


def _calibration(given: Mapping[str, Any], info: RunInfo, model: nn.Module) -> tuple[Calibration | None, int, int]:
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
