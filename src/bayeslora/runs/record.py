"""A finished run as the report reads it: ``metrics.json`` and ``history.json``, checked once, here."""

from __future__ import annotations

import json
import math
import os
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from bayeslora.errors import BayesLoraError
from bayeslora.runs.names import Address, locate

WIDTHS = (2, 4, 8, 16, 32)
KINDS = ("in", "weight", "A", "E", "B", "A_out", "E_out", "out")
SCOPES = ("adapted", "attention", "encoder", "model")
ADAPTER_KINDS = ("A", "E", "B")
# The score GLUE ranks a task by, where it is not accuracy.
_TASK_METRICS = {"cola": "matthews_correlation", "stsb": "pearson"}
_METRIC_ORDER = ("accuracy", "matthews_correlation", "pearson", "spearman", "f1")
LOWER_IS_BETTER = frozenset("nll ece adaptive_ece brier loss aurc mse rmse mae perplexity".split())


@dataclass(frozen=True)
class LayerRecord:
    """One adapted matrix: its module path, effective and initial rank, and width in bits by kind."""

    name: str
    rank: int
    initial_rank: int
    bits: dict[str, int]
    address: Address


@dataclass(frozen=True)
class ReliabilityBin:
    """One confidence bin: its edges, how many examples fell in it, their mean confidence and their accuracy."""

    lower: float
    upper: float
    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Histogram:
    """Counts of one measure of uncertainty on shared bins, by group: ``correct``, ``wrong``, and ``ood`` if known."""

    edges: list[float]
    counts: dict[str, list[int]]


@dataclass(frozen=True)
class RunRecord:
    """Everything a report needs to know of a run. Scores and shares are plain fractions, not per cent.

    ``scores`` are those of the evaluation split, ``test_scores`` those of a separate test split where there was one.
    ``risk_coverage`` holds (share answered, error rate among them), ``ood`` the detection scores by measure of
    uncertainty and ``ood_name`` what was detected.
    """

    folder: Path
    method: str
    task: str
    model: str
    metric: str
    scores: dict[str, float]
    layers: list[LayerRecord]
    parameters: dict[str, int]
    relative_bops: dict[str, float]
    seconds: dict[str, float]
    versions: dict[str, str]
    reliability: list[ReliabilityBin]
    labels: list[str]
    confusion: list[list[int]]
    seed: int | None = None
    steps: int | None = None
    samples: int = 0
    peak_memory_bytes: int | None = None
    test_scores: dict[str, float] = field(default_factory=dict)
    split: str | None = None
    risk_coverage: list[tuple[float, float]] = field(default_factory=list)
    histograms: dict[str, Histogram] = field(default_factory=dict)
    ood: dict[str, dict[str, float]] = field(default_factory=dict)
    ood_name: str = ""

    @property
    def where(self) -> str:
        """The task, with the split where it is not the evaluation split that a run is scored on."""
        return self.task if self.split in (None, "validation") else f"{self.task}, {self.split}"

    @property
    def score(self) -> float:
        """The headline score (``metric`` names it)."""
        return self.scores[self.metric]

    @property
    def mean_rank(self) -> float | None:
        """Mean effective rank over adapted matrices; None when nothing is adapted."""
        return statistics.fmean(layer.rank for layer in self.layers) if self.layers else None

    @property
    def median_adapter_bits(self) -> float | None:
        """Median width of the adapter's own matrices (A, E and B of every layer); None when there are none."""
        widths = [layer.bits[kind] for layer in self.layers for kind in ADAPTER_KINDS if kind in layer.bits]
        return float(statistics.median(widths)) if widths else None

    @property
    def kinds(self) -> list[str]:
        """The kinds of tensor that carry a width in this run, in the order of the forward pass."""
        present = {kind for layer in self.layers for kind in layer.bits}
        return [kind for kind in KINDS if kind in present] + sorted(present - set(KINDS))

    @property
    def is_quantized(self) -> bool:
        """Whether any adapted tensor is narrower than 32 bits."""
        return any(width < 32 for layer in self.layers for width in layer.bits.values())

    @property
    def ranks_differ(self) -> bool:
        """Whether any rank was cut, or ranks differ between matrices."""
        return any(layer.rank != layer.initial_rank for layer in self.layers) or len({x.rank for x in self.layers}) > 1


