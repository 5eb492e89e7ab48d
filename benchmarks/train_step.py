"""Time and memory of one training step of each method against PEFT's LoRA, interleaved in one process.

    python benchmarks/train_step.py              # packaged MiniLM, 32 x 64 tokens, r = 8 on q, k, v
    python benchmarks/train_step.py --rounds 40 --output benchmarks/results/train_step.json

Each round takes one step of every variant in turn, so a drift of the machine's speed touches all alike; the
figures are medians over rounds and medians of the ratio round by round. Memory is the growth of the peak over one
step, in a process of its own for each variant. Variants:

    lora            PEFT's LoRA
    blora-learning  B-LoRA q + ra in the gates' phase at 3% of the bit operations, with quantized inputs
    blora-evidence  the same in a step that gathers evidence
    blora-frozen    the same with gates frozen
    paper-learning  the paper's gates in the middle of their phase, with what `BayesLoop` does around the step
    paper-start     the same at the phase's first step, when the gates of 16 and 32 bits are undecided
    residual        the original residual form of the quantizer in plain autograd: the baseline to beat
    melora          Me-LoRA, one core for each sequence
    blob            BLoB with flipout
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import growth_of_peak, peak_of, print_result, processor
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForSequenceClassification

import bayeslora
from bayeslora.data import packaged_model
from bayeslora.methods.blora.gated_quantizers import Assignment, Phase, Quantizers
from bayeslora.quantization import WIDTHS, grid_step

BY_EVIDENCE = ("blora-learning", "blora-evidence", "blora-frozen")
VARIANTS = ("lora", *BY_EVIDENCE, "paper-learning", "paper-start", "residual", "melora", "blob")

VARIATIONAL = ("melora", "blob")


def residual_form(x: Tensor, bound: Tensor, gates: Tensor) -> Tensor:
    """Algorithm 2 as printed: a running residual, one rounding for every width, everything kept by autograd."""

    def rounded(value: Tensor) -> Tensor:
        return value + (torch.round(value) - value).detach()

    clipped = torch.clamp(x, -bound * (1 - 1e-7), bound * (1 - 1e-7))
    step = grid_step(bound, WIDTHS[0])
    total = step * rounded(clipped / step)
    residuals, running = [], total
    for bits in WIDTHS[1:]:
        step = step / ((1 << (bits // 2)) + 1)
        residuals.append(step * rounded((clipped - running) / step))
        running = running + residuals[-1]
    inner: Tensor | float = 0.0
    for gate, residual in zip(reversed(gates.unbind()), reversed(residuals), strict=True):
        inner = gate * (residual + inner)
    return total + inner


def residual_quantized(self: Quantizers, kind: str, x: Tensor, assignment: Assignment) -> Tensor:
    if kind not in self.kinds or assignment.weights is None:
        return x
    index = self.kinds.index(kind)
    reached = assignment.weights[index].flip(0).cumsum(0).flip(0)  # gates from the mixture's weights
    gates = reached[1:] / reached[:-1].clamp_min(1e-12)
    return residual_form(x, assignment.ranges[index], gates)


def configuration(variant: str, shared: dict[str, Any]) -> PeftConfig:
    if variant == "lora":
        return LoraConfig(**shared)
    if variant in VARIATIONAL:
        return bayeslora.METHODS[variant](num_examples=10_000, **shared)
    if variant in BY_EVIDENCE:
        return bayeslora.BLoraConfig(**shared, quantize_input=True, per_channel=True, target_bops=0.03)
    return bayeslora.BLoraConfig(**shared, gates="paper")


def make_step(variant: str, batch_size: int, length: int) -> Callable[[], None]:
    """One training step of `variant`, forward to zero_grad, ready to be called again and again."""
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(packaged_model("minilm"), num_labels=2)
    shared = {"r": 8, "lora_alpha": 16, "target_modules": ["query", "key", "value"], "task_type": "SEQ_CLS"}
    model = get_peft_model(base, configuration(variant, shared)).train()
    optimizer = torch.optim.AdamW(bayeslora.parameter_groups(model, lr=1e-4), fused=True)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (batch_size, length), generator=generator)
    labels = torch.randint(0, 2, (batch_size,), generator=generator)
    mask = torch.ones_like(ids)
    loop = None if variant == "lora" else bayeslora.BayesLoop(model, optimizer, total_steps=10_000)

    def step() -> None:
        if loop is not None:
            loop.step_begin()
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        if loop is not None:
            loop.before_optimizer_step()
        optimizer.step()
        if loop is not None:
            loop.step_end()
        optimizer.zero_grad()

    if loop is not None and variant not in VARIATIONAL:
        advance(loop, variant, step)
    if loop is not None and variant == "blora-evidence":
        measured = loop.tuner.run_state().schedule.decisions[-1] - 1

        def measuring_step() -> None:
            loop.step = measured
            step()

        return measuring_step
    return with_own_quantizer(variant, step)


def advance(loop: bayeslora.BayesLoop, variant: str, step: Callable[[], None]) -> None:
    """Take the steps of a run that lead to the phase of `variant`, and leave out those between them."""
    run = loop.tuner.run_state()
    stops = [run.rotated_after - 1, run.warm_up_end - 2, run.warm_up_end - 1]  # rotated, observed, learning
    if run.schedule is not None:
        stops += run.schedule.decisions
    if variant == "blora-frozen":
        stops.append(run.frozen_from - 1)
    for loop.step in stops:
        step()
    if variant in ("paper-learning", "residual"):
        spread_gates(loop)
    expected = Phase.FROZEN if variant == "blora-frozen" else Phase.LEARN
    assert {layer.progress("default").current for layer in loop.tuner.adapted_layers()} == {expected}


def spread_gates(loop: bayeslora.BayesLoop) -> None:
    """Gates as they stand in the middle of a run: 16 and 32 bits closed, 4 and 8 undecided, more so in the adapter."""
    wide, narrow = [3.0, 2.0, -4.0, -4.0], [1.0, -1.0, -4.0, -4.0]
    with torch.no_grad():
        for layer in loop.tuner.adapted_layers():
            quantizers = layer.quantizers("default")
            rows = [wide if kind in ("weight", "out") else narrow for kind in quantizers.kinds]
            quantizers.gate_logits.copy_(torch.tensor(rows))


def with_own_quantizer(variant: str, step: Callable[[], None]) -> Callable[[], None]:
    """The residual baseline replaces the quantizer, and only while its own step runs."""
    if variant != "residual":
        return step
    ours = Quantizers.quantized

    def run() -> None:
        Quantizers.quantized = residual_quantized  # type: ignore[method-assign]
        try:
            step()
        finally:
            Quantizers.quantized = ours  # type: ignore[method-assign]

    return run


def peak_of_one_step(variant: str, batch_size: int, length: int) -> int:
    """Bytes by which the peak of this process grows over one step."""
    step = make_step(variant, batch_size, length)
    step()
    return growth_of_peak(step)


def memory(variant: str, batch_size: int, length: int) -> int:
    arguments = ["--memory-of", variant, "--batch-size", str(batch_size), "--length", str(length)]
    return peak_of([__file__, *arguments])


def measure(rounds: int, batch_size: int, length: int) -> dict[str, object]:
    steps = {variant: make_step(variant, batch_size, length) for variant in VARIANTS}
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for _ in range(rounds):
        for variant, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[variant].append(time.perf_counter() - start)
    peaks = {variant: memory(variant, batch_size, length) for variant in VARIANTS}
    ratio = {v: [a / b for a, b in zip(seconds[v], seconds["lora"], strict=True)] for v in VARIANTS}
    return {
        "batch": [batch_size, length],
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "machine": processor(),
        "variants": {
            v: {
                "seconds": round(statistics.median(seconds[v]), 4),
                "time_ratio": round(statistics.median(ratio[v]), 3),
                "peak_bytes": peaks[v],
                "peak_ratio": round(peaks[v] / peaks["lora"], 3),
            }
            for v in VARIANTS
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.memory_of:
        print(peak_of_one_step(given.memory_of, given.batch_size, given.length))
        return
    result = measure(given.rounds, given.batch_size, given.length)
    print_result(result, given.output)


if __name__ == "__main__":
    main()
