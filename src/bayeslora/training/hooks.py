"""Hooks around the optimizer's step: one for an adapter's method, one for IVON's posterior."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer

from bayeslora.cost import SCOPES, bops_cost, bytes_cost, operations, rank_cost, relative_bops
from bayeslora.errors import BayesLoraError
from bayeslora.methods.allocation import CostModel
from bayeslora.methods.tuner import BayesTuner, TrainingSetup
from bayeslora.optim import IVON
from bayeslora.posterior import save_posterior
from bayeslora.posterior.draws import is_sharded, local
from bayeslora.posterior.saved import check_unmerged
from bayeslora.training.groups import ROLE
from bayeslora.vocabulary import CostScope


class LoopHook:
    """Calls that `BayesLoop` makes around the optimizer's step; a hook overrides those that it needs."""

    def begin(self, total_steps: int) -> None:
        """Prepare for a run of `total_steps` optimizer steps, and check that it can work."""

    def check_trainer(self) -> None:
        """Raise if a Trainer, which runs every batch once, cannot drive the optimizer."""

    def step_begin(self, step: int) -> None:
        """Run before the first micro-batch of an optimizer step."""

    def before_step(self, step: int, scale: float) -> None:
        """Run after the last backward pass; `scale` is the loss scale that the gradients still have."""

    def step_end(self, step: int) -> None:
        """Run after the optimizer's step."""

    def restore(self) -> None:
        """Restore the weights after a step that was interrupted or skipped."""

    def save(self, folder: Path) -> None:
        """Write to the folder of a checkpoint."""

    def statistics(self) -> dict[str, float]:
        """Return values to log with the loss."""
        return {}


class MethodHook(LoopHook):
    """Hook for an adapter's method: its noise, rates, penalty, budget and phases.

    Args:
        tuner: the tuner of `model`.
        model, optimizer, num_examples, seed, rows: as for `BayesLoop`.
    """

    def __init__(
        self,
        tuner: BayesTuner,
        model: nn.Module,
        optimizer: Optimizer,
        num_examples: int | None,
        seed: int,
        rows: int | None,
    ) -> None:
        self.tuner, self.model, self.optimizer = tuner, model, optimizer
        self.num_examples, self.seed, self.rows = num_examples, seed, rows
        self.penalties: dict[str, Tensor] = {}
        self._share: tuple[object, dict[str, float]] | None = None

    def begin(self, total_steps: int) -> None:
        check_unmerged(self.model)
        if is_sharded(self.model):
            check_sharding(self.tuner)
        has_posterior = hasattr(self.optimizer, "posterior")
        cost_of = functools.partial(cost_in, self.model)
        setup = TrainingSetup(total_steps, self.num_examples, has_posterior, cost_of, self.rows, self.model)
        self.tuner.begin(setup)
        roles = {group.get(ROLE) for group in self.optimizer.param_groups}
        trained = {self.tuner.role_of(name) for name, p in self.tuner.named_parameters() if p.requires_grad}
        if missing := (trained | set(self.tuner.learning_rates)) - roles - {"weights"}:
            raise BayesLoraError(
                f"the optimizer lacks a group for the {', '.join(sorted(missing))}, but each needs its own rate or "
                "decay: build it from bayeslora.parameter_groups(model, lr=…)"
            )

    def step_begin(self, step: int) -> None:
        self.tuner.step_begin(step, self.seed)
        for group in self.optimizer.param_groups:
            rate = self.tuner.rate_of(group.get(ROLE, "weights"), step)
            if rate is not None:
                group["lr"] = rate

    def before_step(self, step: int, scale: float) -> None:
        # From the optimizer's groups, because a walk over the model's tree would take longer than all that follows.
        trained = [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]
        self.penalties = self.tuner.add_penalty(trained, scale)
        self._even_gradients(step)
        self.tuner.observe(step, self.optimizer, scale)

    def _even_gradients(self, step: int) -> None:
        """Clear the gradients of roles whose rate is 0 in this step, and give the other such roles one of zeros.

        Adam counts a step, and remembers the gradient, where there is one. DDP gives every parameter one, if only
        zeros, so gates and ranges would learn with other bias corrections than in a single process.
        """
        for group in self.optimizer.param_groups:
            rate = self.tuner.rate_of(group.get(ROLE, "weights"), step)
            if rate is None:
                continue
            for parameter in group["params"]:
                if rate == 0:
                    parameter.grad = None
                elif parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)

    def step_end(self, step: int) -> None:
        self.tuner.allocate(step, self.optimizer)
        self.tuner.step_end(step)

    def statistics(self) -> dict[str, float]:
        """Return penalty terms, the method's values (widths, ranks, …), and the share of LoRA's bit operations."""
        values = {f"penalty_{name}": float(self.penalties.get(name, 0.0)) for name in self.tuner.penalty_names}
        return {**values, **self.tuner.statistics(), "relative_bops": self._attention_bops()}

    def _attention_bops(self) -> float:
        """Return the share of LoRA's bit operations, computed again only if a rank or width has changed."""
        layers = self.tuner.describe()
        key = [(layer.rank, *layer.bits.values()) for layer in layers]
        if self._share is None or self._share[0] != key:
            self._share = (key, relative_bops(self.model, layers=layers))
        return self._share[1]["attention"]