def read_run(folder: Path) -> RunRecord:
    """Read and check ``folder/metrics.json``; raises BayesLoraError where it is missing or not as documented."""
    path = Path(folder) / "metrics.json"
    raw = _read_json(path)
    if not isinstance(raw, dict):
        raise BayesLoraError(f"{path} holds a {type(raw).__name__}, not an object; run `bayeslora train` again.")
    scores = _numbers(path, raw, "scores", required=True)
    if not scores:
        raise BayesLoraError(f"{path}: 'scores' is empty, at least one score is needed; run `bayeslora train` again.")
    task = _text(path, raw, "task")
    ood = _mapping(path, raw, "ood")
    ood_scores = _mapping(path, ood, "scores")
    return RunRecord(
        folder=Path(folder),
        method=_text(path, raw, "method"),
        task=task,
        model=_text(path, raw, "model"),
        metric=_headline(task, scores, raw.get("metric")),
        scores=scores,
        layers=_layers(path, raw),
        parameters={k: int(v) for k, v in _numbers(path, raw, "parameters").items()},
        relative_bops={k: v for k, v in _numbers(path, raw, "relative_bops").items() if k in SCOPES},
        seconds=_numbers(path, raw, "seconds"),
        versions={str(k): str(v) for k, v in _mapping(path, raw, "versions").items()},
        reliability=_reliability(path, raw),
        labels=[str(label) for label in _sequence(path, raw, "labels")],
        confusion=_confusion(path, raw),
        seed=_integer(path, raw, "seed"),
        steps=_integer(path, raw, "steps"),
        samples=_integer(path, raw, "samples") or 0,
        peak_memory_bytes=_integer(path, raw, "peak_memory_bytes"),
        test_scores=_numbers(path, raw, "scores_test"),
        split=_text(path, raw, "split") if raw.get("split") is not None else None,
        risk_coverage=_curve(path, _mapping(path, raw, "risk_coverage")),
        histograms=_histograms(path, raw),
        ood={name: _numbers(path, ood_scores, name) for name in ood_scores},
        ood_name=_text(path, ood, "name") if ood else "",
    )


def read_history(folder: Path) -> list[dict[str, float]]:
    """Read ``folder/history.json``, the trainer's log: one dict a logging step, without what is no number."""
    path = Path(folder) / "history.json"
    raw = _read_json(path)
    if not isinstance(raw, list) or not all(isinstance(entry, dict) for entry in raw):
        raise BayesLoraError(f"{path} is not a list of log entries; it should be the trainer's log_history.")
    return [{str(k): float(v) for k, v in entry.items() if _is_number(v)} for entry in raw]


