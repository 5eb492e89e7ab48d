"""B-LoRA: rank and bit-widths learned with Bayesian gates."""

from __future__ import annotations

from bayeslora.methods.blora.config import BLoraConfig
from bayeslora.methods.blora.model import BLoraModel

__all__ = [
    "BLoraConfig",
    "BLoraModel",
]
