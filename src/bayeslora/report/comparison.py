"""Compare runs: one row per run, mean ± standard deviation over seeds of the same setting, and figures."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure
from scipy.stats import t as student_t

from bayeslora.errors import BayesLoraError, counted
from bayeslora.files import finite, parse_yaml, save_json, write_atomically
from bayeslora.report import comparison_figures, uncertainty_figures
from bayeslora.report.comparison_table import comma_separated, latex, markdown
from bayeslora.report.page import write_files
from bayeslora.report.style import pdf_bytes, png_bytes
from bayeslora.report.uncertainty_figures import pooled_histogram
from bayeslora.runs.record import Histogram, Reliability, ReliabilityBin, RunRecord, read_run

# Options that may differ between runs of one setting: the seed, and those about output and logging.
_NOT_OPTIONS = frozenset(
    "seed data_seed output_dir overwrite_output_dir overwrite logging_dir run_name report_to resume_from_checkpoint "
    "resume logging_steps logging_strategy logging_first_step disable_tqdm log_level save_total_limit hub_model_id "
    "push_to_hub json samples report_rows".split()
)
# Results of training, not options, in adapter_config.json, which is read if config.yaml is missing.
_LEARNED = frozenset({"rank_pattern", "alpha_pattern", "inference_mode", "peft_version"})

# Options that decide which rows a run without a file for them is scored on.
_SPLIT = ("data_dir", "train_file", "eval_fraction", "split_seed", "group_column")


@dataclass(frozen=True)
class Group:
    """Runs of one setting, which differ only in their seed."""

    label: str
    runs: list[RunRecord]
    options: dict[str, Any]

    @property
    def where(self) -> str:
        """Return task and split."""
        return self.runs[0].where


def write_comparison(folders: Sequence[Path], output_dir: Path) -> dict[str, Any]:
    """Compare finished runs: write `table.json`, `.md`, `.tex` and `.csv`, and figures as PNG and PDF.

    The figures are `score_bops.png`, `reliability.png`, `risk_coverage.png` and, for runs that were scored on
    out-of-distribution inputs, `uncertainty.png` and `ood.png`; figures without data are left out.

    Runs form a group if their method, model, task, split, steps, samples and options (`config.yaml` without seed and
    output paths) agree. A group is reported as mean ± sample standard deviation (n − 1) over its distinct seeds. Runs
    with the same seed are repeats and are never averaged.

    Args:
        folders: output folders of `bayeslora train` or `bayeslora evaluate`, in the order of the rows.
        output_dir: folder for the files; created if missing.

    Returns:
        The content of `table.json`: `{"runs": [row, …], "groups": [row, …], "differences": [row, …], "figures": [file
        name, …]}`. In a group's row each number is `{"mean", "sd", "n"}`, with `sd` null for a single run. A row of
        `differences` compares one group with the first group of the same task and split. It has `setting`, `baseline`,
        the `seeds` that both have, and for each score `{"mean", "low", "high"}`: a 95% interval from Student's t over
        the differences at each seed, null for a single seed.

    Raises:
        BayesLoraError: no folder is given, one is given twice, or a `metrics.json` is invalid.
    """
    paths = [Path(folder) for folder in folders]
    if not paths:
        raise BayesLoraError("0 folders are given, but at least 1 is needed: name output folders of `bayeslora train`")
    for position, path in enumerate(paths):
        if path.resolve() in {earlier.resolve() for earlier in paths[:position]}:
            raise BayesLoraError(f"{path} is named twice, but each folder may appear once: leave one out")
    runs = [read_run(path) for path in paths]
    groups = group_runs(runs)
    label_of = {run.folder: group.label for group in groups for run in group.runs}
    target = Path(output_dir)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BayesLoraError(f"{target} cannot be created ({error.strerror}): choose a writable folder") from error
    drawn = {name: figure for name, figure in _figures(groups).items() if figure is not None}
    table: dict[str, Any] = {
        "runs": [{"setting": label_of[run.folder], **run_row(run)} for run in runs],
        "groups": [group_row(group) for group in groups],
        "differences": differences(groups),
        "figures": [f"{name}.png" for name in drawn],
    }
    table = finite(table)
    write_files(target, {f"{name}.png": png_bytes(figure) for name, figure in drawn.items()})
    write_files(target, {f"{name}.pdf": pdf_bytes(figure) for name, figure in drawn.items()})
    with write_atomically(target / "table.json") as path:
        save_json(path, table)
    forms = {"table.md": markdown, "table.tex": latex, "table.csv": comma_separated}
    write_files(target, {name: written(table).encode() for name, written in forms.items()})
    return table


def group_runs(runs: Sequence[RunRecord]) -> list[Group]:
    """Group runs by setting, in the order in which settings first appear; repeats of one seed stay separate."""
    sampled = {run.method for run in runs if run.samples}
    by_setting: dict[str, Group] = {}
    for run in runs:
        options = _options(run.folder)
        key = json.dumps([run.method, run.model, run.where, run.steps, run.samples, _map(run), options], default=str)
        by_setting.setdefault(key, Group(_name(run, sampled), [], options)).runs.append(run)
    groups: list[Group] = []
    for group in by_setting.values():
        seeds = [run.seed for run in group.runs]
        if len(set(seeds)) == len(seeds) and (None not in seeds or len(seeds) == 1):
            groups.append(group)
        else:
            groups.extend(replace(group, runs=[run]) for run in group.runs)
    alike: dict[tuple[str, str], list[Group]] = defaultdict(list)
    for group in groups:
        alike[group.label, group.where].append(group)
    labels = {id(g): label for same in alike.values() for g, label in zip(same, _labels(same), strict=True)}
    return [replace(group, label=labels[id(group)]) for group in groups]


def run_row(run: RunRecord) -> dict[str, Any]:
    """Return one run as a flat row of the table; missing numbers are None."""
    return {"folder": str(run.folder), "seed": run.seed, **_setting(run), **run_numbers(run)}


def _setting(run: RunRecord) -> dict[str, Any]:
    """Return the columns that runs of one setting share."""
    names = ("method", "task", "model", "steps", "samples", "metric", "where")
    return {name: getattr(run, name) for name in names} | {"ood": run.ood.name if run.ood else None}


def run_numbers(run: RunRecord) -> dict[str, float | None]:
    """Return the numbers that are averaged over seeds, in the table's order."""
    numbers: dict[str, float | None] = {"score": run.score}
    for name in ("accuracy", "ece", "nll"):
        numbers[name] = run.scores.get(name)
    numbers |= {name: value for name, value in run.scores.items() if name not in numbers}
    numbers |= {f"ood_{m}_{name}": value for m, scores in run.detection.items() for name, value in scores.items()}
    numbers["trainable_parameters"] = run.parameters.get("trainable")
    numbers["adapter_median_bits"] = run.median_adapter_bits
    numbers["mean_rank"] = run.mean_rank
    for scope in ("attention", "encoder"):
        numbers[f"{scope}_bops"] = run.relative_bops.get(scope)
    numbers["train_seconds"] = run.seconds.get("train")
    return numbers


