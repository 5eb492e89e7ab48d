"""Adapters with every tensor at its learned width, in one file."""

from __future__ import annotations

from bayeslora.export.packed.reader import load_packed
from bayeslora.export.packed.writer import export_packed

__all__ = [
    "export_packed",
    "load_packed",
]
