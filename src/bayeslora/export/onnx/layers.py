r"""The layers with weights, in float32 or on integer codes.

A layer with learned widths computes, as in evaluation,

$$ y = Q_{out}\bigl( Q_w(W_0) Q_{in}(x) + b + c\, Q_b(B)\, Q_E( E \circ Q_A( Q_a(A) Q_{in}(x) ) ) \bigr). $$

`QuantizeLinear` and `DequantizeLinear` with the learned steps stand around the products with $W_0$ and $A$, so that a
runtime replaces them by products of integers. Weights are stored in four bits if their codes fit, and otherwise in
eight; a runtime widens them when it loads the graph. The code of an activation takes a byte: one of fewer bits is
clipped to its range, and one of eight bits has one code more than the grid, -128 steps where training clips at -127.
Grids of 16 bits are computed in float32, because runtimes lack products for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from ml_dtypes import int4
from numpy.typing import NDArray
from onnx import TensorProto
from torch import Tensor, nn

from bayeslora.export.onnx.graph import Graph
from bayeslora.methods.layer import BayesLayer, PackedTensors
from bayeslora.quantization import FLOOR, codes, grid_step
from bayeslora.vocabulary import ACTIVATIONS, BASE_WEIGHT, MATRICES, UNQUANTIZED

_BYTE = 8
_ZERO_POINT = 128
_FITS_INT4 = 7

Array = NDArray[Any]
Move = Callable[[str], str]
"""Adds nodes that put values, or codes, in another order, and returns the result's name."""


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
    zero_point: int = _ZERO_POINT

    @classmethod
    def of_range(cls, bound: float, bits: int) -> Grid:
        """Return the grid that is symmetric around 0."""
        # float32 as in training, because codes at rounding ties depend on the step's last digit.
        return cls(bits, float(grid_step(torch.tensor(bound), bits)))

    def rounded(self, graph: Graph, x: str, name: str, factor: float | Array = 1.0, move: Move | None = None) -> str:
        """Add the values that `x` is rounded to.

        Args:
            graph: to add to.
            x: values.
            name: of the result.
            factor: of the result: one number, or one for each column.
            move: puts values or codes in another order, before they become values again.
        """
        level = (1 << (self.bits - 1)) - 1
        if self.bits > _BYTE:
            steps = graph("Div", move(x) if move else x, graph.number(self.step), name=f"{name}.steps")
            steps = graph("Round", steps, name=f"{name}.codes")
            clipped = graph("Clip", steps, graph.number(-level), graph.number(level), name=f"{name}.clipped")
            scale = np.asarray(self.step * factor, dtype=np.float32)
            return graph("Mul", clipped, graph.constant(f"{name}.scale", scale), name=name)
        zero = graph.constant(f"uint8_{self.zero_point}", np.array(self.zero_point, dtype=np.uint8))
        found = graph("QuantizeLinear", x, graph.number(self.step), zero, name=f"{name}.codes")
        if self.bits < _BYTE:
            ends = [np.array(self.zero_point + end, dtype=np.uint8) for end in (-level, level)]
            bounds = [graph.constant(f"uint8_{end}", end) for end in ends]
            found = graph("Clip", found, *bounds, name=f"{name}.clipped")
        found = move(found) if move else found
        if isinstance(factor, float):
            return graph("DequantizeLinear", found, graph.number(self.step * factor), zero, name=name)
        values = graph("DequantizeLinear", found, graph.number(self.step), zero, name=f"{name}.values")
        return graph("Mul", values, graph.constant(f"{name}.factor", factor), name=name)


