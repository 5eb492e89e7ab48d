"""The layers with weights, written into a graph.

`QuantizeLinear` and `DequantizeLinear` with the learned steps stand around the products with $W_0$ and $A$, so that a
runtime replaces them by products of integers. Weights are stored in four bits if their codes fit, and otherwise in
eight; a runtime widens them when it loads the graph. The code of an input or output takes a byte: one of fewer bits is
clipped to its range, and one of eight bits has one code more than the grid, -128 steps where training clips at -127.
Grids of 16 bits are computed in float32, because runtimes lack products for them.

Layers that read the same rows, such as query, key and value, are written side by side as one layer. A runtime then
needs one node for their updates, roundings and moves where it would need three, and the time of one sentence is
mostly that of starting nodes. Products with $W_0$ stay apart where the grids of the inputs differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import cast

import numpy as np
from ml_dtypes import int4
from onnx import TensorProto

from bayeslora.export.onnx.graph import RUNTIME_DOMAIN, Graph
from bayeslora.export.onnx.products import BLOCK, BYTE, CENTER, Array, Grid, Product
from bayeslora.vocabulary import ACTIVATIONS, BASE_WEIGHT, MATRICES

_FITS_INT4 = 7
_HALF_BYTE = 4
_ROUNDS_INPUTS = 4  # accuracy level of `MatMulNBits` at which inputs are rounded, the only fast one for 8 bits

Move = Callable[[str], str]
"""Adds nodes that put values, or codes, in another order, and returns the result's name."""
NamedMove = Callable[[str, str], str]
"""The same, of values and a name for the nodes."""


@dataclass(frozen=True)
class Part:
    """A layer among those that are written side by side.

    Attributes:
        path: of the layer.
        factor: of its output.
        share: its part of the axis 1 of the outputs, after they were moved.
        turn: puts its output alone in another order.
    """

    path: str
    factor: float = 1.0
    share: int = 1
    turn: Move | None = None


Embedding = Array | tuple[Array, Array] | str
"""Values in float32; 8-bit codes and the step of each row; or the path of the linear layer with the same weight."""


