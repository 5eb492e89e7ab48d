r"""Evidence of the components together, from the gradients that training computes anyway.

Two components that write into the same direction cannot both go, and two that cancel can: what a set of them is worth
is not the sum of what each is worth. With $g_k$ the derivative of a row's loss along component k, over all layers, the
second-order rise of the mean loss when the components in S close is

$$ \Delta(S) = \tfrac{1}{2}\, 1_S^\top F\, 1_S, \qquad F = \mathrm{E}_{rows}\bigl[ g g^\top \bigr]. $$

In the backward pass of a training step $g_k$ is a sum over the row's tokens of products with the r hidden units, at
next to no cost. So every step counts, not only the few passes of `probe.py`. The labels are those of the data; a row's
g is scaled as it would be with labels drawn from the prediction, which is exact for two classes and for regression,
where labels change its length alone. The trace of F is that of the passes.

The components that stay can take over what the others did. To second order the best factors of E are

$$ 1 + \delta, \qquad (F_{oo} + \tau I)\, \delta = F_{oS} 1_S, $$

o being the open components and $\tau$ a tenth of the mean of F's diagonal (the step of the optimal brain surgeon).

F is kept as a count sketch: each row adds its g, with a random sign, to one of m buckets. On average over the signs
the sketch $S$ (m, K) has $S^\top S = \sum g g^\top$; sums over micro-batches, steps and ranks are sums of sketches. A
quadratic form of it has a relative standard deviation of at most $\sqrt{2 / m}$.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bayeslora.methods.blora.probe import row_uniform

BUCKETS = 256
"""Rows m of the sketch."""

DAMPING = 0.1
"""Added to the diagonal of F when open components take over, as a share of its mean."""

_CANDIDATES = 256
"""Closed components, those worth the most, that an exchange may open."""

_LEAST = 1e-8


class Deal(NamedTuple):
    """Bucket (rows,) and sign (rows,) of each row of a batch."""

    buckets: Tensor
    signs: Tensor


def deal(inputs: Mapping[str, Any], rows: int, step: int) -> Deal:
    """Deal the rows of a batch to buckets. A row's tokens and `step` decide, so that it is the same on any rank."""
    uniform = row_uniform((rows, 2), inputs, step, torch.device("cpu"))
    return Deal((uniform[:, 0] * BUCKETS).long(), torch.where(uniform[:, 1] < 0.5, -1.0, 1.0))


@torch.no_grad()
def as_if_drawn(logits: Tensor, labels: Any, problem: str | None) -> Tensor | None:
    """Return the factors (rows,) from gradients with the labels of the data to those with labels that the model draws.

    They are ratios of the lengths of the derivatives by the logits, in the mean square over drawn labels; 1 for the
    tokens of a language model, whose labels are about as likely as it says. None where labels are not at hand, or
    where several numbers are predicted: what is left of their errors has directions of its own.
    """
    if not isinstance(labels, Tensor) or len(labels) != len(logits):
        return None
    if logits.ndim > 2:
        return torch.ones(len(logits))
    # In float64: of a sure prediction both lengths are differences of numbers that are nearly equal.
    values, labels, outputs = logits.detach().cpu().double(), labels.cpu(), logits.shape[-1]
    if problem == "regression" or (outputs == 1 and problem is None):
        if outputs > 1:
            return None
        drawn, given = torch.tensor(0.5), (values.flatten() - labels.flatten()).square()
    elif labels.is_floating_point() and labels.shape == values.shape:
        probability = torch.sigmoid(values)
        drawn, given = (probability * (1 - probability)).sum(1), (probability - labels).square().sum(1)
    elif labels.ndim == 1:
        probability = torch.softmax(values, -1)
        drawn = 1 - probability.square().sum(1)
        given = (probability - F.one_hot(labels.clamp_min(0), outputs)).square().sum(1)
    else:
        return None
    return (drawn.clamp_min(_LEAST) / given.clamp_min(_LEAST)).sqrt().float()


