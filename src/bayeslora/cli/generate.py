"""`bayeslora generate OUT --input F --output G.jsonl`: answer prompts, with the uncertainty of each answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bayeslora.cli.inputs import check_output, load_run
from bayeslora.errors import BayesLoraError, counted
from bayeslora.files import write_atomically
from bayeslora.methods.registry import title_of
from bayeslora.model_card import public_name
from bayeslora.report import check_installed, write_answers
from bayeslora.runs.answer_risk import AnswerCalibration
from bayeslora.runs.answers import Sampling, check_generates, read_prompts
from bayeslora.runs.info import RunInfo
from bayeslora.runs.prediction_files import answer_lines

SAMPLING = ("samples", "seed", "max_new_tokens", "temperature", "cluster_with", "similarity")
"""Options that are fields of `Sampling`."""


def run(given: dict[str, Any]) -> int:
    """Run the command with the options `given` on the command line."""
    folder, source = Path(given["folder"]), Path(given.get("input", ""))
    info = RunInfo.load(folder)
    check_generates(info)
    target = check_output(Path(given["output"]), source) if "output" in given else None
    page = check_output(Path(given["html"]), source, "--html") if "html" in given else None
    if page is not None:
        check_installed()
        if target is not None and page.absolute() == target.absolute():
            raise BayesLoraError(f"--html is {page}, but --output is the same file: name another")
    chosen = {name: given[name] for name in SAMPLING if name in given}
    sampling = AnswerCalibration.load(folder).settings(folder, chosen) if "risk" in given else Sampling(**chosen)
    rows = read_prompts(source if "input" in given else given["prompt"], info)
    loaded = load_run(folder, given)
    answers = loaded.generate_rows(rows, given.get("batch_size", 8), given.get("risk"), given.get("delta"), **chosen)
    lines = answer_lines(rows, answers)
    if page is not None:
        drawn = f" · {counted(sampling.samples, 'draw')}" if sampling.samples else ""
        write_answers(
            page, answers, f"Answers of {title_of(info.method)}", f"{public_name(info.model)} · {info.task}{drawn}"
        )
    if target is None:
        print("".join(lines), end="")
        return 0
    with write_atomically(target) as partial:
        partial.write_text("".join(lines), encoding="utf-8")
    asked = f", {sum(bool(answer.ask_a_human) for answer in answers)} left to a person" if "risk" in given else ""
    print(f"{target}: {counted(len(answers), 'answer')}{asked}")
    return 0
