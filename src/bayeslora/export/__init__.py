"""Exports: ranks cut out for real, and the forms that other programs load.

A name is imported when it is first used, because who loads an integer model needs neither PEFT nor the writers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bayeslora.export.formats import FORMATS, export, shrink
    from bayeslora.export.integer.reader import load_integer
    from bayeslora.export.packed.reader import load_packed

__all__ = ["FORMATS", "export", "load_integer", "load_packed", "shrink"]

_HOMES = {
    "FORMATS": "formats",
    "export": "formats",
    "load_integer": "integer.reader",
    "load_packed": "packed.reader",
    "shrink": "formats",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
