"""How far a LoRA moves from its own predictions when it is cut to a lower mean rank, by how the components are chosen.

    python benchmarks/components.py --data-dir DATA --adapters FOLDER --tasks mrpc --seeds 0

FOLDER is that of `rounding.py`, which trains the adapters. The components are those of the singular value
decomposition of each layer's update. Nothing trains on. 512 training rows give the evidence, 512 others the
divergence, in nats:

    values      the largest singular values over all layers stay
    single      those with the largest second-order rise of the loss
    together    those that close at the least rise as a set (`bayeslora.methods.blora.components`)
    taken over  the same, and their factors make up for the others

One file a task and seed in results/components. No held-out row is looked at.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from glue import TRAINING
from harness import classifier, parsed, run_missing
from peft import PeftModel
from records import RESULTS, Run
from rounding import Job
from rows import target_modules
from torch import Tensor

from bayeslora.data import load_task
from bayeslora.data.encode import collated
from bayeslora.methods.blora.components import close_together, taken_over

MEAN_RANKS = (2, 1.5, 1)
ROWS = 512


class Components:
    """The components of a LoRA, each with a factor that is 1 at first; `values` are their singular values."""

    def __init__(self, model: Any) -> None:
        self.model, self.factors = model, {}
        layers = {name: m for name, m in model.named_modules() if hasattr(m, "lora_A")}
        values = []
        for name, layer in layers.items():
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            u, s, vh = torch.linalg.svd(b.detach().double() @ a.detach().double(), full_matrices=False)
            rank = len(a)
            a.data, b.data = vh[:rank].float(), (u[:, :rank] * s[:rank]).float()
            values.append(s[:rank] * layer.scaling["default"])
            layer.lora_A["default"].register_forward_hook(lambda _, __, out, name=name: out * self.factors[name])
        self.names, self.rank, self.values = list(layers), rank, torch.cat(values)

    def logits(self, batches: list[dict[str, Tensor]], factors: Tensor) -> Tensor:
        """Logits (rows, classes) with these factors (K,) of the components."""
        parts = factors.float().split(self.rank)
        self.factors = dict(zip(self.names, parts, strict=True))
        with torch.no_grad():
            return torch.cat([self.model(**batch).logits for batch in batches])

    def gradients(self, batches: list[dict[str, Tensor]]) -> Tensor:
        """Derivatives (rows, K) of the log-likelihoods of labels that the model draws."""
        found = []
        for batch in batches:
            rows = len(batch["input_ids"])
            self.factors = {name: torch.ones(rows, 1, self.rank, requires_grad=True) for name in self.names}
            logits = self.model(**batch).logits
            drawn = torch.distributions.Categorical(logits=logits.detach()).sample()
            loss = torch.nn.functional.cross_entropy(logits, drawn, reduction="sum")
            parts = torch.autograd.grad(loss, list(self.factors.values()))
            found.append(torch.cat([part.flatten(1) for part in parts], dim=1))
        return torch.cat(found).double()


def run(job: Job) -> Run:
    """Measure one adapter; returns what the file holds."""
    torch.manual_seed(job.seed)
    base, tokenizer, encoded = classifier(load_task(job.task, job.data_dir), job.training, job.model)
    components = Components(PeftModel.from_pretrained(base, job.adapter).eval())
    order = np.random.default_rng(5).permutation(len(encoded["train"]))
    halves = np.split(order[: 2 * ROWS], 2)
    fitted, scored = (list(collated(encoded["train"], rows, tokenizer, 32, None)) for rows in halves)
    gradients = components.gradients(fitted)
    columns, ones = gradients / len(gradients) ** 0.5, torch.ones(gradients.shape[1], dtype=torch.bool)
    before = torch.log_softmax(components.logits(scored, ones).double(), -1)

    def divergence(factors: Tensor) -> float:
        after = torch.log_softmax(components.logits(scored, factors).double(), -1)
        return float((before.exp() * (before - after)).sum(1).mean())

    found: Run = {"task": job.task, "seed": job.seed, "model": job.model, "rows": ROWS, "mean_ranks": {}}
    for mean_rank in MEAN_RANKS:
        count = round(mean_rank * len(components.names))
        together, _ = close_together(columns, limit=count)
        found["mean_ranks"][str(mean_rank)] = {
            "values": divergence(largest(components.values, count)),
            "single": divergence(largest(columns.square().sum(0), count)),
            "together": divergence(together),
            "taken over": divergence(taken_over(columns, ones, together) * together),
        }
    return found


def largest(values: Tensor, count: int) -> Tensor:
    mask = torch.zeros(len(values), dtype=torch.bool)
    mask[values.topk(count).indices] = True
    return mask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--adapters", type=Path, required=True, help="folder of the trained adapters")
    parser.add_argument("--tasks", nargs="+", choices=list(TRAINING), default=["mrpc"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of all results")
    given = parsed(parser)
    jobs = {}
    for task in given.tasks:
        for seed in given.seeds:
            adapter = given.adapters / f"{task}-lora-{seed}"
            jobs[given.results / "components" / f"{task}-{seed}.json"] = Job(
                task=task,
                seed=seed,
                model="minilm",
                data_dir=given.data_dir,
                target_modules=target_modules("minilm", all_linear=False),
                adapter=adapter,
            )
    run_missing(parser, jobs, run)


if __name__ == "__main__":
    main()
