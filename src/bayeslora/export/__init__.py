"""Exports: ranks cut out for real, and the forms that other programs load.

A name is imported when it is first used, because who loads an integer model needs neither PEFT nor the writers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bayeslora._lazy import importer

if TYPE_CHECKING:
    from bayeslora.export.formats import FORMATS, export, shrink
    from bayeslora.export.integer.reader import load_integer
    from bayeslora.export.packed.reader import load_packed

__all__ = ["FORMATS", "export", "load_integer", "load_packed", "shrink"]

_MODULES = {
    "formats": ("FORMATS", "export", "shrink"),
    "integer.reader": ("load_integer",),
    "packed.reader": ("load_packed",),
}
__getattr__ = importer(__name__, _MODULES)
