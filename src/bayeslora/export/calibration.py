r"""Static 8-bit grids for the inputs of linear layers without an adapter, from a few batches.

The ends of a grid are those with the least squared error of the layer's output,

$$ \min_{l, h} \sum_x \lVert W (Q_{l,h}(x) - x) \rVert^2, $$

over rows of these batches. A few columns of a transformer's inputs are many times as large as the others; how far a
grid must reach for them depends on the columns of $W$ that they meet.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bayeslora.export.formats import inputs_for, upright
from bayeslora.methods.layer import evaluation_mode
from bayeslora.quantization import FLOOR

CODES = 255
"""Steps between the ends of a grid of 8 bits."""
_SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
"""Of the lowest and of the highest value: ends that are tried."""

Activation = tuple[str, Literal["in", "out"]]
"""A layer's input or output: its path and which of them."""


@dataclass
class LayerInputs:
    """Inputs of a linear layer, some of them and the ends of all.

    Attributes:
        weight: (d_out, d_in).
        rows: some of its inputs, each (n, d_in).
        lowest: of all inputs and 0.
        highest: of all inputs and 0.
    """

    weight: Tensor
    rows: list[Tensor] = field(default_factory=list)
    lowest: float = 0.0
    highest: float = 0.0

    def add(self, rows: Tensor) -> None:
        """Note rows (n, d_in)."""
        self.lowest = min(self.lowest, float(rows.min()))
        self.highest = max(self.highest, float(rows.max()))
        self.rows.append(rows[:: -(-len(rows) // 256)].float())  # at most 256 of each batch

    def best_ends(self) -> tuple[float, float]:
        """Return the lowest and the highest value of the best grid, whose codes need not be symmetric around 0."""
        error = self._error()
        below = above = 1.0
        for _ in range(2):  # one end after the other, because few pairs are worth a try
            above = min(_SHARES, key=lambda share: error(below * self.lowest, share * self.highest))
            below = min(_SHARES, key=lambda share: error(share * self.lowest, above * self.highest))
        return below * self.lowest, above * self.highest

    def best_range(self) -> float:
        """Return the largest value of the best grid that is symmetric around 0."""
        error, most = self._error(), max(self.highest, -self.lowest)
        return max(most * min(_SHARES, key=lambda share: error(-share * most, share * most)), FLOOR)

    def _error(self) -> Callable[[float, float], float]:
        """Return the mean squared error of the layer's output as a function of the grid's ends."""
        rows, weight = torch.cat(self.rows), self.weight.float()

        def error(lowest: float, highest: float) -> float:
            step = max(highest - lowest, FLOOR) / CODES
            zero_point = round(-lowest / step)
            codes = torch.round(rows / step).clamp_(-zero_point, CODES - zero_point)
            return float(((codes * step - rows) @ weight.T).square().mean())

        return error


def inputs_of_plain_layers(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, LayerInputs]:
    """Return what each linear layer without an adapter reads, by its path in the base model.

    Args:
        model: a PEFT model, in evaluation mode.
        batches: of inputs; padding does not count.
    """
    modules = {path: module for path, module in cast(Any, model).get_base_model().named_modules()}
    plain = {path for path, module in modules.items() if type(module) in (nn.Linear, Conv1D)}
    wanted: set[Activation] = {(path, "in") for path in plain if not path.endswith(".base_layer")}
    found: dict[str, LayerInputs] = {}

    def see(key: Activation, x: Tensor) -> None:
        found.setdefault(key[0], LayerInputs(upright(modules[key[0]]))).add(x.flatten(0, -2))

    watch_layers(model, modules, wanted, batches, see)
    return found


@torch.no_grad()
def watch_layers(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    wanted: Collection[Activation],
    batches: Iterable[Mapping[str, Any]],
    see: Callable[[Activation, Tensor], None],
) -> None:
    """Run the batches, and show the wanted activations without padding to `see`."""
    mask: Tensor | None = None

    def watch(path: str, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pairs: tuple[tuple[Activation, Tensor], ...] = (((path, "in"), inputs[0]), ((path, "out"), output))
        for key, x in pairs:
            if key in wanted:
                see(key, x if mask is None or mask.shape != x.shape[:-1] else x[mask])

    with ExitStack() as hooks, evaluation_mode(model):
        for path in {path for path, _ in wanted}:
            hooks.enter_context(modules[path].register_forward_hook(partial(watch, path)))
        for batch in batches:
            inputs = inputs_for(model, batch) or {}
            mask = inputs["attention_mask"].bool() if "attention_mask" in inputs else None
            model(**inputs)
