"""Time of AdaLoRA's training step outside the task's forward and backward pass: Bayesian AdaLoRA against PEFT's.

    python benchmarks/adalora_time.py              # packaged MiniLM, 32 x 64 tokens, 12 ranks on q, k, v, 8 left
    python benchmarks/adalora_time.py --rounds 8 --threads 1 --output benchmarks/results/adalora_time.json

What counts as outside is everything else that a user pays for in a step: drawing the weights, the orthogonality
penalty and its gradient, the optimizer, and the allocation of ranks with `zero_grad`. In each step all variants take
their turn, so a drift of the machine's speed touches all alike. A round is `deltaT` = 10 steps, in the phase where the
budget falls: exactly one of them cuts ranks. PEFT's penalty, a part of its forward pass, is computed by its own code
in a call and a backward pass of its own, so that it can be timed. Passes run under bfloat16 autocast, as in a Trainer
with `bf16`; a Trainer's logging is in nobody's time.

Seconds a step are the median of the steps without a cut, nine tenths, and of those with one, a tenth; `outside_ratio`
and `step_ratio` are those seconds over PEFT's. `wall` is the clock's time and `cpu` the process's, which is the same
on one thread of an idle machine, and less disturbed by others on a shared one. Variants:

    peft           PEFT's AdaLoRA with torch's AdamW (foreach)
    ivon           Bayesian AdaLoRA, importance `snr_abs`, with IVON
    sensitivity    Bayesian AdaLoRA, importance `sensitivity`, with torch's AdamW (foreach)

`optimizer_step` is the optimizer alone (IVON's draw and update, AdamW's update) on the parameters of the `ivon` model,
with random gradients, without a model's passes between the steps.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import peft
import torch
import transformers
from harness import ATTENTION, NO_DROPOUT
from measuring import print_result, processor
from peft import PeftConfig, get_peft_model
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers import AutoModelForSequenceClassification

import bayeslora
from bayeslora.data import packaged_model

BASELINE = "peft"
DELTA_T = 10
FIRST_STEPS = 2  # not measured
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
SHARED = {
    "init_r": 12,
    "target_r": 8,
    "deltaT": DELTA_T,
    "lora_alpha": 16,
    "target_modules": ["query", "key", "value"],
    "task_type": "SEQ_CLS",
}
PASSES = "forward and backward"
Batch = dict[str, Tensor]
Part = Callable[[], object]
Variant = dict[str, Part]
"""The parts of a training step by name, in their order; all but `PASSES` are outside."""


def adapted(config: PeftConfig) -> nn.Module:
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(
        packaged_model("minilm"), num_labels=2, **NO_DROPOUT, **ATTENTION
    )
    return get_peft_model(base, config).train()


def peft_variant(batch: Batch, total_steps: int) -> Variant:
    """PEFT's AdaLoRA, driven as its documentation says."""
    model = adapted(peft.AdaLoraConfig(**SHARED, total_step=total_steps, tinit=0, tfinal=0))
    tuner = model.base_model
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, foreach=True)
    step = 0

    def passes() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = tuner.model(**batch).loss
        loss.backward()

    def penalty() -> None:
        tuner.model.forward = lambda: SimpleNamespace(loss=torch.zeros(()))
        try:
            with torch.autocast("cpu", torch.bfloat16):
                loss = tuner().loss  # adds the penalty to the loss of the model inside, which is 0 here
            loss.backward()
        finally:
            del tuner.model.forward

    def allocate() -> None:
        nonlocal step
        step += 1
        tuner.update_and_allocate(step)
        optimizer.zero_grad()

    return {PASSES: passes, "penalty": penalty, "optimizer": optimizer.step, "allocation": allocate}


def our_variant(batch: Batch, total_steps: int, importance: str) -> Variant:
    """Bayesian AdaLoRA, driven by `BayesLoop`."""
    model = adapted(bayeslora.AdaLoraConfig(**SHARED, importance=importance, tinit=0, tfinal=0))
    optimizer = our_optimizer(model, importance)
    loop = bayeslora.BayesLoop(model, optimizer, total_steps=total_steps)

    def passes() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()

    def allocate() -> None:
        loop.step_end()
        optimizer.zero_grad()

    return {
        "sampling": loop.step_begin,
        PASSES: passes,
        "penalty": loop.before_optimizer_step,
        "optimizer": optimizer.step,
        "allocation": allocate,
    }


def our_optimizer(model: nn.Module, importance: str) -> Optimizer:
    if importance == "sensitivity":
        return AdamW(bayeslora.parameter_groups(model, lr=1e-3), foreach=True)
    groups = bayeslora.parameter_groups(model, lr=0.1)
    return bayeslora.IVON(groups, lr=0.1, ess=3668, clip_radius=1e-3)


