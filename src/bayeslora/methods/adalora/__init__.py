"""AdaLoRA and Bayesian AdaLoRA: a fixed budget of ranks, spent where it counts."""

from __future__ import annotations

from bayeslora.methods.adalora.config import AdaLoraConfig
from bayeslora.methods.adalora.model import AdaLoraModel

__all__ = [
    "AdaLoraConfig",
    "AdaLoraModel",
]
