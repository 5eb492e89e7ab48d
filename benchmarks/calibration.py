"""How far probabilities can be trusted after fine-tuning, with every method of uncertainty on the same footing.

    python benchmarks/calibration.py --data-dir DATA                             # every missing run, then the tables
    python benchmarks/calibration.py --data-dir DATA --tasks mrpc --seeds 0      # some of them
    python benchmarks/calibration.py --table                                     # only the tables
    python benchmarks/calibration.py --data-dir DATA --select --methods melora-closed --set prior_std=0.1

Trained for each task and seed, on the same layers and 90% of train:

- `search`, with seed 0 alone and before all others: LoRA with dropout 0.1 at three learning rates, stopped early on
  the other 10% of train. The best rate is that of all methods. Their rate falls to zero, where the search stops on the
  way: they have as many steps as give the same sum of rates.
- `tuned`: LoRA with these settings. It also fills the rows that need no training of their own: temperature, vector
  scaling and isotonic maps (fitted on the 10%), Monte-Carlo dropout, Laplace on the head (fitted on the training
  rows), training-free Bayesianization (on 256 rows of the 10%), and ensembles of three seeds.
- `swag`, `ivon`: the same LoRA, with a posterior over its weights.
- `blob`, `melora-closed` (with its defaults) and `melora-cores` (four cores). The last two also with a temperature.

`lora` and `melora` are the rows of an earlier table: LoRA without tuning, and Me-LoRA whose variance is learned.
SST-2 and QNLI are trained on 10,000 rows of train, and QNLI is scored on 2,000 rows. The language model answers by
cloze. It is trained on 80% of the first 300 rows of train and scored on the first 120 of development, so that steps
and samples fit a CPU: `--tasks arc_easy --seeds 0` takes about an hour of one core. Isotonic maps and Laplace on the
head are not there: its classes are texts. Each file says how the model answered (`scoring`, `normalization`) and which
rows it lacks (`left_out`). Older files of these tasks, by letters, lack these names, and have tables of their own.
One JSON file a run in benchmarks/results/calibration, with the probabilities of every row; runs whose file exists are
skipped, and several processes share the work. Scores are of the test split where it has labels, otherwise of the
development split, looked at once. Intervals of the differences to tuned LoRA with a temperature are bootstrapped from
the files over rows and seeds, and kept in benchmarks/results/calibration-differences.json. With `--select` 30% of
train are held out and nothing else is scored; files go to benchmarks/results/calibration-selection.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from forms import BATCH, CLOZE_BATCH, LANGUAGE, METHODS, OPTIONS, Form, forms, search, trained
from harness import Training, run_missing, training_arithmetic
from intervals import encoded
from results_calibration import CLOZE, calibration_section, write_differences

from bayeslora.data import Task, hold_out, load_task
from bayeslora.data.known import KNOWN
from bayeslora.errors import BayesLoraError
from bayeslora.evaluation import evaluate
from bayeslora.evaluation.uncertainty import excess_area

RESULTS = Path(__file__).parent / "results" / "calibration"
TRAINING = {
    "mrpc": Training(steps=480, learning_rate=2e-3, max_length=96),
    "rte": Training(steps=400, learning_rate=1e-3, max_length=96),
    "cola": Training(steps=640, learning_rate=5e-4, max_length=64),
    "sst2": Training(steps=400, learning_rate=1e-3, max_length=64),
    "qnli": Training(steps=400, learning_rate=1e-3, max_length=128),
    **dict.fromkeys(LANGUAGE, Training(steps=60, learning_rate=1e-3, batch_size=8, max_length=256)),
}
FEW = {"sst2": (10_000, None), "qnli": (10_000, 2_000)} | dict.fromkeys(LANGUAGE, (300, 120))
"""By task, rows of train (the first; a fixed choice of the large sets) and rows to score, where not all are used."""
DEFAULT_TASKS = tuple(task for task in TRAINING if task not in LANGUAGE)


@dataclass(frozen=True)
class Job:
    """One run: what is trained on what, and where its data are."""

    method: str
    task: str
    seed: int
    data_dir: Path
    options: dict[str, Any]
    select: bool
    folder: Path
    training: Training
    rows: int | None = None
    without_tfb: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """What its file records of how it was trained, and of a language model how it answers."""
        found = {"training": vars(self.training), "options": self.options}
        cloze = KNOWN[self.task].cloze if self.task in LANGUAGE else None
        return found if cloze is None else {**found, "scoring": "cloze", "normalization": cloze.normalization}


def run(job: Job) -> dict[str, Any]:
    """Train one adapter and score it in every form; returns what its file holds."""
    is_language = job.task in LANGUAGE
    held_out = 0.3 if job.select else 0.2 if is_language else 0.1
    task = hold_out(_fewer(load_task(job.task, job.data_dir), job), held_out)
    shared = {"task": job.task, "method": job.method, "seed": job.seed, **job.settings, "metric": task.metric}
    if job.method == "search":
        found = search(task, job.training, job.seed, **job.options)
        return {**shared, "split": "selection", "labels": [], "forms": {}, "search": found}
    training, searched = tuned_settings(job)
    done = trained(job.method, task, training, job.seed, job.options)
    rows_of = done.data.encoded
    labelled = "test" if "test" in rows_of and not is_language else "validation"
    rows = rows_of["selection" if job.select else labelled]
    scored: dict[str, Any] = {}
    with training_arithmetic(done.model):
        for form in forms(job.method, done, job.without_tfb):
            scored[form.name] = _scored(form, rows, task, done.data.tokenizer, job.seed)
    return {
        **shared,
        "split": "selection" if job.select else labelled,
        "labels": list(rows["label"]),
        "forms": scored,
        "left_out": done.left_out,
        **({"search": searched} if job.method == "tuned" else {}),
        "found": {"learning_rate": training.learning_rate, "steps": training.steps},
        **done.facts,
    }


def tuned_settings(job: Job) -> tuple[Training, list[dict[str, Any]]]:
    """The training of a run, at the rate and of the length that the search has found, and what it has tried.

    Raises:
        BayesLoraError: the search is missing, and this run belongs to the table.
    """
    if job.method not in METHODS:
        return job.training, []
    first = job.folder / f"{_file_name(job.task, 'search')}-0.json"
    if not (first.exists() and first.stat().st_size):
        if job.select or job.rows is not None:
            return job.training, []
        raise BayesLoraError(f"{first} is missing, but has the settings of the other runs: run --methods search first")
    found = json.loads(first.read_text(encoding="utf-8"))["search"]
    best = min(found, key=lambda each: each["nll"])
    steps = as_many_steps(best["step"], job.training.steps)
    return replace(job.training, learning_rate=best["learning_rate"], steps=steps), found


def as_many_steps(stopped: int, planned: int) -> int:
    """The length of a whole run whose learning rates have the sum of those of a longer run that is stopped early.

    Rates fall linearly to zero: the first s of T steps have a mean of 1 - s / 2T times the peak, a whole run of 1 / 2.
    """
    return round(stopped * (2 - stopped / planned))


def _file_name(task: str, method: str) -> str:
    """The beginning of the name of a run's file; those of older runs, by letters, do not say how a model answers."""
    return f"{task}{CLOZE}-{method}" if task in LANGUAGE else f"{task}-{method}"


