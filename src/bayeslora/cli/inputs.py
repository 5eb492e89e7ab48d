"""Options of the commands that run a finished run over rows."""

from __future__ import annotations

from typing import Any

from bayeslora.cli.coercion import coerce
from bayeslora.errors import BayesLoraError, option


def batch_size(given: dict[str, Any]) -> int:
    """Return `--batch-size`, 64 by default."""
    size = int(given.get("batch_size", 64))
    if size < 1:
        raise BayesLoraError(f"--batch-size is {size}: give at least 1")
    return size


def columns(given: dict[str, Any], name: str = "text_column") -> list[str] | None:
    """Return `--text-column` or an option like it as a list; None where it is not given."""
    return list(coerce(name, given[name], list[str])) if name in given else None


def refuse(given: dict[str, Any], names: tuple[str, ...], reason: str) -> None:
    """Raise for the first of these options that is given; `reason` follows its name."""
    for name in names:
        if name in given:
            raise BayesLoraError(f"{option(name)} {reason}")