@dataclass(frozen=True)
class Product:
    """A linear layer on codes, as the graph computes it.

    Attributes:
        weight: codes (d_out, d_in), or values in float32.
        steps: (d_out,), one for each row of the weight: what a code or value is multiplied by.
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
        return bool(self.widths) and "in" in self.grids and self.grids["in"].bits <= _BYTE

    def with_bias_in_update(self) -> Product:
        """Return an equal product with an integer update that includes the bias, which takes one pass less.

        A rank is added whose A is zero and has a bias of one step. Its E and B take this step to the layer's bias.
        """
        a, a_steps, b, b_steps = (cast(Array, each) for each in (self.a, self.a_steps, self.b, self.b_steps))
        after_a, after_e = (self.grids[kind].step if kind in self.grids else 1.0 for kind in ("A_out", "E_out"))
        values = np.column_stack([b * b_steps[:, None], cast(Array, self.bias) / after_e]).astype(np.float32)
        return replace(
            self,
            bias=None,
            a=np.concatenate([a, np.zeros((1, a.shape[1]), dtype=a.dtype)]),
            a_steps=np.append(a_steps, after_a / self.grids["in"].step),
            a_bias=np.append(np.zeros(len(a)), after_a),
            diagonal=np.append(cast(Array, self.diagonal), after_e / after_a).astype(np.float32),
            b=values,
            b_steps=np.ones(len(values), dtype=np.float32),
        )

    def computed(self) -> Iterator[tuple[str, int, int]]:
        """Yield the kinds with learned bits, these bits, and those that the graph computes with."""
        is_integer = self.widths.get("in", UNQUANTIZED) <= _BYTE
        for kind, bits in self.widths.items():
            is_narrow = bits <= _BYTE and (kind in ACTIVATIONS or (is_integer and kind in (BASE_WEIGHT, "A")))
            if self.a is not None or kind in (BASE_WEIGHT, "in", "out"):
                yield kind, bits, _BYTE if is_narrow else UNQUANTIZED

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


def rounded(module: nn.Linear, grid: Grid | None) -> Product:
    """Return a layer without an adapter, with 8-bit codes, one range a row, and an input on `grid`."""
    bias = _bias(module.bias, module.out_features)
    return Product(*rounded_rows(module.weight), bias, {} if grid is None else {"in": grid})


def rounded_rows(weight: Tensor) -> tuple[Array, Array]:
    """Return 8-bit codes with one range a row, and the steps (rows,)."""
    bound = weight.detach().float().abs().amax(1, keepdim=True).clamp_min(FLOOR)
    return codes(weight, bound, _BYTE).to(torch.int8).cpu().numpy(), array(grid_step(bound, _BYTE).reshape(-1))


def plain(module: nn.Linear) -> Product:
    """Return a layer in float32."""
    weight = array(module.weight)
    return Product(weight, np.ones(len(weight), dtype=np.float32), _bias(module.bias, len(weight)))


def _coded(matrices: Mapping[str, Tensor], packed: PackedTensors, kind: str) -> tuple[Array, Array]:
    """Return codes, or values if the matrix is not quantized, and the step of each row."""
    matrix = matrices[kind]
    rows, bits = len(matrix), packed.widths.get(kind, UNQUANTIZED)
    if bits == UNQUANTIZED:
        return array(matrix), np.ones(rows, dtype=np.float32)
    bound = packed.ranges[kind]
    found = codes(matrix, bound, bits).to(torch.int8 if bits <= _BYTE else torch.int16)
    return found.cpu().numpy(), array(grid_step(bound, bits).reshape(-1).expand(rows))


def _bias(bias: Tensor | None, width: int) -> Array:
    return np.zeros(width, dtype=np.float32) if bias is None else array(bias)


def array(tensor: Tensor) -> NDArray[np.float32]:
    """Return the tensor as a float32 array."""
    return cast("NDArray[np.float32]", tensor.detach().float().cpu().contiguous().numpy())


class ProductLayers:
    """Writes linear layers and embeddings from their weights.

    Args:
        products: of every linear layer, by path.
        embeddings: values of the embeddings in float32, or their 8-bit codes and the step of each row, by path.
    """

    def __init__(self, products: Mapping[str, Product], embeddings: Mapping[str, Array | tuple[Array, Array]]) -> None:
        self.products, self.embeddings = products, embeddings

    def embedding(self, graph: Graph, path: str, ids: str) -> str:
        found = self.embeddings[path]
        if not isinstance(found, tuple):
            return graph("Gather", graph.constant(f"{path}.weight", found), ids, name=path)
        rows, steps = found
        gathered = graph("Gather", graph.constant(f"{path}.codes", rows), ids, name=f"{path}.gathered")
        scales = graph("Gather", graph.constant(f"{path}.steps", steps.reshape(-1, 1)), ids, name=f"{path}.scales")
        values = graph("Cast", gathered, name=f"{path}.values", to=TensorProto.FLOAT)
        return graph("Mul", values, scales, name=path)

    def linear(
        self,
        graph: Graph,
        path: str,
        x: str,
        factor: float = 1.0,
        before: Move | None = None,
        after: Move | None = None,
    ) -> str:
        product = self.products[path]
        into, out = product.grids.get("in"), product.grids.get("out")
        if out is None and factor != 1.0:
            product = product.scaled(factor)
        if into is not None:
            x = into.rounded(graph, x, f"{path}.input", move=before)
        elif before is not None:
            x = before(x)
        if product.has_coarse_sums and product.a is not None and product.a.dtype == np.int8:
            product = product.with_bias_in_update()
        bias = None if product.has_coarse_sums else product.bias
        found = _product(graph, path, x, product.weight, product.steps, into, bias)
        if product.a is not None:
            hidden = _product(graph, f"{path}.A", x, product.a, cast(Array, product.a_steps), into, product.a_bias)
            found = _update(graph, path, found, hidden, product)
        if product.bias is not None and bias is None:
            found = graph("Add", found, graph.constant(f"{path}.bias", product.bias), name=f"{path}.biased")
        if out is not None:
            return out.rounded(graph, found, f"{path}.output", factor, after)
        return after(found) if after else found

    @property
    def are_learned(self) -> bool:
        """True if a layer has learned widths."""
        return any(product.widths for product in self.products.values())

    @property
    def widened(self) -> str | None:
        """Learned widths that the graph computes in more bits, such as `weight 2 and 4 as 8, B 4 as 32`, or None."""
        found: dict[tuple[str, int], set[int]] = {}
        for product in self.products.values():
            for kind, bits, wide in product.computed():
                if bits < wide:
                    found.setdefault((kind, wide), set()).add(bits)
        order = (BASE_WEIGHT, *MATRICES, *ACTIVATIONS)
        listed = sorted(found, key=lambda each: (order.index(each[0]), each[1]))
        return ", ".join(f"{kind} {_joined(found[kind, wide])} as {wide}" for kind, wide in listed) or None

    @property
    def unadapted(self) -> str:
        """Form of the layers without an adapter: `float32`, `int8 weights`, or `int8 weights and inputs`."""
        rounded = [each for each in self.products.values() if not each.widths and each.weight.dtype == np.int8]
        if not rounded:
            return "float32"
        return "int8 weights and inputs" if any(each.grids for each in rounded) else "int8 weights"


def _joined(numbers: Iterable[int]) -> str:
    *first, last = map(str, sorted(numbers))
    return f"{', '.join(first)} and {last}" if first else last


def _product(
    graph: Graph, path: str, x: str, weight: Array, steps: Array, grid: Grid | None, bias: Array | None
) -> str:
    """Add a product with a weight: of integers if the input is on a `grid` of 8 bits, otherwise of values.

    Values of codes are computed once, when a runtime loads the graph. A bias of integers is rounded to the step of the
    sums.
    """
    if grid is None or grid.bits > _BYTE or weight.dtype != np.int8:
        terms = [_values(graph, f"{path}.weight", weight, steps)]
        terms += [] if bias is None else [graph.constant(f"{path}.bias", bias)]
    else:
        terms = [_by_row(graph, f"{path}.weight", weight, steps)]
        if bias is not None:
            sums, limits = grid.step * steps, np.iinfo(np.int32)
            whole = np.clip(np.round(bias / sums), limits.min, limits.max).astype(np.int32)
            terms.append(_by_row(graph, f"{path}.bias", whole, sums))
    return graph("Gemm", x, *terms, name=f"{path}.products", transB=1)


def _by_row(graph: Graph, path: str, rows: Array, steps: Array) -> str:
    """Add values from codes with one step and, as runtimes expect, one zero point for each row."""
    zeros = graph.constant(f"{rows.dtype.name}_zeros_{len(steps)}", np.zeros(len(steps), dtype=rows.dtype))
    scales = graph.constant(f"{path}.steps", steps.astype(np.float32))
    return graph("DequantizeLinear", _stored(graph, path, rows), scales, zeros, name=path, axis=0)


def _update(graph: Graph, path: str, base: str, hidden: str, product: Product) -> str:
    """Add what follows A, on `hidden` (n, r), to the output of the base weight."""
    after_a, after_e = (product.grids.get(kind) for kind in ("A_out", "E_out"))
    diagonal = cast(Array, product.diagonal)
    if after_a is not None:
        hidden = after_a.rounded(graph, hidden, f"{path}.E.products", diagonal)
    else:
        hidden = graph("Mul", hidden, graph.constant(f"{path}.E", diagonal), name=f"{path}.E.products")
    if after_e is not None:
        hidden = after_e.rounded(graph, hidden, f"{path}.B.input")
    b = _values(graph, f"{path}.B", cast(Array, product.b), cast(Array, product.b_steps))
    return graph("Gemm", hidden, b, base, transB=1, name=f"{path}.updated")


def _values(graph: Graph, path: str, weight: Array, steps: Array) -> str:
    """Add the values of a matrix, stored as they are or as codes."""
    if weight.dtype == np.float32:
        return graph.constant(path, weight * steps[:, None])
    values = graph("Cast", _stored(graph, path, weight), name=f"{path}.floats", to=TensorProto.FLOAT)
    return graph("Mul", values, graph.constant(f"{path}.steps", steps[:, None]), name=path)


def _stored(graph: Graph, path: str, weight: Array) -> str:
    """Add codes in as few bits as ONNX has for them, and return them in at least 8."""
    if weight.dtype != np.int8 or np.abs(weight).max(initial=0) > _FITS_INT4:
        return graph.constant(f"{path}.codes", weight)
    packed = graph.constant(f"{path}.packed", weight.astype(int4))
    return graph("Cast", packed, name=f"{path}.codes", to=TensorProto.INT8)
