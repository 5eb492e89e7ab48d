"""B-LoRA against LoRA on GLUE tasks: the same layers, steps, data, seeds and learning rate, one JSON file a run.

    python benchmarks/glue.py --data-dir DATA                            # every missing run, then the table
    python benchmarks/glue.py --data-dir DATA --tasks cola --seeds 0 1   # some of them
    python benchmarks/glue.py --table                                    # only the table, from the files there are
    python benchmarks/glue.py --data-dir DATA --select --tasks mrpc --set bit_penalty=2e-4   # to choose settings

Runs whose file exists in benchmarks/results/glue are skipped: an interrupted benchmark goes on where it stopped,
and several processes can share the work: a run under way is claimed by a lock file. The score is the task's
own metric on all held-out rows (the development and, where it has labels, the test split), looked at once, after
training. With `--select` a fifth of the training rows is held out, nothing else is scored, and the files go to
benchmarks/results/glue-selection: what the defaults were chosen on.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from datasets import concatenate_datasets
from harness import Training, classifier, fine_tune, once
from peft import LoraConfig, PeftConfig
from transformers import set_seed

import bayeslora
from bayeslora.cost import relative_bops
from bayeslora.evaluation import evaluate, hold_out, load_task

RESULTS = Path(__file__).parent / "results" / "glue"
SELECTION = RESULTS.with_name("glue-selection")
TRAINING = {"mrpc": Training(345), "cola": Training(960, 5e-4), "sst2": Training(260)}
ATTENTION = ["query", "key", "value"]
# With attention alone, this encoder of sentence meanings has learned next to nothing of grammar after 800 steps.
TARGETS = {"mrpc": ATTENTION, "cola": [*ATTENTION, "dense"], "sst2": ATTENTION}


def configuration(task: str, method: str, options: dict[str, Any]) -> PeftConfig:
    shared = {"r": 8, "lora_alpha": 16, "target_modules": TARGETS[task], "task_type": "SEQ_CLS"}
    if method == "lora":
        return LoraConfig(**shared)
    return bayeslora.BLoraConfig(mode=method.removeprefix("blora-"), **shared, **options)


def run(
    task_name: str, method: str, seed: int, data_dir: Path, options: dict[str, Any], select: bool
) -> dict[str, Any]:
    """Train and score one run with `options` in B-LoRA's configuration; returns what its file holds."""
    set_seed(seed)
    task = load_task(task_name, data_dir)
    if select:
        task = hold_out(task, 0.2)
    training = TRAINING[task_name]
    base, tokenizer, encoded = classifier(task, training)
    config = configuration(task_name, method, options)
    model, trained = fine_tune(base, tokenizer, encoded["train"], config, training, seed)
    scored = ["selection"] if select else [split for split in ("validation", "test") if split in encoded]
    held_out = concatenate_datasets([encoded[split] for split in scored])
    ranks = bayeslora.shrink(model)
    scores = evaluate(model, held_out, task, tokenizer, batch_size=64).scores
    layers = bayeslora.describe(model)
    return {
        "task": task_name,
        "method": method,
        "options": options,
        "seed": seed,
        "training": vars(training),
        "target_modules": TARGETS[task_name],
        "metric": task.metric,
        "held_out": len(held_out),
        "scores": scores,
        "relative_bops": relative_bops(model, layers=layers),
        "median_adapter_bits": statistics.median(layer.bits[kind] for layer in layers for kind in "AEB"),
        "mean_rank": statistics.mean(ranks.values()) if ranks else 8,
        "layers": [layer.to_dict() for layer in layers],
        **trained,
    }


def table() -> str:
    """Mean and sample standard deviation over seeds, for every task and method that has files."""
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for path in sorted(RESULTS.glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        runs.setdefault((found["task"], found["method"]), []).append(found)
    lines = [
        "| task | method | metric | score | seeds | steps | attention BOPs | median adapter bits | mean rank |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (task, method), found in sorted(runs.items(), key=lambda item: (item[0][0], item[0][1] != "lora", item[0][1])):
        scores = [100 * each["scores"][each["metric"]] for each in found]
        spread = statistics.stdev(scores) if len(scores) > 1 else float("nan")
        mean = {key: statistics.mean(each[key] for each in found) for key in ("median_adapter_bits", "mean_rank")}
        bops = 100 * statistics.mean(each["relative_bops"]["attention"] for each in found)
        lines.append(
            f"| {task} | {method} | {found[0]['metric']} | {statistics.mean(scores):.2f} ± {spread:.2f} "
            f"| {len(scores)} "
            f"| {TRAINING[task].steps} | {bops:.1f}% | {mean['median_adapter_bits']:.1f} | {mean['mean_rank']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--tasks", nargs="+", default=list(TRAINING), choices=list(TRAINING))
    parser.add_argument("--methods", nargs="+", default=["lora", "blora-q+ra"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--select", action="store_true", help="hold rows of train out, and score on them alone")
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=JSON", help="B-LoRA's configuration")
    parser.add_argument("--table", action="store_true", help="only write the table")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    if given.set and not given.select:
        parser.error("--set belongs to --select: the benchmark itself runs the defaults")
    options = {name: json.loads(value) for name, value in (item.split("=", 1) for item in given.set)}
    results = SELECTION if given.select else RESULTS
    wanted = [(t, m, s) for s in given.seeds for t in given.tasks for m in given.methods]
    for task, method, seed in [] if given.table else wanted:
        changed = "".join(f"-{name}={value}" for name, value in options.items()) if method != "lora" else ""
        path = results / f"{task}-{method}{changed.replace(' ', '')}-{seed}.json"
        once(path, lambda t=task, m=method, s=seed: run(t, m, s, given.data_dir, options, given.select))
    if given.select:
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "table.md").write_text(table(), encoding="utf-8")
    print(table())


if __name__ == "__main__":
    main()
