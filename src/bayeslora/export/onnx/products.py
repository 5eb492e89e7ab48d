r"""Linear layers as the graph has them: in float32, or as integer codes with the grids of their activations.

A layer with learned widths computes, as in evaluation,

$$ y = Q_{out}\bigl( Q_w(W_0) Q_{in}(x) + b + c\, Q_b(B)\, Q_E( E \circ Q_A( Q_a(A) Q_{in}(x) ) ) \bigr). $$
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bayeslora.export.formats import upright
from bayeslora.methods.layer import BayesLayer, PackedTensors
from bayeslora.quantization import FLOOR, codes, grid_step
from bayeslora.vocabulary import ACTIVATIONS, BASE_WEIGHT, MATRICES, UNQUANTIZED

BYTE = 8
BLOCK = 32
"""Inputs that `MatMulNBits` multiplies, and rounds, at once: more of them lose more where they have outliers."""
CENTER = 128
"""Zero point of the grids that are symmetric around 0, as all learned ones are."""

Array = NDArray[Any]


@dataclass(frozen=True)
class Grid:
    """The static grid of an activation.

    Attributes:
        bits: at most 16.
        step: distance of two values.
        zero_point: code of 0, from 0 to 255; without effect for more than 8 bits.
    """

    bits: int
    step: float
    zero_point: int = CENTER

    @classmethod
    def of_range(cls, bound: float, bits: int) -> Grid:
        """Return the grid that is symmetric around 0."""
        # float32 as in training, because codes at rounding ties depend on the step's last digit.
        return cls(bits, float(grid_step(torch.tensor(bound), bits)))

    @property
    def level(self) -> int:
        """Largest code, for a grid that is symmetric around 0."""
        return (1 << (self.bits - 1)) - 1

    @property
    def is_byte(self) -> bool:
        """True if a code takes one byte."""
        return self.bits <= BYTE


@dataclass(frozen=True)
class Product:
    """A linear layer on codes, as the graph computes it.

    Attributes:
        weight: codes (d_out, d_in), or values in float32.
        steps: (d_out,), one for each row of the weight, or (d_out, groups), one for each group of its inputs: what a
            code or value is multiplied by.
        bias: (d_out,), or None if the update includes it.
        grids: by kind of activation; kinds that are not quantized are missing.
        widths: learned bits by kind; empty for a layer without an adapter.
        a: (r, d_in), codes or values, with `a_steps` (r,) and perhaps a bias `a_bias` (r,).
        diagonal: (r,), values of E.
        b: (d_out, r), codes or values, with `b_steps` (d_out,) that include the scaling.
    """

    weight: Array
    steps: Array
    bias: Array | None
    grids: Mapping[str, Grid] = field(default_factory=dict)
    widths: Mapping[str, int] = field(default_factory=dict)
    a: Array | None = None
    a_steps: Array | None = None
    a_bias: Array | None = None
    diagonal: Array | None = None
    b: Array | None = None
    b_steps: Array | None = None

    @property
    def has_coarse_sums(self) -> bool:
        """True for a product of codes that may be few, whose sums have wide steps: no bias is a multiple of them."""
        return bool(self.widths) and "in" in self.grids and self.grids["in"].is_byte

    @property
    def is_grouped(self) -> bool:
        """True if the rows of the weight have groups with steps of their own, which no product of integers has."""
        return self.steps.ndim == 2

    @property
    def fits_blocks(self) -> bool:
        """True if every block of inputs has one step in each row."""
        return not self.is_grouped or self.weight.shape[1] // self.steps.shape[1] % BLOCK == 0

    def computed(self, *, in_blocks: bool) -> Iterator[tuple[str, int, int]]:
        """Yield the kinds with learned bits, these bits, and those that the graph computes with.

        Args:
            in_blocks: as of `ProductLayers`.
        """
        is_integer = self.widths.get("in", UNQUANTIZED) <= BYTE
        in_codes = (BASE_WEIGHT, "A") if not self.is_grouped else ("A",)
        for kind, bits in self.widths.items():
            is_narrow = bits <= BYTE and (kind in ACTIVATIONS or (is_integer and kind in in_codes))
            wide = BYTE if is_narrow else UNQUANTIZED
            if kind == BASE_WEIGHT and bits <= BYTE and in_blocks and self.fits_blocks and not is_integer:
                wide = max(bits, BYTE // 2)
            if self.a is not None or kind in (BASE_WEIGHT, "in", "out"):
                yield kind, bits, wide

    def scaled(self, factor: float) -> Product:
        """Return the product whose output is this one's times a factor, for an output that is not quantized."""
        number = np.float32(factor)
        b_steps = None if self.b_steps is None else self.b_steps * number
        bias = None if self.bias is None else self.bias * number
        return replace(self, steps=self.steps * number, bias=bias, b_steps=b_steps)


