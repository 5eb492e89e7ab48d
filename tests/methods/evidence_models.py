"""A tiny model whose gates evidence has decided, trained by the library's own loop."""

from __future__ import annotations

import torch
from peft import get_peft_model
from torch import nn

from bayeslora import BayesLoop, BLoraConfig, parameter_groups
from tests.conftest import build_tiny_bert

EXAMPLES = 500


def trained(
    steps: int = 24,
    num_examples: int | None = EXAMPLES,
    batch: int = 16,
    rows: int | None = None,
    **options: object,
) -> nn.Module:
    """Return a tiny BERT whose adapter has been through `steps` of 24 steps of the library's loop.

    It trains on `batch` rows a step; `rows` is what the loop is told of that.
    """
    torch.manual_seed(0)
    settings = {
        "r": 4,
        "target_modules": ["query", "value"],
        "warmup_fraction": 0.25,
        "target_bops": 0.6,
        "init_weights": False,
    }
    settings |= options
    model = get_peft_model(build_tiny_bert(), BLoraConfig(task_type="SEQ_CLS", **settings))  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2))
    loop = BayesLoop(model, optimizer, total_steps=24, num_examples=num_examples, rows=rows)
    tokens = torch.randint(5, 30, (batch, 8))
    for _ in range(steps):
        loop.step_begin()
        model(input_ids=tokens, labels=tokens[:, 0] % 2).loss.backward()
        loop.before_optimizer_step()
        optimizer.step()
        loop.step_end()
        optimizer.zero_grad()
    return model.eval()
