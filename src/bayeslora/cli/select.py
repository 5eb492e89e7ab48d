"""`bayeslora select OUT --input F --budget N --output G.jsonl`: choose the rows to label next."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from bayeslora.cli.inputs import check_files, load_run
from bayeslora.data.encode_words import has_words, word_rows
from bayeslora.data.tagged import OFFSETS
from bayeslora.errors import BayesLoraError, counted
from bayeslora.evaluation import predict_dataset
from bayeslora.files import write_atomically
from bayeslora.posthoc import select_rows
from bayeslora.posthoc.acquisition import row_means
from bayeslora.prediction import check_samples
from bayeslora.runs.info import RunInfo
from bayeslora.runs.rows import encode_for, rows_to_predict
from bayeslora.runs.run import Run

_ADDED = ("row", "entropy", "mutual_information")
_OTHERS_THAN_CLASSES = {"regression": "predicts numbers", "multi_label": "has several labels a row"}
_OTHERS = "give --score entropy, margin or random"


def run(given: dict[str, Any]) -> int:
    """Run the command with the options `given` on the command line."""
    folder, budget, score = Path(given["folder"]), given["budget"], given.get("score", "mutual_information")
    info = RunInfo.load(folder)
    source, target = check_files(given, info)
    if what := _OTHERS_THAN_CLASSES.get(info.kind):
        raise BayesLoraError(f"{folder} {what}, but select needs a classifier: use a run with one label a row")
    by_information = score == "mutual_information"
    samples, seed = given.get("samples", 10 if by_information else 0), given.get("seed", 0)
    if by_information and samples < 2:
        raise BayesLoraError(f"--samples is {samples}, but mutual_information needs at least 2: give 10, or {_OTHERS}")
    task = rows_to_predict(source, info, given.get("text_column"))
    rows = task.eval_split
    if budget > len(rows):
        raise BayesLoraError(
            f"--budget is {budget}, but {source} has {counted(len(rows), 'row')}: give at most {len(rows)}"
        )
    if taken := [name for name in _ADDED if name in rows.column_names]:
        raise BayesLoraError(f"{source} has the column {taken[0]!r}, but select adds one of that name: rename it")
    loaded = load_run(folder, given)
    _check_randomness(loaded, samples, by_information)
    data = encode_for(rows, task, loaded.tokenizer, loaded.info)
    prediction = predict_dataset(
        loaded.predictor, data, loaded.tokenizer, given.get("batch_size", 64), samples, seed, per_sample=True
    )
    of_row = word_rows(data) if has_words(data) else np.arange(len(rows))
    means = [row_means(values, of_row) for values in (prediction.entropy, prediction.mutual_information)]
    shown = rows.remove_columns([name for name in rows.column_names if name == OFFSETS and has_words(data)])
    with write_atomically(target) as partial, partial.open("w", encoding="utf-8") as file:
        for row in select_rows(prediction, budget, score, seed, of_row):
            values = (row + 1, *(float(of_rows[row]) for of_rows in means))
            line = {**dict(zip(_ADDED, values, strict=True)), **shown[row]}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    print(f"{target}: {budget} of {len(rows)} rows by {score}")
    return 0


def _check_randomness(loaded: Run, samples: int, by_information: bool) -> None:
    try:
        check_samples(loaded.predictor, samples)
    except BayesLoraError:
        if not by_information:
            raise
        raise BayesLoraError(
            f"--score is mutual_information, but {loaded.folder} is deterministic, so that it is 0 for every row: "
            f"{_OTHERS}"
        ) from None
