"""The layers' weights, learned or not, and the adapter's update as two matrices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import nn

from bayeslora.errors import BayesLoraError
from bayeslora.export.formats import upright
from bayeslora.export.gguf.blocks import Array, are_steps_exact, block_type, packed, repeated, rounded
from bayeslora.export.onnx.products import BYTE, array
from bayeslora.methods.layer import BayesLayer
from bayeslora.quantization import codes, grid_step, quantize
from bayeslora.vocabulary import BASE_WEIGHT, UNQUANTIZED

UNADAPTED = {"int8": Type.Q8_0, "float16": Type.F16, "float32": Type.F32}
"""Types of weights that have not learned a width, by the word for them."""


@dataclass(frozen=True)
class Weight:
    """The weight of a layer in the layout (d_out, d_in).

    Attributes:
        values: int8 codes if there are steps, otherwise float32.
        steps: (d_out, 1) or (d_out, groups), what a code of each row, or of each group of inputs, is multiplied by.
        bits: learned, or None.
    """

    values: Array
    steps: Array | None = None
    bits: int | None = None

    def type_for(self, plain: Type) -> Type:
        """Return the type in a file where weights without a learned width are `plain`."""
        columns = self.values.shape[1]
        if self.bits is None:
            return plain if plain != Type.Q8_0 or block_type(BYTE, columns) else Type.F16
        wide = Type.F32 if plain == Type.F32 else Type.F16
        if self.bits > BYTE:
            return wide
        if self.steps is not None and not are_steps_exact(self.steps):
            return Type.F32
        return block_type(self.bits, columns if self.steps is None else columns // self.steps.shape[1]) or wide

    def data(self, kind: Type, order: Array) -> Array:
        """Return the rows, in this order, as a file stores them."""
        if self.steps is None:
            return rounded(self.values[order], kind)
        if kind in (Type.F16, Type.F32):
            return rounded((self.values * repeated(self.steps, self.values.shape[1]))[order], kind)
        return packed(self.values[order], self.steps[order], kind)


def learned_weight(layer: nn.Module, name: str) -> Weight | None:
    """Return the weight that evaluation uses if its width was learned; None otherwise."""
    found = layer.packed_tensors(name) if isinstance(layer, BayesLayer) else None
    if found is None or BASE_WEIGHT not in found.widths:
        return None
    assert isinstance(layer, BayesLayer)
    weight = upright(layer.get_base_layer()).float()
    bits, bound = found.widths[BASE_WEIGHT], found.ranges[BASE_WEIGHT]
    if bits > BYTE:
        return Weight(array(quantize(weight, bound, bits)), None, bits)
    whole = codes(weight, bound, bits).to(torch.int8).cpu().numpy()
    steps = array(grid_step(bound, bits).reshape(1 if not bound.ndim else len(bound), -1))
    return Weight(whole, np.broadcast_to(steps, (len(whole), steps.shape[1])).copy(), bits)


def update_of(layer: nn.Module, name: str) -> tuple[Array, Array] | None:
    """Return A (r, d_in) and B (d_out, r) whose product is added to the weight; None where no rank is left."""
    if isinstance(layer, BayesLayer):
        a, diagonal, b = layer.factors(name)
        kept = diagonal != 0
        a, b, scaling = (diagonal.unsqueeze(1) * a)[kept], b[:, kept], layer.scaling[name]
    else:
        lora = cast(Any, layer)
        if lora.use_dora.get(name, False):
            raise BayesLoraError("the adapter scales columns (DoRA), but A and B cannot: give adapter='merged'")
        a, b, scaling = lora.lora_A[name].weight, lora.lora_B[name].weight, lora.scaling[name]
    return (array(a), array(b) * np.float32(scaling)) if len(a) else None


def widened(
    kinds: Mapping[str, Type], weights: Mapping[str, Weight], bits: Mapping[Type, tuple[int, int]]
) -> str | None:
    """Return which learned widths a file has in more bits, such as `2 bits as Q4_0 (30 layers)`, or None."""
    found: Counter[tuple[int, str]] = Counter()
    for path, kind in kinds.items():
        learned = weights[path].bits
        if learned is not None and learned < UNQUANTIZED and bits.get(kind, (UNQUANTIZED, 1))[0] != learned:
            found[learned, kind.name] += 1
    return ", ".join(f"{wide} bits as {kind} ({count})" for (wide, kind), count in sorted(found.items())) or None
