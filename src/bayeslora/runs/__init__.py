"""Plan, train, score, record and load training runs.

`load` is imported on first use, because the command line reads `runs.plan` before it needs torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bayeslora.runs.run import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    if name != "load":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from bayeslora.runs.run import load

    return load
