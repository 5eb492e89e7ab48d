"""Plan, train, score, record and load training runs.

`load` is imported on first use, because the command line reads `runs.plan` before it needs torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bayeslora._lazy import importer

if TYPE_CHECKING:
    from bayeslora.runs.run import load

__all__ = ["load"]


__getattr__ = importer(__name__, {"run": ("load",)})
