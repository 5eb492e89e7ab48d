"""Load the rows for the task in local_choices.yaml. Like an exported adapter, this does not need bayeslora."""

from __future__ import annotations

import json
from typing import Any

from datasets import Dataset

COLUMNS = ("question", "choices", "answer")


def rows(file: str, **_others: Any) -> dict[str, Dataset]:
    """Return the split `test` of a JSON Lines file; `_others` are arguments that lm-eval passes to every task."""
    with open(file, encoding="utf-8") as lines:
        found = [json.loads(line) for line in lines if line.strip()]
    return {"test": Dataset.from_list([{name: row[name] for name in COLUMNS} for row in found])}
