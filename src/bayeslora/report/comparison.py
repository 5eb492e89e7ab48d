"""Several runs side by side: one row a run, seeds of the same setting as mean ± standard deviation, and figures."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayeslora.errors import BayesLoraError
from bayeslora.report import text
from bayeslora.report.comparison_table import markdown
from bayeslora.runs.record import Histogram, ReliabilityBin, RunRecord, read_run, write_bytes

if TYPE_CHECKING:
    from bayeslora.report.uncertainty_figures import Detection, Selection

# What may differ between runs of one setting: the seed, and where and how verbosely things are written.
_NOT_OPTIONS = frozenset(
    "seed data_seed output_dir overwrite_output_dir overwrite logging_dir run_name report_to resume_from_checkpoint "
    "resume logging_steps logging_strategy logging_first_step disable_tqdm log_level save_total_limit hub_model_id "
    "push_to_hub json samples".split()
)
# The result of training, not an option; only read where a folder has no config.yaml.
_LEARNED = frozenset({"rank_pattern", "alpha_pattern", "inference_mode", "peft_version"})


@dataclass(frozen=True)
class Group:
    """Runs of one setting that differ in their seed only."""

    label: str
    runs: list[RunRecord]
    options: dict[str, Any]

    @property
    def where(self) -> str:
        """Task and split."""
        return self.runs[0].where


def write_comparison(folders: Sequence[Path], output_dir: Path) -> dict[str, Any]:
    """Compare finished runs: writes ``table.json``, ``table.md`` and figures.

    The figures are ``score_bops.png``, ``reliability.png``, ``risk_coverage.png`` and, of runs that were scored on
    out-of-distribution inputs, ``uncertainty.png`` and ``ood.png``; one without data is left out.

    Runs whose method, model, task, split, steps, samples and options (``config.yaml`` without seed and output paths)
    agree form a group, reported as mean ± sample standard deviation (n − 1) over its distinct seeds. Runs that agree
    in the seed as well are repeats, not seeds: they are never averaged and stand alone.

    Args:
        folders: output folders of ``bayeslora train`` or ``bayeslora evaluate``, in the order the rows should have.
        output_dir: where the files go; made when it is missing.

    Returns:
        What ``table.json`` holds: ``{"runs": [row, …], "groups": [row, …], "figures": [file name, …]}``. In a group's
        row each number is ``{"mean", "sd", "n"}``, ``sd`` null for a single run.

    Raises:
        BayesLoraError: no folder, a folder given twice, or one whose ``metrics.json`` cannot be used.
    """
    paths = [Path(folder) for folder in folders]
    if not paths:
        raise BayesLoraError("0 folders to compare, at least one is needed; name output folders of `bayeslora train`.")
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() in seen:
            raise BayesLoraError(f"{path} is named twice, each folder may appear once; name it once.")
        seen.add(path.resolve())
    runs = [read_run(path) for path in paths]
    groups = group_runs(runs)
    label_of = {run.folder: group.label for group in groups for run in group.runs}
    target = Path(output_dir)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BayesLoraError(f"cannot make {target} ({error.strerror}); name a folder that can be written.") from error
    figures = {name: png for name, png in _figures(groups).items() if png is not None}
    table: dict[str, Any] = {
        "runs": [{"setting": label_of[run.folder], **run_row(run)} for run in runs],
        "groups": [group_row(group) for group in groups],
        "figures": [f"{name}.png" for name in figures],
    }
    table = _finite(table)
    for name, png in figures.items():
        write_bytes(target / f"{name}.png", png)
    write_bytes(target / "table.json", (json.dumps(table, indent=2, ensure_ascii=False) + "\n").encode())
    write_bytes(target / "table.md", markdown(table).encode())
    return table


def group_runs(runs: Sequence[RunRecord]) -> list[Group]:
    """Runs by setting, in the order in which settings first appear; repeats of one seed stay apart."""
    by_setting: dict[str, list[tuple[RunRecord, dict[str, Any]]]] = defaultdict(list)
    for run in runs:
        options = _options(run.folder)
        key = [run.method, run.model, run.where, run.steps, run.samples, options]
        by_setting[json.dumps(key, sort_keys=True, default=str)].append((run, options))
    settings: list[tuple[list[RunRecord], dict[str, Any]]] = []
    for members in by_setting.values():
        found = [run for run, _ in members]
        seeds = [run.seed for run in found]
        if len(set(seeds)) == len(seeds) and (None not in seeds or len(seeds) == 1):
            settings.append((found, members[0][1]))
        else:
            settings.extend(([run], options) for run, options in members)
    return _labelled(settings)


def run_row(run: RunRecord) -> dict[str, Any]:
    """One run as a flat row of the table; None where the run has no such number."""
    row: dict[str, Any] = {
        "folder": str(run.folder),
        "method": run.method,
        "task": run.task,
        "model": run.model,
        "seed": run.seed,
        "steps": run.steps,
        "samples": run.samples,
        "metric": run.metric,
        "where": run.where,
        "ood": run.ood_name or None,
    }
    return row | run_numbers(run)


def run_numbers(run: RunRecord) -> dict[str, float | None]:
    """The numbers that are averaged over seeds, in the table's order."""
    numbers: dict[str, float | None] = {"score": run.score}
    for name in ("accuracy", "ece", "nll"):
        numbers[name] = run.scores.get(name)
    numbers |= {name: value for name, value in run.scores.items() if name not in numbers}
    numbers |= {f"ood_{m}_{name}": value for m, scores in run.ood.items() for name, value in scores.items()}
    numbers["trainable_parameters"] = run.parameters.get("trainable")
    numbers["adapter_median_bits"] = run.median_adapter_bits
    numbers["mean_rank"] = run.mean_rank
    for scope in ("attention", "encoder"):
        numbers[f"{scope}_bops"] = run.relative_bops.get(scope)
    numbers["train_seconds"] = run.seconds.get("train")
    return numbers