class ProductLayers:
    """Writes linear layers and embeddings from their weights.

    Args:
        products: of every linear layer, by path.
        embeddings: by path.
        in_blocks: whether products of codes with inputs that are on no grid are left to onnxruntime's `MatMulNBits`.
            It reads weights of 4 and 8 bits as they are, which pays where a few rows are multiplied at a time, and
            rounds the inputs to 8 bits, in blocks.
    """

    def __init__(
        self, products: Mapping[str, Product], embeddings: Mapping[str, Embedding], *, in_blocks: bool = False
    ) -> None:
        self.products, self.embeddings, self.in_blocks = products, embeddings, in_blocks

    def width(self, path: str) -> int:
        """Return the number of outputs of the linear layer at `path`."""
        return len(self.products[path].steps)

    def embedding(self, graph: Graph, path: str, ids: str) -> str:
        """Add the embedding at `path` for `ids` of any shape and return (..., width)."""
        found = self.embeddings[path]
        if isinstance(found, str):
            return self._tied(graph, path, found, ids)
        if not isinstance(found, tuple):
            return graph("Gather", graph.constant(f"{path}.weight", found), ids, name=path)
        rows, steps = found
        gathered = graph("Gather", graph.constant(f"{path}.codes", rows), ids, name=f"{path}.gathered")
        scales = graph("Gather", graph.steps(f"{path}.steps", steps.reshape(-1, 1)), ids, name=f"{path}.scales")
        values = graph("Cast", gathered, name=f"{path}.values", to=TensorProto.FLOAT)
        return graph("Mul", values, scales, name=path)

    def _tied(self, graph: Graph, path: str, head: str, ids: str) -> str:
        """Add the embedding that has the weight of the layer `head`, from the same constants."""
        product = self.products[head]
        if product.weight.dtype == np.float32:
            return graph("Gather", graph.constant(f"{head}.weight", product.weight), ids, name=path)
        columns = product.weight.shape[1]
        codes, _ = _blocks(graph, head, product.weight, product.steps, BYTE)
        rows = graph("Gather", codes, ids, name=f"{path}.gathered")
        shape = graph("Shape", ids, name=f"{path}.shape")
        sizes = graph("Concat", shape, graph.integers(-1), name=f"{path}.sizes", axis=0)
        rows = graph("Reshape", rows, sizes, name=f"{path}.rows")
        if columns % BLOCK:
            limits = (graph.integers(each) for each in (0, columns, 2))
            rows = graph("Slice", rows, *limits, name=f"{path}.columns")
        zero = graph.constant(f"uint8_{CENTER}", np.array(CENTER, dtype=np.uint8))
        values = graph("DequantizeLinear", rows, graph.number(1.0), zero, name=f"{path}.values")
        steps = graph.constant(f"{path}.steps", product.steps.reshape(-1, 1).astype(np.float32))
        return graph("Mul", values, graph("Gather", steps, ids, name=f"{path}.scales"), name=path)

    def linear(self, graph: Graph, path: str, x: str, before: Move | None = None) -> str:
        """Add the linear layer at `path` and return its output.

        Args:
            graph: to add to.
            path: of the layer.
            x: rows (n, d_in), or what `before` makes rows of.
            before: puts the input in another order; on codes, which are smaller, if there are any.
        """
        return self.linears(graph, path, [Part(path)], x, before=before)[0]

    def linears(
        self,
        graph: Graph,
        name: str,
        parts: Sequence[Part],
        x: str,
        before: Move | None = None,
        after: NamedMove | None = None,
    ) -> list[str]:
        """Add layers with the same input and return their outputs.

        Args:
            graph: to add to.
            name: of the nodes that the layers share.
            parts: the layers.
            x: rows (n, d_in), or what `before` makes rows of.
            before: puts the input in another order.
            after: does the same with the outputs, of one layer or of several in one row. Both on codes, which are
                smaller, if there are any.
        """
        products = [self.products[part.path] for part in parts]
        source = _Input(graph, x, before)
        if _fit_together(products):
            return _Joint(graph, name, parts, products, in_blocks=self.in_blocks).write(source, after)
        apart = [
            _Joint(graph, part.path, [part], [product], in_blocks=self.in_blocks).write(source, after)
            for part, product in zip(parts, products, strict=True)
        ]
        return [output for (output,) in apart]

    @property
    def are_learned(self) -> bool:
        """True if a layer has learned widths."""
        return any(product.widths for product in self.products.values())

    @property
    def widened(self) -> str | None:
        """Learned widths that the graph computes in more bits, such as `weight 2 and 4 as 8, B 4 as 32`, or None."""
        found: dict[tuple[str, int], set[int]] = {}
        for product in self.products.values():
            for kind, bits, wide in product.computed(in_blocks=self.in_blocks):
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


def _fit_together(products: Sequence[Product]) -> bool:
    """Return whether the layers round the same things, those in 16 bits left apart."""
    outputs = {product.grids["out"].is_byte if "out" in product.grids else None for product in products}
    adapted = [product for product in products if product.a is not None]
    hidden = ({kind in product.grids for product in adapted} for kind in ("A_out", "E_out"))
    return len(products) == 1 or (len(outputs) == 1 and outputs != {False} and all(len(each) <= 1 for each in hidden))


class _Input:
    """Rows `x` that layers read, on each grid once; `before` puts their values or codes in another order."""

    def __init__(self, graph: Graph, x: str, before: Move | None) -> None:
        self.graph, self.x, self.before = graph, x, before
        self._found: dict[Grid | None, tuple[str, str]] = {}

    def forms(self, grid: Grid | None, path: str) -> tuple[str, str]:
        """Return the codes of the rows on the grid, and the rows, rounded to the grid if there is one.

        Nodes are named after `path`, the first to ask.
        """
        if grid not in self._found:
            self._found[grid] = self._made(grid, f"{path}.input")
        return self._found[grid]

    def _made(self, grid: Grid | None, name: str) -> tuple[str, str]:
        graph = self.graph
        if grid is not None and grid.is_byte:
            found = _byte_codes(graph, self.x, grid.step, grid, name)
            found = self.before(found) if self.before else found
            return found, _from_bytes(graph, found, grid.step, grid.zero_point, name)
        x = self.before(self.x) if self.before else self.x
        if grid is None:
            return x, x
        steps = graph("Div", x, graph.number(grid.step), name=f"{name}.steps")
        found = _rounded(graph, steps, [grid.level], name)
        return found, graph("Mul", found, graph.number(grid.step), name=name)


