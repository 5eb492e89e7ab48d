r"""How far matrices are from orthonormal: one matrix product for all of a shape, with its gradient beside it.

$\|A A^\top - I\|_F$ has the gradient $2 (A A^\top - I) A / \|A A^\top - I\|_F$, whose factors the value needs anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def distance_from_orthogonal(rows: Sequence[Tensor], columns: Sequence[Tensor]) -> Tensor:
    r"""Mean of $\|A A^\top - I\|_F$ over `rows`, matrices (r, d), and $\|B^\top B - I\|_F$ over `columns`, (d, r)."""
    groups: dict[Any, list[Tensor]] = {}
    for is_wide, matrices in ((True, rows), (False, columns)):
        for matrix in matrices:
            groups.setdefault((is_wide, matrix.shape, matrix.device, matrix.dtype), []).append(matrix)
    sums = [_Distances.apply(key[0], *matrices) for key, matrices in groups.items()]
    total = torch.stack([value.to(sums[0].device, sums[0].dtype) for value in sums]).sum()
    return total / (len(rows) + len(columns))


class _Distances(torch.autograd.Function):
    """Sum of the distances of matrices of one shape, from orthonormal rows where they are wide, or else columns."""

    @staticmethod
    def forward(ctx: Any, is_wide: bool, *matrices: Tensor) -> Tensor:
        stacked = torch.stack(matrices)
        gram = stacked @ stacked.mT if is_wide else stacked.mT @ stacked
        gram.diagonal(dim1=1, dim2=2).sub_(1)
        distances = torch.linalg.vector_norm(gram, dim=(1, 2))
        # At an orthonormal matrix the norm has no gradient; 0 is in its subdifferential.
        ctx.save_for_backward(stacked, gram / distances.clamp_min(torch.finfo(gram.dtype).tiny)[:, None, None])
        ctx.is_wide = is_wide
        return distances.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        stacked, direction = ctx.saved_tensors
        direction = direction * (2 * gradient)
        gradients = direction @ stacked if ctx.is_wide else stacked @ direction
        return None, *gradients.unbind()
