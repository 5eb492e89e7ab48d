"""The table of `active.py`: accuracy by number of labels, rows chosen by mutual information against random rows."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from records import TASK_TITLES, Run, markdown_table, read_runs, spread
from scipy.stats import t

STRATEGIES = ("mutual_information", "random")


def active_section(results: Path) -> str:
    """The table with its caption; nothing if it has not been run."""
    runs = read_runs(results / "active")
    if not runs:
        return ""
    first, seeds = runs[0], len({run["seed"] for run in runs})
    return (
        f"{table(runs)}\n"
        "`python benchmarks/active.py`: Me-LoRA on MiniLM-L6, trained anew at each number of labels for "
        f"{first['training']['steps']} steps; accuracy in per cent on the test rows, mean ± standard deviation over "
        f"{seeds} seeds. The pool has {first['pool']:,} rows, and the first {first['labels'][0]} labels are the same "
        "random ones for both.\n"
    )


def table(runs: Sequence[Run]) -> str:
    """Accuracy by labels, in per cent: mean ± standard deviation over seeds, and the paired differences to random."""
    lines = []
    for task in dict.fromkeys(each["task"] for each in runs):
        by_way = {way: {r["seed"]: r for r in runs if (r["task"], r["method"]) == (task, way)} for way in STRATEGIES}
        found = {
            way: {seed: [100 * one["scores"]["accuracy"] for one in each["rounds"]] for seed, each in seeds.items()}
            for way, seeds in by_way.items()
        }
        counts = [one["labels"] for each in runs if each["task"] == task for one in each["rounds"]]
        for number, count in enumerate(dict.fromkeys(counts)):
            values = {
                way: {s: row[number] for s, row in seeds.items() if number < len(row)} for way, seeds in found.items()
            }
            first, second = (values[way] for way in STRATEGIES)
            differences = [first[seed] - second[seed] for seed in first if seed in second]
            lines.append(
                [
                    TASK_TITLES.get(task, task),
                    str(count),
                    *(spread(list(values[way].values()), 1) for way in STRATEGIES),
                    interval(differences),
                ]
            )
    return markdown_table(["task", "labels", *STRATEGIES, "difference, 95% interval"], lines, left=1)


def interval(differences: list[float]) -> str:
    """The mean of paired differences and its 95% interval by Student's t; a dash where there are fewer than two."""
    if len(differences) < 2:
        return "–"
    half = t.ppf(0.975, len(differences) - 1) * statistics.stdev(differences) / len(differences) ** 0.5
    mean = statistics.fmean(differences)
    return f"{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}]"