class _Joint:
    """Layers side by side, whose outputs are columns of one matrix; `name` is that of the nodes that they share."""

    def __init__(
        self, graph: Graph, name: str, parts: Sequence[Part], products: Sequence[Product], *, in_blocks: bool
    ) -> None:
        self.graph, self.name, self.parts, self.in_blocks = graph, name, parts, in_blocks
        self.outputs = [product.grids.get("out") for product in products]
        self.products = [
            product.scaled(part.factor if out is None else 1 / out.step)
            for part, product, out in zip(parts, products, self.outputs, strict=True)
        ]
        self.members = [(part.path, product) for part, product in zip(parts, self.products, strict=True)]

    def write(self, source: _Input, after: NamedMove | None) -> list[str]:
        """Add the layers and return the output of each."""
        biases = [product.bias if product.has_coarse_sums else None for product in self.products]
        late = None
        if any(bias is not None for bias in biases):
            zeros = (np.zeros(len(product.steps), dtype=np.float32) for product in self.products)
            late = np.concatenate([zero if bias is None else bias for zero, bias in zip(zeros, biases, strict=True)])
        found = self._bases(source)
        if any(product.a is not None for product in self.products):
            found = self._updated(found, source, late)
        elif late is not None:
            bias = self.graph.constant(f"{self.name}.bias", late)
            found = self.graph("Add", found, bias, name=f"{self.name}.biased")
        return self._apart(found, after)

    def _bases(self, source: _Input) -> str:
        """Add the products with the base weights; those with the same input are one."""
        found = []
        for (grid, *_), same in groupby(self.members, lambda each: _stored_as(each[1])):
            members = list(same)
            path, first = members[0]
            products = [product for _, product in members]
            bias = None
            if not first.has_coarse_sums:
                bias = np.concatenate([cast(Array, product.bias) for product in products])
            weight = np.concatenate([product.weight for product in products])
            steps = np.concatenate([product.steps for product in products])
            _, x = source.forms(grid, path)
            in_blocks = self.in_blocks and first.fits_blocks and (grid is None or not grid.is_byte)
            if in_blocks and weight.dtype == np.int8:
                found.append(_block_product(self.graph, path, x, weight, steps, bias))
            else:
                found.append(_product(self.graph, path, x, weight, steps, grid, bias))
        return self._side_by_side(found, "bases")

    def _side_by_side(self, found: Sequence[str], name: str) -> str:
        return found[0] if len(found) == 1 else self.graph("Concat", *found, name=f"{self.name}.{name}", axis=1)

    def _updated(self, base: str, source: _Input, late: Array | None) -> str:
        """Add the low-rank updates to the base products; `late` is a bias that they take with them.

        The bias is a rank more, whose A is zero and has the bias 1, and whose E is 1.
        """
        graph, name = self.graph, self.name
        adapted = [(path, product) for path, product in self.members if product.a is not None]
        hidden = self._hidden(source, adapted, has_bias=late is not None)
        after_a, after_e = ([product.grids.get(kind) for _, product in adapted] for kind in ("A_out", "E_out"))
        ranks = [len(cast(Array, product.a)) for _, product in adapted]
        more = 0 if late is None else 1
        if after_a[0] is not None:
            hidden = _rounded(graph, hidden, _levels(after_a, ranks, more), f"{name}.A_out")
        factors = [
            cast(Array, product.diagonal) * (_step(a) / _step(e))
            for (_, product), a, e in zip(adapted, after_a, after_e, strict=True)
        ]
        diagonal = np.concatenate([*factors, np.ones(more)]).astype(np.float32)
        hidden = graph("Mul", hidden, graph.constant(f"{name}.E", diagonal), name=f"{name}.E.products")
        if after_e[0] is not None:
            hidden = _rounded(graph, hidden, _levels(after_e, ranks, more), f"{name}.E_out")
        return graph("Gemm", hidden, self._b(ranks, late), base, transB=1, name=f"{name}.updated")

    def _hidden(self, source: _Input, adapted: Sequence[tuple[str, Product]], *, has_bias: bool) -> str:
        """Add the products with A in steps of the grids after A, (n, r), with a column of ones if asked for."""
        grids = [product.grids.get("in") for _, product in adapted]
        weights = [cast(Array, product.a) for _, product in adapted]
        steps = [cast(Array, p.a_steps) / np.float32(_step(p.grids.get("A_out"))) for _, p in adapted]
        are_codes = all(grid is not None and grid.is_byte for grid in grids)
        if len(set(grids)) > 1 and are_codes and all(weight.dtype == np.int8 for weight in weights):
            return self._hidden_of_codes(source, adapted, steps, has_bias=has_bias)
        found = []
        kinds = list(zip(grids, (weight.dtype for weight in weights), strict=True))
        for kind in dict.fromkeys(kinds):
            mine = [place for place, each in enumerate(kinds) if each == kind]
            path, grid, is_last = adapted[mine[0]][0], kind[0], kind == kinds[-1]
            own_weights, own_steps = [weights[i] for i in mine], [steps[i] for i in mine]
            _, x = source.forms(grid, path)
            found.append(self._a_product(f"{path}.A", x, own_weights, own_steps, grid, has_bias=has_bias and is_last))
        return self._side_by_side(found, "A.products")

    def _hidden_of_codes(
        self, source: _Input, adapted: Sequence[tuple[str, Product]], steps: Sequence[Array], *, has_bias: bool
    ) -> str:
        """Add one product for inputs on several grids: their codes side by side, and each A with zeros for others."""
        grids = [product.grids["in"] for _, product in adapted]
        weights = [cast(Array, product.a) for _, product in adapted]
        known, width = list(dict.fromkeys(grids)), weights[0].shape[1]
        paths = {grid: path for (path, _), grid in reversed(list(zip(adapted, grids, strict=True)))}
        codes = self._side_by_side([source.forms(grid, paths[grid])[0] for grid in known], "codes")
        x = _from_bytes(self.graph, codes, 1.0, CENTER, f"{self.name}.inputs")
        wide = [
            np.pad(weight, ((0, 0), (width * before, width * (len(known) - 1 - before))))
            for weight, before in zip(weights, map(known.index, grids), strict=True)
        ]
        scaled = [step * np.float32(grid.step) for step, grid in zip(steps, grids, strict=True)]
        return self._a_product(f"{self.name}.A", x, wide, scaled, Grid(BYTE, 1.0), has_bias=has_bias)

    def _a_product(
        self, path: str, x: str, weights: list[Array], steps: list[Array], grid: Grid | None, *, has_bias: bool
    ) -> str:
        weight, scale, bias = np.concatenate(weights), np.concatenate(steps), None
        if has_bias:
            weight = np.concatenate([weight, np.zeros((1, weight.shape[1]), dtype=weight.dtype)])
            scale = np.append(scale, np.float32(1 / _step(grid)))
            bias = np.append(np.zeros(len(weight) - 1, dtype=np.float32), np.float32(1))
        return _product(self.graph, path, x, weight, scale, grid, bias)

    def _b(self, ranks: Sequence[int], late: Array | None) -> str:
        """Add B of all layers, (sum of d_out, sum of r), which has zeros where rank and output are of two layers."""
        first, total = 0, sum(ranks)
        blocks: list[Array] = []
        steps: list[Array] = []
        for product in self.products:
            width = len(product.steps)
            if product.b is None:
                blocks.append(np.zeros((width, total), dtype=np.int8))
                steps.append(np.ones(width, dtype=np.float32))
                continue
            own = product.b.shape[1]
            blocks.append(np.pad(product.b, ((0, 0), (first, total - first - own))))
            steps.append(cast(Array, product.b_steps) * np.float32(_step(product.grids.get("E_out"))))
            first += own
        kinds = {block.dtype for block, product in zip(blocks, self.products, strict=True) if product.b is not None}
        if len(kinds) > 1:
            blocks = [block * step[:, None] for block, step in zip(blocks, steps, strict=True)]
            steps = [np.ones_like(step) for step in steps]
        (kind,) = kinds if len(kinds) == 1 else (np.dtype(np.float32),)
        values = np.concatenate([block.astype(kind) for block in blocks])
        b = _values(self.graph, f"{self.name}.B", values, np.concatenate(steps))
        if late is None:
            return b
        bias = self.graph.constant(f"{self.name}.bias", late[:, None])
        return self.graph("Concat", b, bias, name=f"{self.name}.B.biased", axis=1)

    def _apart(self, found: str, after: NamedMove | None) -> list[str]:
        """Add the rounding of the outputs, the moves, and the parting."""
        graph, name, grids = self.graph, self.name, self.outputs
        is_byte = grids[0] is not None and grids[0].is_byte
        is_clipped = len({grid.bits for grid in grids if grid is not None}) == 1
        if is_byte:
            bits = cast(Grid, grids[0]).bits if is_clipped else BYTE
            found = _byte_codes(graph, found, 1.0, Grid(bits, 1.0), f"{name}.output")
        elif grids[0] is not None:
            found = _rounded(graph, found, [grids[0].level], f"{name}.output")
        found = after(found, name) if after else found
        if len(self.parts) == 1:
            outputs = [found]
        else:
            shares = graph.integers(*(part.share for part in self.parts))
            names = [f"{part.path}.part" for part in self.parts]
            outputs = list(graph.several("Split", found, shares, outputs=names, axis=1))
        result = []
        for part, grid, output in zip(self.parts, grids, outputs, strict=True):
            if is_byte and not is_clipped:
                output = _clipped_bytes(graph, output, cast(Grid, grid), f"{part.path}.output")
            output = part.turn(output) if part.turn else output
            if grid is not None:
                step, values = grid.step * part.factor, f"{part.path}.output"
                if grid.is_byte:
                    output = _from_bytes(graph, output, step, grid.zero_point, values)
                else:
                    output = graph("Mul", output, graph.number(step), name=values)
            result.append(output)
        return result


