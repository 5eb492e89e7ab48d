r"""Rotation of a low-rank update into its singular value decomposition.

$s\,B\,\mathrm{diag}(E)\,A$ is the same function for every invertible change of basis of its r components, so that
after training all of them matter a little and none can go. In the singular value decomposition $U S V^\top$ of
$B\,\mathrm{diag}(E)\,A$ they are sorted and as few as possible carry the update. It is found from the factors alone:
two QR decompositions, and the decomposition of the r × r middle, $O((d_{in} + d_{out}) r^2)$.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bayeslora.posterior.draws import whole, write


class Factors(NamedTuple):
    """A (r, d_in), E (r,) and B (d_out, r)."""

    A: Tensor
    E: Tensor
    B: Tensor


@torch.no_grad()
def rotated(factors: Factors) -> Factors:
    r"""Return factors with the same $B\,\mathrm{diag}(E)\,A$: $A = V^\top$, $E = 1$ and $B = U S$, S in falling order.

    Rows of A have unit length, as they begin in LoRA, and a step of B changes the function as much as before: with S
    in E the small components would hardly learn any more. E = 1 is exact at any width. A component beyond the smaller
    dimension of the layer has S = 0.
    """
    a, e, b = (factor.double() for factor in factors)
    rank = len(e)
    columns, upper = torch.linalg.qr(b * e)
    rows, lower = torch.linalg.qr(a.T)
    u, s, v = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    left, right = columns @ u, v @ rows.T
    found = Factors(a.new_zeros(a.shape), e.new_ones(rank), b.new_zeros(b.shape))
    found.A[: right.shape[0]], found.B[:, : left.shape[1]] = right, left * s
    return Factors(*(new.to(old.dtype) for new, old in zip(found, factors, strict=True)))


@torch.no_grad()
def rotate(a: nn.Parameter, e: nn.Parameter, b: nn.Parameter, optimizer: Optimizer) -> None:
    r"""Rotate the three parameters in place, and what Adam knows of them with them.

    With $A' = T A$ the gradient of B changes by $\partial B' = \partial B\, M$, $M = \mathrm{diag}(E)^{-1} T^\top
    \mathrm{diag}(E')$, and likewise for A. First moments, which are means of gradients, change by the same M; second
    moments are mixed by the squares of M, as those of independent entries would be. E, whose gradient is another one
    in the new basis, starts anew. Sharded parameters are gathered for it; every rank computes the same.
    """
    old = Factors(*(whole(p.detach()).clone() for p in (a, e, b)))
    new = rotated(old)
    # By pseudo-inverses, which zeros do not disturb: least squares on CUDA wants full rank.
    of_a = new.A.double() @ torch.linalg.pinv(old.A.double())  # T with A' = T A
    of_b = (torch.linalg.pinv(old.B.double()) @ new.B.double()).T  # R with B' = B R^T
    for parameter, value in zip((a, e, b), new, strict=True):
        write(parameter, value)
    inverse = torch.where(old.E != 0, 1 / old.E, torch.zeros_like(old.E)).double()
    mix_b = inverse.unsqueeze(1) * of_a.T * new.E.double()
    mix_a = new.E.double().unsqueeze(1) * of_b * inverse
    _mix(optimizer, b, mix_b, lambda moment, mix: moment @ mix)
    _mix(optimizer, a, mix_a, lambda moment, mix: mix @ moment)
    optimizer.state.pop(e, None)


def _mix(
    optimizer: Optimizer, parameter: nn.Parameter, mix: Tensor, product: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """Mix the first moment of Adam, and the second by the squares; drop the state that another optimizer keeps."""
    state = optimizer.state.get(parameter, {})
    second = state.get("exp_avg_sq")
    if set(state) <= {"step", "exp_avg", "exp_avg_sq"} and isinstance(second, Tensor) and second.is_floating_point():
        for name, by in (("exp_avg", mix), ("exp_avg_sq", mix.square())):
            moment = whole(state[name]).clone()
            write(state[name], product(moment, by.to(moment)))
    else:
        optimizer.state.pop(parameter, None)
