"""The parts of the results page beside the GLUE table: importances, MMLU, timing, and runs kept for the record."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from patterns import Verdict, not_below
from records import (
    ABLATED,
    ABLATED_TASK,
    GLUE_ROWS,
    GLUE_TASKS,
    IMPORTANCES,
    IVON_SETTINGS,
    MMLU_ROWS,
    SHOTS,
    TASK_TITLES,
    Run,
    check_alike,
    grouped,
    markdown_table,
    mean_at,
    mean_of,
    read_runs,
    score,
    spread,
)
from results_calibration import missing_calibration
from results_glue import CLOSE, PAPERS, SEEDS, Group, megabytes, missing, number, percent


def importance_section(results: Path) -> str:
    """Bayesian AdaLoRA's six scores under several settings of IVON, CV(σ), and whether magnitude alone does it."""
    found = [
        {**run, "importance": run["options"]["importance"], "setting": ivon_setting(run["optimizer"])}
        for run in read_runs(results / "importance")
    ]
    if not found:
        return "Not run.\n"
    groups = grouped(found, "task", "setting", "importance")
    rows, answers = [], []
    for task, setting in dict.fromkeys(key[:2] for key in groups):
        here = {name: groups[task, setting, name] for name in IMPORTANCES if (task, setting, name) in groups}
        for name, group in here.items():
            check_alike(group)
            cells = [task, setting, name, str(len(group)), spread(list(map(score, group))), variation(group)]
            rows.append([TASK_TITLES[task], *cells[1:]])
        if {"magnitude", "snr_abs"} <= set(here):
            alone, both = ({run["seed"]: score(run) for run in here[name]} for name in ("magnitude", "snr_abs"))
            seeds = alone.keys() & both.keys()
            if not seeds:
                continue
            difference = statistics.fmean(alone[seed] - both[seed] for seed in seeds)
            verdict = Verdict(difference >= -CLOSE, f"{difference:+.2f} points, seeds of both: {len(seeds)}")
            answers.append([TASK_TITLES[task], setting, verdict.text, verdict.seen])
    settings = "\n".join(
        f"- `{name}`: " + ", ".join(f"{key} {value}" for key, value in options.items())
        for name, options in IVON_SETTINGS.items()
    )
    question = f"Is magnitude alone enough (at most {CLOSE} points below `snr_abs`)?\n"
    return "\n".join(
        [
            "CV(σ) is the standard deviation of σ divided by the mean of σ. If it is near 0, every score depends only "
            "on the means of the weights, and comparing the scores says little. The settings of IVON are:\n",
            settings + "\n",
            markdown_table(["task", "IVON", "importance", "seeds", "score", "CV(σ)"], rows, left=3),
            question,
            markdown_table(["task", "IVON", "here", "magnitude − snr_abs"], answers, left=3),
        ]
    )


def ivon_setting(optimizer: dict[str, Any]) -> str:
    """The name of the settings that a file records."""
    own = {name: value for name, value in optimizer.items() if name != "name"}
    return next((name for name, options in IVON_SETTINGS.items() if options == own), "other")


def variation(runs: Group) -> str:
    """CV(σ), the mean over runs: to two digits, however small it is."""
    return f"{statistics.fmean(run['posterior']['posterior_std_variation'] for run in runs):.2g}"


def posterior_table(runs: Group) -> str:
    """CV(σ) of the rows of the GLUE table that IVON trained."""
    rows = []
    for (task, method), group in grouped([run for run in runs if "posterior" in run], "task", "method").items():
        setting = ivon_setting(group[0]["optimizer"])
        rows.append([TASK_TITLES[task], GLUE_ROWS[method], setting, variation(group)])
    return "\n" + markdown_table(["task", "method", "IVON", "CV(σ)"], rows, left=3) if rows else ""


GUESSING = 0.25
"""Accuracy of guesses at MMLU's four choices."""


def guessing_error(rows: int) -> float:
    """The standard error of the accuracy of guesses on this many rows."""
    return float((GUESSING * (1 - GUESSING) / rows) ** 0.5)


def guesses(runs: Sequence[Run]) -> bool:
    """Whether no run on MMLU differs from guessing by more than two standard errors."""
    scores = [(run["shots"][shots]["accuracy"], guessing_error(run["held_out"])) for run in runs for shots in SHOTS]
    return all(abs(score - GUESSING) <= 2 * error for score, error in scores)


