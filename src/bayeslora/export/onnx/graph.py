"""A small builder of ONNX graphs, whose tensors are named after the modules that they compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from bayeslora.errors import BayesLoraError

OPSET = 21
"""Version of the operators: the first with per-channel integer types that onnxruntime 1.20 runs, with `Gelu`."""

_LARGEST = (1 << 31) - (1 << 20)  # of a message that protobuf writes, less the rest of the file
_IR_VERSION = 10  # the file format of that time, so that older runtimes read it


RUNTIME_DOMAIN = "com.microsoft"
"""Domain of onnxruntime's own operators."""


@dataclass(frozen=True)
class Value:
    """An input or output of a graph.

    Attributes:
        name: of the tensor.
        kind: its element type, as `TensorProto` numbers them.
        axes: sizes, or names of those that are free.
    """

    name: str
    kind: int
    axes: Sequence[str | int]

    def described(self) -> onnx.ValueInfoProto:
        """Return its description in the file."""
        return helper.make_tensor_value_info(self.name, self.kind, list(self.axes))


class Graph:
    """Nodes and constants in the order in which they are added."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}

    def constant(self, name: str, value: NDArray[Any]) -> str:
        """Add a constant, unless one of this name is there, and return its name."""
        if name not in self._constants:
            self._constants[name] = numpy_helper.from_array(np.asarray(value, order="C"), name)
        return name

    def integers(self, *values: int) -> str:
        """Return the name of a constant vector of int64, such as a shape or axes."""
        return self.constant("int64_" + "_".join(map(str, values)), np.array(values, dtype=np.int64))

    def integer(self, value: int) -> str:
        """Return the name of a constant int64 scalar."""
        return self.constant(f"int64_scalar_{value}", np.array(value, dtype=np.int64))

    def number(self, value: float) -> str:
        """Return the name of a constant float32 scalar."""
        return self.constant(f"float_{np.float32(value)!s}", np.array(value, dtype=np.float32))

    def steps(self, name: str, values: NDArray[np.float32]) -> str:
        """Add steps of grids, stored in half precision if that loses nothing, and return their name."""
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if not np.array_equal(half.astype(np.float32), values):
            return self.constant(name, values)
        return self("Cast", self.constant(f"{name}.half", half), name=name, to=onnx.TensorProto.FLOAT)

    def __call__(self, operator: str, *inputs: str, name: str, **attributes: Any) -> str:
        """Add a node whose one output is called `name`, and return it."""
        return self.several(operator, *inputs, outputs=[name], **attributes)[0]

    def several(self, operator: str, *inputs: str, outputs: Sequence[str], **attributes: Any) -> Sequence[str]:
        """Add a node with several outputs."""
        # The output is named after the module; the same name again for each node would only make the file larger.
        name = f"{operator}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(operator, inputs, outputs, name=name, **attributes))
        return outputs

    def save(self, path: Path, name: str, inputs: Sequence[Value], outputs: Sequence[Value], note: str) -> None:
        """Write the checked model.

        Raises:
            BayesLoraError: it is larger than a file of this format can be.
        """
        graph = helper.make_graph(
            self._nodes,
            name,
            [each.described() for each in inputs],
            [each.described() for each in outputs],
            list(self._constants.values()),
        )
        domains = [helper.make_opsetid("", OPSET)]
        if any(node.domain == RUNTIME_DOMAIN for node in self._nodes):
            domains.append(helper.make_opsetid(RUNTIME_DOMAIN, 1))
        size = graph.ByteSize()
        if size > _LARGEST:
            raise BayesLoraError(
                f"the graph takes {size:,} bytes, but an ONNX file holds at most {_LARGEST:,}: export 'gguf' instead"
            )
        model = helper.make_model(
            graph, opset_imports=domains, ir_version=_IR_VERSION, producer_name="bayeslora", doc_string=note
        )
        onnx.checker.check_model(model)
        onnx.save(model, path)
