"""Answers of a small language model and what orders them: SQuAD and E2E, LoRA, B-LoRA and Me-LoRA with samples.

    python benchmarks/text.py --data-dir DATA --threads 1                   # every missing run, then the table
    python benchmarks/text.py --data-dir DATA --tasks squad --methods lora melora   # some of them
    python benchmarks/text.py --table                                               # only the table

The packaged SmolLM2-135M-Instruct is trained on the rows of train that fit `max_length` tokens (none is cut), with the
same steps and layers for every method (query, key and value projections, r = 8). It answers every row of the test: 221
of SQuAD and 630 of E2E. The answer is that of the mean weights, with the most probable tokens. Five answers more are
sampled at temperature 1, each of Me-LoRA's under a draw of its own; a semantic entropy is that of these five. The
draws of Me-LoRA give the mutual information, too.

One JSON file a run in benchmarks/results/text, with the loss (1 - F1, or 1 - ROUGE-L) and the measures of uncertainty
of every row, but no texts; runs whose file exists are skipped, and several processes can share the work. `errors` are
standard errors over the test rows, from 1,000 bootstrap samples. A run takes between half an hour and an hour and
a half of a core.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from harness import Training, fine_tune, packaged_language_model, run_missing
from peft import PeftConfig
from records import RESULTS, Run
from results_text import METHODS, TASKS, text_section
from rows import QUANTIZED, RANK, adapter_options, lora, ours
from transformers import set_seed

import bayeslora
from bayeslora.data import Task, load_task
from bayeslora.data.chat import encode_generation
from bayeslora.data.text_tasks import REFERENCES
from bayeslora.evaluation.text_metrics import exact_match, text_scores
from bayeslora.evaluation.uncertainty import area_under_risk_coverage
from bayeslora.methods import has_posterior
from bayeslora.runs.answers import Answer, Sampling
from bayeslora.runs.text_scores import evaluate_answers, uncertainty_of

TRAINING = {
    "squad": Training(steps=80, learning_rate=1e-3, batch_size=4, max_length=320),
    "e2e": Training(steps=80, learning_rate=1e-3, batch_size=4, max_length=96),
}
TARGETS = ["q_proj", "k_proj", "v_proj"]
SAMPLES, TEMPERATURE = 5, 1.0
BATCH = 16
"""Prompts that are answered together."""
RESAMPLED = 1000
BUILD = {
    "lora": lora(RANK),
    "blora": ours("blora", mode="q+ra", **QUANTIZED),
    "melora": ours("melora"),
}


@dataclass(frozen=True)
class Job:
    """One run: its task, method and seed, and the data."""

    task: str
    method: str
    seed: int
    data_dir: Path
    training: Training
    test_rows: int | None

    @property
    def settings(self) -> dict[str, Any]:
        """What has to be the same in a file that is already there."""
        return {
            "model": "smollm2",
            "subset": {"test_rows": self.test_rows},
            "training": vars(self.training),
            "target_modules": TARGETS,
            "adapter": adapter_options(configuration(self.method, self.training.steps)),
            "sampling": {"samples": SAMPLES, "temperature": TEMPERATURE},
        }


def configuration(method: str, steps: int) -> PeftConfig:
    """The adapter's configuration, new for each call."""
    config = BUILD[method]({"target_modules": list(TARGETS), "task_type": "CAUSAL_LM"}, steps)
    assert config is not None
    return config


def fitting(encoded: Dataset, max_length: int) -> list[int]:
    """Numbers of the encoded rows of at most `max_length` tokens."""
    return [row for row, ids in enumerate(encoded["input_ids"]) if len(ids) <= max_length]


def some(rows: Dataset, count: int | None) -> Dataset:
    """At most `count` rows, the same in every run, in the file's order."""
    return rows if count is None else rows.select(np.sort(np.random.default_rng(0).permutation(len(rows))[:count]))


def run(job: Job) -> Run:
    """Train one adapter and score its answers; returns what a file holds."""
    set_seed(job.seed)
    task = load_task(job.task, job.data_dir)
    base, tokenizer = packaged_language_model()
    encoded = encode_generation(task.splits["train"], tokenizer, 10**6)
    data = encoded.select(fitting(encoded, job.training.max_length))
    config = configuration(job.method, job.training.steps)
    model, trained = fine_tune(base, tokenizer, data, config, job.training, job.seed)
    bayeslora.shrink(model)
    rows = some(task.splits["test"], job.test_rows)
    found = evaluate_answers(model, task, rows, tokenizer, BATCH, Sampling(SAMPLES, job.seed, None, TEMPERATURE))
    return {
        "task": job.task,
        "method": job.method,
        "seed": job.seed,
        **job.settings,
        "metric": task.metric,
        "trained_rows": len(data),
        "held_out": len(rows),
        "draws_weights": has_posterior(model),
        **scored(task, rows, found.answers),
        "finished": sum(answer.is_finished for answer in found.answers) / len(rows),
        **trained,
    }


def scored(task: Task, rows: Dataset, answers: list[Answer]) -> dict[str, Any]:
    """Scores, their standard errors over rows, and the loss and the measures of uncertainty of each row."""
    texts, references = [answer.text for answer in answers], rows[REFERENCES][:]
    scores, losses = text_scores(task.metrics, texts, references)
    measures = uncertainty_of(answers)
    values = {"risk": losses}
    if "exact_match" in scores:
        values["exact_match"] = exact_match(texts, references)
    resampled = np.random.default_rng(0).integers(len(losses), size=(RESAMPLED, len(losses)))
    errors = {name: [of_row[chosen].mean() for chosen in resampled] for name, of_row in values.items()}
    for name, of_row in measures.items():
        scores[f"aurc_{name}"] = area_under_risk_coverage(of_row, losses)
        areas = [area_under_risk_coverage(of_row[chosen], losses[chosen]) for chosen in resampled]
        errors[f"aurc_{name}"] = areas
    return {
        "scores": {**scores, "risk": float(losses.mean())},
        "errors": {name: float(np.std(found, ddof=1)) for name, found in errors.items()},
        "rows": {"loss": losses.tolist(), **{name: of_row.tolist() for name, of_row in measures.items()}},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, help="for a trial: fewer, in another --results folder")
    parser.add_argument("--test-rows", type=int, help="for a trial: rows of test that are answered")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of all results")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--table", action="store_true", help="only print the table")
    given = parser.parse_args()
    if not given.table and given.data_dir is None:
        parser.error("--data-dir is missing: the texts come from its tasks")
    if given.threads:
        torch.set_num_threads(given.threads)
    jobs = {}
    for seed in given.seeds:
        for task in given.tasks:
            training = replace(TRAINING[task], steps=given.steps) if given.steps else TRAINING[task]
            for method in given.methods:
                path = given.results / "text" / f"{task}-{method}-{seed}.json"
                jobs[path] = Job(task, method, seed, given.data_dir, training, given.test_rows)
    if not given.table:
        run_missing(parser, jobs, run)
    print(text_section(given.results))


if __name__ == "__main__":
    main()
