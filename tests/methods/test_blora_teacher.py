"""B-LoRA finds the ranks of a teacher, and two runs find the same ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from bayeslora import BayesLoop, BLoraConfig, describe, parameter_groups

WIDTH, ROWS, BATCH = 12, 512, 64
RANKS = (0, 1, 2, 4, 8)
TARGET = sum(RANKS) / len(RANKS)


class Residual(nn.Module):
    """Five residual layers of one width; if `silent`, the output of the last is multiplied by zero."""

    def __init__(self, silent: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in RANKS)
        self.scales = [1.0] * len(RANKS)
        if silent:
            self.scales[-1] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        for layer, scale in zip(self.layers, self.scales, strict=True):
            x = x + scale * torch.tanh(layer(x))
        return x


class Task:
    """A frozen network, and targets from it with an update of known rank in every layer."""

    def __init__(self, seed: int, silent: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.ranks = [RANKS[i] for i in torch.randperm(len(RANKS), generator=generator).tolist()]
        self.base = Residual(silent).requires_grad_(False)
        teacher = Residual(silent)
        teacher.load_state_dict(self.base.state_dict())
        with torch.no_grad():
            for layer, rank in zip(teacher.layers, self.ranks, strict=True):
                left, right = (torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q for _ in range(2))
                layer.weight.add_(0.8 * left[:, :rank] @ right[:rank])
            self.x = torch.randn(ROWS, WIDTH, generator=generator)
            self.y = teacher(self.x)

    def trained(
        self, steps: int = 400, seed: int = 0, data_seed: int = 0, lr: float = 2e-2, **options: Any
    ) -> nn.Module:
        """A student after `steps` steps on batches drawn with `data_seed`, its loop seeded with `seed`."""
        torch.manual_seed(1)
        student = Residual()
        student.load_state_dict(self.base.state_dict())
        student.scales = self.base.scales
        config = BLoraConfig(
            r=10,
            lora_alpha=10,
            target_modules=[f"layers.{i}" for i in range(len(RANKS))],
            init_weights=False,
            **options,
        )
        model = get_peft_model(student, config).train()
        optimizer = torch.optim.Adam(parameter_groups(model, lr=lr))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        loop = BayesLoop(model, optimizer, total_steps=steps, seed=seed, num_examples=ROWS)
        generator = torch.Generator().manual_seed(data_seed)
        for _ in range(steps):
            rows = torch.randint(ROWS, (BATCH,), generator=generator)
            loop.step_begin()
            nn.functional.mse_loss(model(self.x[rows]), self.y[rows]).backward()
            loop.before_optimizer_step()
            optimizer.step()
            loop.step_end()
            schedule.step()
            optimizer.zero_grad()
        return model


def decisions(model: nn.Module) -> list[tuple[str, str, int]]:
    """Every width and every rank that a run has chosen."""
    layers = describe(model)
    found = [(layer.name, kind, bits) for layer in layers for kind, bits in layer.bits.items()]
    return found + [(layer.name, "rank", layer.rank) for layer in layers]


def test_the_ranks_of_a_teacher_are_found_in_nine_of_ten_runs() -> None:
    """Of a student that has learned what the teacher does: with E held at 1 that takes a larger rate."""
    wrong = []
    for seed in range(10):
        task = Task(seed)
        ranks = [layer.rank for layer in describe(task.trained(mode="ra", target_rank=TARGET, lr=5e-2))]
        if ranks != task.ranks:
            wrong.append((seed, task.ranks, ranks))
    assert len(wrong) <= 1, wrong


def test_the_ranks_of_a_teacher_are_found_beside_widths() -> None:
    task = Task(0)
    model = task.trained(target_rank=TARGET, target_bops=0.15)
    assert [layer.rank for layer in describe(model)] == task.ranks


def test_tensors_that_do_not_matter_end_at_two_bits() -> None:
    model = Task(0, silent=True).trained(mode="q", bops_price=0.05)
    *others, silent = describe(model)
    assert {bits for kind, bits in silent.bits.items() if kind != "out"} == {
        2
    }  # nothing reads `out`: it costs nothing
    assert all(layer.bits["weight"] >= 8 for layer in others)


@pytest.mark.parametrize("options", [{"mode": "ra", "target_rank": TARGET}, {"target_bops": 0.15}], ids=str)
def test_the_seed_of_the_loop_changes_nothing(options: dict[str, Any]) -> None:
    """No gate is sampled, so two runs over the same batches are one run."""
    first, second = (Task(0).trained(steps=100, seed=seed, **options) for seed in (0, 1))
    assert decisions(first) == decisions(second)
    states = [model.state_dict() for model in (first, second)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_two_orders_of_the_data_agree_on_most_widths_and_on_all_ranks() -> None:
    found = []
    for data_seed in (0, 1):
        found.append(decisions(Task(0).trained(data_seed=data_seed, target_rank=TARGET, target_bops=0.15)))
    same = [one == two for one, two in zip(*found, strict=True)]
    assert sum(same) / len(same) >= 0.7
    assert [d for d in found[0] if d[1] == "rank"] == [d for d in found[1] if d[1] == "rank"]