def timed(part: Part) -> dict[str, float]:
    """Seconds of one call, by clock."""
    before = {name: clock() for name, clock in CLOCKS.items()}
    part()
    return {name: clock() - before[name] for name, clock in CLOCKS.items()}


def compare_steps(rounds: int, batch: Batch) -> dict[str, dict[str, object]]:
    total = 10 * (rounds + 1) * DELTA_T  # the budget falls slowly throughout
    variants = {
        "peft": peft_variant(batch, total),
        "ivon": our_variant(batch, total, "snr_abs"),
        "sensitivity": our_variant(batch, total, "sensitivity"),
    }
    taken: dict[str, list[dict[str, dict[str, float]]]] = {name: [] for name in variants}
    for _ in range(FIRST_STEPS + rounds * DELTA_T):
        for name, variant in variants.items():
            taken[name].append({part: timed(run) for part, run in variant.items()})
    found: dict[str, dict[str, object]] = {}
    for clock in CLOCKS:
        parts = {
            name: {part: a_step([step[part][clock] for step in taken[name]]) for part in variant}
            for name, variant in variants.items()
        }
        whole = {name: a_step([sum(part[clock] for part in step.values()) for step in taken[name]]) for name in taken}
        outside = {name: sum(part for label, part in parts[name].items() if label != PASSES) for name in parts}
        found[clock] = {
            name: {
                "outside_seconds": round(outside[name], 6),
                "outside_ratio": round(outside[name] / outside[BASELINE], 3),
                "parts": {part: round(seconds, 6) for part, seconds in parts[name].items()},
                "step_seconds": round(whole[name], 4),
                "step_ratio": round(whole[name] / whole[BASELINE], 3),
            }
            for name in variants
        }
    return found


def a_step(seconds: list[float]) -> float:
    """Of one step, from those of steps 1, 2, …: a step in `DELTA_T` cuts ranks."""
    measured = list(enumerate(seconds, start=1))[FIRST_STEPS:]
    ordinary = statistics.median(value for step, value in measured if step % DELTA_T)
    cutting = statistics.median(value for step, value in measured if step % DELTA_T == 0)
    return ordinary + (cutting - ordinary) / DELTA_T


def compare_optimizers(repeats: int) -> dict[str, dict[str, dict[str, float]]]:
    model = adapted(bayeslora.AdaLoraConfig(**SHARED))
    generator = torch.Generator().manual_seed(0)
    shapes = [p.shape for p in model.parameters() if p.requires_grad]
    values = [torch.randn(shape, generator=generator) * 0.02 for shape in shapes]

    def parameters() -> list[nn.Parameter]:
        made = [nn.Parameter(value.clone()) for value in values]
        for parameter in made:
            parameter.grad = torch.randn(parameter.shape, generator=generator) * 1e-3
        return made

    ivon = bayeslora.IVON(parameters(), lr=0.1, ess=3668, clip_radius=1e-3)

    def draw_and_update() -> None:
        ivon.sample()
        ivon.step()

    steps: dict[str, Part] = {
        "ivon": draw_and_update,
        "adamw-foreach": AdamW(parameters(), lr=1e-3, foreach=True).step,
        "adamw-fused": AdamW(parameters(), lr=1e-3, fused=True).step,
        "adamw-loop": AdamW(parameters(), lr=1e-3, foreach=False).step,
    }
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    for number in range(repeats + 10):
        for name, step in steps.items():
            found = timed(step)
            if number >= 10:
                taken[name].append(found)
    medians = {
        clock: {name: statistics.median(one[clock] for one in found) for name, found in taken.items()}
        for clock in CLOCKS
    }
    return {
        clock: {
            name: {"seconds": round(value, 6), "ratio": round(value / seconds["adamw-foreach"], 3)}
            for name, value in seconds.items()
        }
        for clock, seconds in medians.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8, help="of 10 steps each")
    parser.add_argument("--optimizer-repeats", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (given.batch_size, given.length), generator=generator)
    labels = torch.randint(0, 2, (given.batch_size,), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    result = {
        "batch": [given.batch_size, given.length],
        "deltaT": DELTA_T,
        "rounds": given.rounds,
        "threads": torch.get_num_threads(),
        "versions": {
            "torch": torch.__version__,
            "peft": peft.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "machine": processor(),
        "optimizer_step": compare_optimizers(given.optimizer_repeats),
        "variants": compare_steps(given.rounds, batch),
    }
    print_result(result, given.output)


if __name__ == "__main__":
    main()
