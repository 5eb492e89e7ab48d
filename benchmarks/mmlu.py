"""MMLU, zero- and five-shot, of a small language model: what ranks and bits of B-LoRA cost against LoRA and QLoRA.

    python benchmarks/mmlu.py --data-dir DATA                              # every missing run
    python benchmarks/mmlu.py --data-dir DATA --rows lora blora-ra --seeds 0
    python benchmarks/mmlu.py --data-dir DATA --per-subject 20 --results FOLDER      # another subset, elsewhere

The packaged SmolLM2-135M-Instruct answers the first ten test questions of each of MMLU's 57 subjects (570 of 14,042),
without examples and after the five of the subject's dev split. There is no training data of MMLU's own in the data
folder: ARC-easy's and OpenBookQA's training questions stand in for it. Rows: the model as it is, LoRA, LoRA on a base
in NF4 (QLoRA), and B-LoRA with ranks alone and with ranks and bits; r = 8 on the query, key and value projections, the
same steps for all. Answers are the letters' log-likelihoods.

One JSON file a run in benchmarks/results/mmlu; runs whose file exists are skipped, a file with other settings stops
the benchmark, and several processes can share the work. Five-shot prompts over `--max-length` tokens lose examples.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from harness import ATTENTION, Training, fine_tune, run_missing, training_arithmetic
from peft import PeftConfig
from records import MMLU_ROWS, RESULTS, SHOTS, Run
from rows import PAPER, RANK, adapter_options, describe, lora, nf4, ours
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed

import bayeslora
from bayeslora.cost import relative_bops
from bayeslora.data import Task, load_task, unpack_model
from bayeslora.data.few_shot import few_shot_pool
from bayeslora.evaluation import encode_prompts, evaluate

TRAINING = Training(steps=200, learning_rate=5e-4, batch_size=8, max_length=256)
TRAINED_ON = ("arc_easy", "openbookqa")
TARGETS = ["q_proj", "k_proj", "v_proj"]
MODEL = "smollm2"
PER_SUBJECT = 10
EVALUATION_LENGTH = 2048


@dataclass(frozen=True)
class Job:
    """One run: its row, its seed, and the data."""

    row: str
    seed: int
    data_dir: Path
    training: Training = TRAINING
    per_subject: int = PER_SUBJECT
    max_length: int = EVALUATION_LENGTH

    @property
    def settings(self) -> dict[str, Any]:
        """What has to be the same in a file that is already there."""
        trained = self.row != "base"
        return {
            "model": MODEL,
            "subset": {"per_subject": self.per_subject, "max_length": self.max_length},
            "training": vars(self.training) if trained else None,
            "trained_on": list(TRAINED_ON) if trained else None,
            "target_modules": TARGETS if trained else None,
            "adapter": adapter_options(configuration(self.row)) if trained else None,
        }


def first_of_each(split: Dataset, count: int) -> Dataset:
    """The first `count` rows of each subject, in the file's order."""
    seen: dict[str, int] = {}
    chosen = []
    for index, subject in enumerate(split["subject"]):
        seen[subject] = seen.get(subject, 0) + 1
        if seen[subject] <= count:
            chosen.append(index)
    return split.select(chosen)


def training_rows(data_dir: Path, tokenizer: Any, max_length: int) -> Dataset:
    """The prompts of all training questions; those of more tokens are left out, for questions are not cut."""
    parts = []
    for name in TRAINED_ON:
        task = load_task(name, data_dir)
        rows = encode_prompts(task.splits["train"], tokenizer, classes=5)
        lengths = [len(ids) for ids in rows["input_ids"]]
        parts.append(rows.select([index for index, length in enumerate(lengths) if length <= max_length]))
    return concatenate_datasets(parts)


def configuration(row: str) -> PeftConfig:
    build = lora(RANK) if row in ("lora", "qlora") else ours("blora", mode=row.removeprefix("blora-"), **PAPER)
    return build({"target_modules": TARGETS, "task_type": "CAUSAL_LM"}, TRAINING.steps)


