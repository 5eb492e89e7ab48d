"""Training: optimizer groups, the four calls of a loop, and `attach` for a Trainer."""

from __future__ import annotations

from bayeslora.training.attach import attach
from bayeslora.training.groups import parameter_groups
from bayeslora.training.loop import BayesLoop

__all__ = [
    "BayesLoop",
    "attach",
    "parameter_groups",
]
