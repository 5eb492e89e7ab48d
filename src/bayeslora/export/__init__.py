"""Exports: ranks cut out for real, and the forms that other programs load."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bayeslora.export.formats import FORMATS, export, shrink
from bayeslora.export.packed.reader import load_packed

if TYPE_CHECKING:
    from bayeslora.export.integer.reader import load_integer

__all__ = [
    "FORMATS",
    "export",
    "load_integer",
    "load_packed",
    "shrink",
]


def __getattr__(name: str) -> Any:
    """Import `load_integer`, and the runtime that it needs, when it is first asked for."""
    if name != "load_integer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from bayeslora.export.integer.reader import load_integer

    return load_integer
