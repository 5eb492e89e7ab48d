"""What the commands that run a finished run over rows have in common."""

from __future__ import annotations

from typing import Any

from bayeslora.cli.coercion import coerce
from bayeslora.cli.models import RunInfo
from bayeslora.errors import BayesLoraError, option


def positive_batch(given: dict[str, Any]) -> int:
    """`--batch-size`, 64 by default."""
    size = int(given.get("batch_size", 64))
    if size < 1:
        raise BayesLoraError(f"--batch-size is {size}; give at least 1.")
    return size


def text_columns(given: dict[str, Any], info: RunInfo, name: str = "text_column") -> list[str]:
    """`--text-column` or an option like it, by default the columns the run was trained on; as many as those."""
    if name not in given:
        return info.text_columns
    columns = coerce(name, given[name], list[str])
    if len(columns) != len(info.text_columns):
        raise BayesLoraError(
            f"{option(name)} names {len(columns)} columns, but the run was trained on {len(info.text_columns)}; "
            "name as many."
        )
    return list(columns)
