"""Squared gradients of a core by the rows of a batch, as they arrive in the backward passes of one optimizer step."""

from __future__ import annotations

import torch
from torch import Tensor


class RowGradients:
    """Sum over rows of one layer's squared gradients, by member.

    A layer that runs several times in a forward pass has one core for a row: the row's gradients are summed over the
    calls before they are squared. Calls with other numbers of rows (DeBERTa's table of positions, one row for the
    batch) are summed apart.

    Args:
        shape: of the core or cores: (*core) or (K, *core).
    """

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape
        self._squares: Tensor | None = None
        self._of_pass: dict[tuple[int, int], tuple[Tensor, Tensor | None]] = {}

    def add(self, gradients: Tensor, members: Tensor | None, number: int | None) -> None:
        """Add the gradients (rows, *core) of one call.

        Args:
            members: of the rows, where there are several cores.
            number: the forward pass, if the layer runs several times in one.
        """
        if number is None:
            self._square(gradients, members)
            return
        key = (number, len(gradients))
        known = self._of_pass.get(key)
        self._of_pass[key] = (gradients if known is None else known[0] + gradients, members)

    def take(self) -> Tensor | None:
        """Return the sum since the last call, of the core's shape; None if no row has had a gradient."""
        for gradients, members in self._of_pass.values():
            self._square(gradients, members)
        found, self._squares = self._squares, None
        self._of_pass.clear()
        return found

    def _square(self, gradients: Tensor, members: Tensor | None) -> None:
        squares = gradients.square()
        if members is None:
            squares = squares.sum(0)
        else:
            squares = squares.new_zeros(self.shape).index_add_(0, members[: len(squares)], squares)
        self._squares = squares if self._squares is None else self._squares + squares