def mmlu_title(results: Path) -> str:
    """The heading of the section: how the model answers, and whether it is better than guesses."""
    runs = read_runs(results / "mmlu")
    return "MMLU by letters (guesses)" if runs and guesses(runs) else "MMLU by letters"


def mmlu_section(results: Path) -> str:
    """Accuracy of each row without and with examples, and what holds of the paper's findings."""
    runs = read_runs(results / "mmlu")
    if not runs:
        return "Not run.\n"
    groups = grouped(runs, "method")
    rows = []
    for row, title in MMLU_ROWS.items():
        group = groups.get((row,))
        if group:
            check_alike(group)
            cells = [title, str(len(group))]
            cells += [spread([100 * run["shots"][shots]["accuracy"] for run in group]) for shots in SHOTS]
            cells.append(percent(mean_at(group, "relative_bops", "attention")))
            cells.append(number(mean_at(group, "mean_rank"), 1))
            cells += [number(mean_at(group, name)) for name in ("seconds", "processor_seconds")]
            cells.append(number(mean_of(group, megabytes)))
            rows.append(cells)
    head = [
        "row",
        "seeds",
        *(f"{shots}-shot" for shots in SHOTS),
        "BOPs: attention",
        "mean rank",
        "seconds",
        "processor seconds",
        "memory, MB",
    ]
    first = next((run for run in runs if run["training"]), runs[0])
    error = guessing_error(first["held_out"])
    subset = (
        f"Scores are for the first {first['subset']['per_subject']} test questions of each subject, "
        f"{first['held_out']} in total. The standard error is about {100 * error:.1f} points. "
    )
    if guesses(runs):
        subset += (
            f"**Every run is within two standard errors of guessing ({GUESSING:.0%}). This model does not learn to "
            "answer by letter, so the claims below compare noise.** "
        )
    if first["training"]:
        subset += (
            f"The models were fine-tuned for {first['training']['steps']} steps of {first['training']['batch_size']} "
            f"rows on {' and '.join(first['trained_on'])} instead of MMLU's training data. "
        )
    papers = PAPERS["mmlu"]
    lost = "–".join(map(str, papers["points_lost_to_quantization"]))
    paper = (
        f"In {papers['source']} ({' and '.join(papers['models'])}) learning only ranks equals QLoRA "
        f"({papers['qlora']}), and quantization costs {lost} points more.\n"
    )
    claims = []
    for shots in SHOTS:
        own = [{**run, "scores": run["shots"][shots]} for run in runs]
        dense = "qlora" if ("qlora",) in groups else "lora"
        equal = not_below(own, "blora-ra", dense, CLOSE)
        costs = not_below(own, "blora-q+ra", "blora-ra", CLOSE)
        claims.append(
            [f"{shots}-shot: ranks alone are at most {CLOSE} points below {MMLU_ROWS[dense]}", equal.text, equal.seen]
        )
        claims.append([f"{shots}-shot: bits cost more than {CLOSE} points", _not(costs).text, costs.seen])
    return "\n".join(
        [subset + paper, markdown_table(head, rows), markdown_table(["claim", "here", ""], claims, left=3)]
    )


def _not(verdict: Verdict) -> Verdict:
    return Verdict(None if verdict.holds is None else not verdict.holds, verdict.seen)


def variants_table(variants: dict[str, dict[str, Any]]) -> str:
    """A timing script's variants with whatever numbers they have."""
    columns = list(
        dict.fromkeys(key for each in variants.values() for key, v in each.items() if isinstance(v, (int, float)))
    )
    rows = [[name, *(_plain(values.get(column)) for column in columns)] for name, values in variants.items()]
    return markdown_table(["variant", *(column.replace("_", " ") for column in columns)], rows)


def nested_tables(name: str, found: dict[str, Any]) -> list[str]:
    """A table for every level of `found` whose entries have numbers, with the names that lead there."""
    entries = {key: each for key, each in found.items() if isinstance(each, dict)}
    if any(isinstance(value, (int, float)) for each in entries.values() for value in each.values()):
        return [f"{name}:\n\n{variants_table(entries)}"]
    return [table for key, each in entries.items() for table in nested_tables(f"{name}, {key}", each)]


