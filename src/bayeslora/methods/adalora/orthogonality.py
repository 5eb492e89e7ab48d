r"""Distance of matrices from orthonormal ones, with its gradient: one matrix product for all of a shape.

$\|A A^\top - I\|_F$ has the gradient $2 (A A^\top - I) A / \|A A^\top - I\|_F$, whose factors the value needs anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def distance_from_orthogonal(rows: Sequence[Tensor], columns: Sequence[Tensor]) -> Tensor:
    r"""Mean of $\|A A^\top - I\|_F$ over `rows`, matrices (r, d), and $\|B^\top B - I\|_F$ over `columns`, (d, r)."""
    sums = [_Distances.apply(is_wide, *matrices) for is_wide, matrices in _alike(rows, columns)]
    return _total(sums) / (len(rows) + len(columns))


@torch.no_grad()
def distance_and_gradients(
    rows: Sequence[Tensor], columns: Sequence[Tensor], scale: float = 1.0
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Return `distance_from_orthogonal`, and pairs of each matrix and `scale` times its gradient, without a graph."""
    factor = 2 * scale / (len(rows) + len(columns))
    sums, pairs = [], []
    for is_wide, matrices in _alike(rows, columns):
        stacked = torch.stack(matrices)
        distances, direction = _distances(stacked, is_wide)
        sums.append(distances)
        direction.mul_(factor)
        gradients = direction @ stacked if is_wide else stacked @ direction
        pairs += list(zip(matrices, gradients.unbind(), strict=True))
    return _total(sums) / (len(rows) + len(columns)), pairs


def _alike(rows: Sequence[Tensor], columns: Sequence[Tensor]) -> list[tuple[bool, list[Tensor]]]:
    """The matrices by shape, device and type, each time with whether it is their rows that are to be orthonormal."""
    groups: dict[Any, list[Tensor]] = {}
    for is_wide, matrices in ((True, rows), (False, columns)):
        for matrix in matrices:
            groups.setdefault((is_wide, matrix.shape, matrix.device, matrix.dtype), []).append(matrix)
    return [(key[0], matrices) for key, matrices in groups.items()]


def _total(sums: Sequence[Tensor]) -> Tensor:
    return torch.stack([value.to(sums[0].device, sums[0].dtype) for value in sums]).sum()


def _distances(stacked: Tensor, is_wide: bool) -> tuple[Tensor, Tensor]:
    """Sum of the distances of `stacked` (n, r, d) or (n, d, r), and the matrices (n, r, r) they grow along."""
    gram = stacked @ stacked.mT if is_wide else stacked.mT @ stacked
    gram.diagonal(dim1=1, dim2=2).sub_(1)
    distances = torch.linalg.vector_norm(gram, dim=(1, 2))
    # At an orthonormal matrix the norm has no gradient; 0 is in its subdifferential.
    return distances.sum(), gram / distances.clamp_min(torch.finfo(gram.dtype).tiny)[:, None, None]


class _Distances(torch.autograd.Function):
    """Sum of the distances of matrices of one shape, from orthonormal rows where they are wide, or else columns."""

    @staticmethod
    def forward(ctx: Any, is_wide: bool, *matrices: Tensor) -> Tensor:
        stacked = torch.stack(matrices)
        distances, direction = _distances(stacked, is_wide)
        ctx.save_for_backward(stacked, direction)
        ctx.is_wide = is_wide
        return distances

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        stacked, direction = ctx.saved_tensors
        direction = direction * (2 * gradient)
        gradients = direction @ stacked if ctx.is_wide else stacked @ direction
        return None, *gradients.unbind()
