r"""Codes of a weight chosen for the output of its layer: every column makes up for the errors of those before it.

Rounding W (d_out, d_in) to Q changes the output of a layer by $(Q - W) x$. For inputs with second moments
$H = \mathrm{E}[x x^T]$, the mean square of this change is $\mathrm{tr}((Q - W) H (Q - W)^T)$. The nearest codes do not
minimise it, because inputs have a mean and are correlated. Columns are therefore rounded one after the other, and the
remaining columns make up for an error $e$ in column j by the best change,

$$ w_k \leftarrow w_k - e\, U_{jk} / U_{jj}, \quad k > j, \qquad H^{-1} = U^T U, $$

with U upper triangular, which conditions the inverse on the columns that are done (Frantar et al., *GPTQ*, 2022). The
columns with the largest moments come first, while there are many left to make up for them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bayeslora.quantization.quantizer import grid_step, repeated

DAMPING = 0.01
"""Share of the mean of H's diagonal that is added to it: few rows leave directions that no input has."""

_BLOCK = 64  # columns whose changes reach the rest of the matrix in one product


@torch.no_grad()
def gptq_codes(weight: Tensor, ranges: Tensor, bits: int, moments: Tensor) -> Tensor:
    r"""Return the GPTQ codes (d_out, d_in), int8, of a weight.

    Args:
        weight: (d_out, d_in) weight.
        ranges: ranges of the grids, as for `quantize`: one number, (d_out, 1), or (d_out, groups).
        bits: width of the codes, from 2 to 8.
        moments: (d_in, d_in) second moments H of the inputs, up to a positive factor.
    """
    level = (1 << (bits - 1)) - 1
    order = moments.diagonal().argsort(descending=True, stable=True)
    rows = weight.float()[:, order].clone()
    steps = repeated(grid_step(ranges.float(), bits), weight).expand(weight.shape)[:, order]
    factor = _inverse_factor(moments.double()[order][:, order]).to(rows)
    found = torch.empty_like(rows, dtype=torch.int8)
    for start in range(0, rows.shape[1], _BLOCK):
        end = min(start + _BLOCK, rows.shape[1])
        errors = torch.empty_like(rows[:, start:end])
        for column in range(start, end):
            values, step = rows[:, column], steps[:, column]
            codes = torch.round(values / step).clamp_(-level, level)
            found[:, column] = codes.to(torch.int8)
            error = (values - codes * step) / factor[column, column]
            rows[:, column:end] -= error.outer(factor[column, column:end])
            errors[:, column - start] = error
        rows[:, end:] -= errors @ factor[start:end, end:]
    return found[:, order.argsort()]


def _inverse_factor(moments: Tensor) -> Tensor:
    """Return U, upper triangular, with U^T U the inverse of the damped moments (d, d)."""
    mean = moments.diagonal().mean().clamp_min(torch.finfo(moments.dtype).tiny)
    damped = moments / mean + DAMPING * torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)