def _plain(value: Any) -> str:
    if not isinstance(value, (int, float)):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def timing_section(results: Path) -> str:
    """The tables of the timing scripts' files."""
    parts = []
    for path in sorted(results.glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        if "servers" in found:  # how near answers are, and no times
            continue
        script = f"benchmarks/{path.stem.partition('-')[0]}.py"
        settings = [
            f"{key} {found[key]}" for key in ("batch", "tokens", "samples", "rounds", "threads") if key in found
        ]
        machine = found.get("machine")
        if isinstance(machine, dict) and "instructions" in machine:
            settings.append(f"{machine['processor']} with {', '.join(machine['instructions'])}")
        where = ", ".join(settings)
        parts.append(f"### {path.stem.replace('_', ' ')}\n\n`{script}` says what is measured. Settings: {where}.\n")
        for name in ("variants", "optimizer_step"):
            parts += nested_tables(name.replace("_", " "), found.get(name, {}))
        for each in found.get("results", []):
            parts.append(f"{each['method']}, {each['rows']} × {each['tokens']}:\n\n{variants_table(each['variants'])}")
        for name in ("encoder", "decoder"):
            parts += [deployed(name, found[name])] if name in found else []
        parts += [served(found)] if "clients" in found else []
    return "\n".join(parts) if parts else "Not run.\n"


def deployed(name: str, found: dict[str, Any]) -> str:
    """What an exported model is on disk, in time, and in its task."""
    scores = {form: each if isinstance(each, dict) else {found["scores"]["metric"]: each}
              for form, each in found["scores"].items() if form != "metric"}  # fmt: skip
    tables = {"rate and peak of memory": found["rates"], "scores": scores}
    if "rates_of_one" in found:
        tables["rate and peak of memory, one at a time"] = found["rates_of_one"]
    parts = [f"{name}, {what}:\n\n{variants_table(table)}" for what, table in tables.items()]
    return "\n".join([*nested_tables(f"{name}, bytes", found["bytes"]), *parts])


def served(found: dict[str, Any]) -> str:
    """What the server did under load."""
    figures = {
        "requests": found["requests"],
        "errors": sum(found["errors"].values()),
        "refused, as they must be": sum(found["refused"].values()),
        "seconds to an answer, median": found["latency_seconds"]["p50"],
        "seconds to an answer, 95%": found["latency_seconds"]["p95"],
        "memory before, MB": found["resident_bytes"]["before"] / 1e6,
        "memory after, MB": found["resident_bytes"]["after"] / 1e6,
        "largest difference of a probability from `predict`": found["largest_difference"]["probability"],
        "other labels than `predict`": found["largest_difference"]["other_labels"],
    }
    title = f"{found['clients']} clients, {found['seconds']:.0f} seconds:"
    return f"{title}\n\n{markdown_table(['', ''], [[name, _plain(value)] for name, value in figures.items()])}"


def other_runs_section(results: Path, folder: str) -> str:
    """Runs that are no part of the comparison: what their files are called, and what they scored."""
    named: dict[str, list[Run]] = {}
    for run in read_runs(results / folder):
        named.setdefault(run["file"].removesuffix(".json").rpartition("-")[0], []).append(run)
    rows = [
        [f"`{name}`", str(len(group)), spread(list(map(score, group))),
         percent(mean_at(group, "relative_bops", "attention")),
         number(mean_at(group, "mean_rank"), 1)]
        for name, group in named.items()
    ]  # fmt: skip
    return markdown_table(["runs", "seeds", "score", "BOPs: attention", "mean rank"], rows) if rows else "None.\n"


def missing_section(results: Path) -> str:
    """Everything that the runners would still run."""
    glue = missing(read_runs(results / "glue"), GLUE_ROWS, GLUE_TASKS)
    ablation = read_runs(results / "importance")
    scores = [
        {**run, "method": f"{run['options']['importance']}, {ivon_setting(run['optimizer'])}"} for run in ablation
    ]
    names = {
        f"{name}, {setting}": f"importance {name}, IVON {setting}"
        for setting, importances in ABLATED.items()
        for name in importances
    }
    tasks = sorted({run["task"] for run in ablation}) or [ABLATED_TASK]
    mmlu = read_runs(results / "mmlu")
    mmlu += [{**run, "seed": seed} for run in mmlu if run["method"] == "base" for seed in SEEDS]
    lines = [
        *glue,
        *missing(scores, names, tasks),
        *missing(mmlu, {k: f"MMLU, {v}" for k, v in MMLU_ROWS.items()}, ["mmlu"]),
        *missing_calibration(results / "calibration"),
    ]
    return "\n".join(lines) + "\n" if lines else "Nothing is missing.\n"
