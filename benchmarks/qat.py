"""What else people do instead of B-LoRA: LoRA under quantization-aware training (QAT), with torchao's fake quantizers.

    python benchmarks/qat.py --data-dir DATA --threads 1                            # every missing run
    python benchmarks/qat.py --data-dir DATA --tasks mrpc --seeds 0 --settings W2A4/8
    python benchmarks/qat.py --data-dir DATA --select --begin 0 0.6                 # when to begin, on rows of train

One file a run, in results/qat (results/qat-selection with `--select`, which holds a fifth of the training rows out and
scores them alone). The LoRA is the table's (`glue.py`, row `lora`): the same start, rows, steps and rate. From the
share `--begin` of the steps on, query, key and value compute with the merged weight, rounded, so that what is trained
is what a rounded merge computes:

    weights     torchao's `IntxFakeQuantizer`: symmetric, a range for each output channel, from its largest entry
    inputs      asymmetric, a range for each token, found anew in each pass; outputs likewise

B-LoRA and `rounding.py` have one static range for an activation, which costs nothing to find when a model runs. Bit
operations are counted by the function that counts theirs, without the cost of finding ranges. The settings are those
roundings that B-LoRA's budgets in attention come from (`frontier.py`), W2A4/8 with outputs at 8 bits.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import concatenate_datasets
from glue import LoraJob
from harness import classifier, encoder_parser, fine_tune, parsed, run_missing
from peft.tuners.lora import Linear as LoraLinear
from records import Run
from rows import target_modules
from torch import Tensor, nn
from torchao.quantization.qat import IntxFakeQuantizeConfig, IntxFakeQuantizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

import bayeslora
from bayeslora.cost import relative_bops
from bayeslora.data import hold_out, load_task
from bayeslora.evaluation import evaluate
from bayeslora.methods import LayerDescription

SETTINGS = {"W8A8/8": (8, 8, 8), "W4A4/8": (4, 4, 8), "W2A4/8": (2, 4, 8), "W2A4/4": (2, 4, 4)}
"""Bits of weights, of inputs and of outputs."""
KINDS = ("weight", "in", "out")
BEGIN = 0.6
"""Share of the steps before numbers are rounded, as B-LoRA's warm-up; held-out rows of MRPC preferred it to 0."""
_TYPES = {2: torch.int2, 4: torch.int4, 8: torch.int8}


@dataclass(frozen=True, kw_only=True)
class Job(LoraJob):
    """One LoRA, its widths, and when rounding begins."""

    setting: str
    begin: float
    select: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "setting": self.setting, "begin": self.begin}


class RoundedMerge(nn.Module):
    """Forward pass of a linear layer with LoRA, as that of its merged weight with rounded numbers."""

    def __init__(self, layer: LoraLinear, bits: tuple[int, ...]) -> None:
        super().__init__()
        self.layer = [layer]  # not a submodule: it holds this one's function
        channels = IntxFakeQuantizeConfig(_TYPES[bits[0]], "per_channel", is_symmetric=True)
        tokens = [IntxFakeQuantizeConfig(_TYPES[width], "per_token", is_symmetric=False) for width in bits[1:]]
        self.weight, self.input, self.output = map(IntxFakeQuantizer, (channels, *tokens))
        self.is_rounding = False

    def forward(self, x: Tensor) -> Tensor:
        (layer,) = self.layer
        base = layer.get_base_layer()
        merged = base.weight + layer.get_delta_weight("default")
        if not self.is_rounding:
            return F.linear(x, merged, base.bias)
        return self.output(F.linear(self.input(x), self.weight(merged), base.bias))


class BeginRounding(TrainerCallback):
    """Puts `RoundedMerge` in place of the layers' forward passes, and lets it round from a share of the steps on."""

    def __init__(self, model: nn.Module, bits: tuple[int, ...], begin: float) -> None:
        self.begin = begin
        self.passes = []
        for layer in model.modules():
            if isinstance(layer, LoraLinear):
                rounded = RoundedMerge(layer, bits)
                object.__setattr__(layer, "forward", rounded.forward)
                self.passes.append(rounded)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step >= round(self.begin * state.max_steps):
            for each in self.passes:
                each.is_rounding = True


def run(job: Job) -> Run:
    """Train and score one run; returns what its file holds."""
    set_seed(job.seed)
    task = load_task(job.task, job.data_dir)
    if job.select:
        task = hold_out(task, 0.2)
    bits = SETTINGS[job.setting]
    base, tokenizer, encoded = classifier(task, job.training, job.model)
    model, trained = fine_tune(
        base, tokenizer, encoded["train"], job.config, job.training, job.seed,
        callback=lambda adapted: BeginRounding(adapted, bits, job.begin),
    )  # fmt: skip
    scored = ["selection"] if job.select else [split for split in ("validation", "test") if split in encoded]
    held_out = concatenate_datasets([encoded[split] for split in scored])
    found = {
        "task": job.task,
        "method": "lora-qat",
        "seed": job.seed,
        **job.settings,
        "metric": task.metric,
        "held_out": len(held_out),
        "scores": evaluate(model, held_out, task, tokenizer, 64).scores,
    }
    layers = [as_merged(layer, bits) for layer in bayeslora.describe(model)]
    whole: Any = model
    return {**found, "relative_bops": relative_bops(whole.unload(), layers=layers), **trained}


def as_merged(layer: LayerDescription, bits: tuple[int, ...]) -> LayerDescription:
    """The layer without a branch, at these widths."""
    return replace(layer, rank=0, initial_rank=0, parameters=0, bits=dict(zip(KINDS, bits, strict=True)))


def jobs(given: argparse.Namespace) -> dict[Path, Job]:
    folder = given.results / ("qat-selection" if given.select else "qat")
    targets = target_modules(given.model, False)
    found = {}
    for seed in given.seeds:
        for task in given.tasks:
            for setting in given.settings:
                for begin in given.begin:
                    name = f"{task}-{setting.replace('/', '-')}" + ("" if begin == BEGIN else f"-{begin}")
                    found[folder / f"{name}-{seed}.json"] = Job(
                        task=task,
                        seed=seed,
                        model=given.model,
                        data_dir=given.data_dir,
                        target_modules=targets,
                        steps=given.steps,
                        setting=setting,
                        begin=begin,
                        select=given.select,
                    )
    return found


def main() -> None:
    parser = encoder_parser(__doc__)
    parser.add_argument("--tasks", nargs="+", choices=("sst2", "mrpc", "qnli"), default=["sst2", "mrpc"])
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--begin", nargs="+", type=float, default=[BEGIN], help="share of the steps before rounding")
    parser.add_argument("--select", action="store_true", help="hold rows of train out, and score on them alone")
    parser.add_argument("--steps", type=int, help="instead of the table's, for a trial")
    given = parsed(parser)
    run_missing(parser, jobs(given), run)


if __name__ == "__main__":
    main()