class IvonHook(LoopHook):
    """Hook for IVON: the weights are a draw from the start of an optimizer step to its end, otherwise the mean."""

    def __init__(self, optimizer: IVON, model: nn.Module, tuner: BayesTuner | None) -> None:
        self.optimizer, self.model, self.tuner = optimizer, model, tuner

    def begin(self, total_steps: int) -> None:
        tuner = self.tuner
        roles = set() if tuner is None else {tuner.role_of(n) for n, p in tuner.named_parameters() if p.requires_grad}
        if roles := roles - {"weights"}:
            raise BayesLoraError(
                f"the adapter has {', '.join(sorted(roles))} with learning rates made for Adam's steps, but IVON can "
                "train weights only: use AdamW here, or an adapter such as LoRA with IVON"
            )
        needed = (tuner or BayesTuner).least_travel
        travel = total_steps * max(map(_largest_step, self.optimizer.param_groups))
        if travel < needed:
            warnings.warn(
                f"IVON can move a weight by at most {travel:.2g} in {total_steps} steps (learning rate x (hess_init + "
                f"weight_decay) x clip_radius x steps), but this adapter needs about {needed:g} to learn much: raise "
                "the learning rate or clip_radius, or train for longer",
                stacklevel=2,
            )

    def check_trainer(self) -> None:
        if self.optimizer.mc_samples != 1:
            raise BayesLoraError(
                f"mc_samples is {self.optimizer.mc_samples}, but a Trainer runs each batch once, under one draw: use "
                "mc_samples=1 with larger batches, or write the loop yourself"
            )

    def step_begin(self, step: int) -> None:
        self.optimizer.sample(step)  # `IVON.step` pairs the gradients with this noise, and ends at the mean

    def restore(self) -> None:
        self.optimizer.restore()

    def save(self, folder: Path) -> None:
        save_posterior(self.model, self.optimizer, folder)

    def statistics(self) -> dict[str, float]:
        return posterior_statistics(self.optimizer)


def posterior_statistics(optimizer: IVON) -> dict[str, float]:
    """Return the mean of the deviations, their coefficient of variation, and the median of |mean| / deviation.

    A variation near 0 means that the Hessian has hardly moved: all weights are equally uncertain.
    """
    entries = optimizer.gaussians()
    known = [(e.mean, e.deviation) for e in entries if e.mean is not None and e.deviation is not None]
    if not known:
        return {}
    means = torch.cat([local(mean).flatten().float() for mean, _ in known])
    deviations = torch.cat([local(deviation).flatten().float() for _, deviation in known])
    return {
        "posterior_std": float(deviations.mean()),
        "posterior_std_variation": float(deviations.std() / deviations.mean()),
        "signal_to_noise": float((means.abs() / deviations).median()),
    }


def _largest_step(group: dict[str, Any]) -> float:
    rate = float(group.get("initial_lr", group["lr"]))  # a schedule may begin at zero
    scale = group["hess_init"] + group["weight_decay"] if group["rescale_lr"] else 1.0
    return rate * scale * float(group["clip_radius"])


def cost_in(model: nn.Module, currency: str, scope: CostScope | None = None) -> CostModel:
    """Return the cost of `model` in bit operations (`"bops"`), bytes or ranks.

    Without a scope, bit operations are those of attention if only its projections are adapted, otherwise those of the
    encoder.
    """
    model = next((module for module in model.modules() if isinstance(module, PeftModel)), model)
    if currency == "rank":
        return rank_cost(model)
    if currency == "bytes":
        return bytes_cost(model)
    if scope is not None:
        return bops_cost(model, scope)
    adapted = [operation for operation in operations(model) if operation.scope == "adapted"]
    return bops_cost(model, max((operation.region for operation in adapted), key=SCOPES.index, default="attention"))


def check_sharding(tuner: BayesTuner) -> None:
    """Raise BayesLoraError for a method that cannot train on parts of factors, as each rank has under FSDP."""
    if not tuner.trains_sharded:
        raise BayesLoraError(f"FSDP gives each rank a part of a factor, but {tuner.title} needs whole ones: use DDP")
