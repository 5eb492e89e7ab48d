"""The papers' GLUE table: every method on the same layers, steps, data and seeds, one JSON file a run.

    python benchmarks/glue.py --data-dir DATA                            # every missing run, then the table
    python benchmarks/glue.py --data-dir DATA --tasks cola --seeds 0 1 --methods lora blora-q+ra    # some of them
    python benchmarks/glue.py --data-dir DATA --model FOLDER             # on another encoder, in results/glue-FOLDER
    python benchmarks/glue.py --data-dir DATA --ablation --tasks sst2    # the importances of Bayesian AdaLoRA
    python benchmarks/glue.py --data-dir DATA --ablation --tasks mrpc --importances snr_abs magnitude    # two of them
    python benchmarks/glue.py --data-dir DATA --select --tasks mrpc --methods blora-q+ra --set bit_penalty=2e-4

Runs whose file exists are skipped: an interrupted benchmark goes on where it stopped, and several processes can share
the work, for a run under way is claimed. A file that records other settings than are wanted now stops the benchmark
before it starts. Each run is a process of its own, whose peak of memory is recorded. The score is the task's own
metric on all held-out rows (the development and, where it has labels, the test split), looked at once, after training.

`--ablation` trains Bayesian AdaLoRA with each of its six importances, under IVON at settings with which the Hessian
moves, and with one of them at the paper's, with which it does not; files go to results/importance.
`--select` holds a fifth of the training rows out, scores nothing else, and writes to results/glue-selection: to choose
settings on, which `--set FIELD=JSON` changes (fields of the method's configuration, of the training, or of IVON as
`ivon.FIELD`).
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets import concatenate_datasets
from harness import Training, classifier, encoder_parser, fine_tune, parsed, run_missing
from peft import PeftConfig
from records import ABLATED, ABLATED_TASK, GLUE_TASKS, IMPORTANCES, Run
from rows import ROWS, Row, adapter_options, describe, optimizer_of, target_modules, training_of
from torch import nn
from transformers import set_seed

import bayeslora
from bayeslora.cost import relative_bops
from bayeslora.data import hold_out, load_task
from bayeslora.evaluation import evaluate

TRAINING = {
    "sst2": Training(300),
    "cola": Training(960, 5e-4),
    "mrpc": Training(345),
    "rte": Training(312),
    "stsb": Training(720),
    "qnli": Training(400),
    "mnli": Training(400),
    "qqp": Training(400),
}
# With attention alone, this encoder of sentence meanings has learned next to nothing of grammar after 800 steps.
ALL_LINEAR = ("cola",)
CURVE = (1, 2, 4)
"""Ranks below the full one that DyLoRA is scored at, too."""


@dataclass(frozen=True)
class Job:
    """One run: what it is, how it is trained, where its data are, and a folder for a warm-up shared with others."""

    task: str
    method: str
    seed: int
    model: str
    data_dir: Path
    target_modules: list[str]
    select: bool = False
    setting: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    warm_up: Path | None = None

    @property
    def row(self) -> Row:
        return ROWS[self.method]

    @property
    def training(self) -> Training:
        return training_of(self.row, TRAINING[self.task], self.options, self.setting)

    @property
    def optimizer(self) -> dict[str, Any]:
        changed = {name.removeprefix("ivon."): v for name, v in self.options.items() if name.startswith("ivon.")}
        return {**optimizer_of(self.row, self.setting), **changed}

    @property
    def config(self) -> PeftConfig | None:
        """The adapter's configuration, new for each call; None for full fine-tuning."""
        trained = vars(self.training)
        own = {name: v for name, v in self.options.items() if name not in trained and not name.startswith("ivon.")}
        return self.row.build(
            {"target_modules": self.target_modules, "task_type": "SEQ_CLS", **own}, self.training.steps
        )

    @property
    def settings(self) -> dict[str, Any]:
        """What has to be the same in a file that is already there."""
        return {
            "model": self.model,
            "training": vars(self.training),
            "optimizer": self.optimizer,
            "target_modules": self.target_modules,
            "adapter": adapter_options(self.config),
        }


@dataclass(frozen=True, kw_only=True)
class LoraJob:
    """The table's LoRA on one task and seed, for what is done to it: how it is trained, and where its data are."""

    task: str
    seed: int
    model: str
    data_dir: Path
    target_modules: list[str]
    steps: int | None = None

    @property
    def training(self) -> Training:
        return training_of(ROWS["lora"], TRAINING[self.task], {} if self.steps is None else {"steps": self.steps})

    @property
    def config(self) -> Any:
        return ROWS["lora"].build({"target_modules": self.target_modules, "task_type": "SEQ_CLS"}, self.training.steps)

    @property
    def settings(self) -> dict[str, Any]:
        """What has to be the same in a file that is already there."""
        return {
            "model": self.model,
            "training": vars(self.training),
            "target_modules": self.target_modules,
            "adapter": adapter_options(self.config),
        }


