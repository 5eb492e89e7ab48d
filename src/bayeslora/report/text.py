"""Format numbers and names for the HTML report, the comparison table and the model card."""

from __future__ import annotations

import math
import re

from markupsafe import Markup, escape

_SCORE_NAMES = {
    "nll": "NLL (nats)", "ece": "ECE", "adaptive_ece": "adaptive ECE", "classwise_ece": "class-wise ECE",
    "brier": "Brier score", "f1": "F1", "f1_micro": "micro F1", "f1_macro": "macro F1",
    "matthews_correlation": "Matthews correlation", "pearson": "Pearson correlation",
    "spearman": "Spearman correlation", "auroc": "AUROC", "aurc": "AURC", "mse": "MSE",
    "bleu": "BLEU", "rouge_l": "ROUGE-L", "span_f1": "span F1",
}  # fmt: skip
_MEASURE_NAMES = {
    "probability": "probability of the answer",
    "max_probability": "1 − max probability", "mahalanobis": "Mahalanobis distance",
    "relative_mahalanobis": "relative Mahalanobis distance", "nearest_neighbors": "distance to nearest neighbors",
}  # fmt: skip
_SCORE_WORDS = {
    "accuracy": "share of rows, or of tagged words, that are right",
    "span_f1": "harmonic mean of precision and recall of the spans; 1 is best",
    "span_precision": "share of the predicted spans with the right kind, first and last word",
    "span_recall": "share of the spans that are predicted so",
    "matthews_correlation": "correlation of predicted and true class; 0 for a constant answer, 1 is best",
    "f1": "harmonic mean of precision and recall of class 1; 1 is best",
    "nll": "mean of −log of the right class's probability; 0 is best, a sure error costs much",
    "ece": "gap between confidence and accuracy, averaged over 15 bins of confidence; 0 is best",
    "adaptive_ece": "the same over bins with equally many rows",
    "classwise_ece": "the same for the probabilities of all classes",
    "brier": "squared distance from the right class's probability 1 and the others' 0; 0 is best",
    "aurc": "mean error rate over all shares of answered rows, the surest first; 0 is best",
    "pearson": "correlation of predicted and true numbers; 1 is best",
    "spearman": "correlation of their ranks; 1 is best",
    "mse": "mean of the squared errors; 0 is best",
    "perplexity": "exp of the NLL: as unsure as between so many equal tokens",
    "token_accuracy": "share of tokens that are the most probable ones",
}


def score_words(name: str) -> str:
    """Return what a score measures, in a few words; "" for others."""
    return _SCORE_WORDS.get(name, "")


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
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


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


def code(value: str) -> Markup:
    """Escape text for HTML, with what is between backticks as code; lines do not begin with a sign for per cent."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(value))).replace(" %", "\N{NO-BREAK SPACE}%"))


def markdown_text(value: object) -> str:
    """Escape text for Markdown, including table cells."""
    flat = " ".join(str(value).split())
    flat = flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|#])", r"\\\1", flat)
