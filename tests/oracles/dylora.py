r"""DyLoRA on one page: the weight of every rank written out, as a sum over its first k columns and rows.

Reference for the tests, from the equations and without the package's code:

    W_k = W0 + (alpha / k) sum_{j <= k} B[:, j] A[j, :]
"""

from __future__ import annotations

from torch import Tensor


def weight(base: Tensor, a: Tensor, b: Tensor, alpha: float, rank: int) -> Tensor:
    """W_k (d_out, d_in) for `a` (r, d_in) and `b` (d_out, r)."""
    found = base.clone()
    for j in range(min(rank, len(a))):
        found = found + alpha / rank * b[:, j].outer(a[j])
    return found


def forward(x: Tensor, base: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, alpha: float, rank: int) -> Tensor:
    return x @ weight(base, a, b, alpha, rank).T + (0 if bias is None else bias)
