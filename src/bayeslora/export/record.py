"""Record of an export, `export.json`: its format, and its distance from its run.

| field | |
|---|---|
| `version` | version of this file, 1 |
| `format` | a key of `FORMATS` |
| `measured` | what the export measured: sizes and errors |
| `tolerance` | largest mean divergence from the run, in nats, with which `bayeslora verify` agrees |
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bayeslora.errors import BayesLoraError
from bayeslora.files import finite

RECORD_FILE = "export.json"
EXACT = 1e-4
"""Divergence, in nats, that float rounding through a deep model may add up to."""

_VERSION = 1


@dataclass(frozen=True)
class ExportRecord:
    """The content of `export.json`.

    Attributes:
        format: of the export.
        measured: sizes and errors.
        tolerance: largest mean divergence from the run, in nats.
    """

    format: str
    measured: dict[str, Any] = field(default_factory=dict)
    tolerance: float = EXACT

    @classmethod
    def of(cls, form: str, measured: Mapping[str, Any]) -> ExportRecord:
        """Return the record of measurements: other rows may diverge twice as far as those that were measured."""
        kept = {name: value for name, value in measured.items() if isinstance(value, (int, float, str))}
        return cls(form, kept, max(EXACT, 2 * float(kept.get("divergence") or 0.0)))

    def save(self, folder: Path) -> None:
        """Write the file."""
        content = {"version": _VERSION, **vars(self), "measured": finite(self.measured)}
        (folder / RECORD_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> ExportRecord | None:
        """Return the record of a folder, or None without the file.

        Raises:
            BayesLoraError: a file with other content.
        """
        file = folder / RECORD_FILE
        if not file.is_file():
            return None
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            found = cls(str(content["format"]), dict(content["measured"]), float(content["tolerance"]))
        except (ValueError, KeyError, TypeError) as error:
            raise BayesLoraError(f"{file} is damaged ({error}): export again") from error
        if content.get("version") != _VERSION or not (math.isfinite(found.tolerance) and found.tolerance >= 0):
            raise BayesLoraError(f"{file} is of another version of bayeslora: export again")
        return found
