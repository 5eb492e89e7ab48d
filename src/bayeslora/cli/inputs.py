"""Checks shared by the commands that predict with a finished run."""

from __future__ import annotations

from typing import Any

from bayeslora.errors import Problems, option


def refuse(given: dict[str, Any], names: tuple[str, ...], reason: str) -> None:
    """Raise for each of the options `names` that is given; its message is the option and `reason`."""
    Problems(f"{option(name)} {reason}" for name in names if name in given).tell()
