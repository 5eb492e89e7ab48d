"""Optimizer groups: a learning rate for each role of parameters, and no decay where it would do harm."""

from __future__ import annotations

from typing import Any

from torch import nn

from bayeslora.methods.tuner import check_has_tuner, tuner_of

ROLE = "bayeslora_role"
"""Key in an optimizer group for the role of its parameters; saved with the optimizer's state."""


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.0, no_decay: tuple[str, ...] = ("bias", "norm")
) -> list[dict[str, Any]]:
    """Return parameter groups of all trainable parameters of `model`, for any `torch.optim.Optimizer`.

    Args:
        model: an adapted model, or any other model (which gives the usual two groups).
        lr: learning rate of the weights; other roles get a multiple of it, or a rate that the method sets when
            training begins.
        weight_decay: weight decay of the weights. Gates, ranges, vectors and parameters named in `no_decay` get none:
            decay would pull a gate's logit towards a half-open 0 and a range towards an arbitrary 1.
        no_decay: parameters whose name contains one of these strings (compared in lower case) get no decay either.

    Returns:
        Dictionaries with `params`, `lr`, `weight_decay` and, under the key `ROLE`, the group's role.
    """
    check_has_tuner(model)
    tuner = tuner_of(model)
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        role = tuner.role_of(name) if tuner is not None else "weights"
        decays = role == "weights" and parameter.ndim > 1 and not any(part in name.lower() for part in no_decay)
        groups.setdefault((role, decays), []).append(parameter)
    factors = {role: 1.0 if tuner is None else tuner.rate_factor(role) for role, _ in groups}
    return [
        {"params": parameters, "lr": lr * factors[role], "weight_decay": weight_decay if decays else 0.0, ROLE: role}
        for (role, decays), parameters in groups.items()
    ]
