"""Result files as the runners and the results page read them: one shape for old and new files, means over seeds.

Nothing here needs torch, so that the page is generated in a second.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bayeslora.errors import BayesLoraError

RESULTS = Path(__file__).parent / "results"
Run = dict[str, Any]

FIRST_TASKS = ("sst2", "cola", "mrpc", "rte", "stsb")
"""Those that every row has been run on."""
GLUE_TASKS = (*FIRST_TASKS, "qnli", "mnli", "qqp")
TASK_TITLES = {
    "sst2": "SST-2", "cola": "CoLA", "mrpc": "MRPC", "rte": "RTE", "stsb": "STS-B",
    "qnli": "QNLI", "mnli": "MNLI", "qqp": "QQP",
    "winogrande": "WinoGrande", "arc_easy": "ARC-easy", "openbookqa": "OpenBookQA",
}  # fmt: skip
GLUE_ROWS = {
    "full": "full fine-tuning",
    "lora-r1": "LoRA r = 1",
    "lora-r2": "LoRA r = 2",
    "lora": "LoRA r = 8",
    "rslora": "rsLoRA r = 8 (PEFT)",
    "eva": "EVA, mean r = 8 (PEFT)",
    "lora-nf4": "LoRA r = 8, NF4 base",
    "adalora": "AdaLoRA (PEFT, AdamW)",
    "adalora-r2": "AdaLoRA, mean r = 2 (PEFT, AdamW)",
    "bayes_adalora": "Bayesian AdaLoRA (IVON)",
    "dylora": "DyLoRA",
    "blora-q": "B-LoRA q, paper's gates",
    "blora-ra": "B-LoRA ra, paper's gates",
    "blora-q+ra": "B-LoRA q + ra, paper's gates",
    "rotated-ra": "B-LoRA ra, paper's gates after the rotation",
    "evidence-q": "B-LoRA q",
    "evidence-ra": "B-LoRA ra, mean r = 1.5",
    "evidence-ra-r1": "B-LoRA ra, mean r = 1",
    "evidence-q+ra": "B-LoRA q + ra",
    "melora": "Me-LoRA, learned variances, mean",
    "melora-closed": "Me-LoRA, mean",
    "monteclora": "MonteCLoRA (PEFT)",
    "pvera": "PVeRA (PEFT)",
}
"""Name in the files' names, and what the row is called."""
SAMPLED = "-sampled"
"""Ending of the name of a row that is scored on samples of the same run."""
IMPORTANCES = ("snr_abs", "snr", "mean_abs", "inverse_std", "magnitude", "sensitivity")
IVON_SETTINGS = {
    "paper": {"hess_init": 1.0, "betas": [0.9, 0.99999], "weight_decay": 1e-8, "clip_radius": 1e-3},
    "moving": {"hess_init": 1e-2, "betas": [0.9, 0.995], "weight_decay": 1e-8, "clip_radius": 1.25e-3, "ess": 1e7},
    "short": {"hess_init": 100.0, "betas": [0.9, 0.99999], "weight_decay": 1e-8, "clip_radius": 1.25e-7},
}
"""The paper's, with which the Hessian hardly moves, one with which it does, and the one for some hundred steps. The
learning rate is multiplied by `hess_init`, so `clip_radius` is divided by it: the largest change of a weight in a step
is 2e-3 in the first at a rate of 2, and 5e-3 in the others at their rate of 400. With so small a Hessian the posterior
of the training set's size is all noise (0.15 a weight, `glue-selection/`); `ess` makes it as narrow as the others'."""
ABLATED = {"moving": IMPORTANCES, "paper": ("snr_abs",)}
"""By setting, the importances that are compared in it. Where the Hessian does not move, the posterior's scores are
functions of the means' magnitudes, and there is nothing to compare."""
ABLATED_TASK = "sst2"
"""The task whose scores differ least between seeds."""
MMLU_ROWS = {
    "base": "no fine-tuning",
    "lora": "LoRA",
    "qlora": "QLoRA (NF4 base)",
    "blora-ra": "B-LoRA, ranks only",
    "blora-q+ra": "B-LoRA, ranks and bits",
}
SHOTS = ("0", "5")


