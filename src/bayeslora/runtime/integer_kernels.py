"""Products of activations and a matrix of integer codes: PyTorch's kernels, and a plain product as fallback.

All but `FewRowsWeight` and `PrepackedWeight` return sums of activation times code, (n, d_in) by (d_out, d_in) to
(n, d_out), and the caller scales them. A kernel is used on a device type if it runs there, agrees with the plain
product and is fast enough. On a processor without the right instructions, libraries fall back to reference code that
is thousands of times slower; a short timing per process and device type rejects it (see `has_integer_kernel`).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

SMALL_BATCH = 4
"""Largest number of rows for which reading the weight dominates, so that int8 codes are read directly."""

FEW_ROWS = 64
"""Largest number of rows for `FewRowsWeight`, whose calls cost little; `PrepackedWeight` reads many rows faster."""

WEIGHT_MULTIPLE = 32
"""Block length of the kernel of `int8_weight_product`; d_in must be a multiple of it."""

_FEWEST_ROWS, _FEWEST_COLUMNS = 16, 32
"""Smaller products (one row, or at most 256 results) run in oneDNN's reference code, 100 times as slow."""

_CUDA_ROWS, _CUDA_MULTIPLE = 24, 8
"""Fewest rows, and the factor of both widths, of a product of integers in cuBLASLt."""

_ANY_SHAPES = ((1, 24, 40), (SMALL_BATCH, 37, 11), (33, 64, 51))
_TIMED_WIDTH = 256  # of d_in and d_out
_SLOWEST = 10  # times as slow as the plain product in float32
_FEWEST_RUNS, _MOST_RUNS = 5, 30
_BYTE_VALUES = 256
_BLOCK = 1 << 22  # entries of a weight that are dequantized at a time


def dequantized_product(x: Tensor, codes: Tensor) -> Tensor:
    """Return the product in the type of `x`, float32 or bfloat16 (which hold 8-bit codes exactly), on any device."""
    return _joined([F.linear(x, part.to(x.dtype)) for part in _in_blocks(codes)])


def fused_product(x: Tensor, codes: Tensor) -> Tensor:
    """Return the product of a few rows in float32, as an expression that `torch.compile` fuses into one loop.

    Uncompiled, it would write the codes as float32 for each row.
    """
    x = x.float()
    x = x.as_strided(x.shape, x.stride())  # a barrier: operations before `x` are not fused into every column
    return (x[:, None] * codes.float()).sum(-1)


def scaled_product(x: Tensor, codes: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """Return the plain product with scale and bias, rounded once at the end."""
    if bias is None:
        return dequantized_product(x, codes).mul_(scale)
    parts = _in_blocks(codes)
    pairs = zip(parts, bias.to(x.dtype).split(len(parts[0])), strict=True)
    return _joined([torch.addmm(added, x, part.to(x.dtype).T, alpha=scale) for part, added in pairs])


def _joined(columns: list[Tensor]) -> Tensor:
    return columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)


