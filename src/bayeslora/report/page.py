"""Write the self-contained HTML report of a run, and its figures as PNG files."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from matplotlib.figure import Figure

from bayeslora.files import write_atomically
from bayeslora.report import evidence_figures, figures, text, training_figures, uncertainty_figures
from bayeslora.report.style import png_bytes
from bayeslora.runs.names import order_matrices, shortest_labels
from bayeslora.runs.record import History, RunRecord, read_history, read_run

REPORT_NAME = "report.html"


def write_report(output_dir: Path) -> list[Path]:
    """Draw a run's figures and write `report.html` from its `metrics.json` and `history.json`.

    Figures without data are left out (ranks and widths of full fine-tuning or plain LoRA). A PNG of that name from an
    earlier report is removed, so that the folder never shows figures of another run.

    Args:
        output_dir: the output folder of `bayeslora train`; or of `bayeslora evaluate`, with the figures of its
            predictions only, from `metrics.json`.

    Returns:
        The files written: the PNGs (`ranks`, `bits`, `evidence`, `gates`, `cost`, `calibration`, `selective`,
        `uncertainty`, `shift`, `loss`), then `report.html`.

    Raises:
        BayesLoraError: a file is missing or malformed.
    """
    folder = Path(output_dir)
    run = read_run(folder)
    drawn = _score_figures(run) if run.evaluated else _run_figures(run, read_history(folder))
    shown = {name: figure for name, figure in drawn.items() if figure is not None}
    images = {name: png_bytes(figure) for name, figure in shown.items()}
    pictures = [
        {
            "name": name,
            "source": "data:image/png;base64," + base64.b64encode(images[name]).decode("ascii"),
            # A CSS pixel is 1/96 inch; figures are 25% larger on screen than on paper.
            "width": round(float(figure.get_size_inches()[0]) * 96 * 1.25),
        }
        for name, figure in shown.items()
    ]
    html = environment().get_template("report.html.j2").render(_context(run), pictures=pictures)
    written = write_pngs(folder, images)
    for stale in drawn.keys() - shown.keys():
        (folder / f"{stale}.png").unlink(missing_ok=True)
    with write_atomically(folder / REPORT_NAME) as path:
        path.write_text(html, encoding="utf-8")
    return [*written, folder / REPORT_NAME]


def write_pngs(folder: Path, images: Mapping[str, bytes]) -> list[Path]:
    """Write images by name into `folder`, and return their paths."""
    for name, png in images.items():
        with write_atomically(folder / f"{name}.png") as path:
            path.write_bytes(png)
    return [folder / f"{name}.png" for name in images]


@cache
def environment() -> Environment:
    """Return the Jinja environment; it escapes HTML templates, and Markdown templates use the filter `md`."""
    made = Environment(
        loader=PackageLoader("bayeslora.report"),
        autoescape=select_autoescape(enabled_extensions=("html", "html.j2"), default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters.update(
        measure_name=text.measure_name, number=text.number, significant=text.significant, percent=text.percent,
        count=text.count, compact=text.compact, duration=text.duration,
        memory=text.memory, md=text.markdown_text, score_name=text.score_name,
    )  # fmt: skip
    return made


def _run_figures(run: RunRecord, history: History) -> dict[str, Figure | None]:
    """Return all figures of a trained run."""
    return {
        "ranks": figures.rank_figure(run),
        "bits": figures.bits_figure(run),
        "evidence": evidence_figures.evidence_figure(run),
        "gates": training_figures.gates_figure(run, history),
        "cost": figures.cost_figure(run),
        **_score_figures(run),
        "loss": training_figures.loss_figure(run, history),
    }


def _score_figures(run: RunRecord) -> dict[str, Figure | None]:
    """Return the figures of a run's predictions."""
    return {
        "calibration": training_figures.calibration_figure(run),
        "selective": uncertainty_figures.selective_figure(run),
        "uncertainty": uncertainty_figures.uncertainty_figure(run),
        "shift": uncertainty_figures.shift_figure(run),
    }


def _context(run: RunRecord) -> dict[str, Any]:
    matrices = order_matrices(layer.address.matrix for layer in run.layers)
    labels = shortest_labels(matrices)
    return {
        "run": run,
        "matrices": [labels[matrix] for matrix in matrices],
        "ranks": [layer.rank for layer in run.layers],
        "evidence": evidence_figures.summarize_evidence(run),
        "has_unadapted_part": figures.has_unadapted_part(run),
        "confusion": run.confusion if len(run.confusion) == len(run.labels) else [],
    }
