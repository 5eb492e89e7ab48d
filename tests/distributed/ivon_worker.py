"""What each process of IVON's distributed test runs: a short training, on whole parameters or on shards of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bayeslora.optim import IVON
from bayeslora.posterior import WeightPosterior

STEPS = 4
BATCH = 16


class Tiny(nn.Module):
    """Sizes that two ranks cannot share equally, and a layer that never has a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.idle = nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def train(rank: int, ranks: int, sharded: bool = False, accumulation: int = 1) -> dict[str, Any]:
    """Weights, Hessians and the last draw after a few steps, all of them whole tensors."""
    torch.manual_seed(0)
    model = Tiny()
    inputs, targets = torch.randn(STEPS, BATCH, 5), torch.randn(STEPS, BATCH, 3)
    torch.manual_seed(1000 + rank)  # what is equal on all ranks must not be equal by luck
    wrapped: nn.Module = model
    if sharded:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        wrapped = fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))
    elif ranks > 1:
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    options: dict[str, Any] = {"lr": 0.1, "ess": 16.0, "hess_init": 0.1, "betas": (0.9, 0.9), "max_grad_norm": 0.5}
    optimizer = IVON(model.parameters(), **options)
    micro = BATCH // (ranks * accumulation)
    for step in range(STEPS):
        optimizer.sample()
        for index in range(accumulation):
            start = (index * ranks + rank) * micro
            rows = slice(start, start + micro)
            loss = nn.functional.mse_loss(wrapped(inputs[step, rows]), targets[step, rows])
            (loss / accumulation).backward()
        optimizer.step()
        optimizer.zero_grad()
    with optimizer.sampled(seed=3):
        drawn = {name: _whole(p) for name, p in model.named_parameters()}
    return {
        "weights": {name: _whole(p) for name, p in model.named_parameters()},
        "deviations": WeightPosterior.of(model, optimizer).deviations,
        "drawn": drawn,
        "steps": {name: float(optimizer.state[p]["step"]) for name, p in model.named_parameters()},
    }


def _whole(parameter: Any) -> Tensor:
    value = parameter.detach()
    whole: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return whole.clone()


def main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        found = {
            "replicated": train(rank, 2),
            "accumulated": train(rank, 2, accumulation=2),
            "sharded": train(rank, 2, sharded=True),
        }
        torch.save(found, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
