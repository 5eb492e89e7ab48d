r"""The two graphs of an encoder-decoder with its caches: T5 and mT5.

They compute what the model of Transformers computes in evaluation mode. Inputs and outputs are named as Optimum names
them. The encoder reads `input_ids` and `attention_mask` (batch, source) and returns `last_hidden_state` and, for each
block of the decoder, the keys and values of the text, `present.0.encoder.key` and `.value` (batch, heads, source,
size). The decoder reads `input_ids` (batch, length) behind the tokens whose keys and values it is given in
`past_key_values.0.decoder.key` and `.value`, of length 0 at first, with `past_key_values.0.encoder.key` and `.value`
and `encoder_attention_mask`. It returns `logits` and `present.0.decoder.key` and `.value`.

A score is $q k^\top + t_{k - q}$, without a scale. The bias $t$ of a distance is looked up in a table, because all
distances beyond `relative_attention_max_distance` share one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from onnx import TensorProto
from torch import Tensor, nn
from transformers import PreTrainedModel

from bayeslora.export.onnx.decoders import activated, by_head, by_row, check_activation, root_mean_square_norm
from bayeslora.export.onnx.encoders import HIDDEN, IDS, LOGITS, MASK
from bayeslora.export.onnx.graph import Graph, Value
from bayeslora.export.onnx.layers import Part, ProductLayers
from bayeslora.export.onnx.products import array

FAMILIES = ("MT5ForConditionalGeneration", "T5ForConditionalGeneration")
"""Architectures that can be written, by the name of their class in Transformers."""
SOURCE_MASK, STATES = "encoder_attention_mask", "last_hidden_state"
_WORDS, _HEAD = "shared", "lm_head"
_KINDS = ("key", "value")
_SELF, _CROSS = "SelfAttention", "EncDecAttention"


def is_encoder_decoder(model: nn.Module) -> bool:
    """Return whether the model is of an architecture in `FAMILIES`."""
    return type(model).__name__ in FAMILIES


def check_encoder_decoder(model: nn.Module) -> None:
    """Raise `BayesLoraError` for a setting that the graphs do not have."""
    check_activation(cast(Any, model).config.dense_act_fn)


class EncoderDecoder:
    """Writes a model into two graphs.

    Args:
        model: of an architecture in `FAMILIES`, with merged weights.
        layers: writes linear layers and the word embedding.
    """

    def __init__(self, model: PreTrainedModel, layers: ProductLayers) -> None:
        self.model, self.layers = model, layers
        self.config: Any = model.config
        self.heads, self.size = int(self.config.num_heads), int(self.config.d_kv)
        self.blocks = int(self.config.num_decoder_layers)

    @property
    def encoder_values(self) -> tuple[list[Value], list[Value]]:
        """Names, types and axes of the encoder's inputs and outputs."""
        inputs = [Value(name, TensorProto.INT64, ["batch", "source"]) for name in (IDS, MASK)]
        states = Value(STATES, TensorProto.FLOAT, ["batch", "source", int(self.config.d_model)])
        return inputs, [states, *self._caches("present", "encoder", "source")]

    @property
    def decoder_values(self) -> tuple[list[Value], list[Value]]:
        """Names, types and axes of the decoder's inputs and outputs."""
        ids = Value(IDS, TensorProto.INT64, ["batch", "length"])
        mask = Value(SOURCE_MASK, TensorProto.INT64, ["batch", "source"])
        past = [*self._caches("past_key_values", "decoder", "past")]
        read = self._caches("past_key_values", "encoder", "source")
        logits = Value(LOGITS, TensorProto.FLOAT, ["batch", "length", int(self.config.vocab_size)])
        return [mask, ids, *past, *read], [logits, *self._caches("present", "decoder", "total")]

    def _caches(self, name: str, side: str, length: str) -> list[Value]:
        names = [f"{name}.{block}.{side}.{kind}" for block in range(self.blocks) for kind in _KINDS]
        return [Value(each, TensorProto.FLOAT, ["batch", self.heads, length, self.size]) for each in names]

    def encoder(self) -> Graph:
        """Return the graph that reads a text."""
        stack = _Stack(self, "encoder")
        graph, zero = stack.graph, stack.number(0)
        length = graph("Shape", IDS, name="length", start=1, end=2)
        places = graph("Range", zero, graph("Squeeze", length, name="length.number"), stack.number(1), name="places")
        bias = graph("Add", stack.padding(MASK), stack.distances(places, places), name="attention.bias")
        x = stack.embedded()
        for number in range(int(self.config.num_layers)):
            x, _ = stack.self_attention(number, x, bias)
            x = stack.feed_forward(number, 1, x)
        x = stack.norm("encoder.final_layer_norm", x)
        sizes = graph("Concat", stack.shape, graph.integers(-1), name="states.sizes", axis=0)
        graph("Reshape", x, sizes, name=STATES)
        for block in range(self.blocks):
            path = f"decoder.block.{block}.layer.1.{_CROSS}"
            found = stack.projected(path, "kv", x)
            for kind, values in zip(_KINDS, found, strict=True):
                graph("Identity", values, name=f"present.{block}.encoder.{kind}")
        return graph

    def decoder(self) -> Graph:
        """Return the graph that writes the next tokens."""
        stack = _Stack(self, "decoder")
        graph, zero, one = stack.graph, stack.number(0), stack.number(1)
        past = graph("Shape", "past_key_values.0.decoder.key", name="past.length", start=2, end=3)
        length = graph("Shape", IDS, name="length", start=1, end=2)
        total = graph("Add", past, length, name="total.length")
        ends = [graph("Squeeze", each, name=f"{each}.number") for each in (past, total)]
        own = graph("Range", ends[0], ends[1], one, name="attention.own")
        seen = graph("Range", zero, ends[1], one, name="attention.seen")
        rows = graph("Unsqueeze", own, graph.integers(1), name="attention.rows")
        is_later = graph("Greater", seen, rows, name="attention.is_later")
        hidden = graph("Where", is_later, graph.number(HIDDEN), graph.number(0.0), name="attention.hidden")
        bias = graph("Add", hidden, stack.distances(own, seen), name="attention.bias")
        source = stack.padding(SOURCE_MASK)
        x = stack.embedded()
        for number in range(self.blocks):
            past_values = [f"past_key_values.{number}.decoder.{kind}" for kind in _KINDS]
            x, found = stack.self_attention(number, x, bias, past_values)
            assert found == [f"present.{number}.decoder.{kind}" for kind in _KINDS]
            x = stack.cross_attention(number, x, source)
            x = stack.feed_forward(number, 2, x)
        x = stack.norm("decoder.final_layer_norm", x)
        if getattr(self.config, "scale_decoder_outputs", False):
            x = graph("Mul", x, graph.number(self.config.d_model**-0.5), name="decoder.scaled")
        x = self.layers.linear(graph, _HEAD, x)
        sizes = graph("Concat", stack.shape, graph.integers(-1), name="logits.sizes", axis=0)
        graph("Reshape", x, sizes, name=LOGITS)
        return graph