def group_row(group: Group) -> dict[str, Any]:
    """One setting: what its runs share, and mean, sample standard deviation and count of each number."""
    first = group.runs[0]
    rows = [run_numbers(run) for run in group.runs]
    row: dict[str, Any] = {
        "setting": group.label,
        "method": first.method,
        "task": first.task,
        "model": first.model,
        "steps": first.steps,
        "samples": first.samples,
        "metric": first.metric,
        "where": first.where,
        "ood": first.ood_name or None,
        "seeds": [run.seed for run in group.runs],
        "folders": [str(run.folder) for run in group.runs],
        "options": group.options,
    }
    for name in dict.fromkeys(name for numbers in rows for name in numbers):
        values = [value for numbers in rows if (value := numbers.get(name)) is not None]
        row[name] = mean_and_deviation(values)
    return row


def mean_and_deviation(values: Sequence[float]) -> dict[str, float | int] | None:
    """``{"mean", "sd", "n"}``, ``sd`` with n − 1 and None for a single value; None for no value at all."""
    if not values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "sd": deviation, "n": len(values)}  # type: ignore[dict-item]


def pooled_reliability(runs: Sequence[RunRecord]) -> list[ReliabilityBin]:
    """Bins of several runs as one, weighted by their counts; the first run's alone where the edges differ."""
    tables = [run.reliability for run in runs if any(b.count for b in run.reliability)]
    if not tables:
        return []
    edges = [(b.lower, b.upper) for b in tables[0]]
    if any([(b.lower, b.upper) for b in table] != edges for table in tables):
        return tables[0]
    pooled = []
    for column in zip(*tables, strict=True):
        total = sum(b.count for b in column)
        confidence = sum(b.count * b.confidence for b in column) / total if total else 0.0
        accuracy = sum(b.count * b.accuracy for b in column) / total if total else 0.0
        pooled.append(ReliabilityBin(column[0].lower, column[0].upper, total, confidence, accuracy))
    return pooled


def _options(folder: Path) -> dict[str, Any]:
    """A run's options without what may differ between seeds; from the adapter's own config where no YAML was kept."""
    import yaml

    for name in ("config.yaml", "adapter_config.json"):
        path = folder / name
        if not path.exists():
            continue
        try:
            loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise BayesLoraError(f"{path} cannot be read ({type(error).__name__}); mend it or train again.") from error
        dropped = _NOT_OPTIONS if name == "config.yaml" else _NOT_OPTIONS | _LEARNED
        return _without(loaded, dropped) if isinstance(loaded, dict) else {}
    return {}