def write_bytes(path: Path, content: bytes) -> Path:
    """Write a file beside its place, then rename, so that a reader never sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise BayesLoraError(f"cannot write {path} ({error.strerror}); name a folder that can be written.") from error
    return path


def _read_json(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BayesLoraError(f"{path} is not UTF-8 text; it is damaged, run `bayeslora train` again.") from error
    except OSError as error:
        raise BayesLoraError(
            f"cannot read {path} ({error.strerror}); name the output folder of a finished `bayeslora train`."
        ) from error
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BayesLoraError(
            f"{path} is not JSON ({error.msg} in line {error.lineno}); it is damaged, run `bayeslora train` again."
        ) from error


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _wrong(path: Path, key: str, value: object, wanted: str) -> BayesLoraError:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return BayesLoraError(f"{path}: {key} is {shown}, {wanted} is needed; run `bayeslora train` again.")


def _text(path: Path, raw: dict[str, Any], key: str) -> str:
    value = raw.get(key)
    if not isinstance(value, str) or not value:
        raise _wrong(path, f"'{key}'", value, "a name")
    return value


def _integer(path: Path, raw: dict[str, Any], key: str) -> int | None:
    value = raw.get(key)
    if value is None:
        return None
    if not _is_number(value) or not math.isfinite(value) or value != int(value):
        raise _wrong(path, f"'{key}'", value, "a whole number")
    return int(value)


def _mapping(path: Path, raw: dict[str, Any], key: str, required: bool = False) -> dict[str, Any]:
    value = raw.get(key)
    if value is None and not required:
        return {}
    if not isinstance(value, dict):
        raise _wrong(path, f"'{key}'", value, "an object")
    return value


def _numbers(path: Path, raw: dict[str, Any], key: str, required: bool = False) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for name, value in _mapping(path, raw, key, required).items():
        if value is None:
            continue
        if not _is_number(value):
            raise _wrong(path, f"'{key}.{name}'", value, "a number")
        numbers[str(name)] = float(value)
    return numbers


def _sequence(path: Path, raw: dict[str, Any], key: str) -> list[Any]:
    value = raw.get(key)
    if value is None:
        return []
    if not isinstance(value, list):
        raise _wrong(path, f"'{key}'", value, "a list")
    return value


def _layers(path: Path, raw: dict[str, Any]) -> list[LayerRecord]:
    if "layers" not in raw:
        raise _wrong(path, "'layers'", None, "a list")
    layers = []
    for position, entry in enumerate(_sequence(path, raw, "layers")):
        key = f"'layers[{position}]'"
        if not isinstance(entry, dict):
            raise _wrong(path, key, entry, "an object")
        name, rank, bits = entry.get("name"), entry.get("rank"), entry.get("bits") or {}
        if not isinstance(name, str) or not name:
            raise _wrong(path, f"{key} name", name, "a module path")
        if not _is_number(rank) or not 0 <= rank < math.inf:
            raise _wrong(path, f"{key} rank", rank, "a rank of 0 or more")
        initial = entry.get("initial_rank", rank)
        if not _is_number(initial) or not rank <= initial < math.inf:
            raise _wrong(path, f"{key} initial_rank", initial, f"a rank of {rank} or more")
        if not isinstance(bits, dict) or not all(_is_number(b) and 1 <= b <= 64 for b in bits.values()):
            raise _wrong(path, f"{key} bits", bits, "a width between 1 and 64 for each kind")
        widths = {str(kind): int(width) for kind, width in bits.items()}
        layers.append(LayerRecord(name, int(rank), int(initial), widths, locate(name)))
    return layers


def _reliability(path: Path, raw: dict[str, Any]) -> list[ReliabilityBin]:
    value = raw.get("reliability")
    # `evaluate` returns the bare list of bins; the file wraps it. Both are accepted.
    entries = value if isinstance(value, list) else _sequence(path, _mapping(path, raw, "reliability"), "bins")
    bins = []
    for position, entry in enumerate(entries):
        key = f"'reliability.bins[{position}]'"
        if not isinstance(entry, dict):
            raise _wrong(path, key, entry, "an object")
        count = entry.get("count")
        if not _is_number(count) or not 0 <= count < math.inf:
            raise _wrong(path, f"{key} count", count, "a count of 0 or more")
        numbers = {}
        for name in ("lower", "upper", "confidence", "accuracy"):
            number = entry.get(name)
            if name in ("confidence", "accuracy") and not count:
                number = 0.0  # an empty bin has no mean; it may be written as null or NaN
            if not _is_number(number) or not -1e-6 <= number <= 1 + 1e-6:
                raise _wrong(path, f"{key} {name}", number, "a number between 0 and 1")
            numbers[name] = float(number)
        bins.append(ReliabilityBin(count=int(count), **numbers))
    return bins


def _curve(path: Path, raw: dict[str, Any]) -> list[tuple[float, float]]:
    coverage, risk = _floats(path, raw, "coverage"), _floats(path, raw, "risk")
    if len(coverage) != len(risk):
        raise _wrong(path, "'risk_coverage'", raw, "one risk for each coverage")
    return list(zip(coverage, risk, strict=True))


def _histograms(path: Path, raw: dict[str, Any]) -> dict[str, Histogram]:
    found = {}
    for measure in _mapping(path, raw, "uncertainty"):
        entry = _mapping(path, raw["uncertainty"], measure)
        edges = _floats(path, entry, "edges")
        counts = {str(g): [int(n) for n in _floats(path, entry, g)] for g in entry if g != "edges"}
        if any(len(numbers) != len(edges) - 1 for numbers in counts.values()):
            raise _wrong(path, f"'uncertainty.{measure}'", entry, "one count for each bin between two edges")
        found[str(measure)] = Histogram(edges, counts)
    return found


def _floats(path: Path, raw: dict[str, Any], key: str) -> list[float]:
    values = _sequence(path, raw, key)
    if not all(_is_number(value) and math.isfinite(value) for value in values):
        raise _wrong(path, f"'{key}'", values, "a list of numbers")
    return [float(value) for value in values]


def _confusion(path: Path, raw: dict[str, Any]) -> list[list[int]]:
    rows = _sequence(path, raw, "confusion")
    for row in rows:
        if not isinstance(row, list) or len(row) != len(rows) or not all(_is_number(n) for n in row):
            raise _wrong(path, "'confusion'", rows, "a square table of counts")
    return [[int(n) for n in row] for row in rows]


def _headline(task: str, scores: dict[str, float], named: object) -> str:
    for candidate in (named, _TASK_METRICS.get(task), *_METRIC_ORDER):
        if isinstance(candidate, str) and candidate in scores:
            return candidate
    return next((name for name in scores if name not in LOWER_IS_BETTER), next(iter(scores)))