class _Stack:
    """The encoder or the decoder in a graph of its own; `x` is always rows, a token each."""

    def __init__(self, owner: EncoderDecoder, root: str) -> None:
        self.owner, self.root, self.graph = owner, root, Graph()
        self.module: Any = owner.model.get_submodule(root)
        self.shape = self.graph("Shape", IDS, name="shape")
        self._sizes = self.graph("Concat", self.shape, self.graph.integers(-1, owner.size), name="sizes", axis=0)

    def number(self, value: int) -> str:
        """Return the name of a constant int64 scalar."""
        return self.graph.constant(f"int64_scalar_{value}", np.array(value))

    def embedded(self) -> str:
        """Return the embedded tokens."""
        x = self.owner.layers.embedding(self.graph, _WORDS, IDS)
        return self.graph("Reshape", x, self.graph.integers(-1, int(self.owner.config.d_model)), name="rows")

    def padding(self, mask: str) -> str:
        """Return what is added to the scores for a mask (batch, source): 0, or a large negative number."""
        graph = self.graph
        is_padding = graph("Equal", mask, self.number(0), name=f"{mask}.is_padding")
        is_padding = graph("Unsqueeze", is_padding, graph.integers(1, 2), name=f"{mask}.padding")
        return graph("Where", is_padding, graph.number(HIDDEN), graph.number(0.0), name=f"{mask}.bias")

    def distances(self, own: str, seen: str) -> str:
        """Return the learned bias of each distance, (heads, own, seen), of tokens at these places."""
        graph, furthest = self.graph, int(self.owner.config.relative_attention_max_distance)
        table = graph.constant(f"{self.root}.distances", _table(self.module.block[0].layer[0].SelfAttention, furthest))
        rows = graph("Unsqueeze", own, graph.integers(1), name="distances.rows")
        apart = graph("Sub", seen, rows, name="distances.apart")
        ends = (self.number(-furthest), self.number(furthest))
        apart = graph("Clip", apart, *ends, name="distances.clipped")
        columns = graph("Add", apart, self.number(furthest), name="distances.columns")
        return graph("Gather", table, columns, name="distances", axis=1)

    def norm(self, path: str, x: str) -> str:
        """Return the normalized rows."""
        module = cast(Any, self.owner.model.get_submodule(path))
        weight = self.graph.constant(f"{path}.weight", array(cast(Tensor, module.weight)))
        return root_mean_square_norm(self.graph, path, x, weight, float(module.variance_epsilon))

    def projected(self, path: str, names: str, x: str) -> list[str]:
        """Return the outputs of the layers with these names by head, (batch, heads, length, size)."""
        parts = [Part(f"{path}.{name}", share=self.owner.heads) for name in names]
        return self.owner.layers.linears(self.graph, f"{path}.{names}", parts, x, after=self._by_head)

    def self_attention(self, number: int, x: str, bias: str, past: Sequence[str] = ()) -> tuple[str, list[str]]:
        """Return the rows with the attention added, and its keys and values behind those of the past."""
        path = f"{self.root}.block.{number}.layer.0"
        q, *found = self.projected(f"{path}.{_SELF}", "qkv", self.norm(f"{path}.layer_norm", x))
        if past:
            found = [
                self.graph("Concat", before, new, name=before.replace("past_key_values", "present"), axis=2)
                for before, new in zip(past, found, strict=True)
            ]
        return self._attended(path, _SELF, x, q, found, bias), found

    def cross_attention(self, number: int, x: str, bias: str) -> str:
        """Return the rows with the attention to the text that was read added."""
        path = f"{self.root}.block.{number}.layer.1"
        (q,) = self.projected(f"{path}.{_CROSS}", "q", self.norm(f"{path}.layer_norm", x))
        found = [f"past_key_values.{number}.encoder.{kind}" for kind in _KINDS]
        return self._attended(path, _CROSS, x, q, found, bias)

    def feed_forward(self, number: int, place: int, x: str) -> str:
        """Return the rows with the feed-forward network added."""
        graph, layers, path = self.graph, self.owner.layers, f"{self.root}.block.{number}.layer.{place}"
        inner = f"{path}.DenseReluDense"
        names = ("wi_0", "wi_1") if self.owner.config.is_gated_act else ("wi",)
        parts = [Part(f"{inner}.{name}", share=layers.width(f"{inner}.{name}")) for name in names]
        found = layers.linears(graph, f"{inner}.inputs", parts, self.norm(f"{path}.layer_norm", x))
        hidden = activated(graph, self.owner.config.dense_act_fn, parts[0].path, found[0])
        if len(found) > 1:
            hidden = graph("Mul", hidden, found[1], name=f"{inner}.gated")
        return graph("Add", x, layers.linear(graph, f"{inner}.wo", hidden), name=f"{path}.output")

    def _attended(self, path: str, name: str, x: str, q: str, found: Sequence[str], bias: str) -> str:
        """Add softmax(q k^T + bias) v of every head, through the output layer, to the rows."""
        graph, owner, inner = self.graph, self.owner, f"{path}.{name}"
        k, v = found
        turned = graph("Transpose", k, name=f"{inner}.turned", perm=[0, 1, 3, 2])
        scores = graph("Add", graph("MatMul", q, turned, name=f"{inner}.products"), bias, name=f"{inner}.scores")
        mixed = graph("MatMul", graph("Softmax", scores, name=f"{inner}.shares", axis=-1), v, name=f"{inner}.mixed")
        rows = partial(by_row, graph, width=owner.heads * owner.size, path=inner)
        return graph("Add", x, owner.layers.linear(graph, f"{inner}.o", mixed, before=rows), name=f"{path}.attended")

    def _by_head(self, x: str, path: str) -> str:
        return by_head(self.graph, x, self._sizes, path)


@torch.no_grad()
def _table(attention: Any, furthest: int) -> np.ndarray[Any, Any]:
    """Return the bias of the distances -furthest to furthest, (heads, 2 furthest + 1)."""
    buckets = attention._relative_position_bucket(
        torch.arange(-furthest, furthest + 1),
        bidirectional=not attention.is_decoder,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=attention.relative_attention_max_distance,
    )
    return array(attention.relative_attention_bias(buckets).T)
