"""Products of activations with a matrix of integer codes: the kernels that PyTorch has, and the one that always works.

All but `Prepacked` return sums of activation times code, (n, d_in) by (d_out, d_in) to (n, d_out), to be scaled by
the caller. A kernel is used on a kind of device where it runs there, gives what the plain product gives, and is not
the reference code that a library falls back to on a processor without the instructions, thousands of times as slow.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

FEW_ROWS = 4
"""Up to so many rows the time goes into reading the weight, for which int8 codes are read as they are."""

WEIGHT_MULTIPLE = 32
"""Widths d_in that `weight_product` takes: its kernel reads in blocks, and past the end of any other row."""

_FEWEST_ROWS, _FEWEST_COLUMNS = 16, 32
"""oneDNN leaves products with one row, or of at most 256 results, to its reference code: a hundred times as slow."""

_ANY_SHAPES = ((1, 24, 40), (FEW_ROWS, 37, 11), (33, 64, 51))
_TIMED_WIDTH = 256  # of d_in and d_out
_SLOWEST = 10  # times the plain product, of float32
_FEWEST_RUNS, _MOST_RUNS = 5, 30
_BYTE_VALUES = 256
_BLOCK = 1 << 22  # entries of a weight that are dequantized at a time


def dequantized_product(x: Tensor, codes: Tensor) -> Tensor:
    """The product in the type of `x`, float32 or bfloat16, which holds codes of 8 bits exactly; on any device."""
    return _joined([F.linear(x, part.to(x.dtype)) for part in _in_blocks(codes)])


def reduced_product(x: Tensor, codes: Tensor) -> Tensor:
    """The same for a few rows in float32, in an expression that `torch.compile` turns into one loop over the codes.

    Run as it stands it would write down the codes as float32, for each row.
    """
    x = x.float()
    x = x.as_strided(x.shape, x.stride())  # or what `x` is made of, a rounding perhaps, would be done in each column
    return (x[:, None] * codes.float()).sum(-1)


def scaled_product(x: Tensor, codes: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """The same, scaled by one number and with a bias: both part of the product, before its rounding."""
    if bias is None:
        return dequantized_product(x, codes).mul_(scale)
    found, parts = [], _in_blocks(codes)
    for part, added in zip(parts, bias.to(x.dtype).split(len(parts[0])), strict=True):
        found.append(torch.addmm(added, x, part.to(x.dtype).T, alpha=scale))
    return _joined(found)


def _joined(columns: Sequence[Tensor]) -> Tensor:
    return columns[0] if len(columns) == 1 else torch.cat(tuple(columns), dim=1)


def _in_blocks(codes: Tensor) -> tuple[Tensor, ...]:
    return codes.split(max(1, _BLOCK // max(1, codes.shape[1])))


def integer_product(x: Tensor, codes: Tensor) -> Tensor:
    """`torch._int_mm`, of int8 `x`: sums are exact, and int32."""
    return torch._int_mm(x, codes.T)


def two_byte_product(x: Tensor, codes: Tensor, row_sums: Tensor) -> Tensor:
    """The same of float32 `x` that are codes of 16 bits: their two bytes are rows of one `integer_product`.

    A code is 256 times its high byte, plus its low byte, plus 128, where both bytes are int8. What the 128 adds to
    each column is 128 times the sum of a row of `codes`: `row_sums` are these sums, (d_out,), float32.
    """
    high = x.div(_BYTE_VALUES).floor_()
    low = torch.sub(x, high, alpha=_BYTE_VALUES).sub_(ZERO_CODE)
    sums = integer_product(torch.cat([high, low]).to(torch.int8), codes).float()
    high, low = sums.split(len(x))
    return low.add_(high, alpha=_BYTE_VALUES).add_(row_sums, alpha=ZERO_CODE)


def weight_product(x: Tensor, codes: Tensor) -> Tensor:
    """`torch._weight_int8pack_mm`: `x` and the sums are rounded to bfloat16, int8 codes are read as they lie.

    The kernel would round its scales to bfloat16 too, so that it gets ones. d_in is a multiple of `WEIGHT_MULTIPLE`,
    which the kernel itself does not check.
    """
    ones = codes.new_ones(len(codes), dtype=torch.bfloat16)
    return torch._weight_int8pack_mm(x.to(torch.bfloat16), codes, ones).float()


ZERO_CODE = 128
"""What is added to the codes of activations for `Prepacked`, so that they are unsigned.

