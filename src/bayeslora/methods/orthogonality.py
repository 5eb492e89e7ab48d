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
    groups: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
    for matrix in rows:
        groups.setdefault((matrix.shape, matrix.device, matrix.dtype), ([], []))[0].append(matrix)
    for matrix in columns:
        groups.setdefault((matrix.shape[::-1], matrix.device, matrix.dtype), ([], []))[1].append(matrix)
    sums = [_Distances.apply(len(a), *a, *b) for a, b in groups.values()]
    total = torch.stack([value.to(sums[0].device, sums[0].dtype) for value in sums]).sum()
    return total / (len(rows) + len(columns))


class _Distances(torch.autograd.Function):
    """Sum of the distances of matrices of one shape, of which the first `rows` are wide and the others tall."""

    @staticmethod
    def forward(ctx: Any, rows: int, *matrices: Tensor) -> Tensor:
        wide = torch.stack([*matrices[:rows], *(matrix.T for matrix in matrices[rows:])])
        gram = wide @ wide.mT
        gram.diagonal(dim1=1, dim2=2).sub_(1)
        distances = torch.linalg.vector_norm(gram, dim=(1, 2))
        # At an orthonormal matrix the norm has no gradient; 0 is in its subdifferential.
        ctx.save_for_backward(wide, gram / distances.clamp_min(torch.finfo(gram.dtype).tiny)[:, None, None])
        ctx.rows = rows
        return distances.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        wide, direction = ctx.saved_tensors
        gradients = torch.bmm(direction, wide).mul_(2 * gradient).unbind()
        return None, *gradients[: ctx.rows], *(matrix.T for matrix in gradients[ctx.rows :])