def read_run(path: Path) -> Run:
    """What a file holds, with what older files lack under the names of the newer ones.

    Older files have `steps` and `learning_rate` where newer ones have `training`; the other values of `training` were
    the same for all of them. They were made with AdamW on the packaged encoder, and trained in bfloat16.
    """
    found = json.loads(path.read_text(encoding="utf-8"))
    if "training" not in found and "steps" in found:
        old = {"steps": found["steps"], "learning_rate": found["learning_rate"]}
        found["training"] = {**old, "batch_size": 32, "max_length": 128}
    found.setdefault("model", "minilm")
    found.setdefault("optimizer", {"name": "adamw"})
    found.setdefault("machine", {"precision": "bfloat16"})
    found["file"] = path.name
    return dict(found)


def read_runs(folder: Path) -> list[Run]:
    """All runs of a folder, by file name; none where it does not exist."""
    return [read_run(path) for path in sorted(folder.glob("*.json"))]


def check_settings(path: Path, wanted: Mapping[str, Any]) -> None:
    """Raise where `path` exists and records other settings than the `wanted` ones, which it would be mixed with.

    Older files do not say the adapter's options.

    Raises:
        BayesLoraError: naming the file, the first setting that differs, and what to do.
    """
    if not path.exists():
        return
    found = read_run(path)
    for name, value in wanted.items():
        if _differ(name, found, {name: json.loads(json.dumps(value))}):
            raise BayesLoraError(
                f"{path} records {name} {json.dumps(found.get(name))}, but the benchmark now wants "
                f"{json.dumps(value)}: move the file elsewhere or restore the settings"
            )


def _differ(name: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two records differ in a setting; not in the adapter's, where one of them does not say it.

    Of the adapter's options one that is None is not used: an older file may not know it.
    """
    if name != "adapter":
        return one.get(name) != other.get(name)
    return name in one and name in other and _used(one[name]) != _used(other[name])


def _used(adapter: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if adapter is None else {option: value for option, value in adapter.items() if value is not None}


def grouped(runs: Iterable[Run], *keys: str) -> dict[tuple[str, ...], list[Run]]:
    """Runs by the values of `keys`, each list by seed."""
    found: dict[tuple[str, ...], list[Run]] = {}
    for run in sorted(runs, key=lambda each: each.get("seed") or 0):
        found.setdefault(tuple(str(run[key]) for key in keys), []).append(run)
    return found


def check_alike(runs: Sequence[Run]) -> None:
    """Raise `BayesLoraError` where runs of one row differ in the settings of their training."""
    for run in runs[1:]:
        for name in ("training", "optimizer", "target_modules", "model", "subset", "adapter"):
            if _differ(name, run, runs[0]):
                raise BayesLoraError(
                    f"{run['file']} and {runs[0]['file']} were trained with different settings ({name}), a mean over "
                    "them says nothing: keep one kind in the folder"
                )


def with_sampled(runs: Iterable[Run]) -> list[Run]:
    """Runs, and for each that was scored with samples too a further one, named `…-sampled`, with those scores."""
    found = []
    for run in runs:
        found.append(run)
        if "sampled" in run:
            found.append({**run, "method": run["method"] + SAMPLED, "scores": run["sampled"]["scores"]})
    return found


def row_titles(runs: Iterable[Run]) -> dict[str, str]:
    """Titles of the GLUE rows in the table's order, with the rows of samples that `runs` have after their means."""
    samples = {run["method"]: run["sampled"]["samples"] for run in runs if "sampled" in run}
    titles = {}
    for name, title in GLUE_ROWS.items():
        titles[name] = title
        if name in samples:
            titles[name + SAMPLED] = f"{title.removesuffix(', mean')}, {samples[name]} samples"
    return titles


def score(run: Run) -> float:
    """The task's own metric, in per cent."""
    return 100 * float(run["scores"][run["metric"]])


def spread(values: Sequence[float | None], digits: int = 2) -> str:
    """Mean and sample standard deviation; a dash where there is no value, no deviation where there is one."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return "–"
    mean = f"{statistics.fmean(known):.{digits}f}"
    return f"{mean} ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else mean


def mean_of(runs: Sequence[Run], value: Callable[[Run], float | None]) -> float | None:
    """The mean of what `value` finds in `runs`, or None."""
    known = [found for found in map(value, runs) if found is not None]
    return statistics.fmean(known) if known else None


def mean_at(runs: Sequence[Run], *keys: str) -> float | None:
    """The mean of the number at a path of keys in `runs`; None where none of them has it."""

    def number(run: Run) -> float | None:
        found: Any = run
        for key in keys:
            found = (found or {}).get(key)
        return found

    return mean_of(runs, number)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table whose first `left` columns are aligned to the left and the others to the right."""
    lines = ["| " + " | ".join(head) + " |"]
    lines.append("|" + "|".join("---" if column < left else "---:" for column in range(len(head))) + "|")
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"
