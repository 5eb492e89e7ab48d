"""`bayeslora predict OUT --input F --output G`: write the rows with their predictions, in order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bayeslora.cli.inputs import check_files, load_run
from bayeslora.errors import counted
from bayeslora.runs.decisions import calibration_for
from bayeslora.runs.info import RunInfo, refuse
from bayeslora.runs.prediction_files import write_predictions
from bayeslora.runs.rows import encode_for, rows_to_predict, table_to_predict


def run(given: dict[str, Any]) -> int:
    """Run the command with the options `given` on the command line."""
    folder = Path(given["folder"])
    info = RunInfo.load(folder)
    source, target = check_files(given, info)
    if info.kind == "token_classification":
        refuse(given, ("coverage", "risk", "delta"), "is given, but the run tags words: leave it out")
    asked = {name: given[name] for name in ("coverage", "risk", "delta") if name in given}
    calibration, samples, seed = calibration_for(
        folder,
        given.get("samples"),
        given.get("seed"),
        decides=bool(asked),
        uncalibrated=given.get("uncalibrated", False),
    )
    table = table_to_predict(source, info, given.get("text_column"))
    task = rows_to_predict(table, info, given.get("text_column"))
    loaded = load_run(folder, given)
    data = encode_for(task.eval_split, task, loaded.tokenizer, loaded.info)
    predictions = loaded.predict_encoded(data, samples, seed, given.get("batch_size", 64), calibration, **asked)
    renamed = write_predictions(target, table, predictions)
    by = f", {calibration.scaling}" if calibration is not None and calibration.scaling else ""
    print(f"{target}: {counted(len(predictions), 'row')}{by}")
    if renamed:
        print(f"  columns of the input renamed: {', '.join(f'{old} to {new}' for old, new in renamed.items())}")
    return 0
