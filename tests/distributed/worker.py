"""What each process of the distributed tests runs: a hand-written loop over a tiny model, everything recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bayeslora import BayesLoop, BLoraConfig, describe, parameter_groups
from bayeslora.posterior.draws import whole

STEPS = 8
BATCH = 16
BIT_PENALTY = 0.3
RANK_PENALTY = 1.0


@dataclass(frozen=True)
class Run:
    """One way to compute the same update: `BATCH` examples over ranks and micro-batches."""

    ranks: int
    accumulation: int
    mode: str
    gates: str = "evidence"
    activations: bool = False
    """Whether evidence chooses widths of activations too; their ranges are means over ranks and micro-batches."""
    adam: bool = False
    wrapped: bool = False
    """Under DDP even on one rank."""
    sharded: str = ""
    """Under FSDP2 in place of DDP: the `model` as one, or its `layers` as well, which are gathered one at a time."""

    @property
    def distributed(self) -> bool:
        return self.wrapped or self.ranks > 1


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(6, 10)
        self.lin1 = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin1(torch.tanh(self.lin0(x)))


def _model(run: Run) -> nn.Module:
    torch.manual_seed(0)
    options: dict[str, Any] = {}
    if run.gates == "evidence":
        options = {"bops_price": 0.5} if "q" in run.mode else {}
        options |= {"target_rank": 2.5} if "ra" in run.mode else {}
        if "q" in run.mode and not run.activations:
            options["fixed_bits"] = dict.fromkeys(("A_out", "E_out", "out"), 32)
    config = BLoraConfig(
        r=4,
        lora_alpha=4,
        target_modules=["lin0", "lin1"],
        mode=run.mode,
        gates=run.gates,
        # The largest magnitude of two halves is that of the whole; the best range in least squares is not.
        calibration="absmax",
        bit_penalty=BIT_PENALTY,
        rank_penalty=RANK_PENALTY,
        warmup_fraction=0.25,
        freeze_fraction=0.25,
        init_weights=False,
        **options,
    )
    return get_peft_model(Tiny(), config).train()


def _gates(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if name.endswith((".gates", "blora_rank.default.logits"))}


def _distributed(run: Run, model: Any) -> Any:
    if not run.sharded:
        return DistributedDataParallel(model) if run.distributed else model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (run.ranks,))
    if run.sharded == "layers":
        for layer in (model.base_model.model.lin0, model.base_model.model.lin1):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@contextmanager
def _gathering(run: Run, wrapped: Any, last: bool) -> Iterator[None]:
    """Add up the gradients of micro-batches on each rank, and over the ranks with the last of them."""
    if run.sharded:
        wrapped.set_requires_gradient_sync(last)
    with nullcontext() if last or run.sharded or not run.distributed else wrapped.no_sync():
        yield


def _gradient(parameter: nn.Parameter) -> Tensor:
    return whole(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).detach().clone()


def _optimizer(run: Run, model: nn.Module) -> torch.optim.Optimizer:
    groups = parameter_groups(model, lr=0.05)
    # Adam would turn the rounding of a tiny gradient into a whole step, so it gets a large epsilon.
    return torch.optim.AdamW(groups, lr=0.05, eps=1e-2) if run.adam else torch.optim.SGD(groups, lr=0.05)


def _steps_counted(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """How many steps Adam has counted for each parameter; 0 without a state."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name: int(optimizer.state.get(p, {}).get("step", 0)) for name, p in trained.items()}


def train(run: Run, rank: int) -> dict[str, Any]:
    """Train `STEPS` optimizer steps on the share of `rank`; returns parameters, gate samples and penalty gradients."""
    model = _model(run)
    inputs = torch.randn(STEPS, BATCH, 6)
    targets = torch.randint(0, 3, (STEPS, BATCH))
    torch.manual_seed(1000 + rank)  # what is equal on all ranks must not be equal by luck
    wrapped = _distributed(run, model)
    optimizer = _optimizer(run, wrapped)
    loop = BayesLoop(wrapped, optimizer, total_steps=STEPS)
    micro = BATCH // (run.ranks * run.accumulation)
    noise, penalty_gradients, logits = [], [], []
    for step in range(STEPS):
        loop.step_begin()
        for index in range(run.accumulation):
            start = (index * run.ranks + rank) * micro
            rows = slice(start, start + micro)
            with _gathering(run, wrapped, last=index == run.accumulation - 1):
                loss = nn.functional.cross_entropy(wrapped(inputs[step, rows]), targets[step, rows])
                (loss / run.accumulation).backward()
        gates = _gates(model)
        before = {name: _gradient(p) for name, p in gates.items()}
        logits.append({name: whole(p.detach()).clone() for name, p in gates.items()})
        loop.before_optimizer_step()
        penalty_gradients.append(
            {n: _gradient(p) - (before[n] if p.grad is not None else 0.0) for n, p in gates.items()}
        )
        optimizer.step()
        loop.step_end()
        optimizer.zero_grad()
        noise.append([m.noise for m in model.modules() if getattr(m, "noise", None) is not None])
    return {
        "parameters": {name: whole(p.detach()) for name, p in model.named_parameters() if p.requires_grad},
        "noise": noise,
        "logits": logits,
        "penalty_gradients": penalty_gradients,
        "steps counted": _steps_counted(model, optimizer),
        "widths": [layer.bits for layer in describe(model)],
        "activations are fixed": run.gates == "evidence" and not run.activations,
        "ranks": [layer.rank for layer in describe(model)],
    }


def main(rank: int, run: Run, folder: str) -> None:
    _in_group(rank, run.ranks, folder, lambda: train(run, rank))


def name_of(run: Run) -> str:
    return f"{run.mode} by {run.gates} with {'Adam' if run.adam else 'SGD'}"


def main_of_all(rank: int, runs: list[Run], folder: str) -> None:
    """Runs of several modes one after the other, with the same number of ranks."""

    def results() -> dict[str, Any]:
        return {name_of(run): train(run, rank) for run in runs}

    _in_group(rank, runs[0].ranks, folder, results)


def _in_group(rank: int, ranks: int, folder: str, results: Callable[[], Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    try:
        torch.save(results(), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
