"""The rows of the task in local_choices.yaml. Needs nothing of bayeslora, as an exported adapter does not."""

from __future__ import annotations

import json
from typing import Any

from datasets import Dataset

COLUMNS = ("question", "choices", "answer")


def rows(file: str, **_others: Any) -> dict[str, Dataset]:
    """The split `test`, from a JSON Lines file; `_others` is what else lm-eval hands to every task."""
    with open(file, encoding="utf-8") as lines:
        found = [json.loads(line) for line in lines if line.strip()]
    return {"test": Dataset.from_list([{name: row[name] for name in COLUMNS} for row in found])}