class Watch:
    """Sketch (m, r) of one layer's derivatives along its components, over one optimizer step.

    Attributes:
        dealt: the deal of the micro-batch that is under way.
        sketch: the sum over micro-batches.
    """

    def __init__(self, rank: int, device: torch.device) -> None:
        self.sketch = torch.zeros(BUCKETS, rank, device=device)
        self.dealt: Deal | None = None

    def diagonal(self, values: Tensor, inputs: Tensor, output: Tensor) -> None:
        """Add the derivatives along E (r,), which has multiplied `inputs`, when the gradient reaches `output`.

        Args:
            values: E without its gates, so that closed components show what they would be worth.
            inputs: (..., r), the rows first; of a tensor that rows do not divide, all is one row.
            output: (..., r).
        """
        if self.dealt is None or not output.requires_grad or not len(values):
            return
        (buckets, signs), values, inputs = self.dealt, values.detach(), inputs.detach()

        def add(gradient: Tensor) -> None:
            rows = len(buckets) if gradient.shape[0] % len(buckets) == 0 else 1
            along = (gradient.float() * inputs.float()).reshape(rows, -1, len(values)).sum(1) * values.float()
            sketch = self.sketch
            signed = signs[:rows].to(sketch.device).unsqueeze(1) * along
            sketch.index_add_(0, buckets[:rows].to(sketch.device), signed)

        output.register_hook(add)


def close_together(columns: Tensor, limit: int = 0, price: float = torch.inf) -> tuple[Tensor, float]:
    r"""Close components until at most `limit` are open, those first whose closing raises the loss least.

    The loss with the components in S closed is $\tfrac12 \lVert \sum_{k \in S} c_k \rVert^2$. Each move is the best
    single one. In the end single components are exchanged, or opened and closed again at the price, as long as that
    lowers the loss.

    Args:
        columns: c (m, K), the components' columns in a square root of F.
        limit: number of components to keep.
        price: rise of the loss from which on a component stays open although the limit is not reached.

    Returns:
        a mask (K,) of the components that stay open, and the rise of the last one closed (0.0 if there is none).
    """
    search = _Search(columns.double(), price)
    search.close(limit)
    for _ in range(columns.shape[1]):
        if not search.exchange():
            break
        search.close(limit)
    return search.is_open, max(search.last, 0.0)


def taken_over(columns: Tensor, was_open: Tensor, is_open: Tensor) -> Tensor:
    """Return the factors (K,) of E with which the open components make up best for those that have just changed.

    Args:
        columns: c (m, K), as for `close_together`.
        was_open, is_open: masks (K,) before and after.
    """
    columns = columns.double()
    missing = columns @ (was_open.double() - is_open.double())
    factors = columns.new_ones(columns.shape[1])
    staying = is_open & was_open
    c = columns[:, staying]
    damping = DAMPING * columns.square().sum(0).mean()
    if not staying.any() or not damping > 0:
        return factors
    # (C^T C + t I)^-1 C^T = C^T (C C^T + t I)^-1, whichever is smaller
    if c.shape[1] <= len(c):
        step = torch.linalg.solve(c.T @ c + damping * torch.eye(c.shape[1], dtype=c.dtype), c.T @ missing)
    else:
        step = c.T @ torch.linalg.solve(c @ c.T + damping * torch.eye(len(c), dtype=c.dtype), missing)
    factors[staying] += step
    return factors


class _Search:
    """Open components, and the sum (m,) of the columns of the closed ones."""

    def __init__(self, columns: Tensor, price: float) -> None:
        self.columns, self.price = columns, price
        self.halves = columns.square().sum(0) / 2
        self.least_gain = 1e-9 * float(self.halves.sum())
        self.is_open = torch.ones(columns.shape[1], dtype=torch.bool)
        self.total = columns.new_zeros(columns.shape[0])
        self.last = 0.0

    def close(self, limit: int) -> None:
        while int(self.is_open.sum()) > limit:
            rises = torch.where(self.is_open, self.columns.T @ self.total + self.halves, torch.inf)
            k = int(rises.argmin())
            rise = float(rises[k])
            if rise > self.price:
                break
            self._set(k, False)
            self.last = rise

    def exchange(self) -> bool:
        """Open one closed component, alone or for an open one, whichever lowers the loss most; return if it does."""
        if bool(self.is_open.all()):
            return False
        along = self.columns.T @ self.total
        falls = torch.where(self.is_open, -torch.inf, along - self.halves)
        candidates = falls.topk(min(_CANDIDATES, int((~self.is_open).sum()))).indices
        rises = torch.where(self.is_open, along + self.halves, torch.inf)
        after = rises - self.columns[:, candidates].T @ self.columns  # (candidates, K): beside the one that opens
        rise, partners = after.min(1)
        gains = falls[candidates] - rise.clamp(max=self.price)
        best = int(gains.argmax())
        if float(gains[best]) <= self.least_gain:
            return False
        self._set(int(candidates[best]), True)
        if float(rise[best]) < self.price:
            self._set(int(partners[best]), False)
        return True

    def _set(self, k: int, is_open: bool) -> None:
        self.is_open[k] = is_open
        self.total = self.total - self.columns[:, k] if is_open else self.total + self.columns[:, k]