Processors without AMX multiply unsigned by signed bytes; for signed activations oneDNN has nothing but reference code.
"""


class Prepacked:
    """oneDNN's product with codes in the order in which it reads them; scales and bias are part of the product.

    On CPUs `integer_product` puts the codes in that order for each product.

    Args:
        codes: (d_out, d_in), int8.
        scales: of the sums over codes of both, (d_out,), float32.
        bias: (d_out,), float32, or None.
        gelu_step: where given, results are the 8-bit codes of GELU of the product, on the grid of this step.
    """

    def __init__(self, codes: Tensor, scales: Tensor, bias: Tensor | None, gelu_step: float | None = None) -> None:
        self.gelu_step, self.out_features = gelu_step, len(codes)
        self.scales = _at_least(_FEWEST_COLUMNS, scales)
        self.bias = None if bias is None else _at_least(_FEWEST_COLUMNS, bias)
        self.codes = torch.ops.onednn.qlinear_prepack(_at_least(_FEWEST_COLUMNS, codes), None)
        self.zeros = torch.zeros(len(self.scales), dtype=torch.int32)

    def product(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Values (n, d_out) from codes (n, d_in) plus `ZERO_CODE`, uint8: exact sums, scaled in float32, as `dtype`.

        With a `gelu_step` they are such codes themselves, uint8, whatever `dtype` is.
        """
        found = torch.ops.onednn.qlinear_pointwise(
            _at_least(_FEWEST_ROWS, x),
            1.0,
            ZERO_CODE,
            self.codes,
            self.scales,
            self.zeros,
            self.bias,
            self.gelu_step or 1.0,
            0 if self.gelu_step is None else ZERO_CODE,
            dtype if self.gelu_step is None else torch.uint8,
            "none" if self.gelu_step is None else "gelu",
            [],
            "none",  # of GELU's two algorithms the one with the error function
        )
        return found[: len(x), : self.out_features]


def _at_least(rows: int, x: Tensor) -> Tensor:
    """`x` with rows of zeros below it."""
    return x if len(x) >= rows else torch.cat([x, x.new_zeros(rows - len(x), *x.shape[1:])])


def _prepacked_sums(x: Tensor, codes: Tensor) -> Tensor:
    unsigned = (x.short() + ZERO_CODE).to(torch.uint8)
    return Prepacked(codes, torch.ones(len(codes), device=codes.device), None).product(unsigned, torch.float32)


@torch.compiler.assume_constant_result
def has_prepacked_kernel(device: str) -> bool:
    """Whether `Prepacked` works on this kind of device, for one row as for many."""
    return _agrees(_prepacked_sums, device, _ANY_SHAPES, torch.int8, tolerance=0.0)


@torch.compiler.assume_constant_result
def has_integer_kernel(device: str) -> bool:
    """Whether `integer_product` works on this kind of device, for one row as for many."""
    return _agrees(integer_product, device, _ANY_SHAPES, torch.int8, tolerance=0.0)


@torch.compiler.assume_constant_result
def has_weight_kernel(device: str) -> bool:
    """Whether `weight_product` works on this kind of device."""
    return _agrees(weight_product, device, ((1, 32, 40), (FEW_ROWS, 96, 11)), torch.float32, tolerance=0.01)


@cache
def _agrees(
    product: Callable[[Tensor, Tensor], Tensor],
    device: str,
    shapes: tuple[tuple[int, int, int], ...],
    dtype: torch.dtype,
    tolerance: float,
) -> bool:
    """Whether a kernel takes activations of `dtype`, is fast, and gives the plain product's (n, d_in, d_out).

    A clock may decide, for what takes the place of a kernel that is refused is no less exact.
    """
    for shape in shapes:
        try:
            x, codes = _example(shape, device)
            expected, found = dequantized_product(x, codes), product(x.to(dtype), codes)
        except (RuntimeError, NotImplementedError, AttributeError):
            return False
        if not bool((found - expected).abs().max() <= tolerance * expected.abs().max()):
            return False
    if device != "cpu":
        return True
    x, codes = _example((max(rows for rows, *_ in shapes), _TIMED_WIDTH, _TIMED_WIDTH), device)
    narrow = x.to(dtype)
    return _keeps_up(lambda: product(narrow, codes), lambda: dequantized_product(x, codes))


def _example(shape: tuple[int, int, int], device: str) -> tuple[Tensor, Tensor]:
    rows, width, height = shape
    x = (torch.arange(rows * width, device=device) * 37 % 255 - 127).float().view(rows, width)
    return x, (torch.arange(height * width, device=device) * 91 % 255 - 127).to(torch.int8).view(height, width)


def _keeps_up(product: Callable[[], Tensor], plain: Callable[[], Tensor]) -> bool:
    """Whether the shortest run of `product` takes at most `_SLOWEST` times the shortest of `plain`.

    Beside other work nearly every run may be a long one, so that one that seems too slow is given more of them.
    """
    shortest = [float("inf"), float("inf")]
    for count in range(1, _MOST_RUNS + 1):
        for index, run in enumerate((product, plain)):
            start = time.perf_counter()
            run()
            shortest[index] = min(shortest[index], time.perf_counter() - start)
        if count >= _FEWEST_RUNS and shortest[0] <= _SLOWEST * shortest[1]:
            return True
    return False