def _stored_as(product: Product) -> tuple[Grid | None, str, bool, bool]:
    """Return what products with the base weight share that are one: input, type, width and groups of the weight."""
    return product.grids.get("in"), product.weight.dtype.name, _fits_four_bits(product.weight), product.is_grouped


def _fits_four_bits(weight: Array) -> bool:
    return weight.dtype == np.int8 and bool(np.abs(weight).max(initial=0) <= _FITS_INT4)


def _step(grid: Grid | None) -> float:
    return 1.0 if grid is None else grid.step


def _levels(grids: Sequence[Grid | None], ranks: Sequence[int], more: int) -> list[int]:
    """Return the largest code of each column, and of `more` columns of ones."""
    levels = [cast(Grid, grid).level for grid, rank in zip(grids, ranks, strict=True) for _ in range(rank)]
    return levels + [levels[-1]] * more


def _rounded(graph: Graph, steps: str, levels: Sequence[int], name: str) -> str:
    """Round a number of steps to a code that is at most the level, or the level of its column."""
    found = graph("Round", steps, name=f"{name}.codes")
    if len(set(levels)) == 1:
        return graph("Clip", found, graph.number(-levels[0]), graph.number(levels[0]), name=f"{name}.clipped")
    bounds = np.array(levels, dtype=np.float32)
    found = graph("Min", found, graph.constant(f"{name}.upper", bounds), name=f"{name}.below")
    return graph("Max", found, graph.constant(f"{name}.lower", -bounds), name=f"{name}.clipped")


