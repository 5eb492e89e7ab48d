"""B-LoRA: rank and bit-widths learned with Bayesian gates."""

from __future__ import annotations

from bayeslora.methods.blora.model import BLoraConfig, BLoraModel

__all__ = [
    "BLoraConfig",
    "BLoraModel",
]
