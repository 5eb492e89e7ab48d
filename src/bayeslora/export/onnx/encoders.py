r"""The graph of an encoder with a classifier: BERT, RoBERTa and DistilBERT.

The graph computes what the model of Transformers computes in evaluation mode, without what has no effect on it:

- Padding is left out. Tokens are rows of matrices (tokens, width), on which every linear layer is one `Gemm`. Only the
  products of the attention put them back in their places, (batch, length).
- Only the first token reaches the classifier, so the last block computes its queries, and all that follows them, for
  the first token only.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import TensorProto
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bayeslora.errors import BayesLoraError
from bayeslora.export.onnx.graph import Graph, Value
from bayeslora.export.onnx.layers import NamedMove, Part, ProductLayers
from bayeslora.export.onnx.products import array, rounded_rows
from bayeslora.runtime.encoders import FAMILIES

IDS, MASK, TYPES = "input_ids", "attention_mask", "token_type_ids"
LOGITS = "logits"

ACTIVATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "gelu": ("Gelu", {}),
    "gelu_new": ("Gelu", {"approximate": "tanh"}),
    "gelu_pytorch_tanh": ("Gelu", {"approximate": "tanh"}),
    "relu": ("Relu", {}),
}
HIDDEN = -1e30
"""Added to the scores of tokens that are given no weight; the exponential is 0 in float32."""
_REPEATED = -40.0
"""Added instead if a token repeats a visible one, whose weight it would have: e^-40 of that is lost in rounding.

The exponential of a lower number is not a normal float32, and processors take many times as long for those.
"""


def check_encoder(model: nn.Module) -> None:
    """Raise `BayesLoraError` for an activation or attention that the graph does not have."""
    config = cast(Any, model).config
    activation = _activation_name(config)
    if activation not in ACTIVATIONS:
        raise refused("activation", activation, sorted(ACTIVATIONS))
    if getattr(config, "is_decoder", False):
        raise BayesLoraError(
            "the model's attention sees only earlier tokens, but format 'onnx' is for BERT as an encoder: "
            "export 'merged' instead"
        )


def refused(what: str, given: str, known: Sequence[str]) -> BayesLoraError:
    """Return the error for a setting that the graph does not have."""
    return BayesLoraError(
        f"the model's {what} is {given!r}, but format 'onnx' is for {', '.join(known)}: export 'merged' instead"
    )


def input_names(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the names of the inputs: ids, mask, and token types if tokenizer and encoder distinguish them."""
    family = FAMILIES.get(type(model).__name__)
    if family is None:
        return [IDS, MASK]
    embeddings: Any = model.get_submodule(f"{family.encoder}.embeddings")
    types = getattr(embeddings, "token_type_embeddings", None)
    has_types = types is not None and types.num_embeddings > 1 and TYPES in tokenizer.model_input_names
    return [IDS, MASK, TYPES] if has_types else [IDS, MASK]


def _activation_name(config: Any) -> str:
    return str(config.activation if config.model_type == "distilbert" else config.hidden_act)


def normalized(graph: Graph, model: nn.Module, path: str, x: str) -> str:
    """Add the norm at `path` over the last axis, a `LayerNorm` or x / sqrt(mean(x^2) + epsilon) times the weight."""
    module: Any = model.get_submodule(path)
    weight = graph.constant(f"{path}.weight", array(module.weight))
    if isinstance(module, nn.LayerNorm):
        bias = graph.constant(f"{path}.bias", array(module.bias))
        return graph("LayerNormalization", x, weight, bias, name=path, axis=-1, epsilon=float(module.eps))
    squares = graph("Pow", x, graph.number(2.0), name=f"{path}.squares")
    mean = graph("ReduceMean", squares, graph.integers(-1), name=f"{path}.mean", keepdims=1)
    positive = graph("Add", mean, graph.number(float(module.variance_epsilon)), name=f"{path}.positive")
    root = graph("Sqrt", positive, name=f"{path}.root")
    return graph("Mul", graph("Div", x, root, name=f"{path}.scaled"), weight, name=path)


