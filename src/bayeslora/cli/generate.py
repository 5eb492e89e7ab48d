"""`bayeslora generate OUT --input F --output G.jsonl`: answer prompts, with the uncertainty of each answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bayeslora.cli.inputs import check_output
from bayeslora.cli.progress import disable_progress_bars
from bayeslora.files import finite, write_atomically
from bayeslora.runs.answers import Sampling, answer_rows, check_generates, read_prompts
from bayeslora.runs.info import RunInfo
from bayeslora.runs.run import load

_SAMPLING = ("samples", "seed", "max_new_tokens", "temperature")


def run(given: dict[str, Any]) -> int:
    """Run the command with the options `given` on the command line."""
    folder, source = Path(given["folder"]), Path(given.get("input", ""))
    info = RunInfo.load(folder)
    check_generates(info)
    target = check_output(Path(given["output"]), source) if "output" in given else None
    sampling = Sampling(**{name: given[name] for name in _SAMPLING if name in given})
    rows = read_prompts(source if "input" in given else given["prompt"], info)
    disable_progress_bars()
    loaded = load(folder, given.get("model"))
    answers = answer_rows(loaded.predictor, loaded.tokenizer, rows, sampling, given.get("batch_size", 8))
    lines = [json.dumps(finite(answer.to_dict()), ensure_ascii=False) + "\n" for answer in answers]
    if target is None:
        print("".join(lines), end="")
        return 0
    with write_atomically(target) as partial:
        partial.write_text("".join(lines), encoding="utf-8")
    print(f"{target}: {len(answers)} answers")
    return 0
