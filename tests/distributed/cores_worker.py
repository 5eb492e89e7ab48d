"""What each process of the distributed test of several cores runs: a short training, each row with its member."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bayeslora import BayesLoop, MeLoraConfig, parameter_groups
from tests.methods.reference import D_IN, RANK, Tiny, seeded

STEPS, ROWS, PARTS = 3, 12, 2


def trained(variance: str, rank: int, ranks: int) -> dict[str, Tensor]:
    """Train for `STEPS` steps on `ROWS` rows each, in micro-batches whose rows the ranks share."""
    prior: dict[str, Any] = {"prior_std": 1e-6} if variance == "closed_form" else {}  # no noise to speak of
    config = MeLoraConfig(
        r=RANK, cores=3, variance=variance, target_modules=["first", "second"], num_examples=20, init_weights=False,
        kl_weight=1e-9, **prior,
    )  # fmt: skip
    model: nn.Module = seeded(lambda: get_peft_model(Tiny(), config)).train()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True) if ranks > 1 else model
    optimizer = torch.optim.SGD(parameter_groups(wrapped, lr=0.1))
    loop = BayesLoop(wrapped, optimizer, total_steps=STEPS, seed=5)
    generator = torch.Generator().manual_seed(3)
    for _ in range(STEPS):
        rows, labels = (
            torch.randn(ROWS, 5, D_IN, generator=generator),
            torch.randint(0, 3, (ROWS,), generator=generator),
        )
        loop.step_begin()
        for x, y in zip(rows.chunk(PARTS), labels.chunk(PARTS), strict=True):
            own, answers = x.chunk(ranks)[rank], y.chunk(ranks)[rank]
            (nn.functional.cross_entropy(wrapped(own).mean(1), answers) / PARTS).backward()
        loop.before_optimizer_step()
        optimizer.step()
        loop.step_end()
        optimizer.zero_grad()
    return {name: value.detach().clone() for name, value in model.state_dict().items() if "melora_" in name}


def main(rank: int, variance: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        torch.save(trained(variance, rank, 2), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
