"""`bayeslora calibrate OUT`: prepare conformal sets and the risk of `predict`, or the risk of `generate`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bayeslora.cli.generate import SAMPLING
from bayeslora.cli.inputs import load_run, print_json
from bayeslora.data import Task
from bayeslora.errors import counted
from bayeslora.files import check_writable
from bayeslora.runs.answer_risk import RISK_FILE, AnswerCalibration
from bayeslora.runs.answers import Sampling
from bayeslora.runs.decisions import CALIBRATION_FILE, Calibration
from bayeslora.runs.evaluate_run import part_scored, rows_to_score, source_of
from bayeslora.runs.info import RunInfo, check_one_label_a_row, refuse
from bayeslora.runs.rows import check_not_training
from bayeslora.runs.scaling import ScalingName

_SCALINGS: dict[str, ScalingName] = {"temperature": "temperature", "vector_scaling": "vector", "isotonic": "isotonic"}
"""Maps of the probabilities by option."""
_OF_LABELS = ("score", "by_class", *_SCALINGS, "text_column", "label_column")
_OF_ANSWERS = ("measure", "loss", "max_new_tokens", "token_temperature", "cluster_with", "similarity")
"""Options for one kind of run."""


def run(given: dict[str, Any]) -> int:
    """Run the command with the options `given` on the command line."""
    folder = Path(given["folder"])
    info = RunInfo.load(folder)
    generates = info.kind == "generation"
    if generates:
        refuse(given, _OF_LABELS, "is given, but the run generates text: leave it out")
    else:
        refuse(given, _OF_ANSWERS, "is given, but the run predicts labels: leave it out")
    if info.kind == "token_classification":
        refuse(given, ("score", "by_class"), "is given, but the run tags words: leave it out")
    else:
        check_one_label_a_row(info.kind, "calibrate")
    task, split = rows_to_score(given, info)
    source = source_of(given, task, part_scored(given, info, split))
    file = folder / (RISK_FILE if generates else CALIBRATION_FILE)
    check_writable(file)
    check_not_training(info, source, task, split)
    calibration = (_of_answers if generates else _of_labels)(given, task, split, source)
    found = calibration.summary()
    if given.get("json"):
        print_json({"folder": str(folder), **found})
        return 0
    rows = counted(found["rows"], "word" if info.kind == "token_classification" else "row")
    drawn = f", {counted(found['samples'], 'sample')}" if found["samples"] else ""
    how, *lines = _lines(calibration, found)
    print(f"{file}: {rows} of {source}{drawn}{how}", *lines, sep="\n")
    return 0


def _of_labels(given: dict[str, Any], task: Task, split: str, source: str) -> Calibration:
    """Calibrate a run that predicts labels or numbers."""
    return load_run(given["folder"], given).calibrate_split(
        task,
        split,
        given.get("samples", 0),
        given.get("seed", 0),
        given.get("batch_size", 64),
        source=source,
        score=given.get("score"),
        by_class=given.get("by_class", False),
        scaling=next((scaling for name, scaling in _SCALINGS.items() if name in given), None),
    )


def _of_answers(given: dict[str, Any], task: Task, split: str, source: str) -> AnswerCalibration:
    """Calibrate a run that generates text."""
    names = {name: "token_temperature" if name == "temperature" else name for name in SAMPLING}
    sampling = Sampling(**{name: given[spelt] for name, spelt in names.items() if spelt in given})
    options = {name: given[name] for name in ("measure", "loss") if name in given}
    return load_run(given["folder"], given).calibrate_answers_split(
        task, split, given.get("batch_size", 8), sampling, source=source, **options
    )


def _lines(calibration: Calibration | AnswerCalibration, found: dict[str, Any]) -> Iterator[str]:
    """Yield how it was calibrated, and lines that say what usual coverages and risks mean."""
    if isinstance(calibration, AnswerCalibration):
        yield ""
        yield f"  risk: mean of 1 - {calibration.loss}, {found['risk_of_all']:.3f} if all are answered"
        yield f"  uncertainty: {calibration.measure}"
        for row in found["risk"]:
            yield f"  --risk {row['risk']:<5g} answers {row['answered']:.1%} of these rows"
        yield f"  lowest risk with an answer: {found['lowest_risk']:.2g}"
        return
    if calibration.sets is None:
        yield f", {calibration.scaling}"
        return
    yield f", score {calibration.score}"
    if calibration.scaling is not None:
        yield f"  {calibration.scaling}, fitted on {calibration.scaling.rows} other rows of them"
    for row in found["coverage"]:
        yield f"  --coverage {row['coverage']:<5g} {_limit(row)}"
    for row in found.get("risk", []):
        yield f"  --risk {row['risk']:<9g} answers {row['answered']:.1%} of these rows"
    if unanswered := [f"{row['risk']:g}" for row in found.get("risk", []) if not row["answered"]]:
        yield (
            f"  at a risk of {' or '.join(unanswered)} every row is left to a person: "
            f"{counted(found['rows'], 'row')} of this "
            f"model show none below {found['lowest_risk']:.2g}; give a higher --risk, more rows, or a better model"
        )


def _limit(row: dict[str, Any]) -> str:
    if row.get("labels"):
        return f"too few rows: {', '.join(row['labels'])} in every set"
    return "too few rows: no bounds" if math.isinf(row["limit"]) else f"score up to {row['limit']:.4g}"
