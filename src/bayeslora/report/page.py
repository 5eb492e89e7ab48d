"""The HTML report of one run: self-contained, opened from disk, with the same figures as PNG beside it."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayeslora.report import text
from bayeslora.runs.names import order_matrices, shortest_labels
from bayeslora.runs.record import RunRecord, read_history, read_run, write_bytes

if TYPE_CHECKING:
    from jinja2 import Environment
    from matplotlib.figure import Figure

REPORT_NAME = "report.html"
_TITLES = {
    "ranks": "Ranks",
    "bits": "Bit-widths",
    "gates": "Gates over training",
    "cost": "Cost",
    "calibration": "Calibration",
    "selective": "Selective prediction",
    "uncertainty": "Uncertainty",
    "loss": "Loss",
}


@dataclass(frozen=True)
class Picture:
    """One figure of the page: PNG bytes, width in CSS pixels, and the words around it."""

    name: str
    title: str
    caption: str
    alternative: str
    png: bytes
    width: int

    @property
    def source(self) -> str:
        """The picture as a data URI."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")


def write_report(output_dir: Path) -> list[Path]:
    """Draw a run's figures and write ``report.html`` from its ``metrics.json`` and ``history.json``.

    A figure that has nothing to show is left out (ranks and widths of full fine-tuning or plain LoRA); a PNG an
    earlier report left under that name is removed, so that the folder never shows another run's picture.

    Args:
        output_dir: the output folder of ``bayeslora train``.

    Returns:
        The files written: the PNGs (``ranks``, ``bits``, ``gates``, ``cost``, ``calibration``, ``selective``,
        ``uncertainty``, ``loss``), then ``report.html``.

    Raises:
        BayesLoraError: a file is missing or not what the contract says.
    """
    folder = Path(output_dir)
    run, history = read_run(folder), read_history(folder)
    pictures = _pictures(run, history)
    html = environment().get_template("report.html.j2").render(_context(run, pictures))
    written = [write_bytes(folder / f"{picture.name}.png", picture.png) for picture in pictures]
    for stale in set(_TITLES) - {picture.name for picture in pictures}:
        (folder / f"{stale}.png").unlink(missing_ok=True)
    return [*written, write_bytes(folder / REPORT_NAME, html.encode("utf-8"))]


def write_figures(folder: Path) -> list[Path]:
    """Draw ``calibration``, ``selective`` and ``uncertainty`` alone, from a ``metrics.json`` that may lack a history.

    Raises:
        BayesLoraError: the file is missing or not what the contract says.
    """
    run = read_run(Path(folder))
    pictures = [_picture(name, figure, run) for name, figure in _score_figures(run).items() if figure is not None]
    return [write_bytes(Path(folder) / f"{picture.name}.png", picture.png) for picture in pictures]


