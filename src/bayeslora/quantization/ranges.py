"""Ranges fitted to data: where a quantizer starts before its range is learned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from bayeslora.errors import BayesLoraError
from bayeslora.quantization.quantizer import grid_step

Calibration = Literal["mse", "absmax"]

FLOOR = 1e-6
"""Smallest range; an all-zero tensor gets it, so that no step is ever zero."""

# Beyond the largest magnitude too: the top level is below the range, at 2/3 of it for two bits.
_COARSE = torch.logspace(-1.6, 0.1761, 80)
_FINE = torch.linspace(0.95, 1.05, 41)
_SAMPLE = 65_521
_AT_ONCE = 1 << 20
_BINS = 2048  # 16 to a step of 8 bits; counts of them stand for a large tensor


@torch.no_grad()
def optimal_range(x: Tensor, bits: int = 8, method: Calibration = "mse", dim: int | None = None) -> Tensor:
    r"""Return a positive float32 range for `x`: its largest magnitude (`absmax`) or that of least error (`mse`).

    `mse` minimizes the squared error: it tries 80 multiples of the largest magnitude, from 1/40 to 1.5 and spaced 5%
    apart, and then steps of a quarter percent around the best. The error of a single range is measured on a histogram
    of all magnitudes (2,048 bins), that of a row on at most 65,521 evenly spaced entries. For a Gaussian, the optimum
    is near 1.85, 2.65 and 3.9 standard deviations at 2, 4 and 8 bits; at the low widths, the largest magnitude has
    about twice the error.

    Args:
        x: tensor of any shape; empty and all-zero tensors give `FLOOR`.
        bits: width at which the error is measured; at 16 and 32 bits the largest magnitude is the optimum.
        method: ``"mse"`` or ``"absmax"``.
        dim: None for a single range (0-d); 1 for one range per row of a matrix, in the shape [rows, 1].
    """
    x = x.detach().float()
    rows = x.reshape(1, -1) if dim is None else x
    if rows.numel() == 0:
        found = rows.new_full((rows.shape[0], 1), FLOOR)
    else:
        found = rows.abs().amax(1, keepdim=True).clamp_min(FLOOR)
        if method == "mse" and bits < 16:
            if rows.numel() > _BINS and dim is None:
                return range_of_counts(magnitude_counts(rows, found), found, bits)
            sample = _spread(rows)
            for shares in (_COARSE[_COARSE >= _least_share(sample.shape[1], bits)], _FINE):
                found = found * _best_share(sample, None, found, bits, shares.to(rows.device))
    return found.reshape(()) if dim is None else found


@torch.no_grad()
def optimal_ranges(x: Tensor, widths: Sequence[int], method: Calibration = "mse") -> list[Tensor]:
    """Return `optimal_range(x, bits, method)` for each of `widths`; the magnitudes of a large `x` are counted once."""
    x = x.detach().float()
    if method != "mse" or x.numel() <= _BINS:
        return [optimal_range(x, bits, method) for bits in widths]
    largest = x.abs().amax().clamp_min(FLOOR)
    counts = magnitude_counts(x, largest)
    return [range_of_counts(counts, largest, bits) for bits in widths]


@torch.no_grad()
def magnitude_counts(x: Tensor, largest: Tensor) -> Tensor:
    """Count the magnitudes of `x`, of any shape, in 2,048 equal bins up to `largest`, its maximum or a larger number.

    Counts of parts of a tensor, with the maximum over all parts, add up to those of the whole.
    """
    most = float(largest)
    if not math.isfinite(most):
        raise BayesLoraError(
            "a value to quantize is not finite, but must be (training diverged): lower the learning rate"
        )
    return torch.histc(x.detach().float().abs(), _BINS, 0.0, most)


@torch.no_grad()
def range_of_counts(counts: Tensor, largest: Tensor, bits: int) -> Tensor:
    """Return the range (0-d, float32) with the least squared error at `bits` for counts of magnitudes.

    Args:
        counts: as `magnitude_counts` returns them, or their sum over parts.
        largest: the maximum that they were counted with, one positive number.
        bits: width at which the error is measured; `optimal_range` gives the same range for a large tensor.
    """
    largest = largest.float().reshape(1, 1)
    if bits >= 16:
        return largest.reshape(())
    # Quantization is symmetric, so that signs do not matter.
    centres = (torch.arange(_BINS, device=counts.device) + 0.5) * (largest / _BINS)
    found = largest
    for shares in (_COARSE, _FINE):
        found = found * _best_share(centres, counts.float(), found, bits, shares.to(counts.device))
    return found.reshape(())


def _least_share(count: int, bits: int) -> float:
    """Return a share of the largest magnitude below which no range of `count` entries is best.

    With the largest magnitude as range no error exceeds half a step, so that the squares sum to at most count / 4
    steps squared. Below this share the clipping of the largest entry alone costs more.
    """
    level = (1 << (bits - 1)) - 1
    return (1 - math.sqrt(count) / (2 * level + 1)) * (level + 0.5) / level


def _spread(rows: Tensor) -> Tensor:
    """At most `_SAMPLE` columns; a prime number of them, so that a flattened matrix is not sampled in few columns."""
    size = rows.shape[1]
    return rows if size <= _SAMPLE else rows[:, torch.arange(_SAMPLE, device=rows.device) * size // _SAMPLE]


def _best_share(rows: Tensor, counts: Tensor | None, largest: Tensor, bits: int, shares: Tensor) -> Tensor:
    """The one of `shares` of `largest` [rows, 1] with the least squared quantization error in each row.

    With `counts`, `rows` is one row of values, and each stands for that many entries.
    """
    level = (1 << (bits - 1)) - 1
    if counts is not None:
        steps = grid_step(largest * shares.unsqueeze(1), bits)
        error = torch.round(rows / steps).clamp_(max=level).mul_(steps).sub_(rows)
        return shares[(error.square_() @ counts).argmin()]
    errors, values = [], rows.unsqueeze(1)
    for some in shares.split(max(1, _AT_ONCE // rows.numel())):  # of a small matrix an operation is dearer than sums
        steps = grid_step(largest * some, bits).unsqueeze(2)
        error = torch.round(values / steps).clamp_(-level, level).mul_(steps).sub_(values)
        errors.append(error.square_().sum(2))
    return shares[torch.cat(errors, 1).argmin(1)].unsqueeze(1)
