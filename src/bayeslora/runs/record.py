"""Read and write the record of a finished run: `metrics.json` and `history.json`.

`metrics.json` is a `RunRecord`. Scores and shares are fractions, times are in seconds. A field that is null or missing
takes its default, a number that was not finite is null, and unknown keys are ignored.

| key | content |
|---|---|
| `method`, `title` | the method's name in `--method`, and in prose |
| `task`, `dataset`, `model` | the task, hub id of its data set if it has one, and the base model |
| `seed`, `steps`, `samples` | of training; optimizer steps; samples of the posterior per prediction, 0 for its mean |
| `metric`, `scores` | name of the headline score; scores by name (`accuracy_mismatched`: MNLI's second split) |
| `split`, `rows` | what was scored, by default `validation`, or of files `held-out rows`, `rows of FILE`; its size |
| `words` | of rows whose words have tags, their number; scores, curves and bins are then over words |
| `scoring`, `normalization` | how a language model answers: `letters` or `cloze`; the unit of cloze's divisor |
| `baseline` | scores of the best constant prediction: the shares of the classes in these rows, or the mean number |
| `label_scores` | with several labels a row: by label `precision`, `recall`, `f1`, `nll`, `auroc`, and its `rows` |
| | of tagged words: by kind of span `precision`, `recall`, `f1`, and the number of `spans` |
| `scores_test` | scores of the test split, if there is one |
| `reliability.bins` | `lower`, `upper`, `count`, mean `confidence` and `accuracy` by bin of confidence |
| `risk_coverage` | `coverage`, the shares of examples answered, and `risk`, the error rate among each |
| `risk_coverage_by` | of named tasks of text: the same by measure of uncertainty; the risk is the mean loss |
| `uncertainty` | by measure (`entropy`, `mutual_information`): `edges` in nats, counts of `correct`, `wrong`, `ood` |
| `ood` | of out-of-distribution inputs: `name`, `rows`, `rows_in`; by measure the `scores` `auroc`, `aupr`, `fpr95` |
| `ood.rows_fitted` | number of training rows that the scores by features were fitted to |
| `shift` | of shifted texts: `columns`, `seed`, and `levels` by `suite` and `severity` with `rows` and `scores` |
| `shift.levels` | `none` (severity 0) first; `changed`, the number of rows with other tokens; `domain` has a `name` |
| `labels`, `confusion` | class names by id; examples by true class (rows) and predicted class (columns) |
| `verdict.gain` | accuracy above that of the most frequent label, or squared error below that of the mean number |
| `verdict.overconfidence` | mean confidence minus accuracy; both have a `mean` and a 95% interval, `low` to `high` |
| `verdict.thresholds` | by `risk`, the `confidence` above which errors among answers stay below it with 95% |
| | probability; the `coverage` of these rows and the `errors` among them |
| `verdict.spread` | of numbers: the `half_width` of an interval that holds a share `coverage` of new rows, and the |
| | share `observed` where one half of the rows sets the width for the other |
| `layers` | by adapted matrix `name`, `rank`, `initial_rank`, `bits` by kind of tensor, shape and parameters |
| `posterior` | of variational methods, by matrix: posterior by prior standard deviation, its `mean`, and `low`, |
| | `median` and `high`, the 5th, 50th and 95th percentile |
| `layers.gates` | of B-LoRA by evidence: `kind` of tensor or `rank`, `gate` (its bits, or the component's index), |
| | `is_open`, `delta` (nats), `saving` (share), `price` (nats), `probability` (unless N is unknown) |
| `class_weights` | by label, the weight of its rows in the training loss; their mean over the training rows is 1 |
| `parameters` | numbers of `trainable`, `adapter` and `total` scalars |
| `relative_bops` | by scope (`adapted`, `attention`, `encoder`, `model`), relative to LoRA r = 16 at 32 x 32 bits |
| `seconds`, `peak_memory_bytes` | wall time of `train` and `evaluate`; the largest amount of memory held |
| `versions` | of Python, this package, torch, transformers and peft |
| `calibrated` | `by`, the map of the probabilities that the scores use, and the `rows` and `source` it was fitted on |
| `evaluated` | `folder` and `seed`, if `bayeslora evaluate` scored the run again |

`history.json` is the Trainer's log, a list of objects with numbers by name: `step`, `loss`, `eval_loss`, `eval_*`, and
from the methods `phase` (0 warm-up, 1 gates learn, 2 frozen), `bits/<kind>`, `gates/<bits>`, `rank/<matrix>`,
`mean_rank`, `mean_bits`, `relative_bops`, `penalty_*`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from bayeslora.errors import BayesLoraError
from bayeslora.files import save_json
from bayeslora.runs.names import Address, locate
from bayeslora.runs.schema import Limit, Mismatch, from_json, to_json
from bayeslora.vocabulary import ALL_KINDS, COST_SCOPES, MATRICES, UNQUANTIZED

METRICS_FILE, HISTORY_FILE = "metrics.json", "history.json"
NO_SHIFT, DOMAIN = "none", "domain"
"""Names in `shift.levels` beside the suites: texts as they are, and labelled rows of another source."""
IN_BRACKETS = (
    "in brackets: the score of predicting the same for every row, the shares of the classes or the mean number"
)
"""Words for the numbers in brackets beside scores."""
# Older files do not name their headline score; it is the first of these that they have.
_HEADLINES = ("matthews_correlation", "pearson", "accuracy", "spearman", "f1")

Name = Annotated[str, Limit("a name", 1)]
Count = Annotated[int, Limit("a whole number of 0 or more", 0)]
Width = Annotated[int, Limit("a width between 1 and 64 bits", 1, 64)]
Share = Annotated[float, Limit("a number between 0 and 1", -1e-6, 1 + 1e-6)]
Finite = Annotated[float, Limit("a finite number", -1e308, 1e308)]
History = list[dict[str, float]]


@dataclass(frozen=True)
class GateRecord:
    """One gate that evidence has decided; `methods.description.GateDescription` explains each field.

    Its numbers are rounded to 4 significant digits: there are thousands, and of the evidence one or two are certain.
    """

    kind: Name
    gate: Count
    is_open: bool
    delta: Finite
    saving: Finite
    price: Finite
    probability: Share | None = None

    def __post_init__(self) -> None:
        for name in ("delta", "saving", "price", "probability"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, float(f"{value:.4g}"))

    @property
    def is_sure(self) -> bool | None:
        """Return whether its probability is below 0.05 or above 0.95; None if it is unknown."""
        return None if self.probability is None else not 0.05 <= self.probability <= 0.95


@dataclass(frozen=True)
class LayerRecord:
    """One adapted matrix: its path, effective and initial rank, bits by kind, shape, parameters and gates."""

    name: Name
    rank: Count
    initial_rank: Count
    bits: dict[str, Width] = field(default_factory=dict)
    in_features: int | None = None
    out_features: int | None = None
    parameters: int | None = None
    gates: list[GateRecord] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.initial_rank < self.rank:
            raise Mismatch("initial_rank", self.initial_rank, f"at least the rank, {self.rank}")

    @cached_property
    def address(self) -> Address:
        """Return the place of the matrix in the model."""
        return locate(self.name)


@dataclass(frozen=True)
class WidthRecord:
    """Posterior by prior standard deviation over the entries of a matrix; 1 where the data have said nothing."""

    mean: Finite
    low: Finite
    median: Finite
    high: Finite


@dataclass(frozen=True)
class ReliabilityBin:
    """One bin of confidence; the means are NaN if it is empty."""

    lower: Share
    upper: Share
    count: Count
    confidence: Share = math.nan
    accuracy: Share = math.nan

    def __post_init__(self) -> None:
        for name in ("confidence", "accuracy"):
            if self.count and math.isnan(getattr(self, name)):
                raise Mismatch(name, None, f"the mean of {self.count} examples")


@dataclass(frozen=True)
class Reliability:
    """Accuracy by confidence, in bins of equal width."""

    bins: list[ReliabilityBin] = field(default_factory=list)

    @property
    def filled(self) -> list[ReliabilityBin]:
        """Return the bins that are not empty."""
        return [b for b in self.bins if b.count]

    @property
    def ece(self) -> float:
        """Return the expected calibration error, Σ (count/n) |accuracy − confidence|; NaN if all bins are empty."""
        total = sum(b.count for b in self.filled)
        return sum(b.count * abs(b.accuracy - b.confidence) for b in self.filled) / total if total else math.nan


@dataclass(frozen=True)
class RiskCoverage:
    """Error rate by the share of examples answered, the most confident first."""

    coverage: list[Finite] = field(default_factory=list)
    risk: list[Finite] = field(default_factory=list)

    def __post_init__(self) -> None:
        if len(self.coverage) != len(self.risk):
            raise Mismatch("risk", self.risk, f"one risk for each coverage, {len(self.coverage)} in all")

    @property
    def points(self) -> list[tuple[float, float]]:
        """Return (coverage, risk) pairs."""
        return list(zip(self.coverage, self.risk, strict=True))


@dataclass(frozen=True)
class Histogram:
    """Counts of one measure of uncertainty on shared bins, by group of examples; unknown groups are empty."""

    edges: list[Finite]
    correct: list[Count] = field(default_factory=list)
    wrong: list[Count] = field(default_factory=list)
    ood: list[Count] = field(default_factory=list)

    def __post_init__(self) -> None:
        for group, counts in self.counts.items():
            if len(counts) != len(self.edges) - 1:
                raise Mismatch(
                    group, counts, f"one count for each bin between two edges, {len(self.edges) - 1} in all"
                )

    @property
    def counts(self) -> dict[str, list[int]]:
        """Return the counts of the known groups."""
        return {group: counts for group in ("correct", "wrong", "ood") if (counts := getattr(self, group))}


@dataclass(frozen=True)
class Detection:
    """Detection of `rows` out-of-distribution inputs among `rows_in` of the split, in total and by source."""

    scores: dict[str, dict[str, float]]
    name: str = ""
    rows: Count | None = None
    rows_in: Count | None = None
    rows_fitted: Count | None = None
    by_source: dict[str, Detection] = field(default_factory=dict)


@dataclass(frozen=True)
class ShiftLevel:
    """Scores of the split with its texts shifted by a suite, or of `rows` of the domain `name`.

    `changed` is the number of rows whose tokens the shift has changed.
    """

    suite: Name
    severity: Share
    scores: dict[str, float]
    rows: Count | None = None
    changed: Count | None = None
    name: str = ""


@dataclass(frozen=True)
class Shift:
    """Scores by suite and severity, of texts without a shift first; the texts in `columns` were shifted."""

    levels: list[ShiftLevel]
    columns: list[str] = field(default_factory=list)
    seed: int | None = None

    @property
    def suites(self) -> dict[str, list[ShiftLevel]]:
        """Return the levels by suite, without `none` and `domain`."""
        names = dict.fromkeys(level.suite for level in self.levels if level.suite not in (NO_SHIFT, DOMAIN))
        return {name: [level for level in self.levels if level.suite == name] for name in names}

    def of(self, suite: str) -> ShiftLevel | None:
        """Return the first level of a suite; None without any."""
        return next((level for level in self.levels if level.suite == suite), None)

    @property
    def unchanged(self) -> str:
        """Return a sentence with the shifts that have changed no row; "" without any."""
        found = {
            suite: [f"{level.severity:.0%}" for level in levels if level.changed == 0]
            for suite, levels in self.suites.items()
        }
        named = [f"{suite} ({', '.join(shares)})" for suite, shares in found.items() if shares]
        verb = "changes" if len(named) == 1 else "change"
        return f"{' and '.join(named)} {verb} no row: the model reads the same tokens as without it" if named else ""


@dataclass(frozen=True)
class Interval:
    """A mean over rows and its 95% interval."""

    mean: Finite
    low: Finite
    high: Finite

    @property
    def has_zero(self) -> bool:
        """Return whether 0 is inside the interval."""
        return self.low <= 0 <= self.high


@dataclass(frozen=True)
class ThresholdRecord:
    """The confidence above which errors stay below `risk`; `posthoc.Threshold` explains the other fields."""

    risk: Share
    confidence: Finite
    coverage: Share
    errors: Share


@dataclass(frozen=True)
class Spread:
    """Half the width of an interval for a share `coverage` of new rows, and the share that was observed."""

    coverage: Share
    half_width: Finite
    observed: Share | None = None


@dataclass(frozen=True)
class Verdict:
    """Gain over a constant, confidence and thresholds; for numbers a spread instead of the latter two."""

    gain: Interval | None = None
    overconfidence: Interval | None = None
    thresholds: list[ThresholdRecord] = field(default_factory=list)
    spread: Spread | None = None


@dataclass(frozen=True)
class ClassScore:
    """Scores of one class; precision is NaN if it was never predicted, recall if it has no rows."""

    label: str
    rows: int
    predicted: int
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class Evaluated:
    """The run that `bayeslora evaluate` scored again, and the seed of the samples."""

    folder: str
    seed: int


@dataclass(frozen=True)
class Calibrated:
    """The map of the probabilities, such as `temperature 1.31`, and the rows it was fitted on."""

    by: Name
    rows: Count | None = None
    source: str = ""


@dataclass(frozen=True)
class RunRecord:
    """Content of `metrics.json`; the module docstring explains each field."""

    method: Name
    task: Name
    model: Name
    scores: dict[str, float]
    layers: list[LayerRecord]
    title: str = ""
    metric: str = ""
    seed: int | None = None
    steps: int | None = None
    samples: Count = 0
    dataset: str | None = None
    scoring: str = ""
    normalization: str = ""
    split: str | None = None
    rows: Count | None = None
    words: Count | None = None
    baseline: dict[str, float] = field(default_factory=dict)
    label_scores: dict[str, dict[str, float]] = field(default_factory=dict)
    scores_test: dict[str, float] = field(default_factory=dict)
    reliability: Reliability = field(default_factory=Reliability)
    risk_coverage: RiskCoverage = field(default_factory=RiskCoverage)
    risk_coverage_by: dict[str, RiskCoverage] = field(default_factory=dict)
    uncertainty: dict[str, Histogram] = field(default_factory=dict)
    ood: Detection | None = None
    shift: Shift | None = None
    labels: list[str] = field(default_factory=list)
    confusion: list[list[Count]] = field(default_factory=list)
    verdict: Verdict = field(default_factory=Verdict)
    class_weights: dict[str, float] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    relative_bops: dict[str, float] = field(default_factory=dict)
    posterior: dict[str, WidthRecord] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    calibrated: Calibrated | None = None
    evaluated: Evaluated | None = None
    folder: Path = field(default=Path(), metadata={"stored": False})

    def __post_init__(self) -> None:
        if not self.scores:
            raise Mismatch("scores", self.scores, "an object with at least one score")
        if any(len(row) != len(self.confusion) for row in self.confusion):
            raise Mismatch("confusion", self.confusion, "a square table of counts")
        if self.ood and not self.ood.name:
            raise Mismatch("ood.name", None, "a name")

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> RunRecord:
        """Return the record of `content`, which has the keys of `metrics.json`."""
        return from_json(cls, content)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `metrics.json`."""
        return to_json(self)

    def save(self, folder: Path) -> None:
        """Write `folder/metrics.json`."""
        save_json(folder / METRICS_FILE, self.to_dict())

    @property
    def where(self) -> str:
        """Return the task, with the split unless it is the evaluation split."""
        return self.task if self.split in (None, "validation") else f"{self.task}, {self.split}"

    @property
    def score(self) -> float:
        """Return the headline score, which `metric` names."""
        return self.scores[self.metric]

    @property
    def score_lines(self) -> list[str]:
        """Return the scores by name, each with that of the best constant prediction in brackets where there is one."""
        return [
            f"{name} {value:.4f}" + (f" ({self.baseline[name]:.4f})" if name in self.baseline else "")
            for name, value in self.scores.items()
        ]

    @property
    def classes(self) -> list[ClassScore]:
        """Return the scores of each class from the confusion matrix; empty without one."""
        if len(self.confusion) != len(self.labels):
            return []
        columns = [sum(column) for column in zip(*self.confusion, strict=True)]
        found = []
        for number, (label, row, predicted) in enumerate(zip(self.labels, self.confusion, columns, strict=True)):
            right, rows = row[number], sum(row)
            precision, recall = (right / count if count else math.nan for count in (predicted, rows))
            f1 = 2 * right / (rows + predicted) if rows + predicted else math.nan
            found.append(ClassScore(label, rows, predicted, precision, recall, f1))
        return found

    @property
    def detection(self) -> dict[str, dict[str, float]]:
        """Return the scores of out-of-distribution detection by measure; empty if it was not run."""
        return self.ood.scores if self.ood else {}

    @property
    def mean_rank(self) -> float | None:
        """Return the mean effective rank of the adapted matrices; None without any."""
        return statistics.fmean(layer.rank for layer in self.layers) if self.layers else None

    @property
    def median_adapter_bits(self) -> float | None:
        """Return the median width of the adapter's matrices (A, E, B of every layer); None without any."""
        return self.median_bits(*MATRICES)

    def median_bits(self, *kinds: str) -> float | None:
        """Return the median width of these kinds of tensor over all layers; None where no layer has one."""
        widths = [layer.bits[kind] for layer in self.layers for kind in kinds if kind in layer.bits]
        return float(statistics.median(widths)) if widths else None

    @property
    def kinds(self) -> list[str]:
        """Return the kinds of tensor that have a width in this run."""
        present = {kind for layer in self.layers for kind in layer.bits}
        return [kind for kind in ALL_KINDS if kind in present] + sorted(present - set(ALL_KINDS))

    @property
    def posterior_to_prior(self) -> float | None:
        """Return the mean over matrices of posterior by prior standard deviation; None without a posterior."""
        return statistics.fmean(width.mean for width in self.posterior.values()) if self.posterior else None

    @property
    def gates(self) -> list[GateRecord]:
        """Return the gates of all layers that evidence has decided."""
        return [gate for layer in self.layers for gate in layer.gates]

    @property
    def is_quantized(self) -> bool:
        """Return whether any adapted tensor is narrower than 32 bits."""
        return any(width < UNQUANTIZED for layer in self.layers for width in layer.bits.values())

    @property
    def ranks_differ(self) -> bool:
        """Return whether any rank was reduced or ranks differ between matrices."""
        return any(layer.rank != layer.initial_rank for layer in self.layers) or len({x.rank for x in self.layers}) > 1


