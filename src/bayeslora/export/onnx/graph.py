"""A small builder of ONNX graphs, whose nodes and tensors are named after the modules that they compute."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

OPSET = 21
"""Version of the operators: the first with per-channel integer types that onnxruntime 1.20 runs, with `Gelu`."""

_IR_VERSION = 10  # the file format of that time, so that older runtimes read it


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

    def number(self, value: float) -> str:
        """Return the name of a constant float32 scalar."""
        return self.constant(f"float_{np.float32(value)!s}", np.array(value, dtype=np.float32))

    def __call__(self, operator: str, *inputs: str, name: str, **attributes: Any) -> str:
        """Add a node called `name` with one output of the same name, and return it."""
        return self.several(operator, *inputs, name=name, outputs=[name], **attributes)[0]

    def several(
        self, operator: str, *inputs: str, name: str, outputs: Sequence[str], **attributes: Any
    ) -> Sequence[str]:
        """Add a node with several outputs."""
        self._nodes.append(helper.make_node(operator, inputs, outputs, name=name, **attributes))
        return outputs

    def save(self, path: Path, name: str, inputs: Sequence[str], output: str, labels: int, note: str) -> None:
        """Write the checked model; inputs are int64 (batch, length), and the output is float32 (batch, labels)."""
        batch, length = "batch", "length"
        graph = helper.make_graph(
            self._nodes,
            name,
            [helper.make_tensor_value_info(each, TensorProto.INT64, [batch, length]) for each in inputs],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, [batch, labels])],
            list(self._constants.values()),
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=_IR_VERSION,
            producer_name="bayeslora",
            doc_string=note,
        )
        onnx.checker.check_model(model)
        onnx.save(model, path)
