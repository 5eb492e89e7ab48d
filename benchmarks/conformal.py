"""Whether conformal sets cover and answers keep their risk, on saved predictions of fine-tuned models.

    python benchmarks/conformal.py                                # results/calibration, into results/decisions
    python benchmarks/conformal.py --predictions FOLDER --output FILE
    python benchmarks/conformal.py --table                        # only the tables

Reads files with the true `labels` and, under `forms`, the `probabilities` of each row, as `calibration.py` writes
them.
The rows of each are split at random into halves, 100 times: one half calibrates, the other is predicted. Coverage is
counted where sets may be empty, for then it is exact: the number of covered rows among m after n calibration rows has
a beta-binomial distribution. So 95 of 100 splits should be within its central 95%, and the mean over splits near
⌈(n + 1) c⌉ / (n + 1). Where many rows have equal probabilities, as those of a language model in bfloat16, LAC covers
more. Whatever the model, these hold for rows that are split at random; the size of the sets is what
tells models apart. A risk is kept in a split if the error rate among the answered rows of the other half is at most
that, or none is answered.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from pathlib import Path
from typing import Any, get_args

import numpy as np
from intervals import probabilities_of
from records import RESULTS, TASK_TITLES, Run, markdown_table, read_runs
from scipy.stats import betabinom

from bayeslora.posthoc import ConformalSets, RiskControl
from bayeslora.posthoc.conformal import SetScore, rank_of_quantile

SPLITS = 100
COVERAGES = (0.8, 0.9, 0.95)
RISKS = (0.05, 0.1, 0.2)


def halves(rows: int, split: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.random.default_rng(split).permutation(rows)
    return order[: rows // 2], order[rows // 2 :]


def coverage_of(
    probabilities: np.ndarray, labels: np.ndarray, score: SetScore, by_class: bool
) -> list[dict[str, Any]]:
    """Coverage and size of the sets over the splits, for each coverage asked for."""
    covered: dict[float, list[int]] = {level: [] for level in COVERAGES}
    sizes: dict[float, list[float]] = {level: [] for level in COVERAGES}
    for split in range(SPLITS):
        first, second = halves(len(labels), split)
        sets = ConformalSets(score, by_class=by_class, allow_empty=True, seed=split)
        sets.fit(probabilities[first], labels[first])
        for level in COVERAGES:
            chosen = sets.sets(probabilities[second], level).numpy()
            covered[level].append(int(chosen[np.arange(len(second)), labels[second]].sum()))
            sizes[level].append(float(chosen.sum(axis=1).mean()))
    found = []
    n, m = len(first), len(second)
    for level in COVERAGES:
        rank = rank_of_quantile(n, level)
        expected = betabinom(m, rank, n + 1 - rank)
        low, high = expected.ppf(0.025), expected.ppf(0.975)
        shares = np.array(covered[level]) / m
        found.append(
            {
                "coverage": level,
                "mean": float(shares.mean()),
                "standard_error": float(shares.std(ddof=1) / np.sqrt(SPLITS)),
                "expected": rank / (n + 1),
                "within": sum(bool(low <= count <= high) for count in covered[level]),
                "size": statistics.fmean(sizes[level]),
            }
        )
    return found


def risk_of(probabilities: np.ndarray, labels: np.ndarray) -> list[dict[str, Any]]:
    """How many rows are answered at each risk, and in how many splits it is kept."""
    found = []
    wrong = probabilities.argmax(axis=1) != labels
    for risk in RISKS:
        kept, answered, rates = 0, [], []
        for split in range(SPLITS):
            first, second = halves(len(labels), split)
            control = RiskControl(risk).fit(probabilities[first], labels[first])
            chosen = ~control.ask_a_human(probabilities[second]).numpy()
            answered.append(float(chosen.mean()))
            if chosen.any():
                rates.append(float(wrong[second][chosen].mean()))
            kept += bool(not chosen.any() or rates[-1] <= risk)
        mean = statistics.fmean(rates) if rates else None
        found.append({"risk": risk, "kept": kept, "answered": statistics.fmean(answered), "error_rate": mean})
    return found


def measured(run: Run) -> list[dict[str, Any]]:
    """One record for each form of a run."""
    labels, records = np.asarray(run["labels"]), []
    for name, form in run["forms"].items():
        probabilities = probabilities_of(form, len(labels))
        sets = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a rare class may have too few rows in some split
            for score in get_args(SetScore):
                sets[score] = coverage_of(probabilities, labels, score, by_class=False)
            sets["lac by class"] = coverage_of(probabilities, labels, "lac", by_class=True)
        records.append(
            {
                "task": run["task"],
                "form": name,
                "seed": run["seed"],
                "rows": len(labels),
                "accuracy": float((probabilities.argmax(axis=1) == labels).mean()),
                "sets": sets,
                "risks": risk_of(probabilities, labels),
            }
        )
    return records


def tables(records: list[dict[str, Any]]) -> str:
    """Coverage and size of LAC's and APS's sets, and the risks; means over the seeds of a task and form."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["task"], record["form"]), []).append(record)
    of_sets, of_risks = [], []
    for (task, form), group in groups.items():
        start = [TASK_TITLES.get(task, task), form, f"{statistics.fmean(each['accuracy'] for each in group):.3f}"]
        for score in get_args(SetScore):
            cells = [score]
            for number in range(len(COVERAGES)):
                each = [record["sets"][score][number] for record in group]
                mean, size = (statistics.fmean(one[key] for one in each) for key in ("mean", "size"))
                cells.append(f"{mean:.3f} ({min(one['within'] for one in each)}), {size:.2f}")
            of_sets.append([*start, *cells])
        risks = [[record["risks"][number] for record in group] for number in range(len(RISKS))]
        of_risks.append(
            [
                *start,
                *(f"{statistics.fmean(r['answered'] for r in e):.1%} ({min(r['kept'] for r in e)})" for e in risks),
            ]
        )
    heads = ["task", "form", "accuracy"]
    first = markdown_table([*heads, "score", *(f"at {level:g}" for level in COVERAGES)], of_sets, left=2)
    second = markdown_table([*heads, *(f"risk {risk:g}" for risk in RISKS)], of_risks, left=2)
    return (
        "Mean coverage (in brackets how many of 100 splits are within the 95% interval, the fewest of any seed), and "
        f"labels a set:\n\n{first}\nShare of rows that are answered (in how many of 100 splits the risk was kept, the "
        f"fewest of any seed):\n\n{second}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--predictions", type=Path, default=RESULTS / "calibration", help="folder of files to read")
    parser.add_argument("--output", type=Path, default=RESULTS / "decisions" / "conformal.json")
    parser.add_argument("--table", action="store_true", help="only print the tables of --output")
    given = parser.parse_args()
    if not given.table:
        runs = [run for run in read_runs(given.predictions) if "forms" in run]
        if not runs:
            parser.error(f"{given.predictions} has no files with predictions: run calibration.py first")
        records = [record for run in runs for record in measured(run)]
        beside = given.output.with_name(given.output.name + ".partial")
        beside.write_text(json.dumps({"splits": SPLITS, "records": records}, indent=1) + "\n", encoding="utf-8")
        beside.rename(given.output)
    print(tables(json.loads(given.output.read_text(encoding="utf-8"))["records"]))


if __name__ == "__main__":
    main()
