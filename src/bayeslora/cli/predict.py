"""`bayeslora predict OUT --input F --output G.jsonl`: one line a row, in order."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from bayeslora.cli.choices import encoded_for, rows_to_predict
from bayeslora.cli.inputs import positive_batch
from bayeslora.cli.models import RunInfo, load_run, with_posterior
from bayeslora.errors import BayesLoraError
from bayeslora.evaluation import predict_dataset
from bayeslora.prediction import Prediction, check_samples


def run(given: dict[str, Any]) -> int:
    """The command; `given` are the options on the command line."""
    folder, source, target = Path(given["folder"]), Path(given["input"]), Path(given["output"])
    batch_size = positive_batch(given)
    info = RunInfo.load(folder)
    if target.is_dir() or not target.absolute().parent.is_dir():
        raise BayesLoraError(f"--output {target} cannot be a file; name a file in an existing folder.")
    if target.exists() and source.exists() and target.samefile(source):
        raise BayesLoraError(f"--output {target} is the input file; name another file.")
    task = rows_to_predict(given, info, source)
    model, tokenizer, info = load_run(folder, given.get("model"))
    samples = given.get("samples", 0)
    predictor = with_posterior(model, folder)
    check_samples(predictor, samples)
    data = encoded_for(task.eval_split, task, tokenizer, info)
    prediction = predict_dataset(predictor, data, tokenizer, batch_size, samples, given.get("seed", 0))
    _write(target, prediction, info)
    print(f"{target}: {len(prediction)} rows")
    return 0


def _uncertainty(prediction: Prediction, row: int, regression: bool) -> dict[str, Any]:
    """How sure a row's prediction is: a classifier's in nats, a regression's spread over the samples."""
    entropies = ("entropy", "expected_entropy", "mutual_information")
    if regression:
        return {"probabilities": None, **dict.fromkeys(entropies), "std": float(prediction.std[row])}
    values = {name: float(getattr(prediction, name)[row]) for name in entropies}
    return {"probabilities": prediction.probabilities[row].tolist(), **values}


def _write(target: Path, prediction: Prediction, info: RunInfo) -> None:
    """Write beside the target, then rename: a reader never sees half of it."""
    partial = target.with_name(target.name + ".partial")
    regression = info.kind == "regression"
    try:
        with partial.open("w", encoding="utf-8") as file:
            for row in range(len(prediction)):
                label = float(prediction.labels[row]) if regression else info.labels[int(prediction.labels[row])]
                line = {"label": label, **_uncertainty(prediction, row, regression)}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
