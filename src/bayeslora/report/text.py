"""Numbers as a reader wants them: shared by the HTML report, the comparison table and the model card."""

from __future__ import annotations

import math
import re

from bayeslora.runs.record import RunRecord

METHOD_NAMES = {"blora": "B-LoRA", "lora": "LoRA", "full": "full fine-tuning", "melora": "Me-LoRA", "blob": "BLoB"}
METHOD_NAMES |= {"adalora": "AdaLoRA", "bayes_adalora": "Bayesian AdaLoRA", "dylora": "DyLoRA"}
_SCORE_NAMES = {
    "nll": "NLL (nats)", "ece": "ECE", "adaptive_ece": "adaptive ECE", "classwise_ece": "class-wise ECE",
    "brier": "Brier score", "f1": "F1",
    "matthews_correlation": "Matthews correlation", "pearson": "Pearson correlation",
    "spearman": "Spearman correlation", "auroc": "AUROC", "aurc": "AURC", "mse": "MSE",
}  # fmt: skip
_MEASURE_NAMES = {"max_probability": "1 − max probability", "mutual_information": "mutual information"}


def method_name(method: str) -> str:
    """A method's name in prose; an unknown one is left as it is."""
    return METHOD_NAMES.get(method, method)


def score_name(name: str) -> str:
    """A score's name in prose."""
    return _SCORE_NAMES.get(name, name.replace("_", " "))


def measure_name(measure: str) -> str:
    """A measure of uncertainty in prose."""
    return _MEASURE_NAMES.get(measure, measure.replace("_", " "))


def number(value: float | None, digits: int = 3) -> str:
    """Fixed digits; a dash where there is no value."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.{digits}f}"


def percent(share: float | None) -> str:
    """A share (0..1) in per cent with one digit."""
    return "–" if share is None or math.isnan(share) else f"{100 * share:.1f} %"


def count(value: float | None) -> str:
    """A whole number with thousands separated."""
    return "–" if value is None else f"{round(value):,}"


def compact(value: float | None) -> str:
    """At most one digit after the point, none where it is whole: widths and ranks."""
    return "–" if value is None else f"{value:.1f}".removesuffix(".0")


def duration(seconds: float | None) -> str:
    """Seconds as ``8.7 s``, ``4 min 11 s`` or ``2 h 5 min``."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def memory(size: float | None) -> str:
    """Bytes in GiB or MiB."""
    if size is None:
        return "–"
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def markdown_text(value: object) -> str:
    """Text that Markdown shows as it is, also inside a table cell."""
    flat = " ".join(str(value).split())
    flat = flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|#])", r"\\\1", flat)


def facts(run: RunRecord) -> list[tuple[str, str]]:
    """The handful of numbers a run is judged by, as (name, value)."""
    rows = [(score_name(run.metric), number(run.score))]
    rows += [(score_name(name), number(run.scores[name])) for name in ("ece", "nll") if name in run.scores]
    if "attention" in run.relative_bops:
        rows.append(("attention bit operations*", percent(run.relative_bops["attention"])))
    if run.is_quantized:
        rows.append(("adapter matrices, median", f"{compact(run.median_adapter_bits)} bits"))
    if run.layers:
        start = max(layer.initial_rank for layer in run.layers)
        rows.append(("mean rank", f"{compact(run.mean_rank)} of {start}"))
    if "trainable" in run.parameters:
        rows.append(("trainable parameters", count(run.parameters["trainable"])))
    if "train" in run.seconds:
        rows.append(("training time", duration(run.seconds["train"])))
    return rows
