"""Optimizers that learn a posterior over the weights they train."""

from __future__ import annotations

from bayeslora.optim.ivon import IVON

__all__ = ["IVON"]