def load(row: str) -> tuple[PreTrainedModel, Any]:
    folder = unpack_model(MODEL, Path(tempfile.gettempdir()) / "bayeslora-smollm2")
    loading = nf4() if row == "qlora" else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **ATTENTION, **loading)
    return model, AutoTokenizer.from_pretrained(folder)


def encoded_prompts(tokenizer: Any, task: Task, job: Job) -> dict[str, tuple[Dataset, float]]:
    """The prompts by number of examples, and how many of them had lost some; before anything is trained.

    Raises:
        BayesLoraError: a question that alone is longer than `job.max_length`.
    """
    rows = first_of_each(task.splits["test"], job.per_subject)
    found = {}
    for shots in SHOTS:
        with warnings.catch_warnings(record=True) as raised:
            warnings.simplefilter("always")
            prompts = encode_prompts(
                rows, tokenizer, classes=len(task.labels), max_length=job.max_length,
                few_shot=int(shots), pool=few_shot_pool(task),
            )  # fmt: skip
        lost = [str(each.message).split()[0] for each in raised if "lost few-shot examples" in str(each.message)]
        found[shots] = prompts, float(lost[0]) if lost else 0.0
    return found


def accuracies(
    model: Any, tokenizer: Any, task: Task, prompts: dict[str, tuple[Dataset, float]]
) -> dict[str, dict[str, float]]:
    """Scores by number of examples."""
    found = {}
    for shots, (data, shortened) in prompts.items():
        # The trained rows are still under the autocast of their training: the row without training is scored alike.
        with training_arithmetic(model):
            scores = evaluate(model, data, task, tokenizer, batch_size=16).scores
        found[shots] = {**scores, "shortened": shortened}
    return found


def run(job: Job) -> Run:
    """Fine-tune, unless it is the model as it is, and score; returns what a file holds."""
    set_seed(job.seed)
    task = load_task("mmlu", job.data_dir)
    model: Any
    model, tokenizer = load(job.row)
    prompts = encoded_prompts(tokenizer, task, job)
    trained: dict[str, Any] = {"parameters": bayeslora.cost.count_parameters(model)}
    if job.row != "base":
        data = training_rows(job.data_dir, tokenizer, job.training.max_length)
        model, trained = fine_tune(model, tokenizer, data, configuration(job.row), job.training, job.seed)
        bayeslora.shrink(model)
    layers = describe(model) if job.row != "base" else []
    shots = accuracies(model, tokenizer, task, prompts)
    return {
        "task": "mmlu",
        "method": job.row,
        "seed": job.seed,
        **job.settings,
        "metric": "accuracy",
        "held_out": len(first_of_each(task.splits["test"], job.per_subject)),
        "shots": shots,
        "scores": shots["0"],
        "relative_bops": relative_bops(model, layers=layers),
        "mean_rank": sum(layer.rank for layer in layers) / len(layers) if layers else None,
        "layers": [layer.to_dict() for layer in layers],
        **trained,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", default=list(MMLU_ROWS), choices=list(MMLU_ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--per-subject", type=int, default=PER_SUBJECT, help="test questions of each subject")
    parser.add_argument("--max-length", type=int, default=EVALUATION_LENGTH, help="tokens of a prompt at evaluation")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of all results")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    wanted = {}
    for seed in given.seeds:
        for row in given.rows:
            if row != "base" or seed == given.seeds[0]:  # nothing of the model as it is depends on a seed
                job = Job(row, seed, given.data_dir, per_subject=given.per_subject, max_length=given.max_length)
                name = row if row == "base" else f"{row}-{seed}"
                wanted[given.results / "mmlu" / f"mmlu-{name}.json"] = job
    run_missing(parser, wanted, run)
    from results_sections import mmlu_section

    print(mmlu_section(given.results))


if __name__ == "__main__":
    main()