def read_run(folder: Path) -> RunRecord:
    """Return the record in `folder/metrics.json`.

    Raises:
        BayesLoraError: the file is missing or damaged, or a value is invalid.
    """
    folder = Path(folder)
    path = folder / METRICS_FILE
    try:
        record = RunRecord.from_dict(_read_json(path))
    except Mismatch as error:
        raise BayesLoraError(f"{path}: {error}: run `bayeslora train` again") from None
    bops = {str(scope): record.relative_bops[scope] for scope in COST_SCOPES if scope in record.relative_bops}
    if not record.title:  # an older file; the registry imports torch, so import it only here
        from bayeslora.methods.registry import title_of

        record = dataclasses.replace(record, title=title_of(record.method))
    metric = next(name for name in (record.metric, *_HEADLINES, *record.scores) if name in record.scores)
    return dataclasses.replace(record, folder=folder, metric=metric, relative_bops=bops)


def read_history(folder: Path) -> History:
    """Read `folder/history.json`: one dictionary per logging step, without values that are not numbers.

    Raises:
        BayesLoraError: the file is missing, damaged, or not a list of objects.
    """
    path = Path(folder) / HISTORY_FILE
    found = _read_json(path)
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise BayesLoraError(
            f"{path} holds {str(found)[:60]}, but must hold a list of log entries: run `bayeslora train` again"
        )
    return [
        {name: float(value) for name, value in entry.items() if type(value) in (int, float)}  # bool is not a number
        for entry in found
    ]


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BayesLoraError(
            f"cannot read {path} ({error.strerror}): name the output folder of a finished `bayeslora train`"
        ) from error
    except ValueError as error:  # not JSON, or not UTF-8
        raise BayesLoraError(
            f"{path} is damaged, but must be valid JSON ({error}): run `bayeslora train` again"
        ) from error