@cache
def environment() -> Environment:
    """The templates, HTML-escaped by default; Markdown templates escape by their own filter."""
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    made = Environment(
        loader=PackageLoader("bayeslora.report"),
        autoescape=select_autoescape(enabled_extensions=("html", "html.j2"), default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters.update(
        number=text.number, percent=text.percent, count=text.count, compact=text.compact, duration=text.duration,
        memory=text.memory, md=text.markdown_text, score_name=text.score_name, method_name=text.method_name,
    )  # fmt: skip
    return made


def _pictures(run: RunRecord, history: list[dict[str, float]]) -> list[Picture]:
    # Matplotlib takes a third of a second to import; whoever only reads or compares numbers should not wait for it.
    from bayeslora.report import figures, training_figures

    drawn: dict[str, Figure | None] = {
        "ranks": figures.rank_figure(run),
        "bits": figures.bits_figure(run),
        "gates": training_figures.gates_figure(run, history),
        "cost": figures.cost_figure(run),
        **_score_figures(run),
        "loss": training_figures.loss_figure(run, history),
    }
    return [_picture(name, figure, run) for name, figure in drawn.items() if figure is not None]


def _score_figures(run: RunRecord) -> dict[str, Figure | None]:
    """The figures of a run's predictions."""
    from bayeslora.report import training_figures, uncertainty_figures

    return {
        "calibration": training_figures.calibration_figure(run),
        "selective": uncertainty_figures.selective_figure(run),
        "uncertainty": uncertainty_figures.uncertainty_figure(run),
    }


def _picture(name: str, figure: Figure, run: RunRecord) -> Picture:
    from bayeslora.report.style import png_bytes

    caption, alternative = _words(name, run)
    # A CSS pixel is 1/96 inch; a quarter more than paper size suits a screen.
    width = round(float(figure.get_size_inches()[0]) * 96 * 1.25)
    return Picture(name, _TITLES[name], caption, alternative, png_bytes(figure), width)


def _words(name: str, run: RunRecord) -> tuple[str, str]:
    """Caption and text alternative of a figure."""
    numbered = "Layers are numbered as in the module names, the first at the bottom."
    if name == "ranks":
        low, high = min(x.rank for x in run.layers), max(x.rank for x in run.layers)
        return (
            f"Effective rank of each adapted matrix after training: gates that are open and whose entry of E is not "
            f"quantized to zero. {numbered}",
            f"Heat map of ranks, layer by matrix; between {low} and {high}, mean {text.compact(run.mean_rank)}.",
        )
    if name == "bits":
        return (
            "Width each quantizer settled on: the frozen weight W₀, the adapter's A, E and B, and the outputs of A, "
            f"of E and of the whole layer. {numbered}",
            f"Heat maps of bit-widths, layer by kind; the adapter's median: {text.compact(run.median_adapter_bits)}.",
        )
    if name == "gates":
        return (
            "Widths as evaluation would use them, averaged by kind; mean probability that the gate to 4, 8, 16 and "
            "32 bits is open; mean effective rank; bit operations of attention. Shading marks the phases: warm-up "
            "without quantization, gates learn, gates frozen while the weights finish.",
            "Curves of widths, gate probabilities, ranks and attention's bit operations over the training steps.",
        )
    if name == "cost":
        from bayeslora.report.figures import has_unadapted_part

        shares = ", ".join(f"{scope} {text.percent(share)}" for scope, share in run.relative_bops.items())
        hatched = " The hatched part lies in modules that were not adapted and costs what it cost before."
        return (
            "Bit operations (multiply-accumulates × bits of both operands) by scope, each as a share of the same "
            "scope of the same model under LoRA r = 16 on q, k, v at 32 × 32 bits."
            + (hatched if has_unadapted_part(run) else ""),
            f"Bars of cost by scope: {shares}.",
        )
    if name == "calibration":
        return (
            "Top: accuracy among the evaluation examples of each bin of confidence, with Wilson's 95 % interval; "
            "hatched, the gap to the mean confidence. Bottom: examples in each bin. ECE is the gap averaged over "
            "examples.",
            "Reliability diagram with a histogram of confidences.",
        )
    if name == "selective":
        return (
            "Error rate when only the examples the model is most confident about are answered, by their share. The "
            "dashed line is what any other order would give on average. AURC is the mean height of the curve.",
            "Curve of the error rate by the share of examples answered.",
        )
    if name == "uncertainty":
        foreign = (
            f" Dashed: {run.ood_name}; AUROC is that of telling them from the evaluation split." if run.ood else ""
        )
        return (
            "How unsure the model is of predictions that are right and of those that are wrong, each as shares of its "
            "own number. Mutual information is the part of the entropy that the samples of the weights disagree "
            f"about.{foreign}",
            "Histograms of uncertainty for right and wrong predictions" + (" and foreign inputs." if run.ood else "."),
        )
    return (
        "The task's loss alone, without the penalties on bits and ranks.",
        "Curves of training and evaluation loss over the steps.",
    )


def _context(run: RunRecord, pictures: list[Picture]) -> dict[str, Any]:
    matrices = order_matrices(layer.address.matrix for layer in run.layers)
    labels = shortest_labels(matrices)
    return {
        "run": run,
        "facts": text.facts(run),
        "pictures": pictures,
        "matrices": [labels[matrix] for matrix in matrices],
        "summary": _summary(run),
        "confusion": run.confusion if len(run.confusion) == len(run.labels) else [],
    }


def _summary(run: RunRecord) -> str:
    """One sentence on what was adapted, and on what was not."""
    if not run.layers:
        return "All weights were trained at 32 bits; there is no adapter, hence no ranks and no widths to show."
    ranks = {layer.rank for layer in run.layers}
    where = f"{len(run.layers)} matrices"
    if not run.is_quantized and not run.ranks_differ:
        return f"Rank {ranks.pop()} in all {where}, nothing quantized: 32 bits throughout."
    rank_text = f"ranks {min(ranks)} to {max(ranks)}" if len(ranks) > 1 else f"rank {min(ranks)}"
    bits_text = (
        f"adapter matrices at a median of {text.compact(run.median_adapter_bits)} bits"
        if run.is_quantized
        else "nothing quantized"
    )
    return f"{where} were adapted: {rank_text}, {bits_text}. Everything else stayed as it was."
