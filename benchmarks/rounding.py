"""What people do instead of B-LoRA: a trained LoRA, merged and rounded, or cut to lower ranks, without training on.

    python benchmarks/rounding.py --data-dir DATA --adapters FOLDER --threads 1       # every missing file
    python benchmarks/rounding.py --data-dir DATA --adapters FOLDER --tasks sst2 mrpc --seeds 0
    python benchmarks/rounding.py --data-dir DATA --adapters FOLDER --only-cuts      # no roundings, in results/cut
    python benchmarks/rounding.py --data-dir DATA --adapters FOLDER --model MPNET --tasks rte --seeds 0 \\
        --scopes attention --settings W4A8 W3A4 W2A4 --without-cuts                  # another encoder, some roundings
    python benchmarks/rounding.py --data-dir DATA --adapters FOLDER --steps 3 --results DIR     # does it run?

One file a task and seed, in results/rounding. The LoRA is the table's (`glue.py`, row `lora`): the adapter in
FOLDER/TASK-lora-SEED is read where it exists, and otherwise trained and saved there. That folder may also be a run of
`bayeslora train --method lora`.

Each file holds the scores, the shares of bit operations (`bayeslora.cost.relative_bops`) and the bytes of

    lora        the LoRA at 32 bits
    rounded     W8A8, W4A8, W4A4, W3A4, W2A8, W2A4 on query, key and value and on all linear layers of the blocks; the
                outputs of query, key and value have 8 bits, and in a second variant those of the inputs; codes of
                weights are the nearest, or below 8 bits GPTQ's
    cut         its SVD at mean ranks 1, 1.5, 2 and 4 over all layers, and at ranks 1 and 2 in each; at mean ranks 1
                and 1.5 also its components that matter most to the predictions of 1,024 training rows

Ranges are set on 128 training rows. Bytes are those of the model's parameters: codes at their width, ranges, and four
for each other number.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from glue import ALL_LINEAR, LoraJob
from harness import classifier, encoder_parser, fine_tune, parsed, run_missing
from peft import PeftModel
from records import GLUE_TASKS, Run
from rows import target_modules
from torch import Tensor, nn
from transformers import PreTrainedModel, set_seed

import bayeslora
from bayeslora.cost import relative_bops
from bayeslora.data import load_task
from bayeslora.data.encode import collated
from bayeslora.evaluation import evaluate
from bayeslora.methods import LayerDescription

WIDTHS = ((8, 8), (4, 8), (4, 4), (3, 4), (2, 8), (2, 4))
"""Bits of weights and of inputs."""
NAMED = {f"W{weight}A{inputs}": (weight, inputs) for weight, inputs in WIDTHS}
OUTPUT_BITS = 8
GPTQ_BITS = 4
"""Widest weights whose codes GPTQ chooses, too: at 8 bits the nearest are as good."""
SCOPES = ("attention", "encoder")
MEAN_RANKS = (1, 1.5, 2, 4)
RANKS = (1, 2)
CALIBRATION_ROWS = 128
CUT_ROWS = 1024
"""Training rows that components are chosen on, where data choose them."""
SETTINGS_FILE = "training.json"


@dataclass(frozen=True, kw_only=True)
class Job(LoraJob):
    """One LoRA, where its adapter is, and what is done to it."""

    adapter: Path
    only_cuts: bool = False
    without_cuts: bool = False
    scopes: tuple[str, ...] = SCOPES
    widths: tuple[tuple[int, int], ...] = WIDTHS

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "calibration_rows": CALIBRATION_ROWS}


def run(job: Job) -> Run:
    """Train or load the LoRA, and score it, its roundings and its cuts; returns what the file holds."""
    set_seed(job.seed)
    task = load_task(job.task, job.data_dir)
    base, tokenizer, encoded = classifier(task, job.training, job.model)
    lora = trained(job, base, tokenizer, encoded["train"])
    held_out = concatenate_datasets([encoded[split] for split in ("validation", "test") if split in encoded])

    def scores(model: nn.Module) -> dict[str, float]:
        return evaluate(model, held_out, task, tokenizer, 64).scores

    found: Run = {
        "task": job.task,
        "method": "lora",
        "seed": job.seed,
        **job.settings,
        "metric": task.metric,
        "held_out": len(held_out),
        "lora": adapted(lora, bayeslora.describe(lora), scores),
        "cut": [],
    }
    if not job.without_cuts:
        found["cut"] = list(cuts(lora, calibration(encoded["train"], tokenizer, job.seed, CUT_ROWS), scores))
    if not job.only_cuts:
        rows = calibration(encoded["train"], tokenizer, job.seed)
        seen = bayeslora.ActivationCounts(lora, rows, moments=True)
        found["rounded"] = list(rounded(lora, seen, scores, job))
    return found


def trained(job: Job, base: PreTrainedModel, tokenizer: Any, data: Dataset) -> nn.Module:
    """The saved adapter on its base; trained and saved where there is none."""
    if (job.adapter / "adapter_config.json").exists():
        check_trained_alike(job)
        return PeftModel.from_pretrained(base, job.adapter).eval()
    model, _ = fine_tune(base, tokenizer, data, job.config, job.training, job.seed)
    beside = job.adapter.with_name(job.adapter.name + ".partial")
    model.save_pretrained(str(beside), save_embedding_layers=False)
    written = json.dumps({**job.settings, "seed": job.seed}, indent=1)
    (beside / SETTINGS_FILE).write_text(written + "\n", encoding="utf-8")
    beside.rename(job.adapter)
    return model.eval()


def check_trained_alike(job: Job) -> None:
    """Raise where an adapter of this benchmark was trained with other settings; a run of the command says its own."""
    path = job.adapter / SETTINGS_FILE
    if not path.exists():
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    wanted = json.loads(json.dumps({**job.settings, "seed": job.seed}))
    for name in ("seed", "model", "training", "target_modules"):
        if found[name] != wanted[name]:
            raise bayeslora.BayesLoraError(
                f"{path} records {name} {json.dumps(found[name])}, but the benchmark now wants "
                f"{json.dumps(wanted[name])}: move the adapter elsewhere or restore the settings"
            )


def calibration(data: Dataset, tokenizer: Any, seed: int, rows: int = CALIBRATION_ROWS) -> list[dict[str, Tensor]]:
    """Batches of 32 of the rows that ranges, or components, are chosen on, drawn from the training rows."""
    order = np.random.default_rng(seed).permutation(len(data))[:rows]
    return list(collated(data, order, tokenizer, 32, None))


Scores = Callable[[nn.Module], dict[str, float]]


def adapted(model: Any, layers: list[LayerDescription], scores: Scores) -> Run:
    """Scores, operations and bytes of a model with plain LoRA."""
    modules = [model.get_base_model().get_submodule(layer.name) for layer in layers]
    once = {name: p.numel() for name, p in model.named_parameters() if ".original_module." not in name}
    return {
        "scores": scores(model),
        "relative_bops": relative_bops(model, layers=layers),
        "bytes": {
            "layers": 4 * sum(p.numel() for module in modules for p in module.parameters()),
            "model": 4 * sum(once.values()),
            "adapter": 4 * sum(layer.parameters for layer in layers),
        },
        "mean_rank": statistics.fmean(layer.rank for layer in layers),
    }


def rounded(lora: nn.Module, seen: bayeslora.ActivationCounts, scores: Scores, job: Job) -> Iterator[Run]:
    for scope in job.scopes:
        for weight_bits, input_bits in job.widths:
            for output_bits in dict.fromkeys((OUTPUT_BITS, input_bits)):
                widths = {"weight_bits": weight_bits, "input_bits": input_bits, "output_bits": output_bits}
                for rounding in ("nearest", "gptq")[: 1 + (weight_bits <= GPTQ_BITS)]:
                    found = bayeslora.round_after_training(lora, seen, **widths, scope=scope, rounding=rounding)
                    yield {
                        "setting": f"W{weight_bits}A{input_bits}",
                        "scope": scope,
                        "rounding": rounding,
                        **widths,
                        "scores": scores(found.model),
                        "relative_bops": relative_bops(found.model, layers=found.layers),
                        "bytes": {"layers": found.layer_bytes, "model": found.model_bytes},
                    }


def cuts(lora: nn.Module, rows: list[Any], scores: Scores) -> Iterator[Run]:
    before = {layer.name: layer for layer in bayeslora.describe(lora)}
    wanted: list[dict[str, Any]] = [{"mean_rank": mean} for mean in MEAN_RANKS] + [{"rank": rank} for rank in RANKS]
    wanted += [{"mean_rank": mean, "data_rows": CUT_ROWS} for mean in MEAN_RANKS[:2]]
    for asked in wanted:
        options = {name: value for name, value in asked.items() if name != "data_rows"}
        model = bayeslora.truncate_rank(lora, **options, data=rows if "data_rows" in asked else None)
        left = {layer.name: layer for layer in bayeslora.describe(model)}
        # A layer without an adapter has rank 0, and counts in the scope "adapted" as the others do.
        layers = [left.get(name) or dataclasses.replace(was, rank=0, parameters=0) for name, was in before.items()]
        yield {**asked, **adapted(model, layers, scores), "ranks": {layer.name: layer.rank for layer in layers}}


def jobs(given: argparse.Namespace) -> dict[Path, Job]:
    """The files that are asked for, with the LoRA that each is about; all tasks of a seed before the next."""
    what = "cut" if given.only_cuts else "rounding"
    folder = given.results / (what if given.model == "minilm" else f"{what}-{Path(given.model).name}")
    targets = {every: target_modules(given.model, every) for every in (False, True)}
    found = {}
    for seed in given.seeds:
        for task in given.tasks:
            name = f"{task}-lora-{seed}"
            found[folder / f"{name}.json"] = Job(
                task=task,
                seed=seed,
                model=given.model,
                data_dir=given.data_dir,
                target_modules=targets[task in ALL_LINEAR],
                steps=given.steps,
                adapter=given.adapters / name,
                only_cuts=given.only_cuts,
                without_cuts=given.without_cuts,
                scopes=tuple(given.scopes),
                widths=tuple(NAMED[name] for name in given.settings),
            )
    return found


def main() -> None:
    parser = encoder_parser(__doc__)
    parser.add_argument("--adapters", type=Path, required=True, help="folder of the trained adapters")
    parser.add_argument("--tasks", nargs="+", choices=GLUE_TASKS, default=list(GLUE_TASKS))
    parser.add_argument("--steps", type=int, help="instead of the table's, for a trial")
    parser.add_argument("--scopes", nargs="+", choices=SCOPES, default=list(SCOPES))
    parser.add_argument("--settings", nargs="+", choices=list(NAMED), default=list(NAMED))
    parser.add_argument("--only-cuts", action="store_true", help="without the roundings, which take most of the time")
    parser.add_argument(
        "--without-cuts", action="store_true", help="without the cuts, which are slow on a large model"
    )
    given = parsed(parser)
    given.adapters.mkdir(parents=True, exist_ok=True)
    run_missing(parser, jobs(given), run)


if __name__ == "__main__":
    main()