def group_row(group: Group) -> dict[str, Any]:
    """Return the row of a group: shared columns, and mean, sample standard deviation and count of each number."""
    rows = [run_numbers(run) for run in group.runs]
    row: dict[str, Any] = {"setting": group.label, **_setting(group.runs[0])}
    row["seeds"] = [run.seed for run in group.runs]
    row["folders"] = [str(run.folder) for run in group.runs]
    row["options"] = group.options
    for name in dict.fromkeys(name for numbers in rows for name in numbers):
        values = [value for numbers in rows if (value := numbers.get(name)) is not None]
        row[name] = mean_and_deviation(values)
    return row


def differences(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Return each group's scores minus those of the first group scored on the same rows, over the seeds of both."""
    found = []
    first: dict[tuple[Any, ...], Group] = {}
    for group in groups:
        rows = [group.options.get(name) for name in (("eval_file",) if "eval_file" in group.options else _SPLIT)]
        baseline = first.setdefault((group.where, *group.runs[0].labels, *rows), group)
        pairs = [(a, b) for a in group.runs for b in baseline.runs if a.seed == b.seed and a.seed is not None]
        if baseline is group or not pairs:
            continue
        row: dict[str, Any] = {"setting": group.label, "baseline": baseline.label, "seeds": [a.seed for a, _ in pairs]}
        row |= {name: getattr(group.runs[0], name) for name in ("where", "metric")}
        numbers = [(run_numbers(a), run_numbers(b)) for a, b in pairs]
        for name in ("score", *group.runs[0].scores):
            both = [(a.get(name), b.get(name)) for a, b in numbers]
            row[name] = mean_and_interval([a - b for a, b in both if a is not None and b is not None])
        found.append(row)
    return found


def mean_and_interval(values: Sequence[float]) -> dict[str, float | None] | None:
    """Return `{"mean", "low", "high"}`, a 95% interval by Student's t, without ends for one value; None for none."""
    if not values:
        return None
    mean = statistics.fmean(values)
    if len(values) == 1:
        return {"mean": mean, "low": None, "high": None}
    half = float(student_t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def mean_and_deviation(values: Sequence[float]) -> dict[str, float | int] | None:
    """Return `{"mean", "sd", "n"}` with the sample standard deviation, None for one value; None without values."""
    if not values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "sd": deviation, "n": len(values)}  # type: ignore[dict-item]


def pooled_reliability(runs: Sequence[RunRecord]) -> Reliability:
    """Pool the bins of several runs, weighted by counts; if the edges differ, return those of the first run."""
    tables = [run.reliability for run in runs if run.reliability.filled]
    if not tables:
        return Reliability()
    if len({tuple((b.lower, b.upper) for b in table.bins) for table in tables}) > 1:
        return tables[0]
    return Reliability([_pooled_bin(column) for column in zip(*(table.bins for table in tables), strict=True)])


def _pooled_bin(bins: Sequence[ReliabilityBin]) -> ReliabilityBin:
    filled = [b for b in bins if b.count]
    total = sum(b.count for b in filled)
    if not total:
        return bins[0]
    confidence = sum(b.count * b.confidence for b in filled) / total
    accuracy = sum(b.count * b.accuracy for b in filled) / total
    return ReliabilityBin(bins[0].lower, bins[0].upper, total, confidence, accuracy)


def _options(folder: Path) -> dict[str, Any]:
    """Return a run's options without those that may differ between seeds; without config.yaml, the adapter's."""
    for name in ("config.yaml", "adapter_config.json"):
        path = folder / name
        if not path.exists():
            continue
        try:
            loaded = parse_yaml(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise BayesLoraError(
                f"{path} cannot be read ({type(error).__name__}): repair it or train again"
            ) from error
        dropped = _NOT_OPTIONS if name == "config.yaml" else _NOT_OPTIONS | _LEARNED
        return dict(sorted(_flattened(loaded, dropped).items())) if isinstance(loaded, dict) else {}
    return {}


def _flattened(options: dict[str, Any], dropped: frozenset[str], prefix: str = "") -> dict[str, Any]:
    """Flatten options to dotted names with underscores, without those in `dropped`."""
    flat: dict[str, Any] = {}
    for key, value in options.items():
        name = str(key).replace("-", "_")
        if name not in dropped:
            nested = isinstance(value, dict)
            flat |= _flattened(value, dropped, f"{prefix}{name}.") if nested else {prefix + name: value}
    return flat


def _name(run: RunRecord, sampled: Container[str]) -> str:
    """Return the method's title, with the number of samples (or "mean") if any run of the method was sampled."""
    how = f", {counted(run.samples, 'sample')}" if run.samples else ", mean"
    return run.title + (how if run.method in sampled else "")


def _map(run: RunRecord) -> str | None:
    """Return the kind of map of the probabilities that the scores use, without its numbers, which differ by seed."""
    return run.calibrated.by.split()[0] if run.calibrated else None


def _labels(same: Sequence[Group]) -> list[str]:
    """Return labels that distinguish groups of one name and task: by the options that differ, or by the folder."""
    if len(same) == 1:
        return [same[0].label]
    options = [
        g.options | {"steps": g.runs[0].steps, "model": Path(g.runs[0].model).name, "calibrated": _map(g.runs[0])}
        for g in same
    ]
    names = sorted({name for own in options for name in own})
    telling = [name for name in names if len({json.dumps(own.get(name), default=str) for own in options}) > 1]
    labels = []
    for group, own in zip(same, options, strict=True):
        words = [f"{name.split('.')[-1]}={own[name]}" for name in telling if own.get(name) is not None]
        labels.append(f"{group.label} ({', '.join(words) if 0 < len(words) < 4 else group.runs[0].folder.name})")
    return labels if len(set(labels)) == len(labels) else [f"{g.label} ({g.runs[0].folder})" for g in same]


def _figures(groups: Sequence[Group]) -> dict[str, Figure | None]:
    points = [_point(group.label, run) for group in groups for run in group.runs]
    several = len({group.where for group in groups}) > 1
    titled = [(f"{group.label} on {group.where}" if several else group.label, group.runs) for group in groups]
    panels = [panel for label, runs in titled if any(run.ood for run in runs) for panel in _histograms(label, runs)]
    return {
        "score_bops": comparison_figures.score_figure(points),
        "reliability": comparison_figures.reliability_figure([reliability_of(label, runs) for label, runs in titled]),
        "risk_coverage": uncertainty_figures.risk_coverage_figure([_selection(group) for group in groups]),
        "uncertainty": uncertainty_figures.histograms_figure(panels),
        "ood": uncertainty_figures.detection_figure([_detections(group) for group in groups]),
    }


def _point(label: str, run: RunRecord) -> comparison_figures.Point:
    bops, rows = run.relative_bops.get("attention", math.nan), sum(each.count for each in run.reliability.filled)
    return comparison_figures.Point(label, run.where, run.metric, run.score, bops, rows)


def reliability_of(label: str, runs: Sequence[RunRecord]) -> tuple[str, Reliability, float]:
    """Return the label, the bins pooled over seeds, and the mean ECE of the seeds as in the table."""
    pooled = pooled_reliability(runs)
    errors = [run.scores["ece"] for run in runs if "ece" in run.scores]
    return label, pooled, statistics.fmean(errors) if errors else pooled.ece


def _selection(group: Group) -> uncertainty_figures.Selection:
    areas = [run.scores["aurc"] for run in group.runs if "aurc" in run.scores]
    curve = uncertainty_figures.mean_curve([run.risk_coverage.points for run in group.runs])
    return uncertainty_figures.Selection(group.label, group.where, curve, statistics.fmean(areas) if areas else None)


def _detections(group: Group) -> uncertainty_figures.Detections:
    found: dict[str, list[float]] = defaultdict(list)
    for run in group.runs:
        for measure, scores in run.detection.items():
            if "auroc" in scores:
                found[measure].append(scores["auroc"])
    return uncertainty_figures.Detections(group.label, group.where, dict(found))


def _histograms(label: str, runs: Sequence[RunRecord]) -> list[tuple[str, str, Histogram, float | None]]:
    """Return one panel per measure of uncertainty: counts pooled and AUROC averaged over the runs of a setting."""
    panels = []
    for measure in dict.fromkeys(measure for run in runs for measure in run.uncertainty):
        pooled = pooled_histogram([run.uncertainty[measure] for run in runs if measure in run.uncertainty])
        areas = [run.detection[measure]["auroc"] for run in runs if "auroc" in run.detection.get(measure, {})]
        if pooled is not None:
            panels.append((label, measure, pooled, statistics.fmean(areas) if areas else None))
    return panels
