"""The parts of the results page about the GLUE table: scores, costs, patterns, and what is missing."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from patterns import (
    BLORA_PATTERNS,
    CLOSING_PATTERNS,
    RANK_PATTERNS,
    attention_bops_at_most,
    not_below,
    pattern_table,
)
from records import (
    FIRST_TASKS,
    GLUE_ROWS,
    GLUE_TASKS,
    SAMPLED,
    TASK_TITLES,
    Run,
    check_alike,
    grouped,
    markdown_table,
    mean_at,
    mean_of,
    read_runs,
    row_titles,
    score,
    spread,
    with_sampled,
)

PAPERS = json.loads((Path(__file__).parent / "papers.json").read_text(encoding="utf-8"))
SEEDS = (0, 1, 2)
SCOPES = ("adapted", "attention", "encoder", "model")
SCORE_COLUMNS = ("accuracy", "f1", "matthews_correlation", "pearson", "spearman", "nll", "ece")
CLOSE = 0.5
"""Points below LoRA that B-LoRA may be, on average, and …"""
NEAR = 0.3
"""Points below LoRA that B-LoRA with low ranks may be, on average."""
CHEAP = 0.25
"""… the share of attention's bit operations that it may cost then."""
FAR_APART = 10
"""Points of standard deviation over seeds beyond which a mean says little, and every seed is told."""

Group = Sequence[Run]


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}%"


