"""Check options and files, load a run from its folder and print JSON, for all commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayeslora.errors import BayesLoraError
from bayeslora.files import check_writable, finite
from bayeslora.runs.info import RUN_FILE, RunInfo, refuse

if TYPE_CHECKING:
    from bayeslora.runs.run import Run

_TABLES = (".parquet", ".xlsx", ".xls", ".arrow", ".feather")
"""Extensions of tables that are no text, which no command writes."""
_OF_A_RUN = (".json", ".yaml", ".safetensors", ".md")
"""Extensions of the files in a run's folder that hold it; predictions have others."""


def load_run(folder: str | Path, given: dict[str, Any]) -> Run:
    """Load the run in `folder` with its base from `--model`, spread over devices by `--device-map`.

    Other libraries' progress bars are turned off from then on.
    """
    from bayeslora.cli.progress import disable_progress_bars  # which imports PyTorch
    from bayeslora.runs.run import load

    disable_progress_bars()
    return load(folder, given.get("model"), device_map=given.get("device_map"))


def print_json(content: Any) -> None:
    """Print a value as JSON, with null for numbers that are not finite."""
    print(json.dumps(finite(content), indent=2, ensure_ascii=False))


def check_files(given: dict[str, Any], info: RunInfo) -> tuple[Path, Path]:
    """Return `--input` and `--output` of a command that writes a line for rows of a file, checked with the run."""
    source = Path(given["input"])
    target = check_output(Path(given["output"]), source)
    if info.kind == "multiple_choice":
        refuse(given, ("text_column",), "is given, but multiple choice fixes it: leave it out")
    return source, target


def check_output(target: Path, source: Path, name: str = "--output") -> Path:
    """Return a file to write, given by the option `name`; raise unless its folder exists and it is not the input."""
    if target.is_dir() or not target.absolute().parent.is_dir():
        raise BayesLoraError(f"{name} is {target}, but must be a file in an existing folder: name another path")
    if target.suffix.lower() in _TABLES:
        raise BayesLoraError(f"{name} is {target}, but must be CSV, TSV or JSON Lines: name it .csv, .tsv or .jsonl")
    if target.exists() and source.exists() and target.samefile(source):
        raise BayesLoraError(f"{name} is {target}, but must not be the input file: name another file")
    if target.is_file() and target.suffix in _OF_A_RUN and (target.absolute().parent / RUN_FILE).is_file():
        raise BayesLoraError(f"{name} is {target}, but must not be a file of a run: name another file")
    if target.is_file() or not target.exists():  # neither a device nor a pipe
        check_writable(target.resolve())
    return target