def run(job: Job) -> Run:
    """Train and score one run; returns what its file holds."""
    set_seed(job.seed)
    task = load_task(job.task, job.data_dir)
    if job.select:
        task = hold_out(task, 0.2)
    row, training = job.row, job.training
    base, tokenizer, encoded = classifier(task, training, job.model, **row.loading())
    ivon = {name: value for name, value in job.optimizer.items() if name != "name"} if row.ivon else None
    model, trained = fine_tune(
        base, tokenizer, encoded["train"], job.config, training, job.seed,
        ivon=ivon, callback=row.callback, mixin=row.mixin, warm_up=job.warm_up,
    )  # fmt: skip
    scored = ["selection"] if job.select else [split for split in ("validation", "test") if split in encoded]
    held_out = concatenate_datasets([encoded[split] for split in scored])

    def scores(samples: int = 0) -> dict[str, float]:
        return evaluate(model, held_out, task, tokenizer, 64, samples, job.seed).scores

    bayeslora.shrink(model)
    found: Run = {
        "task": job.task,
        "method": job.method,
        "options": job.options,
        "seed": job.seed,
        **job.settings,
        "metric": task.metric,
        "held_out": len(held_out),
        "scores": scores(),
    }
    if row.samples:
        found["sampled"] = {"samples": row.samples, "scores": scores(row.samples)}
    if job.method == "dylora":
        found["rank_curve"] = rank_curve(model, scores)
    layers = describe(model)
    adapted = [layer.bits[kind] for layer in layers for kind in "AEB"]
    found |= {
        "relative_bops": relative_bops(model, layers=layers),
        "median_adapter_bits": statistics.median(adapted) if adapted else None,
        "mean_rank": statistics.mean(layer.rank for layer in layers) if layers else None,
        "layers": [replace(layer, gates=[]).to_dict() for layer in layers],
    }
    return {**found, **trained}


def rank_curve(model: nn.Module, scores: Any) -> dict[str, dict[str, float]]:
    """Scores of the same adapter at lower ranks."""
    found = {}
    for rank in CURVE:
        with bayeslora.at_rank(model, rank):
            found[str(rank)] = scores()
    return found


def jobs(given: argparse.Namespace) -> dict[Path, Job]:
    """The runs that are asked for, by the file that each is written to; all rows of a seed before the next."""
    what = ("importance" if given.ablation else "glue") + ("-selection" if given.select else "")
    folder = given.results / (what if given.model == "minilm" else f"{what}-{Path(given.model).name}")
    options = {key: json.loads(value) for key, value in (item.split("=", 1) for item in given.set)}
    changed = "".join(f"-{key}={value}" for key, value in options.items()).replace(" ", "")
    targets = {every: target_modules(given.model, every) for every in (False, True)}
    found = {}
    for seed in given.seeds:
        for task in given.tasks or ((ABLATED_TASK,) if given.ablation else GLUE_TASKS):
            common = (seed, given.model, given.data_dir, targets[task in ALL_LINEAR], given.select)
            if given.ablation:
                for setting, importances in ABLATED.items():
                    for importance in (name for name in importances if name in given.importances):
                        own = {**options, "importance": importance}
                        file = folder / f"{task}-{importance}-{setting}{changed}-{seed}.json"
                        found[file] = Job(task, "bayes_adalora", *common, setting, own)
            else:
                for method in given.methods:
                    file = folder / f"{task}-{method}{changed}-{seed}.json"
                    found[file] = Job(task, method, *common, None, options)
    return found


def main() -> None:
    parser = encoder_parser(__doc__)
    parser.add_argument(
        "--tasks", nargs="+", choices=GLUE_TASKS, help=f"by default all; {ABLATED_TASK} for the ablation"
    )
    parser.add_argument("--methods", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--ablation", action="store_true", help="the importances instead of the methods")
    parser.add_argument(
        "--importances", nargs="+", default=list(IMPORTANCES), choices=IMPORTANCES, help="with --ablation (all)"
    )
    parser.add_argument("--select", action="store_true", help="hold rows of train out, and score on them alone")
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=JSON", help="settings, with --select")
    given = parsed(parser)
    if given.set and not given.select:
        parser.error("--set belongs to --select: the benchmark itself runs the defaults")
    if given.importances != list(IMPORTANCES) and not given.ablation:
        parser.error("--importances belongs to --ablation: the table has one of them")
    wanted = jobs(given)
    run_missing(parser, wanted, run)
    from results_glue import glue_section

    print(glue_section(given.results))


if __name__ == "__main__":
    main()