def _without(options: dict[str, Any], dropped: frozenset[str]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, value in options.items():
        name = str(key).replace("-", "_")
        if name not in dropped:
            kept[name] = _without(value, dropped) if isinstance(value, dict) else value
    return kept


def _labelled(settings: list[tuple[list[RunRecord], dict[str, Any]]]) -> list[Group]:
    """Name each setting by its method and samples and, where that is not enough, by the options that differ."""
    names = _names([runs[0] for runs, _ in settings])
    labels = list(names)
    by_base: dict[tuple[str, str], list[int]] = defaultdict(list)
    for position, (runs, _) in enumerate(settings):
        by_base[names[position], runs[0].where].append(position)
    for positions in by_base.values():
        if len(positions) < 2:
            continue
        flat = {i: _flatten(settings[i][1]) | _run_options(settings[i][0][0]) for i in positions}
        keys = sorted({key for options in flat.values() for key in options})
        telling = [key for key in keys if len({json.dumps(flat[i].get(key), default=str) for i in positions}) > 1]
        for i in positions:
            words = [f"{key.split('.')[-1]}={flat[i][key]}" for key in telling if flat[i].get(key) is not None]
            if len(words) > 3 or not words:
                words = [settings[i][0][0].folder.name]
            labels[i] += f" ({', '.join(words)})"
        if len({labels[i] for i in positions}) < len(positions):
            for i in positions:
                labels[i] = f"{names[i]} ({settings[i][0][0].folder})"
    return [Group(label, runs, options) for label, (runs, options) in zip(labels, settings, strict=True)]


def _names(runs: Sequence[RunRecord]) -> list[str]:
    """A method with its number of samples; without any it is the mean, if the same method was sampled elsewhere."""
    sampled = {run.method for run in runs if run.samples}
    names = []
    for run in runs:
        how = f", {run.samples} sample{'s' if run.samples > 1 else ''}" if run.samples else ", mean"
        names.append(text.method_name(run.method) + (how if run.method in sampled else ""))
    return names


def _run_options(run: RunRecord) -> dict[str, Any]:
    return {"steps": run.steps, "model": Path(run.model).name}


def _flatten(options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in options.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _figures(groups: Sequence[Group]) -> dict[str, bytes | None]:
    from bayeslora.report import comparison_figures, uncertainty_figures
    from bayeslora.report.style import png_bytes

    points = [
        comparison_figures.Point(
            group.label, run.where, run.metric, run.score, run.relative_bops.get("attention", math.nan)
        )
        for group in groups
        for run in group.runs
    ]
    several = len({group.where for group in groups}) > 1
    titled = [(f"{group.label} on {group.where}" if several else group.label, group.runs) for group in groups]
    drawn = {
        "score_bops": comparison_figures.score_figure(points),
        "reliability": comparison_figures.reliability_figure(
            [(label, pooled_reliability(runs)) for label, runs in titled]
        ),
        "risk_coverage": uncertainty_figures.risk_coverage_figure([_selection(group) for group in groups]),
        "uncertainty": uncertainty_figures.histograms_figure(
            [panel for label, runs in titled if any(run.ood for run in runs) for panel in _histograms(label, runs)]
        ),
        "ood": uncertainty_figures.detection_figure([_detection(group) for group in groups]),
    }
    return {name: None if figure is None else png_bytes(figure) for name, figure in drawn.items()}


def _selection(group: Group) -> Selection:
    from bayeslora.report.uncertainty_figures import Selection, mean_curve

    areas = [run.scores["aurc"] for run in group.runs if "aurc" in run.scores]
    curve = mean_curve([run.risk_coverage for run in group.runs])
    return Selection(group.label, group.where, curve, statistics.fmean(areas) if areas else None)


def _detection(group: Group) -> Detection:
    from bayeslora.report.uncertainty_figures import Detection

    found: dict[str, list[float]] = defaultdict(list)
    for run in group.runs:
        for measure, scores in run.ood.items():
            if "auroc" in scores:
                found[measure].append(scores["auroc"])
    return Detection(group.label, group.where, dict(found))


def _histograms(label: str, runs: Sequence[RunRecord]) -> list[tuple[str, str, Histogram, float | None]]:
    """One panel a measure of uncertainty that a setting's runs have: counts pooled, AUROC averaged over seeds."""
    from bayeslora.report.uncertainty_figures import pooled_histogram

    panels = []
    for measure in dict.fromkeys(measure for run in runs for measure in run.histograms):
        pooled = pooled_histogram([run.histograms[measure] for run in runs if measure in run.histograms])
        areas = [run.ood[measure]["auroc"] for run in runs if "auroc" in run.ood.get(measure, {})]
        if pooled is not None:
            panels.append((label, measure, pooled, statistics.fmean(areas) if areas else None))
    return panels


def _finite(value: Any) -> Any:
    """JSON has no NaN: a number that is none becomes null, so that any reader can parse the table."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
