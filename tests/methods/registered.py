"""Methods that a test registers: installed packages that offer them, and tables as they were before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from bayeslora.methods.registry import _MODELS, METHODS


@contextmanager
def forgotten_afterwards() -> Iterator[None]:
    """Inside, methods may be registered; outside, none of them are left."""
    tables: Any = (METHODS, _MODELS, PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING)
    kept = [dict(table) for table in tables]
    try:
        yield
    finally:
        for table, before in zip(tables, kept, strict=True):
            table.clear()
            table.update(before)


def offer(folder: Path, method: str, module: str, content: str) -> None:
    """Put an installed package into `folder` that offers `method` by an entry point, with one module of `content`."""
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[bayeslora.methods]\n{method} = {module}\n")
    (folder / f"{module}.py").write_text(content)