def _fewer(task: Task, job: Job) -> Task:
    """The task with the rows that are used of it."""
    train, scored = FEW.get(job.task, (None, None))
    if job.rows is not None:
        train = scored = job.rows
    for name, count in (("train", train), ("validation", scored), ("test", scored)):
        if count is None or name not in task.splits:
            continue
        rows = task.splits[name]
        chosen = rows if job.task in LANGUAGE or name != "train" else rows.shuffle(seed=0)
        task.splits[name] = chosen.select(range(min(count, len(rows))))
    return task


def _scored(form: Form, rows: Any, task: Task, tokenizer: Any, seed: int) -> dict[str, Any]:
    """What a file holds of one form."""
    batch_size = CLOZE_BATCH if task.name in LANGUAGE else BATCH
    scored = evaluate(form.predictor, rows, task, tokenizer, batch_size, form.samples, seed)
    p = scored.predictions
    excess = excess_area(1 - p.max(axis=1), p.argmax(axis=1) != scored.labels)
    return {
        "scores": {**scored.scores, "excess_aurc": excess},
        "passes": form.passes,
        "numbers": form.numbers,
        "fit_seconds": form.seconds,
        "log_odds": encoded(p),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--tasks", nargs="+", default=list(DEFAULT_TASKS), choices=list(TRAINING))
    parser.add_argument(
        "--methods", nargs="+", default=list(METHODS), choices=[*METHODS, "lora", "melora"], metavar="METHOD"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--select", action="store_true", help="score on the rows held out of train alone")
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=JSON", help="the configuration, with --select")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of the runs' files")
    parser.add_argument(
        "--without-tfb", action="store_true", help="leave out training-free Bayesianization: it is slow"
    )
    parser.add_argument("--steps", type=int, help="of every run, to try the benchmark out in another --results")
    parser.add_argument("--rows", type=int, help="of train and to score, to try the benchmark out")
    parser.add_argument("--table", action="store_true", help="only print the tables, as on the results page")
    given = parser.parse_args()
    if given.set and not given.select:
        parser.error("--set belongs to --select: the benchmark itself runs the defaults")
    if given.threads:
        torch.set_num_threads(given.threads)
    if (given.steps or given.rows) and given.results == RESULTS:
        parser.error("--steps and --rows make other runs than the benchmark's: give another folder as --results")
    if not given.table:
        run_missing(parser, jobs(given), run)
    if not given.select:
        write_differences(given.results)
        print(calibration_section(given.results))


def jobs(given: argparse.Namespace) -> dict[Path, Job]:
    """The runs that are asked for, by the file that each is written to; all methods of a seed before the next."""
    options = {name: json.loads(value) for name, value in (item.split("=", 1) for item in given.set)}
    changed = "".join(f"-{name}={value}" for name, value in options.items())
    folder = given.results.with_name(given.results.name + "-selection") if given.select else given.results
    found = {}
    for seed in given.seeds:
        for task in given.tasks:
            for method in given.methods:
                if method == "search" and seed:
                    continue
                training = TRAINING[task] if given.steps is None else replace(TRAINING[task], steps=given.steps)
                own = {**OPTIONS.get(method, {}), **options}
                file = folder / f"{_file_name(task, method)}{changed}-{seed}.json"
                where = given.data_dir, own, given.select, folder
                found[file] = Job(method, task, seed, *where, training, given.rows, given.without_tfb)
    return found


if __name__ == "__main__":
    main()
