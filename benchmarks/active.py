"""Active learning: accuracy by number of labels, rows chosen by mutual information against random rows.

    python benchmarks/active.py --data-dir DATA                              # every missing run, then the table
    python benchmarks/active.py --data-dir DATA --tasks mrpc --seeds 0       # some of them
    python benchmarks/active.py --table                                      # only the table

Each run begins with 50 random labelled rows, the same for every way of choosing. It trains Me-LoRA on MiniLM-L6 from
the start, scores it at the mean weights, chooses rows of the pool with `bayeslora.select_rows`, adds their labels and
repeats, until 800 rows have labels. The pool is 2,000 rows of train, drawn by the seed. Steps and learning rate are
the same in every round. One JSON file a run in benchmarks/results/active; runs whose file exists are skipped, and
several processes share the work. Scores are of the test split.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from harness import Training, classifier, fine_tune, run_missing, training_arithmetic
from records import RESULTS, read_runs
from results_active import STRATEGIES, table
from transformers import set_seed

import bayeslora
from bayeslora.data import load_task
from bayeslora.evaluation import evaluate, predict_dataset
from bayeslora.posthoc.acquisition import SelectionScore

FOLDER = RESULTS / "active"
LABELS = (50, 100, 200, 400, 800)
POOL, SAMPLES = 2000, 20
TRAINING = {
    "sst2": Training(steps=200, learning_rate=1e-3, max_length=64),
    "mrpc": Training(steps=300, learning_rate=2e-3, max_length=96),
}


@dataclass(frozen=True)
class Job:
    """One run: a task, how rows are chosen, and the seed of the pool, the first rows, the order and the weights."""

    task: str
    strategy: SelectionScore
    seed: int
    data_dir: Path
    training: Training
    labels: tuple[int, ...] = LABELS
    pool: int = POOL
    samples: int = SAMPLES
    model: str = "minilm"
    config: dict[str, Any] = field(default_factory=lambda: {"r": 8, "lora_alpha": 16})

    @property
    def settings(self) -> dict[str, Any]:
        names = ("labels", "pool", "samples", "model", "config")
        return {"training": vars(self.training), **{name: getattr(self, name) for name in names}}


def run(job: Job) -> dict[str, Any]:
    """All rounds of one run; returns what its file holds."""
    task = load_task(job.task, job.data_dir)
    generator = np.random.default_rng(job.seed)
    order = generator.permutation(len(task.train_split))[: job.pool]
    labelled = list(range(job.labels[0]))  # of the pool, which is in random order
    rounds, seconds = [], 0.0
    for number, count in enumerate(job.labels):
        set_seed(job.seed)
        base, tokenizer, encoded = classifier(task, job.training, job.model)
        pool = encoded["train"].select(order)
        config = bayeslora.MeLoraConfig(target_modules=["query", "key", "value"], task_type="SEQ_CLS", **job.config)
        model, trained = fine_tune(base, tokenizer, pool.select(labelled), config, job.training, job.seed)
        seconds += trained["seconds"]
        scored = encoded["test" if "test" in encoded else "validation"]
        with training_arithmetic(model):
            scores = evaluate(model, scored, task, tokenizer, 64, 0, job.seed).scores
            rounds.append({"labels": count, "scores": scores, "chosen": sorted(int(order[row]) for row in labelled)})
            if number + 1 == len(job.labels):
                break
            rest = sorted(set(range(len(pool))) - set(labelled))
            samples = 0 if job.strategy == "random" else job.samples
            prediction = predict_dataset(model, pool.select(rest), tokenizer, 64, samples, job.seed, per_sample=True)
        wanted = job.labels[number + 1] - count
        chosen = bayeslora.select_rows(prediction, wanted, job.strategy, job.seed + number)
        labelled += [rest[row] for row in chosen]
    return {
        "task": job.task,
        "method": job.strategy,
        "seed": job.seed,
        **job.settings,
        "metric": task.metric,
        "rounds": rounds,
        "seconds": seconds,
        "machine": trained["machine"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--tasks", nargs="+", default=list(TRAINING), choices=list(TRAINING))
    parser.add_argument("--scores", nargs="+", default=list(STRATEGIES), choices=get_args(SelectionScore))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--results", type=Path, default=FOLDER)
    parser.add_argument("--table", action="store_true", help="only print the table")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    jobs = {
        given.results / f"{task}-{way}-{seed}.json": Job(task, way, seed, given.data_dir, TRAINING[task])
        for seed in given.seeds
        for task in given.tasks
        for way in given.scores
    }
    if not given.table:
        run_missing(parser, jobs, run)
    print(table(read_runs(given.results)))


if __name__ == "__main__":
    main()
