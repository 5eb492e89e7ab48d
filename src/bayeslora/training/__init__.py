"""Training: optimizer groups, the four calls of a loop, `attach` for a Trainer, and SWAG."""

from __future__ import annotations

from bayeslora.training.attach import attach
from bayeslora.training.groups import parameter_groups
from bayeslora.training.loop import BayesLoop
from bayeslora.training.swag import SWAG

__all__ = [
    "SWAG",
    "BayesLoop",
    "attach",
    "parameter_groups",
]