def _in_blocks(codes: Tensor) -> tuple[Tensor, ...]:
    return codes.split(max(1, _BLOCK // max(1, codes.shape[1])))


def integer_product(x: Tensor, codes: Tensor) -> Tensor:
    """Return `torch._int_mm` of int8 `x`, with exact sums in int32; on the CPU it is wrong for an inner width of 1."""
    is_right = x.device.type == "cpu" and x.shape[1] > 1
    return torch._int_mm(x, codes.T) if is_right else padded_integer_product(x, codes)


def padded_integer_product(x: Tensor, codes: Tensor) -> Tensor:
    """Return the same in a shape that CUDA accepts: more than 16 rows, and widths that are multiples of 8."""
    (rows, width), height = x.shape, len(codes)
    columns = -width % _CUDA_MULTIPLE
    x = F.pad(x, (0, columns, 0, max(0, _CUDA_ROWS - rows)))
    codes = F.pad(codes, (0, columns, 0, -height % _CUDA_MULTIPLE))
    found = torch._int_mm(x, codes.T)
    return found if found.shape == (rows, height) else found[:rows, :height]


def int16_product(x: Tensor, codes: Tensor, row_sums: Tensor) -> Tensor:
    """Return the product of 16-bit codes `x` (float32), with their two bytes as rows of one `integer_product`.

    A code is 256 times its high byte, plus its low byte, plus 128, where both bytes are int8. The last term adds 128
    times the sum of a row of `codes` to each column; `row_sums` are these sums, (d_out,), float32.
    """
    high = x.div(_BYTE_VALUES).floor_()
    low = torch.sub(x, high, alpha=_BYTE_VALUES).sub_(ZERO_POINT)
    sums = integer_product(torch.cat([high, low]).to(torch.int8), codes).float()
    high, low = sums.split(len(x))
    return low.add_(high, alpha=_BYTE_VALUES).add_(row_sums, alpha=ZERO_POINT)


def int8_weight_product(x: Tensor, codes: Tensor) -> Tensor:
    """Return `torch._weight_int8pack_mm`, which reads int8 codes directly and rounds `x` and the sums to bfloat16.

    The kernel would also round scales to bfloat16, so they are ones here. d_in must be a multiple of
    `WEIGHT_MULTIPLE`, which the kernel does not check.
    """
    ones = codes.new_ones(len(codes), dtype=torch.bfloat16)
    return torch._weight_int8pack_mm(x.to(torch.bfloat16), codes, ones).float()


ZERO_POINT = 128
"""Offset of unsigned activation codes, for `PrepackedWeight`.

Processors without AMX multiply unsigned by signed bytes; for signed activations oneDNN has only reference code.
"""


class FewRowsWeight:
    """A weight in FBGEMM's memory layout, whose product rounds the input and includes scales and bias.

    A call costs a fraction of one of oneDNN, which is most of the time of one sentence.

    Args:
        codes: (d_out, d_in), int8.
        scales: of the sums of input value times weight code, (d_out,), float32.
        bias: (d_out,), float32, or None.
        step: of the input's grid.
    """

    def __init__(self, codes: Tensor, scales: Tensor, bias: Tensor | None, step: float) -> None:
        self.step = step
        zeros = torch.zeros(len(scales), dtype=torch.long)
        engine = torch.backends.quantized.engine
        torch.backends.quantized.engine = "fbgemm"
        try:
            with warnings.catch_warnings():  # PyTorch will drop these tensors: `has_few_rows_kernel` is then False
                warnings.simplefilter("ignore", UserWarning)
                weight = torch._make_per_channel_quantized_tensor(codes, scales.double(), zeros, 0)
            self.packed = torch.ops.quantized.linear_prepack(weight, bias)
        finally:
            torch.backends.quantized.engine = engine
        # Without the packet around it, which looks at every argument in Python.
        packet = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        self._apply: Callable[..., Tensor] = getattr(packet, "_op", packet)

    def product(self, x: Tensor) -> Tensor:
        """Return values (n, d_out) from values (n, d_in), both float32.

        Inputs are rounded to codes from -128 to 127. A value within 1e-5 steps of a tie may get the other code. Sums
        are exact.
        """
        return self._apply(x, self.step, ZERO_POINT, self.packed)


class PrepackedWeight:
    """A weight in oneDNN's memory layout, whose product includes scales and bias.

    On CPUs `integer_product` converts the codes to that layout in each call.

    Args:
        codes: (d_out, d_in), int8.
        scales: of the sums of activation code times weight code, (d_out,), float32.
        bias: (d_out,), float32, or None.
        gelu_step: if given, the results are 8-bit codes of GELU of the product, on the grid with this step.
    """

    def __init__(self, codes: Tensor, scales: Tensor, bias: Tensor | None, gelu_step: float | None = None) -> None:
        self.gelu_step, self.out_features = gelu_step, len(codes)
        self.scales = _at_least(_FEWEST_COLUMNS, scales)
        self.bias = None if bias is None else _at_least(_FEWEST_COLUMNS, bias)
        self.codes = torch.ops.onednn.qlinear_prepack(_at_least(_FEWEST_COLUMNS, codes), None)
        self.zeros = torch.zeros(len(self.scales), dtype=torch.int32)

    def product(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return values (n, d_out) of `dtype` from uint8 codes plus `ZERO_POINT` (n, d_in).

        Sums are exact and scaled in float32. With a `gelu_step` the results are such uint8 codes too, for any `dtype`.
        """
        found = torch.ops.onednn.qlinear_pointwise(
            _at_least(_FEWEST_ROWS, x),
            1.0,
            ZERO_POINT,
            self.codes,
            self.scales,
            self.zeros,
            self.bias,
            self.gelu_step or 1.0,
            0 if self.gelu_step is None else ZERO_POINT,
            dtype if self.gelu_step is None else torch.uint8,
            "none" if self.gelu_step is None else "gelu",
            [],
            "none",  # GELU by the error function, not by its tanh approximation
        )
        return found if found.shape == (x.shape[0], self.out_features) else found[: x.shape[0], : self.out_features]


def _at_least(rows: int, x: Tensor) -> Tensor:
    """Return `x` with rows of zeros appended until it has `rows`."""
    missing = rows - x.shape[0]
    return x if missing <= 0 else torch.cat([x, x.new_zeros(missing, *x.shape[1:])])


def _prepacked_sums(x: Tensor, codes: Tensor) -> Tensor:
    unsigned = (x.short() + ZERO_POINT).to(torch.uint8)
    return PrepackedWeight(codes, torch.ones(len(codes), device=codes.device), None).product(unsigned, torch.float32)


def _few_rows_sums(x: Tensor, codes: Tensor) -> Tensor:
    if codes.device.type != "cpu":
        raise NotImplementedError
    return FewRowsWeight(codes, torch.ones(len(codes)), None, 1.0).product(x)


@torch.compiler.assume_constant_result
def has_few_rows_kernel(device: str) -> bool:
    """Return whether `FewRowsWeight` works on this device type; without VNNI its sums would overflow."""
    return _is_usable(_few_rows_sums, device, _ANY_SHAPES, torch.float32, tolerance=0.0)


@torch.compiler.assume_constant_result
def has_prepacked_kernel(device: str) -> bool:
    """Return whether `PrepackedWeight` works on this device type."""
    return _is_usable(_prepacked_sums, device, _ANY_SHAPES, torch.int8, tolerance=0.0)


@torch.compiler.assume_constant_result
def has_integer_kernel(device: str) -> bool:
    """Return whether `integer_product` works on this device type."""
    return _is_usable(integer_product, device, _ANY_SHAPES, torch.int8, tolerance=0.0)


@torch.compiler.assume_constant_result
def has_weight_kernel(device: str) -> bool:
    """Return whether `int8_weight_product` works on this device type."""
    return _is_usable(int8_weight_product, device, ((1, 32, 40), (SMALL_BATCH, 96, 11)), torch.float32, tolerance=0.01)


@cache
def _is_usable(
    product: Callable[[Tensor, Tensor], Tensor],
    device: str,
    shapes: tuple[tuple[int, int, int], ...],
    dtype: torch.dtype,
    tolerance: float,
) -> bool:
    """Return whether a kernel takes activations of `dtype`, agrees with the plain product and, on a CPU, is fast.

    `shapes` are the products (n, d_in, d_out) to try. The plain product is as exact as the kernel, so a misleading
    timing costs time, never accuracy.
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
    return _is_fast(lambda: product(narrow, codes), lambda: dequantized_product(x, codes))


def _example(shape: tuple[int, int, int], device: str) -> tuple[Tensor, Tensor]:
    rows, width, height = shape
    x = (torch.arange(rows * width, device=device) * 37 % 255 - 127).float().view(rows, width)
    return x, (torch.arange(height * width, device=device) * 91 % 255 - 127).to(torch.int8).view(height, width)


def _is_fast(product: Callable[[], Tensor], plain: Callable[[], Tensor]) -> bool:
    """Return whether the shortest run of `product` takes at most `_SLOWEST` times the shortest of `plain`.

    On a busy machine most runs may be slow, so a kernel that seems too slow gets up to `_MOST_RUNS` runs.
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