def learned(layer: BayesLayer, name: str) -> Product:
    """Return the product of a layer with the adapter `name`, without its closed ranks, as evaluation uses it."""
    packed = cast(PackedTensors, layer.packed_tensors(name))
    weight = layer.get_base_weight().detach()
    matrices = {BASE_WEIGHT: weight.T if layer.is_transposed else weight, **packed.matrices}
    grids = {
        kind: Grid.of_range(float(packed.ranges[kind]), packed.widths[kind])
        for kind in ACTIVATIONS
        if packed.widths.get(kind, UNQUANTIZED) < UNQUANTIZED
    }
    bias = cast("Tensor | None", layer.get_base_layer().bias)
    product = Product(*_coded(matrices, packed, BASE_WEIGHT), _bias(bias, layer.out_features), grids, packed.widths)
    if not len(packed.matrices["E"]):
        return product
    (a, a_steps), (e, e_steps), (b, b_steps) = (_coded(matrices, packed, kind) for kind in MATRICES)
    scaling = np.float32(layer.scaling[name])
    return replace(product, a=a, a_steps=a_steps, diagonal=e * e_steps, b=b, b_steps=b_steps * scaling)


def rounded(module: nn.Linear | Conv1D, grid: Grid | None) -> Product:
    """Return a layer without an adapter, with 8-bit codes, one range a row, and an input on `grid`."""
    weight = upright(module)
    return Product(*rounded_rows(weight), _bias(module.bias, len(weight)), {} if grid is None else {"in": grid})


def rounded_rows(weight: Tensor) -> tuple[Array, Array]:
    """Return 8-bit codes with one range a row, and the steps (rows,): numbers of half precision, if not too large."""
    values = array(weight)
    level = (1 << (BYTE - 1)) - 1
    steps = _half_above(np.maximum(np.abs(values).max(1), FLOOR) / np.float32(level))
    return np.clip(np.round(values / steps[:, None]), -level, level).astype(np.int8), steps


def _half_above(steps: NDArray[np.float32]) -> NDArray[np.float32]:
    """Round steps up to half precision; those that are too large for it stay as they are."""
    with np.errstate(over="ignore"):
        half = steps.astype(np.float16)
        above = np.where(half < steps, np.nextafter(half, np.float16(np.inf)), half)
    return np.where(np.isfinite(above), above.astype(np.float32), steps)


def plain(module: nn.Linear | Conv1D) -> Product:
    """Return a layer in float32."""
    weight = array(upright(module))
    return Product(weight, np.ones(len(weight), dtype=np.float32), _bias(module.bias, len(weight)))


def _coded(matrices: Mapping[str, Tensor], packed: PackedTensors, kind: str) -> tuple[Array, Array]:
    """Return codes, or values if the matrix is not quantized, and the step of each row."""
    matrix = matrices[kind]
    rows, bits = len(matrix), packed.widths.get(kind, UNQUANTIZED)
    if bits == UNQUANTIZED:
        return array(matrix), np.ones(rows, dtype=np.float32)
    bound = packed.ranges[kind]
    found = codes(matrix, bound, bits).to(torch.int8 if bits <= BYTE else torch.int16)
    steps = grid_step(bound, bits)
    return found.cpu().numpy(), array(steps if steps.numel() > rows else steps.reshape(-1).expand(rows))


def _bias(bias: Tensor | None, width: int) -> Array:
    return np.zeros(width, dtype=np.float32) if bias is None else array(bias)


def array(tensor: Tensor) -> NDArray[np.float32]:
    """Return the tensor as a float32 array."""
    return cast("NDArray[np.float32]", tensor.detach().float().cpu().contiguous().numpy())
