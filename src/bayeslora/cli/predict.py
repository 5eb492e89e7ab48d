"""`bayeslora predict OUT --input F --output G.jsonl`: write one prediction per row, in order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bayeslora.cli.inputs import refuse
from bayeslora.cli.progress import disable_progress_bars
from bayeslora.errors import BayesLoraError
from bayeslora.files import write_atomically
from bayeslora.runs.info import RunInfo
from bayeslora.runs.rows import encode_for, rows_to_predict
from bayeslora.runs.run import load


def run(given: dict[str, Any]) -> int:
    """Run the command with the options `given` on the command line."""
    folder, source, target = Path(given["folder"]), Path(given["input"]), Path(given["output"])
    size = given.get("batch_size", 64)
    info = RunInfo.load(folder)
    if target.is_dir() or not target.absolute().parent.is_dir():
        raise BayesLoraError(f"--output is {target}, but must be a file in an existing folder: name another path")
    if target.exists() and source.exists() and target.samefile(source):
        raise BayesLoraError(f"--output is {target}, but must not be the input file: name another file")
    if info.kind == "multiple_choice":
        refuse(given, ("text_column",), "is given, but multiple choice fixes it: leave it out")
    task = rows_to_predict(source, info, given.get("text_column"))
    disable_progress_bars()
    loaded = load(folder, given.get("model"))
    data = encode_for(task.eval_split, task, loaded.tokenizer, loaded.info)
    predictions = loaded.predict_encoded(data, given.get("samples", 0), given.get("seed", 0), size)
    with write_atomically(target) as partial, partial.open("w", encoding="utf-8") as file:
        for row in predictions:
            file.write(json.dumps(row.to_dict(), ensure_ascii=False) + "\n")
    print(f"{target}: {len(predictions)} rows")
    return 0
