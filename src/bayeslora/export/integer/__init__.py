"""Models of integer codes: the base and a B-LoRA adapter at the learned widths."""

from __future__ import annotations

from bayeslora.export.integer.reader import load_integer
from bayeslora.export.integer.writer import export_integer

__all__ = [
    "export_integer",
    "load_integer",
]
