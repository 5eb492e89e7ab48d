r"""Integer layers with the same input, such as query, key and value, computed side by side.

Three layers take three times as many calls as one, and for one sentence calls take longer than products.
Here the calls are shared: inputs are rounded to all grids at once, and the updates of all layers are one product with

$$ \begin{pmatrix} B_q & & \\ & B_k & \\ & & B_v \end{pmatrix}. $$

Only the products with $W_0$ and $A$ stay apart, because each layer has its own grid for the input.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bayeslora.quantization import WIDTHS
from bayeslora.runtime.integer_linear import (
    CACHE_BLOCK,
    Bounds,
    IntegerLinear,
    StaticQuantizer,
    are_few,
    as_codes,
    rounded,
    zero_point_for,
)

_UNQUANTIZED = WIDTHS[-1]


class JointLinear:
    """The outputs of several `IntegerLinear`, next to one another.

    Args:
        layers: for which `fit` returns True.
    """

    def __init__(self, layers: Sequence[IntegerLinear]) -> None:
        self.layers = layers
        self.out_features = sum(layer.out_features for layer in layers)
        device = layers[0].codes.device
        column = (-1, 1, 1)
        self.input_steps = torch.tensor([layer.input.step for layer in layers], device=device).view(column)
        self.input_bounds = _bounds([layer.input for layer in layers], [1] * len(layers), device, column)
        ranks = [layer.rank for layer in layers]
        with_rank = [layer for layer in layers if layer.rank]
        self.rank = sum(ranks)
        if with_rank:
            counts = [layer.rank for layer in with_rank]
            self.after_a = _bounds([layer.after_a for layer in with_rank], counts, device)
            self.after_e = _bounds([layer.after_e for layer in with_rank], counts, device)
            self.diagonal = torch.cat([layer.diagonal for layer in with_rank])
            empty = torch.zeros(0, device=device)
            self.up = torch.block_diag(
                *(layer.up if layer.rank else empty.new_zeros(0, layer.out_features) for layer in layers)
            )
        widths = [layer.out_features for layer in layers]
        self.output_bounds = _bounds([layer.output for layer in layers], widths, device)
        steps = torch.tensor([layer.output.step for layer in layers], device=device)
        self.output_steps = steps.repeat_interleave(torch.tensor(widths, device=device))

    @staticmethod
    def fit(layers: Sequence[object]) -> bool:
        """Return whether the layers have integer products and quantized outputs, and round the same things inside."""
        learned = [each for each in layers if isinstance(each, IntegerLinear) and each.is_learned and each.takes_codes]
        if len(learned) < len(layers) or any(layer.output.bits == _UNQUANTIZED for layer in learned):
            return False
        with_rank = [layer for layer in learned if layer.rank]
        kinds = {(layer.after_a.bits == _UNQUANTIZED, layer.after_e.bits == _UNQUANTIZED) for layer in with_rank}
        return len(kinds) <= 1 and all(layer.is_stacked for layer in with_rank)

    def __call__(self, rows: Tensor) -> Tensor:
        """Return the layers' outputs side by side, (n, sum of d_out), float32, for rows (n, d_in)."""
        rows = rows.float()
        if rows.device.type != "cpu":
            return self._product(rows)
        block = max(1, CACHE_BLOCK // (len(self.layers) * rows.shape[1]))
        if rows.shape[0] <= block:
            return self._product(rows)
        return torch.cat([self._product(part) for part in rows.split(block)])

    def _product(self, rows: Tensor) -> Tensor:
        if are_few(rows):
            found = [layer.few_rows_sums(rows) for layer in self.layers]
        else:
            found = [layer.sums_of_codes(part) for layer, part in zip(self.layers, self._codes(rows), strict=True)]
        joint = torch.cat([part[:, : layer.out_features] for layer, part in zip(self.layers, found, strict=True)], 1)
        if self.rank:
            joint = joint.addmm_(self._low(found), self.up)
        return rounded(self.output_bounds, joint).mul_(self.output_steps)

    def _codes(self, rows: Tensor) -> Tensor:
        """Return the codes of the rows on each layer's grid, (layers, n, d_in)."""
        steps = rounded(self.input_bounds, torch.div(rows, self.input_steps))
        return as_codes(steps, zero_point_for(rows))

    def _low(self, found: Sequence[Tensor]) -> Tensor:
        """Return what the layers' B multiply, (n, sum of ranks)."""
        parts = zip(self.layers, found, strict=True)
        hidden = torch.cat([part[:, layer.out_features :] for layer, part in parts if layer.rank], 1)
        return rounded(self.after_e, rounded(self.after_a, hidden).mul_(self.diagonal))


def _bounds(
    grids: Sequence[StaticQuantizer], counts: Sequence[int], device: torch.device, shape: Sequence[int] = (-1,)
) -> Bounds | None:
    """Return the lowest and the highest code, `counts` times for each grid; None if the grids round nothing.

    Numbers instead of tensors if all grids have the same, because clamping to them takes a fraction of the time.
    """
    if any(grid.bits == _UNQUANTIZED for grid in grids):
        return None
    if len({grid.level for grid in grids}) == 1:
        return -float(grids[0].level), float(grids[0].level)
    levels = [float(grid.level) for grid, count in zip(grids, counts, strict=True) for _ in range(count)]
    highest = torch.tensor(levels, device=device).view(*shape)
    return -highest, highest
