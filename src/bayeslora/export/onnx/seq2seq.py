"""The two graphs of an encoder-decoder with its caches: T5, mT5, BART, mBART and Pegasus.

They compute what the model of Transformers computes in evaluation mode. Inputs and outputs are named as Optimum names
them. The encoder reads `input_ids` and `attention_mask` (batch, source) and returns `last_hidden_state` and, for each
block of the decoder, the keys and values of the text, `present.0.encoder.key` and `.value` (batch, heads, source,
size). The decoder reads `input_ids` (batch, length) behind the tokens whose keys and values it is given in
`past_key_values.0.decoder.key` and `.value`, of length 0 at first, with `past_key_values.0.encoder.key` and `.value`
and `encoder_attention_mask`. It returns `logits` and `present.0.decoder.key` and `.value`.
"""

from __future__ import annotations

from typing import Any, cast

from onnx import TensorProto
from torch import nn
from transformers import PreTrainedModel

from bayeslora.errors import BayesLoraError
from bayeslora.export.onnx.decoders import check_activation, tokens_apart, tokens_before
from bayeslora.export.onnx.encoders import HIDDEN, IDS, LOGITS, MASK
from bayeslora.export.onnx.graph import Graph, Value
from bayeslora.export.onnx.layers import ProductLayers
from bayeslora.export.onnx.seq2seq_families import FAMILIES
from bayeslora.export.onnx.seq2seq_stack import KINDS

SOURCE_MASK, STATES = "encoder_attention_mask", "last_hidden_state"
_ROOTS = ("encoder", "decoder")


def is_encoder_decoder(model: nn.Module) -> bool:
    """Return whether the model is of an architecture in `FAMILIES`."""
    return type(model).__name__ in FAMILIES


def check_encoder_decoder(model: nn.Module) -> None:
    """Raise `BayesLoraError` for a setting that the graphs or the card's program do not have."""
    found, family = cast(Any, model), FAMILIES[type(model).__name__]
    check_activation(getattr(found.config, family.activation))
    words = found.get_input_embeddings().weight
    if any(found.get_submodule(f"{family.prefix}{root}.embed_tokens").weight is not words for root in _ROOTS):
        raise BayesLoraError(
            "the model's encoder and decoder have word embeddings of their own, but format 'onnx' is for one that "
            "they share: export 'merged' instead"
        )
    if start_token(model) is None:
        raise BayesLoraError(
            "the model's decoder_start_token_id is None, but an answer begins with it: set it in "
            "model.generation_config"
        )


def start_token(model: nn.Module) -> int | None:
    """Return the token with which `generate` begins an answer."""
    generation = cast(Any, model).generation_config
    start = generation.decoder_start_token_id
    return generation.bos_token_id if start is None else start


class EncoderDecoder:
    """Writes a model with merged weights into two graphs; `layers` writes linear layers and the word embedding."""

    def __init__(self, model: PreTrainedModel, layers: ProductLayers) -> None:
        self.model, self.layers = model, layers
        self.config: Any = model.config
        self.family = FAMILIES[type(model).__name__]
        self.blocks, self.heads, self.size = self.family.sizes(model.config, "decoder")

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
        names = [f"{name}.{block}.{side}.{kind}" for block in range(self.blocks) for kind in KINDS]
        return [Value(each, TensorProto.FLOAT, ["batch", self.heads, length, self.size]) for each in names]

    def encoder(self) -> Graph:
        """Return the graph that reads a text."""
        stack = self.family(self.model, self.layers, "encoder")
        graph = stack.graph
        length = graph("Shape", IDS, name="length", start=1, end=2)
        ends = graph.integer(0), graph("Squeeze", length, name="length.number"), graph.integer(1)
        places = graph("Range", *ends, name="places")
        bias = stack.biased(stack.padding(MASK), places, places)
        x = stack.embedded(places)
        for number in range(stack.count):
            x = stack.self_attention(number, x, bias)
            x = stack.feed_forward(number, x)
        x = stack.finished(x)
        tokens_apart(graph, x, STATES)
        for block in range(self.blocks):
            for kind, values in zip(KINDS, stack.read(block, x), strict=True):
                graph("Identity", values, name=f"present.{block}.encoder.{kind}")
        return graph

    def decoder(self) -> Graph:
        """Return the graph that writes the next tokens."""
        stack = self.family(self.model, self.layers, "decoder")
        graph = stack.graph
        own, seen, is_later = tokens_before(graph, "past_key_values.0.decoder.key")
        hidden = graph("Where", is_later, graph.number(HIDDEN), graph.number(0.0), name="attention.hidden")
        bias, source = stack.biased(hidden, own, seen), stack.padding(SOURCE_MASK)
        x = stack.embedded(own)
        for number in range(self.blocks):
            x = stack.self_attention(number, x, bias, [f"past_key_values.{number}.decoder.{kind}" for kind in KINDS])
            x = stack.cross_attention(number, x, source)
            x = stack.feed_forward(number, x)
        tokens_apart(graph, stack.scored(stack.finished(x)), LOGITS)
        return graph
