"""What each process of the variational distributed test runs: noise by rank, predictions by seed, a short training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import bayeslora
from bayeslora import BayesLoop, parameter_groups
from tests.methods.reference import layers_of
from tests.methods.variational_models import X, sampled, tiny

STEPS = 3


def results(method: str, rank: int, ranks: int) -> dict[str, Any]:
    """Both ranks are seeded alike, as transformers does."""
    model = tiny(method, kl_warmup=0.0, kl_weight=2.0, num_examples=20)
    torch.manual_seed(0)
    fresh = model(X).detach()
    again = model(X).detach()
    torch.manual_seed(0)
    replayed = model(X).detach()
    seeded = sampled(model, X.repeat(2, 1, 1), scope="batch", seed=4, draws=2)
    return {
        "fresh": fresh,
        "again": again,
        "replayed": replayed,
        "seeded": seeded,
        "seeded_examples": sampled(model, X, scope="example", seed=4),
        "predicted": _predicted(model, rank, ranks),
        "checkpointed": [_gradients(model, reentrant) for reentrant in (None, True, False)],
        "penalty_gradients": _penalty_gradients(model, ranks),
        "trained": _trained(method, rank, ranks),
    }


def _predicted(model: nn.Module, rank: int, ranks: int) -> Tensor:
    """Every sample's probabilities for this rank's rows: each `ranks`-th, in batches of its own."""
    wrapped = DistributedDataParallel(model, find_unused_parameters=True) if ranks > 1 else model
    rows = torch.randn(10, *X.shape[1:], generator=torch.Generator().manual_seed(6))[rank::ranks]
    found = bayeslora.predict(
        wrapped,
        [{"x": batch} for batch in rows.split(3)],
        samples=4,
        seed=7,
        per_sample=True,
        logits=lambda module, batch: module(batch["x"]).mean(1),
    )
    assert found.sample_probabilities is not None
    return found.sample_probabilities


def _gradients(model: nn.Module, reentrant: bool | None) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(5)
    x = X.clone().requires_grad_()
    y = model(x) if reentrant is None else checkpoint(model, x, use_reentrant=reentrant)
    y.square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _penalty_gradients(model: nn.Module, ranks: int) -> dict[str, Tensor]:
    """Of two micro-batches on each rank: what the penalty adds to gradients that are 0."""
    model.zero_grad()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True) if ranks > 1 else model
    loop = BayesLoop(wrapped, torch.optim.SGD(parameter_groups(wrapped, lr=0.1)), total_steps=4)
    loop.step_begin()
    for _ in range(2):
        (wrapped(X).sum() * 0.0).backward()
    loop.before_optimizer_step()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _trained(method: str, rank: int, ranks: int) -> dict[str, Tensor]:
    """At the posterior mean, so that one process with the whole batch is the reference."""
    model = tiny(method, kl_weight=2.0, num_examples=20)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True) if ranks > 1 else model
    optimizer = torch.optim.SGD(parameter_groups(wrapped, lr=0.02), lr=0.02)
    loop = BayesLoop(wrapped, optimizer, total_steps=STEPS)
    batch = torch.randn(STEPS, 4, 5, X.shape[-1], generator=torch.Generator().manual_seed(3))
    share = 4 // ranks
    with bayeslora.posterior_mean(model):
        for step in range(STEPS):
            loop.step_begin()
            wrapped(batch[step, rank * share : (rank + 1) * share]).square().mean().backward()
            loop.before_optimizer_step()
            optimizer.step()
            loop.step_end()
            optimizer.zero_grad()
    assert all(not layer.is_controlled for layer in layers_of(model))
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def main(rank: int, method: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        torch.save(results(method, rank, 2), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
