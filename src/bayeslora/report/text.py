"""Format numbers and names for the HTML report, the comparison table and the model card."""

from __future__ import annotations

import math
import re

_SCORE_NAMES = {
    "nll": "NLL (nats)", "ece": "ECE", "adaptive_ece": "adaptive ECE", "classwise_ece": "class-wise ECE",
    "brier": "Brier score", "f1": "F1",
    "matthews_correlation": "Matthews correlation", "pearson": "Pearson correlation",
    "spearman": "Spearman correlation", "auroc": "AUROC", "aurc": "AURC", "mse": "MSE",
    "bleu": "BLEU", "rouge_l": "ROUGE-L",
}  # fmt: skip
_MEASURE_NAMES = {
    "probability": "probability of the answer",
    "max_probability": "1 − max probability", "mahalanobis": "Mahalanobis distance",
    "relative_mahalanobis": "relative Mahalanobis distance", "nearest_neighbors": "distance to nearest neighbors",
}  # fmt: skip


def score_name(name: str) -> str:
    """Return the readable name of a score."""
    if name.startswith("aurc_"):
        return f"AURC by {measure_name(name.removeprefix('aurc_'))}"
    return _SCORE_NAMES.get(name, name.replace("_", " "))


def measure_name(measure: str) -> str:
    """Return the readable name of a measure of uncertainty."""
    return _MEASURE_NAMES.get(measure, measure.replace("_", " "))


def number(value: float | None, digits: int = 3) -> str:
    """Format `value` with `digits` decimals; a dash for None and NaN."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.{digits}f}"


def significant(value: float) -> str:
    """Format `value` with two significant digits."""
    return f"{value:.2g}"


def percent(share: float | None) -> str:
    """Format a share (0..1) as per cent with one decimal."""
    return "–" if share is None or math.isnan(share) else f"{100 * share:.1f} %"


def count(value: float | None) -> str:
    """Format a whole number with separators of thousands."""
    return "–" if value is None else f"{round(value):,}"


def compact(value: float | None) -> str:
    """Format a width or rank with one decimal, or none if it is whole."""
    return "–" if value is None else f"{value:.1f}".removesuffix(".0")


def duration(seconds: float | None) -> str:
    """Format seconds as `8.7 s`, `4 min 11 s` or `2 h 5 min`."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def memory(size: float | None) -> str:
    """Format bytes as GiB or MiB."""
    if size is None:
        return "–"
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def markdown_text(value: object) -> str:
    """Escape text for Markdown, including table cells."""
    flat = " ".join(str(value).split())
    flat = flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|#])", r"\\\1", flat)