def _byte_codes(graph: Graph, x: str, step: float, grid: Grid, name: str) -> str:
    """Add the code of values on a grid of at most 8 bits, in the unit `step`."""
    zero = graph.constant(f"uint8_{grid.zero_point}", np.array(grid.zero_point, dtype=np.uint8))
    codes = graph("QuantizeLinear", x, graph.number(step), zero, name=f"{name}.codes")
    return _clipped_bytes(graph, codes, grid, name)


def _clipped_bytes(graph: Graph, codes: str, grid: Grid, name: str) -> str:
    if grid.bits == BYTE:
        return codes
    ends = [np.array(grid.zero_point + end, dtype=np.uint8) for end in (-grid.level, grid.level)]
    return graph("Clip", codes, *(graph.constant(f"uint8_{end}", end) for end in ends), name=f"{name}.clipped")


def _from_bytes(graph: Graph, codes: str, step: float, zero_point: int, name: str) -> str:
    zero = graph.constant(f"uint8_{zero_point}", np.array(zero_point, dtype=np.uint8))
    return graph("DequantizeLinear", codes, graph.number(step), zero, name=name)


def _product(
    graph: Graph, path: str, x: str, weight: Array, steps: Array, grid: Grid | None, bias: Array | None
) -> str:
    """Add a product with a weight: of integers if the input is on a `grid` of 8 bits, otherwise of values.

    Values of codes are computed once, when a runtime loads the graph. A bias of integers is rounded to the step of the
    sums.
    """
    if grid is None or not grid.is_byte or weight.dtype != np.int8 or steps.ndim == 2:
        terms = [_values(graph, f"{path}.weight", weight, steps)]
        terms += [] if bias is None else [graph.constant(f"{path}.bias", bias)]
    else:
        scales = graph.steps(f"{path}.weight.steps", steps.astype(np.float32))
        terms = [_by_row(graph, f"{path}.weight", weight, scales)]
        if bias is not None:
            limits = np.iinfo(np.int32)
            whole = np.clip(np.round(bias / (np.float32(grid.step) * steps)), limits.min, limits.max).astype(np.int32)
            sums = graph("Mul", scales, graph.number(grid.step), name=f"{path}.bias.steps")
            terms.append(_by_row(graph, f"{path}.bias", whole, sums))
    return graph("Gemm", x, *terms, name=f"{path}.products", transB=1)


