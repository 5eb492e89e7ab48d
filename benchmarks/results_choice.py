"""The page that says which method to use, docs/choose.md: its advice in words, its tables from the committed files."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from records import GLUE_TASKS, TASK_TITLES, Run, markdown_table, read_runs, score
from results_active import active_section
from results_calibration import GUESSING, MORE_TASKS, Table, rows_of
from results_frontier import BYTES, SCOPES, budget_rows, bytes_table, cut_runs
from results_otherwise import decoder_table, otherwise_table
from results_servers import servers_table
from results_tags import tags_section
from results_text import text_section

PAGE = """# Which of these should I use?

Start with LoRA. Then read the line of what you are missing.

| you want | use | because |
|---|---|---|
| labels, and nothing else | LoRA | it is the simplest, and what everything here is judged against |
| probabilities that are right on average | LoRA, then [`TemperatureScaling`](prediction.md), or \
[`calibrate --temperature`](decisions.md) | one number, fitted in seconds on held-out rows; \
[see below](#probabilities) |
| the same without held-out rows | [Me-LoRA](melora.md) with `cores=4` | on MRPC, SST-2 and RTE its NLL is that \
of LoRA with a temperature, within the interval; on CoLA it is .029 higher, and on QNLI .020, where LoRA needs no \
temperature |
| the best order of doubtful rows | an ensemble of three LoRAs (`DeepEnsemble`) | its AURC is .017 lower on CoLA, \
.008 on MRPC and .003 on SST-2, for three trainings and three passes; no single adapter lowers LoRA's by .001 beyond \
the interval |
| uncertainty from one adapter and one training: draws, mutual information | [Me-LoRA](melora.md) | its mean is an \
ordinary LoRA, and a draw costs one pass; rows chosen by its draws to be labelled next \
[saved no labels on SST-2](decisions.md#which-rows-should-be-labelled-next) |
| labels that are right with a given probability, rows for a person | any, then [`calibrate`](decisions.md) | \
the guarantee holds for every model; a better model answers more rows |
| to notice texts unlike the training data | any of these, then \
[distances of features](uncertainty.md#does-it-notice-foreign-inputs-out-of-distribution-detection) | they look at \
the input, not at the answer |
| a smaller model, down to 5% of the bit operations | LoRA, merged and rounded to 4 or 8 bits | it costs no training; \
[see below](#bits) |
| a smaller model than that | [B-LoRA](blora.md) with `target_bops` and `quantize_input` (`train --goal small`); with \
inputs at 32 bits no budget below about 5% can be reached | training keeps points that rounding inputs to 4 bits \
loses: on MRPC and QNLI 4 to 13 below 5%, on SST-2 .5 to 1 down to 3%; at 4 bits LoRA under quantization-aware \
training keeps most of them, too |
| small ranks | LoRA of r = 8, then [`truncate_rank`](export.md#rounding-and-cutting-without-training) with training \
rows as its `data`, or `export --mean-rank 1` | one pass and no training; [see below](#ranks) |
| ranks from 1 up to choose among later | [DyLoRA](dylora.md) | one training for all ranks |

All tables come from the files in `benchmarks/results/`; the [results page](results.md) has every row of them.

## Probabilities

Each method on the same layers, the same steps and 90% of the training rows; temperatures are fitted on the other 10%.
Means over seeds; where a row has fewer than LoRA, their number is in parentheses. Lower is better. NLL is the negative
log-likelihood in nats. AURC is the mean error rate over all shares of answered rows, the most certain first: without
samples, a temperature cannot change it for two classes.
{tuned}

{probabilities}

Paired over rows and seeds, with 95% intervals ([results](results.md#calibration)): Me-LoRA with a temperature ties
with LoRA with one in NLL on all five tasks; on SST-2, where a temperature does not help, it is .009 lower without.
Four cores with a temperature tie on MRPC, RTE and SST-2, and are worse on CoLA and QNLI. An ensemble of three LoRAs
is better on MRPC (by .015) and SST-2 (.018), and ties on CoLA and RTE.

## Bits

LoRA of rank 8, merged and rounded without training on, against B-LoRA trained to the same budget in the same number of
steps. The budget is a share of the bit operations of LoRA of rank 16 at 32 bits. Beside each budget is the best
rounding that costs no more. QAT is the same LoRA, trained with rounded numbers for the last 40% of its steps with
torchao's fake quantizers; it finds a range for each token anew, where the others have one range for all. Scores in
per cent, means over the seeds in parentheses.

{bits}

{bytes}
{by_bytes}

## Ranks

The tasks' scores in per cent, and NLL, means over the seeds in parentheses, on query, key and value (CoLA: all linear
layers of the blocks). The cut takes the largest singular values of a trained LoRA of rank 8, or the components that
matter most to its predictions of 1,024 training rows; it does not train on. The last table has the differences of runs
with the same seed, which begin at the same factors and see the same batches and dropout.

{ranks}
"""
PROBABILITIES = {
    "LoRA": ("tuned", "lora"),
    "LoRA + temperature": ("tuned-temperature", "temperature"),
    "MC dropout": ("tuned-dropout", "dropout"),
    "Laplace on the head": ("laplace",),
    "SWAG": ("swag",),
    "TFB (`bayesianize`)": ("tfb",),
    "BLoB": ("blob",),
    "Me-LoRA, learned variances": ("melora",),
    "Me-LoRA": ("melora-closed",),
    "Me-LoRA + temperature": ("melora-closed-temperature",),
    "Me-LoRA, 4 cores": ("melora-cores",),
    "Me-LoRA, 4 cores + temperature": ("melora-cores-temperature",),
    "ensemble of 3 LoRAs": ("tuned-ensemble", "ensemble"),
}
"""Rows of the first table, and which forms of the calibration runs fill them: around a tuned LoRA, or earlier."""
RANKS = {"lora": "LoRA, r = 8", "lora-r2": "LoRA, r = 2", "lora-r1": "LoRA, r = 1"}
LEARNED = {"evidence-ra": (1.5, "B-LoRA, mean rank 1.5"), "evidence-ra-r1": (1.0, "B-LoRA, mean rank 1")}


def choice_page(results: Path) -> str:
    """The whole page in Markdown."""
    tables = _calibration_tables(results)
    tuned = [_with_seeds(task, rows["tuned"]) for task, rows in tables.items() if "tuned" in rows]
    earlier = [_with_seeds(task, rows["lora"]) for task, rows in tables.items() if "tuned" not in rows]
    notes = [f"On {', '.join(tuned)} LoRA's learning rate and length are tuned."] if tuned else []
    notes += [f"On {', '.join(earlier)} they are the task's for all methods."] if earlier else []
    found = choice_tables(results)
    return PAGE.format(
        tuned=" ".join(notes),
        probabilities=f"{found['nll']}\n\n{found['aurc']}",
        bits=f"{found['attention']}\n\n{found['encoder']}",
        bytes=BYTES,
        by_bytes=found["bytes"],
        ranks=found["ranks"],
    )


def _with_seeds(task: str, runs: Sequence[Run]) -> str:
    return f"{TASK_TITLES[task]} ({len(runs)} {'seed' if len(runs) == 1 else 'seeds'})"


def _calibration_tables(results: Path) -> dict[str, Table]:
    """The rows of each task that has a LoRA."""
    # By letters SmolLM2-135M guesses, and a table of guesses advises nobody.
    runs = [
        run
        for run in read_runs(results / "calibration")
        if run["task"] not in GUESSING or run.get("scoring") == "cloze"
    ]
    tables = {task: rows_of([run for run in runs if run["task"] == task]) for task in MORE_TASKS}
    return {task: rows for task, rows in tables.items() if ("tuned" in rows or "lora" in rows)}


def choice_tables(results: Path) -> dict[str, str]:
    """The tables by name that other pages show as well."""
    probabilities = _calibration_tables(results)
    return {
        **{key: _probabilities(probabilities, key) for key in ("nll", "aurc")},
        **{scope: _bits(results, scope) for scope in SCOPES},
        "bytes": bytes_table(results),
        "ranks": _ranks(results),
        "active": active_section(results),
        "answers": text_section(results),
        "otherwise": otherwise_table(results),
        "otherwise_decoder": decoder_table(results),
        "servers": servers_table(results),
        "tags": tags_section(results),
    }


_TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def with_tables(text: str, tables: Mapping[str, str]) -> str:
    """A page with each table between its marks (`<!-- table: NAME -->`, `<!-- end of table -->`) written anew."""
    return _TABLE.sub(lambda mark: f"{mark[1]}\n{tables[mark[2]]}\n{mark[3]}", text)


def _probabilities(tables: dict[str, Table], key: str) -> str:
    """One score by method and task."""
    lines = []
    for title, names in PROBABILITIES.items():
        cells = []
        for rows in tables.values():
            name = next((name for name in names if name in rows), None)
            found = [run["forms"][name]["scores"].get(key) for run in rows[name]] if name else []
            known = [value for value in found if value is not None]
            cells.append(f"{statistics.fmean(known):.3f}{_other_seeds(rows, name)}" if known else "–")
        if set(cells) != {"–"}:
            lines.append([title, *cells])
    return markdown_table([key.upper(), *(TASK_TITLES[task] for task in tables)], lines)


def _other_seeds(rows: Table, name: str | None) -> str:
    """The number of seeds of a row that has others than LoRA, in parentheses; an ensemble is of LoRA's own."""
    first = next(each for each in ("tuned", "lora") if each in rows)
    if name is None or "ensemble" in name or len(rows[name]) == len(rows[first]):
        return ""
    return f" ({len(rows[name])})"


def _bits(results: Path, scope: str) -> str:
    """The best rounding, the best QAT where there is one, and B-LoRA by budget."""
    found = budget_rows(results, scope)
    kinds = ("rounded", "QAT", "B-LoRA")
    tasks = dict.fromkeys(task for task, _ in found)
    columns = [(t, kind) for t in tasks for kind in kinds if any(kind in found[key] for key in found if key[0] == t)]
    head = [SCOPES[scope], *(f"{TASK_TITLES[task]}: {kind}" for task, kind in columns)]
    lines = []
    for budget in sorted({budget for _, budget in found}, reverse=True):
        cells = [found.get((task, budget), {}).get(kind, "–") for task, kind in columns]
        lines.append([f"{budget:.1%}", *cells])
    return markdown_table(head, lines) if lines else ""


def _ranks(results: Path) -> str:
    """LoRA of three ranks, its cuts, and ranks that are learned: a table of scores and one of NLL."""
    runs = [run for run in read_runs(results / "glue") if run["method"] in {*RANKS, *LEARNED}]
    for run in cut_runs(results):  # of these very LoRAs
        runs = [other for other in runs if (other["task"], other["seed"], other["method"]) != _key(run, "lora")]
        runs.append({**run, **run["lora"], "method": "lora"})
        for entry in run["cut"]:
            if "rank" not in entry:
                kind = "data" if "data_rows" in entry else "cut"
                runs.append({**run, **entry, "method": f"{kind} {entry['mean_rank']:g}"})
    rows = dict(RANKS)
    for method, (rank, title) in LEARNED.items():
        rows[f"cut {rank:g}"] = f"LoRA of r = 8, cut to {rank:g}"
        rows[f"data {rank:g}"] = f"LoRA of r = 8, cut to {rank:g} by data"
        rows[method] = title
    compared = {run["task"] for run in runs if run["method"] not in RANKS}
    tasks = [task for task in GLUE_TASKS if task in compared]
    tables = []
    for name, cell in {"Score": _mean_score, "NLL": _mean_nll}.items():
        lines = [
            [title, *(cell([run for run in runs if (run["task"], run["method"]) == (task, row)]) for task in tasks)]
            for row, title in rows.items()
        ]
        lines = [line for line in lines if set(line[1:]) != {"–"}]
        tables.append(markdown_table([name, *(TASK_TITLES[task] for task in tasks)], lines))
    return "\n".join([*tables, _paired(runs, tasks)])


def _paired(runs: Sequence[Run], tasks: Sequence[str]) -> str:
    """What learned ranks change against LoRA of r = 8 with the same seeds, which began at the same factors."""
    lines = []
    for method, (_, title) in LEARNED.items():
        changes: dict[str, list[float]] = {"points": [], "NLL": []}
        cells: dict[str, list[str]] = {"points": [], "NLL": []}
        for task in tasks:
            of_task = [run for run in runs if run["task"] == task]
            loras = {run["seed"]: run for run in of_task if run["method"] == "lora"}
            pairs = [(run, loras[run["seed"]]) for run in of_task if run["method"] == method and run["seed"] in loras]
            points = [score(own) - score(lora) for own, lora in pairs]
            nlls = [
                100 * (own["scores"]["nll"] / lora["scores"]["nll"] - 1)
                for own, lora in pairs
                if "nll" in own["scores"]
            ]
            for name, found, form in (("points", points, "{:+.1f} ({})"), ("NLL", nlls, "{:+.1f}%")):
                changes[name] += [statistics.fmean(found)] if found else []
                cells[name].append(form.format(statistics.fmean(found), len(found)) if found else "–")
        for name, form in (("points", "{:+.1f}"), ("NLL", "{:+.1f}%")):
            if changes[name]:
                lines.append([f"{title}: {name}", *cells[name], form.format(statistics.fmean(changes[name]))])
    head = ["Minus LoRA, r = 8", *(TASK_TITLES[task] for task in tasks), "mean"]
    return markdown_table(head, lines) if lines else ""


def _key(run: Run, method: str) -> tuple[str, int, str]:
    return run["task"], run["seed"], method


def _mean_score(runs: Sequence[Run]) -> str:
    return f"{statistics.fmean(map(score, runs)):.1f} ({len(runs)})" if runs else "–"


def _mean_nll(runs: Sequence[Run]) -> str:
    found = [run["scores"]["nll"] for run in runs if "nll" in run["scores"]]
    return f"{statistics.fmean(found):.3f}" if found else "–"
