"""Packages that import a public name when it is first used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def importer(package: str, modules: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """Return the `__getattr__` (PEP 562) of `package`, whose public names are in `modules`, themselves attributes."""
    homes = {name: module for module, names in modules.items() for name in names}

    def find(name: str) -> Any:
        if name not in homes and name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        found = importlib.import_module(f"{package}.{homes.get(name, name)}")
        value = getattr(found, name) if name in homes else found
        setattr(sys.modules[package], name, value)
        return value

    return find
