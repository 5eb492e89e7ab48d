"""How far probabilities can be trusted after fine-tuning: Me-LoRA and BLoB against LoRA and what is put on top of it.

    python benchmarks/calibration.py --data-dir DATA                             # every missing run, then the tables
    python benchmarks/calibration.py --data-dir DATA --tasks mrpc --seeds 0      # some of them
    python benchmarks/calibration.py --table                                     # only the tables
    python benchmarks/calibration.py --data-dir DATA --select --set prior_std=0.1    # to choose Me-LoRA's settings

Three adapters are trained for each task and seed, with the same layers, steps, learning rate and data (90% of train):
LoRA with dropout 0.1, BLoB and Me-LoRA. Rows of the table that need no training of their own are read off them: LoRA
with a temperature fitted on the other 10% of train, Monte-Carlo dropout, and the ensemble of the seeds' LoRA adapters.
The language model is trained on the first 240 rows of train and scored on the first 256 of development, so that steps
and samples fit a CPU; of its LoRA adapters only seed 0's dropout is sampled.
One JSON file a run in benchmarks/results/calibration; runs whose file exists are skipped, and several processes share
the work. Scores are of the test split where it has labels, otherwise of the development split, looked at once. With
`--select` 30% of train are held out and nothing else is scored; files go to benchmarks/results/calibration-selection.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from harness import Training, classifier, fine_tune, language_model, run_missing, training_arithmetic
from peft import LoraConfig, PeftConfig
from results_calibration import SAMPLES, calibration_section
from torch import nn
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, set_seed

import bayeslora
from bayeslora.data import hold_out, load_task
from bayeslora.errors import BayesLoraError
from bayeslora.evaluation import choice_scoring, evaluate
from bayeslora.posthoc import MCDropout, TemperatureScaling
from bayeslora.prediction import Predictable

RESULTS = Path(__file__).parent / "results" / "calibration"
SELECTION = RESULTS.with_name("calibration-selection")
LANGUAGE = ("winogrande", "arc_easy")
TRAINING = {
    "mrpc": Training(steps=480, learning_rate=2e-3, max_length=96),
    "rte": Training(steps=400, learning_rate=1e-3, max_length=96),
    "cola": Training(steps=640, learning_rate=5e-4, max_length=64),
    "winogrande": Training(steps=216, learning_rate=1e-3, batch_size=8),
    "arc_easy": Training(steps=216, learning_rate=1e-3, batch_size=8, max_length=256),
}
ATTENTION = ["query", "key", "value"]
DECODER = ["q_proj", "v_proj"]
FEW_ROWS, FEW_SCORED = 240, 256
TARGETS = {"mrpc": ATTENTION, "rte": ATTENTION, "cola": [*ATTENTION, "dense"]}


def configuration(method: str, task: str, options: dict[str, Any], rows: int) -> PeftConfig:
    """The adapter's; BLoB follows its published schedule, whose cycle depends on the number of training `rows`."""
    shared: dict[str, Any] = {"r": 8, "lora_alpha": 16}
    if task in LANGUAGE:
        shared |= {"target_modules": DECODER, "task_type": "CAUSAL_LM"}
    else:
        shared |= {"target_modules": TARGETS[task], "task_type": "SEQ_CLS"}
    if method == "lora":
        return LoraConfig(lora_dropout=0.1, **shared)
    if method == "blob":
        cycle = int(100 * rows ** (math.pi / 8) / TRAINING[task].batch_size)
        shared |= {"kl_schedule": "blob", "kl_cycle": cycle}
    return bayeslora.METHODS[method](**{**shared, **options})


@dataclass(frozen=True)
class Job:
    """One run: what is trained on what, and where its data are."""

    method: str
    task: str
    seed: int
    data_dir: Path
    options: dict[str, Any]
    select: bool

    @property
    def settings(self) -> dict[str, Any]:
        """What its file records of how it was trained."""
        return {"training": vars(TRAINING[self.task]), "options": self.options}


def run(job: Job) -> dict[str, Any]:
    """Train one adapter and score it in every form; returns what its file holds."""
    method, task_name, seed, select = job.method, job.task, job.seed, job.select
    training = TRAINING[task_name]
    set_seed(seed)
    is_language = task_name in LANGUAGE
    task = load_task(task_name, job.data_dir)
    if is_language:
        for name, count in (("train", FEW_ROWS), ("validation", FEW_SCORED)):
            task.splits[name] = task.splits[name].select(range(count))
    task = hold_out(task, 0.3 if select else 0.1)
    base, tokenizer, encoded = (language_model if is_language else classifier)(task, training)
    config = configuration(method, task_name, job.options, len(encoded["train"]))
    model, trained = fine_tune(base, tokenizer, encoded["train"], config, training, seed)
    labelled = "test" if "test" in encoded and task_name != "arc_easy" else "validation"
    rows = encoded["selection" if select else labelled]
    found: dict[str, Any] = {}
    with training_arithmetic(model):
        for name, predictor, samples in forms(method, model, encoded["selection"], tokenizer):
            if name == "dropout" and is_language and seed:
                continue
            scored = evaluate(predictor, rows, task, tokenizer, 64, samples, seed)
            found[name] = {"scores": scored.scores, "probabilities": scored.predictions.round(5).tolist()}
    return {
        "task": task_name,
        "method": method,
        "seed": seed,
        **job.settings,
        "metric": task.metric,
        "split": "selection" if select else labelled,
        "labels": list(rows["label"]),
        "forms": found,
        **trained,
    }


def forms(method: str, model: nn.Module, selection: Dataset, tokenizer: Any) -> Iterable[tuple[str, Predictable, int]]:
    """Names of the table's rows that one adapter fills, what predicts there, and with how many samples."""
    if method != "lora":
        yield f"{method}-mean", model, 0
        yield method, model, SAMPLES
        return
    yield "lora", model, 0
    scoring = choice_scoring(selection, tokenizer) if "choice_mask" in selection.column_names else None
    collate = scoring.collate if scoring else DataCollatorWithPadding(tokenizer)
    loader = DataLoader(selection, 64, collate_fn=collate)  # type: ignore[arg-type]
    try:
        yield "temperature", TemperatureScaling(model).fit(loader, logits=scoring.logits if scoring else None), 0
    except BayesLoraError as error:  # a model that knows nothing of held-out rows has no best temperature
        print(f"no temperature: {error}", file=sys.stderr)
    yield "dropout", MCDropout(model), SAMPLES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--tasks", nargs="+", default=list(TRAINING), choices=list(TRAINING))
    parser.add_argument("--methods", nargs="+", default=["lora", "melora", "blob"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--select", action="store_true", help="score on the rows held out of train alone")
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=JSON", help="the configuration, with --select")
    parser.add_argument("--table", action="store_true", help="only print the tables, as on the results page")
    given = parser.parse_args()
    if given.set and not given.select:
        parser.error("--set belongs to --select: the benchmark itself runs the defaults")
    if given.threads:
        torch.set_num_threads(given.threads)
    options = {name: json.loads(value) for name, value in (item.split("=", 1) for item in given.set)}
    changed = "".join(f"-{name}={value}" for name, value in options.items())
    wanted = [(t, m, s) for s in given.seeds for t in given.tasks for m in given.methods]
    folder = SELECTION if given.select else RESULTS
    jobs = {
        folder / f"{task}-{method}{changed}-{seed}.json": Job(
            method, task, seed, given.data_dir, options, given.select
        )
        for task, method, seed in wanted
    }
    if not given.table:
        run_missing(parser, jobs, run)
    if not given.select:
        print(calibration_section(RESULTS))


if __name__ == "__main__":
    main()
