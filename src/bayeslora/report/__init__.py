"""What a run looks like on paper: figures, a self-contained HTML report, a comparison of runs, and the model card.

Every function reads the files a run leaves in its output folder (``metrics.json``, ``history.json``), so a report can
be made again at any time, on a machine without the model. Matplotlib and Jinja are imported when something is drawn.
"""

from __future__ import annotations

from bayeslora.report.card import write_model_card
from bayeslora.report.comparison import write_comparison
from bayeslora.report.page import write_figures, write_report

__all__ = ["write_comparison", "write_figures", "write_model_card", "write_report"]
