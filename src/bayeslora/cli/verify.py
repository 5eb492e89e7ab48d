"""`bayeslora verify EXPORT --against RUN`: compare an export's answers with its run's; status 1 if they disagree."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from bayeslora.cli.inputs import load_run, print_json
from bayeslora.errors import BayesLoraError, counted
from bayeslora.runs.evaluate_run import rows_to_score, source_of
from bayeslora.runs.exports import format_of
from bayeslora.runs.info import RunInfo
from bayeslora.runs.verify import Verified, verify

DISAGREES = 1


def run(given: dict[str, Any]) -> int:
    """Run the command with the options `given` on the command line."""
    folder, source = Path(given["folder"]), Path(given["against"])
    format_of(folder)
    info = RunInfo.load(source)
    asked = {**given, "eval_file": given["rows"]} if "rows" in given else given
    try:
        task, split = rows_to_score(asked, info)
    except BayesLoraError as error:
        raise BayesLoraError(str(error).replace("--eval-file", "--rows")) from error
    found = verify(
        folder,
        load_run(source, given),
        task,
        split,
        limit=given.get("limit", 256),
        batch_size=given.get("batch_size", 64),
        max_divergence=given.get("max_divergence"),
        max_changed=given.get("max_changed"),
    )
    if given.get("json"):
        content = {"folder": str(folder), "against": str(source), "rows_of": source_of(asked, task, split)}
        print_json({**content, **dataclasses.asdict(found), "agrees": found.agrees})
    else:
        _print(found, folder, source)
    return 0 if found.agrees else DISAGREES


def _print(found: Verified, folder: Path, source: Path) -> None:
    print(
        f"{folder} ({found.format}) against {source}: {counted(found.rows, 'row')}, {counted(found.answers, 'answer')}"
    )
    if found.changed is not None:
        allowed = "" if found.max_changed is None else f"  (at most {found.max_changed:.2%})"
        print(f"  changed answers  {found.changed:.2%}{allowed}")
    print(f"  mean divergence  {found.divergence:.2g} nats  (at most {found.tolerance:.2g})")
    print(f"  max divergence   {found.max_divergence:.2g} nats")
    print(f"  {found.metric:<15}  {found.score_before:.4f} before, {found.score_after:.4f} after")
    print("  agrees" if found.agrees else "  does not agree")
