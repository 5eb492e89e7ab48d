"""`bayeslora calibrate OUT`: prepare conformal sets and the risk of `predict`, or the risk of `generate`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from bayeslora.cli.evaluate import part_scored, rows_to_score, source_of
from bayeslora.cli.generate import SAMPLING
from bayeslora.cli.inputs import load_run, refuse
from bayeslora.cli.progress import disable_progress_bars
from bayeslora.data import Task
from bayeslora.errors import counted
from bayeslora.files import check_writable, finite
from bayeslora.runs.answer_risk import RISK_FILE
from bayeslora.runs.answers import Sampling
from bayeslora.runs.decisions import CALIBRATION_FILE
from bayeslora.runs.info import RunInfo, check_one_label_a_row
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
    if info.kind == "generation":
        refuse(given, _OF_LABELS, "is given, but the run generates text: leave it out")
    else:
        refuse(given, _OF_ANSWERS, "is given, but the run predicts labels: leave it out")
    if info.kind == "token_classification":
        refuse(given, ("score", "by_class"), "is given, but the run tags words: leave it out")
    else:
        check_one_label_a_row(info.kind, "calibrate")
    task, split = rows_to_score(given, info)
    source = source_of(given, task, part_scored(given, info, split))
    check_not_training(info, source, split)
    check_writable(folder / (RISK_FILE if info.kind == "generation" else CALIBRATION_FILE))
    disable_progress_bars()
    if info.kind == "generation":
        return _of_answers(given, task, split, source)
    calibration = load_run(folder, given).calibrate_split(
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
    found = calibration.summary()
    if given.get("json"):
        print(json.dumps(finite({"folder": str(folder), **found}), indent=2, ensure_ascii=False))
        return 0
    drawn = f", {counted(calibration.samples, 'sample')}" if calibration.samples else ""
    if calibration.sets is None:
        words = counted(calibration.rows, "word")
        print(f"{folder / CALIBRATION_FILE}: {words} of {source}{drawn}, {calibration.scaling}")
        return 0
    print(
        f"{folder / CALIBRATION_FILE}: {counted(calibration.rows, 'row')} of {source}{drawn}, score "
        f"{calibration.score}"
    )
    if calibration.scaling is not None:
        print(f"  {calibration.scaling}, fitted on {calibration.scaling.rows} other rows of them")
    for row in found["coverage"]:
        print(f"  --coverage {row['coverage']:<5g} {_limit(row)}")
    for row in found.get("risk", []):
        print(f"  --risk {row['risk']:<9g} answers {row['answered']:.1%} of these rows")
    if unanswered := [f"{row['risk']:g}" for row in found.get("risk", []) if not row["answered"]]:
        print(
            f"  at a risk of {' or '.join(unanswered)} every row is left to a person: "
            f"{counted(found['rows'], 'row')} of this "
            f"model show none below {found['lowest_risk']:.2g}; give a higher --risk, more rows, or a better model"
        )
    return 0


def _of_answers(given: dict[str, Any], task: Task, split: str, source: str) -> int:
    """Calibrate a run that generates text, and say what usual risks mean."""
    folder = Path(given["folder"])
    names = {name: "token_temperature" if name == "temperature" else name for name in SAMPLING}
    sampling = Sampling(**{name: given[spelt] for name, spelt in names.items() if spelt in given})
    options = {name: given[name] for name in ("measure", "loss") if name in given}
    calibration = load_run(folder, given).calibrate_answers_split(
        task, split, given.get("batch_size", 8), sampling, source=source, **options
    )
    found = calibration.summary()
    if given.get("json"):
        print(json.dumps(finite({"folder": str(folder), **found}), indent=2, ensure_ascii=False))
        return 0
    drawn = f", {counted(sampling.samples, 'sample')}" if sampling.samples else ""
    print(f"{folder / RISK_FILE}: {counted(calibration.rows, 'row')} of {source}{drawn}")
    print(f"  risk: mean of 1 - {calibration.loss}, {found['risk_of_all']:.3f} if all are answered")
    print(f"  uncertainty: {calibration.measure}")
    for row in found["risk"]:
        print(f"  --risk {row['risk']:<5g} answers {row['answered']:.1%} of these rows")
    print(f"  lowest risk with an answer: {found['lowest_risk']:.2g}")
    return 0


def _limit(row: dict[str, Any]) -> str:
    if row.get("labels"):
        return f"too few rows: {', '.join(row['labels'])} in every set"
    if math.isinf(row["limit"]):
        return "too few rows: no bounds"
    return f"score up to {row['limit']:.4g}"