def number(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def glue_runs(folder: Path) -> list[Run]:
    """The runs of one model, those with samples twice; raises where a row's runs were trained differently."""
    runs = read_runs(folder)
    for group in grouped(runs, "task", "method").values():
        check_alike(group)
    for group in grouped(runs, "task").values():
        if len({run["training"]["steps"] for run in group}) > 1:
            check_alike([{**run, "optimizer": None, "target_modules": None} for run in group])
    return with_sampled(runs)


def paper_score(row: str, task: str) -> float | None:
    """What the paper has for a row and task, in per cent."""
    glue = PAPERS["glue"]
    found = glue["rows"].get(row)
    return found["scores"][glue["tasks"].index(task)] if found else None


def score_table(runs: Group) -> str:
    """Rows × tasks: mean ± standard deviation over seeds, the paper's number behind it in parentheses."""
    groups = grouped(runs, "task", "method")
    head = ["method", *(TASK_TITLES[task] for task in GLUE_TASKS)]
    head += [f"average of {len(tasks)}" for tasks in (FIRST_TASKS, GLUE_TASKS)]
    rows = []
    for method, title in row_titles(runs).items():
        here = {task: groups[task, method] for task in GLUE_TASKS if (task, method) in groups}
        papers = [paper_score(method, task) for task in GLUE_TASKS]
        if not here:
            continue
        cells = [
            beside(spread([score(run) for run in here.get(t, [])]), p) for t, p in zip(GLUE_TASKS, papers, strict=True)
        ]
        for tasks in (FIRST_TASKS, GLUE_TASKS):
            known = [statistics.fmean(map(score, here[task])) for task in tasks if task in here]
            average = statistics.fmean(known) if len(known) == len(tasks) else None
            values = [value for task in tasks if (value := paper_score(method, task)) is not None]
            theirs = statistics.fmean(values) if len(values) == len(tasks) else None
            cells.append(beside(number(average, 2), theirs))
        rows.append([title, *cells])
    return markdown_table(head, rows)


def bops_table(runs: Group) -> str:
    """Attention's bit operations by row and task, the paper's behind them in parentheses where it has them."""
    glue = PAPERS["glue"]
    groups = grouped([run for run in runs if not run["method"].endswith(SAMPLED)], "task", "method")
    rows = []
    for method, title in GLUE_ROWS.items():
        if not any((task, method) in groups for task in GLUE_TASKS):
            continue
        cells = []
        for task in GLUE_TASKS:
            share = mean_at(groups.get((task, method), []), "relative_bops", "attention")
            theirs = glue["attention_bops"].get(method)
            paper = None if theirs is None else theirs[glue["tasks"].index(task)]
            cells.append(percent(share) + ("" if paper is None else f" ({paper:.2f}%)"))
        overall = glue["rows"].get(method, {}).get("bops")
        rows.append([title, *cells, "–" if overall is None else f"{overall:.2f}%"])
    head = ["BOPs: attention", *(TASK_TITLES[task] for task in GLUE_TASKS), "all tasks, in the paper's table"]
    return markdown_table(head, rows)


def beside(cell: str, paper: float | None) -> str:
    return cell if paper is None else f"{cell} ({paper:.2f})"


def cost_table(runs: Group, task: str) -> str:
    """Every score and cost of one task's rows, as means over seeds."""
    groups = grouped([run for run in runs if run["task"] == task], "method")
    known = {name for group in groups.values() for run in group for name in run["scores"]}
    columns = [name for name in SCORE_COLUMNS if name in known]
    head = ["method", "seeds", *(name.replace("_", " ") for name in columns), *(f"BOPs: {scope}" for scope in SCOPES)]
    head += ["trainable", "adapter", "mean rank", "A, E, B bits", "seconds", "processor seconds", "memory, MB"]
    rows = []
    for method, title in row_titles(runs).items():
        group = groups.get((method,))
        if not group:
            continue
        cells = [title, str(len(group))]
        for name in columns:
            factor, digits = (1, 3) if name in ("nll", "ece") else (100, 2)
            cells.append(spread([factor * run["scores"][name] for run in group], digits))
        cells += [percent(mean_at(group, "relative_bops", scope)) for scope in SCOPES]
        cells += [number(mean_at(group, "parameters", name)) for name in ("trainable", "adapter")]
        cells += [number(mean_at(group, name), 1) for name in ("mean_rank", "median_adapter_bits")]
        cells += [number(mean_at(group, name)) for name in ("seconds", "processor_seconds")]
        cells.append(number(mean_of(group, megabytes)))
        rows.append(cells)
    return markdown_table(head, rows)


def megabytes(run: Run) -> float | None:
    return run["peak_memory_bytes"] / 1e6 if "peak_memory_bytes" in run else None


def training_line(runs: Group, task: str) -> str:
    """What was the same for a task's rows, and what was not."""
    group = [run for run in runs if run["task"] == task]
    first = group[0]["training"]
    rates = sorted({run["training"]["learning_rate"] for run in group})
    metric, shown = group[0]["metric"].replace("_", " "), ", ".join(f"{rate:g}" for rate in rates)
    slow = {run["method"] for run in group if run["machine"]["precision"] == "float32"}
    elsewhere = ", ".join(title for method, title in row_titles(group).items() if method in slow)
    note = f" In float32, on a processor without bfloat16 (seconds do not compare): {elsewhere}." if slow else ""
    return (
        f"{first['steps']} steps of {first['batch_size']} rows, learning rate {shown}, "
        f"layers {', '.join(group[0]['target_modules'])}; {metric} on {group[0]['held_out']:,} held-out rows.{note}\n"
    )


def far_apart(runs: Group, task: str) -> str:
    """Every seed's score of the rows of one task that a mean does not describe; nothing where there are none."""
    lines = []
    for method, title in row_titles(runs).items():
        found = [score(run) for run in runs if run["task"] == task and run["method"] == method]
        if len(found) > 1 and statistics.stdev(found) > FAR_APART:
            lines.append(f"{title}: {', '.join(f'{value:.2f}' for value in found)}")
    return f"Far apart between seeds: {'; '.join(lines)}.\n" if lines else ""


def curve_table(runs: Group) -> str:
    """DyLoRA's score at each rank that was looked at."""
    found = [run for run in runs if "rank_curve" in run]
    if not found:
        return ""
    ranks = [*sorted(found[0]["rank_curve"], key=int), str(found[0]["layers"][0]["initial_rank"])]
    rows = []
    for task in GLUE_TASKS:
        group = [run for run in found if run["task"] == task]
        if group:
            curves = [{**run["rank_curve"], ranks[-1]: run["scores"]} for run in group]
            metric = group[0]["metric"]
            rows.append(
                [TASK_TITLES[task], *(spread([100 * each[rank][metric] for each in curves]) for rank in ranks)]
            )
    return "DyLoRA, cut to a rank after training:\n\n" + markdown_table(["task", *(f"rank {r}" for r in ranks)], rows)


def glue_section(results: Path, folder: str = "glue") -> str:
    """The GLUE table of one model, what it cost, and what is missing."""
    runs = glue_runs(results / folder)
    if not runs:
        return "Not run.\n"
    parts = [score_table(runs), bops_table(runs)]
    for task in GLUE_TASKS:
        if any(run["task"] == task for run in runs):
            parts += [f"### {TASK_TITLES[task]}\n", training_line(runs, task), cost_table(runs, task)]
            parts.append(far_apart(runs, task))
    return "\n".join(part for part in [*parts, curve_table(runs)] if part).rstrip() + "\n"


def missing(runs: Iterable[Run], rows: dict[str, str], tasks: Sequence[str]) -> list[str]:
    """For each row what has not been run, by task and seed."""
    there = {(run["method"], run["task"], run["seed"]) for run in runs}
    lines = []
    for row, title in rows.items():
        absent = {task: [seed for seed in SEEDS if (row, task, seed) not in there] for task in tasks}
        names = [
            TASK_TITLES.get(task, task) + ("" if len(seeds) == len(SEEDS) else f" (seed {', '.join(map(str, seeds))})")
            for task, seeds in absent.items()
            if seeds
        ]
        if names:
            lines.append(
                f"- {title}: {'all' if len(names) == len(tasks) and ' (' not in ''.join(names) else ', '.join(names)}"
            )
    return lines


def patterns_section(results: Path) -> str:
    """Each pattern of the papers, with what the files say about it task by task."""
    runs = glue_runs(results / "glue")
    parts = []
    for method, patterns in (
        ("blora-q+ra", BLORA_PATTERNS),
        ("blora-ra", RANK_PATTERNS),
        ("evidence-ra", CLOSING_PATTERNS),
        ("adalora", RANK_PATTERNS),
        ("bayes_adalora", RANK_PATTERNS),
    ):
        own = {task: [r for r in runs if r["method"] == method and r["task"] == task] for task in GLUE_TASKS}
        own = {task: group for task, group in own.items() if group}
        if own:
            titled = {TASK_TITLES[task]: group for task, group in own.items()}
            parts.append(pattern_table(GLUE_ROWS[method], titled, patterns))
    claims = {
        f"B-LoRA q + ra is at most {CLOSE} points below LoRA r = 8": not_below(runs, "blora-q+ra", "lora", CLOSE),
        f"its attention costs at most {100 * CHEAP:.0f}% of the bit operations": attention_bops_at_most(
            runs, "blora-q+ra", CHEAP
        ),
        "learning ranks as well costs nothing: q + ra is not below q": not_below(runs, "blora-q+ra", "blora-q", 0),
        f"B-LoRA ra at a mean rank of 1.5 is at most {NEAR} points below LoRA r = 8": not_below(
            runs, "evidence-ra", "lora", NEAR
        ),
        "B-LoRA ra at a mean rank of 1.5 is not below LoRA r = 2": not_below(runs, "evidence-ra", "lora-r2", 0),
        "B-LoRA ra at a mean rank of 1.5 is not below LoRA r = 1": not_below(runs, "evidence-ra", "lora-r1", 0),
        "AdaLoRA is not below LoRA r = 8": not_below(runs, "adalora", "lora", 0),
        "Bayesian AdaLoRA with IVON is not below AdaLoRA with AdamW": not_below(runs, "bayes_adalora", "adalora", 0),
    }
    parts.append(markdown_table(["claim", "here", ""], [[c, v.text, v.seen] for c, v in claims.items()], left=3))
    return "\n".join(parts)
