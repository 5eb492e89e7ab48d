"""A linear layer whose weight is frozen and quantized: its gradient serves a range and a few gates, nothing else."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_WORTHWHILE = 1 << 18


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear(x, weight, bias)` for `x` (..., d_in) and a quantized `weight` (d_out, d_in).

    The weight itself is frozen. Its gradient is only summed up into those of its range and gates, five numbers in all,
    so where the hardware multiplies bfloat16 faster, the outer products are taken in bfloat16: for sums over thousands
    of tokens that changes these numbers in about the third digit, and saves most of the gradient's time.
    """
    if weight.requires_grad and x.dtype == torch.float32 and x.numel() >= _WORTHWHILE and _has_fast_bfloat16(x):
        return _Linear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def _has_fast_bfloat16(x: Tensor) -> bool:
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
        return False
    if x.device.type == "cpu":
        return torch.cpu._is_amx_tile_supported()
    return x.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        need_x, _, need_bias = ctx.needs_input_grad
        grad = grad.flatten(0, -2)
        rows = grad.to(torch.bfloat16)
        grad_weight = (rows.T @ x.flatten(0, -2).to(torch.bfloat16)).float()
        grad_x = (grad @ weight).view(x.shape) if need_x else None
        return grad_x, grad_weight, grad.sum(0) if need_bias else None