def _block_product(graph: Graph, path: str, x: str, weight: Array, steps: Array, bias: Array | None) -> str:
    """Add a product with codes of 4 or 8 bits, each block of a row with the row's step."""
    bits = _HALF_BYTE if _fits_four_bits(weight) else BYTE
    product = graph(
        "MatMulNBits",
        x,
        *_blocks(graph, path, weight, steps, bits),
        name=f"{path}.products",
        domain=RUNTIME_DOMAIN,
        K=weight.shape[1],
        N=len(weight),
        bits=bits,
        block_size=BLOCK,
        accuracy_level=_ROUNDS_INPUTS,
    )
    if bias is None or not bias.any():
        return product
    return graph("Add", product, graph.constant(f"{path}.bias", bias), name=f"{path}.products.biased")


def _blocks(graph: Graph, path: str, weight: Array, steps: Array, bits: int) -> tuple[str, str]:
    """Add codes in blocks, (rows, blocks, bytes), the first of two in the low bits, and a step for each block."""
    rows, columns = weight.shape
    blocks = -(-columns // BLOCK)
    codes = np.zeros((rows, blocks * BLOCK), dtype=np.int16)
    codes[:, :columns] = weight
    found: Array = (codes + (1 << (bits - 1))).astype(np.uint8).reshape(rows, blocks, BLOCK)
    if bits == _HALF_BYTE:
        found = found[..., ::2] | found[..., 1::2] << _HALF_BYTE
    groups = steps.astype(np.float32).reshape(rows, -1)
    scales = np.repeat(groups, blocks // groups.shape[1], axis=1).reshape(-1)
    return graph.constant(f"{path}.weight.blocks", found), graph.constant(f"{path}.weight.steps", scales)


def _by_row(graph: Graph, path: str, rows: Array, steps: str) -> str:
    """Add values from codes with one step and, as runtimes expect, one zero point for each row."""
    zeros = graph.constant(f"{rows.dtype.name}_zeros_{len(rows)}", np.zeros(len(rows), dtype=rows.dtype))
    return graph("DequantizeLinear", _stored(graph, path, rows), steps, zeros, name=path, axis=0)


def _values(graph: Graph, path: str, weight: Array, steps: Array) -> str:
    """Add the values of a matrix, stored as they are or as codes."""
    if weight.dtype == np.float32:
        return graph.constant(path, weight * steps[:, None])
    values = graph("Cast", _stored(graph, path, weight), name=f"{path}.floats", to=TensorProto.FLOAT)
    if steps.ndim == 1:
        return graph("Mul", values, graph.constant(f"{path}.steps", steps[:, None]), name=path)
    values = graph("Reshape", values, graph.integers(*steps.shape, -1), name=f"{path}.groups")
    values = graph("Mul", values, graph.constant(f"{path}.steps", steps[:, :, None]), name=f"{path}.scaled")
    return graph("Reshape", values, graph.integers(len(steps), -1), name=path)


def _stored(graph: Graph, path: str, weight: Array) -> str:
    """Add codes in as few bits as ONNX has for them, and return them in at least 8."""
    if not _fits_four_bits(weight):
        return graph.constant(f"{path}.codes", weight)
    packed = graph.constant(f"{path}.packed", weight.astype(int4))
    return graph("Cast", packed, name=f"{path}.codes", to=TensorProto.INT8)