class Encoder:
    """Writes a model with merged weights into a graph, whose inputs are `names`.

    `layers` writes linear layers and the word embedding.
    """

    def __init__(self, model: PreTrainedModel, layers: ProductLayers, names: Sequence[str]) -> None:
        self.model, self.layers, self.names = model, layers, names
        self.config: Any = model.config
        self.family = FAMILIES[type(model).__name__]
        self.width = int(self.config.hidden_size)
        self.heads = int(self.config.num_attention_heads)
        self.graph = Graph()
        self._norm = partial(normalized, self.graph, model)

    @property
    def inputs(self) -> list[Value]:
        """Names, types and axes of the graph's inputs."""
        return [Value(name, TensorProto.INT64, ["batch", "length"]) for name in self.names]

    @property
    def outputs(self) -> list[Value]:
        """Name, type and axes of the graph's output."""
        return [Value(LOGITS, TensorProto.FLOAT, ["batch", int(self.config.num_labels)])]

    def write(self) -> Graph:
        """Return the graph, from the inputs to the output `logits` (batch, labels)."""
        graph, family = self.graph, self.family
        self._shape = graph("Shape", IDS, name="shape")
        self._sizes = graph("Concat", self._shape, graph.integers(-1, self.width // self.heads), name="sizes", axis=0)
        self._find_tokens()
        x, bias = self._embeddings(), self._attention_bias()
        blocks = cast(nn.ModuleList, self.model.get_submodule(f"{family.encoder}.{family.blocks}"))
        for number in range(len(blocks)):
            x = self._block(f"{family.encoder}.{family.blocks}.{number}", x, bias, is_last=number == len(blocks) - 1)
        for path, activation in family.head:
            x = self.layers.linear(graph, path, x)
            x = graph(activation, x, name=f"{path}.{activation.lower()}") if activation else x
        graph("Identity", x, name=LOGITS)
        return graph

    def _embeddings(self) -> str:
        """Return the embedded tokens as rows."""
        graph, path = self.graph, f"{self.family.encoder}.embeddings"
        words = self.layers.embedding(graph, f"{path}.word_embeddings", IDS)
        module: Any = self.model.get_submodule(path)
        positions = array(module.position_embeddings.weight)
        types = array(module.token_type_embeddings.weight) if hasattr(module, "token_type_embeddings") else None
        if types is not None and TYPES not in self.names:
            positions = positions + types[0]  # without the input every token is of the first type
        x = graph("Add", words, self._positions(path, positions), name=f"{path}.positioned")
        if types is not None and TYPES in self.names:
            table = graph.constant(f"{path}.token_type_embeddings.weight", types)
            typed = graph("Gather", table, TYPES, name=f"{path}.token_type_embeddings")
            x = graph("Add", x, typed, name=f"{path}.typed")
        return self._norm(f"{path}.LayerNorm", self._rows(f"{path}.rows", x))

    def _find_tokens(self) -> None:
        """Add the indices of the tokens that are not padding, and for each place (batch, length) that of its row.

        A first token is always among them, because the classifier reads it. Padding gets the row of a token before it,
        to which the attention gives no weight.
        """
        graph = self.graph
        one = graph.integer(1)
        start, end, axis = graph.integers(1), graph.integers(np.iinfo(np.int64).max), graph.integers(1)
        later = graph("Slice", MASK, start, end, axis, name="tokens.later")
        first = graph("Slice", MASK, graph.integers(0), start, axis, name="tokens.first")
        first = graph("Add", graph("Sub", first, first, name="tokens.zeros"), one, name="tokens.ones")
        flat = graph("Concat", first, later, name="tokens.mask", axis=1)
        flat = graph("Reshape", flat, graph.integers(-1), name="tokens.flat")
        kept = graph("NonZero", flat, name="tokens.found")
        self._kept = graph("Reshape", kept, graph.integers(-1), name="tokens.kept")
        counted = graph("CumSum", flat, graph.integer(0), name="tokens.counted")
        rows = graph("Sub", counted, one, name="tokens.rows")
        self._places = graph("Reshape", rows, self._shape, name="tokens.places")

    def _rows(self, path: str, x: str) -> str:
        """Return the tokens of (batch, length, …) as rows (tokens, width)."""
        flat = self.graph("Reshape", x, self.graph.integers(-1, self.width), name=f"{path}.flat")
        return self.graph("Gather", flat, self._kept, name=path, axis=0)

    def _positions(self, path: str, values: NDArray[np.float32]) -> str:
        """Return the position embeddings, (1 or batch, length, width); stored as the word embedding is."""
        graph, name = self.graph, f"{path}.position_embeddings"
        rows = self._position_rows(path)
        if not isinstance(self.layers.embeddings[f"{path}.word_embeddings"], tuple):
            return rows(graph.constant(f"{name}.weight", values), name)
        codes, steps = rounded_rows(torch.from_numpy(values))
        found = rows(graph.constant(f"{name}.codes", codes), f"{name}.rows")
        found = graph("Cast", found, name=f"{name}.values", to=TensorProto.FLOAT)
        scales = rows(graph.steps(f"{name}.steps", steps.reshape(-1, 1)), f"{name}.scales")
        return graph("Mul", found, scales, name=name)

    def _position_rows(self, path: str) -> NamedMove:
        """Return what adds the rows of a table for the tokens' positions, under a name."""
        graph = self.graph
        if self.family.counts_padding:
            length = graph("Shape", IDS, name=f"{path}.length", start=1, end=2)
            return lambda table, name: graph("Slice", table, graph.integers(0), length, graph.integers(0), name=name)
        padding = graph.integer(self.config.pad_token_id)
        is_token = graph("Not", graph("Equal", IDS, padding, name=f"{path}.is_padding"), name=f"{path}.is_token")
        is_token = graph("Cast", is_token, name=f"{path}.tokens", to=TensorProto.INT64)
        counted = graph("CumSum", is_token, graph.integer(1), name=f"{path}.counted")
        numbers = graph("Mul", counted, is_token, name=f"{path}.numbers")
        ids = graph("Add", numbers, padding, name=f"{path}.position_ids")
        return lambda table, name: graph("Gather", table, ids, name=name)

    def _attention_bias(self) -> str:
        """Return what is added to the scores, (batch, 1, 1, length): 0, or a negative number for padding.

        Padding has the row of a token before it; the first token may be hidden itself.
        """
        graph = self.graph
        hidden = graph("Equal", MASK, graph.integer(0), name="attention.is_hidden")
        start, end = graph.integers(0), graph.integers(1)
        is_first = graph("Slice", hidden, start, end, end, name="attention.first_is_hidden")
        least = graph("Where", is_first, graph.number(HIDDEN), graph.number(_REPEATED), name="attention.least")
        added = graph("Where", hidden, least, graph.number(0.0), name="attention.added")
        return graph("Unsqueeze", added, graph.integers(1, 2), name="attention.bias")

    def _block(self, path: str, x: str, bias: str, *, is_last: bool) -> str:
        graph, family = self.graph, self.family
        first = self._first_tokens(f"{path}.first", x) if is_last else x
        attended = self._attention(path, x, first, bias)
        first_norm, second_norm = (f"{path}.{name}" for name in family.norms)
        x = self._norm(first_norm, graph("Add", attended, first, name=f"{first_norm}.sum"))
        inner, outer = (f"{path}.{name}" for name in family.feed_forward)
        operator, attributes = ACTIVATIONS[_activation_name(self.config)]
        hidden = graph(operator, self.layers.linear(graph, inner, x), name=f"{inner}.activation", **attributes)
        x = graph("Add", self.layers.linear(graph, outer, hidden), x, name=f"{second_norm}.sum")
        return self._norm(second_norm, x)

    def _first_tokens(self, path: str, x: str) -> str:
        """Return the rows of the first tokens, (batch, width)."""
        places = self.graph("Gather", self._places, self.graph.integer(0), name=f"{path}.places", axis=1)
        return self.graph("Gather", x, places, name=path, axis=0)

    def _attention(self, path: str, x: str, queries_of: str, bias: str) -> str:
        """Return softmax(q k^T / sqrt(d)) v of every head, through the output layer."""
        graph, size = self.graph, self.width // self.heads
        query, key, value, output = (f"{path}.{name}" for name in self.family.attention)
        is_first = queries_of != x
        turned = partial(graph, "Transpose", name=f"{key}.turned", perm=[0, 1, 3, 2])
        q_part = Part(query, size**-0.5, self.heads)
        parts = [Part(key, share=self.heads, turn=turned), Part(value, share=self.heads)]
        if is_first:
            of_first = partial(self._by_head, sizes=graph.integers(-1, 1, self.heads, size))
            (q,) = self.layers.linears(graph, query, [q_part], queries_of, after=of_first)
            k, v = self.layers.linears(graph, f"{path}.projections", parts, x, after=self._by_head)
        else:
            q, k, v = self.layers.linears(graph, f"{path}.projections", [q_part, *parts], x, after=self._by_head)
        path = f"{path}.attention"
        scores = graph("Add", graph("MatMul", q, k, name=f"{path}.products"), bias, name=f"{path}.scores")
        shares = graph("Softmax", scores, name=f"{path}.shares", axis=-1)
        mixed = graph("MatMul", shares, v, name=f"{path}.mixed")

        def by_row(heads: str) -> str:
            tokens = graph("Transpose", heads, name=f"{path}.by_token", perm=[0, 2, 1, 3])
            if is_first:
                return graph("Reshape", tokens, graph.integers(-1, self.width), name=f"{path}.rows")
            return self._rows(f"{path}.rows", tokens)

        return self.layers.linear(graph, output, mixed, before=by_row)

    def _by_head(self, x: str, path: str, sizes: str | None = None) -> str:
        """Return rows in their places as (batch, heads, length, size), or with other sizes."""
        if sizes is None:
            x, sizes = self.graph("Gather", x, self._places, name=f"{path}.places", axis=0), self._sizes
        split = self.graph("Reshape", x, sizes, name=f"{path}.split")
        return self.graph("Transpose", split, name=f"{path}.by_head", perm=[0, 2, 1, 3])
