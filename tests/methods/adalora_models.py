"""A classifier with an AdaLoRA adapter, the reference on its state, and an optimizer with a posterior."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

from bayeslora import AdaLoraConfig, BayesLoop, parameter_groups
from tests.methods.reference import D_IN, Tiny, layers_of, seeded
from tests.oracles import adalora as oracle

X = torch.randn(16, D_IN, generator=torch.Generator().manual_seed(7))
Y = torch.arange(16) % 3
FIRST, TARGET = 6, 3
SCHEDULE = {"tinit": 3, "tfinal": 6, "deltaT": 2}
STEPS = 20


class Scored(Tiny):
    """`Tiny` with a loss, in the form of transformers' outputs."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        logits = super().forward(x)
        loss = None if y is None else nn.functional.cross_entropy(logits, y)
        return SimpleNamespace(logits=logits, loss=loss)


class WithPosterior(torch.optim.AdamW):
    """AdamW that claims a posterior around each weight, with deviations that are anything but equal."""

    def posterior(self, parameter: nn.Parameter) -> tuple[Tensor, Tensor]:
        position = torch.arange(parameter.numel()).view(parameter.shape)
        return parameter.detach().float(), 0.01 * (1 + (position % 7).float() + 0.1 * parameter.ndim)


def config(**options: Any) -> AdaLoraConfig:
    settings = {"init_r": FIRST, "target_r": TARGET, "lora_alpha": 6, "target_modules": ["first", "second"]}
    return AdaLoraConfig(**{**settings, **SCHEDULE, "importance": "sensitivity", **options})


def scored(kind: str = "linear", **options: Any) -> nn.Module:
    """In training mode, as a run begins."""
    return seeded(lambda: get_peft_model(Scored(kind), config(**options))).train()


@torch.no_grad()
def randomized(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for layer in layers_of(model):
        for tensor in layer.triplets("default"):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) - 0.5)
    return model


def adapter_of(layer: Any) -> oracle.Adapter:
    a, e, b = (tensor.detach().clone() for tensor in layer.triplets("default"))
    return oracle.Adapter(a, e, b, layer.scaling["default"])


def loop_of(model: nn.Module, optimizer: Any = None, steps: int = STEPS, step: int = 0, **options: Any) -> BayesLoop:
    if optimizer is None:
        optimizer = torch.optim.AdamW
    if isinstance(optimizer, type):
        optimizer = optimizer(parameter_groups(model, lr=1e-2), **options)
    return BayesLoop(model, optimizer, total_steps=steps, step=step)


def advance(loop: BayesLoop, accumulation: int = 1) -> None:
    """One optimizer step on `X` in equal micro-batches."""
    loop.step_begin()
    for x, y in zip(X.chunk(accumulation), Y.chunk(accumulation), strict=True):
        (loop.model(x, y).loss / accumulation).backward()
    loop.before_optimizer_step()
    loop.optimizer.step()
    loop.step_end()
    loop.optimizer.zero_grad()


def diagonals(model: nn.Module) -> list[list[float]]:
    return [layer.bayes_adalora_E["default"].tolist() for layer in layers_of(model)]


def masks(model: nn.Module) -> list[list[bool]]:
    return [[value != 0 for value in row] for row in diagonals(model)]
