"""Products of activations with a matrix of integer codes: the kernels that PyTorch has, and the one that always works.

All return float32 sums of activation times code, (n, d_in) by (d_out, d_in) to (n, d_out), to be scaled by the caller.
A kernel is used on a kind of device where it runs there and gives what the plain product gives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

FEW_ROWS = 4
"""Up to so many rows the time goes into reading the weight, for which int8 codes are read as they are."""

WEIGHT_MULTIPLE = 32
"""Widths d_in that `weight_product` takes: its kernel reads in blocks, and past the end of any other row."""

_BLOCK = 1 << 22  # entries of a weight that are dequantized at a time


def dequantized_product(x: Tensor, codes: Tensor) -> Tensor:
    """The product in the type of `x`, float32 or bfloat16, which holds codes of 8 bits exactly; on any device."""
    rows = max(1, _BLOCK // max(1, codes.shape[1]))
    if len(codes) <= rows:
        return F.linear(x, codes.to(x.dtype)).float()
    return torch.cat([F.linear(x, part.to(x.dtype)).float() for part in codes.split(rows)], dim=1)


def integer_product(x: Tensor, codes: Tensor) -> Tensor:
    """`torch._int_mm`: `x` holds integers of at most 8 bits, and sums are exact."""
    return torch._int_mm(x.to(torch.int8), codes.T).float()


def weight_product(x: Tensor, codes: Tensor) -> Tensor:
    """`torch._weight_int8pack_mm`: `x` and the sums are rounded to bfloat16, int8 codes are read as they lie.

    The kernel would round its scales to bfloat16 too, so that it gets ones. d_in is a multiple of `WEIGHT_MULTIPLE`,
    which the kernel itself does not check.
    """
    return torch._weight_int8pack_mm(x.to(torch.bfloat16), codes, _ones(len(codes), str(codes.device))).float()


@cache
def has_integer_kernel(device: str) -> bool:
    """Whether `integer_product` works on this kind of device, for one row as for many."""
    return _agrees(integer_product, device, ((1, 24, 40), (FEW_ROWS, 37, 11), (33, 64, 51)), tolerance=0.0)


@cache
def has_weight_kernel(device: str) -> bool:
    """Whether `weight_product` works on this kind of device."""
    return _agrees(weight_product, device, ((1, 32, 40), (FEW_ROWS, 96, 11)), tolerance=0.01)


@cache
def _ones(count: int, device: str) -> Tensor:
    with torch.inference_mode(False):
        return torch.ones(count, dtype=torch.bfloat16, device=device)


def _agrees(
    product: Callable[[Tensor, Tensor], Tensor], device: str, shapes: Sequence[tuple[int, int, int]], tolerance: float
) -> bool:
    """Whether a kernel runs, and gives what the plain product gives, for `shapes` (n, d_in, d_out)."""
    for rows, width, height in shapes:
        try:
            x = (torch.arange(rows * width, device=device) * 37 % 255 - 127).float().view(rows, width)
            codes = (torch.arange(height * width, device=device) * 91 % 255 - 127).to(torch.int8).view(height, width)
            expected, found = dequantized_product(x, codes), product(x, codes)
        except (RuntimeError, NotImplementedError, AttributeError):
            return False
        if not bool((found - expected).abs().max() <= tolerance * expected.abs().max()):
            return False
    return True
