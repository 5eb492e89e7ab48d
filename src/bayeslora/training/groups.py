"""Optimizer groups: every role of parameters with its own learning rate, and no decay where it would harm."""

from __future__ import annotations

from typing import Any

from torch import nn

from bayeslora.methods.tuner import tuner_of

ROLE = "bayeslora_role"
"""Key in an optimizer group that says what its parameters are for; saved with the optimizer's state."""


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.0, no_decay: tuple[str, ...] = ("bias", "norm")
) -> list[dict[str, Any]]:
    """Groups over all trainable parameters of `model`, for any `torch.optim.Optimizer`.

    Args:
        model: an adapted model, or any other (which gives the usual two groups).
        lr: learning rate of the weights; the other roles get a multiple of it, or theirs from the method when training
            begins.
        weight_decay: decay of the weights. Gates, ranges, vectors and parameters named in `no_decay` get none: decay
            would pull a gate's logit towards a half-open 0 and a range towards an arbitrary 1.
        no_decay: parts of names, compared in lower case, of further parameters without decay.

    Returns:
        Dictionaries with `params`, `lr`, `weight_decay` and the group's role under `ROLE`.
    """
    tuner = tuner_of(model)
    factor = tuner.rate_factor if tuner is not None else _same_rate
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        role = tuner.role_of(name) if tuner is not None else "weights"
        decays = role == "weights" and parameter.ndim > 1 and not any(part in name.lower() for part in no_decay)
        groups.setdefault((role, decays), []).append(parameter)
    return [
        {"params": parameters, "lr": lr * factor(role), "weight_decay": weight_decay if decays else 0.0, ROLE: role}
        for (role, decays), parameters in groups.items()
    ]


def _same_rate(role: str) -> float:
    return 1.0
