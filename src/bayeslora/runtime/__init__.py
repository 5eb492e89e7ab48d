"""Inference with integer arithmetic: layers of codes, their kernels, and compiled graphs."""

from __future__ import annotations

from bayeslora.runtime.compiled import compile_inference

__all__ = ["compile_inference"]
