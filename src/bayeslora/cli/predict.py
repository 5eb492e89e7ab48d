"""`bayeslora predict OUT --input F --output G.jsonl`: write one prediction per row, in order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bayeslora.cli.inputs import check_files
from bayeslora.cli.progress import disable_progress_bars
from bayeslora.files import write_atomically
from bayeslora.runs.decisions import Calibration
from bayeslora.runs.info import RunInfo
from bayeslora.runs.predictions import Predictions
from bayeslora.runs.rows import encode_for, rows_to_predict
from bayeslora.runs.run import load


def run(given: dict[str, Any]) -> int:
    """Run the command with the options `given` on the command line."""
    folder = Path(given["folder"])
    info = RunInfo.load(folder)
    source, target = check_files(given, info)
    samples, seed, calibration = given.get("samples", 0), given.get("seed", 0), None
    if "coverage" in given or "risk" in given:
        calibration = Calibration.load(folder)
        samples, seed = calibration.check(folder, given.get("samples"), given.get("seed"))
    task = rows_to_predict(source, info, given.get("text_column"))
    disable_progress_bars()
    loaded = load(folder, given.get("model"))
    if calibration is not None:
        calibration.check_model(folder, loaded.model)
    data = encode_for(task.eval_split, task, loaded.tokenizer, loaded.info)
    predictions = loaded.predict_encoded(data, samples, seed, given.get("batch_size", 64))
    if calibration is not None:
        asked = (given.get(name) for name in ("coverage", "risk", "delta"))
        decisions = calibration.decide(predictions.prediction, *asked)
        predictions = Predictions(predictions.prediction, loaded.labels, decisions)
    with write_atomically(target) as partial, partial.open("w", encoding="utf-8") as file:
        for row in predictions:
            file.write(json.dumps(row.to_dict(), ensure_ascii=False) + "\n")
    print(f"{target}: {len(predictions)} rows")
    return 0
