"""Write the self-contained HTML report of a run, and its figures as PNG files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from matplotlib.figure import Figure

from bayeslora.files import write_atomically
from bayeslora.report import evidence_figures, figures, style, text, training_figures, uncertainty_figures
from bayeslora.report.style import inline_svg, png_bytes
from bayeslora.report.verdict import handed_over, most_frequent, verdict
from bayeslora.runs.examples import read_examples
from bayeslora.runs.names import order_matrices, shortest_labels
from bayeslora.runs.record import History, RunRecord, read_history, read_run

REPORT_NAME = "report.html"
_MOST_CLASSES = 12
"""A confusion matrix of more classes is a list of the most frequent confusions."""
Drawings = Mapping[str, Callable[[], Figure | None]]


def write_report(output_dir: Path) -> list[Path]:
    """Draw a run's figures and write `report.html` from its `metrics.json`, `history.json` and `examples.json`.

    The page begins with the questions of a user: is the model better than a constant, is it as confident as it is
    right, which rows need a person? Figures are drawn twice, for wide and narrow screens. Figures without data are
    left out, such as ranks and widths for full fine-tuning or plain LoRA. Their PNGs from an earlier report are
    removed, so that the folder never shows figures of another run.

    Args:
        output_dir: output folder of `bayeslora train`; or of `bayeslora evaluate`, whose `metrics.json` gives only the
            figures of predictions.

    Returns:
        The files written: the PNGs (`ranks`, `bits`, `evidence`, `gates`, `cost`, `calibration`, `selective`,
        `uncertainty`, `shift`, `loss`), then `report.html`.

    Raises:
        BayesLoraError: a file is missing or malformed.
    """
    folder = Path(output_dir)
    run = read_run(folder)
    drawings = _score_figures(run) if run.evaluated else _run_figures(run, read_history(folder))
    shown = {name: figure for name, draw in drawings.items() if (figure := draw()) is not None}
    pictures = {name: _picture(name, figure, drawings[name]) for name, figure in shown.items()}
    context = _context(run) | {"pictures": pictures, "examples": read_examples(folder)}
    html = environment().get_template("report.html.j2").render(context)
    written = write_files(folder, {f"{name}.png": png_bytes(figure) for name, figure in shown.items()})
    for stale in drawings.keys() - shown.keys():
        (folder / f"{stale}.png").unlink(missing_ok=True)
    return [*written, *write_files(folder, {REPORT_NAME: html.encode()})]


def _picture(name: str, figure: Figure, draw: Callable[[], Figure | None]) -> dict[str, Any]:
    """Return a figure as SVG with its width on the screen, and as it is on a narrow one if that differs."""
    with style.narrow():
        other = draw() if figure.get_figwidth() > 1.15 * style.page_width() else None
    forms = {"wide" if other else "any": figure, **({"slim": other} if other else {})}
    # A CSS pixel is 1/96 inch; figures are 25% larger on screen than on paper.
    return {
        "name": name,
        "forms": [
            {"kind": kind, "width": round(each.get_figwidth() * 96 * 1.25), "svg": inline_svg(each, f"{name}-{kind}")}
            for kind, each in forms.items()
        ],
    }


def write_files(folder: Path, files: Mapping[str, bytes]) -> list[Path]:
    """Write files by name into `folder`, and return their paths."""
    for name, content in files.items():
        with write_atomically(folder / name) as path:
            path.write_bytes(content)
    return [folder / name for name in files]


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
        count=text.count, compact=text.compact, score_words=text.score_words, code=text.code, duration=text.duration,
        memory=text.memory, md=text.markdown_text, score_name=text.score_name,
    )  # fmt: skip
    return made


def _run_figures(run: RunRecord, history: History) -> Drawings:
    """Return what draws the figures of a trained run."""
    return {
        "ranks": partial(figures.rank_figure, run),
        "bits": partial(figures.bits_figure, run),
        "evidence": partial(evidence_figures.evidence_figure, run),
        "gates": partial(training_figures.gates_figure, run, history),
        "cost": partial(figures.cost_figure, run),
        **_score_figures(run),
        "loss": partial(training_figures.loss_figure, run, history),
    }


def _score_figures(run: RunRecord) -> Drawings:
    """Return what draws the figures of a run's predictions."""
    return {
        "calibration": partial(training_figures.calibration_figure, run),
        "selective": partial(uncertainty_figures.selective_figure, run),
        "uncertainty": partial(uncertainty_figures.uncertainty_figure, run),
        "shift": partial(uncertainty_figures.shift_figure, run),
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
        "verdict": verdict(run),
        "confusion": run.confusion if len(run.confusion) == len(run.labels) <= _MOST_CLASSES else [],
        "confusions": _confusions(run) if len(run.labels) > _MOST_CLASSES else [],
        "most_frequent": most_frequent(run),
        "handed_over": handed_over,
    }


def _confusions(run: RunRecord) -> list[tuple[str, str, int]]:
    """Return the 12 most frequent pairs of a true and another predicted class, with their number of rows."""
    pairs = [
        (run.labels[truth], run.labels[predicted], rows)
        for truth, row in enumerate(run.confusion)
        for predicted, rows in enumerate(row)
        if rows and truth != predicted
    ]
    return sorted(pairs, key=lambda pair: -pair[2])[:12]
