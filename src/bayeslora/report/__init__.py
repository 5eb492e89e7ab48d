"""Report on finished runs: figures, a self-contained HTML page, a comparison of runs, and the model card.

The functions read the files in a run's output folder (`metrics.json`, `history.json`), so a report can be rebuilt
at any time without the model; `write_answers` takes answers instead. Matplotlib and Jinja are imported on first use.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from bayeslora._lazy import importer
from bayeslora.errors import BayesLoraError

if TYPE_CHECKING:
    from bayeslora.report.answers import write_answers
    from bayeslora.report.card import write_model_card
    from bayeslora.report.comparison import write_comparison
    from bayeslora.report.page import write_report

__all__ = ["check_installed", "write_answers", "write_comparison", "write_model_card", "write_report"]
_MODULES = {
    "answers": ("write_answers",),
    "card": ("write_model_card",),
    "comparison": ("write_comparison",),
    "page": ("write_report",),
}
__getattr__ = importer(__name__, _MODULES)


def check_installed() -> None:
    """Check that Matplotlib and Jinja are installed, before a run starts.

    Raises:
        BayesLoraError: one of them is missing.
    """
    for name in ("matplotlib", "jinja2"):
        if find_spec(name) is None:
            raise BayesLoraError(f"{name} is not installed, but the report of a run needs it: pip install {name}")
