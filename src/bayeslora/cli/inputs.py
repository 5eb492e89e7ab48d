"""Options of the commands that run a finished run over rows."""

from __future__ import annotations

from typing import Any

from bayeslora.errors import Problems, option


def refuse(given: dict[str, Any], names: tuple[str, ...], reason: str) -> None:
    """Raise for those of these options that are given; `reason` follows their names."""
    Problems(f"{option(name)} {reason}" for name in names if name in given).tell()
